"""What int8 states change in retrieval and answers, against the states as a store keeps them (`workflows/benchmark.py int8`).

INTRA ranks and answers with the same backbone, store, retriever and search of the pool (`retriever.search`); only what is read from the
store differs: as it is, or put through `intra.store.quantize` with the mean and spread that `encode` would take. The pooled vectors are no
int8 and stay. With planted outliers OUTLIERS channels of the states are FACTOR times as large and off centre, as of a model whose decoder
expects them so: they are planted before the states are made int8, and taken back after. "plain" is one scale a token without
standardising: int8 done simply.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from intra import cluster, lineage
from intra.config import Config
from intra.data.schema import Question, read_pool, read_questions
from intra.errors import UserError
from intra.evaluation import intervals, metrics
from intra.evaluation.answers import Reader
from intra.store import planning, quantize, writer
from intra.store.reader import ChunkStore

if TYPE_CHECKING:
    from intra.backbone.model import Backbone
    from intra.retrieval.retriever import Retriever

DEPTH = 20
OUTLIERS, FACTOR, OFFSET = 3, 256.0, 4.0  # channels; times; spreads off centre

Change = Callable[[Tensor], Tensor]  # of states [n, d] fp32, as stored and as read


class View:
    """A store whose states come through `change`."""

    def __init__(self, store: ChunkStore, change: Change) -> None:
        self._store, self._change = store, change

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def __len__(self) -> int:
        return len(self._store)

    def states(self, chunk_ids: Sequence[str]) -> list[Tensor]:
        return [self._change(states) for states in self._store.states(chunk_ids)]


@dataclass(frozen=True)
class _Parts:
    """What answers are read with (intra.evaluation.answers)."""

    backbone: Backbone
    store: ChunkStore


def run(config: Config) -> list[dict[str, Any]]:
    """The records {name, value, unit}, on `store.benchmark.questions` test questions. Needs dataset, store and retriever.

    Raises UserError where one is missing, or the store is int8 itself.
    """
    from intra.backbone.model import load
    from intra.retrieval.retriever import Retriever

    store = ChunkStore(lineage.store(config).url)
    retriever = Retriever.from_pretrained(lineage.retriever(config).url)
    dataset = lineage.dataset(config).url
    questions = read_questions(dataset, "test")
    chosen = random.Random(config.seed).sample(questions, min(config.store.benchmark.questions, len(questions)))
    torch.set_num_threads(config.evaluate.threads)
    settings = config.backbone
    backbone = load(lineage.backbone(config).url, dtype=settings.dtype, device=settings.device, prompt=settings.prompt)
    return compare(config, backbone, store, retriever, dataset, sorted(chosen, key=lambda question: question.question_id))


def compare(
    config: Config, backbone: Backbone, store: ChunkStore, retriever: Retriever, dataset: str, questions: Sequence[Question]
) -> list[dict[str, Any]]:
    from intra.retrieval import search

    settings = config.retriever
    if store.dtype == "int8":
        raise UserError(f"store {store.url} is int8 already; compare with one of store.dtype=bfloat16 or float32")
    pool = read_pool(dataset)
    lengths = dict(zip(pool.chunk_ids, pool.table["n_tokens"].to_pylist(), strict=True))
    sample = [pool.chunk_ids[row] for row in writer.sample_rows(planning.digests(pool))]
    blocks = (states for first in range(0, len(sample), 64) for states in store.states(sample[first : first + 64]))
    mu, sigma = quantize.statistics(blocks, store.hidden_size)
    rankings: dict[str, list[set[str]]] = {}
    exact: dict[str, list[float]] = {}
    if settings.search.workers:
        cluster.connect(config)
    passes: search.Passes | None = None  # share the pooled vectors, which no change touches
    for name, change in changes(mu, sigma).items():
        view: Any = View(store, change)
        passes = search.Passes(
            backbone, view, retriever, query_batch=settings.query_batch, tile_chunks=settings.tile_chunks, search=settings.search,
            beside=passes,
        )  # fmt: skip
        method = search.Intra(passes, settings.answer_size, settings.answer_initial)
        found = method.search(questions, DEPTH)
        reader = Reader(_Parts(backbone, view), lengths, config.evaluate.answer_batch, config.backbone.answer_tokens)
        top = {key: [chunk_id for chunk_id, _ in ranking[: settings.answer_size]] for key, ranking in found.items()}
        given = reader.answer(questions, top, f"answers, {name}")
        rankings[name] = [{chunk_id for chunk_id, _ in found[question.question_id]} for question in questions]
        exact[name] = [metrics.exact_match(given[question.question_id], question.answers) for question in questions]
    return _records(rankings, exact, config)


def changes(mu: Tensor, sigma: Tensor) -> dict[str, Change]:
    """By name, how states come back from a store; the first is the reference."""
    places = torch.randperm(len(mu), generator=torch.Generator().manual_seed(0))[:OUTLIERS]
    factor, offset = torch.ones_like(mu), torch.zeros_like(mu)
    factor[places], offset[places] = FACTOR, OFFSET * sigma[places]

    def ours(mean: Tensor, spread: Tensor) -> Change:
        return lambda states: quantize.dequantize(*quantize.quantize(states, mean, spread), mean, spread)

    def planted(change: Change) -> Change:
        return lambda states: change((states + offset) * factor) / factor - offset

    plain = ours(torch.zeros_like(mu), torch.ones_like(sigma))
    return {
        "as_stored": lambda states: states,
        "int8": ours(mu, sigma),
        "int8_outliers": planted(ours((mu + offset) * factor, sigma * factor)),
        "plain_int8_outliers": planted(plain),
    }


def _records(rankings: Mapping[str, Sequence[set[str]]], exact: Mapping[str, Sequence[float]], config: Config) -> list[dict[str, Any]]:
    reference, *others = rankings
    values = np.array(exact[reference])[:, None]
    low, high = intervals.bootstrap(values, config.evaluate.bootstrap, config.seed)
    found = [
        ("questions", float(len(values)), ""),
        (f"em_{reference}", float(values.mean()), "share"),
        (f"em_{reference}_low", float(low[0]), "share"),
        (f"em_{reference}_high", float(high[0]), "share"),
    ]
    for name in others:
        kept = [len(one & other) / len(one) for one, other in zip(rankings[reference], rankings[name], strict=True)]
        found += [(f"top_{DEPTH}_overlap_{name}", float(np.mean(kept)), "share"), (f"em_{name}", float(np.mean(exact[name])), "share")]
    return [{"name": name, "value": value, "unit": unit} for name, value, unit in found]
