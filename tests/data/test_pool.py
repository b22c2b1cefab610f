"""The pool builder: what it keeps, that order and processes do not matter, copies and near copies, the checks and their report."""

from __future__ import annotations

import itertools
import random
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from intra import storage
from intra.artifact import Artifact
from intra.data import duplicates, pool, questions, raw, schema, stages
from intra.errors import UserError, WorkflowError
from tests.data import formats
from tests.data.conftest import make, write_lines
from tests.data.formats import text_of, write, write_parquet
from tests.data.test_dataset import contents

WORDS = [
    f"{first}{second}"
    for first in ("ba", "ko", "lu", "mi", "re", "sa", "ty", "wo")
    for second in ("den", "lip", "mar", "nos", "rak", "tum")
]


def prose(seed: object, words: int = 60) -> str:
    return " ".join(random.Random(str(seed)).choices(WORDS, k=words))


def backwards(stage: Any, arguments: tuple[Any, ...], tasks: list[dict[str, Any]], label: str) -> Iterator[dict[str, Any]]:
    """Another set of workers: each task in a process of its own, in another order."""
    made = {number: stage(*arguments)(task) for number, task in reversed(list(enumerate(tasks)))}
    return (made[number] for number in range(len(tasks)))


@pytest.fixture
def benchmarks(tmp_path: Path) -> Path:
    """A file of most formats, and distractors."""
    folder = tmp_path / "real"
    write(folder / "hotpot.json.gz", text_of("hotpotqa", formats.HOTPOTQA))
    write(folder / "2wiki.json", text_of("2wikimultihopqa", formats.TWO_WIKI))
    write(folder / "musique.jsonl.zst", text_of("musique", formats.MUSIQUE))
    write(folder / "nq.json", text_of("dpr", formats.DPR))
    write(folder / "clara.jsonl", text_of("clara", formats.CLARA_E2E))
    write(folder / "psgs_w100.tsv", "id\ttext\ttitle\n" + "".join(f"{n}\t{prose(n)}\tPage {n}\n" for n in range(40)))
    write_parquet(folder / "wiki.parquet", [{"title": f"Page {n}", "text": prose(n)} for n in range(20, 60)])
    return folder


FILES = [
    {"format": "hotpotqa", "path": "hotpot.json.gz", "benchmark": "hotpotqa", "split": "train"},
    {"format": "2wikimultihopqa", "path": "2wiki.json", "benchmark": "2wikimultihopqa", "split": "train"},
    {"format": "musique", "path": "musique.jsonl.zst", "benchmark": "musique", "split": "train"},
    {"format": "dpr", "path": "nq.json", "benchmark": "nq", "split": "train"},
    {"format": "clara", "path": "clara.jsonl", "benchmark": "hotpotqa", "split": "test"},
    {"format": "psgs", "path": "psgs_w100.tsv"},
    {"format": "parquet", "path": "wiki.parquet"},
]


def build(folder: Path, artifact: Artifact, fan: pool.Fan = stages.inline, files: Any = FILES, **data: Any) -> dict[str, Any]:
    config = make(folder, folder.parent, source="files", files=files, **{"chunk_tokens": 256, **data})
    return pool.build(config, artifact, fan)


def chunk_ids(artifact: Artifact) -> list[str]:
    return schema.read_pool(artifact.url).chunk_ids


def test_one_pool_of_many_formats(benchmarks: Path, artifact: Artifact) -> None:
    manifest = build(benchmarks, artifact)
    made = schema.read_pool(artifact.url)
    assert manifest["questions"] == {
        "2wikimultihopqa": {"train": 1}, "hotpotqa": {"train": 2, "test": 2}, "musique": {"train": 1}, "nq": {"train": 1}}  # fmt: skip
    assert set(manifest["inputs"]) == {str(entry["path"]) for entry in FILES}
    assert sum(title.startswith("Page ") for title in made.titles) == 60  # those in both files once
    texts = dict(zip(made.texts, made.table["source"].to_pylist(), strict=True))
    assert texts["A silo stores grain."] == "musique.jsonl.zst"  # without a title it is another passage than with one
    gold = {chunk for question in schema.read_questions(artifact.url) for group in question.gold for chunk in group}
    assert gold <= set(made.chunk_ids)
    assert not [name for name in storage.files(artifact.url) if name.startswith("work/")]


