"""Chunks fit, lose nothing, and are what the encoder reads."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest

from intra.backbone import tiny
from intra.config import ArchitectureConfig
from intra.data.chunking import Chunk, chunk, chunk_text, lengths
from intra.data.raw import Passage
from intra.errors import UserError

TEMPLATE = "{title}\n{text}"
WORDS = [
    "river",
    "Tarn",
    "runs",
    "past",
    "mills,",
    "(and",
    "towns)",
    "東京都",
    "naïve",
    "3.14",
    "👩🏽\u200d🔬",
    "antidisestablishmentarianism",
]


@pytest.fixture(scope="module", params=["word", "byte_bpe"])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    architecture = ArchitectureConfig(tokenizer=request.param, vocabulary=320)
    return tiny.train_tokenizer([" ".join(WORDS)] * 3, architecture)


def make(text: str, title: str = "Tarn", passage_id: str = "p") -> Passage:
    return Passage(passage_id, title, text, "x.jsonl", "x.jsonl:1")


def cut(passages: Sequence[Passage], tokenizer: Any, limit: int) -> list[Chunk]:
    return list(chunk(passages, tokenizer, TEMPLATE, limit))


@pytest.mark.parametrize(
    ("title", "text", "template", "expected"),
    [
        ("Tarn", "A river.", "{title}\n{text}", "Tarn\nA river."),
        ("", "A river.", "{title}\n{text}", "A river."),
        ("  ", "A river.", "{title}: {text}", ": A river."),
        ("", "A river.", "{text}\n({title})", "A river.\n()"),
        ("", "A river.", "{text}\n{title}", "A river."),
        ("{text}", "{title} {0} {", "{title}|{text}", "{text}|{title} {0} {"),
        ("Tarn", "A river.", "passage {n}: {text}", "passage {n}: A river."),
        ("Tarn", "a \\1 b", "{text}", "a \\1 b"),
    ],
)
def test_the_template_is_filled_in_once(title: str, text: str, template: str, expected: str) -> None:
    assert chunk_text(title, text, template) == expected


def test_length_counts_special_tokens_and_reads_spelled_out_ones_as_text(tokenizer: Any) -> None:
    assert lengths([""], tokenizer) == [1]  # <bos>
    plain, spelled = lengths(["a", "a <bos>"], tokenizer)
    assert spelled > plain + 1
    assert lengths([], tokenizer) == []


def test_a_passage_that_fits_is_left_as_it_is(tokenizer: Any) -> None:
    text = "  river\n runs mills, "
    size = lengths([chunk_text("Tarn", text, TEMPLATE)], tokenizer)[0]
    assert cut([make(text)], tokenizer, size) == [Chunk("p", "Tarn", text, "x.jsonl", size, "p")]
    bare = lengths([chunk_text("Tarn", text.strip(), TEMPLATE)], tokenizer)[0]
    assert len(cut([make(text)], tokenizer, bare - 1)) > 1
    if bare < size:  # too long only by white space: no text is lost, so it is not split
        assert cut([make(text)], tokenizer, bare) == [Chunk("p", "Tarn", text.strip(), "x.jsonl", bare, "p")]


@pytest.mark.parametrize("limit", [24, 40, 64])
def test_pieces_fit_and_lose_nothing(tokenizer: Any, limit: int) -> None:
    generator = random.Random(limit)
    passages = [
        make(
            "".join(generator.choice(WORDS) + generator.choice([" ", "  ", "\n"]) for _ in range(generator.randrange(1, 120))),
            passage_id=f"p{n}",
        )
        for n in range(40)
    ]
    chunks = cut(passages, tokenizer, limit)
    assert [c.n_tokens for c in chunks] == lengths([chunk_text(c.title, c.text, TEMPLATE) for c in chunks], tokenizer)
    assert max(c.n_tokens for c in chunks) <= limit
    some_split = False
    for passage in passages:
        pieces = [c for c in chunks if c.passage_id == passage.passage_id]
        if len(pieces) == 1:
            assert pieces[0].chunk_id == passage.passage_id
            assert pieces[0].text == passage.text
            continue
        some_split = True
        assert [c.chunk_id for c in pieces] == [f"{passage.passage_id}#{number}" for number in range(len(pieces))]
        assert {c.title for c in pieces} == {"Tarn"}
        assert "".join("".join(c.text.split()) for c in pieces) == "".join(passage.text.split())
    assert some_split


def test_words_stay_whole_and_pieces_are_of_like_size(tokenizer: Any) -> None:
    words = ["river", "farms,", "mills,"] * 40
    pieces = cut([make(" ".join(words))], tokenizer, 60)
    assert [word for piece in pieces for word in piece.text.split()] == words
    sizes = [len(piece.text.split()) for piece in pieces]
    assert max(sizes) - min(sizes) <= 0.25 * max(sizes)  # no piece of a few words at the end


def test_a_word_longer_than_a_chunk_is_split_between_characters() -> None:
    tokenizer = tiny.train_tokenizer(["a b"], ArchitectureConfig(tokenizer="byte_bpe", vocabulary=260))
    text = "short " + "x東" * 60 + " end"
    pieces = cut([make(text)], tokenizer, 24)
    assert max(piece.n_tokens for piece in pieces) <= 24
    assert "".join(piece.text for piece in pieces) == text.replace(" ", "")
    assert pieces[0].text == "short"


def test_a_title_that_leaves_no_room_is_refused() -> None:
    tokenizer = tiny.train_tokenizer(["a b"], ArchitectureConfig(tokenizer="byte_bpe", vocabulary=260))
    with pytest.raises(UserError, match=r"^x.jsonl:1: passage 'p': data.chunk_tokens=20 leaves no room for text beside the title"):
        cut([make("some text", title="t" * 30)], tokenizer, 20)


def test_many_batches_keep_the_order(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    passages = [make("river runs", passage_id=f"p{n}") for n in range(11)]
    whole = cut(passages, tokenizer, 64)
    monkeypatch.setattr("intra.data.chunking.BATCH", 3)
    assert cut(passages, tokenizer, 64) == whole
    assert [c.chunk_id for c in whole] == [p.passage_id for p in passages]
