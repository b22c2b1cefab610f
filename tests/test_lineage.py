"""Which artifacts share a fingerprint, and which must not."""

from __future__ import annotations

from pathlib import Path

import pytest

from intra import lineage
from intra.config import Config, parse
from intra.errors import UserError
from workflows import encode, nightly, prepare, warmstart

from .conftest import make_bert, write_world


@pytest.fixture
def config(tmp_path: Path) -> Config:
    write_world(tmp_path / "data")
    encoder = make_bert(tmp_path / "bert", ["film", "director", "born"])
    size = {"encoder": str(encoder), "matching_heads": 3, "hidden_size": 48, "heads": 6, "kv_heads": 6, "head_dim": 24}
    data = {"source": "jsonl", "path": str(tmp_path / "data"), "passages": "passages.jsonl"}
    config = parse({"root": str(tmp_path / "root"), "data": data, "backbone": {"train": True, "architecture": size}})
    prepare.run(config)
    return config


def changed(config: Config, path: str, value: object) -> Config:
    values = config.model_dump()
    section = values
    *keys, last = path.split(".")
    for key in keys:
        section = section[key]
    section[last] = value
    return parse(values)


def trained(config: Config, weights: str | None = None, card: str = "") -> Config:
    """With the manifest of the backbone, which the names of what is made with it need."""
    backbone = lineage.backbone(config)
    backbone.finish({"sha256": {"model.safetensors": weights or backbone.fingerprint, "README.md": card}})
    return config


def test_decoders_over_one_frozen_encoder_share_its_store_and_nothing_that_they_read(config: Config) -> None:
    other = trained(changed(config, "backbone.warmstart.steps", 7))
    config = trained(config)
    assert lineage.backbone(config).fingerprint != lineage.backbone(other).fingerprint
    assert lineage.encoding(config) == lineage.encoding(other)
    assert lineage.store(config).fingerprint == lineage.store(other).fingerprint
    for artifact in (lineage.retriever, lambda each: lineage.answers(each, "bm25"), lambda each: lineage.ranking(each, "intra")):
        assert artifact(config).fingerprint != artifact(other).fingerprint
    assert lineage.ranking(config, "bm25").fingerprint == lineage.ranking(other, "bm25").fingerprint


def test_chunks_scored_again_make_another_ranking_of_the_same_retriever(config: Config) -> None:
    other = trained(changed(config, "retriever.search.rescore", 50))
    config = trained(config)
    assert lineage.retriever(config) == lineage.retriever(other)
    for name, same in (("intra", False), ("s0_reranked", False), ("maxsim", True), ("bm25", True)):
        assert (lineage.ranking(config, name) == lineage.ranking(other, name)) == same


