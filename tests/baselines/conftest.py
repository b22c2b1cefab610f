"""Tiny models of the baselines' classes, with random weights."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from intra.data.schema import POOL_SCHEMA, Pool, Question

WORDS = [
    *("the", "of", "and", "a", "is", "in", "by", "who", "where", "which", "was", "born", "film", "town", "river", "directed", "port"),
    *("large", "small", "red", "moon", "silver", "harbor", "carl", "dorn", "ada", "bell", "oldtown", "newport", "wend", "lies"),
    *("question", "passage", "instruct", "query"),
]


def make_pool(texts: Sequence[tuple[str, str]]) -> Pool:
    columns = {
        "chunk_id": [f"c{row:03d}" for row in range(len(texts))],
        "title": [title for title, _ in texts],
        "text": [text for _, text in texts],
        "source": ["test"] * len(texts),
        "n_tokens": [len(text.split()) for _, text in texts],
    }
    return Pool(pa.table(columns, schema=POOL_SCHEMA))


def sentences(count: int, seed: int, longest: int = 14) -> list[str]:
    import numpy as np

    generator = np.random.default_rng(seed)
    return [" ".join(generator.choice(WORDS, int(generator.integers(3, longest)))) for _ in range(count)]


@pytest.fixture(scope="session")
def pool() -> Pool:
    """70 chunks; the last ten copy the first ten."""
    texts = sentences(60, 1)
    return make_pool([("", text) for text in [*texts, *texts[:10]]])


@pytest.fixture(scope="session")
def questions() -> list[Question]:
    return [Question(f"q{n}", "test", "test", text, ("x",), (("c000",),), 1, "single") for n, text in enumerate(sentences(9, 2))]


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT encoder (as MiniLM, BGE), as transformers saves it."""
    return saved(tmp_path_factory.mktemp("bert"), "BertModel", "BertConfig", SIZES)


@pytest.fixture(scope="session")
def cross(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cross-encoder of XLM-RoBERTa's class (as Jina's reranker)."""
    sizes = {**SIZES, "num_labels": 1, "max_position_embeddings": 140}
    return saved(tmp_path_factory.mktemp("cross"), "XLMRobertaForSequenceClassification", "XLMRobertaConfig", sizes)


@pytest.fixture(scope="session")
def flash(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cross-encoder as Jina's reranker lies on the hub: XLM-RoBERTa in flash-attention's layout, and code, which must not run."""
    import torch
    from safetensors.torch import save_file

    folder = saved(tmp_path_factory.mktemp("flash"), "XLMRobertaForSequenceClassification", "XLMRobertaConfig", {**SIZES, "num_labels": 1})
    d, wide, layers = SIZES["hidden_size"], SIZES["intermediate_size"], SIZES["num_hidden_layers"]
    config = {
        **SIZES, "architectures": ["XLMRobertaForSequenceClassification"], "classifier_dropout": None, "emb_pooler": None,
        "hidden_act": "gelu", "layer_norm_eps": 1e-5, "num_labels": 1, "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0},
        "output_past": True, "max_position_embeddings": 130, "position_embedding_type": "absolute", "torch_dtype": "bfloat16",
        "transformers_version": "4.40.0", "type_vocab_size": 1, "use_cache": False, "use_flash_attn": True,
        "auto_map": {"AutoConfig": "own.Config", "AutoModelForSequenceClassification": "own.Model"},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(
        "from einops import rearrange\n"
        "from transformers.models.xlm_roberta.modeling_xlm_roberta import create_position_ids_from_input_ids\n"
    )
    names = json.loads((folder / "tokenizer_config.json").read_text()) | {"model_input_names": ["input_ids", "attention_mask"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    shapes = {
        **{f"roberta.embeddings.{name}_embeddings.weight": (count, d)
           for name, count in [("word", SIZES["vocab_size"]), ("position", 130), ("token_type", 1)]},
        "roberta.emb_ln": d, "classifier.dense": (d, d), "classifier.out_proj": (1, d),
        **{f"roberta.encoder.layers.{layer}.{name}": shape for layer in range(layers) for name, shape in
           [("mixer.Wqkv", (3 * d, d)), ("mixer.out_proj", (d, d)), ("norm1", d), ("mlp.fc1", (wide, d)), ("mlp.fc2", (d, wide)),
            ("norm2", d)]},
    }  # fmt: skip
    torch.manual_seed(0)
    weights = {}
    for name, shape in shapes.items():
        if name.endswith(".weight"):
            weights[name] = torch.randn(shape)
        else:
            weights[f"{name}.weight"] = torch.randn(shape) * (0.3 if isinstance(shape, tuple) else 1)
            weights[f"{name}.bias"] = torch.randn(shape[0] if isinstance(shape, tuple) else shape) * 0.3
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="session")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3 decoder (as Qwen3-Embedding), whose tokenizer pads on the left and ends a text with a token of its own."""
    sizes = {**SIZES, "num_key_value_heads": 1, "head_dim": 16}
    return saved(tmp_path_factory.mktemp("qwen"), "Qwen3Model", "Qwen3Config", sizes, "left")


@pytest.fixture(scope="session")
def colbert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A late-interaction model with a projection, as sentence-transformers saves one."""
    import torch
    from sentence_transformers import MultiVectorEncoder

    bare = saved(tmp_path_factory.mktemp("bare"), "BertModel", "BertConfig", SIZES)
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("colbert")
    MultiVectorEncoder(str(bare), device="cpu", prompts={"query": "question ", "document": "passage "}).save_pretrained(str(folder))
    return folder


SIZES: dict[str, Any] = {
    "vocab_size": len(WORDS) + 5, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48,
    "max_position_embeddings": 128, "pad_token_id": 0,
}  # fmt: skip


def saved(folder: Path, model: str, config: str, sizes: dict[str, Any], padding_side: str = "right") -> Path:
    """A model of transformers' class `model` with random weights, and a tokenizer of WORDS."""
    import torch
    import transformers
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate([*specials, *WORDS])}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]",
        padding_side=padding_side, model_max_length=128,
    ).save_pretrained(folder)  # fmt: skip
    torch.manual_seed(0)
    getattr(transformers, model)(getattr(transformers, config)(**sizes)).save_pretrained(folder)
    return folder
