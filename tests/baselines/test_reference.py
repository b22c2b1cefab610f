from __future__ import annotations

import math

import pyarrow as pa
import pytest

from intra.baselines.reference import Oracle, Random
from intra.data.schema import POOL_SCHEMA, Pool, Question
from intra.evaluation import metrics
from intra.method import Rankings, check

CHUNKS = 40
QUESTIONS = 3000


@pytest.fixture(scope="module")
def pool() -> Pool:
    ids = [f"c{row:02d}" for row in range(CHUNKS)]
    columns = {"chunk_id": ids, "title": ids, "text": ids, "source": ids, "n_tokens": [3] * CHUNKS}
    return Pool(pa.table(columns, schema=POOL_SCHEMA))


@pytest.fixture(scope="module")
def questions() -> list[Question]:
    """Two gold passages each; the second one of two pieces."""
    made = []
    for number in range(QUESTIONS):
        gold = ((f"c{number % 30:02d}",), (f"c{number % 30 + 3:02d}", f"c{number % 30 + 5:02d}"))
        made.append(Question(f"q{number}", "test", "test", "?", ("x",), gold, 2, "bridge"))
    return made


def mean(questions: list[Question], rankings: Rankings, metric: str) -> float:
    values = metrics.retrieval(questions, rankings, [5, 10])
    return sum(row[metric] for row in values.values()) / len(values)


def test_random_scores_at_chance(pool: Pool, questions: list[Question]) -> None:
    method = Random(seed=0)
    method.index(pool)
    rankings = method.search(questions, 10)
    check("random", rankings, questions, 10, pool)
    for k in (5, 10):
        missed_first = 1 - k / CHUNKS
        missed_second = math.comb(CHUNKS - 2, k) / math.comb(CHUNKS, k)
        missed_both = math.comb(CHUNKS - 3, k) / math.comb(CHUNKS, k)
        complete = 1 - missed_first - missed_second + missed_both
        deviation = math.sqrt(complete * (1 - complete) / QUESTIONS)
        assert abs(mean(questions, rankings, f"complete_recall_at_{k}") - complete) < 4 * deviation
        recall = ((1 - missed_first) + (1 - missed_second)) / 2
        assert abs(mean(questions, rankings, f"recall_at_{k}") - recall) < 4 * math.sqrt(0.25 / QUESTIONS)
        assert abs(mean(questions, rankings, f"success_at_{k}") - (1 - missed_both)) < 4 * math.sqrt(0.25 / QUESTIONS)


def test_a_constant_scorer_scores_at_chance(pool: Pool, questions: list[Question]) -> None:
    """It ranks by id alone, so it finds c00 .. c09: the expected recall is counted, not estimated."""
    constant = {question.question_id: [(chunk, 0.5) for chunk in pool.chunk_ids[:10]] for question in questions}
    check("constant", constant, questions, 10, pool)
    found = [all(any(int(chunk[1:]) < 5 for chunk in group) for group in question.gold) for question in questions]
    assert mean(questions, constant, "complete_recall_at_5") == pytest.approx(sum(found) / QUESTIONS)


def test_the_oracle_scores_one(pool: Pool, questions: list[Question]) -> None:
    method = Oracle(seed=0)
    method.index(pool)
    rankings = method.search(questions, 10)
    check("oracle", rankings, questions, 10, pool)
    for metric in metrics.names([5, 10]):
        assert mean(questions, rankings, metric) == 1.0
    assert [chunk for chunk, _ in rankings["q7"][:2]] == ["c07", "c10"]


def test_a_draw_depends_on_seed_and_question_alone(pool: Pool, questions: list[Question]) -> None:
    method = Random(seed=0)
    method.index(pool)
    together = method.search(questions[:5], 10)
    assert method.search([questions[3]], 10)["q3"] == together["q3"]
    assert together["q3"] != together["q4"]
    other = Random(seed=1)
    other.index(pool)
    assert other.search([questions[3]], 10)["q3"] != together["q3"]
