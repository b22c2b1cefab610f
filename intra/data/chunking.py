"""Passages to chunks by backbone tokens: a passage that is too long becomes several chunks, and nothing is cut off.

The length of a chunk is that of the encoder's whole input: template, title, text and the tokenizer's special tokens.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from intra.data.raw import Passage
from intra.errors import UserError

BATCH = 1024  # texts tokenised at once


@dataclass(frozen=True, slots=True)
class Chunk:
    chunk_id: str  # the passage's id; of the pieces of a split passage `<passage id>#0`, `#1`, ...
    title: str
    text: str
    source: str
    n_tokens: int  # of the encoder's input, special tokens included
    passage_id: str


def chunk_text(title: str, text: str, template: str) -> str:
    """The encoder's input text for a chunk: `template` with {title} and {text} filled in.

    Without a title, {title} goes together with the white space that follows it, and the result is stripped.
    """
    title = title.strip()
    if not title:
        template = re.sub(r"\{title\}\s*", "", template)
    # One pass, so that braces in a title or text are left as they are.
    filled = re.sub(r"\{(title|text)\}", lambda match: title if match[1] == "title" else text, template)
    return filled if title else filled.strip()


def lengths(texts: Sequence[str], tokenizer: Any) -> list[int]:
    """Tokens of each text as the encoder reads it: special tokens added, those spelled out in a text read as plain text."""
    if not texts:
        return []
    encoded = tokenizer(
        list(texts),
        add_special_tokens=True,
        split_special_tokens=True,
        truncation=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    return [len(ids) for ids in encoded["input_ids"]]


def chunk(passages: Sequence[Passage], tokenizer: Any, template: str, limit: int) -> Iterator[Chunk]:
    """The chunks of each passage in turn, none longer than `limit` tokens.

    A longer passage is split at white space into consecutive pieces of like size, each with the title; a single word longer than a chunk is
    split between characters. Raises UserError where the title leaves no room for any text.
    """
    for start in range(0, len(passages), BATCH):
        batch = passages[start : start + BATCH]
        counts = lengths([chunk_text(passage.title, passage.text, template) for passage in batch], tokenizer)
        for passage, count in zip(batch, counts, strict=True):
            if count <= limit:
                yield Chunk(passage.passage_id, passage.title, passage.text, passage.source, count, passage.passage_id)
                continue
            text = passage.text.strip()
            count = lengths([chunk_text(passage.title, text, template)], tokenizer)[0]
            if count <= limit:  # too long only by white space at its ends
                yield Chunk(passage.passage_id, passage.title, text, passage.source, count, passage.passage_id)
                continue
            for number, (piece, size) in enumerate(_pieces(passage, tokenizer, template, limit)):
                yield Chunk(f"{passage.passage_id}#{number}", passage.title, piece, passage.source, size, passage.passage_id)


def _pieces(passage: Passage, tokenizer: Any, template: str, limit: int) -> Iterator[tuple[str, int]]:
    """(text, tokens) of the consecutive pieces of a passage."""
    title, text = passage.title, passage.text

    def size(start: int, end: int) -> int:
        return lengths([chunk_text(title, text[start:end], template)], tokenizer)[0]

    words = [match.span() for match in re.finditer(r"\S+", text)]
    ends = [end for _, end in words]
    tokens = _spans(text, tokenizer)
    taken = lengths([chunk_text(title, "", template)], tokenizer)[0]
    word, start = 0, words[0][0]
    while True:
        # The whole text's own tokens say how far a piece should reach. The piece itself is then measured, for a cut can change
        # the tokens beside it, and shortened until it fits.
        reach = _reach(tokens, start, limit - taken)
        last = max(bisect_right(ends, reach), word + 1)
        end = ends[last - 1]
        count = size(start, end)
        while count > limit and last > word + 1:
            last -= 1
            end = ends[last - 1]
            count = size(start, end)
        if count > limit:  # one word alone
            end = min(end, max(reach, start + 1))
            while (count := size(start, end)) > limit:
                end -= 1
                if end == start:
                    raise UserError(
                        f"{passage.where or passage.source}: passage '{passage.passage_id}': data.chunk_tokens={limit} leaves no room "
                        f"for text beside the title and template ({taken} tokens); raise it or shorten the title"
                    )
        yield text[start:end], count
        if end == ends[-1]:
            return
        word = bisect_right(ends, end)
        start = max(end, words[word][0])


def _spans(text: str, tokenizer: Any) -> list[tuple[int, int]]:
    """Character spans of the tokens of a text alone, in order."""
    encoded = tokenizer(
        text, add_special_tokens=False, split_special_tokens=True, truncation=False, return_offsets_mapping=True, verbose=False
    )
    return [(int(start), int(end)) for start, end in encoded["offset_mapping"]]


def _reach(tokens: Sequence[tuple[int, int]], start: int, room: int) -> int:
    """How far, in characters, a piece from `start` should go: the rest in as few pieces of `room` tokens as it needs, of like size."""
    first = bisect_right(tokens, start, key=lambda span: span[1])
    rest = len(tokens) - first
    if room < 1 or rest < 1:
        return start
    share = math.ceil(rest / math.ceil(rest / room))
    return tokens[first + share - 1][1]
