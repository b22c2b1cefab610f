"""MLflow: one run per workflow step, children for its parts, a parent over the steps of a nightly.

    with tracking.step(config, "encode", artifact) as run:
        run.log_metrics({"chunks_per_second": 210.0}, step=3)

Where the runs are kept: `tracking.uri`, or, where that is null, a SQLite store beside the run: `<root>/mlflow/mlflow.db` with
artifacts in `<root>/mlflow/artifacts`. SQLite needs a local disk, so the database of an s3:// root lies in
`runs/mlflow/mlflow.db` of the working directory, and its artifacts in `<root>/mlflow/artifacts`.

An experiment holds the runs of one configuration file (`tracking.experiment` names another): nights stand side by side. The parameters of
a run are the resolved configuration; nothing of the environment is logged, and a password in a URL is masked. A step that makes an
artifact logs the machine's load too (`system/...`, every ten seconds; `tracking.system_metrics`).
A process other than the one that opened a run (a training worker) continues it with `attach(run.uri, run.run_id)`.
A store that does not answer is told at once where a run is to be opened; what is logged to an open run is tried again for `PATIENCE`
seconds, as a server is started again now and then beside hours of work. MLflow is imported only when a run is opened: it takes seconds.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import json
import logging
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from intra import cluster, storage
from intra.artifact import Artifact
from intra.config import Config
from intra.errors import UserError, WorkflowError

LOGGER = logging.getLogger(__name__)
_METRICS_A_BATCH = 1000  # MLflow's own limits of one log_batch
_PARAMS_A_BATCH = 100
_VALUE_LENGTH = 6000
_DIGEST_LENGTH = 36
PATIENCE = 300.0  # seconds that what is logged to an open run is tried for; other workers wait for the one that logs, NCCL ten minutes
PAUSE = 10.0  # seconds between two tries
COMMIT = "INTRA_COMMIT"  # the variable that names the commit of code without a repository

_current: ContextVar[Run | None] = ContextVar("run", default=None)


class Run:
    """An open MLflow run. Failures of the tracking store are `WorkflowError`s that name it."""

    def __init__(self, client: Any, uri: str, experiment_id: str, run_id: str) -> None:
        self.uri = uri
        self.run_id = run_id
        self._client = client
        self._experiment_id = experiment_id

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Numbers by name, in batches. Characters of a name that MLflow refuses (such as `@`) become `_`."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        entries = [Metric(_metric_name(name), float(value), now, step or 0) for name, value in metrics.items()]
        for start in range(0, len(entries), _METRICS_A_BATCH):
            self._call(self._client.log_batch, self.run_id, metrics=entries[start : start + _METRICS_A_BATCH])

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Settings; nested mappings are flattened to dotted names."""
        from mlflow.entities import Param

        entries = [Param(_metric_name(name), _masked(str(value))[:_VALUE_LENGTH]) for name, value in flatten(params).items()]
        for start in range(0, len(entries), _PARAMS_A_BATCH):
            self._call(self._client.log_batch, self.run_id, params=entries[start : start + _PARAMS_A_BATCH])

    def log_artifact(self, content: Path | str | bytes, name: str) -> None:
        """A file as `name` (which may hold folders): a Path is read, a str is the text itself, bytes are the bytes."""
        folder, _, base = name.rpartition("/")
        with tempfile.TemporaryDirectory() as temporary, _named(self.uri):
            file = Path(temporary) / base
            data = content.read_bytes() if isinstance(content, Path) else content
            file.write_bytes(data.encode() if isinstance(data, str) else data)
            self._call(self._client.log_artifact, self.run_id, str(file), folder or None)

    def log_input(self, name: str, digest: str, source: str) -> None:
        """A data set this run read: its name, the digest of its bytes (MLflow keeps 36 characters) and its place."""
        from mlflow.entities import Dataset, DatasetInput

        kind = "s3" if storage.is_s3(source) else "local"
        dataset = Dataset(name, digest[:_DIGEST_LENGTH], kind, json.dumps({"uri": source}), profile=json.dumps({"digest": digest}))
        self._call(self._client.log_inputs, self.run_id, [DatasetInput(dataset)])

    def register_model(self, name: str, files: Mapping[str, bytes], tags: Mapping[str, str]) -> str:
        """Files (by name; no pickle) as a version of the registered model `name`; returns the version.

        A version with the same tag `fingerprint` is that model already, and is left as it is.
        """
        self._call(_register, self._client, name)
        known: str | None = self._call(_version, self._client, name, tags["fingerprint"])
        if known is not None:
            return known
        for file, content in files.items():
            self.log_artifact(content, f"{name}/{file}")
        source = f"{self._call(self._client.get_run, self.run_id).info.artifact_uri}/{name}"
        return str(self._call(self._client.create_model_version, name, source, self.run_id, tags=dict(tags)).version)

    def tag_model(self, name: str, fingerprint: str, tags: Mapping[str, str]) -> None:
        """Tags for the version of a registered model with that fingerprint, where there is one."""
        version = self._call(_version, self._client, name, fingerprint)
        for key, value in tags.items() if version is not None else ():
            self._call(self._client.set_model_version_tag, name, version, _metric_name(key), value)

    def set_tags(self, tags: Mapping[str, str]) -> None:
        from mlflow.entities import RunTag

        self._call(self._client.log_batch, self.run_id, tags=[RunTag(name, value) for name, value in tags.items()])

    def _call(self, function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        return _patient(self.uri, lambda: function(*arguments, **named))

    @contextlib.contextmanager
    def child(self, name: str, tags: Mapping[str, str] | None = None) -> Iterator[Run]:
        """A run below this one."""
        from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

        below = {**(tags or {}), MLFLOW_PARENT_RUN_ID: self.run_id}
        made = self._call(self._client.create_run, self._experiment_id, run_name=name, tags=below)
        with _ended(Run(self._client, self.uri, self._experiment_id, made.info.run_id)) as run:
            yield run


@contextlib.contextmanager
def step(config: Config, name: str, artifact: Artifact | None = None) -> Iterator[Run]:
    """The MLflow run of a workflow step, below the run that is open already, if any; ended FAILED where the step raises.

    Tags: `step`, `commit` (see there; `changed` where files differ from it), `device`, `software`, and `fingerprint` and
    `artifact` of what the step makes. The resolved configuration is logged as parameters and as `config.json`.
    Raises WorkflowError where the tracking store cannot be reached.
    """
    tags = {"step": name, "commit": commit(), "changed": changed(), "device": device(), "software": software()}
    if artifact is not None:
        tags |= {"fingerprint": artifact.fingerprint, "artifact": artifact.url}
    parent = _current.get()
    if parent is not None:
        opened = parent.child(name, tags)
    else:
        uri, location = place(config)
        client = _client(uri)
        with _named(uri):
            experiment = _experiment(client, config, location)
            made = client.create_run(experiment, run_name=name, tags=dict(tags))
        opened = _ended(Run(client, uri, experiment, made.info.run_id))
    with opened as run:
        run.log_params(config.model_dump())
        run.log_artifact(json.dumps(resolved(config), indent=1), "config.json")
        with _system_metrics(run) if artifact is not None and config.tracking.system_metrics else contextlib.nullcontext():
            yield run


@contextlib.contextmanager
def below(run: tuple[str, str] | None) -> Iterator[None]:
    """In another process than the one that opened the run (its `uri` and `run_id`): steps opened here lie below it. None: below no run."""
    token = _current.set(None if run is None else attach(*run))
    try:
        yield
    finally:
        _current.reset(token)


def current() -> Run | None:
    """The run that is open."""
    return _current.get()


def attach(uri: str, run_id: str) -> Run:
    """The run `run_id` of another process, to log to; the process that opened it ends it."""
    client = _client(uri)
    experiment = _patient(uri, lambda: client.get_run(run_id)).info.experiment_id
    return Run(client, uri, experiment, run_id)


def place(config: Config) -> tuple[str, str | None]:
    """The tracking URI, and where artifacts of a new experiment go (None: the tracking server decides).

    Raises UserError in a submitted job whose root is on S3 and that names no server: its working directory goes with it, and its workers,
    on other machines, never see it.
    """
    artifacts = storage.join(storage.absolute(config.root), "mlflow", "artifacts")
    if config.tracking.uri is not None:
        return config.tracking.uri, None if config.tracking.uri.startswith(("http://", "https://", "databricks")) else artifacts
    if storage.is_s3(config.root) and cluster.joined():
        raise UserError(f"tracking.uri: a submitted job with root={config.root} needs an MLflow server; set tracking.uri=http://HOST:5000")
    folder = Path.cwd() / "runs" / "mlflow" if storage.is_s3(config.root) else Path(storage.absolute(config.root)) / "mlflow"
    return f"sqlite:///{folder / 'mlflow.db'}", artifacts


def how_to_open(config: Config) -> str:
    """One line for the user: the tracking store and the command that shows it."""
    uri = _masked(place(config)[0])
    return uri if uri.startswith(("http://", "https://")) else f"{uri}  (mlflow ui --backend-store-uri {uri})"


def resolved(config: Config) -> dict[str, Any]:
    """The resolved configuration as plain values, with passwords in URLs masked: what is stored beside an output."""
    values = config.model_dump()
    if config.tracking.uri is not None:
        values["tracking"]["uri"] = _masked(config.tracking.uri)
    return values


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def commit() -> str:
    """The git commit of this code; where it has no repository, as in an image or a job's working directory, what INTRA_COMMIT says, else
    "unknown"."""
    return (_git("rev-parse", "HEAD") or os.environ.get(COMMIT) or "unknown").strip()


def changed() -> str:
    """Whether files of the code differ from `commit`: "yes", "no", or "unknown" outside a repository."""
    found = _git("status", "--porcelain", "--untracked-files=no")
    return "unknown" if found is None else "yes" if found.strip() else "no"


def _git(*arguments: str) -> str | None:
    """What git says of the repository that holds this code; None where none does: another's around an installed copy is not asked."""
    here = Path(__file__)
    try:
        for command in (["ls-files", "--error-unmatch", here.name], arguments):
            found = subprocess.run(["git", *command], cwd=here.parent, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return found


@functools.cache
def device() -> str:
    """The GPUs of this machine, or its processor: "2 x NVIDIA H100 80GB HBM3", "2 cores of Intel(R) Xeon(R) ..."."""
    try:
        command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        names = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.split("\n")
        counts = {name: names.count(name) for name in names if name}
        if counts:
            return ", ".join(f"{count} x {name}" for name, count in counts.items())
    except (OSError, subprocess.SubprocessError):
        pass  # no GPU, or no driver for it
    models = []
    with contextlib.suppress(OSError):
        models = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return f"{os.cpu_count()} cores of {models[0] if models else platform.processor() or platform.machine()}"


@functools.cache
def software() -> str:
    """Python and the libraries that compute: "python 3.11.7, torch 2.13.0, ..."."""
    names = ("torch", "transformers", "sentence-transformers", "ray", "numpy", "bm25s", "faiss-cpu", "faiss-gpu")
    found = [f"python {platform.python_version()}"]
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found.append(f"{name} {importlib.metadata.version(name)}")
    return ", ".join(found)


def model_name(config: Config) -> str:
    """Of the registered model that holds this configuration's retrievers."""
    return f"{config.tracking.experiment or 'intra'}-retriever"


@contextlib.contextmanager
def _system_metrics(run: Run) -> Iterator[None]:
    """Logs processor, memory, disk, network and, where there are any, GPUs of this machine while the step runs."""
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    with _named(run.uri):
        monitor = SystemMetricsMonitor(run.run_id, tracking_uri=run.uri)
        monitor.start()
    try:
        yield
    finally:
        monitor.finish()


def _version(client: Any, name: str, fingerprint: str) -> str | None:
    """The version of a registered model with this tag."""
    found = client.search_model_versions(f"name = '{name}'")
    return next((str(one.version) for one in found if one.tags.get("fingerprint") == fingerprint), None)


def _register(client: Any, name: str) -> None:
    """Makes the registered model where there is none."""
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name, description="Retrieval tokens and layer and head weights of INTRA (safetensors).")
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


@contextlib.contextmanager
def _ended(run: Run) -> Iterator[Run]:
    """The run as the one that is open; ended as FINISHED, FAILED or KILLED."""
    token = _current.set(run)
    try:
        yield run
    except BaseException as error:
        status = "FAILED" if isinstance(error, Exception) else "KILLED"
        try:
            run._client.set_terminated(run.run_id, status)  # no patience: the store may be what failed, or the user waits for the end
        except Exception as second:  # the step's own error matters more than that of the tracking store
            LOGGER.warning("MLflow run %s could not be ended as %s: %s", run.run_id, status, _one_line(second))
        raise
    finally:
        _current.reset(token)
    run._call(run._client.set_terminated, run.run_id, "FINISHED")


def _client(uri: str) -> Any:
    os.environ["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"] = "false"
    # A server that does not answer must fail the step in seconds, before hours of work; by default MLflow retries for minutes. Those of an
    # open run are spent in `_patient`, which says so.
    for name, value in {
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
        "MLFLOW_LOGGING_LEVEL": "WARNING",
    }.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient

    logging.getLogger("alembic").setLevel(logging.WARNING)
    for name in ("mlflow", "sqlalchemy.engine", "alembic"):  # each with a handler of its own, which MLflow has just given it
        for handler in logging.getLogger(name).handlers:
            handler.addFilter(_masks)
    if uri.startswith("sqlite:///"):
        folder = Path(uri.removeprefix("sqlite:///")).parent
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            reason = f"the folder {folder} cannot be made ({error.strerror})"
            remedy = "set tracking.uri, or root where that is null, to a place that can be written to"
            raise UserError(f"MLflow store {_masked(uri)}: {reason}; {remedy}") from error
    with _named(uri):
        return MlflowClient(tracking_uri=uri)


def _experiment(client: Any, config: Config, location: str | None) -> str:
    name = config.tracking.experiment or "intra"
    found = client.get_experiment_by_name(name)
    if found is not None and config.tracking.uri is None and found.artifact_location.removeprefix("file://") != location:
        # The experiment was made for another root (or this root has moved): its artifacts would land there.
        name = f"{name} {location}"
        found = client.get_experiment_by_name(name)
    return str(found.experiment_id if found is not None else client.create_experiment(name, artifact_location=location))


@contextlib.contextmanager
def _named(uri: str) -> Iterator[None]:
    try:
        yield
    except _errors() as error:
        raise _failed(uri, error) from _cause(uri, error)


def _patient(uri: str, call: Callable[[], Any]) -> Any:
    """What `call` returns. A store that does not answer is tried again for PATIENCE seconds, which is said once.

    Raises WorkflowError when they are over, or where another try would help nothing.
    """
    deadline, told = time.monotonic() + PATIENCE, False
    while True:
        try:
            return call()
        except _errors() as error:
            if not _passes(error) or time.monotonic() + PAUSE > deadline:
                raise _failed(uri, error) from _cause(uri, error)
            if not told:
                line = f"MLflow store {_masked(uri)}: {_one_line(error)}; it is tried again for up to {PATIENCE / 60:g} minutes"
                print(line, file=sys.stderr, flush=True)
                told = True
        time.sleep(PAUSE)


def _errors() -> tuple[type[Exception], ...]:
    from mlflow.exceptions import MlflowException
    from requests.exceptions import RequestException
    from sqlalchemy.exc import SQLAlchemyError

    return MlflowException, RequestException, SQLAlchemyError, OSError


def _passes(error: Exception) -> bool:
    """Whether it may be over in a minute: no answer, or a server or database that is out of order; not one that refuses."""
    from mlflow.exceptions import MlflowException
    from requests.exceptions import RequestException

    if isinstance(error, MlflowException):
        status = int(error.get_http_status_code())  # 500 of a request that was not answered
    elif isinstance(error, RequestException):
        status = error.response.status_code if error.response is not None else 500
    else:
        return not isinstance(error, OSError)  # of a database; else of a file
    return status in (408, 429, 500, 502, 503, 504)


def _failed(uri: str, error: Exception) -> WorkflowError:
    return WorkflowError(f"MLflow store {_masked(uri)}: {_one_line(error)}; check tracking.uri, or leave it null for a local store")


def _cause(uri: str, error: Exception) -> Exception | None:
    """The error, for a traceback; None where its text would tell a password."""
    return error if _masked(uri) == uri else None


def _one_line(error: Exception) -> str:
    return _masked(" ".join(str(error).split()))[:300]


def _metric_name(name: str) -> str:
    return re.sub(r"[^\w./ :-]", "_", name)


_IN_URL = re.compile(r"(?<=://)[^/\s]*@")
_IN_QUERY = re.compile(r"([?&][\w.-]*(?:password|passwd|pwd|token|secret|access_key)=)[^&\s]+", re.IGNORECASE)


def _masked(text: str) -> str:
    """The text without the passwords in its URLs."""
    return _IN_QUERY.sub(r"\1***", _IN_URL.sub("***@", text))


def _masks(record: logging.LogRecord) -> bool:
    """A filter of log handlers: no password in a URL is printed."""
    try:
        record.msg, record.args = _masked(record.getMessage()), None
    except (TypeError, ValueError):
        return True  # arguments that do not fit the message: the handler tells of it
    if record.exc_info:
        record.exc_text = _masked(record.exc_text or logging.Formatter().formatException(record.exc_info))
    return True
