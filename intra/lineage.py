"""Where each artifact of a configuration lies: the fingerprint of what makes it.

    dataset    data section, seed, digests of the input files, tokenizer
    encoder    a frozen encoder, whitened by a sample of the pool: it encodes the store, whatever decoder is trained over it
    backbone   trained here: its recipe, the dataset, the seed, the encoding of a frozen encoder; otherwise the digest of the model's files
    store      its encoding (backbone, or a frozen encoder, pooled_length, what shapes the bytes of a shard), the pool's digest
    retriever  store, the weights of a backbone trained here, the questions' digest, the retriever section, the seed
    tuned      of a fine-tuned baseline: its model, the questions, the negatives, the recipe
    vectors    of a dense or late baseline: its weights, how it reads a passage, the pool's digest
    ranking    of a method: pool, questions, depth, and what the method is made of (vectors, retriever, other rankings, settings)
    answers    the ranking, the store, the weights of a backbone trained here, the prompt
    results    rankings and answers of the methods, the metrics' settings, the values they are judged against

A step's fingerprint holds the digests its predecessor's manifest states, so a later one is known once the earlier is made:
until then these functions raise UserError naming what is missing.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

from intra import storage
from intra.artifact import Artifact, fingerprint
from intra.backbone import locate
from intra.baselines import models
from intra.config import Config
from intra.data import sources
from intra.errors import UserError
from intra.evaluate_config import DenseConfig, FusionConfig, ModelConfig, RerankConfig
from intra.evaluation import expectations
from intra.store.format import FORMAT

EXACT = ("exact", "head_space", "reverse")  # retriever.search.scorer: these rank alike in float32
SCANS = 3  # of the rule by which int8, cascade and auto rank; raise it when they rank otherwise
VERSION = 1  # of the artifacts' formats; raise it when the bytes of any of them change meaning
# The workflow; of others, evaluate.
MADE_BY = {"dataset": "prepare", "encoder": "encode", "backbone": "warmstart", "store": "encode", "retriever": "train"}


def _artifact(config: Config, kind: str, **parts: object) -> Artifact:
    mark = fingerprint({"version": VERSION, "kind": kind, **parts})
    return Artifact(kind, storage.join(storage.absolute(config.root), kind, mark), mark, MADE_BY.get(kind, "evaluate"))


def from_scratch(config: Config) -> bool:
    return config.backbone.train and config.backbone.initial == "scratch"


def dataset(config: Config) -> Artifact:
    return _artifact(
        config,
        "dataset",
        data=sources.identity(config.data),
        inputs=sources.digests(config.data),
        tokenizer=_tokenizer(config),
        seed=config.seed,
    )


def _tokenizer(config: Config) -> object:
    architecture = config.backbone.architecture
    if not from_scratch(config):
        return locate.tokenizer_digest(config.backbone.model, config.backbone.revision)
    if architecture.encoder is not None:
        return locate.encoder_digest(architecture.encoder, locate.TOKENIZER_FILES)
    return {"scratch": architecture.tokenizer, "vocabulary": architecture.vocabulary}


def backbone(config: Config) -> Artifact:
    if not config.backbone.train:
        mark = locate.digest(config.backbone.model, config.backbone.revision)
        return Artifact("backbone", str(locate.resolve(config.backbone.model, config.backbone.revision)), mark, "warmstart")
    source = dataset(config)
    recipe = config.backbone.warmstart.model_dump(exclude={"checkpoint_every", "workers", "gpus_per_worker"})
    start: object = _architecture(config) if from_scratch(config) else locate.digest(config.backbone.model, config.backbone.revision)
    return _artifact(
        config,
        "backbone",
        dataset=source.fingerprint,
        recipe=recipe,
        start=start,
        prompt=config.backbone.prompt,
        dtype=config.backbone.dtype,
        seed=config.seed,
        **({"states": encoding(config)} if over_encoder(config) else {}),
    )


def _architecture(config: Config) -> object:
    size = config.backbone.architecture
    if size.encoder is None:
        return size.model_dump(exclude={"encoder", "encoder_sample", "matching_heads"})
    return [size.model_dump(exclude={"encoder", "vocabulary", "tokenizer", "encoder_layers"}), locate.encoder_digest(size.encoder)]


def over_encoder(config: Config) -> bool:
    """Whether the backbone is trained here over a frozen encoder: its store is that of any decoder over it."""
    return from_scratch(config) and config.backbone.architecture.encoder is not None


def encoder(config: Config) -> str:
    """What stands for the encoder in a store: the backbone, or, frozen, itself and what whitens it, whatever decoder is trained over it."""
    size = config.backbone.architecture
    if not over_encoder(config) or size.encoder is None:
        return backbone(config).fingerprint
    sample = {"pool": dataset(config).manifest()["pool_sha256"], "template": config.data.template, "count": size.encoder_sample,
              "seed": config.seed, "threads": config.backbone.warmstart.threads}  # fmt: skip
    return fingerprint({"version": VERSION, "encoder": locate.encoder_digest(size.encoder), "sample": sample})


def whitened(config: Config) -> Artifact:
    """The frozen encoder, whitened: a model directory (intra.backbone.whitened)."""
    return _artifact(config, "encoder", encoder=encoder(config))


def model(config: Config) -> tuple[str, str | None]:
    """The directory, or the hub's name and revision, of the model that encodes."""
    if not config.backbone.train:
        return config.backbone.model, config.backbone.revision
    return (whitened(config) if over_encoder(config) else backbone(config)).url, None


