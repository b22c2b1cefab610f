"""Builds a dataset: reads the source, checks all of it, chooses the pool, chunks its passages, writes the artifact.

    <dataset>/pool.parquet, questions.parquet (`intra.data.schema`), statistics.json, report.md, mistakes.txt and near_duplicates.parquet
    (where there are any), config.json, tokenizer/ (where the backbone is made from scratch), manifest.json last

Nothing of it is written before everything has been checked, and the same inputs give the same bytes, on any number of processes
(`intra.data.stages` has what they do). Meanwhile <dataset>/work/ holds what was read; it is removed at the end, whatever happens.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from intra import lineage, storage, tracking
from intra.artifact import Artifact
from intra.config import Config
from intra.data import candidates as choice
from intra.data import checks, chunking, duplicates, raw, report, schema, sources, stages, statistics
from intra.data.candidates import Candidates, Rows
from intra.data.raw import Mistakes, RawQuestion
from intra.data.schema import Question
from intra.data_config import DataConfig
from intra.errors import UserError, WorkflowError

STATISTICS = "statistics.json"
REPORT = "report.md"
MISTAKES = "mistakes.txt"
NEAR_DUPLICATES = "near_duplicates.parquet"
TOKENIZER = "tokenizer"
UNION = ("hotpotqa", "2wikimultihopqa")  # what MuSiQue's training questions are united with (data.musique_train)
SLICE = 65536  # rows of a row group of pool.parquet


class Fan(Protocol):
    """Runs a stage (`intra.data.stages`) over tasks, in one process or many; the results come in the tasks' order."""

    def __call__(self, stage: Any, arguments: tuple[Any, ...], tasks: list[dict[str, Any]], label: str) -> Iterator[dict[str, Any]]: ...


def build(config: Config, artifact: Artifact, fan: Fan = stages.inline) -> dict[str, Any]:
    """Makes the dataset of a configuration at `artifact`; returns the manifest.

    The manifest holds pool_sha256 and questions_sha256 (of the Parquet bytes), passages, split_passages, chunks, tokens,
    longest_chunk (tokens), questions (per benchmark and split) and inputs (digest of each file).
    Raises UserError naming file, line and id for bad input, WorkflowError where an input changes while it is read.
    """
    work = artifact.path("work")
    storage.remove(work)  # of a run that was killed
    try:
        return _build(config, artifact, work, fan)
    finally:
        storage.remove(work)


def _build(config: Config, artifact: Artifact, work: str, fan: Fan) -> dict[str, Any]:
    data = config.data
    digests = sources.digests(data)
    mistakes = Mistakes(skip=data.on_error == "skip")
    count = len(sources.parts(data))
    scans = list(fan(stages.Scan, (data, config.seed, work), [{"part": part} for part in range(count)], "read"))
    for scan in scans:
        mistakes.merge(scan["mistakes"], scan["messages"], dict(scan["left_out"]))
    read = choice.load(scans, work, [sources.own_ids(data, part) for part in range(count)], data.deduplicate, mistakes)
    questions = unique((question for scan in scans for question in _questions(work, scan)), mistakes)
    questions = check(read, choice.resolve_titles(questions, read, mistakes), needs_answers(config), mistakes)
    asked, questions_read = limit_questions(fair(questions, data), data.question_limit, config.seed), len(questions)
    del questions
    groups = _equivalence(sources.equivalents(data, mistakes), read)
    if sources.digests(data) != digests:
        raise WorkflowError(f"{data.path}: a file changed while it was read; run the same command again")

    gold = np.unique(read.find([gold for question in asked for gold in question.gold_ids]))
    wanted = limit_pool(read, gold, data.pool_limit)
    with tempfile.TemporaryDirectory() as folder:
        place = _tokenizer(config, read, wanted, asked, folder)
        if place != config.backbone.model:
            storage.upload(folder, storage.join(work, TOKENIZER))
            place = storage.join(work, TOKENIZER)
        chopper = _Chopper(config, read, work, place, fan)
        pool = chopper.budgeted(gold, wanted) if data.pool_chunks or data.pool_tokens else chopper.all(wanted)
        table, passage = _in_order(pool)
        asked_chunks = with_gold_chunks(asked, _pieces(read, table, passage, asked, groups), groups)
        described = statistics.describe(table, passage, asked_chunks, read.read, questions_read)
        described["checks"] = checks.run(table, asked_chunks, config.evaluate.k)
        described["input"] = {"mistakes": mistakes.count, "left_out": dict(sorted(mistakes.left_out.items())),
                              "duplicates": int(len(read) - len(read.distinct()))}  # fmt: skip
        near = _near_duplicates(table, data.near_duplicates, described)
        return _write(config, artifact, table, asked_chunks, described, mistakes, near, folder, digests)


