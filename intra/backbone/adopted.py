"""A second family of backbones: an encoder from elsewhere, frozen, under a T5Gemma 2 decoder.

For real text where no released T5Gemma 2 can be had: a BERT (`backbone.architecture.encoder`, under its own name) encodes chunks and
questions, and a decoder of transformers' T5Gemma 2 class is trained to search and to read its states. The rest of INTRA stays as it is:
one encoding, the decoder's queries and keys, the answer from stored states. What differs:

    whitening   states leave the encoder as (h - mean) @ matrix of a sample of the corpus, a rotation behind it: a BERT's states share a few
                strong directions, and the decoder's heads are to see the others
    matching    the decoder starts as MaxSim, not at random: the first `architecture.matching_heads` heads of every layer are near the
                identity on equal parts of the state, in the slowest rotary pairs, where a position hardly turns it
    reading     the value and output matrices of the other heads begin near the identity too: what they look at, they copy. The attention
                loss trains them alone
    words       the decoder's embedding of a token is the encoder's state of that token by itself, scaled to unit spread
    echo        the retrieval pass reads, behind the prompt, the question's own encoder states; their queries retrieve beside those of the
                retrieval tokens, which stand on the mean of those states

A model directory of this family is a T5Gemma 2's with `frozen_encoder`, the BERT's configuration, in its config.json.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import BertConfig, BertModel, T5Gemma2Config, T5Gemma2ForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutput

from intra.backbone import locate, tiny
from intra.backbone.locate import FROZEN
from intra.backbone.model import Backbone, pool_all
from intra.config import ArchitectureConfig
from intra.errors import UserError
from intra.whitening import moments, whitening

SPECIAL = {"pad_token": "[PAD]", "bos_token": "[CLS]", "eos_token": "[SEP]", "unk_token": "[UNK]"}
NOISE = 0.1  # of the random weights that stay beside an identity
SAY = 0.3  # of a layer's attention, against what came in: it matches what it has read with what it asks for
MLP = 0.1
ROPE_THETA = 1e6  # half of a head's rotary pairs hardly turn within a thousand tokens
POOLED = 7  # vectors a chunk that the whitening is of
BATCH = 64  # chunks of a sample, or eight times as many tokens by themselves, encoded at once


class FrozenEncoder(torch.nn.Module):  # type: ignore[misc]
    """A BERT and the whitening of its states; called as a T5Gemma 2's encoder is."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.bert = BertModel(config, add_pooling_layer=False)
        self.whitening = torch.nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **kwargs: Any) -> BaseModelOutput:
        """input_ids, attention_mask: long [B, T]. last_hidden_state: [B, T, d]."""
        states = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return BaseModelOutput(last_hidden_state=self.whitening(states))


class Adopted(T5Gemma2ForConditionalGeneration):  # type: ignore[misc]
    """A T5Gemma 2 whose encoder is a FrozenEncoder; its output words are tied to the decoder's own embeddings."""

    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.out_proj.weight": "model.decoder.embed_tokens.weight"}

    def __init__(self, config: T5Gemma2Config) -> None:
        super().__init__(config)
        self.model.all_tied_weights_keys = {}  # of the encoder that goes
        self.model.encoder = FrozenEncoder(BertConfig(**getattr(config, FROZEN)))
        self.post_init()