def test_neither_processes_nor_the_order_of_the_files_matter(benchmarks: Path, artifact: Artifact, tmp_path: Path) -> None:
    settings = {"pool_tokens": 2000, "deduplicate": True, "near_duplicates": 0.8}
    build(benchmarks, artifact, **settings)
    again, turned = (Artifact("dataset", str(tmp_path / name), artifact.fingerprint, "prepare") for name in ("again", "turned"))
    build(benchmarks, again, backwards, **settings)
    assert contents(again.url) == contents(artifact.url)
    build(benchmarks, turned, backwards, FILES[::-1], **settings)
    assert chunk_ids(turned) == chunk_ids(artifact)
    assert contents(turned.url)[schema.QUESTIONS] == contents(artifact.url)[schema.QUESTIONS]


# -- how many ---------------------------------------------------------------------------------------------------------


def test_a_token_budget_keeps_gold_and_is_filled_as_far_as_it_goes(benchmarks: Path, artifact: Artifact, tmp_path: Path) -> None:
    whole = build(benchmarks, artifact)
    everything = schema.read_pool(artifact.url)
    gold = {chunk for question in schema.read_questions(artifact.url) for group in question.gold for chunk in group}
    sizes = dict(zip(everything.chunk_ids, everything.table["n_tokens"].to_pylist(), strict=True))
    least = sum(sizes[name] for name in gold)
    kept: list[set[str]] = []
    for number, budget in enumerate((least, least + 900, least + 2500, whole["tokens"], 10 * whole["tokens"])):
        made = Artifact("dataset", str(tmp_path / str(number)), artifact.fingerprint, "prepare")
        manifest = build(benchmarks, made, pool_tokens=budget)
        # Tokens are counted by a tokenizer that learned from all passages, as the whole pool's did.
        assert manifest["tokens"] == sum(sizes[name] for name in chunk_ids(made)) <= budget
        assert gold <= set(chunk_ids(made))
        kept.append(set(chunk_ids(made)))
        longest = max(sizes.values())
        assert manifest["tokens"] > min(budget, whole["tokens"]) - longest
    assert all(smaller <= larger for smaller, larger in itertools.pairwise(kept))  # a larger budget only adds
    assert kept[0] == gold
    assert kept[-1] == kept[-2] == set(sizes)


def test_gold_stays_where_the_budget_is_smaller(benchmarks: Path, artifact: Artifact) -> None:
    manifest = build(benchmarks, artifact, pool_tokens=1)
    said = f"- The gold passages alone are more than data.pool_tokens=1 allows: {manifest['tokens']:,}.\n"
    assert said in storage.read_bytes(artifact.path(pool.REPORT)).decode()
    gold = {chunk for question in schema.read_questions(artifact.url) for group in question.gold for chunk in group}
    assert set(chunk_ids(artifact)) == gold


def test_a_number_of_chunks_counts_pieces(benchmarks: Path, artifact: Artifact) -> None:
    manifest = build(benchmarks, artifact, pool_chunks=60, chunk_tokens=100)
    assert manifest["split_passages"] > 5
    assert 58 <= manifest["chunks"] <= 60


# -- copies -----------------------------------------------------------------------------------------------------------


def test_copies_become_one_and_gold_follows(tmp_path: Path, artifact: Artifact) -> None:
    folder = tmp_path / "own"
    text = "The mill stands by the river."
    passages = [
        {"id": "b", "title": "Mill", "text": text}, {"id": "c", "title": "MILL ", "text": text.upper()},
        {"id": "a", "title": "Mill", "text": text.replace(" ", " \n")}, {"id": "d", "title": "Mill", "text": text.replace("the", "a")},
        {"id": "e", "title": "", "text": "ﬁne"}, {"id": "f", "title": "", "text": "fine"},
    ]  # fmt: skip
    asked = [
        {"id": "q1", "question": "Where is it?", "answers": ["river"], "gold_ids": ["c", "b", "d"]},
        {"id": "q2", "question": "How?", "answers": ["fine"], "gold_ids": ["f"]},
    ]
    write_lines(folder / "passages.jsonl", passages)
    write_lines(folder / "questions" / "x.train.jsonl", asked[:1])
    write_lines(folder / "questions" / "x.test.jsonl", asked[1:])
    write_lines(folder / "equivalent_gold.jsonl", [["c", "d"]])
    pool.build(make(folder, tmp_path, deduplicate=True), artifact)
    assert chunk_ids(artifact) == ["a", "d", "e"]
    assert [question.gold for question in schema.read_questions(artifact.url)] == [(("a", "d"),), (("e",),)]
    assert storage.read_json(artifact.path(pool.STATISTICS))["input"]["duplicates"] == 3
    pool.build(make(folder, tmp_path), artifact)
    assert len(chunk_ids(artifact)) == 6


