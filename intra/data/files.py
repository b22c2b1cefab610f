"""Reading the lines and records of input files, with errors that name file and line.

A file is plain UTF-8, or gzip where its name ends in `.gz`; local or on s3://.
"""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Iterator
from typing import Any

from intra import storage
from intra.errors import UserError

Record = dict[str, Any]

_KINDS = {dict: "an object", list: "a list", str: "a string", bool: "true or false", int: "a number", float: "a number", type(None): "null"}


def kind(value: object) -> str:
    """The JSON name of a value's type, for messages."""
    return _KINDS.get(type(value), type(value).__name__)


def either(folder: str, name: str, present: list[str]) -> str | None:
    """`name` or `name`.gz, whichever of them is among the names present; None where neither is. Both is a UserError."""
    found = [candidate for candidate in (name, f"{name}.gz") if candidate in present]
    if len(found) > 1:
        raise UserError(f"{storage.join(folder, name)}: stands there both plain and as .gz; remove one of them")
    return found[0] if found else None


def content(url: str) -> bytes:
    """The bytes of an input file. Raises UserError where there is no such file."""
    try:
        return storage.read_bytes(url)
    except FileNotFoundError:
        raise UserError(f"{url}: no such file; check data.path and the file's name") from None
    except (IsADirectoryError, NotADirectoryError):
        raise UserError(f"{url}: expected a file, found a folder; check data.path and the file's name") from None


def lines(url: str) -> Iterator[tuple[str, str]]:
    """(`url:number`, text) of every line that is not blank. Raises UserError: no such file, bad gzip, bytes that are not UTF-8."""
    stream: io.BufferedIOBase = io.BytesIO(content(url))
    if url.endswith(".gz"):
        stream = gzip.GzipFile(fileobj=stream)
    number = 0
    try:
        for number, line in enumerate(stream, 1):
            try:
                text = line.decode().rstrip("\r\n")
            except UnicodeDecodeError as error:
                raise UserError(f"{url}:{number}: not UTF-8 ({error.reason}); convert the file, or name it .gz if it is gzip") from None
            if text.strip():
                yield f"{url}:{number}", text
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{url}: not a sound gzip file (after line {number}: {error}); fetch or compress it again") from None


def records(url: str) -> Iterator[tuple[str, Record]]:
    """(`url:number`, object) of every line of a JSONL file. Raises UserError as `lines`, and for a line that is not a JSON object."""
    for where, text in lines(url):
        value = parse(where, text)
        if not isinstance(value, dict):
            raise UserError(f"{where}: expected a JSON object, found {kind(value)}; write one object a line")
        yield where, value


def parse(where: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not valid JSON ({error}); write one JSON value a line") from None


def string(record: Record, key: str, where: str, *, default: str | None = None, blank: bool = False) -> str:
    """The string `record[key]`; `default` (if given) where it is absent or null. A blank one is a UserError unless allowed."""
    value = record.get(key, default)
    if value is None and default is not None:
        value = default
    if key not in record and default is None:
        raise UserError(f"{where}: '{key}' is missing; found the fields {', '.join(sorted(record)) or 'none'}")
    return _sound(value, key, where, blank)


def identifier(record: Record, key: str, where: str) -> str:
    """The string `record[key]` as an id: not blank, without white space (run files are separated by it)."""
    value = string(record, key, where)
    if value.split() != [value]:
        raise UserError(f"{where}: '{key}' {value!r} holds white space; run files are separated by it, so write an id without")
    return value


def strings(record: Record, key: str, where: str, meaning: str) -> tuple[str, ...]:
    """The list of strings `record[key]`, with at least one and none blank; `meaning` says what one of them is."""
    if key not in record:
        raise UserError(f"{where}: '{key}' is missing; found the fields {', '.join(sorted(record)) or 'none'}")
    values = record[key]
    if not isinstance(values, list):
        raise UserError(f"{where}: '{key}' must be a list of strings, found {kind(values)}")
    if not values:
        raise UserError(f"{where}: '{key}' is empty; a question needs at least one {meaning}: add it or remove the question")
    return tuple(_sound(value, key, where, False) for value in values)


def integer(record: Record, key: str, where: str, *, default: int) -> int:
    """The whole number `record[key]`, at least 1; `default` where it is absent or null."""
    value = record.get(key)
    if value is None:
        return default
    if type(value) is not int or value < 1:
        raise UserError(f"{where}: '{key}' must be a whole number of at least 1, found {value!r}")
    return value


def _sound(value: object, key: str, where: str, blank: bool) -> str:
    if not isinstance(value, str):
        raise UserError(f"{where}: '{key}' must be a string, found {kind(value)}")
    if not blank and not value.strip():
        raise UserError(f"{where}: '{key}' is empty; fill it or remove the line")
    try:
        value.encode()
    except UnicodeEncodeError:  # JSON can write half a surrogate pair, which no UTF-8 file can hold
        raise UserError(f"{where}: '{key}' holds half a surrogate pair (\\ud800 to \\udfff); write the whole character") from None
    return value
