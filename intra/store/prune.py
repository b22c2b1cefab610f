"""Deletes what older corpora left behind: the stores that this one has superseded, except the shards that a store beside them borrows.

Superseded is a store that this one borrows from, itself or through others, and most of whose chunks stand in this one's pool. So neither a
newer store goes, nor one of another corpus that has a few texts in common, nor a large pool that a small one was taken from.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass

import pyarrow.parquet as pq

from intra import storage
from intra.artifact import MANIFEST, Artifact
from intra.errors import UserError, WorkflowError
from intra.store import claim
from intra.store.format import COMMIT, INDEX, PLAN, POOLED, STATES, file_name
from intra.store.planning import Manifest, begun, siblings

PRUNED = "pruned.json"  # marks a store whose manifest was pruned: its remaining shards are others'
MOST = 0.5  # of a store's chunks: more of them stand in the pool of one that supersedes it


@dataclass(frozen=True, slots=True)
class Removal:
    """Of one superseded store: how much goes, and how many of its shards stay because they are borrowed."""

    store: Artifact
    names: list[str]
    bytes: int
    kept: int


def removals(store: Artifact) -> list[Removal]:
    """What pruning would delete, by name. Raises UserError where the store itself is not complete."""
    manifest = store.manifest()
    parent = store.url.rpartition("/")[0]
    beside = siblings(store)
    older = _superseded(store, manifest, beside)
    needed: dict[str, set[str]] = {}
    for each in [manifest, *(beside[name] for name in beside if name not in older)]:
        for shard in each["shards"]:
            if shard["store"]:
                needed.setdefault(shard["store"], set()).add(shard["name"])
    older |= {name for name in storage.names(parent) if name != store.fingerprint and _encoding(parent, name) == manifest["encoding"]}
    found = []
    for name in sorted(older):
        old = Artifact("store", storage.join(parent, name), name, "encode")
        stays = {f"{folder}/{file_name(folder, shard)}" for shard in needed.get(name, ()) for folder in (STATES, POOLED, COMMIT)}
        stays |= {PRUNED} if stays else set()
        names = [file for file in storage.files(old.url) if file not in stays]
        sizes = {folder: storage.sizes(old.path(folder)) for folder in (STATES, POOLED, COMMIT)}
        total = sum(sizes[file.split("/")[0]].get(file.split("/")[1], 0) for file in names if file.split("/")[0] in sizes)
        if names:
            found.append(Removal(old, names, total, len(needed.get(name, ()))))
    return found


def prune(store: Artifact) -> list[Removal]:
    """Deletes them. From the first on, the superseded stores are not readable any more.

    Raises WorkflowError where a run makes one of them, UserError where a store that is not complete was planned to borrow from one.
    """
    found = removals(store)
    _check_plans(store, {item.store.fingerprint for item in found})
    for item in found:
        who = claim.holder(item.store)
        if who:
            raise WorkflowError(f"store {item.store.url} is being made by {who}; nothing was deleted: prune when that run is over")
    encoding = store.manifest()["encoding"]
    for item in found:
        storage.write_json(item.store.path(PRUNED), {"encoding": encoding})
        storage.remove(item.store.path(MANIFEST))
        if item.kept:
            for name in item.names:
                storage.remove(item.store.path(name))
        else:
            storage.remove(item.store.url)
    return found


def _superseded(store: Artifact, manifest: Manifest, beside: Mapping[str, Manifest]) -> set[str]:
    """The complete stores beside this one that it has superseded."""
    parent = store.url.rpartition("/")[0]
    lenders: set[str] = set()
    waiting = [store.fingerprint]
    while waiting:
        name = waiting.pop()
        shards = (manifest if name == store.fingerprint else beside[name])["shards"]
        plan = begun(Artifact("store", storage.join(parent, name), name, "encode"))
        new = ({shard["store"] for shard in shards} | set(plan.get("bases", ()))) & set(beside) - lenders
        lenders |= new
        waiting += sorted(new)
    if not lenders:
        return set()
    mine = _chunks(store.url)
    theirs = {name: _chunks(storage.join(parent, name)) for name in lenders}
    return {name for name, chunks in theirs.items() if len(chunks & mine) > MOST * len(chunks)}


def _chunks(url: str) -> set[tuple[str, bytes]]:
    """Id and digest of each chunk of a store."""
    index = pq.read_table(io.BytesIO(storage.read_bytes(storage.join(url, INDEX))), columns=["chunk_id", "digest"])
    return set(zip(index["chunk_id"].to_pylist(), index["digest"].to_pylist(), strict=True))


def _check_plans(store: Artifact, going: set[str]) -> None:
    """Raises UserError where a store that was begun and is not complete was planned to borrow from one of `going`."""
    parent = store.url.rpartition("/")[0]
    for name in storage.names(parent):
        other = Artifact("store", storage.join(parent, name), name, "encode")
        if name in going or not storage.exists(other.path(PLAN)) or other.complete():
            continue
        lender = next((base for base in begun(other).get("bases", ()) if base in going), None)
        if lender:
            raise UserError(f"store {other.url} is not complete and borrows from {lender}; nothing was deleted: finish it with "
                            "workflows/encode.py, or delete its folder, and prune then")  # fmt: skip


def _encoding(parent: str, name: str) -> str | None:
    """Of a store that was pruned before; None of any other."""
    try:
        return str(storage.read_json(storage.join(parent, name, PRUNED))["encoding"])
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError):
        return None
