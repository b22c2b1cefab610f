"""The readers of the public formats: a good file of each, and what is wrong in bad ones, stopped at or skipped."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from intra import storage
from intra.artifact import Artifact
from intra.data import pool, schema, sources
from intra.data.raw import Mistakes, Passage, RawQuestion
from intra.data_config import DataConfig
from intra.errors import UserError
from tests.data import formats
from tests.data.conftest import bare, make, write_lines
from tests.data.formats import RECORDS, text_of, write, write_parquet

QUESTIONLESS = ("psgs", "parquet", "passages")


def config(folder: Path | str, kind: str, name: str, **values: object) -> DataConfig:
    entry = {"format": kind, "path": name} | ({} if kind in QUESTIONLESS else {"benchmark": "b", "split": "train"})
    return DataConfig.model_validate({"source": "files", "path": str(folder), "files": [entry], **values})


def read(data: DataConfig, mistakes: Mistakes | None = None) -> tuple[list[Passage], list[RawQuestion]]:
    found = list(sources.read(data, 0, 0, mistakes or Mistakes()))
    return [item for item in found if isinstance(item, Passage)], [item for item in found if isinstance(item, RawQuestion)]


def texts(passages: list[Passage], question: RawQuestion) -> list[str]:
    by_id = {passage.passage_id: passage.text for passage in passages}
    return [by_id[name] for name in question.gold_ids]


# -- good files -------------------------------------------------------------------------------------------------------


def test_clara_pretraining(tmp_path: Path) -> None:
    write(tmp_path / "p.jsonl", text_of("clara", formats.CLARA_PRETRAINING))
    passages, questions = read(config(tmp_path, "clara", "p.jsonl"))
    assert [(p.title, p.text) for p in passages] == [
        ("Lake Orla", "Lake Orla lies north of the town of Brenn."), ("Brenn", "Brenn is a town whose mayor is Ada Moss.")]  # fmt: skip
    assert [(q.question, q.answers, q.type) for q in questions] == [
        ("Where does Lake Orla lie?", ("north of Brenn",), "qa"), ("What is north of Brenn?", ("Lake Orla",), "qa"),
        ("Who is mayor of Brenn?", ("Ada Moss",), "qa")]  # fmt: skip
    assert [q.gold_ids for q in questions] == [(passages[0].passage_id,)] * 2 + [(passages[1].passage_id,)]


def test_clara_end_to_end(tmp_path: Path) -> None:
    paraphrases = [
        {"data_type": "paraphrase", "question": asked, "answers": ["other words"], "docs": ["Some words."]} for asked in ("", [""])
    ]
    write(tmp_path / "e.jsonl", text_of("clara", [*formats.CLARA_E2E, *paraphrases]))
    mistakes = Mistakes()
    passages, questions = read(config(tmp_path, "clara", "e.jsonl"), mistakes)
    assert len(passages) == 5
    assert (passages[2].title, passages[2].text) == ("", "A document without a title.")
    assert texts(passages, questions[0]) == ["Lake Orla lies north of Brenn.", "Brenn is a town whose mayor is Ada Moss."]
    assert (questions[0].hops, questions[0].answers, questions[0].benchmark, questions[0].split) == (2, ("Ada Moss",), "b", "train")
    assert questions[1].answers == ("grain", "fodder")
    assert dict(mistakes.left_out) == {"CLaRa paraphrases, which ask nothing": 2}


def test_hotpotqa(tmp_path: Path) -> None:
    write(tmp_path / "h.json", text_of("hotpotqa", formats.HOTPOTQA))
    passages, questions = read(config(tmp_path, "hotpotqa", "h.json"))
    assert len(passages) == 5
    assert passages[0].passage_id == passages[4].passage_id  # one paragraph in two questions
    assert texts(passages, questions[0]) == ["Brenn is a town. Its mayor is Ada Moss.", "Lake Orla lies north of Brenn."]
    assert (questions[0].question_id, questions[0].type, questions[0].hops) == ("5a7a06935542990198eaf050", "bridge", 2)


def as_columns(record: dict[str, Any]) -> dict[str, Any]:
    """A record of HotpotQA as the hub's Parquet has it."""
    (titles, sentences), (named, numbers) = (zip(*record[key], strict=True) for key in ("context", "supporting_facts"))
    return {**record, "context": {"title": titles, "sentences": sentences}, "supporting_facts": {"title": named, "sent_id": numbers}}


