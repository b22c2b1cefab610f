"""The supervised baseline: what it is trained on, that it learns, and that a run that was cut off ends in the same weights."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file

from intra import config as configuration
from intra import lineage, storage
from intra.artifact import Artifact
from intra.baselines import models, tuning
from intra.config import Config
from intra.data.schema import Pool, Question, read_pool, read_questions, to_parquet
from intra.errors import UserError, WorkflowError
from intra.evaluate_config import DenseConfig
from intra.evaluation.parts import Parts
from intra.retrieval.negatives import Example
from tests.baselines.conftest import sentences
from workflows import prepare

RECIPE = {
    "steps": 30,
    "held_out": 0,
    "batch_size": 6,
    "hard_negatives": 2,
    "learning_rate": 5e-3,
    "warmup_steps": 3,
    "checkpoint_every": 10,
}


def dense(model: Path, **tune: Any) -> DenseConfig:
    return DenseConfig.model_validate(
        {"kind": "dense", "model": str(model), "pooling": "mean", "max_length": 32, "tune": {**RECIPE, **tune}}
    )


def tuner(model: Path, pool: Pool, examples: list[Example], **tune: Any) -> tuning.Tuner:
    settings = dense(model, **tune)
    return tuning.Tuner(models.Dense("tiny", settings, "cpu", 1), settings, examples, pool, 0)


def examples_of(pool: Pool) -> list[Example]:
    """Questions that have nothing to do with their gold texts: what is found afterwards was learnt."""
    return [
        Example(f"q{row}", text, ((row,),), [], [(row + step) % 60 for step in range(1, 6)]) for row, text in enumerate(sentences(24, 5))
    ]


def recall(encoder: models.Dense, pool: Pool, examples: list[Example]) -> float:
    scores = np.concatenate(encoder.questions([item.question for item in examples])) @ encoder.passages(pool.title_and_text()[:60])[0].T
    return float(np.mean([scores[place].argmax() in item.positives for place, item in enumerate(examples)]))


def test_it_learns_and_goes_on_to_the_same_weights(bert: Path, pool: Pool, tmp_path: Path) -> None:
    examples = examples_of(pool)
    before = recall(models.Dense("tiny", dense(bert), "cpu", 1), pool, examples)
    artifact = Artifact("tuned", str(tmp_path / "a"), "mark", "evaluate")
    tuner(bert, pool, examples).run(artifact, "tiny")
    manifest = artifact.manifest()
    assert (manifest["steps"], manifest["questions"]) == (30, 24)
    assert not Path(f"{artifact.url}.training").exists()
    after = recall(models.Dense("tiny", dense(bert), "cpu", 1, Path(artifact.url)), pool, examples)
    assert before < 0.2 < 0.5 < after

    half = tuner(bert, pool, examples)
    for _ in range(17):  # cut off behind the checkpoint at 10
        half.step()
        if len(half.curve) == 10:
            half.save(str(tmp_path / "b.training"))
    again = Artifact("tuned", str(tmp_path / "b"), "mark", "evaluate")
    tuner(bert, pool, examples).run(again, "tiny")
    for name in ("model.safetensors", "curve.parquet"):
        assert storage.read_bytes(again.path(name)) == storage.read_bytes(artifact.path(name))


def test_held_out_questions_choose_the_step(bert: Path, pool: Pool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each question stands twice, so what is held out can be learnt; cut off between two searches, the same weights are kept."""
    twice = [dataclasses.replace(item, question_id=f"{item.question_id}{n}") for n in range(2) for item in examples_of(pool)]
    recipe = {"held_out": 0.25, "held_out_chunks": 40, "measure_every": 12}
    artifact = Artifact("tuned", str(tmp_path / "a"), "mark", "evaluate")
    tuner(bert, pool, twice, **recipe).run(artifact, "tiny")
    manifest = artifact.manifest()
    measured = dict(manifest["recall_at_5"])
    assert list(measured) == [0, 12, 24, 30]
    assert (manifest["questions"], manifest["held_out"]) == (36, 12)
    assert measured[manifest["kept"]] == max(measured.values()) > measured[0] + 0.3
    assert f"kept: {manifest['kept']}\n" in capsys.readouterr().err

    half = tuner(bert, pool, twice, **recipe)
    half.measure()
    for _ in range(17):
        half.step()
        if len(half.curve) == 12:
            half.measure()
            half.save(str(tmp_path / "b.training"))
    again = Artifact("tuned", str(tmp_path / "b"), "mark", "evaluate")
    tuner(bert, pool, twice, **recipe).run(again, "tiny")
    assert again.manifest() == manifest
    assert storage.read_bytes(again.path("model.safetensors")) == storage.read_bytes(artifact.path("model.safetensors"))


