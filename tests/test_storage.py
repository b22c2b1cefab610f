from __future__ import annotations

import errno
import os
import random
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp
import fsspec
import pytest

from intra import storage
from intra.artifact import Artifact, fingerprint
from intra.errors import UserError, WorkflowError

from .workflows.encode import proxy


def test_round_trip_and_listing(root: str) -> None:
    storage.write_bytes(storage.join(root, "a", "one"), b"0123456789")
    storage.write_json(storage.join(root, "a", "b", "two.json"), {"k": [1, "é"]})
    assert storage.read_bytes(storage.join(root, "a", "one")) == b"0123456789"
    assert storage.read_json(storage.join(root, "a", "b", "two.json")) == {"k": [1, "é"]}
    assert storage.read_ranges([(storage.join(root, "a", "one"), 2, 5), (storage.join(root, "a", "one"), 0, 1)]) == [b"234", b"0"]
    assert storage.names(storage.join(root, "a")) == ["b", "one"]
    assert storage.files(root) == ["a/b/two.json", "a/one"]
    assert storage.sizes(storage.join(root, "a")) == {"one": 10}
    assert storage.sizes(storage.join(root, "absent")) == {}
    assert storage.size(storage.join(root, "a", "one")) == 10
    assert storage.exists(storage.join(root, "a", "one"))
    assert not storage.exists(storage.join(root, "absent"))
    assert storage.names(storage.join(root, "absent")) == []


def test_an_object_is_replaced_whole_and_removed(root: str) -> None:
    url = storage.join(root, "x")
    storage.write_bytes(url, b"long first version")
    storage.write_bytes(url, b"second")
    assert storage.read_bytes(url) == b"second"
    storage.remove(url)
    assert not storage.exists(url)
    storage.remove(url)


def test_folders_travel(root: str, tmp_path: Path) -> None:
    (tmp_path / "from" / "deep").mkdir(parents=True)
    (tmp_path / "from" / "deep" / "f").write_bytes(b"f")
    storage.upload(tmp_path / "from", storage.join(root, "folder"))
    storage.download(storage.join(root, "folder"), tmp_path / "to")
    assert (tmp_path / "to" / "deep" / "f").read_bytes() == b"f"


def test_missing_object_is_file_not_found(root: str) -> None:
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(storage.join(root, "absent"))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_said_and_the_old_object_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    url = str(tmp_path / "x")
    storage.write_bytes(url, b"old")

    def full(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(WorkflowError, match="no space left"):
        storage.write_bytes(url, b"new")
    assert storage.read_bytes(url) == b"old"
    assert storage.names(str(tmp_path)) == ["x"]


def test_a_large_object_is_read_and_fetched_in_pieces(root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "PIECE", 1000)
    for length in (0, 999, 1000, 1001, 9500):
        data, url = random.Random(length).randbytes(length), storage.join(root, str(length))
        storage.write_bytes(url, data)
        assert storage.read_bytes(url) == data
        assert [len(part) for part in storage.pieces(url)] == [min(1000, length - start) for start in range(0, length, 1000)]
        storage.fetch(url, tmp_path / "to" / str(length))
        assert (tmp_path / "to" / str(length)).read_bytes() == data
    with pytest.raises(FileNotFoundError):
        storage.fetch(storage.join(root, "absent"), tmp_path / "to" / "absent")
    assert sorted(path.name for path in (tmp_path / "to").iterdir()) == ["0", "1000", "1001", "9500", "999"]


def test_an_object_that_changes_while_it_is_read_is_refused(root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "PIECE", 10)
    url = storage.join(root, "x")
    storage.write_bytes(url, b"0123456789" * 9)
    parts = storage.pieces(url)
    next(parts)
    storage.write_bytes(url, b"9876543210" * 9)
    with pytest.raises(WorkflowError, match="x: changed while it was read; run the same command again"):
        list(parts)


def test_a_large_object_is_read_again_where_an_answer_is_cut_off(
    s3_server: str, s3_root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, url = random.Random(0).randbytes(20_000), f"{s3_root}/x"
    storage.write_bytes(url, data)
    monkeypatch.setattr(storage, "PIECE", 1000)
    with proxy.before(s3_server) as between:
        asked: list[str] = []

        def fault(path: str) -> str | None:
            asked.append(path)
            return "cut answer" if len(asked) % 4 == 0 else None

        monkeypatch.setattr(between, "fault", fault)
        through = fsspec.filesystem(
            "s3", use_listings_cache=False, default_block_size=1000, endpoint_url=between.url, skip_instance_cache=True
        )
        monkeypatch.setattr(storage, "_s3", lambda: through)
        assert storage.read_bytes(url) == data
        storage.fetch(url, tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == data
    assert len(asked) > 2 * 20 * 4 / 3


def test_what_the_http_client_raises_is_one_line() -> None:
    with pytest.raises(WorkflowError, match="s3://bucket/x: the answer was cut; check AWS_ENDPOINT_URL"), storage._named("s3://bucket/x"):
        raise aiohttp.ClientPayloadError("the answer was cut")


def test_folders_travel_without_a_file_being_held_whole(root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "from").mkdir()
    (tmp_path / "from" / "f").write_bytes(b"file")

    def never(*_: object) -> bytes:
        raise AssertionError

    with monkeypatch.context() as patched:
        patched.setattr(Path, "read_bytes", never)
        patched.setattr(storage, "read_bytes", never)
        patched.setattr(storage, "write_bytes", never)
        storage.upload(tmp_path / "from", storage.join(root, "folder"))
        storage.download(storage.join(root, "folder"), tmp_path / "to")
    assert (tmp_path / "to" / "f").read_bytes() == b"file"


def test_an_upload_that_is_cut_off_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "from").mkdir()
    (tmp_path / "from" / "f").write_bytes(b"new")
    storage.write_bytes(str(tmp_path / "to" / "f"), b"old")

    def cut(source: Any, target: Any, length: int) -> None:
        target.write(source.read(1))
        raise OSError(errno.EIO, "cut")

    monkeypatch.setattr(shutil, "copyfileobj", cut)
    with pytest.raises(WorkflowError, match="cut"):
        storage.upload(tmp_path / "from", str(tmp_path / "to"))
    assert [path.read_bytes() for path in (tmp_path / "to").iterdir()] == [b"old"]


WRITES: list[Callable[[str], object]] = [lambda url: storage.write_bytes(url, b""), lambda url: storage.create(url, b"")]
READS: list[Callable[[str], object]] = [storage.read_bytes, storage.size, storage.stamp, storage.names, storage.sizes]


@pytest.mark.parametrize("write", [*WRITES, lambda url: storage.upload(Path(__file__).parent / "store", url)])
def test_a_bucket_that_is_not_there_is_the_users_mistake(s3_server: str, write: Callable[[str], object]) -> None:
    with pytest.raises(UserError, match=r"s3://typo/run.*: no such bucket 'typo'; create it, or mend root"):
        write("s3://typo/run")


@pytest.mark.parametrize("use", [*WRITES, *READS, lambda url: storage.read_ranges([(url, 0, 1)])])
def test_a_root_below_a_file_is_the_users_mistake(tmp_path: Path, use: Callable[[str], object]) -> None:
    (tmp_path / "file").touch()
    url = f"{tmp_path}/file/run/x"
    with pytest.raises(UserError, match=rf"{url}: {tmp_path}/file is a file, not a folder; mend root"):
        use(url)
    assert not storage.exists(url)


def test_more_files_are_read_than_may_be_open(tmp_path: Path) -> None:
    for number in range(60):
        (tmp_path / str(number)).write_bytes(b"%03d" % number)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.dup(0)
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free + 20, before[1]))
    try:
        found = storage.read_ranges([(f"{tmp_path}/{number}", 2, 3) for number in range(60)] * 2)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert found == [b"%d" % (number % 10) for number in range(60)] * 2


