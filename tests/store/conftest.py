"""A small store made without a model: a fake encoder whose states are known, written by the store's own writer."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pytest
import torch
from safetensors.torch import save
from torch import Tensor

from intra import storage
from intra.artifact import Artifact
from intra.backbone.model import Memory
from intra.data import schema
from intra.store import planning, quantize, writer
from intra.store.format import PLAN, SCALE, committed, shards, torch_dtype

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


SHARD_CHUNKS = 4


def token_ids(text: str) -> list[int]:
    return [ord(letter) % 50 for letter in text]


def write_pool(dataset: str, columns: Mapping[str, Sequence[object]]) -> None:
    data = schema.to_parquet(pa.table(dict(columns), schema=schema.POOL_SCHEMA))
    storage.write_bytes(storage.join(dataset, schema.POOL), data)
    Artifact("dataset", dataset, "", "prepare").finish({"pool_sha256": hashlib.sha256(data).hexdigest()})


def artifact(root: str, name: str) -> Artifact:
    return Artifact("store", storage.join(root, "store", name), name, "encode")


def planned(root: str, name: str, texts: Mapping[str, str], left_out: Sequence[str] = ()) -> planning.Plan:
    """The plan of the store `name` over the chunks of those ids and texts, written down."""
    dataset, chunk_ids = storage.join(root, "dataset", name), sorted(texts)
    columns = {
        "chunk_id": chunk_ids,
        "title": [""] * len(texts),
        "text": [texts[chunk_id] for chunk_id in chunk_ids],
        "source": ["s"] * len(texts),
        "n_tokens": [len(token_ids(texts[chunk_id])) for chunk_id in chunk_ids],
    }
    write_pool(dataset, columns)
    plan = planning.make(artifact(root, name), "encoding", dataset, SHARD_CHUNKS, left_out=left_out)
    storage.write_json(artifact(root, name).path(PLAN), plan.record())
    return plan


def encoded(root: str, name: str, texts: Mapping[str, str], left_out: Sequence[str] = ()) -> Artifact:
    """A complete store of that plan; what is committed stays."""
    store, plan, encoder = artifact(root, name), planned(root, name, texts, left_out), FakeEncoder()
    for shard in plan.shards:
        if shard.number not in committed(store, [shard]):
            ids = [token_ids(texts[plan.chunk_ids[row]]) for row in plan.rows_of(shard).tolist()]
            states, pooled = writer.encode(encoder, ids, POOLED, 32, torch.float32)  # type: ignore[arg-type]
            writer.write_shard(store, shard, [len(item) for item in ids], states, pooled)
    writer.finish(
        store, plan.chunk_ids, plan.shards, committed(store, plan.shards), {}, backbone="b" * 64, hidden_size=WIDTH, pooled_length=POOLED,
        dtype="float32", threads=1, encoding="encoding", digests=plan.digests, rows=plan.fresh, lent=plan.lent,
    )  # fmt: skip
    return store
