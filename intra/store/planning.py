"""What a store must encode and what it can borrow: from a pool, and from the complete stores of the same encoding beside it.

A chunk whose id, title and text stand in such a store is not encoded again; the new store's index points into the other's shards. So adding
passages costs the new ones, and removing some costs nothing. Which stores are borrowed from is written down first (`plan.json`): a run that
was cut off goes on with the same ones, whatever has been made beside it meanwhile. Borrowed shards that turned out damaged are left out, in
the order in which that was found: the chunks of each are encoded here then, as a shard behind those that were planned before.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from intra import storage
from intra.artifact import MANIFEST, Artifact
from intra.data.schema import Pool, PoolFile
from intra.store.format import DIGEST_BYTES, FORMAT, INDEX, PLAN, SCALE, SETTINGS, Shard, shards

GROUP = 65536  # rows of the pool read at once
PLACES = ("row", "n_tokens", "offset", "states_crc32", "pooled_crc32")  # columns of an index that say where a chunk lies

Manifest = dict[str, Any]


@dataclass(frozen=True)
class Lent:
    """Chunks that other stores hold: `rows` of the pool, for each the position in `shards` (manifest entries) and its index columns."""

    shards: list[dict[str, Any]] = field(default_factory=list)
    rows: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    shard: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    columns: dict[str, NDArray[Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """`fresh` are the rows of the pool that the store encodes itself, cut into `shards`: in pool order, behind them those of each shard
    that is `left_out`. `bases` are the stores it was planned to borrow from."""

    chunk_ids: list[str]
    digests: list[bytes]
    tokens: int  # of all chunks
    fresh: NDArray[np.int64]
    fresh_tokens: int
    shards: list[Shard]
    lent: Lent = Lent()
    bases: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()

    def rows_of(self, shard: Shard) -> NDArray[np.int64]:
        return self.fresh[shard.first : shard.first + shard.rows]

    def record(self) -> dict[str, Any]:
        """What plan.json says."""
        return {"bases": list(self.bases), "left_out": list(self.left_out)}


def digest(title: str, text: str) -> bytes:
    """Of a chunk's text, 16 bytes."""
    return hashlib.sha256(f"{title}\0{text}".encode()).digest()[:DIGEST_BYTES]


def digests(pool: Pool) -> list[bytes]:
    return [digest(title, text) for title, text in zip(pool.titles, pool.texts, strict=True)]


def content(chunk_ids: Sequence[str], marks: Sequence[bytes]) -> str:
    """SHA-256 (hex) of chunks' ids and digests, in order: what a shard holds."""
    whole = hashlib.sha256()
    for chunk_id, mark in zip(chunk_ids, marks, strict=True):
        whole.update(chunk_id.encode() + b"\0" + mark)
    return whole.hexdigest()


def make(store: Artifact, encoding: str, dataset: str, shard_chunks: int, *, reuse: bool = True, left_out: Sequence[str] = ()) -> Plan:
    """The plan of a store: the one it was begun with (plan.json) as long as its bases are complete, else a new one.

    `reuse` False borrows nothing; `left_out` names shards (<fingerprint>/<shard>) that are not to be borrowed: they change nothing of the
    cut that was made before. Writes nothing.
    """
    pool = PoolFile(dataset)
    chunk_ids: list[str] = []
    marks: list[bytes] = []
    lengths: list[NDArray[np.int64]] = []
    for first in range(0, len(pool), GROUP):
        part = pool.rows(first, min(GROUP, len(pool) - first))
        chunk_ids += part.chunk_ids
        marks += digests(part)
        lengths.append(part.table["n_tokens"].to_numpy().astype(np.int64))
    made = begun(store)
    left_out = tuple(dict.fromkeys([*made.get("left_out", ()), *sorted(left_out)]))
    found = siblings(store, encoding) if reuse or made.get("bases") else {}
    bases = [base for base in made["bases"] if base in found] if "bases" in made else list(found)
    if len(bases) < len(made.get("bases", ())):
        bases = list(found)  # one of them was deleted meanwhile
    lent, late, used = _lent(store, {base: found[base] for base in bases}, chunk_ids, marks, left_out)
    own = np.setdiff1d(np.arange(len(chunk_ids)), lent.rows, assume_unique=True)
    parts = [own[late[own] == place] for place in range(-1, len(left_out))]
    fresh = np.concatenate(parts)
    tokens = np.concatenate(lengths) if lengths else np.zeros(0, dtype=np.int64)
    cut: list[Shard] = []
    for part, before in zip(parts, np.cumsum([0, *map(len, parts)]).tolist(), strict=False):
        for shard in shards(len(part), shard_chunks):
            rows = part[shard.first : shard.first + shard.rows].tolist()
            mark = content([chunk_ids[row] for row in rows], [marks[row] for row in rows])
            cut.append(Shard(len(cut), before + shard.first, shard.rows, mark))
    return Plan(chunk_ids, marks, int(tokens.sum()), fresh, int(tokens[fresh].sum()), cut, lent, tuple(used), left_out)


