"""Retrieval training: soft cross-entropy over the oracle chunks, gradients to the retrieval tokens and weights only.

    L = mean over questions of  -(1/|O|) sum_{j in O} log softmax(s)_j       over the micro-batch's candidates (paper section 3.2)

For `retriever.scoring=mixture` the probability is that of the mixture, (1/L) sum_l softmax(z_l)_j (intra.retrieval.scoring).

Plain PyTorch: one process by itself, or several that each take a share of a step's micro-batches (`Workers`). A micro-batch's
gradient does not depend on who computes it, and every process adds all of them in the same order: any number of workers that
divides them gives the same bits. Everything else a step needs follows from the seed and its number, so a run
that was killed goes on from its last checkpoint to the same result.

The paper names AdamW, its rate, the warm-up and the number of steps; not stated there, and so ours: the decay to 0, no weight decay,
candidates instead of the whole pool, no clipping, and the weights' own rate (`weights_rate`: weights start near 1e-3, tokens near 1,
and Adam moves both by about the rate).
"""

from __future__ import annotations

import functools
import io
import math
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from intra import storage
from intra.config import RetrieverTrainConfig
from intra.data.schema import Question, to_parquet
from intra.errors import UserError, WorkflowError
from intra.method import Method
from intra.retrieval import initial, negatives, scoring
from intra.retrieval.negatives import Example, Rows
from intra.retrieval.prefix import Prefixes
from intra.retrieval.retriever import Retriever, RetrieverSettings
from intra.retrieval.scoring import Scored
from intra.retrieval.search import read_context

if TYPE_CHECKING:
    from intra.backbone.model import Backbone
    from intra.store.reader import ChunkStore

COLUMNS = ("loss", "recall", "learning_rate")  # of the curve; recall: share of gold groups with a chunk in the candidates' top 5
TOP = 5
CALIBRATION = (8, 256)  # questions and sampled chunks
NOTHING = "train: the dataset has no training question; check data.train_split and data.benchmarks"
BLOCK = 1024  # questions whose negatives are found and stored at once


@dataclass(frozen=True)
class Workers:
    """The processes that share a step. `gather` turns this process' [mine, n] into everyone's [all, n], in the order of ranks."""

    rank: int = 0
    size: int = 1
    gather: Callable[[Tensor], Tensor] = field(default=lambda mine: mine)
    barrier: Callable[[], None] = field(default=lambda: None)


def start(backbone: Backbone, store: ChunkStore, settings: RetrieverSettings, examples: Sequence[Example], seed: int) -> Retriever:
    """The untrained retriever: its weights calibrated on the first questions of the first batch and chunks drawn from the pool."""
    retriever = Retriever.initialise(backbone, settings, seed)
    if not examples:
        raise UserError(NOTHING)
    batch = [examples[index] for index in negatives.order(len(examples), min(CALIBRATION[0], len(examples)), 0, seed)]
    rows, _ = negatives.candidates(batch, len(store), CALIBRATION[1], (seed, 0))
    memory = read_context(backbone, store, [item.context for item in batch], settings.initial_context)
    retriever.calibrate(backbone, backbone.prompt_ids([item.question for item in batch]), memory, store.pooled(rows).to(backbone.device))
    return retriever


def reduce(parts: Tensor) -> Tensor:
    """The sum of [micro-batches, n], one after the other: the same bits whoever computed them."""
    total = parts[0].clone()
    for part in parts[1:]:
        total += part
    return total


def trained(retriever: Retriever, train_tokens: bool) -> list[torch.nn.Parameter]:
    """What training moves, in the order of the gradient's parts."""
    return [retriever.tokens, retriever.weights] if train_tokens else [retriever.weights]


