"""The `beir` source: one benchmark in BEIR's layout. The folder's name is the benchmark's.

    <data.path>/corpus.jsonl        {"_id", "title" (optional), "text"}
    <data.path>/queries.jsonl       {"_id", "text"}; answers, where known, in "answers", "metadata.answers" or "metadata.answer"
    <data.path>/qrels/<split>.tsv   query-id, corpus-id, score, with a header; a score above 0 marks a gold passage

Every file may be packed (`.gz`, `.zst`). A query belongs to a split when that split's qrels hold a gold passage of it. BEIR does not
say hops or types: `hops` is the number of gold passages unless "metadata.hops" says it, `type` is "metadata.type" or "". What
`intra.data.export` writes besides is read back: of a query "metadata.benchmark", "metadata.gold_source" and "metadata.gold" (groups of
passages of which either counts), of a passage "metadata.source".
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

from intra import storage
from intra.data import files
from intra.data.raw import Item, Mistakes, Passage, RawQuestion, items, named_twice
from intra.data_config import DataConfig, FileConfig
from intra.errors import UserError


@dataclass(frozen=True)
class Layout:
    """The input files, as names below `folder`."""

    folder: str
    benchmark: str
    corpus: str
    queries: str
    qrels: dict[str, str]  # split ("train" | "test") -> name
    prefix: str = ""  # before every id
    source: str = ""  # of the passages; "" takes the corpus file's name

    def names(self) -> list[str]:
        return [name for name in (self.corpus, self.queries, *self.qrels.values()) if name]


def layout(data: DataConfig) -> Layout:
    """Finds the files. Raises UserError: no such folder, a file that is missing, a benchmark that is not this folder's."""
    path = data.path or ""
    folder, present = files.listing(data, "corpus.jsonl, queries.jsonl and qrels/")
    # The name as the user wrote it: a link's own name, not its target's.
    benchmark = folder.rpartition("/")[2] if storage.is_s3(path) else os.path.basename(os.path.abspath(path.removeprefix("file://")))
    if data.benchmarks is not None and data.benchmarks != [benchmark]:
        raise UserError(f"data.benchmarks={data.benchmarks}: the folder {folder} holds the one benchmark '{benchmark}'; remove the key")
    names = {}
    for name in ("corpus.jsonl", "queries.jsonl"):
        found = files.either(folder, name, present)
        if found is None:
            raise UserError(f"{storage.join(folder, name)}: no such file; data.source=beir needs it (or {name}.gz, {name}.zst)")
        names[name] = found
    place = storage.join(folder, "qrels")
    judged = storage.names(place)
    qrels = {}
    for role, split in (("train", data.train_split), ("test", data.test_split)):
        found = files.either(place, f"{split}.tsv", judged)
        if found is None:
            splits = sorted({name.partition(".tsv")[0] for name in judged if ".tsv" in name})
            raise UserError(
                f"{storage.join(place, split)}.tsv: no such file; set data.{role}_split to one of: {', '.join(splits) or 'none'}"
            )
        qrels[role] = f"qrels/{found}"
    return Layout(folder, benchmark, names["corpus.jsonl"], names["queries.jsonl"], qrels)


def entry_layout(entry: FileConfig, folder: str) -> Layout:
    """The files of an entry of `data.files`: ids get the benchmark before them, for another benchmark may have the same ones."""
    benchmark = str(entry.benchmark)
    qrels: dict[str, str] = {entry.split: f"qrels/{_found(storage.join(folder, 'qrels'), f'{entry.split}.tsv')}"} if entry.split else {}
    queries = _found(folder, "queries.jsonl") if entry.split else ""
    return Layout(folder, benchmark, _found(folder, "corpus.jsonl"), queries, qrels, f"{benchmark}/", entry.path)


def _found(folder: str, name: str) -> str:
    found = files.either(folder, name, storage.names(folder))
    if found is None:
        raise UserError(f"{storage.join(folder, name)}: no such file; format beir needs it (or {name}.gz, {name}.zst)")
    return found


def read_corpus(found: Layout, mistakes: Mistakes) -> Iterator[Item]:
    """The corpus's passages."""

    def parse(where: str, record: files.Record) -> Iterator[Item]:
        yield Passage(
            passage_id=found.prefix + files.identifier(record, "_id", where),
            title=files.string(record, "title", where, default="", blank=True),
            text=files.string(record, "text", where),
            source=files.string(_metadata(record, where), "source", where, default=found.source or found.corpus),
            where=where,
        )

    return items(files.records(storage.join(found.folder, found.corpus), mistakes), parse, mistakes)


