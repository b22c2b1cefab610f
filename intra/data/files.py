"""Reading the lines and records of input files, as streams, with errors that name file and line.

A file is plain UTF-8, gzip, Zstandard or Parquet as its name ends (`.gz`, `.zst`, `.parquet`); local or on s3://.
"""

from __future__ import annotations

import codecs
import contextlib
import gzip
import hashlib
import io
import json
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, cast

import pyarrow as pa
import pyarrow.parquet as pq
from botocore.exceptions import BotoCoreError, ClientError

from intra import storage
from intra.data.raw import Mistakes
from intra.data_config import DataConfig
from intra.errors import UserError, WorkflowError

Record = dict[str, Any]

PACKED = ("", ".gz", ".zst")
BLOCK = 1 << 20  # bytes read at once
MARK = b"\xef\xbb\xbf"  # of UTF-8, which some programs write before the first line
ROWS = 2048  # of Parquet, read at once
LARGEST = 64 << 20  # characters of one record of a JSON array
STOP = Mistakes()  # raises every mistake
_KINDS = {dict: "an object", list: "a list", str: "a string", bool: "true or false", int: "a number", float: "a number", type(None): "null"}
_SPACE = re.compile(r"[ \t\r\n]*")
_DECODER = json.JSONDecoder()


def kind(value: object) -> str:
    """The JSON name of a value's type, for messages."""
    return _KINDS.get(type(value), type(value).__name__)


def listing(data: DataConfig, holds: str) -> tuple[str, list[str]]:
    """The URL of `data.path` and the names in it. Raises UserError where it is a file, absent or empty; `holds`: what should be there."""
    url = storage.absolute(data.path or ".")
    if not storage.is_s3(url) and os.path.isfile(url):
        raise UserError(f"data.path={data.path}: is a file; name the folder that it lies in")
    names = storage.names(url)
    if not names:
        raise UserError(f"data.path={data.path}: no such folder, or an empty one; it must hold {holds}")
    return url, names


def either(folder: str, name: str, present: list[str]) -> str | None:
    """`name`, `name`.gz or `name`.zst, whichever of them is among the names present; None where none is. Two are a UserError."""
    found = [name + packed for packed in PACKED if name + packed in present]
    if len(found) > 1:
        raise UserError(f"{storage.join(folder, name)}: stands there both plain and as .gz or .zst; keep one of {', '.join(found)}")
    return found[0] if found else None


@contextlib.contextmanager
def opened(url: str) -> Iterator[IO[bytes]]:
    """The bytes of an input file as they lie there. Raises UserError where there is no such file, WorkflowError where it cannot be read.

    The second also while it is being read: an OSError from whoever unpacks the bytes is of what they hold, never of the storage.
    """
    fs, path = storage.filesystem(url)
    try:
        file = fs.open(path, "rb")
    except FileNotFoundError:
        raise UserError(f"{url}: no such file; check data.path and the file's name") from None
    except (IsADirectoryError, NotADirectoryError):
        raise UserError(f"{url}: expected a file, found a folder; check data.path and the file's name") from None
    except (OSError, BotoCoreError, ClientError) as error:
        raise _unread(url, error) from error
    with file:
        yield cast(IO[bytes], _Raw(url, file))


class _Raw(io.RawIOBase):
    """A file as its storage hands it out, whose failures are WorkflowErrors."""

    def __init__(self, url: str, file: IO[bytes]) -> None:
        self._url, self._file = url, file

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            return int(self._file.readinto(buffer))  # type: ignore[attr-defined]
        except (OSError, BotoCoreError, ClientError) as error:
            raise _unread(self._url, error) from error

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        try:
            return self._file.seek(offset, whence)
        except (OSError, BotoCoreError, ClientError) as error:
            raise _unread(self._url, error) from error


def _unread(url: str, error: Exception) -> WorkflowError:
    reason = " ".join(str(error).split())[:300] or type(error).__name__
    return WorkflowError(f"{url}: cannot be read ({reason}); run the same command again, and where that does not help check the file's "
                         "permissions and, for s3://, AWS_ENDPOINT_URL")  # fmt: skip


