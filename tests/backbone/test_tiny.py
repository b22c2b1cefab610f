"""The tokenizers and the random model of a backbone from scratch."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
import torch

from intra.backbone import tiny
from intra.backbone.model import load_tokenizer, token_ids
from intra.config import ArchitectureConfig
from intra.errors import UserError

from .conftest import ARCHITECTURE, sentences

TEXTS = [
    "Ada O'Neil-Bell founded Red Moon in 1,912.",
    "The company's seat is São Tomé; it earned $3.5 million (2001).",
    "Straße, naïve, 東京 and 🙂 are not lost.\n\tNor  are spaces.",
]
BYTES = ArchitectureConfig(vocabulary=400, tokenizer="byte_bpe")


def fingerprint(tokenizer: Any) -> str:
    return hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()


@pytest.mark.parametrize("architecture", [ARCHITECTURE, BYTES], ids=["word", "byte_bpe"])
def test_both_kinds(architecture: ArchitectureConfig, tmp_path: Any) -> None:
    texts = TEXTS + sentences(300)
    tokenizer = tiny.train_tokenizer(iter(texts), architecture)
    assert fingerprint(tokenizer) == fingerprint(tiny.train_tokenizer(texts, architecture))
    assert len(tokenizer) <= architecture.vocabulary
    assert tokenizer.convert_tokens_to_ids(["<pad>", "<eos>", "<bos>", "<unk>"]) == [0, 1, 2, 3]
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.unk_token_id) == (0, 1, 2, 3)
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    for text in TEXTS:
        ids = token_ids(tokenizer, [text])[0]
        assert ids[0] == 2
        assert 2 not in ids[1:]
        assert 1 not in ids
        assert token_ids(loaded, [text]) == [ids]
        assert loaded.decode(ids, skip_special_tokens=True) == tokenizer.decode(ids, skip_special_tokens=True)


def test_byte_bpe_gives_the_text_back() -> None:
    tokenizer = tiny.train_tokenizer(sentences(50), BYTES)  # never saw a byte of these
    for text in [*TEXTS, "", " ", "<eos> is only text", "a  b\n"]:
        ids = token_ids(tokenizer, [text], special=False)[0]
        assert tokenizer.decode(ids) == text
        assert tokenizer.unk_token_id not in ids
    learned = tiny.train_tokenizer(sentences(300), BYTES)
    assert len(token_ids(learned, [" oldtown"], special=False)[0]) == 1


def test_word_gives_words_with_single_spaces() -> None:
    tokenizer = tiny.train_tokenizer([*TEXTS, "well-known"], ArchitectureConfig(vocabulary=200))
    for text, expected in (
        ("Ada  O'Neil-Bell", "ada o'neil-bell"),
        ("the company's seat", "the company 's seat"),
        ("$3.5 million (2001).", "$ 3.5 million ( 2001 ) ."),
        ("1,912.", "1,912 ."),
        ("São\nTomé;", "são tomé ;"),
        ("Moon, Moon", "moon , moon"),
    ):
        assert tokenizer.decode(token_ids(tokenizer, [text])[0], skip_special_tokens=True) == expected
    assert token_ids(tokenizer, ["Zebra"], special=False) == [[3]]
    assert 3 not in token_ids(tokenizer, ["Question: Answer:"])[0]  # the prompt's words are always known


def test_the_most_frequent_words_stay() -> None:
    texts = ["zz yy xx"] * 5 + ["yy xx"] * 5 + [f"w{number}" for number in range(200)]
    tokenizer = tiny.train_tokenizer(texts, ArchitectureConfig(vocabulary=64))
    assert len(tokenizer) == 64
    assert tokenizer.convert_tokens_to_ids(["xx", "yy", "zz"]) == [4, 5, 6]  # by count, ties in alphabetical order


def test_a_large_corpus_is_thinned_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [f"{number:04d} text" for number in range(400)]  # 9 bytes each
    assert list(tiny._thinned(texts, 1000)) == texts[::4]
    assert list(tiny._thinned(texts, 3600)) == texts
    assert list(tiny._thinned([], 1000)) == []
    whole = fingerprint(tiny.train_tokenizer(sentences(400), BYTES))
    monkeypatch.setattr(tiny, "BPE_SAMPLE_BYTES", 1000)
    thinned = fingerprint(tiny.train_tokenizer(sentences(400), BYTES))
    assert thinned != whole
    assert thinned == fingerprint(tiny.train_tokenizer(sentences(400), BYTES))


def test_a_vocabulary_too_small_for_bytes() -> None:
    with pytest.raises(UserError, match=r"vocabulary: found 100.*at least 260"):
        tiny.train_tokenizer(["a"], ArchitectureConfig(vocabulary=100, tokenizer="byte_bpe"))


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_weights_follow_the_seed_alone(tokenizer: Any) -> None:
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    one = weights(tiny.build(ARCHITECTURE, tokenizer, 0))
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(2)
    two, other = weights(tiny.build(ARCHITECTURE, tokenizer, 0)), weights(tiny.build(ARCHITECTURE, tokenizer, 1))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)


def test_the_default_architecture(tokenizer: Any) -> None:
    architecture = ArchitectureConfig()
    texts = [f"word{number}" for number in range(2000)]
    model = tiny.build(architecture, tiny.train_tokenizer(texts, architecture), 0)
    assert 0.8e6 < sum(parameter.numel() for parameter in model.parameters()) < 1.2e6
    config = model.config.decoder
    assert config.query_pre_attn_scalar == config.head_dim == 32
    assert config.layer_types == ["sliding_attention", "full_attention"] * 2
    assert model.config.encoder.text_config.layer_types == ["sliding_attention", "full_attention"]
    assert config.sliding_window == model.config.encoder.text_config.sliding_window == 64
    embedding = model.get_encoder().get_input_embeddings().weight
    assert model.lm_head.out_proj.weight is embedding
    assert model.get_decoder().embed_tokens.weight is embedding
    assert tiny._layer_types(1) == ["full_attention"]
    assert not any("vision" in name or "projector" in name for name, _ in model.named_parameters())


def test_sizes_that_cannot_be_built(tokenizer: Any) -> None:
    with pytest.raises(UserError, match="hidden_size: found 50, not a multiple of heads"):
        tiny.build(ARCHITECTURE.model_copy(update={"hidden_size": 50}), tokenizer, 0)
    with pytest.raises(UserError, match="head_dim: found 7"):
        tiny.build(ARCHITECTURE.model_copy(update={"head_dim": 7}), tokenizer, 0)
