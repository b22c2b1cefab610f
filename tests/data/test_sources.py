"""The jsonl source and the digests of input files: what is read, and every way the files can be wrong."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from intra import storage
from intra.data import sources
from intra.data.raw import Mistakes, Passage, RawQuestion
from intra.data_config import DataConfig
from intra.errors import UserError
from tests.data.conftest import PASSAGES, QUESTIONS, write_lines


def jsonl(folder: Path | str, **values: object) -> DataConfig:
    return DataConfig.model_validate({"source": "jsonl", "path": str(folder), **values})


def read(data: DataConfig) -> tuple[list[Passage], list[RawQuestion]]:
    found = [item for part in range(len(sources.parts(data))) for item in sources.read(data, 0, part, Mistakes())]
    return [item for item in found if isinstance(item, Passage)], [item for item in found if isinstance(item, RawQuestion)]


def refused(data: DataConfig) -> str:
    def everything() -> None:
        read(data)
        sources.equivalents(data, Mistakes())

    with pytest.raises(UserError) as caught:
        everything()
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_several_passage_files_make_one_pool(folder: Path) -> None:
    passages, questions = read(jsonl(folder))
    assert [(p.passage_id, p.title, p.text) for p in passages] == [(p["id"], p["title"], p["text"]) for p in PASSAGES]
    assert [p.source for p in passages] == ["passages.a.jsonl.gz"] * 3 + ["passages.b.jsonl"] * 3
    assert passages[4].where == f"{folder}/passages.b.jsonl:2"
    assert {(q.question_id, q.benchmark, q.split) for q in questions} == {
        ("q1", "lakes", "train"), ("q2", "lakes", "test"), ("q3", "rivers", "test")}  # fmt: skip
    first = next(q for q in questions if q.question_id == "q1")
    assert (first.answers, first.gold_ids, first.hops, first.type) == (("Ada Moss",), ("p1", "p2"), 2, "bridge")
    assert first.where == f"{folder}/questions/lakes.train.jsonl.gz:1"
    assert sources.equivalents(jsonl(folder), Mistakes()) == [("p2", "p4")]


def test_optional_fields_have_defaults(folder: Path) -> None:
    short = {name: QUESTIONS[0][name] for name in ("id", "question", "answers", "gold_ids")}
    write_lines(folder / "questions" / "lakes.train.jsonl.gz", [short])
    question = next(q for q in read(jsonl(folder))[1] if q.question_id == "q1")
    assert (question.hops, question.type, question.gold_source) == (2, "", "annotated")


@pytest.mark.parametrize("chosen", ["passages.b.jsonl", "passages.b*", ["passages.b.jsonl", "*.b.jsonl"]])
def test_passages_are_chosen_by_name_or_glob(folder: Path, chosen: object) -> None:
    assert [p.passage_id for p in read(jsonl(folder, passages=chosen))[0]] == ["p4", "p5", "p6"]


def test_a_glob_may_name_a_folder(folder: Path) -> None:
    write_lines(folder / "more" / "x.jsonl", PASSAGES[:1])
    assert [p.source for p in read(jsonl(folder, passages="more/*.jsonl"))[0]] == ["more/x.jsonl"]


def test_benchmarks_select_question_files(folder: Path) -> None:
    assert {q.question_id for q in read(jsonl(folder, benchmarks=["lakes"]))[1]} == {"q1", "q2"}


def test_split_keys_name_the_files_and_give_the_role(folder: Path) -> None:
    questions = read(jsonl(folder, train_split="test", test_split="train"))[1]
    assert {q.question_id: q.split for q in questions} == {"q1": "test", "q2": "train", "q3": "train"}


def test_blank_lines_and_byte_order_are_no_matter(folder: Path) -> None:
    lines = (folder / "passages.b.jsonl").read_text().splitlines()
    for begin, line in (("\n", 4), ("\ufeff", 3)):  # some programs write the second before UTF-8
        (folder / "passages.b.jsonl").write_bytes((begin + "\r\n\r\n".join(lines)).encode())
        passages = read(jsonl(folder))[0]
        assert len(passages) == len(PASSAGES)
        assert passages[4].where.endswith(f"passages.b.jsonl:{line}")


def test_digests_are_of_the_bytes_and_of_every_file(folder: Path) -> None:
    digests = sources.digests(jsonl(folder))
    assert sorted(digests) == sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    for name, digest in digests.items():
        assert digest == hashlib.sha256((folder / name).read_bytes()).hexdigest()


def test_a_digest_follows_the_file(folder: Path) -> None:
    before = sources.digests(jsonl(folder))
    content = (folder / "passages.b.jsonl").read_bytes()
    (folder / "passages.b.jsonl").write_bytes(content.replace(b"Silo", b"Solo"))  # the same size
    after = sources.digests(jsonl(folder))
    assert {name for name in after if after[name] != before[name]} == {"passages.b.jsonl"}


def test_synthetic_has_no_input_files() -> None:
    assert sources.digests(DataConfig()) == {}
    passages, questions = read(DataConfig.model_validate({"synthetic": {"chunks": 120, "train_questions": 9, "test_questions": 6}}))
    assert len(passages) == 120
    assert sorted(q.split for q in questions) == ["test"] * 6 + ["train"] * 9


def test_s3_reads_the_same(folder: Path, s3_root: str) -> None:
    storage.upload(folder, s3_root)
    here, there = jsonl(folder), jsonl(s3_root)
    assert sources.digests(there) == sources.digests(here)
    assert [p.text for p in read(there)[0]] == [p.text for p in read(here)[0]]
    assert {q.question_id for q in read(there)[1]} == {q.question_id for q in read(here)[1]}
    assert refused(jsonl(f"{s3_root}/absent")).startswith(f"data.path={s3_root}/absent: no such folder")


# -- wrong folders and files ------------------------------------------------------------------------------------------


def test_missing_folder(tmp_path: Path) -> None:
    assert refused(jsonl(tmp_path / "absent")).startswith(f"data.path={tmp_path}/absent: no such folder")


def test_missing_passage_file(folder: Path) -> None:
    message = refused(jsonl(folder, passages=["passages.b.jsonl", "passages.c.jsonl"]))
    assert f"{folder}/passages.c.jsonl: no such file (data.passages)" in message
    assert "passages.a.jsonl.gz" in message


def test_no_file_matches_the_glob(folder: Path) -> None:
    message = refused(jsonl(folder, passages="texts*"))
    assert message.startswith("data.passages=texts*: no file in ")
    assert "passages.a.jsonl.gz" in message


def test_a_folder_where_a_passage_file_should_be(folder: Path) -> None:
    assert "expected a file, found a folder" in refused(jsonl(folder, passages="questions"))
    with pytest.raises(UserError, match="expected a file, found a folder"):
        sources.digests(jsonl(folder, passages="questions"))


def test_no_passages_named(folder: Path) -> None:
    assert refused(jsonl(folder, passages=[])).startswith("data.passages is empty")


def test_no_question_folder(folder: Path) -> None:
    for path in (folder / "questions").iterdir():
        path.unlink()
    assert refused(jsonl(folder)).startswith(f"{folder}/questions: no question files")


def test_no_question_file_of_a_split(folder: Path) -> None:
    message = refused(jsonl(folder, train_split="trian"))
    assert message.startswith("data.train_split=trian: no file <benchmark>.trian.jsonl")
    assert message.endswith("splits found: test, train")


def test_no_question_file_of_a_benchmark(folder: Path) -> None:
    message = refused(jsonl(folder, benchmarks=["lakes", "seas"]))
    assert "no question file for 'seas'" in message
    assert message.endswith("found lakes, rivers")


@pytest.mark.parametrize("benchmarks", [["rivers"], []])
def test_chosen_benchmarks_without_training_questions(folder: Path, benchmarks: list[str]) -> None:
    assert "has a file for data.train_split=train" in refused(jsonl(folder, benchmarks=benchmarks))


def test_a_file_both_plain_and_gzipped(folder: Path) -> None:
    write_lines(folder / "questions" / "lakes.test.jsonl.gz", QUESTIONS[1:2])
    assert f"{folder}/questions/lakes.test.jsonl: stands there both plain and as .gz" in refused(jsonl(folder))


def test_an_empty_question_file(folder: Path) -> None:
    write_lines(folder / "questions" / "lakes.test.jsonl", [])
    assert refused(jsonl(folder)).startswith(f"{folder}/questions/lakes.test.jsonl: holds no questions")


def test_not_gzip(folder: Path) -> None:
    (folder / "passages.a.jsonl.gz").write_text(json.dumps(PASSAGES[0]))
    assert refused(jsonl(folder)).startswith(f"{folder}/passages.a.jsonl.gz: not a sound gzip file")


def test_gzip_cut_short(folder: Path) -> None:
    data = gzip.compress("".join(json.dumps({**p, "id": f"x{n}"}) + "\n" for n, p in enumerate(PASSAGES * 50)).encode())
    (folder / "passages.a.jsonl.gz").write_bytes(data[:-30])
    assert "not a sound gzip file" in refused(jsonl(folder))


def test_gzip_damaged_inside(folder: Path) -> None:
    data = bytearray((folder / "passages.a.jsonl.gz").read_bytes())
    data[len(data) // 2] ^= 0xFF
    (folder / "passages.a.jsonl.gz").write_bytes(data)
    assert f"{folder}/passages.a.jsonl.gz" in refused(jsonl(folder))


# -- wrong lines ------------------------------------------------------------------------------------------------------


def passage(**change: object) -> dict[str, object]:
    return {name: value for name, value in {**PASSAGES[5], **change}.items() if value is not ...}


def question(**change: object) -> dict[str, object]:
    return {name: value for name, value in {**QUESTIONS[0], **change}.items() if value is not ...}


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ('{"id": "p7", ', "not valid JSON"),
        ("[1]", "expected a JSON object, found a list"),
        (passage(id=...), "'id' is missing; found the fields text, title"),
        (passage(title=...), "'title' is missing"),
        (passage(text=...), "'text' is missing"),
        (passage(id=7), "'id' must be a string, found a number"),
        (passage(id=""), "'id' is empty"),
        (passage(id="p 7"), "'id' 'p 7' holds white space"),
        (passage(title=None), "'title' must be a string, found null"),
        (passage(text=["a"]), "'text' must be a string, found a list"),
        (passage(text=""), "'text' is empty"),
        (passage(text=" \n"), "'text' is empty"),
        ('{"id": "p7", "title": "", "text": "\\ud800"}', "'text' holds half a surrogate pair"),
    ],
)
def test_a_wrong_passage(folder: Path, line: object, found: str) -> None:
    write_lines(folder / "passages.b.jsonl", [*PASSAGES[3:5], line])
    assert refused(jsonl(folder)).startswith(f"{folder}/passages.b.jsonl:3: {found}")


def test_a_line_that_is_not_utf8(folder: Path) -> None:
    with (folder / "passages.b.jsonl").open("ab") as file:
        file.write('{"id": "p7", "title": "", "text": "é"}'.encode("latin-1"))
    assert refused(jsonl(folder)).startswith(f"{folder}/passages.b.jsonl:4: not UTF-8")


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("{", "not valid JSON"),
        (question(id=...), "'id' is missing"),
        (question(question=...), "'question' is missing"),
        (question(question=" "), "'question' is empty"),
        (question(question=3), "'question' must be a string, found a number"),
        (question(answers=...), "'answers' is missing"),
        (question(answers=[]), "'answers' is empty; it needs at least one answer"),
        (question(answers=[""]), "'answers' is empty"),
        (question(answers="Ada"), "'answers' must be a list (of at least one answer), found a string"),
        (question(answers=[1]), "'answers' must be a string, found a number"),
        (question(gold_ids=...), "'gold_ids' is missing"),
        (question(gold_ids=[]), "'gold_ids' is empty; it needs at least one gold passage"),
        (question(hops="2"), "'hops' must be a whole number of at least 1 (and below 2^31), found '2'"),
        (question(hops=0), "'hops' must be a whole number of at least 1 (and below 2^31), found 0"),
        (question(hops=1 << 31), "'hops' must be a whole number of at least 1 (and below 2^31), found 2147483648"),
        (question(hops=True), "'hops' must be a whole number of at least 1 (and below 2^31), found True"),
        (question(type=1), "'type' must be a string, found a number"),
        (question(benchmark="rivers"), "'benchmark' is 'rivers' in a file of 'lakes'"),
    ],
)
def test_a_wrong_question(folder: Path, line: object, found: str) -> None:
    write_lines(folder / "questions" / "lakes.train.jsonl.gz", [question(), line])
    assert refused(jsonl(folder)).startswith(f"{folder}/questions/lakes.train.jsonl.gz:2: {found}")


@pytest.mark.parametrize("line", ['{"a": "p2"}', '["p2"]', '["p2", 4]', "[", '"p2"'])
def test_a_wrong_equivalent_pair(folder: Path, line: str) -> None:
    write_lines(folder / "equivalent_gold.jsonl", [["p2", "p4"], line])
    assert refused(jsonl(folder)).startswith(f"{folder}/equivalent_gold.jsonl:2: ")
    mistakes = Mistakes(skip=True)
    assert sources.equivalents(jsonl(folder), mistakes) == [("p2", "p4")]
    assert mistakes.count == 1


# -- the same in BEIR's layout ----------------------------------------------------------------------------------------


def beir(folder: Path, **values: object) -> DataConfig:
    return DataConfig.model_validate({"source": "beir", "path": str(folder), **values})


def test_beir_reads_corpus_queries_and_judgements(beir_folder: Path) -> None:
    passages, questions = read(beir(beir_folder))
    assert [(p.passage_id, p.title, p.source) for p in passages] == [(p["id"], p["title"], "corpus.jsonl") for p in PASSAGES]
    assert [(q.question_id, q.benchmark, q.split, q.gold_ids, q.answers, q.hops, q.type) for q in questions] == [
        ("q1", "brenn", "train", ("p1", "p2"), ("Ada Moss",), 3, "bridge"),
        ("q2", "brenn", "test", ("p3",), ("1950",), 1, ""),
        ("q3", "brenn", "test", ("p5",), ("river",), 1, ""),
    ]


def test_beir_digests_name_the_benchmark(beir_folder: Path) -> None:
    names = {"corpus.jsonl", "queries.jsonl", "qrels/train.tsv", "qrels/test.tsv"}
    assert set(sources.digests(beir(beir_folder))) == {f"brenn/{name}" for name in names}


def test_beir_needs_no_titles_and_no_answers(beir_folder: Path) -> None:
    write_lines(beir_folder / "corpus.jsonl", [{"_id": p["id"], "text": p["text"]} for p in PASSAGES])
    write_lines(beir_folder / "queries.jsonl.gz", [{"_id": f"q{n}", "text": "Who?"} for n in (1, 2, 3)])
    (beir_folder / "queries.jsonl").unlink()
    passages, questions = read(beir(beir_folder))
    assert {p.title for p in passages} == {""}
    assert {q.answers for q in questions} == {()}


def change_corpus(folder: Path) -> None:
    write_lines(folder / "corpus.jsonl", [{"_id": "p1", "text": "a"}, {"_id": "p2", "text": ""}])


def change_answers(folder: Path) -> None:
    write_lines(folder / "queries.jsonl", [{"_id": "q1", "text": "Who?", "answers": []}])


def nest_gold(folder: Path) -> None:
    write_lines(folder / "queries.jsonl", [{"_id": "q1", "text": "Who?", "answers": ["a"], "metadata": {"gold": [[["p1"], "p2"]]}}])


def change_query(folder: Path) -> None:
    write_lines(folder / "queries.jsonl", [{"_id": "q1", "text": ""}])


def change_metadata(folder: Path) -> None:
    write_lines(folder / "queries.jsonl", [{"_id": "q1", "text": "Who?", "metadata": []}])


def double_query(folder: Path) -> None:
    write_lines(folder / "queries.jsonl", [{"_id": "q1", "text": "Who?"}] * 2)


def lose_query(folder: Path) -> None:
    write_lines(folder / "queries.jsonl", [{"_id": "q1", "text": "Who?", "answers": ["a"]}])


def change_qrels(*lines: str) -> Callable[[Path], None]:
    return lambda folder: write_lines(folder / "qrels" / "train.tsv", ["query-id\tcorpus-id\tscore", *lines])


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (change_corpus, "{}/corpus.jsonl:2: 'text' is empty"),
        (change_answers, "{}/queries.jsonl:1: 'answers' is empty"),
        (change_query, "{}/queries.jsonl:1: 'text' is empty"),
        (nest_gold, "{}/queries.jsonl:1: 'metadata.gold' must be a string, found a list"),
        (change_metadata, "{}/queries.jsonl:1: 'metadata' must be an object, found a list"),
        (double_query, "{}/queries.jsonl:2: question id 'q1' stands already at {}/queries.jsonl:1"),
        (lose_query, "{}/qrels/test.tsv:2: query 'q2' is not in {}/queries.jsonl"),
        (change_qrels("q1 p1 1"), "{}/qrels/train.tsv:2: expected query-id, corpus-id and score between tabs"),
        (change_qrels("q1\tp1\tyes"), "{}/qrels/train.tsv:2: the score 'yes' is not a number"),
        (change_qrels("q1\tp1\t0"), "{}/qrels/train.tsv: no line with a score above 0"),
        (lambda folder: (folder / "corpus.jsonl").unlink(), "{}/corpus.jsonl: no such file"),
        (lambda folder: (folder / "queries.jsonl").unlink(), "{}/queries.jsonl: no such file"),
        (lambda folder: (folder / "qrels" / "train.tsv").rename(folder / "qrels" / "dev.tsv"),
         "{}/qrels/train.tsv: no such file; set data.train_split to one of: dev, test"),
    ],
)  # fmt: skip
def test_a_wrong_beir_folder(beir_folder: Path, change: Callable[[Path], object], found: str) -> None:
    change(beir_folder)
    assert refused(beir(beir_folder)).startswith(found.replace("{}", str(beir_folder)))


def test_beir_holds_one_benchmark(beir_folder: Path) -> None:
    assert "holds the one benchmark 'brenn'" in refused(beir(beir_folder, benchmarks=["lakes"]))
    assert len(read(beir(beir_folder, benchmarks=["brenn"]))[1]) == 3


def test_folders_that_are_none(beir_folder: Path, folder: Path) -> None:
    assert refused(beir(beir_folder / "absent")).startswith(f"data.path={beir_folder}/absent: no such folder")
    for data in (beir(beir_folder / "corpus.jsonl"), jsonl(folder / "passages.b.jsonl")):
        assert refused(data) == f"data.path={data.path}: is a file; name the folder that it lies in"


def test_a_bad_query_is_skipped_once(beir_folder: Path) -> None:
    lines = (beir_folder / "queries.jsonl").read_text().splitlines()
    write_lines(beir_folder / "queries.jsonl", [*lines, "{"])
    mistakes = Mistakes(skip=True)
    assert len(list(sources.read(beir(beir_folder), 0, 1, mistakes))) == 3
    assert sources.equivalents(beir(beir_folder), mistakes) == []
    assert mistakes.count == 1
