"""The scorers of a search: forward only, one interface, the exact ones checked against each other.

    scorer = LayerScorer(queries, Keys.of(backbone), weights, "per_head", form="head_space")
    z = scorer(pooled)                                   # [N, P, d] -> components [B, C, N] float32, as of `scoring.scorer`

What each sums for layer l, head h and its key-value head g, over retrieval tokens r and pooled vectors p:

    head_space   sum_r max_p  q_r . k_p              k_p = k_norm(k_proj(h_p)), made once for a tile; exact
    reverse      sum_r max_p  rho_p (q~_r . h_p)     q~_r = (q_r * (1 + w)) W_K in R^d, rho_p = rsqrt(mean((W_K h_p)^2) + eps): one scalar a
                                                     vector, layer and key-value head (`scalars`), kept beside the vectors; exact
    paper        sum_r max_p  nu_p (q~_r . h_p)      nu_p = rsqrt(mean(h_p^2) + eps): App. A.2, where the norm stands before the projection.
                                                     Not the score of a stock T5Gemma 2: a model must have been trained to it
    int8         sum_r max_p  of head_space in integers, keys and their projections both: one scale for a chunk's vectors, which therefore
                                                     commutes with the maximum, one for a question's head; approximate. Worth it where
                                                     `fast_integers`; elsewhere the same sums come from float32, no faster than head_space

These serve `per_head` and `mixture`; `mixed` mixes layers before its one MaxSim and has only its own form (`scoring.scorer`).

A product is taken in blocks that stay in the processor's cache, in a buffer that is used again; its maximum over a chunk's vectors and sum
over the tokens follow at once, then the sum over heads. Blocks are cut at fixed rows of the pool as long as tiles begin at multiples of
ALIGN: then neither the size of the tiles nor the number of shards changes a bit of a score.

Shapes: B questions, C components, L layers, H query heads, G key-value heads, R retrieval tokens, N chunks, P pooled vectors a
chunk, e = head_dim, d = hidden size.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from intra.errors import UserError
from intra.retrieval import scoring

if TYPE_CHECKING:
    from intra.backbone.model import Backbone

FORMS = ("head_space", "reverse", "paper", "int8")
ALIGN = 1024  # chunks, at multiples of which a tile begins
PART = 512  # chunks whose keys are made at once on a CPU; divides ALIGN
# On one AVX512 core, 448 to 1,792 rows by 512 to 2,048 columns ran within a tenth of each other; beyond 2**20 products leave the cache.
PRODUCT = 2**20  # elements of a product on a CPU
COLUMNS = 1024  # of it at most
# With so many rows and columns at least (zeros are added), a float32 product of MKL has the same bits wherever a row or column stands and
# however many stand beside it (tried on AVX512, widths 8 to 256): scores depend neither on neighbours nor on the batch of questions.
WIDE = 16
INT8 = 127
EXACT = 2**24 // INT8**2  # so many products of two such integers add up to what float32 holds exactly, in any order
_TINY = 1e-20  # stands for the scale of a chunk whose keys are all zero


@dataclass(frozen=True)
class Keys:
    """What makes cross-attention keys of pooled vectors, of every decoder layer: a few matrices, not the model."""

    projections: Tensor  # [L, G * e, d] of the model's dtype
    biases: Tensor | None  # [L, G * e]
    gains: Tensor  # [L, e] float32, 1 + k_norm.weight
    eps: float
    groups: int  # G
    scaling: float

    @classmethod
    def of(cls, backbone: Backbone) -> Keys:
        attentions = [block.self_attn for block in backbone.model.get_decoder().layers]
        biases = [attention.k_proj.bias for attention in attentions]
        return cls(
            torch.stack([attention.k_proj.weight.detach() for attention in attentions]),
            None if biases[0] is None else torch.stack([bias.detach() for bias in biases]),
            1.0 + torch.stack([attention.k_norm.weight.detach().float() for attention in attentions]),
            float(attentions[0].k_norm.eps),
            backbone.kv_heads,
            backbone.scaling,
        )

    @property
    def liftable(self) -> bool:
        """Whether queries carried into the hidden space rank chunks as the keys do: in float32, and where no bias stands between."""
        return self.biases is None and self.projections.dtype == torch.float32

    def to(self, device: torch.device | str) -> Keys:
        biases = None if self.biases is None else self.biases.to(device)
        return replace(self, projections=self.projections.to(device), biases=biases, gains=self.gains.to(device))

    def normed(self, flat: Tensor, layer: int) -> Tensor:
        """k_norm(k_proj(h)) without k_norm's weight: [n, d] -> [n, G, e] of the model's dtype."""
        keys = self._projected(flat, layer)
        return keys.mul_(self._rsqrt(keys)[..., None].to(keys.dtype))

    def rho(self, flat: Tensor, layer: int) -> Tensor:
        """The scalars of vectors [n, d] in one layer: [G, n] float32."""
        return self._rsqrt(self._projected(flat, layer)).T

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def scalars(self, pooled: Tensor) -> Tensor:
        """rho of every pooled vector, layer and key-value head: [N, P, d] -> [L, G, N, P] float32."""
        flat = pooled.reshape(-1, pooled.shape[-1]).to(self.projections.dtype)
        return torch.stack([self.rho(flat, layer) for layer in range(len(self.gains))]).unflatten(-1, pooled.shape[:2])

    def _projected(self, flat: Tensor, layer: int) -> Tensor:
        bias = None if self.biases is None else self.biases[layer]
        return torch.nn.functional.linear(flat, self.projections[layer], bias).unflatten(-1, (self.groups, -1))

    def _rsqrt(self, keys: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(keys, dim=-1, dtype=torch.float32)
        return torch.rsqrt(norm.square_() / keys.shape[-1] + self.eps)


class _Head(NamedTuple):
    """The queries of the kept heads that read one key-value head of one layer."""

    layer: int
    group: int
    panels: list[tuple[Tensor, int]]  # [e or d, columns], then zeros up to a multiple of WIDE; B * s * R in all, question by question
    scales: Tensor | None  # [B * s], of int8 queries
    weights: Tensor  # [s], alpha * scaling / temperature


class LayerScorer:
    """The components of the scores `per_head` and `mixture` for queries [B, L, H, R, e] and weights alpha [L, H].

    kept: BoolTensor[L, H], heads that count (all where None): `strongest` chooses them.
    """

    def __init__(
        self, queries: Tensor, keys: Keys, weights: Tensor, kind: str, *, form: str = "head_space", temperature: float = 1.0,
        kept: Tensor | None = None,
    ) -> None:  # fmt: skip
        """Raises ValueError for a form there is not, UserError for a scoring or a backbone that the form does not serve."""
        if form not in FORMS:
            raise ValueError(f"scorer '{form}'")
        refuse(form, kind)
        if form in ("reverse", "paper") and keys.biases is not None:
            raise UserError(
                f"retriever.search.scorer={form}: this backbone's k_proj has a bias, which queries cannot take over; take head_space"
            )
        if form == "int8" and queries.is_cuda:
            raise UserError("retriever.search.scorer=int8 is for CPUs; take exact or cascade on a GPU")
        self.form, self.keys = form, keys
        self.questions, self.layers, _, self.tokens, _ = queries.shape
        self.components = self.layers if kind == "mixture" else 1
        self._work: Tensor | None = None
        self._integers = Integers(keys) if form == "int8" else None
        factors = weights.detach().float().to(queries.device) * (keys.scaling / temperature)
        self._heads = [made for layer in range(self.layers) for made in self._of_layer(queries[:, layer], layer, factors[layer], kept)]

    def _of_layer(self, queries: Tensor, layer: int, weights: Tensor, kept: Tensor | None) -> Iterator[_Head]:
        groups = self.keys.groups
        shared = queries.shape[1] // groups
        scaled = queries.detach() * self.keys.gains[layer].to(queries.dtype)
        for group in range(groups):
            heads = [head for head in range(group * shared, (group + 1) * shared) if kept is None or bool(kept[layer, head])]
            if not heads:
                continue
            mine = scaled[:, heads]  # [B, s, R, e]
            if self.form in ("reverse", "paper"):
                mine = mine @ self.keys.projections[layer].unflatten(0, (groups, -1))[group].to(mine.dtype)
            scales = None
            if self.form == "int8":
                scales = mine.float().abs().amax(dim=(2, 3)).clamp(min=_TINY) / INT8
                mine = (mine / scales[..., None, None]).round().to(torch.int8)
                scales = scales.flatten()
            flat = mine.reshape(-1, mine.shape[-1])
            step = flat.shape[0] if flat.is_cuda else max(1, COLUMNS // self.tokens) * self.tokens
            panels = [(torch.nn.functional.pad(part, (0, 0, 0, -len(part) % WIDE)).T, len(part)) for part in flat.split(step)]
            if self.form != "int8":  # integers are multiplied by columns as they lie
                panels = [(panel.contiguous(), columns) for panel, columns in panels]
            yield _Head(layer, group, panels, scales, weights[heads])

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def __call__(self, pooled: Tensor, scalars: Tensor | None = None) -> Tensor:
        """pooled [N, P, d] on the queries' device, scalars [L, G, N, P] (`reverse`; made here where they are not given) -> [B, C, N]."""
        count = len(pooled)
        if missing := -count % WIDE:
            pooled = torch.cat([pooled, pooled[:1].expand(missing, -1, -1)])
            scalars = None if scalars is None else torch.cat([scalars, scalars[:, :, :1].expand(-1, -1, missing, -1)], dim=2)
        total = torch.zeros(self.components, len(pooled), self.questions, device=pooled.device)
        step = len(pooled) if pooled.is_cuda else PART
        for first in range(0, len(pooled), max(1, step)):
            rows = slice(first, first + step)
            self._add(total[:, rows], pooled[rows], None if scalars is None else scalars[:, :, rows])
        return total[:, :count].permute(2, 0, 1)

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def products(self, pooled: Tensor) -> None:
        """The matrix products of a call in head space and nothing else, in the same blocks: what a benchmark holds against it."""
        for part in pooled.split(len(pooled) if pooled.is_cuda else PART):
            count, length = part.shape[:2]
            flat = part.reshape(count * length, -1).to(self.keys.projections.dtype)
            made = -1
            for head in self._heads:
                if head.layer != made:
                    projected, made = flat @ self.keys.projections[head.layer].T, head.layer
                rows = projected.unflatten(-1, (self.keys.groups, -1))[:, head.group]
                for panel, _ in head.panels:
                    step = _step(length, panel.shape[1], count, pooled.is_cuda) * length
                    product, _ = self._buffers(step // length, length, panel.shape[1], rows.dtype, rows.device)
                    for mine in rows.split(step):
                        torch.mm(mine, panel, out=product[: len(mine)])

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def of_chosen(self, tiles: Iterable[tuple[Tensor, Tensor | None]]) -> list[Tensor]:
        """head_space or reverse, of each question for chunks of its own: (pooled [n, P, d], scalars [L, G, n, P] for reverse) -> [C, n].

        Its columns are taken out of the batch's, and what is worked on stays in the cache.
        """
        keys, tokens, columns = self.keys, self.tokens, []
        for head in self._heads:  # [B, w, s * R and zeros]
            together = (
                torch.cat([panel[:, :width] for panel, width in head.panels], dim=1).unflatten(1, (self.questions, -1)).transpose(0, 1)
            )
            columns.append(torch.nn.functional.pad(together, (0, -together.shape[2] % WIDE)).contiguous())
        found = []
        for question, (pooled, scalars) in enumerate(tiles):
            count, length = pooled.shape[:2]
            missing = -count % WIDE
            pooled = torch.nn.functional.pad(pooled, (0, 0, 0, 0, 0, missing))
            flat = pooled.flatten(0, 1).to(keys.projections.dtype)
            total, made = torch.zeros(self.components, len(pooled), device=pooled.device), -1
            for head, mine in zip(self._heads, columns, strict=True):
                if self.form == "head_space" and head.layer != made:
                    projected, made = keys.normed(flat, head.layer), head.layer
                product = (projected[:, head.group] if self.form == "head_space" else flat) @ mine[question]
                product = product.unflatten(0, (-1, length))
                if self.form == "reverse":
                    assert scalars is not None
                    product[:count] *= scalars[head.layer, head.group, :, :, None].to(product.dtype)
                maxima = product.amax(dim=1)[:, : len(head.weights) * tokens]
                sums = maxima.unflatten(1, (-1, tokens)).sum(dim=2, dtype=torch.float32)  # [n, s]
                for number, weight in enumerate(head.weights):
                    total[head.layer if self.components > 1 else 0].addcmul_(sums[:, number], weight)
            found.append(total[:, :count])
        return found

    def _add(self, total: Tensor, pooled: Tensor, scalars: Tensor | None) -> None:
        count, length = pooled.shape[:2]
        dtype = self.keys.projections.dtype
        flat = pooled.reshape(count * length, -1).to(dtype)
        own = torch.rsqrt(pooled.float().square().mean(dim=-1) + self.keys.eps) if self.form == "paper" else None
        made = -1
        keys, scale = flat, None
        for head in self._heads:
            fresh, made = head.layer != made, head.layer
            if self._integers is not None:
                if fresh:
                    values, steps = quantized(self._integers.normed(flat, head.layer), length)
                keys, scale = values[head.group], steps[head.group]
            elif self.form == "head_space":
                if fresh:
                    projected = self.keys.normed(flat, head.layer)
                keys = projected[:, head.group]
            elif self.form == "reverse":
                if fresh:
                    factors = self.keys.rho(flat, head.layer) if scalars is None else scalars[head.layer]
                own = factors[head.group]
            sums = self._sums(keys, head, length, None if own is None else own.reshape(-1, 1).to(dtype))
            if scale is not None:
                sums = sums * scale[:, None]
            mine, each = total[head.layer if self.components > 1 else 0], sums.view(count, self.questions, -1)
            for number, weight in enumerate(head.weights):
                mine.addcmul_(each[:, :, number], weight)

    def _sums(self, keys: Tensor, head: _Head, length: int, factors: Tensor | None) -> Tensor:
        """sum_r max_p of keys [n * P, w] against the columns of a head -> [n, B * s] float32."""
        count, tokens = len(keys) // length, self.tokens
        integer = keys.dtype == torch.int8
        sums = torch.empty(count, self.questions * len(head.weights), device=keys.device)
        place = 0
        for panel, columns in head.panels:
            width, mine = panel.shape[1], columns // tokens
            step = _step(length, width, count, keys.is_cuda)
            product, maxima = self._buffers(step, length, width, torch.int32 if integer else keys.dtype, keys.device)
            for first in range(0, count, step):
                n = min(step, count - first)
                rows = keys[first * length : (first + n) * length]
                here, best = product[: n * length], maxima[:n]
                integer_product(rows, panel, here) if integer else torch.mm(rows, panel, out=here)
                if factors is not None:
                    here.mul_(factors[first * length : (first + n) * length])
                torch.amax(here.view(n, length, width), dim=1, out=best)
                kind = torch.int32 if integer else torch.float32
                sums[first : first + n, place : place + mine] = best[:, :columns].view(n, mine, tokens).sum(dim=2, dtype=kind)
            place += mine
        return sums if head.scales is None else sums * head.scales

    def _buffers(self, step: int, length: int, width: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
        """For a product and its maxima; the same memory each time, which is in the cache and mapped already."""
        size = step * length * width
        if self._work is None or len(self._work) < size + step * width:
            self._work = torch.empty(size + step * width, dtype=dtype, device=device)
        return self._work[:size].view(-1, width), self._work[size : size + step * width].view(-1, width)


@torch.no_grad()  # type: ignore[untyped-decorator]
def strongest(queries: Tensor, keys: Keys, weights: Tensor, pooled: Tensor, share: float) -> Tensor:
    """BoolTensor[L, H]: the fewest heads whose |alpha| times spread over the chunks `pooled` has `share` of all heads' sum of squares.

    The spread is the standard deviation of a head's score over the chunks, in the mean over the questions: what a head without spread
    adds, it adds to every chunk. Heads of one layer and key-value head are scored each by itself.
    """
    layers, heads = weights.shape
    spread = torch.zeros(layers, heads, device=pooled.device)
    for head in range(heads):
        alone = torch.zeros(layers, heads, dtype=torch.bool)
        alone[:, head] = True
        spread[:, head] = LayerScorer(queries, keys, weights, "mixture", kept=alone)(pooled).std(dim=2).mean(dim=0)
    squares, order = spread.square().flatten().sort(descending=True, stable=True)
    count = int((squares.cumsum(0) < share * squares.sum()).sum()) + 1
    kept = torch.zeros(layers * heads, dtype=torch.bool)
    kept[order[:count].cpu()] = True
    return kept.view(layers, heads)


class Linear:
    """A cheap stand-in for the components of `per_head` and `mixture`: of a chunk only the mean of its vectors and their spread about it.

        a_c z_c(mean) + b_c spread + c_c            a, b, c of each question and component: `fit` (1, 0, 0 where there is none)

    The maximum over a chunk's vectors, which the mean leaves out, lies the higher the wider they are spread. With one vector a chunk
    there is no maximum, so tokens and heads sum into one query vector for each layer and key-value head: what is left is the keys of one
    vector a chunk instead of P, and H R / G times fewer products for each. Where means and their scalars are kept in memory, no key is
    made for few questions: the query vectors are carried into the hidden space, as `reverse` does, where the keys are `liftable`.
    """

    def __init__(
        self, queries: Tensor, keys: Keys, weights: Tensor, kind: str, *, temperature: float = 1.0, fit: Tensor | None = None
    ) -> None:
        """`fit` [B, C, 3]. Raises UserError for a scoring it does not serve."""
        refuse("linear", kind)
        self.keys = keys
        layers, (width, hidden) = queries.shape[1], (queries.shape[-1], keys.projections.shape[2])
        factors = weights.detach().float().to(queries.device) * (keys.scaling / temperature)
        self._fit = None if fit is None else fit.to(queries.device).float()
        if self._fit is not None:
            factors = factors * self._fit[:, :, :1]  # [B, L, H]
        summed = queries.detach().float().sum(dim=3) * factors.view(-1, *weights.shape, 1) * keys.gains[None, :, None]  # [B, L, H, e]
        grouped = summed.unflatten(2, (keys.groups, -1)).sum(dim=3)  # [B, L, G, e]
        self.questions, self.components = len(queries), layers if kind == "mixture" else 1
        self._columns = [grouped[:, layer].flatten(1).T.contiguous().to(keys.projections.dtype) for layer in range(layers)]
        self._lifted: Tensor | None = None  # [d, B * L * G]
        if keys.liftable and self.questions * hidden < width * (hidden + self.questions):  # operations a vector, layer and group
            projections = keys.projections.unflatten(1, (keys.groups, -1))
            lifted = torch.einsum("blge,lged->blgd", grouped.to(projections.dtype), projections)
            self._lifted = lifted.flatten(0, 2).T.contiguous()

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def __call__(
        self, pooled: Tensor, means: Tensor | None = None, scalars: Tensor | None = None, spreads: Tensor | None = None
    ) -> Tensor:  # fmt: skip
        """pooled [N, P, d] -> [B, C, N] float32; `means` [N, d] and `spreads` [N] of the vectors (`middle`) and scalars [L, G, N] of the
        means, where they are at hand."""
        if means is None or spreads is None:
            means, spreads = middle(pooled, self.keys.projections.dtype)
        if scalars is not None and self._lifted is not None:
            parts = (means @ self._lifted).unflatten(1, (self.questions, *scalars.shape[:2]))  # [N, B, L, G]
            layers = (parts * scalars.permute(2, 0, 1)[:, None]).sum(dim=3, dtype=torch.float32)  # [N, B, L]
            total = (layers if self.components > 1 else layers.sum(dim=2, keepdim=True)).permute(1, 2, 0).contiguous()
            if self._fit is not None:
                total.addcmul_(self._fit[:, :, 1:2], spreads).add_(self._fit[:, :, 2:])
            return total
        if self._fit is None:
            total = torch.zeros(self.components, len(means), self.questions, device=means.device)
        else:
            _, slope, level = self._fit.permute(2, 1, 0)[:, :, None]  # [C, 1, B]
            total = torch.addcmul(level, slope, spreads[:, None])
        for layer, columns in enumerate(self._columns):
            total[layer if self.components > 1 else 0] += self.keys.normed(means, layer).flatten(1) @ columns
        return total.permute(2, 0, 1).contiguous()  # sums over chunks take a third of the time then


def middle(pooled: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Of the vectors [N, P, d], as keys are made of them, the mean [N, d], and their root mean square distance from it as a share of its
    length, [N] float32."""
    vectors = pooled.to(dtype).float()
    means = vectors.mean(dim=1)
    distances = (vectors - means[:, None]).square_().sum(dim=2).mean(dim=1).sqrt_()
    return means.to(dtype), distances / torch.linalg.vector_norm(means, dim=1).clamp(min=_TINY)


class Summed:
    """A stand-in for the components of `per_head` and `mixture` with a query vector a head: sum_r q_r, against every vector of a chunk.

    As the tokens of a head mostly agree about a chunk's best vector, far closer than `Linear`, and R times cheaper than the exact score.
    In the hidden space (as `reverse`), for few questions and chunks of their own; in head space it is `LayerScorer` of `summed` queries.
    """

    def __init__(self, queries: Tensor, keys: Keys, weights: Tensor, kind: str, *, temperature: float = 1.0) -> None:
        """`summed` queries [B, L, H, 1, e] and weights [L, H]. Raises UserError for a scoring it does not serve, ValueError for keys that
        are not `liftable`."""
        refuse("summed", kind)
        if not keys.liftable:
            raise ValueError("these keys cannot be compared in the hidden space")
        layers, heads = weights.shape
        grouped = (queries.detach()[:, :, :, 0] * keys.gains[None, :, None]).unflatten(2, (keys.groups, -1))  # [B, L, G, s, e]
        lifted = torch.einsum("blgse,lged->blgsd", grouped, keys.projections.unflatten(1, (keys.groups, -1)))
        self._shape = (len(queries), layers, keys.groups, heads // keys.groups)
        self._columns = lifted.flatten(0, 3).T.contiguous()  # [d, B * L * G * s]
        self._factors = (weights.detach().float().to(queries.device) * (keys.scaling / temperature)).view(self._shape[1:])
        self.components = layers if kind == "mixture" else 1

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def __call__(self, pooled: Tensor, scalars: Tensor) -> Tensor:
        """pooled [N, P, d], scalars [L, G, N, P] -> [B, C, N] float32."""
        step = _step(pooled.shape[1], self._columns.shape[1], len(pooled), pooled.is_cuda)
        factors = scalars.permute(2, 3, 0, 1)[:, :, None, :, :, None]
        parts = []
        for vectors, factor in zip(pooled.split(step), factors.split(step), strict=True):
            products = (vectors.flatten(0, 1) @ self._columns).view(*vectors.shape[:2], *self._shape).mul_(factor)
            parts.append((products.amax(dim=1) * self._factors).sum(dim=(3, 4)))  # [n, B, L]
        layers = torch.cat(parts)
        return (layers if self.components > 1 else layers.sum(dim=2, keepdim=True)).permute(1, 2, 0)


def summed(queries: Tensor) -> Tensor:
    """[B, L, H, R, e] -> [B, L, H, 1, e]: what stands for all tokens of a head in `Summed`."""
    return queries.float().sum(dim=3, keepdim=True).to(queries.dtype)


def _step(length: int, width: int, count: int, cuda: bool) -> int:
    """Chunks of a product; on a CPU a power of two, so that it divides PART."""
    if cuda:
        return max(1, min(count, scoring.GPU_BLOCK // (length * width)))
    return min(PART, int(2 ** max(0, (PRODUCT // (length * width)).bit_length() - 1)))


class Integers:
    """`Keys.normed` by integer products: one scale for a vector, which the norm takes out again, one for a row of a projection.

    Where a few channels of the vectors are far larger than the rest the others are rounded coarsely; a search checks its recall.
    """

    def __init__(self, keys: Keys) -> None:
        self.keys = keys
        self._scales = keys.projections.float().abs().amax(dim=2).clamp(min=_TINY) / INT8  # [L, G * e]
        self._columns = [
            (each.float() / scales[:, None]).round().to(torch.int8).T for each, scales in zip(keys.projections, self._scales, strict=True)
        ]

    def normed(self, flat: Tensor, layer: int) -> Tensor:
        """[n, d] -> [n, G, e] float32."""
        scales = flat.float().abs().amax(dim=1, keepdim=True).clamp(min=_TINY) / INT8
        rounded, columns = (flat / scales).round_().to(torch.int8), self._columns[layer]
        products = integer_product(rounded, columns, torch.empty(len(flat), columns.shape[1], dtype=torch.int32))
        keys = products.float().mul_(self._scales[layer])
        if self.keys.biases is not None:
            keys += self.keys.biases[layer] / scales
        keys = keys.unflatten(-1, (self.keys.groups, -1))
        means = torch.linalg.vector_norm(keys, dim=-1).square_() / keys.shape[-1]
        return keys.mul_(torch.rsqrt(means + self.keys.eps / scales.square())[..., None])


def fast_integers() -> bool:
    """Whether `torch._int_mm` beats a float32 product: by two to four with AVX512; with AVX2 it is ten to thirty times slower."""
    return bool(torch.backends.cpu.get_cpu_capability().startswith("AVX512"))


def integer_product(left: Tensor, right: Tensor, out: Tensor) -> Tensor:
    """int8 [n, w] @ int8 [w, c] -> `out`, int32 [n, c], the same on every processor."""
    if fast_integers():
        return torch._int_mm(left, right, out=out)
    for first in range(0, left.shape[1], EXACT):
        width = slice(first, first + EXACT)
        part = left[:, width].float() @ right[width].float()
        out.copy_(part) if first == 0 else out.add_(part.to(torch.int32))
    return out


def quantized(keys: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Keys [n * P, G, e] in integers, one scale for the P vectors of a chunk: (int8 [G, n * P, e], float32 [G, n])."""
    chunks = keys.unflatten(0, (-1, length)).float()
    scale = torch.maximum(chunks.amax(dim=(1, 3)), -chunks.amin(dim=(1, 3))).clamp(min=_TINY) / INT8  # [n, G]
    values = (chunks / scale[:, None, :, None]).round_().to(torch.int8)
    return values.permute(2, 0, 1, 3).contiguous().flatten(1, 2), scale.T


def refuse(form: str, kind: str) -> None:
    """Raises UserError where a scorer does not serve a scoring."""
    if kind == "mixed":
        raise UserError(f"retriever.search.scorer={form} does not serve retriever.scoring=mixed, which has one form; take exact")
