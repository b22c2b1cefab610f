"""Files on a local path or on s3://, by fsspec: whole objects, byte ranges, folders.

A URL here is a local path, `file:///...` or `s3://bucket/prefix`. Every write is atomic: a reader sees the whole object
or none (local: temporary file and rename; S3: one put). Credentials, region and endpoint come from the environment's
usual AWS variables. A storage failure is a `WorkflowError` that names the URL; a missing object is FileNotFoundError. A place that cannot
be, below a file, in a bucket that is not there or of another scheme, is a `UserError`.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import io
import itertools
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import fsspec
from fsspec.spec import AbstractFileSystem

from intra.errors import UserError, WorkflowError

PIECE = 32 * 1024**2  # bytes of a large object read at once
TOGETHER = 4  # pieces on their way at once
_SCHEME = re.compile(r"[A-Za-z][\w+.-]*://")
_KNOWN = re.compile(r"s3://[^/]|file://.")


class NotAFolder(UserError, NotADirectoryError):
    """A path leads through a file."""


def is_s3(url: str) -> bool:
    return url.startswith("s3://")


def absolute(url: str, name: str = "place") -> str:
    """The URL as any process of a cluster must read it: s3:// as it is, a local path made absolute.

    Raises UserError, with the `name` of the setting, where it is empty or of a scheme unknown here: either would pass for a local folder.
    """
    if not url.strip() or (_SCHEME.match(url) and not _KNOWN.match(url)):
        raise UserError(f"{name}: found '{url}'; give a local folder, file:///FOLDER or s3://BUCKET/PREFIX")
    return url.rstrip("/") if is_s3(url) else str(Path(url.removeprefix("file://")).expanduser().resolve())


def join(url: str, *parts: str) -> str:
    return "/".join([url.rstrip("/"), *parts])


@functools.cache
def _s3() -> AbstractFileSystem:
    # Listings are never cached: other processes write under the same prefix.
    return fsspec.filesystem(
        "s3",
        use_listings_cache=False,
        config_kwargs={"connect_timeout": 5, "read_timeout": 60, "retries": {"max_attempts": 3, "mode": "standard"}},
    )


@functools.cache
def _local() -> AbstractFileSystem:
    return fsspec.filesystem("file")


def filesystem(url: str) -> tuple[AbstractFileSystem, str]:
    """The fsspec file system of `url` and the path within it."""
    place = absolute(url)
    return (_s3(), url.removeprefix("s3://")) if is_s3(url) else (_local(), place)


@functools.cache
def _client_errors() -> tuple[type[Exception], ...]:
    """What S3's clients raise beside OSError; imported where something has been raised."""
    from aiohttp import ClientError as HttpError
    from botocore.exceptions import BotoCoreError, ClientError

    return BotoCoreError, ClientError, HttpError


@contextlib.contextmanager
def _named(url: str, writes: bool = False) -> Iterator[None]:
    """Errors of the storage as ours, with the URL; `writes`: nothing is looked for, so that what is missing is where it was to be."""
    try:
        yield
    except (UserError, IsADirectoryError):
        raise
    except FileNotFoundError as error:
        if not writes:
            raise
        if is_s3(url) and "NoSuchUpload" not in str(error.__cause__):
            bucket = url.removeprefix("s3://").partition("/")[0]
            raise UserError(f"{url}: no such bucket '{bucket}'; create it, or mend root") from error
        raise WorkflowError(f"{url}: went away while it was written; run the same command again") from error
    except NotADirectoryError as error:
        found = next(place for place in (Path(filesystem(url)[1]), *Path(filesystem(url)[1]).parents) if place.exists())
        raise NotAFolder(f"{url}: {found} is a file, not a folder; mend root, or the path that leads there") from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            left = "no space left on the device" if error.errno == errno.ENOSPC else "no space left in the quota"
            raise WorkflowError(f"{url}: {left}; free some and run the same command again") from error
        raise WorkflowError(f"{url}: {error or type(error).__name__}; check the path, its permissions and, for s3://, "
                            "AWS_ENDPOINT_URL and the credentials") from error  # fmt: skip
    except _client_errors() as error:
        raise WorkflowError(f"{url}: {error}; check AWS_ENDPOINT_URL, the credentials and the bucket") from error
    except ValueError as error:  # the first request makes S3's client
        if not is_s3(url) or "Invalid endpoint" not in str(error):
            raise
        raise UserError(f"{url}: {error}; give AWS_ENDPOINT_URL with its scheme, such as http://HOST:9000") from error


def exists(url: str) -> bool:
    fs, path = filesystem(url)
    with _named(url):
        return bool(fs.exists(path))


def size(url: str) -> int:
    fs, path = filesystem(url)
    with _named(url):
        return int(fs.size(path))


def stamp(url: str) -> str:
    """What changes when a file is written again (size, time, inode or ETag), to spare reading an unchanged one."""
    fs, path = filesystem(url)
    with _named(url):
        info = fs.info(path)
    return repr([info.get(key) for key in ("size", "mtime", "ino", "ETag", "LastModified")])


def read_bytes(url: str) -> bytes:
    """The whole object, in memory once and a few pieces more."""
    fs, path = filesystem(url)
    with _named(url):
        if not is_s3(url):
            return bytes(fs.cat_file(path))
        length = int(fs.size(path))
        if length <= PIECE:
            return bytes(fs.cat_file(path, max_concurrency=1))  # one request, tried again where its answer is cut off
    whole = io.BytesIO()
    whole.seek(length - 1)
    whole.write(b"\0")  # its room at once
    whole.seek(0)
    for part in pieces(url):
        whole.write(part)
    return whole.getvalue()


