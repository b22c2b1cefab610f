"""BM25 (bm25s) and TF-IDF (scikit-learn) over title and text; BM25's settings are `evaluate.bm25`'s, by default bm25s' own.

Both score the whole pool per question. Rows of the pool are in id order, so a tie goes to the lower row; where fewer than k
chunks share a word with the question, the rest of the ranking is chunks of score zero in id order.
Memory: the sparse index, and one (BM25) or 16 (TF-IDF) dense float32 rows of the pool's length.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from intra.data.schema import Pool, Question
from intra.errors import UserError
from intra.evaluate_config import BM25Config
from intra.method import Ranking, Rankings

_QUESTIONS_AT_ONCE = 16


class BM25:
    """Lucene's BM25 with English stop words, by default with k1 1.5, b 0.75 and no stemming, as in bm25s."""

    name = "bm25"

    def __init__(self, settings: BM25Config | None = None) -> None:
        self._settings = settings or BM25Config()

    def index(self, pool: Pool) -> None:
        import bm25s

        self._ids = pool.chunk_ids
        self._index = bm25s.BM25(k1=self._settings.k1, b=self._settings.b)
        tokens = self._tokenize(pool.title_and_text())
        if not tokens.vocab:
            raise UserError("bm25: no chunk of the pool holds a word that is not a stop word; take bm25 out of evaluate.methods")
        self._index.index(tokens, show_progress=False)

    def search(self, questions: Sequence[Question], k: int) -> Rankings:
        texts = [question.question for question in questions]
        words = self._tokenize(texts, return_ids=False) if texts else []
        rankings = {}
        for question, terms in zip(tqdm(questions, desc=self.name, unit="question", disable=None), words, strict=True):
            known = [term for term in terms if term in self._index.vocab_dict]
            scores = self._index.get_scores(known) if known else np.zeros(len(self._ids), np.float32)
            rankings[question.question_id] = best(self._ids, scores, k)
        return rankings

    def operations(self, questions: Sequence[Question]) -> float:
        """Of a search: two for each posting of a question's words."""
        texts, lengths = [question.question for question in questions], np.diff(self._index.scores["indptr"])
        words = self._tokenize(texts, return_ids=False) if texts else []
        known = [self._index.vocab_dict[term] for terms in words for term in terms if term in self._index.vocab_dict]
        return 2.0 * float(lengths[known].sum())

    def _tokenize(self, texts: list[str], **options: bool) -> Any:
        import bm25s

        return bm25s.tokenize(texts, stopwords="english", stemmer=stemmer(self._settings.stemming), show_progress=False, **options)


def stemmer(stemming: str) -> Any:
    """The stemmer of `evaluate.bm25.stemming`; None: none. Raises UserError where its package is missing."""
    if stemming == "none":
        return None
    try:
        import Stemmer
    except ImportError as error:
        raise UserError(f"evaluate.bm25.stemming={stemming} needs PyStemmer ({error}); run: pip install PyStemmer") from error
    return Stemmer.Stemmer(stemming)


def bm25(pool: Pool) -> BM25:
    """BM25 as it is by default, its index over the pool: what hard negatives and distractors are drawn from."""
    method = BM25()
    method.index(pool)
    return method


class TfIdf:
    """Cosine of TF-IDF vectors with sublinear term frequencies and scikit-learn's English stop words."""

    name = "tfidf"

    def index(self, pool: Pool) -> None:
        from sklearn.feature_extraction.text import TfidfVectorizer

        self._ids = pool.chunk_ids
        self._vectorizer: Any = TfidfVectorizer(sublinear_tf=True, stop_words="english", dtype=np.float32)
        try:
            self._matrix: Any = self._vectorizer.fit_transform(pool.title_and_text()).T.tocsr()  # [words, chunks]
        except ValueError as error:
            raise UserError(f"tfidf: {error}; take tfidf out of evaluate.methods") from error

    def search(self, questions: Sequence[Question], k: int) -> Rankings:
        rankings = {}
        for start in tqdm(range(0, len(questions), _QUESTIONS_AT_ONCE), desc=self.name, unit="batch", disable=None):
            batch = questions[start : start + _QUESTIONS_AT_ONCE]
            scores = (self._vectorizer.transform([question.question for question in batch]) @ self._matrix).toarray()
            for question, row in zip(batch, scores, strict=True):
                rankings[question.question_id] = best(self._ids, row, k)
        return rankings

    def operations(self, questions: Sequence[Question]) -> float:
        """Of a search: two for each posting of a question's words."""
        found = self._vectorizer.transform([question.question for question in questions])
        return 2.0 * float(np.diff(self._matrix.indptr)[found.indices].sum())


def best(ids: Sequence[str], scores: NDArray[Any], k: int) -> Ranking:
    """The k best of scores [N], ids in ascending order: by (-score, id), all of the pool where it is smaller than k."""
    k = min(k, len(ids))
    if k == 0:
        return []
    last = np.partition(scores, len(ids) - k)[len(ids) - k]  # the k-th best score
    above = np.flatnonzero(scores > last)
    rows = np.concatenate([above, np.flatnonzero(scores == last)[: k - len(above)]])
    rows = rows[np.lexsort((rows, -scores[rows]))]
    return [(ids[row], float(scores[row])) for row in rows]
