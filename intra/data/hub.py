"""Fetches input files from the Hugging Face hub: a pinned commit, checked bytes, resumed where a download was cut off.

An entry of `data.files` with `repo` names a file of a data set; it comes to `path` below `data.path`, a local folder. While it is on its
way it lies beside it as `<path>.<checksum>.partial`; `.fetched/<path>.json` below `data.path` says what it is. No code of the hub's is run.
huggingface_hub does the talking (its HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE hold); its own hf_hub_download starts a file anew in each
process.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import os
import re
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from intra import storage
from intra.data import files, sources
from intra.data_config import DataConfig, FileConfig
from intra.errors import UserError, WorkflowError

TIMEOUT = 10.0  # seconds, for what is known of a file
WITHOUT = "without data, configs/quickstart.yaml makes a synthetic world"
_COMMIT, _SHA256, _SHA1 = (re.compile(f"[0-9a-f]{{{digits}}}") for digits in (40, 64, 40))


def missing(data: DataConfig) -> list[FileConfig]:
    """The entries that are to be fetched: of the hub, and not yet here as the commit that they name."""
    return [entry for entry in data.files if entry.repo and not _here(data, entry)]


def fetch(data: DataConfig, endpoint: str | None = None) -> list[str]:
    """Fetches what is missing; returns the files' paths. `endpoint` is the hub's address (null: HF_ENDPOINT, or the public one).

    Raises UserError: no pinned commit, an unknown data set, commit or file, one behind a licence, a checksum that is not the pinned one,
    offline with files missing. WorkflowError: the hub cannot be reached, bytes that are not what the hub says.
    """
    wanted = missing(data)
    if not wanted:
        return []
    if storage.is_s3(str(data.path)):
        raise UserError(
            f"data.path={data.path}: files of the hub are fetched to a local folder; fetch there, then copy it, .fetched too, to s3://"
        )
    for entry in wanted:
        if data.offline or _offline():
            raise UserError(
                f"data.files: {entry.path} of {entry.repo} (commit {entry.revision or 'not pinned'}) is not in {data.path}, and offline "
                f"nothing is fetched (data.offline, HF_HUB_OFFLINE); fetch it where there is a network and copy {data.path}, or, {WITHOUT}"
            )
        if not entry.revision or not _COMMIT.fullmatch(entry.revision):
            found = f"'{entry.revision}' is no commit" if entry.revision else "no revision is set"
            commit = _asked(entry, lambda hub, entry=entry: hub.HfApi(endpoint=endpoint).dataset_info(entry.repo, timeout=TIMEOUT).sha)
            raise UserError(f"data.files: {entry.path} of {entry.repo}: {found}; to pin what the hub has now, set revision: {commit}")
    return [_fetch(data, entry, endpoint) for entry in wanted]


def _fetch(data: DataConfig, entry: FileConfig, endpoint: str | None) -> str:
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers, disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    name = f"data.files: {entry.path} of {entry.repo} at {entry.revision}"
    url = _asked(entry, lambda hub: hub.hf_hub_url(entry.repo, entry.path, repo_type="dataset", revision=entry.revision, endpoint=endpoint))
    about = _about(entry, url, endpoint)
    if about.commit_hash != entry.revision:
        raise UserError(f"{name}: the hub answers with the commit {about.commit_hash}; set revision to the commit that is meant")
    checksum = str(about.etag)
    if not _SHA256.fullmatch(checksum) and not _SHA1.fullmatch(checksum):
        raise WorkflowError(f"{name}: the hub gives no checksum (ETag '{checksum}'); check HF_ENDPOINT")
    if entry.sha256 and _SHA256.fullmatch(checksum) and checksum != entry.sha256:
        raise UserError(f"{name}: sha256 is pinned as {entry.sha256}, the hub has {checksum}; mend one of revision and sha256")
    target = _target(data, entry)
    partial = target.with_name(f"{target.name}.{checksum[:12]}.partial")
    try:
        partial.parent.mkdir(parents=True, exist_ok=True)
        file = partial.open("ab")
    except OSError as error:
        raise UserError(f"{partial}: cannot be written ({error.strerror}); name a folder that can be as data.path") from None
    headers = build_hf_headers()
    if urlsplit(about.location).hostname != urlsplit(url).hostname:
        headers.pop("authorization", None)  # the token is for the hub, not for where it keeps its files
    with file:
        if about.size is not None and file.tell() > about.size:
            file.truncate(0)
        _asked(
            entry,
            lambda hub: http_get(about.location, file, resume_size=file.tell(), headers=headers, expected_size=about.size,
                                 displayed_filename=entry.path),
            f"; {partial.name} keeps what came, and the same command goes on from there",
        )  # fmt: skip
    sha256 = files.digest(str(partial))
    if _git_blob(partial) != checksum if _SHA1.fullmatch(checksum) else sha256 != checksum:
        partial.unlink()
        raise WorkflowError(
            f"{name}: what came has another checksum than the hub says ({checksum}) and was removed; run the same command again"
        )
    if entry.sha256 and sha256 != entry.sha256:
        partial.unlink()
        raise UserError(f"{name}: sha256 is pinned as {entry.sha256}, what came has {sha256} and was removed; mend revision or sha256")
    os.replace(partial, target)
    record = {"repo": entry.repo, "revision": entry.revision, "sha256": sha256, "size": target.stat().st_size}
    storage.write_json(_record(data, entry), record)
    return str(target)


def _about(entry: FileConfig, url: str, endpoint: str | None) -> Any:
    """What the hub says of a file (commit, ETag, size, location). Raises UserError with the names there are where it has no such file."""
    from huggingface_hub import get_hf_file_metadata
    from huggingface_hub.errors import EntryNotFoundError

    try:
        return _asked(entry, lambda hub: get_hf_file_metadata(url, timeout=TIMEOUT, endpoint=endpoint))
    except UserError as error:
        if not isinstance(error.__context__, EntryNotFoundError):
            raise
    names = _asked(
        entry, lambda hub: hub.HfApi(endpoint=endpoint).list_repo_files(entry.repo, revision=entry.revision, repo_type="dataset")
    )
    near = difflib.get_close_matches(entry.path, names, n=5, cutoff=0.4) or names[:5]
    raise UserError(f"data.files: {entry.path}: {entry.repo} at {entry.revision} has no such file; it has, for one, {', '.join(near)}")


def _here(data: DataConfig, entry: FileConfig) -> bool:
    """Whether the file is here: of the pinned checksum, however it came, or, where none is pinned, fetched as the commit it is pinned to.

    Raises UserError where a file is in the way of which neither can be said.
    """
    url = storage.join(storage.absolute(str(data.path)), entry.path)
    if not storage.exists(url):
        return False
    if entry.sha256:
        if (found := sources.digest(url)) != entry.sha256:
            raise UserError(f"{url}: data.files pins its sha256 as {entry.sha256}, the file has {found}; remove it, or mend sha256")
        return True
    known = {}
    with contextlib.suppress(FileNotFoundError, ValueError):  # none, or damaged: then nothing is known
        known = storage.read_json(_record(data, entry))
    same = known.get("repo") == entry.repo and known.get("size") == storage.size(url)
    if same and known.get("revision") == entry.revision:
        return True
    was = f"commit {known.get('revision')}" if same else "of unknown origin"
    raise UserError(
        f"{url}: is not known as what data.files names ({entry.repo}, commit {entry.revision}) but {was}; remove it, name another "
        "data.path, or, if it is what you mean, set the entry's sha256, or take out its repo"
    )


def _asked(entry: FileConfig, question: Any, kept: str = "") -> Any:
    """What the hub answers; its errors as one line."""
    import huggingface_hub as hub
    from huggingface_hub import errors

    name = f"data.files: {entry.path} of {entry.repo}" + (f" at {entry.revision}" if entry.revision else "")
    try:
        return question(hub)
    except errors.GatedRepoError:
        raise UserError(f"{name}: the hub asks for its licence to be accepted; accept it on the data set's page and set HF_TOKEN") from None
    except errors.RevisionNotFoundError:
        raise UserError(f"{name}: the hub has no such commit; mend revision") from None
    except errors.RepositoryNotFoundError:
        raise UserError(f"{name}: the hub has no such data set; check the spelling, or set HF_TOKEN if it is private") from None
    except errors.EntryNotFoundError:
        raise UserError(f"{name}: the data set has no such file; mend path") from None
    except errors.HFValidationError as error:
        raise UserError(f"{name}: {' '.join(str(error).split())[:200]}") from None
    except Exception as error:  # of the HTTP client, whose classes differ between versions
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise WorkflowError(f"{name}: the download failed ({reason}){kept or f'; check the network; {WITHOUT}'}") from error


def _offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def _target(data: DataConfig, entry: FileConfig) -> Path:
    return Path(storage.absolute(str(data.path))) / entry.path


def _record(data: DataConfig, entry: FileConfig) -> str:
    return storage.join(storage.absolute(str(data.path)), ".fetched", f"{entry.path}.json")


def _git_blob(path: Path) -> str:
    """The SHA-1 by which git, and so the hub, knows a small file."""
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
