"""Encodes every chunk of the pool once, with Ray Data: the chunk store (token states and pooled vectors in shards).

    python workflows/encode.py --config configs/quickstart.yaml [section.key=value ...] [--dry-run | --verify | --repair | --prune]
    ray job submit --address http://HEAD:8265 --working-dir . -- python workflows/encode.py --config configs/paper.yaml \\
        root=s3://bucket/run data.path=s3://bucket/data tracking.uri=http://MLFLOW:5000

Needs the dataset (workflows/prepare.py) and, with backbone.train=true, the backbone (workflows/warmstart.py), unless its encoder is frozen:
then the warm start reads this store. Cut off, the same command redoes only the shards that are not committed. `store.workers` changes no
byte. Of a pool that has changed only new chunks are encoded. A shard that fails is tried again on another worker, then set aside while the
rest goes on. --dry-run forecasts bytes, operations, hours and memory; --verify compares every byte with its checksum; --repair makes
what is damaged again; --prune deletes the stores that this one borrows from and mostly contains, except the shards still borrowed.
"""

from __future__ import annotations

import functools
import hashlib
import math
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from intra import cli, cluster, lineage, storage
from intra.artifact import Artifact
from intra.backbone import whitened
from intra.config import Config
from intra.errors import UserError, WorkflowError
from intra.store import claim, forecast, planning, prune, verify
from intra.store.forecast import size
from intra.store.format import COMMIT, PLAN, POOLED, SCALE, SETTINGS, STATES, Commit, Shard, committed
from intra.store.progress import Progress, peak_memory

WORKERS_A_LOADER = 8  # tokenising is light: one loader feeds many encoders
LOADER_CPUS = 0.5
ATTEMPTS = 2  # at a shard, each on another worker
LOGGED = 30.0  # seconds between two entries in MLflow


def plan(config: Config) -> Iterator[str]:
    """What exists, what will be made, how large it is. Makes nothing. Raises UserError, after all lines, where it cannot fit."""
    try:
        dataset = lineage.dataset(config)
        waits = "" if dataset.complete() else f"waits for the dataset {dataset.url} (workflows/prepare.py)"
    except (UserError, WorkflowError) as error:
        if config.store.forecast.chunks is None or config.store.forecast.tokens is None:
            raise
        waits = f"waits for the dataset ({error})"
    if waits:
        yield f"encode: {waits}"
        if config.store.forecast.chunks is None or config.store.forecast.tokens is None:
            return
        found = forecast.forecast(config, config.store.forecast.chunks, config.store.forecast.tokens)
        yield "  on paper, by store.forecast:"
        yield from forecast.lines(config, found)
        forecast.check(config, found)
        return
    counts = dataset.manifest()
    found = forecast.forecast(config, counts["chunks"], counts["tokens"])
    backbone = _awaited(config)
    waits = "" if backbone is None or backbone.complete() else f"; waits for the backbone {backbone.url} (workflows/warmstart.py)"
    store = lineage.store(config)
    if store.complete():
        yield f"encode: store {store.url} is complete ({counts['chunks']:,} chunks, {counts['tokens']:,} tokens)"
        older = prune.removals(store)
        if older:
            yield f"  {len(older)} superseded stores of older corpora, {size(sum(item.bytes for item in older))}, can go (--prune)"
        return
    made = _plan(config, store, dataset)
    commits = committed(store, made.shards)
    missing = len(made.shards) - len(commits)
    yield f"encode: store {store.url}{waits}"
    if lineage.over_encoder(config) and not lineage.whitened(config).complete():
        yield f"  first the encoder is whitened, by {config.backbone.architecture.encoder_sample:,} chunks: {lineage.whitened(config).url}"
    if len(made.lent.rows):
        lent = f"  {len(made.lent.rows):,} of the {counts['chunks']:,} chunks are borrowed from complete stores of the same encoding"
        yield f"{lent} ({', '.join(made.bases)})"
    found = forecast.forecast(config, len(made.fresh), made.fresh_tokens)
    yield f"  {len(commits):,} shards are committed, {missing:,} to make with {min(config.store.workers, missing)} workers; encoded here:"
    yield from forecast.lines(config, found)
    forecast.check(config, found, _written(commits))


def run(config: Config) -> str:
    """Makes the store where it is not complete. Returns its URL."""
    timed(config)
    return lineage.store(config).url


def timed(config: Config) -> Progress:
    """As `run`. Returns how it went: of the shards made now, which may be none."""
    store = lineage.store(config)
    if not _complete(store):
        _check(config)
        with claim.hold(store) as mine:
            if not _complete(store):  # another run may just have ended
                return _make(config, store, mine)
    claim.sweep(store)
    return Progress(0, 0, time.time())


