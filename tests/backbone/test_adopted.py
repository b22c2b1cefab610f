"""A frozen BERT under a T5Gemma 2 decoder: what it starts as, what it echoes, what of it is trained."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from intra.backbone import adopted, curriculum, locate, model, packing, tiny, warmstart
from intra.baselines.models import linear
from intra.config import LossConfig, parse
from intra.errors import UserError
from intra.evaluation import cost
from intra.retrieval import initial, scoring
from intra.retrieval.prefix import Prefixes
from intra.retrieval.retriever import RetrieverSettings
from intra.store import forecast
from workflows import prepare

from ..conftest import write_world
from .conftest import over, sentences
from .warm_start.conftest import config

QUESTIONS = ["where was ada bell born", "red", "is the red moon film directed by ada"]


@pytest.fixture(scope="module")
def backbone(adopted_folder: Path) -> model.Backbone:
    return model.load(str(adopted_folder), device="cpu")


def memory(backbone: model.Backbone, count: int = 3) -> model.Memory:
    states = backbone.encode(backbone.tokenize(sentences(2, seed=3)))
    return backbone.pack([states] * count)


def tokens(backbone: model.Backbone, count: int = 4) -> torch.Tensor:
    return torch.randn(count, backbone.hidden_size, generator=torch.Generator().manual_seed(2))


def test_states_are_the_berts_whitened(backbone: model.Backbone, bert: Path) -> None:
    from transformers import BertModel

    other = BertModel.from_pretrained(bert, add_pooling_layer=False).eval()
    ids = backbone.tokenize(sentences(60, seed=7))
    assert all(row[0] == 2 and row[-1] == 3 for row in ids)
    assert max(len(row) for row in ids) > 8  # the file's truncation is not heeded
    linear = backbone.model.get_encoder().whitening
    for found, row in zip(backbone.encode(ids[:5]), ids[:5], strict=True):
        with torch.no_grad():
            plain = other(input_ids=torch.tensor([row])).last_hidden_state[0]
        assert torch.allclose(found, plain @ linear.weight.T + linear.bias, atol=1e-4)
    vectors = model.pool_all(backbone.encode(ids), adopted.POOLED).flatten(0, 1)
    assert vectors.mean(0).abs().max() < 1e-3
    assert abs(float(vectors.square().mean()) - 1) < 1e-3
    strong = torch.linalg.eigvalsh(torch.cov(vectors.T))[-24:]
    assert strong.max() / strong.min() < 1.5


def test_untrained_it_ranks_as_maxsim_does(backbone: model.Backbone) -> None:
    """The matching heads of the first layer, by the echoed question alone, against MaxSim of whitened states."""
    chunks = backbone.encode(backbone.tokenize(sentences(40, seed=1, shortest=8)))
    pooled = model.pool_all(chunks, 7)
    ids = backbone.prompt_ids(sentences(12, seed=2, shortest=5, longest=9))
    queries = backbone.queries(ids, tokens(backbone), backbone.pack([[]] * len(ids)))[:, 0, : backbone.matching_heads, 4:]
    keys = backbone.keys(pooled, 0)[:, :, : backbone.matching_heads]
    mine = torch.einsum("bhre,cphe->bcrhp", queries, keys).amax(-1).sum((2, 3))
    alike = []
    for row, echo in enumerate(backbone.encode(backbone.echo_ids(ids))):
        asked = torch.nn.functional.normalize(echo[1:-1], dim=-1)
        plain = (torch.nn.functional.normalize(pooled, dim=-1) @ asked.T).amax(1).sum(-1)
        alike.append(float(torch.corrcoef(torch.stack([mine[row], plain]))[0, 1]))
    assert min(alike) > 0.5
    assert sum(alike) / len(alike) > 0.7


def test_the_question_is_echoed_behind_the_prompt(backbone: model.Backbone) -> None:
    ids = backbone.prompt_ids(QUESTIONS)
    echoes = backbone.echo_ids(ids)
    assert [backbone.tokenizer.decode(row[1:-1]) for row in echoes] == QUESTIONS
    assert echoes == backbone.tokenize(QUESTIONS)
    found = backbone.queries(ids, tokens(backbone), memory(backbone))
    longest = max(len(row) for row in echoes) - 2
    assert found.shape == (3, backbone.layers, backbone.heads, 4 + longest, backbone.head_dim)
    for row, echo in enumerate(echoes):
        sizes = found[row].norm(dim=-1)
        assert (sizes[:, :, : 4 + len(echo) - 2] > 1).all()
        assert not sizes[:, :, 4 + len(echo) - 2 :].any()  # a score of 0 for every chunk
        alone = backbone.queries(ids[row : row + 1], tokens(backbone), memory(backbone, 1))[0]
        assert torch.allclose(alone, found[row, :, :, : alone.shape[2]], atol=1e-4)


def test_the_first_context_is_asked_for_without_special_states(backbone: model.Backbone) -> None:
    whole = backbone.encode(backbone.tokenize(QUESTIONS))
    for found, states in zip(initial.encode(backbone, QUESTIONS), whole, strict=True):
        assert len(found) == len(states) - 2
        assert torch.equal(found, states[1:-1])


def test_gradient_flows_to_the_tokens_alone(backbone: model.Backbone) -> None:
    mine = tokens(backbone).requires_grad_()
    backbone.queries(backbone.prompt_ids(QUESTIONS), mine, memory(backbone))[:, -1].square().sum().backward()
    assert mine.grad is not None
    assert (mine.grad.abs().sum(dim=1) > 0).all()
    assert all(parameter.grad is None for parameter in backbone.model.parameters())


def test_it_answers_and_is_saved_and_loaded(backbone: model.Backbone, bert: Path, tmp_path: Path) -> None:
    ids = backbone.prompt_ids(QUESTIONS)
    assert len(backbone.answer(ids, memory(backbone), 3)) == 3
    tiny.save(backbone.model, backbone.tokenizer, tmp_path / "again")
    again = model.load(str(tmp_path / "again"), device="cpu")
    assert again.model.lm_head.out_proj.weight is again.model.get_decoder().embed_tokens.weight
    assert torch.equal(again.queries(ids, tokens(again), memory(again)), backbone.queries(ids, tokens(backbone), memory(backbone)))
    words = adopted.tokenizer(str(bert))
    made = [adopted.build(over(bert), words, 3, sentences(60, seed=7)) for _ in range(2)]
    for one, other in zip(made[0].parameters(), made[1].parameters(), strict=True):
        assert torch.equal(one, other)


def losses(
    folder: Path, stored: Callable[[Sequence[int]], list[torch.Tensor]] | None = None, **warm: Any
) -> tuple[warmstart.WarmStart, warmstart.Optimizers, packing.Batch]:
    backbone = model.load(str(folder), device="cpu")
    backbone.model.requires_grad_(True)
    adopted.freeze(backbone.model)
    recipe = config(**warm).backbone.warmstart
    module = warmstart.WarmStart(backbone, LossConfig(answer=1, retrieval=1, hop=1, attention=1), 7, "mixture", stored=stored)
    asked = [
        curriculum.Asked("where was the directed of red moon born", "oldtown", [0, 1], "ada bell"),
        curriculum.Asked("green", "river", [2], "green"),
    ]
    chunks = backbone.tokenize(["the film red moon directed by ada bell", "ada bell born in oldtown", "green river"])
    everything = config(
        losses={"retrieval": 1.0, "attention": 1.0}, retrieval_share=1.0, pooled_length=7, probes=3, probe_span=3
    ).backbone.warmstart
    packed = curriculum._pack(backbone, random.Random(0), chunks, asked, everything, [4, 9, 2])
    extra = backbone.tokenize(sentences(5, seed=9))
    return module, warmstart.optimizers(module, recipe), packing.collate([packed], 0, extra, [[True] * 7] * 5, [8, 7, 6, 5, 3])


def test_the_states_of_a_pools_chunks_are_those_of_its_store(adopted_folder: Path) -> None:
    module, _, batch = losses(adopted_folder)
    texts = dict(zip([*batch.rows, *batch.extra_rows], [*batch.chunks, *batch.extra], strict=True))
    read: list[int] = []

    def stored(rows: Sequence[int]) -> list[torch.Tensor]:
        read.extend(rows)
        return [module.backbone.encode([texts[row]])[0].bfloat16().float() for row in rows]

    reading, _, _ = losses(adopted_folder, stored)
    live, found = module(batch), reading(batch)
    assert sorted(read) == sorted(texts)
    for name, value in live.items():
        assert torch.allclose(value, found[name], rtol=0.02, atol=1e-3), name
    other, _, _ = losses(adopted_folder, lambda rows: [states[:-1] for states in stored(rows)])
    with pytest.raises(ValueError, match="stored states are not of the batch's chunks"):
        other(batch)
    turned, _, _ = losses(adopted_folder, lambda rows: [-states for states in stored(rows)])
    assert not torch.allclose(turned(batch)["retrieval"], live["retrieval"], rtol=0.05)


def test_training_scores_as_searching_does(adopted_folder: Path) -> None:
    """The retrieval segments of a batch give the queries that `Backbone.queries` gives of the same tokens and memory."""
    module, _, batch = losses(adopted_folder)
    backbone = module.backbone
    sink = warmstart._Sink()
    with torch.no_grad():
        states = module._states(batch.chunks)
        vectors = module._vectors(batch, states)
        own, cross = packing.masks(batch, 512)
        with warmstart.capturing(backbone.model):
            backbone.model.get_decoder()(
                inputs_embeds=module._echoed(batch), attention_mask=own, position_ids=batch.positions,
                encoder_hidden_states=states.flatten(0, 1)[batch.gather], encoder_attention_mask=cross, use_cache=False, query_sink=sink,
            )  # fmt: skip
        found = module._scores(batch, vectors, sink)
        for row in range(2):
            place = batch.probe_columns[row]
            first = int(batch.echo_columns[row, 0])
            prompt = batch.ids[0, :first][batch.segment[0, :first] == batch.segment[0, place[0]]].tolist()
            seen = batch.visible[0, batch.segment[0, place[0]]].nonzero().flatten().tolist()
            kept = [states[chunk, : len(batch.chunks[chunk])] for chunk in seen]
            token = backbone.model.get_decoder().embed_tokens(torch.tensor([prompt[-1]])).expand(3, -1)
            queries = backbone.queries([prompt], token, backbone.pack([kept]))
            mine = found[row] * (3 + int(batch.echoed[row].sum()))
            expected = torch.stack(
                [torch.einsum("hre,cphe->crhp", queries[0, layer], backbone.keys(vectors, layer)).amax(-1).sum(1) for layer in range(4)], 1
            )
            assert torch.allclose(mine, expected, atol=2e-3)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_the_encoder_and_the_words_stay_and_matching_heads_move_less(adopted_folder: Path, optimizer: str) -> None:
    moved = {}
    for rate in (0.0, 0.1, 1.0):
        module, optimizers, batch = losses(
            adopted_folder, optimizer=optimizer, matching_rate=rate, matrix_learning_rate=0.01, warmup_steps=0
        )
        before = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
        values = module(batch)
        assert {"answer", "retrieval", "hop", "attention"} <= values.keys()
        values["total"].backward()
        optimizers.step(0)
        after = dict(module.named_parameters())
        fixed = [name for name in before if torch.equal(before[name], after[name])]
        assert [name for name in before if "encoder." in name or "embed_tokens.weight" in name] == [
            name for name in fixed if "encoder." in name or "embed_tokens.weight" in name]  # fmt: skip
        backbone, rows = module.backbone, module.backbone.matching_heads * module.backbone.head_dim
        q = "model.model.decoder.layers.1.self_attn.q_proj.weight"
        name = next(name for name in before if name.endswith(q.removeprefix("model.")))
        difference = (after[name].detach() - before[name]).abs()
        moved[rate] = float(difference[:rows].mean())
        assert float(difference[rows:].mean()) > 1e-6
        assert backbone.matching_heads == 3
    assert moved[0.0] == 0
    assert 0 < moved[0.1] < 0.2 * moved[1.0]


def test_the_other_heads_weigh_little_at_first(adopted_folder: Path) -> None:
    module, _, batch = losses(adopted_folder)
    shares = module.backbone.head_shares()
    assert torch.allclose(shares[3:] / shares[0], torch.full((3,), 0.1))
    assert float(shares.square().mean()) == pytest.approx(1.0)
    module(batch)["retrieval"].backward()
    values = module.backbone.model.get_decoder().layers[3].self_attn.q_proj.weight.grad.unflatten(0, (6, -1)).abs().sum((1, 2))
    assert 0 < values[3:].max() < 0.3 * values[:3].min()


def test_the_attention_loss_leaves_the_matching_heads_alone(adopted_folder: Path) -> None:
    module, _, batch = losses(adopted_folder)
    values = module(batch, LossConfig(answer=0, attention=1))
    values["attention"].backward()
    backbone = module.backbone
    rows = backbone.matching_heads * backbone.head_dim
    last = backbone.model.get_decoder().layers[1].self_attn  # the last of the early half: its queries go nowhere else in this loss
    gradient = last.q_proj.weight.grad
    assert gradient[rows:].abs().sum() > 0
    late = backbone.model.get_decoder().layers[3].self_attn.q_proj.weight.grad
    assert not late[:rows].abs().sum()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 96}, "hidden_size: found 96; the encoder .* has 48"),
        ({"encoder": "/nowhere"}, "no config.json of a model in /nowhere"),
        ({"encoder": "package:not_a_package_at_all/model"}, "the package is not installed"),
        ({"encoder": "package:not_a_package_at_all.sub/model"}, "the package is not installed"),
        ({"encoder": "package:/model"}, "the package is not installed"),
    ],
)
def test_an_encoder_that_does_not_fit_is_refused(bert: Path, change: dict[str, Any], message: str) -> None:
    words = adopted.tokenizer(str(bert))
    with pytest.raises(UserError, match=message):
        adopted.build(over(bert).model_copy(update=change), words, 0, [])


def test_damaged_encoder_files_are_refused(bert: Path, tmp_path: Path) -> None:
    for name, text, message in (
        ("config.json", json.dumps({"model_type": "gpt2"}), "model_type 'gpt2'"),
        ("config.json", "{", "no config.json of a model"),
        ("tokenizer.json", "{", "cannot be read as a tokenizer"),
        ("tokenizer.json", (bert / "tokenizer.json").read_text().replace("[SEP]", "[END]"), r"has no \[SEP\]"),
    ):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        shutil.copytree(bert, folder)
        (folder / name).write_text(text)
        with pytest.raises(UserError, match=message):
            adopted.tokenizer(str(folder))
    shutil.copytree(bert, tmp_path / "bare")
    (tmp_path / "bare" / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"lacks model\.safetensors"):
        locate.encoder_folder(str(tmp_path / "bare"))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"matching_heads": 2}, "matching_heads needs a backbone.architecture.encoder"),
        ({"encoder": "x", "heads": 4, "kv_heads": 2}, "heads must equal kv_heads"),
        ({"encoder": "x", "matching_heads": 4}, "be more than matching_heads"),
        ({"encoder": "x", "matching_heads": 2, "head_dim": 32}, "hidden_size / matching_heads must be even and at most head_dim"),
    ],
)
def test_sizes_that_do_not_go_together_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse({"root": "r", "backbone": {"train": True, "architecture": values}})
    with pytest.raises(UserError, match="shard does not serve"):
        parse({"root": "r", "backbone": {"architecture": {"encoder": "x"}, "warmstart": {"shard": True, "optimizer": "adamw"}}})


def test_the_forecast_knows_it(bert: Path, adopted_folder: Path) -> None:
    before = parse({"root": "r", "backbone": {"train": True, "architecture": over(bert).model_dump()}})
    after = parse({"root": "r", "backbone": {"model": str(adopted_folder)}})
    made = forecast.encoder(before)
    assert made == forecast.encoder(after)
    assert (made.layers, made.hidden_size, made.heads, made.head_dim) == (2, 48, 4, 12)
    found = model.load(str(adopted_folder), device="cpu").model
    real = sum(parameter.numel() for parameter in found.parameters())
    # The BERT's positions are not counted, nor norms and biases; the decoder's words stand once.
    assert abs(made.parameters - (real - 512 * 48)) < 0.05 * real


def test_its_tokens_keep_no_prefix(backbone: model.Backbone) -> None:
    with pytest.raises(ValueError, match="the prompt alone"):
        Prefixes(backbone, None, 3, 1)  # type: ignore[arg-type]


def test_its_operations_count_the_echo(backbone: model.Backbone) -> None:
    from intra.data.schema import Question

    asked = [Question(str(n), "b", "test", text, (), (), 1, "") for n, text in enumerate(QUESTIONS)]
    words = sum(len(text.split()) for text in QUESTIONS) / len(QUESTIONS)
    assert cost.echoed(backbone, asked) == words
    settings = RetrieverSettings(4, backbone.layers, backbone.heads, backbone.hidden_size, 7, 0, "dot", "per_head", "", "")
    queries = backbone.queries(backbone.prompt_ids([QUESTIONS[0]]), tokens(backbone), backbone.pack([[]]))
    vectors = torch.randn(50, 7, backbone.hidden_size, generator=torch.Generator().manual_seed(0))
    with FlopCounterMode(display=False) as counter:
        scoring.scorer("per_head", queries, backbone, torch.ones(backbone.layers, backbone.heads))(vectors)
    counted = cost.scoring(backbone, settings, 50, 1, 1, cost.echoed(backbone, asked[:1]))
    assert counted == pytest.approx(counter.get_total_flops(), rel=0.1)
    read = settings, 0, cost.echoed(backbone, asked[:1])
    with FlopCounterMode(display=False) as counter:
        backbone.queries(backbone.prompt_ids([QUESTIONS[0]]), tokens(backbone), backbone.pack([[]]))
    assert cost.retrieval_pass(backbone, asked[:1], *read) == pytest.approx(counter.get_total_flops(), rel=0.25)
    encoder = 2 * (words + 2) * linear(backbone.model.get_encoder())  # [CLS] and [SEP] are encoded, not compared
    assert cost.initial(backbone, asked, 50, 7) == encoder + 2 * words * 50 * 7 * backbone.hidden_size


def test_chunks_longer_than_the_encoder_reads_are_refused(bert: Path, tmp_path: Path) -> None:
    write_world(tmp_path / "data")
    config = parse(
        {
            "root": str(tmp_path / "root"),
            "data": {"source": "jsonl", "path": str(tmp_path / "data"), "passages": "passages.jsonl", "chunk_tokens": 513},
            "backbone": {"train": True, "architecture": over(bert).model_dump()},
        }
    )
    with pytest.raises(UserError, match=r"data\.chunk_tokens: found 513; the encoder .* reads at most 512"):
        prepare.run(config)
