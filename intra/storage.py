"""Files on a local path or on s3://, by fsspec: whole objects, byte ranges, folders.

A URL here is a local path, `file:///...` or `s3://bucket/prefix`. Every write is atomic: a reader sees the whole object
or none (local: temporary file and rename; S3: one put). Credentials, region and endpoint come from the environment's
usual AWS variables. A storage failure is a `WorkflowError` that names the URL; a missing object is FileNotFoundError.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import os
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import fsspec
from fsspec.spec import AbstractFileSystem

from intra.errors import WorkflowError


def is_s3(url: str) -> bool:
    return url.startswith("s3://")


def absolute(url: str) -> str:
    """The URL as any process of a cluster must read it: s3:// as it is, a local path made absolute."""
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
    return (_s3(), url.removeprefix("s3://")) if is_s3(url) else (_local(), absolute(url))


@contextlib.contextmanager
def _named(url: str) -> Iterator[None]:
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise WorkflowError(f"{url}: no space left on the device; free some and run the same command again") from error
        raise WorkflowError(f"{url}: {error or type(error).__name__}; check the path, its permissions and, for s3://, "
                            "AWS_ENDPOINT_URL and the credentials") from error  # fmt: skip
    except (BotoCoreError, ClientError) as error:
        raise WorkflowError(f"{url}: {error}; check AWS_ENDPOINT_URL, the credentials and the bucket") from error


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
    fs, path = filesystem(url)
    with _named(url):
        return bytes(fs.cat_file(path))


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
    """Each file is opened once: a training step reads a thousand ranges, and fsspec opens a file for each of them."""
    with contextlib.ExitStack() as stack:
        files = {path: stack.enter_context(open(path, "rb", buffering=0)) for path in dict.fromkeys(path for path, _, _ in requests)}
        return [os.pread(files[path].fileno(), end - start, start) for path, start, end in requests]


def write_bytes(url: str, data: bytes) -> None:
    fs, path = filesystem(url)
    with _named(url):
        if is_s3(url):
            fs.pipe_file(path, data)
            return
        os.makedirs(os.path.dirname(path), exist_ok=True)
        temporary = f"{path}.{uuid.uuid4().hex}.tmp"
        try:
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            Path(temporary).unlink(missing_ok=True)


def create(url: str, data: bytes) -> bool:
    """Writes the object as a whole unless there is one: of several callers one gets True, the others False."""
    fs, path = filesystem(url)
    with _named(url):
        try:
            if is_s3(url):
                fs.pipe_file(path, data, mode="create")  # put with If-None-Match
                return True
            os.makedirs(os.path.dirname(path), exist_ok=True)
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
    """Copies every file of a local folder to below `url`."""
    for file in sorted(Path(folder).rglob("*")):
        if file.is_file():
            write_bytes(join(url, str(file.relative_to(folder))), file.read_bytes())


def download(url: str, folder: str | Path) -> None:
    """Copies every file below `url` into a local folder."""
    for name in files(url):
        target = Path(folder) / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(read_bytes(join(url, name)))


def remove(url: str) -> None:
    """Deletes a file or a folder and all below it, if it is there."""
    fs, path = filesystem(url)
    with _named(url), contextlib.suppress(FileNotFoundError):
        fs.rm(path, recursive=True)