def test_fine_tuning_that_harms_is_not_kept(bert: Path, pool: Pool, tmp_path: Path) -> None:
    """Questions that are their passages' own words: the start finds them, steps as long as these lose them."""
    texts = pool.title_and_text()
    own = [Example(f"q{row}", texts[row], ((row,),), [], []) for row in range(40)]
    artifact = Artifact("tuned", str(tmp_path), "mark", "evaluate")
    one = tuner(bert, pool, own, steps=8, held_out=0.5, held_out_chunks=60, measure_every=4, warmup_steps=0, learning_rate=0.3)
    start = {name: weight.detach().clone() for name, weight in one.model.named_parameters()}
    one.run(artifact, "tiny")
    measured = dict(artifact.manifest()["recall_at_5"])
    assert measured[0] > 0.9 > measured[8]
    assert artifact.manifest()["kept"] == 0
    assert all(torch.equal(weight, start[name]) for name, weight in one.model.named_parameters())


def test_in_bfloat16_it_is_trained_in_float32(bert: Path, tmp_path: Path) -> None:
    """AdamW on bfloat16 weights would leave most of them, all norms among them, as they were."""
    settings = dense(bert, steps=3).model_copy(update={"dtype": "bfloat16"})
    config = small(settings, tmp_path)
    prepare.run(config)
    questions = read_questions(lineage.dataset(config).url, "train")
    leave(config, "initial", questions, list(range(20)))
    leave(config, "bm25", questions, list(range(30, 50)))
    place = tuning.folder(config, "tiny")
    weights = load_file(place / "model.safetensors")
    before = load_file(bert / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    assert all(not torch.equal(weights[name], before[name]) for name in weights if "LayerNorm" in name)


def test_vectors_stand_in_the_order_of_their_texts(bert: Path, pool: Pool) -> None:
    one = tuner(bert, pool, examples_of(pool))
    one.model.eval()  # no dropout
    texts = [*sentences(40, 3), "moon", " ".join(sentences(3, 1))]
    one_by_one = np.concatenate(models.Dense("tiny", dense(bert), "cpu", 1).questions(texts))
    assert one._vectors(texts).detach().numpy() == pytest.approx(one_by_one, abs=1e-5)


def test_layers_computed_again_give_the_same_weights(bert: Path, pool: Pool) -> None:
    """Dropout too: each layer draws again what it drew."""
    kept, again = (tuner(bert, pool, examples_of(pool), gradient_checkpointing=on) for on in (False, True))
    layers: list[int] = []
    for one in (kept, again):
        calls: list[int] = []
        one.model[0].auto_model.encoder.layer[0].intermediate.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        for _ in range(3):
            one.step()
        layers.append(len(calls))
    assert layers[1] == 2 * layers[0]
    assert kept.curve == again.curve
    for (name, weight), other in zip(kept.model.named_parameters(), again.model.parameters(), strict=True):
        assert torch.equal(weight, other), name


def test_every_weight_moves_and_a_broken_loss_stops(bert: Path, pool: Pool) -> None:
    one = tuner(bert, pool, examples_of(pool))
    before = {name: weight.clone() for name, weight in one.model.named_parameters()}
    for _ in range(3):
        one.step()
    still = [name for name, weight in one.model.named_parameters() if bool((weight == before[name]).all()) and "pooler" not in name]
    assert still == []
    broken = tuner(bert, pool, examples_of(pool))
    next(broken.model.parameters()).data.fill_(float("nan"))
    with pytest.raises(WorkflowError, match=r"fine-tuning: the loss is .* lower tune\.learning_rate"):
        broken.step()


def small(settings: DenseConfig, root: Path) -> Config:
    return configuration.parse(
        {
            "root": str(root),
            "data": {"synthetic": {"chunks": 60, "train_questions": 5, "test_questions": 5}},
            "retriever": {"train": {"hard_negatives": 4, "bm25_negatives": 2, "bm25_skip": 1}},
            "evaluate": {"methods": ["tiny"], "answers": False, "models": {"tiny": settings.model_dump()}, "device": "cpu"},
        }
    )


def test_the_negatives_are_the_retrievers(bert: Path, tmp_path: Path) -> None:
    config = small(dense(bert, steps=2), tmp_path)
    prepare.run(config)
    url = lineage.dataset(config).url
    questions, pool = read_questions(url, "train"), read_pool(url)
    with pytest.raises(UserError, match=r"retriever .* is missing .*workflows/train\.py"):
        tuning.examples(config, questions, pool)
    leave(config, "initial", questions, list(range(20)))
    leave(config, "bm25", questions, list(range(30, 50)))
    for question, item in zip(questions, tuning.examples(config, questions, pool), strict=True):
        gold = {pool.row_of[chunk] for group in question.gold for chunk in group}
        assert item.positives == gold
        assert list(item.hard) == [row for row in range(20) if row not in gold][:4] + [row for row in range(31, 50) if row not in gold][:2]
    corpus = Parts(config).corpus("tiny", pool)
    corpus.complete()  # fine-tunes, and encodes with what came out
    tuned = models.Dense("tiny", lineage.dense(config, "tiny"), "cpu", 1, Path(lineage.tuned(config, "tiny").url))
    assert corpus.encoder.questions(["red moon"])[0] == pytest.approx(tuned.questions(["red moon"])[0])
    assert not np.allclose(tuned.questions(["red moon"])[0], models.Dense("tiny", dense(bert), "cpu", 1).questions(["red moon"])[0])
    with pytest.raises(WorkflowError, match="no negatives of question other"):
        tuning.examples(config, [*questions, Question("other", "b", "train", "?", ("x",), ((pool.chunk_ids[0],),), 1, "")], pool)
    # Another recipe of the retriever leaves the fine-tuned weights as they are; other negatives do not.
    same = {"train": {**config.retriever.train.model_dump(), "learning_rate": 0.5}}
    other = {"train": {**config.retriever.train.model_dump(), "hard_negatives": 3}}
    assert lineage.tuned(changed(config, same), "tiny") == lineage.tuned(config, "tiny")
    assert lineage.tuned(changed(config, other), "tiny") != lineage.tuned(config, "tiny")
    # Nor what changes no weight.
    assert lineage.tuned(small(dense(bert, steps=2, gradient_checkpointing=True, checkpoint_every=1), tmp_path), "tiny") == lineage.tuned(
        config, "tiny"
    )


def changed(config: Config, retriever: dict[str, Any]) -> Config:
    return configuration.parse({**config.model_dump(), "retriever": {**config.retriever.model_dump(), **retriever}})


def leave(config: Config, kind: str, questions: list[Question], rows: list[int]) -> None:
    """What workflows/train.py leaves of the mined chunks."""
    retriever = lineage.retriever(config)
    table = pa.table({"question_id": [question.question_id for question in questions], "rows": [rows] * len(questions)})
    storage.write_bytes(retriever.path(kind, "00000.parquet"), to_parquet(table))
    retriever.finish({})
