from __future__ import annotations

import io
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from intra import storage
from intra.data import schema
from intra.errors import WorkflowError


@pytest.fixture
def url(tmp_path: Path) -> str:
    """A pool of 10 chunks in row groups of 4."""
    columns = {
        "chunk_id": [f"c{number}" for number in range(10)],
        "title": [f"t{number}" for number in range(10)],
        "text": [f"text {number}" for number in range(10)],
        "source": ["s"] * 10,
        "n_tokens": list(range(10)),
    }
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns, schema=schema.POOL_SCHEMA), buffer, row_group_size=4)
    storage.write_bytes(f"{tmp_path}/{schema.POOL}", buffer.getvalue())
    return str(tmp_path)


@pytest.mark.parametrize(("first", "count"), [(0, 10), (0, 4), (3, 2), (4, 4), (2, 7), (9, 1), (5, 0)])
def test_slices_are_those_of_the_whole_pool(url: str, first: int, count: int) -> None:
    whole, file = schema.read_pool(url), schema.PoolFile(url)
    assert len(file) == 10
    part = file.rows(first, count)
    assert part.chunk_ids == whole.chunk_ids[first : first + count]
    assert part.texts == whole.texts[first : first + count]
    assert part.table.schema == whole.table.schema


def test_a_missing_or_damaged_file_is_said(url: str) -> None:
    with pytest.raises(WorkflowError, match=rf"^{url}/questions.parquet: is missing; remove {url} and run workflows/prepare.py again"):
        schema.read_questions(url)
    storage.write_bytes(f"{url}/{schema.POOL}", storage.read_bytes(f"{url}/{schema.POOL}")[:-9])
    for read in (schema.read_pool, schema.PoolFile):
        with pytest.raises(WorkflowError, match=rf"^{url}/pool.parquet: is damaged \(.*\); remove {url}"):
            read(url)
