"""Builds a dataset: reads the source, checks all of it, applies the limits, chunks the passages, writes the artifact.

    <dataset>/pool.parquet, questions.parquet (`intra.data.schema`), statistics.json, config.json, tokenizer/ (where the backbone
    is made from scratch), manifest.json last

Nothing is written before everything has been checked, and the same inputs give the same bytes.
"""

from __future__ import annotations

import hashlib
import itertools
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import pyarrow as pa

from intra import lineage, storage, tracking
from intra.artifact import Artifact
from intra.config import Config
from intra.data import chunking, schema, sources, statistics
from intra.data.chunking import Chunk
from intra.data.raw import Mistakes, Passage, RawQuestion
from intra.data.schema import Question
from intra.errors import UserError, WorkflowError

STATISTICS = "statistics.json"
TOKENIZER = "tokenizer"

Item = TypeVar("Item", Passage, RawQuestion)


def build(config: Config, artifact: Artifact) -> dict[str, Any]:
    """Makes the dataset of a configuration at `artifact`; returns the manifest.

    The manifest holds pool_sha256 and questions_sha256 (of the Parquet bytes), passages, split_passages, chunks, tokens,
    longest_chunk (tokens), questions (per benchmark and split) and inputs (digest of each file).
    Raises UserError naming file, line and id for bad input, WorkflowError where an input changes while it is read.
    """
    data = config.data
    digests = sources.digests(data)
    found = [item for part in range(len(sources.parts(data))) for item in sources.read(data, config.seed, part, Mistakes())]
    passages = unique([item for item in found if isinstance(item, Passage)], "passage", "passage_id")
    questions = unique([item for item in found if isinstance(item, RawQuestion)], "question", "question_id")
    check(passages, questions, needs_answers(config))
    kept_questions = limit_questions(questions, data.question_limit, config.seed)
    kept = limit_pool(passages, {gold for question in kept_questions for gold in question.gold_ids}, data.pool_limit, config.seed)
    groups = equivalence(sources.equivalents(data))
    if sources.digests(data) != digests:
        raise WorkflowError(f"{data.path}: a file changed while it was read; run the same command again")

    tokenizer = _tokenizer(config, kept, kept_questions)
    chunks = sorted(chunking.chunk(kept, tokenizer, data.template, data.chunk_tokens), key=lambda chunk: chunk.chunk_id)
    for left, right in itertools.pairwise(chunks):
        if left.chunk_id == right.chunk_id:
            whole = left.chunk_id.rpartition("#")[0]
            raise UserError(f"passage id '{left.chunk_id}' is also the name of a piece of passage '{whole}'; rename one of them")
    asked = with_gold_chunks(kept_questions, chunks, groups)
    return _write(config, artifact, chunks, asked, statistics.describe(chunks, asked, len(passages), len(questions)), tokenizer, digests)


def unique(items: Iterable[Item], kind: str, key: str) -> list[Item]:
    """The items sorted by id. Raises UserError where an id stands twice."""
    found: dict[str, Item] = {}
    for item in items:
        name = getattr(item, key)
        if name in found:
            place = f" stands already at {found[name].where}" if found[name].where else " stands twice"
            raise UserError(f"{item.where or kind}: {kind} id '{name}'{place}; ids are unique over all files: remove one or rename it")
        found[name] = item
    return [found[name] for name in sorted(found)]


def needs_answers(config: Config) -> set[str]:
    """The splits whose questions need an answer: those that are answered, or trained on, in this configuration."""
    return {split for split, needed in (("test", config.evaluate.answers), ("train", config.backbone.train)) if needed}


def check(passages: Sequence[Passage], questions: Sequence[RawQuestion], answered: set[str]) -> None:
    """Raises UserError: no passages or questions, a gold id without its passage, no answer in a split that needs one."""
    if not passages:
        raise UserError("data.passages: the files hold no passages; check data.path")
    known = {passage.passage_id for passage in passages}
    for question in questions:
        where = f"{question.where or question.benchmark}: question '{question.question_id}'"
        for gold in question.gold_ids:
            if gold not in known:
                raise UserError(f"{where}: gold passage '{gold}' is not in the pool; add its file to data.passages, or mend the id")
        if not question.gold_ids:
            raise UserError(f"{where} has no gold passage; add one or remove the question")
        if not question.answers and question.split in answered:
            raise UserError(f"{where} has no answer; add one, or set evaluate.answers=false (test) or backbone.train=false (train)")


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
        for question in sorted(group, key=lambda question: _draw(seed, "question", question.question_id))[:limit]
    }
    return [question for question in questions if question.question_id in chosen]


