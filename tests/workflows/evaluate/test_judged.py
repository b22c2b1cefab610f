"""Results against expected values, and the rows of an ablation in one table."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from intra import cli
from intra.config import Config
from workflows import evaluate, nightly

from .runs import linked, table


def test_ablation_sets_its_rows_in_one_table(
    finished: tuple[Config, str], ledger: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that share every artifact but the results; run again, nothing is evaluated a second time."""
    from intra.evaluation import run as evaluation
    from workflows import ablate

    config, _ = finished
    linked(config, tmp_path)
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
    """What evaluate --expect prints expects these results again; a fall below it is named; a night its gate cannot judge is refused."""
    config, _ = finished
    linked(config, tmp_path, "ranking", "answers")
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

    expected.write_text(f"{head}{now}, absent: 0.5{rest}")
    assert cli.main("", nightly.plan, nightly.run, judge) == 2
    out, error = capsys.readouterr()
    assert "against the last nightly run: 24 OK, 1 not run" in out.splitlines()
    assert "error: against the last nightly run: 1 of 25 values not run, such as absent, synthetic, F1: this night" in error
    expected.write_text(text.replace("questions_sha256: ", "questions_sha256: 0"))
    for _ in range(2):
        assert cli.main("", nightly.plan, nightly.run, judge) == 2
        out, error = capsys.readouterr()
        assert "against the last nightly run: not judged, its values are of another dataset" in out
        assert "nothing is judged" in error.splitlines()[-1]
        assert "(workflows/evaluate.py --expect)" in error.splitlines()[-1]
    expected.write_text(text.replace("questions_sha256: ", "questions_sha256: 0").replace("gate: true", "gate: false"))
    assert cli.main("", nightly.plan, nightly.run, judge) == 0
    assert "against the last nightly run: not judged, its values are of another dataset" in capsys.readouterr().out
