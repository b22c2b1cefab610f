from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from intra import storage
from intra.artifact import Artifact, fingerprint
from intra.errors import UserError, WorkflowError


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


def test_a_full_disk_is_said_and_the_old_object_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = str(tmp_path / "x")
    storage.write_bytes(url, b"old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(WorkflowError, match="no space left"):
        storage.write_bytes(url, b"new")
    assert storage.read_bytes(url) == b"old"
    assert storage.names(str(tmp_path)) == ["x"]


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
