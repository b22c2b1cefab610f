"""The `jsonl` source: passage files and one question file per benchmark and split.

    <data.path>/<data.passages>                      {"id", "title", "text"}; several files make one pool
    <data.path>/questions/<benchmark>.<split>.jsonl  {"id", "question", "answers", "gold_ids"}; optional "hops", "type", "gold_source",
                                                     "benchmark" (then equal to the file's); other fields are not read
    <data.path>/equivalent_gold.jsonl                optional: ["id", "id"], passages of which either counts as a hit

Every file may be packed (`.gz`, `.zst`). `title` may be "". `hops` defaults to the number of gold ids, `type` to "" (no type).
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator
from dataclasses import dataclass

from intra import storage
from intra.data import files
from intra.data.raw import Item, Mistakes, Passage, RawQuestion, items
from intra.data_config import DataConfig
from intra.errors import UserError

EQUIVALENT = "equivalent_gold.jsonl"


@dataclass(frozen=True)
class Layout:
    """The input files, as names below `folder`."""

    folder: str
    passages: list[str]
    questions: list[tuple[str, str, str]]  # name, benchmark, split ("train" | "test")
    equivalent: str | None

    def names(self) -> list[str]:
        return [*self.passages, *(name for name, _, _ in self.questions), *([self.equivalent] if self.equivalent else [])]


def layout(data: DataConfig) -> Layout:
    """Finds the files. Raises UserError: no such folder, a file or glob without a match, no questions of a benchmark or split."""
    folder, present = files.listing(data, "passage files and questions/")
    return Layout(folder, _passages(data, folder, present), _questions(data, folder), files.either(folder, EQUIVALENT, present))


def read(data: DataConfig, part: int, mistakes: Mistakes) -> Iterator[Item]:
    """The passages or questions of a file, in the file's order; parts are the passage files, then the question files."""
    found = layout(data)
    if part < len(found.passages):
        return _read_passages(found.folder, found.passages[part], mistakes)
    return _read_questions(found.folder, *found.questions[part - len(found.passages)], mistakes)


def equivalents(data: DataConfig, mistakes: Mistakes) -> list[tuple[str, ...]]:
    """The groups of equivalent passage ids; none where the file is absent."""
    found = layout(data)
    if found.equivalent is None:
        return []
    groups = []
    for where, text in files.lines(storage.join(found.folder, found.equivalent), mistakes):
        try:
            group = files.parse(where, text)
            if not isinstance(group, list) or len(group) < 2 or not all(isinstance(item, str) for item in group):
                raise UserError(f'{where}: expected a list of passage ids such as ["a", "b"], found {text[:80]}')
        except UserError as error:
            mistakes.add(error)
        else:
            groups.append(tuple(group))
    return groups


def _passages(data: DataConfig, folder: str, present: list[str]) -> list[str]:
    patterns = [data.passages] if isinstance(data.passages, str) else data.passages
    if not patterns:
        raise UserError("data.passages is empty; name the passage files or a glob")
    chosen: set[str] = set()
    for pattern in patterns:
        if not any(sign in pattern for sign in "*?["):
            if not storage.exists(storage.join(folder, pattern)):
                raise UserError(f"{storage.join(folder, pattern)}: no such file (data.passages); {folder} holds {_few(present)}")
            chosen.add(pattern)
            continue
        names = storage.files(folder) if "/" in pattern else present
        matches = [name for name in names if fnmatch.fnmatchcase(name, pattern)]
        if not matches:
            raise UserError(f"data.passages={pattern}: no file in {folder} matches; it holds {_few(present)}")
        chosen.update(matches)
    return sorted(chosen)


def _questions(data: DataConfig, folder: str) -> list[tuple[str, str, str]]:
    roles = {"train": data.train_split, "test": data.test_split}
    place = storage.join(folder, "questions")
    present = storage.names(place)
    plain = {name: name.removesuffix(".gz").removesuffix(".zst") for name in present}
    stems = {name: bare.removesuffix(".jsonl") for name, bare in plain.items() if bare.endswith(".jsonl")}
    if not stems:
        raise UserError(f"{place}: no question files; it must hold <benchmark>.<split>.jsonl (.gz, .zst)")
    found: list[tuple[str, str, str]] = []
    for role, split in roles.items():
        names = [name for name, stem in stems.items() if stem.endswith(f".{split}") and stem != f".{split}"]
        if not names:
            splits = sorted({stem.rpartition(".")[2] for stem in stems.values() if "." in stem})
            raise UserError(f"data.{role}_split={split}: no file <benchmark>.{split}.jsonl (.gz, .zst) in {place}; "
                            f"splits found: {', '.join(splits) or 'none'}")  # fmt: skip
        for name in names:
            files.either(place, f"{stems[name]}.jsonl", present)
            found.append((f"questions/{name}", stems[name].removesuffix(f".{split}"), role))
    known = sorted({benchmark for _, benchmark, _ in found})
    wanted = known if data.benchmarks is None else data.benchmarks
    for benchmark in wanted:
        if benchmark not in known:
            raise UserError(f"data.benchmarks: no question file for '{benchmark}' in {place} (splits {', '.join(roles.values())}); "
                            f"found {', '.join(known)}")  # fmt: skip
    chosen = sorted(entry for entry in found if entry[1] in wanted)
    for role, split in roles.items():
        if not any(entry[2] == role for entry in chosen):
            raise UserError(f"data.benchmarks: none of {', '.join(wanted) or 'an empty list'} has a file for data.{role}_split={split} "
                            f"in {place}; name one that has, or null for all")  # fmt: skip
    return chosen


def _few(names: list[str]) -> str:
    return ", ".join(names[:8]) + (" ..." if len(names) > 8 else "")


def _read_passages(folder: str, name: str, mistakes: Mistakes) -> Iterator[Item]:
    def parse(where: str, record: files.Record) -> Iterator[Item]:
        yield Passage(
            passage_id=files.identifier(record, "id", where),
            title=files.string(record, "title", where, blank=True),
            text=files.string(record, "text", where),
            source=name,
            where=where,
        )

    return items(files.records(storage.join(folder, name), mistakes), parse, mistakes)


def _read_questions(folder: str, name: str, benchmark: str, split: str, mistakes: Mistakes) -> Iterator[Item]:
    def parse(where: str, record: files.Record) -> Iterator[Item]:
        stated = files.string(record, "benchmark", where, default=benchmark)
        if stated != benchmark:
            raise UserError(f"{where}: 'benchmark' is '{stated}' in a file of '{benchmark}'; move the line or rename the file")
        gold_ids = files.strings(record, "gold_ids", where, "gold passage")
        yield RawQuestion(
            question_id=files.identifier(record, "id", where),
            benchmark=benchmark,
            split=split,
            question=files.string(record, "question", where),
            answers=files.strings(record, "answers", where, "answer"),
            gold_ids=gold_ids,
            hops=files.integer(record, "hops", where, default=len(gold_ids)),
            type=files.string(record, "type", where, default="", blank=True),
            gold_source=files.string(record, "gold_source", where, default="annotated"),
            where=where,
        )

    empty = True
    for question in items(files.records(storage.join(folder, name), mistakes), parse, mistakes):
        empty = False
        yield question
    if empty:
        mistakes.add(UserError(f"{storage.join(folder, name)}: holds no questions; remove it or fill it"), whole=True)
