"""The encode workflow as a user starts it: by script, by `ray job submit`, on a local path and on S3, killed and started again.

Every run below must give the bytes of one uninterrupted run by script with one worker. Few Ray clusters, because each start takes
seconds: one head for the module, and local ones only where the script must start its own.
"""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import psutil
import pyarrow as pa
import pytest
import torch

from intra import lineage, storage
from intra.backbone import model as backbones
from intra.data import schema
from intra.errors import UserError, WorkflowError
from intra.store.format import COMMIT, STATES, shards
from intra.store.reader import ChunkStore
from workflows import encode

from .runs import (
    CHUNKS,
    REPOSITORY,
    SHARDS,
    Head,
    World,
    committed_files,
    contents,
    end,
    environment,
    finish,
    stamps,
    wait_for_jobs,
)


def kill_in_the_middle(command: list[str], commits: str, total: int, **changes: str) -> None:
    """Starts the command and ends it with SIGKILL when some shards, but not all, are committed; waits until all of it is gone."""
    driver = subprocess.Popen(
        command,
        cwd=REPOSITORY,
        env=environment(**changes),
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    family: list[psutil.Process] = []
    try:
        deadline = time.monotonic() + 240
        while len(storage.sizes(commits)) < 5:
            assert driver.poll() is None, f"the run ended before it was killed: {driver.communicate()[0]}"
            assert time.monotonic() < deadline, "no shard was committed"
            time.sleep(0.005)
        family = psutil.Process(driver.pid).children(recursive=True)
        driver.kill()
        driver.wait()
    finally:
        driver.kill()
        driver.communicate()
        end(family)
    settled = -1
    while settled != (settled := len(storage.sizes(commits))):  # workers of a cluster end a moment after their driver
        time.sleep(1)
    assert 5 <= settled < total


# ---- without Ray


def test_the_plan_before_and_after_prepare(world: World, tmp_path: Path) -> None:
    (before,) = encode.plan(world.load(str(tmp_path)))
    assert before.startswith("encode: waits for the dataset")
    assert list(tmp_path.iterdir()) == []
    manifest = storage.read_json(lineage.dataset(world.load()).path("manifest.json"))
    root = world.clone(str(tmp_path / "clone"))
    after = "\n".join(encode.plan(world.load(root)))
    assert f"{CHUNKS} chunks, {manifest['tokens']:,} tokens in {SHARDS} shards" in after
    assert "0 shards are committed" in after
    assert f"{SHARDS} to make with 2 workers" in after
    assert not Path(root, "store").exists()


def test_without_a_dataset_the_remedy_is_named(world: World, tmp_path: Path) -> None:
    done = finish(world.command(str(tmp_path)))
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: dataset ")
    assert "run workflows/prepare.py" in line


def test_an_unreachable_endpoint_is_one_line(world: World) -> None:
    done = finish(world.command("s3://bucket/run"), AWS_ENDPOINT_URL="http://127.0.0.1:9", AWS_ACCESS_KEY_ID="x", AWS_SECRET_ACCESS_KEY="x")
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: s3://bucket/run")
    assert "AWS_ENDPOINT_URL" in line


def test_a_gpu_backbone_without_gpu_workers_is_refused(world: World) -> None:
    with pytest.raises(UserError, match=r"backbone.device=cuda, but store.gpus_per_worker is 0"):
        encode.run(world.load(None, "backbone.device=cuda"))


# ---- with Ray


def test_the_store_holds_what_the_backbone_encodes(world: World, reference: dict[str, bytes]) -> None:
    config = world.load()
    store, pool = ChunkStore(lineage.store(config).url), schema.read_pool(lineage.dataset(config).url)
    assert encode.check(config) == store.url
    assert store.chunk_ids == pool.chunk_ids
    backbone = backbones.load(config.backbone.model, device="cpu")
    for row in (0, 1, 80, CHUNKS - 1):
        (states,) = backbone.encode(backbone.tokenize([f"{pool.titles[row]}\n{pool.texts[row]}"]))
        # bfloat16 keeps 8 bits; batches differ by rounding
        torch.testing.assert_close(store.states([pool.chunk_ids[row]])[0], states, rtol=1e-2, atol=1e-3)
        torch.testing.assert_close(store.pooled([row])[0], backbones.pool(states, 3), rtol=1e-2, atol=1e-3)
    manifest = store.manifest
    assert (manifest["rows"], manifest["hidden_size"], manifest["pooled_length"], manifest["dtype"]) == (CHUNKS, 32, 3, "bfloat16")
    assert manifest["backbone"] == backbones.digest(config.backbone.model)
    assert len(manifest["shards"]) == SHARDS


def test_a_second_run_redoes_nothing(world: World, reference: dict[str, bytes]) -> None:
    url = lineage.store(world.load()).url
    before = stamps(url, list(reference))
    assert encode.run(world.load()) == url
    assert stamps(url, storage.files(url)) == before


def test_a_submitted_job_with_two_workers_gives_the_same_bytes(
    world: World, reference: dict[str, bytes], head: Head, tmp_path: Path
) -> None:
    wait_for_jobs(head)
    root = world.clone(str(tmp_path))
    entry = ["python", *world.command(root)[1:]]
    submit = ["ray", "job", "submit", "--address", head.dashboard, "--working-dir", ".", "--", *entry]
    done = finish(submit, RAY_AUTH_MODE="disabled")
    assert done.returncode == 0, done.stdout + done.stderr
    assert contents(lineage.store(world.load(root)).url) == reference


@pytest.mark.slow
@pytest.mark.parametrize("place", ["local", "s3"])
def test_killed_and_started_again_the_store_is_the_same(
    world: World, reference: dict[str, bytes], request: pytest.FixtureRequest, tmp_path: Path, place: str
) -> None:
    if place == "local":
        root, joined = world.clone(str(tmp_path)), {}
    else:
        root = world.clone(request.getfixturevalue("s3_root"))
        joined = {"RAY_ADDRESS": request.getfixturevalue("head").gcs, "RAY_AUTH_MODE": "disabled"}
    store = lineage.store(world.load(root))
    command = world.command(root, f"store.workers={2 if place == 'local' else 1}")
    kill_in_the_middle(command, store.path(COMMIT), SHARDS, **joined)
    assert not store.complete()
    with pytest.raises(UserError, match="is incomplete"):
        ChunkStore(store.url)
    before = stamps(store.url, committed_files(store))
    done = finish(command, **joined)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == store.url
    assert stamps(store.url, list(before)) == before
    assert contents(store.url) == reference


def test_a_failing_shard_is_one_line_and_the_others_stay(
    world: World, head: Head, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import ray

    wait_for_jobs(head)
    root = world.clone(str(tmp_path))
    config = world.load(root, "store.shard_chunks=64", "store.workers=1")
    dataset = lineage.dataset(config)
    table = schema.read_pool(dataset.url).table
    counts = table["n_tokens"].to_pylist()
    counts[-1] += 1  # of the last of three shards
    wrong = table.set_column(4, "n_tokens", pa.array(counts, pa.int32()))
    storage.write_bytes(dataset.path(schema.POOL), schema.to_parquet(wrong))
    monkeypatch.setenv("RAY_ADDRESS", head.gcs)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    ours = not ray.is_initialized()
    try:
        why = r"1 of 3 shards failed on 2 workers and are set aside: 00002-\w{8} \(chunk .*: \d+ tokens, but dataset .* states \d+"
        with pytest.raises(WorkflowError, match=why) as caught:
            encode.run(config)
        assert "\n" not in str(caught.value)
        assert "shards that failed are tried again on another worker: 00002-" in capsys.readouterr().err
        store = lineage.store(config)
        assert not store.complete()
        storage.write_bytes(dataset.path(schema.POOL), schema.to_parquet(table))
        kept = stamps(store.url, [name for name in storage.files(store.url) if name.startswith(STATES)])
        encode.run(config)
        assert stamps(store.url, list(kept)) == kept
        assert len(ChunkStore(store.url).manifest["shards"]) == len(shards(CHUNKS, 64))
    finally:
        if ours:
            ray.shutdown()
