"""Compares every byte of a store with the SHA-256 that was written down for it, and prepares the damaged parts for being made again."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from intra import storage
from intra.artifact import MANIFEST, Artifact
from intra.store.format import COMMIT, POOLED, STATES, Commit, path, sealed

THREADS = 4  # files read at once
PIECE = 32 * 1024**2  # bytes of a file in memory at once

_Work = tuple[str, str, int | None, str, str | None]  # url, sha256 ("" of a commit), bytes, shard, store borrowed from


@dataclass(frozen=True, slots=True)
class Damage:
    """A file that is not what was written. `shard` is its shard's name, or "" of a file of the whole store; `store` the fingerprint of the
    store it is borrowed from, or None."""

    url: str
    what: str
    shard: str = ""
    store: str | None = None

    def __str__(self) -> str:
        return f"{self.url} {self.what}"


def shard_entry(name: str, commit: Commit) -> dict[str, Any]:
    """What `damaged` needs of a shard that is committed in a store without a manifest."""
    return {"store": None, "name": name, STATES: commit[STATES], POOLED: commit[POOLED]}


def damaged(store: Artifact, files: Mapping[str, str], shards: Iterable[Mapping[str, Any]]) -> list[Damage]:
    """Every file that differs, in the order of the manifest: `files` and `shards` as it states them. Reads everything once."""
    beside = store.url.rpartition("/")[0]
    work: list[_Work] = [(store.path(name), digest, None, "", None) for name, digest in files.items()]
    for shard in shards:
        owner = storage.join(beside, shard["store"]) if shard["store"] else store.url
        for folder in (STATES, POOLED):
            stated = shard[folder]
            work.append((path(owner, folder, shard["name"]), stated["sha256"], stated["bytes"], shard["name"], shard["store"]))
        if not shard["store"]:
            work.append((path(owner, COMMIT, shard["name"]), "", None, shard["name"], None))

    def look(item: _Work) -> Damage | None:
        url, digest, size, name, lender = item
        what = _unsealed(url) if not digest else _difference(url, digest, size)
        return Damage(url, what, name, lender) if what else None

    with ThreadPoolExecutor(THREADS, thread_name_prefix="verify") as pool:
        return [found for found in tqdm(pool.map(look, work), total=len(work), desc="verify", unit="file", disable=None) if found]


def discard(store: Artifact, found: Iterable[Damage]) -> list[str]:
    """Makes room for the damaged parts to be made again: the store is incomplete from now on, its damaged shards no longer committed.

    Returns the borrowed shards among them (<fingerprint>/<shard>), which this store must not borrow again.
    """
    storage.remove(store.path(MANIFEST))
    borrowed = []
    for item in found:
        if item.store is not None:
            borrowed.append(f"{item.store}/{item.shard}")
        elif item.shard:
            storage.remove(path(store.url, COMMIT, item.shard))
        else:
            storage.remove(item.url)
    return sorted(set(borrowed))


def _difference(url: str, digest: str, size: int | None) -> str | None:
    """How the file differs, or None."""
    try:
        found = storage.size(url)
        if size is not None and found != size:
            return f"is cut off ({found} bytes where {size} should be)"
        whole = hashlib.sha256()
        for start in range(0, found, PIECE):
            whole.update(storage.read_ranges([(url, start, min(start + PIECE, found))])[0])
    except FileNotFoundError:
        return "is missing"
    return None if whole.hexdigest() == digest else "differs from what was written"


def _unsealed(url: str) -> str | None:
    try:
        return None if sealed(storage.read_bytes(url)) is not None else "differs from what was written"
    except FileNotFoundError:
        return "is missing"
