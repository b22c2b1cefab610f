"""The pool as a search sees it: parts of pooled vectors, in memory or streamed from the store, and what is asked of them.

    ask = Ask.of(retriever, queries, backbone)                     # a batch of questions
    pool = Local(store, Keys.of(backbone), 2048, backbone.device)
    best = pool.best(ask, Form("head_space"), 20, normalisers)     # TopK

`intra.retrieval.fleet.Fleet` answers the same, with the parts in Ray actors. A part holds whole tiles, which begin at multiples of
`scorers.ALIGN`: the number of parts changes no bit of a score.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor

from intra.retrieval import scoring
from intra.retrieval.scorers import ALIGN, PART, Keys, LayerScorer, Linear, Summed, middle, refuse, summed
from intra.retrieval.scoring import TopK

if TYPE_CHECKING:
    from intra.backbone.model import Backbone
    from intra.retrieval.retriever import Retriever


LENGTHS = 32  # tokens: chunks whose lengths lie between the same multiples are scored together
SCALARS = 256 * 2**20  # bytes of scalars that are kept of chunks scored by their token states
MANY = 32  # one row in so many: from there on reading all tiles takes less than reading rows


class Tile(NamedTuple):
    vectors: Tensor  # [n, P, d]
    scalars: Tensor | None = None  # [L, G, n, P], of `Keys.scalars`
    means: Tensor | None = None  # [n, d] of the vectors
    mean_scalars: Tensor | None = None  # [L, G, n]
    spreads: Tensor | None = None  # [n], of `scorers.middle`

    def rows(self, at: Tensor) -> Tile:
        """The chunks at these places."""
        means, scalars = self.means, self.scalars
        return Tile(
            self.vectors.index_select(0, at),  # several times faster than self.vectors[at]
            None
            if scalars is None
            else scalars.movedim(2, 0).index_select(0, at).movedim(0, 2),  # where a chunk's lie together they are read together
            None if means is None else means[at],
            None if self.mean_scalars is None else self.mean_scalars[:, :, at],
            None if self.spreads is None else self.spreads[at],
        )


Tiles = Iterable[tuple[int, Tile]]  # first row, tile
Scorer = Callable[[Tile], Tensor]  # -> components [B, C, n] float32


@dataclass(frozen=True)
class Form:
    """How components are computed: a form of `scorers.FORMS`, `exact` (head_space or reverse, by `cheaper`), `linear` or `summed`."""

    name: str = "exact"
    kept: tuple[tuple[bool, ...], ...] | None = None  # [L][H]: heads that count, of `scorers.strongest`; None: all

    @property
    def rough(self) -> bool:
        return self.name in ("linear", "summed")


@dataclass(frozen=True)
class Ask:
    """A batch of questions, as every part of the pool gets it."""

    kind: str  # per_head | mixture | mixed
    queries: Tensor  # [B, L, H, R, e]; of `mixed` its vectors [B, R, d]
    weights: Tensor  # [L, H]
    temperature: float
    fit: Tensor | None = None  # [B, C, 3] of a linear form, `scorers.Linear`

    @classmethod
    def of(cls, retriever: Retriever, queries: Tensor, backbone: Backbone) -> Ask:
        settings, weights = retriever.settings, retriever.weights.detach().to(queries.device)
        made = scoring.mixed(queries, backbone, weights) if settings.scoring == "mixed" else queries
        return cls(settings.scoring, made.detach(), weights, settings.temperature)

    def __len__(self) -> int:
        return len(self.queries)

    @property
    def components(self) -> int:
        """C"""
        return self.queries.shape[1] if self.kind == "mixture" else 1

    def part(self, first: int, count: int = 1) -> Ask:
        """So many of the questions."""
        fit = None if self.fit is None else self.fit[first : first + count]
        return replace(self, queries=self.queries[first : first + count], fit=fit)

    @classmethod
    def joined(cls, asks: Sequence[Ask]) -> Ask:
        """Batches of one retriever as one. Where questions have fewer queries zeros follow, as within a batch (`Backbone.queries`)."""
        widest = max(ask.queries.shape[-2] for ask in asks)
        padded = [torch.nn.functional.pad(ask.queries, (0, 0, 0, widest - ask.queries.shape[-2])) for ask in asks]
        return replace(asks[0], queries=torch.cat(padded))

    def to(self, device: torch.device | str) -> Ask:
        fit = None if self.fit is None else self.fit.to(device)
        return replace(self, queries=self.queries.to(device), weights=self.weights.to(device), fit=fit)

    def scorer(self, keys: Keys, form: Form, scalars: bool = False) -> Scorer:
        """`scalars`: whether the tiles bring them. Raises UserError where the form does not serve the scoring."""
        if self.kind == "mixed":
            if form.name != "exact":
                refuse(form.name, self.kind)
            vectors = scoring.mixed_scorer(self.queries, keys.scaling / self.temperature)
            return lambda tile: vectors(tile.vectors)
        if form.name == "linear":
            linear = Linear(self.queries, keys, self.weights, self.kind, temperature=self.temperature, fit=self.fit)
            return lambda tile: linear(tile.vectors, tile.means, tile.mean_scalars, tile.spreads)
        queries = summed(self.queries) if form.name == "summed" else self.queries
        name = cheaper(keys, queries.shape, scalars) if form.name in ("exact", "summed") else form.name
        if form.name == "summed" and name == "reverse":
            carried = Summed(queries, keys, self.weights, self.kind, temperature=self.temperature)
            return lambda tile: carried(tile.vectors, tile.scalars)
        kept = None if form.kept is None else torch.tensor(form.kept)
        layers = LayerScorer(queries, keys, self.weights, self.kind, form=name, temperature=self.temperature, kept=kept)
        return lambda tile: layers(tile.vectors, tile.scalars)


def cheaper(keys: Keys, shape: Sequence[int], scalars: bool) -> str:
    """The exact form with fewer operations a pooled vector, for queries [B, L, H, R, e].

    head_space: G e d for the keys, B H R e for the products; reverse: B H R d, and only where the scalars are at hand (to make them
    costs what the keys cost) and both rank alike (`Keys.liftable`). So `reverse` for a question or two at a time, `head_space` for more.
    """
    questions, _, heads, tokens, width = shape
    hidden = keys.projections.shape[2]
    products = questions * heads * tokens
    fewer = products * hidden < keys.projections.shape[1] * hidden + products * width
    return "reverse" if scalars and keys.liftable and fewer else "head_space"


class Source(Protocol):
    """What gives pooled vectors: a store, a part of it, a benchmark's pool."""

    def __len__(self) -> int: ...
    def tiles(self, tile_chunks: int, start: int = 0, count: int | None = None) -> Iterator[tuple[int, Tensor]]: ...
    def pooled(self, wanted: Any) -> Tensor: ...


