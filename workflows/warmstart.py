"""Warm-starts a backbone with Ray Train: question answering over packed, separately encoded chunks.

    python workflows/warmstart.py --config configs/quickstart.yaml backbone.train=true [section.key=value ...] [--dry-run]
    ray job submit --address http://HEAD:8265 --working-dir . -- python workflows/warmstart.py --config configs/paper.yaml \\
        root=s3://bucket/run data.path=s3://bucket/data tracking.uri=http://MLFLOW:5000

Needs the dataset (workflows/prepare.py) and, over a frozen encoder, the store (workflows/encode.py), whose states it reads. Without
`backbone.train` there is nothing to do: the backbone is `backbone.model`.
Makes <root>/backbone/<fingerprint>/: the model directory, README.md, curve.parquet, curve.png and, last, manifest.json. Cut off at any
point, the same command goes on from the last checkpoint, to the same weights. Checkpoints lie beside the artifact, in
<root>/backbone/<fingerprint>.training, until it is complete.
"""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from intra import cli, cluster, lineage, storage, tracking
from intra.artifact import Artifact
from intra.backbone import card, whitened
from intra.config import Config
from intra.data import files
from intra.errors import UserError, WorkflowError
from intra.store import claim

if TYPE_CHECKING:
    from intra.data.schema import Pool, Question
    from intra.retrieval.negatives import Rows

NEAR = 50  # of BM25's ranking of a question, from which distractors are drawn
LEXICAL = "bm25"  # below a run's folder: what BM25 ranks near the training questions
CURVE = "curve.json"  # of a checkpoint: the rows so far
POLL = 2.0  # seconds between two looks at the progress, and between two notes of it


def plan(config: Config) -> list[str]:
    """What exists and what will be made. Makes nothing."""
    if not config.backbone.train:
        return [f"warmstart: nothing to train; the backbone is '{config.backbone.model}' ({lineage.backbone(config).url})"]
    dataset = lineage.dataset(config)
    if lineage.over_encoder(config) and not dataset.complete():
        return [f"warmstart: waits for the dataset {dataset.url} (workflows/prepare.py)"]
    backbone = lineage.backbone(config)
    if backbone.complete():
        return [f"warmstart: backbone {backbone.url} is complete"]
    recipe = config.backbone.warmstart
    start = "random weights" if lineage.from_scratch(config) else f"'{config.backbone.model}'"
    start += f" over the frozen encoder '{config.backbone.architecture.encoder}'" if lineage.over_encoder(config) else ""
    stages = "".join(f"; stage {stage.name} {stage.share:.0%}" for stage in recipe.stages or [])
    split = " that share the weights" if recipe.shard and recipe.workers > 1 else ""
    waits = "" if dataset.complete() else f"; waits for the dataset {dataset.url} (workflows/prepare.py)"
    if not waits and lineage.over_encoder(config) and not lineage.store(config).complete():
        waits = f"; waits for the store {lineage.store(config).url} (workflows/encode.py)"
    return [
        f"warmstart: backbone {backbone.url}: {recipe.steps:,} steps of {recipe.batch_size} worlds with {recipe.questions} questions each, "
        f"from {start}, with {recipe.workers} workers{split}; losses {recipe.losses.model_dump()}{stages}{waits}"
    ]


def run(config: Config) -> str:
    """Trains the backbone where it is to be trained and is not complete. Returns the place of the backbone."""
    backbone = lineage.backbone(config)
    if not config.backbone.train or backbone.complete():
        return backbone.url
    manifest = lineage.dataset(config).manifest()
    if config.data.source != "synthetic" and not any(splits.get("train") for splits in manifest["questions"].values()):
        raise UserError("backbone.train: the dataset has no training questions; add some (data.train_split) or set backbone.train=false")
    if config.data.source != "synthetic":  # a dataset that was not made to be trained on may lack answers
        described = storage.read_json(lineage.dataset(config).path("statistics.json"))["questions"]
        lacking = {name: splits["train"]["without_answer"] for name, splits in described.items() if "train" in splits}
        if any(lacking.values()):
            found = ", ".join(f"{count:,} of {name}" for name, count in lacking.items() if count)
            raise UserError(f"backbone.train: training questions have no answer ({found}); add their answers, or set backbone.train=false")
    if lineage.over_encoder(config):
        lineage.store(config).manifest()  # there, and complete
        whitened.make(config)  # as it is, unless it was deleted since the store was made
    with claim.hold(backbone) as mine:
        if not backbone.complete():  # another run may just have ended
            with tracking.step(config, "warmstart", backbone) as step:
                _make(config, backbone, step, mine)
    return backbone.url