def test_an_approximate_scorer_names_its_rule_in_the_ranking_and_an_exact_one_nothing(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained(config)

    def names(scorer: str) -> list[str]:
        return [lineage.ranking(changed(config, "retriever.search.scorer", scorer), name).fingerprint for name in ("intra", "maxsim")]

    scorers = ("exact", "head_space", "reverse", "int8", "cascade", "auto", "paper")
    before = {scorer: names(scorer) for scorer in scorers}
    assert before["exact"] == before["head_space"] == before["reverse"]
    assert len({intra for intra, _ in before.values()}) == 5
    coarse = changed(config, "retriever.search.coarse_candidates", 1000)
    differs = [
        name
        for name in scorers
        if lineage.ranking(changed(coarse, "retriever.search.scorer", name), "intra").fingerprint != before[name][0]
    ]
    assert differs == ["cascade", "auto"]
    monkeypatch.setattr(lineage, "SCANS", lineage.SCANS + 1)
    assert [scorer for scorer in scorers if names(scorer) != before[scorer]] == ["int8", "cascade", "auto"]
    assert {maxsim for _, maxsim in before.values()} == {names("cascade")[1]}


@pytest.mark.parametrize(
    ("path", "value", "same"),
    [
        ("retriever.train.steps", 7, True),
        ("retriever.initial_context", 9, True),
        ("backbone.warmstart.steps", 7, True),
        ("backbone.prompt", "Question: {question}\n", True),
        ("retriever.initial_scoring", "cosine", False),
        ("retriever.pooled_length", 3, False),
        ("backbone.dtype", "bfloat16", False),
    ],
)
def test_s_0_is_named_by_the_states_and_how_they_are_compared(config: Config, path: str, value: object, same: bool) -> None:
    """It asks by the question's encoder states: another retriever, or decoder over the same encoder, finds the same."""
    other = trained(changed(config, path, value))
    config = trained(config)
    assert lineage.retriever(config) != lineage.retriever(other)
    assert (lineage.ranking(config, "maxsim") == lineage.ranking(other, "maxsim")) == same
    assert lineage.ranking(config, "intra") != lineage.ranking(other, "intra")


def test_exact_scorers_share_a_ranking_in_float32_alone(config: Config) -> None:
    half = trained(changed(config, "backbone.dtype", "bfloat16"))
    for name, ours in (("intra", 2), ("s0_reranked", 2), ("maxsim", 1)):
        found = {lineage.ranking(changed(half, "retriever.search.scorer", scorer), name).fingerprint for scorer in ("exact", "reverse")}
        assert len(found) == ours


@pytest.mark.parametrize(("path", "value"), [("backbone.warmstart.gpus_per_worker", 1), ("store.dtype", "bfloat16")])
def test_what_shapes_no_weights_leaves_the_backbones_name(config: Config, path: str, value: object) -> None:
    """Nor does it matter whether a default is written out."""
    assert config.store.dtype == "bfloat16"
    assert lineage.backbone(config).fingerprint == lineage.backbone(changed(config, path, value)).fingerprint


def test_over_a_frozen_encoder_the_store_comes_before_the_backbone(config: Config) -> None:
    """The whitened encoder encodes, one for all decoders. What shapes the states that the warm start reads is part of the backbone."""
    other = changed(config, "backbone.warmstart.steps", 7)
    assert lineage.model(config) == lineage.model(other) == (lineage.whitened(config).url, None)
    assert lineage.backbone(config).fingerprint != lineage.backbone(changed(config, "store.dtype", "int8")).fingerprint
    larger = changed(config, "backbone.architecture.decoder_layers", 3)
    assert (lineage.model(larger), lineage.store(larger).url) == (lineage.model(config), lineage.store(config).url)
    assert nightly.steps(config) == ["prepare", "encode", "warmstart", "train", "evaluate"]
    with pytest.raises(UserError, match=r"store .* is missing .*workflows/encode\.py"):
        warmstart.run(config)
    assert "waits for the store" in warmstart.plan(config)[0]
    assert any("first the encoder is whitened, by 10,000 chunks" in line for line in encode.plan(config))


@pytest.mark.parametrize(("path", "value"), [("backbone.architecture.encoder_sample", 9), ("seed", 1), ("retriever.pooled_length", 3)])
def test_what_shapes_the_states_makes_another_store(config: Config, path: str, value: object) -> None:
    other = changed(config, path, value)
    if path == "seed":
        prepare.run(other)
    assert lineage.store(config).fingerprint != lineage.store(other).fingerprint


def test_another_encoder_makes_another_store(config: Config, tmp_path: Path) -> None:
    before = lineage.store(config).fingerprint
    weights = tmp_path / "bert" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert lineage.store(config).fingerprint != before


def test_without_a_frozen_encoder_the_backbone_names_the_store(tmp_path: Path) -> None:
    data = {"synthetic": {"chunks": 60, "train_questions": 5, "test_questions": 5}}
    config = parse({"root": str(tmp_path), "data": data, "backbone": {"train": True}})
    prepare.run(config)
    assert lineage.store(config).fingerprint != lineage.store(changed(config, "backbone.warmstart.steps", 7)).fingerprint


@pytest.mark.parametrize("frozen", [True, False])
def test_a_backbone_trained_again_to_other_weights_shares_nothing_that_it_made(config: Config, tmp_path: Path, frozen: bool) -> None:
    """Another machine may round otherwise: the recipe, and so the backbone's own name, is the same."""
    if not frozen:
        data = {"synthetic": {"chunks": 60, "train_questions": 5, "test_questions": 5}}
        config = parse({"root": str(tmp_path / "other"), "data": data, "backbone": {"train": True}})
        prepare.run(config)

    def names() -> dict[str, str]:
        methods = {name: lineage.ranking(config, name).fingerprint for name in ("intra", "s0_reranked", "maxsim", "bm25")}
        made = {"retriever": lineage.retriever, "results": lineage.results, "store": lineage.store, "backbone": lineage.backbone}
        return (
            methods
            | {name: artifact(config).fingerprint for name, artifact in made.items()}
            | {"answers": lineage.answers(config, "bm25").fingerprint}
        )

    with pytest.raises(UserError, match=r"backbone .* is missing .*workflows/warmstart\.py"):
        names()
    trained(config, "aa")
    before = names()
    trained(config, "aa", card="0c")
    assert names() == before
    trained(config, "bb")
    same = {"bm25", "store", "backbone"} | ({"maxsim"} if frozen else set())
    assert {name for name, mark in names().items() if mark == before[name]} == same
