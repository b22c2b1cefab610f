"""Results judged against expected values: each line OK, nearly, FAIL, or not run.

    name: the last nightly run
    ok: 0.5                 OK where the value is off by at most so many margins, nearly up to `near`, FAIL beyond
    near: 1
    sides: below            both: too high is off too (the paper reproduced); below: only too low is
    gate: true              a FAIL is a regression: nightly exits 3; and 2 where not every value can be judged
    pool_sha256, questions_sha256     of the dataset the values were measured on; where given, no other is judged by them
    lines:
      - {source: commit 1a2b3c4, benchmark: synthetic, metric: em, values: {intra: [0.763, 0.717, 0.813], bm25: [0.5, 0.44, 0.557]}}

A value is a number, [value, half of its interval] or [value, low, high]. The margin is the interval's half on the side of the deviation: of
the expected value alone where the dataset is named (the questions are the same), else of ours and the expected one's together, as of
independent samples. A `benchmark` that is a list stands for the mean over these. `of: rows` are rows of an ablation.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self

import yaml
from pydantic import Field, ValidationError, model_validator

from intra import storage
from intra.errors import UserError
from intra.evaluation import results
from intra.evaluation.results import Record
from intra.section import Section

ROUNDING = 0.0005  # the expected values have three digits
VERDICTS = ("OK", "nearly", "FAIL", "not run")


class Line(Section):
    source: str
    benchmark: str | list[str]
    metric: str
    of: Literal["methods", "rows"] = "methods"
    values: dict[str, float | list[float]]

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name, value in self.values.items():
            if isinstance(value, list) and (len(value) not in (2, 3) or (len(value) == 3 and not value[1] <= value[0] <= value[2])):
                raise ValueError(f"{name}: found {value}; give a number, [value, half of its interval] or [value, low, high]")
        return self

    def expected(self, name: str) -> tuple[float, float, float]:
        """Value, low and high."""
        value = self.values[name]
        if not isinstance(value, list):
            return value, value, value
        return (value[0], value[0] - value[1], value[0] + value[1]) if len(value) == 2 else (value[0], value[1], value[2])


class Expectations(Section):
    name: str
    ok: float = Field(1.0, ge=0)
    near: float = Field(2.0, ge=0)
    sides: Literal["both", "below"] = "both"
    gate: bool = False
    pool_sha256: str | None = None
    questions_sha256: str | None = None
    lines: list[Line]

    @property
    def bound(self) -> bool:
        """Whether the values are of one dataset alone."""
        return self.pool_sha256 is not None or self.questions_sha256 is not None

    def of_dataset(self, manifest: Mapping[str, Any]) -> bool:
        """Whether a dataset of this manifest may be judged."""
        return all(
            mine in (None, manifest[key]) for key, mine in (("pool_sha256", self.pool_sha256), ("questions_sha256", self.questions_sha256))
        )


def load(url: str) -> Expectations:
    """Raises UserError: no such file, a folder, not YAML, an unknown key or a wrong value."""
    try:
        values = yaml.safe_load(storage.read_bytes(url))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"evaluate.expected: no file {url}; configs/expected/*.yaml come with the project") from None
    except IsADirectoryError:
        raise UserError(f"evaluate.expected: {url} is a folder; name its files") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{url}: not valid YAML: {' '.join(str(error).split())}") from None
    try:
        return Expectations.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{url}: {'.'.join(map(str, first['loc']))}: {first['msg']}; see intra/evaluation/expectations.py") from None


def judge(found: Sequence[Record], expected: Expectations, of: Literal["methods", "rows"] = "methods") -> list[Record]:
    """A record a value: {name, source, of, benchmark, metric, expected, expected_low, expected_high, value, low, high, verdict}.

    `of` is a method; with of="rows" a row, and `found` are the records of an ablation.
    """
    key, judged = of.removesuffix("s"), []
    by_name = {(r[key], r["benchmark"], r["metric"]): r for r in found}
    for line in expected.lines:
        for name in line.values if line.of == of else ():
            parts = [line.benchmark] if isinstance(line.benchmark, str) else line.benchmark
            mine = [by_name.get((name, part, line.metric)) for part in parts]
            value, low, high = line.expected(name)
            record = {"name": expected.name, "source": line.source, "of": name, "metric": line.metric,
                      "benchmark": line.benchmark if isinstance(line.benchmark, str) else "mean of " + ", ".join(parts),
                      "expected": value, "expected_low": low, "expected_high": high}  # fmt: skip
            judged.append({**record, **_judged([one for one in mine if one], len(parts), record, expected)})
    return judged


def _judged(mine: Sequence[Record], parts: int, line: Record, expected: Expectations) -> Record:
    if len(mine) < parts:
        return {"value": None, "low": None, "high": None, "verdict": "not run"}
    value = sum(r["value"] for r in mine) / parts
    below = math.sqrt(sum((r["value"] - r["low"]) ** 2 for r in mine)) / parts
    above = math.sqrt(sum((r["high"] - r["value"]) ** 2 for r in mine)) / parts
    off = value - line["expected"]
    its, ours = (line["expected"] - line["expected_low"], above) if off < 0 else (line["expected_high"] - line["expected"], below)
    margin = its if expected.bound else math.hypot(its, ours)
    size = 0.0 if expected.sides == "below" and off > 0 else abs(off) - ROUNDING
    verdict = "OK" if size <= expected.ok * margin else "nearly" if size <= expected.near * margin else "FAIL"
    return {"value": value, "low": value - below, "high": value + above, "verdict": verdict}


def unjudged(judged: Sequence[Record], expected: Expectations) -> list[str]:
    """Why the file does not say how a night went: nothing of it was judged, or not all; empty where all was."""
    if not judged:
        return [f"against {expected.name}: nothing is judged, its values are of another dataset or of no method"]
    absent = [f"{r['of']}, {r['benchmark']}, {results.title(r['metric'])}" for r in judged if r["verdict"] == "not run"]
    return [f"against {expected.name}: {len(absent)} of {len(judged)} values not run, such as {absent[0]}"] if absent else []


def regressions(judged: Sequence[Record]) -> list[Record]:
    """What failed by being too low."""
    return [r for r in judged if r["verdict"] == "FAIL" and r["value"] < r["expected"]]


def text(judged: Sequence[Record]) -> list[str]:
    """Lines for the terminal: what is not OK, then the counts."""
    return [*(one_line(r) for r in judged if r["verdict"] in ("nearly", "FAIL")), *counts(judged)]


def counts(judged: Sequence[Record]) -> list[str]:
    """How many values got each verdict, a line a file."""
    lines = []
    for name in dict.fromkeys(r["name"] for r in judged):
        found = Counter(r["verdict"] for r in judged if r["name"] == name)
        lines.append(f"against {name}: " + ", ".join(f"{found[verdict]} {verdict}" for verdict in VERDICTS if found[verdict]))
    return lines


def one_line(record: Record) -> str:
    interval = ""
    if record["expected_low"] < record["expected_high"]:
        interval = f" [{record['expected_low']:.3f}, {record['expected_high']:.3f}]"
    return (
        f"{record['verdict']}: {record['of']}, {record['benchmark']}, {results.title(record['metric'])}: {record['value']:.3f}, expected "
        f"{record['expected']:.3f}{interval} ({record['name']}, {record['source']})"
    )


def written(found: Sequence[Record], name: str, source: str, manifest: Mapping[str, Any]) -> str:
    """YAML that expects these results of this dataset again: the metrics of the main table, whole benchmarks, chance aside."""
    lines = []
    for benchmark in results.whole(found):
        for metric in results.shown(found):
            mine = [r for r in found if (r["benchmark"], r["metric"]) == (benchmark, metric) and r["method"] != "random"]
            values = ", ".join(f"{r['method']}: [{r['value']:.3f}, {r['low']:.3f}, {r['high']:.3f}]" for r in mine)
            lines.append(f"  - {{source: {source}, benchmark: {json.dumps(benchmark)}, metric: {metric}, values: {{{values}}}}}\n")
    head = f"name: {name}\nok: 0.5\nnear: 1\nsides: below\ngate: true\n"
    return f"{head}pool_sha256: {manifest['pool_sha256']}\nquestions_sha256: {manifest['questions_sha256']}\nlines:\n{''.join(lines)}"