def micro_gradient(
    backbone: Backbone, retriever: Retriever, store: ChunkStore, examples: Sequence[Example], sampled: int, key: Sequence[int],
    train_tokens: bool = True, prefixes: Prefixes | None = None,
) -> Tensor:  # fmt: skip
    """One micro-batch: float32 [n + 2] on the CPU: gradients of what is `trained` (n numbers), loss, recall; summed over its questions.

    The retriever's parameters keep no gradient, the backbone's never get one.
    """
    rows, gold = negatives.candidates(examples, len(store), sampled, key)
    device = backbone.device
    settings = retriever.settings
    tokens = retriever.tokens.detach().to(device).requires_grad_(train_tokens)
    weights = retriever.weights.detach().to(device).requires_grad_()
    if prefixes is None:
        memory = read_context(backbone, store, [item.context for item in examples], settings.initial_context)
        queries = backbone.queries(backbone.prompt_ids([item.question for item in examples]), tokens, memory)
    else:
        queries = prefixes.queries(examples, tokens)
    components = scoring.scorer(settings.scoring, queries, backbone, weights, settings.temperature)(store.pooled(rows).to(device))
    scores = scoring.log_mixture(components, torch.logsumexp(components, dim=2))
    loss = cross_entropy(scores, gold.to(device))
    gradients = torch.autograd.grad(loss, (tokens, weights) if train_tokens else (weights,))
    recall = _recall(scores.detach().cpu(), rows, examples)
    return torch.cat([*(part.flatten().float().cpu() for part in gradients), torch.tensor([float(loss.detach()), recall])])


def cross_entropy(scores: Tensor, gold: Tensor) -> Tensor:
    """sum over questions of -(1/|O|) sum_{j in O} scores_j; scores: log-probabilities [B, N], gold BoolTensor[B, N]."""
    return -(scores.masked_fill(~gold, 0.0).sum(dim=1) / gold.sum(dim=1)).sum()


def _recall(scores: Tensor, rows: Sequence[int], examples: Sequence[Example]) -> float:
    best = torch.sort(scores, dim=1, descending=True, stable=True).indices[:, :TOP].tolist()
    total = 0.0
    for item, places in zip(examples, best, strict=True):
        top = {rows[place] for place in places}
        total += sum(any(row in top for row in group) for group in item.gold) / len(item.gold)
    return total


def rate(step: int, settings: RetrieverTrainConfig) -> float:
    """The learning rate of a step: linear warm-up, then `schedule`: a line or a half cosine that would reach 0 one step after the last,
    or the same rate to the end."""
    warmup = min(settings.warmup_steps, settings.steps)
    if step < warmup:
        return settings.learning_rate * (step + 1) / warmup
    left = (settings.steps - step) / (settings.steps - warmup)
    falling = {"linear": left, "cosine": (1 - math.cos(math.pi * left)) / 2, "constant": 1.0}
    return settings.learning_rate * falling[settings.schedule]