def test_the_hubs_parquet(tmp_path: Path) -> None:
    write(tmp_path / "h.json", text_of("hotpotqa", formats.HOTPOTQA))
    wanted = read(config(tmp_path, "hotpotqa", "h.json"))
    write_parquet(tmp_path / "h.parquet", [as_columns(record) for record in formats.HOTPOTQA])
    passages, questions = read(config(tmp_path, "hotpotqa", "h.parquet"))
    assert ([p.passage_id for p in passages], [q.gold_ids for q in questions]) == (
        [p.passage_id for p in wanted[0]], [q.gold_ids for q in wanted[1]])  # fmt: skip
    assert questions[1].where == f"{tmp_path}/h.parquet:2"
    write_parquet(tmp_path / "m.parquet", [{**formats.MUSIQUE[0], "id": f"3hop1__{n}"} for n in range(3)])
    assert [q.question_id for q in read(config(tmp_path, "musique", "m.parquet"))[1]] == ["3hop1__0", "3hop1__1", "3hop1__2"]


def test_hotpotqa_fullwiki_names_pages_it_does_not_hold(tmp_path: Path) -> None:
    record = copy.deepcopy(formats.HOTPOTQA[0])
    record["context"] = record["context"][:2]
    write(tmp_path / "h.json", text_of("hotpotqa_fullwiki", [record]))
    passages, questions = read(config(tmp_path, "hotpotqa_fullwiki", "h.json"))
    assert questions[0].gold_ids == ("title: Brenn", passages[0].passage_id)
    with pytest.raises(UserError, match=r"'supporting_facts' names 'Brenn', which is not in 'context'; .* format: hotpotqa_fullwiki"):
        read(config(tmp_path, "hotpotqa", "h.json"))


def test_2wikimultihopqa(tmp_path: Path) -> None:
    write(tmp_path / "w.json", text_of("2wikimultihopqa", formats.TWO_WIKI))
    passages, questions = read(config(tmp_path, "2wikimultihopqa", "w.json"))
    assert passages[0].text == "Lantern is a film. It was directed by Bo Reed."
    assert (questions[0].type, questions[0].hops, len(questions[0].gold_ids)) == ("bridge_comparison", 3, 3)


def test_musique_and_its_full_set(tmp_path: Path) -> None:
    other = {**formats.MUSIQUE[0], "answerable": False, "question_decomposition": [{"id": 1, "paragraph_support_idx": None}]}
    write(tmp_path / "m.jsonl", text_of("musique", [*formats.MUSIQUE, other]))
    mistakes = Mistakes()
    passages, questions = read(config(tmp_path, "musique", "m.jsonl"), mistakes)
    assert texts(passages, questions[0]) == [
        "Lake Orla lies north of Brenn.",
        "Brenn has the mayor Ada Moss.",
        "Ada Moss was born in 1950.",
    ]
    assert (questions[0].type, questions[0].hops, questions[0].answers) == ("3hop1", 3, ("1950", "in 1950"))
    assert (len(questions), sum(mistakes.left_out.values()), mistakes.count) == (1, 1, 0)


def test_natural_questions_as_dpr_has_them(tmp_path: Path) -> None:
    write(tmp_path / "d.json", text_of("dpr", formats.DPR))
    passages, questions = read(config(tmp_path, "dpr", "d.json"))
    assert texts(passages, questions[0]) == ["Brenn has the mayor Ada Moss.", "Ada Moss, mayor of Brenn."]
    assert [p.title for p in passages] == ["Brenn", "Ada Moss", "Silo", "Tarn"]


def test_open_natural_questions(tmp_path: Path) -> None:
    write(tmp_path / "o.jsonl", text_of("nq_open", formats.NQ_OPEN))
    passages, questions = read(config(tmp_path, "nq_open", "o.jsonl"))
    assert texts(passages, questions[0]) == ["Brenn has the mayor Ada Moss."]
    assert questions[0].question_id.startswith("b.train.")


def test_psgs(tmp_path: Path) -> None:
    write(tmp_path / "psgs_w100.tsv", formats.PSGS)
    passages, questions = read(config(tmp_path, "psgs", "psgs_w100.tsv"))
    assert [(p.title, p.text) for p in passages] == [
        ("Brenn", 'Brenn is a town; its "old" mill stands.'),
        ('Tarn "the" river', "Tarn is a river."),
    ]
    assert (passages[1].where, questions) == (f"{tmp_path}/psgs_w100.tsv:3", [])


