"""What a user should know of a dataset before trusting figures on it: questions and evidence that training has seen, answers that no
evidence holds, ceilings of the metric. All of it is reported, none of it refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from intra.data import duplicates
from intra.data.schema import Question

LISTED = 20  # ids named for each finding
KS = (5, 10, 20)  # of complete-evidence recall@k: the paper's, whatever `evaluate.k` asks for (it shapes no dataset)
UNSPOKEN = {"yes", "no", "true", "false"}  # answers that no passage need hold
_WORD = re.compile(r"\w+")


def run(table: pa.Table, questions: Sequence[Question]) -> dict[str, Any]:
    """Plain JSON values: `questions_in_both_splits`; per benchmark and split `answer_not_in_gold`; per benchmark `test_gold_in_training`
    (any, all) and `ceiling` (the highest complete-evidence recall@k, for each of KS); `gold_chunks`.

    `table` is the pool (chunk_id, text), sorted by chunk_id.
    """
    return {
        "gold_chunks": len({chunk for question in questions for group in question.gold for chunk in group}),
        "questions_in_both_splits": _listed(_both_splits(questions)),
        "answer_not_in_gold": _per_split(questions, _unanswered(table, questions)),
        "test_gold_in_training": _leaked(questions),
        "ceiling": _ceiling(questions),
    }


def _listed(found: Sequence[Any]) -> dict[str, Any]:
    return {"count": len(found), "first": list(found[:LISTED])}


def _both_splits(questions: Sequence[Question]) -> list[list[str]]:
    """Pairs of ids [train, test] of one question in both splits, in whatever benchmarks; case and spacing aside."""
    first: dict[tuple[str, str], str] = {}
    for question in questions:
        first.setdefault((question.split, duplicates.normalized("", question.question)), question.question_id)
    return [[name, first["test", words]] for (split, words), name in first.items() if split == "train" and ("test", words) in first]


def _per_split(questions: Sequence[Question], found: Sequence[Question]) -> dict[str, dict[str, Any]]:
    result: dict[str, dict[str, Any]] = {question.benchmark: {} for question in questions}
    for name, split in sorted({(question.benchmark, question.split) for question in questions}):
        result[name][split] = _listed([question.question_id for question in found if (question.benchmark, question.split) == (name, split)])
    return dict(sorted(result.items()))


def _unanswered(table: pa.Table, questions: Sequence[Question]) -> list[Question]:
    """The questions of which no answer's words stand, in order, in any gold chunk or its title; yes and no aside."""
    needed = [q for q in questions if q.answers and not UNSPOKEN.intersection(answer.casefold() for answer in q.answers)]
    ids = pa.array([chunk for question in needed for group in question.gold for chunk in group], pa.string())
    rows = iter(np.asarray(pc.index_in(ids, value_set=table["chunk_id"].combine_chunks()).to_numpy(zero_copy_only=False), dtype=np.int64))
    columns = table["title"].combine_chunks(), table["text"].combine_chunks()
    missing = []
    for question in needed:
        texts = [_words(f"{columns[0][row]} {columns[1][row]}") for group in question.gold for row in _take(rows, len(group))]
        if not any(_words(answer) in text for answer in question.answers for text in texts):
            missing.append(question)
    return missing


def _take(rows: Iterator[Any], count: int) -> list[int]:
    return [int(next(rows)) for _ in range(count)]


def _words(text: str) -> str:
    return f" {' '.join(_WORD.findall(text.casefold()))} "


def _leaked(questions: Sequence[Question]) -> dict[str, dict[str, int]]:
    """Per benchmark: test questions of which any, or all, gold passages are gold of a training question of the same, or any, benchmark."""
    seen: dict[str, set[str]] = {}
    for question in questions:
        if question.split == "train":
            seen.setdefault(question.benchmark, set()).update(chunk for group in question.gold for chunk in group)
    everywhere = set().union(*seen.values())
    result: dict[str, dict[str, int]] = {}
    for question in questions:
        if question.split != "test":
            continue
        row = result.setdefault(question.benchmark, {"test": 0, "any": 0, "all": 0, "any_of_any_benchmark": 0})
        own = [any(chunk in seen.get(question.benchmark, ()) for chunk in group) for group in question.gold]
        row["test"] += 1
        row["any"] += any(own)
        row["all"] += all(own)
        row["any_of_any_benchmark"] += any(chunk in everywhere for group in question.gold for chunk in group)
    return dict(sorted(result.items()))


def _ceiling(questions: Sequence[Question]) -> dict[str, dict[str, float]]:
    """Per benchmark and k: the share of test questions with at most k gold passages. No method's complete-evidence recall@k is above it."""
    sizes: dict[str, list[int]] = {}
    for question in questions:
        if question.split == "test":
            sizes.setdefault(question.benchmark, []).append(len(question.gold))
    return {name: {str(k): round(float(np.mean(np.array(counts) <= k)), 4) for k in KS} for name, counts in sorted(sizes.items())}
