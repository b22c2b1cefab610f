"""The paired tests, Holm's correction, the gap that is closed; the rates of false alarms and of coverage on simulated data."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from intra.data.schema import Question
from intra.evaluation import intervals, results, significance


def ask(number: int, benchmark: str = "b", kind: str = "bridge", hops: int = 2, source: str = "annotated") -> Question:
    return Question(f"{benchmark}{number}", benchmark, "test", "?", ("x",), (("c",),), hops, kind, source)


def test_the_test_agrees_with_scipy() -> None:
    from scipy.stats import permutation_test

    generator = np.random.default_rng(0)
    first = generator.random((60, 3))
    second = first + generator.normal([0.0, 0.08, 0.2], 0.3, (60, 3))
    found = significance.sign_flip(first - second, 20000, seed=0)
    for column in range(3):
        expected = permutation_test(
            (first[:, column], second[:, column]), lambda x, y, axis: np.mean(x - y, axis=axis), permutation_type="samples",
            n_resamples=20000, vectorized=True, rng=np.random.default_rng(1),
        ).pvalue  # fmt: skip
        assert found[column] == pytest.approx(expected, abs=0.015)
    exact = significance.sign_flip(np.array([[1.0], [1.0], [1.0], [1.0]]), 40000, seed=0)  # 2 of the 16 flips are as far
    assert exact[0] == pytest.approx(2 / 16, abs=0.01)
    assert significance.sign_flip(np.zeros((9, 1)), 200, seed=0)[0] == 1.0


def test_holm_by_hand() -> None:
    assert significance.holm(np.array([0.01, 0.04, 0.03, 0.005])).tolist() == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert significance.holm(np.array([0.5, 0.9])).tolist() == pytest.approx([1.0, 1.0])
    assert significance.holm(np.array([0.2])).tolist() == [0.2]


def graded(generator: np.random.Generator) -> Any:
    """Two copies with noise of a metric between 0 and 1 (F1): differences over 300 questions, 250 pairs of copies."""
    true = generator.random((300, 250))
    return np.clip(true + generator.normal(0, 0.2, true.shape), 0, 1) - np.clip(true + generator.normal(0, 0.2, true.shape), 0, 1)


def binary(generator: np.random.Generator) -> Any:
    """The same of a metric of 0 and 1 (complete evidence), over 750 questions. With fewer, the steps of its mean leave less than 5 %."""
    true = generator.random((750, 250))
    return (generator.random(true.shape) < true).astype(float) - (generator.random(true.shape) < true)


@pytest.mark.parametrize("copies", [graded, binary])
def test_two_copies_with_noise_differ_in_one_case_of_twenty(copies: Any) -> None:
    """At the level of 5 %, over 4,000 pairs of copies. Each 250 have their own permutations: a thousand are a sample too."""
    rates = [(significance.sign_flip(copies(np.random.default_rng([9, n])), 1000, seed=n) <= 0.05).mean() for n in range(16)]
    assert np.mean(rates) == pytest.approx(0.05, abs=0.01)


def test_the_interval_covers_the_truth_in_nineteen_cases_of_twenty() -> None:
    generator, cases = np.random.default_rng(4), 4000
    for rate, n in ((0.5, 300), (0.8, 300)):
        low, high = intervals.bootstrap((generator.random((n, cases)) < rate).astype(float), 1000, seed=0)
        assert ((low <= rate) & (rate <= high)).mean() == pytest.approx(0.95, abs=0.01)
    skewed = generator.beta(0.5, 1.5, (300, cases))  # mean 1/4
    low, high = intervals.bootstrap(skewed, 1000, seed=0)
    assert ((low <= 0.25) & (high >= 0.25)).mean() == pytest.approx(0.95, abs=0.01)


def values(rates: dict[str, float], questions: list[Question]) -> dict[str, dict[str, dict[str, float]]]:
    generator = np.random.default_rng(5)
    return {
        name: {question.question_id: {"em": float(generator.random() < rate), "mrr": float(generator.random())} for question in questions}
        for name, rate in rates.items()
    }


def test_intra_is_compared_with_every_method_but_the_ends() -> None:
    questions = [ask(n) for n in range(150)] + [ask(n, "c") for n in range(40)]
    table = values({"intra": 0.8, "bm25": 0.4, "tfidf": 0.78, "random": 0.1, "oracle": 1.0}, questions)
    for n in range(6):  # as good as INTRA, but for questions it answers differently
        table["tfidf"] |= {f"b{n}": {**table["intra"][f"b{n}"], "em": 1 - table["intra"][f"b{n}"]["em"]}}
    for n in range(6, 150):
        table["tfidf"][f"b{n}"] = {**table["intra"][f"b{n}"]}
    for question in questions[:10]:
        for mine in table.values():
            mine[question.question_id]["answer_recall_at_5"] = 1.0  # a metric that some questions lack
    found = significance.compare(table, questions, 2000, seed=0)
    assert {r["method"] for r in found} == {"bm25", "tfidf"}
    by_name = {(r["method"], r["benchmark"], r["metric"]): r for r in found}
    assert len(by_name) == 2 * 2 * 2 + 2
    bm25, tfidf = by_name["bm25", "b", "em"], by_name["tfidf", "b", "em"]
    assert bm25["difference"] == pytest.approx(np.mean([table["intra"][f"b{n}"]["em"] - table["bm25"][f"b{n}"]["em"] for n in range(150)]))
    assert bm25["p"] < 0.01 < 0.05 < tfidf["p"]
    assert bm25["p_holm"] == pytest.approx(2 * bm25["p"])
    assert tfidf["p_holm"] == tfidf["p"]
    assert (bm25["n"], by_name["bm25", "b", "answer_recall_at_5"]["n"]) == (150, 10)
    assert significance.compare({name: table[name] for name in ("bm25", "tfidf")}, questions, 100, seed=0) == []


def test_gap_closure_by_hand() -> None:
    questions = [ask(n) for n in range(4)]
    rows = {"intra": [1, 0, 1, 0], "random": [0, 0, 0, 0], "oracle": [1, 1, 1, 0]}
    table = {name: {f"b{n}": {"em": float(value)} for n, value in enumerate(row)} for name, row in rows.items()}
    (record,) = significance.gap_closure(table, questions, "em", 500, seed=0)
    assert (record["method"], record["metric"], record["n"]) == ("intra", "gap_closure_em", 4)
    assert record["value"] == pytest.approx(100 * (2 / 4) / (3 / 4))
    assert record["low"] <= record["value"] <= record["high"] <= 100
    assert significance.gap_closure({name: table[name] for name in ("intra", "oracle")}, questions, "em", 500, seed=0) == []
    assert significance.gap_closure(table, questions, "f1", 500, seed=0) == []


def test_breakdowns() -> None:
    questions = [ask(0, kind="bridge"), ask(1, kind="comparison", source="title"), ask(2, kind="", hops=4)]
    table = {"intra": {f"b{n}": {"em": float(n == 2)} for n in range(3)}}
    table["intra"]["b1"]["answer_recall_at_5"] = 1.0
    found = {(r["benchmark"], r["metric"]): (r["value"], r["n"]) for r in results.breakdowns(table, questions, 100, seed=0)}
    assert found["b/hops 2", "em"] == (0.0, 2)
    assert found["b/hops 4", "em"] == (1.0, 1)
    assert found["b/type comparison", "answer_recall_at_5"] == (1.0, 1)
    assert ("b/type bridge", "answer_recall_at_5") not in found
    names = ("hops 2", "hops 4", "type bridge", "type comparison", "gold_source annotated", "gold_source title")
    assert {name for name, _ in found} == {f"b/{name}" for name in names}
    assert found["b/gold_source annotated", "em"] == (0.5, 2)
    assert found["b/gold_source annotated", "em"][1] + found["b/gold_source title", "em"][1] == 3
