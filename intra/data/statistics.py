"""What a dataset holds, in numbers: `statistics.json`, and the part of it that goes to MLflow."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from intra.data.schema import Question


def describe(
    chunks: pa.Table, passages: npt.NDArray[np.int64], questions: Sequence[Question], passages_read: int, questions_read: int
) -> dict[str, Any]:
    """Counts and sizes of the pool, and per benchmark and split of the questions. Plain JSON values; words are split at white space.

    `chunks` has n_tokens, words and source; `passages` [chunks] is the number of the passage that each is of.
    """
    pieces = np.unique(passages, return_counts=True)[1]
    groups: dict[tuple[str, str], list[Question]] = {}
    for question in questions:
        groups.setdefault((question.benchmark, question.split), []).append(question)
    benchmarks: dict[str, dict[str, Any]] = {}
    for (benchmark, split), members in sorted(groups.items()):
        benchmarks.setdefault(benchmark, {})[split] = _questions(members)
    sources = chunks["source"].value_counts().to_pylist()
    return {
        "pool": {
            "passages_read": passages_read,
            "passages": len(pieces),
            "split_passages": int((pieces > 1).sum()),
            "chunks": len(chunks),
            "tokens": _spread(chunks["n_tokens"].to_numpy()),
            "words": _spread(chunks["words"].to_numpy()),
            "sources": {str(row["values"]): int(row["counts"]) for row in sorted(sources, key=lambda row: row["values"])},
        },
        "questions_read": questions_read,
        "questions": benchmarks,
    }


def metrics(statistics: dict[str, Any]) -> dict[str, float]:
    """The numbers of `describe` worth a metric, by name."""
    pool = statistics["pool"]
    values = {name: float(pool[name]) for name in ("passages", "split_passages", "chunks")}
    values |= {f"{unit}_{name}": float(pool[unit][name]) for unit in ("tokens", "words") for name in ("total", "mean", "median", "longest")}
    values["gold_chunks"] = float(statistics["checks"]["gold_chunks"])
    values["questions_in_both_splits"] = float(statistics["checks"]["questions_in_both_splits"]["count"])
    values |= {f"input_{name}": float(statistics["input"][name]) for name in ("mistakes", "duplicates")}
    if "near_duplicates" in statistics:
        values["near_duplicate_pairs"] = float(statistics["near_duplicates"]["pairs"])
    for benchmark, found in statistics["checks"]["test_gold_in_training"].items():
        values[f"test_gold_in_training/{benchmark}"] = float(found["any"])
    for benchmark, splits in statistics["checks"]["answer_not_in_gold"].items():
        values |= {f"answer_not_in_gold/{benchmark}/{split}": float(found["count"]) for split, found in splits.items()}
    for benchmark, splits in statistics["questions"].items():
        values |= {f"questions/{benchmark}/{split}": float(numbers["questions"]) for split, numbers in splits.items()}
    return values


def _questions(questions: Sequence[Question]) -> dict[str, Any]:
    return {
        "questions": len(questions),
        "without_answer": sum(not question.answers for question in questions),
        "gold_per_question": _count(str(len(question.gold)) for question in questions),
        "chunks_per_gold": round(float(np.mean([len(group) for question in questions for group in question.gold])), 4),
        "hops": _count(str(question.hops) for question in questions),
        "types": _count(question.type for question in questions),
        "gold_sources": _count(question.gold_source for question in questions),
    }


def _count(values: Iterable[str]) -> dict[str, int]:
    return dict(sorted(Counter(values).items()))


def _spread(sizes: npt.NDArray[np.int32]) -> dict[str, float | int]:
    return {
        "total": int(np.sum(sizes, dtype=np.int64)),
        "mean": round(float(np.mean(sizes)), 2),
        "median": float(np.median(sizes)),
        "p99": float(np.percentile(sizes, 99)),
        "longest": int(np.max(sizes)),
    }
