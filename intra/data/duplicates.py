"""Texts that are the same, and texts that are nearly so.

Same: equal once Unicode form (NFKC), case and white space are set aside. Nearly: MinHash over the sets of word 5-grams proposes pairs,
their exact Jaccard similarity decides. Only word characters count there, so punctuation never tells two texts apart.

Band-and-row hashing (Broder 1997; Leskovec, Rajaraman, Ullman, Mining of Massive Datasets, 3.4) with BANDS x ROWS hashes: a pair with
Jaccard similarity s is proposed with probability 1 - (1 - s^ROWS)^BANDS, which is .988 at .7, .9999 at .8 and .02 at .25. Hashes of a
pool of 759K chunks are 146 MB.
"""

from __future__ import annotations

import hashlib
import itertools
import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

GRAM = 5  # words
BANDS, ROWS = 24, 5
BUCKET = 64  # texts of one band's hash that are compared each with each; of more, each with the first
_WORD = re.compile(r"\w+")
_PRIME = np.uint64((1 << 31) - 1)  # a Mersenne prime: products of two residues fit 64 bits

Hashes = npt.NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class Pair:
    left: int  # positions of the texts, left < right
    right: int
    similarity: float  # Jaccard, of the sets of word 5-grams


def normalized(title: str, text: str) -> str:
    """Title and text without what tells copies of them apart."""
    return "\n".join(" ".join(unicodedata.normalize("NFKC", part).casefold().split()) for part in (title, text))


def key(title: str, text: str) -> bytes:
    """16 bytes that are the same for the same passages."""
    return hashlib.blake2b(normalized(title, text).encode(), digest_size=16).digest()


def grams(text: str) -> set[int]:
    """The hashes of a text's word 5-grams, below 2^31 - 1; of a shorter text, that of all its words."""
    words = _WORD.findall(unicodedata.normalize("NFKC", text).casefold())
    spans = (words[start : start + GRAM] for start in range(max(1, len(words) - GRAM + 1)))
    return {int.from_bytes(hashlib.blake2b(" ".join(span).encode(), digest_size=8).digest()) % int(_PRIME) for span in spans}


def band_hashes(texts: Sequence[str]) -> Hashes:
    """[texts, BANDS] uint64: two texts that share an entry of the same band are to be compared."""
    multipliers, offsets = _functions()
    signatures = np.empty((len(texts), BANDS * ROWS), dtype=np.uint64)
    for row, text in enumerate(texts):
        values = np.fromiter(grams(text), dtype=np.uint64)
        signatures[row] = ((values[:, None] * multipliers + offsets) % _PRIME).min(axis=0)
    mixed = np.full((len(texts), BANDS), 0x9E3779B97F4A7C15, dtype=np.uint64)
    for column in range(ROWS):
        mixed = (mixed ^ signatures[:, column::ROWS]) * np.uint64(0xFF51AFD7ED558CCD)
        mixed ^= mixed >> np.uint64(32)
    return mixed


def _functions() -> tuple[Hashes, Hashes]:
    """Multipliers and offsets of the hash functions: fixed, so that bands of two runs agree."""
    draws = np.random.Generator(np.random.PCG64(20260508)).integers(1, int(_PRIME), size=(2, BANDS * ROWS), dtype=np.uint64)
    return draws[0], draws[1]


def candidates(hashes: Hashes) -> list[tuple[int, int]]:
    """The pairs of rows that share a band's hash, sorted; of a crowded bucket only those with its first row."""
    found: set[tuple[int, int]] = set()
    for band in range(hashes.shape[1]):
        column = hashes[:, band]
        order = np.argsort(column, kind="stable")
        edges = np.flatnonzero(np.diff(column[order])) + 1
        starts, ends = np.concatenate(([0], edges)), np.concatenate((edges, [len(order)]))
        for start, end in zip(starts[ends - starts > 1], ends[ends - starts > 1], strict=True):
            members = [int(row) for row in order[start:end]]
            found.update(itertools.combinations(members, 2) if len(members) <= BUCKET else ((members[0], other) for other in members[1:]))
    return sorted(found)


def near(hashes: Hashes, text_of: Callable[[int], str], threshold: float) -> Iterator[Pair]:
    """The pairs of texts whose similarity is at least `threshold`, in order; `text_of(row)` gives the texts that were hashed."""
    last, held = -1, {0}
    for left, right in candidates(hashes):
        if left != last:
            last, held = left, grams(text_of(left))
        other = grams(text_of(right))
        similarity = len(held & other) / len(held | other)
        if similarity >= threshold:
            yield Pair(left, right, similarity)