def _questions(work: str, scan: Mapping[str, Any]) -> Iterator[RawQuestion]:
    if scan["questions"]:
        for batch in stages.get(storage.join(work, "questions", f"{scan['part']:05}.parquet")).to_batches(4096):
            for row in batch.to_pylist():
                yield RawQuestion(**{**row, "answers": tuple(row["answers"]), "gold_ids": tuple(row["gold_ids"])})


def unique(questions: Iterable[RawQuestion], mistakes: Mistakes) -> list[RawQuestion]:
    """The questions sorted by id. An id that stands twice is a mistake; of ids that are hashes of the whole question the first counts."""
    found: dict[str, RawQuestion] = {}
    for question in questions:
        name, first = question.question_id, found.setdefault(question.question_id, question)
        if first is question:
            continue
        if name == raw.hashed_id(question) and replace(question, where=first.where) == first:
            mistakes.left_out["questions that stand there twice, word for word"] += 1
            continue
        mistakes.add(raw.named_twice("question", name, first.where, question.where))
    return [found[name] for name in sorted(found)]


def needs_answers(config: Config) -> set[str]:
    """The splits whose questions need an answer: those that are answered, or trained on, in this configuration."""
    return {split for split, needed in (("test", config.evaluate.answers), ("train", config.backbone.train)) if needed}


def check(read: Candidates, questions: Sequence[RawQuestion], answered: set[str], mistakes: Mistakes) -> list[RawQuestion]:
    """The questions, with the ids of the passages that stand for their gold ones and no longer with where they were read.

    Mistakes, of which each costs its question: a gold id without its passage, no gold passage, no answer in a split that needs one.
    """
    rows = read.find([gold for question in questions for gold in question.gold_ids])
    ends = np.cumsum([len(question.gold_ids) for question in questions]).tolist()
    names = read.ids.take(pa.array(read.canonical[np.maximum(rows, 0)]))
    sound = []
    one: dict[str, str] = {}  # half a million questions share their evidence, and here its names
    for question, end in zip(questions, ends, strict=True):
        where = f"{question.where or question.benchmark}: question '{question.question_id}'"
        start = end - len(question.gold_ids)
        try:
            if not question.gold_ids:
                raise UserError(f"{where} has no gold passage; add one or remove the question")
            for gold, row in zip(question.gold_ids, rows[start:end], strict=True):
                if row < 0:
                    raise UserError(f"{where}: gold passage '{gold}' is not in the pool; add its file to data.passages, or mend the id")
            if not question.answers and question.split in answered:
                raise UserError(f"{where} has no answer; add one, or set evaluate.answers=false (test) or backbone.train=false (train)")
        except UserError as error:
            mistakes.add(error)
            continue
        gold_ids = tuple(dict.fromkeys(one.setdefault(name, name) for name in names[start:end].to_pylist()))
        sound.append(replace(question, gold_ids=gold_ids, where=""))
    return sound


def fair(questions: Sequence[RawQuestion], data: DataConfig) -> list[RawQuestion]:
    """The questions as data.nq_gold and data.musique_train would have them; sorted by id."""
    made = list(questions)
    if data.nq_gold == "one":
        made = [replace(question, gold_ids=question.gold_ids[:1]) if question.benchmark == "nq" else question for question in made]
    if data.musique_train == "union":
        if not any(question.benchmark == "musique" for question in made):
            raise UserError(
                "data.musique_train=union: there is no benchmark 'musique' among the questions; add its files, or set it to own"
            )
        made += [
            replace(question, question_id=f"musique+{question.question_id}", benchmark="musique")
            for question in made
            if question.split == "train" and question.benchmark in UNION
        ]
    return sorted(made, key=lambda question: question.question_id)


