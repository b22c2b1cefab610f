"""Runs the variants of a configuration for several seeds, and sets them in one table with intervals.

    python workflows/ablate.py --config configs/ablation.yaml
    python workflows/ablate.py --config configs/ablation.yaml --dry-run        # the rows, and what each still needs

Each variant is a whole run (prepare, warmstart, encode, train, evaluate) under one root: artifacts with the same fingerprint are made
once and shared. INTRA's figures are compared, or those of a row's own `evaluate.methods`. Writes <root>/ablation/results.json and
table.md, logs each row to MLflow, prints the table, and the path of results.json as its last line. What is complete is not run again.
"""

from __future__ import annotations

import importlib
import io
import sys

import pyarrow.parquet as pq

from intra import cli, lineage, storage, tracking
from intra import config as configuration
from intra.config import Config
from intra.errors import UserError
from intra.evaluation import ablation, expectations, metrics, parts, results
from intra.evaluation import run as evaluation
from workflows import evaluate, nightly

SHOWN = ("complete_recall_at_5", "em")


def variants(config: Config) -> dict[str, dict[int, Config]]:
    """Ablation row -> seed -> configuration. Raises UserError where there is none, or an override is wrong."""
    if config.ablation is None:
        raise UserError("the configuration has no ablation section; see configs/ablation.yaml")
    rows = {
        row: {
            seed: configuration.varied(config, [f"seed={seed}", "evaluate.methods=[intra]", *overrides]) for seed in config.ablation.seeds
        }
        for row, overrides in config.ablation.rows.items()
    }
    for by_seed in rows.values():
        for variant in by_seed.values():
            parts.check(variant)
    return rows


def plan(config: Config) -> list[str]:
    """A line per row: which steps its seeds still need. Makes nothing."""
    lines = []
    for row, by_seed in variants(config).items():
        needs = {seed: _needs(variant) for seed, variant in by_seed.items()}
        lines.append(f"ablate: {row}: " + "; ".join(f"seed {seed} {', '.join(names) or 'complete'}" for seed, names in needs.items()))
    return lines


def _needs(config: Config) -> list[str]:
    return nightly.steps(config)[nightly.first_open(config) :]


def run(config: Config) -> str:
    """Makes what is missing of every variant, then the table. Returns the place of the records."""
    rows = variants(config)
    tables: dict[str, dict[int, ablation.Table]] = {}
    with tracking.step(config, "ablate") as parent:
        for number, (row, by_seed) in enumerate(rows.items(), start=1):
            with parent.child(row, {"row": row}) as child:
                for seed, variant in by_seed.items():
                    print(f"ablate: row {number} of {len(rows)}, {row}, seed {seed}", file=sys.stderr)
                    tables.setdefault(row, {})[seed] = _table(variant)
                own = ablation.records({row: tables[row]}, _names(config), config.evaluate.bootstrap)
                child.log_metrics({f"{record['benchmark']}/{record['metric']}": record["value"] for record in own})
        found = ablation.records(tables, _names(config), config.evaluate.bootstrap)
        names = [name for name in SHOWN if any(record["metric"] == name for record in found)]
        text = "\n\n".join(f"{results.title(name)}\n\n{ablation.markdown(found, name)}" for name in names)
        folder = storage.join(storage.absolute(config.root), "ablation")
        storage.write_json(storage.join(folder, evaluation.RESULTS), found)
        storage.write_bytes(storage.join(folder, "table.md"), f"{text}\n".encode())
        parent.log_artifact(f"{text}\n", "table.md")
    print(text)
    judged = [r for place in config.evaluate.expected for r in expectations.judge(found, expectations.load(place), "rows")]
    if judged:
        print("", *expectations.text(judged), sep="\n")
    return storage.join(folder, evaluation.RESULTS)


def _names(config: Config) -> list[str]:
    return [*metrics.names(config.evaluate.k), "em", "f1"]


def _table(config: Config) -> ablation.Table:
    """The per-question values of the variant's first method, made where they are missing."""
    for name in nightly.steps(config)[nightly.first_open(config) : -1]:
        importlib.import_module(f"workflows.{name}").run(config)
    evaluate.make(config)
    table = pq.read_table(io.BytesIO(storage.read_bytes(lineage.results(config).path("per_question.parquet"))))
    return [item for item in table.to_pylist() if item["method"] == config.evaluate.methods[0]]


if __name__ == "__main__":
    sys.exit(cli.main(__doc__, plan, run))
