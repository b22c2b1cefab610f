"""The frozen encoder-decoder: encodes chunks, gives the decoder's queries and keys, answers from stored states.

    backbone = load("quickstart")
    states = backbone.encode(backbone.tokenize(["Ada Bell was born in Oldtown."]))
    memory = pack([states], backbone.device, backbone.dtype)
    backbone.answer(backbone.prompt_ids(["Where was Ada Bell born?"]), memory, 8)

The model is transformers' T5Gemma 2, unmodified, or its decoder over a frozen encoder from elsewhere (intra.backbone.adopted). Its
cross-attention logit of head h, layer l, for an encoder state v is `scaling * <query[l, h], keys(v, l)[h // (heads // kv_heads)]>`: keys
carry no position, so neither the order of packed chunks nor their number of neighbours enters it.
"""

from __future__ import annotations

import copy
import functools
import itertools
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from intra.backbone.attention import capturing
from intra.backbone.locate import FROZEN, digest, load_tokenizer, one_line, resolve, token_ids, tokenizer_digest
from intra.backbone.tiny import drop_vision, greedy, quiet
from intra.config import BackboneConfig
from intra.errors import UserError

__all__ = ["Backbone", "Memory", "digest", "load", "load_tokenizer", "pack", "pool", "pool_all", "resolve", "tokenizer_digest"]

OTHERS = 0.1  # of the head weights that retrieval starts from: of a head that does not match, where others do
PROMPT: str = BackboneConfig.model_fields["prompt"].default


class Memory(NamedTuple):
    """What the decoder attends to: the packed states of one group of chunks per row.

    states: Tensor[B, T, d] of the model's dtype; mask: BoolTensor[B, T], False where there is no state. T >= 1.
    """

    states: Tensor
    mask: Tensor


