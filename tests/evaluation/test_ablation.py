"""The table of an ablation, from per-question values made by hand."""

from __future__ import annotations

import numpy as np
import pytest

from intra.evaluation import ablation
from intra.evaluation.intervals import bootstrap


def table(values: dict[str, float], metric: str = "em", kind: str = "bridge", world: str = "") -> ablation.Table:
    return [
        {"question_id": name, "question": f"{name} {world}?", "benchmark": "world", "type": kind, metric: value}
        for name, value in values.items()
    ]


def test_means_seeds_and_paired_differences() -> None:
    first = {0: table({"a": 1.0, "b": 0.0}), 1: table({"a": 1.0, "b": 1.0}, world="other")}
    second = {0: table({"a": 0.0, "b": 0.0}), 1: table({"a": 0.0, "b": 1.0}, world="other")}
    records = ablation.records({"first": first, "second": second}, ["em", "f1"], 200)
    assert {record["metric"] for record in records} == {"em"}
    found = {(record["row"], record["benchmark"]): record for record in records}
    assert set(found) == {(row, name) for row in ("first", "second") for name in ("world", "world/bridge")}
    one, two = found["first", "world"], found["second", "world/bridge"]
    assert (one["value"], one["seeds"], one["n"], one["difference"]) == (0.75, [0.5, 1.0], 4, 0.0)
    assert (two["value"], two["seeds"], two["difference"]) == (0.25, [0.0, 0.5], -0.5)
    assert two["difference_low"] <= -0.5 <= two["difference_high"] <= 0.0


def test_more_seeds_on_the_same_questions_are_no_more_questions() -> None:
    """Identical tables have one interval, of a row and of a difference, however many; a question's mean over seeds is resampled."""
    generator = np.random.default_rng(0)
    values, others = ({f"q{n}": float(value) for n, value in enumerate(generator.integers(0, 2, 80))} for _ in range(2))

    def found(count: int) -> list[dict[str, object]]:
        seeds = range(count)
        made = ablation.records({"first": {s: table(values) for s in seeds}, "second": {s: table(others) for s in seeds}}, ["em"], 500)
        return [{key: value for key, value in record.items() if key != "seeds"} for record in made]

    assert found(1) == found(3)
    assert found(3)[0]["n"] == 80
    other = {name: 1 - value for name, value in values.items()}
    swapped = ablation.records({"first": {0: table(values), 1: table(other)}}, ["em"], 500)[0]
    assert (swapped["value"], swapped["low"], swapped["high"], swapped["n"]) == (0.5, 0.5, 0.5, 80)
    assert swapped["seeds"] == [pytest.approx(np.mean(list(values.values()))), pytest.approx(np.mean(list(other.values())))]


def test_the_questions_of_several_worlds_are_all_resampled() -> None:
    """Their ids are the same, their texts are not."""
    generator = np.random.default_rng(0)
    worlds = {s: {f"q{n}": float(value) for n, value in enumerate(generator.integers(0, 2, 40))} for s in range(3)}
    found = ablation.records({"first": {s: table(values, world=str(s)) for s, values in worlds.items()}}, ["em"], 500)[0]
    pooled = np.array([[value] for values in worlds.values() for value in values.values()])
    low, high = bootstrap(pooled, 500, 0)
    assert (found["n"], found["value"], found["low"], found["high"]) == (120, pooled.mean(), low[0], high[0])


def test_rows_that_were_asked_other_questions_have_no_difference() -> None:
    records = ablation.records({"first": {0: table({"a": 1.0})}, "second": {0: table({"c": 1.0})}}, ["em"], 100)
    assert [record["difference"] for record in records if record["row"] == "second"] == [None, None]


def test_a_metric_the_first_row_lacks_has_no_difference() -> None:
    records = ablation.records({"first": {0: table({"a": 1.0}, "em")}, "second": {0: table({"a": 1.0}, "f1")}}, ["em", "f1"], 100)
    assert next(record for record in records if record["row"] == "second")["difference"] is None
    assert not any(np.isnan(record["value"]) for record in records)


def test_markdown_has_a_line_per_row() -> None:
    records = ablation.records({"first": {0: table({"a": 1.0})}, "no S_0": {0: table({"a": 0.0})}}, ["em"], 100)
    lines = ablation.markdown(records, "em").splitlines()
    assert lines[0].startswith("| row | world [95 %] | world/bridge [95 %] |")
    assert lines[3] == "| no S_0 | 0.000 [0.000, 0.000] | 0.000 [0.000, 0.000] | 0.000 to 0.000 | -1.000 [-1.000, -1.000] |"
    assert ablation.markdown(records, "f1").splitlines() == lines[:2]


def test_markdown_has_a_difference_of_every_benchmark() -> None:
    """Also of one that a row lacks: blank."""
    both = [*table({"a": 1.0, "b": 0.0}), *({**item, "benchmark": "real", "type": ""} for item in table({"c": 1.0}))]
    worse = [{**item, "em": 0.0} for item in both]
    found = ablation.records({"first": {0: both}, "worse": {0: worse}, "real only": {0: worse[2:]}}, ["em"], 100)
    lines = ablation.markdown(found, "em").splitlines()
    assert lines[0].endswith("| world/bridge [95 %] | seeds, real | difference, real | seeds, world | difference, world |")
    assert lines[1] == "|---" * 8 + "|"
    assert lines[3].split(" | ")[4:] == ["0.000 to 0.000", "-1.000 [-1.000, -1.000]", "0.000 to 0.000", "-0.500 [-1.000, +0.000] |"]
    assert lines[4] == "| real only | 0.000 [0.000, 0.000] |  |  | 0.000 to 0.000 | -1.000 [-1.000, -1.000] |  |  |"


@pytest.mark.parametrize("untyped", ["", None])
def test_questions_without_a_type_stand_under_their_benchmark(untyped: str) -> None:
    records = ablation.records({"first": {0: table({"a": 1.0}, kind=untyped)}}, ["em"], 100)
    assert [record["benchmark"] for record in records] == ["world"]
