"""Trains the retriever with Ray Train: retrieval tokens and layer weights, against the frozen backbone and the chunk store.

    python workflows/train.py --config configs/quickstart.yaml [section.key=value ...] [--dry-run]
    ray job submit --address http://HEAD:8265 --working-dir . -- python workflows/train.py --config configs/paper.yaml \\
        root=s3://bucket/run data.path=s3://bucket/data tracking.uri=http://MLFLOW:5000

Needs the dataset (workflows/prepare.py) and the store (workflows/encode.py). Makes <root>/retriever/<fingerprint>/: model.safetensors,
config.json, README.md, curve.parquet, initial/ (S_0 of the training questions), bm25/ (their BM25 ranking, where
`retriever.train.bm25_negatives` asks for it) and, last, manifest.json. Cut off at any point, the same command goes on from the last
checkpoint, to the same bytes; they do not depend on `retriever.train.workers`. Checkpoints lie beside the artifact, in
<root>/retriever/<fingerprint>.training, until it is complete.
"""

from __future__ import annotations

import contextlib
import hashlib
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

from tqdm import tqdm

from intra import cli, cluster, lineage, storage, tracking
from intra.artifact import Artifact
from intra.backbone import locate
from intra.config import Config
from intra.errors import UserError
from intra.store import claim

CURVE = "curve.parquet"
INITIAL = "initial"
LEXICAL = "bm25"
POLL = 2.0  # seconds between two looks at the checkpoints, for the progress bar


def plan(config: Config) -> list[str]:
    """What exists and what will be made. Makes nothing."""
    for earlier in (lineage.dataset, lineage.backbone, lineage.store):
        if earlier is lineage.backbone and not config.backbone.train:
            continue
        artifact = earlier(config)
        if not artifact.complete():
            return [f"train: waits for the {artifact.kind} {artifact.url} (workflows/{artifact.made_by}.py)"]
    artifact, settings = lineage.retriever(config), config.retriever
    layers, heads, hidden_size = _shape(config)
    questions = sum(splits.get("train", 0) for splits in lineage.dataset(config).manifest()["questions"].values())
    frozen = "" if settings.train.train_tokens else "the weights alone are trained; "
    size = (
        f"{settings.tokens} tokens x {hidden_size} + {layers} layers x {heads} heads = {settings.tokens * hidden_size + layers * heads:,} "
        f"parameters; {frozen}{settings.train.steps:,} steps of {settings.train.batch_size} of {questions:,} questions"
    )
    if artifact.complete():
        return [f"train: retriever {artifact.url} is complete ({size})"]
    names = [name for name in storage.names(_checkpoints(artifact)) if name.endswith(".safetensors")]
    done = int(names[-1].removesuffix(".safetensors")) if names else 0
    return [f"train: retriever {artifact.url}: {size}; {done:,} steps are done; {settings.train.workers} workers"]


def run(config: Config) -> str:
    """Makes the retriever where it is not complete. Returns its URL."""
    artifact = lineage.retriever(config)
    if artifact.complete():
        return artifact.url
    device = _device(config)
    _check_prefixes(config)
    _check_questions(config)
    lineage.check_store(config)
    with claim.hold(artifact) as mine:
        if not artifact.complete():  # another run may just have ended
            with tracking.step(config, "train", artifact) as step:
                _make(config, artifact, device, step, mine)
    return artifact.url


# -- on the driver ----------------------------------------------------------------------------------------------------


def _make(config: Config, artifact: Artifact, device: str, step: tracking.Run, mine: claim.Claim) -> None:
    dataset, store = lineage.dataset(config), lineage.store(config)
    step.log_input("questions", dataset.manifest()["questions_sha256"], dataset.url)
    step.log_input("store", store.fingerprint, store.url)
    started = time.monotonic()
    # A trained backbone is an artifact below the root; any other is found by each machine for itself.
    model = (lineage.backbone(config).url, None) if config.backbone.train else (config.backbone.model, config.backbone.revision)
    _fit(
        config,
        artifact,
        {
            "config": config.model_dump(),
            "dataset": dataset.url,
            "store": store.url,
            "backbone": [*model, lineage.backbone(config).fingerprint, device],
            "store_fingerprint": store.fingerprint,
            "artifact": artifact.url,
            "training": _training(artifact),
            "checkpoints": _checkpoints(artifact),
            "tracking": [step.uri, step.run_id],
        },
    )
    mine.check()  # a driver that was suspended may have been taken over: what is there is the other's to complete
    from intra.retrieval.retriever import CARD, CONFIG, MODEL, Retriever

    retriever = Retriever.from_pretrained(artifact.url)
    last = _last(artifact)
    model_bytes = storage.read_bytes(artifact.path(MODEL))
    files = {MODEL: model_bytes, **{name: storage.read_bytes(artifact.path(name)) for name in (CONFIG, CARD)}}
    tags = {"fingerprint": artifact.fingerprint, "store": store.fingerprint, "backbone": retriever.settings.backbone}
    step.register_model(tracking.model_name(config), files, {**tags, "commit": tracking.commit(), "device": tracking.device()})
    step.log_metrics({"seconds": time.monotonic() - started})
    artifact.finish(
        {
            "backbone": retriever.settings.backbone,
            "store": store.fingerprint,
            "steps": config.retriever.train.steps,
            "parameters": sum(parameter.numel() for parameter in retriever.parameters()),
            "sha256": hashlib.sha256(model_bytes).hexdigest(),
            **last,
        }
    )
    storage.remove(_training(artifact))


