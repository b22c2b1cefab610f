"""The two ends of the scale: chance and perfect retrieval."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from intra.data.schema import Pool, Question
from intra.method import Ranking, Rankings


class Random:
    """k chunks drawn uniformly without replacement; the draw depends on the seed and the question's id alone."""

    name = "random"

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def index(self, pool: Pool) -> None:
        self._ids = pool.chunk_ids

    def search(self, questions: Sequence[Question], k: int) -> Rankings:
        return {question.question_id: _ranked(draw(self._ids, question, k, self._seed)) for question in questions}


class Oracle:
    """The first chunk of every gold group, in the groups' order, then random chunks.

    A question with more gold groups than k gets k of them: its complete-evidence recall is 0 even here.
    """

    name = "oracle"

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def index(self, pool: Pool) -> None:
        self._ids = pool.chunk_ids

    def search(self, questions: Sequence[Question], k: int) -> Rankings:
        rankings = {}
        for question in questions:
            gold = [group[0] for group in question.gold]
            # Drawing k + len(gold) leaves k where every gold chunk is among the drawn.
            filler = draw(self._ids, question, k + len(gold), self._seed)
            rankings[question.question_id] = _ranked(list(dict.fromkeys([*gold, *filler]))[:k])
        return rankings


def draw(ids: Sequence[str], question: Question, k: int, seed: int) -> list[str]:
    """k distinct ids (all of them where there are fewer), in random order."""
    key = int.from_bytes(hashlib.sha256(question.question_id.encode()).digest()[:8], "big")
    rows = np.random.default_rng([seed, key]).choice(len(ids), min(k, len(ids)), replace=False)
    return [ids[row] for row in rows]


def _ranked(ids: Sequence[str]) -> Ranking:
    return [(chunk_id, 1.0 / rank) for rank, chunk_id in enumerate(ids, start=1)]
