"""How the chunk store lies in storage, and which of its shards may be trusted.

    <store>/states/00000.safetensors   `states` [tokens of the shard, d], the encoder's output, chunk after chunk
    <store>/pooled/00000.safetensors   `pooled` [rows, pooled_length, d], the mean-pooled vectors (paper section 3.3)
    <store>/commit/00000.json          written after both: fingerprint, rows, tokens per chunk, sizes and SHA-256 of both
    <store>/index.parquet              chunk_id, shard, row (in the shard), n_tokens, offset (bytes into the states file)
    <store>/whitening.safetensors      `mean` [d], `matrix` [d, d], fp32 (intra.store.whitening)
    <store>/config.json                what shaped the store
    <store>/manifest.json              last: rows, tokens, bytes, shapes, dtype, backbone digest, SHA-256 of every shard

A shard is the unit of work and of commit: a run of `store.shard_chunks` consecutive chunks of the pool, which is sorted by
chunk id. Rows count through the shards in pool order. Bytes depend on the configuration alone: not on the number of workers,
nor on how often the run was cut off.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from intra import storage
from intra.artifact import Artifact

if TYPE_CHECKING:
    import torch

STATES, POOLED, COMMIT = "states", "pooled", "commit"
INDEX, WHITENING = "index.parquet", "whitening.safetensors"
ITEM_BYTES = {"float32": 4, "bfloat16": 2}

INDEX_SCHEMA = pa.schema(
    [("chunk_id", pa.string()), ("shard", pa.int32()), ("row", pa.int32()), ("n_tokens", pa.int32()), ("offset", pa.int64())]
)

Commit = dict[str, Any]


def torch_dtype(name: str) -> torch.dtype:
    import torch  # not above: a plan needs no torch

    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


@dataclass(frozen=True, slots=True)
class Shard:
    """Chunks [first, first + rows) of the pool."""

    number: int
    first: int
    rows: int

    @property
    def name(self) -> str:
        return f"{self.number:05d}"


def shards(chunks: int, shard_chunks: int) -> list[Shard]:
    """The pool cut into shards; the last one may be smaller."""
    return [Shard(number, first, min(shard_chunks, chunks - first)) for number, first in enumerate(range(0, chunks, shard_chunks))]


def file_name(folder: str, shard: int) -> str:
    return f"{shard:05d}.{'json' if folder == COMMIT else 'safetensors'}"


def path(url: str, folder: str, shard: int) -> str:
    return storage.join(url, folder, file_name(folder, shard))


def committed(store: Artifact, plan: Sequence[Shard]) -> dict[int, Commit]:
    """The commits that can be trusted, by shard: of this fingerprint, of these rows, with both files of the stated size.

    Any other is left out, and so its shard is made again. Three listings and one (concurrent) read of the commits.
    """
    found = {folder: storage.sizes(store.path(folder)) for folder in (COMMIT, STATES, POOLED)}
    present = [shard for shard in plan if file_name(COMMIT, shard.number) in found[COMMIT]]
    texts = storage.read_ranges(
        [(path(store.url, COMMIT, shard.number), 0, found[COMMIT][file_name(COMMIT, shard.number)]) for shard in present]
    )
    commits: dict[int, Commit] = {}
    for shard, text in zip(present, texts, strict=True):
        try:
            commit = json.loads(text)
        except ValueError:
            continue  # not one of ours: made again
        if isinstance(commit, dict) and _trusted(commit, store.fingerprint, shard, found):
            commits[shard.number] = commit
    return commits


def _trusted(commit: Commit, fingerprint: str, shard: Shard, found: Mapping[str, Mapping[str, int]]) -> bool:
    stated = (commit.get("fingerprint"), commit.get("shard"), commit.get("first"), commit.get("rows"))
    if stated != (fingerprint, shard.number, shard.first, shard.rows):
        return False
    return all(commit.get(folder, {}).get("bytes") == found[folder].get(file_name(folder, shard.number), -1) for folder in (STATES, POOLED))