def pieces(url: str) -> Iterator[bytes]:
    """The object's bytes in order, up to PIECE at a time, each tried again where S3 fails. WorkflowError: it changes meanwhile."""
    before, length = stamp(url), size(url)
    ranges = ((url, start, min(start + PIECE, length)) for start in range(0, length, PIECE))
    while together := list(itertools.islice(ranges, TOGETHER)):
        yield from read_ranges(together)
    if stamp(url) != before:
        raise WorkflowError(f"{url}: changed while it was read; run the same command again")


def fetch(url: str, path: str | Path) -> None:
    """Copies an object to a local file, which is there when it is whole. Memory does not grow with it."""
    with _named(str(path)), _whole(os.path.abspath(path)) as file:
        for part in pieces(url):
            file.write(part)


def read_ranges(requests: Sequence[tuple[str, int, int]]) -> list[bytes]:
    """The bytes [start, end) of each (url, start, end), read concurrently on S3."""
    if not requests:
        return []
    fs = filesystem(requests[0][0])[0]
    with _named(requests[0][0]):
        paths = {url: filesystem(url)[1] for url in {url for url, _, _ in requests}}
        if not is_s3(requests[0][0]):
            return _read_local_ranges([(paths[url], start, end) for url, start, end in requests])
        starts, ends = [start for _, start, _ in requests], [end for _, _, end in requests]
        return [bytes(part) for part in fs.cat_ranges([paths[url] for url, _, _ in requests], starts, ends, on_error="raise")]


def _read_local_ranges(requests: Sequence[tuple[str, int, int]]) -> list[bytes]:
    """Each file is opened once, one at a time: a training step reads a thousand ranges, and fsspec opens a file for each of them."""
    places: dict[str, list[int]] = {}
    for place, (path, _, _) in enumerate(requests):
        places.setdefault(path, []).append(place)
    found = [b""] * len(requests)
    for path, mine in places.items():
        with open(path, "rb", buffering=0) as file:
            for place in mine:
                _, start, end = requests[place]
                found[place] = os.pread(file.fileno(), end - start, start)
    return found


@contextlib.contextmanager
def _whole(path: str) -> Iterator[BinaryIO]:
    """A local file to be written, which comes to `path` when all of it has been."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    temporary = f"{path}.{uuid.uuid4().hex}.tmp"
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def write_bytes(url: str, data: bytes) -> None:
    fs, path = filesystem(url)
    with _named(url, writes=True):
        if is_s3(url):
            fs.pipe_file(path, data)
            return
        with _whole(path) as file:
            file.write(data)


def create(url: str, data: bytes) -> bool:
    """Writes the object as a whole unless there is one: of several callers one gets True, the others False."""
    fs, path = filesystem(url)
    with _named(url, writes=True):
        if not is_s3(url):
            os.makedirs(os.path.dirname(path), exist_ok=True)
        try:
            if is_s3(url):
                fs.pipe_file(path, data, mode="create")  # put with If-None-Match
                return True
            temporary = f"{path}.{uuid.uuid4().hex}.tmp"
            try:
                Path(temporary).write_bytes(data)
                os.link(temporary, path)
            finally:
                Path(temporary).unlink(missing_ok=True)
        except FileExistsError:
            return False
        except OSError as error:
            if "ConditionalRequestConflict" in str(error.__cause__):  # another's is just being written
                return False
            raise
    return True


def read_json(url: str) -> Any:
    return json.loads(read_bytes(url))


def write_json(url: str, value: Any) -> None:
    write_bytes(url, (json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode())


def names(url: str) -> list[str]:
    """Names directly below a folder, sorted; an absent folder is empty."""
    fs, path = filesystem(url)
    with _named(url):
        try:
            entries = fs.ls(path, detail=False)
        except FileNotFoundError:
            return []
    return sorted(os.path.basename(entry.rstrip("/")) for entry in entries)


def sizes(url: str) -> dict[str, int]:
    """Bytes of each file directly below a folder, by name, in one listing; an absent folder is empty."""
    fs, path = filesystem(url)
    with _named(url):
        try:
            entries = fs.ls(path, detail=True)
        except FileNotFoundError:
            return {}
    return {os.path.basename(entry["name"]): int(entry["size"]) for entry in entries if entry["type"] == "file"}


def files(url: str) -> list[str]:
    """Paths of all files below a folder, relative to it, sorted."""
    fs, path = filesystem(url)
    with _named(url):
        found = fs.find(path)
    return sorted(os.path.relpath(entry, path.rstrip("/")) for entry in found)


def upload(folder: str | Path, url: str) -> None:
    """Copies every file of a local folder to below `url`. Memory does not grow with them."""
    for file in sorted(Path(folder).rglob("*")):
        if file.is_file():
            _put(file, join(url, str(file.relative_to(folder))))


def _put(file: Path, url: str) -> None:
    fs, path = filesystem(url)
    with _named(url, writes=True):
        if is_s3(url):
            fs.put_file(str(file), path, max_concurrency=TOGETHER)  # in parts where it is large; it is there when the last one is
            return
        with open(file, "rb") as source, _whole(path) as target:
            shutil.copyfileobj(source, target, PIECE)


def download(url: str, folder: str | Path) -> None:
    """Copies every file below `url` into a local folder."""
    for name in files(url):
        fetch(join(url, name), Path(folder) / name)


def remove(url: str) -> None:
    """Deletes a file or a folder and all below it, if it is there."""
    fs, path = filesystem(url)
    with _named(url), contextlib.suppress(FileNotFoundError):
        fs.rm(path, recursive=True)
