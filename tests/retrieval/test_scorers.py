"""The scorers of a search against the naive one and against each other; blocks, tiles and head counts change no bit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from intra.backbone.model import Backbone
from intra.errors import UserError
from intra.retrieval import scorers
from intra.retrieval.scorers import Keys, LayerScorer, Linear, Summed, middle, summed

from .conftest import MemoryStore
from .test_scoring import naive

each_kind = pytest.mark.parametrize("kind", ["per_head", "mixture"])


@pytest.fixture
def keys(backbone: Backbone) -> Keys:
    return Keys.of(backbone)


@each_kind
@pytest.mark.parametrize("form", ["head_space", "reverse"])
def test_the_exact_forms_equal_the_naive_scorer(
    kind: str,
    form: str,
    backbone: Backbone,
    keys: Keys,
    store: MemoryStore,
    queries: Tensor,
    weights: Tensor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = naive(kind, queries, store.vectors, backbone, weights)
    for product, part, columns in ((2**20, 512, 1024), (1, 4, 5), (200, 8, 10)):
        monkeypatch.setattr(scorers, "PRODUCT", product)
        monkeypatch.setattr(scorers, "PART", part)
        monkeypatch.setattr(scorers, "COLUMNS", columns)
        scorer = LayerScorer(queries, keys, weights, kind, form=form, temperature=0.5)
        found = scorer(store.vectors)
        assert found.shape == expected.shape
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double() * 0.5, expected, rtol=1e-5, atol=1e-4)
        assert torch.equal(scorer(store.vectors, keys.scalars(store.vectors)), found)


@each_kind
def test_the_papers_form_has_its_norm_before_the_projection(
    kind: str, backbone: Backbone, keys: Keys, store: MemoryStore, queries: Tensor, weights: Tensor
) -> None:
    pooled = store.vectors.double()
    pooled = pooled / (pooled.square().mean(dim=-1, keepdim=True) + keys.eps).sqrt()
    expected = torch.zeros(3, backbone.layers, len(store), dtype=torch.float64)
    for layer in range(backbone.layers):
        projected = (pooled @ keys.projections[layer].double().T).unflatten(-1, (backbone.kv_heads, -1)) * keys.gains[layer].double()
        for head in range(backbone.heads):
            group = head // (backbone.heads // backbone.kv_heads)
            logits = torch.einsum("bre,npe->bnrp", queries[:, layer, head].double(), projected[:, :, group]) * backbone.scaling
            expected[:, layer] += weights[layer, head].double() * logits.amax(dim=3).sum(dim=2)
    expected = expected if kind == "mixture" else expected.sum(dim=1, keepdim=True)
    found = LayerScorer(queries, keys, weights, kind, form="paper")(store.vectors)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-4)
    exact = LayerScorer(queries, keys, weights, kind)(store.vectors)
    assert (found - exact).abs().max() > 0.1 * exact.std()  # another score, by no rounding


@each_kind
def test_integers_come_close(kind: str, keys: Keys, store: MemoryStore, queries: Tensor, weights: Tensor) -> None:
    exact = LayerScorer(queries, keys, weights, kind)(store.vectors)
    found = LayerScorer(queries, keys, weights, kind, form="int8")(store.vectors)
    assert 0 < (found - exact).abs().max() < 0.1 * exact.std()


@pytest.mark.parametrize("width", [8, 1040, 2560])
def test_integer_products_are_the_same_without_the_instructions_for_them(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest sums too: of 2,560 products one is odd and beyond 2**24, which float32 alone would round."""
    generator = torch.Generator().manual_seed(0)
    left = torch.randint(-127, 128, (40, width), generator=generator, dtype=torch.int8)
    right = torch.randint(-127, 128, (width, 24), generator=generator, dtype=torch.int8)
    left[0], right[:, 0] = 127, 127
    left[1], right[:, 1] = 127, -127
    right[-1, 0] = 126
    expected = (left.long() @ right.long()).to(torch.int32)
    for fast in (True, False):
        monkeypatch.setattr(scorers, "fast_integers", lambda fast=fast: fast)
        out = torch.full((40, 24), 7, dtype=torch.int32)
        assert torch.equal(scorers.integer_product(left, right, out), expected)
        assert torch.equal(out, expected)


