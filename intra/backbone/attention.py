"""Reads a decoder's queries through transformers' own extension points: no patched code, nothing left switched on.

A T5Gemma 2 decoder calls its attention function by name, and hands every keyword of the call on to it. So one name is
registered, for the function and for its masks (a name without masks would be silently unmasked); it is chosen for the
decoder alone and only inside `capturing`; and even there it does nothing but sdpa unless the call brings a `query_sink`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "intra_query_capture"


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    query_sink: dict[int, torch.Tensor] | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    if query_sink is not None:
        query_sink[module.layer_idx] = query
    output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    return output, None


@contextlib.contextmanager
def capturing(model: Any) -> Iterator[None]:
    """Within the block, `model.get_decoder()(..., query_sink=sink)` fills `sink[layer]` with that layer's queries.

    A query is Tensor[batch, heads, positions, head_dim], after q_norm and RoPE, before scaling, with its gradient. The
    decoder's attention implementation is put back afterwards.
    """
    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    before = model.get_decoder().config._attn_implementation
    model.set_attn_implementation({"decoder": NAME})
    try:
        yield
    finally:
        model.set_attn_implementation({"decoder": before})