class Resident:
    """A part (first row, number of rows) of a source, in memory, with its scalars."""

    def __init__(self, source: Source, keys: Keys, part: tuple[int, int], device: torch.device | str) -> None:
        first, count = part
        self.first, self.vectors = first, torch.empty(0)
        for row, tile in source.tiles(ALIGN, first, count):
            if not self.vectors.numel():
                self.vectors = torch.empty(count, *tile.shape[1:], dtype=keys.projections.dtype, device=device)
            self.vectors[row - first : row - first + len(tile)] = tile
        pieces = self.vectors.split(ALIGN)
        self.means, self.spreads = (torch.cat(each) for each in zip(*(middle(piece, piece.dtype) for piece in pieces), strict=True))
        self.scalars = torch.cat([keys.scalars(piece).movedim(2, 0) for piece in pieces]).movedim(0, 2)  # a chunk's lie together
        self.mean_scalars = torch.cat([keys.scalars(piece[:, None])[..., 0] for piece in self.means.split(ALIGN)], dim=2)

    def tiles(self, tile_chunks: int) -> Iterator[tuple[int, Tile]]:
        for start in range(0, len(self.vectors), tile_chunks):
            rows = slice(start, start + tile_chunks)
            scalars = self.scalars[:, :, rows], self.mean_scalars[:, :, rows]
            yield self.first + start, Tile(self.vectors[rows], scalars[0], self.means[rows], scalars[1], self.spreads[rows])

    def components(self, ask: Ask, keys: Keys, form: Form, rows: Sequence[Sequence[int]]) -> list[Tensor]:
        """Of each question for rows of its own."""
        if form.name == "summed" and not keys.liftable:
            return by_tile(self.tiles(ALIGN), ask, keys, form, rows)
        places = [torch.tensor(mine, dtype=torch.int64, device=self.vectors.device) - self.first for mine in rows]
        return components(ask, keys, form, Tile(self.vectors, self.scalars, self.means, self.mean_scalars, self.spreads), places)