# -- on the driver ----------------------------------------------------------------------------------------------------


def _make(config: Config, artifact: Artifact, step: tracking.Run, mine: claim.Claim) -> None:
    dataset = lineage.dataset(config)
    step.log_input("questions", dataset.manifest()["questions_sha256"], dataset.url)
    training = f"{artifact.url}.training"
    started = time.monotonic()
    checkpoint = _fit(config, training, step)
    mine.check()  # a driver that was suspended may have been taken over: the folder is the other's
    work = (config.model_dump(), checkpoint, time.monotonic() - started, (step.uri, step.run_id))
    recipe = config.backbone.warmstart
    if cluster.joined() and recipe.gpus_per_worker > 0:
        worker = {"CPU": float(recipe.threads), "GPU": 1.0}
        cluster.apart(_finish, *work, worker=worker, name=f"warm start in {training}")
    else:
        _finish(*work)
    storage.remove(training)


def _finish(values: dict[str, Any], checkpoint: Any, seconds: float, run: tuple[str, str]) -> None:
    """The artifact, from the last checkpoint: what the model reads, its weights, card and curve. On a GPU where its workers had some."""
    import torch

    from intra.backbone import checkpoint as checkpoints
    from intra.backbone import curriculum, tiny
    from intra.config import parse
    from intra.data.schema import to_parquet

    config, step = parse(values), tracking.attach(*run)
    artifact, dataset = lineage.backbone(config), lineage.dataset(config)
    module = _module(config, dataset.url)
    with checkpoint.as_directory() as folder:
        checkpoints.load(module, None, Path(folder))
        rows = json.loads((Path(folder) / CURVE).read_text())
    backbone = module.backbone
    if config.backbone.warmstart.gpus_per_worker > 0 and torch.cuda.is_available():
        backbone.model.to("cuda")
    stages = curriculum.stages(config.backbone.warmstart)
    reads = any(stage.recipe.losses.answer for stage in stages)
    scores = card.reading(config, backbone) if reads else {}
    step.log_metrics({**{f"reading_{name}": value for name, (value, _) in scores.items()}, "seconds": seconds})
    dtype = {"float32": "float", "bfloat16": "bfloat16"}[config.backbone.dtype]
    with tempfile.TemporaryDirectory() as temporary:
        tiny.save(getattr(backbone.model, dtype)(), backbone.tokenizer, temporary)
        parameters = sum(parameter.numel() for parameter in backbone.model.parameters())
        (Path(temporary) / "README.md").write_text(card.card(config, dataset, parameters, seconds, rows[-1], scores))
        (Path(temporary) / "curve.parquet").write_bytes(to_parquet(card.curve(rows, [stage.name for stage in stages])))
        (Path(temporary) / "curve.png").write_bytes(card.figure(rows, {stage.start: stage.name for stage in stages}))
        for name in ("README.md", "curve.parquet", "curve.png"):
            step.log_artifact(Path(temporary) / name, name)
        digests = files.digests(temporary)
        storage.upload(temporary, artifact.url)
    # Not config.json, which is the model's own here.
    storage.write_json(artifact.path("run.json"), tracking.resolved(config))
    artifact.finish(
        {
            "dataset": dataset.fingerprint,
            "steps": config.backbone.warmstart.steps,
            "parameters": parameters,
            "losses": {stage.name: stage.recipe.losses.model_dump() for stage in stages},
            "sha256": digests,
            "reading": {name: value for name, (value, _) in scores.items()},
        }
    )