def test_parquet_shards_by_a_glob(tmp_path: Path) -> None:
    for number, row in enumerate(formats.PASSAGES):
        write_parquet(tmp_path / "wiki" / f"train-{number:05}.parquet", [{"id": "1", "url": "u", **row}])
    data = config(tmp_path, "parquet", "wiki/train-*.parquet")
    assert sources.parts(data) == ["wiki/train-00000.parquet", "wiki/train-00001.parquet"]
    found = [item for part in (0, 1) for item in sources.read(data, 0, part, Mistakes())]
    assert [(p.title, p.text, p.source) for p in found if isinstance(p, Passage)] == [
        ("Tarn", "Tarn is a river.", "wiki/train-00000.parquet"), ("", "A silo stores grain.", "wiki/train-00001.parquet")]  # fmt: skip


def test_beir_as_one_of_several_files(beir_folder: Path) -> None:
    entry = {"format": "beir", "path": "brenn", "benchmark": "nq", "split": "test"}
    data = DataConfig.model_validate({"source": "files", "path": str(beir_folder.parent), "files": [entry]})
    passages, questions = read(data)
    assert (passages[0].passage_id, passages[0].source) == ("nq/p1", "brenn")
    assert [(q.question_id, q.gold_ids, q.benchmark) for q in questions] == [("nq/q2", ("nq/p3",), "nq"), ("nq/q3", ("nq/p5",), "nq")]
    assert set(sources.digests(data)) == {"brenn/corpus.jsonl", "brenn/queries.jsonl", "brenn/qrels/test.tsv"}


def test_alternatives_of_a_beir_folder_count(beir_folder: Path, tmp_path: Path, artifact: Artifact) -> None:
    groups = [["p1"], ["p2", "p4"]]
    asked = [{"_id": "q1", "text": "Who is mayor?", "metadata": {"answer": "Ada Moss", "gold": groups}}]
    write_lines(beir_folder / "queries.jsonl", asked)
    write_lines(beir_folder / "qrels" / "train.tsv", ["query-id\tcorpus-id\tscore", *(f"q1\tp{n}\t1" for n in (1, 2, 4))])
    entry = {"format": "beir", "path": "brenn", "benchmark": "nq", "split": "train"}
    pool.build(make(beir_folder.parent, tmp_path, source="files", files=[entry], chunk_tokens=500), artifact)
    assert [question.gold for question in schema.read_questions(artifact.url)] == [(("nq/p1",), ("nq/p2", "nq/p4"))]


def test_both_splits_of_a_beir_folder_share_its_passages(beir_folder: Path, tmp_path: Path, artifact: Artifact) -> None:
    entries = [{"format": "beir", "path": "brenn", "benchmark": "nq", "split": split} for split in ("train", "test")]
    both = make(beir_folder.parent, tmp_path, source="files", files=entries, chunk_tokens=500)
    manifest = pool.build(both, artifact)
    assert (manifest["passages"], manifest["questions"]) == (6, {"nq": {"train": 1, "test": 2}})
    read_once = [item for part in (0, 1) for item in sources.read(both.data, 0, part, Mistakes()) if isinstance(item, Passage)]
    assert len(read_once) == 6
    other = [*entries, {"format": "beir", "path": "copy", "benchmark": "nq"}]
    (beir_folder.parent / "copy").mkdir()
    (beir_folder.parent / "copy" / "corpus.jsonl").write_bytes((beir_folder / "corpus.jsonl").read_bytes())
    with pytest.raises(UserError, match=r"copy/corpus.jsonl:1: passage id 'nq/p1' stands already at .*brenn/corpus.jsonl:1"):
        pool.build(make(beir_folder.parent, tmp_path, source="files", files=other, chunk_tokens=500), artifact)


@pytest.mark.parametrize("packed", ["", ".gz", ".zst"])
def test_packed_and_on_s3(tmp_path: Path, packed: str, s3_root: str) -> None:
    for kind, records in RECORDS.items():
        write(tmp_path / f"{kind}.json{packed}", text_of(kind, records))
    write(tmp_path / f"psgs.tsv{packed}", formats.PSGS)
    storage.upload(tmp_path, s3_root)
    for kind in (*RECORDS, "psgs"):
        name = f"{kind}.{'tsv' if kind == 'psgs' else 'json'}{packed}"
        here, there = read(config(tmp_path, kind, name)), read(config(s3_root, kind, name))
        assert [p.text for p in here[0]] == [p.text for p in there[0]] != []
        assert [q.gold_ids for q in here[1]] == [q.gold_ids for q in there[1]]