def best(tiles: Tiles, scorer: Scorer, k: int, normalisers: Tensor | None, rough: bool = False) -> TopK:
    """The k best of some tiles; of a mixture with the normalisers [B, C] of the whole pool, in float32 where the scorer is `rough`."""
    if normalisers is None:
        return scoring.top_k(tiles, lambda tile: scorer(tile)[:, 0], k)
    sums = normalisers.float() if rough else normalisers
    return scoring.top_k(tiles, lambda tile: scoring.log_mixture(scorer(tile), sums.to(tile.vectors.device)), k)


def components(ask: Ask, keys: Keys, form: Form, chosen: Tile, places: Sequence[Tensor]) -> list[Tensor]:
    """Of each question for chunks of its own, `places` among those chosen: [C, n_b] float32."""
    pooled, scalars = chosen.vectors, chosen.scalars
    if ask.kind != "mixed" and all(torch.equal(at, places[0]) for at in places[1:]):
        z = ask.scorer(keys, form, scalars is not None)(chosen.rows(places[0])).cpu()  # one product for all questions
        return list(z) if len(places[0]) else [torch.empty(ask.components, 0) for _ in places]
    if ask.kind != "mixed" and form.name in ("exact", "head_space"):
        name = cheaper(keys, (1, *ask.queries.shape[1:]), scalars is not None) if form.name == "exact" else form.name
        layers = LayerScorer(ask.queries, keys, ask.weights, ask.kind, form=name, temperature=ask.temperature)
        mine = ((pooled[at], None if scalars is None else scalars[:, :, at]) for at in places)
        return [each.cpu() for each in layers.of_chosen(mine)]
    if form.name == "summed" and (scalars is None or not keys.liftable):  # keys made once for all questions
        z = ask.scorer(keys, form)(Tile(pooled)).cpu()
        return [z[question][:, at.cpu()] for question, at in enumerate(places)]
    if form.name != "linear":
        chosen = Tile(pooled, scalars)
    elif chosen.means is not None:  # it asks for no other vectors
        chosen = chosen._replace(vectors=chosen.means, scalars=None)
    found = []
    for question, at in enumerate(places):
        scorer = ask.part(question).scorer(keys, form, scalars is not None)
        parts = [scorer(chosen.rows(part))[0].cpu() for part in at.split(PART) if len(part)]
        found.append(torch.cat(parts, dim=1) if parts else torch.empty(ask.components, 0))
    return found


def by_tile(tiles: Tiles, ask: Ask, keys: Keys, form: Form, rows: Sequence[Sequence[int]]) -> list[Tensor]:
    """The same of rows of the pool, with one tile of it in memory at a time."""
    wanted = [torch.tensor(mine, dtype=torch.int64) for mine in rows]
    found = [torch.empty(ask.components, len(mine)) for mine in rows]
    for first, tile in tiles:
        inside = [((each >= first) & (each < first + len(tile.vectors))).nonzero().flatten() for each in wanted]
        union = torch.cat([each[at] for each, at in zip(wanted, inside, strict=True)]).unique()
        if not len(union):
            continue
        device = tile.vectors.device
        places = [torch.searchsorted(union, each[at]).to(device) for each, at in zip(wanted, inside, strict=True)]
        parts = components(ask, keys, form, tile.rows((union - first).to(device)), places)
        for mine, at, part in zip(found, inside, parts, strict=True):
            mine[:, at] = part
    return found


