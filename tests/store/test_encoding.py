"""Of a frozen encoder: which changes leave the encoding of a store as it is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from intra import lineage
from intra.config import Config, parse, varied
from workflows import encode, prepare

from ..conftest import make_bert, write_world


@pytest.fixture
def config(tmp_path: Path) -> Config:
    write_world(tmp_path / "data")
    size = {
        "encoder": str(make_bert(tmp_path / "bert", ["film"])),
        "matching_heads": 3,
        "hidden_size": 48,
        "heads": 6,
        "kv_heads": 6,
        "head_dim": 24,
    }
    data = {"source": "jsonl", "path": str(tmp_path / "data"), "passages": "passages.jsonl"}
    made = parse({"root": str(tmp_path / "root"), "data": data, "backbone": {"train": True, "architecture": size}})
    prepare.run(made)
    return made


def test_another_question_leaves_the_encoding_and_another_passage_does_not(config: Config, tmp_path: Path) -> None:
    before = lineage.dataset(config), lineage.encoding(config), lineage.whitened(config), lineage.store(config)
    file = tmp_path / "data" / "questions" / "b.test.jsonl"
    lines = file.read_text().splitlines()
    file.write_text("\n".join([*lines, json.dumps({**json.loads(lines[0]), "id": "one-more", "question": "And which film?"})]))
    prepare.run(config)
    assert lineage.dataset(config) != before[0]
    assert (lineage.encoding(config), lineage.whitened(config), lineage.store(config)) == before[1:]
    pool = tmp_path / "data" / "passages.jsonl"
    pool.write_text(pool.read_text() + "\n" + json.dumps({"id": "one-more", "title": "A film", "text": "It is one more film."}))
    prepare.run(config)
    assert lineage.encoding(config) != before[1]


@pytest.mark.parametrize("change", ["backbone.warmstart.threads=3", "backbone.architecture.encoder_sample=9"])
def test_what_the_whitening_depends_on_makes_another_encoding(config: Config, change: str) -> None:
    other = varied(config, [change])
    assert lineage.encoding(other) != lineage.encoding(config)
    assert lineage.whitened(other) != lineage.whitened(config)


def test_without_the_dataset_the_plan_waits_for_it(config: Config, tmp_path: Path) -> None:
    (line,) = encode.plan(varied(config, [f"root={tmp_path}/elsewhere"]))
    assert line.startswith("encode: waits for the dataset")