def varied(text: str, share: float, seed: object) -> str:
    """The text with its end replaced, so that about `share` of all word 5-grams of the two are in both."""
    words = text.split()
    kept = round(2 * share / (1 + share) * (len(words) - 4)) + 4
    return " ".join([*words[:kept], *prose(f"{seed} end", len(words) - kept).split()])


def test_near_duplicates_are_found_and_no_others() -> None:
    plain = [prose(number, 90) for number in range(300)]
    planted = {
        "exact": plain[:30], "case": [text.upper() for text in plain[30:60]],
        "spacing": [text.replace(" ", " \n ") for text in plain[60:90]],
        "nine tenths": [varied(text, 0.9, number) for number, text in enumerate(plain[90:150])],
        "half": [varied(text, 0.5, number) for number, text in enumerate(plain[150:200])],
    }  # fmt: skip
    texts = plain + [text for group in planted.values() for text in group]
    found = {(pair.left, pair.right): pair.similarity for pair in duplicates.near(duplicates.band_hashes(texts), texts.__getitem__, 0.8)}
    wanted = {(number, 300 + number) for number in range(150)}
    assert set(found) == wanted  # recall and precision 1
    assert all(found[number, 300 + number] == 1 for number in range(90))
    assert all(0.85 < found[number, 300 + number] < 0.95 for number in range(90, 150))


def test_short_texts_and_crowded_buckets() -> None:
    texts = ["a b", "A  b!", "a c", *["the same words in every one of these"] * 200]
    pairs = [(pair.left, pair.right) for pair in duplicates.near(duplicates.band_hashes(texts), texts.__getitem__, 0.8)]
    assert pairs == [(0, 1), *((3, other) for other in range(4, 203))]


def test_near_duplicates_are_reported_and_not_merged(tmp_path: Path, artifact: Artifact) -> None:
    folder = tmp_path / "real"
    write(folder / "nq.json", text_of("dpr", formats.DPR))
    rows = [{"title": "t", "text": prose(n, 90)} for n in range(30)]
    rows += [{"title": "t", "text": varied(row["text"], 0.9, n)} for n, row in enumerate(rows[:7])]
    write(folder / "p.jsonl", text_of("passages", rows))
    files = [FILES[3], {"format": "passages", "path": "p.jsonl"}]
    manifest = build(folder, artifact, files=files, near_duplicates=0.8, deduplicate=True, chunk_tokens=2000)
    assert manifest["passages"] == 4 + 37
    table = pq.read_table(artifact.path(pool.NEAR_DUPLICATES)).to_pylist()
    texts = dict(zip(chunk_ids(artifact), schema.read_pool(artifact.url).texts, strict=True))
    assert {frozenset((texts[row["left"]], texts[row["right"]])) for row in table} == {
        frozenset((rows[n]["text"], rows[30 + n]["text"])) for n in range(7)}  # fmt: skip
    assert storage.read_json(artifact.path(pool.STATISTICS))["near_duplicates"] == {"threshold": 0.8, "pairs": 7, "chunks": 14}
    assert "7 pairs, 14 chunks" in storage.read_bytes(artifact.path(pool.REPORT)).decode()


# -- evidence named by title, mistakes, switches ----------------------------------------------------------------------


def fullwiki(folder: Path, pages: list[dict[str, str]]) -> list[dict[str, str]]:
    record = {**formats.HOTPOTQA[0], "context": formats.HOTPOTQA[0]["context"][:2]}
    write(folder / "h.json", text_of("hotpotqa_fullwiki", [record]))
    write(folder / "p.jsonl", text_of("passages", pages))
    return [
        {"format": "hotpotqa_fullwiki", "path": "h.json", "benchmark": "hotpotqa", "split": "test"},
        {"format": "passages", "path": "p.jsonl"},
    ]


