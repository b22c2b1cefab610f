"""Retrieval by vectors: dense (one vector a text, by faiss) and late interaction (one a token, exact MaxSim).

Exact search goes once over the encoded corpus for all questions. Memory: a shard, and the best k of each question. A dense model may be
searched by an inverted file instead (`ivf`): all its vectors in memory, and a recall against exact search, which is measured and told.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from intra.baselines.corpus import Block, Corpus, tell_cut
from intra.baselines.models import Floats, operations
from intra.data.schema import Pool, Question
from intra.errors import UserError
from intra.evaluate_config import IvfConfig
from intra.method import Ranking, Rankings, ordered

_SPARE = 16  # candidates beyond k: more than rounding may reorder
_SAMPLE = 64  # texts a cell of an inverted file, on which the cells are found
_QUESTIONS_AT_ONCE = 64  # of an inverted file: their candidates' vectors are in memory
_PRODUCTS = 2**18  # of late interaction: what is kept at once stays in a processor's cache


class _Vectors(ABC):
    def __init__(self, name: str, corpus: Callable[[Pool], Corpus]) -> None:
        self.name = name
        self._open = corpus
        self._asked: set[str] = set()  # ids of the questions whose length has been looked at

    def index(self, pool: Pool) -> None:
        """Encodes what is not encoded, and loads the model for the questions."""
        self._corpus = self._open(pool)
        self._corpus.complete()
        self._encoder = self._corpus.encoder

    @property
    def corpus(self) -> Corpus:
        return self._corpus

    def search(self, questions: Sequence[Question], k: int) -> Rankings:
        best: list[Ranking] = [[] for _ in questions]
        queries = self._queries(questions)
        for block in self._corpus.blocks() if questions else ():
            for place, (rows, scores) in enumerate(self._best(queries, block, k)):
                owners = (self._corpus.owners[block.first + row] for row in rows)
                found = [(chunk, score) for chunks, score in zip(owners, scores, strict=True) for chunk in chunks]
                best[place] = ordered([*best[place], *found], k)
        return {question.question_id: ranking for question, ranking in zip(questions, best, strict=True)}

    def scores(self, questions: Sequence[Question], candidates: Mapping[str, Sequence[str]]) -> dict[str, list[float]]:
        """The score of each question's candidate chunks."""
        row_of = {chunk: row for row, chunks in enumerate(self._corpus.owners) for chunk in chunks}
        queries = self._queries(questions)
        rows = [[row_of[chunk] for chunk in candidates[question.question_id]] for question in questions]
        found: list[dict[int, float]] = [{} for _ in questions]
        for block in self._corpus.blocks() if questions else ():
            for query, wanted, mine in zip(queries, rows, found, strict=True):
                inside = sorted({row - block.first for row in wanted if 0 <= row - block.first < len(block)})
                if inside:
                    scores = self._score(query, block, inside)
                    mine.update(zip((block.first + row for row in inside), scores, strict=True))
        return {question.question_id: [mine[row] for row in wanted] for question, wanted, mine in zip(questions, rows, found, strict=True)}

    def operations(self, questions: Sequence[Question]) -> float:
        """Of a search: the questions' encoding, and an inner product of every question vector with every vector of the corpus."""
        texts, facts = [question.question for question in questions], self._corpus.facts
        model = self._encoder.model
        vectors = sum(len(query) for query in self._queries(questions))
        return operations(model, model.tokenizer, texts) + 2.0 * vectors * facts["vectors"] * facts["dimension"]

    def scoring_operations(self, questions: Sequence[Question], depth: int) -> float:
        """Of the scores of so many candidates of each question."""
        texts, facts, model = [question.question for question in questions], self._corpus.facts, self._encoder.model
        vectors = sum(len(query) for query in self._queries(questions))
        mean = facts["vectors"] / max(facts["texts"], 1)
        return operations(model, model.tokenizer, texts) + 2.0 * vectors * depth * mean * facts["dimension"]

    def _queries(self, questions: Sequence[Question]) -> list[Floats]:
        new = [question.question for question in questions if question.question_id not in self._asked]
        if new:
            tell_cut(self.name, self._encoder.cut_questions(new), len(new), "questions")
            self._asked |= {question.question_id for question in questions}
        return self._encoder.questions([question.question for question in questions]) if questions else []

    @abstractmethod
    def _best(self, queries: Sequence[Floats], block: Block, k: int) -> Iterator[tuple[list[int], list[float]]]:
        """For each query the k best texts of the block, and perhaps more, with their scores, in any order."""

    @abstractmethod
    def _score(self, query: Floats, block: Block, rows: Sequence[int]) -> list[float]: ...


