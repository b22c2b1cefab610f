"""The scorer against an independent one, against itself in other tiles and batches, and the order of equal scores."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from intra.backbone.model import Backbone
from intra.errors import WorkflowError
from intra.retrieval import scoring
from intra.retrieval.scoring import TopK

from .conftest import SCORINGS, MemoryStore


def naive(kind: str, queries: Tensor, pooled: Tensor, backbone: Backbone, weights: Tensor) -> Tensor:
    """The components [B, C, N], one layer, head and token at a time, from the attention modules' own projections."""
    repeats, tokens = backbone.heads // backbone.kv_heads, queries.shape[3]
    parts = torch.zeros(len(queries), backbone.layers, len(pooled), dtype=torch.float64)
    mixed = torch.zeros(len(queries), tokens, backbone.hidden_size, dtype=torch.float64)
    for layer, block in enumerate(backbone.model.get_decoder().layers):
        attention = block.self_attn
        projected = attention.k_proj(pooled)
        keys = attention.k_norm(projected.view(*pooled.shape[:2], backbone.kv_heads, backbone.head_dim)).double()
        for head in range(backbone.heads):
            group, query = head // repeats, queries[:, layer, head].double()
            logits = torch.einsum("bre,npe->bnrp", query, keys[:, :, group]) * backbone.scaling
            for token in range(tokens):
                parts[:, layer] += weights[layer, head].double() * logits[:, :, token].max(dim=-1).values
            rows = attention.k_proj.weight[group * backbone.head_dim : (group + 1) * backbone.head_dim].double()
            mixed += weights[layer, head].double() * (query * (1 + attention.k_norm.weight.double())) @ rows
    if kind != "mixed":
        return parts if kind == "mixture" else parts.sum(dim=1, keepdim=True)
    keys = pooled.double() / (pooled.double().square().mean(dim=-1, keepdim=True) + 1e-6).sqrt()
    return torch.einsum("brd,npd->bnrp", mixed, keys).max(dim=-1).values.sum(dim=2)[:, None] * backbone.scaling


def naive_scores(kind: str, queries: Tensor, pooled: Tensor, backbone: Backbone, weights: Tensor) -> Tensor:
    """s_i [B, N]."""
    components = naive(kind, queries, pooled, backbone, weights)
    return components.softmax(dim=2).mean(dim=1).log() if kind == "mixture" else components[:, 0]


@pytest.mark.parametrize("kind", SCORINGS)
def test_equals_the_naive_scorer(
    kind: str, backbone: Backbone, store: MemoryStore, queries: Tensor, weights: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = naive(kind, queries, store.vectors, backbone, weights)
    for block in (1, 100, 2**20):  # one chunk at a time, a few, all
        monkeypatch.setattr(scoring, "CPU_BLOCK", block)
        found = scoring.scorer(kind, queries, backbone, weights)(store.vectors)
        assert found.shape == (3, backbone.layers if kind == "mixture" else 1, len(store))
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(scoring.scorer(kind, queries, backbone, weights, 0.25)(store.vectors), found * 4)


@pytest.mark.parametrize("kind", SCORINGS)
def test_gradients_equal_the_naive_ones(
    kind: str, backbone: Backbone, store: MemoryStore, queries: Tensor, weights: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring, "CPU_BLOCK", 100)
    direction = torch.randn(3, 1, len(store), generator=torch.Generator().manual_seed(3))
    gradients = []
    for scorer in (
        lambda q, w: scoring.scorer(kind, q, backbone, w)(store.vectors),
        lambda q, w: naive(kind, q, store.vectors, backbone, w),
    ):
        q, w = queries.clone().requires_grad_(), weights.clone().requires_grad_()
        (scorer(q, w) * direction).sum().backward()
        gradients.append((q.grad, w.grad))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=2e-4)


def test_an_unknown_variant_is_refused(backbone: Backbone, queries: Tensor, weights: Tensor) -> None:
    with pytest.raises(ValueError, match="scoring 'sum'"):
        scoring.scorer("sum", queries, backbone, weights)


@pytest.mark.parametrize("kind", SCORINGS)
def test_repeated_vectors_share_the_gradient(kind: str, backbone: Backbone, store: MemoryStore, queries: Tensor, weights: Tensor) -> None:
    """A chunk shorter than the pooled length repeats its states: that must not count its gradient more than once."""
    once, thrice = store.vectors[:4, :1], store.vectors[:4, :1].expand(-1, 3, -1)
    gradients = []
    for pooled in (once, thrice):
        q = queries.clone().requires_grad_()
        scoring.scorer(kind, q, backbone, weights)(pooled).sum().backward()
        gradients.append(q.grad)
    torch.testing.assert_close(gradients[0], gradients[1])
    assert gradients[0].abs().sum() > 0


