from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from intra import storage
from intra.artifact import Artifact
from intra.backbone.model import pool
from intra.errors import UserError, WorkflowError
from intra.store import writer
from intra.store.format import COMMIT, PLAN, STATES, Shard, committed, path, shards

from .conftest import POOLED, WIDTH, FakeEncoder, Made, token_lists, write, write_pool


def contents(url: str) -> dict[str, bytes]:
    return {name: storage.read_bytes(storage.join(url, name)) for name in storage.files(url)}


def test_batches_hold_every_chunk_once_within_the_budget() -> None:
    lengths = [5, 1, 9, 40, 3, 3, 8, 2, 31]
    made = writer.batches(lengths, 30)
    assert sorted(place for batch in made for place in batch) == list(range(len(lengths)))
    sizes = [(len(batch), max(lengths[place] for place in batch)) for batch in made]
    assert all(count * longest <= 30 for count, longest in sizes if count > 1)
    assert sizes[-2:] == [(1, 31), (1, 40)]  # longer than the budget: alone, not cut
    assert max(count for count, _ in sizes) > 1
    assert [lengths[place] for batch in made for place in batch] == sorted(lengths)


def test_states_and_pooled_stand_in_pool_order_whatever_the_batches() -> None:
    encoder, ids = FakeEncoder(), token_lists(30)
    states, pooled = writer.encode(encoder, ids, POOLED, 24, torch.float32)  # type: ignore[arg-type]
    assert torch.equal(states, torch.cat(encoder.encode(ids)))
    torch.testing.assert_close(pooled, torch.stack([pool(item, POOLED) for item in encoder.encode(ids)]))


def test_pooled_vectors_are_means_of_unrounded_states() -> None:
    encoder, ids = FakeEncoder(), token_lists(30)
    _, exact = writer.encode(encoder, ids, POOLED, 24, torch.float32)  # type: ignore[arg-type]
    _, pooled = writer.encode(encoder, ids, POOLED, 24, torch.bfloat16)  # type: ignore[arg-type]
    assert torch.equal(pooled, exact.bfloat16())


def test_a_state_that_is_not_finite_is_refused() -> None:
    encoder = FakeEncoder()
    encoder.table[7, 2] = float("inf")
    with pytest.raises(WorkflowError, match="not finite"):
        writer.encode(encoder, [[1, 2], [3, 7]], POOLED, 24, torch.float32)  # type: ignore[arg-type]


def test_bytes_do_not_depend_on_the_order_of_the_shards(root: str) -> None:
    first = write(f"{root}/a", dtype="bfloat16")
    second = write(f"{root}/b", dtype="bfloat16", order=[3, 1, 4, 0, 2])
    assert len(contents(first.url)) == 5 * 3 + 4
    assert contents(first.url) == contents(second.url)


def test_what_a_killed_worker_left_behind_is_removed(root: str) -> None:
    clean, dirty = write(f"{root}/a"), f"{root}/b"
    storage.write_bytes(f"{dirty}/store/{'f' * 16}/states/00001.safetensors.0123.tmp", b"half")
    assert contents(write(dirty).url) == contents(clean.url)


def test_a_store_that_lacks_a_shard_is_not_closed(made: Made) -> None:
    storage.remove(path(made.url, COMMIT, "00002"))
    storage.remove(made.artifact.path("manifest.json"))
    plan = shards(23, 5)
    with pytest.raises(WorkflowError, match=r"shard 00002 is not committed \(1 in all\)"):
        writer.finish(
            made.artifact, made.chunk_ids, plan, committed(made.artifact, plan), {},
            backbone="b", hidden_size=WIDTH, pooled_length=POOLED, dtype="float32", threads=1,
        )  # fmt: skip
    assert not made.artifact.complete()


