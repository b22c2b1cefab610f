"""The supervised dense baseline: a bi-encoder fine-tuned on the training questions the retriever is trained on, with the same negatives.

Loss: soft cross-entropy over all gold chunks, as the retriever's, against the gold and drawn hard negatives of every question of the batch.
Hard negatives are those mined for the retriever (S_0, and BM25 where `retriever.train.bm25_negatives` asks for it), read from its artifact.

    <root>/tuned/<fingerprint>/            config.json, model.safetensors, tokenizer, curve.parquet and, last, manifest.json
    <root>/tuned/<fingerprint>.training/   checkpoints, until it is complete; the same command goes on from the last, to the same weights
"""

from __future__ import annotations

import atexit
import functools
import io
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from intra import lineage, storage
from intra.artifact import Artifact
from intra.baselines import models
from intra.config import Config
from intra.data.schema import Pool, Question, read_pool, read_questions, to_parquet
from intra.errors import UserError, WorkflowError
from intra.evaluate_config import DenseConfig, TuneConfig
from intra.retrieval import negatives
from intra.retrieval.negatives import Example

_TOGETHER = 16  # texts of a step that are encoded at once


def folder(config: Config, name: str) -> Path:
    """A local folder of the fine-tuned weights of `name`, fine-tuned first where they are not there."""
    artifact = lineage.tuned(config, name)
    if not artifact.complete():
        settings, dataset = lineage.dense(config, name), lineage.dataset(config)
        questions, pool = read_questions(dataset.url, "train"), read_pool(dataset.url)
        if not questions:
            raise UserError(f"dataset {dataset.url} holds no training questions for {name}; take it out of evaluate.methods")
        trained = examples(config, questions, pool)
        encoder = models.Dense(name, settings, config.evaluate.device, config.evaluate.threads)
        Tuner(encoder, settings, trained, pool, config.seed).run(artifact, name)
    return Path(artifact.url) if not storage.is_s3(artifact.url) else _copy(artifact.url)


@functools.cache
def _copy(url: str) -> Path:
    place = tempfile.mkdtemp(prefix="intra-tuned-")
    atexit.register(shutil.rmtree, place, ignore_errors=True)
    storage.download(url, place)
    return Path(place)


def examples(config: Config, questions: Sequence[Question], pool: Pool) -> list[Example]:
    """The training questions with the negatives that were mined for the retriever."""
    recipe, retriever = config.retriever.train, lineage.retriever(config)
    retriever.manifest()
    initial = _rows(retriever, "initial", questions) if recipe.hard_negatives else [[]] * len(questions)
    bm25 = _rows(retriever, "bm25", questions) if recipe.bm25_negatives else [[]] * len(questions)
    return [
        negatives.example(question, pool.row_of, mine, 0, recipe.hard_negatives, lexical, recipe.bm25_negatives, recipe.bm25_skip)
        for question, mine, lexical in zip(questions, initial, bm25, strict=True)
    ]


def _rows(retriever: Artifact, kind: str, questions: Sequence[Question]) -> list[list[int]]:
    found: dict[str, list[int]] = {}
    for name in storage.names(retriever.path(kind)):
        table = pq.read_table(io.BytesIO(storage.read_bytes(retriever.path(kind, name))))
        found |= dict(zip(table["question_id"].to_pylist(), table["rows"].to_pylist(), strict=True))
    missing = next((question.question_id for question in questions if question.question_id not in found), None)
    if missing is not None:
        raise WorkflowError(f"{retriever.path(kind)}: no negatives of question {missing}; delete the retriever and run workflows/train.py")
    return [found[question.question_id] for question in questions]


