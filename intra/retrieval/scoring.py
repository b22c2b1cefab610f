"""The score of every chunk, exact, by one of three variants (`retriever.scoring`), and the running top k over a pool of any size.

Every variant gives components z_{c,i} of the chunks of a tile; what differs is what a component is:

    per_head   one:            z_i     = sum_{l,h} alpha_{l,h} sum_r max_p  scaling q_{l,h,r} . k_{i,p,g(h)}    s_i = z_i
               The paper's score (Eq. 3 with App. B.1).
    mixture    one per layer:  z_{l,i} = sum_h alpha_{l,h} sum_r max_p  scaling q_{l,h,r} . k_{i,p,g(h)}
                               s_i     = log mean_l softmax_i(z_l)_i
               Not the paper's: each layer spreads its own probability over the chunks. A chunk that one layer is sure of ranks
               high; in the sum over layers the near-names of the first hop, which every layer knows a little, bury the second hop.
    mixed      one:            z_i     = sum_r max_p  scaling u_r . k^_{i,p},   u_r = sum_{l,h} alpha_{l,h} q~_{l,h,r}    s_i = z_i
               Not the paper's, but its successor's (UNREAL): layers and heads are mixed first, then there is one MaxSim. See `mixed`.

The training loss is the same for all: -log of the mean over components of the softmax over the candidates (`log_mixture` with
the candidates' own normalisers), which for one component is the paper's log softmax. In a search the mixture's softmax runs over
the whole pool: one pass over the tiles for the normalisers (`log_normalisers`), another for the scores.

The first two work in head space: a tile of pooled vectors is projected once per layer (`backbone.keys`), then scored against every
query of that layer. Each product is taken in blocks that stay in the processor's cache, its maximum over a chunk's pooled vectors is
kept, the product is dropped: memory does not grow with the pool, in the backward pass neither.

Shapes: B questions, C components, L layers, H query heads, G key-value heads, R retrieval tokens, N chunks, P pooled vectors a
chunk, e = head_dim, d = hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from intra.errors import WorkflowError

if TYPE_CHECKING:
    from intra.backbone.model import Backbone

# Products kept at once, in elements. On a CPU core 1024 queries x 7 vectors x 64 to 256 chunks ran at 65 to 80 GFLOP/s and 2048 chunks
# at 24 (head_dim 32, one AVX512 core): larger blocks leave the cache before their maximum is taken.
CPU_BLOCK = 2**20
GPU_BLOCK = 2**27

GRID = 2.0**-20  # to which a log-normaliser is rounded
EPS = 1e-6  # of the mean square, in the vectors `mixed` normalises

Scored = list[tuple[int, float]]  # (row of the pool, score), best first, equal scores by row
Scorer = Callable[[Tensor], Tensor]  # pooled [N, P, d] -> components z [B, C, N] float32


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


def per_head(queries: Tensor, pooled: Tensor, backbone: Backbone) -> Tensor:
    """scaling * sum_r max_p q . k for every layer and head, before the weights.

    queries [B, L, H, R, e], after q_norm and RoPE; pooled [N, P, d] -> [B, L, H, N] float32. Differentiable with respect to
    the queries; the keys are constants.
    """
    layers = []
    for layer in range(queries.shape[1]):
        with torch.no_grad():
            keys = backbone.keys(pooled.to(queries.dtype), layer).detach()
        layers.append(layer_scores(queries[:, layer], keys))
    return torch.stack(layers, dim=1) * backbone.scaling


def layer_scores(queries: Tensor, keys: Tensor) -> Tensor:
    """queries [B, H, R, e], keys [N, P, G, e] -> [B, H, N]; query head h reads key head h // (H / G)."""
    n_questions, heads, tokens, width = queries.shape
    shared = heads // keys.shape[2]
    parts = []
    for group in range(keys.shape[2]):
        mine = queries[:, group * shared : (group + 1) * shared].reshape(n_questions * shared, tokens, width)
        sums = _SumOfMaxima.apply(mine, keys[:, :, group].contiguous())
        parts.append(sums.T.reshape(n_questions, shared, -1))
    return torch.cat(parts, dim=1)