def limit_pool(passages: Sequence[Passage], gold: set[str], limit: int | None, seed: int) -> list[Passage]:
    """`limit` passages: all gold ones (even where they are more than `limit`), the rest chosen by seed and id alone."""
    if limit is None:
        return list(passages)
    others = [passage.passage_id for passage in passages if passage.passage_id not in gold]
    others.sort(key=lambda name: _draw(seed, "passage", name))
    chosen = gold.union(others[: max(0, limit - len(gold))])
    return [passage for passage in passages if passage.passage_id in chosen]


def equivalence(groups: Iterable[Sequence[str]]) -> dict[str, tuple[str, ...]]:
    """Passage id -> all ids that count as the same, sorted; what is equal to a third is equal to each other."""
    parts: dict[str, set[str]] = {}
    for group in groups:
        merged = set(group).union(*(parts[name] for name in group if name in parts))
        parts |= dict.fromkeys(merged, merged)
    return {name: tuple(sorted(part)) for name, part in parts.items()}


def _draw(seed: int, kind: str, name: str) -> bytes:
    return hashlib.sha256(f"{seed}\0{kind}\0{name}".encode()).digest()


def with_gold_chunks(questions: Sequence[RawQuestion], chunks: Sequence[Chunk], equal: Mapping[str, tuple[str, ...]]) -> list[Question]:
    """The questions with one group of chunk ids per gold passage: its pieces, and those of passages equal to it.

    Gold passages of one question that are equal to each other make one group.
    """
    pieces: dict[str, list[str]] = {}
    for chunk in chunks:
        pieces.setdefault(chunk.passage_id, []).append(chunk.chunk_id)
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


def _tokenizer(config: Config, passages: Sequence[Passage], questions: Sequence[RawQuestion]) -> Any:
    """The backbone's tokenizer: its own, or, where it is made from scratch, one trained on this pool.

    The only knowledge the data has of a room to its right: a chunk's length is in the backbone's tokens.
    """
    from intra.backbone import locate, tiny

    if not lineage.from_scratch(config):
        return locate.load_tokenizer(config.backbone.model, config.backbone.revision)
    texts = [chunking.chunk_text(passage.title, passage.text, config.data.template) for passage in passages]
    if config.backbone.architecture.tokenizer == "word":  # bytes spell any word; a word vocabulary must have seen it
        texts += [text for question in questions if question.split == "train" for text in (question.question, *question.answers)]
        if config.data.source == "synthetic":
            from intra.data import synthetic

            texts += synthetic.vocabulary()
    return tiny.train_tokenizer(texts, config.backbone.architecture)


def _write(
    config: Config,
    artifact: Artifact,
    chunks: Sequence[Chunk],
    questions: Sequence[Question],
    described: dict[str, Any],
    tokenizer: Any,
    digests: dict[str, str],
) -> dict[str, Any]:
    columns = {name: [getattr(chunk, name) for chunk in chunks] for name in schema.POOL_SCHEMA.names}
    pool = schema.to_parquet(pa.table(columns, schema=schema.POOL_SCHEMA))
    asked = schema.to_parquet(schema.questions_table(questions))
    numbers = described["pool"]
    counts = {name: {split: values["questions"] for split, values in splits.items()} for name, splits in described["questions"].items()}
    manifest = {
        "pool_sha256": hashlib.sha256(pool).hexdigest(),
        "questions_sha256": hashlib.sha256(asked).hexdigest(),
        "passages": numbers["passages"],
        "split_passages": numbers["split_passages"],
        "chunks": numbers["chunks"],
        "tokens": numbers["tokens"]["total"],
        "longest_chunk": numbers["tokens"]["longest"],
        "questions": counts,
        "inputs": digests,
    }
    storage.write_bytes(artifact.path(schema.POOL), pool)
    storage.write_bytes(artifact.path(schema.QUESTIONS), asked)
    storage.write_json(artifact.path(STATISTICS), described)
    if lineage.from_scratch(config):
        with tempfile.TemporaryDirectory() as folder:
            tokenizer.save_pretrained(folder)
            storage.upload(folder, artifact.path(TOKENIZER))
    storage.write_json(artifact.path("config.json"), tracking.resolved(config))
    artifact.finish(manifest)
    return artifact.manifest()
