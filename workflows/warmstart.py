"""Warm-starts a backbone with Ray Train: question answering over packed, separately encoded chunks.

    python workflows/warmstart.py --config configs/quickstart.yaml backbone.train=true [section.key=value ...] [--dry-run]
    ray job submit --address http://HEAD:8265 --working-dir . -- python workflows/warmstart.py --config configs/paper.yaml root=s3://bucket/run

Needs the dataset (workflows/prepare.py). Without `backbone.train` there is nothing to do: the backbone is `backbone.model`.
Cut off at any point, the same command goes on from the last checkpoint, to the same weights. Checkpoints lie beside the
artifact, in <root>/backbone/<fingerprint>.training, until it is complete.
"""

from __future__ import annotations

import hashlib
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from intra import cli, cluster, lineage, storage, tracking
from intra.artifact import Artifact
from intra.config import Config
from intra.errors import UserError, WorkflowError

READING_QUESTIONS = 300  # of the test split, for the model card's scores
READING_CHUNKS = 5


def plan(config: Config) -> list[str]:
    """What exists and what will be made. Makes nothing."""
    if not config.backbone.train:
        return [f"warmstart: nothing to train; the backbone is '{config.backbone.model}' ({lineage.backbone(config).url})"]
    backbone, dataset = lineage.backbone(config), lineage.dataset(config)
    if backbone.complete():
        return [f"warmstart: backbone {backbone.url} is complete"]
    recipe = config.backbone.warmstart
    start = "random weights" if lineage.from_scratch(config) else f"'{config.backbone.model}'"
    waits = "" if dataset.complete() else f"; waits for the dataset {dataset.url} (workflows/prepare.py)"
    return [
        f"warmstart: backbone {backbone.url}: {recipe.steps:,} steps of {recipe.batch_size} worlds with {recipe.questions} questions each, "
        f"from {start}, with {recipe.workers} workers; losses {recipe.losses.model_dump()}{waits}"
    ]


def run(config: Config) -> str:
    """Trains the backbone where it is to be trained and is not complete. Returns the place of the backbone."""
    backbone = lineage.backbone(config)
    if not config.backbone.train or backbone.complete():
        return backbone.url
    manifest = lineage.dataset(config).manifest()
    if config.data.source != "synthetic" and not any(splits.get("train") for splits in manifest["questions"].values()):
        raise UserError("backbone.train: the dataset has no training questions; add some (data.train_split) or set backbone.train=false")
    with tracking.step(config, "warmstart", backbone) as step:
        _make(config, backbone, step)
    return backbone.url


# -- on the driver ----------------------------------------------------------------------------------------------------


def _make(config: Config, artifact: Artifact, step: tracking.Run) -> None:
    dataset = lineage.dataset(config)
    manifest = dataset.manifest()
    step.log_input("questions", manifest["questions_sha256"], dataset.url)
    training = f"{artifact.url}.training"
    started = time.monotonic()
    checkpoint, metrics = _fit(config, training, step)
    seconds = time.monotonic() - started
    module = _module(config, dataset.url)
    with checkpoint.as_directory() as folder:
        _load(module, None, Path(folder))
    backbone = module.backbone
    scores = _reading(config, backbone)
    step.log_metrics({**{f"reading_{name}": value for name, (value, _) in scores.items()}, "seconds": seconds})
    from intra.backbone import tiny

    dtype = {"float32": "float", "bfloat16": "bfloat16"}[config.backbone.dtype]
    with tempfile.TemporaryDirectory() as temporary:
        tiny.save(getattr(backbone.model, dtype)(), backbone.tokenizer, temporary)
        parameters = sum(parameter.numel() for parameter in backbone.model.parameters())
        (Path(temporary) / "README.md").write_text(_card(config, dataset, parameters, seconds, metrics, scores))
        step.log_artifact(Path(temporary) / "README.md", "README.md")
        digests = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(Path(temporary).iterdir())}
        storage.upload(temporary, artifact.url)
    # Not config.json, which is the model's own here.
    storage.write_json(artifact.path("run.json"), tracking.resolved(config))
    artifact.finish(
        {
            "dataset": dataset.fingerprint,
            "steps": config.backbone.warmstart.steps,
            "parameters": parameters,
            "losses": config.backbone.warmstart.losses.model_dump(),
            "sha256": digests,
            "reading": {name: value for name, (value, _) in scores.items()},
        }
    )
    storage.remove(training)


