"""Deletes what older corpora left behind: stores of the same encoding, except the shards that the newest store borrows from them."""

from __future__ import annotations

from dataclasses import dataclass

from intra import storage
from intra.artifact import MANIFEST, Artifact
from intra.errors import WorkflowError
from intra.store import claim
from intra.store.format import COMMIT, POOLED, STATES, file_name
from intra.store.planning import siblings

PRUNED = "pruned.json"  # marks a store whose manifest was pruned: its remaining shards are another's


@dataclass(frozen=True, slots=True)
class Removal:
    """Of one older store: how much goes, and how many of its shards stay because they are borrowed."""

    store: Artifact
    names: list[str]
    bytes: int
    kept: int


def removals(store: Artifact) -> list[Removal]:
    """What pruning would delete, oldest names first. Raises UserError where the store itself is not complete."""
    manifest = store.manifest()
    needed: dict[str, set[str]] = {}
    for shard in manifest["shards"]:
        if shard["store"]:
            needed.setdefault(shard["store"], set()).add(shard["name"])
    parent = store.url.rpartition("/")[0]
    older = set(siblings(store, manifest["encoding"]))
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
    """Deletes them. From the first on, the older stores are not readable any more. Raises WorkflowError where a run makes one of them."""
    found = removals(store)
    for item in found:
        who = claim.holder(item.store)
        if who:
            raise WorkflowError(f"store {item.store.url} is being made by {who}; nothing was deleted: prune when that run is over")
    encoding = store.manifest()["encoding"]
    for item in found:
        if item.kept:
            storage.write_json(item.store.path(PRUNED), {"encoding": encoding})
        storage.remove(item.store.path(MANIFEST))
        if item.kept:
            for name in item.names:
                storage.remove(item.store.path(name))
        else:
            storage.remove(item.store.url)
    return found


def _encoding(parent: str, name: str) -> str | None:
    """Of a store that was pruned before; None of any other."""
    try:
        return str(storage.read_json(storage.join(parent, name, PRUNED))["encoding"])
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError):
        return None