def test_parquet_on_s3(tmp_path: Path, s3_root: str) -> None:
    write_parquet(tmp_path / "w.parquet", formats.PASSAGES)
    storage.upload(tmp_path, s3_root)
    assert len(read(config(s3_root, "parquet", "w.parquet"))[0]) == 2


# -- bad files --------------------------------------------------------------------------------------------------------


def put(record: Any, path: str, value: object = ...) -> Any:
    """A copy with the field at `path` (dots between) set, or, without a value, removed."""
    record = copy.deepcopy(record)
    *way, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    place = record
    for part in way:
        place = place[part]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return record


# format, field, value (... removes it), what is said of it
FIELDS: list[tuple[str, str, object, str]] = [
    ("clara", "docs", ..., "'docs' is missing"),
    ("clara", "answer", ..., "'answer' is missing"),
    ("clara", "pos_index", ..., "'pos_index' is missing"),
    ("clara", "pos_index", [1, 4], "'pos_index' holds the index 4, out of range: there are 4, counted from 0"),
    ("clara", "pos_index", [-1], "'pos_index' holds the index -1, out of range"),
    ("clara", "pos_index", [True], "'pos_index' must hold whole numbers, found True"),
    ("clara", "pos_index", [], "'pos_index' is empty"),
    ("clara", "docs", [], "'docs' is empty"),
    ("clara", "docs", ["a", " "], "'docs' is empty"),
    ("hotpotqa", "supporting_facts", ..., "'supporting_facts' is missing"),
    ("hotpotqa", "answer", ..., "'answer' is missing"),
    ("hotpotqa", "_id", ..., "'_id' is missing"),
    ("hotpotqa", "supporting_facts.0.1", 2, "'supporting_facts (Brenn)' holds the index 2, out of range: there are 2"),
    ("hotpotqa", "supporting_facts.0", ["Brenn"], "'supporting_facts' must hold pairs of a title and a sentence's number"),
    ("hotpotqa", "supporting_facts", [], "'supporting_facts' is empty"),
    ("hotpotqa", "context", [], "'context' is empty"),
    ("hotpotqa", "context.0.1", [], "'sentences' is empty"),
    ("hotpotqa", "context.0.1", [" "], "'context': the paragraph 'Lake Orla' is empty"),
    ("hotpotqa", "context", {"title": ["Brenn"]}, "'context': 'sentences' is missing; found the fields title"),
    ("hotpotqa", "supporting_facts", {"title": ["Brenn"], "sent_id": [0, 1]}, "'supporting_facts' holds 1 of 'title', 2 of 'sent_id'"),
    ("hotpotqa_fullwiki", "supporting_facts.0", ["Elsewhere", -1], "'supporting_facts (Elsewhere)' holds the index -1, out of range: they"),
    ("2wikimultihopqa", "evidences", ..., "'evidences' is missing"),
    ("2wikimultihopqa", "evidences", [], "'evidences' is empty"),
    ("2wikimultihopqa", "evidences.0", ["a", "b"], "'evidences' must hold triples of strings"),
    ("2wikimultihopqa", "supporting_facts.1.1", 1, "'supporting_facts (Bo Reed)' holds the index 1, out of range: there are 1"),
    ("2wikimultihopqa", "question", ..., "'question' is missing"),
    ("musique", "paragraphs", ..., "'paragraphs' is missing"),
    ("musique", "paragraphs", [], "'paragraphs' is empty"),
    ("musique", "paragraphs.0.paragraph_text", ..., "'paragraph_text' is missing"),
    ("musique", "paragraphs.1.idx", 0, "'paragraphs' need an 'idx' each, a number of its own; found 0"),
    ("musique", "question_decomposition", [], "'question_decomposition' is empty"),
    ("musique", "question_decomposition.0.paragraph_support_idx", 4, "'question_decomposition' names the paragraph 4 (paragraph_sup"),
    ("musique", "question_decomposition.0.paragraph_support_idx", [2], "'question_decomposition' names the paragraph [2] (paragraph_su"),
    ("musique", "question_decomposition.0.paragraph_support_idx", True, "'question_decomposition' names the paragraph True (paragraph_s"),
    ("dpr", "positive_ctxs", ..., "'positive_ctxs' is missing"),
    ("dpr", "positive_ctxs", [], "'positive_ctxs' is empty"),
    ("dpr", "positive_ctxs.0.text", ..., "'text' is missing; found the fields passage_id, score, title, title_score (in 'positive_ctxs')"),
    ("dpr", "hard_negative_ctxs.0", "x", "'hard_negative_ctxs' must hold objects, found a string"),
    ("dpr", "answers", [], "'answers' is empty"),
    ("nq_open", "ctxs", ..., "'ctxs' is missing: questions and answers alone name no evidence"),
    ("nq_open", "ctxs", [], "'ctxs' is empty"),
    ("nq_open", "ctxs.1.isgold", False, "'ctxs' marks no passage as gold"),
    ("nq_open", "answers", [], "'answers' is empty"),
    ("passages", "text", ..., "'text' is missing"),
    ("passages", "text", "", "'text' is empty"),
    ("passages", "title", 3, "'title' must be a string, found a number"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "field", "value", "found"), FIELDS)
