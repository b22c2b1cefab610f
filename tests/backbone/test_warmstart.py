"""The warm start: packed worlds give what plain runs give, each loss trains what it should, and a stopped run goes on exactly."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from intra.backbone import curriculum, model, packing, warmstart
from intra.backbone.packing import EARLY, LATE, Look, PackedWorld, answer_segment, collate, retrieval_segment
from intra.config import Config, LossConfig, parse
from intra.data import synthetic
from intra.data.schema import POOL_SCHEMA, Pool, Question
from intra.errors import UserError, WorkflowError

from .conftest import WORDS, sentences

LOSSES = LossConfig(answer=1.0, retrieval=0.5, hop=0.5)
PROBES = 3
POOLED = 3


@pytest.fixture
def backbone(folder: Path) -> model.Backbone:
    """One of its own for each test: these change it."""
    loaded = model.load(str(folder), device="cpu")
    loaded.model.requires_grad_(True)
    return loaded


@pytest.fixture
def worlds(backbone: model.Backbone) -> list[PackedWorld]:
    """Three worlds of different sizes, with answer and retrieval segments between one another."""
    made = []
    for number, chunks in enumerate((3, 5, 2)):
        texts = backbone.tokenize(sentences(chunks, seed=number, shortest=2))
        prompts = backbone.prompt_ids(sentences(3, seed=10 + number, shortest=2))
        answers = backbone.answer_ids(["ada bell", "oldtown", "red moon film"])
        everything = list(range(chunks))
        segments = [answer_segment(prompts[0], answers[0], everything)]
        segments.append(retrieval_segment(prompts[1], range(PROBES), [0], [0, chunks - 1]))
        segments.append(answer_segment(prompts[2], answers[1], [chunks - 1]))
        segments.append(retrieval_segment(prompts[2], range(PROBES), everything, [chunks - 1]))
        made.append(PackedWorld(texts, segments, [[True] * POOLED] * chunks))
    return made


def config(**warm: Any) -> Config:
    values = {"steps": 6, "batch_size": 4, "micro_batch": 2, "questions": 4, "world_chunks": 4, "warmup_steps": 2, "probes": 2,
              "checkpoint_every": 2, "pooled_length": POOLED, "losses": LOSSES.model_dump(), **warm}  # fmt: skip
    return parse({"root": "unused", "backbone": {"train": True, "warmstart": values}})


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


@pytest.fixture
def supervised(backbone: model.Backbone, worlds: list[PackedWorld]) -> packing.Batch:
    """The worlds with looks of both halves, as one batch."""
    worlds[0].segments[0].looks = [Look(3, EARLY, [(1, 0), (2, 1)]), Look(3, LATE, [(0, 1)])]
    return collate(worlds, backbone.tokenizer.pad_token_id)


def without_gradient(module: warmstart.WarmStart) -> set[str]:
    """Parameters without a gradient; a layer's by its layer and part ("decoder.3.mlp"), if none of that part has one."""
    names: dict[str, bool] = {}
    for name, weight in module.named_parameters():
        if "eoi_embedding" in name:
            continue  # the end-of-image embedding is never read in text
        side, _, rest = name.partition(".layers.")
        short = f"{'decoder' if 'decoder' in side else 'encoder'}.{'.'.join(rest.split('.')[:3])}".removesuffix(".weight") if rest else name
        names[short] = names.get(short, False) or bool(weight.grad is not None and weight.grad.abs().sum() > 0)
    return {name for name, found in names.items() if not found}


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


STAGES = [
    {"name": "reading", "share": 0.34, "losses": {"answer": 1.0}, "world_chunks": 3, "binding": 1.0, "learning_rate_factor": 2.0},
    {"name": "joint", "share": 0.66, "growth": 1.0},
]


