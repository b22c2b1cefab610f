"""S_0, the answer set, and the order of every method's ranking."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pytest
import torch
from torch import Tensor

from intra import method
from intra.backbone.model import Backbone
from intra.config import SearchConfig
from intra.data.schema import POOL_SCHEMA, Pool, Question
from intra.errors import UserError
from intra.retrieval import initial, search
from intra.retrieval.retriever import Retriever

from .conftest import SCORINGS, MemoryStore, settings

each_scoring = pytest.mark.parametrize("retriever", SCORINGS, indirect=True)


def pool_of(ids: list[str]) -> Pool:
    empty = [""] * len(ids)
    return Pool(pa.table({"chunk_id": ids, "title": empty, "text": empty, "source": empty, "n_tokens": [1] * len(ids)}, schema=POOL_SCHEMA))


def naive_initial(kind: str, store: MemoryStore, states: Tensor) -> list[float]:
    """Eq. 6 one pair of vectors at a time."""
    mean, matrix = (part.double() for part in store.whitening())

    def white(vector: Tensor) -> Tensor:
        return (vector.double() - mean) @ matrix if kind == "whitened" else vector.double()

    def similarity(u: Tensor, v: Tensor) -> float:
        u, v = white(u), white(v)
        divisor = {"dot": store.hidden_size**0.5, "cosine": u.norm() * v.norm(), "whitened": v.norm()}[kind]
        return float(u @ v / divisor)

    return [sum(max(similarity(u, v) for v in chunk) for u in states) for chunk in store.vectors]


def compared(store: MemoryStore, tile_chunks: int, kind: str = "dot") -> initial.Chunks:
    return initial.Chunks(initial.Space(kind, store), lambda: store.tiles(tile_chunks))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["dot", "cosine", "whitened"])
def test_initial_scores_equal_the_naive_ones(kind: str, backbone: Backbone, store: MemoryStore, questions: list[Question]) -> None:
    texts = [question.question for question in questions[:3]]
    (best,) = initial.search(backbone, compared(store, 7, kind), texts, 10)
    for text, rows, scores in zip(texts, best.rows.tolist(), best.scores, strict=True):
        (states,) = backbone.encode(backbone.tokenize([text]))
        expected = naive_initial(kind, store, states)
        assert rows == sorted(range(len(store)), key=lambda row: -expected[row])[:10]
        torch.testing.assert_close(scores.double(), torch.tensor([expected[row] for row in rows]).double(), rtol=1e-4, atol=1e-4)


def test_initial_does_not_depend_on_tiles_or_neighbours(backbone: Backbone, store: MemoryStore, questions: list[Question]) -> None:
    texts = [question.question for question in questions]
    (together,) = initial.search(backbone, compared(store, 60), texts, 8)
    alone = [next(iter(initial.search(backbone, compared(store, 11), [text], 8))).rows[0].tolist() for text in texts]
    assert together.rows.tolist() == alone


@pytest.mark.parametrize("kind", ["dot", "cosine", "whitened"])
def test_s_0_in_memory_reads_the_pool_once_and_finds_the_same(
    kind: str, backbone: Backbone, store: MemoryStore, questions: list[Question]
) -> None:
    retriever = Retriever.initialise(backbone, settings(backbone, initial_scoring=kind), 0)
    streamed, kept = (
        search.Passes(backbone, store, retriever, tile_chunks=16, search=SearchConfig(in_memory=in_memory))  # type: ignore[arg-type]
        for in_memory in (False, True)
    )
    beside = search.Passes(backbone, store, retriever, beside=kept)  # type: ignore[arg-type]
    reads = []
    for passes in (streamed, kept, beside):
        before = store.tile_reads
        found = [passes.initial([question], 10)[question.question_id] for question in questions[:4]]
        reads.append(store.tile_reads - before)
        assert found == [streamed.initial([question], 10)[question.question_id] for question in questions[:4]]
    assert reads == [4, 1, 0]


@pytest.fixture
def passes(backbone: Backbone, store: MemoryStore, retriever: Retriever) -> search.Passes:
    return search.Passes(backbone, store, retriever, query_batch=4, tile_chunks=16)  # type: ignore[arg-type]


@each_scoring
@pytest.mark.parametrize("k", [1, 3, 5, 20, 60])
def test_every_method_gives_a_checked_ranking(passes: search.Passes, store: MemoryStore, questions: list[Question], k: int) -> None:
    for each in search.methods(passes):
        each.index(pool_of(store.chunk_ids))
        method.check(each.name, each.search(questions, k), questions, k, pool_of(store.chunk_ids))


@each_scoring
def test_rankings_are_what_they_are_made_of(passes: search.Passes, questions: list[Question]) -> None:
    intra, maxsim, reranked = (each.search(questions, 12) for each in search.methods(passes, 5, 1))
    raw = search.Intra(passes).raw(questions, 12)
    n_0 = passes.retriever.settings.initial_context
    differ = False
    for question in questions:
        key = question.question_id
        by_score, first = [c for c, _ in raw[key]], [c for c, _ in maxsim[key]]
        found = [c for c, _ in intra[key]]
        assert found[:4] == by_score[:4]
        assert set(found[:5]) == set(by_score[:4]) | {first[0]} or first[0] in by_score[:4]
        assert [c for c in found[5:] if c != first[0]] == [c for c in by_score if c not in found[:5]][: len(found) - 5]
        again = [c for c, _ in reranked[key]]
        assert set(again[:n_0]) == set(first[:n_0])
        assert again[n_0:] == first[n_0:]
        everything = dict(search.Intra(passes).raw([question], 60)[key])
        assert again[:n_0] == sorted(first[:n_0], key=lambda c: (-everything[c], c))
        differ |= again != first
    assert differ


def test_answer_set_is_distinct_and_refilled() -> None:
    order = [10, 11, 12, 13, 14, 15, 16]
    assert search.compose(order, [99, 98], 5, 1) == [10, 11, 12, 13, 99, 14, 15, 16]
    assert search.compose(order, [12, 99], 5, 1) == order  # S_0's top is among the four: the fifth by s_i fills up
    assert search.compose(order, [14], 5, 1) == order
    assert search.compose(order, [99, 11, 98], 5, 2) == [10, 11, 12, 99, 13, 14, 15, 16]
    assert search.compose(order, [99], 5, 0) == order
    assert search.compose(order, [99, 98], 2, 2)[:3] == [99, 98, 10]


def test_a_constant_scorer_ranks_by_id(backbone: Backbone, store: MemoryStore, retriever: Retriever, questions: list[Question]) -> None:
    with torch.no_grad():
        retriever.weights.zero_()
    passes = search.Passes(backbone, store, retriever, query_batch=4, tile_chunks=16)  # type: ignore[arg-type]
    for ranking in search.Intra(passes, 5, 0).search(questions, 10).values():
        assert [c for c, _ in ranking] == store.chunk_ids[:10]


def test_what_s_0_has_found_is_not_searched_again(
    backbone: Backbone, store: MemoryStore, retriever: Retriever, questions: list[Question], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, other = (search.Passes(backbone, store, retriever) for _ in range(2))  # type: ignore[arg-type]
    expected = [each.search(questions, 20) for each in search.methods(whole)]
    other.remember(expected[1])
    other.remember({key: ranking[:3] for key, ranking in expected[1].items()})  # shorter ones are left

    def nothing_left(_: object, __: object, texts: list[str], *___: object) -> list[object]:
        assert texts == []
        return []

    monkeypatch.setattr(initial, "search", nothing_left)
    assert [each.search(questions, 20) for each in search.methods(other)] == expected


@each_scoring
def test_passes_are_made_once(passes: search.Passes, store: MemoryStore, questions: list[Question]) -> None:
    for each in search.methods(passes):
        each.search(questions, 10)
    reads = store.tile_reads
    batches = -(-len(questions) // passes.query_batch)
    # S_0, then s_i once a batch; a mixture's normalisers before it, which s_i of S_0 shares.
    assert reads == 1 + batches * (2 if passes.retriever.settings.scoring == "mixture" else 1)
    for each in search.methods(passes):
        each.search(questions, 5)
    assert store.tile_reads == reads


@each_scoring
def test_query_batch_and_tiles_keep_the_rankings(
    backbone: Backbone, store: MemoryStore, retriever: Retriever, questions: list[Question]
) -> None:
    found = []
    for query_batch, tile_chunks in ((4, 16), (30, 60), (1, 7)):
        passes = search.Passes(backbone, store, retriever, query_batch=query_batch, tile_chunks=tile_chunks)  # type: ignore[arg-type]
        rankings = [each.search(questions, 10) for each in search.methods(passes)]
        found.append([{key: [c for c, _ in ranking] for key, ranking in each.items()} for each in rankings])
    assert found[0] == found[1] == found[2]


def test_the_context_changes_the_scores_and_may_be_empty(backbone: Backbone, store: MemoryStore, questions: list[Question]) -> None:
    raw = []
    for n_0 in (0, 4):
        retriever = Retriever.initialise(backbone, settings(backbone, initial_context=n_0), seed=5)
        passes = search.Passes(backbone, store, retriever)  # type: ignore[arg-type]
        for each in search.methods(passes):
            method.check(each.name, each.search(questions, 10), questions, 10, pool_of(store.chunk_ids))
        raw.append(search.Intra(passes).raw(questions, 10))
    assert raw[0] != raw[1]


def test_refuses_a_store_of_another_pool(passes: search.Passes, store: MemoryStore) -> None:
    with pytest.raises(UserError, match="not the 59 of the pool"):
        search.MaxSim(passes).index(pool_of(store.chunk_ids[:-1]))


@pytest.mark.parametrize(("scorer", "fast", "lines"), [("int8", True, 0), ("int8", False, 1), ("cascade", False, 0)])
def test_an_integer_scan_that_saves_no_time_says_so(
    backbone: Backbone, store: MemoryStore, retriever: Retriever, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    scorer: Any, fast: bool, lines: int,
) -> None:  # fmt: skip
    monkeypatch.setattr(search, "fast_integers", lambda: fast)
    search.Passes(backbone, store, retriever, search=SearchConfig(scorer=scorer))  # type: ignore[arg-type]
    said = capsys.readouterr().err.splitlines()
    assert len(said) == lines
    assert all("retriever.search.scorer=int8 saves no time" in line for line in said)
