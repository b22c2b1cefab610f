"""The HTML report of a run: one file that loads nothing and runs no script, for any width, without a mouse, read aloud too.

The figures are inline SVG (`figures`), with the same numbers in tables. The questions at its end are a sample by seed and id alone:
what each method found, gold marked, and what was answered. All of them stand in per_question.parquet.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

from intra.data.schema import Pool, Question
from intra.evaluation import expectations, figures, metrics, results
from intra.evaluation.figures import Figure
from intra.evaluation.metrics import Values
from intra.evaluation.results import Outcome, Record

ENDS = ("random", "oracle")
Outcomes = Sequence[tuple[Outcome, Mapping[str, Values]]]


@dataclass(frozen=True)
class Contents:
    """What a report shows; what is empty is left out.

    records: results.json. facts: name and value of what identifies the run. config: resolved. size: chunks an answer is read from.
    tests, gap_closure: significance.json. breakdowns: breakdowns.json. costs: costs.json. weights: alpha [layers][heads]. failures: of
    methods, by name. judged: `expectations.judge`. asked: `sample`.
    """

    records: Sequence[Record]
    facts: Mapping[str, str]
    config: Mapping[str, Any]
    size: int
    tests: Sequence[Record] = ()
    gap_closure: Sequence[Record] = ()
    breakdowns: Sequence[Record] = ()
    costs: Sequence[Record] = ()
    weights: Sequence[Sequence[float]] = ()
    failures: Mapping[str, str] = field(default_factory=dict)
    judged: Sequence[Record] = ()
    asked: Sequence[Mapping[str, Any]] = ()

    @property
    def methods(self) -> list[str]:
        return list(dict.fromkeys(record["method"] for record in self.records))


def html(contents: Contents) -> str:
    import jinja2

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(resources.files("intra.evaluation").joinpath("report.html.j2").read_text(encoding="utf-8"))
    found, methods = contents.records, contents.methods
    benchmarks, shown = results.whole(found), results.shown(found)
    every = list(dict.fromkeys(record["metric"] for record in found))
    slices = list(dict.fromkeys(record["benchmark"] for record in contents.breakdowns))
    return template.render(
        facts=contents.facts,
        failures=contents.failures,
        style=figures.STYLE,
        light=dict(zip(figures.NAMES, figures.LIGHT, strict=True)),
        dark=dict(zip(figures.NAMES, figures.DARK, strict=True)),
        drawn=drawn(contents),
        main=_table(found, benchmarks, methods, shown),
        breakdowns=_table(contents.breakdowns, slices, methods, shown),
        others=_table(found, benchmarks, methods, [metric for metric in every if metric not in shown]),
        tests=_tests(contents.tests, shown),
        judged=[{**r, "title": results.title(r["metric"])} for r in contents.judged if r["verdict"] != "not run"],
        verdicts=expectations.counts(contents.judged),
        gaps=contents.gap_closure,
        costs=[{**cost, "cells": _cost_cells(cost)} for cost in contents.costs],
        weights=contents.weights,
        benchmarks=list(dict.fromkeys(item["benchmark"] for item in contents.asked)),
        kinds={kind: f"{KINDS[kind]} ({count})" for kind, count in _counts(contents.asked).items() if count},
        asked=contents.asked,
        size=contents.size,
        config=json.dumps(contents.config, indent=1, ensure_ascii=False),
    )


def _counts(asked: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """How many questions each filter leaves."""
    return {kind: sum(kind in ("all", *item["kinds"]) for item in asked) for kind in KINDS}


def drawn(contents: Contents) -> dict[str, list[Figure]]:
    """The figures, by the section they stand in; the key of a section that has none is left out."""
    found, methods = contents.records, contents.methods
    judged = [method for method in methods if method not in ENDS]
    sets = figures.three_sets(found, contents.size)
    parts = {
        "curves": figures.recall_curves(found, methods),
        "answers": figures.answers(found, methods),
        "sets": [sets] if sets else [],
        "weights": [figures.weight_map(contents.weights)] if contents.weights else [],
        "gap": figures.gap_closure(contents.gap_closure, judged),
        "cost": _cost_figures(contents, judged),
    }
    return {name: made for name, made in parts.items() if made}


def _cost_figures(contents: Contents, methods: Sequence[str]) -> list[Figure]:
    """Retrieval alone against complete-evidence recall, and with the answer against EM; both means over the benchmarks."""
    benchmarks, made = results.whole(contents.records), []
    shown = results.shown(contents.records)
    recall = next((name for name in shown if name.endswith(f"_at_{contents.size}")), shown[0])
    for metric, parts, name in ((recall, ("search",), "cost.recall"), ("em", ("search", "answer"), "cost.em")):
        points = {}
        for cost in contents.costs:
            values = [r["value"] for b in benchmarks if (r := results.find(contents.records, b, cost["method"], metric))]
            times = [_per_question(cost)[part] for part in parts]
            if values and None not in times:
                points[cost["method"]] = (sum(time or 0.0 for time in times), sum(values) / len(values))
        figure = figures.cost_and_quality(points, methods, results.title(metric), name)
        made += [figure] if figure else []
    return made


def _per_question(cost: Record) -> dict[str, float | None]:
    """Seconds of the search and of the answer; None where no answer was read (none asked for, or all known from other methods)."""
    read = cost["answers_read"]
    return {"search": cost["search_seconds"] / cost["questions"], "answer": cost["answer_seconds"] / read if read else None}


def _cost_cells(cost: Record) -> list[str]:
    """Index, search, answer, memory, operations of search and answer; empty where it is not known."""
    cells = ["" if value is None else figures.seconds(value) for value in (cost["index_seconds"], *_per_question(cost).values())]
    peaks = [cost[name] for name in ("peak_bytes", "answer_peak_bytes") if cost.get(name) is not None]
    cost = {**cost, "peak_bytes": max(peaks, default=None)}
    for name, units in (("peak_bytes", ("B", "KB", "MB", "GB")), ("search_operations", UNITS), ("answer_operations", UNITS)):
        cells.append("" if cost.get(name) is None else _scaled(cost[name], units))
    return cells


UNITS = ("", "thousand", "million", "billion", "trillion")


def _scaled(value: float, units: Sequence[str]) -> str:
    power = 0
    while value >= 999.5 and power < len(units) - 1:
        value, power = value / 1000, power + 1
    return f"{value:.3g} {units[power]}".strip()


def _table(found: Sequence[Record], benchmarks: Sequence[str], methods: Sequence[str], metrics: Sequence[str]) -> dict[str, Any]:
    """Header cells and rows of a table; the best value of a metric on a benchmark is marked, the references aside."""
    values = {(r["benchmark"], r["method"], r["metric"]): r for r in found}
    rows = []
    for benchmark in benchmarks:
        judged = [method for method in methods if method not in ENDS]
        best = {
            metric: max((values[benchmark, m, metric]["value"] for m in judged if (benchmark, m, metric) in values), default=None)
            for metric in metrics
        }
        for method in methods:
            cells = [values.get((benchmark, method, metric)) for metric in metrics]
            first = next((cell for cell in cells if cell), None)
            if first is None:
                continue
            rows.append(
                {
                    "benchmark": benchmark,
                    "method": method,
                    "n": first["n"],
                    "cells": [
                        None
                        if cell is None
                        else {**cell, "best": method in judged and len(judged) > 1 and cell["value"] == best[cell["metric"]]}
                        for cell in cells
                    ],
                }
            )
    return {"titles": [results.title(metric) for metric in metrics], "rows": rows}


def _tests(tests: Sequence[Record], shown: Sequence[str]) -> dict[str, Any]:
    """A row a benchmark and method, a cell a metric of the main table: INTRA's lead and its corrected p."""
    cells = {(r["benchmark"], r["method"], r["metric"]): r for r in tests}
    pairs = dict.fromkeys((r["benchmark"], r["method"]) for r in tests)
    rows = [{"benchmark": b, "method": m, "cells": [cells.get((b, m, metric)) for metric in shown]} for b, m in pairs]
    return {"titles": [results.title(metric) for metric in shown], "rows": rows}


