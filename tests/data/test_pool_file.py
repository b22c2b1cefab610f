from __future__ import annotations

import hashlib
import io
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from intra import storage
from intra.artifact import Artifact
from intra.data import schema
from intra.errors import UserError, WorkflowError


@pytest.fixture
def url(tmp_path: Path) -> str:
    """A dataset of 10 chunks in row groups of 4, and one question."""
    columns = {
        "chunk_id": [f"c{number}" for number in range(10)],
        "title": [f"t{number}" for number in range(10)],
        "text": [f"text {number}" for number in range(10)],
        "source": ["s"] * 10,
        "n_tokens": list(range(10)),
    }
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns, schema=schema.POOL_SCHEMA), buffer, row_group_size=4)
    question = schema.Question("q1", "b", "test", "Which text?", ("text 3",), (("c3",),), 1, "")
    asked = schema.to_parquet(schema.questions_table([question]))
    storage.write_bytes(f"{tmp_path}/{schema.POOL}", buffer.getvalue())
    storage.write_bytes(f"{tmp_path}/{schema.QUESTIONS}", asked)
    digests = {"pool_sha256": hashlib.sha256(buffer.getvalue()).hexdigest(), "questions_sha256": hashlib.sha256(asked).hexdigest()}
    Artifact("dataset", str(tmp_path), "0" * 16, "prepare").finish(digests)
    return str(tmp_path)


@pytest.mark.parametrize(("first", "count"), [(0, 10), (0, 4), (3, 2), (4, 4), (2, 7), (9, 1), (5, 0)])
def test_slices_are_those_of_the_whole_pool(url: str, first: int, count: int) -> None:
    whole, file = schema.read_pool(url), schema.PoolFile(url)
    assert len(file) == 10
    part = file.rows(first, count)
    assert part.chunk_ids == whole.chunk_ids[first : first + count]
    assert part.texts == whole.texts[first : first + count]
    assert part.table.schema == whole.table.schema


READERS = ((schema.read_pool, schema.POOL), (schema.PoolFile, schema.POOL), (schema.read_questions, schema.QUESTIONS))


def test_a_missing_file_is_said(url: str) -> None:
    for read, name in READERS:
        storage.remove(f"{url}/{name}")
        with pytest.raises(WorkflowError, match=rf"^{url}/{name}: is missing; remove {url} and run workflows/prepare.py again"):
            read(url)


def test_whatever_bit_is_wrong_nothing_is_read(url: str) -> None:
    for read, name in READERS:
        assert len(read(url)) > 0  # type: ignore[arg-type]
        whole = storage.read_bytes(f"{url}/{name}")
        draw = random.Random(name)
        for bit in (draw.randrange(8 * len(whole)) for _ in range(40)):
            damaged = bytearray(whole)
            damaged[bit // 8] ^= 1 << bit % 8
            storage.write_bytes(f"{url}/{name}", bytes(damaged))
            with pytest.raises(WorkflowError, match=rf"^{url}/{name}: is damaged \(SHA-256 .*, the manifest states .*\); remove {url}"):
                read(url)
        storage.write_bytes(f"{url}/{name}", whole[:-9])
        with pytest.raises(WorkflowError, match="is damaged"):
            read(url)
        storage.write_bytes(f"{url}/{name}", whole)


def test_a_dataset_that_is_not_complete_is_not_read(url: str) -> None:
    storage.remove(f"{url}/manifest.json")
    for read, _ in READERS:
        with pytest.raises(UserError, match=rf"^dataset {url} is incomplete \(no manifest.json\); run workflows/prepare.py"):
            read(url)
