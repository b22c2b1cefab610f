"""The methods `intra`, `maxsim` and `s0_reranked`, behind `intra.method.Method`, and the passes they share.

    passes = Passes(backbone, store, retriever)
    for method in methods(passes, answer_size=5, answer_initial=1): ...

Per question: S_0 over the whole pool; one retrieval pass of the decoder over the stored states of S_0's first n_0 chunks; s_i of
every chunk. Each is computed once for a question, whichever method asks first. Memory does not grow with the pool.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from tqdm import tqdm

from intra.config import SearchConfig
from intra.data import schema
from intra.data.schema import Question
from intra.errors import UserError
from intra.method import Method, Ranking, Rankings
from intra.retrieval import initial, intrinsic, scoring
from intra.retrieval.intrinsic import Searcher
from intra.retrieval.pools import Ask, Form, Local, Pool, Tokens
from intra.retrieval.scorers import ALIGN, Keys, fast_integers
from intra.retrieval.scoring import Scored

if TYPE_CHECKING:
    from intra.backbone.model import Backbone, Memory
    from intra.retrieval.retriever import Retriever
    from intra.store.reader import ChunkStore


class Passes:
    """S_0, the retrieval pass and s_i for sets of questions; keeps the best rows of each question it has seen."""

    def __init__(
        self,
        backbone: Backbone,
        store: ChunkStore,
        retriever: Retriever,
        *,
        query_batch: int = 16,
        tile_chunks: int = 2048,
        search: SearchConfig | None = None,
        beside: Passes | None = None,
    ) -> None:
        """`beside`: other passes over the same pooled vectors, whose memory or workers these share; None: new ones, for which Ray must be
        connected with `search.workers`.

        Raises UserError where backbone, store and retriever do not fit each other, or no worker fits the cluster.
        """
        retriever.check(backbone)
        retriever.check_store(store.hidden_size, store.pooled_length)
        self.backbone, self.store, self.retriever = backbone, store, retriever
        self.query_batch, self.tile_chunks = query_batch, tile_chunks
        settings = search or SearchConfig()
        keys = Keys.of(backbone)
        pool: Pool
        if beside is not None:
            pool = beside.searcher.pool
        elif settings.workers:
            pool = _fleet(store, keys, settings, tile_chunks)
        else:
            pool = Local(store, keys, tile_chunks, backbone.device, settings.in_memory)
            if settings.scorer == "int8" and not fast_integers():
                said = "search: without AVX512 integers multiply no faster than float32: retriever.search.scorer=int8 saves no time"
                print(f"{said}; take cascade or exact", file=sys.stderr)

        def prune(ask: Ask) -> Form:
            _, pooled = next(iter(store.tiles(min(ALIGN, len(store)))))
            return intrinsic.pruned(ask, keys, pooled.to(backbone.device, backbone.dtype), settings.heads)

        tokens = Tokens(keys, lambda rows: store.states([store.chunk_ids[row] for row in rows]))
        self.searcher: Searcher = Searcher(pool, settings, prune, tokens)
        self._beside, self._in_memory = beside, settings.in_memory
        self._initial: dict[str, Scored] = {}
        self._intrinsic: dict[str, Scored] = {}
        self._context: dict[str, Scored] = {}
        self._normalisers: dict[str, Tensor] = {}  # log-normaliser of each component over the pool

    @functools.cached_property
    def _chunks(self) -> initial.Chunks:
        """The pool's side of S_0. In memory `dot` compares the vectors that s_i is made of, where these are not rounded."""
        if self._beside is not None:
            return self._beside._chunks
        pool, device = self.searcher.pool, self.backbone.device
        space = initial.Space(self.retriever.settings.initial_scoring, self.store, device)
        rounded = self.store.dtype == "float32" and self.backbone.dtype != torch.float32
        if self._in_memory and space.kind == "dot" and isinstance(pool, Local) and not rounded:
            return initial.Chunks(space, pool.vectors, device)
        return initial.Chunks(space, functools.partial(self.store.tiles, self.tile_chunks), device, keep=self._in_memory)

    def check(self, pool: schema.Pool) -> None:
        """Raises UserError where the store does not hold the pool's chunks in the pool's order."""
        if list(self.store.chunk_ids) != pool.chunk_ids:
            raise UserError(
                f"the chunk store holds {len(self.store)} chunks that are not the {len(pool)} of the pool; run workflows/encode.py"
            )

    def initial(self, questions: Sequence[Question], k: int) -> dict[str, Scored]:
        """The k best chunks by S_0's score (at least n_0 are kept), by question id."""
        k = max(k, self.retriever.settings.initial_context)
        todo = _lacking(self._initial, questions, min(k, len(self.store)))
        texts = [question.question for question in todo]
        found = (scored for best in initial.search(self.backbone, self._chunks, texts, k) for scored in best.pairs())
        self._initial.update(zip((question.question_id for question in todo), found, strict=True))
        return {question.question_id: self._initial[question.question_id] for question in questions}

    def remember(self, rankings: Rankings) -> None:
        """S_0's rankings, as `MaxSim` gives them, of questions for which the pool need not be searched again."""
        for key, ranking in rankings.items():
            if len(ranking) > len(self._initial.get(key, [])):
                rows = self.store.rows([chunk_id for chunk_id, _ in ranking])
                self._initial[key] = [(row, score) for row, (_, score) in zip(rows, ranking, strict=True)]

    def intrinsic(self, questions: Sequence[Question], k: int) -> dict[str, Scored]:
        """The k best chunks of the whole pool by s_i (Eq. 4), by question id: raw scores."""
        todo = _lacking(self._intrinsic, questions, min(k, len(self.store)))
        with torch.no_grad():
            for batch, queries in self.retrieval_pass(todo, "s_i over the pool"):
                self._find(batch, Ask.of(self.retriever, queries, self.backbone), k)
        return {question.question_id: self._intrinsic[question.question_id] for question in questions}

    def _find(self, batch: Sequence[Question], ask: Ask, k: int) -> None:
        found = self.searcher.find(ask, k)
        self._remember(batch, found.normalisers)
        self._intrinsic.update(zip((question.question_id for question in batch), found.pairs, strict=True))

    def context(self, questions: Sequence[Question], k: int) -> dict[str, Scored]:
        """S_0's first n_0 chunks, ordered by s_i, by question id: raw scores. Where a mixture's normalisers come from a search of the pool,
        it is for the k best, which `intrinsic` then has."""
        n_0 = self.retriever.settings.initial_context
        if n_0 == 0:
            return {question.question_id: [] for question in questions}
        todo = _lacking(self._context, questions, min(n_0, len(self.store)))
        rows_of = {key: sorted(row for row, _ in scored[:n_0]) for key, scored in self.initial(todo, n_0).items()}
        with torch.no_grad():
            for batch, queries in self.retrieval_pass(todo, "s_i of S_0"):
                rows = [rows_of[question.question_id] for question in batch]
                scores = self._scores(batch, Ask.of(self.retriever, queries, self.backbone), rows, k)
                for question, mine, each in zip(batch, rows, scores, strict=True):
                    scored = list(zip(mine, each.tolist(), strict=True))
                    self._context[question.question_id] = sorted(scored, key=lambda pair: (-pair[1], pair[0]))
        return {question.question_id: self._context[question.question_id] for question in questions}

    def _scores(self, batch: Sequence[Question], ask: Ask, rows: Sequence[Sequence[int]], k: int) -> list[Tensor]:
        """s_i of rows of each question's own: [n_b]. A mixture's normalisers are taken over the whole pool, once for a question."""
        z = self.searcher.components(ask, rows)
        if ask.kind != "mixture":
            return [each[0] for each in z]
        if any(question.question_id not in self._normalisers for question in batch):
            found = self.searcher.normalisers(ask)
            if found is None:
                self._find(batch, ask, k)
            self._remember(batch, found)
        sums = [self._normalisers[question.question_id] for question in batch]
        return [scoring.log_mixture(each[None], mine[None])[0].float() for each, mine in zip(z, sums, strict=True)]

    def _remember(self, batch: Sequence[Question], normalisers: Tensor | None) -> None:
        if normalisers is not None:
            self._normalisers.update((question.question_id, mine) for question, mine in zip(batch, normalisers.cpu(), strict=True))

    def retrieval_pass(self, questions: Sequence[Question], what: str) -> Iterator[tuple[list[Question], Tensor]]:
        """Batches of questions with their queries [B, L, H, R, e]."""
        n_0 = self.retriever.settings.initial_context
        first_chunks = self.initial(questions, n_0) if n_0 else {question.question_id: [] for question in questions}
        tokens = self.retriever.tokens.to(self.backbone.device)
        with tqdm(total=len(questions), desc=what, unit="question", disable=None) as bar:
            for first in range(0, len(questions), self.query_batch):
                batch = list(questions[first : first + self.query_batch])
                rows = [[row for row, _ in first_chunks[question.question_id]] for question in batch]
                memory = read_context(self.backbone, self.store, rows, n_0)
                yield batch, self.backbone.queries(self.backbone.prompt_ids([q.question for q in batch]), tokens, memory)
                bar.update(len(batch))


