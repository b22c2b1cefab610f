"""Builds a dataset: reads the source, checks all of it, chooses the pool, chunks its passages, writes the artifact.

    <dataset>/pool.parquet, questions.parquet (`intra.data.schema`), statistics.json, report.md, mistakes.txt and near_duplicates.parquet
    (where there are any), config.json, tokenizer/ (where the backbone is made from scratch), manifest.json last

Nothing of it is written before everything has been checked, and the same inputs give the same bytes, on any number of processes
(`intra.data.stages` has what they do). Meanwhile <dataset>/work-<token>/ holds what was read, of each run its own; it is removed at the
end, whatever happens.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
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
from intra.data import checks, chunking, duplicates, questions, report, schema, sources, stages, statistics
from intra.data.candidates import Candidates, Rows
from intra.data.raw import Mistakes, RawQuestion
from intra.data.schema import Question
from intra.errors import UserError, WorkflowError

STATISTICS = "statistics.json"
REPORT = "report.md"
MISTAKES = "mistakes.txt"
NEAR_DUPLICATES = "near_duplicates.parquet"
TOKENIZER = "tokenizer"
WORK = "work"  # begins the name of a run's folder
SLICE = 65536  # rows of a row group of pool.parquet


class Fan(Protocol):
    """Runs a stage (`intra.data.stages`) over tasks, in one process or many; the results come in the tasks' order."""

    def __call__(self, stage: Any, arguments: tuple[Any, ...], tasks: list[dict[str, Any]], label: str) -> Iterator[dict[str, Any]]: ...


