"""Results judged against expected values, and the files of such values that come with the project."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from intra import config as configuration
from intra.errors import UserError
from intra.evaluation import expectations
from intra.evaluation.expectations import Expectations

CONFIGS = Path(__file__).parents[2] / "configs"


def record(value: float, half: float = 0.02, method: str = "intra", benchmark: str = "b", metric: str = "em") -> dict[str, Any]:
    return {"method": method, "benchmark": benchmark, "metric": metric, "value": value, "low": value - half, "high": value + half, "n": 100}


def expect(value: Any, **settings: Any) -> Expectations:
    line = {"source": "table 1", "benchmark": "b", "metric": "em", "values": {"intra": value}}
    return Expectations.model_validate({"name": "x", "lines": [line], **settings})


@pytest.mark.parametrize(
    ("value", "expected", "verdict"),
    [
        (0.50, 0.50, "OK"),
        (0.50, 0.52, "OK"),  # in our own interval of .02
        (0.50, 0.53, "nearly"),
        (0.50, 0.55, "FAIL"),
        (0.50, 0.45, "FAIL"),  # too high is off too
        (0.50, [0.52, 0.015], "OK"),
        (0.50, [0.525, 0.015], "OK"),  # the root of .02 and .015 squared is .025
        (0.50, [0.53, 0.015], "nearly"),
        (0.50, [0.551, 0.015], "FAIL"),
        (0.50, [0.525, 0.51, 0.60], "OK"),  # the side that faces ours counts
        (0.50, [0.525, 0.52, 0.60], "nearly"),
    ],
)
def test_two_samples_are_judged_by_both_intervals(value: float, expected: Any, verdict: str) -> None:
    (judged,) = expectations.judge([record(value)], expect(expected))
    assert judged["verdict"] == verdict
    assert (judged["of"], judged["source"], judged["value"]) == ("intra", "table 1", value)


@pytest.mark.parametrize(
    ("value", "verdict"), [(0.9, "OK"), (0.50, "OK"), (0.49, "OK"), (0.485, "nearly"), (0.48, "nearly"), (0.479, "FAIL"), (0.2, "FAIL")]
)
def test_the_same_questions_are_judged_by_the_expected_interval(value: float, verdict: str) -> None:
    """Of one dataset, only too low is a fall; our own interval, of the same questions, excuses nothing."""
    expected = expect([0.5, 0.48, 0.52], ok=0.5, near=1, sides="below", gate=True, pool_sha256="p", questions_sha256="q")
    judged = expectations.judge([record(value, 0.2)], expected)
    assert judged[0]["verdict"] == verdict
    assert bool(expectations.regressions(judged)) == (verdict == "FAIL")
    assert expected.of_dataset({"pool_sha256": "p", "questions_sha256": "q"})
    assert not expected.of_dataset({"pool_sha256": "p", "questions_sha256": "other"})


def test_what_is_too_high_is_no_regression() -> None:
    assert expectations.regressions(expectations.judge([record(0.9)], expect(0.5))) == []
    assert len(expectations.regressions(expectations.judge([record(0.1)], expect(0.5)))) == 1


def test_means_and_what_was_not_run() -> None:
    line = {"source": "t", "benchmark": ["b", "c"], "metric": "em", "values": {"intra": 0.4, "bm25": 0.3}}
    expected = Expectations.model_validate({"name": "x", "lines": [line]})
    mean, absent = expectations.judge([record(0.3, 0.03), record(0.5, 0.04, benchmark="c"), record(0.3, method="bm25")], expected)
    assert (mean["value"], mean["verdict"], mean["benchmark"]) == (pytest.approx(0.4), "OK", "mean of b, c")
    assert mean["high"] - mean["value"] == pytest.approx(0.025)  # half of the root of .03 and .04 squared
    assert (absent["value"], absent["verdict"]) == (None, "not run")
    assert expectations.text([mean, absent]) == ["against x: 1 OK, 1 not run"]
    (line_,) = expectations.text(expectations.judge([record(0.3)], expect([0.5, 0.01])))[:1]
    assert line_ == "FAIL: intra, b, EM: 0.300, expected 0.500 [0.490, 0.510] (x, table 1)"


def test_a_file_that_judges_nothing_or_not_all_is_told() -> None:
    expected = expect(0.5)
    assert expectations.unjudged(expectations.judge([record(0.1)], expected), expected) == []  # a fall is judged
    assert expectations.unjudged([], expected) == ["against x: nothing is judged, its values are of another dataset or of no method"]
    absent = expectations.judge([record(0.5, method="bm25")], expected)
    assert expectations.unjudged(absent, expected) == ["against x: 1 of 1 values not run, such as intra, b, EM"]


def test_rows_of_an_ablation() -> None:
    lines = [{"source": "t", "of": "rows", "benchmark": "b", "metric": "em", "values": {"1 token": 0.4}}]
    expected = Expectations.model_validate({"name": "x", "lines": lines})
    row = {**record(0.4), "row": "1 token"}
    assert [r["verdict"] for r in expectations.judge([row], expected, "rows")] == ["OK"]
    assert expectations.judge([record(0.4)], expected) == []


def test_what_is_written_expects_itself(tmp_path: Path) -> None:
    found = [record(0.51234, 0.02), record(0.7, 0.01, "bm25"), record(0.1, 0.01, "random"), record(0.2, 0.1, benchmark="b/bridge"),
             record(0.9, 0.01, metric="complete_recall_at_5"), record(0.8, 0.01, metric="mrr")]  # fmt: skip
    file = tmp_path / "expected.yaml"
    file.write_text(expectations.written(found, "the last nightly run", "commit 1a2b", {"pool_sha256": "p", "questions_sha256": "q"}))
    expected = expectations.load(str(file))
    assert expected.gate
    assert expected.of_dataset({"pool_sha256": "p", "questions_sha256": "q"})
    judged = expectations.judge(found, expected)
    assert [(r["of"], r["metric"], r["verdict"]) for r in judged] == [
        ("intra", "complete_recall_at_5", "OK"), ("intra", "em", "OK"), ("bm25", "em", "OK")
    ]  # fmt: skip
    worse = [{**r, "value": r["low"] - 0.002} for r in found]
    assert [r["verdict"] for r in expectations.judge(worse, expected)] == ["FAIL"] * 3


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (None, "evaluate.expected: no file"),
        ("lines: [", "not valid YAML"),
        ("name: x\nlines: []\ngates: true", "gates: Extra inputs"),
        ("name: x\nlines: [{source: t, benchmark: b, metric: em, values: {intra: [.5, .6, .7]}}]", r"intra: found \[0.5, 0.6, 0.7\]"),
    ],
)
def test_mistakes_of_a_file(tmp_path: Path, text: str | None, problem: str) -> None:
    file = tmp_path / "expected.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(UserError, match=problem):
        expectations.load(str(file))


def test_a_folder_is_no_file_of_expected_values(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"evaluate\.expected: .* is a folder; name its files"):
        expectations.load(str(tmp_path))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"evaluate\.expected: no file"):
        expectations.load(str(tmp_path / "file" / "expected.yaml"))


def test_the_nightly_configuration_is_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(CONFIGS.parent)
    config = configuration.load("configs/nightly.yaml")
    assert config.evaluate.expected == [str(CONFIGS / "expected/nightly.yaml")]
    expected = expectations.load(config.evaluate.expected[0])
    assert expected.gate
    assert expected.bound
    assert expected.sides == "below"
    found = {(line.metric, name) for line in expected.lines for name in line.values}
    assert {name for _, name in found} == set(config.evaluate.methods) - {"random"}
    assert {metric for metric, _ in found} == {*(f"complete_recall_at_{k}" for k in config.evaluate.k), "em", "f1"}


def test_the_papers_values() -> None:
    """Every line has the methods of its table; means are the means of what they are of; figure 3 and table 7 agree with table 4."""
    expected = expectations.load(str(CONFIGS / "expected/paper.yaml"))
    assert not expected.gate
    values = {
        (line.source, str(line.benchmark), line.metric, name): line.expected(name)[0] for line in expected.lines for name in line.values
    }
    tables = {source: [key for key in values if key[0] == source] for source, *_ in values}
    assert {source: len(keys) for source, keys in tables.items()} == {
        "table 4": 108, "tables 1 and 5": 36, "tables 1 and 6": 36, "table 1": 18, "figure 3": 12, "table 7": 32
    }  # fmt: skip
    names = ["hotpotqa", "2wikimultihopqa", "musique", "nq"]
    for metric, source in (("em", "tables 1 and 5"), ("f1", "tables 1 and 6")):
        for method in ("tfidf", "bm25", "maxsim", "hybrid", "bge_large", "qwen3_0_6b", "qwen3_4b", "qwen3_4b_jina", "intra"):
            off = sum(values[source, name, metric, method] for name in names) / 4 - values["table 1", str(names), metric, method]
            assert abs(off) < (0.003 if (metric, method) == ("f1", "qwen3_4b_jina") else 0.0011), (metric, method)
    for key in tables["figure 3"]:
        if key[3] != "s0_reranked":
            assert values[key] == values["table 4", *key[1:]]
    for line in expected.lines:
        for name in line.values:
            low, high = line.expected(name)[1:]
            assert 0 < low <= high < 1
    rows = yaml.safe_load((CONFIGS / "ablation.yaml").read_text())["ablation"]["rows"]
    assert {key[3] for key in tables["table 7"]} - set(rows) == {"16 tokens"}  # the quick start's INTRA has 16
    known = set(yaml.safe_load(Path(configuration.__file__).with_name("models.yaml").read_text()))
    assert {key[3] for key in values if key[0] != "table 7"} <= known | {"tfidf", "bm25", "maxsim", "s0_reranked", "intra"}
    assert all(re.fullmatch(r"em|f1|complete_recall_at_(5|10|20)", key[2]) for key in values)
