"""Start, calibration, files, and what a retriever does not fit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from intra.backbone.model import Backbone
from intra.errors import UserError
from intra.retrieval.retriever import Retriever
from intra.retrieval.search import read_context

from .conftest import SCORINGS, MemoryStore, settings


def test_starts_the_same_for_one_seed_and_near_the_answer_position(backbone: Backbone) -> None:
    one, same, other = (Retriever.initialise(backbone, settings(backbone), seed) for seed in (1, 1, 2))
    assert torch.equal(one.tokens, same.tokens)
    assert not torch.equal(one.tokens, other.tokens)
    colon = backbone.model.get_decoder().embed_tokens(torch.tensor(backbone.prompt_ids(["who ?"])[0][-1:]))[0]
    assert torch.cosine_similarity(one.tokens, colon[None], dim=1).min() > 0.95
    assert len({tuple(row.tolist()) for row in one.tokens}) == len(one.tokens)


@pytest.mark.parametrize("kind", SCORINGS)
def test_calibration_spreads_the_components_by_about_one(kind: str, backbone: Backbone, store: MemoryStore) -> None:
    """Over the temperature."""
    retriever = Retriever.initialise(backbone, settings(backbone, scoring=kind, temperature=0.5), seed=1)
    prompts = backbone.prompt_ids(["where was ada born ?", "where was hugo born ?"])
    memory = read_context(backbone, store, [[1, 2], [3]], 4)  # type: ignore[arg-type]
    retriever.calibrate(backbone, prompts, memory, store.vectors)
    with torch.no_grad():
        components = retriever.scorer(backbone.queries(prompts, retriever.tokens, memory), backbone)(store.vectors)
    assert components.std(dim=2).mean().item() == pytest.approx(2.0, rel=1e-4)
    assert len(retriever.weights.unique()) == 1


def test_weights_start_as_the_backbone_says(backbone: Backbone, store: MemoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backbone, "matching_heads", 1)
    retriever = Retriever.initialise(backbone, settings(backbone), seed=1)
    prompts, memory = backbone.prompt_ids(["where was ada born ?"]), read_context(backbone, store, [[1, 2]], 4)  # type: ignore[arg-type]
    retriever.calibrate(backbone, prompts, memory, store.vectors)
    found = retriever.weights.detach()
    assert torch.allclose(found / found[:, :1], (backbone.head_shares() / backbone.head_shares()[0]).expand_as(found))
    assert float(found[0, -1] / found[0, 0]) == pytest.approx(0.1)


def test_saves_and_loads(retriever: Retriever, root: str) -> None:
    folder = f"{root}/retriever"
    retriever.save_pretrained(folder, run={"seed": 7})
    loaded = Retriever.from_pretrained(folder)
    assert loaded.settings == retriever.settings
    assert torch.equal(loaded.tokens, retriever.tokens)
    assert torch.equal(loaded.weights, retriever.weights)


def test_files_from_before_there_was_a_temperature_have_none(retriever: Retriever, tmp_path: Path) -> None:
    retriever.save_pretrained(str(tmp_path))
    values = json.loads((tmp_path / "config.json").read_text())
    del values["temperature"]
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert Retriever.from_pretrained(str(tmp_path)).settings.temperature == 1.0


@pytest.mark.parametrize("retriever", SCORINGS, indirect=True)
def test_the_card_says_what_is_not_the_papers(retriever: Retriever, tmp_path: Path) -> None:
    retriever.save_pretrained(str(tmp_path))
    card = (tmp_path / "README.md").read_text()
    assert ("not the paper's score" in card) == (retriever.settings.scoring != "per_head")
    assert Retriever.from_pretrained(str(tmp_path)).settings == retriever.settings


def test_card_and_run_are_kept(retriever: Retriever, tmp_path: Path) -> None:
    retriever.save_pretrained(str(tmp_path), run={"seed": 7})
    assert json.loads((tmp_path / "config.json").read_text())["run"] == {"seed": 7}
    assert "5 retrieval tokens" in (tmp_path / "README.md").read_text()


def test_missing_and_damaged_folders(retriever: Retriever, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no config\.json; run workflows/train\.py"):
        Retriever.from_pretrained(str(tmp_path / "nowhere"))
    retriever.save_pretrained(str(tmp_path))
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-10])
    with pytest.raises(UserError, match=r"model.safetensors: damaged"):
        Retriever.from_pretrained(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(whole)
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**values, "tokens": 6}))
    with pytest.raises(UserError, match=r"model.safetensors: damaged, or not of the shapes"):
        Retriever.from_pretrained(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({**values, "scoring": "sum"}))
    with pytest.raises(UserError, match=r"config.json: not the settings .* \(scoring 'sum' is none of per_head, mixture, mixed"):
        Retriever.from_pretrained(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config.json: not the settings"):
        Retriever.from_pretrained(str(tmp_path))
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"no model\.safetensors"):
        Retriever.from_pretrained(str(tmp_path))


def test_refuses_weights_that_are_not_numbers(retriever: Retriever, tmp_path: Path) -> None:
    with torch.no_grad():
        retriever.weights[0, 0] = float("nan")
    retriever.save_pretrained(str(tmp_path))
    with pytest.raises(UserError, match="not a finite number"):
        Retriever.from_pretrained(str(tmp_path))


@pytest.mark.parametrize("change", [{"layers": 3}, {"heads": 2}, {"hidden_size": 64}])
def test_refuses_another_backbone(backbone: Backbone, change: dict[str, int]) -> None:
    name = next(iter(change))
    with pytest.raises(UserError, match=f"backbone with {name} {change[name]}"):
        Retriever(settings(backbone, **change)).check(backbone)


def test_refuses_another_store(backbone: Backbone) -> None:
    with pytest.raises(UserError, match="pooled_length 3, this one has 7"):
        Retriever(settings(backbone)).check_store(backbone.hidden_size, 7)
