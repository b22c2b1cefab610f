"""The warm start on another device than its batches (tests/two_devices.py): nothing is mixed, and it computes the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from intra.backbone import checkpoint, curriculum, model, packing, warmstart
from intra.config import LossConfig

from ... import two_devices
from ...two_devices import DEVICE, numbers
from ..test_adopted import losses
from .conftest import POOLED, config

LOSSES = LossConfig(answer=1, retrieval=1, hop=1, attention=1)


def trained(
    module: warmstart.WarmStart, batch: packing.Batch, recipe: Any, device: torch.device
) -> tuple[dict[str, Tensor], warmstart.Optimizers]:
    """The losses of each step, by its number and their names."""
    warmstart.place(module.train(), recipe, device)
    optimizer = warmstart.optimizers(module, recipe)
    seen: dict[str, Tensor] = {}
    forward = module.forward
    module.forward = lambda *given: seen.setdefault(f"{len(seen)}", forward(*given))  # type: ignore[method-assign]
    warmstart.train(module, optimizer, lambda _: [batch], recipe)
    del module.forward
    return {f"{step} {name}": value.detach() for step, values in seen.items() for name, value in values.items()}, optimizer


@pytest.mark.parametrize(
    ("optimizer", "scoring", "changes"),
    [("muon", "per_head", {}), ("adamw", "mixture", {"precision": "bfloat16"}), ("muon", "mixture", {"gradient_checkpointing": True})],
)
def test_the_warm_start_trains_there(
    optimizer: str, scoring: str, changes: dict[str, Any], folder: Path, supervised: packing.Batch, tmp_path: Path
) -> None:
    recipe = config(steps=2, checkpoint_every=1, optimizer=optimizer, losses=LOSSES.model_dump(), **changes).backbone.warmstart
    fresh = curriculum.fresh_batches(config(), model.load(str(folder), device="cpu"))

    def fresh_module() -> warmstart.WarmStart:
        backbone = model.load(str(folder), device="cpu")
        backbone.model.requires_grad_(True)
        return warmstart.WarmStart(backbone, LOSSES, POOLED, scoring)

    expected, _ = trained(fresh_module(), supervised, recipe, torch.device("cpu"))
    module, other = fresh_module(), fresh_module()
    with two_devices.here():
        found, optimizers = trained(module, supervised, recipe, DEVICE)
        assert set(warmstart.measure(module, fresh)) >= {"fresh_bridge_accuracy", "fresh_last_hop_accuracy"}
        checkpoint.save(module, optimizers, tmp_path, 2)
        warmstart.place(other, recipe, DEVICE)
        assert checkpoint.load(other, warmstart.optimizers(other, recipe), tmp_path) == 2
    for one, two in zip(module.parameters(), other.parameters(), strict=True):
        assert torch.equal(numbers(one), numbers(two))
    assert found.keys() == expected.keys()
    for name, value in found.items():
        if "accuracy" not in name:  # Muon makes of a gradient's rounding what it makes of the gradient
            near = 1e-3 if name.startswith("0") and "precision" not in changes else 0.05
            torch.testing.assert_close(numbers(value), expected[name], rtol=near, atol=1e-3)


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("stored", [False, True])
def test_over_a_frozen_encoder_it_trains_there(stored: bool, checkpointed: bool, adopted_folder: Path) -> None:
    recipe = config(steps=1, losses=LOSSES.model_dump(), gradient_checkpointing=checkpointed).backbone.warmstart
    plain, _, batch = losses(adopted_folder)
    texts = dict(zip([*batch.rows, *batch.extra_rows], [*batch.chunks, *batch.extra], strict=True))
    states = {row: plain.backbone.encode([ids])[0] for row, ids in texts.items()}
    expected, _ = trained(plain, batch, recipe, torch.device("cpu"))
    module, _, _ = losses(adopted_folder, (lambda rows: [states[row] for row in rows]) if stored else None)
    with two_devices.here():
        found, _ = trained(module, batch, recipe, DEVICE)
    assert {"0 answer", "0 retrieval", "0 hop", "0 attention"} <= found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(numbers(value), expected[name], rtol=1e-3, atol=1e-3)