class Tuner:
    def __init__(self, encoder: models.Dense, settings: DenseConfig, trained: Sequence[Example], pool: Pool, seed: int) -> None:
        import torch

        assert settings.tune is not None
        self.recipe: TuneConfig = settings.tune
        self._settings = settings
        self._examples = trained
        self._texts = pool.title_and_text()
        self._seed = seed
        self.model: Any = encoder.model.train()
        self._optimizer = torch.optim.AdamW(self.model.parameters(), lr=self.recipe.learning_rate)
        self.curve: list[float] = []

    def run(self, artifact: Artifact, name: str) -> None:
        """Trains from the last checkpoint on, and completes the artifact."""
        from tqdm import tqdm

        training = f"{artifact.url}.training"
        self.resume(training)
        with tqdm(total=self.recipe.steps, initial=len(self.curve), desc=f"{name}: fine-tune", unit="step", disable=None) as bar:
            while len(self.curve) < self.recipe.steps:
                self.step()
                bar.update()
                if len(self.curve) % self.recipe.checkpoint_every == 0:
                    self.save(training)
        with tempfile.TemporaryDirectory() as place, models.quiet():
            self.model[0].auto_model.save_pretrained(place)
            self.model.tokenizer.save_pretrained(place)
            storage.upload(place, artifact.url)
        storage.write_bytes(artifact.path("curve.parquet"), to_parquet(pa.table({"loss": self.curve})))
        tail = self.curve[-max(1, len(self.curve) // 10) :]
        artifact.finish({"steps": len(self.curve), "questions": len(self._examples), "loss": sum(tail) / len(tail)})
        storage.remove(training)

    def step(self) -> None:
        """One step. What it computes depends on the weights and the number of steps done alone."""
        import torch

        recipe, done = self.recipe, len(self.curve)
        torch.manual_seed(self._seed * 1_000_003 + done)  # dropout
        generator = np.random.default_rng([self._seed, 7, done])
        places = negatives.order(len(self._examples), recipe.batch_size, done, self._seed)
        batch = [self._examples[place] for place in dict.fromkeys(places)]
        rows: set[int] = set()
        for item in batch:
            chosen = generator.permutation(len(item.hard))[: recipe.hard_negatives]
            rows |= item.positives | {item.hard[place] for place in chosen}
        ordered = sorted(rows)
        questions = self._vectors([self._settings.query_prompt + item.question for item in batch])
        passages = self._vectors([self._settings.passage_prompt + self._texts[row] for row in ordered])
        gold = torch.tensor([[row in positives for row in ordered] for positives in (item.positives for item in batch)]).to(
            questions.device
        )
        scores = (questions @ passages.T).float() / recipe.temperature
        loss = -(scores.log_softmax(dim=1) * gold).sum(dim=1).div(gold.sum(dim=1)).mean()
        if not torch.isfinite(loss):
            raise WorkflowError(f"fine-tuning: the loss is {float(loss.detach())} at step {done}; lower tune.learning_rate")
        for group in self._optimizer.param_groups:
            group["lr"] = recipe.learning_rate * self._rate(done)
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self._optimizer.step()
        self.curve.append(float(loss.detach()))

    def _rate(self, done: int) -> float:
        """Linear warm-up, then linear decay to 0."""
        recipe = self.recipe
        if done < recipe.warmup_steps:
            return (done + 1) / recipe.warmup_steps
        return (recipe.steps - done) / max(1, recipe.steps - min(recipe.warmup_steps, recipe.steps))

    def _vectors(self, texts: Sequence[str]) -> Any:
        """[n, d], with a gradient. Texts of like length are encoded together: padding costs as much as words do, and more memory."""
        import torch

        order = sorted(range(len(texts)), key=lambda place: (len(texts[place]), place))
        parts = []
        for first in range(0, len(order), _TOGETHER):
            features = self.model.preprocess([texts[place] for place in order[first : first + _TOGETHER]])
            moved = {key: value.to(self.model.device) if hasattr(value, "to") else value for key, value in features.items()}
            parts.append(self.model(moved)["sentence_embedding"])
        place = torch.tensor(order, device=parts[0].device).argsort()
        return torch.cat(parts)[place]

    def save(self, url: str) -> None:
        """A checkpoint: weights, AdamW's moments, the curve."""
        import torch
        from safetensors.torch import save

        data = {"curve": torch.tensor(self.curve, dtype=torch.float64)}
        for name, weight in self.model.named_parameters():
            state = self._optimizer.state.get(weight, {})
            data |= {f"weight {name}": weight.detach()} | {f"{key} {name}": state[key] for key in ("exp_avg", "exp_avg_sq") if key in state}
        storage.write_bytes(
            storage.join(url, f"{len(self.curve):08d}.safetensors"), save({k: v.cpu().contiguous() for k, v in data.items()})
        )
        for old in storage.names(url)[:-2]:
            storage.remove(storage.join(url, old))

    def resume(self, url: str) -> None:
        """The state of the last checkpoint, where there is one."""
        import torch
        from safetensors.torch import load

        names = storage.names(url)
        if not names:
            return
        data = load(storage.read_bytes(storage.join(url, names[-1])))
        self.curve = data["curve"].tolist()
        for name, weight in self.model.named_parameters():
            with torch.no_grad():
                weight.copy_(data[f"weight {name}"])
            if f"exp_avg {name}" in data:
                moments = {key: data[f"{key} {name}"].to(weight.device) for key in ("exp_avg", "exp_avg_sq")}
                self._optimizer.state[weight] = {"step": torch.tensor(float(len(self.curve))), **moments}
