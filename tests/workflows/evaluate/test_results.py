"""evaluate and nightly over a run whose store and retriever are made here, in one process, without Ray."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from intra import cli, cluster, lineage, storage, tracking
from intra import config as configuration
from intra.backbone import model as backbones
from intra.config import Config
from intra.errors import UserError, WorkflowError
from intra.evaluation import metrics
from workflows import evaluate, nightly, prepare

from ...baselines.conftest import SIZES, saved
from .runs import ANSWER_RECALL, METHODS, make_store_and_retriever, settings, table, tiny_dense


def test_results(finished: tuple[Config, str]) -> None:
    config, place = finished
    assert place == f"{config.root}/results/results.json"
    records = json.loads(Path(place).read_text())
    assert {frozenset(record) for record in records} == {frozenset({"method", "benchmark", "metric", "value", "low", "high", "n"})}
    assert list(dict.fromkeys(record["method"] for record in records)) == METHODS
    assert {record["metric"] for record in records} == {*metrics.names([5, 10]), *ANSWER_RECALL, "em", "f1"}
    assert {record["benchmark"].split("/")[0] for record in records} == {"synthetic"}
    assert {record["benchmark"] for record in records} > {"synthetic"}
    assert all(0 <= record["low"] <= record["value"] <= record["high"] <= 1 for record in records)
    by_name = {(r["method"], r["benchmark"], r["metric"]): r for r in records}
    assert by_name["oracle", "synthetic", "complete_recall_at_5"]["value"] == 1.0
    assert by_name["bm25", "synthetic", "em"]["n"] == 12
    types = [r for r in records if r["benchmark"].startswith("synthetic/") and (r["method"], r["metric"]) == ("bm25", "em")]
    assert sum(record["n"] for record in types) == 12


def test_what_lies_beside_them(finished: tuple[Config, str]) -> None:
    config, place = finished
    artifact = lineage.results(config)
    assert set(storage.names(artifact.url)) == {
        "breakdowns.json", "config.json", "costs.json", "figures", "manifest.json", "per_question.parquet", "report.html", "results.json",
        "runs", "significance.json",
    }  # fmt: skip
    drawn = {"answers.synthetic.svg", "cost.em.svg", "cost.recall.svg", "recall.synthetic.svg", "three-sets.svg", "weights.svg"}
    assert set(storage.names(artifact.path("figures"))) - {"gap.synthetic.svg"} == drawn  # an untrained oracle may answer nothing
    assert set(storage.names(artifact.path("runs"))) == {f"{method}.synthetic.trec" for method in METHODS}
    assert storage.read_bytes(artifact.path("results.json")) == Path(place).read_bytes()
    assert storage.read_bytes(artifact.path("report.html")) == Path(config.root, "results", "report.html").read_bytes()
    assert storage.read_json(artifact.path("config.json"))["retriever"]["tokens"] == 3
    assert artifact.manifest()["made_from"] == {
        "store": lineage.store(config).fingerprint, "retriever": lineage.retriever(config).fingerprint
    }  # fmt: skip


def test_the_per_question_table_is_what_the_records_sum_up(finished: tuple[Config, str]) -> None:
    config, place = finished
    rows = table(config)
    assert len(rows) == len(METHODS) * 12
    assert all(row["f1"] >= row["em"] for row in rows)
    records = {(r["method"], r["benchmark"], r["metric"]): r["value"] for r in json.loads(Path(place).read_text())}
    for method in METHODS:
        values = [row["mrr"] for row in rows if row["method"] == method]
        assert records[method, "synthetic", "mrr"] == pytest.approx(sum(values) / 12)
    row = next(row for row in rows if row["method"] == "bm25")
    assert row["complete_recall_at_10"] == float(all(set(group) & set(row["ids"][:10]) for group in row["gold"]))
    lines = storage.read_bytes(lineage.results(config).path("runs", "bm25.synthetic.trec")).decode().splitlines()
    assert [line.split()[2] for line in lines if line.split()[0] == row["question_id"]] == row["ids"]


def test_answers_come_from_the_stored_states_of_a_methods_own_chunks(finished: tuple[Config, str]) -> None:
    """Read again here, one question at a time, from the top five of each method."""
    from intra.store.reader import ChunkStore

    config, _ = finished
    backbone, store = backbones.load(config.backbone.model, device="cpu"), ChunkStore(lineage.store(config).url)
    for row in [row for row in table(config) if row["method"] in {"intra", "tfidf", "oracle"}][::4]:
        memory = backbone.pack([store.states(sorted(row["ids"][:5]))])
        assert backbone.answer(backbone.prompt_ids([row["question"]]), memory, 4) == [row["answer"]]


def test_mlflow_holds_a_parent_and_a_child_per_method(finished: tuple[Config, str]) -> None:
    from mlflow import MlflowClient

    config, place = finished
    client = MlflowClient(tracking_uri=tracking.place(config)[0])
    runs = client.search_runs([client.get_experiment_by_name("trial").experiment_id])
    parent = next(run for run in runs if run.info.run_name == "evaluate")
    assert parent.data.tags["fingerprint"] == lineage.results(config).fingerprint
    assert parent.data.params["evaluate.k"] == "[5, 10]"
    assert {entry.dataset.name for entry in parent.inputs.dataset_inputs} == {"pool", "questions", "store", "retriever"}
    assert {file.path for file in client.list_artifacts(parent.info.run_id)} == {"config.json", "figures", "report.html", "results.json"}
    drawn = {file.path for file in client.list_artifacts(parent.info.run_id, "figures")}
    assert drawn == {f"figures/{name}" for name in storage.names(lineage.results(config).path("figures"))}
    children = {run.info.run_name: run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id}
    assert set(children) == set(METHODS)
    records = {(r["method"], r["benchmark"], r["metric"]): r["value"] for r in json.loads(Path(place).read_text())}
    assert children["bm25"].data.metrics["synthetic/ndcg_at_10"] == pytest.approx(records["bm25", "synthetic", "ndcg_at_10"])
    curve = client.get_metric_history(children["bm25"].info.run_id, "synthetic/complete_recall")
    assert [(point.step, point.value) for point in curve] == [
        (k, pytest.approx(records["bm25", "synthetic", f"complete_recall_at_{k}"])) for k in (5, 10)
    ]
    assert parent.data.metrics["bm25/synthetic/em"] == records["bm25", "synthetic", "em"]
    assert not [name for name in parent.data.metrics if "synthetic/bridge" in name]
    assert parent.data.tags["device"] == tracking.device()
    assert {file.path for file in client.list_artifacts(children["bm25"].info.run_id, "runs")} == {"runs/bm25.synthetic.trec"}


def test_plans(finished: tuple[Config, str], model: Path, tmp_path: Path) -> None:
    config, _ = finished
    plans = [line for line in nightly.plan(config) if not line.startswith(" ")]
    assert [line.split(":")[0] for line in plans] == ["prepare", "warmstart", "encode", "train", "evaluate"]
    assert all("complete" in line for line in plans if not line.startswith("warmstart"))
    assert evaluate.plan(config)[0].startswith(f"evaluate: results {lineage.results(config).url} are complete")
    other = config.model_copy(update={"seed": 1})
    assert "workflows/prepare.py" in "\n".join(evaluate.plan(other))
    lexical = settings(config.root, model, methods=["bm25", "random"], answers=False)
    assert len(evaluate.plan(lexical)) == 1
    assert "12 questions, no answers, by bm25, random; done: bm25, random" in evaluate.plan(lexical)[0]
    deeper = settings(config.root, model, methods=["bm25", "random"], answers=False, k=[30])
    assert "done: none" in evaluate.plan(deeper)[0]
    wider = settings(config.root, model, methods=["intra"]).model_copy(update={"retriever": configuration.RetrieverConfig(tokens=9)})
    assert [line.split()[1:4] for line in evaluate.plan(wider)[1:]] == [["waits", "for", "the"]] * 2
    fresh = settings(tmp_path / "absent", model)
    nightly.plan(fresh)
    assert not (tmp_path / "absent").exists()


def test_lexical_methods_need_the_dataset_only(model: Path, ledger: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = settings(tmp_path, model, ledger, methods=["bm25", "random"], answers=False)
    prepare.run(config)
    monkeypatch.setattr(backbones, "load", lambda *_, **__: pytest.fail("no backbone is needed"))
    records = json.loads(Path(evaluate.run(config)).read_text())
    assert {record["method"] for record in records} == {"bm25", "random"}
    assert {record["metric"] for record in records} == {*metrics.names([5, 10]), *ANSWER_RECALL}


def test_what_is_missing_is_named(model: Path, ledger: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = settings(tmp_path, model, ledger)
    with pytest.raises(UserError, match=r"dataset .* is missing .*workflows/prepare\.py"):
        evaluate.run(config)
    prepare.run(config)
    with pytest.raises(UserError, match=r"store .* is missing .*workflows/encode\.py"):
        evaluate.run(config)
    deep = settings(tmp_path, model, ledger, k=[5, 500], methods=["bm25"], answers=False)
    file = tmp_path / "deep.yaml"
    file.write_text(json.dumps(deep.model_dump()))
    assert cli.main("", evaluate.plan, evaluate.run, ["--config", str(file)]) == 2
    assert "evaluate.k: rankings of 500 chunks need a larger pool than" in capsys.readouterr().err
    assert not (tmp_path / "results").exists()


@pytest.mark.slow
def test_workers_encode_the_same_corpus(model: Path, ledger: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By Ray Data with two workers, and in this process: the same bytes, and the same results."""
    from intra.baselines.corpus import Corpus

    folder = saved(tmp_path / "bert", "BertModel", "BertConfig", SIZES)
    made = {}
    for workers in (2, 1):
        config = settings(tmp_path / str(workers), model, ledger, methods=["tiny"], answers=False, models={"tiny": tiny_dense(folder)},
                          shard_chunks=16, workers=workers, device="cpu")  # fmt: skip
        prepare.run(config)
        with monkeypatch.context() as patch:
            if workers == 2:
                patch.setattr(Corpus, "encode", lambda *_: pytest.fail("the workers have done it"))
            place = evaluate.run(config)
        vectors = lineage.vectors(config, "tiny")
        made[workers] = {name: storage.read_bytes(vectors.path(name)) for name in storage.names(vectors.url) if "safetensors" in name}
        made[workers]["results"] = Path(place).read_bytes()
    assert len(made[1]) == 4 + 1
    assert made[1] == made[2]


