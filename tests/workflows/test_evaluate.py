"""evaluate and nightly over a run whose store and retriever are made here, in one process, without Ray."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from intra import cli, lineage, storage, tracking
from intra import config as configuration
from intra.backbone import model as backbones
from intra.backbone import tiny
from intra.config import ArchitectureConfig, Config
from intra.data.schema import read_pool, read_questions
from intra.errors import UserError, WorkflowError
from intra.evaluation import metrics
from intra.retrieval.retriever import Retriever, RetrieverSettings
from intra.store import format as layout
from intra.store import writer
from workflows import evaluate, nightly, prepare

ARCHITECTURE = ArchitectureConfig(
    hidden_size=32, intermediate_size=48, encoder_layers=1, decoder_layers=2, heads=2, kv_heads=1, head_dim=16, vocabulary=300
)
ANSWER_RECALL = ["answer_recall_at_5", "answer_recall_at_10"]
METHODS = ["intra", "maxsim", "s0_reranked", "bm25", "tfidf", "random", "oracle"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from intra.data import synthetic

    folder = tmp_path_factory.mktemp("tiny")
    passages, _ = synthetic.generate(configuration.SyntheticConfig(chunks=60, train_questions=5, test_questions=5), 0)
    tokenizer = tiny.train_tokenizer([passage.text for passage in passages], ARCHITECTURE)
    tiny.save(tiny.build(ARCHITECTURE, tokenizer, 0), tokenizer, folder)
    return folder


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
    writer.finish(store, pool.chunk_ids, [shard], {0: commit}, {}, backbone="", hidden_size=backbone.hidden_size,
                  pooled_length=config.retriever.pooled_length, dtype="bfloat16", threads=1)  # fmt: skip
    made = RetrieverSettings(
        tokens=config.retriever.tokens, layers=backbone.layers, heads=backbone.heads, hidden_size=backbone.hidden_size,
        pooled_length=config.retriever.pooled_length, initial_context=config.retriever.initial_context,
        initial_scoring=config.retriever.initial_scoring, scoring=config.retriever.scoring, backbone="", store="",
    )  # fmt: skip
    Retriever.initialise(backbone, made, 0).save_pretrained(retriever.url)
    retriever.finish({})


@pytest.fixture(scope="module")
def finished(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, str]:
    """An evaluated run, and what evaluate returned."""
    config = settings(tmp_path_factory.mktemp("run"), model)
    prepare.run(config)
    make_store_and_retriever(config)
    return config, evaluate.run(config)


@pytest.fixture(scope="module")
def ledger(model: Path) -> str:
    """One tracking store for the runs whose records no test looks at: making one takes seconds."""
    return f"sqlite:///{model}.db"


def table(config: Config) -> list[dict[str, Any]]:
    return list(pq.read_table(io.BytesIO(storage.read_bytes(lineage.results(config).path("per_question.parquet")))).to_pylist())


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


def test_a_finished_run_is_shown_again_and_left_alone(finished: tuple[Config, str], tmp_path: Path) -> None:
    """nightly in a fresh process: the same table and last line, nothing written, none of the heavy libraries imported."""
    config, place = finished
    before = {path: path.stat().st_mtime_ns for path in Path(config.root).rglob("*") if path.is_file()}
    file = tmp_path / "run.yaml"
    file.write_text(json.dumps(config.model_dump()))
    code = (
        "import sys\nfrom intra import cli\nfrom workflows import nightly\n"
        f"status = cli.main('', nightly.plan, nightly.run, ['--config', {str(file)!r}])\n"
        "print([name for name in ('ray', 'torch', 'mlflow', 'transformers') if name in sys.modules], file=sys.stderr)\nsys.exit(status)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    lines = result.stdout.splitlines()
    assert lines[-1] == place
    assert [line.split()[1] for line in lines if line.startswith("synthetic ")] == METHODS
    assert any(line.startswith("report ") and line.endswith("report.html") for line in lines)
    assert any(line.startswith("MLflow ") and "mlflow ui" in line for line in lines)
    assert result.stderr.splitlines()[-1] == "[]"
    assert {path: path.stat().st_mtime_ns for path in Path(config.root).rglob("*") if path.is_file()} == before


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


def test_an_interrupted_evaluation_goes_on(
    finished: tuple[Config, str], ledger: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in the last method, then started again: the same results, and what was committed is not searched again."""
    from intra.baselines import lexical, reference
    from intra.retrieval import search

    config, _ = finished
    again = config.model_copy(update={"root": str(tmp_path), "tracking": configuration.TrackingConfig(experiment="trial", uri=ledger)})
    for kind in ("dataset", "store", "retriever"):
        Path(tmp_path, kind).symlink_to(Path(config.root, kind))

    def stop(*_: Any) -> Any:
        raise WorkflowError("stopped here")

    def interrupt(*_: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(reference.Oracle, "search", interrupt)
        with pytest.raises(KeyboardInterrupt):
            evaluate.run(again)
    assert not lineage.results(again).complete()
    for method in (search.Intra, search.MaxSim, search.Reranked, lexical.BM25, lexical.TfIdf, reference.Random):
        monkeypatch.setattr(method, "search", stop)
    evaluate.run(again)
    first, second = lineage.results(config), lineage.results(again)
    for name in ("results.json", "per_question.parquet"):
        assert storage.read_bytes(first.path(name)) == storage.read_bytes(second.path(name))


def test_a_part_that_is_not_there_is_made_again(finished: tuple[Config, str], ledger: str, tmp_path: Path) -> None:
    """INTRA's ranking is complete, but not that of S_0, whose cost is part of its own."""
    config, _ = finished
    alone = config.evaluate.model_copy(update={"methods": ["intra"], "answers": False})
    track = configuration.TrackingConfig(experiment="trial", uri=ledger)
    again = config.model_copy(update={"root": str(tmp_path), "tracking": track, "evaluate": alone})
    for kind in ("dataset", "store", "retriever"):
        Path(tmp_path, kind).symlink_to(Path(config.root, kind))
    made = lineage.ranking(config, "intra")
    shutil.copytree(made.url, tmp_path / "ranking" / made.fingerprint)
    assert lineage.ranking(again, "intra").complete()
    evaluate.run(again)
    assert lineage.ranking(again, "maxsim").complete()
    assert {row["method"] for row in table(again)} == {"intra"}


def test_a_stored_s_0_is_not_searched_again(
    finished: tuple[Config, str], ledger: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """INTRA and S_0 reranked read it where it is stored; a fusion of it needs no backbone for that."""
    from intra.retrieval import initial

    config, _ = finished
    track = configuration.TrackingConfig(experiment="trial", uri=ledger)
    for kind in ("dataset", "store", "retriever"):
        Path(tmp_path, kind).symlink_to(Path(config.root, kind))
    made = lineage.ranking(config, "maxsim")
    shutil.copytree(made.url, tmp_path / "ranking" / made.fingerprint)
    search = initial.search
    monkeypatch.setattr(initial, "search", lambda *given: pytest.fail("S_0 is stored") if given[2] else search(*given))
    values = config.evaluate.model_dump() | {
        "answers": False,
        "models": {"both": {"kind": "fusion", "of": ["maxsim", "bm25"], "depth": 10}},
    }
    for methods in (["intra", "s0_reranked"], ["both"]):
        chosen = type(config.evaluate).model_validate(values | {"methods": methods})
        again = config.model_copy(update={"root": str(tmp_path), "tracking": track, "evaluate": chosen})
        evaluate.run(again)
        assert {row["method"] for row in table(again)} == set(methods)
        # What comes after needs no backbone.
        monkeypatch.setattr(backbones, "load", lambda *_, **__: pytest.fail("no backbone is needed"))


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


def test_methods_that_fail_are_named_and_leave_the_others(
    model: Path, ledger: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Too few chunks, a doubled one, an unknown id, a NaN, a crash, a wrapper of a method that failed; then all is mended."""
    from intra.baselines import dense, lexical, reference
    from tests.baselines.conftest import SIZES, saved

    values = settings(tmp_path / "run", model, ledger, answers=False).model_dump()
    values["evaluate"] |= {
        "methods": ["bm25", "tfidf", "random", "oracle", "crash", "rrf", "tiny"],
        "models": {
            "tiny": tiny_dense(saved(tmp_path / "bert", "BertModel", "BertConfig", SIZES)),
            "crash": {"kind": "rerank", "of": "tiny", "by": "tiny", "depth": 12},
            "rrf": {"kind": "fusion", "of": ["tiny", "bm25"], "depth": 12},
        },
    }
    file = tmp_path / "run.yaml"
    file.write_text(json.dumps(values))
    config = configuration.load(file)
    prepare.run(config)
    first = read_questions(lineage.dataset(config).url, "test")[0].question_id

    def spoilt(kind: type[Any], spoil: Any) -> None:
        good = kind.search
        patch.setattr(kind, "search", lambda self, questions, k: {**(found := good(self, questions, k)), first: spoil(found[first])})

    def crash(*_: Any) -> Any:
        raise RuntimeError("boom")

    with monkeypatch.context() as patch:
        spoilt(lexical.BM25, lambda ranking: ranking[:-1])
        spoilt(lexical.TfIdf, lambda ranking: [ranking[0], *ranking[:-1]])
        spoilt(reference.Random, lambda ranking: [("nowhere", 2.0), *ranking[:-1]])
        spoilt(reference.Oracle, lambda ranking: [*ranking[:-1], (ranking[-1][0], float("nan"))])
        patch.setattr(dense.Dense, "scores", crash)
        assert cli.main("", evaluate.plan, evaluate.run, ["--config", str(file)]) == 1
    out, error = capsys.readouterr()
    last = error.splitlines()[-1]
    for name, reason in [
        ("bm25", f"method bm25, question {first}: 11 chunks where 12 were asked for"),
        ("tfidf", f"method tfidf, question {first}: a chunk is ranked twice"),
        ("random", f"method random, question {first}: 'nowhere' is no chunk of the pool"),
        ("oracle", f"method oracle, question {first}: a score is not a number"),
        ("crash", "RuntimeError: boom"),
        ("rrf", "its part bm25 failed"),
    ]:
        assert f"method {name} failed: {reason}" in last
        assert f"error: method {name} failed: {reason}" in error
    assert "the other methods' results are written; run the same command again" in last
    assert [line.split()[1] for line in out.splitlines() if line.startswith("synthetic ")] == ["tiny"]
    place = Path(config.root, "results", "results.json")
    before = [record for record in json.loads(place.read_text()) if record["method"] == "tiny"]
    assert before
    assert not lineage.results(config).complete()

    monkeypatch.setattr(dense.Dense, "search", crash)  # of `tiny`, which is done
    assert cli.main("", evaluate.plan, evaluate.run, ["--config", str(file)]) == 0
    records = json.loads(place.read_text())
    assert list(dict.fromkeys(record["method"] for record in records)) == values["evaluate"]["methods"]
    assert [record for record in records if record["method"] == "tiny"] == before
    assert [record for record in records if record["method"] == "crash"] == [{**record, "method": "crash"} for record in before]


@pytest.mark.slow
def test_workers_encode_the_same_corpus(model: Path, ledger: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By Ray Data with two workers, and in this process: the same bytes, and the same results."""
    from intra.baselines.corpus import Corpus
    from tests.baselines.conftest import SIZES, saved

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
        made[workers] = {name: storage.read_bytes(vectors.path(name)) for name in storage.names(vectors.url)}
        made[workers]["results"] = Path(place).read_bytes()
    assert len(made[1]) == 4 + 2
    assert made[1] == made[2]


def tiny_dense(folder: Path) -> dict[str, Any]:
    return {"kind": "dense", "model": str(folder), "pooling": "mean", "max_length": 64}


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


def test_ablation_sets_its_rows_in_one_table(
    finished: tuple[Config, str], ledger: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that share every artifact but the results; run again, nothing is evaluated a second time."""
    from intra.evaluation import run as evaluation
    from workflows import ablate

    config, _ = finished
    for kind in ("dataset", "store", "retriever"):
        Path(tmp_path, kind).symlink_to(Path(config.root, kind))
    rows = {"INTRA": [], "no 4+1": ["retriever.answer_initial=0"], "BM25": ["evaluate.methods=[bm25]"]}
    values = {**config.model_dump(), "root": str(tmp_path), "ablation": {"seeds": [0], "rows": rows}}
    values["tracking"] = {"uri": ledger, "experiment": "ablation"}
    file = tmp_path / "ablation.yaml"
    file.write_text(json.dumps(values))

    assert cli.main("", ablate.plan, ablate.run, ["--config", str(file), "--dry-run"]) == 0
    assert capsys.readouterr().out.splitlines()[-3:] == [f"ablate: {row}: seed 0 evaluate" for row in rows]
    assert cli.main("", ablate.plan, ablate.run, ["--config", str(file)]) == 0
    lines = capsys.readouterr().out.splitlines()
    records = json.loads(Path(lines[-1]).read_text())
    assert list(dict.fromkeys(record["row"] for record in records)) == list(rows)
    bm25 = {row["question_id"]: row["em"] for row in table(config) if row["method"] == "bm25"}
    (record,) = [r for r in records if (r["row"], r["benchmark"], r["metric"]) == ("BM25", "synthetic", "em")]
    assert record["value"] == pytest.approx(sum(bm25.values()) / len(bm25))
    assert sum(line.startswith("| BM25 |") for line in lines) == 2

    wanted = {"BM25": record["value"], "1 token": 0.4}
    line = {"source": "table 7", "of": "rows", "benchmark": "synthetic", "metric": "em", "values": wanted}
    (tmp_path / "expected.yaml").write_text(json.dumps({"name": "the paper", "lines": [line]}))
    assert cli.main("", ablate.plan, ablate.run, ["--config", str(file), f"evaluate.expected=[{tmp_path / 'expected.yaml'}]"]) == 0
    assert "against the paper: 1 OK, 1 not run" in capsys.readouterr().out.splitlines()

    monkeypatch.setattr(evaluation, "make", lambda *_: pytest.fail("it is complete"))
    assert cli.main("", ablate.plan, ablate.run, ["--config", str(file)]) == 0
    assert capsys.readouterr().out.splitlines() == lines

    assert cli.main("", ablate.plan, ablate.run, ["--config", str(file), "ablation.rows.INTRA=[retriever.tokenz=1]"]) == 2
    assert "unknown key 'retriever.tokenz'; did you mean 'retriever.tokens'?" in capsys.readouterr().err


def test_results_are_judged_and_a_fall_ends_a_night_with_3(
    finished: tuple[Config, str], ledger: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What evaluate --expect prints expects these results again; a fall below it is named; another dataset's values judge nothing."""
    config, _ = finished
    for kind in ("dataset", "store", "retriever", "ranking", "answers"):
        Path(tmp_path, kind).symlink_to(Path(config.root, kind))
    values = {**config.model_dump(), "root": str(tmp_path), "tracking": {"uri": ledger, "experiment": "judged"}}
    file, expected = tmp_path / "run.yaml", tmp_path / "expected.yaml"
    file.write_text(json.dumps(values))
    start = ["--config", str(file)]
    assert cli.main("", nightly.plan, nightly.run, start) == 0
    capsys.readouterr()
    assert cli.main("", evaluate.plan, evaluate.run, [*start, "--expect"], others={"expect": (evaluate.expect, "")}) == 0
    text = capsys.readouterr().out

    judge = [*start, f"evaluate.expected=[{expected}]"]
    assert cli.main("", nightly.plan, nightly.run, judge) == 2
    assert f"evaluate.expected: no file {expected}" in capsys.readouterr().err
    expected.write_text(text)
    assert cli.main("", nightly.plan, nightly.run, judge) == 0
    out, _ = capsys.readouterr()
    assert "against the last nightly run: 24 OK" in out.splitlines()
    assert "<li>against the last nightly run: 24 OK</li>" in (tmp_path / "results" / "report.html").read_text()

    bm25 = next(r for r in json.loads((tmp_path / "results" / "results.json").read_text()) if (r["method"], r["metric"]) == ("bm25", "f1"))
    now = f"bm25: [{bm25['value']:.3f}, {bm25['low']:.3f}, {bm25['high']:.3f}]"
    head, _, rest = text.rpartition(now)
    expected.write_text(f"{head}bm25: [0.999, 0.998, 1.0]{rest}")
    for _ in range(2):  # also when all of it is there already
        assert cli.main("", nightly.plan, nightly.run, judge) == 3
        out, error = capsys.readouterr()
        assert error.splitlines()[-1].startswith(
            f"regression: FAIL: bm25, synthetic, F1: {bm25['value']:.3f}, expected 0.999 [0.998, 1.000]"
        )
        assert "against the last nightly run: 23 OK, 1 FAIL" in out.splitlines()
    assert cli.main("", evaluate.plan, evaluate.run, judge) == 0  # evaluate judges, but only a night fails by it
    capsys.readouterr()
    expected.write_text(expected.read_text().replace("questions_sha256: ", "questions_sha256: 0"))
    assert cli.main("", nightly.plan, nightly.run, judge) == 0
    assert "against the last nightly run: not judged, its values are of another dataset" in capsys.readouterr().out


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
