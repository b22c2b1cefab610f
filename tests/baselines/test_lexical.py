from __future__ import annotations

import math
import re
import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from intra.baselines.lexical import BM25, TfIdf, best
from intra.data.schema import POOL_SCHEMA, Pool, Question
from intra.errors import UserError
from intra.evaluate_config import BM25Config
from intra.method import Method, check

TEXTS = [
    ("Ada Bell", "Ada Bell was born in Oldtown, a town on the river."),
    ("Oldtown", "Oldtown is a large town. The town lies on the river Wend."),
    ("Red Moon", "Red Moon is a film directed by Carl Dorn; the film was shot in Oldtown."),
    ("Carl Dorn", "Carl Dorn directed films. He was born in Newport."),
    ("Newport", "Newport is a small port."),
    ("Newport", "Newport is a small port."),
]


def make_pool(texts: Sequence[tuple[str, str]]) -> Pool:
    columns = {
        "chunk_id": [f"c{row}" for row in range(len(texts))],
        "title": [title for title, _ in texts],
        "text": [text for _, text in texts],
        "source": ["test"] * len(texts),
        "n_tokens": [len(text.split()) for _, text in texts],
    }
    return Pool(pa.table(columns, schema=POOL_SCHEMA))


def ask(*texts: str) -> list[Question]:
    return [Question(f"q{n}", "test", "test", text, ("x",), (("c0",),), 1, "single") for n, text in enumerate(texts)]


QUESTIONS = ask("Who directed the film Red Moon?", "Where was Ada Bell born?", "small port", "the of and", "zebra")


@pytest.mark.parametrize(("k1", "b", "stemming"), [(1.5, 0.75, "none"), (0.9, 0.4, "none"), (1.5, 0.75, "english")])
def test_bm25_is_lucenes_formula(k1: float, b: float, stemming: Any) -> None:
    """Against the formula written out: idf ln(1 + (N - n + 0.5) / (n + 0.5))."""
    from bm25s.stopwords import STOPWORDS_EN

    stem = pytest.importorskip("Stemmer").Stemmer("english").stemWord if stemming == "english" else str

    def words(text: str) -> list[str]:
        return [stem(word) for word in re.findall(r"(?u)\b\w\w+\b", text.lower()) if word not in STOPWORDS_EN]

    documents = [Counter(words(f"{title} {text}")) for title, text in TEXTS]
    mean = sum(sum(document.values()) for document in documents) / len(documents)
    method = BM25(BM25Config(k1=k1, b=b, stemming=stemming))
    method.index(make_pool(TEXTS))
    for question in QUESTIONS:
        expected = []
        for document in documents:
            score = 0.0
            for word in words(question.question):
                containing = sum(word in other for other in documents)
                idf = math.log(1 + (len(documents) - containing + 0.5) / (containing + 0.5))
                frequency = document[word]
                score += idf * frequency / (frequency + k1 * (1 - b + b * sum(document.values()) / mean)) if frequency else 0
            expected.append(score)
        ranking = dict(method.search([question], len(TEXTS))[question.question_id])
        assert [ranking[f"c{row}"] for row in range(len(TEXTS))] == pytest.approx(expected, rel=1e-5)


def test_tfidf_is_the_cosine_of_its_vectors() -> None:
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.metrics.pairwise import cosine_similarity

    pool = make_pool(TEXTS)
    vectorizer = TfidfVectorizer(sublinear_tf=True, stop_words="english")
    matrix = vectorizer.fit_transform(pool.title_and_text())
    method = TfIdf()
    method.index(pool)
    for question in QUESTIONS:
        expected = cosine_similarity(vectorizer.transform([question.question]), matrix)[0]
        ranking = dict(method.search([question], len(TEXTS))[question.question_id])
        assert [ranking[f"c{row}"] for row in range(len(TEXTS))] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("method", [BM25(), TfIdf()], ids=lambda method: method.name)
def test_every_question_gets_exactly_k_in_order(method: Method) -> None:
    pool = make_pool(TEXTS)
    method.index(pool)
    for k in (1, 4, 6):
        rankings = method.search(QUESTIONS, k)
        check(method.name, rankings, QUESTIONS, k, pool)
        assert {len(ranking) for ranking in rankings.values()} == {k}
    # No word in common: chunks of score zero, in id order.
    assert method.search(QUESTIONS, 3)["q4"] == [("c0", 0.0), ("c1", 0.0), ("c2", 0.0)]
    # The two equal chunks tie, and the lower id comes first.
    assert [chunk for chunk, _ in method.search(QUESTIONS, 2)["q2"]] == ["c4", "c5"]
    assert method.search([], 3) == {}


def test_a_missing_stemmer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "Stemmer", None)
    with pytest.raises(UserError, match="pip install PyStemmer"):
        BM25(BM25Config(stemming="english")).index(make_pool(TEXTS))


@pytest.mark.parametrize("method", [BM25(), TfIdf()], ids=lambda method: method.name)
def test_a_pool_without_words_is_refused(method: Method) -> None:
    with pytest.raises(UserError, match=method.name):
        method.index(make_pool([("the", "of and the")]))


def test_best_orders_ties_by_id() -> None:
    generator = np.random.default_rng(0)
    for _ in range(200):
        count = int(generator.integers(1, 30))
        scores = generator.integers(0, 4, count).astype(np.float32)
        ids = [f"c{row:02d}" for row in range(count)]
        k = int(generator.integers(1, 35))
        expected = sorted(zip(ids, scores.tolist(), strict=True), key=lambda item: (-item[1], item[0]))[:k]
        assert best(ids, scores, k) == expected


def test_operations_are_two_a_posting() -> None:
    from tests.baselines.conftest import make_pool

    pool = make_pool([("", "red moon harbor"), ("", "red harbor"), ("", "the red red town"), ("", "silver river")])
    asked = [
        Question("q", "b", "test", "the red moon and the absent harbor", (), (), 1, ""),
        Question("p", "b", "test", "river", (), (), 1, ""),
    ]
    for method in (BM25(), TfIdf()):
        method.index(pool)
        assert method.operations(asked) == 2 * (3 + 1 + 2 + 1)  # red, moon, harbor; river