class Mapped:
    """A data set of Ray's in this process: the rows by a stage, without those that are lost; then, where given, an error."""

    def __init__(self, rows: list[dict[str, Any]], work: Any, error: Exception | None = None) -> None:
        self.rows, self.work, self.error = rows, work, error

    def iter_rows(self) -> Iterator[dict[str, Any]]:
        yield from map(self.work, self.rows)
        if self.error is not None:
            raise self.error


@pytest.fixture
def by_workers(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[dict[str, Any]]]:
    """Does what workers of Ray Data would in this process; `chosen` picks the rows that are not lost. Returns those it was asked for."""

    def here(chosen: Callable[[list[dict[str, Any]]], list[dict[str, Any]]] = list, error: Exception | None = None) -> list[dict[str, Any]]:
        import ray.data

        asked: list[dict[str, Any]] = []

        def stage(rows: list[dict[str, Any]], build: Any, *_: Any) -> Mapped:
            asked.extend(rows)
            return Mapped(chosen(rows), cluster.Stage(*build), error)

        monkeypatch.setattr(cluster, "connect", lambda _: None)
        monkeypatch.setattr(cluster, "wait_for", lambda *_, **__: None)
        monkeypatch.setattr(ray.data, "from_items", lambda rows, **_: rows)
        monkeypatch.setattr(cluster, "stage", stage)
        return asked

    return here


