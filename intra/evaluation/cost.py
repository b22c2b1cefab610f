"""What a method takes: seconds and the process's memory, measured; operations, counted from the shapes. The seconds of an encoded corpus
are those of all workers together.

Operations are those of matrix products, a multiplication and an addition counted as two, of one question: what does not depend on the
machine. Those of INTRA are of the exact search in head space (`retrieval/scoring.py`), whichever scorer ran; a lexical method's are two for
each posting it reads; an encoder's are those of its weights (attention itself, a few per cent of them, is left out).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from intra.baselines.models import linear

if TYPE_CHECKING:
    from intra.backbone.model import Backbone
    from intra.data.schema import Question
    from intra.retrieval.retriever import RetrieverSettings

INTERVAL = 0.02  # seconds between two looks at the memory


class Meter:
    """Measures a `with` block. seconds; peak_bytes: the most memory this process held, all that was there before included."""

    def __enter__(self) -> Self:
        import psutil

        self._process, self._over = psutil.Process(), threading.Event()
        self.peak_bytes: int = self._process.memory_info().rss
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        self._start = time.perf_counter()
        return self

    def _watch(self) -> None:
        while not self._over.wait(INTERVAL):
            self.peak_bytes = max(self.peak_bytes, self._process.memory_info().rss)

    @property
    def seconds(self) -> float:
        """So far; of the whole block once it is left."""
        return (self._end if self._over.is_set() else time.perf_counter()) - self._start

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._end = time.perf_counter()
        self._over.set()
        self._thread.join()
        self.peak_bytes = max(self.peak_bytes, self._process.memory_info().rss)


def initial(backbone: Backbone, questions: Sequence[Question], chunks: int, pooled_length: int) -> float:
    """S_0 of a question: the encoder, and MaxSim of its tokens (intra.retrieval.initial.encode) with every pooled vector."""
    tokens = _mean(len(ids) for ids in backbone.tokenize([question.question for question in questions]))
    compared = echoed(backbone, questions) or tokens
    return 2 * (tokens * linear(backbone.model.get_encoder()) + compared * chunks * pooled_length * backbone.hidden_size)


def retrieval_pass(
    backbone: Backbone, questions: Sequence[Question], settings: RetrieverSettings, chunk_tokens: float, echo: float = 0.0
) -> float:
    """The decoder over question, `echo` tokens (encoded anew) and retrieval tokens, S_0's chunks of `chunk_tokens` each its memory."""
    own = _mean(len(ids) for ids in backbone.prompt_ids([question.question for question in questions])) + settings.tokens + echo
    return _decoder(backbone, own, settings.initial_context * chunk_tokens) + 2 * echo * linear(backbone.model.get_encoder())


def echoed(backbone: Backbone, questions: Sequence[Question]) -> float:
    """Tokens of a question that its retrieval pass reads as encoder states, and retrieves by (`Backbone.frozen_encoder`)."""
    if not backbone.frozen_encoder:
        return 0.0
    prompts = backbone.prompt_ids([question.question for question in questions])
    return _mean(len(ids) - 2 for ids in backbone.echo_ids(prompts))


def scoring(backbone: Backbone, settings: RetrieverSettings, chunks: float, batch: int, scans: int = 1, echo: float = 0.0) -> float:
    """s_i of so many chunks, `scans` times; a batch of questions shares the keys. `echo`: tokens beside the retrieval tokens."""
    vectors, tokens = chunks * settings.pooled_length, settings.tokens + echo
    if settings.scoring == "mixed":
        return scans * 2 * vectors * tokens * backbone.hidden_size
    keys = backbone.hidden_size * backbone.kv_heads * backbone.head_dim / batch
    return float(scans * 2 * vectors * backbone.layers) * (keys + backbone.heads * tokens * backbone.head_dim)


def answer(backbone: Backbone, questions: Sequence[Question], answers: Sequence[str], memory_tokens: float) -> float:
    """One greedy answer, read from `memory_tokens` stored states."""
    prompt = _mean(len(ids) for ids in backbone.prompt_ids([question.question for question in questions]))
    written = _mean(len(ids) for ids in backbone.answer_ids(answers))
    vocabulary = backbone.model.config.decoder.vocab_size
    return _decoder(backbone, prompt + written - 1, memory_tokens) + 2 * written * backbone.hidden_size * float(vocabulary)


def _decoder(backbone: Backbone, own: float, memory: float) -> float:
    """`own` tokens through every layer; the memory's keys and values are projected once a layer."""
    projected = 2 * backbone.layers * backbone.hidden_size * backbone.kv_heads * backbone.head_dim
    attention = 2 * backbone.layers * backbone.heads * backbone.head_dim * own * (own + memory)
    return 2 * (own * linear(backbone.model.get_decoder()) + memory * projected + attention)


def _mean(values: Any) -> float:
    found = list(values)
    return float(sum(found) / len(found)) if found else 0.0
