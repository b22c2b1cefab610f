"""What gets gradients, the loss, and that neither an interruption nor the number of workers changes a bit."""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from torch import Tensor

from intra import storage
from intra.backbone.model import Backbone
from intra.baselines.lexical import BM25
from intra.data.schema import POOL_SCHEMA, Pool, Question
from intra.errors import UserError
from intra.retrieval import negatives, training
from intra.retrieval.negatives import Example
from intra.retrieval.retriever import Retriever
from intra.retrieval.search import read_context
from intra.retrieval.training import Trainer, Workers

from .conftest import SCORINGS, TRAIN, MemoryStore, settings, world
from .test_scoring import naive

SEED = 11


@pytest.fixture
def examples(backbone: Backbone, store: MemoryStore, questions: list[Question], tmp_path: Path) -> list[Example]:
    depth = negatives.depth(questions, 4, TRAIN.hard_negatives)
    rows = training.initial_rows(backbone, store, questions, depth, "dot", 20, str(tmp_path / "initial"), Workers())  # type: ignore[arg-type]
    return [negatives.example(q, store.row_of, mine, 4, TRAIN.hard_negatives) for q, mine in zip(questions, rows, strict=True)]


@pytest.fixture
def make(backbone: Backbone, store: MemoryStore, examples: list[Example]) -> Callable[..., Trainer]:
    """A fresh trainer, the same each time."""

    def build(workers: Workers | None = None, scoring: str = "per_head", temperature: float = 1.0, **changes: object) -> Trainer:
        shape = settings(backbone, scoring=scoring, temperature=temperature)
        retriever = training.start(backbone, store, shape, examples, SEED)  # type: ignore[arg-type]
        return Trainer(backbone, store, retriever, examples, TRAIN.model_copy(update=changes), SEED, workers)  # type: ignore[arg-type]

    return build


def parameters(trainer: Trainer) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in trainer.retriever.parameters()]


@pytest.mark.parametrize("scoring", SCORINGS)
def test_one_step_moves_every_token_and_weight_and_nothing_of_the_backbone(
    scoring: str, make: Callable[..., Trainer], backbone: Backbone
) -> None:
    frozen = {name: tensor.clone() for name, tensor in backbone.model.state_dict().items()}
    trainer = make(scoring=scoring)
    before = parameters(trainer)
    trainer.step()
    assert (trainer.retriever.tokens.grad.norm(dim=1) > 0).all()
    assert (trainer.retriever.weights.grad != 0).all()
    for old, new in zip(before, parameters(trainer), strict=True):
        assert (old != new).any(dim=1).all()
    after = backbone.model.state_dict()
    assert frozen.keys() == after.keys()
    assert all(torch.equal(frozen[name], after[name]) for name in frozen)
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in backbone.model.parameters())


def test_the_weights_alone(make: Callable[..., Trainer]) -> None:
    """The tokens stay, bit by bit; the weights' gradient is the one they have when both are trained."""
    trainer, both = make(train_tokens=False), make()
    tokens, weights = parameters(trainer)
    training.train(trainer, None)
    both.step()
    assert trainer.retriever.tokens.grad is None
    assert torch.equal(trainer.retriever.tokens, tokens)
    assert (trainer.retriever.weights != weights).all()
    alone = make(train_tokens=False)
    alone.step()
    assert torch.equal(alone.retriever.weights, both.retriever.weights)
    again = make(train_tokens=False)
    again.restore(alone.state())
    assert again.state() == alone.state()


def test_the_weights_have_their_own_rate(make: Callable[..., Trainer]) -> None:
    """Adam's first step is the rate, whatever the gradient's size."""
    trainer = make(weights_rate=0.25, learning_rate=1e-4, warmup_steps=0)
    (old_tokens, old_weights), _ = parameters(trainer), trainer.step()
    tokens, weights = parameters(trainer)
    assert (tokens - old_tokens).abs().max().item() == pytest.approx(1e-4, rel=0.01)
    assert (weights - old_weights).abs().max().item() == pytest.approx(0.25e-4, rel=0.01)