def fitting(config: Config) -> int:
    """How many workers have cores, or GPUs, of their own at once: here, or on the cluster that this process has joined."""
    cluster.connect(config)
    cores = math.inf if cluster.joined() else len(os.sched_getaffinity(0)) // config.store.threads
    return int(min(cluster.fits(_worker(config)), cores))


def check(config: Config) -> str:
    """--verify: reads everything. Raises WorkflowError naming every file that is not what was written. Returns the store's URL."""
    store = lineage.store(config)
    manifest = store.manifest()
    found = verify.damaged(store, manifest["files"], manifest["shards"])
    if found:
        named = "; ".join(map(str, found))
        raise WorkflowError(f"store {store.url}: {named} ({len(found)} damaged in all); run the same command with --repair")
    print(f"verify: {len(manifest['shards']):,} shards and {len(manifest['files'])} other files are as they were written")
    return store.url


def repair(config: Config) -> str:
    """--repair: makes what is damaged or missing again. Returns the store's URL."""
    store, dataset = lineage.store(config), lineage.dataset(config)
    _check(config)
    with claim.hold(store) as mine:
        before: Mapping[str, Any] = {"files": {}, "shards": []}
        try:
            before = store.manifest()
        except UserError:  # none, or not to be read: what is committed says what it must be
            made = _plan(config, store, dataset)
            commits = committed(store, made.shards)
            before = {"files": {}, "shards": [verify.shard_entry(s.name, commits[s.number]) for s in made.shards if s.number in commits]}
        found = verify.damaged(store, before["files"], before["shards"])
        if not found and _complete(store):
            print("repair: nothing is damaged")
            return store.url
        for item in found:
            print(f"repair: {item}", file=sys.stderr)
        _make(config, store, mine, verify.discard(store, found), before["files"].get(SCALE))
    after = {shard["name"]: shard for shard in store.manifest()["shards"]}
    bad = {item.shard for item in found if item.store is None}
    for old in before["shards"]:
        if old["name"] in bad and any(after[old["name"]][folder]["sha256"] != old[folder]["sha256"] for folder in (STATES, POOLED)):
            print(
                f"repair: shard {old['name']} is sound, but not bit for bit what it was: other hardware or libraries made it",
                file=sys.stderr,
            )
    return store.url


def remove_older(config: Config) -> str:
    """--prune. Returns the store's URL."""
    store = lineage.store(config)
    removed = prune.prune(store)
    for item in removed:
        print(
            f"prune: store {item.store.url}: {size(item.bytes)} deleted"
            + (f", {item.kept} shards are borrowed and stay" if item.kept else "")
        )
    if not removed:
        print("prune: no store beside this one is superseded by it")
    return store.url


def _complete(store: Artifact) -> bool:
    """Raises UserError where the folder holds a store of something else."""
    if not store.complete():
        return False
    found = store.manifest().get("fingerprint")
    if found != store.fingerprint:
        raise UserError(
            f"store {store.url}: its manifest says {found}: the folder was renamed or copied; move it away, or give another root"
        )
    return True


def _awaited(config: Config) -> Artifact | None:
    """The backbone that has to be trained first; none where it is given, or reads this store in its training."""
    return lineage.backbone(config) if config.backbone.train and not lineage.over_encoder(config) else None


def _check(config: Config) -> None:
    """Raises UserError where the run cannot succeed, before anything starts."""
    forecast.device(config)
    if (backbone := _awaited(config)) is not None:
        backbone.manifest()  # there, and complete


def _plan(config: Config, store: Artifact, dataset: Artifact, left_out: Sequence[str] = ()) -> planning.Plan:
    return planning.make(
        store, lineage.encoding(config), dataset.url, config.store.shard_chunks, reuse=config.store.reuse, left_out=left_out
    )


@dataclass(frozen=True)
class _Job:
    """What the passes over the cluster share."""

    config: Config
    store: Artifact
    dataset: Artifact
    source: Any  # writer.Source
    plan: planning.Plan
    claim: claim.Claim

    def row(self, shard: Shard) -> dict[str, Any]:
        return {
            "shard": shard.number, "first": shard.first, "rows": shard.rows, "content": shard.content,
            "places": self.plan.rows_of(shard).tobytes(),
        }  # fmt: skip


