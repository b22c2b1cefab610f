"""A frozen encoder whitened by a sample of the pool: the artifact that encodes the store, and that every decoder over it starts with."""

from __future__ import annotations

import sys
import tempfile
from typing import Any

from intra import lineage, storage
from intra.config import Config


def make(config: Config) -> str:
    """Makes the artifact where it is not complete. Returns its URL. Raises what `adopted.build` raises."""
    import torch

    from intra.backbone import adopted, curriculum, locate, tiny
    from intra.data.chunking import chunk_text
    from intra.data.schema import read_pool

    artifact, architecture = lineage.whitened(config), config.backbone.architecture
    if artifact.complete():
        return artifact.url
    dataset = lineage.dataset(config)
    pool = read_pool(dataset.url)
    rows = curriculum.extra_rows(len(pool), architecture.encoder_sample, config.seed)
    print(f"encoder: '{architecture.encoder}' is whitened by {len(rows):,} chunks", file=sys.stderr)
    sample = [chunk_text(pool.titles[row], pool.texts[row], config.data.template) for row in rows]
    tokenizer = locate.load_tokenizer(dataset.path("tokenizer"))
    before = torch.get_num_threads()
    torch.set_num_threads(config.backbone.warmstart.threads)  # not as many as this machine has: sums may depend on it
    try:
        built = adopted.build(adopted.least(architecture), tokenizer, config.seed, sample)
    finally:
        torch.set_num_threads(before)
    with tempfile.TemporaryDirectory() as temporary:
        tiny.save(built, tokenizer, temporary)
        storage.upload(temporary, artifact.url)
    artifact.finish({"pool": dataset.manifest()["pool_sha256"], "encoder": architecture.encoder, "sample": len(rows)})
    return artifact.url


def start(config: Config) -> Any:
    """The Backbone over the artifact before it is trained, fp32 on the CPU: its decoder is a function of the architecture and the seed."""
    from intra.backbone import adopted, model

    encoder = model.load(lineage.whitened(config).url, device="cpu")
    built = adopted.build(config.backbone.architecture, encoder.tokenizer, config.seed, ())
    adopted.take(built, encoder.model)
    return model.Backbone(built, encoder.tokenizer, config.backbone.prompt)