def test_temperature_divides_the_scores_of_the_softmax(
    make: Callable[..., Trainer], backbone: Backbone, store: MemoryStore, examples: list[Example]
) -> None:
    """Cold training is the warm one with weights multiplied; both start from scores of the same spread."""
    warm, cold = make(scoring="mixture"), make(scoring="mixture", temperature=0.25)
    assert torch.equal(warm.retriever.weights, cold.retriever.weights)
    found = [training.micro_gradient(backbone, cold.retriever, store, examples[:2], 5, (0,))]  # type: ignore[arg-type]
    with torch.no_grad():
        warm.retriever.weights *= 4
    found.append(training.micro_gradient(backbone, warm.retriever, store, examples[:2], 5, (0,)))  # type: ignore[arg-type]
    tokens = warm.retriever.tokens.numel()
    torch.testing.assert_close(found[0][-2:], found[1][-2:])
    torch.testing.assert_close(found[0][:tokens], found[1][:tokens], rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(found[0][tokens:-2], found[1][tokens:-2] * 4, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("scoring", SCORINGS)
def test_the_gradient_is_that_of_the_loss(
    scoring: str, make: Callable[..., Trainer], backbone: Backbone, store: MemoryStore, examples: list[Example]
) -> None:
    """Finite differences of the loss, along a random direction."""
    trainer = make(scoring=scoring)
    retriever, batch = trainer.retriever, examples[:3]
    found = training.micro_gradient(backbone, retriever, store, batch, 5, (0,))  # type: ignore[arg-type]
    count = sum(parameter.numel() for parameter in retriever.parameters())
    weight_scale = float(retriever.weights.detach().mean())
    direction = torch.randn(count, generator=torch.Generator().manual_seed(0))
    direction[retriever.tokens.numel() :] *= weight_scale
    losses = []
    start = torch.cat([parameter.detach().flatten() for parameter in retriever.parameters()])
    for sign in (1, -1):
        torch.nn.utils.vector_to_parameters(start + sign * 1e-3 * direction, retriever.parameters())
        losses.append(float(training.micro_gradient(backbone, retriever, store, batch, 5, (0,))[-2]))  # type: ignore[arg-type]
    assert (losses[0] - losses[1]) / 2e-3 == pytest.approx(float(found[:count] @ direction), rel=0.02)


def test_cross_entropy_is_the_papers() -> None:
    scores = torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 5.0]])
    gold = torch.tensor([[True, False, True], [False, True, False]])
    one, two = math.exp(1) + math.exp(2) + math.exp(3), 2 + math.exp(5)
    expected = -(math.log(math.exp(1) / one) + math.log(math.exp(3) / one)) / 2 - math.log(1 / two)
    assert float(training.cross_entropy(scores.log_softmax(dim=1), gold)) == pytest.approx(expected)


@pytest.mark.parametrize("scoring", SCORINGS)
def test_the_loss_is_that_of_the_scores_over_the_candidates(
    scoring: str, make: Callable[..., Trainer], backbone: Backbone, store: MemoryStore, examples: list[Example]
) -> None:
    retriever = make(scoring=scoring, temperature=0.5).retriever
    rows, gold = negatives.candidates(examples[:3], len(store), 5, (0,))
    memory = read_context(backbone, store, [item.context for item in examples[:3]], 4)  # type: ignore[arg-type]
    with torch.no_grad():
        queries = backbone.queries(backbone.prompt_ids([item.question for item in examples[:3]]), retriever.tokens, memory)
        components = naive(scoring, queries, store.pooled(rows), backbone, retriever.weights) / 0.5
    scores = components.softmax(dim=2).mean(dim=1).log()
    expected = -sum(float(mine[positive].mean()) for mine, positive in zip(scores, gold, strict=True))
    found = training.micro_gradient(backbone, retriever, store, examples[:3], 5, (0,))  # type: ignore[arg-type]
    assert float(found[-2]) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("scoring", SCORINGS)
