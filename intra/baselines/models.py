"""Where the files of a baseline's model are, the digest that names them, and the model in memory (sentence-transformers).

`model` in the table is a directory, `package:NAME/FOLDER` (files of an installed Python package), or a hub id with its commit. What a
bi-encoder does with a text - prompt, pooling, normalisation, longest text - is what the table says, not what files beside the weights say.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from intra.backbone import locate
from intra.errors import UserError, WorkflowError
from intra.evaluate_config import CrossConfig, DenseConfig, LateConfig, ModelConfig

Floats = NDArray[np.float32]

_FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "artifact.metadata", "*/*.json", "*/*.safetensors")
_MODULES = {"Transformer", "Pooling", "Normalize"}  # of a sentence-transformers folder: what the table replaces
# The layers of an XLM-RoBERTa as flash-attention's modules name them (Jina's reranker), and as transformers does; _FUSED: all three of it.
_FLASH = (
    (".emb_ln.", ".embeddings.LayerNorm."), (".encoder.layers.", ".encoder.layer."), (".mixer.out_proj.", ".attention.output.dense."),
    (".norm1.", ".attention.output.LayerNorm."), (".mlp.fc1.", ".intermediate.dense."), (".mlp.fc2.", ".output.dense."),
    (".norm2.", ".output.LayerNorm."),
)  # fmt: skip
_FUSED = ".mixer.Wqkv."


def digest(name: str, settings: ModelConfig) -> str:
    """What stands for the weights in a fingerprint: the commit of a hub id, else the SHA-256 of the files' names and bytes."""
    if settings.revision is not None:
        return f"{settings.model}@{settings.revision}"
    place = folder(name, settings)
    files = sorted({path for pattern in _FILES for path in place.glob(pattern)})
    return _hash(place, tuple((str(path.relative_to(place)), path.stat().st_size, path.stat().st_mtime_ns) for path in files))


@functools.lru_cache(maxsize=32)
def _hash(place: Path, state: tuple[tuple[str, int, int], ...]) -> str:
    # Cached by size and time of every file: the fingerprints of several methods ask for it.
    total = hashlib.sha256()
    for name, size, _ in state:
        total.update(f"{name}\0{size}\0".encode())
        with (place / name).open("rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


def folder(name: str, settings: ModelConfig) -> Path:
    """The local folder of the model, fetched from the hub where need be. Raises UserError: not there, or without weights in safetensors."""
    model, key = settings.model, f"evaluate.models.{name}.model"
    if model.startswith("package:"):
        found = locate.package_folder(model)
        if found is None:
            package = model.removeprefix("package:").partition("/")[0]
            raise UserError(f"method {name}: the package {package} is not installed; run pip install '.[minilm]' in the project's folder, "
                            f"or set {key} to a directory of the model")  # fmt: skip
        place = found
    elif settings.revision is not None:
        place = _from_hub(name, settings)
    else:
        place = Path(model).expanduser()
    if not (place / "config.json").is_file() or not list(place.glob("*.safetensors")):
        raise UserError(f"{key}: no config.json and *.safetensors in {place}; give the directory of a model")
    return place


def _from_hub(name: str, settings: ModelConfig) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(settings.model, revision=settings.revision, allow_patterns=list(_FILES)))
    except Exception as error:  # the hub's client raises many kinds: all of them say that the files are not here
        raise WorkflowError(f"method {name}: {settings.model} at {settings.revision} cannot be had ({locate.one_line(error)}); check "
                            f"evaluate.models.{name}, the network and HF_HUB_OFFLINE, or give the directory of a downloaded copy"
                            ) from error  # fmt: skip


