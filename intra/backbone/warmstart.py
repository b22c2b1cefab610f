"""The warm start: trains a T5Gemma 2 to answer from packed, separately encoded chunks. Plain PyTorch, no Ray.

    answer      cross-entropy of the answer's tokens, given the question and the chunks its world holds
    retrieval   soft cross-entropy of the score sum over layers and heads of alpha * sum over probes of MaxSim (paper section 3.3,
                5.1), over all chunks of the batch; the probes stand where retrieval tokens will stand
                Of each chunk's pooled vectors a share may be left out at random (`vector_dropout`): then every vector, not the
                title's alone, must say whose chunk it is, and a fact is bound to its entity.
    hop         the same with the early half of the layers against the first gold chunk and the late half against the last

    attention   minus the log of the attention that falls on given tokens, the mean over the heads of one half of the layers: late layers
                look at the answer's tokens, early ones at the words in the first gold chunk that name the last

A backbone trained with the last three is not "pretrained only for generation": its model card says so. alpha is trained beside
the backbone and thrown away.

Matrices of the layers are trained by Muon, embeddings, norms and alpha by AdamW. Nothing is drawn at random here: batch `i` is
a function of (seed, i), so a run that goes on from a checkpoint gives the same weights as one that was never stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from intra.backbone.attention import capturing
from intra.backbone.model import Backbone
from intra.backbone.packing import EARLY, IGNORE, LATE, Batch, masks, pooled
from intra.config import LossConfig, WarmstartConfig


class WarmStart(torch.nn.Module):  # type: ignore[misc]
    """The backbone in training, and the retrieval loss's own weights alpha [layers, heads].

    `alpha_hop` [2, layers, heads] weighs the two hop losses; each is zero outside its half of the layers.
    """

    def __init__(self, backbone: Backbone, losses: LossConfig, pooled_length: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.model = backbone.model
        self.losses = losses
        self.pooled_length = pooled_length
        shape = backbone.layers, backbone.heads
        # Scores of about unit spread at the start: a dot product of two normed queries and keys has spread head_dim ** 0.5.
        start = backbone.head_dim**-0.5 / (backbone.layers * backbone.heads) ** 0.5
        self.alpha = torch.nn.Parameter(torch.full(shape, start))
        self.alpha_hop = torch.nn.Parameter(torch.full((2, *shape), start * 2**0.5))
        halves = torch.zeros(2, backbone.layers, 1)
        halves[0, : max(1, backbone.layers // 2)] = 1
        halves[1, backbone.layers // 2 :] = 1
        self.register_buffer("halves", halves, persistent=False)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """The losses of a batch (scalars, unweighted), by name, with `total`, their weighted sum, and training accuracies."""
        batch = batch.to(self.backbone.device)
        states, _ = self.backbone.states(batch.chunks)
        flat = states.flatten(0, 1)
        memory = flat[batch.gather]
        config = self.model.config.decoder
        own, cross = masks(batch, config.sliding_window)
        sink: dict[int, Tensor] = {}
        with capturing(self.model):
            hidden = self.model.get_decoder()(
                input_ids=batch.ids, attention_mask=own, position_ids=batch.positions, encoder_hidden_states=memory,
                encoder_attention_mask=cross, use_cache=False, query_sink=sink,
            ).last_hidden_state  # fmt: skip
        trained = batch.labels != IGNORE
        logits = self.model.lm_head(hidden[trained])
        if config.final_logit_softcapping is not None:
            logits = torch.tanh(logits / config.final_logit_softcapping) * config.final_logit_softcapping
        labels = batch.labels[trained]
        parts = {"answer": functional.cross_entropy(logits, labels)}
        out = {"answer_token_accuracy": (logits.argmax(-1) == labels).float().mean()}
        if self.losses.retrieval or self.losses.hop:
            scores = self._scores(batch, states, sink)
            overall = torch.einsum("sclh,lh->sc", scores, self.alpha)
            parts["retrieval"] = functional.cross_entropy(overall, batch.gold)
            early, late = torch.einsum("sclh,klh->ksc", scores, self.alpha_hop * self.halves)
            parts["hop"] = (functional.cross_entropy(early, batch.first) + functional.cross_entropy(late, batch.last)) / 2
            out["first_hop_accuracy"] = (early.argmax(-1) == batch.first).float().mean()
            out["last_hop_accuracy"] = (late.argmax(-1) == batch.last).float().mean()
        if self.losses.attention:
            mass = self._attention(batch, memory, cross["full_attention"], sink)
            if len(mass):
                parts["attention"] = -mass.clamp(min=1e-6).log().mean()
                for name, half in (("early", EARLY), ("late", LATE)):
                    if (batch.look_half == half).any():
                        out[f"{name}_attention"] = mass[batch.look_half == half].mean()
        weights = self.losses.model_dump()
        total = torch.stack([weights[name] * loss for name, loss in parts.items()]).sum()
        return {"total": total, **parts, **out}

    def _attention(self, batch: Batch, memory: Tensor, cross: Tensor, sink: Mapping[int, Tensor]) -> Tensor:
        """The cross-attention that falls on each look's tokens, among the memory alone: Tensor[K], the mean over heads and layers."""
        seen = cross[batch.look_row, 0, batch.look_column]
        repeat = self.backbone.heads // self.backbone.kv_heads
        layers = []
        for layer in range(self.backbone.layers):
            queries = sink[layer].transpose(1, 2)[batch.look_row, batch.look_column]  # [K, heads, head_dim]
            keys = self.backbone.keys(memory, layer).repeat_interleave(repeat, dim=2)[batch.look_row]  # [K, M, heads, head_dim]
            logits = torch.einsum("khe,kmhe->khm", queries, keys) * self.backbone.scaling
            weights = logits.masked_fill(~seen[:, None], float("-inf")).softmax(-1)
            layers.append((weights * batch.look_target[:, None]).sum(-1).mean(-1))
        mass = torch.stack(layers, dim=1)
        share = self.halves[batch.look_half, :, 0]
        return (mass * share).sum(1) / share.sum(1)

    def _scores(self, batch: Batch, states: Tensor, sink: Mapping[int, Tensor]) -> Tensor:
        """Sum over probes of MaxSim, per layer and head: Tensor[S, C, layers, heads]."""
        lengths = torch.tensor([len(chunk) for chunk in batch.chunks], device=states.device)
        vectors = pooled(states, lengths, self.pooled_length)
        repeat = self.backbone.heads // self.backbone.kv_heads
        layers = []
        for layer in range(self.backbone.layers):
            queries = sink[layer].transpose(1, 2)[batch.probe_rows, batch.probe_columns]  # [S, R, heads, head_dim]
            keys = self.backbone.keys(vectors, layer).repeat_interleave(repeat, dim=2)  # [C, P, heads, head_dim]
            products = torch.einsum("srhe,cphe->srchp", queries, keys)
            products = products.masked_fill(~batch.kept[:, None, :], float("-inf"))
            layers.append(products.amax(-1).sum(1))
        return torch.stack(layers, dim=2) / batch.probe_rows.shape[1]