class Trainer:
    """The state of a run: retriever, AdamW, the steps done and their curve. `step`, `save`, `restore`; `train` drives them."""

    def __init__(
        self, backbone: Backbone, store: ChunkStore, retriever: Retriever, examples: Sequence[Example], settings: RetrieverTrainConfig,
        seed: int, workers: Workers | None = None,
    ) -> None:  # fmt: skip
        """Raises UserError where backbone, store and retriever do not fit each other, or there is nothing to train on."""
        retriever.check(backbone)
        retriever.check_store(store.hidden_size, store.pooled_length)
        if not examples:
            raise UserError(NOTHING)
        self.backbone, self.store, self.retriever = backbone, store, retriever
        self.examples, self.settings, self.seed = examples, settings, seed
        self.workers = workers or Workers()
        self.done = 0
        self.curve = torch.zeros(settings.steps, len(COLUMNS))
        room, n_0 = settings.prefix_cache_mb, retriever.settings.initial_context
        self.prefixes = Prefixes(backbone, store, n_0, room) if room else None
        self.trained = trained(retriever, settings.train_tokens)
        self.optimizer = torch.optim.AdamW(
            [{"params": [parameter]} for parameter in self.trained], lr=settings.learning_rate, weight_decay=settings.weight_decay
        )

    def step(self) -> None:
        settings, step = self.settings, self.done
        chosen = negatives.order(len(self.examples), settings.batch_size, step, self.seed)
        share = settings.batch_size // settings.micro_batch // self.workers.size
        mine = []
        for micro in range(self.workers.rank * share, (self.workers.rank + 1) * share):
            batch = [self.examples[index] for index in chosen[micro * settings.micro_batch : (micro + 1) * settings.micro_batch]]
            key = (self.seed, 2, step, micro)
            mine.append(
                micro_gradient(
                    self.backbone, self.retriever, self.store, batch, settings.sampled_negatives, key, settings.train_tokens, self.prefixes
                )
            )  # fmt: skip
        total = reduce(self.workers.gather(torch.stack(mine))) / settings.batch_size
        if not torch.isfinite(total).all():
            raise WorkflowError(f"train: step {step}: loss or gradient is not a finite number; lower retriever.train.learning_rate")
        now = rate(step, settings)
        gradients = total[:-2].split([parameter.numel() for parameter in self.trained])
        for parameter, gradient, group in zip(self.trained, gradients, self.optimizer.param_groups, strict=True):
            parameter.grad = gradient.view_as(parameter).to(parameter)
            group["lr"] = now * settings.weights_rate if parameter is self.retriever.weights else now
        self.optimizer.step()
        self.curve[step] = torch.tensor([float(total[-2]), float(total[-1]), now])
        self.done += 1

    def state(self) -> bytes:
        """Everything a later process needs to go on, as safetensors."""
        from safetensors.torch import save

        tensors = {"curve": self.curve, "done": torch.tensor(self.done)}
        for name, parameter in self.retriever.named_parameters():
            tensors[name] = parameter.detach()
            tensors |= {f"{name}.{key}": value for key, value in self.optimizer.state.get(parameter, {}).items()}
        return bytes(save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}))

    def restore(self, data: bytes) -> None:
        """Raises ValueError where the state is of another run's shape."""
        from safetensors.torch import load

        tensors = load(data)
        if tensors["curve"].shape != self.curve.shape:
            raise ValueError(f"{len(tensors['curve'])} steps instead of {len(self.curve)}")
        self.curve = tensors["curve"]
        self.done = int(tensors["done"])
        for name, parameter in self.retriever.named_parameters():
            parameter.data.copy_(tensors[name])
            prefix = f"{name}."
            moments = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
            if moments:
                self.optimizer.state[parameter] = moments


def train(trainer: Trainer, checkpoints: str | None, after: Callable[[Trainer], None] | None = None) -> None:
    """Runs the steps that are left; `resume` first to go on from a checkpoint.

    Rank 0 writes a checkpoint below the URL `checkpoints` every `checkpoint_every` steps and at the end, keeps the last, and then
    calls `after`.
    """
    while trainer.done < trainer.settings.steps:
        trainer.step()
        due = trainer.done % trainer.settings.checkpoint_every == 0 or trainer.done == trainer.settings.steps
        if due and trainer.workers.rank == 0:
            if checkpoints is not None:
                name = f"{trainer.done:08d}.safetensors"
                storage.write_bytes(storage.join(checkpoints, name), trainer.state())
                for old in checkpoint_names(checkpoints):
                    if old < name:
                        storage.remove(storage.join(checkpoints, old))
            if after is not None:
                after(trainer)


def checkpoint_names(checkpoints: str) -> list[str]:
    return [name for name in storage.names(checkpoints) if name.endswith(".safetensors")]


