from __future__ import annotations

import json
from pathlib import Path

import pytest

from intra import storage
from intra.errors import WorkflowError
from intra.store import verify
from intra.store.format import COMMIT, INDEX, POOLED, SCALE, STATES, WHITENING, committed, path, shards
from intra.store.reader import ChunkStore

from .conftest import Made, write


def damaged(made: Made) -> list[str]:
    manifest = made.artifact.manifest()
    return [str(item).removeprefix(f"{made.url}/") for item in verify.damaged(made.artifact, manifest["files"], manifest["shards"])]


def flip(place: str, position: int) -> None:
    data = bytearray(storage.read_bytes(place))
    data[position] ^= 1
    storage.write_bytes(place, bytes(data))


def read(made: Made) -> object:
    store = ChunkStore(made.url)
    return store.states(["c001"]), store.whitening()


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


def test_every_byte_of_a_shard_is_guarded(tmp_path: Path) -> None:
    """One flipped byte, wherever it is, is named by `damaged`, and where it belongs to a chunk its reader raises; the sound one is read."""
    made = write(str(tmp_path), shard_chunks=4)
    manifest = made.artifact.manifest()
    shard = manifest["shards"][1]
    chunk_ids = made.chunk_ids[4:8]
    for folder in (STATES, POOLED, COMMIT):
        place = Path(path(made.url, folder, shard["name"]))
        whole = place.read_bytes()
        for position in range(0, len(whole), 7):
            place.write_bytes(whole[:position] + bytes([whole[position] ^ 16]) + whole[position + 1 :])
            (found,) = verify.damaged(made.artifact, {}, [shard])
            assert str(found) == f"{place} differs from what was written"
            assert found.shard == shard["name"]
            if folder != COMMIT and position >= shard[folder]["data_offset"]:
                store = ChunkStore(made.url)
                with pytest.raises(WorkflowError, match=rf"{folder}/{shard['name']}\.safetensors differs .* --repair"):
                    store.states(chunk_ids) if folder == STATES else store.pooled(chunk_ids)
        place.write_bytes(whole)
    assert verify.damaged(made.artifact, manifest["files"], manifest["shards"]) == []


@pytest.mark.parametrize("name", [INDEX, WHITENING, SCALE])
def test_a_reader_refuses_a_changed_file_of_the_whole_store(tmp_path: Path, name: str) -> None:
    made = write(str(tmp_path), dtype="int8")
    flip(made.artifact.path(name), -9)
    with pytest.raises(WorkflowError, match=f"{name} differs from what was written; run workflows/encode.py --repair"):
        read(made)
    storage.remove(made.artifact.path(name))
    with pytest.raises(WorkflowError, match=f"{name} is missing; run workflows/encode.py --repair"):
        read(made)


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
