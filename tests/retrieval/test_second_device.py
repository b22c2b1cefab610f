"""Retrieval with the backbone on another device than what a store gives (tests/two_devices.py): nothing is mixed, and it finds the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from intra import config
from intra.backbone import model
from intra.config import RetrieverTrainConfig, SearchConfig
from intra.data.schema import Question
from intra.errors import UserError
from intra.retrieval import benchmark, fleet, intrinsic, pools, scoring, search, training
from intra.retrieval.intrinsic import Searcher
from intra.retrieval.negatives import Example
from intra.retrieval.pools import Ask, Form, Local, Tokens
from intra.retrieval.prefix import Prefixes
from intra.retrieval.retriever import Retriever
from intra.retrieval.scorers import Keys
from intra.retrieval.scoring import Scored

from .. import two_devices
from ..two_devices import CPU, DEVICE, There, numbers
from .conftest import SCORINGS, TRAIN, MemoryStore, settings
from .test_benchmark import made

LAYERWISE = ["per_head", "mixture"]
EXACT = ["exact", "head_space", "reverse", "paper"]


class Two(NamedTuple):
    """The same backbone on both devices."""

    cpu: model.Backbone
    there: model.Backbone

    @property
    def close(self) -> dict[str, float]:
        """How near results of the two are: blocks of a product are cut otherwise there."""
        return {"rtol": 1e-4, "atol": 1e-4} if self.cpu.dtype == torch.float32 else {"rtol": 0.05, "atol": 0.3}


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def two(request: pytest.FixtureRequest, folder: Path) -> Two:
    one, other = (model.load(str(folder), dtype=request.param, device="cpu") for _ in range(2))
    with two_devices.here():
        other.model.to(DEVICE)
    return Two(one, other)


@pytest.fixture
def big() -> MemoryStore:
    """1,100 chunks of 3 to 5 random states: two tiles."""
    generator = torch.Generator().manual_seed(4)
    lengths = [3 + row % 3 for row in range(1100)]
    return MemoryStore([f"c{row:04d}" for row in range(1100)], list(torch.randn(sum(lengths), 32, generator=generator).split(lengths)))


@pytest.fixture
def ragged() -> MemoryStore:
    """40 chunks of 3 to 42 random states."""
    generator = torch.Generator().manual_seed(6)
    return MemoryStore([f"c{row:02d}" for row in range(40)], [torch.randn(3 + row, 32, generator=generator) for row in range(40)])


def asked(kind: str, backbone: model.Backbone, queries: Tensor, weights: Tensor) -> Ask:
    """The questions on the backbone's device and of its type."""
    queries, weights = queries.to(backbone.device, backbone.dtype), weights.to(backbone.device)
    return Ask(kind, scoring.mixed(queries, backbone, weights) if kind == "mixed" else queries, weights, 1.0)


def close(found: Sequence[Tensor], expected: Sequence[Tensor], two: Two) -> None:
    """What was found there and brought back to the CPU."""
    for one, other in zip(found, expected, strict=True):
        assert type(one) is Tensor
        torch.testing.assert_close(one, other, **two.close)


def alike(found: Sequence[Scored], expected: Sequence[Scored], two: Two) -> None:
    """The same chunks, but for those that bfloat16's rounding may exchange."""
    assert [len(mine) for mine in found] == [len(mine) for mine in expected]
    assert intrinsic.recall(expected, found) > (0.99 if two.cpu.dtype == torch.float32 else 0.7)


@pytest.mark.parametrize("kind", SCORINGS)
def test_chunks_are_scored_again_there(kind: str, two: Two, ragged: MemoryStore, queries: Tensor, weights: Tensor) -> None:
    wanted = [[3, 30, 9], [], list(range(40))]
    settings = SearchConfig(rescore=15)

    def run(backbone: model.Backbone) -> tuple[list[Tensor], list[Scored], list[Tensor]]:
        ask, keys = asked(kind, backbone, queries, weights), Keys.of(backbone)
        tokens = Tokens(keys, lambda mine: ragged.states([ragged.chunk_ids[row] for row in mine]))
        searcher = Searcher(Local(ragged, keys, 1024, backbone.device), settings, tokens=tokens)  # type: ignore[arg-type]
        first = tokens(ask, wanted[::2])  # the second time what it has kept serves
        return first, searcher.find(ask, 10).pairs, tokens(ask, wanted[::2])

    expected = run(two.cpu)
    with two_devices.here():
        found = run(two.there)
    close(found[0], expected[0], two)
    alike(found[1], expected[1], two)
    close(found[2], expected[0], two)