def _fit(config: Config, training: str, step: tracking.Run) -> Any:
    """Trains on the cluster; the last checkpoint. Raises WorkflowError where the workers failed."""
    cluster.connect(config)
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchConfig, TorchTrainer

    recipe = config.backbone.warmstart
    on_gpu = recipe.gpus_per_worker > 0
    progress = storage.join(training, "progress.json") if sys.stderr.isatty() else None
    resources = {"CPU": recipe.threads} | ({"GPU": recipe.gpus_per_worker} if on_gpu else {})
    minutes, remedy = config.cluster.wait_minutes, "lower backbone.warmstart.workers, threads or gpus_per_worker"
    cluster.wait_for(resources, recipe.workers, minutes, "backbone.warmstart.workers", remedy, least=recipe.workers)
    trainer = TorchTrainer(
        _worker,
        train_loop_config={
            "config": config.model_dump(),
            "dataset": lineage.dataset(config).url,
            "training": training,
            "tracking": [step.uri, step.run_id],
            "progress": progress,
        },
        torch_config=TorchConfig(backend="nccl" if on_gpu else "gloo"),
        scaling_config=ScalingConfig(num_workers=recipe.workers, use_gpu=on_gpu, resources_per_worker=resources),
        run_config=RunConfig(
            name="train",
            storage_path=training,
            failure_config=FailureConfig(max_failures=2),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
        ),
    )
    cluster.forget_failure(training)
    try:
        with _bar(recipe.steps, progress):
            result = trainer.fit()
    except TrainingFailedError as error:
        raise cluster.training_failed(f"warm start in {training}", error) from error
    if result.checkpoint is None:
        raise WorkflowError(f"warm start in {training}: no checkpoint was written; delete the folder and run the same command again")
    return result.checkpoint


@contextlib.contextmanager
def _bar(steps: int, progress: str | None) -> Iterator[None]:
    """On a terminal, a bar of the steps that rank 0 notes in the file `progress`: the workers' own output does not come here."""
    if progress is None:
        yield
        return
    storage.remove(progress)  # of a run that was cut off
    over = threading.Event()

    def watch() -> None:
        bar, last = None, False
        while not last:
            last = over.wait(POLL)
            if storage.exists(progress):
                done = storage.read_json(progress)
                bar = bar or tqdm(total=steps, initial=done, desc="warmstart", unit="step")
                bar.update(done - bar.n)
        if bar:
            bar.close()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


# -- on a worker ------------------------------------------------------------------------------------------------------


def _worker(settings: dict[str, Any]) -> None:
    with cluster.final_failures(settings["training"], settings["tracking"][1]):
        _train(settings)


