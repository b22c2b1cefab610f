"""Pooled vectors in one raw file: a pool of any size for the benchmark and the tests, read as a chunk store is."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from intra.errors import WorkflowError


class VectorFile:
    """float32 [rows, P, d], row after row. Memory holds two tiles, however long it is."""

    def __init__(self, path: str, pooled_length: int, hidden_size: int) -> None:
        self.path, self.shape = path, (pooled_length, hidden_size)
        self._bytes = 4 * pooled_length * hidden_size
        self._rows = Path(path).stat().st_size // self._bytes

    @classmethod
    def write(cls, path: str, parts: Iterable[Tensor]) -> VectorFile:
        """From parts [n, P, d], one at least."""
        shape = None
        with open(path, "wb") as file:
            for part in parts:
                shape = tuple(part.shape[1:])
                file.write(part.contiguous().float().numpy().data)
        if shape is None:
            raise ValueError("no vectors")
        return cls(path, *shape)

    def __len__(self) -> int:
        return self._rows

    def tiles(self, tile_chunks: int, start: int = 0, count: int | None = None) -> Iterator[tuple[int, Tensor]]:
        """As `ChunkStore.tiles`: the next tile is read meanwhile."""
        end = len(self) if count is None else start + count
        with ThreadPoolExecutor(1, thread_name_prefix="tiles") as ahead:
            waiting = [
                (first, ahead.submit(self._read, first, min(tile_chunks, end - first))) for first in range(start, min(start + 1, end))
            ]
            for first in range(start + tile_chunks, end, tile_chunks):
                waiting.append((first, ahead.submit(self._read, first, min(tile_chunks, end - first))))
                place, tile = waiting.pop(0)
                yield place, tile.result()
            for place, tile in waiting:
                yield place, tile.result()

    def pooled(self, wanted: Sequence[int]) -> Tensor:
        return torch.cat([self._read(row, 1) for row in wanted]) if len(wanted) else torch.empty(0, *self.shape)

    def _read(self, first: int, count: int) -> Tensor:
        values = np.fromfile(self.path, dtype=np.float32, count=count * self._bytes // 4, offset=first * self._bytes)
        if len(values) != count * self._bytes // 4:
            raise WorkflowError(f"{self.path}: rows {first} to {first + count - 1} are not all there")
        return torch.from_numpy(values).view(count, *self.shape)