@pytest.mark.parametrize("in_memory", [False, True])
@pytest.mark.parametrize("kind", LAYERWISE)
def test_every_form_scores_there(
    kind: str, in_memory: bool, two: Two, big: MemoryStore, queries: Tensor, weights: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [list(range(0, 1100, 90)), [], [1099, 2]]

    def run(backbone: model.Backbone) -> tuple[list[list[Scored]], list[Tensor]]:
        pool = Local(big, Keys.of(backbone), 1024, backbone.device, in_memory)  # type: ignore[arg-type]
        ask = asked(kind, backbone, queries, weights)
        pairs = [intrinsic.exact(pool, ask, 10, Form(name)).pairs for name in EXACT]
        pairs += [intrinsic.approximate(pool, ask, 10, Form("linear"), 200, 600).pairs]
        pairs += [intrinsic.approximate(pool, ask, 10, Form("summed"), 200).pairs]
        z: list[Tensor] = []
        for name in (*EXACT, "linear", "summed"):
            for first, mine in ((0, [rows[0]] * 3), (0, rows), (2, rows[2:])):
                z += pool.components(ask.part(first, 3), Form(name), mine)
            with monkeypatch.context() as patch:  # as for many rows, tile by tile
                patch.setattr(pools, "ALIGN", 1)
                z += pool.components(ask, Form(name), rows)
        return pairs, [*z, *([pool.log_sums(ask, Form()).cpu().float()] if kind == "mixture" else [])]

    pairs, z = run(two.cpu)
    with two_devices.here():
        found, there = run(two.there)
    for mine, other in zip(found, pairs, strict=True):
        alike(mine, other, two)
    close(there, z, two)


def test_mixed_scores_there(two: Two, big: MemoryStore, queries: Tensor, weights: Tensor) -> None:
    def run(backbone: model.Backbone, in_memory: bool) -> list[Scored]:
        pool = Local(big, Keys.of(backbone), 1024, backbone.device, in_memory)  # type: ignore[arg-type]
        return intrinsic.exact(pool, asked("mixed", backbone, queries, weights), 10).pairs

    for in_memory in (False, True):
        expected = run(two.cpu, in_memory)
        with two_devices.here():
            alike(run(two.there, in_memory), expected, two)


def test_integers_are_refused_there(two: Two, big: MemoryStore, queries: Tensor, weights: Tensor) -> None:
    with two_devices.here(), pytest.raises(UserError, match="is for CPUs"):
        asked("per_head", two.there, queries, weights).scorer(Keys.of(two.there), Form("int8"))


@pytest.mark.parametrize("kind", LAYERWISE)
def test_the_cascade_is_checked_and_searches_there(
    kind: str, two: Two, big: MemoryStore, queries: Tensor, weights: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(intrinsic, "CHECKED", 2)  # of three questions in the first batch
    with two_devices.here():
        ask = asked(kind, two.there, queries, weights)
        for in_memory in (False, True):
            pool = Local(big, Keys.of(two.there), 1024, DEVICE, in_memory)  # type: ignore[arg-type]
            for recall, form in ((0.0, "linear"), (1.0, "exact")):
                searcher = Searcher(pool, SearchConfig(scorer="cascade", candidates=40, coarse_candidates=500, recall=recall))
                found = [searcher.find(ask, 5) for _ in range(2)]
                assert searcher._chosen[5].name == form
                assert [len(mine) for each in found for mine in each.pairs] == [5] * 6
                assert (found[0].normalisers is None) == (kind == "per_head")
                close(searcher.components(ask, [[1, 2]] * 3), pool.components(ask, Form(), [[1, 2]] * 3), two)


@pytest.mark.parametrize("in_memory", [False, True])
@pytest.mark.parametrize("initial", ["dot", "cosine", "whitened"])
def test_questions_are_searched_there(
    initial: str, in_memory: bool, two: Two, store: MemoryStore, questions: list[Question], weights: Tensor
) -> None:
    shape = settings(two.cpu, scoring="mixture", initial_scoring=initial)
    retriever = Retriever.initialise(two.cpu, shape, seed=5)
    retriever.weights.data.copy_(weights)

    def run(backbone: model.Backbone, rescore: int) -> dict[str, list[Scored]]:
        chosen = SearchConfig(in_memory=in_memory, rescore=rescore)
        passes = search.Passes(backbone, store, retriever, query_batch=4, search=chosen)  # type: ignore[arg-type]
        found = {method.name: method.search(questions[:6], 20) for method in search.methods(passes)}
        return {name: [[(int(chunk[1:]), score) for chunk, score in mine] for mine in each.values()] for name, each in found.items()}

    for rescore in (0, 20):
        expected = run(two.cpu, rescore)
        with two_devices.here():
            found = run(two.there, rescore)
        assert found.keys() == expected.keys() == {"intra", "maxsim", "s0_reranked"}
        for name, pairs in found.items():
            alike(pairs, expected[name], two)


@pytest.fixture
def examples(questions: list[Question]) -> list[Example]:
    contexts = [(3, 1, 8, 20), (5,), (), (7, 30)]
    return [
        Example(question.question_id, question.question, ((number,),), context, (number + 1, 40 + number))
        for number, (question, context) in enumerate(zip(questions, contexts, strict=False))
    ]


@pytest.mark.parametrize("kind", SCORINGS)
def test_a_retriever_is_calibrated_and_trained_there(kind: str, two: Two, store: MemoryStore, examples: list[Example]) -> None:
    memory: Any = store

    def run(backbone: model.Backbone, start: Retriever | None) -> tuple[Retriever, list[Tensor]]:
        retriever = training.start(backbone, memory, settings(backbone, scoring=kind), examples, 3)
        calibrated = retriever.weights.detach().clone()
        if start is not None:  # the gradients are to be of the same weights
            retriever.load_state_dict(start.state_dict())
        micro = [
            training.micro_gradient(backbone, retriever, memory, examples, 5, (0, 1), tokens, prefixes)
            for tokens in (True, False)
            for prefixes in (None, Prefixes(backbone, memory, 4, 100))
        ]
        return retriever, [calibrated, *micro]

    retriever, expected = run(two.cpu, None)
    with two_devices.here():
        _, found = run(two.there, retriever)
        recipe: RetrieverTrainConfig = TRAIN.model_copy(update={"batch_size": 4, "prefix_cache_mb": 8})
        trainer = training.Trainer(two.there, memory, retriever, examples, recipe, 3)
        trainer.step()
        trainer.restore(trainer.state())
        trainer.step()
    assert all(type(parameter.detach()) is Tensor for parameter in retriever.parameters())
    for one, other in zip(found, expected, strict=True):
        assert type(one) is Tensor
        if two.cpu.dtype == torch.float32:
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
        else:
            assert torch.cosine_similarity(one, other, dim=-1).min() > 0.9


@pytest.mark.parametrize("kind", LAYERWISE)
def test_a_part_of_a_fleet_answers_there(
    kind: str, two: Two, big: MemoryStore, queries: Tensor, weights: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ray.get", lambda reference: reference)
    ask = asked(kind, two.cpu, queries, weights)  # it travels on the CPU, as the keys do
    keys = Keys.of(two.cpu)
    rows = [[1030, 1099], [], [1024, 1050, 1060]]

    def run(device: torch.device) -> list[Any]:
        opened: Callable[[], Any] = lambda: big  # noqa: E731
        holder = fleet.Holder(opened, keys, 1024, str(device), 1)
        found: list[Any] = []
        for name in ("exact", "linear", "summed"):
            work = {"part": (1024, 76), "ask": ask, "form": Form(name)}
            sums = holder({**work, "what": "log_sums"})["result"]
            best = holder({**work, "what": "best", "k": 10, "normalisers": sums if kind == "mixture" else None})["result"]
            found += [sums.float(), best.scores, best.rows, *holder({**work, "what": "components", "rows": rows})["result"]]
        return found

    expected = run(CPU)
    with two_devices.here():
        found = run(DEVICE)
    assert all(type(each) is Tensor for each in found)  # nothing there is sent back
    if two.cpu.dtype == torch.float32:
        close(found, expected, two)


class Elsewhere:
    """A pool on the CPU asked by a driver that is there, as workers without a GPU are."""

    def __init__(self, pool: Local) -> None:
        self.pool = pool

    def __len__(self) -> int:
        return len(self.pool)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return lambda ask, form, *others: getattr(self.pool, name)(ask.to("cpu"), form, *others)


@pytest.mark.parametrize("kind", LAYERWISE)
def test_a_driver_there_asks_workers_elsewhere(
    kind: str, two: Two, big: MemoryStore, queries: Tensor, weights: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(intrinsic, "CHECKED", 2)
    pool: Any = Elsewhere(Local(big, Keys.of(two.cpu), 1024, CPU, True))  # type: ignore[arg-type]

    def run(backbone: model.Backbone) -> list[Scored]:
        tokens = Tokens(Keys.of(backbone), lambda mine: big.states([big.chunk_ids[row] for row in mine]))
        ask, found = asked(kind, backbone, queries, weights), []
        for chosen in (
            {},
            {"rescore": 12},
            {"scorer": "cascade", "candidates": 60, "coarse_candidates": 500, "recall": 0.0, "rescore": 12},
        ):
            searcher = Searcher(pool, SearchConfig(**chosen), tokens=tokens)  # type: ignore[arg-type]
            for _ in range(2):
                found += searcher.find(ask, 10).pairs
        return found

    expected = run(two.cpu)
    with two_devices.here():
        alike(run(two.there), expected, two)


def test_answers_are_read_there(two: Two, store: MemoryStore, questions: list[Question]) -> None:
    rows = [[1, 2], [], [5, 7, 9]]
    with two_devices.here():
        memory = search.read_context(two.there, store, rows, 2)  # type: ignore[arg-type]
        assert memory.states.shape[:2] == memory.mask.shape
        assert numbers(memory.mask).sum(dim=1).tolist() == [sum(len(store.kept[row]) for row in mine[:2]) for mine in rows]
        answers = two.there.answer(two.there.prompt_ids([question.question for question in questions[:3]]), memory, 3)
    assert len(answers) == 3


@pytest.mark.parametrize("retriever", ["mixture"], indirect=True)
def test_the_benchmark_runs_there(
    two: Two, store: MemoryStore, retriever: Retriever, questions: list[Question], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benchmark, "CANDIDATES", (25, 400))
    monkeypatch.setattr(intrinsic, "CHECKED", 2)
    with two_devices.here():
        bench = made(two.there, store, retriever, questions, tmp_path, monkeypatch)
        bench.settings = bench.settings.model_copy(update={"questions": 2, "checked": 2, "pools": [150], "latency_questions": 1})
        bench.config = config.varied(bench.config, ["backbone.answer_tokens=2"])
        benchmark.run(bench.config, lambda _: None)
    assert isinstance(bench.sample, There)
    assert not [name for name in bench.records if "int8" in name]
    timed = {"pool_naive_hidden", "shape_sentence_transformers", "batch_2_reverse", "rows_150_cascade", "latency_answer_median"}
    assert timed <= set(bench.records)
    assert bench.records["search_same_top_20"][0] > 0.5
    assert bench.records["search_cascade_400_recall_20"][0] > 0.8


def test_a_planted_mistake_is_found(two: Two, big: MemoryStore, queries: Tensor, weights: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = pools.Tile.rows
    monkeypatch.setattr(pools.Tile, "rows", lambda tile, at: rows(tile, at.cpu()))
    with two_devices.here(), pytest.raises(two_devices.Mixed, match="index_select"):
        Local(big, Keys.of(two.there), 1024, DEVICE).components(asked("per_head", two.there, queries, weights), Form(), [[1, 2]] * 3)  # type: ignore[arg-type]