def two_tiny(model: Path, ledger: str, tmp_path: Path, **others: Any) -> Config:
    """BM25 and two dense baselines, the second of which cannot be made: its folder says nothing of what its weights are."""
    good = saved(tmp_path / "bert", "BertModel", "BertConfig", SIZES)
    bad = shutil.copytree(good, tmp_path / "bad")
    (bad / "config.json").write_text("{}")
    table = {"tiny": tiny_dense(good), "bad": tiny_dense(bad), "both": {"kind": "fusion", "of": ["bm25", "bad"], "depth": 12}}
    asked = {
        "methods": ["bad", "both", "tiny", "bm25"],
        "answers": False,
        "models": table,
        "shard_chunks": 16,
        "workers": 2,
        "device": "cpu",
    }
    config = settings(tmp_path / "run", model, ledger, **asked | others)
    prepare.run(config)
    return config


def test_shards_whose_workers_died_again_and_again_are_named(
    model: Path, ledger: str, tmp_path: Path, by_workers: Callable[..., Any]
) -> None:
    """The stage that ends the retries leaves them out. The other methods' results are written."""
    config = two_tiny(model, ledger, tmp_path, methods=["tiny", "bm25"])
    by_workers(lambda rows: rows[:2] + rows[3:])
    with pytest.raises(WorkflowError, match=r"method tiny failed: 1 shards were not encoded.*: tiny, shard 000000032; the others are kept"):
        evaluate.run(config)
    assert {"000000000.safetensors", "000000048.safetensors"} < set(storage.names(lineage.vectors(config, "tiny").url))
    assert not lineage.results(config).complete()
    assert {record["method"] for record in storage.read_json(f"{config.root}/results/results.json")} == {"bm25"}


