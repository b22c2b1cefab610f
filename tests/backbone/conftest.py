"""A tiny T5Gemma 2 with nothing trivial about it: random norms, grouped queries, sliding layers shorter than the texts."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from intra.backbone import adopted, tiny
from intra.backbone import model as backbone_model
from intra.config import ArchitectureConfig

from ..conftest import make_bert

WINDOW = 6
TEXT = "ada bell born oldtown film red moon directed by the river company founded in town a where was is of large small green"
WORDS = TEXT.split()
ARCHITECTURE = ArchitectureConfig(
    hidden_size=48, intermediate_size=64, encoder_layers=3, decoder_layers=4, heads=4, kv_heads=2, head_dim=16, vocabulary=128
)


def sentences(count: int, seed: int = 0, shortest: int = 3, longest: int = 20) -> list[str]:
    chance = random.Random(seed)
    return [" ".join(chance.choices(WORDS, k=chance.randint(shortest, longest))) for _ in range(count)]


def randomised(model: Any) -> Any:
    """Gives every norm weights far from the initial zeros, and the layers more say than the embeddings (or it only repeats itself)."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
            elif name.endswith("embed_tokens.weight"):
                parameter.mul_(0.2)
    return model


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return tiny.train_tokenizer(sentences(50), ARCHITECTURE)


@pytest.fixture(scope="session")
def folder(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of the tiny model."""
    path = tmp_path_factory.mktemp("backbone") / "model"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny, "SLIDING_WINDOW", WINDOW)
        model = tiny.build(ARCHITECTURE, tokenizer, seed=3)
    tiny.save(randomised(model), tokenizer, path)
    return path


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bert(tmp_path_factory.mktemp("bert") / "model", WORDS)


def over(bert: Path) -> ArchitectureConfig:
    """The size of a backbone over the tiny BERT."""
    return ArchitectureConfig(encoder=str(bert), hidden_size=48, intermediate_size=64, decoder_layers=4, heads=6, kv_heads=6, head_dim=24,
                              matching_heads=3)  # fmt: skip


@pytest.fixture(scope="session")
def adopted_folder(bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of an untrained backbone over the tiny BERT."""
    path = tmp_path_factory.mktemp("adopted") / "model"
    words = adopted.tokenizer(str(bert))
    tiny.save(adopted.build(over(bert), words, 3, sentences(60, seed=7)), words, path)
    return path


@pytest.fixture(scope="session")
def backbone(folder: Path) -> backbone_model.Backbone:
    return backbone_model.load(str(folder), device="cpu")


@pytest.fixture(scope="session")
def pristine(folder: Path) -> Any:
    """The same files, loaded by transformers alone; eager attention, which gives the attention weights."""
    from transformers import T5Gemma2ForConditionalGeneration

    return T5Gemma2ForConditionalGeneration.from_pretrained(folder, attn_implementation="eager").eval()