class Dense(_Vectors):
    """Inner products. faiss proposes candidates in float32; each is scored again in float64 by itself, so that no score depends on the
    block that a text stood in."""

    def __init__(self, name: str, corpus: Callable[[Pool], Corpus], ivf: IvfConfig | None = None) -> None:
        super().__init__(name, corpus)
        self._ivf = ivf
        self.facts: dict[str, float] = {}  # of an approximate search

    def search(self, questions: Sequence[Question], k: int) -> Rankings:
        if self._ivf is None or not questions:
            return super().search(questions, k)
        index, lists = self._inverted(self._ivf), self._lists(self._ivf)
        found = self._from(index, questions, k)
        short = [question for question in questions if len(found[question.question_id]) < k]
        if short:  # the cells looked into hold fewer: all of them do not
            index.nprobe = lists
            found |= self._from(index, short, k)
        count = min(self._ivf.checked, len(questions))
        checked = [questions[place * len(questions) // count] for place in range(count)]
        exact = super().search(checked, k)
        hits = sum(len({chunk for chunk, _ in found[key]} & {chunk for chunk, _ in ranking}) for key, ranking in exact.items())
        recall = hits / sum(len(ranking) for ranking in exact.values())
        probes = min(self._ivf.probes, lists)
        self.facts = {"ivf_lists": lists, "ivf_probes": probes, "ivf_recall": recall, "ivf_recall_k": k, "ivf_recall_questions": count,
                      "ivf_exhaustive": len(short)}  # fmt: skip
        print(f"{self.name}: inverted file of {lists:,} cells, {probes} read: {recall:.3f} of the exact top {k} ({count:,} questions)"
              + (f"; {len(short):,} questions read all" if short else ""))  # fmt: skip
        return found

    def operations(self, questions: Sequence[Question]) -> float:
        """Of a search; of an inverted file's, with cells of equal size."""
        if self._ivf is None:
            return super().operations(questions)
        lists = self._lists(self._ivf)
        read = lists + self._corpus.facts["vectors"] * min(1.0, self._ivf.probes / lists)
        return super().operations(questions) - 2.0 * len(questions) * self._corpus.facts["dimension"] * (
            self._corpus.facts["vectors"] - read
        )

    def _lists(self, ivf: IvfConfig) -> int:
        texts = self._corpus.facts["texts"]
        return min(texts, ivf.lists or max(1, round(4 * texts**0.5)))

    def _inverted(self, ivf: IvfConfig) -> Any:
        """The index of the whole corpus; its cells are found on a sample of _SAMPLE texts a cell."""
        faiss, lists, facts = _faiss(), self._lists(ivf), self._corpus.facts
        index = faiss.IndexIVFFlat(faiss.IndexFlatIP(facts["dimension"]), facts["dimension"], lists, faiss.METRIC_INNER_PRODUCT)
        index.cp.min_points_per_centroid = 1  # a small corpus is no reason to warn
        index.cp.max_points_per_centroid = _SAMPLE
        wanted = np.sort(np.random.default_rng(0).permutation(facts["texts"])[: _SAMPLE * lists])
        parts = []
        for block in self._corpus.blocks():
            rows = wanted[np.searchsorted(wanted, block.first) : np.searchsorted(wanted, block.first + len(block))] - block.first
            parts.append(block.vectors[rows])
        index.train(np.concatenate(parts))
        for block in self._corpus.blocks():
            index.add(block.vectors)
        index.nprobe = min(ivf.probes, lists)
        return index

    def _from(self, index: Any, questions: Sequence[Question], k: int) -> Rankings:
        """Scored again in float64, as in exact search: what both find has the same score."""
        queries = self._queries(questions)
        rankings: Rankings = {}
        for start in range(0, len(questions), _QUESTIONS_AT_ONCE):
            mine = np.concatenate(queries[start : start + _QUESTIONS_AT_ONCE])
            _, rows, vectors = index.search_and_reconstruct(mine, min(k + _SPARE, index.ntotal))
            for question, query, texts, values in zip(questions[start:], mine, rows, vectors, strict=False):
                scores = values.astype(np.float64) @ query.astype(np.float64)
                pairs = [(chunk, score) for row, score in zip(texts.tolist(), scores.tolist(), strict=True) if row >= 0
                         for chunk in self._corpus.owners[row]]  # fmt: skip
                rankings[question.question_id] = ordered(pairs, k)
        return rankings

    def _best(self, queries: Sequence[Floats], block: Block, k: int) -> Iterator[tuple[list[int], list[float]]]:
        faiss = _faiss()
        wanted = min(k + _SPARE, len(block))
        proposed, found = faiss.knn(np.concatenate(queries), block.vectors, wanted, metric=faiss.METRIC_INNER_PRODUCT)
        for query, scores, rows in zip(queries, proposed, found, strict=True):
            last = scores[min(k, wanted) - 1] - 1e-5 * max(1.0, float(abs(scores[0])))
            if wanted < len(block) and scores[-1] >= last:  # a tie that may go on behind the candidates
                rows = np.flatnonzero(block.vectors @ query[0] >= last)
            yield rows.tolist(), self._score(query, block, rows)

    def _score(self, query: Floats, block: Block, rows: Sequence[int]) -> list[float]:
        found: list[float] = (block.vectors[rows].astype(np.float64) @ query[0].astype(np.float64)).tolist()
        return found


class Late(_Vectors):
    """MaxSim: the sum over the question's tokens of the largest inner product with a token of the text."""

    def _best(self, queries: Sequence[Floats], block: Block, k: int) -> Iterator[tuple[list[int], list[float]]]:
        import torch

        scores = torch.from_numpy(self._maxsim(queries, block, range(len(block))))
        wanted = min(k, len(block))
        for row, kth in zip(scores, scores.topk(wanted, dim=1).values[:, -1], strict=True):
            rows = torch.nonzero(row >= kth)[:, 0]
            yield rows.tolist(), row[rows].tolist()

    def _score(self, query: Floats, block: Block, rows: Sequence[int]) -> list[float]:
        found: list[float] = self._maxsim([query], block, rows)[0].tolist()
        return found

    def _maxsim(self, queries: Sequence[Floats], block: Block, rows: Sequence[int]) -> Floats:
        """[questions, texts], float32. One product a text with all questions' tokens; what is shorter than `scorers.WIDE` is padded."""
        import torch

        from intra.retrieval.scorers import WIDE
        from intra.retrieval.scoring import GPU_BLOCK

        device = self._encoder.model.device
        starts = np.cumsum([0, *(len(query) for query in queries[:-1])])
        tokens = np.concatenate(queries)
        asked = torch.from_numpy(_repeated(tokens, WIDE)).to(device)
        products = GPU_BLOCK if asked.is_cuda else _PRODUCTS
        found = np.empty((len(queries), len(rows)), np.float32)
        for place, row in enumerate(rows):
            text = torch.from_numpy(_repeated(block.of(row), WIDE)).to(device)
            parts = asked.tensor_split(min(math.ceil(len(asked) * len(text) / products), len(asked) // WIDE))
            best = torch.cat([(text @ part.T).amax(dim=0) for part in parts]).cpu().numpy()
            found[:, place] = np.add.reduceat(best[: len(tokens)], starts)
        return found


def _repeated(vectors: Floats, least: int) -> Floats:
    """At least so many vectors, some of them repeated, which changes no maximum."""
    return vectors if len(vectors) >= least else np.resize(vectors, (least, vectors.shape[1]))


def _faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise UserError(f"dense retrieval needs faiss ({error}); run pip install '.[cpu]' in the project's folder (or '.[gpu]')") from error
    return faiss
