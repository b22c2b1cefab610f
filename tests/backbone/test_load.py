"""Loading: the round trip, its digests, and everything that can be wrong with a directory."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from intra import storage
from intra.backbone import model as backbone_model
from intra.backbone import tiny
from intra.backbone.model import Backbone, digest, load, load_tokenizer, pack, resolve, tokenizer_digest
from intra.errors import UserError

from .conftest import sentences


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def test_round_trip_is_byte_identical(folder: Path, backbone: Backbone, tmp_path: Path) -> None:
    again = tmp_path / "again"
    tiny.save(backbone.model, backbone.tokenizer, again)
    names = sorted(path.name for path in folder.iterdir())
    assert names == sorted(path.name for path in again.iterdir())
    for name in ("model.safetensors", "tokenizer.json", "generation_config.json"):
        assert (again / name).read_bytes() == (folder / name).read_bytes()
    assert digest(str(again)) == digest(str(load_and_save(again, tmp_path / "third")))
    assert not any("vision" in name or "projector" in name for name in load_file(again / "model.safetensors"))


def load_and_save(source: Path, target: Path) -> Path:
    loaded = load(str(source), device="cpu")
    tiny.save(loaded.model, loaded.tokenizer, target)
    return target


def test_load_is_frozen_text_only_and_leaves_the_random_state(folder: Path) -> None:
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    loaded = load(str(folder), device="cpu", prompt="Q {question} A")
    assert torch.equal(torch.rand(3), expected)
    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    assert loaded.model.get_encoder().vision_tower is None
    assert loaded.prompt == "Q {question} A"
    assert (loaded.layers, loaded.heads, loaded.kv_heads, loaded.head_dim, loaded.hidden_size) == (4, 4, 2, 16, 48)
    assert loaded.scaling == 0.25
    assert loaded.device.type == "cpu"


def test_bfloat16(folder: Path, backbone: Backbone) -> None:
    half = load(str(folder), dtype="bfloat16", device="cpu")
    assert {parameter.dtype for parameter in half.model.parameters()} == {torch.bfloat16}
    ids = half.tokenize(sentences(3))
    states = half.encode(ids)
    assert all(item.dtype == torch.bfloat16 for item in states)
    for item, exact in zip(states, backbone.encode(ids), strict=True):
        assert torch.nn.functional.cosine_similarity(item.float(), exact, dim=-1).min() > 0.99
    tokens = torch.randn(2, half.hidden_size, requires_grad=True)
    memory = pack([[item.float() for item in states], []])  # a float32 store is read by a bfloat16 model
    queries = half.queries(half.prompt_ids(["is", "where was ada born"]), tokens, memory)
    assert queries.dtype == torch.bfloat16
    queries.float().square().sum().backward()
    assert tokens.grad is not None
    assert tokens.grad.dtype == torch.float32
    assert half.keys(states[0].float(), 1).shape == (len(ids[0]), 2, 16)
    assert len(half.answer(half.prompt_ids(["is", "where"]), memory, 3)) == 2


def test_digests(copy: Path, folder: Path) -> None:
    assert digest(str(copy)) == digest(str(folder))
    assert tokenizer_digest(str(copy)) == tokenizer_digest(str(folder))
    before, words = digest(str(copy)), tokenizer_digest(str(copy))
    (copy / "README.md").write_text("a model card does not change the model")
    (copy / "manifest.json").write_text("{}")
    assert digest(str(copy)) == before
    weights = load_file(copy / "model.safetensors")
    name = next(name for name in weights if name.endswith("k_norm.weight"))
    weights[name][3] += 1e-6
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    assert digest(str(copy)) != before
    assert tokenizer_digest(str(copy)) == words
    (copy / "tokenizer_config.json").write_text((copy / "tokenizer_config.json").read_text() + " ")
    assert tokenizer_digest(str(copy)) != words


def test_a_folder_with_only_a_tokenizer(folder: Path, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folder / name, tmp_path / name)
    tokenizer = load_tokenizer(str(tmp_path))
    assert tokenizer("Ada Bell").input_ids == load_tokenizer(str(folder))("Ada Bell").input_ids
    with pytest.raises(UserError, match=r"no config\.json"):
        resolve(str(tmp_path))


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def rename_layer(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if name.endswith("layers.1.self_attn.q_norm.weight"))
    weights[name.replace("q_norm", "other")] = weights.pop(name)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def fewer_layers(folder: Path) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["decoder"]["num_hidden_layers"] = 2
    config["decoder"]["layer_types"] = config["decoder"]["layer_types"][:2]
    path.write_text(json.dumps(config))


def other_shape(folder: Path) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["decoder"]["intermediate_size"] = 32
    path.write_text(json.dumps(config))


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "gpt2": (
        lambda f: (f / "config.json").write_text('{"model_type": "gpt2"}'),
        r"found model_type 'gpt2'.*not a T5Gemma 2 encoder-decoder",
    ),
    "gemma": (lambda f: edit(f / "config.json", model_type="gemma3_text"), r"found model_type 'gemma3_text'.*T5Gemma 2"),
    "bert": (lambda f: edit(f / "config.json", model_type="bert"), r"found model_type 'bert'.*T5Gemma 2"),
    "no type": (lambda f: (f / "config.json").write_text("[]"), r"found model_type 'None'"),
    "no config": (lambda f: (f / "config.json").unlink(), r"no config\.json"),
    "config not JSON": (lambda f: (f / "config.json").write_text("{"), r"config\.json: not valid JSON"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), r"lacks the weights model\.safetensors"),
    "a shard missing": (
        lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-00002-of-00002.safetensors"}}'),
        r"lacks the weights model-00002-of-00002\.safetensors",
    ),
    "bad index": (lambda f: (f / "model.safetensors.index.json").write_text("{}"), "not a valid index"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "has no tokenizer"),
    "damaged tokenizer": (lambda f: cut(f / "tokenizer.json", 300), "tokenizer in .* cannot be read"),
    "tokenizer without bos": (lambda f: edit(f / "tokenizer_config.json", bos_token=None), "lacks a bos, eos or pad token"),
    "damaged weights": (lambda f: cut(f / "model.safetensors", 2000), "weights in .* cannot be read"),
    "empty weights": (lambda f: cut(f / "model.safetensors", 0), "weights in .* cannot be read"),
    "a weight missing": (rename_layer, "lack model.*q_norm.*1 in all"),
    "more layers than the config": (fewer_layers, r"hold more than config\.json names: model\.decoder\.layers\.2"),
    "another shape": (other_shape, "weights in .* cannot be read"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_directory_is_one_clear_line(case: str, copy: Path, capfd: pytest.CaptureFixture[str]) -> None:
    damage, message = BROKEN[case]
    damage(copy)
    with pytest.raises(UserError, match=message) as caught:
        load(str(copy), device="cpu")
    assert "\n" not in str(caught.value)
    assert str(copy) in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_a_tokenizer_larger_than_the_model(copy: Path) -> None:
    tokenizer = load_tokenizer(str(copy))
    tokenizer.add_tokens([f"new{number}" for number in range(5)])
    tokenizer.save_pretrained(copy)
    with pytest.raises(UserError, match="its tokenizer has"):
        load(str(copy), device="cpu")


def test_names_that_are_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    file.write_text("")
    for name, message in (
        (str(tmp_path / "none"), "no such directory"),
        ("nothing", "no such directory"),
        ("../a/b", "no such directory"),
        (str(file), "is a file"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            resolve(name)
        assert name in str(caught.value)
    monkeypatch.setattr("intra.backbone.locate.QUICKSTART", tmp_path / "none")
    with pytest.raises(UserError, match="quickstart"):
        digest("quickstart")


def test_settings_that_are_wrong(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for settings, message in (
        ({"device": "cuda"}, r"backbone\.device: found 'cuda'.*no GPU"),
        ({"device": "quantum"}, r"backbone\.device: found 'quantum'"),
        ({"dtype": "float8"}, r"backbone\.dtype: found 'float8'"),
    ):
        with pytest.raises(UserError, match=message):
            load(str(folder), **settings)
    assert load(str(folder)).device.type == "cpu"


def test_end_tokens_of_the_model_and_of_the_tokenizer(copy: Path) -> None:
    edit(copy / "generation_config.json", eos_token_id=[7, 1], do_sample=True, temperature=0.3, num_beams=4)
    settings = load(str(copy), device="cpu").model.generation_config
    assert settings.eos_token_id == [1, 7]
    assert not settings.do_sample
    assert settings.num_beams == 1


def test_s3(folder: Path, s3_root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    url = s3_root + "/model"
    with pytest.raises(UserError, match="no model files there"):
        resolve(url)
    storage.upload(folder, url)
    place = resolve(url)
    assert place.is_relative_to(tmp_path)
    assert digest(url) == digest(str(folder))
    assert tokenizer_digest(url + "/") == tokenizer_digest(str(folder))
    assert resolve(url) == place  # not fetched twice
    assert not list(place.parent.glob("*.partial"))
    storage.write_bytes(url + "/generation_config.json", (folder / "generation_config.json").read_bytes() + b" ")
    assert digest(url) != digest(str(folder))  # a change in the bucket is seen
    storage.write_bytes(url + "/config.json", b'{"model_type": "bert"}')
    with pytest.raises(UserError, match="'bert'"):
        backbone_model.load(url)


def test_of_those_that_want_a_backbone_on_s3_one_fetches_it(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each object once and by pieces, beside what a killed process left."""
    place, fetched = Path(f"{tmp_path}/tmp/intra-backbones-{os.getuid()}"), []
    place.parent.mkdir()
    names = sorted(path.name for path in folder.iterdir())

    def fetch(url: str, path: Path) -> None:
        fetched.append(url.rpartition("/")[2])
        path.parent.mkdir(exist_ok=True)
        time.sleep(0.05)
        shutil.copy(folder / fetched[-1], path)

    monkeypatch.setattr("tempfile.tempdir", str(place.parent))
    monkeypatch.setattr(storage, "names", lambda url: names)
    monkeypatch.setattr(storage, "stamp", lambda url: "stamp")
    monkeypatch.setattr(storage, "fetch", fetch)
    with ThreadPoolExecutor(4) as threads:  # a lock of its own for each, as for processes
        found = set(threads.map(resolve, ["s3://bucket/model"] * 4))
    assert len(found) == 1
    assert sorted(fetched) == names
    (target,) = found
    left = target.rename(f"{target}.partial") / "half.tmp"
    left.write_bytes(b"killed")
    assert resolve("s3://bucket/model") == target
    assert sorted(path.name for path in target.iterdir()) == names
    assert sorted(fetched) == sorted(2 * names)
    monkeypatch.setattr(storage, "fetch", lambda url, path: (fetch(url, path), 1 / 0))
    monkeypatch.setattr(storage, "stamp", lambda url: "another")
    with pytest.raises(ZeroDivisionError):
        resolve("s3://bucket/model")
    assert not list(place.glob("*.partial"))