# Which questions a filter of the page leaves: key -> label. The first shows all.
KINDS = {
    "all": "all",
    "alone": "complete evidence by INTRA alone",
    "missed": "complete by another method, not by INTRA",
    "nobody": "complete by no method",
    "right": "INTRA answers exactly",
    "wrong": "INTRA does not answer exactly",
}


def sample(outcomes: Outcomes, questions: Sequence[Question], pool: Pool, size: int, count: int, seed: int) -> list[dict[str, Any]]:
    """The questions that the report shows: `count` of each benchmark, drawn by seed and id, by benchmark and in the order of the questions.

    Each {question_id, benchmark, type, question, accepted, kinds, methods: [{method, answer, em, f1, complete, found: [passage number]}],
    passages: [{number, title, text, gold, ranks: {method: rank}}]}: the first `size` chunks of each method, and the gold.
    """
    drawn: list[Question] = []
    for benchmark in sorted({question.benchmark for question in questions}):
        own = [question for question in questions if question.benchmark == benchmark]
        lots = {question.question_id: hashlib.sha256(f"{seed} {question.question_id}".encode()).digest() for question in own}
        chosen = set(sorted(lots, key=lots.__getitem__)[:count])
        drawn += [question for question in own if question.question_id in chosen]
    return [_asked(outcomes, question, pool, size) for question in drawn]


