"""One whitened encoder for all decoders: what encodes, and what each warm start begins with."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from intra import lineage
from intra.backbone import adopted, locate, model, whitened
from intra.config import Config, parse
from intra.data.chunking import chunk_text
from intra.data.schema import read_pool
from workflows import prepare

from ..conftest import make_bert, write_world

SIZE = {"matching_heads": 3, "hidden_size": 48, "heads": 6, "kv_heads": 6, "head_dim": 24}


@pytest.fixture
def config(tmp_path: Path) -> Config:
    write_world(tmp_path / "data")
    encoder = make_bert(tmp_path / "bert", ["film", "director", "born"])
    data = {"source": "jsonl", "path": str(tmp_path / "data"), "passages": "passages.jsonl"}
    backbone = {"train": True, "architecture": {"encoder": str(encoder), **SIZE}}
    config = parse({"root": str(tmp_path / "root"), "data": data, "backbone": backbone})
    prepare.run(config)
    return config


def larger(config: Config) -> Config:
    values = config.model_dump()
    values["backbone"]["architecture"]["decoder_layers"] += 1
    return parse(values)


def test_a_start_is_the_backbone_as_it_is_built_in_one(config: Config) -> None:
    """Every weight, whichever decoder the encoder was whitened beside."""
    url = whitened.make(config)
    pool = read_pool(lineage.dataset(config).url)
    texts = [chunk_text(title, text, config.data.template) for title, text in zip(pool.titles, pool.texts, strict=True)]
    for each in (config, larger(config)):
        found = whitened.start(each)
        words = locate.load_tokenizer(lineage.dataset(config).path("tokenizer"))
        expected = dict(adopted.build(each.backbone.architecture, words, config.seed, texts).named_parameters())
        assert found.layers == each.backbone.architecture.decoder_layers
        assert {name for name, _ in found.model.named_parameters()} == set(expected)
        for name, parameter in found.model.named_parameters():
            assert torch.equal(parameter, expected[name]), name
    encoder = model.load(url, device="cpu")
    ids = encoder.tokenize(["the film was born", "director"])
    for one, other in zip(encoder.encode(ids), found.encode(ids), strict=True):
        assert torch.equal(one, other)
    assert sum(parameter.numel() for parameter in encoder.model.get_decoder().layers.parameters()) < 10_000


def test_it_is_made_once_and_again_where_it_was_deleted(config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    url = whitened.make(config)
    assert "is whitened by" in capsys.readouterr().err
    before = (Path(url) / "model.safetensors").read_bytes()
    assert whitened.make(larger(config)) == url
    assert not capsys.readouterr().err
    shutil.rmtree(url)
    assert whitened.make(config) == url
    assert (Path(url) / "model.safetensors").read_bytes() == before


def test_it_takes_the_threads_of_the_configuration(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    built, seen, before = adopted.build, [], torch.get_num_threads()
    monkeypatch.setattr(adopted, "build", lambda *arguments: seen.append(torch.get_num_threads()) or built(*arguments))
    values = config.model_dump()
    values["backbone"]["warmstart"]["threads"] = before + 1
    whitened.make(parse(values))
    assert (seen, torch.get_num_threads()) == ([before + 1], before)
