"""Per-question metrics of rankings and answers.

Retrieval, over the gold groups of a question (a group is one gold passage; any of its chunks stands for it):
    complete_recall_at_k   1 where every group has a chunk in the top k          (complete evidence, the paper's recall)
    recall_at_k            share of the groups with a chunk in the top k
    success_at_k           1 where any group has a chunk in the top k
    ndcg_at_10, mrr        binary gain; mrr within the depth that was ranked
    answer_recall_at_k     1 where an accepted answer stands in a chunk of the top k, gold or not; not for yes-or-no questions
Answers, as in SQuAD and HotpotQA: em and f1, the best over the accepted answers.

The standard measures are ir_measures'. It knows no groups, so the first chunk of a group in a ranking takes the group's own
identity, and a later chunk of that group keeps its place as one that is not relevant: no passage counts twice.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence

from intra.data.schema import Pool, Question
from intra.evaluate_config import NDCG_DEPTH
from intra.method import Rankings

Values = dict[str, float]


def depth(ks: Sequence[int]) -> int:
    """How many chunks a method must rank for the metrics at `ks`."""
    return max(*ks, NDCG_DEPTH)


def names(ks: Sequence[int]) -> list[str]:
    """The retrieval metrics' names, in the order of the report."""
    return [f"{kind}_at_{k}" for kind in ("complete_recall", "recall", "success") for k in ks] + ["ndcg_at_10", "mrr"]


def retrieval(questions: Sequence[Question], rankings: Rankings, ks: Sequence[int]) -> dict[str, Values]:
    """The retrieval metrics of every question, by question_id. Rankings are at least `depth(ks)` long."""
    standard = _standard(questions, rankings, ks)
    results = {}
    for question in questions:
        ids = [chunk_id for chunk_id, _ in rankings[question.question_id]]
        complete = {f"complete_recall_at_{k}": float(complete_evidence(question.gold, ids[:k])) for k in ks}
        results[question.question_id] = {name: {**complete, **standard[question.question_id]}[name] for name in names(ks)}
    return results


def complete_evidence(gold: Sequence[Sequence[str]], ids: Sequence[str]) -> bool:
    """Whether every gold group has a chunk among `ids`."""
    found = set(ids)
    return all(not found.isdisjoint(group) for group in gold)


def grouped(gold: Sequence[Sequence[str]], ids: Sequence[str]) -> tuple[set[str], list[str]]:
    """The gold groups' identities, and the ranking with the first chunk of each group replaced by its identity.

    Groups of the same chunks (a passage and its equivalent that are both gold) are one group.
    """
    groups = {f"group {number}": set(members) for number, members in enumerate(dict.fromkeys(tuple(sorted(group)) for group in gold))}
    open_groups = dict(groups)
    ranked = []
    for chunk_id in ids:
        identity = next((name for name, members in open_groups.items() if chunk_id in members), None)
        ranked.append(f"chunk {chunk_id}" if identity is None else identity)
        if identity is not None:
            del open_groups[identity]
    return set(groups), ranked


def _standard(questions: Sequence[Question], rankings: Rankings, ks: Sequence[int]) -> dict[str, Values]:
    import ir_measures
    from ir_measures import RR, R, Success, nDCG

    measures = {nDCG @ NDCG_DEPTH: "ndcg_at_10", RR: "mrr"}
    for k in ks:
        measures |= {R @ k: f"recall_at_{k}", Success @ k: f"success_at_{k}"}
    qrels: dict[str, dict[str, int]] = {}
    run: dict[str, dict[str, float]] = {}
    for question in questions:
        relevant, ranked = grouped(question.gold, [chunk_id for chunk_id, _ in rankings[question.question_id]])
        qrels[question.question_id] = dict.fromkeys(relevant, 1)
        # Scores by rank: ir_measures would order ties of the true scores its own way.
        run[question.question_id] = {name: float(-rank) for rank, name in enumerate(ranked)}
    results: dict[str, Values] = {question.question_id: dict.fromkeys(measures.values(), 0.0) for question in questions}
    for value in ir_measures.iter_calc(list(measures), qrels, run):
        results[value.query_id][measures[value.measure]] = float(value.value)
    return results


class Passages:
    """The chunks' texts, normalised when first looked at."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._known: dict[str, str] = {}

    def hold(self, chunk_id: str, answers: Sequence[str]) -> bool:
        """Whether title and text hold an answer (normalised, as whole words)."""
        if chunk_id not in self._known:
            row = self._pool.row_of[chunk_id]
            self._known[chunk_id] = f" {normalized(f'{self._pool.titles[row]} {self._pool.texts[row]}')} "
        return any(f" {answer} " in self._known[chunk_id] for answer in answers)


def answer_recall(questions: Sequence[Question], rankings: Rankings, ks: Sequence[int], passages: Passages) -> dict[str, Values]:
    """answer_recall_at_k of the questions whose answer a passage can hold, by question_id."""
    results = {}
    for question in questions:
        wanted = [answer for answer in map(normalized, question.answers) if answer and answer not in _WHOLE]
        if wanted:
            ids = [chunk_id for chunk_id, _ in rankings[question.question_id]]
            first = next((rank for rank, chunk_id in enumerate(ids[: max(ks)]) if passages.hold(chunk_id, wanted)), len(ids))
            results[question.question_id] = {f"answer_recall_at_{k}": float(first < k) for k in ks}
    return results


def normalized(answer: str) -> str:
    """SQuAD's normalisation: lower case, no punctuation, no articles, single spaces."""
    text = "".join(character for character in answer.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def exact_match(answer: str, accepted: Sequence[str]) -> float:
    """1 where the normalised answer equals an accepted one."""
    return float(any(normalized(answer) == normalized(gold) for gold in accepted))


def f1(answer: str, accepted: Sequence[str]) -> float:
    """The best token F1 over the accepted answers. 'yes', 'no' and 'noanswer' match only themselves (HotpotQA)."""
    return max((_f1(normalized(answer), normalized(gold)) for gold in accepted), default=0.0)


def _f1(answer: str, gold: str) -> float:
    if answer == gold:
        return 1.0  # also where both are empty, as in SQuAD 2.0: exact match never exceeds F1
    if answer in _WHOLE or gold in _WHOLE:
        return 0.0
    common = sum((Counter(answer.split()) & Counter(gold.split())).values())
    return 2 * common / (len(answer.split()) + len(gold.split())) if common else 0.0


_WHOLE = {"yes", "no", "noanswer"}


def answers(questions: Sequence[Question], given: Mapping[str, str]) -> dict[str, Values]:
    """em and f1 of every question, by question_id."""
    return {
        question.question_id: {
            "em": exact_match(given[question.question_id], question.answers),
            "f1": f1(given[question.question_id], question.answers),
        }
        for question in questions
    }