def test_a_bad_record_is_refused_or_skipped(tmp_path: Path, kind: str, field: str, value: object, found: str) -> None:
    good = RECORDS[kind][0]
    text = text_of(kind, [good, put(good, field, value)])
    write(tmp_path / "f", text)
    begins = [number for number, line in enumerate(text.splitlines(), 1) if line == "  {"]  # of the list with line breaks
    line = "2" if kind not in formats.LISTS else f"{begins[1] if begins else 1} (record 2)"
    with pytest.raises(UserError) as caught:
        read(config(tmp_path, kind, "f"))
    assert str(caught.value).startswith(f"{tmp_path}/f:{line}: {found}")
    assert str(caught.value).endswith(" (data.on_error=skip leaves such records out, counted and listed)")
    mistakes = Mistakes(skip=True)
    passages, questions = read(config(tmp_path, kind, "f"), mistakes)
    assert (mistakes.count, mistakes.messages) == (1, [bare(caught.value)])
    assert (passages, questions) == read_alone(tmp_path, kind, [good])  # of the bad one nothing at all


def read_alone(folder: Path, kind: str, records: list[Any]) -> tuple[list[Passage], list[RawQuestion]]:
    write(folder / "f", text_of(kind, [*records, *records]))
    passages, questions = read(config(folder, kind, "f"))
    return passages[: len(passages) // 2], questions[: len(questions) // 2]


def test_unpaired_questions_of_clara(tmp_path: Path) -> None:
    write(tmp_path / "f", text_of("clara", [put(formats.CLARA_PRETRAINING[0], "answers", ["one"])]))
    with pytest.raises(UserError, match="'question' holds 2, 'answers' 1"):
        read(config(tmp_path, "clara", "f"))


def cut(data: bytes) -> bytes:
    return data[:-20]


def latin(data: bytes) -> bytes:
    return data.replace(b"Brenn", b"Br\xe9nn").replace(b"Lantern", b"L\xe9ntern").replace(b"Tarn", b"T\xe9rn")


def emptied(data: bytes) -> bytes:
    return b"[]" if data.startswith(b"[") else b"\n"


def spelled(data: bytes) -> bytes:
    return data.replace(b'":', b'"', 1)


@pytest.mark.parametrize("kind", RECORDS)
@pytest.mark.parametrize(
    ("change", "found"),
    [(cut, "not valid JSON"), (latin, "not UTF-8|not valid JSON"), (emptied, "empty"), (spelled, "not valid JSON")],
)
def test_a_damaged_file_is_refused_or_counted(tmp_path: Path, kind: str, change: Callable[[bytes], bytes], found: str) -> None:
    write(tmp_path / "f", change(text_of(kind, RECORDS[kind]).encode()))
    with pytest.raises(UserError, match=found) as caught:
        read(config(tmp_path, kind, "f"))
    assert str(caught.value).startswith(f"{tmp_path}/f:")
    assert "\n" not in str(caught.value)
    mistakes = Mistakes(skip=True)
    read(config(tmp_path, kind, "f"), mistakes)
    assert mistakes.count >= 1
    assert bare(mistakes.messages[0]) == bare(caught.value)


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (formats.PSGS.replace("id\ttext", "text\tid"), ":1: expected the header id, text, title"),
        ("", ":1: expected the header"),
        ("id\ttext\ttitle\n", ": holds no passages"),
        (formats.PSGS.replace("\tBrenn\n", "\n"), ":2: expected id, text, title between tabs, found 2 cells"),
        (formats.PSGS.replace('stands."', "stands."), ":2: not a sound row"),
        (formats.PSGS.replace("Tarn is a river.", " "), ":3: 'text' is empty"),
        (formats.PSGS.encode().replace(b"river.", b"riv\xe9r"), ":3: not UTF-8"),
    ],
)
def test_a_bad_psgs_file(tmp_path: Path, data: str | bytes, found: str) -> None:
    write(tmp_path / "f.tsv", data)
    with pytest.raises(UserError) as caught:
        read(config(tmp_path, "psgs", "f.tsv"))
    assert str(caught.value).startswith(f"{tmp_path}/f.tsv{found}")
    mistakes = Mistakes(skip=True)
    assert len(read(config(tmp_path, "psgs", "f.tsv"), mistakes)[0]) < 2
    assert bare(mistakes.messages[0]) == bare(caught.value)


