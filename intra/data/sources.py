"""Where passages and questions come from: `data.source` = synthetic, jsonl or beir."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable

from intra import storage
from intra.config import DataConfig
from intra.data import beir, files, jsonl
from intra.data.raw import Passage, RawQuestion


def inputs(data: DataConfig) -> dict[str, str]:
    """Name -> URL of every input file; {} for the synthetic source. Raises UserError where one is missing."""
    if data.source == "jsonl":
        layout = jsonl.layout(data)
        return {name: storage.join(layout.folder, name) for name in layout.names()}
    if data.source == "beir":
        found = beir.layout(data)
        # The folder's name is data too: it names the benchmark.
        return {f"{found.benchmark}/{name}": storage.join(found.folder, name) for name in found.names()}
    return {}


def digests(data: DataConfig) -> dict[str, str]:
    """Name -> SHA-256 (hex) of every input file's bytes; {} for the synthetic source. Raises UserError where one is missing."""
    return {name: _digest(url, storage.stamp(url)) for name, url in inputs(data).items()}


def read(data: DataConfig, seed: int) -> tuple[Iterable[Passage], Iterable[RawQuestion]]:
    """The passages and questions as the source gives them, before limits and chunking; `seed` makes the synthetic world.

    Raises UserError naming file and line where a record is malformed.
    """
    if data.source == "jsonl":
        return jsonl.read(data)
    if data.source == "beir":
        return beir.read(data)
    from intra.data import synthetic

    return synthetic.generate(data.synthetic, seed)


def equivalents(data: DataConfig) -> list[tuple[str, ...]]:
    """Groups of passage ids of which any counts as a hit for any other."""
    return jsonl.equivalents(data) if data.source == "jsonl" else []


@functools.lru_cache(maxsize=256)
def _digest(url: str, stamp: str) -> str:
    # The stamp is only the cache's key: every step of a run asks, and an unchanged file is hashed once.
    return hashlib.sha256(files.content(url)).hexdigest()
