"""The encode workflow as a user starts it: by script, by `ray job submit`, on a local path and on S3, killed and started again.

Every run below must give the bytes of one uninterrupted run by script with one worker. Few Ray clusters, because each start takes
seconds: one head for the module, and local ones only where the script must start its own.
"""

from __future__ import annotations

import functools
import shutil
import subprocess
import time
from pathlib import Path

import psutil
import pytest
import torch

from intra import lineage, storage
from intra.backbone import model as backbones
from intra.data import schema
from intra.errors import UserError, WorkflowError
from intra.store import writer
from intra.store.format import COMMIT, SCALE, STATES, WHITENING, shards
from intra.store.progress import Progress
from intra.store.reader import ChunkStore
from workflows import encode, prepare

from . import faults
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


def test_a_large_pool_is_whitened_by_the_workers(world: World, joined: Head, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups of the pool's rows, each by one worker: the bytes that one process gives, whichever worker is first."""
    monkeypatch.setattr(writer, "GROUP_CHUNKS", 48)
    config = world.load(world.clone(str(tmp_path)), "store.shard_chunks=40")
    encode.run(config)
    store = lineage.store(config)
    groups = [(0, 48), (48, 48), (96, 48), (144, 16)]
    here = [writer.group_moments(ChunkStore(store.url), first, rows, 1) for first, rows in groups]
    assert writer._whitening(here, 32, 1) == storage.read_bytes(store.path(WHITENING))
    storage.remove(store.path("manifest.json"))
    again = encode.timed(config)  # its shards are committed: all memory it tells is of the workers that whiten
    assert again.done == 0 < again.memory


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
    world: World, joined: Head, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = world.clone(str(tmp_path / "root"))
    config = world.load(root, "store.shard_chunks=64", "store.workers=1")
    monkeypatch.setattr(writer, "LoadTokenize", functools.partial(faults.Counts, folder=str(tmp_path)))
    why = r"1 of 3 shards failed on 2 workers and are set aside: 00002-\w{8} \(chunk .*: \d+ tokens, but dataset .* states \d+"
    with pytest.raises(WorkflowError, match=why) as caught:
        encode.run(config)
    assert "\n" not in str(caught.value)
    assert "shards that failed are tried again on another worker: 00002-" in capsys.readouterr().err
    store = lineage.store(config)
    assert not store.complete()
    (tmp_path / "mended").touch()
    kept = stamps(store.url, [name for name in storage.files(store.url) if name.startswith(STATES)])
    encode.run(config)
    assert stamps(store.url, list(kept)) == kept
    assert len(ChunkStore(store.url).manifest["shards"]) == len(shards(CHUNKS, 64))


def twin(world: World, root: str) -> str:
    """Another root with the same dataset and the finished store. Returns the store's place."""
    store = lineage.store(world.load())
    url = storage.join(world.clone(root), "store", store.fingerprint)
    storage.upload(store.url, url)
    return url


@pytest.mark.slow
def test_a_flipped_byte_is_named_and_repaired(
    world: World, reference: dict[str, bytes], joined: Head, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url, config = twin(world, str(tmp_path)), world.load(str(tmp_path))
    shard = [entry["name"] for entry in lineage.store(config).manifest()["shards"]]
    bad = [f"states/{shard[7]}.safetensors", f"pooled/{shard[30]}.safetensors", f"commit/{shard[79]}.json", "index.parquet"]
    for name, position in zip(bad, (3, -1, 40, -60), strict=True):
        data = bytearray(reference[name])
        data[position] ^= 1
        storage.write_bytes(f"{url}/{name}", bytes(data))
    with pytest.raises(WorkflowError) as caught:
        encode.check(config)
    assert all(f"{url}/{name} differs from what was written" in str(caught.value) for name in bad)
    assert "(4 damaged in all); run the same command with --repair" in str(caught.value)
    made_again = {shard[number] for number in (7, 30, 79)}
    sound = stamps(url, [name for name in committed_files(lineage.store(config)) if name.split("/")[1].split(".")[0] not in made_again])
    assert encode.repair(config) == url
    assert [line.split(" ")[1] for line in capsys.readouterr().err.splitlines() if line.startswith("repair: ")] == [
        f"{url}/{name}" for name in ("index.parquet", *bad[:3])
    ]
    assert stamps(url, list(sound)) == sound
    assert contents(url) == reference
    assert encode.check(config) == url


@pytest.mark.slow
def test_a_lost_int8_scale_is_made_again(world: World, joined: Head, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = world.load(world.clone(str(tmp_path)), "store.dtype=int8", "store.shard_chunks=80")
    url = encode.run(config)
    before, kept = contents(url), stamps(url, committed_files(lineage.store(config)))
    storage.remove(f"{url}/{SCALE}")
    encode.repair(config)
    assert contents(url) == before
    assert stamps(url, list(kept)) == kept


@pytest.mark.slow
def test_workers_see_their_own_gpu_and_too_many_are_one_line(
    world: World, joined: Head, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, lines = world.clone(str(tmp_path / "root")), []
    asks = world.load(root, "store.gpus_per_worker=3")
    with pytest.raises(UserError, match=r"no worker of 1 CPU and 3 GPU fits: there are 4 CPU and 2 GPU here; lower store.gpus_per_worker"):
        encode.run(asks)
    monkeypatch.setattr(writer, "EncodeCommit", functools.partial(faults.OnCpu, folder=str(tmp_path)))
    add = Progress.add
    monkeypatch.setattr(Progress, "add", lambda self, line: lines.append(line) or add(self, line))
    encode.run(world.load(root, "store.gpus_per_worker=1", "store.shard_chunks=8"))
    assert {line["device"] for line in lines} == {"cpu:0", "cpu:1"}
    assert len({(line["worker"], line["device"]) for line in lines}) == 2


def test_shards_of_a_backbone_that_was_made_again_are_not_gone_on_with(world: World, reference: dict[str, bytes], tmp_path: Path) -> None:
    root = world.clone(str(tmp_path))
    store = lineage.store(world.load(root))
    storage.upload(lineage.store(world.load()).url, store.url)
    storage.remove(store.path("manifest.json"))
    settings = storage.read_json(store.path("config.json"))
    settings["backbone"]["digest"] = "0" * 64
    storage.write_json(store.path("config.json"), settings)
    with pytest.raises(
        UserError, match=r"its shards were made with a backbone of digest 0{16}, which was made again since .*delete the store"
    ):
        encode.run(world.load(root))
    assert stamps(store.url, committed_files(store))  # nothing is lost


# ---- another store under the same root


@pytest.mark.parametrize(
    ("override", "apart"),
    [("store.dtype=float32", "store.dtype float32 instead of bfloat16"), ("seed=1", "data.pool "), ("backbone.model", "backbone.digest ")],
)
def test_another_model_setting_or_corpus_is_a_new_store_beside(
    world: World, reference: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    override: str, apart: str,
) -> None:  # fmt: skip
    url = twin(world, str(tmp_path / "root"))
    if override == "backbone.model":
        shutil.copytree(world.load().backbone.model, tmp_path / "model")
        settings = tmp_path / "model" / "generation_config.json"
        settings.write_text(settings.read_text() + "\n")
        override = f"backbone.model={tmp_path}/model"
    config = world.load(str(tmp_path / "root"), override)
    prepare.run(config)

    def stop(*_: object) -> None:
        raise WorkflowError("stopped")

    monkeypatch.setattr(encode, "_shards", stop)
    with pytest.raises(WorkflowError, match="stopped"):
        encode.run(config)
    found = [line for line in capsys.readouterr().err.splitlines() if line.startswith("encode: a new store beside ")]
    assert len(found) == 1
    assert found[0].startswith(f"encode: a new store beside {url.rsplit('/')[-1]}, for ")
    assert apart in found[0]
    assert lineage.store(config).url != url
    assert contents(url) == reference


def test_a_store_under_another_name_is_refused(world: World, reference: dict[str, bytes], tmp_path: Path) -> None:
    config = world.load(str(tmp_path), "store.dtype=float32")
    url = twin(world, str(tmp_path))
    Path(url).rename(lineage.store(config).url)
    with pytest.raises(UserError, match=r"its manifest says \w+: the folder was renamed or copied"):
        encode.run(config)
