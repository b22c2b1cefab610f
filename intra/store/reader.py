"""Reads a complete chunk store: token states by chunk id, pooled vectors by row, all pooled vectors in tiles.

    store = ChunkStore(url)
    store.states(["c12", "c7"])             # [Tensor[n, d], Tensor[m, d]]
    for first, vectors in store.tiles(2048): ...

States and single pooled vectors are read by byte ranges, one per chunk, and the last CACHE bytes of each are kept; where all of them
take no more than that, whole shards are read, once. So memory does not grow with the pool.
"""

from __future__ import annotations

import hashlib
import io
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property

import numpy as np
import pyarrow.parquet as pq
import torch
from safetensors.torch import load as load_safetensors
from torch import Tensor
from tqdm import tqdm

from intra import storage
from intra.artifact import Artifact
from intra.errors import UserError, WorkflowError
from intra.store.format import INDEX, POOLED, STATES, WHITENING, path, torch_dtype

CACHE = 256 * 1024**2  # bytes of token states kept in memory, and as many of pooled vectors

Range = tuple[int, int, int]  # shard, first byte, number of bytes


class _Cache:
    """The bytes of the ranges read last, at most CACHE of them. Threads may share it."""

    def __init__(self) -> None:
        self._kept: OrderedDict[Range, bytes] = OrderedDict()
        self._size = 0
        self._lock = threading.Lock()

    def get(self, key: Range) -> bytes | None:
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
            return self._kept.get(key)

    def put(self, key: Range, data: bytes) -> None:
        with self._lock:
            if key not in self._kept:
                self._kept[key] = data
                self._size += len(data)
                while self._size > CACHE:
                    self._size -= len(self._kept.popitem(last=False)[1])