@pytest.mark.parametrize("source", ["synthetic", "questions"])
def test_a_stopped_run_goes_on_to_the_same_weights(folder: Path, tmp_path: Path, source: str) -> None:
    """With every part of the recipe that could carry a state from step to step."""
    settings = config(distractors=1, questions=2, stages=STAGES, extra_chunks=3, retrieval_scoring="mixture", name_parts=[2, 3])
    recipe = settings.backbone.warmstart

    def fresh() -> tuple[warmstart.WarmStart, warmstart.Optimizers, curriculum.Batches]:
        backbone = model.load(str(folder), device="cpu")
        backbone.model.requires_grad_(True)
        module = warmstart.WarmStart(backbone, LOSSES, POOLED, recipe.retrieval_scoring)
        batches = curriculum.synthetic_batches(settings, backbone) if source == "synthetic" else questions(settings, backbone)
        return module, warmstart.optimizers(module, recipe), batches

    module, optimizer, made = fresh()
    rows: list[dict[str, float]] = []

    def checkpoint(step: int, metrics: dict[str, float]) -> None:
        rows.append({"step": step, **metrics})
        if step == 4:
            warmstart.save(module, optimizer, tmp_path, step)

    warmstart.train(module, optimizer, made, recipe, checkpoint=checkpoint)
    assert [(row["step"], row["stage"]) for row in rows] == [(2, 1), (4, 2), (6, 2)]
    assert "retrieval" not in rows[0]
    assert rows[1]["retrieval"] > 0
    again, optimizer_again, made_again = fresh()
    start = warmstart.load(again, optimizer_again, tmp_path)
    assert start == 4
    last = warmstart.train(again, optimizer_again, made_again, recipe, start=start)
    assert {"step": 6, **last} == rows[-1]
    for (name, weight), (_, other) in zip(module.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(weight, other), name
    (tmp_path / "optimizer-00000.safetensors").unlink()
    with pytest.raises(WorkflowError, match="0 of 1 optimizer files"):
        warmstart.load(again, optimizer_again, tmp_path)


def questions(settings: Config, backbone: model.Backbone, rank: int = 0, workers: int = 1) -> curriculum.Batches:
    import pyarrow as pa

    rows = [{"chunk_id": f"c{n:02d}", "title": "ada", "text": text, "source": "s", "n_tokens": 9} for n, text in enumerate(sentences(12))]
    gold = [((f"c{n:02d}",), (f"c{n + 5:02d}", f"c{n + 6:02d}")) for n in range(5)]
    asked = [Question(f"q{n}", "b", "train", f"where was {WORDS[n]}", ("oldtown", "red"), gold[n], 2, "bridge") for n in range(5)]
    return curriculum.question_batches(settings, backbone, Pool(pa.Table.from_pylist(rows, schema=POOL_SCHEMA)), asked, rank, workers)


def test_worlds_of_questions_hold_gold_and_distractors(backbone: model.Backbone) -> None:
    settings = config(distractors=2, questions=2, batch_size=2, micro_batch=1)
    for batch in questions(settings, backbone)(0):
        assert 2 * 2 + 2 <= len(batch.chunks) <= 2 * (2 + 2)
        assert torch.allclose(batch.gold.sum(1), torch.ones(len(batch.gold)))
        for hop in (batch.first, batch.last):
            assert torch.equal(hop.sum(1), torch.ones(len(hop)))
            assert (batch.gold[hop > 0] > 0).all()
    # More distractors than the pool has: all of it, once.
    everything = questions(config(distractors=50, questions=1, batch_size=1, micro_batch=1), backbone)(0)
    assert 10 <= len(everything[0].chunks) <= 12


def test_an_epoch_asks_every_question_once(backbone: model.Backbone) -> None:
    settings = config(distractors=0, questions=1, batch_size=5, micro_batch=5)
    made = questions(settings, backbone)
    for step in range(3):
        (batch,) = made(step)
        starts = {tuple(row[: int((segment == 0).sum())].tolist()) for row, segment in zip(batch.ids, batch.segment, strict=True)}
        assert len(starts) == 5


def test_workers_share_a_step(backbone: model.Backbone) -> None:
    settings = config(batch_size=4, micro_batch=1)
    alone = curriculum.synthetic_batches(settings, backbone)(3)
    shared: list[Iterator[packing.Batch]] = [iter(curriculum.synthetic_batches(settings, backbone, rank, 2)(3)) for rank in (0, 1)]
    for number, batch in enumerate(alone):
        assert next(shared[number % 2]).chunks == batch.chunks


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


def test_attention_is_the_models_own(backbone: model.Backbone, pristine: Any, worlds: list[PackedWorld]) -> None:
    """The supervised mass is that of the unmodified model's cross-attention weights, scaled to sum to one over the memory."""
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


def test_looks_point_at_the_bridge_and_at_the_answer(backbone: model.Backbone) -> None:
    chunks = backbone.tokenize(["the film red moon directed by ada bell", "ada bell born in oldtown", "green river"])
    asked = [
        curriculum.Asked("where was the directed of red moon born", "oldtown", [0, 1], "ada bell"),
        curriculum.Asked("red moon directed by", "ada bell", [0], "red moon"),
        curriculum.Asked("is green large", "yes", [2, 1], "ada bell"),
    ]
    settings = config(losses={"answer": 1.0, "retrieval": 1.0, "attention": 1.0}, retrieval_share=1.0)
    packed = curriculum._pack(backbone, random.Random(0), chunks, asked, settings.backbone.warmstart)
    bridge, single, comparison = packed.segments[:3]
    prompt = [len(ids) for ids in backbone.prompt_ids([item.question for item in asked])]
    assert bridge.looks == [Look(prompt[0] - 1, EARLY, [(0, 7), (0, 8)]), Look(prompt[0] - 1, LATE, [(1, 5)])]  # after <bos>
    assert single.looks == [Look(prompt[1] - 1, LATE, [(0, 7)]), Look(prompt[1], LATE, [(0, 8)])]
    assert comparison.looks == []
    seen = [segment for segment in packed.segments[3:] if segment.looks]
    assert all(look.tokens == [(0, 7), (0, 8)] and look.place in segment.probes for segment in seen for look in segment.looks)


def test_mini_worlds_grow() -> None:
    recipe = config(steps=100, growth=0.5, world_chunks=9).backbone.warmstart
    sizes = [{curriculum.world_size(random.Random(seed), step, recipe) for seed in range(200)} for step in (0, 25, 50, 99)]
    assert sizes == [{2}, {4, 5, 6, 7, 8}, set(range(6, 13)), set(range(6, 13))]


# -- stages -----------------------------------------------------------------------------------------------------------


def test_a_stage_is_a_function_of_the_step() -> None:
    recipe = config(steps=100, warmup_steps=0, decay=0.0, growth=0.1, world_chunks=9, bridge=0.25, stages=[
        {"name": "a", "share": 0.5, "losses": {"answer": 2.0}, "world_chunks": 3, "learning_rate_factor": 0.5},
        {"name": "b", "share": 0.3, "growth": 0.5, "bridge": 1.0, "binding": 0.0},
        {"name": "c", "share": 0.2},
    ]).backbone.warmstart  # fmt: skip
    found = [curriculum.stage_at(recipe, step) for step in range(100)]
    assert [(stage.number, stage.name, stage.start, stage.stop) for stage in curriculum.stages(recipe)] == [
        (1, "a", 0, 50), (2, "b", 50, 80), (3, "c", 80, 100)]  # fmt: skip
    assert [stage.name for stage in found] == ["a"] * 50 + ["b"] * 30 + ["c"] * 20
    a, b, c = found[0].recipe, found[50].recipe, found[99].recipe
    assert (a.losses, b.losses) == (LossConfig(answer=2.0), LOSSES)
    assert (a.world_chunks, b.world_chunks, a.bridge, b.bridge, b.binding, c.bridge) == (3, 9, 0.25, 1.0, 0.0, 0.25)
    assert [warmstart.schedule(step, recipe) for step in (0, 49, 50, 99)] == [0.5, 0.5, 1.0, 1.0]
    sizes = [{curriculum.world_size(random.Random(seed), step, recipe) for seed in range(200)} for step in (0, 10, 50, 65, 80)]
    assert sizes == [{2}, {2, 3, 4}, {2}, set(range(6, 13)), set(range(6, 13))]


def test_one_stage_of_all_the_steps_is_no_stage(backbone: model.Backbone) -> None:
    plain = curriculum.synthetic_batches(config(growth=0.5), backbone)
    staged = curriculum.synthetic_batches(config(growth=0.5, stages=[{"name": "all", "share": 1.0}]), backbone)
    for step in (0, 2, 5):
        for one, other in zip(plain(step), staged(step), strict=True):
            assert (one.chunks, one.extra) == (other.chunks, other.extra)
            assert torch.equal(one.ids, other.ids)


@pytest.mark.parametrize(
    ("warm", "says"),
    [
        ({"stages": [{"name": "a", "share": 0.5}]}, "shares sum to 0.5"),
        ({"stages": [{"name": "a", "share": 0.5}, {"name": "a", "share": 0.5}]}, "different names"),
        ({"stages": [{"name": "a", "share": 0.9}, {"name": "b", "share": 0.1}]}, "each needs a step"),
        ({"stages": [{"name": "a", "share": 1.0, "questions": 3}]}, "unknown key 'backbone.warmstart.stages.0.questions'"),
        ({"shard": True}, "Muon needs whole matrices"),
        ({"name_parts": [5]}, "name_parts must be null or a list"),
    ],
)
def test_a_recipe_that_cannot_be_is_the_users_mistake(warm: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError) as caught:
        config(**warm)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


# -- the recipe's choices ---------------------------------------------------------------------------------------------


def test_a_mixture_is_the_log_of_the_layers_mean_softmax(backbone: model.Backbone, supervised: packing.Batch) -> None:
    module = warmstart.WarmStart(backbone, LOSSES, POOLED, "mixture")
    assert module.alpha.mean().item() == pytest.approx(2 * warmstart.WarmStart(backbone, LOSSES, POOLED).alpha.mean().item())
    scores = torch.randn(len(supervised.gold), supervised.gold.shape[1], backbone.layers, backbone.heads)
    with torch.no_grad():
        module.alpha.copy_(torch.rand(module.alpha.shape))
        found = module._retrieval(scores, supervised.gold)
        chances = torch.stack([(scores[:, :, layer] * module.alpha[layer]).sum(-1).softmax(-1) for layer in range(backbone.layers)])
    assert found.item() == pytest.approx(-(supervised.gold * chances.mean(0).log()).sum(1).mean().item(), rel=1e-5)


def test_names_have_the_words_that_are_asked_for(backbone: model.Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    original = synthetic.world
    monkeypatch.setattr(synthetic, "world", lambda *a, **k: asked.append(k["parts"]) or original(*a, **k))
    drawn = curriculum.synthetic_batches(config(name_parts=[2, 3], batch_size=20), backbone)(0)
    assert set(asked) == {2, 3}
    asked.clear()
    plain = curriculum.synthetic_batches(config(batch_size=20), backbone)(0)
    assert set(asked) == {2}
    assert any(one.chunks != other.chunks for one, other in zip(drawn, plain, strict=True))
    only = curriculum.synthetic_batches(config(name_parts=[2], batch_size=20), backbone)(0)
    assert [batch.chunks for batch in only] == [batch.chunks for batch in plain]  # the draw is from a stream of its own


def test_extra_passages_have_other_names_some_of_them_near() -> None:
    world = synthetic.world(0, 3, chunks=8, questions=12, binding=1.0)
    titles = [passage.title for passage in world.passages]
    made = curriculum.extra_passages(random.Random(0), 0, 60, titles, titles, 2)
    names = [title for title, _ in made]
    assert len(made) == len(set(names)) == 60
    assert not set(names) & set(titles)
    assert not any(synthetic.is_test_name(name) for name in names)
    near = [name for name in names if any(len(set(name.split()) ^ set(title.split())) == 2 for title in titles)]
    assert len(near) >= 3
    # A near name is also the one in the text: no passage speaks of another entity under its own title.
    assert sum(title in text for title, text in made) > 50
    assert curriculum.extra_passages(random.Random(0), 0, 60, titles, titles, 2) == made


@pytest.mark.parametrize("source", ["synthetic", "questions"])
def test_extra_chunks_are_negatives_of_the_scores_alone(backbone: model.Backbone, source: str) -> None:
    def first(**warm: Any) -> packing.Batch:
        settings = config(batch_size=2, questions=1, distractors=0, **warm)
        return (curriculum.synthetic_batches(settings, backbone) if source == "synthetic" else questions(settings, backbone))(0)[0]

    batch, plain = first(extra_chunks=3), first()
    assert len(batch.extra) == 3
    assert (batch.chunks, plain.extra) == (plain.chunks, [])
    assert not any(chunk in batch.chunks for chunk in batch.extra)
    assert torch.equal(batch.gold[:, :-3], plain.gold)
    assert batch.gold[:, -3:].sum() == 0
    assert first(extra_chunks=3, losses={"answer": 1.0}).extra == []
    module = warmstart.WarmStart(backbone, LOSSES, POOLED)
    found, without = module(batch), module(plain)
    assert found["answer"].item() == without["answer"].item()
    assert found["retrieval"] > without["retrieval"]
    assert found["hop"] > without["hop"]


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


def test_fresh_worlds_measure_single_hops_and_bridges(backbone: model.Backbone) -> None:
    settings = config(questions=6)
    fresh = curriculum.fresh_batches(settings, backbone)
    assert list(fresh) == ["single", "bridge"]
    assert torch.equal(fresh["single"].first, fresh["single"].last)
    assert not (fresh["bridge"].first * fresh["bridge"].last).any()
    module = warmstart.WarmStart(backbone, LOSSES, POOLED).train()
    found = warmstart.measure(module, fresh)
    assert set(found) == {"fresh_single_accuracy", "fresh_bridge_accuracy", "fresh_first_hop_accuracy", "fresh_last_hop_accuracy"}
    assert all(0 <= value <= 1 for value in found.values())
    assert module.training
    assert all(weight.grad is None for weight in module.parameters())


def test_an_answer_counts_where_all_of_it_is_right() -> None:
    segment = torch.tensor([[0, 0, 1, 1, 1], [0, 0, 0, 2, -1]])
    trained = torch.tensor([[False, True, False, True, True], [True, True, False, True, False]])
    right = torch.tensor([True, True, False, True, True, False])
    assert warmstart._whole(right, segment, trained).item() == pytest.approx(0.5)


def test_checkpointed_layers_give_the_same_gradients(backbone: model.Backbone, supervised: packing.Batch) -> None:
    module = warmstart.WarmStart(backbone, LossConfig(retrieval=0.5, hop=0.5, attention=0.5), POOLED).train()
    gradients = []
    for checkpointed in (False, True):
        recipe = config(gradient_checkpointing=checkpointed).backbone.warmstart
        warmstart.place(module, recipe, torch.device("cpu"))
        module(supervised)["total"].backward()
        gradients.append({name: weight.grad for name, weight in module.named_parameters()})
        module.zero_grad(set_to_none=True)
    assert all(torch.equal(gradients[0][name], gradient) for name, gradient in gradients[1].items() if gradient is not None)


def test_bfloat16_is_of_the_arithmetic_alone(backbone: model.Backbone, worlds: list[PackedWorld]) -> None:
    worlds[0].segments[0].looks = [Look(3, EARLY, [(1, 0), (2, 1)]), Look(3, LATE, [(0, 1)])]
    batch = collate(worlds, backbone.tokenizer.pad_token_id, worlds[0].chunks, worlds[0].kept)
    module = warmstart.WarmStart(backbone, LossConfig(retrieval=0.5, hop=0.5, attention=0.5), POOLED).train()
    exact = module(batch)
    recipe = config(precision="bfloat16", gradient_checkpointing=True).backbone.warmstart
    warmstart.place(module, recipe, torch.device("cpu"))
    rough = module(batch)
    rough["total"].backward()
    for name in ("answer", "retrieval", "hop", "attention"):
        assert rough[name].dtype == torch.float32
        assert rough[name].item() != exact[name].item()
        assert rough[name].item() == pytest.approx(exact[name].item(), rel=0.05)
    assert all(weight.dtype == torch.float32 == weight.grad.dtype for weight in module.parameters() if weight.grad is not None)
    assert without_gradient(module) == set()


# -- two processes ----------------------------------------------------------------------------------------------------

SHARDED = {"optimizer": "adamw", "matrix_learning_rate": 3e-3, "extra_chunks": 2, "batch_size": 2, "micro_batch": 1, "questions": 3,
           "stages": [{"name": "reading", "share": 0.34, "losses": {"answer": 1.0}},
                      {"name": "joint", "share": 0.66, "losses": {"retrieval": 0.5, "hop": 0.5, "attention": 0.5}}],
           "steps": 3, "checkpoint_every": 1, "warmup_steps": 0, "workers": 2}  # fmt: skip


def one_process(rank: int, folder: str, place: str) -> None:
    """Trains thrice: with whole weights, with sharded ones, and with sharded ones from the second's checkpoint on."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{place}/meet", rank=rank, world_size=2)

    def reduce(tensors: list[torch.Tensor]) -> None:
        for tensor in tensors:
            torch.distributed.all_reduce(tensor)
            tensor /= 2

    for name, options in (("whole", {}), ("sharded", {"shard": True}), ("again", {"shard": True, "gradient_checkpointing": True})):
        settings = config(**SHARDED, **options)
        recipe = settings.backbone.warmstart
        backbone = model.load(folder, device="cpu")
        backbone.model.requires_grad_(True)
        module = warmstart.WarmStart(backbone, recipe.losses, POOLED)
        warmstart.place(module, recipe, torch.device("cpu"), 2)
        optimizer = warmstart.optimizers(module, recipe)
        start = warmstart.load(module, optimizer, Path(place, "sharded-2")) if name == "again" else 0
        fresh = curriculum.fresh_batches(settings, backbone)
        rows: list[dict[str, float]] = []

        def checkpoint(step: int, metrics: dict[str, float]) -> None:
            rows.append({"step": step, **metrics, **(warmstart.measure(module, fresh) if step == 2 else {})})  # noqa: B023
            target = Path(place, f"{name}-{step}")  # noqa: B023
            target.mkdir(exist_ok=True)
            warmstart.save(module, optimizer, target, step, rank, 2)  # noqa: B023
            torch.distributed.barrier()

        made = curriculum.synthetic_batches(settings, backbone, rank, 2)
        warmstart.train(module, optimizer, made, recipe, start=start, reduce=reduce, checkpoint=checkpoint)
        if rank == 0:
            torch.save(rows, Path(place, f"{name}.rows"))
    torch.distributed.destroy_process_group()


def test_sharded_weights_train_like_whole_ones_and_go_on_from_a_checkpoint(folder: Path, tmp_path: Path) -> None:
    torch.multiprocessing.spawn(one_process, (str(folder), str(tmp_path)), nprocs=2)
    rows = {name: torch.load(tmp_path / f"{name}.rows", weights_only=True) for name in ("whole", "sharded", "again")}
    assert [row["step"] for row in rows["sharded"]] == [1, 2, 3]
    for one, other in zip(rows["whole"], rows["sharded"], strict=True):
        assert one == pytest.approx(other, rel=1e-4)
    assert rows["again"] == rows["sharded"][2:]
    assert sorted(path.name for path in (tmp_path / "sharded-2").iterdir()) == [
        "optimizer-00000.safetensors", "optimizer-00001.safetensors", "weights-00000.safetensors", "weights-00001.safetensors"]  # fmt: skip

    def weights(name: str) -> dict[str, torch.Tensor]:
        """As one process reads them, weights and the optimizer's state."""
        backbone = model.load(str(folder), device="cpu")
        backbone.model.requires_grad_(True)
        module = warmstart.WarmStart(backbone, LOSSES, POOLED)
        optimizer = warmstart.optimizers(module, config(**SHARDED).backbone.warmstart)
        assert warmstart.load(module, optimizer, tmp_path / name) == 3
        assert all(values["exp_avg"].shape == parameter.shape for parameter, values in optimizer.states() if values)
        return {name: weight.detach() for name, weight in module.named_parameters()}

    whole, sharded, again = weights("whole-3"), weights("sharded-3"), weights("again-3")
    for name, weight in sharded.items():
        assert torch.equal(weight, again[name]), name
        assert torch.allclose(weight, whole[name], atol=1e-4), name
    (tmp_path / "sharded-3" / "weights-00001.safetensors").unlink()
    with pytest.raises(WorkflowError, match="1 of 2 weights files"):
        weights("sharded-3")


def test_of_a_comparison_early_layers_find_the_chunk_named_last(backbone: model.Backbone) -> None:
    world = PackedWorld([[5, 6]] * 3, [retrieval_segment([1, 2], range(PROBES), [0], [2, 0])], [[True] * POOLED] * 3)
    batch = collate([world], 0)
    assert (batch.first.tolist(), batch.last.tolist(), batch.gold.tolist()) == ([[0, 0, 1]], [[1, 0, 0]], [[0.5, 0, 0.5]])
    settings = config(questions=12, losses=LossConfig(retrieval=1, hop=1), retrieval_share=1.0).backbone.warmstart
    for named, order in ((False, [0, 1]), (True, [1, 0])):
        asked = [curriculum.Asked("Who?", "me", [0, 1], "b", named)]
        packed = curriculum._pack(backbone, random.Random(0), [[5, 6]] * 2, asked, settings)
        assert packed.segments[1].gold == order


def test_the_share_of_comparisons() -> None:
    def found(share: float) -> float:
        types = [item.type for index in range(20) for item in synthetic.world(0, index, comparison=share).questions]
        return types.count("comparison") / len(types)

    assert found(0.0) == 0
    assert 0.1 < found(0.25) < 0.25
    assert found(0.6) > 1.5 * found(0.25)


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


def test_a_stage_may_set_names_and_extra_chunks(backbone: model.Backbone) -> None:
    stages = [{"name": "read", "share": 0.5}, {"name": "tell apart", "share": 0.5, "name_parts": [3], "extra_chunks": 5}]
    settings = config(steps=4, stages=stages, losses={"retrieval": 1.0}, name_parts=[2])
    made = [curriculum.synthetic_batches(settings, backbone)(step)[0] for step in (0, 3)]
    assert [len(batch.extra) for batch in made] == [0, 5]
    assert curriculum.stage_at(settings.backbone.warmstart, 3).recipe.name_parts == [3]
    with pytest.raises(UserError, match="name_parts must be null or a list of 2, 3 and 4"):
        config(steps=4, stages=[{"name": "read", "share": 1.0, "name_parts": [7]}])
