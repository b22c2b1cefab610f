"""Prepare: reads the source, chunks its passages by backbone tokens, and writes the dataset.

    python workflows/prepare.py --config configs/quickstart.yaml
    python workflows/prepare.py --config configs/real.yaml data.path=DATA root=runs/real --dry-run
    ray job submit --working-dir . -- python workflows/prepare.py --config configs/paper.yaml root=s3://bucket/run

One process, without Ray: a pool is held in memory (220,000 passages: 3 CPU minutes, 1.2 GB).
The last line printed is the dataset's place. A dataset that is complete is left as it is.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from intra import cli, lineage, storage, tracking
from intra.config import Config
from intra.data import pool, sources, statistics


def plan(config: Config) -> list[str]:
    """What exists and what would be made."""
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
    limits = {"data.pool_limit": data.pool_limit, "data.question_limit": data.question_limit}
    lines += [f"  {key}: {value}" for key, value in limits.items() if value is not None]
    trained = f", with a {config.backbone.architecture.tokenizer} tokenizer trained on it" if lineage.from_scratch(config) else ""
    lines.append(f"  chunks of at most {data.chunk_tokens} tokens{trained}")
    return lines


def run(config: Config) -> str:
    """Makes the dataset unless it is complete. Returns its URL."""
    artifact = lineage.dataset(config)
    if artifact.complete():
        return artifact.url
    with tracking.step(config, "prepare", artifact) as run:
        manifest = pool.build(config, artifact)
        described = storage.read_json(artifact.path(pool.STATISTICS))
        run.log_metrics(statistics.metrics(described))
        run.log_artifact(storage.read_bytes(artifact.path(pool.STATISTICS)), pool.STATISTICS)
        for name, digest in manifest["inputs"].items():
            run.log_input(name, digest, str(config.data.path))
        run.log_input("pool", manifest["pool_sha256"], artifact.url)
        run.log_input("questions", manifest["questions_sha256"], artifact.url)
    print(f"prepare: {_summary(manifest)}")
    return artifact.url


def _summary(manifest: Mapping[str, Any]) -> str:
    questions = ", ".join(
        f"{benchmark} {' + '.join(f'{number} {split}' for split, number in sorted(splits.items(), reverse=True))}"
        for benchmark, splits in manifest["questions"].items()
    )
    return (
        f"{manifest['passages']:,} passages ({manifest['split_passages']:,} split), {manifest['chunks']:,} chunks, "
        f"{manifest['tokens']:,} tokens; questions: {questions}"
    )


if __name__ == "__main__":
    sys.exit(cli.main(__doc__, plan, run))
