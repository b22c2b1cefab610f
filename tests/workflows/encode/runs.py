"""What the tests of encode share: a small world, its command, and what a store holds."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from intra import config as configuration
from intra import storage
from intra.artifact import Artifact
from intra.config import Config
from intra.store.format import COMMIT, POOLED, STATES, path

REPOSITORY = Path(__file__).parents[3]
CHUNKS, SHARD_CHUNKS = 160, 2  # many small shards: time to kill a run between two of them
SHARDS = CHUNKS // SHARD_CHUNKS


@dataclass
class World:
    """A configuration file, and a root that holds its dataset but no store."""

    file: Path
    root: str

    def load(self, root: str | None = None, *overrides: str) -> Config:
        return configuration.load(self.file, [f"root={root or self.root}", *overrides])

    def command(self, root: str, *overrides: str) -> list[str]:
        return [sys.executable, "workflows/encode.py", "--config", str(self.file), f"root={root}", *overrides]

    def clone(self, root: str) -> str:
        """Another root with the same dataset."""
        storage.upload(Path(self.root) / "dataset", storage.join(root, "dataset"))
        return root


@dataclass
class Head:
    pid: int
    gcs: str
    dashboard: str


def contents(url: str) -> dict[str, bytes]:
    return {name: storage.read_bytes(storage.join(url, name)) for name in storage.files(url)}


def stamps(url: str, names: list[str]) -> dict[str, str]:
    return {name: storage.stamp(storage.join(url, name)) for name in names}


def environment(**changes: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {**kept, "RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0", "PATH": path, **changes}


def finish(command: list[str], **changes: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=REPOSITORY, env=environment(**changes), capture_output=True, text=True, timeout=300)


def end(processes: list[psutil.Process]) -> None:
    """Ends what a test has started, and nothing else."""
    for process in processes:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(processes, timeout=20)


def committed_files(store: Artifact) -> list[str]:
    """Of the shards that are committed now, all files."""
    names = [name.removesuffix(".json") for name in storage.names(store.path(COMMIT)) if name.endswith(".json")]
    return [path("", folder, name).removeprefix("/") for name in names for folder in (COMMIT, STATES, POOLED)]


def wait_for_jobs(head: Head) -> None:
    from ray.job_submission import JobSubmissionClient

    for _ in range(240):
        try:
            JobSubmissionClient(head.dashboard).list_jobs()
            return
        except (ConnectionError, RuntimeError):
            time.sleep(0.5)
    raise AssertionError("the job server did not start")
