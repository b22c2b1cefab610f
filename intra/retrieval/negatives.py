"""Which chunks a micro-batch's softmax runs over, and which of them are gold for which question.

Candidates = every gold chunk of its questions, each question's hard negatives (its best chunks by S_0 that are not gold), and chunks
drawn uniformly from the pool, shared by the micro-batch. Each chunk stands once. A chunk that is gold for a question is a positive for it
however it came in, so no question ever counts its own gold, or an equivalent of it, as a negative.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from intra.data.schema import Question
from intra.errors import UserError


@dataclass(frozen=True, slots=True)
class Example:
    """A training question as rows of the pool."""

    question_id: str
    question: str
    gold: tuple[tuple[int, ...], ...]  # a group per gold passage
    context: tuple[int, ...]  # S_0's first n_0, best first
    hard: tuple[int, ...]  # S_0's best that are not gold

    @property
    def positives(self) -> set[int]:
        """O(x) of the paper: every chunk of every group."""
        return {row for group in self.gold for row in group}


def depth(questions: Sequence[Question], initial_context: int, hard_negatives: int) -> int:
    """How deep S_0 must be so that every question finds its context and its hard negatives in it."""
    most_gold = max((sum(len(group) for group in question.gold) for question in questions), default=0)
    return max(initial_context, hard_negatives + most_gold if hard_negatives else 0)


def example(question: Question, row_of: dict[str, int], initial: Sequence[int], initial_context: int, hard_negatives: int) -> Example:
    """`initial`: rows of the pool, best first by S_0. Raises UserError for a question without gold or with gold outside the store."""
    if not question.gold or not all(question.gold):
        raise UserError(f"question {question.question_id}: it has no gold chunk to train on; run workflows/prepare.py again")
    try:
        gold = tuple(tuple(row_of[chunk_id] for chunk_id in group) for group in question.gold)
    except KeyError as error:
        raise UserError(f"question {question.question_id}: gold chunk {error} is not in the chunk store; run workflows/encode.py") from None
    positives = {row for group in gold for row in group}
    hard = [row for row in initial if row not in positives][:hard_negatives]
    return Example(question.question_id, question.question, gold, tuple(initial[:initial_context]), tuple(hard))


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