def _decoder(config: Config) -> dict[str, str]:
    """The weights of a backbone trained here, as its manifest states them, for what is made with its decoder.

    Its fingerprint is its recipe's, and so is the store's: trained again, on another machine perhaps, it may have other weights. Any other
    backbone's digest is in the store's fingerprint.
    """
    if not config.backbone.train:
        return {}
    digests = backbone(config).manifest()["sha256"]
    return {"decoder": locate.digest_of((name, 0, digests[name]) for name in sorted(digests))}


def weights_digest(config: Config) -> str:
    """locate.digest of the model that encodes: of one trained here as its manifest states it, without reading the weights."""
    trained = backbone(config)
    if not config.backbone.train or over_encoder(config):
        return locate.digest(*model(config))
    sizes, digests = storage.sizes(trained.url), trained.manifest()["sha256"]
    return locate.digest_of((name, sizes.get(name, -1), digests[name]) for name in digests)


def check_store(config: Config) -> None:
    """Raises UserError where the store holds another backbone's states: this one was trained again after it was encoded."""
    encoded = store(config)
    found, wanted = encoded.manifest()["backbone"], weights_digest(config)
    if found != wanted:
        raise UserError(f"store {encoded.url}: its states are of a backbone of digest {found[:16]}, but {model(config)[0]} has "
                        f"{wanted[:16]}: it was made again since; delete the store and run workflows/encode.py")  # fmt: skip


def encoding(config: Config) -> str:
    """The fingerprint of all that shapes a store's bytes except the pool: stores that share it may share shards."""
    shape = config.store.model_dump(include={"dtype", "shard_chunks", "batch_tokens", "threads"})
    return fingerprint(
        {"format": FORMAT, "backbone": encoder(config), "compute": config.backbone.dtype, "template": config.data.template,
         "pooled_length": config.retriever.pooled_length, "shape": shape}
    )  # fmt: skip


def store(config: Config) -> Artifact:
    return _artifact(
        config,
        "store",
        encoding=encoding(config),
        pool=dataset(config).manifest()["pool_sha256"],
    )


def retriever(config: Config) -> Artifact:
    asked = {"query_batch": True, "tile_chunks": True, "search": True, "answer_size": True, "answer_initial": True}
    settings = config.retriever.model_dump(exclude={**asked, "train": {"checkpoint_every", "workers", "gpus_per_worker"}})
    return _artifact(
        config,
        "retriever",
        store=store(config).fingerprint,
        questions=dataset(config).manifest()["questions_sha256"],
        settings=settings,
        prompt=config.backbone.prompt,
        seed=config.seed,
        **_decoder(config),
    )


def tuned(config: Config, name: str) -> Artifact:
    """The weights of the bi-encoder `name`, fine-tuned in this run."""
    settings = dense(config, name)
    facts, recipe = dataset(config).manifest(), config.retriever.train
    mined = [store(config).fingerprint, config.retriever.initial_scoring, recipe.hard_negatives, recipe.bm25_negatives, recipe.bm25_skip]
    return _artifact(
        config,
        "tuned",
        model=models.digest(name, settings),
        settings=settings.model_dump(
            exclude={
                "model": True,
                "revision": True,
                "batch_size": True,
                "ivf": True,
                "tune": {"checkpoint_every", "gradient_checkpointing"},
            }
        ),
        questions=facts["questions_sha256"],
        pool=facts["pool_sha256"],
        negatives=mined,
        seed=config.seed,
    )


def dense(config: Config, name: str) -> DenseConfig:
    settings = config.evaluate.models[name]
    assert isinstance(settings, DenseConfig)
    return settings


def weights(config: Config, name: str) -> str:
    """What stands for a baseline's weights in a fingerprint."""
    settings = config.evaluate.models[name]
    assert isinstance(settings, ModelConfig)
    if isinstance(settings, DenseConfig) and settings.tune is not None:
        return tuned(config, name).fingerprint
    return models.digest(name, settings)


