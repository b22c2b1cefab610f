"""What a store borrows, and that a repair leaves the rest as it is."""

from __future__ import annotations

from pathlib import Path

import torch

from intra import storage
from intra.artifact import Artifact
from intra.store import verify
from intra.store.format import COMMIT, POOLED, STATES, committed, path
from intra.store.reader import ChunkStore

from .conftest import FakeEncoder, artifact, encoded, planned, token_ids

OLD = {f"c{number:02d}": f"text {number}" for number in range(16)}
NEW = {**{f"a{number:02d}": f"new {number}" for number in range(6)}, **OLD}


def sound(store: Artifact, texts: dict[str, str]) -> bool:
    """Whether each chunk's states and pooled vectors are read as they are encoded from its text."""
    opened = ChunkStore(store.url)
    wanted = FakeEncoder().encode([token_ids(texts[chunk_id]) for chunk_id in opened.chunk_ids])
    same = all(torch.equal(*both) for both in zip(opened.states(opened.chunk_ids), wanted, strict=True))
    tiled = torch.cat([vectors for _, vectors in opened.tiles(5)])
    return same and opened.chunk_ids == sorted(texts) and torch.equal(tiled, opened.pooled(range(len(opened))))


def repaired(root: str, name: str, texts: dict[str, str]) -> list[str]:
    """Repairs the store. Returns what was left out."""
    store = artifact(root, name)
    manifest = store.manifest()
    lost = verify.discard(store, verify.damaged(store, manifest["files"], manifest["shards"]))
    encoded(root, name, texts, lost)
    return lost


def flip(place: str) -> None:
    data = bytearray(storage.read_bytes(place))
    data[-1] ^= 1
    storage.write_bytes(place, bytes(data))


def own(store: Artifact) -> dict[str, str]:
    """Stamps of the files of the store's own shards."""
    names = [storage.join(folder, name) for folder in (STATES, POOLED, COMMIT) for name in storage.names(store.path(folder))]
    return {name: storage.stamp(store.path(name)) for name in names}


def test_a_chunk_is_borrowed_where_its_id_and_text_stand_in_a_complete_store(root: str) -> None:
    encoded(root, "old", OLD)
    plan = planned(root, "new", {**NEW, "c03": "another text"})
    assert plan.bases == ("old",)
    assert [plan.chunk_ids[row] for row in plan.fresh] == [*sorted(set(NEW) - set(OLD)), "c03"]
    assert [shard.rows for shard in plan.shards] == [4, 3]
    store = encoded(root, "new", {**NEW, "c03": "another text"})
    assert store.manifest()["rows_borrowed"] == len(OLD) - 1
    assert sound(store, {**NEW, "c03": "another text"})


def test_a_store_goes_on_with_the_lenders_it_was_planned_with(tmp_path: Path) -> None:
    root = str(tmp_path)
    encoded(root, "old", OLD)
    before = planned(root, "new", NEW)
    encoded(root, "other", dict(list(NEW.items())[:9]))  # complete meanwhile: it has chunks that "new" was to encode
    after = planned(root, "new", NEW)
    assert (after.bases, after.shards, after.fresh.tolist()) == (before.bases, before.shards, before.fresh.tolist())


def test_damaged_borrowed_shards_are_encoded_here_and_nothing_else_is(tmp_path: Path) -> None:
    """One after the other, the later one of the smaller name."""
    root = str(tmp_path)
    old = encoded(root, "old", OLD)
    store = encoded(root, "new", NEW)
    shards = [shard["name"] for shard in old.manifest()["shards"]]
    kept = own(store)
    for number, damaged in enumerate((shards[2], shards[0]), start=1):
        flip(path(old.url, STATES, damaged))
        assert repaired(root, "new", NEW) == [f"old/{damaged}"]
        after = own(store)
        assert {name: after[name] for name in kept} == kept
        assert len(after) == len(kept) + 3  # states, pooled, commit
        kept = after
        assert store.manifest()["rows_borrowed"] == len(OLD) - 4 * number
        assert sound(store, NEW)
    assert storage.read_json(store.path("plan.json")) == {"bases": ["old"], "left_out": [f"old/{shards[2]}", f"old/{shards[0]}"]}


def test_a_repair_that_was_cut_off_goes_on_with_its_plan(tmp_path: Path) -> None:
    root = str(tmp_path)
    old = encoded(root, "old", OLD)
    store = encoded(root, "new", NEW)
    storage.remove(store.path("manifest.json"))
    lost = [f"old/{shard['name']}" for shard in old.manifest()["shards"]]  # all: nothing is borrowed any more
    before = planned(root, "new", NEW, lost)
    after = planned(root, "new", NEW)
    assert (
        (after.bases, after.left_out, after.shards)
        == (before.bases, before.left_out, before.shards)
        == (("old",), tuple(lost), before.shards)
    )
    assert sorted(committed(store, after.shards)) == [0, 1]
    assert [shard.rows for shard in after.shards] == [4, 2, 4, 4, 4, 4]