def _fit(config: Config, artifact: Artifact, settings: dict[str, Any]) -> None:
    """Trains on the cluster. Raises WorkflowError where the workers failed."""
    cluster.connect(config)
    from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchConfig, TorchTrainer

    recipe = config.retriever.train
    on_gpu = recipe.gpus_per_worker > 0
    resources = {"CPU": recipe.threads} | ({"GPU": recipe.gpus_per_worker} if on_gpu else {})
    minutes, remedy = config.cluster.wait_minutes, "lower retriever.train.workers, threads or gpus_per_worker"
    cluster.wait_for(resources, recipe.workers, minutes, "retriever.train.workers", remedy, least=recipe.workers)
    trainer = TorchTrainer(
        _worker,
        train_loop_config=settings,
        torch_config=TorchConfig(backend="nccl" if on_gpu else "gloo"),
        scaling_config=ScalingConfig(num_workers=recipe.workers, use_gpu=on_gpu, resources_per_worker=resources),
        run_config=RunConfig(name="ray", storage_path=_training(artifact), failure_config=FailureConfig(max_failures=2)),
    )
    cluster.forget_failure(_training(artifact))
    try:
        with _progress(config, artifact):
            trainer.fit()
    except TrainingFailedError as error:
        raise cluster.training_failed(f"train {artifact.url}", error) from error


@contextlib.contextmanager
def _progress(config: Config, artifact: Artifact) -> Iterator[None]:
    """On a terminal, a bar of the steps that stand in checkpoints: the workers' own output does not come here."""
    if not sys.stderr.isatty():
        yield
        return
    over = threading.Event()

    def watch() -> None:
        with tqdm(total=config.retriever.train.steps, desc="train", unit="step") as bar:
            while not over.wait(POLL):
                for name in storage.names(_checkpoints(artifact)):
                    if name.endswith(".safetensors"):
                        bar.update(max(0, int(name.removesuffix(".safetensors")) - bar.n))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _check_questions(config: Config) -> None:
    """Raises UserError where the store does not hold the training questions' gold, or there is no training question."""
    from intra.data.schema import read_questions
    from intra.retrieval import negatives
    from intra.store.reader import ChunkStore

    dataset = lineage.dataset(config)
    questions = read_questions(dataset.url, "train")
    row_of = ChunkStore(lineage.store(config).url).row_of
    if not questions:
        raise UserError(f"dataset {dataset.url} holds no training questions; check data.train_split and run workflows/prepare.py")
    for question in questions:
        negatives.example(question, row_of, [], 0, 0)


def _check_prefixes(config: Config) -> None:
    """Raises UserError where prefixes are to be kept for a backbone whose retrieval pass begins with more than the prompt."""
    room = config.retriever.train.prefix_cache_mb
    if room and locate.FROZEN in storage.read_json(lineage.backbone(config).path("config.json")):
        raise UserError(f"retriever.train.prefix_cache_mb: found {room}; this backbone's retrieval pass echoes the question: set it to 0")


def _device(config: Config) -> str:
    """Where the workers compute. Ray hides the GPUs from a worker that asks for none: never let that decide in silence."""
    device = config.backbone.device
    if config.retriever.train.gpus_per_worker > 0:
        return device
    if device not in ("auto", "cpu"):
        raise UserError(f"backbone.device={device}, but retriever.train.gpus_per_worker is 0; set it to 1, or set backbone.device=cpu")
    return "cpu"


def _training(artifact: Artifact) -> str:
    return f"{artifact.url}.training"


def _checkpoints(artifact: Artifact) -> str:
    return storage.join(_training(artifact), "checkpoints")


def _shape(config: Config) -> tuple[int, int, int]:
    """The decoder's layers, query heads and hidden size."""
    if lineage.from_scratch(config):
        size = config.backbone.architecture
        return size.decoder_layers, size.heads, size.hidden_size
    decoder = storage.read_json(lineage.backbone(config).path("config.json"))["decoder"]
    return decoder["num_hidden_layers"], decoder["num_attention_heads"], decoder["hidden_size"]