def test_a_lost_machine_fails_those_that_wait_for_it(model: Path, ledger: str, tmp_path: Path, by_workers: Callable[..., Any]) -> None:
    from ray.exceptions import ActorDiedError

    config = two_tiny(model, ledger, tmp_path, methods=["tiny", "bm25"])
    by_workers(lambda rows: rows[:3], ActorDiedError())
    with pytest.raises(WorkflowError, match=r"method tiny failed: 1 shards were not encoded, a worker was lost \(.*the others are kept"):
        evaluate.run(config)
    by_workers()
    evaluate.run(config)


def test_a_model_that_cannot_encode_leaves_the_others(
    model: Path, ledger: str, tmp_path: Path, by_workers: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """By workers as in this process: its methods fail by its reason, once each, and what is made of it."""
    config = two_tiny(model, ledger, tmp_path)
    by_workers()
    with pytest.raises(WorkflowError) as caught:
        evaluate.run(config)
    assert re.search(r"^method bad failed: .*config\.json.*; method both failed: its part bad failed; the other methods", str(caught.value))
    records = storage.read_json(f"{config.root}/results/results.json")
    assert {record["method"] for record in records} == {"tiny", "bm25"}
    assert capsys.readouterr().err.count("error: method bad failed: ") == 1


def test_no_corpus_is_encoded_for_rankings_that_are_there(model: Path, ledger: str, tmp_path: Path, by_workers: Callable[..., Any]) -> None:
    """The vectors, tens of gigabytes perhaps, may be deleted; nor is anything encoded where the evaluation could not go on."""
    config = two_tiny(model, ledger, tmp_path, methods=["tiny", "bm25"])
    asked = by_workers()
    evaluate.run(config)
    assert len(asked) == 4
    storage.remove(lineage.vectors(config, "tiny").url)
    asked = by_workers()
    evaluate.run(
        two_tiny(model, ledger, tmp_path / "again", methods=["tiny", "bm25"], bootstrap=200).model_copy(update={"root": config.root})
    )
    assert asked == []
    deep = config.model_copy(update={"evaluate": config.evaluate.model_copy(update={"k": [500]})})
    with pytest.raises(UserError, match=r"evaluate\.k: rankings of 500 chunks need a larger pool"):
        evaluate.run(deep)
    assert asked == []


def test_a_reranker_that_cannot_be_loaded_is_told_first_and_leaves_the_others(
    model: Path, ledger: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = {"tiny": tiny_dense(saved(tmp_path / "bert", "BertModel", "BertConfig", SIZES))}
    headless = {"kind": "cross", "model": str(tmp_path / "bert"), "max_length": 64}  # an encoder: its score would be drawn at random
    table |= {"judge": headless, "judged": {"kind": "rerank", "of": "tiny", "by": "judge", "depth": 20}}
    config = settings(tmp_path / "run", model, ledger, methods=["bm25", "judged"], answers=False, models=table, device="cpu")
    prepare.run(config)
    with pytest.raises(UserError, match=r"method judged failed: evaluate\.models\.judge\.model: the weights in .* lack classifier\."):
        evaluate.run(config)
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert [line.split(": ")[1] for line in told] == ["model judge fails its methods", "method judged failed"]
    assert not Path(config.root, "vectors").exists()  # of its first list, which nobody else asks for
    assert {record["method"] for record in storage.read_json(f"{config.root}/results/results.json")} == {"bm25"}


def test_encoders_that_fit_nowhere_are_told(model: Path, ledger: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray Data would wait for ever, without a word."""
    config = two_tiny(model, ledger, tmp_path, methods=["tiny"], gpus_per_worker=1, device="auto")
    monkeypatch.setattr(cluster, "connect", lambda _: None)
    monkeypatch.setattr(cluster, "fits", lambda _: 0)
    monkeypatch.setattr(cluster, "here", lambda: "2 CPU and 0 GPU")
    with pytest.raises(
        UserError, match=r"^evaluate\.workers: no worker of 1 CPU and 1 GPU fits: there are 2 CPU and 0 GPU here; lower evaluate"
    ):
        evaluate.run(config)


def test_what_can_be_known_is_checked_before_anything_is_made(model: Path, ledger: str, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    table = {"tiny": tiny_dense(empty)}
    for asked, message in [
        ({"expected": [str(tmp_path / "nope.yaml")], "methods": ["bm25"]}, "evaluate.expected: no file"),
        ({"models": table, "methods": ["tiny"]}, "evaluate.models.tiny"),
        ({"methods": ["bm25", "minilm"], "models": {"minilm": {"model": "package:nope/x"}}}, "the package nope is not installed"),
    ]:
        config = settings(tmp_path / "run", model, ledger, answers=False, **asked)
        for command in (nightly.plan, nightly.run, evaluate.plan, evaluate.run):
            with pytest.raises(UserError, match=message):
                command(config)
    assert not (tmp_path / "run").exists()


def test_a_mistake_in_what_methods_share_is_the_users_for_each(model: Path, ledger: str, tmp_path: Path) -> None:
    """INTRA comes first and fails by its S_0; as a method of its own S_0 says why, and what is made of it says by what. Exit status 2."""
    config = settings(tmp_path, model, ledger, methods=["intra", "maxsim", "s0_reranked"], answers=False)
    prepare.run(config)
    make_store_and_retriever(config)
    place = lineage.store(config).path("manifest.json")
    storage.write_json(place, storage.read_json(place) | {"backbone": "0" * 64})
    with pytest.raises(UserError) as caught:
        evaluate.run(config)
    for name, why in [("intra", "store "), ("maxsim", "store "), ("s0_reranked", "its part maxsim failed")]:
        assert f"method {name} failed: {why}" in str(caught.value)
    assert str(caught.value).count("its states are of a backbone of digest 0000000000000000") == 2


def test_a_device_that_is_not_there_is_named_before_the_first_method(model: Path, ledger: str, tmp_path: Path) -> None:
    folder = saved(tmp_path / "bert", "BertModel", "BertConfig", SIZES)
    table = {"tiny": tiny_dense(folder), "again": {"kind": "rerank", "of": "bm25", "by": "tiny", "depth": 20}}
    for methods in (["bm25", "tiny"], ["bm25", "again"]):
        config = settings(tmp_path / "run", model, ledger, methods=methods, answers=False, models=table, device="gpu")
        prepare.run(config)
        with pytest.raises(UserError, match=r"^evaluate\.device: found 'gpu'; give auto, cpu or cuda$"):
            evaluate.run(config)
        assert not Path(config.root, "ranking").exists()
    evaluate.run(settings(tmp_path / "run", model, ledger, methods=["bm25"], answers=False, device="gpu"))  # no model is asked for


def test_on_s3(s3_root: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # the tracking database of an s3:// root lies in the working directory
    config = settings(s3_root, model, methods=["bm25", "oracle"])
    prepare.run(config)
    make_store_and_retriever(config)
    place = evaluate.run(config)
    assert place == f"{s3_root}/results/results.json"
    assert {record["method"] for record in storage.read_json(place)} == {"bm25", "oracle"}
    assert storage.exists(f"{s3_root}/results/report.html")
    assert [name for name in storage.files(f"{s3_root}/mlflow") if name.endswith("oracle.synthetic.trec")]
    assert Path(tmp_path, "runs", "mlflow", "mlflow.db").exists()
    assert evaluate.run(config) == place


def test_what_every_method_takes(finished: tuple[Config, str]) -> None:
    config, _ = finished
    costs = {cost["method"]: cost for cost in storage.read_json(lineage.results(config).path("costs.json"))}
    assert list(costs) == METHODS
    for cost in costs.values():
        assert cost["questions"] == 12
        assert cost["index_seconds"] > 0
        assert cost["search_seconds"] > 0
        assert cost["peak_bytes"] > 50e6
        assert cost["search_operations"] >= 0
        assert (cost["answers_read"] == 0) == (cost["answer_operations"] is None)
    assert costs["intra"]["answers_read"] == 12
    assert costs["intra"]["answer_seconds"] > 0
    operations = {name: cost["search_operations"] for name, cost in costs.items()}
    # INTRA's hold those of its S_0; the oracle looks its chunks up.
    assert operations["intra"] > operations["s0_reranked"] > operations["maxsim"] > operations["bm25"] > operations["oracle"] == 0
    s_0 = storage.read_json(lineage.ranking(config, "maxsim").path("manifest.json"))
    own = storage.read_json(lineage.ranking(config, "intra").path("manifest.json"))
    assert costs["intra"]["search_seconds"] == pytest.approx(own["search_seconds"] + s_0["search_seconds"])
    assert operations["intra"] == pytest.approx(own["operations"] + s_0["operations"])


def test_the_encoding_of_a_corpus_counts_once_whoever_did_it(
    model: Path, ledger: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four shards that workers have made in 1,000 seconds each; a ranking that does not tell what encoding took has no seconds."""
    from intra.baselines.corpus import Corpus
    from intra.data.schema import read_pool
    from intra.evaluation.parts import Parts
    from intra.evaluation.run import Searches

    folder = saved(tmp_path / "bert", "BertModel", "BertConfig", SIZES)
    models = {"tiny": tiny_dense(folder), "again": {"kind": "rerank", "of": "tiny", "by": "tiny", "depth": 12}}
    config = settings(tmp_path / "run", model, ledger, methods=["tiny", "again", "bm25"], answers=False, models=models, shard_chunks=16)
    prepare.run(config)
    worker = evaluate.EncodeShard(config.model_dump(), lineage.dataset(config).url)
    for first in range(0, 60, 16):
        worker({"name": "tiny", "first": first, "stop": min(first + 16, 60)})
        storage.write_json(lineage.vectors(config, "tiny").path("seconds", f"{first:09d}.json"), 1000.0)
    with monkeypatch.context() as patch:
        patch.setattr(Corpus, "encode", lambda *_: pytest.fail("the workers have done it"))
        evaluate.run(config)
    costs = {cost["method"]: cost for cost in storage.read_json(lineage.results(config).path("costs.json"))}
    assert all(4000 < costs[name]["index_seconds"] < 4100 for name in ("tiny", "again"))
    assert all(0 < costs[name]["search_seconds"] < 100 for name in costs)
    assert costs["bm25"]["index_seconds"] < 100
    ranking = lineage.ranking(config, "tiny")
    storage.write_json(ranking.path("manifest.json"), {key: value for key, value in ranking.manifest().items() if key != "encoding"})
    searches = Searches(Parts(config), [], read_pool(lineage.dataset(config).url))
    assert [searches.cost(name)["index_seconds"] is None for name in ("tiny", "again", "bm25")] == [True, True, False]
