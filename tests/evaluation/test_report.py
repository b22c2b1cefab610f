from __future__ import annotations

import itertools
import re
import xml.etree.ElementTree as xml
from html.parser import HTMLParser
from typing import Any

import pyarrow as pa
import pytest

from intra.data.schema import POOL_SCHEMA, Pool, Question
from intra.evaluation import figures, report, results, significance
from intra.evaluation.results import Outcome, Record

KS = [5, 10]


def ask(number: int) -> Question:
    kind = "bridge" if number % 2 else "comparison"
    return Question(f"q {number}", "films & towns", "test", "?", ("Paris",), ((f"c{number}",),), 1, kind)


QUESTIONS = [ask(number) for number in range(6)]


def outcome(name: str, shift: int) -> Outcome:
    """Ranks the gold chunk at place `shift`."""
    rankings, answers = {}, {}
    for number, question in enumerate(QUESTIONS):
        others = [f"x{place}" for place in range(10)]
        others[shift] = f"c{number}"
        rankings[question.question_id] = [(chunk, 10.0 - place) for place, chunk in enumerate(others)]
        answers[question.question_id] = "Paris" if number < 3 else "Paris, France"
    return Outcome(name, rankings, answers)


@pytest.fixture(scope="module")
def found() -> list[Record]:
    made = []
    for one in (outcome("intra", 0), outcome("bm25", 7)):
        made += results.records(one.method, QUESTIONS, one.values(QUESTIONS, KS), 200, 0)
    return made


def test_records(found: list[Record]) -> None:
    assert all(set(record) == {"method", "benchmark", "metric", "value", "low", "high", "n"} for record in found)
    assert {record["benchmark"] for record in found} == {"films & towns", "films & towns/bridge", "films & towns/comparison"}
    assert results.find(found, "films & towns", "bm25", "complete_recall_at_5")["value"] == 0.0  # type: ignore[index]
    assert results.find(found, "films & towns", "bm25", "complete_recall_at_10")["value"] == 1.0  # type: ignore[index]
    em, f1 = (results.find(found, "films & towns", "intra", metric) for metric in ("em", "f1"))
    assert em is not None
    assert f1 is not None
    assert (em["value"], em["n"]) == (0.5, 6)
    assert f1["value"] == pytest.approx((3 + 3 * 2 / 3) / 6)
    assert em["low"] < em["value"] < em["high"]
    assert results.find(found, "films & towns/bridge", "intra", "em")["n"] == 3  # type: ignore[index]


def test_the_terminal_table(found: list[Record]) -> None:
    lines = results.text_table(found).splitlines()
    assert lines[1].split() == ["benchmark", "method", "n", "complete", "R@5", "complete", "R@10", "EM", "F1"]
    assert [line.split()[3] for line in lines[3:]] == ["intra", "bm25"]
    assert "1.000 [1.000, 1.000]" in lines[3]


def test_a_run_file_has_six_columns() -> None:
    one = outcome("bm25", 0)
    lines = results.trec("bm25", one.rankings, QUESTIONS).splitlines()
    assert lines[0] == "q%200 Q0 c0 1 10.0 bm25"
    assert all(len(line.split()) == 6 for line in lines)
    assert len(lines) == 60


def test_rankings_come_back_from_their_table() -> None:
    one = outcome("bm25", 3)
    assert results.rankings_of(results.rankings_table(one.rankings, QUESTIONS)) == one.rankings


