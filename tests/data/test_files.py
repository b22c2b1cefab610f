"""Reading JSON lists as streams: across blocks, packed, damaged."""

from __future__ import annotations

import errno
import io
import json
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.local import LocalFileSystem

from intra.data import files
from intra.data.raw import Mistakes
from intra.data_config import DataConfig
from intra.errors import UserError, WorkflowError
from tests.data.conftest import bare
from tests.data.formats import write


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "BLOCK", 61)  # records, lines and characters lie across the blocks' edges


RECORDS: list[dict[str, Any]] = [{"n": n, "text": "é€𝄞 ]},{[" * (n % 7), "more": [{"a": [n] * (n % 40)}]} for n in range(200)]


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("name", ["a.json", "a.json.gz", "a.json.zst"])
def test_a_list_is_read_as_it_stands(tmp_path: Path, name: str, indent: int | None) -> None:
    text = json.dumps(RECORDS, ensure_ascii=False, indent=indent)
    path = str(write(tmp_path / name, f"\ufeff \n{text}\n\n"))
    found = list(files.objects(path))
    assert [record for _, record in found] == RECORDS
    lines = text.splitlines()
    starts = [number + 2 for number, line in enumerate(lines) if line == " {"] if indent else [2] * len(RECORDS)
    assert [where for where, _ in found] == [f"{path}:{line} (record {number})" for number, line in enumerate(starts, 1)]


@pytest.mark.parametrize("begin", [" \r\n\t ", "\ufeff", " " * 200])
@pytest.mark.parametrize("text", ['[{"a": 1}]', '{"a": 1}\n'])
def test_what_a_file_is_shows_behind_its_white_space(tmp_path: Path, begin: str, text: str) -> None:
    assert [record for _, record in files.objects(str(write(tmp_path / "a", begin + text)))] == [{"a": 1}]


def test_lines_before_a_cut_are_kept(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl.gz", "".join(f'{{"n": {n * n * 7919 % 1_000_003}}}\n' for n in range(300)))
    path.write_bytes(path.read_bytes()[:-5])
    mistakes = Mistakes(skip=True)
    assert (len(list(files.objects(str(path), mistakes))), mistakes.count) == (300, 1)


def test_several_zstandard_frames_are_one_file(tmp_path: Path) -> None:
    data = json.dumps(RECORDS).encode()
    (tmp_path / "a.json.zst").write_bytes(b"".join(pa.compress(part, codec="zstd", asbytes=True) for part in (data[:999], data[999:])))
    assert [record for _, record in files.objects(str(tmp_path / "a.json.zst"))] == RECORDS


@pytest.mark.parametrize(
    ("data", "found", "kept"),
    [
        ("[]", ":1: the list is empty", 0),
        ("", ": is empty", 0),
        ('[{"a": 1}, ]', ":1 (record 2): not valid JSON", 1),
        ('[{"a": 1}\n{"b": 2}]', ":1 (record 1): not valid JSON (behind it a comma or ] must stand, found '{')", 0),
        ('[{"a": 1},\n{"b": 2', ":2 (record 2): not valid JSON, or cut short", 1),
        ('[{"a": 1}', ":1 (record 1): not valid JSON (behind it a comma or ] must stand, found the file's end)", 0),
        ('[{"a": 1}] x', ":1: something stands behind the end of the list", 1),
        ('[{"a": 1}, 2, {"c": 3}]', ":1 (record 2): expected a JSON object, found a number", 2),
        (b'[{"a": 1},\n{"b": "\xff"},\n{"c": 3}]', ":2 (record 2): holds bytes that are not UTF-8", 2),
        ("[" * 100_000, ":1 (record 1): not valid JSON", 0),
    ],
)
def test_damage_is_named_and_what_is_sound_is_kept(tmp_path: Path, data: str | bytes, found: str, kept: int) -> None:
    path = str(write(tmp_path / "a.json", data))
    with pytest.raises(UserError) as caught:
        list(files.objects(path))
    assert str(caught.value).startswith(path + found)
    mistakes = Mistakes(skip=True)
    assert len(list(files.objects(path, mistakes))) == kept
    assert [bare(message) for message in mistakes.messages] == [bare(caught.value)]


@pytest.mark.parametrize(("name", "packing"), [("a.json.gz", "gzip"), ("a.json.zst", "Zstandard")])
def test_damaged_packing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, packing: str) -> None:
    monkeypatch.setattr(files, "BLOCK", 1 << 16)
    whole = write(tmp_path / name, json.dumps([{"n": n, "word": n * n * 7919 % 1_000_003} for n in range(20_000)])).read_bytes()
    for data in (whole[:-40], b"plain text"):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError, match=f"not a sound {packing} file"):
            list(files.objects(str(tmp_path / name)))
    (tmp_path / name).write_bytes(whole[:-40])
    mistakes = Mistakes(skip=True)
    found = list(files.objects(str(tmp_path / name), mistakes))
    assert 0 < len(found) < 20_000
    assert mistakes.count == 1
    assert mistakes.messages[0].endswith(" (the rest of the file is left out)")


class Busy(io.FileIO):
    """A file of which one read, at a byte between `first` and `last`, fails as a busy storage does, and every other is good."""

    first = last = 0

    def _check(self) -> None:
        if self.first <= self.tell() < self.last:
            Busy.last = 0
            raise OSError(errno.EBUSY, "Please reduce your request rate.")

    def read(self, size: int | None = -1) -> bytes:  # type: ignore[override]
        self._check()
        return super().read(size)

    def readinto(self, buffer: Any) -> int | None:  # type: ignore[override]
        self._check()
        return super().readinto(buffer)


@pytest.mark.parametrize(("first", "last"), [(0, 0.3), (0.3, 1)])
@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json.gz", "a.jsonl.zst", "a.json.zst", "a.parquet", "digest"])
def test_a_storage_that_fails_for_a_moment_is_no_damaged_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, first: float, last: float
) -> None:
    monkeypatch.setattr(files, "BLOCK", 1 << 12)
    rows = [{"n": n, "word": random.Random(n).randbytes(100).hex()} for n in range(4000)]
    if name == "a.parquet":
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / name)
    else:
        write(tmp_path / name, json.dumps(rows) if name.startswith("a.json.") else "".join(f"{json.dumps(row)}\n" for row in rows))
    path, size = str(tmp_path / name), (tmp_path / name).stat().st_size
    assert size > 4 * 65536  # so that what lies in the middle is not read with the beginning or the end
    monkeypatch.setattr(LocalFileSystem, "open", lambda self, path, mode: Busy(path, mode))
    mistakes = Mistakes(skip=True)
    if name != "digest":
        assert len(list(files.objects(path, mistakes))) == len(rows)
    monkeypatch.setattr(Busy, "first", first * size)
    monkeypatch.setattr(Busy, "last", last * size)
    with pytest.raises(WorkflowError, match=rf"^{path}: cannot be read \(.*Please reduce your request rate.*\); run the same command"):
        files.digest(path) if name == "digest" else list(files.objects(path, mistakes))
    assert mistakes.count == 0


def test_a_record_larger_than_any_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "LARGEST", 500)
    path = str(write(tmp_path / "a.json", json.dumps([{"text": "x" * 5000}])))
    with pytest.raises(UserError, match=r"record 1\): not valid JSON, or cut short"):
        list(files.objects(path))


def test_benchmarks_are_not_chosen_twice() -> None:
    entry = {"format": "psgs", "path": "a"}
    with pytest.raises(ValueError, match=r"with data.source=files remove it"):
        DataConfig.model_validate({"source": "files", "path": ".", "files": [entry], "benchmarks": ["nq"]})
