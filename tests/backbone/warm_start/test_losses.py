"""The losses of the warm start: packed worlds give what plain runs give, and each loss trains what it should."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn import functional

from intra.backbone import curriculum, model, packing, warmstart
from intra.backbone.packing import EARLY, LATE, Look, PackedWorld, collate
from intra.config import LossConfig
from intra.errors import WorkflowError

from .conftest import LOSSES, POOLED, PROBES, config, without_gradient


def test_a_packed_world_answers_like_plain_runs(backbone: model.Backbone, worlds: list[PackedWorld]) -> None:
    """The packed loss is that of the unmodified model called on each question by itself, by its own forward and loss."""
    from transformers.modeling_outputs import BaseModelOutput

    module = warmstart.WarmStart(backbone, LossConfig(), POOLED)
    packed = module(collate(worlds, backbone.tokenizer.pad_token_id))["answer"]
    plain = []
    for world in worlds:
        states = backbone.encode(world.chunks)
        for segment in world.segments:
            if segment.probes:
                continue
            memory = backbone.pack([[states[chunk] for chunk in segment.visible]])
            logits = backbone.model(
                encoder_outputs=BaseModelOutput(last_hidden_state=memory.states), attention_mask=memory.mask,
                decoder_input_ids=torch.tensor([segment.ids]),
            ).logits[0]  # fmt: skip
            plain.append(functional.cross_entropy(logits, torch.tensor(segment.labels), ignore_index=-100, reduction="none"))
    flat = torch.cat(plain)
    assert packed.item() == pytest.approx(flat[flat != 0].mean().item(), rel=1e-5)


def test_packed_scores_are_those_of_retrieval(backbone: model.Backbone, worlds: list[PackedWorld]) -> None:
    """The retrieval loss scores with the queries and keys that a retrieval pass would use."""
    module = warmstart.WarmStart(backbone, LOSSES, POOLED)
    with torch.no_grad():
        module.alpha.copy_(torch.rand(module.alpha.shape, generator=torch.Generator().manual_seed(0)))
        found = module(collate(worlds, backbone.tokenizer.pad_token_id))["retrieval"]
        states = [state for world in worlds for state in backbone.encode(world.chunks)]
        vectors = model.pool_all(states, POOLED)
        expected, offset = [], 0
        for world in worlds:
            own = states[offset : offset + len(world.chunks)]
            for segment in world.segments:
                if segment.probes:
                    prompt = segment.ids[: segment.probes[0]]
                    tokens = backbone.model.get_decoder().embed_tokens(torch.tensor(prompt[-1:])).expand(PROBES, -1)
                    queries = backbone.queries([prompt], tokens, backbone.pack([[own[chunk] for chunk in segment.visible]]))[0]
                    score = torch.zeros(len(states))
                    for layer in range(backbone.layers):
                        keys = backbone.keys(vectors, layer)
                        for head in range(backbone.heads):
                            products = queries[layer, head] @ keys[:, :, head * backbone.kv_heads // backbone.heads].mT
                            score += module.alpha[layer, head] * products.amax(-1).mean(-1)
                    target = torch.zeros(len(states))
                    target[[offset + chunk for chunk in segment.gold]] = 1 / len(segment.gold)
                    expected.append(-(score.log_softmax(0) * target).sum())
            offset += len(world.chunks)
    assert found.item() == pytest.approx(torch.stack(expected).mean().item(), rel=1e-4)


def test_pooling_is_the_stores(backbone: model.Backbone) -> None:
    states = [torch.randn(n, 4) for n in (1, 2, 3, 5, 8)]
    padded = torch.nn.utils.rnn.pad_sequence(states, batch_first=True)
    found = packing.pooled(padded, torch.tensor([len(state) for state in states]), POOLED)
    assert torch.allclose(found, model.pool_all(states, POOLED), atol=1e-6)


READ_LAST = {  # what comes behind the queries and keys of the last decoder layer
    "decoder.3.self_attn.v_proj", "decoder.3.self_attn.o_proj", "decoder.3.post_self_attn_layernorm", "decoder.3.pre_feedforward_layernorm",
    "decoder.3.mlp.gate_proj", "decoder.3.mlp.up_proj", "decoder.3.mlp.down_proj", "decoder.3.post_feedforward_layernorm",
    "model.model.decoder.norm.weight",
}  # fmt: skip


@pytest.mark.parametrize(
    ("losses", "scoring", "without"),
    [
        (LossConfig(retrieval=0.5, hop=0.5, attention=0.5), "per_head", set()),
        (LossConfig(), "per_head", {"alpha", "alpha_hop"}),
        (LossConfig(attention=0.5), "per_head", {"alpha", "alpha_hop"}),
        (LossConfig(answer=0, retrieval=1), "per_head", {"alpha_hop", *READ_LAST}),
        (LossConfig(answer=0, retrieval=1), "mixture", {"alpha_hop", *READ_LAST}),
        (LossConfig(answer=0, hop=1), "per_head", {"alpha", *READ_LAST}),
        (LossConfig(answer=0, attention=1), "per_head", {"alpha", "alpha_hop", *READ_LAST}),
    ],
)
def test_a_loss_trains_what_it_should_and_nothing_else(
    backbone: model.Backbone, supervised: packing.Batch, losses: LossConfig, scoring: str, without: set[str]
) -> None:
    module = warmstart.WarmStart(backbone, LossConfig(), POOLED, scoring)
    module(supervised, losses)["total"].backward()
    assert without_gradient(module) == without


def test_hop_supervision_parts_the_layers(backbone: model.Backbone, worlds: list[PackedWorld]) -> None:
    module = warmstart.WarmStart(backbone, LossConfig(answer=0.0, hop=1.0), POOLED)
    module(collate(worlds, backbone.tokenizer.pad_token_id))["total"].backward()
    gradient = module.alpha_hop.grad
    assert gradient is not None
    early, late = gradient.abs().sum(-1)
    assert early[:2].min() > 0
    assert early[2:].max() == 0
    assert late[:2].max() == 0
    assert late[2:].min() > 0


def test_the_loss_falls_and_answers_are_learnt(backbone: model.Backbone, worlds: list[PackedWorld]) -> None:
    recipe = config(steps=40, learning_rate=0.01, warmup_steps=4, checkpoint_every=10).backbone.warmstart
    module = warmstart.WarmStart(backbone, LOSSES, POOLED)
    batch = collate(worlds, backbone.tokenizer.pad_token_id)
    losses: list[float] = []
    last = warmstart.train(
        module, warmstart.optimizers(module, recipe), lambda step: [batch], recipe,
        checkpoint=lambda step, metrics: losses.append(metrics["total"]),
    )  # fmt: skip
    assert len(losses) == 4
    assert losses[-1] < 0.5 * losses[0]
    assert last["answer_token_accuracy"] > 0.9


def test_a_step_that_is_not_finite_ends_training_before_it_changes_a_weight(backbone: model.Backbone, worlds: list[PackedWorld]) -> None:
    module = warmstart.WarmStart(backbone, LOSSES, POOLED)
    recipe = config().backbone.warmstart
    batch = collate(worlds, backbone.tokenizer.pad_token_id)
    made: dict[str, torch.Tensor] = {}

    def done(step: int) -> None:
        made.update({name: weight.detach().clone() for name, weight in module.named_parameters()})
        if step == 2:
            module.alpha_hop.register_hook(lambda gradient: gradient * torch.inf)

    with pytest.raises(WorkflowError, match=r"^warmstart: step 2: .* not a finite number; lower backbone\.warmstart\.learning_rate"):
        warmstart.train(module, warmstart.optimizers(module, recipe), lambda step: [batch], recipe, done=done)
    assert all(torch.equal(weight, made[name]) for name, weight in module.named_parameters())


def test_schedule() -> None:
    recipe = config(steps=100, warmup_steps=10, decay=0.5).backbone.warmstart
    factors = [warmstart.schedule(step, recipe) for step in range(100)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[10:50] == [1.0] * 40
    assert factors[75] == pytest.approx(0.5)
    assert 0 < factors[-1] < 0.05


def test_matrices_go_to_muon_and_the_rest_to_adamw(backbone: model.Backbone) -> None:
    module = warmstart.WarmStart(backbone, LOSSES, POOLED)
    made = warmstart.optimizers(module, config().backbone.warmstart)
    assert isinstance(made.matrices, torch.optim.Muon)
    count = [sum(len(group["params"]) for group in optimizer.param_groups) for optimizer in (made.matrices, made.others)]
    assert sum(count) == len(list(module.parameters()))
    assert count[0] == 7 * (backbone.layers + 3)  # q, k, v, o and three of the feed-forward, in every layer
    assert isinstance(warmstart.optimizers(module, config(optimizer="adamw").backbone.warmstart).matrices, torch.optim.AdamW)


def test_left_out_vectors_are_not_scored(backbone: model.Backbone, worlds: list[PackedWorld]) -> None:
    """With one vector kept, a chunk's score is that vector's; at least one is always kept."""
    module = warmstart.WarmStart(backbone, LOSSES, POOLED)
    with torch.no_grad():
        whole = module(collate(worlds, backbone.tokenizer.pad_token_id))["retrieval"]
        for world in worlds:
            world.kept = [[False, True, False] for _ in world.chunks]
        single = module(collate(worlds, backbone.tokenizer.pad_token_id))["retrieval"]
    assert single.isfinite()
    assert single.item() != pytest.approx(whole.item(), rel=1e-4)
    (batch,) = curriculum.synthetic_batches(config(vector_dropout=0.9, batch_size=2), backbone)(0)
    assert batch.kept.any(1).all()
    assert not batch.kept.all()


@pytest.mark.parametrize("gathered", [0, warmstart.GATHERED])
def test_attention_is_the_models_own(
    backbone: model.Backbone, pristine: Any, worlds: list[PackedWorld], gathered: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The supervised mass is that of the unmodified model's cross-attention weights, scaled to sum to one over the memory."""
    monkeypatch.setattr(warmstart, "GATHERED", gathered)
    chosen = [(0, 0, EARLY, [(1, 0), (2, 1)]), (1, 2, LATE, [(4, 0)]), (2, 0, LATE, [(0, 1), (1, 0)])]
    for world, segment, half, tokens in chosen:
        worlds[world].segments[segment].looks = [Look(3, half, tokens)]
    module = warmstart.WarmStart(backbone, LossConfig(answer=0.0, attention=1.0), POOLED)
    found = module(collate(worlds, backbone.tokenizer.pad_token_id))
    expected = []
    for world, segment, half, tokens in chosen:
        packed, visible = worlds[world], worlds[world].segments[segment].visible
        states = backbone.encode(packed.chunks)
        output = pristine.get_decoder()(
            input_ids=torch.tensor([packed.segments[segment].ids]),
            encoder_hidden_states=torch.cat([states[chunk] for chunk in visible])[None], output_attentions=True,
        )  # fmt: skip
        starts = {chunk: sum(len(packed.chunks[other]) for other in visible[:place]) for place, chunk in enumerate(visible)}
        weights = torch.stack(output.cross_attentions)[:, 0, :, 3]
        mass = weights[..., [starts[chunk] + token for chunk, token in tokens]].sum(-1) / weights.sum(-1)
        layers = slice(0, 2) if half == EARLY else slice(2, 4)
        expected.append(mass[layers].mean())
    assert found["attention"].item() == pytest.approx(-torch.stack(expected).log().mean().item(), rel=1e-5)
    assert found["early_attention"].item() == pytest.approx(expected[0].item(), rel=1e-5)
    assert found["total"].item() == found["attention"].item()