def test_bad_parquet_files(tmp_path: Path) -> None:
    def refused() -> str:
        with pytest.raises(UserError) as caught:
            read(config(tmp_path, "parquet", "f.parquet"))
        return str(caught.value).removeprefix(f"{tmp_path}/f.parquet")

    file = tmp_path / "f.parquet"
    rows = [{"title": "Tarn", "text": "Tarn is a river."}] * 3
    whole = write_parquet(file, rows).read_bytes()
    file.write_bytes(whole[:-30])
    assert refused().startswith(": not a sound Parquet file")
    pages = write_parquet(file, [{"text": f"{n} {n * 7919}"} for n in range(2000)]).read_bytes()
    file.write_bytes(pages[:200] + bytes(byte ^ 0x5A for byte in pages[200:4000]) + pages[4000:])
    assert refused().startswith(": not a sound Parquet file")
    file.write_bytes(b"")
    assert refused().startswith(": not a sound Parquet file")
    write_parquet(file, [{"body": "x"}])
    assert refused() == ": the column 'text' is missing; found the columns body"
    write_parquet(file, [], pa.schema([("text", pa.string())]))
    assert refused().startswith(": holds no rows")
    write_parquet(file, [{"text": 3}])
    assert refused().startswith(":1: 'text' must be a string, found a number")
    write_parquet(file, [*rows, {"title": "Orla", "text": None}])
    assert refused().startswith(":4: 'text'")
    mistakes = Mistakes(skip=True)
    assert len(read(config(tmp_path, "parquet", "f.parquet"), mistakes)[0]) == 3
    assert mistakes.count == 1
    broken = pa.array(["fine", "broken"]).cast(pa.binary()).to_pylist()
    broken[1] = b"br\xe9ken"
    column = pa.StringArray.from_buffers(2, *pa.array(broken, pa.binary()).buffers()[1:])
    pq.write_table(pa.table({"text": column}), file)
    assert refused().startswith(":2: holds bytes that are not UTF-8")
    mistakes = Mistakes(skip=True)
    assert [passage.text for passage in read(config(tmp_path, "parquet", "f.parquet"), mistakes)[0]] == ["fine"]
    assert mistakes.count == 1


@pytest.mark.parametrize(
    ("entry", "found"),
    [
        ({"format": "psgs", "path": "a", "split": "train"}, "format psgs has no questions"),
        ({"format": "dpr", "path": "a", "split": "train"}, "format dpr needs benchmark and split"),
        ({"format": "beir", "path": "a"}, "format beir needs a benchmark"),
        ({"format": "psgs", "path": "a", "revision": "main"}, "revision and sha256 go with repo"),
        ({"format": "psgs", "path": "a*", "repo": "o/n"}, "a file of the hub is named in full"),
        ({"format": "psgs", "path": "a", "repo": "o/n", "sha256": "12"}, "sha256 must be 64 hex digits"),
        ({"format": "beir", "path": "a", "benchmark": "b", "repo": "o/n"}, "of the hub single files are fetched, no folders"),
        ({"format": "psgs", "path": "/a", "repo": "o/n"}, "a file of the hub lies below data.path; write its path in o/n"),
        ({"format": "psgs", "path": "b/../../a", "repo": "o/n"}, "a file of the hub lies below data.path; write its path in o/n"),
    ],
)
def test_what_an_entry_may_say(entry: dict[str, str], found: str) -> None:
    with pytest.raises(ValueError, match=found):
        DataConfig.model_validate({"source": "files", "path": ".", "files": [entry]})


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"data.files: {tmp_path}/absent.json: no such file; fetch it"):
        sources.parts(config(tmp_path, "dpr", "absent.json"))
    with pytest.raises(UserError, match=r"data.files: .*/x\*.parquet: no file matches"):
        sources.parts(config(tmp_path, "parquet", "x*.parquet"))
