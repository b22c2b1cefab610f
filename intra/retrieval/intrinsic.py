"""The best chunks of the whole pool by s_i, by the scorer that is configured, and the check that an approximate one is good enough.

`retriever.search.scorer`:
    exact        head_space or, in float32, where both rank alike, reverse: whichever takes fewer operations (`pools.cheaper`); the default
    int8         a scan in integers; its best `candidates` a question are scored again, exactly. With `heads` below 1 it leaves out the
                 heads that weigh least (`scorers.strongest`, on the first CHECKED questions and the pool's first chunks)
    cascade      a scan with one vector a chunk and one query vector a layer and key-value head (`scorers.Linear`); its best
                 `coarse_candidates` a question by one query vector a head (`scorers.Summed`), a smaller pool by that alone; of these the
                 best `candidates` exactly
    auto         exact for `mixed` (it is cheap) and for pools of fewer than AUTO_CHUNKS times `candidates` chunks; else cascade
    head_space, reverse, paper     that form and no other

The first CHECKED questions are searched exactly. An approximate scorer is compared with that, once, as deep as the rest of the search needs
it: where it keeps less than `recall` of the exact ranking the exact one takes over for the other questions, and a line says so. Neither
the batches in which questions come nor the device changes what is chosen.

A mixture's softmax is over the whole pool: an approximate scorer takes its normalisers from its own scan, `corrected` by the
candidates' exact components.

`retriever.search.rescore` scores the best so many of these (at least as many as are asked for) again, by the keys of all their token states
instead of the pooled vectors: what the decoder's own attention compares its queries with. The normalisers are `corrected` by them in
the same way.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from intra.retrieval import scoring
from intra.retrieval.pools import Ask, Form, Pool
from intra.retrieval.scorers import Keys, strongest
from intra.retrieval.scoring import Scored

if TYPE_CHECKING:
    from intra.config import SearchConfig

CHECKED = 16  # questions on which an approximate scorer is compared with the exact one
AUTO_CHUNKS = 20  # a pool of fewer times `candidates` chunks is scanned exactly for little more
_SCANS = ("cascade", "int8")
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
    rows, sums = scanned(pool, ask, form, max(k, candidates, coarse if form.name == "linear" else 0))
    return followed(pool, ask, k, form, rows, sums, candidates)


def cascade(pool: Pool, coarse: int) -> Form:
    """Its scan: where all chunks may go on to `summed` queries, these alone."""
    return Form("linear" if len(pool) > coarse else "summed")


def scanned(pool: Pool, ask: Ask, form: Form, count: int) -> tuple[Tensor, Tensor | None]:
    """The first half of `approximate`: the best rows of each question in `form`, int64 [B, count at most], and a mixture's normalisers by
    it, [B, C]."""
    sums = pool.log_sums(ask, form) if ask.kind == "mixture" else None
    return pool.best(ask, form, count, sums).rows, sums


def followed(pool: Pool, ask: Ask, k: int, form: Form, rows: Tensor, sums: Tensor | None, candidates: int) -> Found:
    """The second half: the best k of these rows by their exact scores."""
    exactly = functools.partial(_components, pool, Form())
    if form.name == "linear" and rows.shape[1] > max(k, candidates):
        linear, one_query = functools.partial(_components, pool, form), functools.partial(_components, pool, Form("summed"))
        rows, _, sums = _again(ask, rows, max(k, candidates), sums, candidates, linear, one_query)
        form = Form("summed")
    return again(ask, rows, k, sums, candidates, functools.partial(_components, pool, form), exactly)


def again(ask: Ask, rows: Tensor, k: int, sums: Tensor | None, depth: int, rough: Rescorer, true: Rescorer) -> Found:
    """The best k of `rows` [B, m] by their `true` components. `sums`: normalisers of a mixture by the `rough` ones, which the first `depth`
    rows correct: of as many as any k gives."""
    best, scores, normalisers = _again(ask, rows, k, sums, depth, rough, true)
    pairs = [list(zip(mine, each, strict=True)) for mine, each in zip(best.tolist(), scores.tolist(), strict=True)]
    return Found(pairs, normalisers)


def _again(
    ask: Ask, rows: Tensor, k: int, sums: Tensor | None, depth: int, rough: Rescorer, true: Rescorer
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    z = torch.stack(true(ask, rows.tolist()))  # [B, C, m]
    if sums is None:
        scores, normalisers = z[:, 0], None
    else:
        own = torch.stack(rough(ask, rows[:, :depth].tolist()))
        normalisers = corrected(sums.cpu(), own, z[:, :, :depth])
        scores = scoring.log_mixture(z, normalisers).float()
    upwards, place = rows.sort(dim=1)  # of equal scores the lower row first
    scores, order = scores.gather(1, place).sort(dim=1, descending=True, stable=True)
    return upwards.gather(1, order[:, :k]), scores[:, :k], normalisers


def _components(pool: Pool, form: Form, ask: Ask, rows: Sequence[Sequence[int]]) -> list[Tensor]:
    return pool.components(ask, form, rows)


def corrected(sums: Tensor, rough: Tensor, true: Tensor) -> Tensor:
    """Normalisers [B, C] of a scan, moved by what its candidates' sum moves from their rough components [B, C, m] to the true ones.

    So a scan may be off by a constant of each question and component, as one without the maximum over a chunk's vectors is.
    """
    return scoring.rounded(sums + torch.logsumexp(true.double(), dim=2) - torch.logsumexp(rough.double(), dim=2))


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
        found = exact(self.pool, asks[-1], depth)
        truth.extend(found.pairs)
        if len(truth) == CHECKED:
            self._chosen[k] = self._checked(name, Ask.joined(asks), truth, depth)
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
