"""What the tests of evaluate share: a small world, its configuration and what stands before an evaluation."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch

from intra import config as configuration
from intra import lineage, storage
from intra.backbone import model as backbones
from intra.config import ArchitectureConfig, Config
from intra.data.schema import read_pool
from intra.retrieval.retriever import Retriever, RetrieverSettings
from intra.store import format as layout
from intra.store import writer

ARCHITECTURE = ArchitectureConfig(
    hidden_size=32, intermediate_size=48, encoder_layers=1, decoder_layers=2, heads=2, kv_heads=1, head_dim=16, vocabulary=300
)
ANSWER_RECALL = ["answer_recall_at_5", "answer_recall_at_10"]
METHODS = ["intra", "maxsim", "s0_reranked", "bm25", "tfidf", "random", "oracle"]


def settings(root: Path | str, model: Path, uri: str | None = None, **evaluate: Any) -> Config:
    return configuration.parse(
        {
            "root": str(root),
            "data": {"synthetic": {"chunks": 60, "train_questions": 5, "test_questions": 12}},
            "backbone": {"model": str(model), "answer_tokens": 4, "device": "cpu"},
            "retriever": {"tokens": 3, "pooled_length": 2, "initial_context": 6},
            "evaluate": {"k": [5, 10], "bootstrap": 100, "threads": 1, "answer_batch": 5, **evaluate},
            "tracking": {"experiment": "trial", "uri": uri},
        }
    )


def make_store_and_retriever(config: Config) -> None:
    """What workflows/encode.py and workflows/train.py leave behind, the retriever untrained."""
    torch.set_num_threads(1)
    dataset, store, retriever = lineage.dataset(config), lineage.store(config), lineage.retriever(config)
    pool = read_pool(dataset.url)
    backbone = backbones.load(config.backbone.model, device="cpu")
    ids = backbone.tokenize([f"{title}\n{text}" for title, text in zip(pool.titles, pool.texts, strict=True)])
    states, pooled = writer.encode(backbone, ids, config.retriever.pooled_length, config.store.batch_tokens, torch.bfloat16)
    shard = layout.Shard(0, 0, len(pool))
    commit = writer.write_shard(store, shard, [len(item) for item in ids], states, pooled)
    writer.finish(store, pool.chunk_ids, [shard], {0: commit}, {}, backbone=lineage.weights_digest(config),
                  hidden_size=backbone.hidden_size, pooled_length=config.retriever.pooled_length, dtype="bfloat16", threads=1)  # fmt: skip
    made = RetrieverSettings(
        tokens=config.retriever.tokens, layers=backbone.layers, heads=backbone.heads, hidden_size=backbone.hidden_size,
        pooled_length=config.retriever.pooled_length, initial_context=config.retriever.initial_context,
        initial_scoring=config.retriever.initial_scoring, scoring=config.retriever.scoring, backbone="", store="",
    )  # fmt: skip
    Retriever.initialise(backbone, made, 0).save_pretrained(retriever.url)
    retriever.finish({})


def table(config: Config) -> list[dict[str, Any]]:
    return list(pq.read_table(io.BytesIO(storage.read_bytes(lineage.results(config).path("per_question.parquet")))).to_pylist())


def tiny_dense(folder: Path) -> dict[str, Any]:
    return {"kind": "dense", "model": str(folder), "pooling": "mean", "max_length": 64}


def linked(config: Config, root: Path, *also: str) -> None:
    """Puts the dataset, the store and the retriever of `config` below another root, and what else is named."""
    for kind in ("dataset", "store", "retriever", *also):
        Path(root, kind).symlink_to(Path(config.root, kind))
