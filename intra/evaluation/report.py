"""The HTML report of a run: one file that loads nothing, readable by screen readers and without a mouse.

The figures are inline SVG with the same numbers in the table beside them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

from intra.evaluation import results
from intra.evaluation.results import Record

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 360, 240, 40, 16, 12, 32  # px
DASHES = ("none", "7 3", "2 3", "9 3 2 3", "4 4", "1 4", "12 4")  # lines differ by more than their colour
COLOURS = 7  # defined in the template


def html(found: Sequence[Record], facts: Mapping[str, str], config: Mapping[str, Any]) -> str:
    """The report. facts: name and value of what identifies the run; config: the resolved configuration."""
    import jinja2

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(resources.files("intra.evaluation").joinpath("report.html.j2").read_text(encoding="utf-8"))
    methods = list(dict.fromkeys(record["method"] for record in found))
    benchmarks = results.whole(found)
    types = [name for name in dict.fromkeys(record["benchmark"] for record in found) if name not in benchmarks]
    every = list(dict.fromkeys(record["metric"] for record in found))
    return template.render(
        facts=facts,
        main=_table(found, benchmarks, methods, results.shown(found)),
        types=_table(found, types, methods, results.shown(found)),
        others=_table(found, benchmarks, methods, [metric for metric in every if metric not in results.shown(found)]),
        figures=[_figure(found, benchmark, methods) for benchmark in benchmarks],
        methods=methods,
        dashes=DASHES,
        colours=COLOURS,
        config=json.dumps(config, indent=1),
    )


def _table(found: Sequence[Record], benchmarks: Sequence[str], methods: Sequence[str], metrics: Sequence[str]) -> dict[str, Any]:
    """Header cells and rows of a table; the best value of a metric on a benchmark is marked, the references aside."""
    values = {(r["benchmark"], r["method"], r["metric"]): r for r in found}
    rows = []
    for benchmark in benchmarks:
        judged = [method for method in methods if method not in ("oracle", "random")]
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


def _figure(found: Sequence[Record], benchmark: str, methods: Sequence[str]) -> dict[str, Any]:
    """Complete-evidence recall over k, as coordinates of lines and points."""
    curves = []
    ks = sorted({int(r["metric"].rpartition("_")[2]) for r in found if r["metric"].startswith("complete_recall_at_")})
    span = max(ks[-1] - ks[0], 1)

    def x(k: int) -> float:
        return round(LEFT + (k - ks[0]) / span * (WIDTH - LEFT - RIGHT), 1)

    def y(value: float) -> float:
        return round(HEIGHT - BOTTOM - value * (HEIGHT - TOP - BOTTOM), 1)

    for number, method in enumerate(methods):
        points = [(k, results.find(found, benchmark, method, f"complete_recall_at_{k}")) for k in ks]
        drawn = [
            {"x": x(k), "y": y(r["value"]), "low": y(r["low"]), "high": y(r["high"]), "k": k, "text": results.interval(r)}
            for k, r in points
            if r
        ]
        if drawn:
            curves.append({"method": method, "number": number, "points": drawn, "line": " ".join(f"{p['x']},{p['y']}" for p in drawn)})
    return {
        "benchmark": benchmark,
        "curves": curves,
        "width": WIDTH,
        "height": HEIGHT,
        "left": LEFT,
        "right": WIDTH - RIGHT,
        "bottom": HEIGHT - BOTTOM,
        "ticks": [{"x": x(k), "text": k} for k in ks],
        "levels": [{"y": y(level / 4), "text": f"{level / 4:.2f}"} for level in range(5)],
    }