def tokenizer(encoder: str) -> Any:
    """The encoder's own tokenizer, its first and last special token as <bos> and <eos>: a transformers fast tokenizer."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    path = locate.encoder_folder(encoder) / "tokenizer.json"
    try:
        words = Tokenizer.from_file(str(path))
    except Exception as error:  # the tokenizers library raises plain Exception on a damaged file
        raise UserError(f"{path}: cannot be read as a tokenizer ({locate.one_line(error)}); put a valid one there") from error
    absent = [token for token in SPECIAL.values() if words.token_to_id(token) is None]
    if absent:
        raise UserError(f"{path}: has no {absent[0]}; put the tokenizer of a BERT there")
    words.no_truncation()
    words.no_padding()
    return PreTrainedTokenizerFast(tokenizer_object=words, padding_side="right", clean_up_tokenization_spaces=False, **SPECIAL)


def positions(encoder: str) -> int:
    """The longest text the encoder reads, in tokens."""
    return int(BertConfig.from_pretrained(locate.encoder_folder(encoder)).max_position_embeddings)


def build(architecture: ArchitectureConfig, words: Any, seed: int, sample: Sequence[str]) -> Adopted:
    """The untrained backbone (fp32, CPU): `words` is the tokenizer, `sample` texts of the corpus, for the whitening.

    Without a sample the whitening stays at random, for weights that are read afterwards. The global random state is left as it was.
    Raises UserError: the encoder is no BERT, or of another width than `architecture.hidden_size`.
    """
    assert architecture.encoder is not None
    bert = _bert(architecture.encoder)
    width = bert.config.hidden_size
    if width != architecture.hidden_size:
        raise UserError(
            f"backbone.architecture.hidden_size: found {architecture.hidden_size}; the encoder '{architecture.encoder}' has {width}"
        )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model: Adopted = Adopted(_config(architecture, words, bert.config)).eval()
        model.get_encoder().bert.load_state_dict(bert.state_dict())
        if sample:
            backbone = Backbone(model, words)
            _whiten(backbone, sample)
            _name_words(backbone)
        _start(model, architecture)
    model.generation_config = tiny.greedy(words, [words.eos_token_id])
    return model


def least(architecture: ArchitectureConfig) -> ArchitectureConfig:
    """The least decoder over the same encoder, for a directory that is to encode alone."""
    small = {"decoder_layers": 1, "heads": 1, "kv_heads": 1, "head_dim": 2, "intermediate_size": 8, "matching_heads": 0}
    return architecture.model_copy(update=small)


def take(model: Adopted, other: Adopted) -> None:
    """Gives a model the whitened encoder of another, and its words."""
    model.get_encoder().load_state_dict(other.get_encoder().state_dict())
    model.get_decoder().embed_tokens.load_state_dict(other.get_decoder().embed_tokens.state_dict())


def freeze(model: Adopted) -> None:
    """What the warm start leaves as it is: the encoder, and the words, which are its states."""
    model.get_encoder().requires_grad_(False)
    model.get_decoder().embed_tokens.requires_grad_(False)


def _bert(place: str) -> BertModel:
    folder = locate.encoder_folder(place)
    with tiny.quiet():
        return BertModel.from_pretrained(
            folder, add_pooling_layer=False, dtype=torch.float32, attn_implementation="sdpa", use_safetensors=True, local_files_only=True
        ).eval()


def _config(architecture: ArchitectureConfig, words: Any, bert: BertConfig) -> T5Gemma2Config:
    made = tiny.config(architecture.model_copy(update={"encoder_layers": 1}), words)
    decoder = made.decoder
    decoder.layer_types = ["full_attention"] * architecture.decoder_layers
    decoder.rope_parameters = {kind: {"rope_type": "default", "rope_theta": ROPE_THETA} for kind in ("full_attention", "sliding_attention")}
    decoder.matching_heads = architecture.matching_heads
    values = bert.to_dict()
    setattr(made, FROZEN, {name: values[name] for name in (
        "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act",
        "max_position_embeddings", "type_vocab_size", "layer_norm_eps", "pad_token_id",
    )} | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0})  # fmt: skip
    return made


def _whiten(backbone: Backbone, sample: Sequence[str]) -> None:
    """The sample's pooled vectors to mean 0 and covariance 1; the rotation behind makes equal parts of a vector say equally much."""
    linear = backbone.model.get_encoder().whitening
    torch.nn.init.eye_(linear.weight)
    torch.nn.init.zeros_(linear.bias)
    texts = sorted(backbone.tokenize(sample), key=len)
    firsts = tqdm(range(0, len(texts), BATCH), desc="whitening", unit="batch", disable=None)
    batches = (backbone.encode(texts[first : first + BATCH]) for first in firsts)
    found = moments((pool_all(states, POOLED) for states in batches), linear.in_features)
    matrix = whitening(found.covariance())
    matrix = matrix @ torch.linalg.qr(torch.randn(matrix.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[0]
    # What the floor leaves of the weakest directions counts less than 1: all together are to have a mean square of 1.
    matrix /= (matrix.T @ found.covariance() @ matrix).trace().div(len(matrix)).sqrt()
    linear.weight.copy_(matrix.T)
    linear.bias.copy_(-(found.mean @ matrix))


def _name_words(backbone: Backbone) -> None:
    """The embedding of each token: its whitened state between <bos> and <eos>, of unit spread, as logits are its products."""
    words, embedding = backbone.tokenizer, backbone.model.get_decoder().embed_tokens
    for first in range(0, len(words), 8 * BATCH):
        tokens = range(first, min(first + 8 * BATCH, len(words)))
        alone = backbone.encode([[words.bos_token_id, token, words.eos_token_id] for token in tokens])
        states = torch.stack([each[1] for each in alone])
        embedding.weight[first : first + len(tokens)] = states / (states.square().mean(dim=1, keepdim=True).sqrt() * embedding.embed_scale)


def _start(model: Adopted, architecture: ArchitectureConfig) -> None:
    """Puts identities into the decoder's attention: matching heads into query, key, value and output, the others into value and output."""
    matching, heads, head_dim, width = architecture.matching_heads, architecture.heads, architecture.head_dim, architecture.hidden_size
    half = head_dim // 2
    part = width // matching if matching else 0
    # Rotary position turns dimension j with j + half, the slower the larger j.
    slow = [*range(half - part // 2, half), *range(head_dim - part // 2, head_dim)]
    copied = min(head_dim, width // (heads - matching))
    for layer in model.get_decoder().layers:
        attention = layer.self_attn
        own = slice(0, matching * head_dim)
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
            projection.weight[own] *= NOISE
        attention.v_proj.weight[matching * head_dim :] *= NOISE
        attention.o_proj.weight *= NOISE
        for head, (place, dimension) in itertools.product(range(matching), enumerate(slow)):
            row, column = head * head_dim + dimension, head * part + place
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
                projection.weight[row, column] += 1
            attention.o_proj.weight[column, row] += 1
        for head, place in itertools.product(range(heads - matching), range(copied)):
            row, column = (matching + head) * head_dim + place, head * copied + place
            attention.v_proj.weight[row, column] += 1
            attention.o_proj.weight[column, row] += 1
        layer.post_self_attn_layernorm.weight.fill_(SAY - 1)
        layer.post_feedforward_layernorm.weight.fill_(MLP - 1)
