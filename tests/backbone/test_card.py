"""The model card of a warm-started backbone: whose weights it is made of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from intra.artifact import Artifact
from intra.backbone import card
from intra.backbone.locate import QUICKSTART
from intra.config import parse

DATASET = Artifact("dataset", "unused", "0123456789abcdef", "prepare")
APACHE = {"license": "apache-2.0"}


@pytest.mark.parametrize(
    ("backbone", "expected"),
    [
        ({}, APACHE),
        ({"initial": "model"}, APACHE),
        ({"initial": "model", "model": "google/t5gemma-2-270m-270m"}, {"license": "gemma", "base_model": "google/t5gemma-2-270m-270m"}),
        ({"initial": "model", "model": "someone/some-model"}, {"license": "other", "base_model": "someone/some-model"}),
        ({"initial": "model", "model": "s3://bucket/model"}, {"license": "other"}),
        ({"initial": "model", "model": "here/model"}, {"license": "other"}),
        ({"architecture": {"encoder": "bert", "matching_heads": 0}}, {"license": "other"}),
    ],
)
def test_the_licence_is_that_of_the_weights_it_starts_from(
    backbone: dict[str, Any], expected: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("here/model").mkdir(parents=True)
    config = parse({"root": "unused", "backbone": {"train": True, **backbone}})
    text = card.card(config, DATASET, 1000, 60.0, {"total": 1.5}, {})
    found = yaml.safe_load(text.split("---\n")[1])
    assert found == {"library_name": "transformers", **expected, "tags": ["t5gemma2", "intra"]}


def test_the_shipped_backbones_card_is_as_written() -> None:
    head = (QUICKSTART / "README.md").read_text().split("---\n")[1]
    config = parse({"root": "unused", "backbone": {"train": True}})
    assert card.card(config, DATASET, 1000, 60.0, {}, {}).split("---\n")[1] == head


def test_the_command_names_the_seed() -> None:
    config = parse({"root": "unused", "seed": 7, "backbone": {"train": True}, "tracking": {"experiment": "quickstart"}})
    text = card.card(config, DATASET, 1000, 60.0, {"total": 1.5}, {})
    assert "`python workflows/warmstart.py --config configs/quickstart.yaml backbone.train=true seed=7`" in text