def _make(config: Config, store: Artifact, mine: claim.Claim, left_out: Sequence[str] = (), scale: str | None = None) -> Progress:
    """`left_out`: shards not to be borrowed; `scale`: SHA-256 of the int8 scale that the committed shards were made with, if known."""
    from intra import tracking
    from intra.store import writer

    begun = time.time()
    dataset = lineage.dataset(config)
    counts = dataset.manifest()
    made = _plan(config, store, dataset, left_out)
    commits = committed(store, made.shards)
    found = forecast.forecast(config, len(made.fresh), made.fresh_tokens)
    forecast.check(config, found, _written(commits))
    if lineage.over_encoder(config):
        whitened.make(config)
    # A trained backbone is an artifact below the root; any other is found by each machine for itself.
    model, revision = lineage.model(config)
    model = str(Path(model).resolve()) if Path(model).is_dir() else model
    digest = lineage.weights_digest(config)
    source = writer.Source(model, revision, digest, config.backbone.dtype, forecast.device(config), config.store.threads)
    mark = lineage.encoder(config) if lineage.over_encoder(config) else source.digest
    settings = _settings(config, mark, counts["pool_sha256"])
    if commits:
        _check_begun(store, settings)
    beside = planning.nearest(store, settings)
    if beside:
        print(f"encode: a new store beside {beside[0]}, for {', '.join(beside[1])}", file=sys.stderr)
    with tracking.step(config, "encode", store) as step:
        step.log_input("pool", counts["pool_sha256"], dataset.url)
        step.log_metrics(forecast.summary(found))
        storage.remove(store.path(prune.PRUNED))  # it is to be whole again
        storage.write_json(store.path(SETTINGS), settings)
        storage.write_json(store.path(PLAN), made.record())
        job = _Job(config, store, dataset, source, made, mine)
        if config.store.dtype == "int8" and not storage.exists(store.path(SCALE)) and not _make_scale(job, scale):
            commits = {}
        todo = [shard for shard in made.shards if shard.number not in commits]
        progress = Progress(len(todo), sum(shard.rows for shard in todo), begun)
        if todo:
            _shards(job, todo, progress, step)
            commits = committed(store, made.shards)
        width = forecast.encoder(config).hidden_size
        manifest = writer.finish(
            store, made.chunk_ids, made.shards, commits, settings, backbone=source.digest, hidden_size=width,
            pooled_length=config.retriever.pooled_length, dtype=config.store.dtype, threads=config.store.threads,
            encoding=lineage.encoding(config), digests=made.digests, rows=made.fresh, lent=made.lent,
            spread=functools.partial(_spread, job, width, progress) if len(made.chunk_ids) > writer.GROUP_CHUNKS else None,
        )  # fmt: skip
        seconds = time.time() - begun
        lent = f", {manifest['rows_borrowed']:,} of the chunks borrowed" if manifest["rows_borrowed"] else ""
        print(
            f"encode: {manifest['rows']:,} chunks, {manifest['tokens']:,} tokens, {size(manifest['bytes'])} in {len(made.shards):,} "
            f"shards, {len(todo):,} of them made now, in {seconds:.0f} s{lent}; at most {size(progress.memory)} of memory a worker, "
            f"{size(peak_memory())} here"
        )
        step.log_metrics(
            {
                "shards": len(made.shards), "shards_made_now": len(todo), "chunks": manifest["rows"], "tokens": manifest["tokens"],
                "chunks_borrowed": manifest["rows_borrowed"], "bytes": manifest["bytes"], "seconds": seconds,
                "seconds_start_up": progress.start_up if todo else 0.0, "seconds_active": progress.active,
                "tokens_per_second": progress.tokens_per_second, "compute_share": progress.compute_share,
                "memory_worker": progress.memory, "memory_driver": peak_memory(),
            }
        )  # fmt: skip
    return progress


def _check_begun(store: Artifact, settings: Mapping[str, Any]) -> None:
    """Raises UserError where the shards there are were made with other weights: a backbone trained again keeps its name."""
    try:
        before = storage.read_json(store.path(SETTINGS))["backbone"]["digest"]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return  # lost or damaged; the shards' own fingerprint holds
    if before != settings["backbone"]["digest"]:
        raise UserError(
            f"store {store.url}: its shards were made with a backbone of digest {before[:16]}, which was made again since (now "
            f"{settings['backbone']['digest'][:16]}); delete the store and run the same command again"
        )


