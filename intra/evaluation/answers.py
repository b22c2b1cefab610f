"""Answers of the same backbone, read from the stored states of a method's own top chunks.

The decoder reads a set: the order of the chunks in its memory does not enter its attention. So chunks are packed in id order,
and a question is answered once for a set of chunks, whichever methods chose it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

from tqdm import tqdm

from intra.data.schema import Question
from intra.evaluation import cost

if TYPE_CHECKING:
    from intra.backbone.model import Backbone
    from intra.store.reader import ChunkStore


class Parts(Protocol):
    """What answers are read with; looked up at the first answer, so that a run with nothing left to read loads nothing."""

    @property
    def backbone(self) -> Backbone: ...

    @property
    def store(self) -> ChunkStore: ...


class Reader:
    """Reads answers and remembers them.

    lengths: tokens of each chunk, by id, to put questions of like length in one batch. batch: questions at once. limit: the
    longest answer in tokens. Memory: the states of one batch's chunks, in float32. read: how many answers were read, not remembered.
    """

    def __init__(self, parts: Parts, lengths: Mapping[str, int], batch: int, limit: int) -> None:
        self._parts = parts
        self._lengths = lengths
        self._batch = batch
        self._limit = limit
        self._known: dict[tuple[str, tuple[str, ...]], str] = {}
        self.read = 0

    def remember(self, question_id: str, chunk_ids: Sequence[str], answer: str) -> None:
        """An answer that was read before, for `chunk_ids` in any order."""
        self._known[question_id, tuple(sorted(chunk_ids))] = answer

    def answer(self, questions: Sequence[Question], chosen: Mapping[str, Sequence[str]], name: str = "answers") -> dict[str, str]:
        """The answer to each question from its chosen chunks, by question_id. `name` is what the progress bar shows."""
        keys = {question.question_id: (question.question_id, tuple(sorted(chosen[question.question_id]))) for question in questions}
        new = [question for question in questions if keys[question.question_id] not in self._known]
        new.sort(key=lambda question: (sum(self._lengths[chunk] for chunk in keys[question.question_id][1]), question.question_id))
        for start in tqdm(range(0, len(new), self._batch), desc=name, unit="batch", disable=None):
            batch = new[start : start + self._batch]
            for question, text in zip(batch, self._read(batch, [keys[q.question_id][1] for q in batch]), strict=True):
                self._known[keys[question.question_id]] = text
        self.read += len(new)
        return {question_id: self._known[key] for question_id, key in keys.items()}

    def operations(self, questions: Sequence[Question], chosen: Mapping[str, Sequence[str]], answers: Mapping[str, str]) -> float:
        """Of reading one answer, the mean of these."""
        tokens = sum(self._lengths[chunk] for question in questions for chunk in chosen[question.question_id]) / len(questions)
        return cost.answer(self._parts.backbone, questions, [answers[question.question_id] for question in questions], tokens)

    def _read(self, questions: Sequence[Question], chosen: Sequence[Sequence[str]]) -> list[str]:
        needed = sorted({chunk for chunks in chosen for chunk in chunks})
        states = dict(zip(needed, self._parts.store.states(needed), strict=True))
        backbone = self._parts.backbone
        memory = backbone.pack([[states[chunk] for chunk in chunks] for chunks in chosen])
        return backbone.answer(backbone.prompt_ids([question.question for question in questions]), memory, self._limit)
