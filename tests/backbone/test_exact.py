"""Queries and keys of the backbone against the unmodified model's own cross-attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput

from intra.backbone import attention
from intra.backbone.model import Backbone, pack

from .conftest import WINDOW, sentences

TOLERANCE = 1e-5  # of the largest logit, in float32


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def retrieval_tokens(backbone: Backbone, count: int = 5) -> Tensor:
    return torch.randn(count, backbone.hidden_size, generator=torch.Generator().manual_seed(2))


def prompts(backbone: Backbone) -> list[list[int]]:
    """Of different lengths, shorter and longer than the sliding window."""
    found = backbone.prompt_ids(["is", *sentences(4, seed=7)])
    assert len({len(ids) for ids in found}) > 2
    assert max(len(ids) for ids in found) > 2 * WINDOW
    return found


def groups(backbone: Backbone) -> list[list[Tensor]]:
    """Chunks for five questions: several, one, one that is short, several, none."""
    states = backbone.encode(backbone.tokenize(sentences(9, seed=5)))
    assert max(len(item) for item in states) > 2 * WINDOW
    return [states[:4], states[4:5], [states[5][:2]], states[6:9], []]


def scores(backbone: Backbone, queries: Tensor, states: Tensor) -> Tensor:
    """scaling * <query, key>: queries Tensor[layers, heads, R, head_dim], states Tensor[T, d] -> [layers, heads, R, T]."""
    keys = torch.stack([backbone.keys(states, layer) for layer in range(backbone.layers)])  # [layers, T, kv_heads, head_dim]
    keys = keys.repeat_interleave(backbone.heads // backbone.kv_heads, dim=2).transpose(1, 2)
    return backbone.scaling * torch.einsum("lhrd,lhtd->lhrt", queries, keys)


def decode(pristine: Any, ids: list[int], tokens: Tensor, states: Tensor, **kwargs: Any) -> Any:
    """The unmodified decoder over one unpadded row."""
    decoder = pristine.get_decoder()
    embeddings = torch.cat([decoder.embed_tokens(torch.tensor([ids]))[0], tokens])[None]
    with torch.no_grad():
        return decoder(inputs_embeds=embeddings, encoder_hidden_states=states[None], use_cache=False, **kwargs)


def rotated(vectors: Tensor, positions: Tensor, theta: float) -> Tensor:
    """RoPE by complex numbers, written apart from the model's."""
    half = vectors.shape[-1] // 2
    angles = positions[:, None].double() / theta ** (torch.arange(half).double() / half)
    turned = torch.complex(vectors[..., :half].double(), vectors[..., half:].double()) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([turned.real, turned.imag], -1)


def record_norms(pristine: Any) -> tuple[dict[tuple[int, str], list[Tensor]], list[Any]]:
    """What each decoder layer's q_norm and k_norm put out from now on, and the hooks to remove afterwards."""
    seen: dict[tuple[int, str], list[Tensor]] = {}
    hooks = []
    for index, layer in enumerate(pristine.get_decoder().layers):
        for name in ("q_norm", "k_norm"):
            outputs = seen.setdefault((index, name), [])
            hooks.append(getattr(layer.self_attn, name).register_forward_hook(lambda _m, _i, out, to=outputs: to.append(out)))
    return seen, hooks


def test_the_tiny_model_is_not_trivial(backbone: Backbone) -> None:
    assert backbone.heads == 2 * backbone.kv_heads
    assert set(backbone.model.config.decoder.layer_types) == {"sliding_attention", "full_attention"}
    assert set(backbone.model.config.encoder.text_config.layer_types) == {"sliding_attention", "full_attention"}
    assert backbone.model.config.decoder.sliding_window == WINDOW
    norms = [parameter for name, parameter in backbone.model.named_parameters() if "norm" in name]
    assert len(norms) > 40
    assert all(parameter.std() > 0.1 for parameter in norms)


@pytest.mark.parametrize("together", [True, False], ids=["one batch", "one by one"])
def test_logits_equal_the_models_own(backbone: Backbone, pristine: Any, together: bool) -> None:
    """By the attention weights: the logarithm of their ratios is the difference of logits, whatever shares the softmax."""
    tokens, ids, chunks = retrieval_tokens(backbone), prompts(backbone), groups(backbone)
    rows = range(len(ids))
    if together:
        queries = backbone.queries(ids, tokens, pack(chunks))
    else:
        queries = torch.cat([backbone.queries([ids[row]], tokens, pack([chunks[row]])) for row in rows])
    assert queries.shape == (len(ids), backbone.layers, backbone.heads, len(tokens), backbone.head_dim)
    for row in rows:
        if not chunks[row]:
            continue
        states = torch.cat(chunks[row])
        output = decode(pristine, ids[row], tokens, states, output_attentions=True)
        weights = torch.stack(output.cross_attentions)[:, 0, :, -len(tokens) :].log()
        assert weights.shape[-1] == len(states)
        found = scores(backbone, queries[row], states)
        scale = found.abs().max()
        difference = (weights - weights[..., :1]) - (found - found[..., :1])
        assert float(difference.abs().max() / scale) < TOLERANCE


