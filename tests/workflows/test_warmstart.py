"""workflows/warmstart.py: its plan, that a killed run ends with the weights of an uninterrupted one, and the paper's recipe."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
import yaml

from intra import cli, lineage, storage, tracking
from intra.backbone import card, curriculum, locate, model, tiny
from intra.backbone import warmstart as training
from intra.config import ArchitectureConfig, Config, LossConfig, load
from intra.data import synthetic
from intra.data.schema import read_pool, read_questions
from intra.errors import UserError, WorkflowError
from intra.store import claim
from workflows import prepare, warmstart

from ..conftest import write_world
from ..data.conftest import write_lines

REPOSITORY = Path(__file__).parents[2]
VALUES: dict[str, Any] = {
    "data": {"source": "synthetic", "synthetic": {"chunks": 60, "train_questions": 24, "test_questions": 12}},
    "backbone": {
        "train": True,
        "architecture": {"hidden_size": 16, "intermediate_size": 16, "encoder_layers": 1, "decoder_layers": 2, "heads": 2, "kv_heads": 1,
                         "head_dim": 8, "vocabulary": 2048},
        "warmstart": {"steps": 6, "batch_size": 2, "micro_batch": 1, "questions": 3, "world_chunks": 4, "checkpoint_every": 2,
                      "warmup_steps": 2, "losses": {"retrieval": 0.5, "hop": 0.5},
                      "stages": [{"name": "reading", "share": 0.5, "losses": {"answer": 1.0}}, {"name": "joint", "share": 0.5}]},
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


def trained_without_ray(config: Config) -> tuple[dict[str, torch.Tensor], list[dict[str, float]]]:
    """The weights of an uninterrupted run in this process, by plain PyTorch, all workers' share and unsharded; and its metrics."""
    torch.set_num_threads(1)
    dataset = lineage.dataset(config).url
    module = warmstart._module(config, dataset)
    recipe = config.backbone.warmstart
    training.place(module, recipe, torch.device("cpu"))
    batches = (
        curriculum.synthetic_batches(config, module.backbone)
        if config.data.source == "synthetic"
        else curriculum.question_batches(config, module.backbone, read_pool(dataset), read_questions(dataset, "train"))
    )
    rows: list[dict[str, float]] = []
    training.train(
        module,
        training.optimizers(module, recipe),
        batches,
        recipe,
        checkpoint=lambda step, metrics: rows.append({"step": step, **metrics}),
    )
    return dict(module.backbone.model.named_parameters()), rows


def registered(checkpoints: Path) -> bool:
    """Whether Ray Train has noted a checkpoint, so that the next run goes on from it."""
    return any("checkpoint_" in path.read_text() for path in checkpoints.rglob("checkpoint_manager_snapshot.json"))


def curve(artifact: lineage.Artifact) -> list[dict[str, Any]]:
    return list(pq.read_table(io.BytesIO(storage.read_bytes(artifact.path("curve.parquet")))).to_pylist())


def test_the_plan_makes_nothing(config: Config, tmp_path: Path) -> None:
    (line,) = warmstart.plan(config)
    assert "6 steps of 2 worlds" in line
    assert "stage reading 50%; stage joint 50%" in line
    assert "waits for the dataset" in line
    assert not (tmp_path / "root").exists()


def test_a_missing_dataset_is_the_users_mistake(config: Config) -> None:
    with pytest.raises(UserError, match=r"dataset .* is missing .*workflows/prepare\.py"):
        warmstart.run(config)


def test_a_worker_started_again_raises_what_no_retry_mends_before_it_loads_anything(tmp_path: Path) -> None:
    note = {"run": "r1", "type": "WorkflowError", "message": "loss is not finite; lower it"}
    (tmp_path / "failure.json").write_text(json.dumps(note))
    with pytest.raises(WorkflowError, match="loss is not finite; lower it"):
        warmstart._worker({"training": str(tmp_path), "tracking": ["sqlite:///x", "r1"]})


def test_two_runs_do_not_train_one_backbone(config: Config) -> None:
    prepare.run(config)
    backbone = lineage.backbone(config)
    with claim.hold(backbone), pytest.raises(WorkflowError, match=r"backbone .* is being made by another run"):
        warmstart.run(config)
    assert not storage.names(backbone.url)


@pytest.mark.parametrize("losses", ["{answer: 1}", "{answer: 0, retrieval: 1}"])
def test_training_questions_without_answers_are_refused(tmp_path: Path, losses: str) -> None:
    """Of a dataset that was made where none was to be trained on."""
    data = tmp_path / "lakes"
    write_lines(data / "corpus.jsonl", [{"_id": f"p{number}", "title": "", "text": f"Lake number {number}."} for number in range(4)])
    asked = [{"_id": f"q{number}", "text": f"Which is number {number}?"} for number in (1, 2, 3)]
    write_lines(data / "queries.jsonl", [{**asked[0], "metadata": {"answer": "1"}}, *asked[1:]])
    write_lines(data / "qrels" / "train.tsv", ["query-id\tcorpus-id\tscore", "q1\tp1\t1", "q2\tp2\t1"])
    write_lines(data / "qrels" / "test.tsv", ["query-id\tcorpus-id\tscore", "q3\tp3\t1"])
    path = write(tmp_path, str(tmp_path / "root"), {"data": {"source": "beir", "path": str(data)}, "evaluate": {"answers": False}})
    dataset = prepare.run(load(path))
    config = load(path, ["backbone.train=true", "backbone.initial=model", f"backbone.warmstart.losses={losses}"])
    assert lineage.dataset(config).url == dataset
    with pytest.raises(UserError, match=r"backbone\.train: training questions have no answer \(1 of lakes\); add their answers, or set"):
        warmstart.run(config)


