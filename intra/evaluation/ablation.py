"""One table of an ablation: its rows over all seeds, with intervals, and each row's paired difference from the first.

A record is {row, benchmark, metric, value, low, high, n, seeds, difference, difference_low, difference_high}: the mean over the n
questions of all seeds with its 95 % interval, the means of the seeds, and, where the first row was asked the same questions, the
mean difference from it on those, with its interval. A question that several seeds ask (real text: the world is no seed's) counts once, by
its mean over these: more seeds are no more questions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from intra.evaluation import results
from intra.evaluation.intervals import Floats, bootstrap
from intra.evaluation.results import Record

Table = list[dict[str, Any]]  # rows of per_question.parquet, of one method


def records(tables: Mapping[str, Mapping[int, Table]], names: Sequence[str], resamples: int) -> list[Record]:
    """`tables`: ablation row -> seed -> per-question values. `names`: the metrics, in order."""
    reference = next(iter(tables.values()))
    made = []
    for row, by_seed in tables.items():
        metrics = [name for name in names if all(name in item for table in by_seed.values() for item in table[:1])]
        slices: dict[str, dict[tuple[int, str], list[float]]] = {}
        texts: dict[tuple[int, str], str] = {}
        for seed, table in by_seed.items():
            for item in table:
                texts[seed, item["question_id"]] = item["question"]
                for benchmark in dict.fromkeys(
                    [item["benchmark"], f"{item['benchmark']}/{item['type']}" if item["type"] else item["benchmark"]]
                ):
                    slices.setdefault(benchmark, {})[seed, item["question_id"]] = [item[name] for name in metrics]
        asked = {(seed, item["question_id"]): [item.get(name, np.nan) for name in metrics] for seed, t in reference.items() for item in t}
        for benchmark, values in sorted(slices.items()):
            every = np.array(list(values.values()), dtype=np.float64)
            questions = [(question_id, texts[seed, question_id]) for seed, question_id in values]
            matrix = _by_question(every, questions)
            low, high = bootstrap(matrix, resamples, 0)
            seeds = [np.mean([value for (seed, _), value in values.items() if seed == one], axis=0) for one in by_seed]
            paired = set(values) <= set(asked)
            difference = every - np.array([asked[key] for key in values]) if paired else np.full_like(every, np.nan)
            difference = _by_question(difference, questions)
            below, above = bootstrap(difference, resamples, 0)
            for place, metric in enumerate(metrics):
                known = paired and not np.isnan(difference[:, place]).any()
                made.append(
                    {
                        "row": row, "benchmark": benchmark, "metric": metric, "value": float(matrix[:, place].mean()),
                        "low": float(low[place]), "high": float(high[place]), "n": len(matrix),
                        "seeds": [float(means[place]) for means in seeds],
                        "difference": float(difference[:, place].mean()) if known else None,
                        "difference_low": float(below[place]) if known else None,
                        "difference_high": float(above[place]) if known else None,
                    }
                )  # fmt: skip
    return made


def _by_question(values: Floats, questions: Sequence[tuple[str, str]]) -> Floats:
    """The means of the rows that are of one question (id and text), in the order in which the questions first stand."""
    rows: dict[tuple[str, str], list[int]] = {}
    for row, question in enumerate(questions):
        rows.setdefault(question, []).append(row)
    return np.array([values[mine].mean(axis=0) for mine in rows.values()])


def markdown(found: Sequence[Record], metric: str) -> str:
    """One metric: a line per row, a column per benchmark and question type; of each whole benchmark the seeds' spread and difference."""
    benchmarks, whole = list(dict.fromkeys(record["benchmark"] for record in found)), results.whole(found)
    last = [f"{title}, {name}" if len(whole) > 1 else title for name in whole for title in ("seeds", "difference")]
    titles = ["row", *(f"{name} [95 %]" for name in benchmarks), *last]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for row in dict.fromkeys(record["row"] for record in found):
        cells = {r["benchmark"]: r for r in found if r["row"] == row and r["metric"] == metric}
        if not cells:
            continue
        shown = [results.interval(cells[name]) if name in cells else "" for name in benchmarks]
        changes = [text for name in whole for text in (_spread(cells.get(name)), _change(cells.get(name)))]
        lines.append("| " + " | ".join([row, *shown, *changes]) + " |")
    return "\n".join(lines)


def _spread(record: Record | None) -> str:
    return "" if record is None else f"{min(record['seeds']):.3f} to {max(record['seeds']):.3f}"


def _change(record: Record | None) -> str:
    if record is None or record["difference"] is None:
        return ""
    return f"{record['difference']:+.3f} [{record['difference_low']:+.3f}, {record['difference_high']:+.3f}]"
