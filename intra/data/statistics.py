"""What a dataset holds, in numbers: `statistics.json`, and the part of it that goes to MLflow."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from intra.data.chunking import Chunk
from intra.data.schema import Question


def describe(chunks: Sequence[Chunk], questions: Sequence[Question], passages_read: int, questions_read: int) -> dict[str, Any]:
    """Counts and sizes of the pool, and per benchmark and split of the questions. Plain JSON values; words are split at white space."""
    pieces = Counter(chunk.passage_id for chunk in chunks)
    groups: dict[tuple[str, str], list[Question]] = {}
    for question in questions:
        groups.setdefault((question.benchmark, question.split), []).append(question)
    benchmarks: dict[str, dict[str, Any]] = {}
    for (benchmark, split), members in sorted(groups.items()):
        benchmarks.setdefault(benchmark, {})[split] = _questions(members)
    return {
        "pool": {
            "passages_read": passages_read,
            "passages": len(pieces),
            "split_passages": sum(count > 1 for count in pieces.values()),
            "chunks": len(chunks),
            "tokens": _spread([chunk.n_tokens for chunk in chunks]),
            "words": _spread([len(chunk.text.split()) for chunk in chunks]),
            "sources": _count(chunk.source for chunk in chunks),
        },
        "questions_read": questions_read,
        "questions": benchmarks,
    }


def metrics(statistics: dict[str, Any]) -> dict[str, float]:
    """The numbers of `describe` worth a metric, by name."""
    pool = statistics["pool"]
    values = {name: float(pool[name]) for name in ("passages", "split_passages", "chunks")}
    values |= {f"{unit}_{name}": float(pool[unit][name]) for unit in ("tokens", "words") for name in ("total", "mean", "median", "longest")}
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


def _spread(sizes: Sequence[int]) -> dict[str, float | int]:
    return {
        "total": int(np.sum(sizes)),
        "mean": round(float(np.mean(sizes)), 2),
        "median": float(np.median(sizes)),
        "p99": float(np.percentile(sizes, 99)),
        "longest": int(np.max(sizes)),
    }