@pytest.mark.parametrize("overrides", [["backbone.initial=model"], ["backbone.train=false"]])
def test_a_dry_run_fetches_no_weights(
    config: Config, overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def from_hub(name: str, revision: str | None, patterns: tuple[str, ...]) -> Path:
        assert patterns != locate.MODEL_FILES, "weights are fetched"
        return locate.QUICKSTART  # a tokenizer

    def cached(name: str, *, revision: str | None, local_files_only: bool) -> str:
        assert local_files_only
        if not cache:
            raise LocalEntryNotFoundError("not here")
        return str(cache[0])

    cache: list[Path] = []
    monkeypatch.setattr(locate, "_from_hub", from_hub)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", cached)
    arguments = ["--config", str(tmp_path / "small.yaml"), "backbone.model=someone/large", *overrides, "--dry-run"]
    partly = tmp_path / "partly"  # as a plan that asked for the tokenizer leaves it
    partly.mkdir()
    (partly / "config.json").write_text("{}")
    for found in ([], [partly]):
        cache[:] = found
        assert cli.main(None, warmstart.plan, warmstart.run, arguments) == 0
        assert capsys.readouterr().out.splitlines()[-1] == "waits for the weights of 'someone/large', which a run fetches from the hub"
    cache[:] = [locate.QUICKSTART]
    assert cli.main(None, warmstart.plan, warmstart.run, arguments) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("warmstart: ")
    assert not (tmp_path / "root").exists()


def test_a_dry_run_fetches_no_weights_from_s3(config: Config, tmp_path: Path, s3_root: str, capsys: pytest.CaptureFixture[str]) -> None:
    storage.upload(locate.QUICKSTART, s3_root)
    arguments = ["--config", str(tmp_path / "small.yaml"), f"backbone.model={s3_root}", "backbone.train=false", "--dry-run"]
    assert cli.main(None, warmstart.plan, warmstart.run, arguments) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"waits for the weights of '{s3_root}', which a run fetches"
    locate.resolve(s3_root)
    assert cli.main(None, warmstart.plan, warmstart.run, arguments) == 0
    assert "nothing to train" in capsys.readouterr().out.splitlines()[-1]


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
    while time.monotonic() < deadline and not registered(checkpoints) and killed.poll() is None:
        time.sleep(0.02)
    assert killed.poll() is None, killed.communicate()[1]
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate()
    assert not artifact.complete()
    assert list(checkpoints.rglob("weights-*.safetensors"))

    again = start(tmp_path / "small.yaml")
    output, errors = again.communicate(timeout=300)
    assert again.returncode == 0, errors
    assert output.splitlines()[-1] == artifact.url
    assert "step/s" not in errors  # the bar is for terminals
    assert artifact.complete()
    assert not checkpoints.exists()
    backbone = model.load(artifact.url)
    found = dict(backbone.model.named_parameters())
    weights, rows = trained_without_ray(config)
    for name, weight in weights.items():
        assert torch.equal(found[name], weight), name

    # The curve is whole: rows of the killed run, one a step, then those of the second one.
    written = curve(artifact)
    steps = [row["step"] for row in written]
    assert steps[0] == 1
    assert steps == sorted(set(steps))
    assert steps[-1] == 6
    assert [(row["stage"], row["stage_name"]) for row in written] == [(1, "reading") if step <= 3 else (2, "joint") for step in steps]
    assert written[-1]["retrieval"] == pytest.approx(rows[-1]["retrieval"])
    assert written[0]["retrieval"] is None
    assert all(0 <= row["fresh_single_accuracy"] <= 1 for row in written)
    assert storage.read_bytes(artifact.path("curve.png")).startswith(b"\x89PNG")
    client = tracking._client(tracking.place(config)[0])
    (experiment,) = [item for item in client.search_experiments() if item.name == "small"]
    last = client.search_runs([experiment.experiment_id], order_by=["attributes.start_time DESC"])[0].info.run_id
    assert [item.step for item in client.get_metric_history(last, "stage")] == steps  # the last run has all of it
    assert {"curve.parquet", "curve.png"} <= {item.path for item in client.list_artifacts(last)}

    text = storage.read_bytes(artifact.path("README.md")).decode()
    assert "not** pretrained only for generation" in text
    assert "| synthetic/bridge |" in text
    assert len(backbone.answer(backbone.prompt_ids(["Who?"]), backbone.pack([backbone.encode(backbone.tokenize(["Ada."]))]), 3)) == 1
    assert warmstart.run(config) == artifact.url  # complete: at once
    assert "is complete" in warmstart.plan(config)[0]


def test_the_curve_is_not_part_of_the_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5gemma2"}))
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "tokenizer.json").write_text("{}")
    before = locate.digest(str(tmp_path))
    rows = [{"run": "r", "step": 1, "stage": 1.0, "total": 2.0}, {"run": "r", "step": 2, "stage": 2.0, "total": 1.0, "hop": 0.5}]
    (tmp_path / "curve.png").write_bytes(card.figure(rows, {0: "reading", 1: "joint"}))
    (tmp_path / "curve.parquet").write_bytes(b"curve")
    assert locate.digest(str(tmp_path)) == before
    assert card.curve(rows, ["reading", "joint"]).to_pylist() == [
        {"step": 1, "stage": 1, "stage_name": "reading", "total": 2.0, "hop": None},
        {"step": 2, "stage": 2, "stage_name": "joint", "total": 1.0, "hop": 0.5},
    ]


