"""Which passages make the pool: all that were read, as columns of numbers, and the choice among them.

Texts stay in the shards that `stages.Scan` wrote; a million candidates are about 120 MB here.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from intra.data import raw, stages
from intra.data.raw import TITLE, Mistakes, RawQuestion
from intra.errors import UserError

Rows = npt.NDArray[np.int64]


@dataclass
class Candidates:
    """Every passage once, in the order of the ids. All arrays are [candidates]."""

    ids: pa.Array  # string
    shard: npt.NDArray[np.int32]  # index into `shards`
    row: npt.NDArray[np.int32]  # of the shard
    draw: npt.NDArray[np.uint64]
    words: npt.NDArray[np.int32]
    canonical: Rows  # the candidate that stands for this one: itself, unless it is a duplicate
    shards: list[str]  # URLs
    starts: Rows  # [shards]: where each begins in `place`
    place: Rows  # [passages read]: the candidate that each is; -1 of an id that stood there before
    read: int  # passages read, those with the id of another counted too

    def __len__(self) -> int:
        return len(self.ids)

    def find(self, names: Sequence[str]) -> Rows:
        """The candidates with these ids; -1 where there is none."""
        found = pc.index_in(pa.array(names, pa.string()), value_set=self.ids)
        return np.asarray(pc.fill_null(found, -1).to_numpy(zero_copy_only=False), dtype=np.int64)

    def position(self, shard: int, rows: npt.NDArray[Any]) -> Rows:
        """The candidates that are these rows of a shard."""
        found: Rows = self.place[self.starts[shard] + rows.astype(np.int64)]
        return found

    def name(self, row: int) -> str:
        return str(self.ids[int(row)].as_py())

    def where(self, row: int) -> str:
        """Where the passage was read ("file:line")."""
        return str(stages.get(self.shards[self.shard[row]], ["where"])["where"][int(self.row[row])].as_py())

    def distinct(self) -> Rows:
        """The candidates that stand for themselves."""
        return np.flatnonzero(self.canonical == np.arange(len(self)))

    def by_draw(self, rows: Rows) -> Rows:
        """The rows in the order in which a sample takes them: by draw, then by id."""
        return rows[np.lexsort((rows, self.draw[rows]))]


def load(scans: Iterable[Mapping[str, object]], work: str, own_ids: Sequence[bool], deduplicate: bool, mistakes: Mistakes) -> Candidates:
    """The candidates of all parts. `own_ids[part]`: the part's ids are names, of which none may stand twice (a mistake); where ids are
    hashes of content, the first of the same counts. With `deduplicate`, passages with the same key are one: the one with the least id.
    """
    shards: list[str] = []
    columns: dict[str, list[pa.ChunkedArray]] = {name: [] for name in ("passage_id", "key", "draw", "words")}
    numbers, rows, owned = [], [], []
    for scan in scans:
        part = int(str(scan["part"]))
        for number, count in enumerate(scan["rows"]):  # type: ignore[arg-type, var-annotated]
            shards.append(stages.scanned(work, part, number))
            table = stages.get(shards[-1], list(columns))
            for name, parts in columns.items():
                parts.append(table[name])
            numbers.append(np.full(count, len(shards) - 1, dtype=np.int32))
            rows.append(np.arange(count, dtype=np.int32))
            owned.append(np.full(count, own_ids[part]))
    if not shards:
        raise mistakes.nothing("passages", "check data.path and which files are named")
    whole = {name: _joined(parts) for name, parts in columns.items()}
    order = pc.sort_indices(whole["passage_id"]).to_numpy()  # stable: of equal ids the first read stands first
    ids = whole["passage_id"].take(order)
    shard, row, own = np.concatenate(numbers)[order], np.concatenate(rows)[order], np.concatenate(owned)[order]
    again = np.zeros(len(ids), dtype=bool)
    if len(ids) > 1:
        again[1:] = pc.equal(ids[1:], ids[:-1]).to_numpy(zero_copy_only=False)
    places = functools.lru_cache(64)(lambda url: stages.get(url, ["where"])["where"])
    for position in np.flatnonzero(again & own):
        first_read, second_read = (places(shards[shard[at]])[int(row[at])].as_py() for at in (position - 1, position))
        mistakes.add(raw.named_twice("passage", ids[int(position)].as_py(), first_read, second_read))
    first = np.flatnonzero(~again)
    kept = order[first]
    keys = np.frombuffer(b"".join(whole["key"].take(kept).to_pylist()), dtype=np.uint64).reshape(-1, 2) if deduplicate else None
    place = np.full(len(order), -1, dtype=np.int64)
    place[kept] = np.arange(len(kept))
    starts = np.cumsum([0, *(len(part) for part in rows[:-1])])
    return Candidates(
        ids=ids.filter(pa.array(~again)),
        shard=shard[first],
        row=row[first],
        draw=whole["draw"].to_numpy()[kept],
        words=whole["words"].to_numpy()[kept],
        canonical=np.arange(len(first)) if keys is None else _canonical(keys),
        shards=shards,
        starts=starts,
        place=place,
        read=len(order),
    )


def resolve_titles(questions: Sequence[RawQuestion], candidates: Candidates, mistakes: Mistakes) -> list[RawQuestion]:
    """The questions with passage ids where evidence was named by its title. A title that no passage or several have is a mistake."""
    wanted = {gold.removeprefix(TITLE) for question in questions for gold in question.gold_ids if gold.startswith(TITLE)}
    if not wanted:
        return list(questions)
    found: dict[str, set[int]] = {}
    names = pa.array(sorted(wanted), pa.string())
    for number, shard in enumerate(candidates.shards):
        titles = stages.get(shard, ["title"])["title"]
        rows = np.flatnonzero(pc.is_in(titles, value_set=names).to_numpy(zero_copy_only=False))
        for row, place in zip(rows.tolist(), candidates.position(number, rows).tolist(), strict=True):
            if place >= 0:
                found.setdefault(titles[row].as_py(), set()).add(int(candidates.canonical[place]))
    resolved = []
    for question in questions:
        try:
            ids = tuple(dict.fromkeys(_by_title(question, gold, found, candidates) for gold in question.gold_ids))
        except UserError as error:
            mistakes.add(error)
            continue
        resolved.append(replace(question, gold_ids=ids))
    return resolved


def shards_of(candidates: Candidates, rows: Rows) -> list[tuple[int, Rows]]:
    """(shard, rows of it in order) of the candidates named, for every shard that has any."""
    shard = candidates.shard[rows]
    return [(int(number), np.sort(candidates.row[rows[shard == number]]).astype(np.int64)) for number in np.unique(shard)]


def _by_title(question: RawQuestion, gold: str, found: Mapping[str, set[int]], candidates: Candidates) -> str:
    if not gold.startswith(TITLE):
        return gold
    title = gold.removeprefix(TITLE)
    rows = sorted(found.get(title, ()))
    if len(rows) != 1:
        state = f"{len(rows)} passages are called '{title}'" if rows else f"no passage is called '{title}'"
        remedy = "name a file of whole pages, each once, in data.files, or set data.on_error=skip"
        raise UserError(f"{question.where}: question '{question.question_id}': {state}; {remedy}")
    return candidates.name(rows[0])


def _joined(parts: list[pa.ChunkedArray]) -> pa.Array:
    chunks = [chunk for part in parts for chunk in part.chunks]
    return pa.concat_arrays(chunks)


def _canonical(keys: npt.NDArray[np.uint64]) -> Rows:
    """For each row the first row with its key."""
    order = np.lexsort((np.arange(len(keys)), keys[:, 1], keys[:, 0]))
    fresh = np.ones(len(keys), dtype=bool)
    fresh[1:] = (keys[order[1:]] != keys[order[:-1]]).any(axis=1)
    group = np.cumsum(fresh) - 1
    canonical = np.empty(len(keys), dtype=np.int64)
    canonical[order] = order[fresh][group]
    return canonical