class Dense:
    """A bi-encoder: texts to float32 vectors [n, d]."""

    def __init__(self, name: str, settings: DenseConfig, device: str, threads: int, place: Path | None = None) -> None:
        """`place`: a folder of the weights other than the table's (fine-tuned ones).

        Raises UserError: sentence-transformers is not installed, the folder's model is more than encoder, pooling and norm, or its files
        lack a weight.
        """
        place = place or folder(name, settings)
        _check_modules(name, place)
        library = sentence_transformers(name, threads)
        from sentence_transformers.sentence_transformer import modules

        encoder = _transformer(name, place, settings, max_seq_length=settings.max_length)
        parts = [encoder, modules.Pooling(encoder.get_embedding_dimension(), settings.pooling)]
        parts += [_in_float32(modules.Normalize())] if settings.normalize else []
        self.model: Any = library.SentenceTransformer(modules=parts, device=device_of(device)).eval()
        self._settings = settings

    def passages(self, texts: Sequence[str]) -> tuple[Floats, list[int]]:
        """A vector a text [n, d], and how many vectors belong to each text: 1."""
        return self._encode(texts, self._settings.passage_prompt), [1] * len(texts)

    def questions(self, texts: Sequence[str]) -> list[Floats]:
        """A vector a question, each [1, d]."""
        return list(self._encode(texts, self._settings.query_prompt)[:, None])

    def cut(self, texts: Sequence[str]) -> int:
        """How many of the passages are longer than the model reads."""
        return _cut(self.model.tokenizer, [self._settings.passage_prompt + text for text in texts], self._settings.max_length)

    def cut_questions(self, texts: Sequence[str]) -> int:
        """How many of the questions are longer than the model reads."""
        return _cut(self.model.tokenizer, [self._settings.query_prompt + text for text in texts], self._settings.max_length)

    def _encode(self, texts: Sequence[str], prompt: str) -> Floats:
        vectors = self.model.encode(list(texts), prompt=prompt or None, batch_size=self._settings.batch_size, show_progress_bar=False)
        return np.ascontiguousarray(vectors, dtype=np.float32)


class Late:
    """Late interaction: texts to float32 vectors a token."""

    def __init__(self, name: str, settings: LateConfig, device: str, threads: int) -> None:
        """Raises UserError: sentence-transformers is not installed, or the files hold no projection that was trained."""
        place = folder(name, settings)
        library = sentence_transformers(name, threads)
        from sentence_transformers.sentence_transformer.modules import Normalize

        self._name, self._settings = name, settings
        if settings.projection:
            _check_projection(name, place)
            with _imports(name), quiet():
                self.model: Any = library.MultiVectorEncoder(
                    str(place), device=device_of(device), local_files_only=True, trust_remote_code=False,
                    model_kwargs={"dtype": settings.dtype, "use_safetensors": True}, processor_kwargs={"padding_side": "right"},
                )  # fmt: skip
            self.model[0].document_length = settings.max_length
            if self.model[0].query_expansion is None:
                self.model[0].query_length = settings.query_length
            else:
                self.model[0].query_expansion = {**self.model[0].query_expansion, "length": settings.query_length}
        else:
            from sentence_transformers.multi_vector_encoder import modules

            encoder = _transformer(name, place, settings, query_length=settings.query_length, document_length=settings.max_length)
            parts = [encoder, modules.MultiVectorMask(), Normalize(module_input_name="token_embeddings")]
            self.model = library.MultiVectorEncoder(modules=parts, device=device_of(device))
        for module in self.model.eval():
            if isinstance(module, Normalize):
                _in_float32(module)

    def passages(self, texts: Sequence[str]) -> tuple[Floats, list[int]]:
        """The token vectors of all texts [T, d], text after text, and how many belong to each."""
        found = self._encode(self.model.encode_document, texts)
        return np.concatenate(found), [len(vectors) for vectors in found]

    def questions(self, texts: Sequence[str]) -> list[Floats]:
        """The token vectors of each question, [tokens, d]."""
        return self._encode(self.model.encode_query, texts)

    def cut(self, texts: Sequence[str]) -> int:
        """How many of the passages are longer than the model reads."""
        prompt = (self.model.prompts or {}).get("document") or ""
        return _cut(self.model.tokenizer, [prompt + text for text in texts], self._settings.max_length)

    def cut_questions(self, texts: Sequence[str]) -> int:
        """How many of the questions are longer than the model reads."""
        prompt = (self.model.prompts or {}).get("query") or ""
        return _cut(self.model.tokenizer, [prompt + text for text in texts], self._settings.query_length)

    def _encode(self, encode: Any, texts: Sequence[str]) -> list[Floats]:
        found = encode(list(texts), batch_size=self._settings.batch_size, show_progress_bar=False)
        empty = next((text for text, vectors in zip(texts, found, strict=True) if not len(vectors)), None)
        if empty is not None:
            raise WorkflowError(f"method {self._name}: the model gives no vector for '{empty[:60]}'; choose another model")
        return [vectors.float().cpu().numpy() for vectors in found]


