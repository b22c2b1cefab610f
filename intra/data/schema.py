"""What a dataset holds: chunks and questions, and the Parquet files they stand in.

<dataset>/pool.parquet        chunk_id, title, text, source, n_tokens; sorted by chunk_id
<dataset>/questions.parquet   question_id, benchmark, split, question, answers, gold, hops, type, gold_source
<dataset>/statistics.json, tokenizer/ (when the backbone is made from scratch), manifest.json
"""

from __future__ import annotations

import hashlib
import io
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import pyarrow as pa
import pyarrow.parquet as pq

from intra import storage
from intra.artifact import Artifact
from intra.errors import WorkflowError

POOL = "pool.parquet"
QUESTIONS = "questions.parquet"
SHA256 = {POOL: "pool_sha256", QUESTIONS: "questions_sha256"}  # where the manifest states them

POOL_SCHEMA = pa.schema(
    [("chunk_id", pa.string()), ("title", pa.string()), ("text", pa.string()), ("source", pa.string()), ("n_tokens", pa.int32())]
)
QUESTIONS_SCHEMA = pa.schema(
    [
        ("question_id", pa.string()),
        ("benchmark", pa.string()),
        ("split", pa.string()),
        ("question", pa.string()),
        ("answers", pa.list_(pa.string())),
        ("gold", pa.list_(pa.list_(pa.string()))),
        ("hops", pa.int32()),
        ("type", pa.string()),
        ("gold_source", pa.string()),
    ]
)


@dataclass(frozen=True, slots=True)
class Question:
    """A question and its evidence.

    `gold` holds one group per gold passage; a group lists the chunks that each satisfy it (the pieces of a split passage,
    or equivalent versions of one text). Evidence is complete when every group has at least one chunk in the top k.
    `question_id` is unique over all benchmarks and splits.
    """

    question_id: str
    benchmark: str
    split: str  # "train" | "test": the role in this run, whatever the source calls its splits
    question: str
    answers: tuple[str, ...]
    gold: tuple[tuple[str, ...], ...]
    hops: int
    type: str
    gold_source: str = "annotated"


class Pool:
    """The chunks, as columns in memory, in the order of their ids."""

    def __init__(self, table: pa.Table) -> None:
        self.table = table

    def __len__(self) -> int:
        return int(self.table.num_rows)

    @cached_property
    def chunk_ids(self) -> list[str]:
        return list(self.table["chunk_id"].to_pylist())

    @cached_property
    def row_of(self) -> dict[str, int]:
        return {chunk_id: row for row, chunk_id in enumerate(self.chunk_ids)}

    @cached_property
    def titles(self) -> list[str]:
        return list(self.table["title"].to_pylist())

    @cached_property
    def texts(self) -> list[str]:
        return list(self.table["text"].to_pylist())

    def title_and_text(self) -> list[str]:
        """What the lexical methods index."""
        return [f"{title} {text}".strip() for title, text in zip(self.titles, self.texts, strict=True)]


def to_parquet(table: pa.Table) -> bytes:
    """The table's bytes: the same table always gives the same bytes."""
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd", row_group_size=65536)
    return buffer.getvalue()


def read_pool(url: str) -> Pool:
    """Raises UserError, as the others here that read, where the dataset is not complete, WorkflowError where its file is missing or is not
    as the manifest states it."""
    return Pool(_opened(url, POOL).read())


def _opened(dataset: str, name: str) -> pq.ParquetFile:
    place = storage.join(dataset, name)
    stated = Artifact("dataset", dataset, "", "prepare").manifest()[SHA256[name]]
    try:
        data = storage.read_bytes(place)
    except FileNotFoundError:
        reason = "is missing"
    else:
        found = hashlib.sha256(data).hexdigest()
        if found == stated:
            return pq.ParquetFile(io.BytesIO(data))
        reason = f"is damaged (SHA-256 {found[:16]}..., the manifest states {stated[:16]}...)"
    raise WorkflowError(f"{place}: {reason}; remove {dataset} and run workflows/prepare.py again")


class PoolFile:
    """The pool, opened to read slices of it: held compressed, one row group decoded at a time."""

    def __init__(self, url: str) -> None:
        self._file = _opened(url, POOL)
        sizes = [self._file.metadata.row_group(group).num_rows for group in range(self._file.num_row_groups)]
        self._starts = [0, *itertools.accumulate(sizes)]
        self._group: tuple[int, pa.Table] | None = None

    def __len__(self) -> int:
        return int(self._starts[-1])

    def rows(self, first: int, count: int) -> Pool:
        """Chunks [first, first + count)."""
        parts = []
        for group, (start, end) in enumerate(itertools.pairwise(self._starts)):
            low, high = max(first, start), min(first + count, end)
            if low < high:
                parts.append(self._decoded(group).slice(low - start, high - low))
        return Pool(pa.concat_tables(parts) if parts else POOL_SCHEMA.empty_table())

    def _decoded(self, group: int) -> pa.Table:
        if self._group is None or self._group[0] != group:
            self._group = None  # before the next one is decoded: one at a time in memory
            self._group = (group, self._file.read_row_group(group))
        return self._group[1]


def questions_table(questions: Sequence[Question]) -> pa.Table:
    columns = {name: [getattr(question, name) for question in questions] for name in QUESTIONS_SCHEMA.names}
    return pa.table(columns, schema=QUESTIONS_SCHEMA)


def read_questions(url: str, split: str | None = None) -> list[Question]:
    table = _opened(url, QUESTIONS).read()
    return [
        Question(**{**row, "answers": tuple(row["answers"]), "gold": tuple(tuple(group) for group in row["gold"])})
        for row in table.to_pylist()
        if split is None or row["split"] == split
    ]
