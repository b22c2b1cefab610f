"""What encoding reaches, as ratios taken in one run: of the bare model, of this machine's matrix product, of two workers to one.

The job is workflows/encode.py's own, from the first shard's start to the last one's end (`Progress.active`); the bare loop is the encoder
alone over the same chunks in the same batches, tokens at hand, nothing pooled or written: half of them before the job, half after it.
All are done in turn, `store.benchmark.repeats` times, and a ratio is taken within each turn: minutes later a shared machine may have
another speed. Records are medians over the turns. `two_workers_to_one` is of their rates (`Progress.rate`); among so few shards the wait
for the last one is long: `two_workers_to_one_wall` has it. `stolen` is what the hypervisor gave to others meanwhile: where it is more than
a hundredth, the machine was not quiet.

The pool is of the configuration's kind, of about `store.benchmark.chunks` chunks. A backbone that the configuration would make from scratch
has random weights here: speed does not depend on them.
"""

from __future__ import annotations

import math
import random
import statistics
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import psutil
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


@dataclass(frozen=True, slots=True)
class Turn:
    """One measure of each, one after the other."""

    peak: float  # FLOP/s
    bare: float  # s
    mixed: float  # s, random batches
    job: Progress
    pair: Progress | None  # two workers, where they find a place
    stolen: float  # share of the processors' time


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

    turns = []
    before = torch.get_num_threads()
    torch.set_num_threads(config.store.threads)
    try:
        _loop(backbone, ours[:1] + theirs[:1])  # the first batch of a process is slow
        for _ in tqdm(range(config.store.benchmark.repeats), desc="benchmark", unit="repeat", disable=None):
            clocks = psutil.cpu_times()
            peak = gemm(backbone)
            mixed, bare = _loop(backbone, theirs), _loop(backbone, ours[::2])
            job = _job(alone, encode)
            bare += _loop(backbone, ours[1::2])
            both = _job(pair, encode) if two else None
            turns.append(Turn(max(peak, gemm(backbone)), bare, mixed, job, both, stolen(clocks, psutil.cpu_times())))
    finally:
        torch.set_num_threads(before)
    sizes = forecast.encoder(config)
    operations = sum(sizes.flops(len(ids), len(ids)) for ids in everything)
    return records(everything, ours, theirs, operations, turns)


def records(
    chunks: Ids, ours: Sequence[Ids], theirs: Sequence[Ids], operations: float, turns: Sequence[Turn]
) -> list[dict[str, Any]]:  # fmt: skip
    """{name, value, unit}. `operations` are FLOP of all chunks; `theirs` are the random batches, of a part of them."""
    tokens = sum(map(len, chunks))
    mixed = sum(len(ids) for batch in theirs for ids in batch)

    def middle(measure: Callable[[Turn], float]) -> float:
        return statistics.median(map(measure, turns))

    found: list[tuple[str, float, str]] = [
        ("chunks", len(chunks), ""),
        ("tokens", tokens, ""),
        ("job_start_up", middle(lambda turn: turn.job.start_up), "s"),
        ("job_active", middle(lambda turn: turn.job.active), "s"),
        ("bare_loop", middle(lambda turn: turn.bare), "s"),
        ("job_to_bare_loop", middle(lambda turn: turn.job.active / turn.bare), "ratio"),
        ("compute_share", middle(lambda turn: turn.job.compute_share), "share"),
        ("tokens_per_second", middle(lambda turn: tokens / turn.job.active), "1/s"),
        ("random_batches_tokens_per_second", middle(lambda turn: mixed / turn.mixed), "1/s"),
        ("job_to_random_batches", middle(lambda turn: tokens / turn.job.active / (mixed / turn.mixed)), "ratio"),
        ("padding", padding(ours), "share"),
        ("random_batches_padding", padding(theirs), "share"),
        ("gemm_peak", middle(lambda turn: turn.peak) / 1e9, "GFLOP/s"),
        ("job_flops", middle(lambda turn: operations / turn.job.active) / 1e9, "GFLOP/s"),
        ("share_of_gemm_peak", middle(lambda turn: operations / turn.job.active / turn.peak), "share"),
        ("bare_loop_share_of_gemm_peak", middle(lambda turn: operations / turn.bare / turn.peak), "share"),
        ("stolen", middle(lambda turn: turn.stolen), "share"),
    ]
    both = [(turn.job, turn.pair) for turn in turns if turn.pair is not None]
    if both:
        found.append(("two_workers_to_one", statistics.median(pair.rate / job.rate for job, pair in both), "ratio"))
        found.append(("two_workers_to_one_wall", statistics.median(job.active / pair.active for job, pair in both), "ratio"))
    return [{"name": name, "value": float(value), "unit": unit} for name, value, unit in found]


def stolen(before: Any, after: Any) -> float:
    """Of the processors' time between two `psutil.cpu_times`, what the hypervisor gave to others; 0 where the system does not say."""
    spent = {name: getattr(after, name) - getattr(before, name) for name in after._fields if not name.startswith("guest")}
    return float(spent.get("steal", 0.0) / sum(spent.values())) if sum(spent.values()) > 0 else 0.0


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
