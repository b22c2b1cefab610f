"""The paper's models on tiny ones of the same classes: late interaction, cross-encoder, Qwen3 with its instruction, the table."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from intra import config as configuration
from intra.artifact import Artifact
from intra.baselines import dense, models, wrappers
from intra.baselines.corpus import Block, Corpus
from intra.data.schema import Pool, Question
from intra.errors import UserError, WorkflowError
from intra.evaluate_config import CrossConfig, DenseConfig, LateConfig
from intra.evaluation.parts import Parts
from intra.method import Ranking, check


def late(root: Path, model: Path, shard_chunks: int = 16, **values: Any) -> dense.Late:
    chosen = LateConfig.model_validate(
        {"kind": "late", "model": str(model), "max_length": 12, "query_length": 10, "batch_size": 8, **values}
    )
    place = Artifact("vectors", str(root / "vectors"), "mark", "evaluate")
    return dense.Late("tiny", lambda pool: Corpus("tiny", place, pool, lambda: models.Late("tiny", chosen, "cpu", 1), shard_chunks, True))


def by_id(ranking: Ranking) -> dict[str, float]:
    return dict(ranking)


@pytest.mark.parametrize("trained", [True, False])
def test_late_interaction_is_the_librarys_maxsim(
    request: pytest.FixtureRequest, pool: Pool, questions: list[Question], tmp_path: Path, trained: bool
) -> None:
    from sentence_transformers import MultiVectorEncoder
    from sentence_transformers.multi_vector_encoder import modules
    from sentence_transformers.sentence_transformer.modules import Normalize, Transformer
    from sentence_transformers.util.similarity import maxsim

    place = request.getfixturevalue("colbert" if trained else "bert")
    if trained:
        model = MultiVectorEncoder(str(place), device="cpu")
        model[0].document_length, model[0].query_length = 12, 10
    else:
        encoder = Transformer(str(place), query_length=10, document_length=12)
        model = MultiVectorEncoder(
            modules=[encoder, modules.MultiVectorMask(), Normalize(module_input_name="token_embeddings")], device="cpu"
        )
    expected = maxsim(model.encode_query([q.question for q in questions]), model.encode_document(pool.title_and_text()))
    method = late(tmp_path / "a", place, projection=trained)
    method.index(pool)
    rankings = method.search(questions, 70)
    check("tiny", rankings, questions, 70, pool)
    for question, row in zip(questions, expected.tolist(), strict=True):
        found = by_id(rankings[question.question_id])
        assert [found[chunk] for chunk in pool.chunk_ids] == pytest.approx(row, abs=5e-3)  # kept in float16
    top = {key: [chunk for chunk, _ in ranking[:20]] for key, ranking in rankings.items()}
    # A wrapper's scores of chosen chunks are the search's; and no ranking depends on shards or batches.
    chosen = {key: list(reversed(chunks)) for key, chunks in top.items()}
    scores = method.scores(questions, chosen)
    assert all(scores[key] == pytest.approx([by_id(rankings[key])[chunk] for chunk in chunks]) for key, chunks in chosen.items())
    other = late(tmp_path / "b", place, 23, projection=trained, batch_size=3)
    other.index(pool)
    assert {key: [chunk for chunk, _ in ranking] for key, ranking in other.search(questions, 20).items()} == top


def test_an_encoder_without_a_projection_is_no_late_interaction_model(bert: Path) -> None:
    chosen = LateConfig(kind="late", model=str(bert), max_length=12)
    with pytest.raises(UserError, match=r"holds no projection trained for late interaction; .* projection=false"):
        models.Late("tiny", chosen, "cpu", 1)


def test_a_text_without_a_vector_is_named(bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    model = models.Late("tiny", LateConfig(kind="late", model=str(bert), max_length=12, projection=False), "cpu", 1)
    monkeypatch.setattr(model.model, "encode_document", lambda texts, **_: [torch.ones(3, 4), torch.ones(0, 4)])
    with pytest.raises(WorkflowError, match="method tiny: the model gives no vector for 'two'"):
        model.passages(["one", "two"])


@pytest.mark.parametrize("products", [1, 100, 10**6])
def test_maxsim_has_the_same_bits_whatever_stands_beside(
    pool: Pool, bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, products: int
) -> None:
    """Questions and texts of one token and of many, by themselves and together, in parts of any size: each its own sum of maxima."""
    generator = np.random.default_rng(0)

    def vectors(*lengths: int) -> list[models.Floats]:
        return [generator.standard_normal((length, 48), dtype=np.float32) for length in lengths]

    method, queries, texts = late(tmp_path, bert, projection=False), vectors(1, 40, 3, 16, 90), vectors(1, 2, 200, 15, 16, 17)
    method.index(pool)
    block = Block(0, np.concatenate(texts), [0, *np.cumsum([len(text) for text in texts]).tolist()], 0)
    together = method._maxsim(queries, block, range(6))
    expected = [[(text.astype(float) @ query.T).max(axis=0).sum() for text in texts] for query in queries]
    assert together == pytest.approx(np.array(expected), abs=1e-4)
    monkeypatch.setattr(dense, "_PRODUCTS", products)
    for row, query in zip(together, queries, strict=True):
        assert method._maxsim([query], block, [5, 0, 3])[0].tolist() == row[[5, 0, 3]].tolist()
    assert (method._maxsim(queries, block, range(6)) == together).all()


def test_query_expansion_has_the_length_of_the_table(tmp_path: Path, colbert: Path) -> None:
    shutil.copytree(colbert, tmp_path / "copy")
    file = tmp_path / "copy" / "sentence_bert_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"query_expansion": {"strategy": "fixed", "attend": False, "length": 32}}))
    model = models.Late("tiny", LateConfig(kind="late", model=str(tmp_path / "copy"), max_length=12, query_length=20), "cpu", 1)
    assert [len(vectors) for vectors in model.questions(["who", "where was ada bell born"])] == [20, 20]


def test_a_cross_encoder_reranks_as_the_library_does(cross: Path, pool: Pool, questions: list[Question]) -> None:
    import torch
    from sentence_transformers import CrossEncoder

    chosen = CrossConfig(kind="cross", model=str(cross), max_length=64, batch_size=7)
    first = {question.question_id: [(chunk, 1.0 / n) for n, chunk in enumerate(pool.chunk_ids[:30], 1)] for question in questions}
    method = wrappers.Rerank("rerank", lambda: first, wrappers.CrossScorer("tiny", lambda: models.Cross("tiny", chosen, "cpu", 1)))
    method.index(pool)
    rankings = method.search(questions, 12)
    check("rerank", rankings, questions, 12, pool)
    library, texts = CrossEncoder(str(cross), device="cpu", num_labels=1), pool.title_and_text()[:30]
    for question in questions:
        scores = library.predict([(question.question, text) for text in texts], activation_fn=torch.nn.Identity()).tolist()
        expected = sorted(zip(pool.chunk_ids, scores, strict=False), key=lambda pair: (-pair[1], pair[0]))[:12]
        assert [score for _, score in rankings[question.question_id]] == pytest.approx([score for _, score in expected], abs=1e-5)
    pairs = [(question.question, text) for question, text in zip(questions, pool.title_and_text(), strict=False)]
    tokens = sum(len(library.tokenizer(*pair)["input_ids"]) for pair in pairs)
    depth = len(next(iter(first.values())))
    assert method.operations(questions) == 2 * depth * tokens * models.linear(library.model)


def flash_score(weights: dict[str, Any], ids: Sequence[int], heads: int) -> float:
    """What the code beside Jina's weights computes of one pair, by its layers' own names."""
    import torch
    from torch.nn import functional

    def linear(name: str, x: Any) -> Any:
        return functional.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def norm(name: str, x: Any) -> Any:
        return functional.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-5)

    embedded = "roberta.embeddings.{}_embeddings.weight".format
    places = torch.arange(1, len(ids) + 1)  # behind the padding's, 0
    x = weights[embedded("word")][list(ids)] + weights[embedded("position")][places] + weights[embedded("token_type")][0]
    x = norm("roberta.emb_ln", x)
    for layer in range(2):
        own = f"roberta.encoder.layers.{layer}"
        query, key, value = linear(f"{own}.mixer.Wqkv", x).view(len(ids), 3, heads, -1).permute(1, 2, 0, 3)
        mixed = (query @ key.transpose(1, 2) / query.shape[-1] ** 0.5).softmax(dim=-1) @ value
        x = norm(f"{own}.norm1", x + linear(f"{own}.mixer.out_proj", mixed.transpose(0, 1).flatten(1)))
        x = norm(f"{own}.norm2", x + linear(f"{own}.mlp.fc2", functional.gelu(linear(f"{own}.mlp.fc1", x))))
    return float(linear("classifier.out_proj", torch.tanh(linear("classifier.dense", x[0]))))


def test_jinas_reranker_is_transformers_xlm_roberta(flash: Path, pool: Pool, questions: list[Question]) -> None:
    """Its weights in flash-attention's layout, loaded without its own code, against what that computes; in batches, with padding."""
    from safetensors.torch import load_file

    model = models.Cross("tiny", CrossConfig(kind="cross", model=str(flash), max_length=64, batch_size=7), "cpu", 1)
    assert type(model.model.model).__module__ == "transformers.models.xlm_roberta.modeling_xlm_roberta"
    pairs = [(question.question, text) for question in questions for text in pool.title_and_text()[:9]]
    weights, ids = load_file(flash / "model.safetensors"), model.model.tokenizer(pairs)["input_ids"]
    expected = [flash_score(weights, one, 2) for one in ids]
    assert model.scores(pairs) == pytest.approx(expected, abs=1e-5)
    assert np.std(expected) > 0.1
    half = models.Cross("tiny", CrossConfig(kind="cross", model=str(flash), max_length=64, dtype="bfloat16"), "cpu", 1)
    assert half.scores(pairs) == pytest.approx(expected, abs=0.1)


