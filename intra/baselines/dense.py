"""Dense retrieval: every chunk and question one vector, the best inner products by exact search (faiss).

    <root>/vectors/<fingerprint>/000000000.safetensors   `vectors` float32 [rows, d] of the `evaluate.shard_chunks` texts from this one on
    <root>/vectors/<fingerprint>/manifest.json           last: rows, d, how many texts were cut

A text is encoded once, however many chunks have it: they tie. A shard is written in one piece, so one that is there is done: a run that was
cut off goes on with the next. Memory: one shard, and the best k of each question.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from intra import storage
from intra.artifact import Artifact
from intra.config import DenseConfig
from intra.data.schema import Pool, Question
from intra.errors import UserError, WorkflowError
from intra.method import Rankings, ordered

if TYPE_CHECKING:
    from intra.baselines.models import Dense as Encoder
    from intra.baselines.models import Floats

_SPARE = 16  # candidates beyond k: more than rounding may reorder


class Dense:
    def __init__(self, name: str, settings: DenseConfig, vectors: Artifact, encoder: Callable[[], Encoder], shard_chunks: int) -> None:
        """`encoder` makes the model when the first text is to be encoded."""
        self.name = name
        self._settings = settings
        self._vectors = vectors
        self._make = encoder
        self._encoder: Encoder | None = None
        self._shard_chunks = shard_chunks

    def index(self, pool: Pool) -> None:
        """Encodes the shards that are missing."""
        owners: dict[str, list[str]] = {}
        for chunk_id, text in zip(pool.chunk_ids, pool.title_and_text(), strict=True):
            owners.setdefault(text, []).append(chunk_id)
        texts, self._owners = list(owners), list(owners.values())
        self._shards = [range(len(texts))[first : first + self._shard_chunks] for first in range(0, len(texts), self._shard_chunks)]
        if self._vectors.complete():
            return
        done = set(storage.names(self._vectors.url))
        for shard in tqdm(self._shards, desc=f"{self.name}: encode", unit="shard", disable=None):
            if _file(shard) not in done:
                mine = texts[shard.start : shard.stop]
                vectors = self._model.encode(mine, self._settings.passage_prompt)
                write(self._vectors.path(_file(shard)), vectors, self._model.cut(mine, self._settings.passage_prompt))
        sizes = [(vectors.shape[1], cut) for vectors, cut in (read(self._vectors.path(_file(shard)), len(shard)) for shard in self._shards)]
        cut = sum(count for _, count in sizes)
        if cut:
            print(f"{self.name}: {cut:,} of {len(texts):,} texts are longer than {self._settings.max_length} tokens and were cut")
        self._vectors.finish({"rows": len(texts), "dimension": sizes[0][0], "cut": cut})

    def search(self, questions: Sequence[Question], k: int) -> Rankings:
        if not questions:
            return {}
        queries = self._model.encode([question.question for question in questions], self._settings.query_prompt)
        best: list[list[tuple[str, float]]] = [[] for _ in questions]
        for first, block in tqdm(self._blocks(), desc=self.name, unit="shard", total=len(self._shards), disable=None):
            for place, (rows, scores) in enumerate(nearest(queries, block, k)):
                found = [(chunk, score) for row, score in zip(rows, scores, strict=True) for chunk in self._owners[first + row]]
                best[place] = ordered([*best[place], *found], k)
        return {question.question_id: ranking for question, ranking in zip(questions, best, strict=True)}

    @property
    def _model(self) -> Encoder:
        if self._encoder is None:
            self._encoder = self._make()
        return self._encoder

    def _blocks(self) -> Iterator[tuple[int, Floats]]:
        for shard in self._shards:
            yield shard.start, read(self._vectors.path(_file(shard)), len(shard))[0]


def nearest(queries: Floats, block: Floats, k: int) -> Iterator[tuple[list[int], list[float]]]:
    """For each query the k rows of the block with the largest inner products, and more where the k-th ties: exact.

    faiss proposes candidates in float32; each is scored again in float64 by itself: no score depends on the block that a row stood in.
    """
    faiss = _faiss()
    wanted = min(k + _SPARE, len(block))
    proposed, found = faiss.knn(queries, block, wanted, metric=faiss.METRIC_INNER_PRODUCT)
    for query, scores, rows in zip(queries, proposed, found, strict=True):
        kth = scores[min(k, wanted) - 1]
        margin = 1e-5 * max(1.0, float(abs(kth)))
        if wanted < len(block) and scores[-1] >= kth - margin:  # a tie that may go on behind the candidates
            rows = np.flatnonzero(block @ query >= kth - margin)
        exact = block[rows].astype(np.float64) @ query.astype(np.float64)
        yield rows.tolist(), exact.tolist()


def write(place: str, vectors: Floats, cut: int) -> None:
    from safetensors.numpy import save

    storage.write_bytes(place, save({"vectors": vectors, "cut": np.array([cut])}))


def read(place: str, rows: int) -> tuple[Floats, int]:
    """The vectors of a shard [rows, d], and how many of its texts were cut. Raises WorkflowError where they are not what was written."""
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        found = load(storage.read_bytes(place))
        vectors, cut = found["vectors"], int(found["cut"][0])
    except (SafetensorError, KeyError) as error:
        raise WorkflowError(f"{place}: damaged ({error}); delete it and run the same command again") from error
    if len(vectors) != rows or not np.isfinite(vectors).all():
        raise WorkflowError(f"{place}: {len(vectors)} vectors where {rows} finite ones are expected; delete its folder and run the same "
                            "command again")  # fmt: skip
    return vectors, cut


def _file(shard: range) -> str:
    return f"{shard.start:09d}.safetensors"


def _faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise UserError(f"dense retrieval needs faiss ({error}); run: pip install 'intra[cpu]' (or 'intra[gpu]')") from error
    return faiss