def resume(trainer: Trainer, checkpoints: str) -> None:
    """Goes on from the last checkpoint below the URL, if there is one; else changes nothing.

    Every process reads the same one: nobody writes another before all have read. Raises UserError where it is damaged or not of this run.
    """
    from safetensors import SafetensorError

    names = checkpoint_names(checkpoints)
    if names:
        url = storage.join(checkpoints, names[-1])
        try:
            trainer.restore(storage.read_bytes(url))
        except (SafetensorError, ValueError, KeyError, RuntimeError) as error:
            raise UserError(f"{url}: not a checkpoint of this run ({error}); delete it and start again") from None
    trainer.workers.barrier()


def curve_table(trainer: Trainer) -> pa.Table:
    """step (from 1), loss, recall, learning_rate of every step done."""
    columns = {name: trainer.curve[: trainer.done, index].tolist() for index, name in enumerate(COLUMNS)}
    return pa.table({"step": pa.array(range(1, trainer.done + 1), pa.int32()), **columns})


def initial_rows(
    backbone: Backbone, store: ChunkStore, questions: Sequence[Question], k: int, kind: str, tile_chunks: int, folder: str, workers: Workers
) -> list[Rows]:
    """S_0 of the training questions to depth k: rows of the pool, best first. Kept below the URL `folder` (`kept_rows`)."""

    chunks = initial.Chunks(initial.Space(kind, store, backbone.device), functools.partial(store.tiles, tile_chunks), backbone.device)

    def find(block: Sequence[Question]) -> list[Scored]:
        texts = [question.question for question in block]
        return [scored for best in initial.search(backbone, chunks, texts, k) for scored in best.pairs()]

    return kept_rows(questions, find, folder, workers)


def method_rows(
    make: Callable[[], Method], row_of: Mapping[str, int], questions: Sequence[Question], k: int, folder: str, workers: Workers
) -> list[Rows]:
    """The same by another method's ranking, to mine negatives from: its first k chunks, without those it scores 0.

    `make` gives the method with its index; it is called only where a block is missing. Of BM25 a score of 0 means that the chunk
    shares no word with the question.
    """
    made = functools.cache(make)

    def find(block: Sequence[Question]) -> list[Scored]:
        found = made().search(block, k)
        return [[(row_of[chunk], score) for chunk, score in found[question.question_id] if score > 0] for question in block]

    return kept_rows(questions, find, folder, workers)


def kept_rows(
    questions: Sequence[Question], find: Callable[[Sequence[Question]], list[Scored]], folder: str, workers: Workers
) -> list[Rows]:
    """What `find` gives of every question, rows of the pool with their scores, best first; returns the rows.

    Kept below the URL `folder`, a Parquet file per block of questions (question_id, rows, scores): the workers share the blocks, and what
    is there is not computed again. Raises UserError where a file holds other questions.
    """
    blocks = [questions[first : first + BLOCK] for first in range(0, len(questions), BLOCK)]
    urls = [storage.join(folder, f"{index:05d}.parquet") for index in range(len(blocks))]
    present = set(storage.names(folder))
    for index in range(workers.rank, len(blocks), workers.size):
        if urls[index].rpartition("/")[2] not in present:
            storage.write_bytes(urls[index], to_parquet(_rows_table(blocks[index], find(blocks[index]))))
    workers.barrier()
    rows: list[Rows] = []
    for block, url in zip(blocks, urls, strict=True):
        table = pq.read_table(io.BytesIO(storage.read_bytes(url)))
        if table["question_id"].to_pylist() != [question.question_id for question in block]:
            raise UserError(f"{url}: holds other questions than this run's; delete {folder} and start again")
        rows += [array("i", mine) for mine in table["rows"].to_pylist()]
    return rows


def _rows_table(questions: Sequence[Question], found: Sequence[Scored]) -> pa.Table:
    return pa.table(
        {
            "question_id": pa.array([question.question_id for question in questions], pa.string()),
            "rows": pa.array([[row for row, _ in scored] for scored in found], pa.list_(pa.int32())),
            "scores": pa.array([[score for _, score in scored] for scored in found], pa.list_(pa.float32())),
        }
    )
