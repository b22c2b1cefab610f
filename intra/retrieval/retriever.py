"""What retrieval training makes: retrieval tokens, one weight per layer and head, and the settings they belong to.

A folder that `Retriever.from_pretrained` reads:
    <folder>/model.safetensors   tokens float32 [R, d], weights float32 [layers, heads]
    <folder>/config.json         the settings and, where a workflow made it, its resolved configuration under "run"
    <folder>/README.md           the model card
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from intra import storage
from intra.errors import UserError
from intra.retrieval import scoring
from intra.retrieval.scoring import Scorer

if TYPE_CHECKING:
    from intra.backbone.model import Backbone, Memory

MODEL = "model.safetensors"
CONFIG = "config.json"
CARD = "README.md"
MODEL_TYPE = "intra-retriever"
NOISE = 0.1  # of the tokens at the start, in standard deviations of the embedding they start from
SCORINGS = ("per_head", "mixture", "mixed")


@dataclass(frozen=True)
class RetrieverSettings:
    """What a retriever was made for; it fits nothing else."""

    tokens: int  # R
    layers: int
    heads: int  # query heads of the decoder
    hidden_size: int  # d
    pooled_length: int  # L_p
    initial_context: int  # n_0
    initial_scoring: str  # dot | cosine | whitened
    scoring: str  # per_head | mixture | mixed
    backbone: str  # fingerprint
    store: str  # fingerprint
    temperature: float = 1.0  # what the components of a score are divided by


class Retriever(nn.Module):  # type: ignore[misc]
    """tokens: Parameter float32 [R, d], decoder inputs after the question, at the scale of scaled embeddings (paper Eq. 2).
    weights: Parameter float32 [layers, heads], alpha of App. B.1."""

    def __init__(self, settings: RetrieverSettings) -> None:
        """Raises ValueError for a scoring there is not."""
        if settings.scoring not in SCORINGS:
            raise ValueError(f"scoring '{settings.scoring}' is none of {', '.join(SCORINGS)}")
        super().__init__()
        self.settings = settings
        self.tokens = nn.Parameter(torch.zeros(settings.tokens, settings.hidden_size))
        summed = settings.layers * settings.heads * settings.tokens
        self.weights = nn.Parameter(torch.full((settings.layers, settings.heads), 1.0 / summed))

    @classmethod
    def initialise(cls, backbone: Backbone, settings: RetrieverSettings, seed: int) -> Self:
        """An untrained retriever, the same for the same seed.

        Every token starts at the embedding of the prompt's last token - where the decoder is about to answer - plus noise
        that sets the tokens apart. The weights start as `Backbone.head_shares` says; `calibrate` gives them their size.
        """
        retriever = cls(settings)
        retriever.check(backbone)
        last = torch.tensor(backbone.prompt_ids(["?"])[0][-1:], device=backbone.device)
        with torch.no_grad():
            start = backbone.model.get_decoder().embed_tokens(last)[0].float().cpu()
            noise = torch.randn(retriever.tokens.shape, generator=torch.Generator().manual_seed(seed))
            retriever.tokens.copy_(start + NOISE * start.std() * noise)
        return retriever

    def scorer(self, queries: Tensor, backbone: Backbone) -> Scorer:
        """The components of any chunks' scores for queries [B, L, H, R, e] (`scoring.scorer`), with this retriever's weights."""
        return scoring.scorer(self.settings.scoring, queries, backbone, self.weights.to(queries.device), self.settings.temperature)

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def calibrate(self, backbone: Backbone, prompt_ids: list[list[int]], memory: Memory, pooled: Tensor) -> None:
        """Scales the start (`Backbone.head_shares`) so that a component's scores have standard deviation 1 over `pooled` [N, P, d].

        Components and questions are averaged. The temperature divides these scores: the softmax starts from a spread of
        1 / temperature. Weights of 0 would give the tokens no gradient. Raises UserError where the scores do not differ at all.
        """
        self.weights.copy_(backbone.head_shares().expand_as(self.weights))
        queries = backbone.queries(prompt_ids, self.tokens.to(backbone.device), memory)
        components = self.scorer(queries, backbone)(pooled) * self.settings.temperature
        spread = float(components.std(dim=2).mean())
        if not spread > 0:
            raise UserError("retriever: the backbone scores every chunk alike, so there is nothing to train on; check backbone.model")
        self.weights /= spread

    def check(self, backbone: Backbone) -> None:
        """Raises UserError where this retriever was made for a backbone of another shape."""
        for name in ("layers", "heads", "hidden_size"):
            mine, its = getattr(self.settings, name), getattr(backbone, name)
            if mine != its:
                raise UserError(f"the retriever was made for a backbone with {name} {mine}, this one has {its}; train one for it")

    def check_store(self, hidden_size: int, pooled_length: int) -> None:
        """Raises UserError where the chunk store's pooled vectors have another shape than in training."""
        for name, its in (("hidden_size", hidden_size), ("pooled_length", pooled_length)):
            mine = getattr(self.settings, name)
            if mine != its:
                raise UserError(f"the retriever was made for a chunk store with {name} {mine}, this one has {its}; train one for it")

    def save_pretrained(self, folder: str, run: Mapping[str, Any] | None = None) -> None:
        """Writes the retriever to a local or s3:// folder. `run`: the configuration it was made with, kept beside the settings."""
        from safetensors.torch import save

        tensors = {name: parameter.detach().float().cpu().contiguous() for name, parameter in self.named_parameters()}
        storage.write_bytes(storage.join(folder, MODEL), save(tensors, metadata={"format": "pt"}))
        storage.write_bytes(storage.join(folder, CARD), self._card().encode())
        values: dict[str, Any] = {"model_type": MODEL_TYPE, **asdict(self.settings)}
        storage.write_json(storage.join(folder, CONFIG), values if run is None else {**values, "run": dict(run)})

    @classmethod
    def from_pretrained(cls, folder: str) -> Self:
        """Reads what `save_pretrained` wrote. Raises UserError where the folder is missing, incomplete or damaged."""
        from safetensors import SafetensorError
        from safetensors.torch import load

        files = {name: storage.join(folder, name) for name in (CONFIG, MODEL)}
        content = {}
        for name, url in files.items():
            try:
                content[name] = storage.read_bytes(url)
            except (FileNotFoundError, NotADirectoryError):
                raise UserError(f"retriever {folder}: no {name}; run workflows/train.py, or name the folder it made") from None
        try:
            values = json.loads(content[CONFIG])
            settings = RetrieverSettings(**{field.name: values[field.name] for field in fields(RetrieverSettings) if field.name in values})
            retriever = cls(settings)
        except (ValueError, TypeError, KeyError, RuntimeError) as error:
            raise UserError(f"{files[CONFIG]}: not the settings of a retriever ({_line(error)}); train it again") from None
        try:
            retriever.load_state_dict(load(content[MODEL]))
        except (SafetensorError, RuntimeError) as error:
            raise UserError(f"{files[MODEL]}: damaged, or not of the shapes config.json gives ({_line(error)}); train it again") from None
        if not all(torch.isfinite(parameter).all() for parameter in retriever.parameters()):
            raise UserError(f"{files[MODEL]}: holds a value that is not a finite number; train it again")
        return retriever

    def _card(self) -> str:
        settings = self.settings
        rows = "\n".join(f"| {name} | {value} |" for name, value in asdict(settings).items())
        variant = "" if settings.scoring == "per_head" else f" Its scoring `{settings.scoring}` is not the paper's score."
        return f"""---
library_name: intra
tags: [retrieval, intra]
---
# INTRA retriever

{settings.tokens} retrieval tokens of width {settings.hidden_size} and {settings.layers} x {settings.heads} layer and head weights
(arXiv 2605.05806, sections 3.1 and 3.2) for one frozen encoder-decoder and one chunk store; it fits no other.{variant}

| setting | value |
|---|---|
{rows}

    from intra.retrieval.retriever import Retriever
    retriever = Retriever.from_pretrained(FOLDER)

`backbone` and `store` are the fingerprints of the model whose states were searched and of their store. Data, seed and
training settings: `run` in `config.json`. Training curve, where it was trained by `workflows/train.py`: `curve.parquet`.
"""


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
