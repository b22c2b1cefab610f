"""Where each artifact of a configuration lies: the fingerprint of what makes it.

    dataset    data section, seed, digests of the input files, tokenizer
    backbone   trained here: its recipe, the dataset, the seed; otherwise the digest of the model's files
    store      its encoding (backbone, pooled_length, what shapes the bytes of a shard), the pool's digest
    retriever  store, the questions' digest, the retriever section, the seed
    vectors    of a dense baseline: its model and how it reads a passage, the pool's digest
    results    retriever, store, the questions' digest, the evaluate section

A step's fingerprint holds the digests its predecessor's manifest states, so a later one is known once the earlier is made:
until then these functions raise UserError naming what is missing.
"""

from __future__ import annotations

from intra import storage
from intra.artifact import Artifact, fingerprint
from intra.backbone import locate
from intra.baselines import models
from intra.config import Config
from intra.data import sources
from intra.store.format import FORMAT

VERSION = 1  # of the artifacts' formats; raise it when the bytes of any of them change meaning


def _artifact(config: Config, kind: str, made_by: str, parts: dict[str, object]) -> Artifact:
    mark = fingerprint({"version": VERSION, "kind": kind, **parts})
    return Artifact(kind, storage.join(storage.absolute(config.root), kind, mark), mark, made_by)


def from_scratch(config: Config) -> bool:
    return config.backbone.train and config.backbone.initial == "scratch"


def dataset(config: Config) -> Artifact:
    architecture = config.backbone.architecture
    tokenizer: object = (
        {"scratch": architecture.tokenizer, "vocabulary": architecture.vocabulary}
        if from_scratch(config)
        else locate.tokenizer_digest(config.backbone.model, config.backbone.revision)
    )
    return _artifact(
        config,
        "dataset",
        "prepare",
        {"data": sources.identity(config.data), "inputs": sources.digests(config.data), "tokenizer": tokenizer, "seed": config.seed},
    )


def backbone(config: Config) -> Artifact:
    if not config.backbone.train:
        mark = locate.digest(config.backbone.model, config.backbone.revision)
        return Artifact("backbone", str(locate.resolve(config.backbone.model, config.backbone.revision)), mark, "warmstart")
    source = dataset(config)
    recipe = config.backbone.warmstart.model_dump(exclude={"checkpoint_every", "workers"})
    start: object = (
        config.backbone.architecture.model_dump()
        if from_scratch(config)
        else locate.digest(config.backbone.model, config.backbone.revision)
    )
    return _artifact(
        config,
        "backbone",
        "warmstart",
        {"dataset": source.fingerprint, "recipe": recipe, "start": start, "prompt": config.backbone.prompt, "dtype": config.backbone.dtype,
         "seed": config.seed},
    )  # fmt: skip


def encoding(config: Config) -> str:
    """The fingerprint of all that shapes a store's bytes except the pool: stores that share it may share shards."""
    shape = config.store.model_dump(include={"dtype", "shard_chunks", "batch_tokens", "threads"})
    return fingerprint(
        {"format": FORMAT, "backbone": backbone(config).fingerprint, "compute": config.backbone.dtype, "template": config.data.template,
         "pooled_length": config.retriever.pooled_length, "shape": shape}
    )  # fmt: skip


def store(config: Config) -> Artifact:
    return _artifact(config, "store", "encode", {"encoding": encoding(config), "pool": dataset(config).manifest()["pool_sha256"]})


def retriever(config: Config) -> Artifact:
    settings = config.retriever.model_dump(exclude={"query_batch": True, "tile_chunks": True, "answer_size": True, "answer_initial": True,
                                                    "train": {"checkpoint_every", "workers", "gpus_per_worker"}})  # fmt: skip
    return _artifact(
        config,
        "retriever",
        "train",
        {"store": store(config).fingerprint, "questions": dataset(config).manifest()["questions_sha256"], "settings": settings,
         "prompt": config.backbone.prompt, "seed": config.seed},
    )  # fmt: skip


def vectors(config: Config, name: str) -> Artifact:
    """The pool as the dense baseline `name` encodes it."""
    settings = config.evaluate.models[name]
    return _artifact(
        config,
        "vectors",
        "evaluate",
        {"model": models.digest(name, settings), "settings": settings.model_dump(exclude={"model", "revision", "query_prompt"}),
         "pool": dataset(config).manifest()["pool_sha256"], "shard_chunks": config.evaluate.shard_chunks},
    )  # fmt: skip


def results(config: Config) -> Artifact:
    return _artifact(
        config,
        "results",
        "evaluate",
        {"store": store(config).fingerprint, "questions": dataset(config).manifest()["questions_sha256"],
         "retriever": retriever(config).fingerprint, "answer": [config.retriever.answer_size, config.retriever.answer_initial],
         "prompt": config.backbone.prompt, "answer_tokens": config.backbone.answer_tokens,
         "evaluate": config.evaluate.model_dump(exclude={"answer_batch", "threads", "device"}), "seed": config.seed},
    )  # fmt: skip
