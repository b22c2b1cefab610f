from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest

from intra.data.schema import Question
from intra.evaluation import report, results
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
        if tag not in {"meta", "line", "br"}:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_report_stands_alone_and_can_be_read_without_a_mouse(found: list[Record]) -> None:
    text = report.html(found, {"results": "abc", "seed": "0"}, {"root": "</pre><script>alert(1)</script>"})
    page = Page()
    page.feed(text)
    assert page.open == []
    assert not [tag for tag, _ in page.tags if tag in {"script", "link", "iframe", "object", "img"}]
    assert not [values for _, values in page.tags if {"src", "srcset"} & set(values)]
    assert not re.search(r"(https?:)?//|@import|url\(", text)
    ids = {values["id"] for _, values in page.tags if "id" in values}
    for tag, values in page.tags:
        if tag == "a":
            assert (values["href"] or "").removeprefix("#") in ids
        if tag == "th":
            assert values["scope"] in {"col", "row"}
        if tag == "svg":
            assert values.get("aria-hidden") or (values["role"] == "img" and values["aria-label"])
        if values.get("class") == "scroll":
            assert values["tabindex"] == "0"
            assert values["aria-label"]
    assert ("html", {"lang": "en"}) in page.tags
    assert "films &amp; towns" in text
    row = re.search(r'<th scope="row">intra</th><td>6</td>(.*?)</tr>', text, re.DOTALL)
    assert row
    assert re.findall(r"\d\.\d{3}(?= <span)", row[1]) == ["1.000", "1.000", "0.500", "0.833"]
    assert text.count("<polyline") == 2