def pack(groups: Sequence[Sequence[Tensor]], device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Memory:
    """Packs each group's chunk states (Tensor[n, d] each) side by side, one row per group, padded on the right.

    A group without chunks becomes one masked zero vector: a memory of length zero would crash the model. When every group
    is empty the width d is unknown and left at 0; the Backbone's methods widen it.
    """
    if not groups:
        raise ValueError("pack: no groups")
    first = next((states for group in groups for states in group), torch.zeros(1, 0))
    lengths = [sum(states.shape[0] for states in group) for group in groups]
    # Put together where the states are, then moved in one piece.
    packed = torch.zeros(len(groups), max(1, *lengths), first.shape[-1], dtype=dtype, device=first.device)
    for row, group in enumerate(groups):
        start = 0
        for states in group:
            packed[row, start : start + states.shape[0]] = states
            start += states.shape[0]
    mask = torch.arange(packed.shape[1])[None, :] < torch.tensor(lengths)[:, None]
    return Memory(packed.to(device), mask.to(device))


def pool(states: Tensor, length: int) -> Tensor:
    """Mean-pools the states of a chunk into a fixed number of vectors (paper section 3.3).

    Vector i is the mean of the states [floor(i n / length), floor((i + 1) n / length)): contiguous segments whose sizes
    differ by at most one. A chunk shorter than `length` has empty segments; there vector i is the single state
    floor(i n / length), so states repeat, in order, and each occurs at least once (a maximum over them is unchanged).

    states: Tensor[n, d], n >= 1. Returns Tensor[length, d] of the same dtype; the mean is taken in float32.
    """
    n = states.shape[0]
    if n == 0 or length < 1:
        raise ValueError(f"pool: {n} states into {length} vectors")
    bounds = [index * n // length for index in range(length + 1)]
    segments = [states[start : max(start + 1, end)].float().mean(0) for start, end in itertools.pairwise(bounds)]
    return torch.stack(segments).to(states.dtype)


def pool_all(states: Sequence[Tensor], length: int) -> Tensor:
    """`pool` of each: Tensor[len(states), length, d]."""
    return torch.stack([pool(item, length) for item in states])


class Backbone:
    """A T5Gemma 2 with its tokenizer. `load` gives it frozen; nothing here changes its weights.

    Attributes: model, tokenizer, device, prompt; layers, heads, kv_heads, head_dim, hidden_size (the decoder's);
    scaling (float, query_pre_attn_scalar ** -0.5); frozen_encoder (bool: of intra.backbone.adopted; the retrieval pass echoes the question,
    reads its encoder states behind the prompt, whose queries retrieve too); matching_heads (of that family: those the attention loss
    leaves alone).
    """

    def __init__(self, model: Any, tokenizer: Any, prompt: str = PROMPT) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.prompt = prompt
        config = model.config.decoder
        self.layers: int = config.num_hidden_layers
        self.heads: int = config.num_attention_heads
        self.kv_heads: int = config.num_key_value_heads
        self.head_dim: int = config.head_dim
        self.hidden_size: int = config.hidden_size
        self.scaling: float = config.query_pre_attn_scalar**-0.5
        self.frozen_encoder = hasattr(model.config, FROZEN)
        self.matching_heads: int = getattr(config, "matching_heads", 0)

    @property
    def device(self) -> torch.device:
        return self.model.device

    def head_shares(self) -> Tensor:
        """What the weights of a layer's heads are to start from, beside one another: float32 [heads], their mean square 1.

        Equal; but where some began as MaxSim (`matching_heads`), the others say little of a chunk before they are trained.
        """
        shares = torch.ones(self.heads)
        if self.matching_heads:
            shares[self.matching_heads :] = OTHERS
        return shares / shares.square().mean().sqrt()

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    def pack(self, groups: Sequence[Sequence[Tensor]]) -> Memory:
        """`pack` for this model's device and dtype."""
        return pack(groups, self.device, self.dtype)

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Encoder input: the ids of each text with the tokenizer's special tokens; nothing is cut."""
        return self._ids(texts, special=True)

    def prompt_ids(self, questions: Sequence[str]) -> list[list[int]]:
        """Decoder input: <bos> and the prompt with each question in it; no end token."""
        texts = [self.prompt.replace("{question}", question) for question in questions]
        return [[self.tokenizer.bos_token_id, *ids] for ids in self._ids(texts, special=False)]

    def answer_ids(self, answers: Sequence[str]) -> list[list[int]]:
        """What the decoder is to write after the prompt: a space, the answer, <eos>. For training it to."""
        return [[*ids, self.tokenizer.eos_token_id] for ids in self._ids([" " + answer.strip() for answer in answers], special=False)]

    def _ids(self, texts: Sequence[str], special: bool) -> list[list[int]]:
        return token_ids(self.tokenizer, texts, special)

    def states(self, token_ids: Sequence[Sequence[int]]) -> Memory:
        """The encoder's output for one right-padded batch, each text by itself: Tensor[B, T, d] and its mask.

        Gradient flows if the weights want it.
        """
        if not all(token_ids):
            raise ValueError("a text without tokens cannot be encoded")
        lengths = torch.tensor([len(ids) for ids in token_ids])
        padded = torch.full((len(token_ids), int(lengths.max())), self.tokenizer.pad_token_id)
        for row, ids in enumerate(token_ids):
            padded[row, : len(ids)] = torch.tensor(ids)
        mask = (torch.arange(padded.shape[1])[None, :] < lengths[:, None]).to(self.device)
        output = self.model.get_encoder()(input_ids=padded.to(self.device), attention_mask=mask)
        return Memory(output.last_hidden_state, mask)

    def encode(self, token_ids: Sequence[Sequence[int]]) -> list[Tensor]:
        """The states of each text, Tensor[n_i, d] of the model's dtype on its device; one padded batch, no gradient."""
        if not token_ids:
            return []
        with torch.no_grad():
            states, _ = self.states(token_ids)
        return [states[row, : len(ids)].clone() for row, ids in enumerate(token_ids)]

    def echo_ids(self, prompt_ids: Sequence[Sequence[int]]) -> list[list[int]]:
        """Encoder input of each prompt's question: <bos>, what stands for {question}, <eos>."""
        before, behind = self._around
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        return [[bos, *ids[1 + before : len(ids) - behind], eos] for ids in prompt_ids]

    @functools.cached_property
    def _around(self) -> tuple[int, int]:
        """The prompt's tokens before and behind the question."""
        before, behind = self._ids(self.prompt.split("{question}", 1), special=False)
        return len(before), len(behind)

    def queries(self, prompt_ids: Sequence[Sequence[int]], tokens: Tensor, memory: Memory) -> Tensor:
        """The decoder's queries at the retrieval tokens, which follow each row's own last prompt token (paper section 3.2).

        prompt_ids: B lists; tokens: Tensor[R, d], taken as embeddings are after their scaling; memory: B rows. Returns
        Tensor[B, layers, heads, R, head_dim] of the model's dtype, after q_norm and RoPE, not scaled. The gradient flows to
        `tokens`. Rows are padded on the right, where causal attention cannot look: neighbours do not change a row.

        With `echo` the question's encoder states stand between prompt and tokens, to each of which their mean is added; the result has
        R + E queries: those of the tokens, then those of the E states of the longest question, zero where a question has fewer.
        """
        decoder, count = self.model.get_decoder(), len(tokens)
        tokens = tokens.to(self.device, self.dtype)
        inputs, read = [], []
        for ids, echo in zip(prompt_ids, self._echoes(prompt_ids), strict=True):
            prompt = decoder.embed_tokens(torch.tensor(ids, device=self.device))
            inputs.append(torch.cat([prompt, echo, tokens + echo.mean(dim=0) if len(echo) else tokens]))
            first = len(ids) + len(echo)
            read.append([*range(first, first + count), *range(len(ids), first)])
        widest = max(len(places) for places in read)
        columns = torch.tensor([[*places, *[0] * (widest - len(places))] for places in read], device=self.device)
        rows = torch.arange(len(read), device=self.device)[:, None]
        memory = self._ready(memory)
        sink: dict[int, Tensor] = {}
        with capturing(self.model):
            decoder(
                inputs_embeds=pad_sequence(inputs, batch_first=True), encoder_hidden_states=memory.states,
                encoder_attention_mask=memory.mask, use_cache=False, query_sink=sink,
            )  # fmt: skip
        found = torch.stack([sink[layer].transpose(1, 2)[rows, columns].transpose(1, 2) for layer in range(self.layers)], dim=1)
        if widest > count:
            spoken = torch.arange(widest)[None, :] < torch.tensor([len(places) for places in read])[:, None]
            found = found * spoken[:, None, None, :, None].to(found)
        return found

    def _echoes(self, prompt_ids: Sequence[Sequence[int]]) -> list[Tensor]:
        """The encoder's states of each prompt's question, between <bos> and <eos>: [n, d]; n = 0 where nothing is echoed."""
        if not self.frozen_encoder:
            return [torch.zeros(0, self.hidden_size, dtype=self.dtype, device=self.device)] * len(prompt_ids)
        return [states[1:-1] for states in self.encode(self.echo_ids(prompt_ids))]

    def keys(self, vectors: Tensor, layer: int) -> Tensor:
        """The cross-attention keys of encoder states (or means of them) in one decoder layer: k_proj, then k_norm.

        vectors: Tensor[..., d]. Returns Tensor[..., kv_heads, head_dim] of the model's dtype. Keys carry no position.
        """
        attention = self.model.get_decoder().layers[layer].self_attn
        projected = attention.k_proj(vectors.to(self.device, self.dtype))
        return attention.k_norm(projected.unflatten(-1, (self.kv_heads, self.head_dim)))

    def answer(self, prompt_ids: Sequence[Sequence[int]], memory: Memory, max_new_tokens: int) -> list[str]:
        """The greedy answer of each row, read from the stored states; at most `max_new_tokens` long, ends at <eos>.

        Rows are padded on the left with masked <bos> (so that `generate` does not put another one in front) and their
        positions count from their own first token: neighbours do not change a row.
        """
        from transformers.modeling_outputs import BaseModelOutput

        if not prompt_ids:
            return []
        width = max(len(ids) for ids in prompt_ids)
        padded = torch.full((len(prompt_ids), width), self.tokenizer.bos_token_id)
        mask = torch.zeros(len(prompt_ids), width, dtype=torch.long)
        for row, ids in enumerate(prompt_ids):
            padded[row, width - len(ids) :] = torch.tensor(ids)
            mask[row, width - len(ids) :] = 1
        memory = self._ready(memory)
        settings = copy.deepcopy(self.model.generation_config)
        settings.max_new_tokens = max_new_tokens
        output = self.model.generate(  # makes no gradient by itself
            encoder_outputs=BaseModelOutput(last_hidden_state=memory.states),
            attention_mask=memory.mask,
            decoder_input_ids=padded.to(self.device),
            decoder_attention_mask=mask.to(self.device),
            decoder_position_ids=(mask.cumsum(-1) - 1).clamp(min=0).to(self.device),
            generation_config=settings,
        )
        ends = set(settings.eos_token_id)
        answers = []
        for ids in output[:, width:].tolist():
            end = next((place for place, token in enumerate(ids) if token in ends), len(ids))
            answers.append(self.tokenizer.decode(ids[:end], skip_special_tokens=True).strip())
        return answers

    def _ready(self, memory: Memory) -> Memory:
        states = memory.states.to(self.device, self.dtype)
        if states.shape[-1] == 0:
            states = states.new_zeros(*states.shape[:-1], self.hidden_size)
        return Memory(states, memory.mask.to(self.device))


def load(model: str, revision: str | None = None, *, dtype: str = "float32", device: str = "auto", prompt: str = PROMPT) -> Backbone:
    """Loads a T5Gemma 2, text only, frozen and in eval mode. `device` auto takes the GPU where there is one.

    Raises UserError: what `resolve` raises; weights that are damaged, missing or of another shape; no such device or dtype.
    """
    from safetensors import SafetensorError
    from transformers import T5Gemma2ForConditionalGeneration

    from intra.backbone import adopted

    place, kind = device_of(device), _dtype(dtype)
    folder = resolve(model, revision)
    name = f"backbone.model '{model}'"
    tokenizer = load_tokenizer(str(folder))
    foreign = FROZEN in json.loads((folder / "config.json").read_text())
    kind_of_model: Any = adopted.Adopted if foreign else T5Gemma2ForConditionalGeneration
    try:
        # What the files lack is first made at random (the vision tower of a text-only model): not from the caller's random state.
        with quiet(), torch.random.fork_rng(devices=[]):
            loaded, report = kind_of_model.from_pretrained(
                folder, dtype=kind, attn_implementation="sdpa", use_safetensors=True, local_files_only=True, output_loading_info=True
            )
    except (SafetensorError, OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise UserError(f"{name}: the weights in {folder} cannot be read ({one_line(error)}); download or make the model again") from error
    if not foreign:
        drop_vision(loaded)
    # A weight that the files lack would be random, a layer that config.json lacks would be lost: never run so.
    surplus = [key for key in report["unexpected_keys"] if ".layers." in key]
    for problem, keys in (("lack", report["missing_keys"]), ("hold more than config.json names:", surplus)):
        odd = sorted(key for key in keys if "vision_tower" not in key and "multi_modal_projector" not in key)
        if odd:
            raise UserError(f"{name}: the weights in {folder} {problem} {odd[0]} ({len(odd)} in all); download or make the model again")
    if len(tokenizer) > loaded.config.decoder.vocab_size:
        raise UserError(
            f"{name}: its tokenizer has {len(tokenizer)} entries, the model only {loaded.config.decoder.vocab_size}; "
            "put the tokenizer the model was made with beside it"
        )
    ends = loaded.generation_config.eos_token_id
    ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    loaded.generation_config = greedy(tokenizer, [tokenizer.eos_token_id, *ends])
    loaded.requires_grad_(False)
    return Backbone(loaded.to(place).eval(), tokenizer, prompt)


def device_of(device: str, key: str = "backbone.device") -> torch.device:
    """The device of a configuration's `key`: auto, or a name of torch's. Raises UserError: no such device, or no GPU here."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
    except RuntimeError:
        raise UserError(f"{key}: found '{device}'; give auto, cpu or cuda") from None
    if place.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"{key}: found '{device}', but torch sees no GPU here; give auto or cpu")
    return place


def _dtype(dtype: str) -> torch.dtype:
    kinds = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    if dtype not in kinds:
        raise UserError(f"backbone.dtype: found '{dtype}'; give one of {', '.join(kinds)}")
    return kinds[dtype]
