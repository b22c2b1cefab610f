"""What the warm start reads, and when; a stopped run goes on exactly."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from intra.backbone import adopted, curriculum, model, packing, warmstart
from intra.backbone import checkpoint as checkpoints
from intra.backbone.packing import EARLY, LATE, Look, PackedWorld, collate, retrieval_segment
from intra.config import Config, LossConfig
from intra.data import synthetic
from intra.data.schema import POOL_SCHEMA, Pool, Question
from intra.errors import UserError, WorkflowError

from ..conftest import WORDS, sentences
from .conftest import LOSSES, POOLED, PROBES, config

STAGES = [
    {"name": "reading", "share": 0.34, "losses": {"answer": 1.0}, "world_chunks": 3, "binding": 1.0, "learning_rate_factor": 2.0},
    {"name": "joint", "share": 0.66, "growth": 1.0},
]


@pytest.mark.parametrize("source", ["synthetic", "questions", "adopted"])
def test_a_stopped_run_goes_on_to_the_same_weights(folder: Path, adopted_folder: Path, tmp_path: Path, source: str) -> None:
    """With every part of the recipe that could carry a state from step to step."""
    settings = config(distractors=1, questions=2, stages=STAGES, extra_chunks=3, retrieval_scoring="mixture", name_parts=[2, 3])
    recipe = settings.backbone.warmstart

    def fresh() -> tuple[warmstart.WarmStart, warmstart.Optimizers, curriculum.Batches]:
        backbone = model.load(str(adopted_folder if source == "adopted" else folder), device="cpu")
        backbone.model.requires_grad_(True)
        if source == "adopted":
            adopted.freeze(backbone.model)
        module = warmstart.WarmStart(backbone, LOSSES, POOLED, recipe.retrieval_scoring)
        batches = curriculum.synthetic_batches(settings, backbone) if source == "synthetic" else questions(settings, backbone)
        return module, warmstart.optimizers(module, recipe), batches

    module, optimizer, made = fresh()
    rows: list[dict[str, float]] = []

    def checkpoint(step: int, metrics: dict[str, float]) -> None:
        rows.append({"step": step, **metrics})
        if step == 4:
            checkpoints.save(module, optimizer, tmp_path, step)

    warmstart.train(module, optimizer, made, recipe, checkpoint=checkpoint)
    assert [(row["step"], row["stage"]) for row in rows] == [(2, 1), (4, 2), (6, 2)]
    assert "retrieval" not in rows[0]
    assert rows[1]["retrieval"] > 0
    again, optimizer_again, made_again = fresh()
    start = checkpoints.load(again, optimizer_again, tmp_path)
    assert start == 4
    last = warmstart.train(again, optimizer_again, made_again, recipe, start=start)
    assert {"step": 6, **last} == rows[-1]
    for (name, weight), (_, other) in zip(module.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(weight, other), name
    (tmp_path / "optimizer-00000.safetensors").unlink()
    with pytest.raises(WorkflowError, match="0 of 1 optimizer files"):
        checkpoints.load(again, optimizer_again, tmp_path)


def questions(
    settings: Config, backbone: model.Backbone, rank: int = 0, workers: int = 1, near: dict[str, list[int]] | None = None,
    made: Sequence[Question] = (),
) -> curriculum.Batches:  # fmt: skip
    import pyarrow as pa

    rows = [{"chunk_id": f"c{n:02d}", "title": "ada", "text": text, "source": "s", "n_tokens": 9} for n, text in enumerate(sentences(12))]
    gold = [((f"c{n:02d}",), (f"c{n + 5:02d}", f"c{n + 6:02d}")) for n in range(5)]
    asked = [Question(f"q{n}", "b", "train", f"where was {WORDS[n]}", ("oldtown", "red"), gold[n], 2, "bridge") for n in range(5)]
    pool = Pool(pa.Table.from_pylist(rows, schema=POOL_SCHEMA))
    return curriculum.question_batches(settings, backbone, pool, asked, rank, workers, near, made)


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


def test_distractors_are_drawn_from_those_near_a_question_and_are_never_gold(backbone: model.Backbone) -> None:
    settings = config(distractors=3, bm25_distractors=2, questions=1, batch_size=1, micro_batch=1)
    texts = [backbone.tokenize([f"ada\n{text}"])[0] for text in sentences(12)]
    near = {f"q{n}": [n, n + 5, n + 6, 11, 4 - n if n != 2 else 0] for n in range(5)}  # its gold first
    batches = questions(settings, backbone, near=near)
    for step in range(10):
        (batch,) = batches(step)
        rows = [texts.index(chunk) for chunk in batch.chunks]
        gold = next(n for n in range(5) if n in rows and (n + 5 in rows or n + 6 in rows) and {11, near[f"q{n}"][4]} <= set(rows))
        assert len(set(rows)) == 5
        assert len({gold + 5, gold + 6} & set(rows)) == 1  # a group's other chunk is no distractor


def test_what_answers_a_question_is_no_negative_of_it_in_any_world(backbone: model.Backbone) -> None:
    """The same chunk in another world, and the other of its group, are left out; its gold is not, nor any other chunk."""
    settings = config(distractors=3, questions=2, batch_size=4, micro_batch=4, retrieval_share=1.0)
    prompts = backbone.prompt_ids([f"where was {WORDS[n]}" for n in range(5)])
    for step in range(3):
        (batch,) = questions(settings, backbone)(step)
        twins = 0
        for probes, columns, gold, out in zip(batch.probe_rows, batch.probe_columns, batch.gold, batch.left_out, strict=True):
            world, column = probes[0], columns[0]
            ids = batch.ids[world][batch.segment[world] == batch.segment[world, column]].tolist()
            asked = next(n for n, prompt in enumerate(prompts) if ids[: len(prompt)] == prompt)
            expected = [row in (asked, asked + 5, asked + 6) and not share for row, share in zip(batch.rows, gold.tolist(), strict=True)]
            assert out.tolist() == expected
            twins += sum(expected)
        assert twins > 0
    (made,) = curriculum.synthetic_batches(config(micro_batch=4), backbone)(0)
    assert made.left_out.shape == made.gold.shape
    assert not made.left_out.any()


def test_of_the_extra_chunks_some_are_near_a_question(backbone: model.Backbone) -> None:
    """They are neither in a world of the batch nor gold, and come before the random ones."""
    settings = config(distractors=1, bm25_distractors=1, bm25_extra=2, extra_chunks=3, questions=1, batch_size=2, micro_batch=2)
    texts = [backbone.tokenize([f"ada\n{text}"])[0] for text in sentences(12)]
    near = {f"q{n}": [n, n + 5, n + 6, 11, 4 - n if n != 2 else 0] for n in range(5)}
    batches = questions(settings, backbone, near=near)
    hard = 0
    for step in range(10):
        (batch,) = batches(step)
        worlds, extra = ({texts.index(chunk) for chunk in chunks} for chunks in (batch.chunks, batch.extra))
        assert len(batch.extra) == len(extra) == 3
        assert [texts[row] for row in batch.rows] == batch.chunks
        assert [texts[row] for row in batch.extra_rows] == batch.extra
        assert not worlds & extra
        hard += 11 in extra
    (batch,) = questions(settings, backbone)(0)  # nothing is near: all at random
    assert len(batch.extra) == 3
    assert hard >= 3


def test_without_its_loss_no_answer_is_packed(backbone: model.Backbone) -> None:
    settings = config(questions=2, batch_size=2, micro_batch=2, distractors=1, losses={"answer": 0, "retrieval": 1, "attention": 1})
    (batch,) = questions(settings, backbone)(0)
    assert (batch.labels == packing.IGNORE).all()
    assert len(batch.gold) == len(batch.probe_rows) == 2
    module = warmstart.WarmStart(backbone, settings.backbone.warmstart.losses, settings.backbone.warmstart.pooled_length)
    losses = module(batch)
    assert not {"answer", "answer_accuracy"} & set(losses)
    assert losses["total"] > 0
    losses["total"].backward()
    assert any(parameter.grad is not None and parameter.grad.any() for parameter in backbone.model.parameters())


def test_a_share_of_the_worlds_has_questions_made_of_passages(backbone: model.Backbone) -> None:
    asked = Question("cloze-1", "cloze", "train", "what was large", ("green",), (("c07",),), 1, "cloze")
    (prompt,) = backbone.prompt_ids([asked.question])
    counts = {}
    for share in (0.0, 0.5, 1.0):
        settings = config(questions=1, batch_size=20, micro_batch=20, distractors=0, cloze_share=share)
        (batch,) = questions(settings, backbone, made=[asked])(0)
        counts[share] = sum(row[: len(prompt)].tolist() == prompt for row in batch.ids)
    assert (counts[0.0], counts[1.0]) == (0, 20)
    assert 4 <= counts[0.5] <= 16


def test_extra_chunks_come_from_a_bank(backbone: model.Backbone) -> None:
    bank = curriculum.extra_rows(12, 4, 0)
    assert len(set(bank)) == 4
    assert curriculum.extra_rows(12, None, 0) == curriculum.extra_rows(12, 99, 0) == range(12)
    texts = [backbone.tokenize([f"ada\n{text}"])[0] for text in sentences(12)]
    batches = questions(config(questions=1, batch_size=2, micro_batch=2, distractors=0, extra_chunks=9, extra_from=4), backbone)
    drawn = [texts.index(chunk) for step in range(4) for batch in batches(step) for chunk in batch.extra]
    assert drawn
    assert set(drawn) <= set(bank)


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


def test_a_stage_may_set_names_and_extra_chunks(backbone: model.Backbone) -> None:
    stages = [{"name": "read", "share": 0.5}, {"name": "tell apart", "share": 0.5, "name_parts": [3], "extra_chunks": 5}]
    settings = config(steps=4, stages=stages, losses={"retrieval": 1.0}, name_parts=[2])
    made = [curriculum.synthetic_batches(settings, backbone)(step)[0] for step in (0, 3)]
    assert [len(batch.extra) for batch in made] == [0, 5]
    assert curriculum.stage_at(settings.backbone.warmstart, 3).recipe.name_parts == [3]
    with pytest.raises(UserError, match="name_parts must be null or a list of 2, 3 and 4"):
        config(steps=4, stages=[{"name": "read", "share": 1.0, "name_parts": [7]}])
