"""One protocol for every retrieval method, and the order of a ranking.

Room note: this stands left of `retrieval/` and `baselines/`, which both implement it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

from intra.data.schema import Pool, Question
from intra.errors import WorkflowError

Ranking = list[tuple[str, float]]  # (chunk_id, score), ordered by (-score, chunk_id)
Rankings = dict[str, Ranking]  # by question_id


class Method(Protocol):
    name: str

    def index(self, pool: Pool) -> None: ...

    def search(self, questions: Sequence[Question], k: int) -> Rankings: ...


def ordered(scored: Iterable[tuple[str, float]], k: int) -> Ranking:
    """The best k of (chunk_id, score), by (-score, chunk_id)."""
    return sorted(scored, key=lambda item: (-item[1], item[0]))[:k]


def check(name: str, rankings: Mapping[str, Ranking], questions: Sequence[Question], k: int, pool: Pool) -> None:
    """Refuses, by name, a ranking that is missing, shorter than k, holds a duplicate, an unknown chunk or a NaN, or is out of order."""
    for question in questions:
        ranking = rankings.get(question.question_id)
        where = f"method {name}, question {question.question_id}"
        if ranking is None:
            raise WorkflowError(f"{where}: no ranking")
        ids = [chunk_id for chunk_id, _ in ranking]
        if len(ids) < k:
            raise WorkflowError(f"{where}: {len(ids)} chunks where {k} were asked for; a pool smaller than evaluate.k?")
        if len(set(ids)) != len(ids):
            raise WorkflowError(f"{where}: a chunk is ranked twice")
        if not set(ids) <= pool.row_of.keys():
            unknown = next(chunk for chunk in ids if chunk not in pool.row_of)
            raise WorkflowError(f"{where}: '{unknown}' is no chunk of the pool")
        if any(math.isnan(score) for _, score in ranking):
            raise WorkflowError(f"{where}: a score is not a number")
        if ranking != ordered(ranking, len(ranking)):
            raise WorkflowError(f"{where}: not ordered by (-score, chunk_id)")
