"""What encoding a pool will take, before it starts: shards, bytes, operations, hours, memory; and whether it fits this machine."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from intra import lineage, storage
from intra.backbone import locate
from intra.config import Config
from intra.errors import UserError, WorkflowError
from intra.store.format import ITEM_BYTES, pooled_bytes, token_bytes
from intra.store_config import StoreConfig

# Beside the two tensors of a shard: their headers, and a commit; by chunk its numbers in the commit and its line in the index.
SHARD_BYTES, CHUNK_BYTES = 900, 66
PROCESS = 700 * 1024**2  # of a worker before it holds anything: Python, torch, transformers, Ray

GPU_TFLOPS, THREAD_TFLOPS = 790.0, 0.1  # an H100's bfloat16; a core's float32

# The published sizes, for a plan where the files are not at hand: layers, d, FFN, query heads, KV heads, head_dim, parameters (text only).
PUBLISHED = {
    "google/t5gemma-2-270m-270m": (18, 640, 2048, 4, 1, 256, 0.368e9),
    "google/t5gemma-2-1b-1b": (26, 1152, 6912, 4, 1, 256, 1.698e9),
    "google/t5gemma-2-4b-4b": (34, 2560, 10240, 8, 4, 256, 7.089e9),
}


@dataclass(frozen=True, slots=True)
class Encoder:
    """The encoder's sizes, and the number of parameters of the whole model, which a worker loads."""

    layers: int
    hidden_size: int
    intermediate_size: int
    heads: int
    kv_heads: int
    head_dim: int
    parameters: float

    def flops(self, tokens: float, length: float) -> float:
        """Multiplications and additions for so many tokens in texts of that mean length, the embedding's look-up left out."""
        linear = self.hidden_size * self.head_dim * (2 * self.heads + 2 * self.kv_heads) + 3 * self.hidden_size * self.intermediate_size
        return tokens * self.layers * (2 * linear + 4 * length * self.heads * self.head_dim)


@dataclass(frozen=True, slots=True)
class Forecast:
    chunks: int
    tokens: int
    shards: int
    states: int  # bytes
    pooled: int
    total: int  # of the whole store
    flops: float
    seconds: float  # of one device at `tflops` and `utilisation`
    memory: int  # bytes a worker, weights on a GPU not counted where there is one
    device: int  # bytes on the GPU a worker


def encoder(config: Config) -> Encoder:
    """The encoder that will run. Raises as `locate.resolve` where its files are not at hand and it is none of the published ones."""
    if lineage.from_scratch(config):
        size = config.backbone.architecture
        if size.encoder is not None:
            bert = json.loads((locate.encoder_folder(size.encoder) / "config.json").read_text())
            return _foreign(bert, size.decoder_layers, size.heads, size.head_dim, size.intermediate_size)
        return _built(size.encoder_layers, size.hidden_size, size.intermediate_size, size.heads, size.kv_heads, size.head_dim,
                      size.decoder_layers, size.vocabulary)  # fmt: skip
    model = config.backbone.model
    try:
        values = json.loads((locate.resolve(model, config.backbone.revision) / "config.json").read_text())
    except (WorkflowError, UserError):
        if model not in PUBLISHED:
            raise
        return Encoder(*PUBLISHED[model])
    if locate.FROZEN in values:
        above = ("num_hidden_layers", "num_attention_heads", "head_dim", "intermediate_size")
        return _foreign(values[locate.FROZEN], *(int(values["decoder"][name]) for name in above))
    text = values["encoder"]["text_config"]
    names = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim")
    layers, width, ffn, heads, kv_heads, head_dim = (int(text[name]) for name in names)
    return _built(layers, width, ffn, heads, kv_heads, head_dim, int(values["decoder"]["num_hidden_layers"]), int(text["vocab_size"]))


