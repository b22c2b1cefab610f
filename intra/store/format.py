"""How the chunk store lies in storage (format version 2), and which of its shards may be trusted.

    <store>/states/<shard>.safetensors   `states` [tokens of the shard, width], the encoder's output, chunk after chunk
    <store>/pooled/<shard>.safetensors   `pooled` [rows, pooled_length, d], the mean-pooled vectors (paper section 3.3)
    <store>/commit/<shard>.json          written after both: format, fingerprint, shard, first, rows, tokens, content; by chunk n_tokens,
                                         states_crc32, pooled_crc32; of both files bytes, data_offset, sha256; seal
    <store>/index.parquet                one line a chunk, in row order (INDEX_SCHEMA)
    <store>/scale.safetensors            int8 only: `mu` [d], `sigma` [d], fp32 (intra.store.quantize)
    <store>/whitening.safetensors        `mean` [d], `matrix` [d, d], fp32 (intra.whitening)
    <store>/config.json                  what shaped the store
    <store>/plan.json                    the stores whose shards it was planned to borrow (intra.store.planning)
    <store>/manifest.json                last: format, fingerprint, encoding, rows, tokens, bytes, hidden_size, pooled_length, dtype,
                                         pooled_dtype, backbone, sha256 of the other files, and `shards`
    <store>/claim/                       while a run makes the store: who (intra.store.claim)

To read it without this program: line i of the index is row i. `shard` is a position in the manifest's `shards`, whose entry has the
shard's `name` and `store`: null, or the fingerprint of the store beside this one (<store>/../<fingerprint>) that holds the shard. The
states of the chunk are the bytes [offset, offset + n_tokens * width) of that states file, little-endian: d numbers a token of `dtype`
float32 or bfloat16; with int8 d bytes x and then one float32 s, and the state is mu + sigma * s * x. Its pooled vectors are
pooled_length * d numbers of `pooled_dtype` from byte pooled.data_offset + row * pooled_length * d * itemsize on. CRC-32 (zlib's) of
either stand in the index.

A shard is the unit of work and of commit: up to `store.shard_chunks` chunks, in the order of the pool, which is sorted by chunk id.
`content` is the SHA-256 of its chunks' ids and texts; its first hex digits are part of the shard's name, so that other chunks never come
under the same name. Rows count in pool order. Bytes depend on the configuration, the pool and the stores borrowed from: not on the number
of workers, nor on how often the run was cut off. A store borrows only from stores of the same `encoding`: backbone, tokenizer, precision,
batches, format.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from intra import storage
from intra.artifact import Artifact

if TYPE_CHECKING:
    import torch

FORMAT = 2
STATES, POOLED, COMMIT = "states", "pooled", "commit"
INDEX, WHITENING, SCALE, PLAN, SETTINGS = "index.parquet", "whitening.safetensors", "scale.safetensors", "plan.json", "config.json"
ITEM_BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}
SCALE_BYTES = 4  # behind each token's int8 states: their float32 scale
DIGEST_BYTES = 16

INDEX_SCHEMA = pa.schema(
    [
        ("chunk_id", pa.string()),
        ("digest", pa.binary(DIGEST_BYTES)),  # of the chunk's title and text (intra.store.planning)
        ("shard", pa.int32()),  # position in the manifest's shards
        ("row", pa.int32()),  # in the shard
        ("n_tokens", pa.int32()),
        ("offset", pa.int64()),  # bytes into the states file
        ("states_crc32", pa.uint32()),
        ("pooled_crc32", pa.uint32()),
    ]
)

Commit = dict[str, Any]


def torch_dtype(name: str) -> torch.dtype:
    import torch  # not above: a plan needs no torch

    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}[name]


def pooled_dtype(dtype: str) -> str:
    """Of the pooled vectors beside states of `dtype`: they are few, and every question reads all of them."""
    return "bfloat16" if dtype == "int8" else dtype


def token_bytes(hidden_size: int, dtype: str) -> int:
    """What the states of one token take."""
    return hidden_size * ITEM_BYTES[dtype] + (SCALE_BYTES if dtype == "int8" else 0)


def pooled_bytes(hidden_size: int, pooled_length: int, dtype: str) -> int:
    """What the pooled vectors of one chunk take."""
    return pooled_length * hidden_size * ITEM_BYTES[pooled_dtype(dtype)]


@dataclass(frozen=True, slots=True)
class Shard:
    """Chunks [first, first + rows) of those that the store itself encodes (without borrowed ones: of the pool)."""

    number: int
    first: int
    rows: int
    content: str = ""  # SHA-256 (hex) of the chunks' ids and digests; "" where a caller writes one by hand

    @property
    def name(self) -> str:
        return f"{self.number:05d}-{self.content[:8]}" if self.content else f"{self.number:05d}"


def shards(chunks: int, shard_chunks: int) -> list[Shard]:
    """The pool cut into shards; the last one may be smaller."""
    return [Shard(number, first, min(shard_chunks, chunks - first)) for number, first in enumerate(range(0, chunks, shard_chunks))]


def file_name(folder: str, shard: str) -> str:
    return f"{shard}.{'json' if folder == COMMIT else 'safetensors'}"


def path(url: str, folder: str, shard: str) -> str:
    """A file of the shard of that name."""
    return storage.join(url, folder, file_name(folder, shard))


def committed(store: Artifact, plan: Sequence[Shard]) -> dict[int, Commit]:
    """The commits that can be trusted, by shard: of this fingerprint, of these chunks, with both files of the stated size.

    Any other is left out, and so its shard is made again. Three listings and one (concurrent) read of the commits.
    """
    found = {folder: storage.sizes(store.path(folder)) for folder in (COMMIT, STATES, POOLED)}
    present = [shard for shard in plan if file_name(COMMIT, shard.name) in found[COMMIT]]
    texts = storage.read_ranges(
        [(path(store.url, COMMIT, shard.name), 0, found[COMMIT][file_name(COMMIT, shard.name)]) for shard in present]
    )
    commits: dict[int, Commit] = {}
    for shard, text in zip(present, texts, strict=True):
        commit = sealed(text)
        if commit is not None and _trusted(commit, store.fingerprint, shard, found):
            commits[shard.number] = commit
    return commits


def seal(commit: Commit) -> bytes:
    """The bytes of a commit file: its canonical JSON with `seal`, the SHA-256 of the JSON without it."""
    return (_canonical({**commit, "seal": hashlib.sha256(_canonical(commit).encode()).hexdigest()}) + "\n").encode()


def sealed(data: bytes) -> Commit | None:
    """The commit that these bytes are, without its seal; None where they are not as they were written."""
    try:
        commit = json.loads(data)
        mark = commit.pop("seal")
    except (ValueError, KeyError, AttributeError, TypeError):
        return None
    return commit if seal(commit) == bytes(data) and mark else None


def _canonical(value: Commit) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def _trusted(commit: Commit, fingerprint: str, shard: Shard, found: Mapping[str, Mapping[str, int]]) -> bool:
    stated = tuple(commit.get(key) for key in ("format", "fingerprint", "shard", "first", "rows", "content"))
    if stated != (FORMAT, fingerprint, shard.number, shard.first, shard.rows, shard.content):
        return False
    return all(commit.get(folder, {}).get("bytes") == found[folder].get(file_name(folder, shard.name), -1) for folder in (STATES, POOLED))
