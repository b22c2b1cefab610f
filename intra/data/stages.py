"""The parts of building a pool that are done in many processes: reading the input files, and tokenizing what is wanted of them.

    Scan   a part of the source -> <work>/passages/<part>-<n>.parquet (SCANNED) and <work>/questions/<part>.parquet (ASKED)
    Chop   rows of one of those -> <work>/chunks/<round>-<shard>.parquet (CHOPPED)

Each is built once in its process, takes a mapping and gives one; plain values in both, so any worker pool will do. The files' bytes
depend on the input alone. `work` is a folder that all processes see; it lasts as long as the building.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from intra import storage
from intra.data import chunking, duplicates, sources
from intra.data.raw import Mistakes, Passage, RawQuestion
from intra.data_config import DataConfig

SHARD = 16_384  # passages

SCANNED = pa.schema(
    [
        ("passage_id", pa.string()),
        ("title", pa.string()),
        ("text", pa.string()),
        ("source", pa.string()),
        ("where", pa.string()),
        ("key", pa.binary(16)),  # the same for the same passages (`duplicates.key`)
        ("draw", pa.uint64()),  # the passage's place in the sample's order
        ("words", pa.int32()),
    ]
)
ASKED = pa.schema(
    [
        ("question_id", pa.string()),
        ("benchmark", pa.string()),
        ("split", pa.string()),
        ("question", pa.string()),
        ("answers", pa.list_(pa.string())),
        ("gold_ids", pa.list_(pa.string())),
        ("hops", pa.int32()),
        ("type", pa.string()),
        ("gold_source", pa.string()),
        ("where", pa.string()),
    ]
)
CHOPPED = pa.schema(
    [
        ("chunk_id", pa.string()),
        ("title", pa.string()),
        ("text", pa.string()),
        ("source", pa.string()),
        ("n_tokens", pa.int32()),
        ("words", pa.int32()),
        ("row", pa.int32()),  # of the passage in its shard
        ("bands", pa.binary(8 * duplicates.BANDS)),  # empty unless near-duplicates are looked for
    ]
)


def draw(seed: int, kind: str, name: str) -> bytes:
    """What orders a sample: of seed and id alone, so that neither the files' order nor the number of processes matters."""
    return hashlib.sha256(f"{seed}\0{kind}\0{name}".encode()).digest()


class Scan:
    """Reads a part of the source: {"part"} -> {"part", "rows" (of each shard), "questions", "mistakes", "messages", "left_out"}."""

    def __init__(self, data: DataConfig, seed: int, work: str) -> None:
        self._data, self._seed, self._work = data, seed, work

    def __call__(self, task: Mapping[str, Any]) -> dict[str, Any]:
        part = int(task["part"])
        mistakes = Mistakes(skip=self._data.on_error == "skip")
        repeats = sources.repeats(self._data, part)
        seen: set[int] = set()  # contents already kept
        passages: list[Passage] = []
        questions: list[RawQuestion] = []
        rows: list[int] = []
        items = sources.read(self._data, self._seed, part, mistakes)
        for item in tqdm(items, desc=sources.parts(self._data)[part], unit="record", leave=False, disable=None):
            if isinstance(item, RawQuestion):
                questions.append(item)
                continue
            if repeats:
                mark = int(item.passage_id[:15], 16)
                if mark in seen:
                    continue
                seen.add(mark)
            passages.append(item)
            if len(passages) == SHARD:
                rows.append(self._keep(passages, part, len(rows)))
                passages = []
        if passages:
            rows.append(self._keep(passages, part, len(rows)))
        if questions:
            columns = {name: [getattr(question, name) for question in questions] for name in ASKED.names}
            put(storage.join(self._work, "questions", f"{part:05}.parquet"), pa.table(columns, schema=ASKED))
        return {"part": part, "rows": rows, "questions": len(questions), "mistakes": mistakes.count, "messages": mistakes.messages,
                "left_out": sorted(mistakes.left_out.items())}  # fmt: skip

    def _keep(self, passages: list[Passage], part: int, number: int) -> int:
        columns: dict[str, list[Any]] = {
            name: [getattr(passage, name) for passage in passages] for name in ("passage_id", "title", "text", "source", "where")
        }
        columns["key"] = [duplicates.key(passage.title, passage.text) for passage in passages]
        columns["draw"] = [int.from_bytes(draw(self._seed, "passage", passage.passage_id)[:8]) for passage in passages]
        columns["words"] = [len(passage.text.split()) for passage in passages]
        put(scanned(self._work, part, number), pa.table(columns, schema=SCANNED))
        return len(passages)


class Chop:
    """Splits passages to chunks: {"number", "shard": URL, "rows": URL of their numbers, "target": URL} -> {"number", "target"}."""

    def __init__(self, tokenizer: str, revision: str | None, template: str, limit: int, bands: bool) -> None:
        from intra.backbone import locate

        self._tokenizer = locate.load_tokenizer(tokenizer, revision)
        self._template, self._limit, self._bands = template, limit, bands

    def __call__(self, task: Mapping[str, Any]) -> dict[str, Any]:
        rows = get(task["rows"])["row"]
        table = get(task["shard"], ["passage_id", "title", "text", "source", "where"]).take(rows)
        passages = [Passage(**record) for record in table.to_pylist()]
        numbers = dict(zip((passage.passage_id for passage in passages), rows.to_pylist(), strict=True))
        chunks = list(chunking.chunk(passages, self._tokenizer, self._template, self._limit))
        columns: dict[str, list[Any]] = {
            name: [getattr(chunk, name) for chunk in chunks] for name in ("chunk_id", "title", "text", "source", "n_tokens")
        }
        columns["words"] = [len(chunk.text.split()) for chunk in chunks]
        columns["row"] = [numbers[chunk.passage_id] for chunk in chunks]
        hashes = duplicates.band_hashes([f"{chunk.title} {chunk.text}" for chunk in chunks]) if self._bands else None
        columns["bands"] = [None] * len(chunks) if hashes is None else [row.tobytes() for row in hashes]
        put(task["target"], pa.table(columns, schema=CHOPPED))
        return {"number": task["number"], "target": task["target"]}


def scanned(work: str, part: int, number: int) -> str:
    """The URL of a shard of a part's passages."""
    return storage.join(work, "passages", f"{part:05}-{number:05}.parquet")


def put(url: str, table: pa.Table) -> None:
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    storage.write_bytes(url, buffer.getvalue())


def get(url: str, columns: list[str] | None = None) -> pa.Table:
    return pq.read_table(io.BytesIO(storage.read_bytes(url)), columns=columns)


def inline(stage: Any, arguments: tuple[Any, ...], tasks: list[dict[str, Any]], label: str) -> Iterator[dict[str, Any]]:
    """The stage's results for the tasks, in their order, in this process. What a workflow puts in its place must give the same."""
    work = stage(*arguments)
    for task in tqdm(tasks, desc=label, unit="file", disable=None):
        yield work(task)
