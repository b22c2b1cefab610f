"""The dataset artifact: what it holds, that limits are fair, that it is the same every time, and what is refused."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from intra import storage
from intra.artifact import Artifact
from intra.backbone import locate
from intra.data import chunking, pool, schema, stages
from intra.data import questions as asking
from intra.data.candidates import Candidates
from intra.data.raw import RawQuestion
from intra.errors import UserError, WorkflowError
from tests.data.conftest import PASSAGES, QUESTIONS, make, write_lines


def contents(url: str | Path) -> dict[str, bytes]:
    return {name: storage.read_bytes(storage.join(str(url), name)) for name in storage.files(str(url))}


def test_pool_and_questions_of_a_folder(folder: Path, tmp_path: Path, artifact: Artifact) -> None:
    config = make(folder, tmp_path)
    manifest = pool.build(config, artifact)
    made = schema.read_pool(artifact.url)
    assert made.chunk_ids == sorted(made.chunk_ids)
    pieces = [name for name in made.chunk_ids if name.startswith("p5#")]
    assert set(made.chunk_ids) == {"p1", "p2", "p3", "p4", "p6", *pieces}
    assert len(pieces) > 1
    assert made.titles[made.row_of["p3"]] == ""

    tokenizer = locate.load_tokenizer(artifact.path(pool.TOKENIZER))
    texts = [chunking.chunk_text(title, text, config.data.template) for title, text in zip(made.titles, made.texts, strict=True)]
    assert made.table["n_tokens"].to_pylist() == chunking.lengths(texts, tokenizer)

    questions = {question.question_id: question for question in schema.read_questions(artifact.url)}
    assert list(questions) == ["q1", "q2", "q3"]
    assert questions["q1"].gold == (("p1",), ("p2", "p4"))  # in hop order; p4 is another version of p2
    assert questions["q2"].gold == (("p3",),)
    assert questions["q2"].type == ""
    assert questions["q3"].gold == (tuple(sorted(pieces)),)
    assert [q.question_id for q in schema.read_questions(artifact.url, "test")] == ["q2", "q3"]

    assert manifest == artifact.manifest()
    assert manifest["passages"] == 6
    assert manifest["split_passages"] == 1
    assert manifest["chunks"] == len(made)
    assert manifest["tokens"] == sum(made.table["n_tokens"].to_pylist())
    assert manifest["longest_chunk"] <= 48
    assert manifest["questions"] == {"lakes": {"train": 1, "test": 1}, "rivers": {"test": 1}}


def test_statistics(folder: Path, tmp_path: Path, artifact: Artifact) -> None:
    pool.build(make(folder, tmp_path, chunk_tokens=1000), artifact)
    found = storage.read_json(artifact.path(pool.STATISTICS))
    words = [len(str(passage["text"]).split()) for passage in PASSAGES]
    assert found["pool"]["words"]["total"] == sum(words)
    assert found["pool"]["words"]["mean"] == pytest.approx(sum(words) / 6, abs=0.01)
    assert found["pool"]["words"]["median"] == sorted(words)[2] / 2 + sorted(words)[3] / 2
    assert found["pool"]["sources"] == {"passages.a.jsonl.gz": 3, "passages.b.jsonl": 3}
    assert found["questions"]["lakes"]["train"] == {
        "questions": 1,
        "without_answer": 0,
        "gold_per_question": {"2": 1},
        "chunks_per_gold": 1.5,
        "hops": {"2": 1},
        "types": {"bridge": 1},
        "gold_sources": {"annotated": 1},
    }


def test_two_runs_are_byte_identical_whatever_the_order_of_files(folder: Path, tmp_path: Path, artifact: Artifact) -> None:
    config = make(folder, tmp_path)
    pool.build(config, artifact)
    first = contents(artifact.url)
    assert {"pool.parquet", "questions.parquet", "statistics.json", "config.json", "manifest.json", "tokenizer/tokenizer.json"} <= set(
        first
    )
    second = Artifact("dataset", str(tmp_path / "again"), artifact.fingerprint, "prepare")
    pool.build(config, second)
    assert contents(second.url) == first

    write_lines(folder / "passages.a.jsonl.gz", PASSAGES[2::-1])
    write_lines(folder / "passages.b.jsonl", PASSAGES[:2:-1])
    third = Artifact("dataset", str(tmp_path / "third"), artifact.fingerprint, "prepare")
    pool.build(config, third)
    for name in ("pool.parquet", "questions.parquet", "tokenizer/tokenizer.json"):
        assert contents(third.url)[name] == first[name]


def test_what_evaluate_asks_for_changes_no_dataset(folder: Path, tmp_path: Path, artifact: Artifact) -> None:
    config, other = make(folder, tmp_path), Artifact("dataset", str(tmp_path / "other"), artifact.fingerprint, "prepare")
    pool.build(config, artifact)
    pool.build(config.model_copy(update={"evaluate": config.evaluate.model_copy(update={"k": [1, 7], "answers": False})}), other)
    ours, theirs = contents(artifact.url), contents(other.url)
    assert {name for name in ours if ours[name] != theirs[name]} == {"config.json"}


def test_beir_and_the_limits(beir_folder: Path, tmp_path: Path, artifact: Artifact) -> None:
    manifest = pool.build(make(beir_folder, tmp_path, source="beir", question_limit=1, pool_limit=4, chunk_tokens=500), artifact)
    assert manifest["passages"] == 4
    assert manifest["questions"] == {"brenn": {"train": 1, "test": 1}}
    made = set(schema.read_pool(artifact.url).chunk_ids)
    assert {chunk for q in schema.read_questions(artifact.url) for group in q.gold for chunk in group} <= made


def test_synthetic_with_a_word_tokenizer_knows_every_word(tmp_path: Path, artifact: Artifact) -> None:
    world = {"chunks": 90, "train_questions": 12, "test_questions": 6}
    config = make(None, tmp_path, tokenizer="word", vocabulary=4096, source="synthetic", synthetic=world)
    pool.build(config, artifact)
    tokenizer = locate.load_tokenizer(artifact.path(pool.TOKENIZER))
    texts = schema.read_pool(artifact.url).title_and_text() + [question.question for question in schema.read_questions(artifact.url)]
    assert tokenizer.unk_token_id not in {token for ids in tokenizer(texts)["input_ids"] for token in ids}


def test_on_s3_as_on_the_disk(folder: Path, tmp_path: Path, artifact: Artifact, s3_root: str) -> None:
    config = make(folder, tmp_path)
    pool.build(config, artifact)
    there = Artifact("dataset", s3_root, artifact.fingerprint, "prepare")
    pool.build(config, there)
    assert contents(there.url) == contents(artifact.url)


# -- limits -----------------------------------------------------------------------------------------------------------


def questions(count: int, benchmark: str = "b", split: str = "test") -> list[RawQuestion]:
    return [RawQuestion(f"{benchmark}{split}{n:03}", benchmark, split, "who?", ("a",), (f"p{n:03}",), 1, "") for n in range(count)]


def test_question_limit_holds_per_benchmark_and_split() -> None:
    everything = [*questions(30), *questions(30, split="train"), *questions(5, "c")]
    kept = asking.limit(everything, 10, seed=0)
    assert [sum(q.benchmark == b and q.split == s for q in kept) for b, s in (("b", "test"), ("b", "train"), ("c", "test"))] == [10, 10, 5]
    assert asking.limit(everything, None, seed=0) == everything


def test_question_limit_depends_on_seed_and_ids_alone() -> None:
    everything = questions(60)
    shuffled = random.Random(1).sample(everything, len(everything))
    kept = {q.question_id for q in asking.limit(everything, 20, seed=0)}
    assert {q.question_id for q in asking.limit(shuffled, 20, seed=0)} == kept
    assert {q.question_id for q in asking.limit(everything, 10, seed=0)} < kept
    assert {q.question_id for q in asking.limit(everything, 20, seed=1)} != kept


def candidates(count: int, seed: int) -> Candidates:
    names = [f"p{number:03}" for number in range(count)]
    draws = np.array([int.from_bytes(stages.draw(seed, "passage", name)[:8]) for name in names], dtype=np.uint64)
    rows = np.arange(count)
    return Candidates(pa.array(names), np.zeros(count, np.int32), rows.astype(np.int32), draws, np.ones(count, np.int32), rows, ["s"],
                      np.array([0]), rows, count)  # fmt: skip


def test_pool_limit_keeps_gold_and_fills_by_seed() -> None:
    gold = np.arange(0, 30, 3)
    kept = pool.limit_pool(candidates(100, 0), gold, 40)
    assert len(kept) == 40
    assert list(kept) == sorted(kept)
    assert set(gold) < set(kept)
    assert set(pool.limit_pool(candidates(100, 0), gold, 30)) < set(kept)
    assert set(pool.limit_pool(candidates(100, 1), gold, 40)) != set(kept)
    assert list(pool.limit_pool(candidates(100, 0), gold, 3)) == list(gold)
    assert len(pool.limit_pool(candidates(100, 0), gold, 1000)) == 100


def test_every_passage_is_as_likely_to_be_kept_as_any_other() -> None:
    taken = np.zeros(40, dtype=int)
    for seed in range(200):
        taken[pool.limit_pool(candidates(40, seed), np.array([0]), 20)] += 1
    assert taken[0] == 200
    assert taken[1:].min() > 97 - 5 * 7  # 200 draws of 19/39: mean 97.4, deviation 7.1
    assert taken[1:].max() < 97 + 5 * 7


def test_equivalence_is_transitive() -> None:
    found = asking.equivalence([("a", "b"), ("c", "d"), ("b", "c"), ("x", "y")])
    assert found["a"] == found["b"] == found["c"] == found["d"] == ("a", "b", "c", "d")
    assert found["x"] == ("x", "y")


def test_equal_gold_passages_of_one_question_are_one_group() -> None:
    asked = RawQuestion("q", "b", "test", "who?", ("x",), ("a", "c", "b"), 3, "")
    made = asking.with_gold_chunks([asked], {name: [name] for name in "abc"}, asking.equivalence([("a", "b"), ("c", "absent")]))
    assert made[0].gold == (("a", "b"), ("c",))


# -- what is refused --------------------------------------------------------------------------------------------------


def double_passage(folder: Path) -> None:
    write_lines(folder / "passages.b.jsonl", [*PASSAGES[3:], PASSAGES[0]])


def double_question(folder: Path) -> None:
    write_lines(folder / "questions" / "rivers.test.jsonl", [QUESTIONS[2], QUESTIONS[0]])


def lose_gold(folder: Path) -> None:
    write_lines(folder / "questions" / "rivers.test.jsonl", [{**QUESTIONS[2], "gold_ids": ["p5", "p77"]}])


def no_passages(folder: Path) -> None:
    write_lines(folder / "passages.a.jsonl.gz", [])
    write_lines(folder / "passages.b.jsonl", [])


def piece_name(folder: Path) -> None:
    write_lines(folder / "passages.b.jsonl", [*PASSAGES[3:], {"id": "p5#1", "title": "", "text": "mine"}])


def long_title(folder: Path) -> None:
    write_lines(folder / "passages.b.jsonl", [*PASSAGES[3:], {"id": "p7", "title": hashlib.sha512(b"").hexdigest(), "text": "mine"}])


WRONG: list[tuple[Callable[[Path], None], str]] = [
    (double_passage, "{}/passages.b.jsonl:4: passage id 'p1' stands already at {}/passages.a.jsonl.gz:1"),
    (double_question, "{}/questions/rivers.test.jsonl:2: question id 'q1' stands already at {}/questions/lakes.train.jsonl.gz:1"),
    (lose_gold, "{}/questions/rivers.test.jsonl:1: question 'q3': gold passage 'p77' is not in the pool"),
    (no_passages, "the input files hold no passages; check data.path"),
    (piece_name, "passage id 'p5#1' is also the name of a piece of passage 'p5'"),
    (long_title, "{}/passages.b.jsonl:4: passage 'p7': data.chunk_tokens=48 leaves no room for text"),
]


@pytest.mark.parametrize(("change", "found"), WRONG)
def test_wrong_input_is_named_and_nothing_is_written(
    folder: Path, tmp_path: Path, artifact: Artifact, change: Callable[[Path], None], found: str
) -> None:
    change(folder)
    with pytest.raises(UserError) as caught:
        pool.build(make(folder, tmp_path), artifact)
    assert str(caught.value).startswith(found.replace("{}", str(folder)))
    assert "\n" not in str(caught.value)
    assert storage.files(artifact.url) == []


def test_a_passage_file_left_out_is_named_by_its_gold(folder: Path, tmp_path: Path, artifact: Artifact) -> None:
    with pytest.raises(UserError, match=r"question 'q3': gold passage 'p5' is not in the pool; add its file to data.passages"):
        pool.build(make(folder, tmp_path, passages="passages.a*"), artifact)


def test_questions_without_answers_will_do_only_where_none_is_needed(beir_folder: Path, tmp_path: Path, artifact: Artifact) -> None:
    write_lines(beir_folder / "queries.jsonl", [{"_id": f"q{n}", "text": "Who?"} for n in (1, 2, 3)])
    config = make(beir_folder, tmp_path, source="beir")

    def change(answers: bool, train: bool) -> Any:
        evaluate = config.evaluate.model_copy(update={"answers": answers})
        return config.model_copy(update={"evaluate": evaluate, "backbone": config.backbone.model_copy(update={"train": train})})

    with pytest.raises(UserError, match=r"queries.jsonl:1: question 'q1' has no answer"):
        pool.build(change(answers=False, train=True), artifact)
    with pytest.raises(UserError, match=r"queries.jsonl:2: question 'q2' has no answer"):
        pool.build(change(answers=True, train=False), artifact)
    assert asking.needs_answers(change(answers=False, train=False)) == set()
    config = make(beir_folder, tmp_path, source="beir", on_error="skip")  # what evaluate asks for leaves no question out
    with pytest.raises(UserError, match=r"queries.jsonl:1: question 'q1' has no answer"):
        pool.build(change(answers=False, train=True), artifact)


def test_a_file_that_changes_while_it_is_read(folder: Path, tmp_path: Path, artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = asking.check

    def meddling(*arguments: Any) -> list[RawQuestion]:
        write_lines(folder / "passages.b.jsonl", PASSAGES[4:])
        return whole(*arguments)

    monkeypatch.setattr(asking, "check", meddling)
    with pytest.raises(WorkflowError, match=r"passages.b.jsonl: changed while it was read"):
        pool.build(make(folder, tmp_path), artifact)
    assert storage.files(artifact.url) == []