def limit_questions(questions: Sequence[RawQuestion], limit: int | None, seed: int) -> list[RawQuestion]:
    """At most `limit` questions of each benchmark and split, chosen by seed and id alone; their order is kept."""
    if limit is None:
        return list(questions)
    groups: dict[tuple[str, str], list[RawQuestion]] = {}
    for question in questions:
        groups.setdefault((question.benchmark, question.split), []).append(question)
    chosen = {
        question.question_id
        for group in groups.values()
        for question in sorted(group, key=lambda question: stages.draw(seed, "question", question.question_id))[:limit]
    }
    return [question for question in questions if question.question_id in chosen]


def limit_pool(read: Candidates, gold: Rows, limit: int | None) -> Rows:
    """`limit` passages: all gold ones (even where they are more than `limit`), the rest chosen by seed and id alone. In order."""
    distinct = read.distinct()
    if limit is None:
        return distinct
    others = read.by_draw(np.setdiff1d(distinct, gold, assume_unique=True))
    return np.union1d(gold, others[: max(0, limit - len(gold))])


def equivalence(groups: Iterable[Sequence[str]]) -> dict[str, tuple[str, ...]]:
    """Passage id -> all ids that count as the same, sorted; what is equal to a third is equal to each other."""
    parts: dict[str, set[str]] = {}
    for group in groups:
        merged = set(group).union(*(parts[name] for name in group if name in parts))
        parts |= dict.fromkeys(merged, merged)
    return {name: tuple(sorted(part)) for name, part in parts.items()}


def _equivalence(groups: Iterable[Sequence[str]], read: Candidates) -> dict[str, tuple[str, ...]]:
    """As `equivalence`, of the passages that stand for those named; a name that no passage has stays as it is."""
    found = [list(group) for group in groups]
    rows = iter(read.find([name for group in found for name in group]))
    return equivalence([[name if (row := next(rows)) < 0 else read.name(read.canonical[row]) for name in group] for group in found])


def with_gold_chunks(
    questions: Sequence[RawQuestion], pieces: Mapping[str, Sequence[str]], equal: Mapping[str, tuple[str, ...]]
) -> list[Question]:
    """The questions with one group of chunk ids per gold passage: its pieces, and those of passages equal to it.

    `pieces` are the chunks of each passage. Gold passages of one question that are equal to each other make one group.
    """
    made = []
    for question in questions:
        groups = [tuple(sorted(piece for name in equal.get(gold, (gold,)) for piece in pieces.get(name, []))) for gold in question.gold_ids]
        made.append(
            Question(
                question_id=question.question_id,
                benchmark=question.benchmark,
                split=question.split,
                question=question.question,
                answers=question.answers,
                gold=tuple(dict.fromkeys(groups)),
                hops=question.hops,
                type=question.type,
                gold_source=question.gold_source,
            )
        )
    return made


def _pieces(
    read: Candidates, table: pa.Table, passage: Rows, questions: Sequence[RawQuestion], equal: Mapping[str, tuple[str, ...]]
) -> dict[str, list[str]]:
    """The chunks of every passage that a question may need."""
    names = {name for question in questions for gold in question.gold_ids for name in equal.get(gold, (gold,))}
    rows = read.find(sorted(names))
    here = np.flatnonzero(np.isin(passage, rows[rows >= 0]))
    pieces: dict[str, list[str]] = {}
    for name, chunk_id in zip(
        read.ids.take(pa.array(passage[here])).to_pylist(), table["chunk_id"].take(pa.array(here)).to_pylist(), strict=True
    ):
        pieces.setdefault(name, []).append(chunk_id)
    return pieces


def _tokenizer(config: Config, read: Candidates, wanted: Rows, questions: Sequence[RawQuestion], folder: str) -> str:
    """Where the backbone's tokenizer is: its own place, or, where the backbone is made from scratch, `folder`, trained on the passages.

    These are the pool's; where the pool's size goes by tokens or chunks, which only a tokenizer can count, all that were read. The only
    knowledge the data has of a room to its right: a chunk's length is in the backbone's tokens.
    """
    if not lineage.from_scratch(config):
        return config.backbone.model
    from intra.backbone import tiny

    texts: Iterable[str] = _texts(read, wanted, config.data.template)
    if config.backbone.architecture.tokenizer == "word":  # bytes spell any word; a word vocabulary must have seen it
        train = (question for question in questions if question.split == "train")
        texts = itertools.chain(texts, (text for question in train for text in (question.question, *question.answers)))
        if config.data.source == "synthetic":
            from intra.data import synthetic

            texts = itertools.chain(texts, synthetic.vocabulary())
    tiny.train_tokenizer(texts, config.backbone.architecture).save_pretrained(folder)
    return folder


