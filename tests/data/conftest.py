"""A small folder of questions and passages in each layout, for tests to change."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from intra import config as configuration
from intra.artifact import Artifact
from intra.config import Config
from intra.data.raw import OR_SKIP, REST

PASSAGES = [
    {"id": "p1", "title": "Lake Orla", "text": "Lake Orla lies north of the town of Brenn."},
    {"id": "p2", "title": "Brenn", "text": "Brenn is a town whose mayor is Ada Moss."},
    {"id": "p3", "title": "", "text": "Ada Moss was born in 1950."},
    {"id": "p4", "title": "Brenn (town)", "text": "Brenn, a town, has the mayor Ada Moss."},
    {"id": "p5", "title": "Tarn", "text": "Tarn is a river. " + "It runs past many small mills and farms. " * 20},
    {"id": "p6", "title": "Silo", "text": "A silo stores grain."},
]
QUESTIONS = [
    {"id": "q1", "question": "Who is mayor by Lake Orla?", "answers": ["Ada Moss"], "gold_ids": ["p1", "p2"], "hops": 2, "type": "bridge"},
    {"id": "q2", "question": "When was Ada Moss born?", "answers": ["1950"], "gold_ids": ["p3"], "hops": 1, "type": None},
    {"id": "q3", "question": "What is Tarn?", "answers": ["a river", "river"], "gold_ids": ["p5"], "hops": 1},
]  # fmt: skip


def write_lines(path: Path, records: Sequence[Any]) -> None:
    """JSONL, gzipped where the name ends in .gz; a str is written as it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = "".join((item if isinstance(item, str) else json.dumps(item)) + "\n" for item in records).encode()
    path.write_bytes(gzip.compress(data) if path.name.endswith(".gz") else data)


def bare(message: object) -> str:
    """What is said of a mistake, without what can be done instead or what it costs."""
    return str(message).removesuffix(f" ({OR_SKIP})").removesuffix(f" ({REST})")


def make(path: Path | str | None, root: Path | str, *, tokenizer: str = "byte_bpe", vocabulary: int = 300, **data: Any) -> Config:
    """A configuration whose backbone is made from scratch, so that the data alone decides the dataset."""
    return configuration.parse(
        {
            "root": str(root),
            "data": {"source": "jsonl", "path": path and str(path), "chunk_tokens": 48, **data},
            "backbone": {"train": True, "architecture": {"tokenizer": tokenizer, "vocabulary": vocabulary}},
        }
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The jsonl layout: two passage files, two benchmarks with both splits."""
    place = tmp_path / "input"
    write_lines(place / "passages.a.jsonl.gz", PASSAGES[:3])
    write_lines(place / "passages.b.jsonl", PASSAGES[3:])
    write_lines(place / "questions" / "lakes.train.jsonl.gz", QUESTIONS[:1])
    write_lines(place / "questions" / "lakes.test.jsonl", QUESTIONS[1:2])
    write_lines(place / "questions" / "rivers.test.jsonl", QUESTIONS[2:])
    write_lines(place / "equivalent_gold.jsonl", [["p2", "p4"]])
    return place


@pytest.fixture
def beir_folder(tmp_path: Path) -> Path:
    place = tmp_path / "brenn"
    write_lines(place / "corpus.jsonl", [{"_id": p["id"], "title": p["title"], "text": p["text"]} for p in PASSAGES])
    write_lines(
        place / "queries.jsonl",
        [
            {"_id": "q1", "text": "Who is mayor?", "metadata": {"answers": ["Ada Moss"], "hops": 3, "type": "bridge"}},
            {"_id": "q2", "text": "When was Ada Moss born?", "answers": ["1950"], "metadata": {}},
            {"_id": "q3", "text": "What is Tarn?", "metadata": {"answer": "river"}},
            {"_id": "unjudged", "text": "What else?"},
        ],
    )
    header = "query-id\tcorpus-id\tscore"
    write_lines(place / "qrels" / "train.tsv", [header, "q1\tp1\t1", "q1\tp2\t2", "q1\tp6\t0"])
    write_lines(place / "qrels" / "test.tsv", [header, "q2\tp3\t1", "q3\tp5\t1"])
    return place


@pytest.fixture
def artifact(tmp_path: Path) -> Artifact:
    return Artifact("dataset", str(tmp_path / "made"), "0" * 16, "prepare")