def test_absolute_logits_by_the_models_own_norms(backbone: Backbone, pristine: Any) -> None:
    """By what q_norm and k_norm put out in the unmodified model, and rotary positions computed here; with and without memory."""
    tokens, ids, chunks = retrieval_tokens(backbone), prompts(backbone), groups(backbone)
    queries = backbone.queries(ids, tokens, pack(chunks))
    config = pristine.config.decoder
    for row, group in enumerate(chunks):
        states = torch.cat(group) if group else torch.randn(3, backbone.hidden_size)  # masked below: seen by nobody
        seen, hooks = record_norms(pristine)
        mask = torch.full((1, len(states)), bool(group))
        decode(pristine, ids[row], tokens, states, encoder_attention_mask=mask)
        for hook in hooks:
            hook.remove()
        positions = torch.arange(len(ids[row]), len(ids[row]) + len(tokens))
        expected = []
        for index in range(backbone.layers):
            query = seen[index, "q_norm"][0][0, :, -len(tokens) :]
            query = rotated(query, positions, config.rope_parameters[config.layer_types[index]]["rope_theta"])
            key = seen[index, "k_norm"][1][0].double()  # the second call is for the cross keys
            expected.append(
                torch.stack([query[head] @ key[head // 2].T * config.query_pre_attn_scalar**-0.5 for head in range(backbone.heads)])
            )
        found = scores(backbone, queries[row], states).double()
        assert relative(found, torch.stack(expected)) < TOLERANCE


def test_queries_do_not_depend_on_neighbours(backbone: Backbone) -> None:
    tokens, ids, chunks = retrieval_tokens(backbone), prompts(backbone), groups(backbone)
    batch = backbone.queries(ids, tokens, pack(chunks))
    for row in range(len(ids)):
        alone = backbone.queries([ids[row]], tokens, pack([chunks[row]]))
        assert relative(batch[row], alone[0]) < TOLERANCE
    order = [3, 0, 4]
    some = backbone.queries([ids[row] for row in order], tokens, pack([chunks[row] for row in order]))
    assert relative(some, batch[order]) < TOLERANCE


def test_queries_see_the_memory_the_prompt_and_earlier_tokens(backbone: Backbone) -> None:
    """What must not be lost: each of these changes the queries."""
    tokens, ids, chunks = retrieval_tokens(backbone), prompts(backbone)[:1], groups(backbone)
    base = backbone.queries(ids, tokens, pack([chunks[0]]))
    assert relative(backbone.queries(ids, tokens, pack([chunks[1]])), base) > 0.01
    assert relative(backbone.queries([[*ids[0][:-1], 9]], tokens, pack([chunks[0]])), base) > 0.01
    moved = backbone.queries(ids, tokens.roll(1, 0), pack([chunks[0]]))
    assert relative(moved[..., -1, :], base[..., -1, :]) > 0.01


def test_encode_does_not_depend_on_neighbours(backbone: Backbone, pristine: Any) -> None:
    texts = sentences(9, seed=5)
    ids = backbone.tokenize(texts)
    for states, row in zip(backbone.encode(ids), ids, strict=True):
        with torch.no_grad():
            expected = pristine.get_encoder()(input_ids=torch.tensor([row])).last_hidden_state[0]
        assert states.shape == expected.shape
        assert relative(states, expected) < TOLERANCE
        assert not states.requires_grad
    assert backbone.encode([]) == []
    with pytest.raises(ValueError, match="without tokens"):
        backbone.encode([ids[0], []])


def test_capturing_leaves_nothing_switched_on(backbone: Backbone) -> None:
    tokens, ids, chunks = retrieval_tokens(backbone), prompts(backbone)[:1], groups(backbone)
    memory = pack(chunks[:1])

    def logits() -> Tensor:
        outputs = BaseModelOutput(last_hidden_state=memory.states)
        with torch.no_grad():
            return backbone.model(encoder_outputs=outputs, attention_mask=memory.mask, decoder_input_ids=torch.tensor(ids)).logits

    before = logits()
    backbone.queries(ids, tokens, memory)
    assert backbone.model.get_decoder().config._attn_implementation == "sdpa"
    assert torch.equal(logits(), before)
    with attention.capturing(backbone.model):  # even inside, a call that brings no sink is the ordinary one, bit for bit
        assert backbone.model.get_decoder().config._attn_implementation == attention.NAME
        assert torch.equal(logits(), before)
    with pytest.raises(RuntimeError, match="stop"), attention.capturing(backbone.model):
        raise RuntimeError("stop")
    assert backbone.model.get_decoder().config._attn_implementation == "sdpa"
