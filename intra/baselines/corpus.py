"""An encoded corpus: the vectors of every text of the pool, in shards below the root.

    <root>/vectors/<fingerprint>/000000000.safetensors   of the `evaluate.shard_chunks` texts from this one on: `vectors` [T, d], one a text
                                                         (dense, float32) or one a token (late, float16), and `lengths` int32 [texts]
    <root>/vectors/<fingerprint>/seconds/000000000.json  what making the shard took, without loading the model
    <root>/vectors/<fingerprint>/manifest.json           last: texts, vectors, d, texts that were cut, all shards' seconds (null: unknown)

A text is encoded once, however many chunks have it: they tie. A shard is written in one piece, so one that is there is done: a run that was
cut off goes on with the next. Memory: one shard.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from tqdm import tqdm

from intra import storage
from intra.artifact import Artifact
from intra.baselines.models import Floats
from intra.data.schema import Pool
from intra.errors import WorkflowError


class Encoder(Protocol):
    model: Any

    def passages(self, texts: Sequence[str]) -> tuple[Floats, list[int]]: ...

    def questions(self, texts: Sequence[str]) -> list[Floats]: ...

    def cut(self, texts: Sequence[str]) -> int: ...

    def cut_questions(self, texts: Sequence[str]) -> int: ...


@dataclass(frozen=True, slots=True)
class Block:
    """The vectors [T, d] of consecutive texts from `first` on; text n's are rows offsets[n] to offsets[n + 1]."""

    first: int
    vectors: Floats
    offsets: list[int]
    cut: int

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def of(self, row: int) -> Floats:
        """The vectors of the row-th text of the block, float32."""
        return self.vectors[self.offsets[row] : self.offsets[row + 1]].astype(np.float32, copy=False)


class Corpus:
    def __init__(self, name: str, artifact: Artifact, pool: Pool, encoder: Callable[[], Encoder], shard_chunks: int, half: bool) -> None:
        """`encoder` makes the model when the first text is to be encoded. half: vectors are kept in float16."""
        self.name = name
        self._artifact = artifact
        self._make = encoder
        self._made: Encoder | None = None
        self._half = half
        self.here = 0.0  # seconds of the shards that this object has made
        owners: dict[str, list[str]] = {}
        for chunk_id, text in zip(pool.chunk_ids, pool.title_and_text(), strict=True):
            owners.setdefault(text, []).append(chunk_id)
        self.texts, self.owners = list(owners), list(owners.values())
        self.shards = [range(len(self.texts))[first : first + shard_chunks] for first in range(0, len(self.texts), shard_chunks)]

    @property
    def facts(self) -> dict[str, int]:
        """Of the complete corpus: texts, vectors, dimension."""
        found = self._artifact.manifest()
        return {name: int(found[name]) for name in ("texts", "vectors", "dimension")}

    @property
    def fingerprint(self) -> str:
        return self._artifact.fingerprint

    @property
    def seconds(self) -> float | None:
        """What encoding the complete corpus took, whichever processes and runs did it; None where it was not written down."""
        found: float | None = self._artifact.manifest().get("seconds")
        return found

    @property
    def encoder(self) -> Encoder:
        if self._made is None:
            self._made = self._make()
        return self._made

    def missing(self) -> list[range]:
        """The shards that are not there."""
        done = set(storage.names(self._artifact.url))
        return [] if self._artifact.complete() else [shard for shard in self.shards if _file(shard) not in done]

    def encode(self, shard: range) -> None:
        """Makes one shard."""
        from safetensors.numpy import save

        texts, encoder = self.texts[shard.start : shard.stop], self.encoder
        start = time.perf_counter()
        vectors, lengths = encoder.passages(texts)
        if not np.isfinite(vectors).all():
            raise WorkflowError(f"method {self.name}: the model gives vectors that are not finite; set its dtype to float32")
        data = {
            "vectors": vectors.astype(np.float16) if self._half else vectors,
            "lengths": np.array(lengths, np.int32),
            "cut": np.array([encoder.cut(texts)]),
        }
        storage.write_bytes(self._artifact.path(_file(shard)), save(data))
        taken = time.perf_counter() - start
        storage.write_json(self._seconds_of(shard), taken)
        self.here += taken

    def complete(self) -> None:
        """Makes the shards that are missing, and the manifest."""
        if self._artifact.complete():
            return
        for shard in tqdm(self.missing(), desc=f"{self.name}: encode", unit="shard", disable=None):
            self.encode(shard)
        sizes = [(*block.vectors.shape, block.cut) for block in self._read()]
        cut = sum(size[2] for size in sizes)
        tell_cut(self.name, cut, len(self.texts), "texts")
        times = [storage.read_json(place) if storage.exists(place) else None for place in map(self._seconds_of, self.shards)]
        facts = {"texts": len(self.texts), "vectors": sum(size[0] for size in sizes), "dimension": sizes[0][1] if sizes else 0, "cut": cut}
        self._artifact.finish({**facts, "seconds": None if None in times else sum(times)})

    def blocks(self) -> Iterator[Block]:
        """Every shard, in order, with a progress bar. Raises WorkflowError where a file is not what was written."""
        yield from tqdm(self._read(), desc=self.name, unit="shard", total=len(self.shards), disable=None)

    def _seconds_of(self, shard: range) -> str:
        return self._artifact.path("seconds", f"{shard.start:09d}.json")

    def _read(self) -> Iterator[Block]:
        for shard in self.shards:
            yield read(self._artifact.path(_file(shard)), shard)


def tell_cut(name: str, cut: int, count: int, what: str) -> None:
    """Says how many of the model's texts, questions or pairs were cut; nothing where none was."""
    if cut:
        print(f"{name}: {cut:,} of {count:,} {what} are longer than the model reads and were cut")


def read(place: str, shard: range) -> Block:
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        found = load(storage.read_bytes(place))
        vectors, lengths, cut = found["vectors"], found["lengths"], int(found["cut"][0])
    except FileNotFoundError:
        raise WorkflowError(f"{place} is missing; delete the manifest.json beside it and run the same command again") from None
    except (SafetensorError, KeyError) as error:
        raise WorkflowError(f"{place}: damaged ({error}); delete its folder and run the same command again") from error
    if len(lengths) != len(shard) or int(lengths.sum()) != len(vectors):
        raise WorkflowError(f"{place}: the vectors of {len(lengths)} texts where {len(shard)} are expected; delete its folder and run the "
                            "same command again")  # fmt: skip
    return Block(shard.start, vectors, [0, *np.cumsum(lengths).tolist()], cut)


def _file(shard: range) -> str:
    return f"{shard.start:09d}.safetensors"
