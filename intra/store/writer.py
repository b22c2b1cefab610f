"""Writes the chunk store: the token ids of a shard, its states and pooled vectors, its commit; at the end what closes the store.

Plain classes and functions, without Ray: `workflows/encode.py` fans them out, and a test or a script can call them in turn.

    row = LoadTokenize(dataset.url, ...)({"shard": 0, "first": 0, "rows": 1024})
    EncodeCommit(store, ...)(row)
    finish(store, ...)
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor
from tqdm import tqdm

from intra import storage
from intra.artifact import Artifact
from intra.backbone import locate
from intra.data.chunking import chunk_text
from intra.data.schema import PoolFile, to_parquet
from intra.errors import WorkflowError
from intra.store.format import COMMIT, INDEX, INDEX_SCHEMA, POOLED, STATES, WHITENING, Commit, Shard, file_name, path, torch_dtype
from intra.store.whitening import moments, whitening

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


def batches(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Positions of `lengths` in batches whose padded size (longest x count) stays within `budget`; sorted by length, then place.

    A text longer than the budget is a batch by itself. The same lengths always give the same batches: padding is part of the
    arithmetic, so a shard's bytes must not depend on what a worker did before.
    """
    order = sorted(range(len(lengths)), key=lambda place: (lengths[place], place))
    result: list[list[int]] = []
    for place in order:  # ascending: the newest is the longest of its batch
        if result and (len(result[-1]) + 1) * lengths[place] <= budget:
            result[-1].append(place)
        else:
            result.append([place])
    return result


class LoadTokenize:
    """First stage: reads a shard's chunks from the dataset and tokenises them.

    In: {shard, first, rows}. Out: the same with `ids` and `lengths`, int32 as bytes.
    """

    def __init__(self, dataset: str, model: str, revision: str | None, template: str) -> None:
        self.pool = PoolFile(dataset)
        self.dataset = dataset
        self.tokenizer = locate.load_tokenizer(model, revision)
        self.template = template

    def __call__(self, row: Mapping[str, Any]) -> Row:
        """Raises WorkflowError where a chunk has another number of tokens than the dataset states."""
        chunks = self.pool.rows(int(row["first"]), int(row["rows"]))
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
        return {**row, "ids": flat.tobytes(), "lengths": lengths.tobytes()}


class EncodeCommit:
    """Second stage: encodes a shard, writes its two files, then its commit. Loads the backbone once.

    In: what LoadTokenize gives. Out: {shard, rows, tokens, bytes}; the states go to storage, not through Ray.
    """

    def __init__(self, store: Artifact, source: Source, pooled_length: int, batch_tokens: int, dtype: str) -> None:
        from intra.backbone.model import load

        torch.set_num_threads(source.threads)
        found = locate.digest(source.model, source.revision)
        if found != source.digest:
            raise WorkflowError(
                f"backbone {source.model}: its files here have the digest {found[:16]}, not {source.digest[:16]} as where the run was "
                "started; give every machine the same files, or pin backbone.revision"
            )
        self.backbone = load(source.model, source.revision, dtype=source.dtype, device=source.device)
        self.store = store
        self.pooled_length = pooled_length
        self.batch_tokens = batch_tokens
        self.dtype = dtype

    def __call__(self, row: Mapping[str, Any]) -> Row:
        lengths = np.frombuffer(row["lengths"], dtype=np.int32)
        ids = np.split(np.frombuffer(row["ids"], dtype=np.int32), np.cumsum(lengths)[:-1])
        shard = Shard(int(row["shard"]), int(row["first"]), int(row["rows"]))
        token_lists = [item.tolist() for item in ids]
        states, pooled = encode(self.backbone, token_lists, self.pooled_length, self.batch_tokens, torch_dtype(self.dtype))
        commit = write_shard(self.store, shard, lengths.tolist(), states, pooled)
        return {
            "shard": shard.number,
            "rows": shard.rows,
            "tokens": commit["tokens"],
            "bytes": commit[STATES]["bytes"] + commit[POOLED]["bytes"],
        }