def test_the_loss_falls(scoring: str, make: Callable[..., Trainer]) -> None:
    trainer = make(scoring=scoring, steps=30, batch_size=10, learning_rate=0.02)
    training.train(trainer, None)
    assert trainer.curve[-10:, 0].mean() < trainer.curve[:3, 0].mean() - 0.2
    assert trainer.curve[-10:, 1].mean() > trainer.curve[:3, 1].mean()


def test_learning_rate_warms_up_and_decays() -> None:
    changed = TRAIN.model_copy(update={"steps": 10, "warmup_steps": 4, "learning_rate": 1.0})
    rates = [training.rate(step, changed) for step in range(10)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4:] == pytest.approx([1.0, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])
    assert training.rate(2, changed.model_copy(update={"steps": 3, "warmup_steps": 100})) == 1.0


def test_schedules_differ_after_the_warm_up_alone() -> None:
    base = TRAIN.model_copy(update={"steps": 10, "warmup_steps": 2, "learning_rate": 1.0})
    linear, cosine, constant = (
        [training.rate(step, base.model_copy(update={"schedule": name})) for step in range(10)] for name in ("linear", "cosine", "constant")
    )
    assert linear[:3] == cosine[:3] == constant[:3] == [0.5, 1.0, 1.0]
    assert constant[2:] == [1.0] * 8
    assert cosine[2:] == pytest.approx([(1 + math.cos(math.pi * step / 8)) / 2 for step in range(8)])
    assert cosine[4] > linear[4]
    assert cosine[9] < linear[9]


@pytest.mark.parametrize("scoring", ["per_head", "mixture"])
def test_stopping_and_going_on_gives_the_same_bytes(scoring: str, make: Callable[..., Trainer], tmp_path: Path) -> None:
    make = functools.partial(make, scoring=scoring)
    whole = make()
    training.train(whole, None)

    class Stop(Exception):
        pass

    def stop(trainer: Trainer) -> None:
        if trainer.done == 4:
            raise Stop

    with pytest.raises(Stop):
        training.train(make(), str(tmp_path / "checkpoints"), stop)
    assert training.checkpoint_names(str(tmp_path / "checkpoints")) == ["00000004.safetensors"]
    second = make()
    training.resume(second, str(tmp_path / "checkpoints"))
    assert second.done == 4
    training.train(second, str(tmp_path / "checkpoints"))
    assert second.state() == whole.state()
    assert training.curve_table(second).equals(training.curve_table(whole))


def test_another_runs_checkpoint_is_refused(make: Callable[..., Trainer], tmp_path: Path) -> None:
    training.train(make(), str(tmp_path))
    with pytest.raises(UserError, match=r"00000006.safetensors: not a checkpoint of this run \(6 steps instead of 7\)"):
        training.resume(make(steps=7), str(tmp_path))
    storage.write_bytes(str(tmp_path / "00000007.safetensors"), b"x")
    with pytest.raises(UserError, match="not a checkpoint of this run"):
        training.resume(make(), str(tmp_path))