def _train(settings: dict[str, Any]) -> None:
    """One training process. Everything it does depends on the configuration, its rank and the checkpoint alone."""
    import ray.train
    import ray.train.torch
    import torch
    import torch.distributed

    from intra.backbone import checkpoint as checkpoints
    from intra.backbone import curriculum, warmstart
    from intra.config import parse
    from intra.data import cloze
    from intra.data.schema import read_pool, read_questions

    config = parse(settings["config"])
    recipe = config.backbone.warmstart
    torch.set_num_threads(recipe.threads)
    context = ray.train.get_context()
    rank, workers = context.get_world_rank(), context.get_world_size()
    dataset = settings["dataset"]
    device = torch.device("cpu")
    if recipe.gpus_per_worker > 0:
        device = ray.train.torch.get_device()
        torch.cuda.set_device(device)
    pool = read_pool(dataset) if config.data.source != "synthetic" else None
    resumed = ray.train.get_checkpoint()
    module = _module(config, dataset)
    warmstart.place(module, recipe, device, workers)
    optimizer = warmstart.optimizers(module, recipe)
    start, rows = 0, []
    if resumed is not None:
        with resumed.as_directory() as folder:
            start = checkpoints.load(module, optimizer, Path(folder))
            rows = json.loads((Path(folder) / CURVE).read_text())
    if pool is None:
        batches = curriculum.synthetic_batches(config, module.backbone, rank, workers)
    else:
        questions = read_questions(dataset, "train")
        lexical = storage.join(settings["training"], LEXICAL)
        near = _near(pool, questions, lexical, rank, workers) if recipe.bm25_distractors or recipe.bm25_extra else None
        made = cloze.questions(pool, config.seed) if recipe.cloze_share else []
        batches = curriculum.question_batches(config, module.backbone, pool, questions, rank, workers, near, made)
    fresh = curriculum.fresh_batches(config, module.backbone)
    log = tracking.attach(*settings["tracking"]) if rank == 0 else None
    noted = float("-inf")

    def show(row: dict[str, Any]) -> None:
        """Logs a row of the curve, once a run: the rows of a run that was cut off are logged again by the next."""
        if log is not None and row["run"] != log.run_id:
            log.log_metrics({name: value for name, value in row.items() if name not in ("run", "step")}, row["step"])
            row["run"] = log.run_id

    def reduce(tensors: list[torch.Tensor]) -> None:
        for tensor in tensors:
            torch.distributed.all_reduce(tensor)
            tensor /= workers

    def checkpoint(step: int, metrics: dict[str, float]) -> None:
        row = {"run": None, "step": step, **metrics, **warmstart.measure(module, fresh)}
        rows.append(row)
        show(row)
        with tempfile.TemporaryDirectory() as folder:
            checkpoints.save(module, optimizer, Path(folder), step, rank, workers)
            if rank == 0:
                (Path(folder) / CURVE).write_text(json.dumps(rows))
            own = any(Path(folder).iterdir())
            ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(folder) if own else None)

    def done(step: int) -> None:
        nonlocal noted
        if rank == 0 and settings["progress"] and (step == recipe.steps or time.monotonic() >= noted + POLL):
            storage.write_json(settings["progress"], step)
            noted = time.monotonic()

    for row in rows:
        show(row)
    done(start)
    warmstart.train(
        module, optimizer, batches, recipe, start=start, reduce=reduce if workers > 1 else None, checkpoint=checkpoint, done=done
    )


def _near(pool: Pool, questions: Sequence[Question], folder: str, rank: int, workers: int) -> dict[str, Rows]:
    """BM25's first chunks of each question that share a word with it, by question id; kept below the URL `folder` for all workers."""
    import torch.distributed

    from intra.baselines.lexical import bm25
    from intra.retrieval import training

    together = training.Workers(rank, workers, barrier=torch.distributed.barrier) if workers > 1 else training.Workers()
    found = training.method_rows(lambda: bm25(pool), pool.row_of, questions, NEAR, folder, together)
    return {question.question_id: rows for question, rows in zip(questions, found, strict=True)}


def _module(config: Config, dataset: str) -> Any:
    """The backbone in training, at its start: random weights and the tokenizer of the dataset (its URL), or the given model; float32."""
    from intra.backbone import adopted, locate, model, tiny, warmstart
    from intra.store.reader import ChunkStore

    stored = None
    if lineage.over_encoder(config):
        backbone = whitened.start(config)
        if config.data.source != "synthetic":  # whose mini-worlds no store holds
            stored = ChunkStore(lineage.store(config).url).states_of
    elif lineage.from_scratch(config):
        tokenizer = locate.load_tokenizer(storage.join(dataset, "tokenizer"))
        backbone = model.Backbone(tiny.build(config.backbone.architecture, tokenizer, config.seed), tokenizer, config.backbone.prompt)
    else:
        backbone = model.load(config.backbone.model, config.backbone.revision, dtype="float32", device="cpu", prompt=config.backbone.prompt)
    backbone.model.requires_grad_(True)
    if backbone.frozen_encoder:
        adopted.freeze(backbone.model)
    recipe = config.backbone.warmstart
    equal = recipe.head_weights == "equal"
    return warmstart.WarmStart(backbone, recipe.losses, recipe.pooled_length, recipe.retrieval_scoring, equal, stored)


if __name__ == "__main__":
    sys.exit(cli.main(__doc__, plan, run))
