from __future__ import annotations

import pytest

from intra import storage
from intra.artifact import Artifact
from intra.store.format import COMMIT, POOLED, STATES, Shard, committed, path, seal, shards

from .conftest import Made


def test_shards_cover_the_pool_once() -> None:
    assert shards(7, 3) == [Shard(0, 0, 3), Shard(1, 3, 3), Shard(2, 6, 1)]
    assert shards(6, 3) == [Shard(0, 0, 3), Shard(1, 3, 3)]
    assert shards(2, 10) == [Shard(0, 0, 2)]


def test_sound_commits_are_trusted(made: Made) -> None:
    found = committed(made.artifact, shards(23, 5))
    assert sorted(found) == [0, 1, 2, 3, 4]
    assert sum(commit["tokens"] for commit in found.values()) == sum(map(len, made.ids))


def test_nothing_is_committed_in_an_absent_store(root: str) -> None:
    assert committed(Artifact("store", f"{root}/store/x", "x", "encode"), shards(23, 5)) == {}


@pytest.mark.parametrize("folder", [STATES, POOLED])
def test_a_shard_whose_file_is_missing_or_of_another_size_is_not_trusted(made: Made, folder: str) -> None:
    storage.remove(path(made.url, folder, "00001"))
    place = path(made.url, folder, "00003")
    storage.write_bytes(place, storage.read_bytes(place)[:-1])
    assert sorted(committed(made.artifact, shards(23, 5))) == [0, 2, 4]


def test_commits_of_another_fingerprint_or_cut_are_not_trusted(made: Made) -> None:
    def change(number: int, **values: object) -> None:
        place = path(made.url, COMMIT, f"{number:05d}")
        commit = {**storage.read_json(place), **values}
        del commit["seal"]
        storage.write_bytes(place, seal(commit))

    change(0, fingerprint="0" * 16)
    change(1, shard=2)
    change(2, rows=4)
    storage.write_bytes(path(made.url, COMMIT, "00003"), b'{"fingerprint": "ffff')
    assert sorted(committed(made.artifact, shards(23, 5))) == [4]
    assert committed(made.artifact, shards(23, 4)) == {}  # the pool cut in another way