class ChunkStore:
    """A complete store at `url`. Rows are those of the pool: sorted by chunk id.

    Raises UserError where the store is missing or incomplete. Attributes: url, manifest, chunk_ids, row_of, hidden_size,
    pooled_length; `len()` is the number of chunks.
    """

    def __init__(self, url: str) -> None:
        self.url = storage.absolute(url)
        self.manifest = Artifact("store", self.url, "", "encode").manifest()
        self.hidden_size: int = self.manifest["hidden_size"]
        self.pooled_length: int = self.manifest["pooled_length"]
        self._dtype = torch_dtype(self.manifest["dtype"])
        index = pq.read_table(io.BytesIO(storage.read_bytes(storage.join(self.url, INDEX))))
        self.chunk_ids: list[str] = index["chunk_id"].to_pylist()
        self._shard, self._row, self._tokens, self._offset = (index[name].to_numpy() for name in ("shard", "row", "n_tokens", "offset"))
        self._firsts = np.array([shard["first"] for shard in self.manifest["shards"]], dtype=np.int64)
        shards = self.manifest["shards"]
        self._fits = {folder: sum(shard[folder]["bytes"] for shard in shards) <= CACHE for folder in (STATES, POOLED)}
        self._caches = {folder: _Cache() for folder in (STATES, POOLED)}
        if len(self.chunk_ids) != self.manifest["rows"]:
            raise WorkflowError(f"store {self.url}: {INDEX} has {len(self.chunk_ids)} rows, the manifest {self.manifest['rows']}; "
                                "delete the store and run workflows/encode.py again")  # fmt: skip

    def __len__(self) -> int:
        return len(self.chunk_ids)

    @cached_property
    def row_of(self) -> dict[str, int]:
        return {chunk_id: row for row, chunk_id in enumerate(self.chunk_ids)}

    def rows(self, chunk_ids: Sequence[str]) -> list[int]:
        """The row of each chunk. Raises UserError for an id that the store does not hold."""
        unknown = [chunk_id for chunk_id in chunk_ids if chunk_id not in self.row_of]
        if unknown:
            raise UserError(f"store {self.url} holds no chunk '{unknown[0]}' ({len(unknown)} unknown ids in all); give ids of its pool")
        return [self.row_of[chunk_id] for chunk_id in chunk_ids]

    def states(self, chunk_ids: Sequence[str]) -> list[Tensor]:
        """The token states of each chunk, Tensor[n_tokens, d] fp32, in the order asked for; an id may occur more than once.

        Raises UserError: an unknown id. WorkflowError: a shard that is cut off.
        """
        rows = self.rows(chunk_ids)
        unique = sorted(set(rows))
        width = self.hidden_size * self._dtype.itemsize
        found = self._read(STATES, [(int(self._shard[row]), int(self._offset[row]), int(self._tokens[row]) * width) for row in unique])
        tensors = {row: self._tensor(data).view(-1, self.hidden_size).float() for row, data in zip(unique, found, strict=True)}
        return [tensors[row] for row in rows]

    def pooled(self, wanted: Sequence[int] | Sequence[str]) -> Tensor:
        """The pooled vectors of the chunks, given by row or by id: Tensor[N, pooled_length, d] fp32, in the order asked for."""
        rows = self._checked(wanted)
        unique = sorted(set(rows))
        size = self.pooled_length * self.hidden_size * self._dtype.itemsize
        parts = self._read(POOLED, [self._pooled_range(row, 1, size) for row in unique])
        if not parts:
            return torch.empty(0, self.pooled_length, self.hidden_size)
        vectors = self._tensor(b"".join(parts)).view(-1, self.pooled_length, self.hidden_size).float()
        place = {row: number for number, row in enumerate(unique)}
        return vectors[[place[row] for row in rows]]

    def tiles(self, tile_chunks: int) -> Iterator[tuple[int, Tensor]]:
        """All pooled vectors in row order, `tile_chunks` chunks at a time: (first row, Tensor[n, pooled_length, d] fp32).

        Only the last tile may be smaller. While the caller works on a tile the next one is read: two are in memory, however
        large the pool.
        """
        with ThreadPoolExecutor(1, thread_name_prefix="tiles") as ahead:
            pending = None
            for first in range(0, len(self), tile_chunks):
                following = ahead.submit(self._tile, first, min(tile_chunks, len(self) - first))
                if pending is not None:
                    yield pending[0], pending[1].result()
                pending = (first, following)
            if pending is not None:
                yield pending[0], pending[1].result()

    def whitening(self) -> tuple[Tensor, Tensor]:
        """(mean Tensor[d], matrix Tensor[d, d]) fp32: a vector x is whitened as (x - mean) @ matrix (intra.store.whitening)."""
        tensors = load_safetensors(storage.read_bytes(storage.join(self.url, WHITENING)))
        return tensors["mean"], tensors["matrix"]

    def verify(self) -> None:
        """Reads every file and compares it with the manifest's SHA-256. Raises WorkflowError naming the first shard that differs."""
        for shard in tqdm(self.manifest["shards"], desc="verify", unit="shard", disable=None):
            for folder in (STATES, POOLED):
                place = path(self.url, folder, shard["shard"])
                try:
                    found = hashlib.sha256(storage.read_bytes(place)).hexdigest()
                except FileNotFoundError:
                    raise self._damaged(place, "is missing") from None
                if found != shard[folder]["sha256"]:
                    raise self._damaged(place, "differs from what was written")

    def _checked(self, wanted: Sequence[int] | Sequence[str]) -> list[int]:
        ids = [item for item in wanted if isinstance(item, str)]
        if ids:
            return self.rows(ids)
        rows = [int(item) for item in wanted]
        outside = [row for row in rows if not 0 <= row < len(self)]
        if outside:
            raise ValueError(f"store {self.url}: row {outside[0]} of {len(self)}")
        return rows

    def _tile(self, first: int, count: int) -> Tensor:
        size = self.pooled_length * self.hidden_size * self._dtype.itemsize
        ranges, row = [], first
        while row < first + count:
            end = min(first + count, self._shard_end(row))
            ranges.append(self._pooled_range(row, end - row, size))
            row = end
        parts = [self._tensor(part) for part in self._read(POOLED, ranges, keep=False)]
        return torch.cat(parts).view(-1, self.pooled_length, self.hidden_size).float()

    def _shard_end(self, row: int) -> int:
        shard = self.manifest["shards"][int(np.searchsorted(self._firsts, row, side="right")) - 1]
        return int(shard["first"] + shard["rows"])

    def _pooled_range(self, row: int, count: int, size: int) -> Range:
        number = int(self._shard[row])
        start = self.manifest["shards"][number][POOLED]["data_offset"] + int(self._row[row]) * size
        return number, int(start), count * size

    def _read(self, folder: str, ranges: Sequence[Range], keep: bool = True) -> list[bytes]:
        """The bytes of each range of the shards of `folder`; `keep` them where the folder is too large to be kept whole."""
        if not self._fits[folder]:
            return self._kept(folder, ranges) if keep else self._fetched(folder, ranges)
        shards = sorted({shard for shard, _, _ in ranges})
        whole = self._kept(folder, [(shard, 0, int(self.manifest["shards"][shard][folder]["bytes"])) for shard in shards])
        views = {shard: memoryview(data) for shard, data in zip(shards, whole, strict=True)}
        return [bytes(views[shard][start : start + length]) for shard, start, length in ranges]

    def _kept(self, folder: str, ranges: Sequence[Range]) -> list[bytes]:
        cache = self._caches[folder]
        found = {key: cache.get(key) for key in ranges}
        missing = [key for key, data in found.items() if data is None]
        fresh = dict(zip(missing, self._fetched(folder, missing), strict=True))
        for key, data in fresh.items():
            cache.put(key, data)
        return [fresh[key] if data is None else data for key, data in ((key, found[key]) for key in ranges)]

    def _fetched(self, folder: str, ranges: Sequence[Range]) -> list[bytes]:
        places = [path(self.url, folder, shard) for shard, _, _ in ranges]
        try:
            found = storage.read_ranges([(place, start, start + length) for place, (_, start, length) in zip(places, ranges, strict=True)])
        except (FileNotFoundError, WorkflowError):
            self._name_damage(folder, {shard for shard, _, _ in ranges})
            raise
        for place, data, (_, _, length) in zip(places, found, ranges, strict=True):
            if len(data) != length:
                raise self._damaged(place, f"is cut off ({len(data)} bytes where {length} should be)")
        return found

    def _name_damage(self, folder: str, shards: set[int]) -> None:
        """After a failed read of several files: raises WorkflowError for the first that is missing or of another size, if any."""
        for shard in sorted(shards):
            place = path(self.url, folder, shard)
            stated = self.manifest["shards"][shard][folder]["bytes"]
            try:
                found = storage.size(place)
            except FileNotFoundError:
                raise self._damaged(place, "is missing") from None
            if found != stated:
                raise self._damaged(place, f"is cut off ({found} bytes where {stated} should be)")

    def _tensor(self, data: bytes) -> Tensor:
        return torch.frombuffer(bytearray(data), dtype=self._dtype)

    def _damaged(self, place: str, what: str) -> WorkflowError:
        return WorkflowError(
            f"{place} {what}; delete it and {storage.join(self.url, 'manifest.json')}, then run workflows/encode.py again with the same "
            "configuration: it makes that shard again"
        )