def test_a_mixture_is_the_log_of_the_layers_mean_softmax(backbone: model.Backbone, supervised: packing.Batch) -> None:
    module = warmstart.WarmStart(backbone, LOSSES, POOLED, "mixture")
    assert module.alpha.mean().item() == pytest.approx(2 * warmstart.WarmStart(backbone, LOSSES, POOLED).alpha.mean().item())
    scores = torch.randn(len(supervised.gold), supervised.gold.shape[1], backbone.layers, backbone.heads)
    with torch.no_grad():
        module.alpha.copy_(torch.rand(module.alpha.shape))
        found = module._retrieval(scores, supervised.gold, supervised.left_out)
        chances = torch.stack([(scores[:, :, layer] * module.alpha[layer]).sum(-1).softmax(-1) for layer in range(backbone.layers)])
    assert found.item() == pytest.approx(-(supervised.gold * chances.mean(0).log()).sum(1).mean().item(), rel=1e-5)


def _losses(module: warmstart.WarmStart, scores: torch.Tensor, batch: packing.Batch, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(module, "_scores", lambda *_: scores)
        return module(batch, LossConfig(answer=0, retrieval=1, hop=1))


@pytest.mark.parametrize("scoring", ["per_head", "mixture"])
def test_what_is_left_out_is_as_if_it_were_not_there(
    backbone: model.Backbone, supervised: packing.Batch, scoring: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = warmstart.WarmStart(backbone, LOSSES, POOLED, scoring)
    there = (supervised.gold == 0).nonzero()[:1, 1]
    out = supervised.gold[:, there.item()] == 0
    scores = torch.randn(*supervised.gold.shape, backbone.layers, backbone.heads)
    scores[:, there] += 100
    rest = torch.tensor([column for column in range(supervised.gold.shape[1]) if column != there])
    less = {name: getattr(supervised, name)[out][:, rest] for name in ("gold", "first", "last", "left_out")}
    expected = _losses(module, scores[out][:, rest], replace(supervised, **less), monkeypatch)
    left_out = supervised.left_out.clone()
    left_out[:, there] = True
    more = {name: getattr(supervised, name)[out] for name in ("gold", "first", "last")}
    found = _losses(module, scores[out], replace(supervised, **more, left_out=left_out[out]), monkeypatch)
    for name in ("retrieval", "hop", "first_hop_accuracy", "last_hop_accuracy"):
        assert found[name].item() == pytest.approx(expected[name].item(), rel=1e-6), name


def test_no_gradient_flows_into_extra_chunks(backbone: model.Backbone, worlds: list[PackedWorld]) -> None:
    """A word that only an extra chunk has keeps its embedding under the retrieval and hop losses; the others' change."""
    pad = backbone.tokenizer.pad_token_id
    worlds = worlds[2:]
    used = {token for world in worlds for ids in (*world.chunks, *(segment.ids for segment in world.segments)) for token in ids}
    unused = next(token for token in range(4, len(backbone.tokenizer)) if token not in used)
    batch = collate(worlds, pad, [[1, unused, unused]], [[True] * POOLED])
    module = warmstart.WarmStart(backbone, LossConfig(answer=0, retrieval=1, hop=1), POOLED)
    module(batch)["total"].backward()
    gradient = backbone.model.get_encoder().text_model.embed_tokens.weight.grad
    assert gradient[unused].abs().sum() == 0
    assert all(gradient[token].abs().sum() > 0 for token in worlds[0].chunks[0])


def test_an_answer_counts_where_all_of_it_is_right() -> None:
    segment = torch.tensor([[0, 0, 1, 1, 1], [0, 0, 0, 2, -1]])
    trained = torch.tensor([[False, True, False, True, True], [True, True, False, True, False]])
    right = torch.tensor([True, True, False, True, True, False])
    assert warmstart._whole(right, segment, trained).item() == pytest.approx(0.5)


def test_heads_may_weigh_the_same(backbone: model.Backbone) -> None:
    """One weight a layer gives the scores of as many equal ones, and every one of them a gradient."""
    batch = curriculum.synthetic_batches(config(), backbone)(0)[0]
    one, many = (warmstart.WarmStart(backbone, LOSSES, POOLED, "mixture", equal) for equal in (True, False))
    assert one.alpha.shape == (backbone.layers, 1)
    found = one(batch)
    for name, value in many(batch).items():
        assert torch.equal(found[name], value), name
    found["total"].backward()
    assert all(bool(alpha.grad.any()) for alpha in (one.alpha, one.alpha_hop))
