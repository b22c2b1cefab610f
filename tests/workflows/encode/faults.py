"""encode.py with workers that fail: python -m tests.workflows.encode.faults FAULT FOLDER --config FILE ...

FOLDER is where a fault keeps what has happened. `die`: a worker ends with SIGKILL between data and commit, at every tenth shard, once.
`full`: once some shards are committed the disk is full, until FOLDER/freed is there. `hasty`: nothing fails, but nobody waits a minute for
an S3 server that does not answer.
"""

from __future__ import annotations

import builtins
import dataclasses
import errno
import functools
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import fsspec

from intra import storage
from intra.store import writer
from intra.store.format import COMMIT

FULL_AFTER = 20  # committed shards


class Die(writer.EncodeCommit):
    def __init__(self, *arguments: Any, folder: str) -> None:
        super().__init__(*arguments)
        written = storage.write_bytes

        def write_bytes(url: str, data: bytes) -> None:
            kind, name = url.split("/")[-2:]
            if kind == COMMIT and name.startswith("000") and name[4] == "7" and storage.create(f"{folder}/{name}", b""):
                os.kill(os.getpid(), signal.SIGKILL)
            written(url, data)

        storage.write_bytes = write_bytes  # of this process, a worker of this job alone


class Full(writer.EncodeCommit):
    def __init__(self, *arguments: Any, folder: str) -> None:
        super().__init__(*arguments)
        commits = self.store.path(COMMIT)

        class Cut:
            """Takes half of what is written, then there is no room."""

            def __init__(self, file: Any) -> None:
                self.file = file

            def __enter__(self) -> Cut:
                return self

            def __exit__(self, *_: object) -> None:
                self.file.close()

            def write(self, data: bytes) -> int:
                self.file.write(data[: len(data) // 2])
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        def opened(path: str, mode: str = "r", **settings: Any) -> Any:
            full = mode == "wb" and len(storage.sizes(commits)) >= FULL_AFTER and not Path(folder, "freed").exists()
            return Cut(builtins.open(path, mode, **settings)) if full else builtins.open(path, mode, **settings)

        storage.open = opened  # type: ignore[attr-defined]


def hasten() -> None:
    """Of this process: two seconds for an answer, where intra.storage waits for a minute."""
    kept = storage._s3().config_kwargs
    made = fsspec.filesystem("s3", use_listings_cache=False, config_kwargs={**kept, "read_timeout": 2})
    storage._s3 = lambda: made  # type: ignore[assignment]


class Hasty(writer.EncodeCommit):
    def __init__(self, *arguments: Any, folder: str) -> None:
        hasten()
        super().__init__(*arguments)


class HastyLoad(writer.LoadTokenize):
    def __init__(self, *arguments: Any) -> None:
        hasten()
        super().__init__(*arguments)


class Counts(writer.LoadTokenize):
    """Finds other tokens in shard 2 than the dataset states, until FOLDER/mended is there."""

    def __init__(self, *arguments: Any, folder: str) -> None:
        super().__init__(*arguments)
        self.folder, self.kept = folder, self.template

    def __call__(self, row: Any) -> writer.Row:
        odd = row["shard"] == 2 and not Path(self.folder, "mended").exists()
        self.template = f"{self.kept} more" if odd else self.kept
        return super().__call__(row)


class OnCpu(writer.EncodeCommit):
    """A worker that was given a GPU which is none: no fault, but it computes on the CPU. It waits until another one has come."""

    def __init__(self, store: Any, source: writer.Source, *arguments: Any, folder: str) -> None:
        super().__init__(store, dataclasses.replace(source, device="cpu"), *arguments)
        storage.create(f"{folder}/here/{os.getpid()}", b"")
        until = time.monotonic() + 120
        while len(storage.names(f"{folder}/here")) < 2:
            assert time.monotonic() < until, "no second worker"
            time.sleep(0.05)


FAULTS = {"die": Die, "full": Full, "hasty": Hasty}


def main(fault: str, folder: str, arguments: list[str]) -> int:
    from intra import cli
    from workflows import encode

    Path(folder).mkdir(exist_ok=True)
    writer.EncodeCommit = functools.partial(FAULTS[fault], folder=folder)  # type: ignore[misc,assignment]
    if fault == "hasty":
        hasten()
        writer.LoadTokenize = HastyLoad  # type: ignore[misc]
    return cli.main(encode.__doc__, encode.plan, encode.run, arguments)


if __name__ == "__main__":
    from tests.workflows.encode import faults  # by its name: workers import it

    sys.exit(faults.main(sys.argv[1], sys.argv[2], sys.argv[3:]))