class Marks:
    """What the fingerprints of all methods share, looked up once: each look reads manifests, on S3 perhaps."""

    def __init__(self, config: Config) -> None:
        self._config = config

    @cached_property
    def facts(self) -> dict[str, Any]:
        return dataset(self._config).manifest()

    @cached_property
    def store(self) -> str:
        return store(self._config).fingerprint

    @cached_property
    def retriever(self) -> str:
        return retriever(self._config).fingerprint

    @cached_property
    def decoder(self) -> dict[str, str]:
        return _decoder(self._config)


def vectors(config: Config, name: str, marks: Marks | None = None) -> Artifact:
    """The pool as the dense or late baseline `name` encodes it."""
    settings, facts = config.evaluate.models[name], (marks or Marks(config)).facts
    assert isinstance(settings, ModelConfig)
    return _artifact(
        config,
        "vectors",
        weights=weights(config, name),
        pool=facts["pool_sha256"],
        shard_chunks=config.evaluate.shard_chunks,
        settings=settings.model_dump(exclude={"model", "revision", "query_prompt", "query_length", "tune", "ivf"}),
        **({} if settings.dtype == "float32" else {"normalised_in": "float32"}),
    )


def ranking(config: Config, name: str, marks: Marks | None = None) -> Artifact:
    """A method's ranking of the test questions."""
    marks = marks or Marks(config)
    return _artifact(
        config,
        "ranking",
        method=name,
        pool=marks.facts["pool_sha256"],
        questions=marks.facts["questions_sha256"],
        depth=config.evaluate.depths()[name],
        made_of=_made_of(config, name, marks),
    )


def _made_of(config: Config, name: str, marks: Marks) -> object:
    model = config.evaluate.models.get(name)
    if isinstance(model, FusionConfig):
        ranks: list[object] = [{"zeros": "no rank"}] if any(map(config.evaluate.fills, model.of)) else []
        return [model.model_dump(), [ranking(config, part, marks).fingerprint for part in model.of], *ranks]
    if isinstance(model, RerankConfig):
        by = config.evaluate.models[model.by]
        scorer = [weights(config, model.by), by.model_dump(exclude={"model", "revision", "tune", "ivf"})]
        return [model.model_dump(), ranking(config, model.of, marks).fingerprint, scorer]
    if model is not None:
        asked = model.model_dump(include={"query_prompt", "query_length", "ivf"}, exclude_none=True)
        return [vectors(config, name, marks).fingerprint, asked]
    if name == "maxsim":
        # By the question's encoder states: of a frozen encoder, which the store names, or of the backbone trained here.
        own = [] if over_encoder(config) or not config.backbone.train else [marks.decoder]
        return [marks.store, config.retriever.initial_scoring, *own]
    if name in ("intra", "s0_reranked"):
        answer = [config.retriever.answer_size, config.retriever.answer_initial] if name == "intra" else []
        search = config.retriever.search
        made_of: list[object] = [marks.store, marks.retriever, config.backbone.prompt, answer]
        if search.scorer not in EXACT:
            made_of += [search.scorer, search.candidates, search.recall, search.heads]
            made_of += [] if search.scorer == "paper" else [{"scans": SCANS}]
            made_of += [search.coarse_candidates] if search.scorer in ("cascade", "auto") else []
        elif config.backbone.dtype != "float32":
            made_of.append(search.scorer)
        return [*made_of, {"rescore": search.rescore}] if search.rescore else made_of
    return [config.evaluate.bm25.model_dump()] if name == "bm25" else [config.seed] if name in ("random", "oracle") else []


def answers(config: Config, name: str, marks: Marks | None = None) -> Artifact:
    """The answers read from a method's first chunks."""
    marks = marks or Marks(config)
    return _artifact(
        config,
        "answers",
        ranking=ranking(config, name, marks).fingerprint,
        store=marks.store,
        size=config.retriever.answer_size,
        prompt=config.backbone.prompt,
        answer_tokens=config.backbone.answer_tokens,
        **marks.decoder,
    )


def results(config: Config) -> Artifact:
    marks = Marks(config)
    judged = {
        name: [ranking(config, name, marks).fingerprint, answers(config, name, marks).fingerprint if config.evaluate.answers else None]
        for name in config.evaluate.methods
    }
    settings = config.evaluate.model_dump(include={"k", "bootstrap", "permutations", "report_questions"})
    expected = [expectations.load(place).model_dump() for place in config.evaluate.expected]
    return _artifact(
        config,
        "results",
        methods=judged,
        order=config.evaluate.methods,
        settings=settings,
        expected=expected,
        seed=config.seed,
    )
