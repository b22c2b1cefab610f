"""evaluate by `ray job submit`, with two workers: the script's numbers."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from intra.config import Config
from tests.baselines.conftest import SIZES, saved
from tests.conftest import free_port

from .runs import linked, tiny_dense


@pytest.mark.slow
def test_a_submitted_job_with_two_workers_gives_the_numbers_of_the_script(finished: tuple[Config, str], tmp_path: Path) -> None:
    """`ray job submit` to a local head, two workers that encode for the baselines; and the script by itself."""
    config, _ = finished
    folder = saved(tmp_path / "bert", "BertModel", "BertConfig", SIZES)
    entries = {}
    for name, workers in (("script", 1), ("job", 2)):
        root = tmp_path / name
        root.mkdir()
        linked(config, root)
        values = {**config.model_dump(), "root": str(root)}
        values["evaluate"] |= {"methods": ["intra", "bm25", "tiny", "oracle"], "models": {"tiny": tiny_dense(folder)}, "shard_chunks": 16,
                               "workers": workers, "device": "cpu"}  # fmt: skip
        (tmp_path / f"{name}.yaml").write_text(json.dumps(values))
        entries[name] = ["python", "workflows/evaluate.py", "--config", str(tmp_path / f"{name}.yaml")]
    project = Path(__file__).parents[3]
    subprocess.run([sys.executable, *entries["script"][1:]], cwd=project, capture_output=True, text=True, check=True)
    with ray_head() as (dashboard, environment):
        command = ["ray", "job", "submit", "--address", dashboard, "--working-dir", ".", "--", *entries["job"]]
        done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    script, job = (tmp_path / name for name in entries)
    assert f"{job}/results/results.json" in done.stdout
    assert (job / "results" / "results.json").read_bytes() == (script / "results" / "results.json").read_bytes()
    (mine,), (its,) = ([path for path in (root / "results").iterdir() if path.is_dir()] for root in (script, job))
    assert mine.name == its.name
    for name in ("per_question.parquet", "significance.json", *(f"runs/{path.name}" for path in (mine / "runs").iterdir())):
        assert (mine / name).read_bytes() == (its / name).read_bytes(), name
    (vectors,) = (job / "vectors").iterdir()
    assert len(list(vectors.glob("*.safetensors"))) == 4


@contextlib.contextmanager
def ray_head() -> Iterator[tuple[str, dict[str, str]]]:
    """A Ray head of our own with its job server: the server's address, and the environment to reach it in."""
    import psutil
    from ray.job_submission import JobSubmissionClient

    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**kept, "RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0", "RAY_AUTH_MODE": "disabled", "PATH": path}
    folder, port = tempfile.mkdtemp(prefix="ray-"), free_port()  # short: it holds Unix sockets
    command = ["ray", "start", "--head", "--block", "--node-ip-address=127.0.0.1", f"--port={free_port()}", "--num-cpus=4",
               f"--temp-dir={folder}", "--object-store-memory=268435456", "--include-dashboard=true", "--dashboard-host=127.0.0.1",
               f"--dashboard-port={port}", f"--dashboard-agent-listen-port={free_port()}", f"--ray-client-server-port={free_port()}",
               f"--metrics-export-port={free_port()}"]  # fmt: skip
    process = subprocess.Popen(command, env=environment, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(240):
            try:
                JobSubmissionClient(f"http://127.0.0.1:{port}").list_jobs()
                break
            except (ConnectionError, RuntimeError):
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}", environment
    finally:
        started = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
        for one in started:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)