@dataclass
class Optimizers:
    """Muon for the matrices of the layers, AdamW for all else, under one schedule."""

    muon: torch.optim.Optimizer
    adamw: torch.optim.Optimizer
    recipe: WarmstartConfig

    def step(self, step: int) -> None:
        factor = schedule(step, self.recipe)
        for optimizer, rate in ((self.muon, self.recipe.matrix_learning_rate), (self.adamw, self.recipe.learning_rate)):
            for group in optimizer.param_groups:
                group["lr"] = rate * factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Any]:
        return {"muon": self.muon.state_dict(), "adamw": self.adamw.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.muon.load_state_dict(state["muon"])
        self.adamw.load_state_dict(state["adamw"])


def schedule(step: int, recipe: WarmstartConfig) -> float:
    """The learning rates' factor: linear warm-up, constant, then linear decay to zero over the last `decay` of the steps."""
    warmup = (step + 1) / recipe.warmup_steps if recipe.warmup_steps else 1.0
    decay = recipe.decay * recipe.steps
    return min(1.0, warmup, (recipe.steps - step) / decay if decay else 1.0)


def optimizers(module: WarmStart, recipe: WarmstartConfig) -> Optimizers:
    matrices: list[Tensor] = []
    others: list[Tensor] = []
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            (matrices if parameter.ndim == 2 and ".layers." in name else others).append(parameter)
    return Optimizers(
        torch.optim.Muon(matrices, lr=recipe.matrix_learning_rate, weight_decay=recipe.weight_decay),
        torch.optim.AdamW(others, lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=0.0),
        recipe,
    )


def train(
    module: WarmStart,
    optimizer: Optimizers,
    batches: Callable[[int], list[Batch]],
    recipe: WarmstartConfig,
    *,
    start: int = 0,
    reduce: Callable[[list[Tensor]], None] | None = None,
    checkpoint: Callable[[int, dict[str, float]], None] | None = None,
) -> dict[str, float]:
    """Trains from step `start` to `recipe.steps`; returns the last metrics.

    `batches(step)` gives this process's micro-batches of a step; gradients are the mean over them. `reduce` averages a list of
    gradients over the processes, in place. `checkpoint(step, metrics)` is called after every `checkpoint_every` steps and
    after the last, with the number of finished steps and the mean losses since the call before.
    """
    module.train()
    totals: dict[str, Tensor] = {}
    counted = 0
    metrics: dict[str, float] = {}
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for step in range(start, recipe.steps):
        micro = batches(step)
        for batch in micro:
            losses = module(batch)
            (losses["total"] / len(micro)).backward()
            for name, value in losses.items():
                totals[name] = value.detach() + totals.get(name, 0.0)
            counted += 1
        if reduce is not None:
            reduce([parameter.grad for parameter in parameters if parameter.grad is not None])
        torch.nn.utils.clip_grad_norm_(parameters, recipe.clip)
        optimizer.step(step)
        if (step + 1) % recipe.checkpoint_every == 0 or step + 1 == recipe.steps:
            metrics = {name: float(value) / counted for name, value in totals.items()}
            totals, counted = {}, 0
            if checkpoint is not None:
                checkpoint(step + 1, metrics)
    module.eval()
    return metrics
