"""One small world, one uninterrupted run over it, and a Ray head of our own, for all tests of encode."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from intra import lineage
from intra.backbone import tiny
from intra.config import ArchitectureConfig, SyntheticConfig
from intra.data import synthetic
from workflows import prepare

from ...conftest import free_port
from .runs import CHUNKS, SHARD_CHUNKS, Head, World, contents, end, environment, finish, wait_for_jobs


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("encode")
    made = SyntheticConfig(chunks=CHUNKS, train_questions=10, test_questions=10)
    passages, _ = synthetic.generate(made, 0)
    architecture = ArchitectureConfig(
        hidden_size=32, intermediate_size=48, encoder_layers=2, decoder_layers=2, heads=4, kv_heads=2, head_dim=8, vocabulary=2048
    )
    tokenizer = tiny.train_tokenizer([f"{passage.title} {passage.text}" for passage in passages], architecture)
    tiny.save(tiny.build(architecture, tokenizer, seed=0), tokenizer, folder / "model")
    values: dict[str, Any] = {
        "root": str(folder / "root"),
        "data": {"source": "synthetic", "synthetic": made.model_dump()},
        "backbone": {"model": str(folder / "model")},
        "store": {"shard_chunks": SHARD_CHUNKS, "batch_tokens": 128, "workers": 2},
        "retriever": {"pooled_length": 3},
        "tracking": {"uri": f"sqlite:///{folder / 'mlflow.db'}"},
    }
    file = folder / "encode.yaml"
    file.write_text(yaml.safe_dump(values))
    result = World(file, values["root"])
    prepare.run(result.load())
    return result


@pytest.fixture(scope="session")
def reference(world: World) -> dict[str, bytes]:
    """The store of an uninterrupted run by script, with one worker, on a Ray that the script starts."""
    done = finish(world.command(world.root, "store.workers=1"))
    assert done.returncode == 0, done.stderr
    url = lineage.store(world.load()).url
    assert done.stdout.splitlines()[-1] == url
    return contents(url)


@pytest.fixture(scope="session")
def head(s3_server: str) -> Iterator[Head]:
    """A Ray head of our own, with its job server; its workers know the local S3 server."""
    folder = tempfile.mkdtemp(prefix="ray-")  # short: it holds Unix sockets
    gcs, dashboard = free_port(), free_port()
    command = ["ray", "start", "--head", "--block", "--node-ip-address=127.0.0.1", f"--port={gcs}", "--num-cpus=4", "--num-gpus=2",
               f"--temp-dir={folder}",
               "--object-store-memory=268435456", "--include-dashboard=true", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}",
               f"--dashboard-agent-listen-port={free_port()}", f"--ray-client-server-port={free_port()}",
               f"--metrics-export-port={free_port()}"]  # fmt: skip
    with open(Path(folder) / "head.log", "w") as log:
        process = subprocess.Popen(command, env=environment(RAY_AUTH_MODE="disabled"), start_new_session=True, stdout=log, stderr=log)
    try:
        yield Head(process.pid, f"127.0.0.1:{gcs}", f"http://127.0.0.1:{dashboard}")
    finally:
        end([*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)])
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def joined(head: Head, monkeypatch: pytest.MonkeyPatch) -> Iterator[Head]:
    """The head, which what runs in this process joins."""
    import ray

    wait_for_jobs(head)
    monkeypatch.setenv("RAY_ADDRESS", head.gcs)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    ours = not ray.is_initialized()
    yield head
    if ours:
        ray.shutdown()
