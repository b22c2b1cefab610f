"""Methods made of others: reranking of one method's first chunks, and reciprocal rank fusion of several."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from tqdm import tqdm

from intra.baselines.corpus import Corpus, tell_cut
from intra.baselines.models import Cross, operations
from intra.data.schema import Pool, Question
from intra.method import Ranking, Rankings, ordered

_QUESTIONS_AT_ONCE = 16
_TEXTS_MEASURED = 256


class Scorer(Protocol):
    def index(self, pool: Pool) -> None: ...

    def scores(self, questions: Sequence[Question], candidates: Mapping[str, Sequence[str]]) -> dict[str, list[float]]: ...
    def scoring_operations(self, questions: Sequence[Question], depth: int) -> float: ...


class CrossScorer:
    """Scores by a cross-encoder."""

    def __init__(self, name: str, model: Callable[[], Cross]) -> None:
        self._name = name
        self._make = model

    def index(self, pool: Pool) -> None:
        self._texts = dict(zip(pool.chunk_ids, pool.title_and_text(), strict=True))
        self._model = self._make()

    def scores(self, questions: Sequence[Question], candidates: Mapping[str, Sequence[str]]) -> dict[str, list[float]]:
        found: dict[str, list[float]] = {}
        cut = read = 0
        for start in tqdm(range(0, len(questions), _QUESTIONS_AT_ONCE), desc=self._name, unit="batch", disable=None):
            batch = questions[start : start + _QUESTIONS_AT_ONCE]
            # A text is read once for a question: its copies tie.
            pairs = dict.fromkeys((q.question, self._texts[chunk]) for q in batch for chunk in candidates[q.question_id])
            score = dict(zip(pairs, self._model.scores(list(pairs)), strict=True))
            cut, read = cut + self._model.cut(list(pairs)), read + len(pairs)
            for q in batch:
                found[q.question_id] = [score[q.question, self._texts[chunk]] for chunk in candidates[q.question_id]]
        tell_cut(self._name, cut, read, "pairs of question and text")
        return found

    def scoring_operations(self, questions: Sequence[Question], depth: int) -> float:
        """By the mean of the first texts of the pool: candidates are not read again for their length."""
        texts = list(self._texts.values())[:_TEXTS_MEASURED]
        pairs = [(question.question, text) for question, text in zip(questions, itertools.cycle(texts), strict=False)]
        return depth * operations(self._model.model, self._model.model.tokenizer, pairs)


class Rerank:
    """The first chunks of another method, in the order of a model's scores."""

    def __init__(self, name: str, first: Callable[[], Rankings], scorer: Scorer) -> None:
        """`first` gives the other method's ranking of the questions, as deep as it is to be reranked."""
        self.name = name
        self._first = first
        self._scorer = scorer

    def index(self, pool: Pool) -> None:
        self._scorer.index(pool)

    def search(self, questions: Sequence[Question], k: int) -> Rankings:
        candidates = {key: [chunk for chunk, _ in ranking] for key, ranking in self._first().items()}
        scores = self._scorer.scores(questions, candidates)
        return {key: ordered(zip(chunks, scores[key], strict=True), k) for key, chunks in candidates.items()}

    @property
    def corpus(self) -> Corpus | None:
        """What the scores are read from; None: a cross-encoder reads the texts."""
        found: Corpus | None = getattr(self._scorer, "corpus", None)
        return found

    def operations(self, questions: Sequence[Question]) -> float:
        """Of the scores alone."""
        depth = max((len(ranking) for ranking in self._first().values()), default=0)
        return self._scorer.scoring_operations(questions, depth)


class Fusion:
    """Reciprocal rank fusion (Cormack et al. 2009): the sum over the methods of 1 / (constant + rank), ranks from 1."""

    def __init__(self, name: str, parts: Callable[[], Sequence[Rankings]], constant: int, fills: Sequence[bool]) -> None:
        """`parts` gives the other methods' rankings of the questions, as deep as they count; `fills`: see `fuse`."""
        self.name = name
        self._parts = parts
        self._constant = constant
        self._fills = fills

    def index(self, pool: Pool) -> None:
        pass

    def search(self, questions: Sequence[Question], k: int) -> Rankings:
        found = self._parts()
        return {q.question_id: fuse([rankings[q.question_id] for rankings in found], self._constant, k, self._fills) for q in questions}


def fuse(rankings: Sequence[Ranking], constant: int, k: int, fills: Sequence[bool]) -> Ranking:
    """`fills`: for each ranking, whether chunks of score zero are none that its method found (`EvaluateConfig.fills`).

    These have no rank; with score zero they fill up the fused ranking where fewer than k chunks were found.
    """
    scores: dict[str, float] = {}
    for ranking, filled in zip(rankings, fills, strict=True):
        for rank, (chunk, score) in enumerate(ranking, start=1):
            scores[chunk] = scores.get(chunk, 0.0) + (0.0 if filled and score == 0 else 1 / (constant + rank))
    return ordered(scores.items(), k)
