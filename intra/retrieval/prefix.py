"""The decoder's keys and values of training questions over their S_0, kept between steps.

What the question and S_0 put into the decoder does not depend on the retrieval tokens, which stand behind them and which they
cannot see. So a question's pass up to its last prompt token is made once, without gradient, and a step runs the tokens alone over
what is kept: for question b and every layer the self keys and values [G, n_b, e] of its n_b prompt tokens, and the cross ones
[G, T_b, e] of the T_b states of its S_0 (G key-value heads, e = head_dim).

Measured with the quick start's backbone (16 tokens behind 16 of the prompt and 600 states, on one core): 2.5 MB a question, and a
micro-step of 92 ms takes 54. At the size of T5Gemma 2 4B it is about 1 GiB a question, far too much for many questions; and it saves
nothing where no question comes twice. So it is off unless `retriever.train.prefix_cache_mb` gives it room.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from intra.backbone.attention import capturing
from intra.retrieval.negatives import Example
from intra.retrieval.search import read_context

if TYPE_CHECKING:
    from intra.backbone.model import Backbone
    from intra.store.reader import ChunkStore


@dataclass(frozen=True, slots=True)
class Prefix:
    """Keys and values, stacked: `own` [2, L, G, n, e] of the prompt, `cross` [2, L, G, T, e] of S_0; the model's dtype and device."""

    own: Tensor
    cross: Tensor

    @property
    def bytes(self) -> int:
        return sum(part.numel() * part.element_size() for part in (self.own, self.cross))


class Prefixes:
    """`queries` is `Backbone.queries` for training examples; what does not fit into `megabytes` is computed each time.

    Each prefix is made by itself, not in a batch: a step's arithmetic does not depend on what is kept, and a run that was cut
    off, which comes back with nothing kept, gives the same bits. None is ever dropped for another: as every epoch shows every
    question once, the first that fit are worth as much as any.
    """

    def __init__(self, backbone: Backbone, store: ChunkStore, initial_context: int, megabytes: int) -> None:
        """Raises ValueError for a backbone that echoes the question: its pass has more before the tokens than the prompt."""
        if backbone.frozen_encoder:
            raise ValueError("a prefix holds the prompt alone")
        self.backbone, self.store, self.initial_context = backbone, store, initial_context
        self.room = megabytes * 2**20
        self._kept: dict[str, Prefix] = {}

    def queries(self, examples: Sequence[Example], tokens: Tensor) -> Tensor:
        """The decoder's queries at the retrieval tokens [R, d] behind each example's prompt: [B, L, H, R, e], gradient to `tokens`."""
        from transformers import DynamicCache, EncoderDecoderCache

        backbone, count, device = self.backbone, len(tokens), self.backbone.device
        prefixes = [self._prefix(item) for item in examples]
        # Prompts are padded on the left, so that distances within a sliding window are those of the prompt itself.
        own, seen = _batch([prefix.own for prefix in prefixes], left=True)
        cross, mask = _batch([prefix.cross for prefix in prefixes], left=False)
        past = EncoderDecoderCache(DynamicCache(), DynamicCache())
        for layer in range(backbone.layers):
            past.self_attention_cache.update(own[0, layer], own[1, layer], layer)
            past.cross_attention_cache.update(cross[0, layer], cross[1, layer], layer)
            past.is_updated[layer] = True  # the cross keys stand there: what is given as the encoder's states is not read
        lengths = seen.sum(dim=1, keepdim=True)
        embeddings = tokens.to(device, backbone.dtype).expand(len(prefixes), *tokens.shape)
        sink: dict[int, Tensor] = {}
        with capturing(backbone.model):
            backbone.model.get_decoder()(
                inputs_embeds=embeddings,
                attention_mask=torch.cat([seen, seen.new_ones(len(prefixes), count)], dim=1),
                position_ids=lengths + torch.arange(count, device=device),
                past_key_values=past,
                use_cache=True,
                encoder_hidden_states=embeddings.new_zeros(1, 1, 1).expand(*mask.shape, backbone.hidden_size),
                encoder_attention_mask=mask,
                query_sink=sink,
            )
        return torch.stack([sink[layer] for layer in range(backbone.layers)], dim=1)

    def _prefix(self, item: Example) -> Prefix:
        kept = self._kept.get(item.question_id)
        if kept is None:
            kept = self._make(item)
            if kept.bytes <= self.room:
                self.room -= kept.bytes
                self._kept[item.question_id] = kept
        return kept

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def _make(self, item: Example) -> Prefix:
        from transformers import DynamicCache, EncoderDecoderCache

        memory = read_context(self.backbone, self.store, [item.context], self.initial_context)
        states = memory.states if memory.states.shape[-1] else memory.states.new_zeros(1, 1, self.backbone.hidden_size)  # an empty S_0
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        self.backbone.model.get_decoder()(
            input_ids=torch.tensor(self.backbone.prompt_ids([item.question]), device=self.backbone.device),
            encoder_hidden_states=states, encoder_attention_mask=memory.mask, past_key_values=cache, use_cache=True,
        )  # fmt: skip
        # An empty S_0 leaves one masked state; without it the masks of a batch would hold it for seen.
        length = int(memory.mask.sum())
        return Prefix(_stacked(cache.self_attention_cache), _stacked(cache.cross_attention_cache)[..., :length, :])


def _stacked(cache: object) -> Tensor:
    layers = cache.layers  # type: ignore[attr-defined]
    return torch.stack([torch.stack([layer.keys[0] for layer in layers]), torch.stack([layer.values[0] for layer in layers])])


def _batch(parts: Sequence[Tensor], left: bool) -> tuple[Tensor, Tensor]:
    """[2, L, G, n_b, e] of each row -> [2, L, B, G, max(1, n), e], padded with zeros, and which are none: BoolTensor[B, max(1, n)]."""
    lengths = [part.shape[3] for part in parts]
    width = max(1, *lengths)
    first = parts[0]
    batch = first.new_zeros(2, first.shape[1], len(parts), first.shape[2], width, first.shape[4])
    mask = torch.zeros(len(parts), width, dtype=torch.bool, device=first.device)
    for row, (part, length) in enumerate(zip(parts, lengths, strict=True)):
        place = slice(width - length, width) if left else slice(0, length)
        batch[:, :, row, :, place] = part
        mask[row, place] = True
    return batch, mask
