from __future__ import annotations

import logging
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from intra import config as configuration
from intra import tracking
from intra.artifact import Artifact
from intra.config import Config
from intra.errors import UserError, WorkflowError


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    root = tmp_path_factory.mktemp("tracking")
    return configuration.parse({"root": str(root), "tracking": {"experiment": "trial"}})


def runs(config: Config) -> list[Any]:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=tracking.place(config)[0])
    experiment = client.get_experiment_by_name(config.tracking.experiment)
    return list(client.search_runs([experiment.experiment_id], order_by=["attributes.start_time DESC"]))


def test_steps_nest_below_the_run_that_is_open(config: Config) -> None:
    with (
        tracking.step(config, "nightly") as parent,
        tracking.step(config, "encode", Artifact("store", "/data/store/ab", "ab", "encode")) as step,
        step.child("shard") as child,
    ):
        pass
    found = {run.info.run_id: run for run in runs(config)}
    assert "mlflow.parentRunId" not in found[parent.run_id].data.tags
    assert found[step.run_id].data.tags["mlflow.parentRunId"] == parent.run_id
    assert found[child.run_id].data.tags["mlflow.parentRunId"] == step.run_id
    assert found[step.run_id].data.tags["fingerprint"] == "ab"
    assert found[step.run_id].info.run_name == "encode"
    assert {run.info.status for run in found.values()} == {"FINISHED"}


def test_what_is_logged(config: Config) -> None:
    with tracking.step(config, "encode") as run:
        run.log_metrics({"recall@5": 0.5}, step=1)
        run.log_metrics({"recall@5": 0.75, "hotpotqa/bridge/em": 1.0}, step=2)
        run.log_params({"outer": {"inner": 7}})
        run.log_artifact("hello", "notes/text.txt")
        run.log_input("pool", "d1" * 32, "/data/pool.parquet")
    found = next(entry for entry in runs(config) if entry.info.run_id == run.run_id)
    assert found.data.metrics == {"recall_5": 0.75, "hotpotqa/bridge/em": 1.0}
    assert found.data.params["retriever.train.steps"] == "300"
    assert found.data.params["outer.inner"] == "7"
    dataset = found.inputs.dataset_inputs[0].dataset
    assert dataset.name == "pool"
    assert ("d1" * 32).startswith(dataset.digest)
    assert ("d1" * 32) in dataset.profile
    assert "/data/pool.parquet" in dataset.source
    artifacts = Path(found.info.artifact_uri)
    assert (artifacts / "notes" / "text.txt").read_text() == "hello"
    assert '"seed": 0' in (artifacts / "config.json").read_text()
    assert artifacts.is_relative_to(config.root)


def test_another_process_goes_on_with_a_run(config: Config) -> None:
    with tracking.step(config, "train") as run:
        tracking.attach(run.uri, run.run_id).log_metrics({"loss": 2.5}, step=3)
    assert next(entry for entry in runs(config) if entry.info.run_id == run.run_id).data.metrics == {"loss": 2.5}


def test_steps_of_another_process_lie_below_the_run_they_are_told(config: Config) -> None:
    with tracking.step(config, "nightly") as parent:
        place = (parent.uri, parent.run_id)
    with tracking.below(place), tracking.step(config, "evaluate") as step:
        pass
    with tracking.below(None), tracking.step(config, "evaluate") as alone:
        pass
    found = {run.info.run_id: run for run in runs(config)}
    assert found[step.run_id].data.tags["mlflow.parentRunId"] == parent.run_id
    assert "mlflow.parentRunId" not in found[alone.run_id].data.tags
    assert tracking.current() is None


@pytest.mark.parametrize(("error", "status"), [(UserError("no"), "FAILED"), (KeyboardInterrupt(), "KILLED")])
def test_a_step_that_raises_ends_its_run(config: Config, error: BaseException, status: str) -> None:
    with pytest.raises(type(error)), tracking.step(config, "train") as run:
        raise error
    assert next(entry for entry in runs(config) if entry.info.run_id == run.run_id).info.status == status