def digest(url: str) -> str:
    """SHA-256 (hex) of a file's bytes."""
    total = hashlib.sha256()
    with opened(url) as file:
        while block := file.read(BLOCK):
            total.update(block)
    return total.hexdigest()


def digests(folder: str | Path) -> dict[str, str]:
    """`digest` of each file that lies in a local folder, by name."""
    return {path.name: digest(str(path)) for path in sorted(Path(folder).iterdir())}


@contextlib.contextmanager
def unpacked(url: str) -> Iterator[IO[bytes]]:
    """The unpacked bytes of an input file. Raises as `opened`, and UserError where the packing is damaged or cut short."""
    packing = {"gz": "gzip", "zst": "Zstandard"}.get(url.rpartition(".")[2])
    with opened(url) as file:
        try:
            if packing == "gzip":
                yield cast(IO[bytes], gzip.GzipFile(fileobj=file))
            elif packing == "Zstandard":
                yield io.BufferedReader(pa.CompressedInputStream(pa.PythonFile(file, "r"), "zstd"), BLOCK)
            else:
                yield cast(IO[bytes], io.BufferedReader(cast(io.RawIOBase, file), BLOCK))
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise UserError(f"{url}: not a sound gzip file ({error}); fetch or compress it again") from None
        except OSError as error:
            if packing is None:
                raise
            raise UserError(
                f"{url}: not a sound {packing} file ({' '.join(str(error).split())[:120]}); fetch or compress it again"
            ) from None


def lines(url: str, mistakes: Mistakes = STOP) -> Iterator[tuple[str, str]]:
    """(`url:number`, text) of every line that is not blank. Mistakes: no such file, damaged packing, bytes that are not UTF-8."""
    try:
        with unpacked(url) as stream:
            for number, line in enumerate(stream, 1):
                try:
                    text = (line.removeprefix(MARK) if number == 1 else line).decode().rstrip("\r\n")
                except UnicodeDecodeError as error:
                    remedy = "convert the file, or name it .gz or .zst if it is packed"
                    mistakes.add(UserError(f"{url}:{number}: not UTF-8 ({error.reason}); {remedy}"))
                    continue
                if text.strip():
                    yield f"{url}:{number}", text
    except UserError as error:  # what was read of the file before stands
        mistakes.add(error, whole=True)


def records(url: str, mistakes: Mistakes = STOP) -> Iterator[tuple[str, Record]]:
    """(`url:number`, object) of every line of a JSONL file. Mistakes as `lines`, and a line that is not a JSON object."""
    for where, text in lines(url, mistakes):
        try:
            value = parse(where, text)
            if not isinstance(value, dict):
                raise UserError(f"{where}: expected a JSON object, found {kind(value)}; write one object a line")
        except UserError as error:
            mistakes.add(error)
        else:
            yield where, value


def objects(url: str, mistakes: Mistakes = STOP) -> Iterator[tuple[str, Record]]:
    """(where, object) of every object of a file that is JSONL or one JSON array, whichever it begins like, or of every row of Parquet.

    Of an array, `where` is `url:line (record n)`. All are read as streams.
    """
    if url.endswith(".parquet"):
        yield from rows(url, mistakes)
        return
    try:
        with unpacked(url) as stream:
            start = stream.read(len(MARK)).removeprefix(MARK).strip()  # little, so that damage further on is met by the reading itself
            while not start and (block := stream.read(64)):
                start = block.strip()
    except UserError as error:
        mistakes.add(error, whole=True)
        return
    if not start:
        mistakes.add(UserError(f"{url}: is empty; fetch it again or remove it"), whole=True)
        return
    yield from _array(url, mistakes) if start.startswith(b"[") else records(url, mistakes)


