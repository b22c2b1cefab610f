"""Encodes every chunk of the pool once, with Ray Data: the chunk store (token states and pooled vectors in shards).

    python workflows/encode.py --config configs/quickstart.yaml [section.key=value ...] [--dry-run]
    ray job submit --address http://HEAD:8265 --working-dir . -- python workflows/encode.py --config configs/paper.yaml root=s3://bucket/run

Needs the dataset (workflows/prepare.py) and, with backbone.train=true, the backbone (workflows/warmstart.py). Cut off at any
point, the same command redoes only the shards that are not committed. The store's bytes do not depend on `store.workers`.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from intra import cli, cluster, lineage
from intra.artifact import Artifact
from intra.backbone import locate
from intra.config import Config
from intra.errors import UserError, WorkflowError
from intra.store.format import ITEM_BYTES, Shard, committed
from intra.store.format import shards as cut

WORKERS_A_LOADER = 8  # tokenising is light: one loader feeds many encoders
LOADER_CPUS = 0.5


def plan(config: Config) -> list[str]:
    """What exists, what will be made, and how large it is. Makes nothing."""
    dataset = lineage.dataset(config)
    if not dataset.complete():
        return [f"encode: waits for the dataset {dataset.url} (workflows/prepare.py)"]
    backbone = lineage.backbone(config)
    ready = not config.backbone.train or backbone.complete()
    waits = "" if ready else f"; waits for the backbone {backbone.url} (workflows/warmstart.py)"
    store = lineage.store(config)
    counts = dataset.manifest()
    shards = cut(counts["chunks"], config.store.shard_chunks)
    width = _hidden_size(config) * ITEM_BYTES[config.store.dtype]
    states, pooled = counts["tokens"] * width, counts["chunks"] * config.retriever.pooled_length * width
    size = (
        f"{counts['chunks']:,} chunks, {counts['tokens']:,} tokens in {len(shards):,} shards; "
        f"{_size(states)} of states and {_size(pooled)} of pooled vectors ({config.store.dtype})"
    )
    if store.complete():
        return [f"encode: store {store.url} is complete ({size})"]
    done = len(committed(store, shards))
    workers = min(config.store.workers, len(shards) - done)
    todo = f"{done:,} shards are committed, {len(shards) - done:,} to make with {workers} workers"
    return [f"encode: store {store.url}: {size}; {todo}{waits}"]


def run(config: Config) -> str:
    """Makes the store where it is not complete. Returns its URL."""
    store = lineage.store(config)
    if store.complete():
        return store.url
    from intra import tracking

    device = _device(config)
    dataset = lineage.dataset(config)
    if config.backbone.train:
        lineage.backbone(config).manifest()  # there, and complete
    with tracking.step(config, "encode", store) as step:
        _encode(config, store, dataset, device, step)
    return store.url


def _encode(config: Config, store: Artifact, dataset: Artifact, device: str, step: Any) -> None:
    from intra.data.schema import read_pool
    from intra.store import writer

    pool = dataset.manifest()
    step.log_input("pool", pool["pool_sha256"], dataset.url)
    # A trained backbone is an artifact below the root; any other is found by each machine for itself.
    model = lineage.backbone(config).url if config.backbone.train else config.backbone.model
    model = str(Path(model).resolve()) if Path(model).is_dir() else model
    revision = None if config.backbone.train else config.backbone.revision
    source = writer.Source(model, revision, locate.digest(model, revision), config.backbone.dtype, device, config.store.threads)
    shards = cut(pool["chunks"], config.store.shard_chunks)
    commits = committed(store, shards)
    todo = [shard for shard in shards if shard.number not in commits]
    started, tokens = time.monotonic(), 0
    if todo:
        cluster.connect(config)
        with tqdm(total=len(shards), initial=len(shards) - len(todo), desc="encode", unit="shard", disable=None) as bar:
            for line in _made(config, store, dataset, source, todo):
                tokens += line["tokens"]
                bar.update()
                bar.set_postfix_str(f"{tokens / (time.monotonic() - started):,.0f} tokens/s")
        commits = committed(store, shards)
    manifest = writer.finish(
        store, read_pool(dataset.url).chunk_ids, shards, commits, _settings(config), backbone=source.digest,
        hidden_size=_hidden_size(config), pooled_length=config.retriever.pooled_length, dtype=config.store.dtype,
        threads=config.store.threads,
    )  # fmt: skip
    seconds = time.monotonic() - started
    print(
        f"encode: {manifest['rows']:,} chunks, {manifest['tokens']:,} tokens, {_size(manifest['bytes'])} in {len(shards):,} shards, "
        f"{len(todo):,} of them made now, in {seconds:.0f} s"
    )
    step.log_metrics(
        {
            "shards": len(shards),
            "shards_made_now": len(todo),
            "chunks": manifest["rows"],
            "tokens": manifest["tokens"],
            "bytes": manifest["bytes"],
            "seconds": seconds,
            "tokens_per_second": tokens / seconds if seconds else 0.0,
        }
    )


def _made(config: Config, store: Artifact, dataset: Artifact, source: Any, todo: Sequence[Shard]) -> Iterator[dict[str, Any]]:
    """Makes the shards on the cluster; one line of numbers for each, when it is committed."""
    import ray
    from ray.data import ActorPoolStrategy
    from ray.exceptions import RayError

    from intra.store.writer import EncodeCommit, LoadTokenize

    cluster.quiet_data()
    smallest, largest = _workers(config, len(todo))
    rows = ray.data.from_items(
        [{"shard": shard.number, "first": shard.first, "rows": shard.rows} for shard in todo], override_num_blocks=len(todo)
    )
    rows = rows.map(
        cluster.Stage,
        fn_constructor_args=(LoadTokenize, dataset.url, source.model, source.revision, config.data.template),
        compute=ActorPoolStrategy(size=math.ceil(smallest / WORKERS_A_LOADER)),
        num_cpus=LOADER_CPUS,
    )
    rows = rows.map(
        cluster.Stage,
        fn_constructor_args=(EncodeCommit, store, source, config.retriever.pooled_length, config.store.batch_tokens, config.store.dtype),
        compute=ActorPoolStrategy(min_size=smallest, max_size=largest, max_tasks_in_flight_per_actor=2),
        num_cpus=config.store.threads,
        num_gpus=config.store.gpus_per_worker or None,
    )
    try:
        for row in rows.iter_rows():
            cluster.check(row, f"encode, shard {row['shard']:05d}")
            yield row
    except RayError as error:
        reason = " ".join(str(error).split())[:300]
        raise WorkflowError(f"encode: a worker was lost ({reason}); committed shards are kept: run the same command again") from error


def _workers(config: Config, shards: int) -> tuple[int, int]:
    """How many encoders at once: those that fit the cluster as it stands, and those wanted (an autoscaler may add machines)."""
    wanted = min(config.store.workers, shards)
    free = cluster.resources()
    per_worker = {"CPU": float(config.store.threads), "GPU": config.store.gpus_per_worker}
    free["CPU"] -= LOADER_CPUS * math.ceil(wanted / WORKERS_A_LOADER)
    fit = min(int(free[name] / amount) for name, amount in per_worker.items() if amount)
    if fit < wanted:
        needs = " and ".join(f"{amount:g} {name}" for name, amount in per_worker.items() if amount)
        if fit < 1 and not cluster.joined():
            raise UserError(f"store.workers: no worker of {needs} fits this machine; lower store.gpus_per_worker or store.threads")
        print(
            f"encode: {max(fit, 0)} of {wanted} workers ({needs} each) fit the cluster now; the others wait for machines", file=sys.stderr
        )
    return max(1, min(fit, wanted)), wanted


def _device(config: Config) -> str:
    """Where the workers compute. Ray hides the GPUs from a worker that asks for none: never let that decide in silence."""
    device = config.backbone.device
    if config.store.gpus_per_worker == 0:
        if device not in ("auto", "cpu"):
            raise UserError(f"backbone.device={device}, but store.gpus_per_worker is 0; set store.gpus_per_worker=1 or backbone.device=cpu")
        return "cpu"
    return device


def _settings(config: Config) -> dict[str, Any]:
    """What shaped the store's bytes, and no more: two runs that share the store agree on it. MLflow has the whole configuration."""
    return {
        "data": {"template": config.data.template},
        "backbone": config.backbone.model_dump(include={"model", "revision", "train", "dtype"}),
        "store": config.store.model_dump(exclude={"workers", "gpus_per_worker"}),
        "retriever": {"pooled_length": config.retriever.pooled_length},
    }


def _hidden_size(config: Config) -> int:
    if lineage.from_scratch(config):
        return config.backbone.architecture.hidden_size
    folder = locate.resolve(config.backbone.model, config.backbone.revision)
    return int(json.loads((folder / "config.json").read_text())["decoder"]["hidden_size"])


def _size(count: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.4g} {unit}"
        count /= 1000
    return f"{count:.4g} TB"


if __name__ == "__main__":
    sys.exit(cli.main(__doc__, plan, run))