def test_what_identifies_a_run(config: Config) -> None:
    with tracking.step(config, "encode") as run:
        pass
    tags = next(entry for entry in runs(config) if entry.info.run_id == run.run_id).data.tags
    assert tags["step"] == "encode"
    assert tags["commit"] == tracking.commit()
    assert tags["changed"] in {"yes", "no", "unknown"}
    assert tags["device"] == tracking.device()
    assert re.match(r"\d+ (x|cores of) \S", tags["device"])
    assert re.search(r"python 3\.\d+\.\d+, torch \d", tags["software"])


def test_the_commit_of_code_without_a_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tracking.py").write_text("")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "another project's"], check=True)
    monkeypatch.delenv("INTRA_COMMIT", raising=False)
    monkeypatch.setattr(tracking, "__file__", str(tmp_path / "tracking.py"))  # an installed copy inside it
    assert (tracking.commit(), tracking.changed()) == ("unknown", "unknown")
    monkeypatch.setenv("INTRA_COMMIT", "0123abc")
    assert tracking.commit() == "0123abc"
    subprocess.run([*git, "add", "tracking.py"], check=True)
    assert (len(tracking.commit()), tracking.changed()) == (40, "yes")


def test_the_machines_load_is_logged_while_a_step_makes_something(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.1")
    artifact = Artifact("store", "/data/store/ab", "ab", "encode")
    with tracking.step(config, "encode", artifact) as run:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            found = next(entry for entry in runs(config) if entry.info.run_id == run.run_id).data.metrics
            if "system/cpu_utilization_percentage" in found:
                break
            time.sleep(0.1)
    assert found["system/system_memory_usage_megabytes"] > 0
    assert not [thread for thread in threading.enumerate() if thread.name == "SystemMetricsMonitor"]
    off = config.model_copy(update={"tracking": config.tracking.model_copy(update={"system_metrics": False})})
    with tracking.step(off, "encode", artifact), tracking.step(config, "nightly"):
        assert not [thread for thread in threading.enumerate() if thread.name == "SystemMetricsMonitor"]


def test_a_model_is_registered_once(config: Config, tmp_path: Path) -> None:
    from mlflow import MlflowClient

    name, files = tracking.model_name(config), {"model.safetensors": b"weights", "config.json": b"{}"}
    versions = []
    for mark in ("f1", "f2", "f1"):
        with tracking.step(config, "train") as run:
            versions.append(run.register_model(name, files, {"fingerprint": mark, "commit": "c"}))
    assert versions == ["1", "2", "1"]
    with tracking.step(config, "evaluate") as run:
        run.tag_model(name, "f2", {"synthetic/complete_recall_at_5": "0.977"})
        run.tag_model(name, "unknown", {"x": "y"})
    client = MlflowClient(tracking_uri=tracking.place(config)[0])
    assert client.get_model_version(name, "2").tags == {"fingerprint": "f2", "commit": "c", "synthetic/complete_recall_at_5": "0.977"}
    assert client.get_model_version(name, "1").tags == {"fingerprint": "f1", "commit": "c"}
    folder = Path(client.download_artifacts(client.get_model_version(name, "2").run_id, name, str(tmp_path)))
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == files


def test_an_unreachable_server_is_one_line_that_hides_the_password(tmp_path: Path) -> None:
    config = configuration.parse({"root": str(tmp_path), "tracking": {"uri": "http://ada:secret@127.0.0.1:9"}})
    with pytest.raises(WorkflowError) as failure, tracking.step(config, "encode"):
        pytest.fail("the step must not begin")
    message = str(failure.value)
    assert message.startswith("MLflow store http://***@127.0.0.1:9:")
    assert "tracking.uri" in message
    assert "\n" not in message
    assert "secret" not in message
    assert "secret" not in str(tracking.resolved(config)) + tracking.how_to_open(config)


@pytest.mark.parametrize(
    ("uri", "masked"),
    [
        ("http://u:p@h:5000/x", "http://***@h:5000/x"),
        ("http://u:p@ss@h", "http://***@h"),
        ("postgresql://h/db?user=a&password=SECRET", "postgresql://h/db?user=a&password=***"),
        ("https://h/?Access_Key=SECRET&x=1 and s3://b/k?X-Amz-Security-Token=SECRET", "https://h/?Access_Key=***&x=1 and s3://b/k?X-Amz-Security-Token=***"),
        ("s3://bucket/a@b and ada@host", "s3://bucket/a@b and ada@host"),
    ],
)  # fmt: skip
def test_passwords_in_urls_are_masked(uri: str, masked: str, tmp_path: Path) -> None:
    config = configuration.parse({"root": str(tmp_path), "tracking": {"uri": uri}})
    assert tracking.resolved(config)["tracking"]["uri"] == masked


def test_what_mlflow_logs_hides_the_password(capsys: pytest.CaptureFixture[str]) -> None:
    tracking._client("http://ada:SECRET@127.0.0.1:9")
    logger = logging.getLogger("mlflow.system_metrics.system_metrics_monitor")
    logger.warning("Failed to get %s.", "http://ada:SECRET@127.0.0.1:9/api")
    try:
        raise ValueError("postgresql://h/db?password=SECRET")
    except ValueError:
        logger.exception("Failed at http://ada:SECRET@127.0.0.1:9")
    found = capsys.readouterr().err
    assert "Failed to get http://***@127.0.0.1:9/api." in found
    assert "ValueError: postgresql://h/db?password=***" in found
    assert "SECRET" not in found


class Flaky:
    """An MLflow client whose calls fail so often, then succeed."""

    def __init__(self, error: Callable[[], Exception], failures: int) -> None:
        self.error, self.failures, self.calls = error, failures, 0

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*arguments: object, **named: object) -> Any:
            self.calls += 1
            if self.failures:
                self.failures -= 1
                raise self.error()
            return type("Made", (), {"info": type("Info", (), {"run_id": "child"})})

        return call