def test_mixture_over_a_streamed_pool_is_the_direct_one(backbone: Backbone, store: MemoryStore, queries: Tensor, weights: Tensor) -> None:
    expected = naive_scores("mixture", queries, store.vectors, backbone, weights)
    scorer = scoring.scorer("mixture", queries, backbone, weights)
    for tile in (1, 7, 60):
        normalisers = scoring.log_normalisers(store.tiles(tile), scorer)
        found = torch.cat([scoring.log_mixture(scorer(pooled), normalisers) for _, pooled in store.tiles(tile)], dim=1)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(found.exp().sum(dim=1), torch.ones(3, dtype=torch.float64), rtol=1e-4, atol=0)


@pytest.mark.parametrize("size", [1.0, 500.0])
def test_the_size_of_the_tiles_changes_no_bit_of_a_mixture(size: float) -> None:
    """From the same components, however large: the same normalisers, scores and order, equal chunks by their rows."""
    components = torch.randn(4, 3, 1000, generator=torch.Generator().manual_seed(0)) * size
    components[:, :, 600:700] = components[:, :, 100:200]

    def tiles(count: int) -> list[tuple[int, Tensor]]:
        return [(first, torch.arange(first, min(1000, first + count))) for first in range(0, 1000, count)]

    found = []
    for count in (1, 7, 64, 333, 1000):
        normalisers = scoring.log_normalisers(tiles(count), lambda rows: components[:, :, rows])
        best = scoring.top_k(tiles(count), lambda rows, n=normalisers: scoring.log_mixture(components[:, :, rows], n), 1000)
        found.append((normalisers, best.scores, best.rows))
        place = {row: index for index, row in enumerate(best.rows[0].tolist())}
        assert all(place[row] < place[row + 500] for row in range(100, 200))
    for other in found[1:]:
        assert all(torch.equal(one, two) for one, two in zip(found[0], other, strict=True))


def test_a_chunk_that_one_layer_is_sure_of_outranks_what_all_know_a_little() -> None:
    """What the sum over layers does not do: chunk 1 is the second layer's alone, the others are near-names in the first."""
    components = torch.tensor([[[6.0, 0.0, 5.9, 5.8, 5.7], [0.0, 4.0, 0.0, 0.0, 0.0]]])
    mixture = scoring.log_mixture(components, components.logsumexp(dim=2))
    assert mixture.argsort(descending=True)[0, 0] == 1
    assert components.sum(dim=1).argsort(descending=True)[0, -1] == 1


def test_a_store_without_chunks_is_refused() -> None:
    with pytest.raises(WorkflowError, match="holds no chunk"):
        scoring.log_normalisers([], lambda pooled: pooled)


@pytest.mark.parametrize("tile", [1, 3, 10])
def test_equal_scores_stay_in_the_order_of_rows(tile: int) -> None:
    scores = torch.tensor([[0.0, 1, 1, 0, 1, 2, 0, 1, 1, 0], [5.0] * 10])
    best = TopK(4)
    for first in range(0, 10, tile):
        best.add(scores[:, first : first + tile], first)
    assert best.rows.tolist() == [[5, 1, 2, 4], [0, 1, 2, 3]]
    assert best.scores.tolist() == [[2, 1, 1, 1], [5, 5, 5, 5]]


@pytest.mark.parametrize("k", [1, 7, 60, 500])
def test_top_k_of_many_tiles_is_that_of_all_in_one(k: int) -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 40, (3, 400), generator=generator).float()  # each many times
    expected = scores.sort(dim=1, descending=True, stable=True)
    for tile in (1, 9, 128):
        best = TopK(k)
        for first in range(0, 400, tile):
            best.add(scores[:, first : first + tile], first)
        assert torch.equal(best.rows, expected.indices[:, :k])
        assert torch.equal(best.scores, expected.values[:, :k])
    halves = TopK(k), TopK(k)
    for half, first in zip(halves, (0, 150), strict=True):
        half.add(scores[:, first : 150 if first == 0 else 400], first)
    halves[0].merge(halves[1])
    assert torch.equal(halves[0].rows, expected.indices[:, :k])


def test_top_k_holds_no_more_than_k_and_gives_what_there_is() -> None:
    best = TopK(3)
    best.add(torch.tensor([[1.0, 2.0]]), 0)
    assert best.rows.tolist() == [[1, 0]]
    best.add(torch.tensor([[3.0, 0.0, 9.0]]), 2)
    assert best.rows.tolist() == [[4, 2, 1]]


def test_a_score_that_is_not_a_number_is_refused() -> None:
    with pytest.raises(WorkflowError, match="rows 7 to 8 is not a number"):
        TopK(2).add(torch.tensor([[1.0, float("nan")]]), 7)
