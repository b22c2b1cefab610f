from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from intra.data.schema import POOL_SCHEMA, Pool, Question
from intra.errors import WorkflowError
from intra.evaluation import intervals, metrics
from intra.evaluation.results import trec
from intra.method import Ranking, check


def ask(question_id: str, gold: tuple[tuple[str, ...], ...], answers: tuple[str, ...] = ("x",)) -> Question:
    return Question(question_id, "test", "test", "?", answers, gold, len(gold), "bridge")


def ranked(*ids: str) -> Ranking:
    return [(chunk, float(-rank)) for rank, chunk in enumerate(ids)]


def make_pool(texts: dict[str, str]) -> Pool:
    columns = {"chunk_id": list(texts), "title": ["The title"] * len(texts), "text": list(texts.values()), "source": ["test"] * len(texts),
               "n_tokens": [1] * len(texts)}  # fmt: skip
    return Pool(pa.table(columns, schema=POOL_SCHEMA))


EXACT = [
    ("Paris", ["paris"], 1.0, 1.0),
    ("the  Paris!", ["Paris"], 1.0, 1.0),
    ("Paris, France", ["Paris"], 0.0, 2 / 3),
    ("Ada Bell", ["Carl Dorn", "Ada C. Bell"], 0.0, 0.8),
    ("London", ["Paris"], 0.0, 0.0),
    ("", ["Paris"], 0.0, 0.0),
    ("the", ["a"], 1.0, 1.0),  # both empty after normalisation: equal, as in SQuAD 2.0
    ("yes", ["Yes."], 1.0, 1.0),
    ("yes it is", ["yes"], 0.0, 0.0),  # HotpotQA: yes and no match only themselves
    ("no", ["no one"], 0.0, 0.0),
    ("no", ["no one", "No"], 1.0, 1.0),
    ("Bell Bell", ["Bell"], 0.0, 2 / 3),  # a repeated word counts once
    ("1,378", ["1378"], 1.0, 1.0),
    ("theatre", ["atre"], 0.0, 0.0),  # an article is a whole word
]


@pytest.mark.parametrize(("answer", "accepted", "em", "f1"), EXACT)
def test_em_and_f1_by_hand(answer: str, accepted: list[str], em: float, f1: float) -> None:
    assert metrics.exact_match(answer, accepted) == em
    assert metrics.f1(answer, accepted) == pytest.approx(f1)


def test_f1_is_never_below_em() -> None:
    chance = random.Random(0)
    pieces = ["a", "The", "an", "yes", "no", "noanswer", "Paris", "paris", "Bell", ".", ",", " ", "  ", "é", "2", "-", "\t", "(", "'s"]
    exact = 0
    for _ in range(20000):
        answer = "".join(chance.choices(pieces, k=chance.randint(0, 4)))
        accepted = ["".join(chance.choices(pieces, k=chance.randint(0, 4))) for _ in range(chance.randint(1, 3))]
        em, f1 = metrics.exact_match(answer, accepted), metrics.f1(answer, accepted)
        assert em <= f1 <= 1.0, (answer, accepted)
        exact += em == 1
    assert exact > 1000


def test_retrieval_metrics_by_hand() -> None:
    question = ask("q", (("a", "a2"), ("b",)))
    # The second chunk of the first group (a2) keeps its rank, and counts for nothing.
    ranking = ranked("x", "a", "a2", "y", "z", "b", "u", "v", "w", "t")
    found = metrics.retrieval([question], {"q": ranking}, [2, 5, 6])["q"]
    assert found["complete_recall_at_2"] == 0
    assert found["complete_recall_at_5"] == 0
    assert found["complete_recall_at_6"] == 1
    assert [found[f"recall_at_{k}"] for k in (2, 5, 6)] == [0.5, 0.5, 1.0]
    assert [found[f"success_at_{k}"] for k in (2, 5, 6)] == [1.0, 1.0, 1.0]
    assert found["mrr"] == 0.5
    ideal = 1 + 1 / np.log2(3)
    assert found["ndcg_at_10"] == pytest.approx((1 / np.log2(3) + 1 / np.log2(7)) / ideal)


def test_an_equivalent_passage_is_a_hit() -> None:
    question = ask("q", (("a", "twin"), ("twin", "a"), ("b",)))  # both versions annotated: one piece of evidence
    found = metrics.retrieval([question], {"q": ranked("twin", "b", *"cdefghij")}, [2])["q"]
    assert found["complete_recall_at_2"] == found["recall_at_2"] == found["ndcg_at_10"] == 1.0