@pytest.mark.parametrize("url", ["", "gs://bucket/x", "S3://bucket/x", "s3://", "s3:///x"])
@pytest.mark.parametrize("use", [*WRITES, *READS, storage.absolute])
def test_a_place_of_another_kind_is_the_users_mistake(url: str, use: Callable[[str], object]) -> None:
    with pytest.raises(UserError, match=f"found '{url}'; give a local folder, file:///FOLDER or s3://BUCKET/PREFIX"):
        use(url)


@pytest.mark.parametrize("use", [*WRITES, *READS, storage.exists])
def test_an_endpoint_without_a_scheme_is_the_users_mistake(use: Callable[[str], object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "127.0.0.1:9000")
    new = fsspec.filesystem("s3", use_listings_cache=False, skip_instance_cache=True)
    monkeypatch.setattr(storage, "_s3", lambda: new)
    with pytest.raises(
        UserError, match=r"s3://b/x: Invalid endpoint: 127.0.0.1:9000; give AWS_ENDPOINT_URL with its scheme, such as http://"
    ):
        use("s3://b/x")


def test_absolute_leaves_s3_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert storage.absolute("s3://bucket/run/") == "s3://bucket/run"
    assert storage.absolute("runs/x") == str(tmp_path / "runs" / "x")
    assert storage.absolute(f"file://{tmp_path}") == str(tmp_path)


def test_fingerprint_does_not_see_order() -> None:
    assert fingerprint({"a": 1, "b": [2]}) == fingerprint({"b": [2], "a": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": 2})


def test_an_artifact_without_manifest_is_refused(root: str) -> None:
    artifact = Artifact("store", storage.join(root, "store", "abc"), "abc", "encode")
    with pytest.raises(UserError, match=r"is missing.*run workflows/encode\.py"):
        artifact.manifest()
    storage.write_bytes(artifact.path("commit", "0"), b"x")
    with pytest.raises(UserError, match="is incomplete"):
        artifact.manifest()
    artifact.finish({"rows": 1})
    assert artifact.complete()
    assert artifact.manifest() == {"kind": "store", "fingerprint": "abc", "rows": 1}
    storage.write_bytes(artifact.path("manifest.json"), b"{")
    with pytest.raises(UserError, match="not valid JSON"):
        artifact.manifest()