def rows(url: str, mistakes: Mistakes = STOP, columns: Sequence[str] = (), needed: Sequence[str] = ()) -> Iterator[tuple[str, Record]]:
    """(`url:row`, record) of every row of a Parquet file, rows counted from 1; of `columns` only, those that are there.

    Mistakes: no such file, a damaged one or one without rows or without a `needed` column, a row with strings that are not UTF-8.
    """
    try:
        with opened(url) as file:
            source = pq.ParquetFile(file)
            names = source.schema_arrow.names
            for name in needed:
                if name not in names:
                    raise UserError(f"{url}: the column '{name}' is missing; found the columns {', '.join(names)}")
            if not source.metadata.num_rows:
                raise UserError(f"{url}: holds no rows; fetch it again or remove it")
            number = 0
            for batch in source.iter_batches(ROWS, columns=[name for name in columns if name in names] or None):
                for record in _decoded(batch):
                    number += 1
                    if record is None:
                        mistakes.add(UserError(f"{url}:{number}: holds bytes that are not UTF-8; convert the file"))
                    else:
                        yield f"{url}:{number}", record
    except (pa.ArrowException, OSError) as error:  # the second from a damaged page
        mistakes.add(UserError(f"{url}: not a sound Parquet file ({' '.join(str(error).split())[:120]}); fetch it again"), whole=True)
    except UserError as error:
        mistakes.add(error, whole=True)


def _decoded(batch: pa.RecordBatch) -> Iterator[Record | None]:
    """The rows; None for one that is not UTF-8, which Arrow does not check of a string column."""
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:
        for index in range(batch.num_rows):
            try:
                yield batch.slice(index, 1).to_pylist()[0]
            except UnicodeDecodeError:
                yield None


def _array(url: str, mistakes: Mistakes) -> Iterator[tuple[str, Record]]:
    number = 0
    try:
        with unpacked(url) as stream:
            text = _Text(stream)
            text.take("[")
            if text.next() == "]":
                raise UserError(f"{url}:{text.line}: the list is empty; fetch the file again or remove it")
            closed = False
            while not closed:
                number += 1
                text.next()  # the record's own first line
                where = f"{url}:{text.line} (record {number})"
                value, raw = text.value(where)
                sign = text.next()
                if sign not in (",", "]"):
                    found = repr(sign) if sign else "the file's end"
                    raise UserError(f"{where}: not valid JSON (behind it a comma or ] must stand, found {found}); fetch the file again")
                text.take(sign)
                closed = sign == "]"
                try:
                    _whole(raw, where)
                    if not isinstance(value, dict):
                        raise UserError(f"{where}: expected a JSON object, found {kind(value)}; mend the list")
                except UserError as error:
                    mistakes.add(error)
                else:
                    yield where, value
            if text.next():
                raise UserError(f"{url}:{text.line}: something stands behind the end of the list; fetch the file again")
    except UserError as error:
        mistakes.add(error, whole=True)


def _whole(raw: str, where: str) -> None:
    try:
        raw.encode()
    except UnicodeEncodeError:  # the decoder has turned such bytes into halves of surrogate pairs
        raise UserError(f"{where}: holds bytes that are not UTF-8; convert the file, or name it .gz or .zst if it is packed") from None


