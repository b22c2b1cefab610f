"""Queries behind kept prefixes are those of the whole pass; what is kept changes no bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from intra.backbone.model import Backbone
from intra.data.schema import Question
from intra.retrieval import training
from intra.retrieval.negatives import Example
from intra.retrieval.prefix import Prefixes
from intra.retrieval.retriever import Retriever
from intra.retrieval.search import read_context
from intra.retrieval.training import Trainer

from .conftest import TRAIN, MemoryStore, settings


@pytest.fixture
def examples(questions: list[Question]) -> list[Example]:
    """Prompts and contexts of different lengths, one context empty."""
    contexts = [(3, 1, 8, 20), (5,), (), (7, 30)]
    return [
        Example(question.question_id, question.question, ((number,),), context, (number + 1,))
        for number, (question, context) in enumerate(zip(questions, contexts, strict=False))
    ]


def whole(backbone: Backbone, store: MemoryStore, examples: list[Example], tokens: Tensor, n_0: int = 4) -> Tensor:
    memory = read_context(backbone, store, [item.context for item in examples], n_0)  # type: ignore[arg-type]
    return backbone.queries(backbone.prompt_ids([item.question for item in examples]), tokens, memory)


def test_equals_the_whole_pass(backbone: Backbone, store: MemoryStore, retriever: Retriever, examples: list[Example]) -> None:
    prefixes = Prefixes(backbone, store, 4, 100)  # type: ignore[arg-type]
    assert len({len(ids) for ids in backbone.prompt_ids([item.question for item in examples])}) > 1
    for batch in (examples, examples[2:3], examples[1:3]):
        gradients = []
        for make in (lambda t, b=batch: prefixes.queries(b, t), lambda t, b=batch: whole(backbone, store, b, t)):
            tokens = retriever.tokens.detach().clone().requires_grad_()
            queries = make(tokens)
            (queries * torch.randn(queries.shape, generator=torch.Generator().manual_seed(0))).sum().backward()
            gradients.append((queries.detach(), tokens.grad))
        for one, other in zip(*gradients, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_an_empty_first_context_for_all(backbone: Backbone, store: MemoryStore, retriever: Retriever, examples: list[Example]) -> None:
    with torch.no_grad():
        found = Prefixes(backbone, store, 0, 100).queries(examples[:2], retriever.tokens)  # type: ignore[arg-type]
        torch.testing.assert_close(found, whole(backbone, store, examples[:2], retriever.tokens, 0), rtol=1e-4, atol=1e-4)


def test_what_fits_is_made_once_and_what_does_not_is_not_kept(
    backbone: Backbone, store: MemoryStore, retriever: Retriever, examples: list[Example]
) -> None:
    prefixes = Prefixes(backbone, store, 4, 100)  # type: ignore[arg-type]
    made = []
    make = prefixes._make
    prefixes._make = lambda item: made.append(item.question_id) or make(item)  # type: ignore[method-assign, func-returns-value]
    with torch.no_grad():
        first = prefixes.queries(examples, retriever.tokens)
        again = prefixes.queries(examples, retriever.tokens)
        assert len(made) == 4
        full = Prefixes(backbone, store, 4, 0)  # type: ignore[arg-type]
        full.room = prefixes._kept[examples[1].question_id].bytes
        without = full.queries(examples[1:], retriever.tokens), full.queries(examples, retriever.tokens)
    assert list(full._kept) == [examples[1].question_id]
    assert full.room == 0
    assert torch.equal(first, again)
    assert torch.equal(first, without[1])


@pytest.mark.parametrize("scoring", ["per_head", "mixture"])
def test_training_with_it(
    scoring: str, backbone: Backbone, store: MemoryStore, examples: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss without it; going on from a checkpoint, with nothing kept, gives the bytes of one run."""

    def trainer(megabytes: int) -> Trainer:
        retriever = training.start(backbone, store, settings(backbone, scoring=scoring), examples, 1)  # type: ignore[arg-type]
        recipe = TRAIN.model_copy(update={"prefix_cache_mb": megabytes})
        return Trainer(backbone, store, retriever, examples, recipe, 1)  # type: ignore[arg-type]

    plain, kept, second = trainer(0), trainer(50), trainer(50)
    for _ in range(4):
        plain.step()
        kept.step()
    torch.testing.assert_close(plain.curve, kept.curve, rtol=1e-3, atol=1e-3)
    second.restore(kept.state())
    second.step()
    kept.step()
    assert second.state() == kept.state()
