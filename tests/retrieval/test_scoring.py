"""The scorer against an independent one, against itself in other tiles and batches, and the order of equal scores."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from intra.backbone.model import Backbone
from intra.errors import WorkflowError
from intra.retrieval import scoring
from intra.retrieval.scoring import TopK
from intra.retrieval.search import read_context

from .conftest import MemoryStore


def naive(queries: Tensor, pooled: Tensor, backbone: Backbone, weights: Tensor) -> Tensor:
    """Eq. 3 with B.1, one scalar at a time, from the attention modules' own projections."""
    scores = torch.zeros(len(queries), len(pooled), dtype=torch.float64)
    repeats = backbone.heads // backbone.kv_heads
    for layer, block in enumerate(backbone.model.get_decoder().layers):
        projected = block.self_attn.k_proj(pooled)
        keys = block.self_attn.k_norm(projected.view(*pooled.shape[:2], backbone.kv_heads, backbone.head_dim)).double()
        for head in range(backbone.heads):
            logits = torch.einsum("bre,npe->bnrp", queries[:, layer, head].double(), keys[:, :, head // repeats]) * backbone.scaling
            for token in range(queries.shape[3]):
                scores += weights[layer, head].double() * logits[:, :, token].max(dim=-1).values
    return scores


@pytest.fixture
def queries(backbone: Backbone) -> Tensor:
    shape = (3, backbone.layers, backbone.heads, 5, backbone.head_dim)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def weights(backbone: Backbone) -> Tensor:
    return torch.randn(backbone.layers, backbone.heads, generator=torch.Generator().manual_seed(1))


def test_equals_the_naive_scorer(
    backbone: Backbone, store: MemoryStore, queries: Tensor, weights: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = naive(queries, store.vectors, backbone, weights)
    for block in (1, 100, 2**20):  # one chunk at a time, a few, all
        monkeypatch.setattr(scoring, "CPU_BLOCK", block)
        found = scoring.score(queries, store.vectors, backbone, weights)
        assert found.shape == (3, len(store))
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_gradients_equal_the_naive_ones(
    backbone: Backbone, store: MemoryStore, queries: Tensor, weights: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring, "CPU_BLOCK", 100)
    direction = torch.randn(3, len(store), generator=torch.Generator().manual_seed(3))
    found, expected = [], []
    for scorer, gradients in ((scoring.score, found), (naive, expected)):
        q, w = queries.clone().requires_grad_(), weights.clone().requires_grad_()
        (scorer(q, store.vectors, backbone, w) * direction).sum().backward()
        gradients += [q.grad, w.grad]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_repeated_vectors_share_the_gradient(backbone: Backbone, store: MemoryStore, queries: Tensor, weights: Tensor) -> None:
    """A chunk shorter than the pooled length repeats its states: that must not count its gradient more than once."""
    once, thrice = store.vectors[:4, :1], store.vectors[:4, :1].expand(-1, 3, -1)
    gradients = []
    for pooled in (once, thrice):
        q = queries.clone().requires_grad_()
        scoring.score(q, pooled, backbone, weights).sum().backward()
        gradients.append(q.grad)
    torch.testing.assert_close(gradients[0], gradients[1])
    assert gradients[0].abs().sum() > 0


def test_tiles_batches_and_padding_keep_the_ranking(backbone: Backbone, store: MemoryStore, retriever: torch.nn.Module) -> None:
    texts = ["where was ada born ?", "where was bruno hugo born and was ada cora born in the town of arden ?", "who ?"]
    rows = [[1, 2, 3], [4, 5], [6]]

    def ranking(tile: int, batch: int) -> list[list[int]]:
        found = []
        for first in range(0, len(texts), batch):
            memory = read_context(backbone, store, rows[first : first + batch], 3)  # type: ignore[arg-type]
            queries = backbone.queries(backbone.prompt_ids(texts[first : first + batch]), retriever.tokens, memory)
            best = scoring.top_k(store.tiles(tile), lambda pooled, q=queries: scoring.score(q, pooled, backbone, retriever.weights), 20)
            found += best.rows.tolist()
        return found

    with torch.no_grad():
        expected = ranking(60, 3)
        assert all(ranking(tile, batch) == expected for tile, batch in ((1, 1), (7, 2), (59, 1), (1000, 3)))
    assert expected[0] != expected[1]


@pytest.mark.parametrize("tile", [1, 3, 10])
def test_equal_scores_stay_in_the_order_of_rows(tile: int) -> None:
    scores = torch.tensor([[0.0, 1, 1, 0, 1, 2, 0, 1, 1, 0], [5.0] * 10])
    best = TopK(4)
    for first in range(0, 10, tile):
        best.add(scores[:, first : first + tile], first)
    assert best.rows.tolist() == [[5, 1, 2, 4], [0, 1, 2, 3]]
    assert best.scores.tolist() == [[2, 1, 1, 1], [5, 5, 5, 5]]


def test_top_k_holds_no_more_than_k_and_gives_what_there_is() -> None:
    best = TopK(3)
    best.add(torch.tensor([[1.0, 2.0]]), 0)
    assert best.rows.tolist() == [[1, 0]]
    best.add(torch.tensor([[3.0, 0.0, 9.0]]), 2)
    assert best.rows.tolist() == [[4, 2, 1]]


def test_a_score_that_is_not_a_number_is_refused() -> None:
    with pytest.raises(WorkflowError, match="rows 7 to 8 is not a number"):
        TopK(2).add(torch.tensor([[1.0, float("nan")]]), 7)
