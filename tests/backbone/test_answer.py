"""Answers and logits from stored states against the unmodified model that reads the text."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.modeling_outputs import BaseModelOutput

from intra.backbone.model import Backbone, Memory, pack

from .conftest import sentences

LENGTH = 9


@pytest.fixture(scope="module")
def case(backbone: Backbone) -> tuple[list[list[int]], list[list[int]]]:
    """Chunk ids and prompt ids of six questions, of different lengths."""
    return backbone.tokenize(sentences(6, seed=21)), backbone.prompt_ids(["is", *sentences(5, seed=22)])


@pytest.fixture(scope="module")
def from_text(backbone: Backbone, pristine: Any, case: tuple[list[list[int]], list[list[int]]]) -> list[str]:
    """What the unmodified model writes for each question about the text of its one chunk."""
    answers = []
    for chunk, prompt in zip(*case, strict=True):
        output = pristine.generate(
            input_ids=torch.tensor([chunk]), decoder_input_ids=torch.tensor([prompt]), max_new_tokens=LENGTH, do_sample=False
        )
        answers.append(backbone.tokenizer.decode(output[0, len(prompt) :], skip_special_tokens=True).strip())
    assert len(set(answers)) == len(answers)  # or equality would say little
    return answers


def test_answers_from_states_equal_answers_from_text(backbone: Backbone, case: Any, from_text: list[str]) -> None:
    chunks, prompts = case
    states = backbone.encode(chunks)
    assert backbone.answer(prompts, pack([[item] for item in states]), LENGTH) == from_text  # padded, all together
    for row in range(len(prompts)):  # one by one, nothing padded
        alone = backbone.answer([prompts[row]], pack([backbone.encode([chunks[row]])]), LENGTH)
        assert alone == [from_text[row]]
    order = [4, 0, 2]  # other neighbours, another batch size
    assert backbone.answer([prompts[row] for row in order], pack([[states[row]] for row in order]), LENGTH) == [
        from_text[row] for row in order
    ]


def test_answers_over_more_padding(backbone: Backbone, case: Any, from_text: list[str]) -> None:
    """Masked states hold anything: they are not read."""
    chunks, prompts = case
    memory = pack([[item] for item in backbone.encode(chunks)])
    rubbish = torch.randn(len(chunks), 7, backbone.hidden_size) * 50
    padded = Memory(torch.cat([memory.states, rubbish], 1), torch.cat([memory.mask, torch.zeros(len(chunks), 7, dtype=torch.bool)], 1))
    padded.states[~padded.mask] += 3
    assert backbone.answer(prompts, padded, LENGTH) == from_text


def logits(model: Any, prompt: list[int], memory: Memory) -> torch.Tensor:
    with torch.no_grad():
        return model(
            encoder_outputs=BaseModelOutput(last_hidden_state=memory.states), attention_mask=memory.mask,
            decoder_input_ids=torch.tensor([prompt]),
        ).logits[0]  # fmt: skip


def test_logits_from_states_equal_logits_from_text(backbone: Backbone, pristine: Any, case: Any) -> None:
    chunks, prompts = case
    for chunk, prompt, states in zip(chunks, prompts, backbone.encode(chunks), strict=True):
        with torch.no_grad():
            expected = pristine(input_ids=torch.tensor([chunk]), decoder_input_ids=torch.tensor([prompt])).logits[0]
        torch.testing.assert_close(
            logits(backbone.model, prompt, pack([[states]])), expected, rtol=0, atol=1e-5 * float(expected.abs().max())
        )


def test_the_order_of_chunks_does_not_matter(backbone: Backbone, case: Any) -> None:
    chunks, prompts = case
    states = backbone.encode(chunks)
    expected = logits(backbone.model, prompts[3], pack([states]))
    found = logits(backbone.model, prompts[3], pack([[states[row] for row in (3, 5, 0, 4, 2, 1)]]))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    fewer = logits(backbone.model, prompts[3], pack([states[:-1]]))
    assert (fewer - expected).abs().max() > 1e-2 * expected.abs().max()  # the chunks are read


def test_an_empty_memory_is_answered_alike_alone_and_beside_others(backbone: Backbone, case: Any) -> None:
    chunks, prompts = case
    states = backbone.encode(chunks)
    alone = backbone.answer(prompts[:1], pack([[]]), LENGTH)  # no chunk at all: the width is unknown to pack
    beside = backbone.answer(prompts[:3], pack([[], [states[1]], []]), LENGTH)
    assert beside[0] == alone[0]
    assert beside[2] == backbone.answer(prompts[2:3], pack([[]]), LENGTH)[0]


def test_an_answer_ends_at_eos(backbone: Backbone, case: Any, from_text: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Taking the third written word for an end token cuts the answer there, and only that row's."""
    chunks, prompts = case
    memory = pack([[item] for item in backbone.encode(chunks)])
    row = next(row for row, text in enumerate(from_text) if len(set(text.split()[:3])) == 3)
    words = from_text[row].split()
    end = backbone.tokenizer.convert_tokens_to_ids(words[2])
    monkeypatch.setattr(backbone.model.generation_config, "eos_token_id", [backbone.tokenizer.eos_token_id, end])
    found = backbone.answer(prompts, memory, LENGTH)
    assert found[row] == " ".join(words[:2])
    for text, whole in zip(found, from_text, strict=True):
        assert text == " ".join(whole.split(words[2])[0].split())
    assert backbone.answer([], memory, LENGTH) == []


def test_answer_leaves_the_settings_alone(backbone: Backbone, case: Any) -> None:
    chunks, prompts = case
    before = backbone.model.generation_config.to_dict()
    memory = pack([backbone.encode(chunks[:1])])
    short = backbone.answer(prompts[:1], memory, 2)[0]
    assert len(short.split()) <= 2
    assert backbone.answer(prompts[:1], memory, LENGTH)[0].startswith(short)
    assert backbone.model.generation_config.to_dict() == before


def test_prompts(backbone: Backbone) -> None:
    bos, eos = backbone.tokenizer.bos_token_id, backbone.tokenizer.eos_token_id
    ids = backbone.prompt_ids(["where was {ada} born", "<eos> <bos> film"])
    assert all(row[0] == bos and bos not in row[1:] and eos not in row for row in ids)
    assert backbone.tokenizer.decode(ids[0][1:3]) == "question :"
    assert backbone.tokenizer.decode(ids[0][-2:]) == "answer :"
    assert backbone.tokenize(["<eos> film"])[0][0] == bos
    assert eos not in backbone.tokenize(["<eos> film"])[0]
    answer = backbone.answer_ids(["Ada Bell"])[0]
    assert answer[-1] == eos
    assert backbone.tokenizer.decode(answer[:-1]) == "ada bell"
    assert backbone.tokenize([]) == backbone.prompt_ids([]) == []