def _fleet(store: ChunkStore, keys: Keys, settings: SearchConfig, tile_chunks: int) -> Pool:
    from intra.retrieval.fleet import Fleet
    from intra.store.reader import ChunkStore

    opens = functools.partial(ChunkStore, store.url)
    return Fleet(
        opens, len(store), keys, workers=settings.workers, parts=settings.parts, threads=settings.threads, gpus=settings.gpus_per_worker,
        tile_chunks=tile_chunks,
    )  # fmt: skip


def read_context(backbone: Backbone, store: ChunkStore, rows: Sequence[Sequence[int]], n_0: int) -> Memory:
    """The stored states of each question's first n_0 rows, packed; each chunk is read once. n_0 = 0: an empty memory."""
    union = sorted({row for mine in rows for row in mine[:n_0]})
    states = dict(zip(union, store.states([store.chunk_ids[row] for row in union]), strict=True)) if union else {}
    return backbone.pack([[states[row] for row in mine[:n_0]] for mine in rows])


class MaxSim:
    """S_0's own ranking, with its scores."""

    name = "maxsim"

    def __init__(self, passes: Passes) -> None:
        self.passes = passes

    def index(self, pool: schema.Pool) -> None:
        self.passes.check(pool)

    def search(self, questions: Sequence[Question], k: int) -> Rankings:
        ids = self.passes.store.chunk_ids
        return {key: [(ids[row], score) for row, score in scored[:k]] for key, scored in self.passes.initial(questions, k).items()}