def test_the_commit_is_written_last(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    real = storage.write_bytes

    def spy(url: str, data: bytes) -> None:
        written.append(url)
        real(url, data)

    monkeypatch.setattr(storage, "write_bytes", spy)
    artifact = Artifact("store", f"{root}/store/x", "x", "encode")
    states, pooled = writer.encode(FakeEncoder(), [[1, 2], [3]], POOLED, 24, torch.float32)  # type: ignore[arg-type]
    writer.write_shard(artifact, Shard(0, 0, 2), [2, 1], states, pooled)
    assert [url.split("/")[-2] for url in written] == ["states", "pooled", "commit"]


def test_batches_of_real_lengths_are_nearly_without_padding() -> None:
    chance = random.Random(0)
    lengths = [min(256, max(12, round(chance.lognormvariate(4.6, 0.5)))) for _ in range(1024)]
    made = writer.batches(lengths, 8192)
    padded = sum(len(batch) * max(lengths[place] for place in batch) for batch in made)
    assert (padded - sum(lengths)) / padded <= 0.04
    assert sum(lengths) / len(made) >= 8192 / 3  # and the batches are not small


class Words:
    """A tokenizer: one token a word, between <bos> and <eos>."""

    def __call__(self, texts: list[str], **_: Any) -> dict[str, list[list[int]]]:
        return {"input_ids": [[1, *(2 + len(word) for word in text.split()), 0] for text in texts]}


@pytest.fixture
def pool_url(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(writer.locate, "load_tokenizer", lambda model, revision: Words())
    rows = {
        "chunk_id": [f"c{number}" for number in range(5)],
        "title": ["Ada", "", "Bell", "Cole", "Dean"],
        "text": ["was born", "alone", "x y z", "one", "two three"],
        "source": ["s"] * 5,
        "n_tokens": [5, 3, 6, 4, 5],
    }
    write_pool(str(tmp_path), rows)
    return str(tmp_path)


def test_a_slice_of_the_pool_is_tokenised(pool_url: str) -> None:
    row = writer.LoadTokenize(pool_url, "m", None, "{title} {text}")({"shard": 1, "first": 1, "rows": 3})
    assert {key: row[key] for key in ("shard", "first", "rows")} == {"shard": 1, "first": 1, "rows": 3}
    lengths = torch.frombuffer(bytearray(row["lengths"]), dtype=torch.int32).tolist()
    assert lengths == [3, 6, 4]
    assert torch.frombuffer(bytearray(row["ids"]), dtype=torch.int32).tolist() == [1, 7, 0, 1, 6, 3, 3, 3, 0, 1, 6, 5, 0]


def test_another_number_of_tokens_than_the_dataset_states_is_an_error(pool_url: str) -> None:
    load = writer.LoadTokenize(pool_url, "m", None, "{title} says {text}")
    with pytest.raises(WorkflowError, match=r"chunk c0: 6 tokens, but dataset .* states 5"):
        load({"shard": 0, "first": 0, "rows": 2})


def test_a_backbone_with_other_files_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setattr(writer.locate, "digest", lambda model, revision: "a" * 64)
    source = writer.Source("org/model", None, "b" * 64, "float32", "cpu", 1)
    store = Artifact("store", str(tmp_path), "x", "encode")
    storage.write_json(store.path(PLAN), {})
    with pytest.raises(WorkflowError, match=r"backbone org/model: its files on .* have the digest aaaa"):
        writer.EncodeCommit(store, source, POOLED, 64, "float32")


def test_a_root_that_the_machines_do_not_share_is_refused_before_anything_is_read(tmp_path: Any) -> None:
    """The plan, which the driver has written, is not there."""
    store = Artifact("store", f"{tmp_path}/root/store/x", "x", "encode")
    source = writer.Source("org/model", None, "b" * 64, "float32", "cpu", 1)
    why = rf"root {tmp_path}/root is not the same folder on .* as where the run was started; give one that all machines share, or s3://"
    with pytest.raises(UserError, match=why):
        writer.LoadTokenize(f"{tmp_path}/root/dataset/y", "org/model", None, "{text}", store)
    with pytest.raises(UserError, match=why):
        writer.EncodeCommit(store, source, POOLED, 64, "float32")


def test_states_file_is_plain_safetensors(made: Made) -> None:
    from safetensors.torch import load

    tensors = load(storage.read_bytes(path(made.url, STATES, "00000")))
    assert list(tensors) == ["states"]
    assert torch.equal(tensors["states"], torch.cat(made.states[:5]))


def test_a_committed_shard_stays_as_it_is_when_it_is_asked_for_again(monkeypatch: pytest.MonkeyPatch, root: str) -> None:
    """A worker may die between its commit and its report; Ray then gives the shard to another."""
    encoder, ids = FakeEncoder(), token_lists(4)
    monkeypatch.setattr(writer, "_load", lambda source: encoder)
    store = Artifact("store", root, "x", "encode")
    storage.write_json(store.path(PLAN), {})
    work = writer.EncodeCommit(store, writer.Source("m", None, "b" * 64, "float32", "cpu", 1), POOLED, 64, "float32")
    flat = torch.tensor([token for mine in ids for token in mine], dtype=torch.int32)
    lengths = torch.tensor([len(mine) for mine in ids], dtype=torch.int32)
    row = {"shard": 0, "first": 0, "rows": 4, "ids": flat.numpy().tobytes(), "lengths": lengths.numpy().tobytes(), "memory": 0}
    first, before = work(row), contents(root)
    encoder.table += 1  # it would write something else
    again = work(row)
    assert {key: again[key] for key in ("shard", "rows", "tokens", "bytes")} == {
        key: first[key] for key in ("shard", "rows", "tokens", "bytes")
    }
    assert contents(root) == before
    name = next(name for name in before if name.startswith(COMMIT))
    storage.write_bytes(storage.join(root, name), before[name].replace(b"1", b"2"))  # a commit that cannot be trusted
    work(row)
    assert contents(root) != before
