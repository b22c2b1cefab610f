"""Every configured scorer against the default one, the check of the approximate ones, and the rule that chooses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from intra import config
from intra.backbone.model import Backbone
from intra.config import SearchConfig
from intra.data.schema import Question
from intra.errors import UserError
from intra.retrieval import intrinsic, pools, scorers, scoring, search
from intra.retrieval.intrinsic import Searcher
from intra.retrieval.pools import Ask, Form, Local, Tile, Tokens, cheaper
from intra.retrieval.retriever import Retriever
from intra.retrieval.scorers import Keys
from intra.retrieval.scoring import Scored

from .conftest import POOLED, MemoryStore

layerwise = pytest.mark.parametrize("kind", ["per_head", "mixture"])


class Big(MemoryStore):
    """2,500 chunks of random vectors near each other, some of them twice."""

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(4)
        self.vectors = torch.randn(2500, POOLED, 32, generator=generator)
        self.vectors[2000:2300] = self.vectors[100:400]

    def __len__(self) -> int:
        return len(self.vectors)


@pytest.fixture
def big() -> Big:
    return Big([], [])


@pytest.fixture
def ask(queries: Tensor, weights: Tensor) -> Ask:
    return Ask("per_head", queries, weights, 1.0)


def local(store: MemoryStore, backbone: Backbone, tile_chunks: int = 1024, in_memory: bool = False) -> Local:
    return Local(store, Keys.of(backbone), tile_chunks, "cpu", in_memory)  # type: ignore[arg-type]


def rows(pairs: list[Scored]) -> list[list[int]]:
    return [[row for row, _ in each] for each in pairs]


@layerwise
def test_tiles_memory_and_forms_change_no_ranking(kind: str, big: Big, backbone: Backbone, ask: Ask) -> None:
    ask = replace(ask, kind=kind)
    truth = intrinsic.exact(local(big, backbone), ask, 50)
    for row, _ in truth.pairs[0]:
        if 100 <= row < 400:  # its twin has the same score, and follows
            assert [r for r, _ in truth.pairs[0]][[r for r, _ in truth.pairs[0]].index(row) + 1] == row + 1900
    for pool in (local(big, backbone, 2048), local(big, backbone, 4096), local(big, backbone, 100)):
        assert intrinsic.exact(pool, ask, 50).pairs == truth.pairs  # to the bit
    for pool in (local(big, backbone, in_memory=True), local(big, backbone, 2048, in_memory=True)):
        assert rows(intrinsic.exact(pool, ask, 50, Form("reverse")).pairs) == rows(truth.pairs)


@layerwise
@pytest.mark.parametrize("form", ["int8", "linear"])
@pytest.mark.parametrize("in_memory", [False, True])
def test_candidates_are_ordered_by_their_exact_scores(
    kind: str, form: str, in_memory: bool, big: Big, backbone: Backbone, ask: Ask
) -> None:
    ask = replace(ask, kind=kind)
    pool = local(big, backbone, in_memory=in_memory)
    truth, every = intrinsic.exact(pool, ask, 20), intrinsic.exact(pool, ask, 2500)
    everything = intrinsic.approximate(pool, ask, 20, Form(form), 2500)  # all of them: nothing is approximate any more
    assert rows(everything.pairs) == rows(truth.pairs)
    found = intrinsic.approximate(pool, ask, 20, Form(form), 300)
    for mine, exactly in zip(found.pairs, every.pairs, strict=True):
        scores = dict(exactly)
        assert len(mine) == 20
        if kind == "per_head" and not in_memory:
            assert all(score == scores[row] for row, score in mine)  # to the bit, though scored alone and not in tiles
        elif kind == "per_head" or form == "int8":  # of a mixture the normalisers of integers are nearly exact
            assert all(score == pytest.approx(scores[row], abs=1e-4 if kind == "per_head" else 0.05) for row, score in mine)
        assert mine == sorted(mine, key=lambda pair: (-pair[1], pair[0]))
    assert intrinsic.recall(truth.pairs, found.pairs) > (
        0.99 if form == "int8" else 0.4
    )  # random vectors: nothing for linear to hold on to


@layerwise
def test_one_query_a_head_finds_what_the_scan_alone_would_miss(kind: str, big: Big, backbone: Backbone, ask: Ask) -> None:
    """Tokens of a head that ask nearly the same, as trained ones do."""
    spread = ask.queries - ask.queries.mean(dim=3, keepdim=True)
    ask = replace(ask, kind=kind, queries=ask.queries.mean(dim=3, keepdim=True) + 0.2 * spread)
    streamed = local(big, backbone)
    truth = intrinsic.exact(streamed, ask, 20)

    def found(pool: Local, coarse: int) -> list[Scored]:
        return intrinsic.approximate(pool, ask, 20, intrinsic.cascade(pool, coarse), 60, coarse).pairs

    alone = intrinsic.recall(truth.pairs, intrinsic.approximate(streamed, ask, 20, Form("linear"), 60).pairs)
    assert alone < 0.7
    wide = found(streamed, 1500)
    assert intrinsic.recall(truth.pairs, wide) > max(0.9, alone)
    assert intrinsic.recall(truth.pairs, found(streamed, 2500)) > 0.97  # all by it: no scan before
    for pool in (local(big, backbone, 2048), local(big, backbone, in_memory=True), local(big, backbone, 2048, in_memory=True)):
        assert rows(found(pool, 1500)) == rows(wide)
    alone_asked = [intrinsic.approximate(streamed, ask.part(each), 20, Form("linear"), 60, 1500).pairs[0] for each in range(len(ask))]
    assert rows(alone_asked) == rows(wide)


@pytest.mark.parametrize("form", ["exact", "head_space", "linear", "summed", "int8"])
@layerwise
def test_rows_and_whole_tiles_give_the_same_components(
    kind: str, form: str, big: Big, backbone: Backbone, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask, generator = replace(ask, kind=kind), torch.Generator().manual_seed(6)
    asked = [torch.randperm(2500, generator=generator)[:1200].tolist(), [], [2499, 0, 7]]
    found = []
    for many in (0, 32):  # rows, then tiles
        monkeypatch.setattr(pools, "MANY", many)
        for in_memory in (False, True):
            found.append(local(big, backbone, in_memory=in_memory).components(ask, Form(form), asked))
            assert [each.shape for each in found[-1]] == [(ask.components, len(mine)) for mine in asked]
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)
    if form not in ("int8", "linear"):
        assert all(torch.equal(one, two) for one, two in zip(found[0], found[2], strict=True))  # to the bit, both streamed


def test_fewer_candidates_than_k_still_give_k(big: Big, backbone: Backbone, ask: Ask) -> None:
    assert all(len(each) == 30 for each in intrinsic.approximate(local(big, backbone), ask, 30, Form("int8"), 5).pairs)


def test_normalisers_with_every_chunk_a_candidate_are_exact() -> None:
    true = torch.randn(2, 3, 40, generator=torch.Generator().manual_seed(0)) * 3
    rough = true + torch.randn(true.shape, generator=torch.Generator().manual_seed(1))
    found = intrinsic.corrected(rough.double().logsumexp(dim=2), rough, true)
    torch.testing.assert_close(found, true.double().logsumexp(dim=2), rtol=0, atol=1e-5)
    off = torch.tensor([3.0, -2.0, 40.0])[None, :, None]
    found = intrinsic.corrected((true + off).double().logsumexp(dim=2), (true + off)[:, :, :7], true[:, :, :7])
    torch.testing.assert_close(found, true.double().logsumexp(dim=2), rtol=0, atol=1e-5)  # off by a constant: none the worse


def test_a_scans_normalisers_with_its_candidates_exchanged() -> None:
    generator = torch.Generator().manual_seed(2)
    true = torch.randn(2, 3, 400, generator=generator) * 2
    true[:, :, :20] += 6  # candidates, of most of the mass
    rough = true + 0.1 * torch.randn(true.shape, generator=generator)
    level = rough + (true[:, :, 20:].logsumexp(dim=2) - rough[:, :, 20:].logsumexp(dim=2))[:, :, None]  # the others are right in sum
    found = intrinsic.exchanged(level.double().logsumexp(dim=2), level[:, :, :20], true[:, :, :20])
    torch.testing.assert_close(found, true.double().logsumexp(dim=2), rtol=0, atol=1e-6)
    for off in (-1e-9, 0.0, 1e-9):  # with every chunk a candidate nothing is left, of either sign
        found = intrinsic.exchanged(rough.double().logsumexp(dim=2) + off, rough, true)
        torch.testing.assert_close(found, true.double().logsumexp(dim=2), rtol=0, atol=1e-6)


def test_least_squares_find_what_made_the_values_and_leave_out_what_does_not_vary() -> None:
    generator = torch.Generator().manual_seed(3)
    features = torch.randn(2, 3, 500, 2, generator=generator, dtype=torch.float64) * torch.tensor([5.0, 0.5]) + torch.tensor([7.0, 1.0])
    made = torch.randn(2, 3, 3, generator=generator, dtype=torch.float64)
    wanted = features @ made[..., :2, None]
    found = intrinsic._least_squares(features, wanted[..., 0] + made[..., 2:])
    torch.testing.assert_close(found[..., :2], made[..., :2], rtol=0.02, atol=0.02)
    torch.testing.assert_close((features @ found[..., :2, None])[..., 0] + found[..., 2:], wanted[..., 0] + made[..., 2:], rtol=0, atol=0.1)
    features[..., 1] = 4.0
    found = intrinsic._least_squares(features, features[..., 0] * 2 + 1)
    torch.testing.assert_close(found, torch.tensor([2.0, 0.0, 1.0]).double().expand(2, 3, 3), rtol=0, atol=0.02)


@layerwise
def test_how_wide_a_chunks_vectors_are_spread_counts_in_the_scan(
    kind: str, big: Big, backbone: Backbone, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The maximum of a chunk lies above its mean the more, the wider."""
    centres = torch.randn(2500, 1, 32, generator=torch.Generator().manual_seed(5))
    big.vectors = centres + torch.linspace(0.0, 1.5, 2500)[torch.randperm(2500, generator=torch.Generator().manual_seed(6))][
        :, None, None
    ] * torch.randn(2500, POOLED, 32, generator=torch.Generator().manual_seed(7))
    ask = replace(ask, kind=kind, weights=ask.weights.abs())
    pool = local(big, backbone)
    truth = intrinsic.exact(pool, ask, 50)
    found = intrinsic.scanned(pool, ask, Form("linear"), 300)
    plain = pool.best(ask, Form("linear"), 300, pool.log_sums(ask, Form("linear")) if kind == "mixture" else None).rows

    def share(kept: Tensor) -> float:
        return sum(len({row for row, _ in one} & set(mine)) for one, mine in zip(truth.pairs, kept.tolist(), strict=True)) / (50 * len(ask))

    assert share(found.rows) > share(plain) + 0.05
    if kind == "mixture":
        assert found.sums is not None
        assert truth.normalisers is not None
        off = pool.log_sums(ask, Form("linear")) - truth.normalisers
        assert (found.sums - truth.normalisers).abs().mean() < 0.1 * off.abs().mean()
        exchanged = intrinsic.approximate(pool, ask, 50, Form("linear"), 300, 1000).normalisers
        assert exchanged is not None
        assert (exchanged - truth.normalisers).abs().mean() < 0.02 * off.abs().mean()  # the best chunks are no guess any more
    monkeypatch.setattr(intrinsic, "SAMPLE", 2500)
    whole = intrinsic.scanned(pool, ask, Form("linear"), 300)
    if whole.sums is not None and truth.normalisers is not None:  # every chunk is in the sample
        torch.testing.assert_close(whole.sums, truth.normalisers, rtol=0, atol=1e-4)
    memory = intrinsic.scanned(local(big, backbone, in_memory=True), ask, Form("linear"), 300)
    assert share(memory.rows) == pytest.approx(share(found.rows), abs=0.01)