class Tokens:
    """Components of chunks by all their token states, in place of the pooled vectors.

    `states_of` reads the states of rows of the pool, [n_tokens, d] each. Chunks of like length are scored together; a shorter one is filled
    up with its own states again, which changes no maximum. What a chunk's keys cost is paid once: their scalars are kept, in SCALARS bytes
    at most, and queries go against the states themselves (`reverse`). Memory beside that: one question's chunks.
    """

    def __init__(self, keys: Keys, states_of: Callable[[Sequence[int]], list[Tensor]]) -> None:
        self._keys, self._states_of = keys, states_of
        self._scalars: dict[int, Tensor] = {}  # [L, G, P] of a row, filled up
        self._room = SCALARS

    def __call__(self, ask: Ask, rows: Sequence[Sequence[int]]) -> list[Tensor]:
        """Of each question for chunks given by rows of the pool: [C, n_b] float32."""
        found = []
        for question, mine in enumerate(rows):
            states = self._states_of(mine)
            sizes = [-(-len(each) // LENGTHS) * LENGTHS for each in states]
            z = torch.empty(1, 0)
            for size in sorted(set(sizes)):
                places = [place for place, each in enumerate(sizes) if each == size]
                filled = torch.stack([states[place][torch.arange(size) % len(states[place])] for place in places])
                tile = self._tile(filled.to(self._keys.projections.device), [mine[place] for place in places], ask.kind)
                part = components(ask.part(question), self._keys, Form(), tile, [torch.arange(len(places), device=tile.vectors.device)])[0]
                z = z if z.numel() else part.new_empty(len(part), len(mine))
                z[:, places] = part
            found.append(z)
        return found

    def _tile(self, filled: Tensor, rows: Sequence[int], kind: str) -> Tile:
        if kind == "mixed" or not self._keys.liftable:
            return Tile(filled)
        known = [self._scalars.get(row) for row in rows]
        missing = [place for place, each in enumerate(known) if each is None]
        if missing:
            for place, each in zip(missing, self._keys.scalars(filled[missing]).unbind(2), strict=True):
                known[place] = each
                size = each.numel() * each.element_size()
                if size <= self._room:
                    self._room -= size
                    self._scalars[rows[place]] = each.clone()
        return Tile(filled, torch.stack([each for each in known if each is not None], dim=2))


class Pool(Protocol):
    """What a search asks of a pool, wherever it lies."""

    def __len__(self) -> int: ...
    def log_sums(self, ask: Ask, form: Form) -> Tensor:
        """[B, C] float64, rounded."""

    def best(self, ask: Ask, form: Form, k: int, normalisers: Tensor | None) -> TopK: ...
    def components(self, ask: Ask, form: Form, rows: Sequence[Sequence[int]]) -> list[Tensor]:
        """Of each question for rows of its own: [C, n_b] float32."""


class Local:
    """The pool in this process: streamed from the store, a tile at a time while the next is read, or kept in memory."""

    def __init__(self, source: Source, keys: Keys, tile_chunks: int, device: torch.device | str, in_memory: bool = False) -> None:
        self.source, self.keys, self.device = source, keys.to(device), device
        self.tile_chunks = aligned(tile_chunks)
        self.in_memory = in_memory
        self._resident: Resident | None = None

    def __len__(self) -> int:
        return len(self.source)

    def log_sums(self, ask: Ask, form: Form) -> Tensor:
        return scoring.log_normalisers(self._tiles(), ask.scorer(self.keys, form, self.in_memory))  # type: ignore[arg-type]

    def best(self, ask: Ask, form: Form, k: int, normalisers: Tensor | None) -> TopK:
        return best(self._tiles(), ask.scorer(self.keys, form, self.in_memory), k, normalisers, form.rough)

    def components(self, ask: Ask, form: Form, rows: Sequence[Sequence[int]]) -> list[Tensor]:
        if self.in_memory:
            return self._loaded().components(ask, self.keys, form, rows)
        union = sorted({row for mine in rows for row in mine})
        if len(union) >= ALIGN and len(union) * MANY >= len(self):  # whole tiles take less than rows
            return by_tile(self._tiles(), ask, self.keys, form, rows)
        pooled, place = self.source.pooled(union).to(self.device), {row: index for index, row in enumerate(union)}
        places = [torch.tensor([place[row] for row in mine], dtype=torch.int64, device=self.device) for mine in rows]
        return components(ask, self.keys, form, Tile(pooled), places)

    def vectors(self) -> Iterator[tuple[int, Tensor]]:
        """(first row, pooled [n, P, d]) of all rows; in memory they are of the keys' type."""
        return ((first, tile.vectors) for first, tile in self._tiles())

    def _loaded(self) -> Resident:
        if self._resident is None:
            self._resident = Resident(self.source, self.keys, (0, len(self.source)), self.device)
        return self._resident

    def _tiles(self) -> Iterator[tuple[int, Tile]]:
        if self.in_memory:
            yield from self._loaded().tiles(self.tile_chunks)
        else:
            for first, vectors in self.source.tiles(self.tile_chunks):
                yield first, Tile(vectors.to(self.device), None)


def aligned(chunks: int) -> int:
    """The next multiple of ALIGN."""
    return -(-chunks // ALIGN) * ALIGN
