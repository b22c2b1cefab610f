"""How a workflow finds its cluster, and how a stage's failure reaches the driver. Without a running Ray."""

from __future__ import annotations

import errno
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from intra import cluster, storage
from intra.config import Config
from intra.errors import UserError, WorkflowError

from .conftest import free_port


def test_a_cluster_that_does_not_answer_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    address = f"127.0.0.1:{free_port()}"
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(WorkflowError, match=f"the cluster at RAY_ADDRESS={address} cannot be reached"):
        cluster.connect()


def test_the_address_of_a_job_server_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:8265")
    with pytest.raises(UserError, match="ray job submit"):
        cluster.connect()


@pytest.mark.parametrize(("failures", "kind"), [(2, Exception), (3, Exception), (1, ConnectionError)])
def test_a_local_ray_slow_to_come_up_is_started_again(
    failures: int, kind: type[Exception], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import ray

    tried = []

    def init(**settings: Any) -> None:
        tried.append(settings["address"])
        if len(tried) <= failures:
            raise kind("The current node timed out\nduring startup.")

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if failures == 2:
        cluster.connect()
        assert tried == ["local"] * 3
        assert capsys.readouterr().err.splitlines() == [
            "a local Ray did not come up (The current node timed out during startup.); it is started again"
        ] * 2  # fmt: skip
        return
    with pytest.raises(WorkflowError, match=r"a local Ray cannot be started: The current node timed out during startup\.; end other work"):
        cluster.connect()
    assert len(tried) == (3 if kind is Exception else 1)


def test_what_a_cluster_must_know_of_this_processs_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    given: list[dict[str, Any]] = []
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **settings: given.append(settings))
    monkeypatch.setenv("RAY_OVERRIDE_JOB_RUNTIME_ENV", "0")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    cluster.connect()
    assert given[-1]["runtime_env"] == {"env_vars": {"HF_HUB_OFFLINE": "1"}}
    assert os.environ["RAY_OVERRIDE_JOB_RUNTIME_ENV"] == "1"
    monkeypatch.delenv("HF_HUB_OFFLINE")
    cluster.connect()
    assert "runtime_env" not in given[-1]


def test_machines_that_an_autoscaler_adds_are_waited_for(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    asked: list[int] = []
    machines = iter([0, 1, 2])
    monkeypatch.setattr(cluster, "fits", lambda worker: next(machines))
    monkeypatch.setattr(cluster, "ask_for", lambda worker, count: asked.append(count))
    monkeypatch.setattr(cluster, "resources", lambda: {"CPU": 4.0, "GPU": 0.0})
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    worker = {"CPU": 1.0, "GPU": 1.0}
    cluster.wait_for(worker, 3, 1, "store.workers", "lower store.threads", least=2)
    assert asked == [3, 0]
    line = "store.workers: 0 of 2 workers of 1 CPU and 1 GPU fit as yet; waiting up to 1 minutes\n"
    assert capsys.readouterr().err == line
    monkeypatch.setattr(cluster, "fits", lambda worker: 0)
    with pytest.raises(
        UserError, match=r"^store.workers: no worker of 1 CPU and 1 GPU fits: there are 4 CPU and 0 GPU here; lower store.threads, add"
    ):
        cluster.wait_for(worker, 3, 0, "store.workers", "lower store.threads")


class Failed(Exception):
    """As Ray Train raises it: the workers' exceptions by rank."""

    def __init__(self, **failures: Exception) -> None:
        super().__init__("Training failed due to worker errors:\n" + "a stack trace\n" * 100)
        self.worker_failures = dict(enumerate(failures.values()))


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (Failed(a=UserError("no such key; mend it")), UserError, "train x: no such key; mend it"),
        (Failed(a=RuntimeError("peer gone"), b=WorkflowError("shard 3 is damaged")), WorkflowError,
         "train x: shard 3 is damaged; the same command goes on from the last checkpoint"),
        (Failed(a=ValueError("a\nb")), WorkflowError, "train x: ValueError: a b; the same command goes on from the last checkpoint"),
        (RuntimeError("the controller died"), WorkflowError,
         "train x: RuntimeError: the controller died; the same command goes on from the last checkpoint"),
    ],
)  # fmt: skip
def test_why_a_training_failed_is_one_line(error: Exception, kind: type[Exception], message: str) -> None:
    found = cluster.training_failed("train x", error)
    assert type(found) is kind
    assert str(found) == message


