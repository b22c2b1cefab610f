"""Any dataset as BEIR and back: the same bytes every time round."""

from __future__ import annotations

from pathlib import Path

import pytest

from intra import storage
from intra.artifact import Artifact
from intra.config import Config
from intra.data import export, pool, schema
from intra.data_config import DataConfig
from intra.errors import UserError
from tests.data.conftest import PASSAGES, QUESTIONS, make, write_lines
from tests.data.test_dataset import contents


def round_trip(config: Config, tmp_path: Path, out: str) -> None:
    """Prepares, exports, prepares from that, exports again: chunks, questions and files are the same."""
    made = [Artifact("dataset", str(tmp_path / name), "0" * 16, "prepare") for name in ("scratch", "first", "second")]
    pool.build(config, made[0])
    # From here on the tokenizer is given, as a released backbone's is: one trained anew would count other lengths.
    backbone = config.backbone.model_copy(update={"train": False, "model": made[0].path(pool.TOKENIZER)})
    config = config.model_copy(update={"backbone": backbone})
    pool.build(config, made[1])
    export.export(made[1].url, f"{out}/one")
    data = DataConfig.model_validate({"source": "beir", "path": f"{out}/one", "chunk_tokens": config.data.chunk_tokens})
    pool.build(config.model_copy(update={"data": data}), made[2])
    export.export(made[2].url, f"{out}/two")
    assert contents(f"{out}/one") == contents(f"{out}/two")
    assert {"corpus.jsonl", "queries.jsonl", "qrels/test.tsv", "qrels/train.tsv"} == set(contents(f"{out}/one"))
    for name in (schema.POOL, schema.QUESTIONS):
        assert contents(made[2].url)[name] == contents(made[1].url)[name]


def test_of_jsonl_with_pieces_and_equivalents(folder: Path, tmp_path: Path) -> None:
    odd = {"id": "p7", "title": 'A "quoted"\ttitle', "text": "Line\u2028separator, {text} and \\ and é."}
    write_lines(folder / "passages.b.jsonl", [*PASSAGES[3:], odd])
    extra = {
        **QUESTIONS[0],
        "id": "q7",
        "question": "Which?\nSecond line",
        "gold_ids": ["p4", "p7", "p5"],
        "gold_source": "own",
        "type": "x",
    }
    write_lines(folder / "questions" / "rivers.train.jsonl", [extra])
    round_trip(make(folder, tmp_path), tmp_path, str(tmp_path / "out"))


def test_of_beir_and_to_s3(beir_folder: Path, tmp_path: Path, s3_root: str) -> None:
    round_trip(make(beir_folder, tmp_path, source="beir"), tmp_path, s3_root)


def test_of_the_synthetic_world(tmp_path: Path) -> None:
    world = {"chunks": 90, "train_questions": 12, "test_questions": 6}
    round_trip(make(None, tmp_path, source="synthetic", synthetic=world, chunk_tokens=200), tmp_path, str(tmp_path / "out"))


def test_groups_that_the_judgements_do_not_name(beir_folder: Path, tmp_path: Path, artifact: Artifact) -> None:
    lines = [{"_id": f"q{n}", "text": "Who?", "metadata": {"answer": "a", "gold": [["p1"]]}} for n in (1, 2, 3)]
    write_lines(beir_folder / "queries.jsonl", lines)
    with pytest.raises(UserError, match=r"queries.jsonl:1: 'metadata.gold' must be lists of the passage ids that the qrels name"):
        pool.build(make(beir_folder, tmp_path, source="beir"), artifact)


def test_command_line(folder: Path, tmp_path: Path, artifact: Artifact, capsys: pytest.CaptureFixture[str]) -> None:
    pool.build(make(folder, tmp_path), artifact)
    out = str(tmp_path / "out")
    assert export.main([artifact.url, out]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    for arguments, found in (([artifact.url, out], "holds files already"), ([out, f"{out}2"], "is incomplete"), ([out], "usage: ")):
        assert export.main(arguments) == 2
        assert found in capsys.readouterr().err
    assert storage.names(f"{out}2") == []