def test_fullwiki_finds_its_pages_by_title(tmp_path: Path, artifact: Artifact) -> None:
    pages = [{"title": "Brenn", "text": "Brenn is a town. Its mayor is Ada Moss."}, {"title": "Other", "text": "Other things."}]
    build(tmp_path / "real", artifact, files=fullwiki(tmp_path / "real", pages))
    (question,) = schema.read_questions(artifact.url)
    made = schema.read_pool(artifact.url)
    assert [made.titles[made.row_of[group[0]]] for group in question.gold] == ["Brenn", "Lake Orla"]


@pytest.mark.parametrize(
    ("pages", "found"), [(["Other"], "no passage is called 'Brenn'"), (["Brenn", "Brenn"], "2 passages are called 'Brenn'")]
)
def test_fullwiki_without_its_pages(tmp_path: Path, artifact: Artifact, pages: list[str], found: str) -> None:
    files = fullwiki(tmp_path / "real", [{"title": title, "text": f"{title} {n}"} for n, title in enumerate(pages)])
    with pytest.raises(UserError, match=rf"h.json:1 \(record 1\): question '5a7a.*': {found}"):
        build(tmp_path / "real", artifact, files=files)
    assert storage.files(artifact.url) == []


def test_bad_records_are_counted_and_listed(benchmarks: Path, artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = {**formats.MUSIQUE[0], "paragraphs": []}
    unanswerable = {**formats.MUSIQUE[0], "answerable": False}
    write(benchmarks / "musique.jsonl.zst", text_of("musique", [*formats.MUSIQUE, bad, unanswerable, *formats.MUSIQUE]))
    write(benchmarks / "psgs_w100.tsv", "id\ttext\ttitle\n1\tfine\tone\n2\ttoo few\n")
    with pytest.raises(UserError, match=r"musique.jsonl.zst:2: 'paragraphs' is empty"):
        build(benchmarks, artifact)
    manifest = build(benchmarks, artifact, on_error="skip")
    assert manifest["questions"]["musique"] == {"train": 1}
    found = storage.read_json(artifact.path(pool.STATISTICS))["input"]
    assert (found["mistakes"], found["left_out"]) == (3, {"MuSiQue questions that are not answerable": 1})
    assert manifest["mistakes"] == 3
    lines = storage.read_bytes(artifact.path(pool.MISTAKES)).decode().splitlines()
    assert [line.removeprefix(f"{benchmarks}/").split(";")[0] for line in lines] == [
        "musique.jsonl.zst:2: 'paragraphs' is empty",
        "psgs_w100.tsv:3: expected id, text, title between tabs, found 2 cells",
        f"musique.jsonl.zst:4: question id '3hop1__12_34_56' stands already at {benchmarks}/musique.jsonl.zst:1",
    ]
    monkeypatch.setattr(raw, "LISTED", 2)
    build(benchmarks, artifact, on_error="skip")
    assert storage.read_bytes(artifact.path(pool.MISTAKES)).decode().splitlines() == [*lines[:2], "... and 1 more"]


def test_a_question_without_its_evidence_is_skipped(folder: Path, tmp_path: Path, artifact: Artifact) -> None:
    extra = {"id": "q9", "question": "What else?", "answers": ["x"], "gold_ids": ["p1", "absent"]}
    write_lines(folder / "questions" / "rivers.train.jsonl", [extra])
    manifest = pool.build(make(folder, tmp_path, on_error="skip"), artifact)
    assert manifest["questions"] == {"lakes": {"train": 1, "test": 1}, "rivers": {"test": 1}}
    assert "gold passage 'absent' is not in the pool" in storage.read_bytes(artifact.path(pool.MISTAKES)).decode()


def test_fairness_switches(benchmarks: Path, artifact: Artifact) -> None:
    build(benchmarks, artifact)
    before = {question.question_id: question for question in schema.read_questions(artifact.url)}
    build(benchmarks, artifact, nq_gold="one", musique_train="union")
    after = {question.question_id: question for question in schema.read_questions(artifact.url)}
    (nq,) = (name for name, question in before.items() if question.benchmark == "nq")
    assert after[nq].gold == before[nq].gold[:1]
    added = {name: question for name, question in after.items() if name not in before}
    assert {name.removeprefix("musique+") for name in added} == {
        name for name, q in before.items() if q.split == "train" and q.benchmark in questions.UNION}  # fmt: skip
    assert {question.benchmark for question in added.values()} == {"musique"}
    assert all(question.gold == before[name.removeprefix("musique+")].gold for name, question in added.items())
    assert {name: question for name, question in after.items() if name in before and name != nq} == {
        name: question for name, question in before.items() if name != nq}  # fmt: skip


@pytest.mark.parametrize("nq_gold", ["all", "one"])
def test_alternative_passages_are_no_hops(benchmarks: Path, artifact: Artifact, nq_gold: str) -> None:
    files = [*FILES[:3], *({"format": kind, "path": path, "benchmark": "nq", "split": split} for kind, path, split in (
        ("dpr", "nq.json", "train"), ("clara", "clara.jsonl", "test")))]  # fmt: skip
    build(benchmarks, artifact, files=files, nq_gold=nq_gold)
    found = [question for question in schema.read_questions(artifact.url) if question.benchmark == "nq"]
    assert sorted((question.split, question.hops, len(question.gold)) for question in found) == [
        ("test", 1, 1), ("test", 1, 2 if nq_gold == "all" else 1), ("train", 1, 2 if nq_gold == "all" else 1)]  # fmt: skip


def test_the_union_needs_musique(folder: Path, tmp_path: Path, artifact: Artifact) -> None:
    with pytest.raises(UserError, match=r"data.musique_train=union: it needs a benchmark 'musique', and .*; found lakes, rivers: add"):
        pool.build(make(folder, tmp_path, musique_train="union"), artifact)


def test_the_union_needs_something_to_add(benchmarks: Path, artifact: Artifact) -> None:
    with pytest.raises(UserError, match=r"data.musique_train=union: it needs .* training questions of 'hotpotqa' or .*; found musique:"):
        build(benchmarks, artifact, files=[FILES[2]], musique_train="union")


def test_one_gold_passage_of_nq_needs_nq(folder: Path, tmp_path: Path, artifact: Artifact) -> None:
    with pytest.raises(UserError, match=r"data.nq_gold=one: no benchmark is called 'nq', but lakes, rivers; rename it, or set all"):
        pool.build(make(folder, tmp_path, nq_gold="one"), artifact)


def test_a_dataset_without_questions_is_none(benchmarks: Path, artifact: Artifact) -> None:
    with pytest.raises(UserError, match=r"the input files hold no questions; add a file that does"):
        build(benchmarks, artifact, files=FILES[5:])
    write(benchmarks / "musique.jsonl.zst", text_of("musique", [{**formats.MUSIQUE[0], "paragraphs": []}]))
    found = r"hold no questions; 1 bad records were left out, the first: .*musique.jsonl.zst:1: 'paragraphs' is empty"
    with pytest.raises(UserError, match=found):
        build(benchmarks, artifact, files=[FILES[2], FILES[5]], on_error="skip")
    assert storage.files(artifact.url) == []


# -- one run after another --------------------------------------------------------------------------------------------


def test_a_run_that_was_taken_over_leaves_its_successors_work(benchmarks: Path, tmp_path: Path, artifact: Artifact) -> None:
    """The first run is held up after reading; the second takes over, and goes on tokenizing once the first has found out and ended."""
    started, taken = threading.Event(), threading.Event()
    caught: list[Exception] = []

    def held_up(stage: Any, arguments: tuple[Any, ...], tasks: list[dict[str, Any]], label: str) -> Iterator[dict[str, Any]]:
        if label == "tokenize":
            started.set()
            assert taken.wait(60)
        yield from stages.inline(stage, arguments, tasks, label)

    def check() -> None:
        if taken.is_set():
            raise WorkflowError("taken over")

    def first() -> None:
        try:
            pool.build(config, artifact, held_up, check)
        except Exception as error:
            caught.append(error)

    def second(stage: Any, arguments: tuple[Any, ...], tasks: list[dict[str, Any]], label: str) -> Iterator[dict[str, Any]]:
        if label == "tokenize":
            taken.set()
            thread.join()
        yield from stages.inline(stage, arguments, tasks, label)

    config = make(benchmarks, tmp_path, source="files", files=FILES)
    thread = threading.Thread(target=first)
    thread.start()
    assert started.wait(60)
    pool.build(config, artifact, second)
    assert [str(error) for error in caught] == ["taken over"]
    again = Artifact("dataset", str(tmp_path / "again"), "0" * 16, "prepare")
    pool.build(config, again)
    assert contents(artifact) == contents(again)


def test_what_a_killed_run_left_is_removed(benchmarks: Path, artifact: Artifact) -> None:
    storage.write_bytes(artifact.path(f"{pool.WORK}-0123", "passages", "00000-00000.parquet"), b"cut off")
    build(benchmarks, artifact)
    assert not [name for name in storage.names(artifact.url) if name.startswith(pool.WORK)]


# -- checks -----------------------------------------------------------------------------------------------------------


def test_checks_and_their_report(tmp_path: Path, artifact: Artifact) -> None:
    folder = tmp_path / "own"
    write_lines(folder / "passages.jsonl", [{"id": f"p{n}", "title": f"Title {n}", "text": f"Text number {n}."} for n in range(9)])
    train = [
        {"id": "t1", "question": "Which is ONE?", "answers": ["number 1"], "gold_ids": ["p1"]},
        {"id": "t2", "question": "Which is two?", "answers": ["TITLE 2"], "gold_ids": ["p2", "p3"]},
        {"id": "t3", "question": "Is it?", "answers": ["Yes"], "gold_ids": ["p3"]},
        {"id": "t4", "question": "Which is none?", "answers": ["umber 4", "five"], "gold_ids": ["p4"]},
    ]
    test = [
        {"id": "e1", "question": "which is  one?", "answers": ["1"], "gold_ids": ["p1"]},
        {"id": "e2", "question": "Which are three?", "answers": ["3"], "gold_ids": ["p3", "p5"]},
        {"id": "e3", "question": "Which are all?", "answers": ["8"], "gold_ids": [f"p{n}" for n in (0, 5, 6, 7, 8, 4)]},
    ]
    write_lines(folder / "questions" / "x.train.jsonl", train)
    write_lines(folder / "questions" / "x.test.jsonl", test)
    write_lines(folder / "questions" / "y.test.jsonl", [{"id": "y1", "question": "What?", "answers": ["Text"], "gold_ids": ["p1"]}])
    pool.build(make(folder, tmp_path), artifact)
    found = storage.read_json(artifact.path(pool.STATISTICS))["checks"]
    assert found == {
        "gold_chunks": 9,
        "questions_in_both_splits": {"count": 1, "first": [["t1", "e1"]]},
        "answer_not_in_gold": {
            "x": {"train": {"count": 1, "first": ["t4"]}, "test": {"count": 0, "first": []}}, "y": {"test": {"count": 0, "first": []}}},
        "test_gold_in_training": {
            "x": {"test": 3, "any": 3, "all": 1, "any_of_any_benchmark": 3},
            "y": {"test": 1, "any": 0, "all": 0, "any_of_any_benchmark": 1}},
        "ceiling": {"x": {"5": 0.6667, "10": 1.0, "20": 1.0}, "y": {"5": 1.0, "10": 1.0, "20": 1.0}},
    }  # fmt: skip
    report = storage.read_bytes(artifact.path(pool.REPORT)).decode()
    assert "| chunks | 9 | 758,500 |" in report
    assert "| of them gold | 9 | 514,999 |" in report
    assert "- The same question in training and test: 1 (t1 = e1)." in report
    assert "| x | test | 3 | 9 | 3.00 |  |  |  |" in report
    assert "| x | 0.667 | 1.000 | 1.000 |" in report


def test_the_papers_counts_stand_beside_ours(benchmarks: Path, artifact: Artifact) -> None:
    build(benchmarks, artifact)
    report = storage.read_bytes(artifact.path(pool.REPORT)).decode()
    assert "| musique | train | 1 | 3 | 3.00 | 277,577 | 631,153 | 2.27 |" in report
    assert "| nq | train | 1 | 2 | 2.00 | 53,301 | 276,872 | 5.19 |" in report
