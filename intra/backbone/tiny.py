"""A small T5Gemma 2 from scratch: its tokenizer, its random weights, its files.

transformers' own classes at a small size, so that whatever holds here (grouped queries, sliding layers, tied embeddings)
holds for a released model. Text only: the configuration keeps the smallest vision tower that loads, its weights are not kept.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from intra.config import ArchitectureConfig, BackboneConfig
from intra.errors import UserError

PAD, EOS, BOS, UNK = "<pad>", "<eos>", "<bos>", "<unk>"
SPECIAL = [PAD, EOS, BOS, UNK]  # ids 0, 1, 2, 3, as in Gemma
SLIDING_WINDOW = 64
BPE_SAMPLE_BYTES = 60_000_000  # learned from in about ten seconds; far more than a vocabulary of thousands needs

# A word, with the marks inside it (o'neil, well-known, 3.5); a possessive; or one mark by itself.
_WORD = r"'s\b|[\w&&[^_]]+(?:['’.,-](?!s\b)[\w&&[^_]]+)*|[^\s]"


def train_tokenizer(texts: Iterable[str], architecture: ArchitectureConfig) -> Any:
    """A tokenizer of at most `architecture.vocabulary` entries, the four special tokens included.

    `word`: lower-cased words and marks, the most frequent of them (ties in alphabetical order), others are <unk>; decoding
    gives words with single spaces. `byte_bpe`: byte-level BPE; decoding gives the text back exactly. Both begin a text with <bos>. The same
    texts in the same order give the same tokenizer. `texts` are kept in memory only if they cannot be gone
    through twice.

    Returns a transformers.PreTrainedTokenizerFast. Raises UserError where the vocabulary is too small for bytes.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    if architecture.tokenizer == "word":
        tokenizer = Tokenizer(models.WordLevel(unk_token=UNK))
        tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex(_WORD), behavior="isolated")]
        )
        trainer: Any = trainers.WordLevelTrainer(vocab_size=architecture.vocabulary, special_tokens=SPECIAL, show_progress=False)
        # The usual prompt's words are always among them: every question the decoder reads has them.
        sample: Iterable[str] = itertools.chain(texts, [BackboneConfig.model_fields["prompt"].default.replace("{question}", "")])
    else:
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        if architecture.vocabulary < len(SPECIAL) + len(alphabet):
            raise UserError(
                f"backbone.architecture.vocabulary: found {architecture.vocabulary}; a byte_bpe tokenizer needs at least "
                f"{len(SPECIAL) + len(alphabet)}"
            )
        tokenizer = Tokenizer(models.BPE(unk_token=UNK))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=architecture.vocabulary, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
        )
        sample = _thinned(texts, BPE_SAMPLE_BYTES)
    tokenizer.train_from_iterator(sample, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, SPECIAL.index(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS, bos_token=BOS, unk_token=UNK, padding_side="right",
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


def _thinned(texts: Iterable[str], limit: int) -> Iterable[str]:
    """Every s-th text, with the smallest s that brings their bytes to about `limit`. Goes through the texts twice."""
    texts = list(texts) if isinstance(texts, Iterator) else texts
    total = sum(len(text.encode()) for text in texts)
    return itertools.islice(texts, 0, None, max(1, -(-total // limit)))


def build(architecture: ArchitectureConfig, tokenizer: Any, seed: int) -> Any:
    """A T5Gemma2ForConditionalGeneration with random weights (fp32, CPU) fixed by `seed`; its vision tower is None.

    Layers alternate between a local window of 64 positions and full attention, the last layer being full. Weights are
    drawn with standard deviation hidden_size ** -0.5, so that scaled embeddings and logits start near 1. The global
    random state is left as it was.
    """
    import torch
    from transformers import T5Gemma2ForConditionalGeneration

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = T5Gemma2ForConditionalGeneration(config(architecture, tokenizer))
    drop_vision(model)
    model.generation_config = greedy(tokenizer, [tokenizer.eos_token_id])
    return model.eval()


def config(architecture: ArchitectureConfig, tokenizer: Any) -> Any:
    """The T5Gemma2Config of that size. Raises UserError for sizes that do not go together."""
    from transformers import SiglipVisionConfig, T5Gemma2Config
    from transformers.models.t5gemma2 import T5Gemma2DecoderConfig, T5Gemma2EncoderConfig, T5Gemma2TextConfig

    if architecture.hidden_size % architecture.heads:
        raise UserError(
            f"backbone.architecture.hidden_size: found {architecture.hidden_size}, not a multiple of heads ({architecture.heads})"
        )
    if architecture.head_dim % 2:
        raise UserError(f"backbone.architecture.head_dim: found {architecture.head_dim}; rotary positions need an even number")
    deviation = architecture.hidden_size**-0.5
    common: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": architecture.hidden_size,
        "intermediate_size": architecture.intermediate_size,
        "num_attention_heads": architecture.heads,
        "num_key_value_heads": architecture.kv_heads,
        "head_dim": architecture.head_dim,
        "query_pre_attn_scalar": architecture.head_dim,
        "sliding_window": SLIDING_WINDOW,
        "initializer_range": deviation,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.bos_token_id,
    }
    depths = architecture.encoder_layers, architecture.decoder_layers
    text = T5Gemma2TextConfig(num_hidden_layers=depths[0], layer_types=_layer_types(depths[0]), **common)
    decoder = T5Gemma2DecoderConfig(num_hidden_layers=depths[1], layer_types=_layer_types(depths[1]), **common)
    vision = SiglipVisionConfig(
        hidden_size=2, intermediate_size=2, num_hidden_layers=1, num_attention_heads=1, image_size=2, patch_size=2, vision_use_head=False
    )
    encoder = T5Gemma2EncoderConfig(
        text_config=text.to_dict(), vision_config=vision.to_dict(), mm_tokens_per_image=1, initializer_range=deviation
    )
    return T5Gemma2Config(encoder=encoder.to_dict(), decoder=decoder.to_dict(), initializer_range=deviation)


def greedy(tokenizer: Any, eos: Sequence[int]) -> Any:
    """The generation settings every answer is made with: greedy, one beam, no penalties; ends at any of `eos`."""
    from transformers import GenerationConfig

    return GenerationConfig(
        do_sample=False,
        num_beams=1,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        decoder_start_token_id=tokenizer.bos_token_id,
        eos_token_id=sorted(set(eos)),
    )


def drop_vision(model: Any) -> None:
    """Text only: the vision tower and its projector are set to None (their weights are neither kept nor saved)."""
    encoder = model.get_encoder()
    encoder.vision_tower = None
    encoder.multi_modal_projector = None


def save(model: Any, tokenizer: Any, folder: str | Path) -> None:
    """Writes a model directory (config, generation settings, safetensors, tokenizer) that `backbone.model.load` reads."""
    with quiet():
        model.save_pretrained(str(folder))
        tokenizer.save_pretrained(str(folder))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps transformers' progress bars and load report off the terminal; what matters of the report is checked by `load`."""
    from transformers.utils import logging

    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()


def _layer_types(layers: int) -> list[str]:
    return ["full_attention" if (layers - 1 - layer) % 2 == 0 else "sliding_attention" for layer in range(layers)]
