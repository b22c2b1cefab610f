"""The backbone on another device than token ids, stores and batches (tests/two_devices.py): nothing is mixed, and it computes the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from intra.backbone import model
from intra.store import writer

from .. import two_devices
from ..two_devices import DEVICE, numbers
from .conftest import sentences

QUESTIONS = ["where was ada bell born", "red", "is the red moon film directed by ada"]


@pytest.fixture(params=["own", "adopted"])
def place(request: pytest.FixtureRequest, folder: Path, adopted_folder: Path) -> str:
    """Where a backbone lies: one with an encoder of its own, and one over a frozen BERT."""
    return str(folder if request.param == "own" else adopted_folder)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_encodes_asks_and_answers_there(place: str, dtype: str) -> None:
    texts = sentences(5, seed=3)

    def run(backbone: model.Backbone, on: Callable[[Tensor], Tensor]) -> list[Tensor]:
        states = backbone.encode(backbone.tokenize(texts))
        memory = backbone.pack([[on(state).float() for state in states[:3]], [], [on(states[4]).float()]])  # as a store gives them
        ids = backbone.prompt_ids(QUESTIONS)
        tokens = torch.randn(4, backbone.hidden_size, generator=torch.Generator().manual_seed(2)).requires_grad_()
        queries = backbone.queries(ids, tokens, memory)
        queries[..., 0].sum().backward()
        assert tokens.grad is not None
        keys = backbone.keys(model.pool_all([on(state) for state in states], 3), 1)
        assert len(backbone.answer(ids, memory, 3)) == 3
        return [*map(on, states), on(queries.detach()), on(keys), on(memory.states), tokens.grad]

    expected = run(model.load(place, dtype=dtype, device="cpu"), lambda tensor: tensor)
    moved = model.load(place, dtype=dtype, device="cpu")
    with two_devices.here():
        moved.model.to(DEVICE)
        found = run(moved, numbers)
    for one, other in zip(found, expected, strict=True):
        if dtype == "float32":
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
        else:
            assert torch.cosine_similarity(one.float().flatten(), other.float().flatten(), dim=0) > 0.98


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_chunks_of_a_store_are_encoded_there(place: str, dtype: torch.dtype) -> None:
    texts = sentences(12, seed=4)

    def run(backbone: model.Backbone) -> tuple[Tensor, Tensor]:
        scale = (torch.zeros(backbone.hidden_size), torch.ones(backbone.hidden_size)) if dtype == torch.int8 else None
        return writer.encode(backbone, backbone.tokenize(texts), 3, 64, dtype, scale)

    states, pooled = run(model.load(place, device="cpu"))
    moved = model.load(place, device="cpu")
    with two_devices.here():
        moved.model.to(DEVICE)
        there = run(moved)
    assert all(type(each) is Tensor for each in there)
    torch.testing.assert_close(there[1].float(), pooled.float(), rtol=0.02, atol=0.02)
    if dtype == torch.int8:
        assert (there[0] != states).float().mean() < 0.1
    else:
        torch.testing.assert_close(there[0], states, rtol=0.02, atol=0.02)