def encode(
    backbone: Backbone, ids: Sequence[Sequence[int]], pooled_length: int, batch_tokens: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The states of all chunks, one after the other, Tensor[sum n, d], and their pooled vectors, Tensor[len(ids), pooled_length, d].

    Both on the CPU in `dtype`; the means are taken from the encoder's output, before it is rounded to `dtype`.
    Raises WorkflowError where the encoder gives a number that is not finite.
    """
    from intra.backbone.model import pool_all

    lengths = [len(item) for item in ids]
    starts = np.concatenate([[0], np.cumsum(lengths)]).tolist()
    states = torch.empty(starts[-1], backbone.hidden_size, dtype=dtype)
    pooled = torch.empty(len(ids), pooled_length, backbone.hidden_size, dtype=dtype)
    for batch in batches(lengths, batch_tokens):
        encoded = backbone.encode([ids[place] for place in batch])
        means = pool_all(encoded, pooled_length)
        pooled[batch] = means.to("cpu", dtype)
        together = torch.cat(encoded).to("cpu", dtype)
        for place, item in zip(batch, together.split([lengths[place] for place in batch]), strict=True):
            states[starts[place] : starts[place + 1]] = item
    if not (torch.isfinite(states).all() and torch.isfinite(pooled).all()):
        raise WorkflowError("the encoder gave a state that is not finite; check the backbone's weights, or try backbone.dtype=float32")
    return states, pooled


def write_shard(store: Artifact, shard: Shard, n_tokens: Sequence[int], states: Tensor, pooled: Tensor) -> Commit:
    """Writes both files, then the commit that makes them count. Returns the commit."""
    commit: Commit = {
        "fingerprint": store.fingerprint,
        "shard": shard.number,
        "first": shard.first,
        "rows": shard.rows,
        "tokens": int(sum(n_tokens)),
        "n_tokens": list(n_tokens),
    }
    for folder, tensor in ((STATES, states), (POOLED, pooled)):
        data = save_safetensors({folder: tensor})
        commit[folder] = {
            "bytes": len(data),
            "data_offset": len(data) - tensor.numel() * tensor.element_size(),  # the one tensor ends the file
            "sha256": hashlib.sha256(data).hexdigest(),
        }
        storage.write_bytes(path(store.url, folder, shard.number), data)
    text = json.dumps(commit, sort_keys=True, separators=(",", ":")) + "\n"
    storage.write_bytes(path(store.url, COMMIT, shard.number), text.encode())
    return commit


def finish(
    store: Artifact, chunk_ids: Sequence[str], plan: Sequence[Shard], commits: Mapping[int, Commit], settings: Mapping[str, Any], *,
    backbone: str, hidden_size: int, pooled_length: int, dtype: str, threads: int,
) -> dict[str, Any]:  # fmt: skip
    """Closes a store whose shards are all committed: index, whitening, settings, and the manifest last. Returns the manifest.

    `settings` is what shaped the store (config.json); `backbone` the digest of the backbone's files.
    """
    missing = [shard.name for shard in plan if shard.number not in commits]
    if missing:
        raise WorkflowError(f"store {store.url}: shard {missing[0]} is not committed ({len(missing)} in all); run the same command again")
    _remove_strays(store, plan)
    ordered = [commits[shard.number] for shard in plan]
    storage.write_bytes(store.path(INDEX), to_parquet(_index(chunk_ids, ordered, hidden_size, dtype)))
    storage.write_bytes(store.path(WHITENING), _whitening(store, ordered, hidden_size, threads))
    storage.write_json(store.path("config.json"), dict(settings))
    manifest = {
        "rows": len(chunk_ids),
        "tokens": sum(commit["tokens"] for commit in ordered),
        "bytes": sum(commit[folder]["bytes"] for commit in ordered for folder in (STATES, POOLED)),
        "hidden_size": hidden_size,
        "pooled_length": pooled_length,
        "dtype": dtype,
        "backbone": backbone,
        "shards": [{key: commit[key] for key in ("shard", "first", "rows", "tokens", STATES, POOLED)} for commit in ordered],
    }
    store.finish(manifest)
    return manifest


def _index(chunk_ids: Sequence[str], commits: Sequence[Commit], hidden_size: int, dtype: str) -> pa.Table:
    n_tokens = np.concatenate([np.asarray(commit["n_tokens"], dtype=np.int64) for commit in commits])
    width = hidden_size * torch_dtype(dtype).itemsize
    before = [np.concatenate([[0], np.cumsum(commit["n_tokens"][:-1], dtype=np.int64)]) for commit in commits]  # tokens
    offsets = [commit[STATES]["data_offset"] + width * tokens for commit, tokens in zip(commits, before, strict=True)]
    columns = {
        "chunk_id": list(chunk_ids),
        "shard": np.repeat([commit["shard"] for commit in commits], [commit["rows"] for commit in commits]),
        "row": np.concatenate([np.arange(commit["rows"]) for commit in commits]),
        "n_tokens": n_tokens,
        "offset": np.concatenate(offsets),
    }
    return pa.table({name: pa.array(columns[name], type=INDEX_SCHEMA.field(name).type) for name in INDEX_SCHEMA.names}, schema=INDEX_SCHEMA)


def _whitening(store: Artifact, commits: Sequence[Commit], hidden_size: int, threads: int) -> bytes:
    def blocks() -> Iterator[Tensor]:
        for commit in tqdm(commits, desc="whiten", unit="shard", disable=None):
            yield load_safetensors(storage.read_bytes(path(store.url, POOLED, commit["shard"])))[POOLED]

    before = torch.get_num_threads()
    torch.set_num_threads(threads)  # sums depend on it
    try:
        total = moments(blocks(), hidden_size)
        matrix = whitening(total.covariance())
    finally:
        torch.set_num_threads(before)
    return bytes(save_safetensors({"mean": total.mean.float(), "matrix": matrix.float().contiguous()}))


def _remove_strays(store: Artifact, plan: Sequence[Shard]) -> None:
    """Deletes what a killed worker left beside the shards: half-written temporary files."""
    for folder in (STATES, POOLED, COMMIT):
        expected = {file_name(folder, shard.number) for shard in plan}
        for name in storage.names(store.path(folder)):
            if name not in expected:
                storage.remove(store.path(folder, name))
