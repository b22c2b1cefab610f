"""workflows/train.py: its plan, the user's mistakes, and that neither a kill nor the number of workers changes what it makes."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from intra import cli, lineage, storage
from intra import config as configuration
from intra.artifact import Artifact
from intra.backbone import locate, model
from intra.config import Config
from intra.data import schema
from intra.errors import UserError
from intra.retrieval.retriever import Retriever
from intra.store import claim, writer
from intra.store.format import Shard
from workflows import train

from ..retrieval import conftest as toy

FILE = Path(train.__file__)
TRAINING = {
    "steps": 60, "batch_size": 8, "micro_batch": 2, "warmup_steps": 5, "hard_negatives": 3, "bm25_negatives": 2, "bm25_skip": 1,
    "sampled_negatives": 5, "checkpoint_every": 3, "threads": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("train") / "model"
    toy.make_backbone(path)
    return path


def write_config(path: Path, root: Path, backbone: Path, **training: object) -> Config:
    values = {
        "root": str(root),
        "backbone": {"model": str(backbone)},
        "retriever": {
            "tokens": 5,
            "pooled_length": 3,
            "initial_context": 4,
            "scoring": "mixture",
            "train": {**TRAINING, **training},
        },
        "evaluate": {"k": [5]},
    }
    path.write_text(yaml.safe_dump(values))
    return configuration.load(path)


def make_dataset(config: Config) -> list[str]:
    """The toy world as a dataset artifact; gives its texts."""
    texts, questions = toy.world()
    empty = [""] * len(texts)
    columns = {"chunk_id": [toy.chunk_id(row) for row in range(len(texts))], "title": empty, "text": texts, "source": empty}
    pool = schema.to_parquet(pa.table({**columns, "n_tokens": [1] * len(texts)}, schema=schema.POOL_SCHEMA))
    storage.write_bytes(lineage.dataset(config).path(schema.POOL), pool)
    ask(config, questions, hashlib.sha256(pool).hexdigest())
    return texts


def ask(config: Config, questions: list[schema.Question], pool: str | None = None) -> None:
    """Completes the dataset artifact with these questions; `pool` is the pool's digest, where it has no manifest yet."""
    artifact, table = lineage.dataset(config), schema.to_parquet(schema.questions_table(questions))
    storage.write_bytes(artifact.path(schema.QUESTIONS), table)
    facts = {"pool_sha256": pool or artifact.manifest()["pool_sha256"], "questions_sha256": hashlib.sha256(table).hexdigest()}
    artifact.finish({**facts, "questions": {"toy": {"train": len(questions)}}})


def make_store(config: Config, texts: list[str]) -> None:
    backbone, artifact = model.load(config.backbone.model, device="cpu"), lineage.store(config)
    ids = backbone.tokenize(texts)
    states, pooled = writer.encode(backbone, ids, 3, 512, torch.bfloat16)
    shard = Shard(0, 0, len(texts))
    commit = writer.write_shard(artifact, shard, [len(item) for item in ids], states, pooled)
    writer.finish(
        artifact, [toy.chunk_id(row) for row in range(len(texts))], [shard], {0: commit}, {},
        backbone=lineage.weights_digest(config), hidden_size=backbone.hidden_size, pooled_length=3, dtype="bfloat16", threads=1,
    )  # fmt: skip


@pytest.fixture
def prepared(tmp_path: Path, backbone: Path) -> Callable[..., tuple[Path, Config]]:
    """A configuration file whose dataset and store are made."""

    def make(name: str, **training: object) -> tuple[Path, Config]:
        file = tmp_path / f"{name}.yaml"
        config = write_config(file, tmp_path / name, backbone, **training)
        make_store(config, make_dataset(config))
        return file, config

    return make


