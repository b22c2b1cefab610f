"""int8 states against those of a small store that is made here without Ray: the shipped backbone, an untrained retriever."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from intra import config as configuration
from intra import lineage, precision, storage
from intra.backbone import locate
from intra.backbone.model import load
from intra.config import Config
from intra.errors import UserError
from intra.retrieval.retriever import Retriever, RetrieverSettings
from intra.store import planning, quantize, writer
from intra.store.format import PLAN, committed
from workflows import prepare

PROJECT = Path(__file__).parents[1]


def test_states_come_back_changed_by_their_precision_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(500, 32, generator=generator) * torch.rand(32, generator=generator) + 1
    mu, sigma = quantize.statistics([states], 32)
    error = {name: float(((change(states) - states) / sigma).abs().mean()) for name, change in precision.changes(mu, sigma).items()}
    assert error["as_stored"] == 0
    assert 0 < error["int8"] < 0.01
    assert error["int8_outliers"] == pytest.approx(error["int8"], rel=0.05)
    assert error["plain_int8_outliers"] > 20 * error["int8"]


def test_what_int8_changes_in_chunks_that_are_scored_again_is_measured(config: Config) -> None:
    plain, again = (
        {record["name"]: record["value"] for record in precision.run(configuration.varied(config, [f"retriever.search.rescore={rescore}"]))}
        for rescore in (0, 60)
    )
    assert again["top_20_overlap_plain_int8_outliers"] < plain["top_20_overlap_plain_int8_outliers"]


@pytest.fixture
def config(tmp_path: Path) -> Config:
    small = ["data.synthetic.chunks=60", "data.synthetic.train_questions=6", "data.synthetic.test_questions=12", "retriever.tokens=4",
             "store.benchmark.questions=8", "retriever.scoring=per_head"]  # fmt: skip
    config = configuration.load(PROJECT / "configs/quickstart.yaml", [f"root={tmp_path}", *small])
    prepare.run(config)
    store, dataset, model = lineage.store(config), lineage.dataset(config), config.backbone.model
    made = planning.make(store, lineage.encoding(config), dataset.url, config.store.shard_chunks)
    storage.write_json(store.path(PLAN), made.record())
    source = writer.Source(model, None, locate.digest(model, None), "float32", "cpu", 1)
    read = writer.LoadTokenize(dataset.url, model, None, config.data.template)
    encode = writer.EncodeCommit(store, source, config.retriever.pooled_length, config.store.batch_tokens, config.store.dtype)
    for shard in made.shards:
        encode(read({"shard": shard.number, "first": shard.first, "rows": shard.rows, "content": shard.content}))
    backbone = load(model, device="cpu")
    writer.finish(
        store, made.chunk_ids, made.shards, committed(store, made.shards), {}, backbone=source.digest, hidden_size=backbone.hidden_size,
        pooled_length=config.retriever.pooled_length, dtype=config.store.dtype, threads=1,
    )  # fmt: skip
    settings = RetrieverSettings(
        4, backbone.layers, backbone.heads, backbone.hidden_size, config.retriever.pooled_length, 5, "whitened", "per_head", "b", "s"
    )
    Retriever.initialise(backbone, settings, seed=0).save_pretrained(lineage.retriever(config).url)
    return config


def test_the_records_compare_rankings_and_answers(config: Config) -> None:
    found = {record["name"]: record["value"] for record in precision.run(config)}
    assert found["questions"] == 8
    assert 0.9 <= found["top_20_overlap_int8"] <= 1
    assert found["top_20_overlap_plain_int8_outliers"] < found["top_20_overlap_int8_outliers"]
    assert found["em_as_stored_low"] <= found["em_as_stored"] <= found["em_as_stored_high"]
    assert {"em_int8", "em_int8_outliers"} <= set(found)
    manifest = lineage.store(config).path("manifest.json")
    storage.write_json(manifest, {**storage.read_json(manifest), "dtype": "int8"})
    with pytest.raises(UserError, match=r"is int8 already; compare with one of store.dtype=bfloat16"):
        precision.run(config)
