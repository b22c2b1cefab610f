"""The dataset's report (Markdown): its numbers beside those of the paper's App. E, and what the checks found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from intra.data_config import DataConfig

# Paper, App. E: the pool, then examples and references to gold passages by benchmark and split.
PAPER_POOL = {"chunks": 758_500, "gold": 514_999, "other": 243_501, "words": 69_734_081, "mean": 91.94, "median": 106.0}
PAPER = {
    ("2wikimultihopqa", "train"): (167_454, 404_170),
    ("2wikimultihopqa", "test"): (12_576, 30_654),
    ("hotpotqa", "train"): (90_185, 180_370),
    ("hotpotqa", "test"): (7_384, 14_768),
    ("musique", "train"): (277_577, 631_153),
    ("musique", "test"): (2_417, 6_404),
    ("nq", "train"): (53_301, 276_872),
    ("nq", "test"): (6_489, 42_182),
}


def markdown(described: Mapping[str, Any], data: DataConfig) -> str:
    """The report of `statistics.json`."""
    checks, found = described["checks"], described["input"]
    parts = ["# The dataset", "", "## Pool", "", *_pool(described), "", "## Questions", "", *_questions(described), ""]
    parts += [
        "References are gold passages, each once a question; in the paper's MuSiQue row HotpotQA's and 2WikiMultihopQA's training "
        f"questions count too (`data.musique_train`: here {data.musique_train}). `data.nq_gold`: here {data.nq_gold}.",
        "", "## Checks", "",
        "- Every gold passage is in the pool.",
        *_exceeded(described, data),
        f"- The same question in training and test: {_some(checks['questions_in_both_splits'])}.",
        f"- Bad records of the input left out: {found['mistakes']:,}" + (" (mistakes.txt)." if found["mistakes"] else "."),
        *(f"- Left out: {count:,} {reason}." for reason, count in found["left_out"].items()),
        f"- Passages that are copies of another but for case, spacing and Unicode form, merged: {found['duplicates']:,}."
        if data.deduplicate else "- Copies were not looked for (`data.deduplicate`).",
        _near(described), "",
        "### Answers that stand in no gold passage (yes and no aside)", "",
        *_table(("benchmark", "split", "questions", "first ids"),
                [(name, split, f"{part['count']:,}", ", ".join(part["first"][:3]))
                 for name, splits in checks["answer_not_in_gold"].items() for split, part in splits.items()]), "",
        "### Test evidence that training has seen", "",
        *_table(("benchmark", "test questions", "any gold passage", "all of them", "any, of any benchmark's training"),
                [(name, *(f"{part[key]:,}" for key in ("test", "any", "all", "any_of_any_benchmark")))
                 for name, part in checks["test_gold_in_training"].items()]), "",
        "### The highest complete-evidence recall@k there can be", "",
        "A question with more than k gold passages cannot have all of them in the top k.", "",
        *_ceiling(checks["ceiling"]), "",
    ]  # fmt: skip
    return "\n".join(parts)


def _pool(described: Mapping[str, Any]) -> list[str]:
    pool, gold = described["pool"], described["checks"]["gold_chunks"]
    rows = [
        ("chunks", f"{pool['chunks']:,}", f"{PAPER_POOL['chunks']:,}"),
        ("of them gold", f"{gold:,}", f"{PAPER_POOL['gold']:,}"),
        ("others", f"{pool['chunks'] - gold:,}", f"{PAPER_POOL['other']:,}"),
        ("words", f"{pool['words']['total']:,}", f"{PAPER_POOL['words']:,}"),
        ("words a chunk, mean", f"{pool['words']['mean']:.2f}", f"{PAPER_POOL['mean']:.2f}"),
        ("words a chunk, median", f"{pool['words']['median']:g}", f"{PAPER_POOL['median']:g}"),
        ("backbone tokens", f"{pool['tokens']['total']:,}", "about 100M"),
        ("tokens a chunk, mean / longest", f"{pool['tokens']['mean']:.2f} / {pool['tokens']['longest']:,}", "not stated"),
        ("passages / of them split", f"{pool['passages']:,} / {pool['split_passages']:,}", "not stated"),
    ]
    return _table(("", "here", "paper"), rows)


def _exceeded(described: Mapping[str, Any], data: DataConfig) -> list[str]:
    pool = described["pool"]
    sizes = {"pool_limit": pool["passages"], "pool_chunks": pool["chunks"], "pool_tokens": pool["tokens"]["total"]}
    over = [(key, size) for key, size in sizes.items() if size > (getattr(data, key) or size)]
    return [f"- The gold passages alone are more than data.{key}={getattr(data, key):,} allows: {size:,}." for key, size in over]


def _questions(described: Mapping[str, Any]) -> list[str]:
    rows = []
    for name, splits in described["questions"].items():
        for split, part in sorted(splits.items(), reverse=True):
            references = sum(int(size) * count for size, count in part["gold_per_question"].items())
            paper = PAPER.get((name, split))
            rows.append(
                (name, split, f"{part['questions']:,}", f"{references:,}", f"{references / part['questions']:.2f}")
                + ((f"{paper[0]:,}", f"{paper[1]:,}", f"{paper[1] / paper[0]:.2f}") if paper else ("", "", ""))
            )
    return _table(("benchmark", "split", "examples", "references", "a question", "paper: examples", "references", "a question"), rows)


def _near(described: Mapping[str, Any]) -> str:
    found = described.get("near_duplicates")
    if found is None:
        return "- Near-duplicates were not looked for (`data.near_duplicates`)."
    return (
        f"- Near-duplicates (Jaccard similarity of word 5-grams at least {found['threshold']:g}): {found['pairs']:,} pairs, "
        f"{found['chunks']:,} chunks (near_duplicates.parquet). None was merged, and a copy of a gold passage counts as a miss."
    )


def _ceiling(found: Mapping[str, Mapping[str, float]]) -> list[str]:
    ks = list(next(iter(found.values()), {}))
    return _table(("benchmark", *(f"k = {k}" for k in ks)), [(name, *(f"{part[k]:.3f}" for k in ks)) for name, part in found.items()])


def _some(found: Mapping[str, Any]) -> str:
    names = ", ".join(" = ".join(pair) for pair in found["first"][:3])
    return f"{found['count']:,}" + (f" ({names}{', ...' if found['count'] > 3 else ''})" if names else "")


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(head)} |", f"|{'|'.join('---' for _ in head)}|", *(f"| {' | '.join(row)} |" for row in rows)]
