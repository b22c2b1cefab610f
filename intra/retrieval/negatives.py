"""Which chunks a micro-batch's softmax runs over, and which of them are gold for which question.

Candidates = every gold chunk of its questions, each question's hard negatives (its best chunks by S_0 that are not gold, and those by BM25
behind its first ranks), and chunks drawn uniformly from the pool, shared by the micro-batch. Each chunk stands once. A chunk that is gold
for a question is a positive for it however it came in, so no question ever counts its own gold, or an equivalent of it, as a negative.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from intra.data.schema import Question
from intra.errors import UserError

Rows = Sequence[int]  # of the pool; where there are many, an array of 4 bytes each


@dataclass(frozen=True, slots=True)
class Example:
    """A training question as rows of the pool."""

    question_id: str
    question: str
    gold: tuple[tuple[int, ...], ...]  # a group per gold passage
    context: Rows  # S_0's first n_0, best first
    hard: Rows  # negatives mined for it: none is gold, each stands once

    @property
    def positives(self) -> set[int]:
        """O(x) of the paper: every chunk of every group."""
        return {row for group in self.gold for row in group}


def depth(questions: Sequence[Question], initial_context: int, hard_negatives: int) -> int:
    """How deep S_0 must be so that every question finds its context and its hard negatives in it."""
    return max(initial_context, hard_negatives + _most_gold(questions) if hard_negatives else 0)


def bm25_depth(questions: Sequence[Question], bm25_negatives: int, bm25_skip: int) -> int:
    """How deep BM25's ranking must be so that every question finds its negatives in it."""
    return bm25_skip + bm25_negatives + _most_gold(questions)


def _most_gold(questions: Sequence[Question]) -> int:
    return max((sum(len(group) for group in question.gold) for question in questions), default=0)


def example(
    question: Question, row_of: Mapping[str, int], initial: Rows, initial_context: int, hard_negatives: int,
    bm25: Rows = (), bm25_negatives: int = 0, bm25_skip: int = 0,
) -> Example:  # fmt: skip
    """`initial` and `bm25`: rows of the pool, best first. Of `bm25` the first `bm25_skip` rows are left out: they may be evidence that
    nobody marked. Raises UserError for a question without gold or with gold outside the store."""
    if not question.gold or not all(question.gold):
        raise UserError(f"question {question.question_id}: it has no gold chunk to train on; run workflows/prepare.py again")
    try:
        gold = tuple(tuple(row_of[chunk_id] for chunk_id in group) for group in question.gold)
    except KeyError as error:
        raise UserError(f"question {question.question_id}: gold chunk {error} is not in the chunk store; run workflows/encode.py") from None
    positives = {row for group in gold for row in group}
    hard = [row for row in initial if row not in positives][:hard_negatives]
    hard += [row for row in bm25[bm25_skip:] if row not in positives][:bm25_negatives]
    return Example(question.question_id, question.question, gold, array("i", initial[:initial_context]), array("i", dict.fromkeys(hard)))


def order(questions: int, batch_size: int, step: int, seed: int) -> list[int]:
    """The questions of a step: consecutive pieces of one shuffle after the other, a new shuffle for each epoch.

    Depends on nothing but its arguments, so that a resumed run needs no state. With fewer questions than a batch holds, a
    question may stand in it more than once.
    """
    chosen: list[int] = []
    position = step * batch_size
    while len(chosen) < batch_size:
        epoch, start = divmod(position, questions)
        shuffled = np.random.default_rng([seed, 1, epoch]).permutation(questions)
        piece = shuffled[start : start + batch_size - len(chosen)]
        chosen += piece.tolist()
        position += len(piece)
    return chosen


def candidates(examples: Sequence[Example], pool: int, sampled: int, key: Sequence[int]) -> tuple[list[int], Tensor]:
    """The rows of a micro-batch's candidates, ascending, and which are gold: BoolTensor[questions, candidates].

    `sampled` of the pool's rows are drawn uniformly without repetition; `key` seeds the draw.
    """
    rows = set(np.random.default_rng([*key]).choice(pool, size=min(sampled, pool), replace=False).tolist())
    for item in examples:
        rows |= item.positives | set(item.hard)
    ordered = sorted(rows)
    gold = torch.tensor([[row in positives for row in ordered] for positives in (item.positives for item in examples)])
    return ordered, gold
