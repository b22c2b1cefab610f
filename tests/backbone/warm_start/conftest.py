"""A backbone in training, three packed worlds, and a small recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from intra.backbone import model, packing, warmstart
from intra.backbone.packing import EARLY, LATE, Look, PackedWorld, answer_segment, collate, retrieval_segment
from intra.config import Config, LossConfig, parse

from ..conftest import sentences

LOSSES = LossConfig(answer=1.0, retrieval=0.5, hop=0.5)


PROBES = 3


POOLED = 3


@pytest.fixture
def backbone(folder: Path) -> model.Backbone:
    """One of its own for each test: these change it."""
    loaded = model.load(str(folder), device="cpu")
    loaded.model.requires_grad_(True)
    return loaded


@pytest.fixture
def worlds(backbone: model.Backbone) -> list[PackedWorld]:
    """Three worlds of different sizes, with answer and retrieval segments between one another."""
    made = []
    for number, chunks in enumerate((3, 5, 2)):
        texts = backbone.tokenize(sentences(chunks, seed=number, shortest=2))
        prompts = backbone.prompt_ids(sentences(3, seed=10 + number, shortest=2))
        answers = backbone.answer_ids(["ada bell", "oldtown", "red moon film"])
        everything = list(range(chunks))
        segments = [answer_segment(prompts[0], answers[0], everything)]
        segments.append(retrieval_segment(prompts[1], range(PROBES), [0], [0, chunks - 1]))
        segments.append(answer_segment(prompts[2], answers[1], [chunks - 1]))
        segments.append(retrieval_segment(prompts[2], range(PROBES), everything, [chunks - 1]))
        made.append(PackedWorld(texts, segments, [[True] * POOLED] * chunks))
    return made


def config(**warm: Any) -> Config:
    values = {"steps": 6, "batch_size": 4, "micro_batch": 2, "questions": 4, "world_chunks": 4, "warmup_steps": 2, "probes": 2,
              "checkpoint_every": 2, "pooled_length": POOLED, "losses": LOSSES.model_dump(), **warm}  # fmt: skip
    return parse({"root": "unused", "backbone": {"train": True, "warmstart": values}})


@pytest.fixture
def supervised(backbone: model.Backbone, worlds: list[PackedWorld]) -> packing.Batch:
    """The worlds with looks of both halves, as one batch."""
    worlds[0].segments[0].looks = [Look(3, EARLY, [(1, 0), (2, 1)]), Look(3, LATE, [(0, 1)])]
    return collate(worlds, backbone.tokenizer.pad_token_id)


def without_gradient(module: warmstart.WarmStart) -> set[str]:
    """Parameters without a gradient; a layer's by its layer and part ("decoder.3.mlp"), if none of that part has one."""
    names: dict[str, bool] = {}
    for name, weight in module.named_parameters():
        if "eoi_embedding" in name:
            continue  # the end-of-image embedding is never read in text
        side, _, rest = name.partition(".layers.")
        short = f"{'decoder' if 'decoder' in side else 'encoder'}.{'.'.join(rest.split('.')[:3])}".removesuffix(".weight") if rest else name
        names[short] = names.get(short, False) or bool(weight.grad is not None and weight.grad.abs().sum() > 0)
    return {name for name, found in names.items() if not found}
