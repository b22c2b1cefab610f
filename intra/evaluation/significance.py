"""Whether INTRA differs from the other methods: paired permutation tests, Holm's correction, and how much of the gap it closes.

    [{"reference": "intra", "method": "bm25", "benchmark": ..., "metric": ..., "difference": ..., "p": ..., "p_holm": ..., "n": ...}]

The test is the paired sign-flip test: under the null hypothesis either method could have given either value of a question. Holm's family is
the methods of one benchmark and metric; `random` and `oracle` are ends of the scale and not in it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from intra.data.schema import Question
from intra.evaluation.intervals import Floats, resampled
from intra.evaluation.metrics import Values
from intra.evaluation.results import Record

REFERENCE = "intra"
ENDS = ("random", "oracle")
_AT_ONCE = 500  # permutations


def compare(values: Mapping[str, Mapping[str, Values]], questions: Sequence[Question], permutations: int, seed: int) -> list[Record]:
    """INTRA minus each other method, by benchmark and metric. `values`: method -> question_id -> metrics. [] without INTRA."""
    others = [name for name in values if name != REFERENCE and name not in ENDS]
    if REFERENCE not in values or not others:
        return []
    records = []
    for benchmark in dict.fromkeys(question.benchmark for question in questions):
        own = [question.question_id for question in questions if question.benchmark == benchmark]
        # What not every question has (answer recall of a yes-or-no question) is compared over those that have it.
        for metric in dict.fromkeys(name for key in own for name in values[REFERENCE][key]):
            keys = [key for key in own if metric in values[REFERENCE][key]]
            table = np.array([[values[REFERENCE][key][metric] - values[name][key][metric] for name in others] for key in keys])
            chances = sign_flip(table, permutations, seed)
            for name, mean, p, corrected in zip(others, table.mean(axis=0), chances, holm(chances), strict=True):
                records.append({"reference": REFERENCE, "method": name, "benchmark": benchmark, "metric": metric,
                                "difference": float(mean), "p": float(p), "p_holm": float(corrected), "n": len(keys)})  # fmt: skip
    return records


def sign_flip(differences: Floats, permutations: int, seed: int) -> Floats:
    """Two-sided p of the mean of each column of paired differences [n, m] being 0: [m].

    (1 + the random sign flips whose mean is at least as far from 0) / (1 + permutations): never 0, and never too small. On metrics of 0 and
    1 the mean moves in steps, and the rate of false alarms is below the level (4 % at 5 % with 200 questions).
    """
    n = len(differences)
    generator = np.random.default_rng([seed, n])
    seen = np.abs(differences.sum(axis=0)) - 1e-9 * n
    as_far = np.zeros(differences.shape[1])
    for start in range(0, permutations, _AT_ONCE):
        signs = generator.integers(0, 2, (min(_AT_ONCE, permutations - start), n), dtype=np.int8).astype(np.float64) * 2 - 1
        as_far += (np.abs(signs @ differences) >= seen).sum(axis=0)
    return (1 + as_far) / (1 + permutations)


def holm(chances: Floats) -> Floats:
    """Holm's step-down correction of a family of p [m]: what is to be compared with the level of the whole family."""
    order = np.argsort(chances, kind="stable")
    scaled = chances[order] * np.arange(len(chances), 0, -1)
    corrected = np.empty_like(chances)
    corrected[order] = np.minimum(np.maximum.accumulate(scaled), 1.0)
    return corrected


def gap_closure(
    values: Mapping[str, Mapping[str, Values]], questions: Sequence[Question], metric: str, resamples: int, seed: int
) -> list[Record]:
    """100 (method - random) / (oracle - random) in per cent, with its 95 % interval, by benchmark (the paper's Table 2).

    [] where random or oracle were not evaluated; a benchmark on which they do not differ is left out.
    """
    if any(name not in values for name in ENDS):
        return []
    names, records = [name for name in values if name not in ENDS], []
    for benchmark in dict.fromkeys(question.benchmark for question in questions):
        keys = [question.question_id for question in questions if question.benchmark == benchmark]
        if any(metric not in values[name][key] for name in values for key in keys):
            continue
        table = np.array([[values[name][key][metric] for name in (*ENDS, *names)] for key in keys])
        means = np.vstack([table.mean(axis=0), resampled(table, resamples, seed)])
        gap = means[:, 1] - means[:, 0]
        if gap[0] <= 0:
            continue
        closed = 100 * (means[:, 2:] - means[:, :1]) / np.where(gap > 0, gap, np.nan)[:, None]
        low, high = np.nanquantile(closed[1:], [0.025, 0.975], axis=0)
        for place, name in enumerate(names):
            records.append({"method": name, "benchmark": benchmark, "metric": f"gap_closure_{metric}", "value": float(closed[0, place]),
                            "low": float(low[place]), "high": float(high[place]), "n": len(keys)})  # fmt: skip
    return records