def start(file: Path) -> subprocess.Popen[str]:
    command = [sys.executable, str(FILE), "--config", str(file)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def contents(artifact: Artifact) -> dict[str, bytes]:
    return {name: storage.read_bytes(artifact.path(name)) for name in storage.files(artifact.url)}


def test_killed_and_run_again_with_two_workers_gives_the_bytes_of_one(prepared: Callable[..., tuple[Path, Config]]) -> None:
    file, config = prepared("whole")
    whole = start(file)
    killed_file, killed_config = prepared("killed", workers=2)
    output, errors = whole.communicate(timeout=300)
    assert whole.returncode == 0, errors
    artifact = lineage.retriever(config)
    assert output.splitlines()[-1] == artifact.url

    other = lineage.retriever(killed_config)
    checkpoints = storage.join(f"{other.url}.training", "checkpoints")

    def kept() -> list[str]:  # not what is still being written
        return [name for name in storage.names(checkpoints) if name.endswith(".safetensors")]

    victim = start(killed_file)
    while victim.poll() is None and not kept():
        time.sleep(0.02)
    os.kill(victim.pid, signal.SIGKILL)
    victim.communicate()
    assert victim.returncode == -signal.SIGKILL
    assert not other.complete()
    assert kept()
    again = start(killed_file)
    _, errors = again.communicate(timeout=300)
    assert again.returncode == 0, errors

    one, two = contents(artifact), contents(other)
    assert one.keys() == two.keys()
    differ = {name for name in one if one[name] != two[name]}
    assert differ <= {"config.json"}  # it names the root and the workers
    assert json.loads(one["config.json"])["run"]["retriever"]["tokens"] == 5
    assert not storage.names(f"{artifact.url}.training")

    curve = pq.read_table(pa.BufferReader(one["curve.parquet"]))
    assert curve["step"].to_pylist() == list(range(1, 61))
    retriever = Retriever.from_pretrained(artifact.url)
    assert retriever.settings.backbone == lineage.backbone(config).fingerprint
    assert retriever.settings.store == lineage.store(config).fingerprint
    assert retriever.settings.scoring == "mixture"
    assert retriever.settings.temperature == config.retriever.train.temperature
    mined = pq.read_table(pa.BufferReader(one["bm25/00000.parquet"]))
    assert mined["question_id"].to_pylist() == pq.read_table(pa.BufferReader(one["initial/00000.parquet"]))["question_id"].to_pylist()
    assert max(len(rows) for rows in mined["rows"].to_pylist()) == 1 + 2 + 2  # skipped, negatives, the most gold of a question
    assert train.plan(config)[0].startswith(f"train: retriever {artifact.url} is complete")


def test_a_complete_retriever_is_not_made_again(prepared: Callable[..., tuple[Path, Config]], monkeypatch: pytest.MonkeyPatch) -> None:
    _, config = prepared("done")
    lineage.retriever(config).finish({})
    monkeypatch.setattr(train, "_make", lambda *_: pytest.fail("made again"))
    assert train.run(config) == lineage.retriever(config).url


def test_plan_says_what_is_missing_and_how_large_it_gets(
    tmp_path: Path, backbone: Path, prepared: Callable[..., tuple[Path, Config]]
) -> None:
    config = write_config(tmp_path / "empty.yaml", tmp_path / "empty", backbone)
    assert train.plan(config) == [f"train: waits for the dataset {lineage.dataset(config).url} (workflows/prepare.py)"]
    make_dataset(config)
    assert train.plan(config) == [f"train: waits for the store {lineage.store(config).url} (workflows/encode.py)"]
    _, config = prepared("ready")
    (line,) = train.plan(config)
    assert "5 tokens x 32 + 2 layers x 4 heads = 168 parameters; 60 steps of 8 of 30 questions; 0 steps are done" in line
    assert not Path(lineage.retriever(config).url).exists()
    alone = configuration.load(tmp_path / "ready.yaml", ["retriever.train.train_tokens=false"])
    assert "= 168 parameters; the weights alone are trained; 60 steps" in train.plan(alone)[0]


def mistake(config_file: Path, capsys: pytest.CaptureFixture[str], *overrides: str) -> str:
    assert cli.main(train.__doc__, train.plan, train.run, ["--config", str(config_file), *overrides]) == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert len(errors) == 1
    return errors[0]


def test_an_incomplete_store_is_refused(prepared: Callable[..., tuple[Path, Config]], capsys: pytest.CaptureFixture[str]) -> None:
    file, config = prepared("incomplete")
    storage.remove(lineage.store(config).path("manifest.json"))
    error = mistake(file, capsys)
    assert f"store {lineage.store(config).url} is incomplete" in error
    assert "run workflows/encode.py" in error
    assert not Path(lineage.retriever(config).url).exists()


def test_a_gpu_that_no_worker_asks_for_is_refused(prepared: Callable[..., tuple[Path, Config]], capsys: pytest.CaptureFixture[str]) -> None:
    file, _ = prepared("gpu")
    assert "retriever.train.gpus_per_worker is 0" in mistake(file, capsys, "backbone.device=cuda")


def test_prefixes_of_a_backbone_that_echoes_the_question_are_refused(
    prepared: Callable[..., tuple[Path, Config]], backbone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, _ = prepared("prefixes")
    shutil.copytree(backbone, tmp_path / "frozen")
    description = json.loads((backbone / "config.json").read_text()) | {locate.FROZEN: {}}
    (tmp_path / "frozen" / "config.json").write_text(json.dumps(description))
    error = mistake(file, capsys, f"backbone.model={tmp_path / 'frozen'}", "retriever.train.prefix_cache_mb=8")
    assert "retriever.train.prefix_cache_mb: found 8; this backbone's retrieval pass echoes the question: set it to 0" in error


def test_states_of_another_backbone_are_refused(prepared: Callable[..., tuple[Path, Config]], capsys: pytest.CaptureFixture[str]) -> None:
    file, config = prepared("again")
    store = lineage.store(config)
    store.finish({**store.manifest(), "backbone": "0" * 64})
    error = mistake(file, capsys)
    assert f"store {store.url}: its states are of a backbone of digest 0000000000000000, but" in error
    assert "delete the store and run workflows/encode.py" in error
    assert not Path(lineage.retriever(config).url).exists()


def test_a_worker_started_again_raises_what_no_retry_mends_before_it_loads_anything(tmp_path: Path) -> None:
    note = {"run": "r1", "type": "UserError", "message": "no such key; mend it"}
    (tmp_path / "failure.json").write_text(json.dumps(note))
    with pytest.raises(UserError, match="no such key; mend it"):
        train._worker({"training": str(tmp_path), "tracking": ["sqlite:///x", "r1"]})


@pytest.mark.slow
def test_a_loss_that_is_not_finite_is_told_once(prepared: Callable[..., tuple[Path, Config]]) -> None:
    file, config = prepared("diverged", learning_rate=1e38, workers=2)
    note = Path(f"{lineage.retriever(config).url}.training") / "failure.json"
    told = "train: step 1: loss or gradient is not a finite number; lower retriever.train.learning_rate"
    note.parent.mkdir(parents=True)
    note.write_text(json.dumps({"run": "r1", "type": "UserError", "message": "what an earlier run could not do"}))
    process = start(file)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 1
    assert errors.splitlines()[-1].startswith(f"error: train {lineage.retriever(config).url}: {told};")
    found = json.loads(note.read_text())
    assert (found["type"], found["message"]) == ("WorkflowError", told)


def test_two_runs_do_not_train_one_retriever(prepared: Callable[..., tuple[Path, Config]], capsys: pytest.CaptureFixture[str]) -> None:
    file, config = prepared("claimed")
    with claim.hold(lineage.retriever(config)):
        assert cli.main(None, train.plan, train.run, ["--config", str(file)]) == 1
    assert f"retriever {lineage.retriever(config).url} is being made by another run" in capsys.readouterr().err
    assert not storage.names(lineage.retriever(config).url)


def test_a_run_that_was_taken_over_completes_nothing(
    prepared: Callable[..., tuple[Path, Config]], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A driver that was suspended: another has claimed the retriever before its own training ended."""
    file, config = prepared("taken")
    artifact, held, take = lineage.retriever(config), [], claim.take

    def taken(made: Artifact) -> claim.Claim:
        held.append(take(made))
        return held[0]

    def fit(*_: object) -> None:
        other = json.loads(claim._text("another")) | {"host": "elsewhere", "name": "elsewhere"}
        storage.write_json(artifact.path("claim", "000002.json"), other)
        deadline = time.monotonic() + 30
        while held[0]._lost is None and time.monotonic() < deadline:
            time.sleep(0.02)

    monkeypatch.setattr(claim, "RENEWED", 0.05)
    monkeypatch.setattr(claim, "take", taken)
    monkeypatch.setattr(train, "_fit", fit)
    assert cli.main(None, train.plan, train.run, ["--config", str(file)]) == 1
    assert re.search(r"elsewhere.* has taken it over; this run stops", capsys.readouterr().err)
    assert not artifact.complete()


def test_gold_outside_the_store_is_refused(prepared: Callable[..., tuple[Path, Config]], capsys: pytest.CaptureFixture[str]) -> None:
    file, config = prepared("gold")
    question = schema.Question("q99", "toy", "train", "who ?", ("x",), (("c999",),), 1, "single")
    ask(config, [question])
    assert "question q99: gold chunk 'c999' is not in the chunk store" in mistake(file, capsys)


def test_no_training_questions_are_refused(prepared: Callable[..., tuple[Path, Config]], capsys: pytest.CaptureFixture[str]) -> None:
    file, config = prepared("none")
    ask(config, [])
    assert "holds no training questions" in mistake(file, capsys)