@each_kind
def test_the_integer_scan_has_the_same_bits_on_every_processor(
    kind: str, keys: Keys, store: MemoryStore, queries: Tensor, weights: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for fast in (True, False):
        monkeypatch.setattr(scorers, "fast_integers", lambda fast=fast: fast)
        found.append(LayerScorer(queries, keys, weights, kind, form="int8")(store.vectors))
    assert torch.equal(*found)


def test_one_scale_a_chunk_and_head() -> None:
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(4 * 3, 8, generator=generator) * torch.tensor([1e-3, 1.0, 50.0, 0.0]).repeat_interleave(3)[:, None]
    values, scale = scorers.quantized(torch.stack([vectors, 2 * vectors], dim=1), 3)
    assert values.shape == (2, 12, 8)
    assert torch.equal(scale[1, :3], 2 * scale[0, :3])
    assert values[0].view(4, -1).abs().amax(dim=1).tolist() == [127, 127, 127, 0]
    torch.testing.assert_close(values[0].float() * scale[0].repeat_interleave(3)[:, None], vectors, rtol=0, atol=float(scale[0].max()) / 2)


@each_kind
def test_heads_left_out_count_nothing(kind: str, keys: Keys, store: MemoryStore, queries: Tensor, weights: Tensor) -> None:
    kept = torch.zeros(weights.shape, dtype=torch.bool)
    kept[0, 1] = kept[1, 3] = True
    found = LayerScorer(queries, keys, weights, kind, kept=kept)(store.vectors)
    torch.testing.assert_close(found, LayerScorer(queries, keys, weights * kept, kind)(store.vectors))


def test_the_strongest_heads_are_those_whose_weight_times_spread_is_greatest(keys: Keys, store: MemoryStore, queries: Tensor) -> None:
    weights = torch.zeros(keys.gains.shape[0], 4)
    weights[0, 2], weights[1, 1], weights[1, 3] = -5.0, 3.0, 0.01
    quiet = queries.clone()
    quiet[:, 1, 1] = 0.0  # weighs, and tells nothing apart
    assert scorers.strongest(queries, keys, weights, store.vectors, 0.99).nonzero().tolist() == [[0, 2], [1, 1]]
    assert scorers.strongest(quiet, keys, weights, store.vectors, 0.99).nonzero().tolist() == [[0, 2]]
    assert scorers.strongest(queries, keys, weights, store.vectors, 1.0).sum() >= 3


@pytest.mark.parametrize("form", scorers.FORMS)
def test_rows_of_a_pool_score_alike_in_any_aligned_tile(form: str, keys: Keys, queries: Tensor, weights: Tensor) -> None:
    pooled = torch.randn(2 * scorers.ALIGN + 300, 3, 32, generator=torch.Generator().manual_seed(0))
    scorer = LayerScorer(queries, keys, weights, "per_head", form=form)
    whole = scorer(pooled)
    assert torch.equal(torch.cat([scorer(part) for part in pooled.split(scorers.ALIGN)], dim=2), whole)
    for place in (0, 1, 700, 2347):  # and beside other chunks, and in another batch of questions
        alone = LayerScorer(queries[1:2], keys, weights, "per_head", form=form)(pooled[place : place + 3])
        assert torch.equal(alone[0], whole[1, :, place : place + 3])


@each_kind
def test_linear_is_exact_where_a_chunk_has_one_vector(kind: str, keys: Keys, store: MemoryStore, queries: Tensor, weights: Tensor) -> None:
    found = Linear(queries, keys, weights, kind, temperature=0.5)(store.vectors)
    means = store.vectors.mean(dim=1, keepdim=True)
    torch.testing.assert_close(found, LayerScorer(queries, keys, weights, kind, temperature=0.5)(means), rtol=1e-5, atol=1e-4)


@each_kind
def test_linear_with_means_and_scalars_at_hand_makes_no_keys(
    kind: str, keys: Keys, store: MemoryStore, queries: Tensor, weights: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    means, spreads = middle(store.vectors, torch.float32)
    scalars = keys.scalars(means[:, None])[..., 0]
    for fit in (None, torch.randn(3, 2 if kind == "mixture" else 1, 3, generator=torch.Generator().manual_seed(0))):
        linear = Linear(queries, keys, weights, kind, fit=fit)
        expected = linear(store.vectors)
        with monkeypatch.context() as patch:
            patch.setattr(Keys, "normed", None)
            torch.testing.assert_close(linear(store.vectors, means, scalars, spreads), expected, rtol=1e-5, atol=1e-4)


@each_kind
def test_linear_is_fitted_by_question_and_component(kind: str, keys: Keys, store: MemoryStore, queries: Tensor, weights: Tensor) -> None:
    means, spreads = middle(store.vectors, torch.float32)
    torch.testing.assert_close(means, store.vectors.mean(dim=1))
    distance = (store.vectors - means[:, None]).square().sum(dim=2).mean(dim=1).sqrt()
    torch.testing.assert_close(spreads, distance / means.norm(dim=1))
    plain = Linear(queries, keys, weights, kind, temperature=0.5)(store.vectors)
    fit = torch.randn(*plain.shape[:2], 3, generator=torch.Generator().manual_seed(1))
    slope, by_spread, level = (each[..., None] for each in fit.unbind(2))
    found = Linear(queries, keys, weights, kind, temperature=0.5, fit=fit)(store.vectors)
    torch.testing.assert_close(found, slope * plain + by_spread * spreads + level, rtol=1e-4, atol=1e-4)


def test_vectors_that_are_all_zero_have_a_spread() -> None:
    means, spreads = middle(torch.zeros(2, 3, 4), torch.float32)
    assert not means.any()
    assert not spreads.any()


@each_kind
def test_summed_is_the_exact_score_of_one_query_a_head(
    kind: str, keys: Keys, store: MemoryStore, queries: Tensor, weights: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exact, too, where all tokens of a head ask the same."""
    mine, scalars = summed(queries), keys.scalars(store.vectors)
    assert mine.shape == (*queries.shape[:3], 1, queries.shape[4])
    found = Summed(mine, keys, weights, kind, temperature=0.5)(store.vectors, scalars)
    torch.testing.assert_close(found, LayerScorer(mine, keys, weights, kind, temperature=0.5)(store.vectors), rtol=1e-5, atol=1e-4)
    alike = queries[:, :, :, :1].expand_as(queries)
    exact = LayerScorer(alike, keys, weights, kind)(store.vectors)
    monkeypatch.setattr(scorers, "PRODUCT", 200)
    torch.testing.assert_close(Summed(summed(alike), keys, weights, kind)(store.vectors, scalars), exact, rtol=1e-5, atol=1e-4)


@each_kind
def test_chosen_chunks_have_the_bits_they_have_in_a_tile(
    kind: str, keys: Keys, store: MemoryStore, queries: Tensor, weights: Tensor
) -> None:
    scorer, reverse = LayerScorer(queries, keys, weights, kind), LayerScorer(queries, keys, weights, kind, form="reverse")
    whole, scalars, places = scorer(store.vectors), keys.scalars(store.vectors), [[3, 1, 59], [], [7] * 20]
    for question, found in enumerate(scorer.of_chosen((store.vectors[mine], None) for mine in places)):
        assert torch.equal(found, whole[question][:, places[question]])
    for question, found in enumerate(reverse.of_chosen((store.vectors[mine], scalars[:, :, mine]) for mine in places)):
        torch.testing.assert_close(found, whole[question][:, places[question]], rtol=1e-5, atol=1e-4)


def test_what_a_form_does_not_serve_is_refused(keys: Keys, queries: Tensor, weights: Tensor) -> None:
    with pytest.raises(UserError, match=r"search.scorer=int8 does not serve retriever.scoring=mixed"):
        LayerScorer(queries, keys, weights, "mixed", form="int8")
    with pytest.raises(UserError, match="linear does not serve"):
        Linear(queries, keys, weights, "mixed")
    with pytest.raises(UserError, match="summed does not serve"):
        Summed(summed(queries), keys, weights, "mixed")
    with pytest.raises(ValueError, match="cannot be compared in the hidden space"):
        Summed(summed(queries), replace(keys, projections=keys.projections.bfloat16()), weights, "per_head")
    with pytest.raises(ValueError, match="scorer 'sum'"):
        LayerScorer(queries, keys, weights, "per_head", form="sum")
