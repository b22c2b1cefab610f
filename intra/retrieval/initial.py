"""S_0, the chunks the decoder reads during its retrieval pass: MaxSim of the encoded question against the pool (Eq. 6).

    s0_i = sum_a max_p  <u_a, k_{i,p}> / sqrt(d)       u: encoder states of the question, every token; k: pooled vectors

Three ways (`retriever.initial_scoring`):
    dot        as above
    cosine     every vector scaled to length 1, without the 1/sqrt(d)
    whitened   both sides become (x - mean) @ matrix of the store's pooled vectors, then the chunk's vectors are scaled to length 1:
               encoder states share a few strong directions, which say little and drown the rest

A whitened question vector keeps its length: a token that is rare in the pool has a longer one and counts for more, as idf has it.
Measured on the synthetic world (two small backbones, three seeds, 300 questions over 1,000 chunks), top 5:

    both gold chunks of a comparison    .61 to .74; with length 1 on both sides .58 to .72; cosine .22 to .36; dot .18 to .28
    first hop of a bridge question      .84 to .96; with length 1 on both sides .81 to .96; cosine .79 to .87; dot .54 to .89
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from tqdm import tqdm

from intra.retrieval import scoring
from intra.retrieval.scoring import TopK

if TYPE_CHECKING:
    from intra.backbone.model import Backbone
    from intra.store.reader import ChunkStore

QUESTIONS = 256  # scored in one pass over the pool; fixed, so that a question's S_0 does not depend on the caller's batches
ENCODED = 32  # encoded at once

Tiles = Callable[[], Iterable[tuple[int, Tensor]]]


class Space:
    """Where the vectors of the two sides are compared: one of dot, cosine, whitened. `question` and `chunk`: [..., d] -> [..., d] fp32."""

    def __init__(self, kind: str, store: ChunkStore, device: torch.device | str = "cpu") -> None:
        if kind not in ("dot", "cosine", "whitened"):
            raise ValueError(f"initial scoring '{kind}'")
        self.kind = kind
        self.scale = store.hidden_size**-0.5 if kind == "dot" else 1.0
        if kind == "whitened":
            self.mean, self.matrix = (part.float().to(device) for part in store.whitening())

    def question(self, vectors: Tensor) -> Tensor:
        return torch.nn.functional.normalize(self._white(vectors), dim=-1) if self.kind == "cosine" else self._white(vectors)

    def chunk(self, vectors: Tensor) -> Tensor:
        return self._white(vectors) if self.kind == "dot" else torch.nn.functional.normalize(self._white(vectors), dim=-1)

    def _white(self, vectors: Tensor) -> Tensor:
        return (vectors.float() - self.mean) @ self.matrix if self.kind == "whitened" else vectors.float()


class Chunks:
    """The pool's side of S_0: its vectors where they are compared, made of the stored ones for every search, or once and kept."""

    def __init__(self, space: Space, source: Tiles, device: torch.device | str = "cpu", *, keep: bool = False) -> None:
        """`source` gives (first row, pooled [n, P, d]) of the whole pool each time it is called. `keep`: float32, on the device."""
        self.space, self.device = space, device
        self._source, self._keep = source, keep
        self._kept: list[tuple[int, Tensor]] | None = None

    def tiles(self) -> Iterator[tuple[int, Tensor]]:
        if self._kept is not None:
            yield from self._kept
            return
        made = []
        for first, pooled in self._source():
            tile = self.space.chunk(pooled.to(self.device))
            if self._keep:
                made.append((first, tile))
            yield first, tile
        if self._keep:
            self._kept = made


def maxsim(questions: Sequence[Tensor], pooled: Tensor) -> Tensor:
    """sum_a max_p <u_a, k_p>: questions B x [n_b, d], pooled [N, P, d], both in one space -> [B, N] float32."""
    tokens = torch.cat(list(questions))
    lengths = [len(question) for question in questions]
    parts = []
    for rows in scoring.blocks(pooled, len(tokens)):
        block = pooled[rows]
        best = (block.reshape(-1, block.shape[-1]) @ tokens.T).view(len(block), -1, len(tokens)).amax(dim=1)
        parts.append(torch.stack([part.sum(dim=1) for part in best.split(lengths, dim=1)]))
    return torch.cat(parts, dim=1)


def search(backbone: Backbone, chunks: Chunks, questions: Sequence[str], k: int) -> Iterator[TopK]:
    """The k best chunks of the whole pool for every question, in their order: one TopK per 256 questions."""
    space = chunks.space
    with torch.no_grad(), tqdm(total=len(questions), desc="S_0", unit="question", disable=None) as bar:
        for first in range(0, len(questions), QUESTIONS):
            block = questions[first : first + QUESTIONS]
            vectors = [space.question(states) for states in encode(backbone, block)]

            def scorer(tile: Tensor, vectors: list[Tensor] = vectors) -> Tensor:
                return maxsim(vectors, tile) * space.scale

            best = scoring.top_k(chunks.tiles(), scorer, k)
            bar.update(len(block))
            yield best


def encode(backbone: Backbone, questions: Sequence[str]) -> list[Tensor]:
    """The encoder's states of each question, [n, d], special tokens included, as for a chunk; over a frozen encoder without them.

    There they are a BERT's [CLS] and [SEP], whose nearest vectors say little of what is asked; they are not echoed either.
    """
    states: list[Tensor] = []
    for first in range(0, len(questions), ENCODED):
        states += backbone.encode(backbone.tokenize(questions[first : first + ENCODED]))
    return [each[1:-1] for each in states] if backbone.frozen_encoder else states