def build(config: Config, artifact: Artifact, fan: Fan = stages.inline, check: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """Makes the dataset of a configuration at `artifact`; returns the manifest.

    The manifest holds pool_sha256 and questions_sha256 (of the Parquet bytes), passages, split_passages, chunks, tokens,
    longest_chunk (tokens), questions (per benchmark and split), mistakes (bad records left out) and inputs (digest of each file).
    Raises UserError naming file, line and id for bad input, WorkflowError where an input changes while it is read.
    `check` raises where the dataset is no longer this run's to make (`claim.Claim.check`); it is asked before anything is removed, at each
    result of `fan`, before the dataset is written, and where anything fails.
    """

    def checked(stage: Any, arguments: tuple[Any, ...], tasks: list[dict[str, Any]], label: str) -> Iterator[dict[str, Any]]:
        for result in fan(stage, arguments, tasks, label):
            check()
            yield result

    check()
    for name in storage.names(artifact.url):
        if name.startswith(WORK):  # of a run that was killed
            storage.remove(artifact.path(name))
    work = artifact.path(f"{WORK}-{uuid.uuid4().hex}")
    try:
        return _build(config, artifact, work, checked, check)
    except Exception:
        check()  # a run that has taken over removes this one's work: then that is what to say
        raise
    finally:
        storage.remove(work)


def _build(config: Config, artifact: Artifact, work: str, fan: Fan, check: Callable[[], None]) -> dict[str, Any]:
    data = config.data
    digests = sources.digests(data)
    mistakes = Mistakes(skip=data.on_error == "skip")
    own_ids = sources.own_ids(data)
    scans = list(fan(stages.Scan, (data, config.seed, work), [{"part": part} for part in range(len(own_ids))], "read"))
    for scan in scans:
        mistakes.merge(scan["mistakes"], scan["messages"], dict(scan["left_out"]))
    read = choice.load(scans, work, own_ids, data.deduplicate, mistakes)
    found = questions.unique((question for scan in scans for question in questions.read(work, scan)), mistakes)
    found = questions.check(read, choice.resolve_titles(found, read, mistakes), questions.needs_answers(config), mistakes)
    asked, questions_read = questions.limit(questions.fair(found, data), data.question_limit, config.seed), len(found)
    del found
    groups = questions.equivalents(sources.equivalents(data, mistakes), read)
    after = sources.digests(data)
    if after != digests:
        changed = ", ".join(sorted({name for name, _ in digests.items() ^ after.items()}))
        raise WorkflowError(f"{data.path}: {changed}: changed while it was read; run the same command again")

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
        asked_chunks = questions.with_gold_chunks(asked, questions.pieces(read, table, passage, asked, groups), groups)
        described = statistics.describe(table, passage, asked_chunks, read.read, questions_read)
        described["checks"] = checks.run(table, asked_chunks)
        described["input"] = {"mistakes": mistakes.count, "left_out": dict(sorted(mistakes.left_out.items())),
                              "duplicates": int(len(read) - len(read.distinct()))}  # fmt: skip
        near = _near_duplicates(table, data.near_duplicates, described)
        check()
        return _write(config, artifact, table, asked_chunks, described, mistakes, near, folder, digests)


def limit_pool(read: Candidates, gold: Rows, limit: int | None) -> Rows:
    """`limit` passages: all gold ones (even where they are more than `limit`), the rest chosen by seed and id alone. In order."""
    distinct = read.distinct()
    if limit is None:
        return distinct
    others = read.by_draw(np.setdiff1d(distinct, gold, assume_unique=True))
    return np.union1d(gold, others[: max(0, limit - len(gold))])


def _tokenizer(config: Config, read: Candidates, wanted: Rows, questions: Sequence[RawQuestion], folder: str) -> str:
    """Where the backbone's tokenizer is: its own place, or, where the backbone is made from scratch, `folder`, trained on the passages (or
    that of the encoder it is made over).

    These are the pool's; where the pool's size goes by tokens or chunks, which only a tokenizer can count, all that were read. The only
    knowledge the data has of a room to its right: a chunk's length is in the backbone's tokens.
    """
    if not lineage.from_scratch(config):
        return config.backbone.model
    from intra.backbone import tiny

    if (encoder := config.backbone.architecture.encoder) is not None:
        from intra.backbone import adopted

        longest = adopted.positions(encoder)
        if config.data.chunk_tokens > longest:
            raise UserError(f"data.chunk_tokens: found {config.data.chunk_tokens}; the encoder '{encoder}' reads at most {longest}")
        adopted.tokenizer(encoder).save_pretrained(folder)
        return folder

    texts: Iterable[str] = _Texts(read, wanted, config.data.template)
    if config.backbone.architecture.tokenizer == "word":  # bytes spell any word; a word vocabulary must have seen it
        train = (question for question in questions if question.split == "train")
        texts = itertools.chain(texts, (text for question in train for text in (question.question, *question.answers)))
        if config.data.source == "synthetic":
            from intra.data import synthetic

            texts = itertools.chain(texts, synthetic.vocabulary())
    tiny.train_tokenizer(texts, config.backbone.architecture).save_pretrained(folder)
    return folder


class _Texts:
    """The encoder's input of each passage, in the order of the ids; read anew each time they are gone through."""

    def __init__(self, read: Candidates, rows: Rows, template: str) -> None:
        self._read, self._rows, self._template = read, rows, template

    def __iter__(self) -> Iterator[str]:
        table, order = self._table()
        for start in range(0, len(order), 8192):
            for row in table.take(order[start : start + 8192]).to_pylist():
                yield chunking.chunk_text(row["title"], row["text"], self._template)

    def _table(self) -> tuple[pa.Table, Rows]:
        parts, places = [], []
        for shard, numbers in choice.shards_of(self._read, self._rows):
            parts.append(stages.get(self._read.shards[shard], ["title", "text"]).take(numbers))
            places.append(self._read.position(shard, numbers))
        return pa.concat_tables(parts).combine_chunks(), np.argsort(np.concatenate(places))


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
        "mistakes": mistakes.count,
        "inputs": digests,
    }
    storage.write_bytes(artifact.path(schema.POOL), pool.getvalue())
    storage.write_bytes(artifact.path(schema.QUESTIONS), asked)
    storage.write_json(artifact.path(STATISTICS), described)
    storage.write_bytes(artifact.path(REPORT), report.markdown(described, config.data).encode())
    if mistakes.count:
        more = [f"... and {mistakes.count - len(mistakes.messages):,} more"] if mistakes.count > len(mistakes.messages) else []
        storage.write_bytes(artifact.path(MISTAKES), "".join(f"{message}\n" for message in (*mistakes.messages, *more)).encode())
    if near is not None:
        storage.write_bytes(artifact.path(NEAR_DUPLICATES), schema.to_parquet(near))
    if lineage.from_scratch(config):
        storage.upload(tokenizer, artifact.path(TOKENIZER))
    storage.write_json(artifact.path("config.json"), tracking.resolved(config))
    artifact.finish(manifest)
    return artifact.manifest()
