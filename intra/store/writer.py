"""Writes the chunk store: the token ids of a shard, its states and pooled vectors, its commit; at the end what closes the store.

Plain classes and functions, without Ray: `workflows/encode.py` fans them out, and a test or a script can call them in turn.

    row = LoadTokenize(dataset.url, ...)({"shard": 0, "first": 0, "rows": 1024})
    EncodeCommit(store, ...)(row)
    finish(store, ...)
"""

from __future__ import annotations

import hashlib
import os
import socket
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from safetensors.torch import save as save_safetensors
from torch import Tensor
from tqdm import tqdm

from intra import storage
from intra.artifact import Artifact
from intra.backbone import locate
from intra.backbone.packing import pooled as pool_padded
from intra.data.chunking import chunk_text
from intra.data.schema import Pool, PoolFile, to_parquet
from intra.errors import UserError, WorkflowError
from intra.store import planning, quantize
from intra.store.format import (
    COMMIT,
    DIGEST_BYTES,
    FORMAT,
    INDEX,
    INDEX_SCHEMA,
    PLAN,
    POOLED,
    SCALE,
    SCALE_BYTES,
    SETTINGS,
    STATES,
    WHITENING,
    Commit,
    Shard,
    committed,
    file_name,
    path,
    pooled_dtype,
    seal,
    token_bytes,
    torch_dtype,
)
from intra.store.planning import Lent
from intra.store.progress import peak_memory
from intra.store.reader import ChunkStore
from intra.whitening import Moments, whitening

if TYPE_CHECKING:  # where it runs it is imported late: it takes seconds, and neither the driver nor a loader needs it
    from intra.backbone.model import Backbone

Row = dict[str, Any]  # what passes between the stages: plain numbers and bytes


@dataclass(frozen=True, slots=True)
class Source:
    """The backbone that encodes, as any machine of a cluster finds it, and the digest its files must have there."""

    model: str
    revision: str | None
    digest: str
    dtype: str
    device: str
    threads: int


PADDING = 0.04  # of a batch: one more text may not bring it above this, once the batch is MINIMUM full
MINIMUM = 1 / 8
TILE = 1024  # chunks read at once for them
GROUP_CHUNKS = 16384  # chunks whose moments are taken together: a unit of work that no worker count changes


