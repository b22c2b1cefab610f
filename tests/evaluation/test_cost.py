"""Operations against torch's own count of what runs; seconds and memory of a block."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from intra.backbone import model as backbones
from intra.backbone.model import Backbone
from intra.data.schema import Question
from intra.evaluation import cost
from intra.retrieval import initial, scoring
from intra.retrieval.retriever import Retriever, RetrieverSettings

CHUNKS, LENGTH, TOKENS = 300, 7, 16


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return backbones.load("quickstart", device="cpu")


@pytest.fixture(scope="module")
def asked() -> list[Question]:
    return [Question("q", "b", "test", "Who directed the film The Silver Harbor of Ada Bell?", ("Carl Dorn",), (("c",),), 1, "")]


def counted(work: Any) -> float:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        work()
    return float(counter.get_total_flops())


def settings(backbone: Backbone, kind: str) -> RetrieverSettings:
    return RetrieverSettings(
        tokens=TOKENS, layers=backbone.layers, heads=backbone.heads, hidden_size=backbone.hidden_size, pooled_length=LENGTH,
        initial_context=4, initial_scoring="dot", scoring=kind, backbone="", store="",
    )  # fmt: skip


def test_an_answer(backbone: Backbone, asked: list[Question]) -> None:
    memory = backbone.pack([[torch.randn(60, backbone.hidden_size)]])
    prompts = backbone.prompt_ids([asked[0].question])
    given: list[str] = []
    measured = counted(lambda: given.extend(backbone.answer(prompts, memory, 8)))
    assert cost.answer(backbone, asked, given, 60) == pytest.approx(measured, rel=0.25)


@pytest.mark.parametrize("kind", ["per_head", "mixed"])
def test_the_retrieval_pass_and_the_scores(backbone: Backbone, asked: list[Question], kind: str) -> None:
    chosen = settings(backbone, kind)
    retriever = Retriever.initialise(backbone, chosen, 0)
    memory = backbone.pack([[torch.randn(25, backbone.hidden_size) for _ in range(4)]])
    found: list[torch.Tensor] = []
    measured = counted(lambda: found.append(backbone.queries(backbone.prompt_ids([asked[0].question]), retriever.tokens.detach(), memory)))
    assert cost.retrieval_pass(backbone, asked, chosen, 25) == pytest.approx(measured, rel=0.25)
    pooled = torch.randn(CHUNKS, LENGTH, backbone.hidden_size)
    scorer = scoring.scorer(kind, found[0], backbone, retriever.weights.detach())
    assert cost.scoring(backbone, chosen, CHUNKS, 1) == pytest.approx(counted(lambda: scorer(pooled)), rel=0.1)


def test_s_0(backbone: Backbone, asked: list[Question]) -> None:
    class Store:
        hidden_size = backbone.hidden_size

        def __len__(self) -> int:
            return CHUNKS

        def tiles(self, _: int) -> Iterator[tuple[int, torch.Tensor]]:
            yield 0, torch.randn(CHUNKS, LENGTH, backbone.hidden_size)

    chunks = initial.Chunks(initial.Space("dot", Store()), lambda: Store().tiles(512))  # type: ignore[arg-type]
    measured = counted(lambda: list(initial.search(backbone, chunks, [asked[0].question], 5)))
    assert cost.initial(backbone, asked, CHUNKS, LENGTH) == pytest.approx(measured, rel=0.25)


def test_a_meter_sees_time_and_memory() -> None:
    with cost.Meter() as meter:
        held = np.ones(40_000_000, dtype=np.float32)  # 160 MB
        time.sleep(0.1)
        before = meter.seconds
        del held
    assert meter.seconds >= before >= 0.1
    assert meter.seconds == meter.seconds
    with cost.Meter() as other:
        pass
    assert meter.peak_bytes - other.peak_bytes > 120_000_000