class Cross:
    """A cross-encoder: (question, passage) to a score."""

    def __init__(self, name: str, settings: CrossConfig, device: str, threads: int) -> None:
        """Raises UserError: sentence-transformers is not installed, or the files lack a weight, such as the head that gives the score, or
        hold one of another architecture."""
        place = folder(name, settings)
        library = sentence_transformers(name, threads)
        with _imports(name), quiet(), _nothing_random(name, place), _renamed(name, place) as known:
            self.model: Any = library.CrossEncoder(
                str(known), device=device_of(device), local_files_only=True, trust_remote_code=False,
                max_length=settings.max_length, num_labels=1, model_kwargs={"dtype": settings.dtype, "use_safetensors": True},
                processor_kwargs={"padding_side": "right"},
            )  # fmt: skip
        self._settings = settings
        self._lengths: dict[str, int] = {}  # in tokens, of each question and passage that `cut` was asked for

    def scores(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        """The logit of each pair."""
        import torch

        found = self.model.predict(
            list(pairs), batch_size=self._settings.batch_size, show_progress_bar=False, activation_fn=torch.nn.Identity()
        )
        return [float(score) for score in found]

    def cut(self, pairs: Sequence[tuple[str, str]]) -> int:
        """How many of the pairs are longer than the model reads. A text is tokenised once, however many pairs it stands in."""
        tokenizer = self.model.tokenizer
        texts = [text for text in dict.fromkeys(itertools.chain.from_iterable(pairs)) if text not in self._lengths]
        if texts:
            ids = tokenizer(texts, add_special_tokens=False, truncation=False, verbose=False)["input_ids"]
            self._lengths |= zip(texts, map(len, ids), strict=True)
        longest = self._settings.max_length - tokenizer.num_special_tokens_to_add(pair=True)
        return sum(self._lengths[question] + self._lengths[passage] > longest for question, passage in pairs)


def linear(model: Any) -> int:
    """The weights of a model's linear layers: a token takes twice as many operations."""
    import torch

    return sum(int(module.weight.numel()) for module in model.modules() if isinstance(module, torch.nn.Linear))


def operations(model: Any, tokenizer: Any, texts: Sequence[Any]) -> float:
    """To encode all the texts (or pairs), attention itself left out."""
    return 2.0 * linear(model) * sum(len(ids) for ids in tokenizer(list(texts), truncation=False, verbose=False)["input_ids"])


def sentence_transformers(name: str, threads: int = 1) -> Any:
    """The library, or a UserError with the remedy."""
    try:
        import sentence_transformers as library
    except ImportError as error:
        raise UserError(
            f"method {name} needs sentence-transformers ({error}); run pip install '.[models]' in the project's folder"
        ) from error
    import torch

    torch.set_num_threads(threads)
    return library


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


def device_of(name: str) -> str | None:
    """`evaluate.device` as sentence-transformers takes it. Raises UserError: no such device, or no GPU here."""
    from intra.backbone import model as backbones

    backbones.device_of(name, "evaluate.device")
    return None if name == "auto" else name


@contextlib.contextmanager
def _nothing_random(name: str, place: Path, unused: str | None = None) -> Iterator[None]:
    """Refuses a model whose files lack a weight, one with `unused` in its name aside: transformers only warns, and draws it at random.

    sentence-transformers hands transformers' report of what was loaded to nobody, so it is asked for here.
    """
    from transformers import PreTrainedModel

    loaded = PreTrainedModel.__dict__["from_pretrained"]

    def load(kind: Any, *given: Any, **settings: Any) -> Any:
        model, report = loaded.__get__(None, kind)(*given, **settings, output_loading_info=True)
        missing = sorted(key for key in report["missing_keys"] if unused is None or unused not in key)
        if missing:
            raise UserError(f"evaluate.models.{name}.model: the weights in {place} lack {missing[0]} ({len(missing)} in all) of "
                            f"{kind.__name__}; choose a model that was trained for this")  # fmt: skip
        return model

    PreTrainedModel.from_pretrained = classmethod(load)
    try:
        yield
    finally:
        PreTrainedModel.from_pretrained = loaded


@contextlib.contextmanager
def _imports(name: str) -> Iterator[None]:
    """What the library imports in vain for a model's files, in one line with the remedy."""
    try:
        yield
    except ImportError as error:
        raise UserError(f"method {name}: its model asks for what is not here ({locate.one_line(error)}); run pip install '.[models]' in "
                        f"the project's folder, and pip install what it names, or set evaluate.models.{name} to another model"
                        ) from error  # fmt: skip


@contextlib.contextmanager
def _renamed(name: str, place: Path) -> Iterator[Path]:
    """`place`; or, of a cross-encoder in flash-attention's layout, a copy in transformers', while the block lasts.

    Jina's reranker is XLM-RoBERTa with its layers under other names: absolute positions, norms behind the layers, exact GELU, the same
    head. Its repository's own code computes the same, but imports what transformers 5 no longer has; so none of it runs.
    """
    config = json.loads((place / "config.json").read_text())
    weights = _flash_weights(place) if "auto_map" in config else {}
    if not weights:
        yield place
        return
    import torch
    from safetensors.torch import save_file
    from transformers import XLMRobertaConfig, XLMRobertaForSequenceClassification

    if config.get("position_embedding_type", "absolute") != "absolute":
        raise UserError(f"evaluate.models.{name}.model: the positions of {place} are {config['position_embedding_type']}, XLM-RoBERTa's "
                        "are absolute; choose another model")  # fmt: skip
    config = {key: value for key, value in config.items() if key != "auto_map"} | {"model_type": XLMRobertaConfig.model_type}
    with torch.device("meta"):
        expected = XLMRobertaForSequenceClassification(XLMRobertaConfig.from_dict(config)).state_dict()
    strange = next((key for key in weights if key not in expected), None)
    if strange is not None:
        raise UserError(f"evaluate.models.{name}.model: {place} holds {strange}, which XLM-RoBERTa does not have; choose another model")
    with tempfile.TemporaryDirectory(prefix="intra-model-") as copy:
        for file in place.iterdir():
            if file.suffix in (".json", ".txt", ".model") and file.name != "model.safetensors.index.json":
                (Path(copy) / file.name).write_bytes(file.read_bytes())
        (Path(copy) / "config.json").write_text(json.dumps(config))
        save_file(weights, Path(copy) / "model.safetensors", {"format": "pt"})
        yield Path(copy)


def _flash_weights(place: Path) -> dict[str, Any]:
    """The weights under transformers' names; none where they are not in flash-attention's layout."""
    from safetensors import safe_open

    found: dict[str, Any] = {}
    for file in sorted(place.glob("*.safetensors")):
        with safe_open(file, "pt") as weights:
            found |= {key: weights.get_tensor(key) for key in weights.keys()}  # noqa: SIM118
    if not any(_FUSED in key for key in found):
        return {}
    renamed: dict[str, Any] = {}
    for key, weight in found.items():
        for old, new in _FLASH:
            key = key.replace(old, new)
        if _FUSED in key:
            parts = zip(("query", "key", "value"), weight.chunk(3), strict=True)
            renamed |= {key.replace(_FUSED, f".attention.self.{part}."): one.contiguous() for part, one in parts}
        else:
            renamed[key] = weight
    return renamed


def _in_float32(normalize: Any) -> Any:
    """Lets it take its vectors in float32, whatever the model computes in: bfloat16 would leave them between .997 and 1.001 long."""

    def widen(module: Any, given: tuple[Any, ...]) -> None:
        features, key = given[0], module.module_input_name
        if key in features:
            features[key] = features[key].float()

    normalize.register_forward_pre_hook(widen)
    return normalize


def _transformer(name: str, place: Path, settings: ModelConfig, **lengths: int) -> Any:
    from sentence_transformers.sentence_transformer import modules

    with _imports(name), quiet(), _nothing_random(name, place, "pooler"):  # `settings.pooling` is done here, not by the model's own pooler
        return modules.Transformer(
            str(place), model_kwargs={"dtype": settings.dtype, "use_safetensors": True}, config_kwargs={"trust_remote_code": False},
            # Right, whatever the tokenizer's file says: positions that count from the left would count the padding.
            processor_kwargs={"padding_side": "right"}, **lengths,
        )  # fmt: skip


def _cut(tokenizer: Any, texts: Sequence[str], longest: int) -> int:
    return sum(len(ids) > longest for ids in tokenizer(list(texts), truncation=False, verbose=False)["input_ids"])


def _check_modules(name: str, place: Path) -> None:
    for kind in _module_types(place):
        if kind not in _MODULES:
            raise UserError(f"evaluate.models.{name}.model: {place / 'modules.json'} asks for a {kind} layer, which a dense model here "
                            "does not have; choose another model")  # fmt: skip


def _check_projection(name: str, place: Path) -> None:
    """sentence-transformers gives an encoder without a projection a random one: that would be searched with in silence."""
    architectures = json.loads((place / "config.json").read_text()).get("architectures") or []
    if "Dense" not in _module_types(place) and "HF_ColBERT" not in architectures:
        raise UserError(f"evaluate.models.{name}: {place} holds no projection trained for late interaction; choose another model, or set "
                        "projection=false for the encoder's own token states")  # fmt: skip


def _module_types(place: Path) -> list[str]:
    file = place / "modules.json"
    return [module["type"].rsplit(".")[-1] for module in json.loads(file.read_text())] if file.is_file() else []