def test_chunks_that_all_questions_ask_for_have_the_bits_of_each_alone(big: Big, backbone: Backbone, ask: Ask) -> None:
    pool, mine = local(big, backbone), [[5, 900, 17, 3]] * len(ask)
    together = pool.components(ask, Form("head_space"), mine)
    for question, each in enumerate(together):
        assert torch.equal(each, pool.components(ask.part(question), Form("head_space"), mine[:1])[0])
    assert [each.shape for each in pool.components(ask, Form(), [[]] * len(ask))] == [(1, 0)] * len(ask)


def test_recall_counts_what_is_kept() -> None:
    exact: list[Scored] = [[(1, 3.0), (2, 2.0)], [(5, 1.0), (6, 0.5)]]
    assert intrinsic.recall(exact, [[(2, 2.0), (9, 1.0)], [(6, 1.0), (5, 0.0)]]) == 0.75


def test_a_scorer_that_keeps_too_little_gives_way_and_says_so(
    big: Big, backbone: Backbone, ask: Ask, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(intrinsic, "CHECKED", 3)
    truth = intrinsic.exact(local(big, backbone), ask, 20)
    searcher = Searcher(local(big, backbone), SearchConfig(scorer="cascade", candidates=20, recall=1.0))
    assert rows(searcher.find(ask, 20).pairs) == rows(truth.pairs)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("search: cascade keeps 0.")
    assert line.endswith("of the exact top 20 of 3 questions, less than retriever.search.recall=1.0; exact takes over")
    assert rows(searcher.find(ask, 20).pairs) == rows(truth.pairs)  # from now on without a word
    assert capsys.readouterr().err == ""


@layerwise
@pytest.mark.parametrize(
    "changes",
    [
        {"scorer": "cascade", "candidates": 25},
        {"scorer": "cascade", "candidates": 25, "coarse_candidates": 300},
        {"scorer": "int8", "candidates": 25, "heads": 0.6},
    ],
)
@pytest.mark.parametrize("recall", [0.0, 1.0])
def test_no_batch_changes_a_ranking_and_the_first_questions_have_the_exact_one(
    kind: str, changes: dict[str, Any], recall: float, big: Big, backbone: Backbone, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(intrinsic, "CHECKED", 5)
    keys, generator = Keys.of(backbone), torch.Generator().manual_seed(8)
    queries = torch.randn(11, *ask.queries.shape[1:], generator=generator) * torch.rand(11, 2, 4, 1, 1, generator=generator)
    asked = replace(ask, kind=kind, queries=queries)
    found, normalisers, judged = [], [], []

    def prune(first: Ask) -> Form:
        judged.append(first.queries)
        return intrinsic.pruned(first, keys, big.vectors[:500], changes["heads"])

    for size in (1, 2, 4, 5, 11):
        searcher = Searcher(local(big, backbone), SearchConfig(**changes, recall=recall), sample=prune)
        batches = [searcher.find(asked.part(first, min(size, 11 - first)), 20) for first in range(0, 11, size)]
        found.append([mine for batch in batches for mine in rows(batch.pairs)])
        normalisers.append([each for batch in batches if batch.normalisers is not None for each in batch.normalisers])
    assert all(each == found[0] for each in found)
    assert all(torch.equal(each, queries[:5]) for each in judged)
    assert len(judged) == (5 if changes["scorer"] == "int8" else 0)
    for each in normalisers:
        assert len(each) == (11 if kind == "mixture" else 0)
        torch.testing.assert_close(each, normalisers[0], rtol=0, atol=1e-4)
    truth = rows(intrinsic.exact(local(big, backbone), asked, 20).pairs)
    assert found[0][:5] == truth[:5]
    assert (found[0] == truth) == (recall == 1.0)  # with 0.0 the scan has passed, and shows in the others


@layerwise
@pytest.mark.parametrize("scorer", ["cascade", "int8"])
def test_batches_whose_longest_questions_differ_are_checked_together(
    kind: str, scorer: Any, big: Big, backbone: Backbone, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A backbone that echoes questions gives as many queries as the longest of a batch has."""
    monkeypatch.setattr(intrinsic, "CHECKED", 5)
    generator = torch.Generator().manual_seed(9)
    queries = torch.randn(8, *ask.queries.shape[1:], generator=generator)
    count = queries.shape[-2]
    queries[1:4, ..., count - 2 :, :] = 0
    queries[4:7, ..., count - 1 :, :] = 0
    settings = SearchConfig(scorer=scorer, candidates=60, recall=0.0)
    whole = Searcher(local(big, backbone), settings).find(replace(ask, kind=kind, queries=queries), 20)
    searcher, found = Searcher(local(big, backbone), settings), []
    for part in (queries[:1], queries[1:4, ..., : count - 2, :], queries[4:7, ..., : count - 1, :], queries[7:]):
        found += searcher.find(replace(ask, kind=kind, queries=part.contiguous()), 20).pairs
    assert rows(found) == rows(whole.pairs)


def test_a_scan_is_checked_as_deep_as_chunks_are_scored_again(
    backbone: Backbone, ask: Ask, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(intrinsic, "CHECKED", 3)
    monkeypatch.setattr(intrinsic, "DEEP", 1)
    store, keys = ragged(), Keys.of(backbone)
    pool, tokens = local(store, backbone), by_states(store, keys)
    kept = {
        k: intrinsic.recall(intrinsic.exact(pool, ask, k).pairs, intrinsic.approximate(pool, ask, k, Form("linear"), 45).pairs)
        for k in (1, 40)
    }
    assert kept[40] < kept[1]
    for rescore, falls in ((0, False), (40, True)):
        settings = SearchConfig(scorer="cascade", candidates=45, rescore=rescore, recall=kept[1])
        Searcher(pool, settings, tokens=tokens).find(ask, 1)
        assert ("of the exact top 40 of 3 questions" in capsys.readouterr().err) == falls


def test_a_search_for_few_is_checked_as_deep_as_tells_something(
    big: Big, backbone: Backbone, ask: Ask, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(intrinsic, "CHECKED", 2)
    truth = intrinsic.exact(local(big, backbone), ask, 5)
    found = Searcher(local(big, backbone), SearchConfig(scorer="cascade", candidates=20, recall=1.0)).find(ask, 5)
    assert found.pairs == truth.pairs  # no more of them than are asked for
    assert "of the exact top 20 of 2 questions" in capsys.readouterr().err


def test_what_was_chosen_for_one_depth_is_checked_anew_for_another(
    big: Big, backbone: Backbone, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So the ranking of one method does not depend on which other has searched before it."""
    monkeypatch.setattr(intrinsic, "CHECKED", 3)
    settings = SearchConfig(scorer="cascade", candidates=20, recall=0.0)
    searcher, fresh = (Searcher(local(big, backbone), settings) for _ in range(2))
    searcher.find(ask, 10)
    assert searcher.find(ask, 30).pairs == fresh.find(ask, 30).pairs == intrinsic.exact(local(big, backbone), ask, 30).pairs


def test_a_scorer_that_keeps_enough_is_checked_on_the_first_questions_alone(
    big: Big, backbone: Backbone, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(intrinsic, "CHECKED", 6)
    for coarse, expected in ((2500, [1, 2, 1, 1]), (2499, [1, 3, 2, 2])):  # the exact one, once with the scan that it checks, then the scan
        searcher = Searcher(local(big, backbone), SearchConfig(scorer="cascade", candidates=20, recall=0.0, coarse_candidates=coarse))
        reads = []
        for _ in range(4):
            before = big.tile_reads
            searcher.find(ask, 20)
            reads.append(big.tile_reads - before)
        assert reads == expected  # of so large a share of the pool what the scan keeps is read in whole tiles as well


def test_pruned_heads_scan_and_all_heads_rank(big: Big, backbone: Backbone, ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intrinsic, "CHECKED", 3)
    weights = ask.weights.clone()
    weights[0, 0] = 1e-6
    ask, keys = replace(ask, weights=weights), Keys.of(backbone)
    form = intrinsic.pruned(ask, keys, big.vectors[:500], 0.9999)
    assert form.kept is not None
    assert not form.kept[0][0]
    truth = intrinsic.exact(local(big, backbone), ask, 20)
    searcher = Searcher(local(big, backbone), SearchConfig(scorer="int8", heads=0.9999, recall=1.0), sample=lambda _: form)
    assert [searcher.find(ask, 20).pairs for _ in range(2)] == [truth.pairs] * 2  # of the check, and of the scan


def test_the_rule_of_auto(big: Big, backbone: Backbone) -> None:
    def chosen(candidates: int = 100, kind: str = "per_head") -> str:
        return Searcher(local(big, backbone), SearchConfig(scorer="auto", candidates=candidates)).scorer(kind)

    assert chosen() == chosen(kind="mixture") == "cascade"
    assert chosen(candidates=126) == "exact"  # a pool of less than 20 times as many
    assert chosen(kind="mixed") == "exact"


def test_the_cheaper_exact_form() -> None:
    """At the size of T5Gemma 2 4B: one question or two in the hidden space, where the scalars are at hand."""
    keys = Keys(torch.empty(34, 1024, 2560, device="meta"), None, torch.empty(34, 256, device="meta"), 1e-6, 4, 1 / 16)
    assert [cheaper(keys, (b, 34, 8, 64, 256), True) for b in (1, 2, 3, 64)] == ["reverse", "reverse", "head_space", "head_space"]
    assert cheaper(keys, (1, 34, 8, 64, 256), False) == "head_space"
    assert cheaper(replace(keys, biases=torch.empty(34, 1024, device="meta")), (1, 34, 8, 64, 256), True) == "head_space"
    assert cheaper(replace(keys, projections=keys.projections.bfloat16()), (1, 34, 8, 64, 256), True) == "head_space"


@layerwise
def test_in_bfloat16_neither_memory_nor_the_batch_changes_a_ranking(kind: str, big: Big, backbone: Backbone, ask: Ask) -> None:
    whole = Keys.of(backbone)
    keys = replace(whole, projections=whole.projections.bfloat16())
    ask = replace(ask, kind=kind, queries=ask.queries.bfloat16())
    pools_ = [Local(big, keys, 1024, "cpu", in_memory) for in_memory in (False, True)]  # type: ignore[arg-type]
    for search_by in (
        lambda pool, part: intrinsic.exact(pool, part, 20),
        lambda pool, part: intrinsic.approximate(pool, part, 20, Form("linear"), 40),
        lambda pool, part: intrinsic.approximate(pool, part, 20, Form("linear"), 40, 400),
        lambda pool, part: intrinsic.approximate(pool, part, 20, Form("summed"), 40),
    ):
        found = [rows(search_by(pool, ask).pairs) for pool in pools_]
        found += [[mine for each in range(len(ask)) for mine in rows(search_by(pool, ask.part(each)).pairs)] for pool in pools_]
        assert found[1:] == [found[0]] * 3
    reverse = intrinsic.exact(pools_[1], ask, 20, Form("reverse"))
    assert rows(reverse.pairs) != rows(intrinsic.exact(pools_[1], ask, 20).pairs)


@pytest.mark.parametrize("retriever", ["per_head", "mixture"], indirect=True)
@pytest.mark.parametrize("scorer", ["head_space", "reverse", "int8", "cascade", "auto"])
@pytest.mark.parametrize("in_memory", [False, True])
def test_every_scorer_gives_the_methods_their_rankings(
    scorer: str, in_memory: bool, backbone: Backbone, store: MemoryStore, retriever: Retriever, questions: list[Question],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(intrinsic, "CHECKED", 3)
    expected, found = (
        [
            {key: [c for c, _ in each] for key, each in made.search(questions[:8], 10).items()}
            for made in search.methods(search.Passes(backbone, store, retriever, query_batch=4, search=settings))  # type: ignore[arg-type]
        ]
        for settings in (SearchConfig(), SearchConfig(scorer=scorer, candidates=60, in_memory=in_memory))  # type: ignore[arg-type]
    )
    if scorer == "int8" and retriever.settings.scoring == "mixture":  # normalisers of integers: near ties may change places
        pairs = [(set(one[key]), set(other[key])) for one, other in zip(expected, found, strict=True) for key in one]
        assert sum(len(one & other) for one, other in pairs) > 0.97 * sum(len(one) for one, _ in pairs)
    else:
        assert found == expected


def test_the_papers_form_ranks_otherwise(backbone: Backbone, store: MemoryStore, retriever: Retriever, questions: list[Question]) -> None:
    one, other = (
        search.Intra(search.Passes(backbone, store, retriever, search=SearchConfig(scorer=name))).raw(questions[:8], 10)  # type: ignore[arg-type]
        for name in ("exact", "paper")
    )
    assert one != other


def ragged() -> MemoryStore:
    """90 chunks of 3 to 70 random states."""
    generator = torch.Generator().manual_seed(6)
    lengths = torch.randint(3, 71, (90,), generator=generator).tolist()
    return MemoryStore([f"c{row:02d}" for row in range(90)], [torch.randn(length, 32, generator=generator) for length in lengths])


def by_states(store: MemoryStore, keys: Keys) -> Tokens:
    return Tokens(keys, lambda mine: store.states([store.chunk_ids[row] for row in mine]))


@pytest.mark.parametrize("kind", ["per_head", "mixture", "mixed"])
def test_chunks_are_scored_again_by_all_their_states(kind: str, backbone: Backbone, ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every chunk by itself, nothing filled up, against the search; with every chunk among those scored again its normalisers are exact."""
    vectors = scoring.mixed(ask.queries, backbone, ask.weights) if kind == "mixed" else ask.queries
    ask, store, keys = replace(ask, kind=kind, queries=vectors), ragged(), Keys.of(backbone)
    scorer = ask.scorer(keys, Form("exact" if kind == "mixed" else "head_space"))
    z = torch.cat([scorer(Tile(states[None])) for states in store.kept], dim=2)  # [B, C, 90]
    expected = scoring.log_mixture(z, z.double().logsumexp(dim=2)) if kind == "mixture" else z[:, 0]
    searcher = Searcher(local(store, backbone), SearchConfig(rescore=90), tokens=by_states(store, keys))
    found = searcher.find(ask, 20)
    for question, mine in enumerate(found.pairs):
        order = sorted(range(90), key=lambda row: (-float(expected[question, row]), row))[:20]
        assert [row for row, _ in mine] == order
        assert [score for _, score in mine] == pytest.approx([float(expected[question, row]) for row in order], abs=1e-4)
    assert rows(found.pairs) != rows(Searcher(local(store, backbone), SearchConfig()).find(ask, 20).pairs)
    for question in range(len(ask)):  # to the bit, whatever stands beside, and whatever of a chunk is kept
        assert searcher.find(ask.part(question), 20).pairs == [found.pairs[question]]
    monkeypatch.setattr(pools, "SCALARS", 1500)
    again = Searcher(local(store, backbone), SearchConfig(rescore=90), tokens=by_states(store, keys))
    assert [again.find(ask, 20).pairs for _ in range(2)] == [found.pairs] * 2
    for question, each in enumerate(searcher.components(ask, [[3, 80, 9]] * len(ask))):
        torch.testing.assert_close(each, z[question][:, [3, 80, 9]], rtol=1e-4, atol=1e-4)


@layerwise
def test_only_the_best_by_pooled_vectors_are_scored_again(kind: str, backbone: Backbone, ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    ask, store = replace(ask, kind=kind), ragged()
    tokens, asked = by_states(store, Keys.of(backbone)), []

    def noted(ask: Ask, wanted: Sequence[Sequence[int]]) -> list[Tensor]:
        asked.extend(set(each) for each in wanted)
        return tokens(ask, wanted)

    monkeypatch.setattr(intrinsic, "CHECKED", 3)
    plain = Searcher(local(store, backbone), SearchConfig()).find(ask, 40)
    for scorer in ("exact", "int8"):
        searcher = Searcher(local(store, backbone), SearchConfig(scorer=scorer, rescore=12, recall=0.5), tokens=noted)  # type: ignore[arg-type]
        if scorer == "int8":  # checked, each depth by itself: from now on the scan is asked
            searcher.find(ask, 5), searcher.find(ask, 40)
        shallow, deep = searcher.find(ask, 5), searcher.find(ask, 40)
        if scorer == "exact":
            assert asked == [{row for row, _ in mine[:12]} for mine in plain.pairs] + [{row for row, _ in mine} for mine in plain.pairs]
        assert [len(mine) for mine in shallow.pairs + deep.pairs] == [5, 5, 5, 40, 40, 40]
        if kind == "mixture":
            assert shallow.normalisers is not None
            torch.testing.assert_close(shallow.normalisers, deep.normalisers, rtol=0, atol=0)  # of the first 12, however many are asked for
            assert searcher.normalisers(ask) is None  # they come from the search


def test_scoring_again_needs_states_and_the_exact_score(big: Big, backbone: Backbone) -> None:
    with pytest.raises(ValueError, match="needs the store's token states"):
        Searcher(local(big, backbone), SearchConfig(rescore=5))
    with pytest.raises(UserError, match=r"rescore is by the exact score; with retriever\.search\.scorer=paper set it to 0"):
        config.parse({"root": "x", "retriever": {"search": {"scorer": "paper", "rescore": 5}}})


@pytest.mark.parametrize(
    ("search_by", "line"),
    [
        ({"scorer": "int8", "workers": 2, "gpus_per_worker": 1}, r"scorer=int8 is for CPUs; .*set retriever\.search\.gpus_per_worker to 0"),
        ({"scorer": "cascade", "candidates": 100, "rescore": 100}, r"candidates=100 must exceed retriever\.search\.rescore=100"),
    ],
)
def test_a_search_that_cannot_do_what_it_is_asked_is_one_line(search_by: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError, match=line):
        config.parse({"root": "x", "retriever": {"search": search_by}})
    config.parse({"root": "x", "retriever": {"search": {**search_by, "scorer": "exact"}}})


@pytest.mark.parametrize("retriever", ["mixture"], indirect=True)
def test_the_order_of_methods_changes_no_ranking(
    backbone: Backbone, store: MemoryStore, retriever: Retriever, questions: list[Question], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(intrinsic, "CHECKED", 4)
    settings, found = SearchConfig(scorer="cascade", candidates=11, recall=0.0), []
    for order in (1, -1):
        made = search.methods(search.Passes(backbone, store, retriever, query_batch=3, search=settings))[::order]  # type: ignore[arg-type]
        found.append({each.name: each.search(questions, 10) for each in made})
    assert found[0] == found[1]


@pytest.mark.parametrize("retriever", ["per_head", "mixture", "mixed"], indirect=True)
def test_methods_agree_on_what_is_scored_again(
    backbone: Backbone, store: MemoryStore, retriever: Retriever, questions: list[Question]
) -> None:
    """INTRA's raw scores are those by which S_0's first chunks are reordered."""
    asked = questions[:6]
    for settings in (SearchConfig(), SearchConfig(rescore=60)):
        passes = search.Passes(backbone, store, retriever, query_batch=4, search=settings)  # type: ignore[arg-type]
        whole = passes.intrinsic(asked, 60)
        for key, scored in passes.context(asked, 60).items():
            mine = dict(whole[key])
            assert scored == [(row, pytest.approx(mine[row], abs=1e-4)) for row, _ in scored]


def test_a_scoring_a_scorer_does_not_serve_is_one_line(big: Big, backbone: Backbone, ask: Ask) -> None:
    values = {"root": "x", "retriever": {"scoring": "mixed", "search": {"scorer": "int8"}}}
    with pytest.raises(UserError, match=r"retriever.search.scorer=int8 does not serve retriever.scoring=mixed; take exact"):
        config.parse(values)
    asked = replace(ask, kind="mixed", queries=scoring.mixed(ask.queries, backbone, ask.weights))
    with pytest.raises(UserError, match="does not serve"):
        Searcher(local(big, backbone), SearchConfig(scorer="reverse")).find(asked, 5)
    assert len(Searcher(local(big, backbone), SearchConfig()).find(asked, 5).pairs[0]) == 5
    assert scorers.ALIGN % scorers.PART == 0
