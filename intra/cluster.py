"""The Ray cluster a workflow runs on: the one it was submitted to, or a local one of its own."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import socket
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from intra import storage
from intra.config import Config
from intra.errors import UserError, WorkflowError

DEATHS = 2  # of its actor that a row of Ray Data outlives
FAILURE = "failure.json"  # below a training's folder: what no retry mends
STARTS = 3  # of a local Ray that is slow to come up
CARRIED = ("HF_HUB_OFFLINE",)  # of this process's environment, for the workers of a cluster it has joined; of a local Ray they inherit it
# glibc gives a batch's freed memory back to the system, and the next batch faults it in again, page by page: 401,000 faults and .8 s of the
# 32 in which a worker encoded 512 chunks of configs/benchmark.yaml; with these 37,000 and .3 s.
ALLOCATOR = {"MALLOC_ARENA_MAX": "1", "MALLOC_TRIM_THRESHOLD_": str(2**30), "MALLOC_MMAP_THRESHOLD_": str(2**30)}
LOCAL_OBJECT_STORE = 512 * 1024**2  # bytes; states never travel through the object store


def connect(config: Config | None = None) -> None:
    """Connects this process to Ray, once. A submitted job (RAY_ADDRESS) joins its cluster; otherwise Ray starts here.

    A local Ray counts as many logical CPUs as the largest step of `config` asks for (at least those of the machine), and two to
    spare: actors that hold every CPU would leave none for reading and hang the job. Raises WorkflowError where Ray cannot be
    reached or started.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    joins = joined()
    if not joins:
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # no token file for a cluster that ends with this process
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # Ray Data's actors trip a harmless check that prints as an error
    import ray

    if ray.is_initialized():
        return
    # "local", said plainly: without it Ray joins whatever cluster another user of this machine has started last.
    settings: dict[str, Any] = {"address": _reached(os.environ["RAY_ADDRESS"]), **_carried()} if joins else {
        "address": "local",
        "num_cpus": _logical_cpus(config),
        "object_store_memory": LOCAL_OBJECT_STORE,
        "include_dashboard": False,
        "log_to_driver": False,
    }  # fmt: skip
    for left in reversed(range(STARTS)):
        try:
            ray.init(logging_level=logging.WARNING, **settings)
            return
        except Exception as error:  # also of no kind of its own, where a node has not come up within 30 s, as on a busy machine
            ray.shutdown()
            if not joins and left and type(error) is Exception:
                print(f"a local Ray did not come up ({' '.join(str(error).split())[:300]}); it is started again", file=sys.stderr)
                continue
            if joins:
                failed = f"the cluster at RAY_ADDRESS={os.environ['RAY_ADDRESS']} cannot be joined"
                remedy = "check it, or unset RAY_ADDRESS to run here"
            else:
                failed, remedy = "a local Ray cannot be started", "end other work on this machine and run the same command again"
            raise WorkflowError(f"{failed}: {' '.join(str(error).split())[:300]}; {remedy}") from error


def _carried() -> dict[str, Any]:
    """The runtime environment that hands CARRIED on, beside what the job was submitted with."""
    found = {name: os.environ[name] for name in CARRIED if name in os.environ}
    if found:
        os.environ["RAY_OVERRIDE_JOB_RUNTIME_ENV"] = "1"  # the job may name the same variable: Ray refuses that otherwise
    return {"runtime_env": {"env_vars": found}} if found else {}


def _reached(address: str) -> str:
    """The cluster's address, once its port answers: Ray itself tries for minutes, page after page, before it gives up."""
    host, _, port = address.rpartition(":")
    if address.startswith("http"):
        raise UserError(f"RAY_ADDRESS={address} is the address of a job server; use `ray job submit`, or unset RAY_ADDRESS to run here")
    if host and port.isdigit() and "/" not in host:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
        except OSError as error:
            raise WorkflowError(
                f"the cluster at RAY_ADDRESS={address} cannot be reached ({error}); check it, or unset RAY_ADDRESS"
            ) from error
    return address


def _logical_cpus(config: Config | None) -> int:
    cpus = os.cpu_count() or 1
    if config is not None:
        steps = (config.backbone.warmstart, config.store, config.retriever.train, config.retriever.search, config.evaluate)
        cpus = max(cpus, *(part.workers * part.threads for part in steps))
    return cpus + 2


def joined() -> bool:
    """True in a job that was submitted to a cluster."""
    return bool(os.environ.get("RAY_ADDRESS"))


def resources() -> dict[str, float]:
    """CPUs and GPUs of the cluster as it stands, this process's among them: {"CPU": n, "GPU": m}."""
    import ray

    found = ray.cluster_resources()
    return {name: float(found.get(name, 0)) for name in ("CPU", "GPU")}


