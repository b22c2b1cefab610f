"""What encoding reaches, as ratios taken in one run: of the bare model, of this machine's matrix product, of two workers to one.

The job is workflows/encode.py's own, from the first shard's start to the last one's end (`Progress.active`); the bare loop is the encoder
alone over the same chunks in the same batches, tokens at hand, nothing pooled or written. Each is done `store.benchmark.repeats` times in
turn, and the shortest of each counts: another program that takes the machine for a moment lengthens one of them, not all.

The pool is of the configuration's kind, of about `store.benchmark.chunks` chunks. A backbone that the configuration would make from scratch
has random weights here: speed does not depend on them.
"""

from __future__ import annotations

import math
import random
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from intra import lineage, storage
from intra.backbone import locate, whitened
from intra.config import Config, varied
from intra.data import files
from intra.store import forecast, writer
from intra.store.format import shards
from intra.store.progress import Progress

if TYPE_CHECKING:
    from intra.backbone.model import Backbone

RANDOM_BATCH = 32  # chunks, in random order: the batches that ours are compared with
SIDES = {"cpu": (512, 1024, 2048), "cuda": (4096, 8192, 16384)}  # of the square matrices whose product gives the peak
PRODUCTS = 5  # of each size, in each repeat

Ids = list[list[int]]


def run(
    config: Config, prepare: Callable[[Config], object], encode: Callable[[Config], Progress], fits: Callable[[Config], int]
) -> list[dict[str, Any]]:
    """The records {name, value, unit}. `prepare` makes the dataset, `encode` the store and says how it went; `fits` says how many workers
    find a place. Works below <root>/benchmark, and leaves nothing there."""
    work = storage.join(storage.absolute(config.root), "benchmark", f"encode-{uuid.uuid4().hex[:8]}")
    try:
        return _measured(_small(config, work), prepare, encode, fits)
    finally:
        storage.remove(work)


def _small(config: Config, root: str) -> Config:
    """The same encoding of few chunks, elsewhere."""
    chunks = config.store.benchmark.chunks
    if config.data.source == "synthetic":
        pool = [f"data.synthetic.chunks={chunks}", "data.synthetic.train_questions=1", "data.synthetic.test_questions=1"]
    else:
        pool = [f"data.pool_chunks={chunks}", "data.pool_limit=null", "data.pool_tokens=null", "data.question_limit=1"]
    keep = lineage.from_scratch(config)
    return varied(config, [f"root={root}", *pool, "store.reuse=false", "data.near_duplicates=null", f"backbone.train={str(keep).lower()}"])


def _measured(
    config: Config, prepare: Callable[[Config], object], encode: Callable[[Config], Progress], fits: Callable[[Config], int]
) -> list[dict[str, Any]]:
    from intra.backbone.model import load

    prepare(config)
    if lineage.over_encoder(config):
        whitened.make(config)
    elif config.backbone.train:
        _random_weights(config)
    dataset = lineage.dataset(config)
    model, revision = lineage.model(config)
    backbone = load(model, revision, dtype=config.backbone.dtype, device=forecast.device(config))
    tokenize = writer.LoadTokenize(dataset.url, model, revision, config.data.template)
    parts = [
        writer.tokens_of(tokenize({"shard": shard.number, "first": shard.first, "rows": shard.rows}))[1]
        for shard in shards(dataset.manifest()["chunks"], config.store.shard_chunks)
    ]
    everything = [ids for part in parts for ids in part]
    random.Random(config.seed).shuffle(everything)
    ours = [[part[place] for place in batch] for part in parts for batch in writer.batches(list(map(len, part)), config.store.batch_tokens)]
    quarter = everything[: math.ceil(len(everything) / 4)]  # enough for a rate
    theirs = [quarter[first : first + RANDOM_BATCH] for first in range(0, len(quarter), RANDOM_BATCH)]
    alone = varied(config, ["store.workers=1"])
    pair = varied(config, ["store.workers=2"])
    two = fits(pair) >= 2 and len(parts) >= 2

    peak, bare, mixed, jobs, pairs = 0.0, [], [], [], []
    before = torch.get_num_threads()
    torch.set_num_threads(config.store.threads)
    try:
        _loop(backbone, ours[:1] + theirs[:1])  # the first batch of a process is slow
        for _ in tqdm(range(config.store.benchmark.repeats), desc="benchmark", unit="repeat", disable=None):
            peak = max(peak, gemm(backbone))
            bare.append(_loop(backbone, ours))
            mixed.append(_loop(backbone, theirs))
            jobs.append(_job(alone, encode))
            pairs += [_job(pair, encode)] if two else []
    finally:
        torch.set_num_threads(before)
    sizes = forecast.encoder(config)
    operations = sum(sizes.flops(len(ids), len(ids)) for ids in everything)
    return _records(everything, ours, theirs, operations, peak, min(bare), min(mixed), jobs, pairs)