@pytest.mark.parametrize("size", [2, 4])
def test_any_number_of_workers_gives_the_same_bytes(make: Callable[..., Trainer], size: int) -> None:
    alone = make()
    training.train(alone, None)
    shared: list[Tensor] = [torch.empty(0)] * size
    meet = threading.Barrier(size)
    trainers = []

    def gather(rank: int, mine: Tensor) -> Tensor:
        shared[rank] = mine
        meet.wait()
        everyone = torch.cat(shared)
        meet.wait()
        return everyone

    for rank in range(size):
        trainers.append(make(Workers(rank, size, lambda mine, rank=rank: gather(rank, mine))))
    lock = threading.Lock()  # one computes at a time: the attention hook is set on the shared backbone
    compute = training.micro_gradient

    def locked(*arguments: object) -> Tensor:
        with lock:
            return compute(*arguments)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "micro_gradient", locked)
        threads = [threading.Thread(target=training.train, args=(trainer, None)) for trainer in trainers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert all(trainer.state() == alone.state() for trainer in trainers)


def test_reduce_adds_in_the_order_of_micro_batches() -> None:
    parts = torch.tensor([[1e8], [1.0], [-1e8], [1.0]])
    assert training.reduce(parts).item() == ((1e8 + 1) - 1e8) + 1 or training.reduce(parts).item() == 1.0
    assert training.reduce(parts).item() != training.reduce(parts[[0, 2, 1, 3]]).item()
    assert parts[0].item() == 1e8


def test_initial_is_kept_and_not_searched_again(
    backbone: Backbone, store: MemoryStore, questions: list[Question], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "BLOCK", 12)
    found = []
    for workers in (Workers(1, 2), Workers(0, 2)):  # neither finds the other's blocks before both are done
        if workers.rank:
            with pytest.raises(FileNotFoundError):
                training.initial_rows(backbone, store, questions, 6, "dot", 20, str(tmp_path), workers)  # type: ignore[arg-type]
        else:
            found.append(training.initial_rows(backbone, store, questions, 6, "dot", 20, str(tmp_path), workers))  # type: ignore[arg-type]
    assert len(storage.names(str(tmp_path))) == 3
    reads = store.tile_reads
    found.append(training.initial_rows(backbone, store, questions, 6, "dot", 20, str(tmp_path), Workers()))  # type: ignore[arg-type]
    assert store.tile_reads == reads
    assert found[0] == found[1]
    assert len(found[0]) == len(questions)
    assert all(len(set(rows)) == 6 for rows in found[0])
    with pytest.raises(UserError, match="holds other questions"):
        training.initial_rows(backbone, store, questions[::-1], 6, "dot", 20, str(tmp_path), Workers())  # type: ignore[arg-type]


def test_bm25_is_kept_and_not_indexed_again(
    store: MemoryStore, questions: list[Question], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks that share no word with the question are no hard negatives; the index is made once, and not at all where all is kept."""
    monkeypatch.setattr(training, "BLOCK", 12)
    texts, made = world()[0], []

    def index() -> BM25:
        made.append(BM25())
        empty = [""] * len(texts)
        columns = {"chunk_id": store.chunk_ids, "title": empty, "text": texts, "source": empty, "n_tokens": [1] * len(texts)}
        made[-1].index(Pool(pa.table(columns, schema=POOL_SCHEMA)))
        return made[-1]

    found = training.method_rows(index, store.row_of, questions, 7, str(tmp_path), Workers())
    assert len(made) == 1
    assert storage.names(str(tmp_path)) == ["00000.parquet", "00001.parquet", "00002.parquet"]
    expected = made[0].search(questions, 7)
    for question, rows in zip(questions, found, strict=True):
        assert list(rows) == [store.row_of[chunk] for chunk, score in expected[question.question_id] if score > 0]
        words = set(question.question.split()) - {"was", "where", "in", "the", "of", "and"}
        assert all(words & set(texts[row].split()) for row in rows)
    assert training.method_rows(index, store.row_of, questions, 7, str(tmp_path), Workers()) == found
    storage.remove(str(tmp_path / "00001.parquet"))
    assert training.method_rows(index, store.row_of, questions, 7, str(tmp_path), Workers()) == found
    assert len(made) == 2


def test_nothing_to_train_on_is_refused(backbone: Backbone, store: MemoryStore, retriever: Retriever) -> None:
    with pytest.raises(UserError, match="no training question"):
        Trainer(backbone, store, retriever, [], TRAIN, 0)  # type: ignore[arg-type]