def test_a_worker_of_ray_train_tells_its_own_exception() -> None:
    from ray.train import WorkerGroupError
    from ray.train.v2._internal.exceptions import UserExceptionWithTraceback

    wrapped = UserExceptionWithTraceback(UserError("no such key; mend it"), "Traceback: pages")
    assert str(cluster.training_failed("train x", WorkerGroupError("pages", {0: wrapped}))) == "train x: no such key; mend it"


@pytest.mark.parametrize("kind", [UserError, storage.NotAFolder, WorkflowError])
def test_what_no_retry_mends_is_done_once_in_a_run(kind: type[Exception], root: str) -> None:
    with pytest.raises(kind, match="no such key"), cluster.final_failures(root, "r1"):
        raise kind("no such key; mend it")
    told = WorkflowError if kind is WorkflowError else UserError
    assert storage.read_json(f"{root}/failure.json") == {"run": "r1", "type": told.__name__, "message": "no such key; mend it"}
    for _ in range(2):  # every rank, in every retry
        with pytest.raises(told, match="no such key; mend it"), cluster.final_failures(root, "r1"):
            pytest.fail("it must not begin")
    with cluster.final_failures(root, "r2"):  # another run than the one that noted it
        pass
    cluster.forget_failure(root)
    cluster.forget_failure(root)
    assert storage.names(root) == []


def lost(error: Exception) -> None:
    try:
        raise OSError("connection reset")
    except OSError as reason:
        raise error from reason if isinstance(error, WorkflowError) else None


@pytest.mark.parametrize("error", [RuntimeError("peer gone"), WorkflowError("the bucket does not answer")])
def test_what_a_retry_may_mend_is_done_again(error: Exception, tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(type(error)), cluster.final_failures(str(tmp_path), "r1"):
            lost(error)
    assert list(tmp_path.iterdir()) == []


def test_a_failure_that_cannot_be_noted_hides_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(url: str, content: bytes) -> None:
        raise WorkflowError(f"{url}: no space left on the device")

    monkeypatch.setattr(storage, "write_bytes", full)
    with pytest.raises(UserError, match="no such key; mend it"), cluster.final_failures(str(tmp_path), "r1"):
        raise UserError("no such key; mend it")
    assert capsys.readouterr().err.startswith(f"{tmp_path}/failure.json: no space left on the device; the training is tried again")


def test_logical_cpus_leave_some_to_spare() -> None:
    config = Config.model_validate({"root": "r", "store": {"workers": 50, "threads": 3}})
    assert cluster._logical_cpus(config) == 152
    assert cluster._logical_cpus(None) >= 3


class Work:
    def __init__(self, error: Exception | None) -> None:
        self.error = error

    def __call__(self, row: Mapping[str, Any]) -> dict[str, Any]:
        if self.error is not None:
            raise self.error
        return {"done": row["shard"]}


class Broken:
    def __init__(self) -> None:
        raise WorkflowError("no such digest")


def test_a_stage_works() -> None:
    row = cluster.Stage(Work, None)({"shard": 3})
    assert row == {"done": 3}
    cluster.check(row, "shard 3")


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (UserError("bad key"), UserError, "shard 3: bad key"),
        (WorkflowError("disk full"), WorkflowError, "shard 3: disk full"),
        (RuntimeError("two\nlines"), WorkflowError, f"shard 3: RuntimeError: two lines (on {socket.gethostname()})"),
    ],
)
def test_a_failure_of_any_stage_reaches_the_driver(error: Exception, kind: type[Exception], message: str) -> None:
    row = cluster.Stage(Work, error)({"shard": 3})
    row = cluster.Stage(Work, None)(row)  # the next stage leaves it alone
    assert row["shard"] == 3
    with pytest.raises(kind) as caught:
        cluster.check(row, "shard 3")
    assert str(caught.value) == message


def test_a_failed_construction_reaches_the_driver() -> None:
    row = cluster.Stage(Broken)({"shard": 3})
    assert row["fatal"]
    with pytest.raises(WorkflowError, match="shard 3: no such digest"):
        cluster.check(row, "shard 3")


def full_disk(number: int) -> WorkflowError:
    error = WorkflowError("no space left on the device")
    error.__cause__ = OSError(number, "No space left on device")
    return error


FULL = [(full_disk(errno.ENOSPC), True), (full_disk(errno.EDQUOT), True)]  # the second: of a quota


@pytest.mark.parametrize(("error", "fatal"), [(WorkflowError("this shard"), False), *FULL, (UserError("no such file"), True)])
def test_a_failure_is_fatal_where_no_other_row_would_fare_better(error: Exception, fatal: bool) -> None:
    assert cluster.Stage(Work, error)({"shard": 3})["fatal"] is fatal
