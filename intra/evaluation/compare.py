"""Two evaluated runs side by side, question by question: the difference of each method's metrics, its interval, and its p.

A run is a results folder (<root>/results/<fingerprint>) or a root, of which the last evaluation counts. Compared are the methods and the
questions that both have; the test is the paired one of `significance`, Holm's family the methods of a benchmark and metric.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from intra import storage, tracking
from intra.errors import UserError
from intra.evaluation import results
from intra.evaluation.intervals import bootstrap
from intra.evaluation.results import FIXED, PER_QUESTION, Record
from intra.evaluation.significance import ENDS, holm, sign_flip

Rows = dict[tuple[str, str], dict[str, Any]]  # (method, question_id) -> a row of per_question.parquet
APART = ("root", "tracking")  # sections in which two runs may differ and yet be of one configuration


@dataclass(frozen=True)
class Run:
    url: str
    rows: Rows
    config: dict[str, Any]


def read(place: str) -> Run:
    """Raises UserError where there is no evaluated run."""
    place = storage.absolute(place)
    url = place if storage.exists(storage.join(place, PER_QUESTION)) else _last(place)
    table = pq.read_table(io.BytesIO(storage.read_bytes(storage.join(url, PER_QUESTION))))
    rows = {(row["method"], row["question_id"]): row for row in table.to_pylist()}
    return Run(url, rows, tracking.flatten(storage.read_json(storage.join(url, "config.json"))))


def _last(root: str) -> str:
    """The results whose records are those published last below the root."""
    folder = storage.join(root, "results")
    try:
        mark = hashlib.sha256(storage.read_bytes(storage.join(folder, "results.json"))).hexdigest()
    except FileNotFoundError:
        raise UserError(f"{root}: neither a results folder nor a root with results; run workflows/evaluate.py, or name another") from None
    for name in storage.names(folder):
        url = storage.join(folder, name)
        manifest = storage.join(url, "manifest.json")
        if storage.exists(manifest) and storage.read_json(manifest)["results_sha256"] == mark:
            return url
    raise UserError(f"{folder}: its results.json belongs to no complete evaluation; run workflows/evaluate.py again")


def compare(a: Run, b: Run, permutations: int, resamples: int, seed: int) -> list[Record]:
    """{method, benchmark, metric, a, b, difference (b - a), low, high, p, p_holm, n}, by benchmark, metric and method.

    random and oracle are compared too, but outside Holm's family. Raises UserError where a question's text or gold differs.
    """
    shared = [key for key in a.rows if key in b.rows]
    for key in shared:
        if any(a.rows[key][name] != b.rows[key][name] for name in ("question", "gold", "answers")):
            raise UserError(f"question {key[1]} is another one in {b.url} than in {a.url}: two data sets cannot be compared")
    names = [name for name in _metrics(a) if name in _metrics(b)]
    found: list[Record] = []
    for benchmark in dict.fromkeys(a.rows[key]["benchmark"] for key in shared):
        for metric in names:
            made = []
            for method in dict.fromkeys(method for method, _ in shared):
                pairs = [(a.rows[key][metric], b.rows[key][metric]) for key in shared
                         if key[0] == method and a.rows[key]["benchmark"] == benchmark]  # fmt: skip
                table = np.array([pair for pair in pairs if None not in pair], dtype=np.float64).reshape(-1, 2)
                if not len(table):
                    continue
                off = table[:, 1:] - table[:, :1]
                low, high = bootstrap(off, resamples, seed)
                (first, second), (p,) = table.mean(axis=0), sign_flip(off, permutations, seed)
                made.append(
                    {"method": method, "benchmark": benchmark, "metric": metric, "a": float(first), "b": float(second),
                     "difference": float(off.mean()), "low": float(low[0]), "high": float(high[0]), "p": float(p), "n": len(table)}
                )  # fmt: skip
            family = [record for record in made if record["method"] not in ENDS]
            for record, corrected in zip(family, holm(np.array([record["p"] for record in family])), strict=True):
                record["p_holm"] = float(corrected)
            found += [{"p_holm": record["p"], **record} for record in made]
    return found


def text(a: Run, b: Run, found: Sequence[Record]) -> str:
    """For the terminal: the settings that differ, what only one run has, and a line a benchmark, method and metric of the main table."""
    lines = [f"A  {a.url}", f"B  {b.url}"]
    for key in sorted({*a.config, *b.config}):
        mine, its = (run.config.get(key, "(no such key)") for run in (a, b))  # a key that is younger than one of the runs
        if key.split(".")[0] not in APART and mine != its:
            lines.append(f"   {key}: {mine} -> {its}")
    for run, other, name in ((a, b, "A"), (b, a, "B")):
        only = [key for key in run.rows if key not in other.rows]
        methods = [method for method in dict.fromkeys(method for method, _ in only) if method not in {method for method, _ in other.rows}]
        if methods:
            lines.append(f"   only in {name}: {', '.join(methods)}")
        if count := len({question for method, question in only if method not in methods}):
            lines.append(f"   {count} questions only in {name}")
    shown = results.shown(found)
    rows = [["benchmark", "method", "metric", "n", "A", "B", "B - A", "p (Holm)"]]
    for r in sorted((r for r in found if r["metric"] in shown), key=lambda r: (r["benchmark"], list(_order(found)).index(r["method"]))):
        rows.append([r["benchmark"], r["method"], results.title(r["metric"]), str(r["n"]), f"{r['a']:.3f}", f"{r['b']:.3f}",
                     f"{r['difference']:+.3f} [{r['low']:+.3f}, {r['high']:+.3f}]",
                     f"{r['p_holm']:.2g}{' *' if r['p_holm'] < 0.05 else ''}"])  # fmt: skip
    if len(rows) == 1:
        raise UserError(f"{a.url} and {b.url} have no method and question in common")
    return "\n".join(
        [*lines, "", *results.aligned(rows), "", "* the difference is significant at 5 % over the methods of its benchmark and metric"]
    )


def _order(found: Sequence[Record]) -> dict[str, None]:
    return dict.fromkeys(record["method"] for record in found)


def _metrics(run: Run) -> list[str]:
    return [name for name in next(iter(run.rows.values()), {}) if name not in FIXED]