class _Text:
    """A stream's text, a window of it in memory, to be read JSON value by value."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        # Bytes that are not UTF-8 do not end the reading: they make one bad record (`_whole`).
        self._decode = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape").decode
        self._text, self._at, self._more = "", 0, True
        self._line, self._counted = 1, 0

    @property
    def line(self) -> int:
        self._line += self._text.count("\n", self._counted, self._at)
        self._counted = self._at
        return self._line

    def next(self) -> str:
        """The next character that is not white space, which stays where it is; "" at the end."""
        while True:
            self._at = _SPACE.match(self._text, self._at).end()  # type: ignore[union-attr]
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more:
                return ""
            self._fill(BLOCK)

    def take(self, sign: str) -> None:
        if self.next() != sign:
            raise AssertionError(f"expected {sign}")
        self._at += 1

    def value(self, where: str) -> tuple[Any, str]:
        """The JSON value that stands next, and its text."""
        self.next()
        while True:
            try:
                value, end = _DECODER.raw_decode(self._text, self._at)
            except RecursionError as error:
                raise UserError(f"{where}: not valid JSON ({error})") from None
            except ValueError as error:
                held = len(self._text) - self._at
                if self._more and held < LARGEST:
                    self._fill(max(BLOCK, held))
                    continue
                reason = getattr(error, "msg", error)
                raise UserError(f"{where}: not valid JSON, or cut short ({reason}); fetch the file again") from None
            raw = self._text[self._at : end]
            self._at = end
            return value, raw

    def _fill(self, size: int) -> None:
        block = self._stream.read(size)
        self._more = bool(block)
        self._line = self.line
        self._text = self._text[self._at :] + self._decode(block, final=not block)
        self._at = self._counted = 0


def parse(where: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not valid JSON ({error}); write one JSON value a line") from None


def string(record: Record, key: str, where: str, *, default: str | None = None, blank: bool = False) -> str:
    """The string `record[key]`; `default` (if given) where it is absent or null. A blank one is a UserError unless allowed."""
    value = record.get(key)
    if value is None:
        value = _present(record, key, where) if default is None else default
    return _sound(value, key, where, blank)


def identifier(record: Record, key: str, where: str) -> str:
    """The string `record[key]` as an id: not blank, without white space (run files are separated by it)."""
    value = string(record, key, where)
    if value.split() != [value]:
        raise UserError(f"{where}: '{key}' {value!r} holds white space; run files are separated by it, so write an id without")
    return value


def strings(record: Record, key: str, where: str, meaning: str) -> tuple[str, ...]:
    """The list of strings `record[key]`, with at least one and none blank; `meaning` says what one of them is."""
    return tuple(_sound(value, key, where, False) for value in listed(record, key, where, meaning))


def listed(record: Record, key: str, where: str, meaning: str) -> list[Any]:
    """The list `record[key]`, with at least one element; `meaning` says what one of them is."""
    values = _present(record, key, where)
    if not isinstance(values, list):
        raise UserError(f"{where}: '{key}' must be a list (of at least one {meaning}), found {kind(values)}")
    if not values:
        raise UserError(f"{where}: '{key}' is empty; it needs at least one {meaning}: add it or remove the record")
    return values


def index(value: object, size: int | None, key: str, where: str) -> int:
    """`value` as an index into a list of `size` elements (null: of unknown length), counted from 0."""
    if type(value) is not int:
        raise UserError(f"{where}: '{key}' must hold whole numbers, found {repr(value)[:80]}")
    if value < 0 or (size is not None and value >= size):
        range_ = "they are counted from 0" if size is None else f"there are {size}, counted from 0"
        raise UserError(f"{where}: '{key}' holds the index {value}, out of range: {range_}; mend or remove it")
    return value


def integer(record: Record, key: str, where: str, *, default: int) -> int:
    """The whole number `record[key]`, at least 1, of 31 bits; `default` where it is absent or null."""
    value = record.get(key)
    if value is None:
        return default
    if type(value) is not int or not 1 <= value < 1 << 31:
        raise UserError(f"{where}: '{key}' must be a whole number of at least 1 (and below 2^31), found {repr(value)[:80]}")
    return value


def _present(record: Record, key: str, where: str) -> Any:
    if key not in record:
        raise UserError(f"{where}: '{key}' is missing; found the fields {', '.join(sorted(record)) or 'none'}")
    return record[key]


def _sound(value: object, key: str, where: str, blank: bool) -> str:
    if not isinstance(value, str):
        raise UserError(f"{where}: '{key}' must be a string, found {kind(value)}")
    if not blank and not value.strip():
        raise UserError(f"{where}: '{key}' is empty; fill it or remove the record")
    try:
        value.encode()
    except UnicodeEncodeError:  # JSON can write half a surrogate pair, which no UTF-8 file can hold
        raise UserError(f"{where}: '{key}' holds half a surrogate pair (\\ud800 to \\udfff); write the whole character") from None
    return value