class Reranked:
    """S_0's first n_0 chunks reordered by s_i, then the rest of S_0. Scores: 1/rank, as the two parts have no common scale."""

    name = "s0_reranked"

    def __init__(self, passes: Passes) -> None:
        self.passes = passes

    def index(self, pool: schema.Pool) -> None:
        self.passes.check(pool)

    def search(self, questions: Sequence[Question], k: int) -> Rankings:
        rest, first = self.passes.initial(questions, k), self.passes.context(questions, k)
        return {key: _by_rank(_distinct([*first[key], *rest[key]]), self.passes.store, k) for key in rest}


class Intra:
    """INTRA's ranking: the answer set first, then the other chunks by s_i.

    Answer set: the top `answer_size - answer_initial` by s_i, then the top `answer_initial` of S_0, without duplicates, refilled by s_i
    to `answer_size` (the paper's 4 + 1). Scores: 1/rank of that order; `raw` gives s_i itself.
    """

    name = "intra"

    def __init__(self, passes: Passes, answer_size: int = 5, answer_initial: int = 1) -> None:
        self.passes = passes
        self.answer_size, self.answer_initial = answer_size, answer_initial

    def index(self, pool: schema.Pool) -> None:
        self.passes.check(pool)

    def search(self, questions: Sequence[Question], k: int) -> Rankings:
        depth = max(k, self.answer_size)
        # As deep as S_0's own method will ask for it, so that it is searched once.
        first = self.passes.initial(questions, depth) if self.answer_initial else {}
        found = self.passes.intrinsic(questions, depth)
        rankings = {}
        for key, scored in found.items():
            rows = compose([row for row, _ in scored], [row for row, _ in first.get(key, [])], self.answer_size, self.answer_initial)
            rankings[key] = _by_rank(rows, self.passes.store, k)
        return rankings

    def raw(self, questions: Sequence[Question], k: int) -> Rankings:
        """The top k by s_i alone, with s_i as the score (S_INTRA of Eq. 4)."""
        ids = self.passes.store.chunk_ids
        return {key: [(ids[row], score) for row, score in scored[:k]] for key, scored in self.passes.intrinsic(questions, k).items()}


def methods(passes: Passes, answer_size: int = 5, answer_initial: int = 1) -> list[Method]:
    return [Intra(passes, answer_size, answer_initial), MaxSim(passes), Reranked(passes)]


def compose(intrinsic: Sequence[int], first: Sequence[int], answer_size: int, answer_initial: int) -> list[int]:
    """INTRA's order of rows from the order by s_i and the order of S_0."""
    return _distinct([(row, 0.0) for row in [*intrinsic[: answer_size - answer_initial], *first[:answer_initial], *intrinsic]])


def _distinct(scored: Sequence[tuple[int, float]]) -> list[int]:
    return list(dict.fromkeys(row for row, _ in scored))


def _by_rank(rows: Sequence[int], store: ChunkStore, k: int) -> Ranking:
    return [(store.chunk_ids[row], 1.0 / rank) for rank, row in enumerate(rows[:k], start=1)]


def _lacking(known: dict[str, Scored], questions: Sequence[Question], depth: int) -> list[Question]:
    return [question for question in questions if question.question_id not in known or len(known[question.question_id]) < depth]
