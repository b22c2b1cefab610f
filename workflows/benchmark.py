"""Measures what the workflows reach, as ratios taken in one run: of the limits of this machine, or of the simplest way to do the same.

    python workflows/benchmark.py encode --config configs/quickstart.yaml [section.key=value ...] [--dry-run]

`encode` times the encoding of chunks (intra/store/benchmark.py); `int8` compares rankings and answers from int8 states with those from the
store's own (intra/precision.py; needs dataset, store and retriever); `search` times the scorers of the whole pool beside their peers, what
they keep of the exact ranking, and a question end to end (intra/retrieval/benchmark.py; needs the same). Prints a table and writes the
records {name, value, unit} to <root>/benchmark/<name>.json, whose path is the last line; the same goes to MLflow. Wall times: run it on a
quiet machine.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from intra import cli, storage, tracking
from intra.config import Config
from intra.errors import UserError

Record = dict[str, Any]  # name (str), value (float), unit (str)


def _encode(config: Config) -> list[Record]:
    from intra.store import benchmark
    from workflows import encode, prepare

    os.environ.setdefault("RAY_worker_niceness", "0")  # Ray would give every other program of the machine precedence
    return benchmark.run(config, prepare.run, encode.timed, encode.fitting)


def _int8(config: Config) -> list[Record]:
    from intra import precision

    return precision.run(config)


def _search(config: Config) -> list[Record]:
    from intra.retrieval import benchmark

    return benchmark.run(config, functools.partial(storage.write_json, place(config, "search")))


BENCHMARKS: Mapping[str, Callable[[Config], list[Record]]] = {"encode": _encode, "int8": _int8, "search": _search}


def place(config: Config, name: str) -> str:
    return storage.join(storage.absolute(config.root), "benchmark", f"{name}.json")


def plan(name: str, config: Config) -> list[str]:
    """Makes nothing."""
    return [f"benchmark {name}: to be measured; writes {place(config, name)}"]


def run(name: str, config: Config) -> str:
    """Measures, prints the table. Returns the place of the records."""
    with tracking.step(config, f"benchmark {name}") as step:
        records = BENCHMARKS[name](config)
        step.log_metrics({record["name"]: record["value"] for record in records})
        storage.write_json(place(config, name), records)
    print(table(records))
    return place(config, name)


def table(records: Sequence[Record]) -> str:
    width = max((len(record["name"]) for record in records), default=0)
    return "\n".join(f"{record['name']:{width}}  {record['value']:>12,.4g} {record['unit']}".rstrip() for record in records)


def _refuse(name: str) -> None:
    raise UserError(f"benchmark '{name}': there is no such one; name {' or '.join(BENCHMARKS)} first")


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status, as cli.main."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    name = arguments.pop(0) if arguments and arguments[0] not in ("-h", "--help") else ""
    if name not in BENCHMARKS and not {"-h", "--help"} & set(arguments):
        return cli.status(functools.partial(_refuse, name))
    return cli.main(__doc__, functools.partial(plan, name), functools.partial(run, name), arguments)


if __name__ == "__main__":
    sys.exit(main())