def test_a_flash_layout_of_another_architecture_is_refused(flash: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(flash, tmp_path / "copy")
    chosen = CrossConfig(kind="cross", model=str(tmp_path / "copy"), max_length=64)
    weights, config = load_file(flash / "model.safetensors"), json.loads((flash / "config.json").read_text())

    def refused(weights: dict[str, Any], message: str, **values: Any) -> None:
        save_file(weights, tmp_path / "copy" / "model.safetensors", {"format": "pt"})
        (tmp_path / "copy" / "config.json").write_text(json.dumps(config | values))
        with pytest.raises(UserError, match=message):
            models.Cross("tiny", chosen, "cpu", 1)

    refused(weights, r"evaluate\.models\.tiny\.model: the positions of .*copy are rotary, XLM-RoBERTa's are absolute",
            position_embedding_type="rotary")  # fmt: skip
    lora = "roberta.encoder.layers.0.mixer.Wqkv.lora_A"
    refused(weights | {lora: weights["classifier.dense.weight"].clone()}, r"holds roberta\..*lora_A, which XLM-RoBERTa does not have")
    refused({key: weight for key, weight in weights.items() if key != "roberta.encoder.layers.1.mixer.Wqkv.bias"},
            r"lack roberta\.encoder\.layer\.1\.attention\.self\.key\.bias \(3 in all\)")  # fmt: skip


@pytest.mark.parametrize("kind", ["late", "dense", "cross"])
def test_what_loading_a_model_imports_in_vain_is_told_in_one_line(
    bert: Path, colbert: Path, cross: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    import sentence_transformers
    from sentence_transformers.sentence_transformer import modules

    def fail(*_: Any, **__: Any) -> Any:
        raise ImportError("this tokenizer needs\n sentencepiece")

    monkeypatch.setattr(sentence_transformers, "MultiVectorEncoder", fail)
    monkeypatch.setattr(sentence_transformers, "CrossEncoder", fail)
    monkeypatch.setattr(modules, "Transformer", fail)
    load: dict[str, Callable[[], Any]] = {
        "late": lambda: models.Late("tiny", LateConfig(kind="late", model=str(colbert), max_length=12), "cpu", 1),
        "dense": lambda: models.Dense("tiny", DenseConfig(kind="dense", model=str(bert), pooling="mean", max_length=64), "cpu", 1),
        "cross": lambda: models.Cross("tiny", CrossConfig(kind="cross", model=str(cross), max_length=64), "cpu", 1),
    }
    with pytest.raises(UserError, match=r"method tiny: its model asks for .*\(this tokenizer needs sentencepiece\)"):
        load[kind]()


def test_qwen_pools_the_last_token_behind_its_instruction(qwen: Path, pool: Pool, questions: list[Question]) -> None:
    """Against the model itself, one text at a time, without padding."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    chosen = DenseConfig(kind="dense", model=str(qwen), pooling="lasttoken", query_prompt="instruct query ", max_length=64, batch_size=8)
    encoder = models.Dense("tiny", chosen, "cpu", 1)
    tokenizer, model = AutoTokenizer.from_pretrained(qwen), AutoModel.from_pretrained(qwen).eval()

    def plain(text: str) -> Any:
        with torch.no_grad():
            last = model(**tokenizer([text], return_tensors="pt")).last_hidden_state[0, -1]
        return torch.nn.functional.normalize(last, dim=0).numpy()

    texts = pool.title_and_text()[:20]
    assert encoder.passages(texts)[0] == pytest.approx(np.stack([plain(text) for text in texts]), abs=1e-5)
    asked = [question.question for question in questions]
    assert np.concatenate(encoder.questions(asked)) == pytest.approx(
        np.stack([plain(f"instruct query {text}") for text in asked]), abs=1e-5
    )


@pytest.mark.parametrize("model", ["qwen", "bert", "colbert"])
def test_vectors_of_bfloat16_models_are_normalised_in_float32(request: pytest.FixtureRequest, pool: Pool, model: str) -> None:
    """Rounded to bfloat16 they would be .997 to 1.001 long. A float32 model's keep the bits of the library's own chain."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

    place, texts = request.getfixturevalue(model), pool.title_and_text()[:40]

    def encoder(dtype: str) -> models.Dense | models.Late:
        common = {"model": str(place), "max_length": 64, "dtype": dtype}
        if model == "qwen":
            return models.Dense("tiny", DenseConfig.model_validate({**common, "kind": "dense", "pooling": "lasttoken"}), "cpu", 1)
        late = LateConfig.model_validate({**common, "kind": "late", "query_length": 10, "projection": model == "colbert"})
        return models.Late("tiny", late, "cpu", 1)

    half, whole = encoder("bfloat16"), encoder("float32")
    for vectors in (half.passages(texts)[0], np.concatenate(half.questions(texts))):
        assert vectors.dtype == np.float32
        assert np.linalg.norm(vectors.astype(np.float64), axis=1) == pytest.approx(1, abs=1e-6)
    assert half.passages(texts)[0] == pytest.approx(whole.passages(texts)[0], abs=0.05)
    if model == "qwen":
        chain = [Transformer(str(place), processor_kwargs={"padding_side": "right"}), Pooling(32, "lasttoken"), Normalize()]
        library = SentenceTransformer(modules=chain, device="cpu")
        assert (library.encode(texts, batch_size=32) == whole.passages(texts)[0]).all()


def test_questions_that_are_cut_are_counted_once(
    bert: Path, pool: Pool, questions: list[Question], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = DenseConfig(kind="dense", model=str(bert), pooling="mean", max_length=8, query_prompt="question ")
    place = Artifact("vectors", str(tmp_path / "dense"), "mark", "evaluate")
    made = dense.Dense("tiny", lambda pool: Corpus("tiny", place, pool, lambda: models.Dense("tiny", chosen, "cpu", 1), 70, False))
    for method, spare in ((made, 8 - 3), (late(tmp_path / "late", bert, projection=False, query_length=9), 9 - 2)):
        method.index(pool)
        capsys.readouterr()
        cut = sum(len(question.question.split()) > spare for question in questions)
        assert 0 < cut < len(questions)
        method.search(questions, 5)
        method.scores(questions[:3], {question.question_id: ["c000"] for question in questions})
        method.operations(questions)
        assert capsys.readouterr().out == f"tiny: {cut} of 9 questions are longer than the model reads and were cut\n"


def test_pairs_that_are_cut_are_counted(cross: Path, pool: Pool, questions: list[Question], capsys: pytest.CaptureFixture[str]) -> None:
    chosen = CrossConfig(kind="cross", model=str(cross), max_length=20)
    scorer = wrappers.CrossScorer("tiny", lambda: models.Cross("tiny", chosen, "cpu", 1))
    scorer.index(pool)
    scorer.scores(questions, {question.question_id: pool.chunk_ids for question in questions})  # the last ten texts are copies
    lengths = [len(text.split()) for text in pool.title_and_text()[:60]]
    cut = sum(len(question.question.split()) + length + 3 > 20 for question in questions for length in lengths)
    assert 0 < cut < 540
    assert capsys.readouterr().out == f"tiny: {cut} of 540 pairs of question and text are longer than the model reads and were cut\n"
    scorer.scores(questions[:1], {"q0": [min(zip(lengths, pool.chunk_ids, strict=False))[1]]})
    assert capsys.readouterr().out == ""


@pytest.mark.skipif(importlib.util.find_spec("ranx") is None, reason="ranx is a development dependency")
def test_fusion_is_ranx() -> None:
    generator = np.random.default_rng(0)
    rankings: list[Ranking] = []
    for _ in range(3):
        ids = [f"c{number:02d}" for number in generator.permutation(40)[: int(generator.integers(10, 30))]]
        rankings.append([(chunk, float(-rank)) for rank, chunk in enumerate(ids)])
    code = (
        "import json, sys\nfrom ranx import Run, fuse\nruns = [Run({'q': dict(pairs)}) for pairs in json.load(sys.stdin)]\n"
        "print(json.dumps(fuse(runs, norm=None, method='rrf', params={'k': 60}).to_dict()['q']))"
    )
    # Without numba's compiler, which takes minutes for what is done once here.
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], input=json.dumps(rankings), env={**os.environ, "NUMBA_DISABLE_JIT": "1"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    found = wrappers.fuse(rankings, 60, 100, [False] * 3)
    assert dict(found) == pytest.approx(json.loads(run.stdout))
    assert found == sorted(found, key=lambda pair: (-pair[1], pair[0]))
    assert wrappers.fuse(rankings, 60, 5, [False] * 3) == found[:5]


def test_a_fusion_reads_its_parts_rankings(questions: list[Question], pool: Pool) -> None:
    parts: list[Any] = [
        {q.question_id: [("c001", 1.0), ("c002", 0.5)] for q in questions},
        {q.question_id: [("c002", 9.0)] for q in questions},
    ]
    method = wrappers.Fusion("hybrid", lambda: parts, 60, [False, False])
    method.index(pool)
    assert method.search(questions[:1], 2) == {"q0": [("c002", pytest.approx(1 / 61 + 1 / 62)), ("c001", pytest.approx(1 / 61))]}


def test_what_a_lexical_method_did_not_find_has_no_rank_in_a_fusion(questions: list[Question]) -> None:
    """It fills the fused ranking up, with score zero; a dense model's score of zero is a rank like any other, a fusion's is not."""
    fillers = [(f"a{number}", 0.0) for number in range(10)]
    rankings = {"bm25": [("x", 2.0), ("y", 1.0), *fillers], "tfidf": [("y", 0.5), *fillers], "minilm": [("z", 0.0), ("x", -0.1)]}
    wrapped = {
        "both": {"kind": "fusion", "of": ["bm25", "tfidf"], "depth": 12},
        "all": {"kind": "fusion", "of": ["both", "minilm"], "depth": 12},
    }
    made = Parts(parse(["all"], k=[10], models=wrapped))

    def found(name: str, k: int) -> Ranking:
        def first(part: str, _: int) -> dict[str, Ranking]:
            return {"q0": rankings[part] if part in rankings else found(part, 12)}

        return made.method(name, first).search(questions[:1], k)["q0"]

    y, x = pytest.approx(1 / 61 + 1 / 62), pytest.approx(1 / 61)
    assert found("both", 5) == [("y", y), ("x", x), ("a0", 0.0), ("a1", 0.0), ("a2", 0.0)]
    assert found("all", 4) == [("x", pytest.approx(2 / 62)), ("y", x), ("z", x), ("a0", 0.0)]
    assert [made.config.evaluate.fills(name) for name in ("bm25", "tfidf", "both", "all", "minilm", "maxsim")] == [True] * 4 + [False] * 2


def test_a_cross_encoder_without_a_head_is_refused(bert: Path) -> None:
    """The library would give an encoder a random one, and rank by it."""
    with pytest.raises(UserError, match=r"evaluate\.models\.tiny\.model: the weights in .* lack classifier\.bias \(2 in all\)"):
        models.Cross("tiny", CrossConfig(kind="cross", model=str(bert), max_length=64), "cpu", 1)


def test_an_encoder_that_lacks_a_weight_is_refused_but_for_its_pooler(bert: Path, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    shutil.copytree(bert, tmp_path / "copy")
    file = tmp_path / "copy" / "model.safetensors"
    weights = load_file(file)
    chosen = DenseConfig(kind="dense", model=str(tmp_path / "copy"), pooling="mean", max_length=64)
    untrained = LateConfig(kind="late", model=str(tmp_path / "copy"), max_length=12, projection=False)
    save_file({name: weight for name, weight in weights.items() if "pooler" not in name}, file, {"format": "pt"})
    models.Dense("tiny", chosen, "cpu", 1)
    save_file({name: weight for name, weight in weights.items() if "layer.1.output.dense" not in name}, file, {"format": "pt"})
    with pytest.raises(UserError, match=r"lack encoder\.layer\.1\.output\.dense\.bias \(2 in all\) of BertModel"):
        models.Dense("tiny", chosen, "cpu", 1)
    with pytest.raises(UserError, match=r"lack encoder\.layer\.1\.output\.dense\.bias"):
        models.Late("tiny", untrained, "cpu", 1)


def test_a_model_that_cannot_be_fetched_is_named_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def offline(*_: Any, **__: Any) -> Any:
        raise OSError("offline")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(WorkflowError, match=r"cannot be had .*HF_HUB_OFFLINE, or give the directory of a downloaded copy$"):
        models.folder("jina", CrossConfig(kind="cross", model="org/name", revision="0" * 40, max_length=64))
    with pytest.raises(UserError, match=r"under 'Files and versions' of its page\), or a directory as evaluate\.models\.jina\.model$"):
        parse(["a"], models={"a": {"kind": "rerank", "of": "bm25", "by": "jina"}, "jina": {}})


@pytest.mark.parametrize(("device", "message"), [("gpu", "found 'gpu'; give auto, cpu or cuda"), ("cuda", "torch sees no GPU here")])
def test_a_device_that_is_not_there_is_named(bert: Path, monkeypatch: pytest.MonkeyPatch, device: str, message: str) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=message) as raised:
        models.Dense("tiny", DenseConfig(kind="dense", model=str(bert), pooling="mean", max_length=64), device, 1)
    assert str(raised.value).startswith("evaluate.device: ")


NINE = ["tfidf", "bm25", "maxsim", "colbert", "bge_large", "qwen3_0_6b", "qwen3_4b", "qwen3_4b_jina", "hybrid"]


def parse(methods: Sequence[str], **evaluate: Any) -> configuration.Config:
    return configuration.parse({"root": "r", "evaluate": {"methods": list(methods), **evaluate}})


def test_the_nine_are_in_the_table() -> None:
    pinned = {name: {"revision": f"{n:040x}"} for n, name in enumerate(["colbert", "bge_large", "qwen3_0_6b", "qwen3_4b", "jina"])}
    chosen = parse(NINE, models=pinned).evaluate
    assert set(chosen.models) == {"colbert", "bge_large", "qwen3_0_6b", "qwen3_4b", "qwen3_4b_jina", "hybrid", "jina"}
    assert chosen.depths() == {name: 100 if name in ("tfidf", "bm25", "bge_large", "qwen3_0_6b", "qwen3_4b") else 20 for name in NINE}
    assert configuration.parse(configuration.parse({"root": "r", "evaluate": chosen.model_dump()}).model_dump()).evaluate == chosen
    for name in pinned:
        users = {"jina": "qwen3_4b_jina"}.get(name, name)
        with pytest.raises(UserError, match=rf"evaluate\.models\.{name}\.revision is missing: .* is a hub id; set the commit"):
            parse([users], models={key: value for key, value in pinned.items() if key != name})


@pytest.mark.parametrize(
    ("methods", "table", "message"),
    [
        (["jina"], {"jina": {"revision": "0" * 40}}, "found 'jina'; name some of"),
        (["a"], {"a": {"kind": "fusion", "of": ["b"]}, "b": {"kind": "fusion", "of": ["a"]}}, "it is made of itself"),
        (["a"], {"a": {"kind": "fusion", "of": ["oracle"]}}, "found 'oracle'; name a method that searches"),
        (["a"], {"a": {"kind": "fusion", "of": ["nothing"]}}, "found 'nothing'"),
        (["a"], {"a": {"kind": "fusion", "of": ["bm25"], "depth": 15}}, "depth: found 15; 20 chunks are asked of it"),
        (["a"], {"a": {"kind": "rerank", "of": "bm25", "by": "bm25"}}, r"a\.by: found 'bm25'; name a model"),
        (["a"], {"a": {"kind": "rerank", "of": "b", "by": "minilm"}, "b": {"kind": "rerank", "of": "bm25", "by": "minilm", "depth": 50}},
         r"b\.depth: found 50; 100 chunks"),
        (["a"], {"a": {"kind": "rerank", "by": "minilm"}}, r"'evaluate\.models\.a\.of' is missing"),
        (["a"], {"a": {"kind": "sparse"}}, "evaluate.models.a"),
    ],
)  # fmt: skip
def test_mistakes_in_the_table_are_named(methods: list[str], table: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse(methods, models=table)


@pytest.mark.parametrize("wrong", [["a"], {"a": 1}, None, 3])
def test_a_method_that_is_no_name_is_refused(wrong: Any) -> None:
    with pytest.raises(UserError, match=r"evaluate\.methods\.1"):
        parse(["bm25", wrong])


def test_faiss_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(UserError, match=r"pip install '\.\[cpu\]'"):
        dense._faiss()
