"""The best chunks of the whole pool by s_i, by the scorer that is configured, and the check that an approximate one is good enough.

`retriever.search.scorer`:
    exact        head_space or, in float32, where both rank alike, reverse: whichever takes fewer operations (`pools.cheaper`); the default
    int8         a scan in integers; its best `candidates` a question are scored again, exactly. With `heads` below 1 it leaves out the
                 heads that weigh least (`scorers.strongest`, on the first CHECKED questions and the pool's first chunks)
    cascade      a scan with one vector a chunk and one query vector a layer and key-value head (`scorers.Linear`), fitted to the exact
                 scores of SAMPLE chunks; its best `coarse_candidates` a question by one query vector a head (`scorers.Summed`), a smaller
                 pool by that alone; of these the best `candidates` exactly
    auto         exact for `mixed` (it is cheap) and for pools of fewer than AUTO_CHUNKS times `candidates` chunks; else cascade
    head_space, reverse, paper     that form and no other

The first CHECKED questions are searched exactly. An approximate scorer is compared with that, once, as deep as the rest of the search
needs it, and DEEP at least: where it keeps less than `recall` of the exact ranking the exact one takes over for the other questions, and a
line says so. Neither the batches in which questions come nor the device changes what is chosen.

A mixture's softmax is over the whole pool: an approximate scorer takes its normalisers from its own scan, in which the candidates' exact
components are `exchanged` for the rough ones; before that they are made level with the exact ones on SAMPLE chunks.

`retriever.search.rescore` scores the best so many of these (at least as many as are asked for) again, by the keys of all their token states
instead of the pooled vectors: what the decoder's own attention compares its queries with. The normalisers are `corrected` by them.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from intra.retrieval import scoring
from intra.retrieval.pools import Ask, Form, Pool
from intra.retrieval.scorers import Keys, strongest
from intra.retrieval.scoring import Scored

if TYPE_CHECKING:
    from intra.config import SearchConfig

SAMPLE = 512  # chunks on which a scan is made level with the exact scores
RIDGE = 1e-3  # of a feature's variance
FLAT = 1e-12
DEEP = 20  # chunks of each of them at least: among five of sixteen questions one is more than a hundredth
CHECKED = 16  # questions on which an approximate scorer is compared with the exact one
AUTO_CHUNKS = 20  # a pool of fewer times `candidates` chunks is scanned exactly for little more
_SCANS = ("cascade", "int8")
Mover = Callable[[Tensor, Tensor, Tensor], Tensor]  # `corrected`, `exchanged`
Rescorer = Callable[[Ask, Sequence[Sequence[int]]], list[Tensor]]  # `pools.Tokens`: components of each question for rows of its own


@dataclass(frozen=True)
class Found:
    pairs: list[Scored]  # of each question
    normalisers: Tensor | None  # [B, C] of a mixture


def exact(pool: Pool, ask: Ask, k: int, form: Form | None = None) -> Found:
    """Every chunk by an exact form (or the paper's)."""
    form = form or Form()
    normalisers = pool.log_sums(ask, form) if ask.kind == "mixture" else None
    return Found(pool.best(ask, form, k, normalisers).pairs(), normalisers)


def approximate(pool: Pool, ask: Ask, k: int, form: Form, candidates: int, coarse: int = 0) -> Found:
    """The best `candidates` (k at least) of a scan in `form`, ordered by their exact scores; of a `linear` one those that `summed` queries
    choose of its best `coarse`."""
    scan = scanned(pool, ask, form, max(k, candidates, coarse if form.name == "linear" else 0))
    return followed(pool, scan, k, form, candidates)


def cascade(pool: Pool, coarse: int) -> Form:
    """Its scan: where all chunks may go on to `summed` queries, these alone."""
    return Form("linear" if len(pool) > coarse else "summed")


class Scan(NamedTuple):
    """The first half of `approximate`."""

    ask: Ask  # with its `fit`
    rows: Tensor  # int64 [B, m], best first
    offset: Tensor  # [B, C] float64, what makes the scan's components level with the exact ones
    sums: Tensor | None  # normalisers of a mixture, [B, C], level


def scanned(pool: Pool, ask: Ask, form: Form, count: int) -> Scan:
    """The best rows of each question in `form`, `count` at most; made level with the exact ones (`sampled`) where it matters."""
    offset = torch.zeros(len(ask), ask.components, dtype=torch.float64)
    if form.name == "linear" or ask.kind == "mixture":
        ask, offset = sampled(pool, ask, form)
    if ask.kind != "mixture":
        return Scan(ask, pool.best(ask, form, count, None).rows, offset, None)
    sums = pool.log_sums(ask, form)
    return Scan(ask, pool.best(ask, form, count, sums).rows, offset, scoring.rounded(sums.cpu() + offset))


def sampled(pool: Pool, ask: Ask, form: Form) -> tuple[Ask, Tensor]:
    """On SAMPLE chunks, evenly spaced: the question with its `fit` for a linear form, by least squares, and by what the form's sum of
    exponentials lies below the exact components', log, [B, C] float64."""
    rows = [(torch.arange(min(SAMPLE, len(pool))) * len(pool) // min(SAMPLE, len(pool))).tolist()] * len(ask)

    def read(asked: Ask, which: Form) -> Tensor:
        return torch.stack(pool.components(asked, which, rows)).double()  # [B, C, m]

    true = read(ask, Form())
    if form.name == "linear":
        spreads = read(replace(ask, fit=torch.tensor([0.0, 1.0, 0.0]).expand(len(ask), ask.components, 3)), form)
        ask = replace(ask, fit=_least_squares(torch.stack([read(ask, form), spreads], dim=3), true).float())
    return ask, torch.logsumexp(true, dim=2) - torch.logsumexp(read(ask, form), dim=2)


def _least_squares(features: Tensor, wanted: Tensor) -> Tensor:
    """Coefficients [B, C, f + 1], the level last, of features [B, C, m, f] for what is wanted, [B, C, m]; all float64. A feature that
    does not vary gets none."""
    means, scales = features.mean(dim=2), features.std(dim=2, correction=0).clamp(min=FLAT)
    standard = (features - means[:, :, None]) / scales[:, :, None]
    level = wanted.mean(dim=2)
    squares = standard.transpose(2, 3) @ standard + RIDGE * features.shape[2] * torch.eye(features.shape[3], dtype=features.dtype)
    slopes = torch.linalg.solve(squares, standard.transpose(2, 3) @ (wanted - level[:, :, None])[..., None])[..., 0] / scales
    return torch.cat([slopes, (level - (slopes * means).sum(dim=2))[..., None]], dim=2)


def followed(pool: Pool, scan: Scan, k: int, form: Form, candidates: int) -> Found:
    """The second half: the best k by their exact scores."""
    ask, rows, offset, sums = scan
    if form.name == "linear" and rows.shape[1] > max(k, candidates):
        z = torch.stack(pool.components(ask, Form("summed"), rows.tolist()))
        rows, _ = _best(rows, _scores(z, sums), max(k, candidates))

    def level(asked: Ask, mine: Sequence[Sequence[int]]) -> list[Tensor]:
        return [each + moved[:, None] for each, moved in zip(pool.components(asked, form, mine), offset, strict=True)]

    return again(ask, rows, k, sums, rows.shape[1], level, functools.partial(_components, pool, Form()), exchanged)


def again(
    ask: Ask, rows: Tensor, k: int, sums: Tensor | None, depth: int, rough: Rescorer, true: Rescorer, move: Mover | None = None
) -> Found:  # fmt: skip
    """The best k of `rows` [B, m] by their `true` components. `sums`: normalisers of a mixture by the `rough` ones, which `move`
    (`corrected` where None) brings nearer by the first `depth` rows: as many as any k gives."""
    z = torch.stack(true(ask, rows.tolist()))  # [B, C, m]
    normalisers = None
    if sums is not None:
        own = torch.stack(rough(ask, rows[:, :depth].tolist()))
        normalisers = (move or corrected)(sums.cpu(), own, z[:, :, :depth])
    best, scores = _best(rows, _scores(z, normalisers), k)
    pairs = [list(zip(mine, each, strict=True)) for mine, each in zip(best.tolist(), scores.tolist(), strict=True)]
    return Found(pairs, normalisers)


def _scores(z: Tensor, normalisers: Tensor | None) -> Tensor:
    return z[:, 0] if normalisers is None else scoring.log_mixture(z, normalisers.cpu()).float()


def _best(rows: Tensor, scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best rows of each question and their scores; of equal ones the lower row first."""
    upwards, place = rows.sort(dim=1)
    scores, order = scores.gather(1, place).sort(dim=1, descending=True, stable=True)
    return upwards.gather(1, order[:, :k]), scores[:, :k]


def _components(pool: Pool, form: Form, ask: Ask, rows: Sequence[Sequence[int]]) -> list[Tensor]:
    return pool.components(ask, form, rows)


def corrected(sums: Tensor, rough: Tensor, true: Tensor) -> Tensor:
    """Normalisers [B, C] of a scan, moved by what its candidates' sum moves from their rough components [B, C, m] to the true ones: as if
    all other chunks' did the same."""
    return scoring.rounded(sums + torch.logsumexp(true.double(), dim=2) - torch.logsumexp(rough.double(), dim=2))


def exchanged(sums: Tensor, rough: Tensor, true: Tensor) -> Tensor:
    """The same where the other chunks are right as they are, in sum: the candidates' rough components give way to the true ones."""
    share = torch.exp(torch.logsumexp(rough.double(), dim=2) - sums).clamp(max=1.0)
    return scoring.rounded(torch.logaddexp(sums + torch.log1p(-share), torch.logsumexp(true.double(), dim=2)))


def recall(exact_pairs: Sequence[Scored], pairs: Sequence[Scored]) -> float:
    """Of the chunks in the exact rankings, the share that stands in the others."""
    kept = sum(len({row for row, _ in one} & {row for row, _ in other}) for one, other in zip(exact_pairs, pairs, strict=True))
    return kept / max(1, sum(len(one) for one in exact_pairs))


def pruned(ask: Ask, keys: Keys, pooled: Tensor, share: float) -> Form:
    """The integer scan by the strongest heads only."""
    kept = strongest(ask.queries, keys, ask.weights, pooled, share)
    return Form("int8", tuple(tuple(row) for row in kept.tolist()))


class Searcher:
    """Finds the best chunks of a pool for batches of questions. Remembers which scorer has passed its check, for each k."""

    def __init__(
        self, pool: Pool, settings: SearchConfig, sample: Callable[[Ask], Form] | None = None, tokens: Rescorer | None = None
    ) -> None:  # fmt: skip
        """`sample` chooses the heads of the integer scan by the first questions (`pruned`); `tokens` is for `settings.rescore`.

        Raises ValueError where it is wanted and not given.
        """
        if settings.rescore and tokens is None:
            raise ValueError("retriever.search.rescore needs the store's token states")
        self.pool, self.settings, self._sample, self._tokens = pool, settings, sample, tokens
        self._first: dict[int, tuple[list[Ask], list[Scored]]] = {}  # by k, until the check: questions, their exact rankings
        self._chosen: dict[int, Form] = {}  # by k, from then on

    def find(self, ask: Ask, k: int) -> Found:
        """Raises UserError where the scorer does not serve the scoring or the device."""
        found, depth = self._by_pooled(ask, k), self.settings.rescore
        if not depth or self._tokens is None:
            return found
        rows = torch.tensor([[row for row, _ in mine] for mine in found.pairs])
        return again(ask, rows, k, found.normalisers, depth, functools.partial(_components, self.pool, Form()), self._tokens)

    def _by_pooled(self, ask: Ask, k: int) -> Found:
        """The best max(k, rescore) by pooled vectors: of the first CHECKED questions exactly, then by what their check has chosen."""
        name, depth = self.scorer(ask.kind), max(k, self.settings.rescore)
        if name not in _SCANS:
            return exact(self.pool, ask, depth, Form(name))
        if chosen := self._chosen.get(k):
            return self._approximate(ask, depth, chosen) if chosen.name != "exact" else exact(self.pool, ask, depth)
        asks, truth = self._first.setdefault(k, ([], []))
        count = min(len(ask), CHECKED - len(truth))
        asks.append(ask.part(0, count))
        deep = max(depth, DEEP)
        found = exact(self.pool, asks[-1], deep)
        truth.extend(found.pairs)
        found = Found([mine[:depth] for mine in found.pairs], found.normalisers)
        if len(truth) == CHECKED:
            self._chosen[k] = self._checked(name, Ask.joined(asks), truth, deep)
            del self._first[k]
        if count == len(ask):
            return found
        others = self._by_pooled(ask.part(count, len(ask) - count), k)
        sums = [each.normalisers.cpu() for each in (found, others) if each.normalisers is not None]
        return Found(found.pairs + others.pairs, torch.cat(sums) if sums else None)

    def _approximate(self, ask: Ask, k: int, form: Form) -> Found:
        return approximate(self.pool, ask, k, form, self.settings.candidates, self.settings.coarse_candidates)

    def _checked(self, name: str, ask: Ask, truth: Sequence[Scored], depth: int) -> Form:
        """The scan `name`, or the exact form where it keeps too little of the exact rankings of these questions."""
        prune = self._sample if name == "int8" and self.settings.heads < 1 else None
        scan = cascade(self.pool, self.settings.coarse_candidates) if name != "int8" else Form("int8")
        form = scan if prune is None else prune(ask)
        kept = recall(truth, self._approximate(ask, depth, form).pairs)
        if kept >= self.settings.recall:
            return form
        print(
            f"search: {name} keeps {kept:.3f} of the exact top {depth} of {len(ask)} questions, less than "
            f"retriever.search.recall={self.settings.recall}; exact takes over",
            file=sys.stderr,
        )
        return Form()

    def components(self, ask: Ask, rows: Sequence[Sequence[int]]) -> list[Tensor]:
        """Exact components of each question for rows of its own (in the paper's form where that is configured): [C, n_b]."""
        if self.settings.rescore and self._tokens is not None:
            return [each.cpu() for each in self._tokens(ask, rows)]
        name = self.settings.scorer
        return self.pool.components(ask, Form("exact" if name in _SCANS or name == "auto" else name), rows)

    def normalisers(self, ask: Ask) -> Tensor | None:
        """[B, C] of a mixture, as `find` takes them; None where only `find` can tell."""
        name = self.scorer(ask.kind)
        return None if name in _SCANS or self.settings.rescore else self.pool.log_sums(ask, Form(name))

    def scorer(self, kind: str) -> str:
        """The scorer for such a scoring, by the rule above, before any check."""
        if self.settings.scorer != "auto":
            return self.settings.scorer
        return "exact" if kind == "mixed" or len(self.pool) < AUTO_CHUNKS * self.settings.candidates else "cascade"
