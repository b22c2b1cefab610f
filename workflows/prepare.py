"""Prepare: reads the source, chunks its passages by backbone tokens, and writes the dataset.

    python workflows/prepare.py --config configs/quickstart.yaml
    python workflows/prepare.py --config configs/real.yaml data.path=DATA root=runs/real --dry-run
    ray job submit --address http://HEAD:8265 --working-dir . -- python workflows/prepare.py --config configs/paper.yaml \\
        root=s3://bucket/run data.path=s3://bucket/data tracking.uri=http://MLFLOW:5000

Files of the Hugging Face hub (`repo` in `data.files`) are fetched first, unless --offline, data.offline=true or HF_HUB_OFFLINE=1; see
`intra.data.hub`. Reads and tokenizes in `data.workers` processes: one, this one, without Ray; more with Ray Data. Their number changes
no byte. (780,763 chunks of 100M tokens in two processes, on two cores shared with other work: 6.6 minutes, 2.0 GiB here, 0.6 GiB in each of
them.) The last line printed is the dataset's place. A dataset that is complete is left as it is; two runs never make one at once.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from intra import cli, cluster, lineage, storage, tracking
from intra.artifact import Artifact
from intra.config import Config
from intra.data import hub, pool, sources, stages, statistics
from intra.errors import WorkflowError
from intra.store import claim


def plan(config: Config) -> list[str]:
    """What exists and what would be made."""
    missing = hub.missing(config.data)
    if missing:
        return [
            "prepare: to be fetched into " + str(config.data.path),
            *(f"  {entry.repo} at {entry.revision or 'no pinned commit'}: {entry.path}" for entry in missing),
        ]
    artifact = lineage.dataset(config)
    if artifact.complete():
        manifest = artifact.manifest()
        return [f"prepare: complete, {artifact.url}", f"  {_summary(manifest)}"]
    data = config.data
    lines = [f"prepare: to be made, {artifact.url}"]
    if data.source == "synthetic":
        made = data.synthetic
        lines.append(f"  generates {made.chunks} passages, {made.train_questions} train and {made.test_questions} test questions")
    else:
        urls = sources.inputs(data).values()
        lines.append(f"  reads {len(urls)} files, {sum(storage.size(url) for url in urls) / 1e6:.1f} MB")
        lines += [f"    {url}" for url in urls]
    limits = {f"data.{key}": getattr(data, key) for key in ("pool_limit", "pool_chunks", "pool_tokens", "question_limit")}
    lines += [f"  {key}: {value}" for key, value in limits.items() if value is not None]
    trained = f", with a {config.backbone.architecture.tokenizer} tokenizer trained on it" if lineage.from_scratch(config) else ""
    lines.append(f"  chunks of at most {data.chunk_tokens} tokens{trained}")
    return lines


def fetch(config: Config) -> None:
    """Fetches the files of the hub that are missing. Without them no step has a fingerprint."""
    for path in hub.fetch(config.data):
        print(f"prepare: fetched {path}")


def run(config: Config) -> str:
    """Fetches what files are missing, and makes the dataset unless it is complete. Returns its URL."""
    fetch(config)
    artifact = lineage.dataset(config)
    if not artifact.complete():
        with claim.hold(artifact) as mine:
            if not artifact.complete():  # another run may just have ended
                print(f"prepare: {_summary(_make(config, artifact, mine))}")
    claim.sweep(artifact)
    return artifact.url


def _make(config: Config, artifact: Artifact, mine: claim.Claim) -> dict[str, Any]:
    """Makes and tracks the dataset. Returns its manifest."""
    with tracking.step(config, "prepare", artifact) as run:
        fan: pool.Fan = stages.inline if config.data.workers == 1 else functools.partial(_fan, config)
        manifest = pool.build(config, artifact, fan, mine.check)
        described = storage.read_json(artifact.path(pool.STATISTICS))
        run.log_metrics(statistics.metrics(described))
        for name in (pool.STATISTICS, pool.REPORT):
            run.log_artifact(storage.read_bytes(artifact.path(name)), name)
        for name, digest in manifest["inputs"].items():
            run.log_input(name, digest, str(config.data.path))
        run.log_input("pool", manifest["pool_sha256"], artifact.url)
        run.log_input("questions", manifest["questions_sha256"], artifact.url)
    return manifest


def _fan(config: Config, stage: Any, arguments: tuple[Any, ...], tasks: list[dict[str, Any]], label: str) -> Iterator[dict[str, Any]]:
    """The stage's results for the tasks, in their order, made by Ray Data's actors (`pool.Fan`)."""
    import ray.data
    from ray.data import ActorPoolStrategy
    from ray.exceptions import RayError
    from tqdm import tqdm

    cluster.connect(config)
    cluster.quiet_data()
    workers = min(config.data.workers, len(tasks))
    wanted = workers + 1  # and one that reads the tasks
    cluster.wait_for({"CPU": 1}, wanted, config.cluster.wait_minutes, "data.workers", "set it to 1 to read in this process")
    # A CPU each, or, where there are fewer, their part of one: with no CPU to spare for reading the tasks, the job would hang.
    cpus = min(1.0, (cluster.resources()["CPU"] - 1) / workers)
    rows = ray.data.from_items([{"task": number, **task} for number, task in enumerate(tasks)], override_num_blocks=len(tasks))
    rows = cluster.stage(rows, (Numbered, stage, *arguments), ActorPoolStrategy(size=workers), cpus)
    made = {}
    try:
        with tqdm(total=len(tasks), desc=label, unit="file", disable=None) as bar:
            for row in rows.iter_rows():
                cluster.check(row, "prepare")
                made[row["task"]] = json.loads(row["result"])
                bar.update()
    except RayError as error:
        raise WorkflowError(f"prepare: a worker was lost ({' '.join(str(error).split())[:300]}); run the same command again") from error
    if len(made) < len(tasks):
        raise WorkflowError(f"prepare: {label}: {len(tasks) - len(made)} of {len(tasks)} files were given up, their workers died again and "
                            "again (for want of memory?); set data.workers lower, or take a larger machine")  # fmt: skip
    yield from (made[number] for number in range(len(tasks)))


class Numbered:
    """A stage whose results say which task they are of (Ray Data may hand them over in any order), as JSON, which Arrow leaves alone."""

    def __init__(self, stage: Any, *arguments: Any) -> None:
        self._work = stage(*arguments)

    def __call__(self, row: Mapping[str, Any]) -> dict[str, Any]:
        return {"task": row["task"], "result": json.dumps(self._work({name: value for name, value in row.items() if name != "task"}))}


def _summary(manifest: Mapping[str, Any]) -> str:
    questions = ", ".join(
        f"{benchmark} {' + '.join(f'{number} {split}' for split, number in sorted(splits.items(), reverse=True))}"
        for benchmark, splits in manifest["questions"].items()
    )
    left_out = f"; {manifest['mistakes']:,} bad records left out ({pool.MISTAKES})" if manifest.get("mistakes") else ""
    return (
        f"{manifest['passages']:,} passages ({manifest['split_passages']:,} split), {manifest['chunks']:,} chunks, "
        f"{manifest['tokens']:,} tokens; questions: {questions}{left_out}"
    )


if __name__ == "__main__":
    sys.exit(cli.main(__doc__, plan, run))