def _last(artifact: Artifact) -> dict[str, float]:
    """Loss and recall of the last tenth of the steps."""
    import io

    import pyarrow.parquet as pq

    curve = pq.read_table(io.BytesIO(storage.read_bytes(artifact.path(CURVE))))
    tail = curve.slice(curve.num_rows - max(1, curve.num_rows // 10))
    return {name: sum(tail[name].to_pylist()) / tail.num_rows for name in ("loss", "recall")}


# -- on a worker ------------------------------------------------------------------------------------------------------


def _worker(settings: dict[str, Any]) -> None:
    with cluster.final_failures(settings["training"], settings["tracking"][1]):
        _train(settings)


def _train(settings: dict[str, Any]) -> None:
    """One training process. What it computes depends on the configuration, the artifacts and the checkpoint alone."""
    import ray.train
    import torch
    import torch.distributed as dist

    from intra.backbone import model
    from intra.baselines.lexical import bm25
    from intra.config import parse
    from intra.data.schema import read_pool, read_questions, to_parquet
    from intra.retrieval import negatives, training
    from intra.retrieval.retriever import RetrieverSettings
    from intra.store.reader import ChunkStore

    config = parse(settings["config"])
    recipe = config.retriever.train
    torch.set_num_threads(recipe.threads)
    context = ray.train.get_context()
    rank, size = context.get_world_rank(), context.get_world_size()
    name, revision, fingerprint, device = settings["backbone"]
    backbone = model.load(name, revision, dtype=config.backbone.dtype, device=device, prompt=config.backbone.prompt)
    store = ChunkStore(settings["store"])

    def gather(mine: torch.Tensor) -> torch.Tensor:
        sent = mine.to(backbone.device)
        everyone = [torch.empty_like(sent) for _ in range(size)]
        dist.all_gather(everyone, sent)
        return torch.cat(everyone).cpu()

    workers = training.Workers(rank, size, gather, dist.barrier) if size > 1 else training.Workers()
    questions = read_questions(settings["dataset"], "train")
    rows = training.initial_rows(
        backbone, store, questions, negatives.depth(questions, config.retriever.initial_context, recipe.hard_negatives),
        config.retriever.initial_scoring, config.retriever.tile_chunks, storage.join(settings["artifact"], INITIAL), workers,
    )  # fmt: skip
    lexical_rows: list[negatives.Rows] = [()] * len(questions)
    if recipe.bm25_negatives:
        lexical_rows = training.method_rows(
            lambda: bm25(read_pool(settings["dataset"])), store.row_of, questions,
            negatives.bm25_depth(questions, recipe.bm25_negatives, recipe.bm25_skip), storage.join(settings["artifact"], LEXICAL), workers,
        )  # fmt: skip
    examples = [
        negatives.example(
            question, store.row_of, mine, config.retriever.initial_context, recipe.hard_negatives, lexical, recipe.bm25_negatives,
            recipe.bm25_skip,
        )
        for question, mine, lexical in zip(questions, rows, lexical_rows, strict=True)
    ]  # fmt: skip
    shape = RetrieverSettings(
        tokens=config.retriever.tokens,
        layers=backbone.layers,
        heads=backbone.heads,
        hidden_size=backbone.hidden_size,
        pooled_length=config.retriever.pooled_length,
        initial_context=config.retriever.initial_context,
        initial_scoring=config.retriever.initial_scoring,
        scoring=config.retriever.scoring,
        temperature=recipe.temperature,
        backbone=fingerprint,
        store=settings["store_fingerprint"],
    )
    trainer = training.Trainer(
        backbone, store, training.start(backbone, store, shape, examples, config.seed), examples, recipe, config.seed, workers
    )
    log = tracking.attach(*settings["tracking"]) if rank == 0 else None
    logged = 0

    def after(trainer: training.Trainer) -> None:
        nonlocal logged
        if log is not None:
            means = trainer.curve[logged : trainer.done].mean(dim=0).tolist()
            log.log_metrics(dict(zip(training.COLUMNS, means, strict=True)), trainer.done)
        logged = trainer.done

    training.resume(trainer, settings["checkpoints"])
    logged = trainer.done
    training.train(trainer, settings["checkpoints"], after)
    if rank == 0:
        trainer.retriever.save_pretrained(settings["artifact"], run=tracking.resolved(config))
        storage.write_bytes(storage.join(settings["artifact"], CURVE), to_parquet(training.curve_table(trainer)))


if __name__ == "__main__":
    sys.exit(cli.main(__doc__, plan, run))
