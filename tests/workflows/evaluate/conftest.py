"""One tiny backbone and one evaluated run, for all tests of evaluate."""

from __future__ import annotations

from pathlib import Path

import pytest

from intra import config as configuration
from intra.backbone import tiny
from intra.config import Config
from workflows import evaluate, prepare

from .runs import ARCHITECTURE, make_store_and_retriever, settings


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from intra.data import synthetic

    folder = tmp_path_factory.mktemp("tiny")
    passages, _ = synthetic.generate(configuration.SyntheticConfig(chunks=60, train_questions=5, test_questions=5), 0)
    tokenizer = tiny.train_tokenizer([passage.text for passage in passages], ARCHITECTURE)
    tiny.save(tiny.build(ARCHITECTURE, tokenizer, 0), tokenizer, folder)
    return folder


@pytest.fixture(scope="session")
def finished(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, str]:
    """An evaluated run, and what evaluate returned."""
    config = settings(tmp_path_factory.mktemp("run"), model)
    prepare.run(config)
    make_store_and_retriever(config)
    return config, evaluate.run(config)


@pytest.fixture(scope="session")
def ledger(model: Path) -> str:
    """One tracking store for the runs whose records no test looks at: making one takes seconds."""
    return f"sqlite:///{model}.db"
