"""A small store made without a model: a fake encoder whose states are known, written by the store's own writer."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from safetensors.torch import save
from torch import Tensor

from intra import storage
from intra.artifact import Artifact
from intra.backbone.model import Memory
from intra.store import quantize, writer
from intra.store.format import SCALE, committed, shards, torch_dtype

WIDTH = 8
POOLED = 3


class FakeEncoder:
    """States that depend on the token and its place only; not exact in bfloat16."""

    hidden_size = WIDTH

    def __init__(self) -> None:
        self.table = torch.randn(50, WIDTH, generator=torch.Generator().manual_seed(0))

    device = torch.device("cpu")

    def encode(self, token_ids: Sequence[Sequence[int]]) -> list[Tensor]:
        return [self.table[list(ids)] + torch.arange(len(ids))[:, None] / 7 for ids in token_ids]

    def states(self, token_ids: Sequence[Sequence[int]]) -> Memory:
        lengths = torch.tensor([len(ids) for ids in token_ids])
        padded = torch.nn.utils.rnn.pad_sequence(self.encode(token_ids), batch_first=True, padding_value=9.0)
        return Memory(padded, torch.arange(padded.shape[1])[None, :] < lengths[:, None])


def token_lists(count: int, seed: int = 1) -> list[list[int]]:
    chance = random.Random(seed)
    return [[chance.randrange(50) for _ in range(chance.randint(1, 12))] for _ in range(count)]


@dataclass
class Made:
    artifact: Artifact
    chunk_ids: list[str]
    ids: list[list[int]]
    states: list[Tensor]  # fp32, as encoded

    @property
    def url(self) -> str:
        return self.artifact.url


def write(root: str, *, count: int = 23, shard_chunks: int = 5, dtype: str = "float32", order: Sequence[int] | None = None) -> Made:
    """A complete store of `count` chunks, its shards written in `order`."""
    artifact = Artifact("store", storage.join(root, "store", "f" * 16), "f" * 16, "encode")
    encoder, ids, chunk_ids = FakeEncoder(), token_lists(count), [f"c{number:03d}" for number in range(count)]
    scale = None
    if dtype == "int8":
        scale = quantize.statistics(encoder.encode(ids), WIDTH)
        storage.write_bytes(artifact.path(SCALE), save({"mu": scale[0], "sigma": scale[1]}))
    plan = shards(count, shard_chunks)
    for number in order or range(len(plan)):
        shard = plan[number]
        part = ids[shard.first : shard.first + shard.rows]
        states, pooled = writer.encode(encoder, part, POOLED, 32, torch_dtype(dtype), scale)  # type: ignore[arg-type]
        writer.write_shard(artifact, shard, [len(item) for item in part], states, pooled)
    writer.finish(
        artifact, chunk_ids, plan, committed(artifact, plan), {"store": {"dtype": dtype}},
        backbone="b" * 64, hidden_size=WIDTH, pooled_length=POOLED, dtype=dtype, threads=1,
    )  # fmt: skip
    return Made(artifact, chunk_ids, ids, encoder.encode(ids))


@pytest.fixture
def made(root: str) -> Made:
    return write(root)
