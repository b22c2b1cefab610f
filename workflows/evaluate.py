"""Evaluates the methods on the test questions: recall from their rankings, answers of the same backbone from stored states.

    python workflows/evaluate.py --config configs/quickstart.yaml
    python workflows/evaluate.py --config configs/quickstart.yaml evaluate.methods=[bm25,tfidf] evaluate.answers=false     # dataset only
    ray job submit --working-dir . -- python workflows/evaluate.py --config configs/paper.yaml root=s3://bucket/run

Reads the dataset, the chunk store (for answers and INTRA's methods) and the retriever; writes <root>/results/. Prints a table, and the
path of results.json as its last line. A method that is done stays done: the same command goes on after an interruption.
"""

from __future__ import annotations

import sys

from intra import cli, lineage
from intra.config import Config
from intra.evaluation import run as evaluation


def plan(config: Config) -> list[str]:
    """What exists and what will be made. Makes nothing."""
    dataset = lineage.dataset(config)
    if not dataset.complete():
        return [f"evaluate: waits for the dataset {dataset.url} (workflows/prepare.py)"]
    artifact, names = lineage.results(config), config.evaluate.methods
    if artifact.complete():
        return [f"evaluate: results {artifact.url} are complete ({', '.join(names)})"]
    questions = sum(splits.get("test", 0) for splits in dataset.manifest()["questions"].values())
    kinds = (lineage.ranking, lineage.answers) if config.evaluate.answers else (lineage.ranking,)
    done = [name for name in names if all(kind(config, name).complete() for kind in kinds)]
    answers = f"answers from {config.retriever.answer_size} chunks each" if config.evaluate.answers else "no answers"
    lines = [
        f"evaluate: results {artifact.url}: {questions:,} questions, {answers}, by {', '.join(names)}; done: {', '.join(done) or 'none'}"
    ]
    missing = [source for source in evaluation.needed(config) if not source.complete()]
    return lines + [f"evaluate: waits for the {source.kind} {source.url} (workflows/{source.made_by}.py)" for source in missing]


def run(config: Config) -> str:
    """Makes the results unless they are complete, prints the table and the places. Returns the place of results.json."""
    artifact = lineage.results(config)
    if not artifact.complete():
        evaluation.make(config, artifact)
    return evaluation.publish(config, artifact)


if __name__ == "__main__":
    sys.exit(cli.main(__doc__, plan, run))
