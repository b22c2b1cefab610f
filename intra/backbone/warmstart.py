"""The warm start: trains a T5Gemma 2 to answer from packed, separately encoded chunks. Plain PyTorch, no Ray.

    answer      cross-entropy of the answer's tokens, given the question and the chunks its world holds
    retrieval   soft cross-entropy of the score sum over layers and heads of alpha * sum over probes of MaxSim (paper section 3.3,
                5.1), over all chunks of the batch; the probes stand where retrieval tokens will stand
                Of each chunk's pooled vectors a share may be left out at random (`vector_dropout`): then every vector, not the
                title's alone, must say whose chunk it is, and a fact is bound to its entity.
                `retrieval_scoring` mixture: the score is the log of the mean over layers of each layer's own softmax over the chunks,
                so that a late layer's choice is not buried under an early one's.
    hop         the same (as a sum) with the early half of the layers against the first gold chunk, the late half against the last;
                of a comparison against the last and the first
    attention   minus the log of the attention that falls on given tokens, the mean over the heads of one half of the layers: late layers
                look at the answer's tokens, early ones at the words in the first gold chunk that name the last

Over a frozen encoder (intra.backbone.adopted) the retrieval positions are the echoed question's too, the attention loss leaves the matching
heads alone, and the states of a pool's chunks are read from its store: they have been encoded once.

A backbone trained with the last three is not "pretrained only for generation": its model card says so. alpha is trained beside
the backbone and thrown away. A batch's `extra` chunks are scored with the others, without a gradient to the encoder.

Matrices of the layers are trained by Muon or AdamW, embeddings, norms and alpha by AdamW. Nothing is drawn at random here: batch `i` is
a function of (seed, i), so a run that goes on from a checkpoint gives the same weights as one that was never stopped.

On several processes gradients are averaged; with `shard` the weights and the optimizer's state are split among them too (FSDP2), layer by
layer. Checkpoints: intra.backbone.checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from intra.backbone.attention import capturing
from intra.backbone.curriculum import stage_at
from intra.backbone.model import Backbone
from intra.backbone.packing import EARLY, IGNORE, LATE, Batch, masks, pooled
from intra.config import LossConfig, WarmstartConfig
from intra.errors import WorkflowError

GATHERED = 2**26  # numbers of the attention loss's keys, a copy for each look, at most
OUT = -1e9  # score of a chunk that is left out; not -inf, which times a share of 0 is not a number


class _Sink:
    """What the layers hand out beside their output. The first value stays: a checkpointed layer runs again.

    Not a dict: of those among a layer's arguments FSDP makes copies.
    """

    def __init__(self) -> None:
        self._found: dict[Any, Tensor] = {}

    def __setitem__(self, key: Any, value: Tensor) -> None:
        self._found.setdefault(key, value)

    def __getitem__(self, key: Any) -> Tensor:
        return self._found[key]


class _Passed(torch.autograd.Function):  # type: ignore[misc]
    """The first tensor as it is; the second is reached by the backward pass, but gets no gradient."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, reached: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class WarmStart(torch.nn.Module):  # type: ignore[misc]
    """The backbone in training, and the retrieval loss's own weights alpha [layers, heads]; [layers, 1] where heads weigh the same.

    Equal weights are what a retriever starts from: trained ones may rest on a few heads, and a new retriever has to find them again.
    Either is taken times the backbone's `head_shares`. `alpha_hop` [2, layers, heads or 1] weighs the two hop losses; each is zero outside
    its half of the layers. `losses` are those of a call that names none.
    """

    def __init__(
        self, backbone: Backbone, losses: LossConfig, pooled_length: int, scoring: str = "per_head", equal: bool = False,
        stored: Callable[[Sequence[int]], list[Tensor]] | None = None,
    ) -> None:  # fmt: skip
        """`stored`: rows of the pool -> the states of these chunks, Tensor[n_i, d] fp32; of a frozen encoder alone."""
        super().__init__()
        self.backbone = backbone
        self.model = backbone.model
        self.losses = losses
        self.pooled_length = pooled_length
        self.scoring = scoring
        self.bfloat16 = False  # whether matrices are multiplied in bfloat16; `place` sets it
        self._stored = stored
        shape = backbone.layers, 1 if equal else backbone.heads
        # Scores of about unit spread at the start: a dot product of two normed queries and keys has spread head_dim ** 0.5.
        start = backbone.head_dim**-0.5 / (backbone.layers * backbone.heads) ** 0.5
        # A mixture scores by each layer alone: the same for the sum over its heads.
        alpha = start * backbone.layers**0.5 if scoring == "mixture" else start
        self.alpha = torch.nn.Parameter(torch.full(shape, alpha))
        self.alpha_hop = torch.nn.Parameter(torch.full((2, *shape), start * 2**0.5))
        halves = torch.zeros(2, backbone.layers, 1)
        halves[0, : max(1, backbone.layers // 2)] = 1
        halves[1, backbone.layers // 2 :] = 1
        self.register_buffer("halves", halves, persistent=False)
        self.register_buffer("shares", backbone.head_shares(), persistent=False)

    @property
    def sharded(self) -> bool:
        return isinstance(self, FSDPModule)

    def forward(self, batch: Batch, losses: LossConfig | None = None) -> dict[str, Tensor]:
        """The losses of a batch (scalars, unweighted), by name, with `total`, their weighted sum, and training accuracies."""
        losses = losses or self.losses
        scored = bool(losses.retrieval or losses.hop)
        batch = batch.to(self.backbone.device)
        config = self.model.config.decoder
        own, cross = masks(batch, config.sliding_window)
        trained = batch.labels != IGNORE
        answered = bool(trained.any())
        sink = _Sink()
        with torch.autocast(self.backbone.device.type, torch.bfloat16, enabled=self.bfloat16 and not self.sharded):
            states = self._states(batch.chunks, batch.rows)
            memory = states.flatten(0, 1)[batch.gather]
            vectors = self._vectors(batch, states) if scored else None
            # A sharded layer's weights are whole within its own forward only: there it makes the keys, in `_keep_keys`.
            asked: dict[str, Any] = {}
            if self.sharded:
                unread = None if answered else self.backbone.layers - 1
                asked = {"key_sink": sink, "key_vectors": vectors, "key_memory": bool(losses.attention), "unread": unread}
            read = {"inputs_embeds": self._echoed(batch)} if batch.echoes else {"input_ids": batch.ids}
            with capturing(self.model):
                hidden = self.model.get_decoder()(
                    **read, attention_mask=own, position_ids=batch.positions, encoder_hidden_states=memory,
                    encoder_attention_mask=cross, use_cache=False, query_sink=sink, **asked,
                ).last_hidden_state  # fmt: skip
            logits = self.model.lm_head(hidden[trained]).float() if answered else None
            scores = self._scores(batch, vectors, sink).float() if vectors is not None else None
            mass = self._attention(batch, memory, cross["full_attention"], sink).float() if losses.attention else None
        parts: dict[str, Tensor] = {}
        out: dict[str, Tensor] = {}
        if logits is not None:
            if config.final_logit_softcapping is not None:
                logits = torch.tanh(logits / config.final_logit_softcapping) * config.final_logit_softcapping
            labels = batch.labels[trained]
            parts["answer"] = functional.cross_entropy(logits, labels)
            right = logits.argmax(-1) == labels
            out = {"answer_token_accuracy": right.float().mean(), "answer_accuracy": _whole(right, batch.segment, trained)}
        if scores is not None:
            parts["retrieval"] = self._retrieval(scores, batch.gold, batch.left_out)
            early, late = torch.einsum("sclh,klh->ksc", scores, self._each(self.alpha_hop) * self.halves).masked_fill(batch.left_out, OUT)
            parts["hop"] = (functional.cross_entropy(early, batch.first) + functional.cross_entropy(late, batch.last)) / 2
            out["first_hop_accuracy"] = _hit(early, batch.first)
            out["last_hop_accuracy"] = _hit(late, batch.last)
        if mass is not None and len(mass):
            parts["attention"] = -mass.clamp(min=1e-6).log().mean()
            for name, half in (("early", EARLY), ("late", LATE)):
                if (batch.look_half == half).any():
                    out[f"{name}_attention"] = mass[batch.look_half == half].mean()
        weights = losses.model_dump()
        total = torch.stack([weights[name] * loss for name, loss in parts.items()]).sum()
        if self.sharded and not answered:
            # Nothing reads the last layer's output, by whose gradient FSDP knows when the backward pass needs that layer's weights.
            total = _Passed.apply(total, hidden)
        return {"total": total, **parts, **out}

    def _each(self, alpha: Tensor) -> Tensor:
        """A weight for every head: [..., layers, heads], of one a head or one a layer."""
        return alpha.expand(*alpha.shape[:-1], self.backbone.heads)

    def _retrieval(self, scores: Tensor, gold: Tensor, left_out: Tensor) -> Tensor:
        """The retrieval loss of scores [S, C + E, layers, heads] against gold [S, C + E], each row's shares, among what is not left out."""
        alpha = self._each(self.alpha) * self.shares
        if self.scoring == "per_head":
            return functional.cross_entropy(torch.einsum("sclh,lh->sc", scores, alpha).masked_fill(left_out, OUT), gold)
        layers = torch.einsum("sclh,lh->slc", scores, alpha).masked_fill(left_out[:, None], OUT).log_softmax(-1)
        mixture = layers.logsumexp(1) - math.log(self.backbone.layers)
        return -(gold * mixture).sum(-1).mean()

    def _vectors(self, batch: Batch, states: Tensor) -> Tensor:
        """The pooled vectors of the chunks, and behind them of the extra ones, those without a gradient: Tensor[C + E, P, d]."""
        lengths = torch.tensor([len(chunk) for chunk in batch.chunks], device=states.device)
        vectors = pooled(states, lengths, self.pooled_length)
        if not batch.extra:
            return vectors
        with torch.no_grad():
            others = self._states(batch.extra, batch.extra_rows)
            lengths = torch.tensor([len(chunk) for chunk in batch.extra], device=states.device)
            further = pooled(others, lengths, self.pooled_length)
        return torch.cat([vectors, further])

    def _states(self, chunks: Sequence[Sequence[int]], rows: Sequence[int] = ()) -> Tensor:
        """The encoder's states of the chunks, padded on the right: [C, N, d]. Of a frozen encoder, without a gradient."""
        if not self.backbone.frozen_encoder:
            return self.backbone.states(chunks).states
        if self._stored is None:
            found = self.backbone.encode(chunks)
        else:
            found = self._stored(rows)
            if [len(states) for states in found] != [len(chunk) for chunk in chunks]:
                raise ValueError("the stored states are not of the batch's chunks")
        return pad_sequence([states.to(self.backbone.device) for states in found], batch_first=True)

    def _echoed(self, batch: Batch) -> Tensor:
        """The decoder's input [W, Q, d] with the questions' states in place, and their mean added to the probes behind them."""
        embeddings = self.model.get_decoder().embed_tokens(batch.ids)
        states = pad_sequence([item[1:-1] for item in self.backbone.encode(batch.echoes)], batch_first=True).to(embeddings)
        rows = batch.probe_rows[:, :1].expand_as(batch.echo_columns)
        embeddings = embeddings.index_put((rows[batch.echoed], batch.echo_columns[batch.echoed]), states[batch.echoed])
        mean = states.sum(dim=1) / batch.echoed.sum(dim=1, keepdim=True).clamp(min=1)
        return embeddings.index_put(
            (batch.probe_rows, batch.probe_columns), mean[:, None].expand(*batch.probe_rows.shape, -1), accumulate=True
        )

    def _keys(self, vectors: Tensor, layer: int, name: str, sink: _Sink) -> Tensor:
        """`Backbone.keys`, or what a sharded layer has kept of them."""
        return sink[name, layer] if self.sharded else self.backbone.keys(vectors, layer)

    def _attention(self, batch: Batch, memory: Tensor, cross: Tensor, sink: _Sink) -> Tensor:
        """The cross-attention that falls on each look's tokens, among the memory alone: Tensor[K], the mean over heads and layers."""
        seen = cross[batch.look_row, 0, batch.look_column]
        repeat = self.backbone.heads // self.backbone.kv_heads
        # The keys of every look by itself are less work where the looks are few and the chunks short; else all places' logits are.
        gathered = not self.backbone.frozen_encoder and seen.numel() * self.backbone.heads * self.backbone.head_dim <= GATHERED
        layers = []
        for layer in range(self.backbone.layers):
            keys = self._keys(memory, layer, "memory", sink).repeat_interleave(repeat, dim=2)  # [W, M, heads, head_dim]
            if gathered:
                queries = sink[layer].transpose(1, 2)[batch.look_row, batch.look_column]  # [K, heads, head_dim]
                logits = torch.einsum("khe,kmhe->khm", queries, keys[batch.look_row])
            else:
                logits = (sink[layer] @ keys.permute(0, 2, 3, 1)).transpose(1, 2)[batch.look_row, batch.look_column]
            weights = (logits * self.backbone.scaling).masked_fill(~seen[:, None], float("-inf")).softmax(-1)
            layers.append((weights * batch.look_target[:, None]).sum(-1)[:, self.backbone.matching_heads :].mean(-1))
        mass = torch.stack(layers, dim=1)
        share = self.halves[batch.look_half, :, 0]
        return (mass * share).sum(1) / share.sum(1)

    def _scores(self, batch: Batch, vectors: Tensor, sink: _Sink) -> Tensor:
        """Sum over probes of MaxSim, per layer and head: Tensor[S, C + E, layers, heads]."""
        repeat = self.backbone.heads // self.backbone.kv_heads
        everything = bool(batch.kept.all())
        rows, columns = batch.probe_rows, batch.probe_columns
        if batch.echoes:
            read = torch.cat([torch.ones_like(rows, dtype=torch.bool), batch.echoed], dim=1)
            columns = torch.cat([columns, batch.echo_columns], dim=1)
            rows = rows[:, :1].expand_as(columns)
        layers = []
        for layer in range(self.backbone.layers):
            queries = sink[layer].transpose(1, 2)[rows, columns]  # [S, R, heads, head_dim]
            keys = self._keys(vectors, layer, "vectors", sink).repeat_interleave(repeat, dim=2)  # [C + E, P, heads, head_dim]
            products = torch.einsum("srhe,cphe->srchp", queries, keys)
            if not everything:
                products = products.masked_fill(~batch.kept[:, None, :], float("-inf"))
            best = products.amax(-1)
            layers.append((best * read[:, :, None, None] if batch.echoes else best).sum(1))
        return torch.stack(layers, dim=2) / (read.sum(dim=1)[:, None, None, None] if batch.echoes else rows.shape[1])


def _hit(scores: Tensor, gold: Tensor) -> Tensor:
    """How often the best of each row's scores is one of its gold chunks."""
    return (gold.gather(1, scores.argmax(-1, keepdim=True)) > 0).float().mean()


def _whole(right: Tensor, segment: Tensor, trained: Tensor) -> Tensor:
    """The share of answers of which every token is right. right: bool, one entry a trained place; segment, trained: [W, Q]."""
    rows = torch.arange(len(segment), device=segment.device)[:, None] * (segment.max() + 1)
    _, answer = (rows + segment)[trained].unique(return_inverse=True)
    wrong = torch.zeros(int(answer.max()) + 1, device=segment.device)
    wrong[answer[~right]] = 1
    return 1 - wrong.mean()


def _keep_keys(module: Any, args: Any, kwargs: Mapping[str, Any], output: Any) -> Any:
    """Forward hook of a sharded decoder layer's attention: keys of what the call asks for, as `Backbone.keys` makes them.

    The output of the layer that nothing reads is cut off: not every kernel's backward takes a gradient that is not there.
    """
    wanted = {"vectors": kwargs.get("key_vectors"), "memory": kwargs["encoder_hidden_states"] if kwargs.get("key_memory") else None}
    for name, vectors in wanted.items():
        if vectors is not None:
            kwargs["key_sink"][name, module.layer_idx] = module.k_norm(module.k_proj(vectors).unflatten(-1, (-1, module.head_dim)))
    return (output[0].detach(), *output[1:]) if module.layer_idx == kwargs.get("unread") else output


def place(module: WarmStart, recipe: WarmstartConfig, device: torch.device, workers: int = 1) -> None:
    """Makes the module ready to train on a device: precision, checkpointed layers, and its share of the weights if sharded.

    Every process of the default group calls it, with the same weights; before the optimizers are made.
    """
    module.bfloat16 = recipe.precision == "bfloat16"
    if recipe.gradient_checkpointing:
        if module.backbone.frozen_encoder:  # no gradient reaches it: there is nothing of it to keep
            module.model.get_decoder().activation_checkpointing_enable()
        else:
            module.model.activation_checkpointing_enable()
            module.model.get_encoder().text_model.config.use_cache = False  # it has none, but would be warned of
    if recipe.shard and workers > 1:
        mesh = torch.distributed.init_device_mesh(device.type, (workers,))
        low = torch.bfloat16 if module.bfloat16 else None
        policy = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32)
        decoder = module.model.get_decoder()
        for layer in (*module.model.get_encoder().text_model.layers, *decoder.layers):
            fully_shard(layer, mesh=mesh, mp_policy=policy)
        for layer in decoder.layers:
            layer.self_attn.register_forward_hook(_keep_keys, with_kwargs=True)
        # alpha is small and stays whole, in float32; a batch is not to be cast.
        policy = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32, cast_forward_inputs=False)
        fully_shard(module, mesh=mesh, mp_policy=policy, ignored_params={module.alpha, module.alpha_hop})
    module.to(device)


@dataclass
class Optimizers:
    """Of the matrices of the layers, Muon or AdamW, and of all else, AdamW; under one schedule."""

    matrices: torch.optim.Optimizer
    others: torch.optim.Optimizer
    recipe: WarmstartConfig
    matching: Sequence[Tensor] = ()  # views of the matching heads' weights

    def step(self, step: int) -> None:
        before = [view.detach().clone() for view in self.matching]
        self._step(step)
        with torch.no_grad():  # Muon and AdamW do not heed the size of a gradient: the step itself is made smaller
            for view, old in zip(self.matching, before, strict=True):
                view.copy_(old.lerp(view, self.recipe.matching_rate))

    def _step(self, step: int) -> None:
        factor = schedule(step, self.recipe)
        for optimizer, rate in ((self.matrices, self.recipe.matrix_learning_rate), (self.others, self.recipe.learning_rate)):
            for group in optimizer.param_groups:
                group["lr"] = rate * factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def states(self) -> Iterable[tuple[Tensor, dict[str, Any]]]:
        """Each parameter and its state, which is empty before the first step."""
        for optimizer in (self.matrices, self.others):
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    yield parameter, optimizer.state[parameter]


def schedule(step: int, recipe: WarmstartConfig) -> float:
    """The learning rates' factor: linear warm-up, constant, linear decay to zero over the last `decay` of the steps; times the stage's."""
    warmup = (step + 1) / recipe.warmup_steps if recipe.warmup_steps else 1.0
    decay = recipe.decay * recipe.steps
    return min(1.0, warmup, (recipe.steps - step) / decay if decay else 1.0) * stage_at(recipe, step).factor


def optimizers(module: WarmStart, recipe: WarmstartConfig) -> Optimizers:
    matrices: list[Tensor] = []
    others: list[Tensor] = []
    alphas = [module.alpha, module.alpha_hop]
    for name, parameter in module.named_parameters():
        if parameter.requires_grad and not any(parameter is alpha for alpha in alphas):
            (matrices if parameter.ndim == 2 and ".layers." in name else others).append(parameter)
    betas = (0.9, 0.98)
    return Optimizers(
        torch.optim.Muon(matrices, lr=recipe.matrix_learning_rate, weight_decay=recipe.weight_decay)
        if recipe.optimizer == "muon"
        else torch.optim.AdamW(matrices, lr=recipe.matrix_learning_rate, betas=betas, weight_decay=recipe.weight_decay),
        # A group of their own: sharded tensors and whole ones are not updated in one call.
        torch.optim.AdamW([{"params": others}, {"params": alphas}], lr=recipe.learning_rate, betas=betas, weight_decay=0.0),
        recipe,
        _matching(module.backbone),
    )


def _matching(backbone: Backbone) -> list[Tensor]:
    """The weights of the heads that began as the identity."""
    rows = backbone.matching_heads * backbone.head_dim
    layers = [layer.self_attn for layer in backbone.model.get_decoder().layers] if rows else []
    views = [part.weight[:rows] for layer in layers for part in (layer.q_proj, layer.k_proj, layer.v_proj)]
    return [*views, *(layer.o_proj.weight[:, :rows] for layer in layers)]


def train(
    module: WarmStart,
    optimizer: Optimizers,
    batches: Callable[[int], list[Batch]],
    recipe: WarmstartConfig,
    *,
    start: int = 0,
    reduce: Callable[[list[Tensor]], None] | None = None,
    checkpoint: Callable[[int, dict[str, float]], None] | None = None,
    done: Callable[[int], None] | None = None,
) -> dict[str, float]:
    """Trains from step `start` to `recipe.steps`; returns the last metrics.

    `batches(step)` gives this process's micro-batches of a step; gradients are the mean over them. `reduce` averages a list of
    tensors over the processes, in place. `checkpoint(step, metrics)` is called after every `checkpoint_every` steps, at the end
    of a stage and after the last step, with the number of finished steps and the means since the call before, over all
    processes, and the stage's number. `done(step)` is called after each step.

    Raises WorkflowError where a step's gradients are not finite, before the weights are changed by them.
    """
    module.train()
    totals: dict[str, Tensor] = {}  # name -> [sum, count]
    metrics: dict[str, float] = {}
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for step in range(start, recipe.steps):
        stage = stage_at(recipe, step)
        micro = batches(step)
        for batch in micro:
            losses = module(batch, stage.recipe.losses)
            (losses["total"] / len(micro)).backward()
            for name, value in losses.items():
                totals[name] = torch.stack([value.detach(), torch.ones_like(value)]).double() + totals.get(name, 0.0)
        if reduce is not None:
            # FSDP has averaged the gradients of what is sharded.
            reduce([parameter.grad for parameter in parameters if parameter.grad is not None and not isinstance(parameter, DTensor)])
        norm = _clip(parameters, recipe.clip)
        if not norm.isfinite():
            raise WorkflowError(f"warmstart: step {step}: loss or gradient is not a finite number; lower backbone.warmstart.learning_rate "
                                "and matrix_learning_rate")  # fmt: skip
        optimizer.step(step)
        if done is not None:
            done(step + 1)
        if (step + 1) % recipe.checkpoint_every == 0 or step + 1 == stage.stop:
            metrics = {"stage": float(stage.number), **_means(totals, module.backbone.device, reduce)}
            totals = {}
            if checkpoint is not None:
                checkpoint(step + 1, metrics)
    module.eval()
    return metrics


METRICS = ("total", "answer", "retrieval", "hop", "attention", "answer_token_accuracy", "answer_accuracy", "first_hop_accuracy",
           "last_hop_accuracy", "early_attention", "late_attention")  # fmt: skip


def _means(totals: Mapping[str, Tensor], device: torch.device, reduce: Callable[[list[Tensor]], None] | None) -> dict[str, float]:
    """Of (sum, count) by name the means over all processes: each name that any of them has."""
    none = torch.zeros(2, dtype=torch.float64, device=device)
    table = torch.stack([totals.get(name, none) for name in METRICS])
    if reduce is not None:
        reduce([table])
    return {name: total / count for name, (total, count) in zip(METRICS, table.tolist(), strict=True) if count}


def _clip(parameters: Sequence[Tensor], limit: float) -> Tensor:
    """Scales the gradients to a common norm of at most `limit`. Returns the norm they had, of all processes' shares: a scalar."""
    sharded = [parameter for parameter in parameters if isinstance(parameter, DTensor) and parameter.grad is not None]
    if not sharded:
        return torch.nn.utils.clip_grad_norm_(parameters, limit)
    whole = [parameter for parameter in parameters if not isinstance(parameter, DTensor) and parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in sharded]).full_tensor()
    if whole:
        norm = torch.hypot(norm, torch.nn.utils.get_total_norm([parameter.grad for parameter in whole]))
    for group in (sharded, whole):
        torch.nn.utils.clip_grads_with_norm_(group, limit, norm)
    return norm


def measure(module: WarmStart, fresh: Mapping[str, Batch]) -> dict[str, float]:
    """How far training is, on `curriculum.fresh_batches`: answers wholly right, by kind of question; hops found, of bridge questions."""
    training = module.training
    module.eval()
    found = {}
    with torch.no_grad():
        for name, batch in fresh.items():
            values = module(batch, LossConfig(retrieval=1, hop=1))
            found[f"fresh_{name}_accuracy"] = float(values["answer_accuracy"])
            if name == "bridge":
                found |= {f"fresh_{hop}_hop_accuracy": float(values[f"{hop}_hop_accuracy"]) for hop in ("first", "last")}
    module.train(training)
    if isinstance(module, FSDPModule):
        module.reshard()  # the root stays whole after a forward pass, for the backward pass that does not come
    return found
