"""What may happen to a run: each ends, or goes on with the same command, in the bytes of an uninterrupted one; what was committed stays.

KILL_SEEDS=20 python -m pytest tests/workflows/encode/test_faults.py -m slow -k killed_at_a_random_moment     kills the driver twenty times
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from intra import lineage, storage
from intra.store.format import COMMIT

from . import faults, proxy
from .runs import REPOSITORY, SHARDS, Head, World, committed_files, contents, end, environment, finish, stamps, wait_for_jobs

SEEDS = int(os.environ.get("KILL_SEEDS", "2"))
pytestmark = pytest.mark.slow


def joins(head: Head) -> dict[str, str]:
    wait_for_jobs(head)
    return {"RAY_ADDRESS": head.gcs, "RAY_AUTH_MODE": "disabled"}


def start(command: list[str], **changes: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command, cwd=REPOSITORY, env=environment(**changes), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )  # fmt: skip


def failing(fault: str, folder: Path, command: list[str]) -> list[str]:
    return [sys.executable, "-m", "tests.workflows.encode.faults", fault, str(folder), *command[2:]]


@pytest.mark.parametrize("seed", range(SEEDS))
def test_a_driver_killed_at_a_random_moment(world: World, reference: dict[str, bytes], head: Head, tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    when, then = chance.randrange(SHARDS + 1), chance.random()  # so many commits, and so many seconds more
    store = lineage.store(world.load(world.clone(str(tmp_path))))
    command, joined = world.command(str(tmp_path)), joins(head)
    driver = start(command, **joined)
    try:
        deadline = time.monotonic() + 300
        while len(storage.sizes(store.path(COMMIT))) < when:
            assert driver.poll() is None, driver.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.002)
        time.sleep(then)
    finally:
        driver.kill()
        driver.communicate()
    before = stamps(store.url, committed_files(store))
    done = finish(command, **joined)  # at once: its workers may still be at it
    assert done.returncode == 0, done.stderr
    assert stamps(store.url, list(before)) == before
    assert contents(store.url) == reference


def test_a_worker_killed_between_data_and_commit(world: World, reference: dict[str, bytes], head: Head, tmp_path: Path) -> None:
    store = lineage.store(world.load(world.clone(str(tmp_path / "root"))))
    done = finish(failing("die", tmp_path / "died", world.command(str(tmp_path / "root"))), **joins(head))
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "died").iterdir())) == SHARDS // 10
    assert contents(store.url) == reference


def test_all_workers_of_a_machine_killed(world: World, reference: dict[str, bytes], head: Head, tmp_path: Path) -> None:
    store = lineage.store(world.load(world.clone(str(tmp_path))))
    driver = start(world.command(str(tmp_path)), **joins(head))
    try:
        while len(storage.sizes(store.path(COMMIT))) < 20:
            assert driver.poll() is None, driver.communicate()
            time.sleep(0.002)
        machine = psutil.Process(head.pid).children(recursive=True)
        end([process for process in machine if "MapWorker" in process.name()])  # encoders and loaders
        before = stamps(store.url, committed_files(store))
        output = driver.communicate(timeout=240)
    finally:
        driver.kill()
        driver.communicate()
    assert len(before) < 3 * SHARDS
    assert driver.returncode == 0, output
    assert stamps(store.url, list(before)) == before
    assert contents(store.url) == reference


def test_a_disk_that_is_full_then_freed(world: World, reference: dict[str, bytes], head: Head, tmp_path: Path) -> None:
    root, folder = world.clone(str(tmp_path / "root")), tmp_path / "disk"
    store, joined = lineage.store(world.load(root)), joins(head)
    command = failing("full", folder, world.command(root))
    done = finish(command, **joined)
    assert done.returncode == 1
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("error: "))  # Ray may print lines of its own behind it
    assert line.startswith("error: encode, shard 000")
    assert "no space left on the device; free some and run the same command again" in line
    before = stamps(store.url, committed_files(store))
    assert 3 * faults.FULL_AFTER <= len(before) < 3 * SHARDS
    (folder / "freed").touch()
    done = finish(command, **joined)
    assert done.returncode == 0, done.stderr
    assert stamps(store.url, list(before)) == before
    assert contents(store.url) == reference


def test_two_drivers_at_once(world: World, reference: dict[str, bytes], head: Head, tmp_path: Path) -> None:
    store, joined = lineage.store(world.load(world.clone(str(tmp_path)))), joins(head)
    both = [start(world.command(str(tmp_path)), **joined) for _ in range(2)]
    ended = [(driver.communicate(timeout=240), driver.returncode) for driver in both]
    (_, errors), _ = next(item for item in ended if item[1] == 1)
    assert sorted(status for _, status in ended) == [0, 1]
    (line,) = errors.splitlines()
    assert line.startswith(f"error: store {store.url} is being made by another run (process ")
    assert contents(store.url) == reference


def test_an_s3_server_that_fails_at_a_tenth_of_the_requests(
    world: World, reference: dict[str, bytes], s3_server: str, s3_root: str, tmp_path: Path
) -> None:
    store = lineage.store(world.load(world.clone(s3_root)))
    with proxy.before(s3_server) as between:
        done = finish(failing("hasty", tmp_path / "x", world.command(s3_root)), AWS_ENDPOINT_URL=between.url)
    assert done.returncode == 0, done.stderr
    assert set(between.faults) == set(proxy.KINDS)
    assert sum(between.faults.values()) > 0.07 * between.requests
    assert contents(store.url) == reference
