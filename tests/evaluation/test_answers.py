from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from intra.backbone.model import pack
from intra.data.schema import Question
from intra.evaluation.answers import Reader


class Backbone:
    """Answers with the sums of its memory: it sees which states came, in which row."""

    device = torch.device("cpu")
    dtype = torch.float32

    def __init__(self) -> None:
        self.batches: list[int] = []

    def pack(self, groups: Any) -> Any:
        return pack(groups, self.device, self.dtype)

    def prompt_ids(self, questions: Sequence[str]) -> list[list[int]]:
        return [[len(question)] for question in questions]

    def answer(self, prompt_ids: Sequence[Sequence[int]], memory: Any, max_new_tokens: int) -> list[str]:
        self.batches.append(len(prompt_ids))
        sums = (memory.states[..., 0] * memory.mask).sum(dim=1).tolist()
        return [f"{ids[0]} {value:.0f} {max_new_tokens}" for ids, value in zip(prompt_ids, sums, strict=True)]


class Store:
    def states(self, chunk_ids: Sequence[str]) -> list[Tensor]:
        assert len(set(chunk_ids)) == len(chunk_ids)
        return [torch.full((int(chunk[1:]), 2), 10.0 ** int(chunk[1:])) for chunk in chunk_ids]


def ask(name: str) -> Question:
    return Question(name, "test", "test", name, ("x",), (("c1",),), 1, "single")


def test_a_set_of_chunks_is_read_once_in_any_order() -> None:
    backbone = Backbone()
    reader = Reader(SimpleNamespace(backbone=backbone, store=Store()), {"c1": 1, "c2": 2, "c3": 3}, batch=2, limit=7)
    questions = [ask("q"), ask("qq"), ask("qqq")]
    found = reader.answer(questions, {"q": ["c1", "c2"], "qq": ["c2"], "qqq": ["c3", "c1"]})
    assert found == {"q": "1 210 7", "qq": "2 200 7", "qqq": "3 3010 7"}
    assert backbone.batches == [2, 1]
    again = reader.answer(questions, {"q": ["c2", "c1"], "qq": ["c3"], "qqq": ["c1", "c3"]})
    assert again == {"q": "1 210 7", "qq": "2 3000 7", "qqq": "3 3010 7"}
    assert backbone.batches == [2, 1, 1]  # only the new set


def test_a_remembered_answer_is_not_read_again() -> None:
    backbone = Backbone()
    reader = Reader(SimpleNamespace(backbone=backbone, store=Store()), {"c1": 1, "c2": 2}, batch=2, limit=7)
    reader.remember("q", ["c2", "c1"], "from before")
    assert reader.answer([ask("q")], {"q": ["c1", "c2"]}) == {"q": "from before"}
    assert backbone.batches == []