def fits(worker: Mapping[str, float]) -> int:
    """How many workers of such a size ({"CPU": n, "GPU": m}) the machines of the cluster hold, as they stand, beside this process."""
    import ray

    own, held = _held()
    wants = {name: amount for name, amount in worker.items() if amount}
    total = 0
    for node in ray.nodes():
        if node["Alive"]:
            mine = held if node["NodeID"] == own else {}
            free = {name: max(0.0, node["Resources"].get(name, 0) - mine.get(name, 0)) for name in wants}
            total += min(int(free[name] / amount + 1e-9) for name, amount in wants.items())
    return total


def _held() -> tuple[str, dict[str, float]]:
    """This process's machine, and what it keeps of it from others: what Ray gave to the task it is, as of `apart`.

    But its CPUs: Ray lends them out while the task waits for others.
    """
    import ray

    if not ray.is_initialized() or ray.get_runtime_context().worker.mode != ray.WORKER_MODE:
        return "", {}  # a driver, to which Ray gives nothing
    context = ray.get_runtime_context()
    return context.get_node_id(), {name: amount for name, amount in context.get_assigned_resources().items() if name != "CPU"}


def amounts(worker: Mapping[str, float]) -> str:
    """{"CPU": 2.0, "GPU": 1.0} in words: 2 CPU and 1 GPU. What a worker asks none of is left out."""
    return " and ".join(f"{amount:g} {kind}" for kind, amount in worker.items() if amount)


def here() -> str:
    """What the cluster has, in words, a GPU that is not there too: 7 CPU and 1 GPU (this process holds 1 GPU)."""
    found = resources()
    held = amounts({kind: amount for kind, amount in _held()[1].items() if kind in found})
    return " and ".join(f"{amount:g} {kind}" for kind, amount in found.items()) + (f" (this process holds {held})" if held else "")


def wait_for(worker: Mapping[str, float], wanted: int, minutes: float, name: str, remedy: str, least: int = 1) -> None:
    """Returns once the cluster holds `least` such workers ({"CPU": n, "GPU": m}); an autoscaler is asked for `wanted` of them.

    Raises UserError, with the `remedy` for the setting `name`, where it does not within so many minutes.
    """
    deadline = time.monotonic() + 60 * minutes
    asked = False
    while (found := fits(worker)) < least:
        few = f"no worker of {amounts(worker)} fits" if least == 1 else f"{found} of {least} workers of {amounts(worker)} fit"
        if time.monotonic() >= deadline:
            raise UserError(
                f"{name}: {few}: there are {here()} here; {remedy}, add machines, or set cluster.wait_minutes where an autoscaler adds them"
            )
        if not asked:
            print(f"{name}: {few} as yet; waiting up to {minutes:g} minutes", file=sys.stderr)
            ask_for(worker, wanted)
            asked = True
        time.sleep(5)  # Ray tells nobody of a machine that joins: it has to be asked; machines take minutes
    if asked:
        ask_for(worker, 0)


def apart(work: Callable[..., Any], *arguments: Any, worker: Mapping[str, float], name: str) -> Any:
    """What `work(*arguments)` returns, done in one process of the cluster that has `worker` ({"CPU": n, "GPU": m}) to itself.

    The driver of a submitted job runs on the cluster's head, which has neither GPU nor memory for a model. Raises what `work` raises, if it
    is a UserError or WorkflowError; else WorkflowError, also where the process was lost.
    """
    import ray
    from ray.exceptions import RayError, RayTaskError

    task = ray.remote(num_cpus=worker.get("CPU", 1), num_gpus=worker.get("GPU", 0), max_retries=0)(work)
    try:
        return ray.get(task.remote(*arguments))
    except RayTaskError as error:
        if isinstance(error.cause, UserError | WorkflowError):
            raise type(error.cause)(str(error.cause)) from error
        print(error, file=sys.stderr)  # not foreseen: where it happened matters
        reason = f"{type(error.cause).__name__}: {' '.join(str(error.cause).split())[:300]}"
        raise WorkflowError(f"{name}: {reason}; run the same command again") from error
    except RayError as error:
        reason = " ".join(str(error).split())[:300]
        raise WorkflowError(f"{name}: the process on the cluster was lost ({reason}); run the same command again") from error


def ask_for(worker: Mapping[str, float], count: int) -> None:
    """Tells the autoscaler, where there is one, that so many workers are wanted; 0 takes it back."""
    from ray.autoscaler.sdk import request_resources

    request_resources(bundles=[{name: amount for name, amount in worker.items() if amount}] * count)


def quiet_data() -> None:
    """Keeps Ray Data's own bars and reports off the terminal; its log file (ray-data.log of the session) has them still.

    In the log of a job its errors stay: there they tell which machine was lost.
    """
    from ray.data import DataContext

    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.max_errored_blocks = -1  # rows whose worker died again and again are left out; who asked for them sees that they lack
    for handler in logging.getLogger("ray.data").handlers:
        if handler.name == "console":
            handler.setLevel(logging.ERROR if joined() else logging.CRITICAL + 1)


