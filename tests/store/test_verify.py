from __future__ import annotations

import json

import pytest

from intra import storage
from intra.store import verify
from intra.store.format import COMMIT, INDEX, POOLED, STATES, WHITENING, committed, path, shards

from .conftest import Made


def damaged(made: Made) -> list[str]:
    manifest = made.artifact.manifest()
    return [str(item).removeprefix(f"{made.url}/") for item in verify.damaged(made.artifact, manifest["files"], manifest["shards"])]


def flip(place: str, position: int) -> None:
    data = bytearray(storage.read_bytes(place))
    data[position] ^= 1
    storage.write_bytes(place, bytes(data))


def test_a_sound_store_has_no_damage(made: Made) -> None:
    assert damaged(made) == []


@pytest.mark.parametrize("position", [0, 9, 40, -1])
def test_one_flipped_byte_anywhere_is_named(made: Made, position: int) -> None:
    flip(path(made.url, STATES, "00004"), position)  # of the header too
    flip(path(made.url, POOLED, "00002"), position)
    flip(made.artifact.path(WHITENING), position)
    flip(made.artifact.path(INDEX), position)
    assert damaged(made) == [
        "index.parquet differs from what was written", "whitening.safetensors differs from what was written",
        "pooled/00002.safetensors differs from what was written", "states/00004.safetensors differs from what was written",
    ]  # fmt: skip


def test_missing_and_cut_files_are_named(made: Made) -> None:
    storage.remove(path(made.url, STATES, "00000"))
    place = path(made.url, POOLED, "00001")
    storage.write_bytes(place, storage.read_bytes(place)[:-5])
    storage.remove(path(made.url, COMMIT, "00003"))
    found = damaged(made)
    assert found[0] == "states/00000.safetensors is missing"
    assert found[1].startswith("pooled/00001.safetensors is cut off")
    assert found[2] == "commit/00003.json is missing"
    assert len(found) == 3


def test_a_changed_commit_is_named_and_not_trusted(made: Made) -> None:
    place = path(made.url, COMMIT, "00003")
    commit = json.loads(storage.read_bytes(place))
    commit["states_crc32"][0] += 1
    storage.write_bytes(place, json.dumps(commit).encode())
    assert damaged(made) == ["commit/00003.json differs from what was written"]
    assert sorted(committed(made.artifact, shards(23, 5))) == [0, 1, 2, 4]


def test_what_is_damaged_loses_its_commit_and_the_store_its_manifest(made: Made) -> None:
    flip(path(made.url, STATES, "00004"), -1)
    manifest = made.artifact.manifest()
    found = verify.damaged(made.artifact, manifest["files"], manifest["shards"])
    assert verify.discard(made.artifact, found) == []
    assert not made.artifact.complete()
    assert sorted(committed(made.artifact, shards(23, 5))) == [0, 1, 2, 3]
