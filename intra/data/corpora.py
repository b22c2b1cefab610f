"""Readers of passages without questions: distractors.

    psgs      DPR's psgs_w100.tsv: id, text and title between tabs, with a header; quotes as in CSV
    parquet   columns `text` and, where it is there, `title`; other columns are not read (a data set of the hub, such as a Wikipedia)
    passages  JSONL of {"text", "title" (optional)}

A passage's id is the hash of its title and text. `path` may be a glob.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator

import pyarrow as pa
import pyarrow.parquet as pq

from intra.data import files
from intra.data.files import Record
from intra.data.raw import Mistakes, Passage, content_id, items
from intra.data_config import FileConfig
from intra.errors import UserError

HEADER = ["id", "text", "title"]
BATCH = 2048  # rows of Parquet at once

Reader = Callable[[str, FileConfig, Mistakes], Iterator[Passage]]


def psgs(url: str, entry: FileConfig, mistakes: Mistakes) -> Iterator[Passage]:
    """The rows of a TSV file of DPR's."""
    rows = files.lines(url, mistakes)
    where, header = next(rows, (f"{url}:1", ""))
    if header.split("\t") != HEADER:
        mistakes.add(UserError(f"{where}: expected the header {', '.join(HEADER)} between tabs, found {header[:80]!r}; add it"), whole=True)
        return

    def parse(where: str, line: str) -> Iterator[Passage]:
        try:
            (cells,) = csv.reader([line], delimiter="\t", strict=True)
        except (csv.Error, ValueError) as error:
            raise UserError(f"{where}: not a sound row ({error}); fetch the file again") from None
        if len(cells) != len(HEADER):
            raise UserError(f"{where}: expected {', '.join(HEADER)} between tabs, found {len(cells)} cells")
        yield _passage(dict(zip(HEADER, cells, strict=True)), where, entry)

    count = 0
    for passage in items(rows, parse, mistakes):
        count += 1
        yield passage  # type: ignore[misc]
    if not count:
        mistakes.add(UserError(f"{url}: holds no passages; fetch it again or remove it"), whole=True)


def parquet(url: str, entry: FileConfig, mistakes: Mistakes) -> Iterator[Passage]:
    """The rows of a Parquet file."""
    try:
        with files.opened(url) as file:
            source = pq.ParquetFile(file)
            names = source.schema_arrow.names
            if "text" not in names:
                raise UserError(f"{url}: the column 'text' is missing; found the columns {', '.join(names)}")
            if not source.metadata.num_rows:
                raise UserError(f"{url}: holds no passages; fetch it again or remove it")
            wanted = [name for name in ("title", "text") if name in names]
            number = 0
            for batch in source.iter_batches(BATCH, columns=wanted):
                records = [(f"{url}:{number + index}", record) for index, record in enumerate(_rows(url, number, batch), 1)]
                number += batch.num_rows
                yield from items(records, lambda where, record: iter([_passage(record, where, entry)]), mistakes)  # type: ignore[misc]
    except (pa.ArrowException, OSError) as error:  # the second from a damaged page
        mistakes.add(UserError(f"{url}: not a sound Parquet file ({' '.join(str(error).split())[:120]}); fetch it again"), whole=True)
    except UserError as error:
        mistakes.add(error, whole=True)


def passages(url: str, entry: FileConfig, mistakes: Mistakes) -> Iterator[Passage]:
    """The objects of a JSONL file (or a JSON list)."""
    yield from items(files.objects(url, mistakes), lambda where, record: iter([_passage(record, where, entry)]), mistakes)  # type: ignore[misc]


READERS: dict[str, Reader] = {"psgs": psgs, "parquet": parquet, "passages": passages}


def _rows(url: str, first: int, batch: pa.RecordBatch) -> list[Record]:
    try:
        return list(batch.to_pylist())
    except UnicodeDecodeError:  # Arrow does not check that a string column is UTF-8
        rows = []
        for index in range(batch.num_rows):
            try:
                rows.append(batch.slice(index, 1).to_pylist()[0])
            except UnicodeDecodeError:
                rows.append({"title": "", "text": b""})
        return rows


def _passage(record: Record, where: str, entry: FileConfig) -> Passage:
    if isinstance(record.get("text"), bytes):
        raise UserError(f"{where}: 'text' or 'title' holds bytes that are not UTF-8; convert the file")
    title, text = files.string(record, "title", where, default="", blank=True), files.string(record, "text", where)
    return Passage(content_id(title, text), title, text, entry.path, where)