def siblings(store: Artifact, encoding: str | None = None) -> dict[str, Manifest]:
    """Manifests of the complete stores beside this one, by fingerprint: the largest first; of that encoding, or of any."""
    parent = storage.join(store.url.rpartition("/")[0])
    found: dict[str, Manifest] = {}
    for name in storage.names(parent):
        if name == store.fingerprint:
            continue
        try:
            manifest = storage.read_json(storage.join(parent, name, MANIFEST))
        except (FileNotFoundError, NotADirectoryError, ValueError):
            continue  # incomplete, or no store
        fits = manifest.get("format") == FORMAT and manifest.get("fingerprint") == name
        if fits and (encoding is None or manifest.get("encoding") == encoding):
            found[name] = manifest
    return dict(sorted(found.items(), key=lambda item: (-item[1]["rows"], item[0])))


def borrowed_from(store: Artifact) -> set[str]:
    """Names of the store's shards that complete stores beside it borrow."""
    return {shard["name"] for manifest in siblings(store).values() for shard in manifest["shards"] if shard["store"] == store.fingerprint}


def nearest(store: Artifact, settings: Mapping[str, Any]) -> tuple[str, list[str]] | None:
    """Of the complete stores beside this one the most like it: its fingerprint, and what sets this one apart, in words."""
    found = []
    for name in siblings(store):
        place = storage.join(store.url.rpartition("/")[0], name, SETTINGS)
        if storage.exists(place):
            found.append((name, differences(settings, storage.read_json(place))))
    return min(found, key=lambda item: (len(item[1]), item[0]), default=None)


def differences(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """What sets two stores' settings (config.json) apart, in words."""
    left, right = _flat(mine), _flat(theirs)
    return [f"{key} {left.get(key)} instead of {right.get(key)}" for key in sorted(left | right) if left.get(key) != right.get(key)]


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return flat


def _scale(store: Artifact) -> str | None:
    """SHA-256 of the int8 scale that the store has already: its states and borrowed ones must have the same."""
    try:
        return hashlib.sha256(storage.read_bytes(store.path(SCALE))).hexdigest()
    except FileNotFoundError:
        return None


def begun(store: Artifact) -> dict[str, Any]:
    """What the store's plan.json says; empty where there is none that can be read."""
    try:
        found = storage.read_json(store.path(PLAN))
    except (FileNotFoundError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _lent(
    store: Artifact, bases: Mapping[str, Manifest], chunk_ids: Sequence[str], marks: Sequence[bytes], left_out: Sequence[str]
) -> tuple[Lent, NDArray[np.int64], list[str]]:
    """What the bases hold of the pool; by row the place in `left_out` of the last shard there that holds it, or -1; the bases used.

    A chunk is taken from the first base that has it elsewhere than in a shard that is left out.
    """
    parent = store.url.rpartition("/")[0]
    scale = _scale(store)
    entries: list[dict[str, Any]] = []
    position: dict[tuple[str, str], int] = {}
    place = np.full(len(chunk_ids), -1, dtype=np.int64)
    late = np.full(len(chunk_ids), -1, dtype=np.int64)
    refused = {name: number for number, name in enumerate(left_out)}
    columns = {name: np.zeros(len(chunk_ids), dtype=np.int64) for name in PLACES}
    used: list[str] = []
    for base, manifest in bases.items():
        its_scale = manifest["files"].get(SCALE)
        if scale is not None and its_scale != scale:
            continue  # int8 states of another mu and sigma
        index = pq.read_table(io.BytesIO(storage.read_bytes(storage.join(parent, base, INDEX))))
        row_of = {chunk_id: row for row, chunk_id in enumerate(index["chunk_id"].to_pylist())}
        its_marks, its_shard = index["digest"].to_pylist(), index["shard"].to_numpy()
        its_columns = {name: index[name].to_numpy() for name in PLACES}
        owners = [(shard["store"] or base, shard["name"]) for shard in manifest["shards"]]
        without = [refused.get(f"{owner}/{name}") for owner, name in owners]
        taken = False
        for row, (chunk_id, mark) in enumerate(zip(chunk_ids, marks, strict=True)):
            its_row = row_of.get(chunk_id)
            if its_row is None or place[row] >= 0 or its_marks[its_row] != mark:
                continue
            key = owners[its_shard[its_row]]
            if key[0] == store.fingerprint:
                continue
            taken = True
            if (refusal := without[its_shard[its_row]]) is not None:
                late[row] = max(late[row], refusal)
                continue
            if key not in position:
                position[key] = len(entries)
                entries.append({**manifest["shards"][its_shard[its_row]], "store": key[0]})
            place[row] = position[key]
            for name in PLACES:
                columns[name][row] = its_columns[name][its_row]
        if taken:
            used.append(base)
            scale = its_scale
    rows = np.flatnonzero(place >= 0)
    return Lent(entries, rows, place[rows], {name: values[rows] for name, values in columns.items()}), late, used