def _asked(outcomes: Outcomes, question: Question, pool: Pool, size: int) -> dict[str, Any]:
    group_of = {chunk: number for number, group in enumerate(question.gold, start=1) for chunk in reversed(group)}
    tops = {outcome.method: [chunk for chunk, _ in outcome.rankings[question.question_id][:size]] for outcome, _ in outcomes}
    found = dict.fromkeys(chunk for method, ids in tops.items() if method not in ENDS for chunk in ids)
    held = [chunk for chunk in found if chunk in group_of]
    missing = [group[0] for group in question.gold if not set(group) & set(held)]
    # Evidence first, found or not; then the others in the order in which the methods bring them.
    ids = list(dict.fromkeys([*sorted([*held, *missing], key=lambda chunk: group_of[chunk]), *found]))
    number_of = {chunk: number for number, chunk in enumerate(ids, start=1)}
    methods = []
    for outcome, values in outcomes:
        mine, top = values[question.question_id], tops[outcome.method]
        methods.append(
            {
                "method": outcome.method,
                "answer": outcome.answers.get(question.question_id),
                "em": mine.get("em"),
                "f1": mine.get("f1"),
                "complete": metrics.complete_evidence(question.gold, top),
                "found": [{"number": number_of.get(chunk), "gold": chunk in group_of} for chunk in top],
            }
        )
    passages = []
    for chunk in ids:
        row = pool.row_of[chunk]
        ranks = {method: top.index(chunk) + 1 for method, top in tops.items() if chunk in top and method not in ENDS}
        passages.append({"number": number_of[chunk], "chunk": chunk, "title": pool.titles[row], "text": pool.texts[row],
                         "gold": group_of.get(chunk), "ranks": ranks})  # fmt: skip
    return {
        "question_id": question.question_id,
        "benchmark": question.benchmark,
        "type": question.type,
        "question": question.question,
        "accepted": list(question.answers),
        "groups": len(question.gold),
        "methods": methods,
        "passages": passages,
        "kinds": _kinds(methods),
    }


def _kinds(methods: Sequence[Mapping[str, Any]]) -> list[str]:
    judged = {item["method"]: item for item in methods if item["method"] not in ENDS}
    found, own = [], judged.get("intra")
    complete = [name for name, item in judged.items() if item["complete"]]
    if complete == ["intra"]:
        found.append("alone")
    if own is not None and complete and not own["complete"]:
        found.append("missed")
    if not complete:
        found.append("nobody")
    if own is not None and own["em"] is not None:
        found.append("right" if own["em"] == 1 else "wrong")
    return found
