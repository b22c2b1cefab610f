"""The results of a run: flat records with intervals, run files, per-question tables, the table for the terminal.

A record is {method, benchmark, metric, value, low, high, n}: the mean of a metric over n questions and its 95 % interval, for a
whole benchmark and for each question type as `benchmark/type`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

import numpy as np
import pyarrow as pa

from intra.data.schema import Question
from intra.evaluation import metrics
from intra.evaluation.intervals import bootstrap
from intra.method import Ranking, Rankings

Record = dict[str, Any]

PER_QUESTION = "per_question.parquet"
FIXED = {
    **{name: pa.string() for name in ("method", "question_id", "benchmark", "type", "question")},
    "gold": pa.list_(pa.list_(pa.string())), "ids": pa.list_(pa.string()), "scores": pa.list_(pa.float64()),
    "answers": pa.list_(pa.string()), "answer": pa.string(),
}  # columns of per_question.parquet; the others are metrics  # fmt: skip
RANKINGS_SCHEMA = pa.schema([("question_id", pa.string()), ("ids", pa.list_(pa.string())), ("scores", pa.list_(pa.float64()))])


def rankings_table(rankings: Rankings, questions: Sequence[Question]) -> pa.Table:
    """RANKINGS_SCHEMA, a row per question."""
    ids = [question.question_id for question in questions]
    columns = {
        "question_id": ids,
        "ids": [[chunk for chunk, _ in rankings[question_id]] for question_id in ids],
        "scores": [[score for _, score in rankings[question_id]] for question_id in ids],
    }
    return pa.table(columns, schema=RANKINGS_SCHEMA)


def rankings_of(table: pa.Table) -> Rankings:
    """What `rankings_table` was made of."""
    return {row["question_id"]: list(zip(row["ids"], row["scores"], strict=True)) for row in table.to_pylist()}


@dataclass
class Outcome:
    """What one method gave: its rankings, and its answers where they were asked for, by question_id."""

    method: str
    rankings: Rankings
    answers: dict[str, str] = field(default_factory=dict)

    def values(
        self, questions: Sequence[Question], ks: Sequence[int], passages: metrics.Passages | None = None
    ) -> dict[str, metrics.Values]:
        """Every metric of every question, by question_id; answer recall where the passages are given."""
        values = metrics.retrieval(questions, self.rankings, ks)
        for question_id, found in metrics.answer_recall(questions, self.rankings, ks, passages).items() if passages else ():
            values[question_id] |= found
        if self.answers:
            for question_id, answer in metrics.answers(questions, self.answers).items():
                values[question_id] |= answer
        return values


def records(method: str, questions: Sequence[Question], values: Mapping[str, metrics.Values], resamples: int, seed: int) -> list[Record]:
    """The records of one method, benchmark by benchmark and type by type, in order of their names."""
    slices: dict[str, list[str]] = {}
    for question in questions:
        slices.setdefault(question.benchmark, []).append(question.question_id)
        if question.type:
            slices.setdefault(f"{question.benchmark}/{question.type}", []).append(question.question_id)
    return _summed_up(method, slices, values, resamples, seed)


def breakdowns(
    values: Mapping[str, Mapping[str, metrics.Values]], questions: Sequence[Question], resamples: int, seed: int
) -> list[Record]:
    """Records by hops, question type and `gold_source`: `benchmark` is `name/hops 2`, `name/type bridge`, `name/gold_source annotated`."""
    slices: dict[str, list[str]] = {}
    for question in questions:
        for kind, value in (("hops", question.hops), ("type", question.type), ("gold_source", question.gold_source)):
            if value != "":
                slices.setdefault(f"{question.benchmark}/{kind} {value}", []).append(question.question_id)
    return [record for method, mine in values.items() for record in _summed_up(method, slices, mine, resamples, seed)]


def _summed_up(
    method: str, slices: Mapping[str, Sequence[str]], values: Mapping[str, metrics.Values], resamples: int, seed: int
) -> list[Record]:
    """A record of each metric over the questions of each slice that have it."""
    result = []
    for name, question_ids in sorted(slices.items()):
        rows = [values[question_id] for question_id in question_ids]
        having: dict[tuple[int, ...], list[str]] = {}  # metrics by the questions that have them: one resample for all of these
        for column in dict.fromkeys(column for row in rows for column in row):
            having.setdefault(tuple(n for n, row in enumerate(rows) if column in row), []).append(column)
        for places, columns in having.items():
            matrix = np.array([[rows[place][column] for column in columns] for place in places])
            low, high = bootstrap(matrix, resamples, seed)
            for column, value, lower, upper in zip(columns, matrix.mean(axis=0), low, high, strict=True):
                result.append({"method": method, "benchmark": name, "metric": column, "value": float(value), "low": float(lower),
                               "high": float(upper), "n": len(places)})  # fmt: skip
    return result


def per_question(outcomes: Sequence[tuple[Outcome, Mapping[str, metrics.Values]]], questions: Sequence[Question]) -> pa.Table:
    """A row per method and question: question, gold, ranked ids and scores, accepted and given answers, every metric."""
    rows = []
    for outcome, values in outcomes:
        for question in questions:
            ranking = outcome.rankings[question.question_id]
            rows.append(
                {
                    "method": outcome.method,
                    "question_id": question.question_id,
                    "benchmark": question.benchmark,
                    "type": question.type,
                    "question": question.question,
                    "gold": [list(group) for group in question.gold],
                    "ids": [chunk for chunk, _ in ranking],
                    "scores": [score for _, score in ranking],
                    "answers": list(question.answers),
                    "answer": outcome.answers.get(question.question_id),
                    **values[question.question_id],
                }
            )
    every = dict.fromkeys(name for _, values in outcomes for row in values.values() for name in row)
    measured = [(name, pa.float64()) for name in every]
    return pa.Table.from_pylist(rows, schema=pa.schema([*FIXED.items(), *measured]))


def trec(method: str, rankings: Mapping[str, Ranking], questions: Sequence[Question]) -> str:
    """A TREC run file. White space inside an id would break its columns and is written as in a URL (%20)."""
    lines = []
    for question in questions:
        for rank, (chunk_id, score) in enumerate(rankings[question.question_id], start=1):
            lines.append(f"{_column(question.question_id)} Q0 {_column(chunk_id)} {rank} {score!r} {method}\n")
    return "".join(lines)


def _column(text: str) -> str:
    return "".join(quote(character) if character.isspace() or character == "%" else character for character in text)


def find(found: Sequence[Record], benchmark: str, method: str, metric: str) -> Record | None:
    return next((r for r in found if (r["benchmark"], r["method"], r["metric"]) == (benchmark, method, metric)), None)


def whole(found: Sequence[Record]) -> list[str]:
    """The benchmarks (not their question types), in order of appearance."""
    names = list(dict.fromkeys(record["benchmark"] for record in found))
    return [name for name in names if not any(name.startswith(f"{other}/") for other in names)]


def shown(found: Sequence[Record]) -> list[str]:
    """The metrics of the main table: complete-evidence recall, then em and f1 where answers were read."""
    present = dict.fromkeys(record["metric"] for record in found)
    return [name for name in present if name.startswith("complete_recall_at_")] + [name for name in ("em", "f1") if name in present]


def title(metric: str) -> str:
    """complete_recall_at_5 -> 'complete R@5', em -> 'EM'."""
    kind, _, k = metric.rpartition("_at_")
    if not kind:
        return metric.upper()
    kind = {"complete_recall": "complete R", "ndcg": "nDCG", "answer_recall": "answer R"}.get(kind, kind)
    return f"{kind}@{k}"


def text_table(found: Sequence[Record]) -> str:
    """Method by benchmark, with 95 % intervals, for the terminal."""
    columns = shown(found)
    lines = [["benchmark", "method", "n", *(title(metric) for metric in columns)]]
    for benchmark in whole(found):
        for method in dict.fromkeys(record["method"] for record in found):
            cells = [find(found, benchmark, method, metric) for metric in columns]
            first = next((cell for cell in cells if cell), None)
            if first:
                lines.append([benchmark, method, str(first["n"]), *(interval(cell) if cell else "" for cell in cells)])
    return "\n".join(["complete R@k: all gold evidence in the top k; [95 % interval]", *aligned(lines)])


def aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    """Lines of cells in columns, a rule below the first."""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    rows = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    return [rows[0], "  ".join("-" * width for width in widths), *rows[1:]]


def interval(record: Record) -> str:
    return f"{record['value']:.3f} [{record['low']:.3f}, {record['high']:.3f}]"
