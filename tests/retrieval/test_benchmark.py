"""The benchmark of the search at a size that says nothing about speed: every part runs, compares before it times, and draws."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from intra import cluster, config
from intra.backbone.model import Backbone, load
from intra.data.schema import Question
from intra.retrieval import benchmark, peers, search
from intra.retrieval.benchmark import Bench
from intra.retrieval.pools import Ask, Local
from intra.retrieval.retriever import Retriever
from intra.retrieval.scorers import Keys

from .conftest import MemoryStore

SIZES = {"questions": 4, "checked": 8, "chunks": 40, "search_chunks": 55, "pools": [90, 150], "repeats": 1, "latency_questions": 3}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["per_head", "mixture"])
def test_peers_agree_with_the_exact_scorer(
    kind: str, dtype: torch.dtype, backbone: Backbone, store: MemoryStore, queries: torch.Tensor, weights: torch.Tensor
) -> None:
    keys = Keys.of(backbone)
    ask, keys = Ask(kind, queries.to(dtype), weights, 0.5), replace(keys, projections=keys.projections.to(dtype))
    times, errors = peers.compare(ask, keys, store.vectors.to(dtype), 1)
    exact = {"exact", "reverse", "chunked", "naive", "naive_hidden", "sentence_transformers"}
    assert exact | {"gemm", "int8", "linear", "faiss_flat"} <= set(times)
    assert all(errors[name] < (peers.SAME if dtype == torch.float32 else 0.3 * peers.SAME_BFLOAT16) for name in exact)
    assert errors["exact"] == 0 < errors["int8"] < errors["linear"]
    assert errors["linear"] > 2 * peers.SAME_BFLOAT16


@pytest.mark.parametrize(("dtype", "off", "same"), [(torch.float32, 1.01, peers.SAME), (torch.bfloat16, 1.3, peers.SAME_BFLOAT16)])
def test_a_peer_that_computes_something_else_is_not_timed(
    dtype: torch.dtype, off: float, same: float, backbone: Backbone, store: MemoryStore, queries: torch.Tensor, weights: torch.Tensor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(peers, "_naive", lambda queries, keys: peers.scoring.layer_scores(queries, keys) * off)
    keys = Keys.of(backbone)
    ask, keys = Ask("per_head", queries.to(dtype), weights, 1.0), replace(keys, projections=keys.projections.to(dtype))
    times, errors = peers.compare(ask, keys, store.vectors.to(dtype), 1, ["exact", "naive"])
    assert set(times) == {"exact"}
    assert errors["naive"] > same


def made(
    backbone: Backbone, store: MemoryStore, retriever: Retriever, questions: list[Question], root: Path, monkeypatch: pytest.MonkeyPatch
) -> Any:
    """A Bench of these, which `benchmark.run` takes."""
    monkeypatch.setattr(benchmark, "LAYER_4B", {"d": 64, "heads": 4, "groups": 2, "e": 16, "tokens": 8})
    bench: Any = object.__new__(Bench)
    bench.config = config.parse({"root": str(root), "retriever": {"search": {"benchmark": SIZES}}})
    bench.settings = bench.config.retriever.search.benchmark
    bench.questions, bench.retriever, bench.backbone, bench.store = questions, retriever, backbone, store
    bench.keys, bench.records = Keys.of(backbone), {}
    bench.passes = search.Passes(backbone, store, retriever, query_batch=4)  # type: ignore[arg-type]
    monkeypatch.setattr(benchmark, "Bench", lambda _: bench)
    return bench


@pytest.mark.parametrize("retriever", ["mixture"], indirect=True)
def test_every_part_gives_its_records(
    backbone: Backbone, store: MemoryStore, retriever: Retriever, questions: list[Question], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = made(backbone, store, retriever, questions, tmp_path, monkeypatch)
    chosen = bench.config
    kept: list[list[dict[str, Any]]] = []
    records = benchmark.run(chosen, kept.append)
    assert kept[-1] == records
    assert [set(kept[0][0]), len(kept)] == [{"name", "value", "unit"}, len(benchmark.PARTS)]
    assert {record["name"].split("_")[0] for record in kept[0]} == {"pool"}
    values = {name: value for name, (value, _) in bench.records.items()}
    assert values["search_questions"] == 8
    assert values["search_same_top_20"] == 1
    assert values["search_chunks"] == 55  # of 60
    assert 0 < values["search_reverse_error"] < 1e-4
    assert values["search_cascade_400_recall_20"] == values["search_int8_100_recall_20"] == 1  # more candidates than chunks
    assert 0 < values["search_cascade_25_recall_20"] <= 1
    enough = int(values["search_cascade_candidates"])
    assert values[f"search_cascade_{enough}_recall_20"] >= 0.99
    assert values["search_exact_to_cascade"] == values[f"search_exact_to_cascade_{enough}"]
    assert values["search_exact_to_int8_100"] == pytest.approx(values["search_exact"] / values["search_int8_100"])
    assert 0 < values["search_pruned_100_recall_20"] <= 1
    assert values["pool_exact_share_of_gemm"] == pytest.approx(values["pool_gemm"] / values["pool_exact"])
    assert {"shape_reverse_to_exact", "shape_exact_to_int8", "batch_1_reverse", "batch_4_linear", "ivf_4_recall_20"} <= set(values)
    assert values["rows_150_exact_memory"] > 0.05
    assert values["latency_total_median"] >= max(values[f"latency_{stage}_median"] for stage in ("S_0", "search", "answer"))
    drawn = benchmark.figures(values)
    assert set(drawn) == {"recall.png", "latency.png", "batch.png", "rows.png"} == set(os.listdir(tmp_path / "benchmark" / "search"))
    assert all(image.startswith(b"\x89PNG") for image in drawn.values())
    assert set(benchmark.figures({name: value for name, value in values.items() if name.startswith("latency_")})) == {"latency.png"}


@pytest.mark.parametrize("retriever", ["per_head"], indirect=True)
def test_every_part_runs_in_bfloat16(
    folder: Path, store: MemoryStore, retriever: Retriever, questions: list[Question], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = load(str(folder), dtype="bfloat16", device="cpu")
    bench = made(backbone, store, retriever, questions, tmp_path, monkeypatch)
    benchmark.run(bench.config, lambda _: None)
    timed = {"exact", "gemm", "reverse", "linear", "chunked", "naive", "naive_hidden", "sentence_transformers", "int8", "faiss_flat"}
    assert {f"pool_{name}" for name in timed} | {"shape_naive_hidden", "batch_4_int8", "ivf_4_recall_20"} <= set(bench.records)
    assert bench.records["search_same_top_20"][0] > 0.5
    assert {name for name in bench.records if name.startswith("latency_total")} == {"latency_total_median", "latency_total_p99"}


def test_the_workers_of_a_search_are_started_once(
    backbone: Backbone, store: MemoryStore, retriever: Retriever, questions: list[Question], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def started(*_: object) -> Any:
        asked.append("workers")
        return Local(store, Keys.of(backbone), 1024, "cpu", True)  # type: ignore[arg-type]

    monkeypatch.setattr(cluster, "connect", lambda _: asked.append("Ray"))
    monkeypatch.setattr(search, "_fleet", started)
    monkeypatch.setattr(benchmark, "lineage", SimpleNamespace(**dict.fromkeys(("dataset", "retriever", "backbone", "store"), place)))
    monkeypatch.setattr(benchmark, "read_questions", lambda *_: questions)
    monkeypatch.setattr(Retriever, "from_pretrained", lambda _: retriever)
    monkeypatch.setattr("intra.backbone.model.load", lambda *_, **__: backbone)
    monkeypatch.setattr("intra.store.reader.ChunkStore", lambda _: store)
    bench = Bench(config.parse({"root": "x", "retriever": {"search": {"workers": 2, "benchmark": SIZES}}}))
    assert asked == ["Ray", "workers"]
    benchmark._latency(bench)
    assert asked == ["Ray", "workers"]


def place(_: object) -> SimpleNamespace:
    return SimpleNamespace(url="here")


def test_a_repeated_pool_is_the_pool_again_and_again(store: MemoryStore) -> None:
    made = torch.cat(list(benchmark.repeated(store, 150)))  # type: ignore[arg-type]
    assert torch.equal(made, torch.cat([store.vectors, store.vectors, store.vectors])[:150])
