"""The table of an ablation, from per-question values made by hand."""

from __future__ import annotations

import numpy as np
import pytest

from intra.evaluation import ablation


def table(values: dict[str, float], metric: str = "em", kind: str = "bridge") -> ablation.Table:
    return [{"question_id": name, "benchmark": "world", "type": kind, metric: value} for name, value in values.items()]


def test_means_seeds_and_paired_differences() -> None:
    first = {0: table({"a": 1.0, "b": 0.0}), 1: table({"a": 1.0, "b": 1.0})}
    second = {0: table({"a": 0.0, "b": 0.0}), 1: table({"a": 0.0, "b": 1.0})}
    records = ablation.records({"first": first, "second": second}, ["em", "f1"], 200)
    assert {record["metric"] for record in records} == {"em"}
    found = {(record["row"], record["benchmark"]): record for record in records}
    assert set(found) == {(row, name) for row in ("first", "second") for name in ("world", "world/bridge")}
    one, two = found["first", "world"], found["second", "world/bridge"]
    assert (one["value"], one["seeds"], one["n"], one["difference"]) == (0.75, [0.5, 1.0], 4, 0.0)
    assert (two["value"], two["seeds"], two["difference"]) == (0.25, [0.0, 0.5], -0.5)
    assert two["difference_low"] <= -0.5 <= two["difference_high"] <= 0.0


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