def _records(
    chunks: Ids, ours: Sequence[Ids], theirs: Sequence[Ids], operations: float, peak: float, bare: float, mixed: float,
    jobs: Sequence[Progress], pairs: Sequence[Progress],
) -> list[dict[str, Any]]:  # fmt: skip
    tokens = sum(map(len, chunks))
    mixed_rate = sum(len(ids) for batch in theirs for ids in batch) / mixed
    job = min(jobs, key=lambda job: job.active)
    records: list[tuple[str, float, str]] = [
        ("chunks", len(chunks), ""),
        ("tokens", tokens, ""),
        ("job_start_up", job.start_up, "s"),
        ("job_active", job.active, "s"),
        ("bare_loop", bare, "s"),
        ("job_to_bare_loop", job.active / bare, "ratio"),
        ("compute_share", job.compute_share, "share"),
        ("tokens_per_second", tokens / job.active, "1/s"),
        ("random_batches_tokens_per_second", mixed_rate, "1/s"),
        ("job_to_random_batches", tokens / job.active / mixed_rate, "ratio"),
        ("padding", padding(ours), "share"),
        ("random_batches_padding", padding(theirs), "share"),
        ("gemm_peak", peak / 1e9, "GFLOP/s"),
        ("job_flops", operations / job.active / 1e9, "GFLOP/s"),
        ("share_of_gemm_peak", operations / job.active / peak, "share"),
        ("bare_loop_share_of_gemm_peak", operations / bare / peak, "share"),
    ]
    if pairs:
        records.append(("two_workers_to_one", job.active / min(both.active for both in pairs), "ratio"))
    return [{"name": name, "value": float(value), "unit": unit} for name, value, unit in records]


def padding(batches: Iterable[Sequence[Sequence[int]]]) -> float:
    """Of the tokens that the encoder is given, the share that are padding."""
    padded = tokens = 0
    for batch in batches:
        padded += len(batch) * max(map(len, batch))
        tokens += sum(map(len, batch))
    return (padded - tokens) / padded


def gemm(backbone: Backbone) -> float:
    """FLOP/s of the fastest square matrix product, in the backbone's dtype on its device."""
    best = 0.0
    for side in SIDES.get(backbone.device.type, SIDES["cpu"]):
        left, right = (torch.ones(side, side, dtype=backbone.dtype, device=backbone.device) for _ in range(2))
        for _ in range(PRODUCTS + 1):
            begun = time.perf_counter()
            torch.mm(left, right)
            _wait(backbone)
            best = max(best, 2 * side**3 / (time.perf_counter() - begun))
    return best


def _loop(backbone: Backbone, batches: Sequence[Ids]) -> float:
    """Seconds in which the encoder alone does the batches."""
    begun = time.perf_counter()
    with torch.no_grad():
        for batch in batches:
            backbone.states(batch)
    _wait(backbone)
    return time.perf_counter() - begun


def _wait(backbone: Backbone) -> None:
    if backbone.device.type == "cuda":
        torch.cuda.synchronize(backbone.device)


def _job(config: Config, encode: Callable[[Config], Progress]) -> Progress:
    storage.remove(lineage.store(config).url)
    return encode(config)


def _random_weights(config: Config) -> None:
    from intra.backbone import tiny

    artifact, dataset = lineage.backbone(config), lineage.dataset(config)
    tokenizer = locate.load_tokenizer(dataset.path("tokenizer"))
    with tempfile.TemporaryDirectory() as folder:
        tiny.save(tiny.build(config.backbone.architecture, tokenizer, config.seed), tokenizer, folder)
        digests = files.digests(folder)
        storage.upload(folder, artifact.url)
    artifact.finish({"sha256": digests})  # as a trained one's: the store is named by it (lineage.weights_digest)
