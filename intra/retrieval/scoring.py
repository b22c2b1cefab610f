"""The paper's score of every chunk, exact, and the running top k over a pool of any size.

    s_i = sum_{l,h} alpha_{l,h} sum_r max_p  scaling * q_{l,h,r} . k_{i,p,g(h)}          (Eq. 3 with App. B.1)

in head space: a tile of pooled vectors is projected once per layer (`backbone.keys`), then scored against every query of
that layer. Each product is taken in blocks that stay in the processor's cache, its maximum over a chunk's pooled vectors is
kept, the product is dropped: memory does not grow with the pool, in the backward pass neither.

Shapes: B questions, L layers, H query heads, G key-value heads, R retrieval tokens, N chunks, P pooled vectors a chunk,
e = head_dim, d = hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from intra.errors import WorkflowError

# Products kept at once, in elements. On a CPU core 1024 queries x 7 vectors x 64 to 256 chunks ran at 65 to 80 GFLOP/s and 2048 chunks
# at 24 (head_dim 32, one AVX512 core): larger blocks leave the cache before their maximum is taken.
CPU_BLOCK = 2**20
GPU_BLOCK = 2**27


class Keys(Protocol):
    """What scoring needs of a backbone."""

    @property
    def scaling(self) -> float: ...

    def keys(self, vectors: Tensor, layer: int) -> Tensor: ...


class _SumOfMaxima(torch.autograd.Function):  # type: ignore[misc]
    """sum_r max_p of [N, P, e] keys against [Q, R, e] queries -> [N, Q] float32; gradient to the queries only.

    The backward pass takes each block's product again rather than keep it. Equal maxima (the repeated vectors of a chunk
    shorter than P) share the gradient, as in `Tensor.amax`.
    """

    @staticmethod
    def forward(ctx: Any, queries: Tensor, keys: Tensor) -> Tensor:
        ctx.save_for_backward(queries, keys)
        n_queries, tokens, width = queries.shape
        flat = queries.reshape(-1, width).T
        sums = torch.empty(len(keys), n_queries, dtype=torch.float32, device=keys.device)
        for rows in blocks(keys, flat.shape[1]):
            product = (keys[rows].reshape(-1, width) @ flat).view(-1, keys.shape[1], flat.shape[1])
            sums[rows] = product.amax(dim=1).view(-1, n_queries, tokens).sum(dim=2, dtype=torch.float32)
        return sums

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        queries, keys = ctx.saved_tensors
        _, tokens, width = queries.shape
        flat = queries.reshape(-1, width).T
        total = torch.zeros(flat.shape[1], width, dtype=torch.float32, device=keys.device)
        for rows in blocks(keys, flat.shape[1]):
            vectors = keys[rows].reshape(-1, width)
            product = (vectors @ flat).view(-1, keys.shape[1], flat.shape[1])
            share = product.eq_(product.amax(dim=1, keepdim=True))  # in place, as the product's own type: 0 or 1
            share *= (gradient[rows].to(share.dtype).repeat_interleave(tokens, dim=1) / share.sum(dim=1))[:, None, :]
            total += share.view(-1, flat.shape[1]).T @ vectors
        return total.view_as(queries).to(queries.dtype), None


def blocks(keys: Tensor, width: int) -> Iterator[slice]:
    """Rows of `keys` whose product with `width` columns stays within a block."""
    step = max(1, (GPU_BLOCK if keys.is_cuda else CPU_BLOCK) // (keys.shape[1] * width))
    for first in range(0, len(keys), step):
        yield slice(first, first + step)


def per_head(queries: Tensor, pooled: Tensor, backbone: Keys) -> Tensor:
    """scaling * sum_r max_p q . k for every layer and head, before the weights.

    queries [B, L, H, R, e], after q_norm and RoPE; pooled [N, P, d] -> [B, L, H, N] float32. Differentiable with respect to
    the queries; the keys are constants.
    """
    layers = []
    for layer in range(queries.shape[1]):
        with torch.no_grad():
            keys = backbone.keys(pooled.to(queries.dtype), layer).detach()
        layers.append(_layer(queries[:, layer], keys))
    return torch.stack(layers, dim=1) * backbone.scaling


def _layer(queries: Tensor, keys: Tensor) -> Tensor:
    """queries [B, H, R, e], keys [N, P, G, e] -> [B, H, N]; query head h reads key head h // (H / G)."""
    n_questions, heads, tokens, width = queries.shape
    shared = heads // keys.shape[2]
    parts = []
    for group in range(keys.shape[2]):
        mine = queries[:, group * shared : (group + 1) * shared].reshape(n_questions * shared, tokens, width)
        sums = _SumOfMaxima.apply(mine, keys[:, :, group].contiguous())
        parts.append(sums.T.reshape(n_questions, shared, -1))
    return torch.cat(parts, dim=1)


def score(queries: Tensor, pooled: Tensor, backbone: Keys, weights: Tensor) -> Tensor:
    """s_i of every question and chunk (Eq. 3).

    queries [B, L, H, R, e], pooled [N, P, d], weights alpha [L, H] -> [B, N] float32. Differentiable with respect to
    queries and weights.
    """
    heads = per_head(queries, pooled, backbone).flatten(1, 2)
    return (weights.float().reshape(1, 1, -1) @ heads).squeeze(1)


class TopK:
    """The k best of each row over any number of tiles; equal scores stay in the order of their chunks' rows.

    `add` takes tiles in ascending order of rows. `scores` float32 and `rows` int64, [B, <= k], best first.
    """

    def __init__(self, k: int) -> None:
        self.k = k
        self.scores = torch.empty(0)
        self.rows = torch.empty(0, dtype=torch.int64)

    def add(self, scores: Tensor, first_row: int) -> None:
        """scores [B, n] of chunks first_row .. first_row + n - 1. Raises WorkflowError for a score that is not a number."""
        if torch.isnan(scores).any():
            last = first_row + scores.shape[1] - 1
            raise WorkflowError(f"a score of the chunks in rows {first_row} to {last} is not a number; check the backbone and the store")
        rows = torch.arange(first_row, first_row + scores.shape[1]).expand(len(scores), -1)
        scores = scores.float().cpu()
        if self.scores.numel():
            scores, rows = torch.cat([self.scores, scores], dim=1), torch.cat([self.rows, rows], dim=1)
        # torch.topk orders equal scores at will; a stable sort keeps the lower row, which is the lower chunk id, first.
        scores, order = torch.sort(scores, dim=1, descending=True, stable=True)
        self.scores, self.rows = scores[:, : self.k].clone(), rows.gather(1, order[:, : self.k])


def top_k(tiles: Iterable[tuple[int, Tensor]], scorer: Callable[[Tensor], Tensor], k: int) -> TopK:
    """The k best chunks of a streamed pool: `tiles` gives (first row, pooled [n, P, d]), `scorer` makes [B, n] of a tile."""
    best = TopK(k)
    for first_row, pooled in tiles:
        best.add(scorer(pooled), first_row)
    return best