def test_complete_recall_agrees_with_the_standard_measures() -> None:
    """Over random rankings: complete is recall = 1, success is recall > 0; and recall is the count of groups."""
    chance = random.Random(0)
    pool = [f"c{number}" for number in range(30)]
    questions, rankings = [], {}
    for number in range(300):
        chunks = chance.sample(pool, 6)
        gold = ((chunks[0],), (chunks[1], chunks[2]), (chunks[3], chunks[4], chunks[5]))[: chance.randint(1, 3)]
        questions.append(ask(f"q{number}", gold))
        # Ties in the scores: the order of the ranking is what counts.
        rankings[f"q{number}"] = [(chunk, 1.0) for chunk in sorted(chance.sample(pool, 15))]
    found = metrics.retrieval(questions, rankings, [1, 5, 10])
    seen = set()
    for question in questions:
        row, ids = found[question.question_id], [chunk for chunk, _ in rankings[question.question_id]]
        for k in (1, 5, 10):
            hit = [bool(set(group) & set(ids[:k])) for group in question.gold]
            assert row[f"recall_at_{k}"] == pytest.approx(sum(hit) / len(hit))
            assert row[f"complete_recall_at_{k}"] == float(all(hit))
            assert row[f"success_at_{k}"] == float(any(hit))
            seen.add((all(hit), any(hit)))
    assert seen == {(True, True), (False, True), (False, False)}


def test_answer_recall_is_of_whole_words_in_any_passage() -> None:
    passages = metrics.Passages(
        make_pool({"a": "He was born in Parish, 1378.", "b": "It lies near the Paris (France).", "c": "Paris, yes."})
    )
    ranking = ranked("a", "b", "c")
    for answers, found in [(("Paris",), [0, 1]), (("1,378", "x"), [1, 1]), (("Title",), [1, 1]), (("the paris france",), [0, 1])]:
        values = metrics.answer_recall([ask("q", (("c",),), answers)], {"q": ranking}, [1, 2], passages)["q"]
        assert values == {"answer_recall_at_1": found[0], "answer_recall_at_2": found[1]}, answers
    # No passage holds the answer of a yes-or-no question, nor one that normalises to nothing.
    assert metrics.answer_recall([ask("q", (("c",),), ("Yes", "the"))], {"q": ranking}, [1, 2], passages) == {}


def test_the_standard_measures_are_ir_measures_own_command_line(tmp_path: Path) -> None:
    chance = random.Random(1)
    questions = [ask(f"q{n}", tuple((f"c{number}",) for number in chance.sample(range(40), chance.randint(1, 4)))) for n in range(25)]
    rankings = {question.question_id: ranked(*chance.sample([f"c{number}" for number in range(40)], 20)) for question in questions}
    qrels, run = tmp_path / "qrels", tmp_path / "run"
    qrels.write_text("".join(f"{q.question_id} 0 {group[0]} 1\n" for q in questions for group in q.gold))
    run.write_text(trec("tiny", rankings, questions))
    names = {"nDCG@10": "ndcg_at_10", "RR": "mrr", "R@5": "recall_at_5", "Success@5": "success_at_5"}
    command = [sys.executable, "-m", "ir_measures", str(qrels), str(run), *names, "--by_query", "--no_summary", "--places", "9"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")
    found = metrics.retrieval(questions, rankings, [5])
    assert len([line for line in lines if line]) == 4 * 25
    for line in lines:
        if line:
            question_id, measure, value = line.split()
            assert found[question_id][names[measure]] == pytest.approx(float(value), abs=1e-8)


@pytest.mark.parametrize(
    ("ranking", "problem"),
    [
        (None, "no ranking"),
        (ranked("a", "b"), "2 chunks where 3 were asked for"),
        (ranked("a", "b", "a"), "ranked twice"),
        ([("a", 2.0), ("b", float("nan")), ("c", 1.0)], "not a number"),
        ([("a", 1.0), ("b", 2.0), ("c", 0.0)], "not ordered"),
        ([("b", 1.0), ("a", 1.0), ("c", 0.0)], "not ordered"),
        (ranked("a", "b", "z"), "'z' is no chunk of the pool"),
    ],
)
def test_a_bad_ranking_is_refused_by_name(ranking: Ranking | None, problem: str) -> None:
    rankings = {} if ranking is None else {"q": ranking}
    with pytest.raises(WorkflowError, match=f"method broken, question q: .*{problem}"):
        check("broken", rankings, [ask("q", (("a",),))], 3, make_pool({"a": "", "b": "", "c": ""}))


def test_the_bootstrap_agrees_with_scipy() -> None:
    from scipy.stats import bootstrap

    values = (np.random.default_rng(1).random((400, 2)) < [0.3, 0.7]).astype(float)
    low, high = intervals.bootstrap(values, 4000, seed=0)
    expected = bootstrap(
        (values,), np.mean, axis=0, n_resamples=4000, method="percentile", rng=np.random.default_rng(2)
    ).confidence_interval
    assert low == pytest.approx(expected.low, abs=0.006)
    assert high == pytest.approx(expected.high, abs=0.006)
    again = intervals.bootstrap(values[:, :1], 4000, seed=0)
    assert again[0][0] == pytest.approx(low[0])  # a column's interval does not depend on the others
    assert again[1][0] == pytest.approx(high[0])


def test_the_interval_of_a_constant_is_that_constant() -> None:
    low, high = intervals.bootstrap(np.full((37, 1), 1.0), 1000, seed=0)
    assert (low[0], high[0]) == (1.0, 1.0)
