from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from intra import storage
from intra.backbone.model import pool
from intra.errors import UserError, WorkflowError
from intra.store import reader
from intra.store.format import POOLED as POOLED_FOLDER
from intra.store.format import STATES, path
from intra.store.reader import ChunkStore

from .conftest import POOLED, WIDTH, Made, write


@pytest.fixture(autouse=True, params=["whole shards", "ranges"])
def _cache(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test with a store that fits in memory, and with one of which a few ranges do."""
    if request.param == "ranges":
        monkeypatch.setattr(reader, "CACHE", 700)


def test_shape_and_rows(made: Made) -> None:
    store = ChunkStore(made.url)
    assert (len(store), store.hidden_size, store.pooled_length) == (23, WIDTH, POOLED)
    assert store.chunk_ids == made.chunk_ids
    assert store.row_of["c017"] == 17
    assert store.manifest["tokens"] == sum(map(len, made.ids))


def test_states_come_back_as_encoded_in_the_order_asked_for(made: Made) -> None:
    store = ChunkStore(made.url)
    asked = ["c022", "c000", "c011", "c000", "c004", "c005"]  # a repeated one, and both sides of a shard's end
    found = store.states(asked)
    assert all(states.dtype == torch.float32 for states in found)
    for chunk_id, states in zip(asked, found, strict=True):
        assert torch.equal(states, made.states[int(chunk_id[1:])])
    assert store.states([]) == []


def test_bfloat16_rounds_once(root: str) -> None:
    made = write(root, dtype="bfloat16")
    store = ChunkStore(made.url)
    for states, expected in zip(store.states(made.chunk_ids), made.states, strict=True):
        assert torch.equal(states, expected.bfloat16().float())


def test_pooled_by_row_and_by_id(made: Made) -> None:
    store = ChunkStore(made.url)
    everything = torch.stack([pool(states, POOLED) for states in made.states])
    torch.testing.assert_close(store.pooled([9, 0, 22, 9]), everything[[9, 0, 22, 9]])
    torch.testing.assert_close(store.pooled(["c009", "c001"]), everything[[9, 1]])
    assert store.pooled([]).shape == (0, POOLED, WIDTH)
    with pytest.raises(ValueError, match="row 23 of 23"):
        store.pooled([23])


@pytest.mark.parametrize("size", [1, 4, 5, 7, 23, 100])
def test_tiles_are_all_pooled_vectors_in_row_order(made: Made, size: int) -> None:
    store = ChunkStore(made.url)
    tiles = list(store.tiles(size))
    assert [first for first, _ in tiles] == list(range(0, 23, size))
    assert all(len(tile) == size for _, tile in tiles[:-1])
    assert torch.equal(torch.cat([tile for _, tile in tiles]), store.pooled(range(23)))


@pytest.mark.parametrize("folder", [STATES, POOLED_FOLDER])
def test_what_was_read_is_kept_within_bounds(made: Made, folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store, read = ChunkStore(made.url), []
    true = storage.read_ranges
    monkeypatch.setattr(storage, "read_ranges", lambda requests: read.extend(requests) or true(requests))
    ask = store.states if folder == STATES else store.pooled
    first = ask(["c003"])
    again, everything = ask(["c003"]), ask(made.chunk_ids)
    assert len(read) == (5 if reader.CACHE > 700 else 23)  # of the shards, of the chunks
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[0], everything[3])
    kept = sum(len(data) for cache in store._caches.values() for data in cache._kept.values())
    assert 0 < kept <= reader.CACHE


def test_tiles_may_be_left_early(made: Made) -> None:
    first, tile = next(store_tiles := ChunkStore(made.url).tiles(4))
    store_tiles.close()  # type: ignore[attr-defined]
    assert (first, len(tile)) == (0, 4)


def test_whitening_is_that_of_all_pooled_vectors(made: Made) -> None:
    store = ChunkStore(made.url)
    mean, matrix = store.whitening()
    vectors = store.pooled(range(23)).view(-1, WIDTH)
    torch.testing.assert_close(mean, vectors.mean(0))
    covariance = torch.cov(vectors.T, correction=0)
    torch.testing.assert_close(matrix @ covariance @ matrix, torch.eye(WIDTH), atol=1e-4, rtol=1e-4)


def test_unknown_ids_are_named(made: Made) -> None:
    with pytest.raises(UserError, match=r"holds no chunk 'x1' \(2 unknown ids in all\)"):
        ChunkStore(made.url).states(["c001", "x1", "x2"])


def test_missing_and_incomplete_stores_are_refused(made: Made) -> None:
    with pytest.raises(UserError, match=r"store .*/elsewhere is missing .* run workflows/encode.py"):
        ChunkStore(f"{made.url}/elsewhere")
    storage.remove(made.artifact.path("manifest.json"))
    with pytest.raises(UserError, match=r"store .* is incomplete .* run workflows/encode.py"):
        ChunkStore(made.url)


@pytest.mark.parametrize("folder", [STATES, POOLED_FOLDER])
def test_a_cut_or_missing_shard_is_named(made: Made, folder: str) -> None:
    store = ChunkStore(made.url)

    def read() -> object:
        return store.states(["c000", "c009"]) if folder == STATES else store.pooled([0, 9])  # of shards 0 and 1

    place = path(made.url, folder, "00001")
    whole = storage.read_bytes(place)
    storage.write_bytes(place, whole[:-1])
    with pytest.raises(WorkflowError, match=f"{folder}/00001.safetensors .*cut off"):
        read()
    storage.write_bytes(place, whole[:100])
    with pytest.raises(WorkflowError, match=f"{folder}/00001.safetensors is cut off"):
        read()
    storage.remove(place)
    with pytest.raises(WorkflowError, match=f"{folder}/00001.safetensors is missing"):
        read()


def failure(read: Callable[[], object]) -> str:
    try:
        read()
    except WorkflowError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("folder", [STATES, POOLED_FOLDER])
@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_a_reader_of_a_changed_chunk_raises_and_names_the_shard(root: str, folder: str, dtype: str) -> None:
    made = write(root, dtype=dtype)
    sound, place = ChunkStore(made.url), path(made.url, folder, "00001")
    whole, start = storage.read_bytes(place), sound.manifest["shards"][1][folder]["data_offset"]
    for position in (start, (start + len(whole)) // 2, len(whole) - 1):
        storage.write_bytes(place, whole[:position] + bytes([whole[position] ^ 4]) + whole[position + 1 :])
        store = ChunkStore(made.url)
        read = [functools.partial(store.states if folder == STATES else store.pooled, [chunk_id]) for chunk_id in made.chunk_ids[5:10]]
        raised = [message for message in map(failure, read) if message]
        assert len(raised) == 1
        assert f"{folder}/00001.safetensors differs from what was written (chunk c00" in raised[0]
        if folder == POOLED_FOLDER:
            with pytest.raises(WorkflowError, match=r"pooled/00001\.safetensors differs"):
                list(store.tiles(7))


def test_another_format_is_refused(made: Made) -> None:
    manifest = storage.read_json(made.artifact.path("manifest.json"))
    storage.write_json(made.artifact.path("manifest.json"), {key: value for key, value in manifest.items() if key != "format"})
    with pytest.raises(UserError, match=r"store .* has format version 1, this program reads 2; run workflows/encode.py again"):
        ChunkStore(made.url)


def test_int8_states_are_within_half_a_step(root: str) -> None:
    made = write(root, dtype="int8")
    store = ChunkStore(made.url)
    _, sigma = store.scale
    for found, (_, scale), expected in zip(store.states(made.chunk_ids), store.quantized(made.chunk_ids), made.states, strict=True):
        assert ((found - expected).abs() <= 0.51 * scale[:, None] * sigma).all()
    assert store.manifest["pooled_dtype"] == "bfloat16"


def test_tiles_of_a_part(made: Made) -> None:
    store = ChunkStore(made.url)
    tiles = list(store.tiles(4, 3, 9))
    assert [(first, len(tile)) for first, tile in tiles] == [(3, 4), (7, 4), (11, 1)]
    assert torch.equal(torch.cat([tile for _, tile in tiles]), store.pooled(range(3, 12)))


def test_a_relative_path_opens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(write(str(tmp_path)).url)
    monkeypatch.chdir(folder.parent)
    store = ChunkStore(folder.name)
    monkeypatch.chdir("/")
    assert len(store.states(["c001"])) == 1
