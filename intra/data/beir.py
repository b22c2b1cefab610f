"""The `beir` source: one benchmark in BEIR's layout. The folder's name is the benchmark's.

    <data.path>/corpus.jsonl        {"_id", "title" (optional), "text"}
    <data.path>/queries.jsonl       {"_id", "text"}; answers, where known, in "answers", "metadata.answers" or "metadata.answer"
    <data.path>/qrels/<split>.tsv   query-id, corpus-id, score, with a header; a score above 0 marks a gold passage

Every file may be gzipped (`.gz`). A query belongs to a split when that split's qrels hold a gold passage of it. BEIR does not
say hops or types: `hops` is the number of gold passages unless "metadata.hops" says it, `type` is "metadata.type" or "".
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

from intra import storage
from intra.config import DataConfig
from intra.data import files
from intra.data.raw import Passage, RawQuestion
from intra.errors import UserError


@dataclass(frozen=True)
class Layout:
    """The input files, as names below `folder`."""

    folder: str
    benchmark: str
    corpus: str
    queries: str
    qrels: dict[str, str]  # split ("train" | "test") -> name

    def names(self) -> list[str]:
        return [self.corpus, self.queries, *self.qrels.values()]


def layout(data: DataConfig) -> Layout:
    """Finds the files. Raises UserError: no such folder, a file that is missing, a benchmark that is not this folder's."""
    path = data.path or ""
    folder = storage.absolute(path)
    # The name as the user wrote it: a link's own name, not its target's.
    benchmark = folder.rpartition("/")[2] if storage.is_s3(path) else os.path.basename(os.path.abspath(path.removeprefix("file://")))
    present = storage.names(folder)
    if not present:
        raise UserError(f"data.path={data.path}: no such folder, or an empty one; it must hold corpus.jsonl, queries.jsonl and qrels/")
    if data.benchmarks is not None and data.benchmarks != [benchmark]:
        raise UserError(f"data.benchmarks={data.benchmarks}: the folder {folder} holds the one benchmark '{benchmark}'; remove the key")
    names = {}
    for name in ("corpus.jsonl", "queries.jsonl"):
        found = files.either(folder, name, present)
        if found is None:
            raise UserError(f"{storage.join(folder, name)}: no such file; data.source=beir needs it (or {name}.gz)")
        names[name] = found
    place = storage.join(folder, "qrels")
    judged = storage.names(place)
    qrels = {}
    for role, split in (("train", data.train_split), ("test", data.test_split)):
        found = files.either(place, f"{split}.tsv", judged)
        if found is None:
            splits = sorted(name.partition(".tsv")[0] for name in judged if ".tsv" in name)
            raise UserError(
                f"{storage.join(place, split)}.tsv: no such file; set data.{role}_split to one of: {', '.join(splits) or 'none'}"
            )
        qrels[role] = f"qrels/{found}"
    return Layout(folder, benchmark, names["corpus.jsonl"], names["queries.jsonl"], qrels)


def read(data: DataConfig) -> tuple[Iterator[Passage], Iterator[RawQuestion]]:
    """The corpus's passages and both splits' questions. Raises UserError naming file and line."""
    found = layout(data)
    return _read_corpus(found), _read_questions(found)


def _read_corpus(found: Layout) -> Iterator[Passage]:
    for where, record in files.records(storage.join(found.folder, found.corpus)):
        yield Passage(
            passage_id=files.identifier(record, "_id", where),
            title=files.string(record, "title", where, default="", blank=True),
            text=files.string(record, "text", where),
            source=found.corpus,
            where=where,
        )


def _read_questions(found: Layout) -> Iterator[RawQuestion]:
    url = storage.join(found.folder, found.queries)
    queries: dict[str, tuple[str, files.Record]] = {}
    for where, record in files.records(url):
        query_id = files.identifier(record, "_id", where)
        if query_id in queries:
            raise UserError(f"{where}: question id '{query_id}' stands already at {queries[query_id][0]}; remove one or rename it")
        queries[query_id] = (where, record)
    for split, name in found.qrels.items():
        place = storage.join(found.folder, name)
        gold = _read_qrels(place)
        if not gold:
            raise UserError(f"{place}: no line with a score above 0; a split needs at least one gold passage")
        for query_id, (judged_at, corpus_ids) in gold.items():
            if query_id not in queries:
                raise UserError(f"{judged_at}: query '{query_id}' is not in {url}; add it there or remove the line")
            where, record = queries[query_id]
            yield _question(found.benchmark, split, query_id, where, record, tuple(corpus_ids))


def _question(benchmark: str, split: str, query_id: str, where: str, record: files.Record, gold_ids: tuple[str, ...]) -> RawQuestion:
    metadata = record.get("metadata")
    if metadata is not None and not isinstance(metadata, dict):
        raise UserError(f"{where}: 'metadata' must be an object, found {files.kind(metadata)}")
    metadata = metadata or {}
    return RawQuestion(
        question_id=query_id,
        benchmark=benchmark,
        split=split,
        question=files.string(record, "text", where),
        answers=_answers(record, metadata, where),
        gold_ids=gold_ids,
        hops=files.integer(metadata, "hops", where, default=len(gold_ids)),
        type=files.string(metadata, "type", where, default="", blank=True),
        where=where,
    )


def _answers(record: files.Record, metadata: files.Record, where: str) -> tuple[str, ...]:
    """The stated answers; () where the benchmark states none (whether that will do is the pool's to say)."""
    for holder, key in ((record, "answers"), (metadata, "answers"), (metadata, "answer")):
        if key not in holder:
            continue
        if isinstance(holder[key], str):
            return (files.string(holder, key, where),)
        return files.strings(holder, key, where, "answer")
    return ()


def _read_qrels(url: str) -> dict[str, tuple[str, list[str]]]:
    """Per query id: where it is first judged, and the ids of its gold passages in the file's order."""
    gold: dict[str, tuple[str, list[str]]] = {}
    for index, (where, text) in enumerate(files.lines(url)):
        cells = text.split("\t")
        if len(cells) != 3:
            raise UserError(f"{where}: expected query-id, corpus-id and score between tabs, found {text[:80]!r}")
        query_id, corpus_id, score = (cell.strip() for cell in cells)
        try:
            positive = float(score) > 0
        except ValueError:
            if index == 0:
                continue  # the header
            raise UserError(f"{where}: the score '{score}' is not a number") from None
        if positive:
            known = gold.setdefault(query_id, (where, []))[1]
            if corpus_id not in known:
                known.append(corpus_id)
    return gold
