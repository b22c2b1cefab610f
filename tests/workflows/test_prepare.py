"""The prepare workflow through its command line."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from intra import cli, lineage, storage
from intra.config import load
from intra.data import stages
from intra.errors import UserError, WorkflowError
from intra.store import claim
from tests.data.conftest import PASSAGES, folder, make, write_lines  # noqa: F401  (folder is a fixture)
from workflows import prepare


@pytest.fixture
def file(folder: Path, tmp_path: Path) -> str:  # noqa: F811
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(make(folder, tmp_path / "root").model_dump()))
    return str(path)


def test_made_once_and_tracked_then_left_alone(
    file: str,
    folder: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def call(*arguments: str) -> list[str]:
        assert cli.main(prepare.__doc__, prepare.plan, prepare.run, ["--config", file, *arguments]) == 0
        return capsys.readouterr().out.splitlines()

    plan = call("--dry-run")
    assert not (tmp_path / "root").exists()
    place = plan[plan.index("---") + 1].removeprefix("prepare: to be made, ")
    assert any(line.endswith("passages.b.jsonl") for line in plan)

    made = call()
    assert made[0].startswith("prepare: 6 passages (1 split), ")
    assert made[-1] == place

    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{tmp_path}/root/mlflow/mlflow.db")
    (run,) = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    assert run.data.metrics["passages"] == 6
    assert run.data.metrics["questions/lakes/train"] == 1
    assert {item.dataset.name for item in run.inputs.dataset_inputs} >= {
        "passages.a.jsonl.gz",
        "questions/lakes.test.jsonl",
        "pool",
        "questions",
    }
    assert {"statistics.json", "report.md"} <= {item.path for item in client.list_artifacts(run.info.run_id)}

    before = {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in Path(place).rglob("*")}

    assert call() == [place]
    assert {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in Path(place).rglob("*")} == before
    assert f"prepare: complete, {place}" in call("--dry-run")

    write_lines(folder / "passages.c.jsonl", ["{"])
    assert call("data.on_error=skip")[0].endswith("rivers 1 test; 1 bad records left out (mistakes.txt)")


def test_changed_input_is_another_dataset(file: str, folder: Path) -> None:  # noqa: F811
    before = lineage.dataset(load(file)).url
    write_lines(folder / "passages.b.jsonl", PASSAGES[:2:-1])
    assert lineage.dataset(load(file)).url != before


def test_two_runs_do_not_make_one_dataset_at_once(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    artifact = lineage.dataset(load(file))
    with claim.hold(artifact):
        assert cli.main(prepare.__doc__, prepare.plan, prepare.run, ["--config", file]) == 1
    assert f"error: dataset {artifact.url} is being made by another run" in capsys.readouterr().err
    assert storage.files(artifact.url) == []


def test_a_run_that_was_taken_over_stops_and_writes_nothing(
    file: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = load(file)
    artifact = lineage.dataset(config)

    def taken_over(*arguments: Any) -> Iterator[dict[str, Any]]:
        storage.write_bytes(artifact.path(claim.CLAIM, "000002.json"), claim._text("another"))
        next(thread for thread in threading.enumerate() if thread.name == "claim").join(60)  # it ends where it finds out
        yield from inline(*arguments)

    inline = stages.inline
    monkeypatch.setattr(claim, "RENEWED", 0.02)
    monkeypatch.setattr(stages, "inline", taken_over)
    assert cli.main(prepare.__doc__, prepare.plan, prepare.run, ["--config", file]) == 1
    assert "has taken it over; this run stops" in capsys.readouterr().err
    assert storage.names(artifact.url) == [claim.CLAIM]


def test_workers_are_refused_where_the_cluster_has_no_machine(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare.cluster, "fits", lambda worker: 0)
    monkeypatch.setattr(prepare.cluster, "connect", lambda config: None)
    monkeypatch.setattr(prepare.cluster, "resources", lambda: {"CPU": 0.0, "GPU": 0.0})
    with pytest.raises(UserError, match=r"data\.workers: no worker of 1 CPU fits: there are .* here; set it to 1 to read in this process"):
        next(prepare._fan(load(file, ["data.workers=2"]), Deadly, (), [{"part": 0}, {"part": 1}], "read"))


@pytest.mark.parametrize(
    ("override", "found"),
    [
        ("data.path=absent", "/absent: no such folder"),
        ("data.passages=passages.a*", "is not in the pool"),
        ("data.test_split=dev", "error: data.test_split=dev: no file"),
    ],
)
def test_the_users_mistake_is_one_line_and_status_2(
    file: str, tmp_path: Path, override: str, found: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(prepare.__doc__, prepare.plan, prepare.run, ["--config", file, override]) == 2
    error = capsys.readouterr().err
    assert found in error
    assert len(error.splitlines()) == 1
    assert not [name for name in storage.files(str(tmp_path / "root")) if name.startswith("dataset/")]


class Deadly:
    """A stage that ends its process at the second task."""

    def __call__(self, task: dict[str, int]) -> dict[str, int]:
        if task["part"]:
            os._exit(1)
        return task


@pytest.mark.slow
def test_two_processes_write_the_same_bytes(file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    monkeypatch.setenv("RAY_worker_niceness", "0")
    ours = not ray.is_initialized()
    try:
        for name, workers in (("one", 1), ("two", 2)):
            limits = ["data.near_duplicates=0.5", "data.deduplicate=true"]
            prepare.run(load(file, [f"root={tmp_path}/{name}", f"data.workers={workers}", *limits]))
        one, two = (lineage.dataset(load(file, [f"root={tmp_path}/{name}", *limits])) for name in ("one", "two"))
        assert one.fingerprint == two.fingerprint
        assert storage.files(one.url) == storage.files(two.url)
        for part in storage.files(one.url):
            if part != "config.json":  # which says how many there were
                assert storage.read_bytes(one.path(part)) == storage.read_bytes(two.path(part)), part
        with pytest.raises(WorkflowError, match=r"prepare: read: 1 of 2 files were given up, their workers died again and again"):
            list(prepare._fan(load(file, ["data.workers=2"]), Deadly, (), [{"part": 0}, {"part": 1}], "read"))
        write_lines(Path(str(load(file).data.path)) / "passages.b.jsonl", ["{"])
        with pytest.raises(UserError, match=r"prepare: .*passages.b.jsonl:1: not valid JSON"):
            prepare.run(load(file, [f"root={tmp_path}/three", "data.workers=2"]))
    finally:
        if ours:
            ray.shutdown()


def test_files_of_the_hub_are_planned_and_not_fetched_offline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    entry = {"format": "dpr", "path": "nq.json", "benchmark": "nq", "split": "test", "repo": "org/set", "revision": "f" * 40}
    path = tmp_path / "hub.yaml"
    path.write_text(
        yaml.safe_dump({"root": str(tmp_path / "root"), "data": {"source": "files", "path": str(tmp_path / "in"), "files": [entry]}})
    )
    call = ["--config", str(path), "data.offline=true"]
    assert cli.main(prepare.__doc__, prepare.plan, prepare.run, [*call, "--dry-run"]) == 0
    assert f"  org/set at {'f' * 40}: nq.json" in capsys.readouterr().out
    assert cli.main(prepare.__doc__, prepare.plan, prepare.run, call) == 2
    assert "configs/quickstart.yaml makes a synthetic world" in capsys.readouterr().err
    assert not (tmp_path / "root").exists()


def test_the_claim_of_a_run_that_died_at_the_end_is_taken_away(file: str) -> None:
    """Killed after the manifest, before it gave the dataset back; the claim of a run that lives stays."""
    config = load(file)
    prepare.run(config)
    artifact = lineage.dataset(config)
    before = sorted(storage.files(artifact.url))
    source = "import os; from intra.artifact import Artifact; from intra.store import claim; "
    taken = f"claim.take(Artifact('dataset', {artifact.url!r}, {artifact.fingerprint!r}, 'prepare')); os.kill(os.getpid(), 9)"
    assert subprocess.run([sys.executable, "-c", source + taken], cwd=Path(__file__).parents[2]).returncode == -9
    assert sorted(storage.files(artifact.url)) == sorted([*before, "claim/000001.json"])
    prepare.run(config)
    assert sorted(storage.files(artifact.url)) == before
    with claim.hold(artifact):
        prepare.run(config)
        assert claim.holder(artifact) is not None