def stage(rows: Any, build: tuple[Any, ...], pool: Any, cpus: float, gpus: float = 0) -> Any:
    """A Ray Data set whose rows a `Stage` of `build` (class, arguments) maps, in actors of `pool` with so many CPUs and GPUs each.

    A row outlives DEATHS of its actor; then it is left out.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ray's plan to drop remote arguments: it offers no other way to end the retries
        return rows.map(
            Stage, fn_constructor_args=build, compute=pool, num_cpus=cpus, num_gpus=gpus or None, max_task_retries=DEATHS,
            runtime_env={"env_vars": ALLOCATOR},
        )  # fmt: skip


class Stage:
    """A stage of a Ray Data pipeline that hands its failure on as a row, for the driver to raise as one line (`check`).

    An exception raised in an actor reaches the driver as pages of several processes' stack traces, and one of its construction
    only as text. Built from a class whose instances map a row (a mapping) to a row. A failure is `fatal` where no other row would fare
    better: of the construction, a user's mistake, a full disk.
    """

    def __init__(self, build: Callable[..., Callable[[Mapping[str, Any]], dict[str, Any]]], *arguments: Any) -> None:
        self._failure: dict[str, Any] | None = None
        try:
            self._work = build(*arguments)
        except Exception as error:
            self._failure = {**_failure(error), "fatal": True}

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        if "failure" in row:  # of a stage before
            return row
        if self._failure is not None:
            return {**row, **self._failure}
        try:
            return self._work(row)
        except Exception as error:
            return {**row, **_failure(error)}


def _failure(error: Exception) -> dict[str, Any]:
    full = isinstance(error.__cause__, OSError) and error.__cause__.errno in (errno.ENOSPC, errno.EDQUOT)
    if isinstance(error, UserError | WorkflowError):
        mistake = isinstance(error, UserError)
        return {"failure": str(error), "mistake": mistake, "fatal": mistake or full}
    traceback.print_exception(error)  # in the worker's log: this one was not foreseen
    reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]} (on {socket.gethostname()})"
    return {"failure": reason, "mistake": False, "fatal": False}


def forget_failure(folder: str) -> None:
    """Before a training begins, on the driver: what an earlier run could not do is tried again."""
    storage.remove(storage.join(folder, FAILURE))


@contextlib.contextmanager
def final_failures(folder: str, run: str) -> Iterator[None]:
    """Around the work of a worker of Ray Train, which starts all workers again where one raises: what a retry cannot mend is done once.

    That is a UserError, and a WorkflowError that no other error led to, such as a loss that is not finite. It is noted below the training's
    `folder`; workers that find a note of this run (the id of its MLflow run) raise what it says, before they load anything.
    """
    place, found = storage.join(folder, FAILURE), None
    with contextlib.suppress(FileNotFoundError):
        found = storage.read_json(place)
    if found is not None and found["run"] == run:
        raise (UserError if found["type"] == UserError.__name__ else WorkflowError)(found["message"])
    try:
        yield
    except (UserError, WorkflowError) as error:
        mistake = isinstance(error, UserError)
        if mistake or (error.__cause__ is None and error.__context__ is None):
            kind = UserError if mistake else WorkflowError
            try:
                storage.write_json(place, {"run": run, "type": kind.__name__, "message": str(error)})
            except (UserError, WorkflowError) as second:  # the training's own error matters more
                print(f"{second}; the training is tried again, though that will not mend it", file=sys.stderr)
        raise


def training_failed(name: str, error: Exception) -> UserError | WorkflowError:
    """What to raise for Ray Train's `error`, in one line: what a worker said that raised one of our errors, else the first exception.

    Ray's own text is pages of stack traces, the reason at their end.
    """
    failures = [getattr(failure, "_base_exc", failure) for failure in getattr(error, "worker_failures", {}).values()]
    for failure in failures:
        if isinstance(failure, UserError):
            return UserError(f"{name}: {failure}")
    told = next((str(failure) for failure in failures if isinstance(failure, WorkflowError)), None)
    first = failures[0] if failures else error
    reason = told or f"{type(first).__name__}: {' '.join(str(first).split())[-600:]}"
    return WorkflowError(f"{name}: {reason}; the same command goes on from the last checkpoint")


def check(row: Mapping[str, Any], name: str) -> None:
    """Raises what a `Stage` has handed on: UserError for the user's mistake, else WorkflowError, naming the piece of work."""
    if row.get("failure") is not None:
        raise (UserError if row["mistake"] else WorkflowError)(f"{name}: {row['failure']}")
