"""What a store has superseded goes, and nothing that any other store needs."""

from __future__ import annotations

from pathlib import Path

import pytest

from intra import storage
from intra.errors import UserError
from intra.store import prune
from intra.store.prune import PRUNED

from .conftest import artifact, encoded, planned
from .test_planning import NEW, OLD, sound

OTHER = {f"d{number:02d}": f"another world {number}" for number in range(16)}


def going(root: str, name: str) -> dict[str, int]:
    """The stores that would go, with how many of their shards stay."""
    return {item.store.fingerprint: item.kept for item in prune.removals(artifact(root, name))}


def test_an_older_store_goes_but_the_shards_that_are_borrowed(root: str) -> None:
    encoded(root, "old", OLD)
    changed = {**NEW, **{f"c{number:02d}": "rewritten" for number in range(4)}}  # the first shard of the old one
    store = encoded(root, "new", changed)
    assert going(root, "new") == {"old": 3}
    (removal,) = prune.prune(store)
    assert removal.bytes > 0
    assert len(storage.files(artifact(root, "old").url)) == 3 * 3 + 1
    assert storage.exists(artifact(root, "old").path(PRUNED))
    assert sound(store, changed)
    assert prune.prune(store) == []


def test_neither_a_newer_store_nor_another_world_goes(tmp_path: Path) -> None:
    root = str(tmp_path)
    old = encoded(root, "old", OLD)
    encoded(root, "new", NEW)
    common = {**OTHER, "c01": OLD["c01"]}  # one text of the other world
    encoded(root, "other", common)
    assert going(root, "old") == {}
    assert going(root, "other") == {}
    assert prune.prune(old) == []


def test_a_large_pool_outlives_a_small_one_that_was_taken_from_it(tmp_path: Path) -> None:
    root = str(tmp_path)
    encoded(root, "old", OLD)
    small = encoded(root, "small", dict(list(OLD.items())[:5]))
    assert small.manifest()["rows_borrowed"] == 5
    assert going(root, "small") == {}


def test_what_a_third_store_borrows_stays(tmp_path: Path) -> None:
    root = str(tmp_path)
    encoded(root, "old", OLD)
    part = dict(list(OLD.items())[:4])  # of its first shard
    third = encoded(root, "third", {**part, **OTHER})
    rest = dict(list(OLD.items())[4:])
    store = encoded(root, "new", {**rest, "e": "new"})
    assert going(root, "new") == {"old": 4}
    prune.prune(store)
    assert sound(third, {**part, **OTHER})
    assert sound(store, {**rest, "e": "new"})


def test_a_lender_of_a_lender_goes_too(tmp_path: Path) -> None:
    root = str(tmp_path)
    encoded(root, "a", OLD)
    encoded(root, "b", NEW)
    newest = {**NEW, "e": "newest"}
    store = encoded(root, "c", newest)
    assert going(root, "c") == {"a": 4, "b": 2}
    prune.prune(store)
    assert sound(store, newest)


def test_nothing_goes_that_an_unfinished_store_is_to_borrow(tmp_path: Path) -> None:
    root = str(tmp_path)
    old = encoded(root, "old", OLD)
    planned(root, "begun", {**OLD, **OTHER})
    store = encoded(root, "new", NEW)
    with pytest.raises(UserError, match=r"store/begun is not complete and borrows from old; nothing was deleted: finish it with"):
        prune.prune(store)
    assert old.complete()
    storage.remove(artifact(root, "begun").url)
    assert len(prune.prune(store)) == 1


def test_a_pruning_that_was_cut_off_is_ended_by_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = str(tmp_path)
    encoded(root, "old", OLD)
    first = encoded(root, "first", {**OLD, "x": "not any more"})
    store = encoded(root, "new", OLD)
    assert going(root, "new") == {"first": 0, "old": 4}
    removed = storage.remove

    def cut(url: str) -> None:
        removed(url)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(storage, "remove", cut)
        with pytest.raises(KeyboardInterrupt):
            prune.prune(store)
    assert not first.complete()
    assert going(root, "new") == {"first": 0, "old": 4}
    prune.prune(store)
    assert storage.names(first.url) == []
    assert going(root, "new") == {}
    assert sound(store, OLD)