def _fit(config: Config, training: str, step: tracking.Run) -> tuple[Any, dict[str, float]]:
    """Trains on the cluster; the last checkpoint and its metrics. Raises WorkflowError where the workers failed."""
    cluster.connect(config)
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchConfig, TorchTrainer

    recipe = config.backbone.warmstart
    on_gpu = recipe.gpus_per_worker > 0
    resources = {"CPU": recipe.threads} | ({"GPU": recipe.gpus_per_worker} if on_gpu else {})
    trainer = TorchTrainer(
        _worker,
        train_loop_config={"config": config.model_dump(), "dataset": lineage.dataset(config).url, "tracking": [step.uri, step.run_id]},
        torch_config=TorchConfig(backend="nccl" if on_gpu else "gloo"),
        scaling_config=ScalingConfig(num_workers=recipe.workers, use_gpu=on_gpu, resources_per_worker=resources),
        run_config=RunConfig(
            name="train",
            storage_path=training,
            failure_config=FailureConfig(max_failures=2),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
        ),
    )
    try:
        result = trainer.fit()
    except TrainingFailedError as error:
        raise WorkflowError(f"warm start in {training}: {' '.join(str(error).split())[:600]}; the same command goes on from the last "
                            "checkpoint") from error  # fmt: skip
    if result.checkpoint is None:
        raise WorkflowError(f"warm start in {training}: no checkpoint was written; delete the folder and run the same command again")
    return result.checkpoint, dict(result.metrics or {})


# -- on a worker ------------------------------------------------------------------------------------------------------


def _worker(settings: dict[str, Any]) -> None:
    """One training process. Everything it does depends on the configuration, its rank and the checkpoint alone."""
    import ray.train
    import torch
    import torch.distributed

    from intra.backbone import curriculum, warmstart
    from intra.config import parse
    from intra.data.schema import read_pool, read_questions

    config = parse(settings["config"])
    recipe = config.backbone.warmstart
    torch.set_num_threads(recipe.threads)
    context = ray.train.get_context()
    rank, workers = context.get_world_rank(), context.get_world_size()
    dataset = settings["dataset"]
    module = _module(config, dataset)
    if recipe.gpus_per_worker > 0:
        module.to("cuda")
    optimizer = warmstart.optimizers(module, recipe)
    start = 0
    resumed = ray.train.get_checkpoint()
    if resumed is not None:
        with resumed.as_directory() as folder:
            start = _load(module, optimizer, Path(folder))
    if config.data.source == "synthetic":
        batches = curriculum.synthetic_batches(config, module.backbone, rank, workers)
    else:
        batches = curriculum.question_batches(config, module.backbone, read_pool(dataset), read_questions(dataset, "train"), rank, workers)
    log = tracking.attach(*settings["tracking"]) if rank == 0 else None

    def reduce(gradients: list[torch.Tensor]) -> None:
        for gradient in gradients:
            torch.distributed.all_reduce(gradient)
            gradient /= workers

    def checkpoint(step: int, metrics: dict[str, float]) -> None:
        if log is None:
            ray.train.report(metrics)
            return
        log.log_metrics(metrics, step)
        with tempfile.TemporaryDirectory() as folder:
            _save(module, optimizer, step, Path(folder))
            ray.train.report({**metrics, "step": step}, checkpoint=ray.train.Checkpoint.from_directory(folder))

    warmstart.train(module, optimizer, batches, recipe, start=start, reduce=reduce if workers > 1 else None, checkpoint=checkpoint)


def _module(config: Config, dataset: str) -> Any:
    """The backbone in training, at its start: random weights and the tokenizer of the dataset (its URL), or the given model; float32."""
    from intra.backbone import locate, model, tiny, warmstart

    if lineage.from_scratch(config):
        tokenizer = locate.load_tokenizer(storage.join(dataset, "tokenizer"))
        built = tiny.build(config.backbone.architecture, tokenizer, config.seed)
        backbone = model.Backbone(built, tokenizer, config.backbone.prompt)
    else:
        backbone = model.load(config.backbone.model, config.backbone.revision, dtype="float32", device="cpu", prompt=config.backbone.prompt)
    backbone.model.requires_grad_(True)
    return warmstart.WarmStart(backbone, config.backbone.warmstart.losses, config.backbone.warmstart.pooled_length)


def _save(module: Any, optimizer: Any, step: int, folder: Path) -> None:
    import torch
    from safetensors.torch import save_file

    weights = {name: parameter.detach().cpu().contiguous() for name, parameter in module.named_parameters()}
    save_file(weights, folder / "weights.safetensors", metadata={"step": str(step)})
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")


def _load(module: Any, optimizer: Any, folder: Path) -> int:
    """Puts a checkpoint's weights (and optimizer state) in place; returns its number of finished steps."""
    import torch
    from safetensors import safe_open

    with safe_open(str(folder / "weights.safetensors"), framework="pt") as file, torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(file.get_tensor(name))
        step = int(file.metadata()["step"])
    if optimizer is not None:
        optimizer.load_state_dict(torch.load(folder / "optimizer.pt", weights_only=True))
    return step