def batches(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Positions of `lengths` in batches whose padded size (longest x count) stays within `budget`; sorted by length, then place.

    A batch ends early where another text would make too much of it padding (PADDING). A text longer than the budget is a batch by
    itself. The same lengths always give the same batches: padding is part of the arithmetic, so a shard's bytes must not depend on
    what a worker did before.
    """
    order = sorted(range(len(lengths)), key=lambda place: (lengths[place], place))
    result: list[list[int]] = []
    filled = 0  # tokens of the newest batch
    for place in order:  # ascending: the newest is the longest of its batch
        padded = (len(result[-1]) + 1) * lengths[place] if result else 0
        spared = padded - filled - lengths[place] <= PADDING * padded or filled < MINIMUM * budget
        if result and padded <= budget and spared:
            result[-1].append(place)
            filled += lengths[place]
        else:
            result.append([place])
            filled = lengths[place]
    return result


class LoadTokenize:
    """First stage: reads a shard's chunks from the dataset and tokenises them.

    In: {shard, first, rows} and, where they are not rows [first, first + rows) of the pool, `places`, int64 as bytes; `content` where it
    is to be compared. Out: the same with `ids` and `lengths`, int32 as bytes, and `memory`, this process's largest so far in bytes.
    """

    def __init__(self, dataset: str, model: str, revision: str | None, template: str, store: Artifact | None = None) -> None:
        """Raises UserError where `store`, the one that is made, does not lie here as where the run was started."""
        if store is not None:
            _check_shared(store)
        self.pool = PoolFile(dataset)
        self.dataset = dataset
        self.tokenizer = locate.load_tokenizer(model, revision)
        self.template = template

    def __call__(self, row: Mapping[str, Any]) -> Row:
        """Raises WorkflowError where the chunks are not those planned, or one has another number of tokens than the dataset states."""
        chunks = self._chunks(row)
        if row.get("content") and planning.content(chunks.chunk_ids, planning.digests(chunks)) != row["content"]:
            raise WorkflowError(f"dataset {self.dataset} has changed since the run was started; run the same command again")
        texts = [chunk_text(title, text, self.template) for title, text in zip(chunks.titles, chunks.texts, strict=True)]
        ids = locate.token_ids(self.tokenizer, texts)
        for chunk_id, found, stated in zip(chunks.chunk_ids, ids, chunks.table["n_tokens"].to_pylist(), strict=True):
            if len(found) != stated:
                raise WorkflowError(
                    f"chunk {chunk_id}: {len(found)} tokens, but dataset {self.dataset} states {stated}; delete that dataset and run "
                    "workflows/prepare.py again with this backbone's tokenizer"
                )
        lengths = np.array([len(item) for item in ids], dtype=np.int32)
        flat = np.concatenate([np.asarray(item, dtype=np.int32) for item in ids])
        return {**row, "ids": flat.tobytes(), "lengths": lengths.tobytes(), "memory": peak_memory()}

    def _chunks(self, row: Mapping[str, Any]) -> Pool:
        if row.get("places") is None:
            return self.pool.rows(int(row["first"]), int(row["rows"]))
        places = np.frombuffer(row["places"], dtype=np.int64)
        runs = np.split(places, np.flatnonzero(np.diff(places) != 1) + 1)
        return Pool(pa.concat_tables([self.pool.rows(int(run[0]), len(run)).table for run in runs]))


class EncodeCommit:
    """Second stage: encodes a shard, writes its two files, then its commit. Loads the backbone once.

    In: what LoadTokenize gives. Out: numbers of the shard (`line`); the states go to storage, not through Ray. Two threads may call it:
    one encodes while the other writes.
    """

    def __init__(self, store: Artifact, source: Source, pooled_length: int, batch_tokens: int, dtype: str) -> None:
        """Raises UserError where the store does not lie here as where the run was started."""
        _check_shared(store)
        self.backbone = _load(source)
        self.threads = source.threads
        self.store = store
        self.pooled_length = pooled_length
        self.batch_tokens = batch_tokens
        self.dtype = dtype
        self.scale = read_scale(store.url) if dtype == "int8" else None
        self._computes = threading.Lock()

    def __call__(self, row: Mapping[str, Any]) -> Row:
        lengths, token_lists = tokens_of(row)
        shard = Shard(int(row["shard"]), int(row["first"]), int(row["rows"]), row.get("content", ""))
        commit = self._before(shard)
        with self._computes:
            torch.set_num_threads(self.threads)  # of this thread
            started = time.time()
            if commit is None:
                states, pooled = encode(
                    self.backbone, token_lists, self.pooled_length, self.batch_tokens, torch_dtype(self.dtype), self.scale
                )  # fmt: skip
            encoded = time.time()
        if commit is None:
            commit = write_shard(self.store, shard, lengths, states, pooled)
        return {
            "shard": shard.number,
            "rows": shard.rows,
            "tokens": commit["tokens"],
            "bytes": commit[STATES]["bytes"] + commit[POOLED]["bytes"],
            "worker": f"{socket.gethostname()}:{os.getpid()}",
            "device": f"{self.backbone.device.type}:{os.environ.get('CUDA_VISIBLE_DEVICES', '')}",  # Ray gives a worker its own
            "memory": max(peak_memory(), int(row["memory"])),  # of its loader, if that is the larger
            "started": started,
            "compute": encoded - started,
            "ended": time.time(),
        }

    def _before(self, shard: Shard) -> Commit | None:
        """The commit of a worker that died before it could say so: Ray gives its shard to another, and what is committed stays as it is."""
        if not storage.exists(path(self.store.url, COMMIT, shard.name)):
            return None
        return committed(self.store, [shard]).get(shard.number)


class Sample:
    """For int8: the mean and spread of the channels over the states of some chunks. In: what LoadTokenize gives. Out: `scale`, bytes."""

    def __init__(self, source: Source, batch_tokens: int) -> None:
        self.backbone = _load(source)
        self.batch_tokens = batch_tokens

    def __call__(self, row: Mapping[str, Any]) -> Row:
        lengths, token_lists = tokens_of(row)
        blocks = (block.float().cpu() for _, block, _ in _encoded(self.backbone, token_lists, lengths, self.batch_tokens))
        mu, sigma = quantize.statistics(blocks, self.backbone.hidden_size)
        return {"shard": row["shard"], "scale": save_safetensors({"mu": mu, "sigma": sigma})}


def sample_rows(digests: Sequence[bytes]) -> list[int]:
    """The rows of the pool whose states give mu and sigma: those with the smallest digests, which is at random and for ever the same."""
    return sorted(sorted(range(len(digests)), key=lambda row: (digests[row], row))[: quantize.SAMPLE])


def read_scale(url: str) -> tuple[Tensor, Tensor]:
    """(mu, sigma) of an int8 store, Tensor[d] fp32 each."""
    from safetensors.torch import load

    tensors = load(storage.read_bytes(storage.join(url, SCALE)))
    return tensors["mu"], tensors["sigma"]


def _check_shared(store: Artifact) -> None:
    """The plan is written before any worker starts: who does not find it would write shards that nobody else sees."""
    if not storage.exists(store.path(PLAN)):
        root = store.url.rsplit("/", 2)[0]
        raise UserError(f"root {root} is not the same folder on {socket.gethostname()} as where the run was started; give one that all "
                        "machines share, or s3:// with the same AWS_ENDPOINT_URL everywhere")  # fmt: skip


def _load(source: Source) -> Backbone:
    from intra.backbone.model import load

    torch.set_num_threads(source.threads)
    found = locate.digest(source.model, source.revision)
    if found != source.digest:
        raise WorkflowError(
            f"backbone {source.model}: its files on {socket.gethostname()} have the digest {found[:16]}, not {source.digest[:16]} as where "
            "the run was started; give every machine the same files, or pin backbone.revision"
        )
    return load(source.model, source.revision, dtype=source.dtype, device=source.device)


def tokens_of(row: Mapping[str, Any]) -> tuple[list[int], list[list[int]]]:
    """What LoadTokenize has put into a row: (number of tokens, token ids) of each chunk."""
    lengths = np.frombuffer(row["lengths"], dtype=np.int32)
    ids = np.split(np.frombuffer(row["ids"], dtype=np.int32), np.cumsum(lengths)[:-1])
    return lengths.tolist(), [item.tolist() for item in ids]


def encode(
    backbone: Backbone, ids: Sequence[Sequence[int]], pooled_length: int, batch_tokens: int, dtype: torch.dtype,
    scale: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The states of all chunks, one after the other, Tensor[sum n, d], and their pooled vectors, Tensor[len(ids), pooled_length, d].

    Both on the CPU in `dtype`; with int8, which needs `scale` (mu, sigma), the states are [sum n, d + 4] as `quantize.join` gives them and
    the pooled vectors bfloat16. Means are taken from the encoder's output, before it is rounded.
    Raises WorkflowError where the encoder gives a number that is not finite.
    """
    lengths = [len(item) for item in ids]
    starts = np.concatenate([[0], np.cumsum(lengths)]).tolist()
    small = dtype == torch.int8
    states = torch.empty(starts[-1], backbone.hidden_size + (SCALE_BYTES if small else 0), dtype=dtype)
    pooled = torch.empty(len(ids), pooled_length, backbone.hidden_size, dtype=torch.bfloat16 if small else dtype)
    mu, sigma = (part.to(backbone.device) for part in scale) if scale is not None else (None, None)
    finite = torch.ones((), dtype=torch.bool, device=backbone.device)
    for batch, flat, padded in _encoded(backbone, ids, lengths, batch_tokens):
        counts = torch.tensor([lengths[place] for place in batch], device=backbone.device)
        pooled[batch] = pool_padded(padded.float(), counts, pooled_length).to(pooled.dtype).cpu()
        finite &= torch.isfinite(flat).all()  # looked at once, at the end: asking earlier would stop a GPU at every batch
        stored = quantize.join(*quantize.quantize(flat, mu, sigma)) if small else flat.to(dtype)
        places = np.concatenate([np.arange(starts[place], starts[place + 1]) for place in batch])
        states[torch.from_numpy(places)] = stored.cpu()
    if not (finite.item() and torch.isfinite(pooled).all()):
        raise WorkflowError("the encoder gave a state that is not finite; check the backbone's weights, or try backbone.dtype=float32")
    return states, pooled


def _encoded(
    backbone: Backbone, ids: Sequence[Sequence[int]], lengths: Sequence[int], batch_tokens: int
) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """By batch: places, their states one after the other [sum n, d], and padded with 0 [B, T, d]; the model's dtype and device."""
    for batch in batches(lengths, batch_tokens):
        with torch.no_grad():
            padded, mask = backbone.states([ids[place] for place in batch])
        yield batch, padded[mask], padded.masked_fill(~mask[..., None], 0)


def write_shard(store: Artifact, shard: Shard, n_tokens: Sequence[int], states: Tensor, pooled: Tensor) -> Commit:
    """Writes both files, then the commit that makes them count. Returns the commit."""
    commit: Commit = {
        "format": FORMAT,
        "fingerprint": store.fingerprint,
        "shard": shard.number,
        "first": shard.first,
        "rows": shard.rows,
        "content": shard.content,
        "tokens": int(sum(n_tokens)),
        "n_tokens": list(n_tokens),
    }
    for folder, tensor, pieces in ((STATES, states, n_tokens), (POOLED, pooled, [1] * shard.rows)):
        data = save_safetensors({folder: tensor})
        start = len(data) - tensor.numel() * tensor.element_size()  # the one tensor ends the file
        commit[folder] = {"bytes": len(data), "data_offset": start, "sha256": hashlib.sha256(data).hexdigest()}
        item = tensor[0].numel() * tensor.element_size()
        ends = start + item * np.cumsum(pieces, dtype=np.int64)
        view = memoryview(data)
        commit[f"{folder}_crc32"] = [
            zlib.crc32(view[end - item * count : end]) for end, count in zip(ends.tolist(), pieces, strict=True)
        ]  # fmt: skip
        storage.write_bytes(path(store.url, folder, shard.name), data)
    storage.write_bytes(path(store.url, COMMIT, shard.name), seal(commit))
    return commit


Spread = Callable[[dict[str, Any], list[tuple[int, int]]], Iterable[Moments]]


def finish(
    store: Artifact, chunk_ids: Sequence[str], plan: Sequence[Shard], commits: Mapping[int, Commit], settings: Mapping[str, Any], *,
    backbone: str, hidden_size: int, pooled_length: int, dtype: str, threads: int, encoding: str = "",
    digests: Sequence[bytes] | None = None, rows: NDArray[np.int64] | None = None, lent: Lent | None = None, spread: Spread | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Closes a store whose shards are all committed: index, whitening, settings, and the manifest last. Returns the manifest.

    `settings` is what shaped the store (config.json); `backbone` the digest of the backbone's files. `digests`, `rows` (its `fresh`) and
    `lent` are of the plan (intra.store.planning) where it was made from one. `spread` takes the manifest and groups of rows (first, count)
    and gives the moments of each group's pooled vectors, in order: where the pool is large, from many workers (`group_moments`).
    """
    missing = [shard.name for shard in plan if shard.number not in commits]
    if missing:
        raise WorkflowError(f"store {store.url}: shard {missing[0]} is not committed ({len(missing)} in all); run the same command again")
    _remove_strays(store, plan)
    ordered = [commits[shard.number] for shard in plan]
    lent = lent or Lent()
    index = to_parquet(_index(chunk_ids, ordered, hidden_size, dtype, rows, lent, digests))
    storage.write_bytes(store.path(INDEX), index)
    stated = ("shard", "first", "rows", "tokens", STATES, POOLED)
    own = [{"store": None, "name": shard.name, **{key: commits[shard.number][key] for key in stated}} for shard in plan]
    files = {INDEX: hashlib.sha256(index).hexdigest()}
    if dtype == "int8":
        files[SCALE] = hashlib.sha256(storage.read_bytes(store.path(SCALE))).hexdigest()
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "encoding": encoding,
        "rows": len(chunk_ids),
        "rows_borrowed": len(lent.rows),
        "tokens": sum(commit["tokens"] for commit in ordered) + int(sum(lent.columns["n_tokens"].tolist()) if len(lent.rows) else 0),
        "bytes": sum(commit[folder]["bytes"] for commit in ordered for folder in (STATES, POOLED)),
        "hidden_size": hidden_size,
        "pooled_length": pooled_length,
        "dtype": dtype,
        "pooled_dtype": pooled_dtype(dtype),
        "backbone": backbone,
        "files": files,
        "shards": [*own, *lent.shards],
    }
    groups = [(first, min(GROUP_CHUNKS, len(chunk_ids) - first)) for first in range(0, len(chunk_ids), GROUP_CHUNKS)]
    parts = spread(manifest, groups) if spread is not None else _moments_here(store, manifest, groups, threads)
    whiten = _whitening(parts, hidden_size, threads)
    storage.write_bytes(store.path(WHITENING), whiten)
    files[WHITENING] = hashlib.sha256(whiten).hexdigest()
    storage.write_json(store.path(SETTINGS), dict(settings))
    store.finish(manifest)
    return manifest


def _index(
    chunk_ids: Sequence[str], commits: Sequence[Commit], hidden_size: int, dtype: str, rows: NDArray[np.int64] | None, lent: Lent,
    digests: Sequence[bytes] | None,
) -> pa.Table:  # fmt: skip
    """One line a chunk: those of the commits, one after the other, stand in `rows` (None: in all rows that are not lent)."""
    width = token_bytes(hidden_size, dtype)
    columns: dict[str, Any] = {name: np.zeros(len(chunk_ids), dtype=np.int64) for name in ("shard", *planning.PLACES)}
    own = rows if rows is not None else np.setdiff1d(np.arange(len(chunk_ids)), lent.rows, assume_unique=True)
    if commits:
        columns["shard"][own] = np.repeat(np.arange(len(commits)), [commit["rows"] for commit in commits])
        columns["row"][own] = np.concatenate([np.arange(commit["rows"]) for commit in commits])
        for name in ("n_tokens", "states_crc32", "pooled_crc32"):
            columns[name][own] = np.concatenate([np.asarray(commit[name], dtype=np.int64) for commit in commits])
        before = [np.concatenate([[0], np.cumsum(commit["n_tokens"][:-1], dtype=np.int64)]) for commit in commits]  # tokens
        offsets = [commit[STATES]["data_offset"] + width * tokens for commit, tokens in zip(commits, before, strict=True)]
        columns["offset"][own] = np.concatenate(offsets)
    if len(lent.rows):
        columns["shard"][lent.rows] = len(commits) + lent.shard
        for name in planning.PLACES:
            columns[name][lent.rows] = lent.columns[name]
    columns["chunk_id"] = list(chunk_ids)
    columns["digest"] = list(digests) if digests is not None else [bytes(DIGEST_BYTES)] * len(chunk_ids)
    return pa.table({name: pa.array(columns[name], type=INDEX_SCHEMA.field(name).type) for name in INDEX_SCHEMA.names}, schema=INDEX_SCHEMA)


def group_moments(store: ChunkStore, first: int, rows: int, threads: int) -> Moments:
    """The moments of the pooled vectors of rows [first, first + rows)."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)  # sums depend on it
    try:
        total = Moments(store.hidden_size)
        for _, vectors in store.tiles(TILE, first, rows):
            total.add(vectors.view(-1, store.hidden_size))
    finally:
        torch.set_num_threads(before)
    return total


class GroupMoments:
    """`group_moments` as a stage: {first, rows} -> with count, mean and scatter, float64 as bytes, and `memory` as LoadTokenize's."""

    def __init__(self, url: str, manifest: Mapping[str, Any], threads: int) -> None:
        self.store, self.threads = ChunkStore(url, manifest), threads

    def __call__(self, row: Mapping[str, Any]) -> Row:
        found = group_moments(self.store, int(row["first"]), int(row["rows"]), self.threads)
        return {**row, "count": found.count, "mean": found.mean.numpy().tobytes(), "scatter": found.scatter.numpy().tobytes(),
                "memory": peak_memory()}  # fmt: skip


def moments_of(row: Mapping[str, Any], hidden_size: int) -> Moments:
    """What GroupMoments has put into a row."""
    found = Moments(hidden_size)
    found.count = int(row["count"])
    found.mean = torch.frombuffer(bytearray(row["mean"]), dtype=torch.float64)
    found.scatter = torch.frombuffer(bytearray(row["scatter"]), dtype=torch.float64).view(hidden_size, hidden_size)
    return found


def _moments_here(store: Artifact, manifest: Mapping[str, Any], groups: Sequence[tuple[int, int]], threads: int) -> Iterator[Moments]:
    opened = ChunkStore(store.url, manifest)
    for first, rows in tqdm(groups, desc="whiten", unit="group", disable=None):
        yield group_moments(opened, first, rows, threads)


def _whitening(parts: Iterable[Moments], hidden_size: int, threads: int) -> bytes:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)  # sums depend on it
    try:
        total = Moments(hidden_size)
        for part in parts:
            total.merge(part)
        matrix = whitening(total.covariance())
    finally:
        torch.set_num_threads(before)
    return bytes(save_safetensors({"mean": total.mean.float(), "matrix": matrix.float().contiguous()}))


def _remove_strays(store: Artifact, plan: Sequence[Shard]) -> None:
    """Deletes what a killed worker or another cut of the pool left beside the shards; what other stores borrow stays."""
    kept = {shard.name for shard in plan} | planning.borrowed_from(store)
    for folder in (STATES, POOLED, COMMIT):
        expected = {file_name(folder, name) for name in kept}
        for name in storage.names(store.path(folder)):
            if name not in expected:
                storage.remove(store.path(folder, name))