def _shards(job: _Job, todo: Sequence[Shard], progress: Progress, step: Any) -> None:
    """Makes the shards on the cluster. Raises WorkflowError naming those that failed on every worker, when all others are committed."""
    cluster.connect(job.config)
    _wait_for_machines(job.config)
    total, logged = len(job.plan.shards), time.monotonic()
    failures: dict[int, str] = {}
    with tqdm(total=total, initial=total - len(todo), desc="encode", unit="shard", disable=None) as bar:
        for attempt in range(ATTEMPTS):
            failures = {shard.number: "its worker was lost (killed, or out of memory)" for shard in todo}
            for row in _encoded(job, todo):
                job.claim.check()
                name = f"encode, shard {row['shard']:05d}"
                if row.get("fatal"):
                    cluster.check(row, name)
                if row.get("failure") is not None:
                    failures[row["shard"]] = row["failure"]
                    continue
                del failures[row["shard"]]
                progress.add(row)
                bar.update()
                bar.set_postfix_str(progress.line())
                if time.monotonic() - logged > LOGGED:
                    step.log_metrics(progress.metrics(), progress.done)
                    logged = time.monotonic()
            todo = [shard for shard in todo if shard.number in failures]
            if not todo:
                break
            if attempt + 1 < ATTEMPTS:
                print(f"encode: shards that failed are tried again on another worker: {_named(todo, failures)}", file=sys.stderr)
    step.log_metrics({**progress.metrics(), "shards_set_aside": len(todo)}, progress.done)
    if todo:
        raise WorkflowError(
            f"encode: {len(todo)} of {total} shards failed on {ATTEMPTS} workers and are set aside: {_named(todo, failures)}; all others "
            "are committed: mend the cause and run the same command again"
        )


def _named(todo: Sequence[Shard], failures: Mapping[int, str]) -> str:
    """The shards, those with the same reason together."""
    reasons: dict[str, list[str]] = {}
    for shard in todo:
        reasons.setdefault(failures[shard.number], []).append(shard.name)
    return "; ".join(f"{', '.join(names)} ({reason})" for reason, names in reasons.items())


def _encoded(job: _Job, todo: Sequence[Shard]) -> Iterator[dict[str, Any]]:
    """One row for each shard: the numbers of EncodeCommit, or its failure. A shard whose worker died again and again has none."""
    from ray.data import ActorPoolStrategy

    from intra.store.writer import EncodeCommit

    config, store = job.config, job.config.store
    smallest, largest = _workers(config, len(todo))
    rows = _tokenized(job, [job.row(shard) for shard in todo], math.ceil(smallest / WORKERS_A_LOADER))
    rows = cluster.stage(
        rows,
        (EncodeCommit, job.store, job.source, config.retriever.pooled_length, store.batch_tokens, store.dtype),
        # Four tasks ahead: one is encoded, one written, and two wait with their tokens ready.
        ActorPoolStrategy(
            min_size=smallest, max_size=largest, max_tasks_in_flight_per_actor=4, max_concurrent_calls_per_actor=2,
            enable_true_multi_threading=True,
        ),
        store.threads,
        store.gpus_per_worker,
    )  # fmt: skip
    yield from _rows(rows)


def _tokenized(job: _Job, rows: Sequence[dict[str, Any]], loaders: int) -> Any:
    import ray
    from ray.data import ActorPoolStrategy

    from intra.store.writer import LoadTokenize

    cluster.quiet_data()
    items = ray.data.from_items(list(rows), override_num_blocks=len(rows))
    build = (LoadTokenize, job.dataset.url, job.source.model, job.source.revision, job.config.data.template, job.store)
    return cluster.stage(items, build, ActorPoolStrategy(size=loaders), LOADER_CPUS)


def _make_scale(job: _Job, before: str | None) -> bool:
    """Writes the int8 store's mu and sigma. False where they are not those that its shards were made with: these lose their commits."""
    cluster.connect(job.config)
    _wait_for_machines(job.config)
    data = _scale(job)
    same = hashlib.sha256(data).hexdigest() == before
    if not same and storage.names(job.store.path(COMMIT)):
        print(f"encode: {SCALE} was lost and could not be made as it was: all shards are made again", file=sys.stderr)
        storage.remove(job.store.path(COMMIT))
    storage.write_bytes(job.store.path(SCALE), data)
    return same


def _scale(job: _Job) -> bytes:
    """mu and sigma of an int8 store: those of the store that is borrowed from, else of a sample of this pool."""
    import numpy as np
    from ray.data import ActorPoolStrategy

    from intra.store import writer

    if job.plan.bases:
        return storage.read_bytes(storage.join(job.store.url.rpartition("/")[0], job.plan.bases[0], SCALE))
    places = np.array(writer.sample_rows(job.plan.digests), dtype=np.int64)
    rows = _tokenized(job, [{"shard": 0, "first": 0, "rows": len(places), "content": "", "places": places.tobytes()}], 1)
    store = job.config.store
    build = (writer.Sample, job.source, store.batch_tokens)
    for row in _rows(cluster.stage(rows, build, ActorPoolStrategy(size=1), store.threads, store.gpus_per_worker)):
        cluster.check(row, "encode, sample for int8")
        return bytes(row["scale"])
    raise WorkflowError("encode, sample for int8: its worker was lost (killed, or out of memory); run the same command again")


