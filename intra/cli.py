"""The command line that every workflow shares.

    python workflows/<name>.py --config FILE [section.key=value ...] [--dry-run] [--offline]

Exit status: 0 done, 1 failed, 2 the user's mistake, 3 results below expectation, 130 interrupted, 141 nobody reads the output any more.
Errors are one line on stderr.
"""

from __future__ import annotations

import argparse
import os
import select
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NoReturn

import yaml

from intra import config as configuration
from intra import tracking
from intra.backbone import locate
from intra.config import Config
from intra.errors import Regression, UserError, WorkflowError


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; usage: {self.prog} --config FILE [section.key=value ...] [--dry-run]")


def main(
    description: str | None,
    plan: Callable[[Config], Iterable[str]],
    run: Callable[[Config], object],
    arguments: Sequence[str] | None = None,
    others: Mapping[str, tuple[Callable[[Config], object], str]] | None = None,
) -> int:
    """Parses the command line, then prints the plan (`--dry-run`) or runs the workflow. Returns the exit status.

    `plan` gives the lines that say what exists and what will be made; it must make nothing. What `run` returns, if not
    None, is printed as the last line: the place of what was made. `others` are further things the workflow can do instead:
    --<name> -> (function in place of `run`, help).
    """
    parser = _Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, metavar="FILE", help="a YAML file of configs/")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--dry-run", action="store_true", help="print the resolved configuration and the plan; make nothing")
    for name, (function, text) in (others or {}).items():
        instead.add_argument(f"--{name}", dest="instead", action="store_const", const=function, help=text)
    parser.add_argument("--offline", action="store_true", help="fetch nothing from the hub, data or weights")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="replaces a value of the file")

    def work() -> object:
        options = parser.parse_intermixed_args(arguments)
        if options.offline:
            os.environ["HF_HUB_OFFLINE"] = "1"  # the hub's library reads it when it is first imported, here and in Ray's workers
            options.overrides.append("data.offline=true")
        config = configuration.load(options.config, options.overrides)
        tracking.place(config)  # a place that cannot be is refused by the plan too, and before any work
        if options.dry_run:
            print(yaml.safe_dump(tracking.resolved(config), sort_keys=False, allow_unicode=True), end="")
            print("---")
            try:
                with locate.nothing_fetched():
                    for line in plan(config):
                        print(line, flush=True)
            except locate.NotHere as waits:
                print(waits)
            return None
        return (getattr(options, "instead", None) or run)(config)

    return status(work)


def status(work: Callable[[], object]) -> int:
    """Does the work and prints what it returns, if not None, or its error in one line. Returns the exit status."""
    try:
        result = work()
        if result is not None:
            print(result)
        sys.stdout.flush()
    except BrokenPipeError:
        if not _unread():  # another pipe's
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python still holds when it ends
        return 141  # what a shell makes of SIGPIPE
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except WorkflowError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except Regression as error:
        print(f"regression: {error}", file=sys.stderr)
        return 3
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from what is complete", file=sys.stderr)
        return 130
    return 0


def _unread() -> bool:
    """Whether standard output is a pipe whose reader has gone, as `head` does."""
    output = select.poll()
    output.register(sys.stdout, 0)
    return bool(output.poll(0))
