"""A tiny backbone, a pool of small texts, and a chunk store in memory with the reader's methods."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import Tensor

from intra import whitening
from intra.backbone import model, tiny
from intra.config import ArchitectureConfig, RetrieverTrainConfig
from intra.data.schema import Question
from intra.retrieval.retriever import Retriever, RetrieverSettings

PEOPLE = [
    "ada", "bruno", "cora", "dario", "edith", "felix", "greta", "hugo", "ines", "jonas",
    "karla", "lena", "milo", "nora", "oskar", "paula", "rita", "simon", "tessa", "viktor",
]  # fmt: skip
TOWNS = ["arden", "berg", "calder", "dorn", "elms", "farrow", "glen", "holt", "innes", "jarrow"]
POOLED = 3
SCORINGS = ["per_head", "mixture", "mixed"]
ARCHITECTURE = ArchitectureConfig(
    hidden_size=32, intermediate_size=48, encoder_layers=1, decoder_layers=2, heads=4, kv_heads=2, head_dim=8, vocabulary=128
)
TRAIN = RetrieverTrainConfig(
    steps=6, batch_size=8, micro_batch=2, warmup_steps=2, hard_negatives=3, sampled_negatives=5, checkpoint_every=2, threads=1
)


@dataclass
class MemoryStore:
    """What ChunkStore gives, from states in memory."""

    chunk_ids: list[str]
    kept: list[Tensor]
    pooled_length: int = POOLED
    dtype: str = "float32"
    tile_reads: int = 0
    row_of: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.row_of = {chunk_id: row for row, chunk_id in enumerate(self.chunk_ids)}
        self.vectors = model.pool_all(self.kept, self.pooled_length)

    def __len__(self) -> int:
        return len(self.chunk_ids)

    @property
    def hidden_size(self) -> int:
        return int(self.kept[0].shape[-1])

    def states(self, chunk_ids: Sequence[str]) -> list[Tensor]:
        return [self.kept[self.row_of[chunk_id]] for chunk_id in chunk_ids]

    def rows(self, chunk_ids: Sequence[str]) -> list[int]:
        return [self.row_of[chunk_id] for chunk_id in chunk_ids]

    def pooled(self, rows: Sequence[int]) -> Tensor:
        return self.vectors[list(rows)]

    def tiles(self, tile_chunks: int, start: int = 0, count: int | None = None) -> Iterator[tuple[int, Tensor]]:
        self.tile_reads += 1
        end = len(self) if count is None else start + count
        for first in range(start, end, tile_chunks):
            yield first, self.vectors[first : min(first + tile_chunks, end)]

    def whitening(self) -> tuple[Tensor, Tensor]:
        moments = whitening.moments([self.vectors], self.hidden_size)
        return moments.mean, whitening.whitening(moments.covariance())


def world() -> tuple[list[str], list[Question]]:
    """60 chunks (people with the town they were born in, towns), 30 questions whose gold is the person's chunk or two of them."""
    chance = random.Random(0)
    names = [f"{first} {second}" for first in PEOPLE for second in chance.sample(PEOPLE, 3)]
    texts = [f"{name} was born in {chance.choice(TOWNS)} and likes the town of {chance.choice(TOWNS)}" for name in names]
    questions = []
    for number in range(30):
        one, two = chance.sample(range(len(names)), 2)
        gold = ((chunk_id(one),),) if number % 2 else ((chunk_id(one),), (chunk_id(two),))
        text = f"where was {names[one]} born ?" if number % 2 else f"was {names[one]} born where {names[two]} was born ?"
        questions.append(Question(f"q{number:02d}", "toy", "train", text, ("x",), gold, len(gold), "single"))
    return texts, questions


def chunk_id(row: int) -> str:
    return f"c{row:03d}"


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def questions() -> list[Question]:
    return world()[1]


def make_backbone(path: Path) -> None:
    """Writes a tiny random T5Gemma 2 that knows the world's words, with norm weights that are not trivial."""
    tokenizer = tiny.train_tokenizer(world()[0] + [question.question for question in world()[1]], ARCHITECTURE)
    made = tiny.build(ARCHITECTURE, tokenizer, seed=3)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "norm" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
    tiny.save(made, tokenizer, path)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("backbone") / "model"
    make_backbone(path)
    return path


@pytest.fixture(scope="session")
def backbone(folder: Path) -> model.Backbone:
    return model.load(str(folder), device="cpu")


@pytest.fixture(scope="session")
def states(backbone: model.Backbone) -> list[Tensor]:
    return backbone.encode(backbone.tokenize(world()[0]))


@pytest.fixture
def store(states: list[Tensor]) -> MemoryStore:
    return MemoryStore([chunk_id(row) for row in range(len(states))], states)


def settings(backbone: model.Backbone, **changes: object) -> RetrieverSettings:
    values: dict[str, object] = {
        "tokens": 5, "layers": backbone.layers, "heads": backbone.heads, "hidden_size": backbone.hidden_size, "pooled_length": POOLED,
        "initial_context": 4, "initial_scoring": "dot", "scoring": "per_head", "backbone": "b", "store": "s",
    }  # fmt: skip
    return RetrieverSettings(**{**values, **changes})  # type: ignore[arg-type]


@pytest.fixture
def retriever(backbone: model.Backbone, request: pytest.FixtureRequest) -> Retriever:
    """Untrained, with weights of both signs; of the scoring a test asks for by an indirect parameter."""
    made = Retriever.initialise(backbone, settings(backbone, scoring=getattr(request, "param", "per_head")), seed=5)
    with torch.no_grad():
        made.weights.copy_(torch.randn(made.weights.shape, generator=torch.Generator().manual_seed(2)))
    return made


@pytest.fixture
def queries(backbone: model.Backbone) -> Tensor:
    shape = (3, backbone.layers, backbone.heads, 5, backbone.head_dim)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def weights(backbone: model.Backbone) -> Tensor:
    return torch.randn(backbone.layers, backbone.heads, generator=torch.Generator().manual_seed(1))
