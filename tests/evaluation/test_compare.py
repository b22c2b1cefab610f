"""Two runs side by side: evaluate.py --compare."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from intra.data.schema import Question, to_parquet
from intra.evaluation import compare, results, significance
from intra.evaluation.results import Outcome
from workflows import evaluate

COUNT = 200


def save(root: Path, em: dict[str, Any], config: dict[str, Any], text: str = "?", first: int = 0) -> str:
    """A results folder below a root, published; em: method -> values of the questions from `first` on."""
    outcomes, questions = [], []
    for method, values in em.items():
        questions = [Question(f"q{n}", "b", "test", text, ("x",), (("c",),), 1, "") for n in range(first, first + len(values))]
        outcome = Outcome(method, {q.question_id: [("c", 1.0)] for q in questions})
        rows: dict[str, dict[str, float]] = {q.question_id: {"em": float(v)} for q, v in zip(questions, values, strict=True)}
        rows[questions[0].question_id]["answer_recall_at_5"] = 1.0  # a metric that the other questions lack
        outcomes.append((outcome, rows))
    records = f"{config} {em}".encode()
    folder = root / "results" / "mark"
    folder.mkdir(parents=True)
    (folder / "per_question.parquet").write_bytes(to_parquet(results.per_question(outcomes, questions)))
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "manifest.json").write_text(json.dumps({"results_sha256": hashlib.sha256(records).hexdigest()}))
    (root / "results" / "results.json").write_bytes(records)
    return str(root)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    generator = np.random.default_rng(0)
    a = {name: generator.random(COUNT) < 0.5 for name in ("intra", "bm25", "random", "tfidf")}
    b = {name: values.copy() for name, values in a.items() if name != "tfidf"}
    b["intra"][:40] = True
    b["bm25"][0] = ~b["bm25"][0]
    folder = tmp_path_factory.mktemp("runs")
    config = {"seed": 0, "root": "a", "retriever": {"tokens": 16}}
    return save(folder / "a", a, config), save(folder / "b", b, {**config, "root": "b", "retriever": {"tokens": 64}})


def test_differences_and_their_significance(runs: tuple[str, str]) -> None:
    a, b = map(compare.read, runs)
    found = {(r["method"], r["metric"]): r for r in compare.compare(a, b, 2000, 500, 0)}
    assert {method for method, _ in found} == {"intra", "bm25", "random"}
    intra, bm25, chance = (found[name, "em"] for name in ("intra", "bm25", "random"))
    values = np.array([[b.rows["intra", f"q{n}"]["em"] - a.rows["intra", f"q{n}"]["em"]] for n in range(COUNT)])
    assert intra["difference"] == pytest.approx(values.mean())
    assert intra["b"] - intra["a"] == pytest.approx(intra["difference"])
    assert intra["p"] == significance.sign_flip(values, 2000, 0)[0] < 0.01
    assert intra["p_holm"] == pytest.approx(2 * intra["p"])
    assert 0 < intra["low"] < intra["difference"] < intra["high"]
    assert (bm25["p_holm"], chance["p_holm"], chance["difference"]) == (1.0, 1.0, 0.0)
    assert (intra["n"], found["intra", "answer_recall_at_5"]["n"]) == (COUNT, 1)


def test_the_command(runs: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = runs
    assert evaluate.main(["--compare", a, f"{b}/results/mark"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:4] == [f"A  {a}/results/mark", f"B  {b}/results/mark", "   retriever.tokens: 16 -> 64", "   only in A: tfidf"]
    cells = next(line.split() for line in lines if line.startswith("b  ") and " intra " in line)
    assert cells[2:4] == ["EM", "200"]
    assert cells[-1] == "*"
    assert not next(line for line in lines if " bm25 " in line).endswith("*")

    longer = save(tmp_path / "longer", {"intra": [1.0] * 5}, {}, first=COUNT - 2)
    assert evaluate.main(["--compare", a, longer]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "   seed: 0 -> (no such key)" in lines
    assert f"   {COUNT - 2} questions only in A" in lines
    assert "   3 questions only in B" in lines


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["A"], "usage: workflows/evaluate.py --compare RUN_A RUN_B"),
        (["A", "absent"], "absent: neither a results folder nor a root with results"),
        (["A", "other"], "question q0 is another one in"),
        (["A", "stale"], "its results.json belongs to no complete evaluation"),
        (["A", "apart"], "have no method and question in common"),
    ],
)
def test_mistakes(arguments: list[str], problem: str, runs: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path / "other", {"intra": [1.0]}, {}, text="another?")
    save(tmp_path / "apart", {"dense": [1.0]}, {})
    stale = save(tmp_path / "stale", {"intra": [1.0]}, {})
    Path(stale, "results", "results.json").write_text("[]")
    places = [runs[0] if name == "A" else str(tmp_path / name) for name in arguments]
    assert evaluate.main(["--compare", *places]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert problem in error