def _texts(read: Candidates, rows: Rows, template: str) -> Iterator[str]:
    """The encoder's input of each passage, in the order of the ids."""
    parts, places = [], []
    for shard, numbers in choice.shards_of(read, rows):
        parts.append(stages.get(read.shards[shard], ["title", "text"]).take(numbers))
        places.append(read.position(shard, numbers))
    table, order = pa.concat_tables(parts).combine_chunks(), np.argsort(np.concatenate(places))
    for start in range(0, len(order), 8192):
        for row in table.take(order[start : start + 8192]).to_pylist():
            yield chunking.chunk_text(row["title"], row["text"], template)


class _Chopper:
    """Tokenizes candidates, shard by shard, and holds their chunks."""

    def __init__(self, config: Config, read: Candidates, work: str, tokenizer: str, fan: Fan) -> None:
        data = config.data
        revision = config.backbone.revision if tokenizer == config.backbone.model else None
        self._stage = (tokenizer, revision, data.template, data.chunk_tokens, data.near_duplicates is not None)
        self._data, self._read, self._work, self._fan = data, read, work, fan
        self._made: list[tuple[int, str]] = []  # (shard, URL of chunks)

    def all(self, rows: Rows) -> list[tuple[pa.Table, Rows]]:
        """The chunks of these candidates."""
        self._chop(rows)
        return [part for made in self._made if len((part := self._load(*made))[1])]

    def budgeted(self, gold: Rows, distinct: Rows) -> list[tuple[pa.Table, Rows]]:
        """The chunks of the gold candidates and of the others, in the order of their draws, up to the first that the budget cannot bear."""
        read, budget = self._read, self._data.pool_tokens or self._data.pool_chunks or 0
        others = read.by_draw(np.setdiff1d(distinct, gold, assume_unique=True))
        # How many to tokenize is a guess (a chunk a passage, a token a word); where it falls short, there is a next round.
        guess = np.maximum(1, read.words[others]) if self._data.pool_tokens else np.ones(len(others), dtype=np.int64)
        cost = np.zeros(len(read), dtype=np.int64)
        self._chop(gold, cost)
        left, done = budget - int(cost[gold].sum()), 0
        while done < len(others) and (room := left - int(cost[others[:done]].sum())) >= 0:
            ahead = int(np.searchsorted(np.cumsum(guess[done:]), room, side="right")) + 1
            self._chop(others[done : done + ahead], cost)
            done = min(len(others), done + ahead)
        taken = int(np.searchsorted(np.cumsum(cost[others[:done]]), left, side="right"))
        keep = np.zeros(len(read), dtype=bool)
        keep[gold] = keep[others[:taken]] = True
        return [part for made in self._made if len((part := self._load(*made, keep))[1])]

    def _chop(self, rows: Rows, cost: Rows | None = None) -> None:
        """Makes the chunks of the candidates; adds what each weighs (tokens or chunks) to `cost`."""
        tasks = []
        for shard, numbers in choice.shards_of(self._read, rows):
            name = f"{len(self._made):05}-{shard:05}.parquet"
            stages.put(storage.join(self._work, "rows", name), pa.table({"row": pa.array(numbers, pa.int32())}))
            tasks.append({"number": shard, "shard": self._read.shards[shard], "rows": storage.join(self._work, "rows", name),
                          "target": storage.join(self._work, "chunks", name)})  # fmt: skip
        made = [(result["number"], result["target"]) for result in self._fan(stages.Chop, self._stage, tasks, "tokenize")]
        self._made += made
        if cost is None:
            return
        for shard, url in made:
            table = stages.get(url, ["row", "n_tokens"])
            weight = table["n_tokens"].to_numpy() if self._data.pool_tokens else 1
            np.add.at(cost, self._read.position(shard, table["row"].to_numpy()), weight)

    def _load(self, shard: int, url: str, keep: npt.NDArray[np.bool_] | None = None) -> tuple[pa.Table, Rows]:
        """(CHOPPED without `row`, the candidate of each chunk) of what a task made."""
        table = stages.get(url)
        rows = self._read.position(shard, table["row"].to_numpy())
        table = table.drop_columns(["row"] if self._data.near_duplicates else ["row", "bands"])
        return (table, rows) if keep is None else (table.filter(pa.array(keep[rows])), rows[keep[rows]])