def scorer(kind: str, queries: Tensor, backbone: Backbone, weights: Tensor, temperature: float = 1.0) -> Scorer:
    """The components of any chunks' scores under `queries` [B, L, H, R, e] and weights alpha [L, H].

    The function returned takes pooled vectors [N, P, d] on the queries' device and gives z / temperature, [B, C, N] float32 (C is L
    for `mixture`, 1 for the others). Differentiable with respect to queries and weights.
    """
    weights = weights.float()
    if kind == "per_head":
        return lambda pooled: (weights.reshape(1, 1, -1) @ per_head(queries, pooled, backbone).flatten(1, 2)) / temperature
    if kind == "mixture":
        return lambda pooled: (weights[None, :, :, None] * per_head(queries, pooled, backbone)).sum(dim=2) / temperature
    if kind == "mixed":
        return mixed_scorer(mixed(queries, backbone, weights), backbone.scaling / temperature)
    raise ValueError(f"scoring '{kind}'")


def mixed_scorer(vectors: Tensor, scale: float) -> Scorer:
    """The scorer `mixed` for its query vectors [B, R, d]."""
    return lambda pooled: _SumOfMaxima.apply(vectors, unit(pooled)).T[:, None] * scale


def mixed(queries: Tensor, backbone: Backbone, weights: Tensor) -> Tensor:
    """One query vector per retrieval token in the hidden space: u_r = sum_{l,h} alpha_{l,h} q~_{l,h,r}, [B, R, d] float32.

        q~_{l,h,r} = (q_{l,h,r} * (1 + k_norm.weight_l)) W_K^{l,g(h)}                     (Reverse-QWK, App. A.1)

    **This is not the paper's score.** A decoder's key is W_K k divided by its own root mean square, another one in each layer and
    key-value head; here every chunk vector is divided by its own in the hidden space instead (`unit`), once for all layers; and
    the maximum over a chunk's vectors is taken after the layers are mixed, not in each of them. A bias of k_proj would add the
    same to every chunk and is left out. In exchange a question has R query vectors, not L H R, and no key is projected: at the
    size of T5Gemma 2 4B (34 layers, 8 heads of 256, d = 2560) 272 times fewer products than the paper's score in the hidden
    space, and 27 times fewer than in head space, its projections not counted.
    """
    total = torch.zeros(1, device=queries.device)
    for layer, block in enumerate(backbone.model.get_decoder().layers):
        attention = block.self_attn
        scale = 1.0 + attention.k_norm.weight.float()
        lifted = (weights[layer][None, :, None, None] * queries[:, layer].float() * scale).unflatten(1, (backbone.kv_heads, -1)).sum(dim=2)
        projection = attention.k_proj.weight.float().unflatten(0, (backbone.kv_heads, -1))  # [G, e, d]
        total = total + torch.einsum("bgre,ged->brd", lifted, projection)
    return total


def unit(pooled: Tensor) -> Tensor:
    """Each vector divided by its root mean square, float32."""
    pooled = pooled.float()
    return pooled * torch.rsqrt(pooled.square().mean(dim=-1, keepdim=True) + EPS)


def log_mixture(components: Tensor, normalisers: Tensor) -> Tensor:
    """log of the mean over components of exp(z - normaliser): z [B, C, N], normalisers [B, C] -> [B, N], of their wider type.

    With normalisers over the chunks of z it is a log-probability over them; with C = 1, log softmax.
    """
    return torch.logsumexp(components - normalisers[:, :, None], dim=1) - math.log(components.shape[1])


def log_normalisers(tiles: Iterable[tuple[int, Tensor]], components: Scorer) -> Tensor:
    """log sum_i exp(z_{c,i}) over a streamed pool: [B, C] float64, `rounded`."""
    return rounded(log_sums(tiles, components))