def _spread(job: _Job, width: int, progress: Progress, manifest: dict[str, Any], groups: list[tuple[int, int]]) -> Iterable[Any]:
    """The moments of the groups' pooled vectors, in their order, from the cluster (writer.finish)."""
    import ray
    from ray.data import ActorPoolStrategy

    from intra.store import writer

    cluster.connect(job.config)
    cluster.quiet_data()
    store = job.config.store
    items = ray.data.from_items([{"first": first, "rows": rows} for first, rows in groups], override_num_blocks=len(groups))
    workers = max(1, min(store.workers, len(groups), cluster.fits({"CPU": store.threads})))
    build = (writer.GroupMoments, job.store.url, manifest, store.threads)
    rows = cluster.stage(items, build, ActorPoolStrategy(size=workers), store.threads)
    waiting: dict[int, Any] = {}
    order = [first for first, _ in groups]
    with tqdm(total=len(order), desc="whiten", unit="group", disable=None) as bar:
        for row in _rows(rows):
            job.claim.check()
            cluster.check(row, f"whitening, chunks from {row['first']}")
            progress.memory = max(progress.memory, int(row["memory"]))
            waiting[row["first"]] = row
            while order and order[0] in waiting:  # sums depend on their order
                yield writer.moments_of(waiting.pop(order.pop(0)), width)
                bar.update()
    if order:
        raise WorkflowError("whitening: a worker was lost (killed, or out of memory); the shards are committed: run the same command again")


def _rows(rows: Any) -> Iterator[dict[str, Any]]:
    from ray.exceptions import RayError

    try:
        yield from rows.iter_rows()
    except RayError as error:
        reason = " ".join(str(error).split())[:300]
        raise WorkflowError(f"encode: the cluster gave up ({reason}); committed shards are kept: run the same command again") from error


def _worker(config: Config) -> dict[str, float]:
    return {"CPU": float(config.store.threads), "GPU": config.store.gpus_per_worker}


def _wait_for_machines(config: Config) -> None:
    """Raises UserError where not one worker fits the cluster, at once or after `cluster.wait_minutes`."""
    remedy = "lower store.gpus_per_worker or store.threads"
    cluster.wait_for(_worker(config), config.store.workers, config.cluster.wait_minutes, "store.workers", remedy)


def _workers(config: Config, shards: int) -> tuple[int, int]:
    """How many encoders at once: those that fit the cluster as it stands, and those wanted (an autoscaler may add machines)."""
    wanted = min(config.store.workers, shards)
    free = cluster.resources()["CPU"] - LOADER_CPUS * math.ceil(wanted / WORKERS_A_LOADER)
    fit = min(cluster.fits(_worker(config)), int(free / config.store.threads))
    if fit < wanted:
        each = cluster.amounts(_worker(config))
        print(f"encode: {max(fit, 1)} of {wanted} workers ({each} each) fit the cluster now; it goes on with those", file=sys.stderr)
    return max(1, min(fit, wanted)), wanted


def _settings(config: Config, backbone: str, pool: str) -> dict[str, Any]:
    """What shaped the store's bytes, and no more: two runs that share the store agree on it. MLflow has the whole configuration."""
    return {
        "data": {"template": config.data.template, "pool": pool},
        "backbone": {**config.backbone.model_dump(include={"model", "revision", "train", "dtype"}), "digest": backbone},
        "store": config.store.model_dump(include={"dtype", "shard_chunks", "batch_tokens", "threads"}),
        "retriever": {"pooled_length": config.retriever.pooled_length},
    }


def _written(commits: Mapping[int, Commit]) -> int:
    return sum(int(commit[folder]["bytes"]) for commit in commits.values() for folder in (STATES, POOLED))


if __name__ == "__main__":
    OTHERS = {
        "verify": (check, "compare every byte of the store with its checksum"),
        "repair": (repair, "make what is damaged or missing again, and only that"),
        "prune": (remove_older, "delete the stores that this one borrows from and mostly contains, except the shards still borrowed"),
    }
    sys.exit(cli.main(__doc__, plan, run, others=OTHERS))