def _foreign(bert: Mapping[str, Any], decoder_layers: int, heads: int, head_dim: int, ffn: int) -> Encoder:
    """A BERT, whose feed-forward has two matrices instead of three, under a decoder of that size."""
    width, own = int(bert["hidden_size"]), int(bert["num_attention_heads"])
    inner = int(bert["intermediate_size"]) * 2 // 3
    layer = width * head_dim * 4 * heads + 3 * width * ffn
    mine = int(bert["num_hidden_layers"]) * (4 * width * width + 3 * width * inner)
    words = 2 * int(bert["vocab_size"]) * width  # the encoder's and the decoder's
    return Encoder(int(bert["num_hidden_layers"]), width, inner, own, own, width // own, float(mine + decoder_layers * layer + words))


def _built(layers: int, width: int, ffn: int, heads: int, kv_heads: int, head_dim: int, decoder_layers: int, vocabulary: int) -> Encoder:
    layer = width * head_dim * (2 * heads + 2 * kv_heads) + 3 * width * ffn
    return Encoder(layers, width, ffn, heads, kv_heads, head_dim, float((layers + decoder_layers) * layer + vocabulary * width))


def forecast(config: Config, chunks: int, tokens: int) -> Forecast:
    """Of a pool of that size, all of it encoded here."""
    made, store = encoder(config), config.store
    shards = math.ceil(chunks / store.shard_chunks) if chunks else 0
    states = tokens * token_bytes(made.hidden_size, store.dtype)
    pooled = chunks * pooled_bytes(made.hidden_size, config.retriever.pooled_length, store.dtype)
    extra = shards * SHARD_BYTES + chunks * CHUNK_BYTES + 4 * made.hidden_size**2
    length = tokens / max(1, chunks)
    flops = made.flops(tokens, length)
    shard = (states + pooled) / max(1, shards)
    weights = made.parameters * ITEM_BYTES[config.backbone.dtype]
    # A batch: the residual stream and one layer's widest products, and the padded states once more in float32.
    batch = store.batch_tokens * (3 * made.hidden_size + 3 * made.intermediate_size) * ITEM_BYTES[config.backbone.dtype]
    batch += store.batch_tokens * 2 * made.hidden_size * 4
    on_gpu = store.gpus_per_worker > 0
    # Two shards are under way, one being encoded and one being written, each as tensors and the latter as the bytes of its file too.
    memory = PROCESS + 3 * shard + 0.3 * pooled / max(1, shards) + weights + (0 if on_gpu else batch)
    seconds = flops / (tflops(store) * 1e12 * store.forecast.utilisation)
    total, device = int(states + pooled + extra), int(weights + batch) if on_gpu else 0
    return Forecast(chunks, tokens, shards, states, pooled, total, flops, seconds, int(memory), device)


def tflops(store: StoreConfig) -> float:
    """What a worker's device can do at most."""
    return store.forecast.tflops or (GPU_TFLOPS if store.gpus_per_worker else THREAD_TFLOPS * store.threads)


def lines(config: Config, found: Forecast) -> list[str]:
    """The forecast in words."""
    store, work = config.store, found.seconds / 3600
    unit = "GPU-hours" if store.gpus_per_worker else "hours of one worker"
    bandwidth = found.total / max(1.0, found.seconds / store.workers)
    return [
        f"  {found.chunks:,} chunks, {found.tokens:,} tokens in {found.shards:,} shards of {store.shard_chunks:,} chunks",
        f"  {size(found.states)} of states ({store.dtype}), {size(found.pooled)} of pooled vectors, {size(found.total)} in all",
        f"  {found.flops:.3g} FLOP: {work:.2g} {unit} at {store.forecast.utilisation:.0%} of {tflops(store):g} TFLOP/s, "
        f"{hours(found.seconds / store.workers)} with {store.workers} workers, which then write {size(bandwidth)}/s together",
        f"  memory: {size(found.memory)} a worker" + (f", {size(found.device)} of its GPU" if found.device else ""),
    ]


def check(config: Config, found: Forecast, done: int = 0) -> None:
    """Raises UserError where the store, of which `done` bytes are there, or its workers cannot fit this machine.

    An s3:// root has no end that could be asked for; the memory of a cluster's machines is looked at when the job has joined it.
    """
    root, store = storage.absolute(config.root), config.store
    if not storage.is_s3(root):
        place = Path(root)
        while not place.exists():
            place = place.parent
        room, needed = shutil.disk_usage(place).free, max(0, found.total - done)
        if needed > room:
            raise UserError(f"root {root}: the store needs {size(needed)} more, the disk has {size(room)} free; choose another root"
                            + ("" if store.dtype == "int8" else ", or store.dtype=int8"))  # fmt: skip
    free = None if os.environ.get("RAY_ADDRESS") else available_memory()
    workers = min(store.workers, max(1, found.shards))
    if free is not None and workers * found.memory > free:
        raise UserError(
            f"store.workers: {workers} workers of {size(found.memory)} need {size(workers * found.memory)} of memory, {size(free)} are "
            "free here; lower store.workers, store.shard_chunks or store.batch_tokens"
        )


def device(config: Config) -> str:
    """Where the workers compute. Ray hides the GPUs from a worker that asks for none: never let that decide in silence."""
    asked = config.backbone.device
    if config.store.gpus_per_worker == 0:
        if asked not in ("auto", "cpu"):
            raise UserError(f"backbone.device={asked}, but store.gpus_per_worker is 0; set store.gpus_per_worker=1 or backbone.device=cpu")
        return "cpu"
    return "cuda" if asked == "auto" else asked  # a worker that was given a GPU and cannot see it must not go on without


def available_memory() -> int | None:
    """Bytes that new processes of this machine can have; None where the system does not say."""
    try:
        fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None


def size(count: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.4g} {unit}"
        count /= 1000
    return f"{count:.4g} TB"


def hours(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def summary(found: Forecast) -> dict[str, Any]:
    """For MLflow."""
    return {"forecast_bytes": found.total, "forecast_flops": found.flops, "forecast_seconds": found.seconds}