def log_sums(tiles: Iterable[tuple[int, Tensor]], components: Scorer) -> Tensor:
    """log sum_i exp(z_{c,i}) over a streamed pool or a part of one: [B, C] float64. Parts are put together by `logaddexp`."""
    total: Tensor | None = None
    for _, pooled in tiles:
        tile = torch.logsumexp(components(pooled).double(), dim=2)
        total = tile if total is None else torch.logaddexp(total, tile)
    if total is None:
        raise WorkflowError("the chunk store holds no chunk; run workflows/encode.py again")
    return total


def rounded(sums: Tensor) -> Tensor:
    """Sums taken in float64 to a multiple of GRID: what the order of adding changes lies nine orders of magnitude below, so the size of
    the tiles does not show, and as every chunk shares the rounding, no order within a component changes."""
    return (sums / GRID).round() * GRID


class TopK:
    """The k best of each row over any number of tiles; equal scores stay in the order of their chunks' rows.

    `add` takes tiles in ascending order of rows. `scores` float32 and `rows` int64, [B, <= k], best first.
    """

    def __init__(self, k: int) -> None:
        self.k = k
        self._best = torch.empty(0), torch.empty(0, dtype=torch.int64)  # in order
        self._new: list[tuple[Tensor, Tensor]] = []  # not yet

    @property
    def scores(self) -> Tensor:
        return self._ordered()[0]

    @property
    def rows(self) -> Tensor:
        return self._ordered()[1]

    def add(self, scores: Tensor, first_row: int) -> None:
        """scores [B, n] of chunks first_row .. first_row + n - 1. Raises WorkflowError for a score that is not a number."""
        if torch.isnan(scores).any():
            last = first_row + scores.shape[1] - 1
            raise WorkflowError(f"a score of the chunks in rows {first_row} to {last} is not a number; check the backbone and the store")
        scores = scores.float().cpu()
        rows = torch.arange(first_row, first_row + scores.shape[1]).expand(len(scores), -1)
        best = self._best[0]
        if best.numel() and best.shape[1] == self.k:
            # Of a tile only what beats the k-th counts: an equal score of a higher row does not. Mostly that is next to nothing.
            most = int((scores > best[:, -1:]).sum(dim=1).max())
            if most == 0:
                return
            if most < scores.shape[1] // 2:
                place = torch.topk(scores, most, dim=1).indices.sort(dim=1).values
                scores, rows = scores.gather(1, place), rows.gather(1, place)
        self._new.append((scores, rows))
        if sum(each.shape[1] for each, _ in self._new) >= self.k:
            self._ordered()

    def merge(self, other: TopK) -> None:
        """Takes in the best of another part of the pool, whose rows all lie above these."""
        if other.scores.numel():
            self._new.append((other.scores, other.rows))

    def pairs(self) -> list[Scored]:
        return [list(zip(row, score, strict=True)) for score, row in zip(self.scores.tolist(), self.rows.tolist(), strict=True)]

    def _ordered(self) -> tuple[Tensor, Tensor]:
        if self._new:
            held = [self._best, *self._new] if self._best[0].numel() else self._new
            scores, rows = (torch.cat(each, dim=1) for each in zip(*held, strict=True))
            # torch.topk orders equal scores at will; a stable sort keeps the lower row, which is the lower chunk id, first.
            scores, order = torch.sort(scores, dim=1, descending=True, stable=True)
            self._best, self._new = (scores[:, : self.k].clone(), rows.gather(1, order[:, : self.k])), []
        return self._best


def top_k(tiles: Iterable[tuple[int, Tensor]], scorer: Callable[[Tensor], Tensor], k: int) -> TopK:
    """The k best chunks of a streamed pool: `tiles` gives (first row, pooled [n, P, d]), `scorer` makes [B, n] of a tile."""
    best = TopK(k)
    for first_row, pooled in tiles:
        best.add(scorer(pooled), first_row)
    return best
