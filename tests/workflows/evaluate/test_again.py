"""evaluate once more: what is complete is read, what is missing is made, and one method's failure leaves the others."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from intra import cli, lineage, storage
from intra import config as configuration
from intra.backbone import model as backbones
from intra.config import Config
from intra.data.schema import read_questions
from intra.errors import WorkflowError
from workflows import evaluate, prepare

from .runs import METHODS, linked, settings, table, tiny_dense


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


def test_an_interrupted_evaluation_goes_on(
    finished: tuple[Config, str], ledger: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in the last method, then started again: the same results, and what was committed is not searched again."""
    from intra.baselines import lexical, reference
    from intra.retrieval import search

    config, _ = finished
    again = config.model_copy(update={"root": str(tmp_path), "tracking": configuration.TrackingConfig(experiment="trial", uri=ledger)})
    linked(config, tmp_path)

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
    linked(config, tmp_path)
    made = lineage.ranking(config, "intra")
    shutil.copytree(made.url, tmp_path / "ranking" / made.fingerprint)
    assert lineage.ranking(again, "intra").complete()
    evaluate.run(again)
    assert lineage.ranking(again, "maxsim").complete()
    assert {row["method"] for row in table(again)} == {"intra"}


@pytest.fixture
def beside_a_stored_s_0(finished: tuple[Config, str], ledger: str, tmp_path: Path) -> Callable[[list[str]], Config]:
    """Another root, which has S_0's ranking; evaluates the methods there. `both` is a fusion of S_0 with BM25."""
    config, _ = finished
    linked(config, tmp_path)
    made = lineage.ranking(config, "maxsim")
    shutil.copytree(made.url, tmp_path / "ranking" / made.fingerprint)
    values = config.evaluate.model_dump() | {
        "answers": False,
        "models": {"both": {"kind": "fusion", "of": ["maxsim", "bm25"], "depth": 10}},
    }

    def evaluated(methods: list[str]) -> Config:
        chosen = type(config.evaluate).model_validate(values | {"methods": methods})
        track = configuration.TrackingConfig(experiment="trial", uri=ledger)
        again = config.model_copy(update={"root": str(tmp_path), "tracking": track, "evaluate": chosen})
        evaluate.run(again)
        return again

    return evaluated


def test_a_stored_s_0_is_not_searched_again(beside_a_stored_s_0: Callable[[list[str]], Config], monkeypatch: pytest.MonkeyPatch) -> None:
    """INTRA and S_0 reranked read it where it is stored."""
    from intra.retrieval import initial

    search = initial.search
    monkeypatch.setattr(initial, "search", lambda *given: pytest.fail("S_0 is stored") if given[2] else search(*given))
    again = beside_a_stored_s_0(["intra", "s0_reranked"])
    assert {row["method"] for row in table(again)} == {"intra", "s0_reranked"}


def test_a_fusion_of_a_stored_s_0_needs_no_backbone(
    beside_a_stored_s_0: Callable[[list[str]], Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backbones, "load", lambda *_, **__: pytest.fail("no backbone is needed"))
    assert {row["method"] for row in table(beside_a_stored_s_0(["both"]))} == {"both"}


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