def read_questions(found: Layout, mistakes: Mistakes) -> Iterator[Item]:
    """The questions of all splits, in the order in which they are judged."""
    url = storage.join(found.folder, found.queries)
    queries = _queries(found, mistakes) if found.qrels else {}
    for split, name in found.qrels.items():
        place = storage.join(found.folder, name)
        gold = _read_qrels(place, mistakes)
        if not gold:
            mistakes.add(UserError(f"{place}: no line with a score above 0; a split needs at least one gold passage"), whole=True)
        for query_id, (judged_at, corpus_ids) in gold.items():
            if query_id not in queries:
                mistakes.add(UserError(f"{judged_at}: query '{query_id}' is not in {url}; add it there or remove the line"))
                continue
            try:
                yield _question(found, split, query_id, *queries[query_id], tuple(corpus_ids))
            except UserError as error:
                mistakes.add(error)


def equivalents(found: Layout) -> list[tuple[str, ...]]:
    """The groups of passages of which either counts as a hit, where the queries state them ("metadata.gold")."""
    if not found.qrels:
        return []
    groups: dict[tuple[str, ...], None] = {}
    told = Mistakes(skip=True)  # what is wrong in the queries, their first reading has said
    for where, query in _queries(found, told).values():
        try:
            groups |= {tuple(group): None for group in _gold(query, where) or [] if len(group) > 1}
        except UserError as error:
            told.add(error)
    return [tuple(found.prefix + name for name in group) for group in groups]


def _queries(found: Layout, mistakes: Mistakes) -> dict[str, tuple[str, files.Record]]:
    queries: dict[str, tuple[str, files.Record]] = {}
    for where, record in files.records(storage.join(found.folder, found.queries), mistakes):
        try:
            query_id = files.identifier(record, "_id", where)
            if query_id in queries:
                raise named_twice("question", query_id, queries[query_id][0], where)
        except UserError as error:
            mistakes.add(error)
            continue
        queries[query_id] = (where, record)
    return queries


def _metadata(record: files.Record, where: str) -> files.Record:
    metadata = record.get("metadata")
    if metadata is not None and not isinstance(metadata, dict):
        raise UserError(f"{where}: 'metadata' must be an object, found {files.kind(metadata)}")
    return metadata or {}


def _question(found: Layout, split: str, query_id: str, where: str, record: files.Record, judged: tuple[str, ...]) -> RawQuestion:
    metadata, groups, gold_ids = _metadata(record, where), _gold(record, where), judged
    if groups is not None:
        if {name for group in groups for name in group} != set(judged):
            raise UserError(f"{where}: 'metadata.gold' must be lists of the passage ids that the qrels name, no more and no less")
        gold_ids = tuple(group[0] for group in groups)
    return RawQuestion(
        question_id=found.prefix + query_id,
        benchmark=files.string(metadata, "benchmark", where, default=found.benchmark),
        split=split,
        question=files.string(record, "text", where),
        answers=_answers(record, metadata, where),
        gold_ids=tuple(found.prefix + name for name in gold_ids),
        hops=files.integer(metadata, "hops", where, default=len(gold_ids)),
        type=files.string(metadata, "type", where, default="", blank=True),
        gold_source=files.string(metadata, "gold_source", where, default="annotated"),
        where=where,
    )


def _gold(record: files.Record, where: str) -> list[tuple[str, ...]] | None:
    """The groups of "metadata.gold"; None where it is not stated."""
    metadata = _metadata(record, where)
    if "gold" not in metadata:
        return None
    groups = files.listed(metadata, "gold", where, "group of passage ids")
    return [files.strings({"metadata.gold": group}, "metadata.gold", where, "passage id") for group in groups]


def _answers(record: files.Record, metadata: files.Record, where: str) -> tuple[str, ...]:
    """The stated answers; () where the benchmark states none (whether that will do is the pool's to say)."""
    for holder, key in ((record, "answers"), (metadata, "answers"), (metadata, "answer")):
        if key not in holder:
            continue
        if isinstance(holder[key], str):
            return (files.string(holder, key, where),)
        return files.strings(holder, key, where, "answer")
    return ()


def _read_qrels(url: str, mistakes: Mistakes) -> dict[str, tuple[str, list[str]]]:
    """Per query id: where it is first judged, and the ids of its gold passages in the file's order."""
    gold: dict[str, tuple[str, list[str]]] = {}
    for index, (where, text) in enumerate(files.lines(url, mistakes)):
        cells = [cell.strip() for cell in text.split("\t")]
        try:
            if len(cells) != 3:
                raise UserError(f"{where}: expected query-id, corpus-id and score between tabs, found {text[:80]!r}; mend the line")
            positive = float(cells[2]) > 0
        except ValueError:
            if index:  # else the header
                mistakes.add(UserError(f"{where}: the score '{cells[2]}' is not a number; mend the line"))
            continue
        except UserError as error:
            mistakes.add(error)
            continue
        if positive:
            known = gold.setdefault(cells[0], (where, []))[1]
            if cells[1] not in known:
                known.append(cells[1])
    return gold
