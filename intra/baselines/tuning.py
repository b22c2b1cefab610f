"""The supervised dense baseline: a bi-encoder fine-tuned on the training questions the retriever is trained on, with the same negatives.

Loss: soft cross-entropy over all gold chunks, as the retriever's, against the gold and drawn hard negatives of every question of the batch.
Hard negatives are those mined for the retriever (S_0, and BM25 where `retriever.train.bm25_negatives` asks for it), read from its artifact.
Held-out training questions choose the step whose weights are kept, the start among them: fine-tuning that harms is not the baseline.

    <root>/tuned/<fingerprint>/            config.json, model.safetensors, tokenizer, curve.parquet and, last, manifest.json
    <root>/tuned/<fingerprint>.training/   checkpoints, until it is complete; the same command goes on from the last, to the same weights
"""

from __future__ import annotations

import atexit
import functools
import io
import shutil
import sys
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
_AT = 5  # recall at this many chunks chooses the step


def folder(config: Config, name: str) -> Path:
    """A local folder of the fine-tuned weights of `name`, fine-tuned first where they are not there."""
    artifact = lineage.tuned(config, name)
    if not artifact.complete():
        settings, dataset = lineage.dense(config, name), lineage.dataset(config)
        questions, pool = read_questions(dataset.url, "train"), read_pool(dataset.url)
        if not questions:
            raise UserError(f"dataset {dataset.url} holds no training questions for {name}; take it out of evaluate.methods")
        trained = examples(config, questions, pool)
        precise = settings.model_copy(update={"dtype": "float32"})  # in bfloat16 most weights are too coarse to take a step
        encoder = models.Dense(name, precise, config.evaluate.device, config.evaluate.threads)
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
    """Fine-tunes the weights of `encoder` in place; `trained`: the questions, of which `tune.held_out` are kept to measure by."""

    def __init__(self, encoder: models.Dense, settings: DenseConfig, trained: Sequence[Example], pool: Pool, seed: int) -> None:
        import torch

        assert settings.tune is not None
        self._encoder = encoder
        self.recipe: TuneConfig = settings.tune
        self._settings = settings
        shuffled = np.random.default_rng([seed, 8]).permutation(len(trained)).tolist()
        held = int(self.recipe.held_out * len(trained))
        self.held_out, self._examples = [[trained[place] for place in sorted(part)] for part in (shuffled[:held], shuffled[held:])]
        self._texts = pool.title_and_text()
        self._seed = seed
        self.model: Any = encoder.model.train()
        if self.recipe.gradient_checkpointing:
            self.model[0].auto_model.activation_checkpointing_enable()
        self._optimizer = torch.optim.AdamW(self.model.parameters(), lr=self.recipe.learning_rate)
        self.curve: list[float] = []
        self.measured: dict[int, float] = {}  # step -> recall of the held-out questions
        self._best: dict[str, Any] = {}  # the weights at the step with the best

    def run(self, artifact: Artifact, name: str) -> None:
        """Trains from the last checkpoint on, and completes the artifact with the weights that the held-out questions choose."""
        from tqdm import tqdm

        recipe, training = self.recipe, f"{artifact.url}.training"
        self.resume(training)
        with tqdm(total=recipe.steps, initial=len(self.curve), desc=f"{name}: fine-tune", unit="step", disable=None) as bar:
            while True:
                done = len(self.curve)
                if self.held_out and done not in self.measured and (done % recipe.measure_every == 0 or done == recipe.steps):
                    bar.set_postfix_str("searching for held-out questions")
                    self.measure()
                    bar.set_postfix_str("")
                    self.save(training)
                elif done and done % recipe.checkpoint_every == 0:
                    self.save(training)
                if done == recipe.steps:
                    break
                self.step()
                bar.update()
        kept = self.keep()
        if self.held_out:
            found = ", ".join(f"{value:.3f} at {step}" for step, value in sorted(self.measured.items()))
            print(f"{name}: fine-tuned; recall@{_AT} of {len(self.held_out)} held-out questions: {found}; kept: {kept}", file=sys.stderr)
        with tempfile.TemporaryDirectory() as place, models.quiet():
            self.model[0].auto_model.save_pretrained(place)
            self.model.tokenizer.save_pretrained(place)
            storage.upload(place, artifact.url)
        storage.write_bytes(artifact.path("curve.parquet"), to_parquet(pa.table({"loss": self.curve})))
        tail = self.curve[-max(1, len(self.curve) // 10) :]
        artifact.finish(
            {
                "steps": len(self.curve),
                "kept": kept,
                "questions": len(self._examples),
                "held_out": len(self.held_out),
                f"recall_at_{_AT}": [list(item) for item in sorted(self.measured.items())],
                "loss": sum(tail) / len(tail),
            }
        )
        storage.remove(training)

    def measure(self) -> float:
        """Recall@5 of the held-out questions, by gold passage, among chunks drawn from the pool and their gold. Keeps the best weights."""
        drawn = np.random.default_rng([self._seed, 9]).permutation(len(self._texts))[: self.recipe.held_out_chunks].tolist()
        rows = sorted({*drawn, *(row for item in self.held_out for row in item.positives)})
        texts = [self._texts[row] for row in rows]
        passages, _ = self._encoder.passages(texts)
        questions = np.concatenate(self._encoder.questions([item.question for item in self.held_out]))
        self.model.train()  # encoding ends it
        best = np.argsort(-(questions @ passages.T), axis=1, kind="stable")[:, :_AT]
        shares = []
        for item, places in zip(self.held_out, best.tolist(), strict=True):
            found = {rows[place] for place in places}
            shares.append(sum(not found.isdisjoint(group) for group in item.gold) / len(item.gold))
        value = float(np.mean(shares))
        if value > max(self.measured.values(), default=-1.0):
            self._best = {name: weight.detach().clone() for name, weight in self.model.named_parameters()}
        self.measured[len(self.curve)] = value
        return value

    def keep(self) -> int:
        """Sets the model to the weights that were measured best, the first of equals, and returns their step."""
        import torch

        if not self._best:
            return len(self.curve)
        with torch.no_grad():
            for name, weight in self.model.named_parameters():
                weight.copy_(self._best[name])
        return max(sorted(self.measured), key=lambda step: self.measured[step])

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
        """A checkpoint: weights, AdamW's moments, the curve, what was measured and the best weights."""
        import torch
        from safetensors.torch import save

        data = {"curve": torch.tensor(self.curve, dtype=torch.float64)}
        data["measured"] = torch.tensor(sorted(self.measured.items()), dtype=torch.float64).reshape(-1, 2)
        data |= {f"best {name}": weight for name, weight in self._best.items()}
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
        self.measured = {int(step): value for step, value in data["measured"].tolist()}
        self._best = {name.removeprefix("best "): weight for name, weight in data.items() if name.startswith("best ")}
        for name, weight in self.model.named_parameters():
            with torch.no_grad():
                weight.copy_(data[f"weight {name}"])
            if f"exp_avg {name}" in data:
                moments = {key: data[f"{key} {name}"].to(weight.device) for key in ("exp_avg", "exp_avg_sq")}
                self._optimizer.state[weight] = {"step": torch.tensor(float(len(self.curve))), **moments}
