"""Readers of passages without questions: distractors.

    psgs      DPR's psgs_w100.tsv: id, text and title between tabs, with a header; quotes as in CSV
    parquet   columns `text` and, where it is there, `title`; other columns are not read (a data set of the hub, such as a Wikipedia)
    passages  JSONL of {"text", "title" (optional)}

A passage's id is the hash of its title and text. `path` may be a glob.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator

from intra.data import files
from intra.data.files import Record
from intra.data.raw import Mistakes, Passage, content_id, items
from intra.data_config import FileConfig
from intra.errors import UserError

HEADER = ["id", "text", "title"]

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
    rows = files.rows(url, mistakes, ("title", "text"), ("text",))
    yield from items(rows, lambda where, record: iter([_passage(record, where, entry)]), mistakes)  # type: ignore[misc]


def passages(url: str, entry: FileConfig, mistakes: Mistakes) -> Iterator[Passage]:
    """The objects of a JSONL file (or a JSON list)."""
    yield from items(files.objects(url, mistakes), lambda where, record: iter([_passage(record, where, entry)]), mistakes)  # type: ignore[misc]


READERS: dict[str, Reader] = {"psgs": psgs, "parquet": parquet, "passages": passages}


def _passage(record: Record, where: str, entry: FileConfig) -> Passage:
    title, text = files.string(record, "title", where, default="", blank=True), files.string(record, "text", where)
    return Passage(content_id(title, text), title, text, entry.path, where)
