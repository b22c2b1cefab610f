"""Everything in order: prepare, warmstart, encode, train, evaluate. What is complete is skipped.

    python workflows/nightly.py --config configs/quickstart.yaml
    python workflows/nightly.py --config configs/real.yaml data.path=FOLDER
    python workflows/nightly.py --config configs/quickstart.yaml --dry-run                  # what exists, what will be made
    ray job submit --address http://HEAD:8265 --working-dir . -- python workflows/nightly.py --config configs/paper.yaml \\
        root=s3://bucket/run data.path=s3://bucket/data tracking.uri=http://MLFLOW:5000

One MLflow run, with the run of each step below it. Prints evaluate's table, and the path of results.json as its last line. Where figures
fell below what `evaluate.expected` holds (a file with `gate: true`): exit status 3, and a line that names them; 2 where such a file is of
another dataset, or names what was not run.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable

from intra import cli, lineage, tracking
from intra.artifact import Artifact
from intra.backbone import locate
from intra.config import Config
from intra.data import hub
from intra.evaluation import parts
from intra.evaluation import run as evaluation
from workflows import prepare

STEPS: dict[str, Callable[[Config], Artifact]] = {
    "prepare": lineage.dataset,
    "warmstart": lineage.backbone,
    "encode": lineage.store,
    "train": lineage.retriever,
    "evaluate": lineage.results,
}


def order(config: Config) -> list[str]:
    """All steps: over a frozen encoder the warm start reads the store."""
    return ["prepare", "encode", "warmstart", "train", "evaluate"] if lineage.over_encoder(config) else list(STEPS)


def steps(config: Config) -> list[str]:
    """The steps this configuration has: a warm start only where it trains a backbone."""
    return [name for name in order(config) if name != "warmstart" or config.backbone.train]


def first_open(config: Config) -> int:
    """The index in `steps` of the first step whose artifact is not complete; their number where all are."""
    # A step's fingerprint is known once its predecessor is made: so one after the other, up to the first that is open.
    names = steps(config)
    return next((index for index, name in enumerate(names) if not STEPS[name](config).complete()), len(names))


def plan(config: Config) -> list[str]:
    """The plans of all steps, in order; of the first alone where it has files to fetch. Makes nothing."""
    parts.check(config)
    if hub.missing(config.data):
        return [*prepare.plan(config), "the other steps have their plans once these files are there"]
    lines: list[str] = []
    for name in order(config):
        try:
            lines += importlib.import_module(f"workflows.{name}").plan(config)
        except locate.NotHere as waits:  # weights that a dry run does not fetch
            return [*lines, str(waits)]
    return lines


def run(config: Config) -> str:
    """Makes what is not complete, in order. Returns the place of results.json."""
    parts.check(config)  # before hours that would end in it
    prepare.fetch(config)
    names, start = steps(config), first_open(config)
    for name in names[:start]:
        print(f"{name}: complete", file=sys.stderr)
    if start == len(names):
        result = evaluation.publish(config, lineage.results(config))
        evaluation.check_regressions(config)
        return result
    with tracking.step(config, "nightly"):
        for name in names[start:]:
            print(f"{name} ...", file=sys.stderr)
            result = importlib.import_module(f"workflows.{name}").run(config)
        evaluation.check_regressions(config)
    return result  # evaluate's


if __name__ == "__main__":
    sys.exit(cli.main(__doc__, plan, run))
