"""The warm start: packed worlds give what plain runs give, gradients reach every weight, and a stopped run goes on exactly."""

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
from intra.data.schema import POOL_SCHEMA, Pool, Question

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


def test_every_weight_gets_a_gradient(backbone: model.Backbone, worlds: list[PackedWorld]) -> None:
    module = warmstart.WarmStart(backbone, LOSSES, POOLED)
    module(collate(worlds, backbone.tokenizer.pad_token_id))["total"].backward()
    without = [name for name, weight in module.named_parameters() if weight.grad is None or not weight.grad.abs().sum() > 0]
    assert [name for name in without if "eoi_embedding" not in name] == []  # the end-of-image embedding is never read in text


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


@pytest.mark.parametrize("source", ["synthetic", "questions"])
def test_a_stopped_run_goes_on_to_the_same_weights(folder: Path, source: str) -> None:
    def fresh() -> tuple[warmstart.WarmStart, warmstart.Optimizers, curriculum.Batches]:
        backbone = model.load(str(folder), device="cpu")
        backbone.model.requires_grad_(True)
        module = warmstart.WarmStart(backbone, LOSSES, POOLED)
        return module, warmstart.optimizers(module, settings.backbone.warmstart), batches(backbone)

    def batches(backbone: model.Backbone) -> curriculum.Batches:
        return curriculum.synthetic_batches(settings, backbone) if source == "synthetic" else questions(settings, backbone)

    settings = config(distractors=1, questions=2)
    recipe = settings.backbone.warmstart
    module, optimizer, made = fresh()
    kept: dict[str, Any] = {}

    def checkpoint(step: int, metrics: dict[str, float]) -> None:
        if step == 4:
            kept["weights"] = {name: weight.detach().clone() for name, weight in module.named_parameters()}
            torch.save(optimizer.state_dict(), folder.parent / f"{source}.pt")

    warmstart.train(module, optimizer, made, recipe, checkpoint=checkpoint)
    again, optimizer_again, made_again = fresh()
    with torch.no_grad():
        for name, weight in again.named_parameters():
            weight.copy_(kept["weights"][name])
    optimizer_again.load_state_dict(torch.load(folder.parent / f"{source}.pt", weights_only=True))
    warmstart.train(again, optimizer_again, made_again, recipe, start=4)
    for (name, weight), (_, other) in zip(module.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(weight, other), name


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
        assert (batch.gold.gather(1, batch.first[:, None]) > 0).all()
        assert (batch.gold.gather(1, batch.last[:, None]) > 0).all()
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
    count = [sum(len(group["params"]) for group in optimizer.param_groups) for optimizer in (made.muon, made.adamw)]
    assert sum(count) == len(list(module.parameters()))
    assert count[0] == 7 * (backbone.layers + 3)  # q, k, v, o and three of the feed-forward, in every layer


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
    packed = curriculum._pack(backbone, random.Random(0), chunks, asked, settings)
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