def _in_order(parts: list[tuple[pa.Table, Rows]]) -> tuple[pa.Table, Rows]:
    """The chunks in the order of their ids, in slices of SLICE rows, and their candidates. Raises UserError where two have one id."""
    table, passage = pa.concat_tables([part for part, _ in parts]), np.concatenate([rows for _, rows in parts])
    parts.clear()
    order = pc.sort_indices(table["chunk_id"]).to_numpy()
    table = table.combine_chunks()
    table = pa.concat_tables([table.take(order[start : start + SLICE]) for start in range(0, len(order), SLICE)])
    ids = table["chunk_id"].combine_chunks()
    same = np.flatnonzero(pc.equal(ids[1:], ids[:-1]).to_numpy(zero_copy_only=False))
    if len(same):
        name = ids[int(same[0])].as_py()
        whole = name.rpartition("#")[0]
        raise UserError(f"passage id '{name}' is also the name of a piece of passage '{whole}'; rename one of them")
    return table, passage[order]


def _near_duplicates(table: pa.Table, threshold: float | None, described: dict[str, Any]) -> pa.Table | None:
    """The pairs of chunks that are nearly the same; `described` gets their numbers."""
    if threshold is None:
        return None
    hashes = np.concatenate([np.frombuffer(value, dtype=np.uint64) for value in table["bands"].to_pylist()]).reshape(-1, duplicates.BANDS)
    titles, texts = table["title"].combine_chunks(), table["text"].combine_chunks()
    pairs = list(duplicates.near(hashes, lambda row: f"{titles[row]} {texts[row]}", threshold))
    described["near_duplicates"] = {
        "threshold": threshold,
        "pairs": len(pairs),
        "chunks": len({row for pair in pairs for row in (pair.left, pair.right)}),
    }
    ids = table["chunk_id"].combine_chunks()
    return pa.table(
        {
            "left": ids.take(pa.array([pair.left for pair in pairs], pa.int64())),
            "right": ids.take(pa.array([pair.right for pair in pairs], pa.int64())),
            "similarity": pa.array([pair.similarity for pair in pairs], pa.float64()),
        }
    )


def _write(
    config: Config,
    artifact: Artifact,
    table: pa.Table,
    questions: Sequence[Question],
    described: dict[str, Any],
    mistakes: Mistakes,
    near: pa.Table | None,
    tokenizer: str,
    digests: dict[str, str],
) -> dict[str, Any]:
    pool = io.BytesIO()
    with pq.ParquetWriter(pool, schema.POOL_SCHEMA, compression="zstd") as writer:
        for start in range(0, len(table), SLICE):
            writer.write_table(table.select(schema.POOL_SCHEMA.names).slice(start, SLICE), row_group_size=SLICE)
    asked = schema.to_parquet(schema.questions_table(questions))
    numbers = described["pool"]
    counts = {name: {split: values["questions"] for split, values in splits.items()} for name, splits in described["questions"].items()}
    manifest = {
        "pool_sha256": hashlib.sha256(pool.getbuffer()).hexdigest(),
        "questions_sha256": hashlib.sha256(asked).hexdigest(),
        "passages": numbers["passages"],
        "split_passages": numbers["split_passages"],
        "chunks": numbers["chunks"],
        "tokens": numbers["tokens"]["total"],
        "longest_chunk": numbers["tokens"]["longest"],
        "questions": counts,
        "inputs": digests,
    }
    storage.write_bytes(artifact.path(schema.POOL), pool.getvalue())
    storage.write_bytes(artifact.path(schema.QUESTIONS), asked)
    storage.write_json(artifact.path(STATISTICS), described)
    storage.write_bytes(artifact.path(REPORT), report.markdown(described, config.data).encode())
    if mistakes.count:
        storage.write_bytes(artifact.path(MISTAKES), "".join(f"{message}\n" for message in mistakes.messages).encode())
    if near is not None:
        storage.write_bytes(artifact.path(NEAR_DUPLICATES), schema.to_parquet(near))
    if lineage.from_scratch(config):
        storage.upload(tokenizer, artifact.path(TOKENIZER))
    storage.write_json(artifact.path("config.json"), tracking.resolved(config))
    artifact.finish(manifest)
    return artifact.manifest()
