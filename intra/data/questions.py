"""Questions on their way into a dataset: checked against the candidates, chosen, and their evidence turned into chunks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa

from intra import storage
from intra.config import Config
from intra.data import raw, stages
from intra.data.candidates import Candidates, Rows
from intra.data.raw import Mistakes, RawQuestion
from intra.data.schema import Question
from intra.data_config import DataConfig
from intra.errors import UserError

UNION = ("hotpotqa", "2wikimultihopqa")  # what MuSiQue's training questions are united with (data.musique_train)


def read(work: str, scan: Mapping[str, Any]) -> Iterator[RawQuestion]:
    """The questions that a scan of a part found (`stages.Scan`)."""
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

    Mistakes, of which each costs its question: a gold id without its passage, no gold passage. Raises UserError where a question has no
    answer in a split that needs one (it does in this configuration only, so nothing is left out for it), and where none is sound.
    """
    rows = read.find([gold for question in questions for gold in question.gold_ids])
    ends = np.cumsum([len(question.gold_ids) for question in questions]).tolist()
    names = read.ids.take(pa.array(read.canonical[np.maximum(rows, 0)]))
    sound = []
    one: dict[str, str] = {}  # half a million questions share their evidence, and here its names
    for question, end in zip(questions, ends, strict=True):
        where = f"{question.where or question.benchmark}: question '{question.question_id}'"
        start = end - len(question.gold_ids)
        if not question.answers and question.split in answered:
            raise UserError(f"{where} has no answer; add one, or set evaluate.answers=false (test) or backbone.train=false (train)")
        try:
            if not question.gold_ids:
                raise UserError(f"{where} has no gold passage; add one or remove the question")
            for gold, row in zip(question.gold_ids, rows[start:end], strict=True):
                if row < 0:
                    raise UserError(f"{where}: gold passage '{gold}' is not in the pool; add its file to data.passages, or mend the id")
        except UserError as error:
            mistakes.add(error)
            continue
        gold_ids = tuple(dict.fromkeys(one.setdefault(name, name) for name in names[start:end].to_pylist()))
        sound.append(replace(question, gold_ids=gold_ids, where=""))
    if not sound:
        raise mistakes.nothing("questions", "add a file that does")
    return sound


def fair(questions: Sequence[RawQuestion], data: DataConfig) -> list[RawQuestion]:
    """The questions as data.nq_gold and data.musique_train would have them; sorted by id. UserError where they change none."""
    made = list(questions)
    benchmarks = {question.benchmark for question in made}
    if data.nq_gold == "one":
        if "nq" not in benchmarks:
            raise UserError(f"data.nq_gold=one: no benchmark is called 'nq', but {', '.join(sorted(benchmarks))}; rename it, or set all")
        made = [replace(question, gold_ids=question.gold_ids[:1]) if question.benchmark == "nq" else question for question in made]
    if data.musique_train == "union":
        others = [question for question in made if question.split == "train" and question.benchmark in UNION]
        if "musique" not in benchmarks or not others:
            raise UserError("data.musique_train=union: it needs a benchmark 'musique', and training questions of 'hotpotqa' or "
                            f"'2wikimultihopqa'; found {', '.join(sorted(benchmarks))}: add their files, or set own")  # fmt: skip
        made += [replace(question, question_id=f"musique+{question.question_id}", benchmark="musique") for question in others]
    return sorted(made, key=lambda question: question.question_id)


def limit(questions: Sequence[RawQuestion], most: int | None, seed: int) -> list[RawQuestion]:
    """At most `most` questions of each benchmark and split, chosen by seed and id alone; their order is kept."""
    if most is None:
        return list(questions)
    groups: dict[tuple[str, str], list[RawQuestion]] = {}
    for question in questions:
        groups.setdefault((question.benchmark, question.split), []).append(question)
    chosen = {
        question.question_id
        for group in groups.values()
        for question in sorted(group, key=lambda question: stages.draw(seed, "question", question.question_id))[:most]
    }
    return [question for question in questions if question.question_id in chosen]


def equivalence(groups: Iterable[Sequence[str]]) -> dict[str, tuple[str, ...]]:
    """Passage id -> all ids that count as the same, sorted; what is equal to a third is equal to each other."""
    parts: dict[str, set[str]] = {}
    for group in groups:
        merged = set(group).union(*(parts[name] for name in group if name in parts))
        parts |= dict.fromkeys(merged, merged)
    return {name: tuple(sorted(part)) for name, part in parts.items()}


def equivalents(groups: Iterable[Sequence[str]], read: Candidates) -> dict[str, tuple[str, ...]]:
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


def pieces(
    read: Candidates, table: pa.Table, passage: Rows, questions: Sequence[RawQuestion], equal: Mapping[str, tuple[str, ...]]
) -> dict[str, list[str]]:
    """The chunks of every passage that a question may need."""
    names = {name for question in questions for gold in question.gold_ids for name in equal.get(gold, (gold,))}
    rows = read.find(sorted(names))
    here = np.flatnonzero(np.isin(passage, rows[rows >= 0]))
    found: dict[str, list[str]] = {}
    for name, chunk_id in zip(
        read.ids.take(pa.array(passage[here])).to_pylist(), table["chunk_id"].take(pa.array(here)).to_pylist(), strict=True
    ):
        found.setdefault(name, []).append(chunk_id)
    return found