def test_a_terminal_sees_the_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(warmstart, "POLL", 0.01)
    progress = str(tmp_path / "progress.json")
    storage.write_json(progress, 900)  # of a run that was cut off
    with warmstart._bar(1000, progress):
        assert not storage.exists(progress)
        storage.write_json(progress, 400)
        time.sleep(0.2)
        storage.write_json(progress, 1000)
    shown = capsys.readouterr().err
    assert "400/1000" in shown
    assert "1000/1000" in shown
    assert "900/1000" not in shown
    with warmstart._bar(1000, None):
        pass
    assert capsys.readouterr().err == ""


def test_the_card_of_a_backbone_that_learnt_no_answers_says_so(config: Config) -> None:
    recipe = config.backbone.warmstart.model_copy(update={"losses": LossConfig(answer=0, retrieval=1), "stages": None})
    retrieves = config.model_copy(update={"backbone": config.backbone.model_copy(update={"warmstart": recipe})})
    text = card.card(retrieves, lineage.dataset(config), 1000, 60.0, {"retrieval": 1.5}, {})
    assert "Trained to retrieve alone: its decoder's queries" in text
    assert "**not** trained to answer" in text
    assert "exact match" not in text


def test_losses_that_train_nothing_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="one of answer, retrieval and hop above 0"):
        load(write(tmp_path, "root"), ["backbone.warmstart.losses={answer: 0, attention: 1}"])


@pytest.mark.slow
def test_the_papers_recipe_trains_a_tiny_model_on_two_workers(tmp_path: Path) -> None:
    """configs/paper.yaml as it stands but for sizes: sharded, bfloat16, checkpointed layers, AdamW, both stages, real-data batches."""
    data, folder = tmp_path / "data", tmp_path / "tiny"
    write_world(data)
    shape = ArchitectureConfig(hidden_size=16, intermediate_size=16, encoder_layers=1, decoder_layers=2, heads=2, kv_heads=1, head_dim=8)
    tokenizer = tiny.train_tokenizer([" ".join(synthetic.vocabulary())], shape)
    tiny.save(tiny.build(shape, tokenizer, 0), tokenizer, folder)
    config = load(REPOSITORY / "configs" / "paper.yaml", [
        f"root={tmp_path / 'root'}", f"data.path={data}", "data.passages=passages.jsonl", f"backbone.model={folder}",
        "backbone.warmstart.workers=2", "backbone.warmstart.gpus_per_worker=0", "backbone.warmstart.steps=4",
        "backbone.warmstart.batch_size=4", "backbone.warmstart.micro_batch=2", "backbone.warmstart.checkpoint_every=2",
        "backbone.warmstart.warmup_steps=0", "backbone.answer_tokens=2",
    ])  # fmt: skip
    recipe = config.backbone.warmstart
    assert (recipe.shard, recipe.precision, recipe.gradient_checkpointing, recipe.optimizer) == (True, "bfloat16", True, "adamw")
    assert [stage.name for stage in recipe.stages or []] == ["reading", "joint"]
    assert "2 workers that share the weights" in warmstart.plan(config)[0]
    prepare.run(config)
    artifact = lineage.backbone(config)
    import ray

    ours = not ray.is_initialized()
    try:
        assert warmstart.run(config) == artifact.url
    finally:
        if ours:
            ray.shutdown()
    written = curve(artifact)
    weights, rows = trained_without_ray(config)
    assert [row["step"] for row in written] == [row["step"] for row in rows] == [2, 3, 4]
    for one, other in zip(written, rows, strict=True):
        for name in ("total", "answer", "retrieval", "hop"):
            assert one.get(name) == (pytest.approx(other[name], rel=0.01) if name in other else None)
    found = dict(model.load(artifact.url).model.named_parameters())
    moved = max((found[name] - weight).abs().max().item() for name, weight in weights.items())
    assert moved < 0.01  # bfloat16 of the artifact, and of the arithmetic
    assert "AdamW" in storage.read_bytes(artifact.path("README.md")).decode()
