"""Reads a complete chunk store: token states by chunk id, pooled vectors by row, all pooled vectors in tiles.

    store = ChunkStore(url)
    store.states(["c12", "c7"])             # [Tensor[n, d], Tensor[m, d]]
    for first, vectors in store.tiles(2048): ...

States and single pooled vectors are read by byte ranges, one per chunk, and the last CACHE bytes of each are kept; where all of them
take no more than that, whole shards are read, once. So memory does not grow with the pool. What is read is compared with the CRC-32 of the
index: states and single vectors each time, the vectors of tiles the first time that this object reads them; the files of the whole
store with the SHA-256 of the manifest.
"""

from __future__ import annotations

import hashlib
import io
import threading
import zlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from safetensors.torch import load as load_safetensors
from torch import Tensor

from intra import storage
from intra.artifact import Artifact
from intra.errors import UserError, WorkflowError
from intra.store import quantize
from intra.store.format import FORMAT, INDEX, POOLED, SCALE, STATES, WHITENING, path, pooled_bytes, token_bytes, torch_dtype

CACHE = 256 * 1024**2  # bytes of token states kept in memory, and as many of pooled vectors

Range = tuple[int, int, int]  # position of the shard in the manifest, first byte, number of bytes


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

    Raises UserError where the store is missing, incomplete or of another format. Attributes: url, manifest, chunk_ids, row_of, hidden_size,
    pooled_length, dtype (of the states: float32, bfloat16 or int8); `len()` is the number of chunks.
    """

    def __init__(self, url: str, manifest: Mapping[str, Any] | None = None) -> None:
        """`manifest` is for who makes the store and has not written it yet."""
        self.url = storage.absolute(url)
        self.manifest = dict(manifest) if manifest is not None else Artifact("store", self.url, "", "encode").manifest()
        if self.manifest.get("format") != FORMAT:
            raise UserError(f"store {self.url} has format version {self.manifest.get('format', 1)}, this program reads {FORMAT}; run "
                            "workflows/encode.py again: it makes a new store beside it")  # fmt: skip
        self.hidden_size: int = self.manifest["hidden_size"]
        self.pooled_length: int = self.manifest["pooled_length"]
        self.dtype: str = self.manifest["dtype"]
        self._pooled_dtype = torch_dtype(self.manifest["pooled_dtype"])
        self._sizes = {
            STATES: token_bytes(self.hidden_size, self.dtype),
            POOLED: pooled_bytes(self.hidden_size, self.pooled_length, self.dtype),
        }
        index = pq.read_table(io.BytesIO(self._file(INDEX)))
        self.chunk_ids: list[str] = index["chunk_id"].to_pylist()
        self._shard, self._row, self._tokens, self._offset = (index[name].to_numpy() for name in ("shard", "row", "n_tokens", "offset"))
        self._sums = {folder: index[f"{folder}_crc32"].to_numpy() for folder in (STATES, POOLED)}
        self._seen = np.zeros(len(self.chunk_ids), dtype=bool)  # rows whose pooled vectors a tile has compared
        self._shards: list[dict[str, Any]] = self.manifest["shards"]
        beside = self.url.rpartition("/")[0]
        self._urls = [storage.join(beside, shard["store"]) if shard["store"] else self.url for shard in self._shards]
        self._fits = {folder: sum(shard[folder]["bytes"] for shard in self._shards) <= CACHE for folder in (STATES, POOLED)}
        self._caches = {folder: _Cache() for folder in (STATES, POOLED)}
        if len(self.chunk_ids) != self.manifest["rows"]:
            raise WorkflowError(f"store {self.url}: {INDEX} has {len(self.chunk_ids)} rows, the manifest {self.manifest['rows']}; "
                                "run workflows/encode.py --repair with the same configuration")  # fmt: skip

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

        Raises UserError: an unknown id. WorkflowError: a shard that is missing, cut off or changed.
        """
        if self.dtype == "int8":
            mu, sigma = self.scale
            return [quantize.dequantize(values, scale, mu, sigma) for values, scale in self.quantized(chunk_ids)]
        return [stored.view(torch_dtype(self.dtype)).view(-1, self.hidden_size).float() for stored in self._stored(chunk_ids)]

    def states_of(self, rows: Sequence[int]) -> list[Tensor]:
        """As `states`, of chunks given by their rows."""
        return self.states([self.chunk_ids[row] for row in rows])

    def quantized(self, chunk_ids: Sequence[str]) -> list[tuple[Tensor, Tensor]]:
        """The states as an int8 store keeps them: (x int8 [n_tokens, d], s fp32 [n_tokens]) of each chunk; state = mu + sigma * s * x.

        With `quantize.fold` queries go against x itself, exactly. Raises as `states`, and ValueError for a store of another dtype.
        """
        if self.dtype != "int8":
            raise ValueError(f"store {self.url} keeps {self.dtype}, not int8")
        return [quantize.split(stored.view(-1, self._sizes[STATES])) for stored in self._stored(chunk_ids)]

    @cached_property
    def scale(self) -> tuple[Tensor, Tensor]:
        """(mu, sigma) of an int8 store, Tensor[d] fp32 each (intra.store.quantize)."""
        tensors = load_safetensors(self._file(SCALE))
        return tensors["mu"], tensors["sigma"]

    def _stored(self, chunk_ids: Sequence[str]) -> list[Tensor]:
        """The bytes of each chunk's states, int8 [n]."""
        rows = self.rows(chunk_ids)
        unique = sorted(set(rows))
        width = self._sizes[STATES]
        found = self._read(STATES, [(int(self._shard[row]), int(self._offset[row]), int(self._tokens[row]) * width) for row in unique])
        self._compare(STATES, unique, found)
        tensors = {row: torch.frombuffer(bytearray(data), dtype=torch.int8) for row, data in zip(unique, found, strict=True)}
        return [tensors[row] for row in rows]

    def pooled(self, wanted: Sequence[int] | Sequence[str]) -> Tensor:
        """The pooled vectors of the chunks, given by row or by id: Tensor[N, pooled_length, d] fp32, in the order asked for."""
        rows = self._checked(wanted)
        unique = sorted(set(rows))
        parts = self._read(POOLED, [self._pooled_range(int(self._shard[row]), int(self._row[row]), 1) for row in unique])
        if not parts:
            return torch.empty(0, self.pooled_length, self.hidden_size)
        self._compare(POOLED, unique, parts)
        vectors = torch.frombuffer(bytearray(b"".join(parts)), dtype=self._pooled_dtype)
        place = {row: number for number, row in enumerate(unique)}
        return vectors.view(-1, self.pooled_length, self.hidden_size).float()[[place[row] for row in rows]]

    def tiles(self, tile_chunks: int, start: int = 0, count: int | None = None) -> Iterator[tuple[int, Tensor]]:
        """The pooled vectors of all rows (or of `count` from `start`) in row order, `tile_chunks` chunks at a time: (first row,
        Tensor[n, pooled_length, d] fp32).

        Only the last tile may be smaller. While the caller works on a tile the next one is read: two are in memory, however
        large the pool.
        """
        end = len(self) if count is None else start + count
        with ThreadPoolExecutor(1, thread_name_prefix="tiles") as ahead:
            pending = None
            for first in range(start, end, tile_chunks):
                following = ahead.submit(self._tile, first, min(tile_chunks, end - first))
                if pending is not None:
                    yield pending[0], pending[1].result()
                pending = (first, following)
            if pending is not None:
                yield pending[0], pending[1].result()

    def whitening(self) -> tuple[Tensor, Tensor]:
        """(mean Tensor[d], matrix Tensor[d, d]) fp32: a vector x is whitened as (x - mean) @ matrix (intra.whitening)."""
        tensors = load_safetensors(self._file(WHITENING))
        return tensors["mean"], tensors["matrix"]

    def _file(self, name: str) -> bytes:
        """A file of the whole store. Raises WorkflowError where it is missing or not as the manifest states it."""
        place = storage.join(self.url, name)
        try:
            data = storage.read_bytes(place)
        except FileNotFoundError:
            raise self._damaged(place, "is missing") from None
        if hashlib.sha256(data).hexdigest() != self.manifest["files"][name]:
            raise self._damaged(place, "differs from what was written")
        return data

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
        """One range of each shard that the rows touch: from the first to the last of them, in which other stores' rows may stand."""
        size = self._sizes[POOLED]
        found = np.empty((count, size), dtype=np.uint8)
        shard, row = self._shard[first : first + count], self._row[first : first + count]
        places = [np.flatnonzero(shard == number) for number in np.unique(shard)]
        starts = [int(row[place].min()) for place in places]
        ranges = [
            self._pooled_range(int(shard[place[0]]), start, int(row[place].max()) - start + 1)
            for place, start in zip(places, starts, strict=True)
        ]
        for place, start, part in zip(places, starts, self._read(POOLED, ranges, keep=False), strict=True):
            found[place] = np.frombuffer(part, dtype=np.uint8).reshape(-1, size)[row[place] - start]
        fresh = [number for number in range(count) if not self._seen[first + number]]
        self._compare(POOLED, [first + number for number in fresh], [found[number].data for number in fresh])
        self._seen[first : first + count] = True
        return (
            torch.from_numpy(found.view(np.int8)).view(-1).view(self._pooled_dtype).view(-1, self.pooled_length, self.hidden_size).float()
        )

    def _pooled_range(self, shard: int, row: int, count: int) -> Range:
        size = self._sizes[POOLED]
        return shard, int(self._shards[shard][POOLED]["data_offset"]) + row * size, count * size

    def _compare(self, folder: str, rows: Sequence[int], found: Sequence[bytes | memoryview]) -> None:
        """Raises WorkflowError where the bytes of a chunk are not those that were written."""
        sums = self._sums[folder]
        for row, data in zip(rows, found, strict=True):
            if zlib.crc32(data) != sums[row]:
                raise self._damaged(
                    self._path(folder, int(self._shard[row])), f"differs from what was written (chunk {self.chunk_ids[row]})"
                )

    def _path(self, folder: str, shard: int) -> str:
        return path(self._urls[shard], folder, self._shards[shard]["name"])

    def _read(self, folder: str, ranges: Sequence[Range], keep: bool = True) -> list[bytes]:
        """The bytes of each range of the shards of `folder`; `keep` them where the folder is too large to be kept whole."""
        if not self._fits[folder]:
            return self._kept(folder, ranges) if keep else self._fetched(folder, ranges)
        shards = sorted({shard for shard, _, _ in ranges})
        whole = self._kept(folder, [(shard, 0, int(self._shards[shard][folder]["bytes"])) for shard in shards])
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
        places = [self._path(folder, shard) for shard, _, _ in ranges]
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
            place, stated = self._path(folder, shard), self._shards[shard][folder]["bytes"]
            try:
                found = storage.size(place)
            except FileNotFoundError:
                raise self._damaged(place, "is missing") from None
            if found != stated:
                raise self._damaged(place, f"is cut off ({found} bytes where {stated} should be)")

    def _damaged(self, place: str, what: str) -> WorkflowError:
        return WorkflowError(f"{place} {what}; run workflows/encode.py --repair with the same configuration, which makes it again")
