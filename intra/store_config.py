"""The keys of the configuration's section `store`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from intra.section import Section


class ForecastConfig(Section):
    """What `encode.py --dry-run` reckons with."""

    tflops: float | None = Field(None, gt=0, description="of one worker; null: an H100's bfloat16 (790) with a GPU, else 0.1 a thread")
    utilisation: float = Field(0.6, gt=0, le=1, description="share of it that encoding reaches")
    chunks: int | None = Field(None, ge=1, description="of the pool, where the dataset is not made yet")
    tokens: int | None = Field(None, ge=1, description="of the pool, where the dataset is not made yet")


class BenchmarkConfig(Section):
    """What `benchmark.py encode` and `benchmark.py int8` measure with."""

    chunks: int = Field(8192, ge=1, description="of the pool, about")
    repeats: int = Field(3, ge=1, description="of each measure, in turn; the median counts")
    questions: int = Field(500, ge=1, description="test questions that int8 states are compared on")


class StoreConfig(Section):
    dtype: Literal["float32", "bfloat16", "int8"] = Field(
        "bfloat16", description="of the token states; int8 keeps the pooled ones bfloat16"
    )
    shard_chunks: int = Field(1024, ge=1, description="chunks a shard, the unit of work and of commit")
    reuse: bool = Field(True, description="borrow unchanged chunks from complete stores of the same encoding under the root")
    batch_tokens: int = Field(8192, ge=64, description="padded tokens a batch; part of the store's fingerprint")
    workers: int = Field(2, ge=1)
    threads: int = Field(1, ge=1, description="CPU threads a worker")
    gpus_per_worker: float = Field(0, ge=0)
    forecast: ForecastConfig = ForecastConfig()
    benchmark: BenchmarkConfig = BenchmarkConfig()