# -- the model card ---------------------------------------------------------------------------------------------------


def _reading(config: Config, backbone: Any) -> dict[str, tuple[float, int]]:
    """Exact match of test questions read from their gold and random chunks, by benchmark and type: name -> (value, questions)."""
    import torch

    from intra.data.chunking import chunk_text
    from intra.data.schema import read_pool, read_questions
    from intra.evaluation.metrics import exact_match

    dataset = lineage.dataset(config).url
    pool, questions = read_pool(dataset), [item for item in read_questions(dataset, "test") if item.answers and item.gold]
    rng = random.Random(f"intra warm start reading {config.seed}")
    questions = rng.sample(questions, min(READING_QUESTIONS, len(questions)))
    backbone.model.eval()
    hits: dict[str, list[float]] = {}
    with torch.no_grad():
        for question in questions:
            rows = list(dict.fromkeys(pool.row_of[group[0]] for group in question.gold))
            while len(rows) < min(READING_CHUNKS, len(pool)):
                row = rng.randrange(len(pool))
                if row not in rows:
                    rows.append(row)
            texts = [chunk_text(pool.titles[row], pool.texts[row], config.data.template) for row in rows]
            memory = backbone.pack([backbone.encode(backbone.tokenize(texts))])
            answer = backbone.answer(backbone.prompt_ids([question.question]), memory, config.backbone.answer_tokens)[0]
            name = f"{question.benchmark}/{question.type}" if question.type else question.benchmark
            hits.setdefault(name, []).append(exact_match(answer, question.answers))
    return {name: (sum(values) / len(values), len(values)) for name, values in sorted(hits.items())}


def _card(
    config: Config, dataset: Artifact, parameters: int, seconds: float, metrics: dict[str, float], scores: dict[str, tuple[float, int]]
) -> str:
    recipe, architecture = config.backbone.warmstart, config.backbone.architecture
    weights = recipe.losses.model_dump()
    losses = ", ".join(f"{name} {weight}" for name, weight in weights.items() if weight)
    kinds = {
        "retrieval": "its decoder's queries were trained to find the gold chunks among those of a batch",
        "hop": "early layers to find the first of them and late layers the last",
        "attention": "its cross-attention to look at the answer's words (late layers) and at those that name the last chunk (early ones)",
    }
    supervised = [text for name, text in kinds.items() if weights[name]]
    supervision = (
        f"Trained with supervision beyond answers: {'; '.join(supervised)}. It is **not** pretrained only for generation."
        if supervised
        else "Trained on answers alone, without any supervision of retrieval."
    )
    start = (
        f"random weights ({architecture.encoder_layers} encoder and {architecture.decoder_layers} decoder layers, hidden size "
        f"{architecture.hidden_size}, {architecture.heads} heads, {architecture.kv_heads} key-value heads)"
        if lineage.from_scratch(config)
        else f"`{config.backbone.model}`"
    )
    data = (
        f"mini-worlds of the synthetic generator (seed {config.seed}, training names only)"
        if config.data.source == "synthetic"
        else f"the training questions of the dataset {dataset.fingerprint} (source `{config.data.source}`)"
    )
    rows = "\n".join(f"| {name} | {value:.3f} | {count} |" for name, (value, count) in scores.items())
    length = f"{recipe.steps:,} steps of {recipe.batch_size} worlds with {recipe.questions} questions each"
    last = ", ".join(f"{name} {value:.3f}" for name, value in sorted(metrics.items()) if isinstance(value, float))
    return f"""---
library_name: transformers
license: apache-2.0
tags: [t5gemma2, intra]
---
# A warm-started T5Gemma 2 for intrinsic retrieval

Text only; {parameters:,} parameters (`T5Gemma2ForConditionalGeneration`, unmodified). {supervision}

- Data: {data}.
- Start: {start}.
- Loss weights: {losses}.
- Training: {length}; seed {config.seed}; {seconds / 60:.1f} minutes with {recipe.workers} worker(s) of
  {recipe.threads} thread(s) (since the last start, where the run was cut off).
- Command: `python workflows/warmstart.py --config configs/{config.tracking.experiment}.yaml backbone.train=true`
- Training metrics, mean of the last steps: {last or "none"}.

Reading: exact match on test questions, answered from the stored states of their gold chunks and random ones, {READING_CHUNKS} in all.

| benchmark/type | exact match | questions |
|---|---|---|
{rows}
"""


if __name__ == "__main__":
    sys.exit(cli.main(__doc__, plan, run))
