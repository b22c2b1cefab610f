"""workflows/warmstart.py: what it plans, what it refuses, and that a killed run ends with the weights of an uninterrupted one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from intra import lineage, storage
from intra.backbone import curriculum, model
from intra.backbone import warmstart as training
from intra.config import Config, load
from intra.errors import UserError
from workflows import prepare, warmstart

REPOSITORY = Path(__file__).parents[2]
VALUES: dict[str, Any] = {
    "data": {"source": "synthetic", "synthetic": {"chunks": 60, "train_questions": 24, "test_questions": 12}},
    "backbone": {
        "train": True,
        "architecture": {"hidden_size": 16, "intermediate_size": 16, "encoder_layers": 1, "decoder_layers": 2, "heads": 2, "kv_heads": 1,
                         "head_dim": 8, "vocabulary": 2048},
        "warmstart": {"steps": 6, "batch_size": 2, "micro_batch": 1, "questions": 3, "world_chunks": 4, "checkpoint_every": 2,
                      "warmup_steps": 2, "losses": {"retrieval": 0.5, "hop": 0.5}},
        "answer_tokens": 4,
    },
}  # fmt: skip


def write(folder: Path, root: str, values: dict[str, Any] = VALUES) -> Path:
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump({"root": root, **values}))
    return path


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return load(write(tmp_path, str(tmp_path / "root")))


def start(path: Path, *overrides: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "workflows/warmstart.py", "--config", str(path), *overrides],
        cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )  # fmt: skip


def trained_without_ray(config: Config) -> dict[str, torch.Tensor]:
    """The weights of an uninterrupted run in this process, by plain PyTorch."""
    torch.set_num_threads(1)
    module = warmstart._module(config)
    recipe = config.backbone.warmstart
    training.train(module, training.optimizers(module, recipe), curriculum.synthetic_batches(config, module.backbone), recipe)
    return dict(module.backbone.model.named_parameters())


def test_the_plan_makes_nothing(config: Config, tmp_path: Path) -> None:
    (line,) = warmstart.plan(config)
    assert "6 steps of 2 worlds" in line
    assert "waits for the dataset" in line
    assert not (tmp_path / "root").exists()


def test_a_missing_dataset_is_the_users_mistake(config: Config) -> None:
    with pytest.raises(UserError, match=r"dataset .* is missing .*workflows/prepare\.py"):
        warmstart.run(config)


def test_without_training_the_given_model_is_the_backbone(tmp_path: Path) -> None:
    config = load(write(tmp_path, str(tmp_path / "root"), {}))
    assert Path(warmstart.run(config)) == model.resolve("quickstart")
    assert "nothing to train" in warmstart.plan(config)[0]


def test_killed_and_started_again_it_ends_with_the_same_weights(config: Config, tmp_path: Path) -> None:
    prepare.run(config)
    artifact = lineage.backbone(config)
    checkpoints = Path(f"{artifact.url}.training")
    killed = start(tmp_path / "small.yaml", "backbone.warmstart.checkpoint_every=1")
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and not list(checkpoints.rglob("weights.safetensors")) and killed.poll() is None:
        time.sleep(0.02)
    assert killed.poll() is None, killed.communicate()[1]
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate()
    assert not artifact.complete()
    assert list(checkpoints.rglob("weights.safetensors"))

    again = start(tmp_path / "small.yaml")
    output, errors = again.communicate(timeout=300)
    assert again.returncode == 0, errors
    assert output.splitlines()[-1] == artifact.url
    assert artifact.complete()
    assert not checkpoints.exists()
    backbone = model.load(artifact.url)
    found = dict(backbone.model.named_parameters())
    for name, weight in trained_without_ray(config).items():
        assert torch.equal(found[name], weight), name

    card = storage.read_bytes(artifact.path("README.md")).decode()
    assert "not** pretrained only for generation" in card
    assert "| synthetic/bridge |" in card
    assert len(backbone.answer(backbone.prompt_ids(["Who?"]), backbone.pack([backbone.encode(backbone.tokenize(["Ada."]))]), 3)) == 1
    assert warmstart.run(config) == artifact.url  # complete: at once
    assert "is complete" in warmstart.plan(config)[0]