class Page(HTMLParser):
    """Open elements, the attributes that load something, header cells, ids and links."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag not in {"meta", "input", "br"}:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


KINDS = ("intra", "maxsim", "s0_reranked", "bm25", "random", "oracle")


def contents(**changes: Any) -> report.Contents:
    """A report with every section, of two benchmarks."""
    chunks = [*(f"c{number}" for number in range(6)), *(f"x{place}" for place in range(10))]
    pool = Pool(pa.table({"chunk_id": chunks, "title": [f"Title of {c}" for c in chunks], "text": [f"<b>Text</b> of {c}" for c in chunks],
                          "source": ["t"] * 16, "n_tokens": [3] * 16}, schema=POOL_SCHEMA))  # fmt: skip
    questions = [*QUESTIONS, *(Question(f"m{n}", "rivers", "test", "Which?", ("Wend",), ((f"c{n}",), ("x1",)), 2, "") for n in range(3))]
    made, values = [], {}
    for number, name in enumerate(KINDS):
        one = outcome(name, 0 if name == "oracle" else number)
        for n, question in enumerate(questions[6:]):
            one.rankings[question.question_id] = one.rankings[f"q {n}"]
            one.answers[question.question_id] = "Wend"
        if name == "random":
            one.answers = dict.fromkeys(one.answers, "Oslo")
        values[name] = one.values(questions, KS)
        made.append((one, values[name]))
    costs = [{"method": name, "questions": 9, "index_seconds": 0.5, "search_seconds": 0.01 * (n + 1), "answer_seconds": 0.3,
              "answers_read": 0 if name == "oracle" else 9, "note": ""} for n, name in enumerate(KINDS)]  # fmt: skip
    settled: dict[str, Any] = {
        "records": [record for one, mine in made for record in results.records(one.method, questions, mine, 100, 0)],
        "facts": {"results": "abc", "seed": "0"},
        "config": {"root": "</pre><script>alert(1)</script>"},
        "size": 5,
        "tests": significance.compare(values, questions, 100, 0),
        "gap_closure": significance.gap_closure(values, questions, "em", 100, 0),
        "breakdowns": results.breakdowns(values, questions, 100, 0),
        "costs": costs,
        "weights": [[0.5, -0.25], [0.0, 1.0], [0.1, 0.2]],
        "asked": report.sample(made, questions, pool, 5, 4, 0),
    }
    return report.Contents(**{**settled, **changes})


@pytest.fixture(scope="module")
def whole() -> report.Contents:
    return contents()


def test_the_report_stands_alone_and_can_be_read_without_a_mouse(whole: report.Contents) -> None:
    text = report.html(whole)
    page = Page()
    page.feed(text)
    assert page.open == []
    assert not [tag for tag, _ in page.tags if tag in {"script", "link", "iframe", "object", "img"}]
    assert not [values for _, values in page.tags if {"src", "srcset"} & set(values)]
    assert not re.search(r"(https?:)?//|@import|url\(", text)
    ids = [values["id"] for _, values in page.tags if "id" in values]
    assert len(ids) == len(set(ids))
    assert {values["for"] for tag, values in page.tags if tag == "label" and "for" in values} <= set(ids)
    for tag, values in page.tags:
        if tag == "a":
            assert (values["href"] or "").removeprefix("#") in ids
        if tag == "th":
            assert values["scope"] in {"col", "row"}
        if tag == "svg":
            assert values["role"] == "img"
            assert values["aria-label"]
        if values.get("class") == "scroll":
            assert values["tabindex"] == "0"
            assert values["aria-label"]
    assert ("html", {"lang": "en"}) in page.tags
    assert "films &amp; towns" in text
    assert "<b>Text" not in text
    row = re.search(r'<th scope="row">intra</th><td>6</td>(.*?)</tr>', text, re.DOTALL)
    assert row
    assert re.findall(r"\d\.\d{3}(?= <span)", row[1]) == ["1.000", "1.000", "0.500", "0.833"]
    sections = ("results", "curves", "answers", "sets", "weights", "gap", "cost", "significance", "breakdowns", "others", "questions")
    assert [name for name in ids if name in sections] == list(sections)


def test_a_section_without_content_is_left_out(found: list[Record]) -> None:
    """The records of two methods, and nothing else."""
    text = report.html(report.Contents(found, {"results": "abc"}, {}, 5, failures={"tfidf": "no <words>"}))
    page = Page()
    page.feed(text)
    assert page.open == []
    ids = {values["id"] for _, values in page.tags if "id" in values}
    assert not ids & {"sets", "weights", "gap", "cost", "significance", "breakdowns", "questions"}
    assert all((values["href"] or "")[1:] in ids for tag, values in page.tags if tag == "a")
    assert "Method tfidf failed: no &lt;words&gt;" in text


def test_where_nothing_was_answered_nothing_is_said_of_answers(found: list[Record]) -> None:
    searched = [record for record in found if record["metric"] not in ("em", "f1")]
    assert len(searched) < len(found)
    for records, judged in ((found, True), (searched, False)):
        text = report.html(report.Contents(records, {"results": "abc"}, {}, 5))
        assert [words in text for words in ("EM and F1 judge the answer", "recall and answers, by benchmark")] == [judged] * 2


def test_what_a_question_shows(whole: report.Contents) -> None:
    assert [item["benchmark"] for item in whole.asked] == ["films & towns"] * 4 + ["rivers"] * 3
    again = contents().asked
    assert [item["question_id"] for item in again] == [item["question_id"] for item in whole.asked]
    item = next(item for item in whole.asked if item["benchmark"] == "rivers")
    first, second = item["passages"][:2]
    assert (first["gold"], second["gold"]) == (1, 2)  # evidence first
    assert first["chunk"] == "c" + item["question_id"][1:]
    # intra has c at 1 and x1 at 2; maxsim lost x1 to the gold chunk; bm25 has the gold chunk at 4 and x1 at 2.
    assert first["ranks"] == {"intra": 1, "maxsim": 2, "s0_reranked": 3, "bm25": 4}
    assert second["ranks"] == {"intra": 2, "s0_reranked": 2, "bm25": 2}
    methods = {mine["method"]: mine for mine in item["methods"]}
    assert [one["gold"] for one in methods["intra"]["found"]] == [True, True, False, False, False]
    assert (methods["intra"]["complete"], methods["maxsim"]["complete"], methods["intra"]["em"]) == (True, False, 1.0)
    assert item["kinds"] == ["right"]
    text = report.html(whole)
    number = whole.asked.index(item) + 1
    assert f'<li id="q{number}p1" class="gold"><p><strong>1. Title of {first["chunk"]}</strong>' in text
    assert f'<a href="#q{number}p2" class="hit">2★</a>' in text
    assert "found by intra (1), maxsim (2), s0_reranked (3), bm25 (4)" in text


def test_filters_count_what_they_leave(whole: report.Contents) -> None:
    text = report.html(whole)
    counts = {kind: len(re.findall(rf'<details class="q [^"]*\b{kind}\b', text)) for kind in report.KINDS} | {"all": 7}
    assert sum(count > 0 for count in counts.values()) >= 3
    for kind, label in report.KINDS.items():
        found = re.findall(rf'id="k-{kind}"[^>]*> {re.escape(label)} \((\d+)\)', text)
        assert found == ([str(counts[kind])] if counts[kind] else [])  # what would leave nothing is not offered
        assert (f"main:has(#k-{kind}:checked) .q:not(.{kind})" in text) == (counts[kind] > 0 and kind != "all")


def test_figures_are_files_of_their_own_too(whole: report.Contents) -> None:
    made = report.drawn(whole)
    assert set(made) == {"curves", "answers", "sets", "weights", "gap", "cost"}
    for figure in (figure for part in made.values() for figure in part):
        root = xml.fromstring(figure.standalone())
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        assert "http" not in figure.inline()
        _, _, width, height = map(float, root.attrib["viewBox"].split())
        for text in root.iter("{http://www.w3.org/2000/svg}text"):
            assert -1 <= float(text.attrib["x"]) <= width
            assert 0 <= float(text.attrib["y"]) <= height
    (curve, _) = made["curves"]
    lines = re.findall(r'<polyline class="line s\d+" points="([^"]*)"', curve.body)
    assert len(lines) == len(KINDS)
    (x5, y5), (x10, y10) = (tuple(map(float, point.split(","))) for point in lines[0].split())
    assert x5 < x10
    assert y5 == y10 == 10  # INTRA's recall is 1: the top
    cells = re.findall(r"<title>layer (\d), head (\d): ([-\d.]+)</title>", made["weights"][0].body)
    assert [float(value) for _, _, value in cells] == [0.5, -0.25, 0.0, 1.0, 0.1, 0.2]
    assert [len(made[name]) for name in ("sets", "gap", "cost")] == [1, 2, 2]
    assert "oracle" not in made["cost"][1].body


def test_the_three_sets_are_the_methods_of_one_run(whole: report.Contents) -> None:
    body = figures.three_sets(whole.records, 5)
    assert body is not None
    assert re.findall(r"<title>([^<>]*) on rivers: (\d\.\d{3})", body.body) == [
        ("S_0", "0.000"), ("S_0 reranked", "1.000"), ("INTRA", "1.000")
    ]  # fmt: skip
    assert figures.three_sets([record for record in whole.records if record["method"] != "maxsim"], 5) is None


def test_labels_are_moved_apart_and_stay_within() -> None:
    placed = figures._apart([5.0, 5.0, 6.0, 90.0, 99.0, 100.0], 10, 0, 100)
    assert all(b - a >= 10 - 1e-9 for a, b in itertools.pairwise(placed))
    assert placed[0] >= 0
    assert placed[-1] <= 100
    assert figures._apart([50.0], 10, 0, 100) == [50.0]


@pytest.mark.parametrize(
    ("value", "text"),
    [(2.0, "2 s"), (0.0123, "12.3 ms"), (4.5e-5, "45 µs"), (59.4, "59.4 s"), (123.0, "2.05 min"), (2283.3, "38.1 min"), (9000.0, "2.5 h")],
)
def test_times_in_units(value: float, text: str) -> None:
    assert figures.seconds(value) == text


@pytest.mark.parametrize(("value", "text"), [(999.4, "999"), (999.7, "1 thousand"), (3.78e11, "378 billion")])
def test_operations_in_words(value: float, text: str) -> None:
    assert report._scaled(value, report.UNITS) == text
