from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from intra import cli
from intra.config import Config
from intra.errors import Regression, UserError, WorkflowError


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "c.yaml"
    path.write_text("root: r")
    return str(path)


def never(config: Config) -> None:
    raise AssertionError("must not run")


def test_run_gets_the_configuration_and_its_result_is_the_last_line(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    def run(config: Config) -> str:
        print("working")
        return f"place/{config.seed}"

    assert cli.main("doc", lambda config: [], run, ["--config", file, "seed=3"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "place/3"


def test_options_may_stand_anywhere(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main("doc", lambda config: [], lambda config: config.seed, ["seed=3", "--config", file, "data.pool_limit=7"]) == 0
    assert capsys.readouterr().out == "3\n"


def test_offline_holds_for_data_and_weights(file: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    assert cli.main("doc", lambda config: [], lambda config: config.data.offline, ["--config", file, "--offline"]) == 0
    assert capsys.readouterr().out == "True\n"
    assert os.environ["HF_HUB_OFFLINE"] == "1"


def test_dry_run_prints_configuration_and_plan_and_makes_nothing(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main("doc", lambda config: ["dataset: to be made"], never, ["--config", file, "--dry-run", "seed=9"]) == 0
    shown, plan = capsys.readouterr().out.split("---\n")
    assert yaml.safe_load(shown)["seed"] == 9
    assert plan == "dataset: to be made\n"


def test_a_dry_run_hides_the_password_of_the_tracking_server(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--config", file, "--dry-run", "tracking.uri=http://ada:secret@mlflow:5000"]
    assert cli.main("doc", lambda config: [], never, options) == 0
    shown = capsys.readouterr().out
    assert "secret" not in shown
    assert "http://***@mlflow:5000" in shown


@pytest.mark.parametrize("option", [[], ["--dry-run"]])
def test_a_submitted_job_on_s3_without_a_server_is_refused_before_any_work(
    file: str, option: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert cli.main("doc", never, never, ["--config", file, "root=s3://bucket/run", *option]) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("error: tracking.uri: a submitted job with root=s3://bucket/run needs an MLflow server")
    assert shown.out == ""


ENDS = """
import sys
from intra import cli
def work():
    {body}
sys.exit(cli.status(work))
"""


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("body", ["print('x' * 100_000)", "return 'place'"])
def test_a_reader_that_goes_ends_it_quietly(body: str, unbuffered: str) -> None:
    command = [sys.executable, "-c", ENDS.format(body=body)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "PYTHONUNBUFFERED": unbuffered}
    ) as made:
        assert made.stdout is not None
        assert made.stderr is not None
        made.stdout.close()
        assert made.stderr.read() == b""
    assert made.returncode == 141


def test_another_broken_pipe_is_not_hidden() -> None:
    body = "import os; ends = os.pipe(); os.close(ends[0]); os.write(ends[1], b'x')"
    done = subprocess.run([sys.executable, "-c", ENDS.format(body=body)], capture_output=True, text=True)
    assert done.returncode == 1
    assert "BrokenPipeError" in done.stderr


@pytest.mark.parametrize(("error", "status"), [(UserError("x: bad; mend it"), 2), (WorkflowError("s3: refused; check it"), 1)])
def test_an_error_is_one_line_and_its_status(file: str, error: Exception, status: int, capsys: pytest.CaptureFixture[str]) -> None:
    def run(config: Config) -> None:
        raise error

    assert cli.main("doc", lambda config: [], run, ["--config", file]) == status
    assert capsys.readouterr().err == f"error: {error}\n"


@pytest.mark.parametrize("arguments", [[], ["--config"], ["--config", "absent.yaml"], ["--konfig", "x"]])
def test_a_wrong_command_line_is_the_users_mistake(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main("doc", lambda config: [], never, arguments) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_regression_has_a_status_of_its_own(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    def run(config: Config) -> None:
        raise Regression("intra, em: 0.3, expected 0.5")

    assert cli.main("doc", lambda config: [], run, ["--config", file]) == 3
    assert capsys.readouterr().err == "regression: intra, em: 0.3, expected 0.5\n"