SERVER = "http://ada:SECRET@127.0.0.1:9"


def no_answer() -> Exception:
    from mlflow.exceptions import MlflowException

    return MlflowException(f"API request to {SERVER}/api failed with exception Connection refused")


def refused() -> Exception:
    from mlflow.exceptions import MlflowException
    from mlflow.protos.databricks_pb2 import RESOURCE_DOES_NOT_EXIST

    return MlflowException("Run with id=r is not there", error_code=RESOURCE_DOES_NOT_EXIST)


def begin_child(run: tracking.Run) -> None:
    with run.child("part"):
        pass


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses between tries, which the clock of this test alone goes through."""
    passed: list[float] = []
    monkeypatch.setattr(time, "sleep", passed.append)
    monkeypatch.setattr(time, "monotonic", lambda: sum(passed))
    monkeypatch.setattr(tracking, "PATIENCE", 120.0)
    monkeypatch.setattr(tracking, "PAUSE", 30.0)
    return passed


@pytest.mark.parametrize(
    "log",
    [
        lambda run: run.log_metrics({"a": 1.0}),
        lambda run: run.log_params({"a": 1}),
        lambda run: run.log_artifact("text", "a.txt"),
        lambda run: run.log_input("pool", "d1", "/data/pool"),
        lambda run: run.set_tags({"a": "b"}),
        begin_child,
    ],
)
def test_an_open_run_outlives_a_server_that_is_started_again(
    log: Callable[[tracking.Run], None], pauses: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    run = tracking.Run(Flaky(no_answer, 3), SERVER, "0", "r")
    log(run)
    assert pauses == [30.0] * 3
    assert capsys.readouterr().err == (
        "MLflow store http://***@127.0.0.1:9: API request to http://***@127.0.0.1:9/api failed with exception Connection refused; "
        "it is tried again for up to 2 minutes\n"
    )


@pytest.mark.parametrize(("error", "tries"), [(no_answer, 5), (refused, 1), (lambda: PermissionError("a.txt"), 1)])
def test_patience_has_an_end_and_none_for_what_stays(error: Callable[[], Exception], tries: int, pauses: list[float]) -> None:
    client = Flaky(error, 99)
    with pytest.raises(WorkflowError, match=r"^MLflow store http://\*\*\*@127.0.0.1:9: .*; check tracking\.uri") as failure:
        tracking.Run(client, SERVER, "0", "r").log_metrics({"a": 1.0})
    assert (client.calls, len(pauses)) == (tries, tries - 1)
    assert failure.value.__cause__ is None  # its text would tell the password, where a traceback is shown


def test_a_failed_step_tells_once_that_its_run_is_not_ended(pauses: list[float], caplog: pytest.LogCaptureFixture) -> None:
    client = Flaky(no_answer, 99)
    with pytest.raises(UserError, match="no such key"), tracking._ended(tracking.Run(client, SERVER, "0", "r")):
        raise UserError("no such key")
    assert (client.calls, pauses) == (1, [])
    assert "MLflow run r could not be ended as FAILED: API request to http://***@127.0.0.1:9/api" in caplog.text
    assert "SECRET" not in caplog.text


@pytest.mark.parametrize("place", ["/proc/x/y.db", "{file}/x/y.db"])
def test_a_folder_that_cannot_be_made_is_the_users_mistake(place: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    uri = "sqlite:///" + place.format(file=tmp_path / "file")
    config = configuration.parse({"root": str(tmp_path / "root"), "tracking": {"uri": uri}})
    with pytest.raises(UserError) as failure, tracking.step(config, "encode"):
        pytest.fail("the step must not begin")
    folder = Path(uri.removeprefix("sqlite:///")).parent
    assert str(failure.value).startswith(f"MLflow store {uri}: the folder {folder} cannot be made (N")
    assert str(failure.value).endswith("; set tracking.uri, or root where that is null, to a place that can be written to")


def test_the_environment_is_never_logged(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-to-be-seen")
    with tracking.step(config, "encode") as run:
        pass
    found = next(entry for entry in runs(config) if entry.info.run_id == run.run_id)
    stored = str(found.data.params) + str(found.data.tags) + "".join(p.read_text() for p in Path(found.info.artifact_uri).rglob("*.json"))
    assert "not-to-be-seen" not in stored


def test_where_the_store_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    local = configuration.parse({"root": str(tmp_path / "run")})
    assert tracking.place(local) == (f"sqlite:///{tmp_path}/run/mlflow/mlflow.db", f"{tmp_path}/run/mlflow/artifacts")
    remote = configuration.parse({"root": "s3://bucket/run"})
    assert tracking.place(remote) == (f"sqlite:///{tmp_path}/runs/mlflow/mlflow.db", "s3://bucket/run/mlflow/artifacts")
    server = configuration.parse({"root": "s3://bucket/run", "tracking": {"uri": "http://mlflow:5000"}})
    assert tracking.place(server) == ("http://mlflow:5000", None)


def test_a_submitted_job_on_s3_needs_a_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    remote = {"root": "s3://bucket/run"}
    with pytest.raises(UserError, match=r"tracking.uri: a submitted job with root=s3://bucket/run needs an MLflow server"):
        tracking.place(configuration.parse(remote))
    assert tracking.place(configuration.parse({**remote, "tracking": {"uri": "http://mlflow:5000"}})) == ("http://mlflow:5000", None)
    assert tracking.place(configuration.parse({"root": "/shared/run"}))[0].startswith("sqlite:////shared/run/")


def test_artifacts_of_an_s3_root_go_to_s3(s3_root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from intra import storage

    monkeypatch.chdir(tmp_path)
    config = configuration.parse({"root": s3_root, "tracking": {"experiment": "trial"}})
    with tracking.step(config, "encode") as run:
        run.log_artifact("hello", "text.txt")
    assert [name for name in storage.files(storage.join(s3_root, "mlflow")) if name.endswith("text.txt")]
    other = configuration.parse({"root": s3_root + "-other", "tracking": {"experiment": "trial"}})
    with tracking.step(other, "encode"):
        pass
    assert storage.files(storage.join(s3_root + "-other", "mlflow"))


def test_importing_it_is_light() -> None:
    code = "import sys, intra.tracking; print([name for name in ('mlflow', 'ray', 'torch') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
