"""How a run stands: counted from the lines that its workers return (writer.EncodeCommit)."""

from __future__ import annotations

import resource
import time
from collections.abc import Mapping
from typing import Any


def peak_memory() -> int:
    """Bytes that this process has had in memory at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Progress:
    """Of the shards made in this run; `shards` and `chunks` are to be made, `begun` is when the run began (time.time())."""

    def __init__(self, shards: int, chunks: int, begun: float) -> None:
        self.shards, self.chunks, self.begun = shards, chunks, begun
        self.done = self.done_chunks = self.tokens = self.bytes = self.memory = 0  # memory: bytes, of the largest worker
        self._spans: dict[str, list[float]] = {}  # worker -> first start, last end, seconds of computing, tokens

    def add(self, line: Mapping[str, Any]) -> None:
        self.done += 1
        self.done_chunks += int(line["rows"])
        self.tokens += int(line["tokens"])
        self.bytes += int(line["bytes"])
        self.memory = max(self.memory, int(line["memory"]))
        span = self._spans.setdefault(str(line["worker"]), [line["started"], line["ended"], 0.0, 0.0])
        span[0], span[1] = min(span[0], line["started"]), max(span[1], line["ended"])
        span[2], span[3] = span[2] + line["compute"], span[3] + line["tokens"]

    @property
    def start_up(self) -> float:
        """Seconds until the first shard was begun."""
        return max(0.0, min((span[0] for span in self._spans.values()), default=time.time()) - self.begun)

    @property
    def active(self) -> float:
        """Seconds from the first shard's start to the last one's end."""
        return max((span[1] for span in self._spans.values()), default=0.0) - min((span[0] for span in self._spans.values()), default=0.0)

    @property
    def compute_share(self) -> float:
        """Of the time that the workers were at it, the share in which they encoded."""
        present = sum(span[1] - span[0] for span in self._spans.values())
        return sum(span[2] for span in self._spans.values()) / present if present else 0.0

    @property
    def rate(self) -> float:
        """Tokens/s of all workers, each over its own time: a worker's wait while another ends its last shard is not in it."""
        return sum(tokens / (end - start) for start, end, _, tokens in self._spans.values() if end > start)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.active if self.active else 0.0

    @property
    def seconds_left(self) -> float:
        return (self.chunks - self.done_chunks) * self.active / self.done_chunks if self.done_chunks else 0.0

    def metrics(self) -> dict[str, float]:
        return {
            "shards_done": self.done,
            "chunks_done": self.done_chunks,
            "tokens_per_second": self.tokens_per_second,
            "compute_share": self.compute_share,
            "seconds_left": self.seconds_left,
            "workers_seen": len(self._spans),
        }

    def line(self) -> str:
        return f"{self.done_chunks:,} chunks, {self.tokens_per_second:,.0f} tokens/s, computing {self.compute_share:.0%}"
