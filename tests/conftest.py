"""What every test may use."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: small tensors, and other tests beside this one


@pytest.fixture(autouse=True)
def _one_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reaches a model hub or reports usage."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """A local S3 server with one bucket, `tests`. The usual AWS variables point at it while the session runs."""
    endpoint = f"http://127.0.0.1:{free_port()}"
    variables = {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", endpoint.rsplit(":")[-1]],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        import boto3
        from botocore.exceptions import EndpointConnectionError

        client = boto3.client("s3")
        for _ in range(150):
            try:
                client.create_bucket(Bucket="tests")
                break
            except EndpointConnectionError:
                time.sleep(0.2)  # the server takes a second or two to listen
        else:
            raise RuntimeError("the S3 server did not start")
        yield endpoint
    server.terminate()
    server.wait()


@pytest.fixture
def s3_root(s3_server: str) -> str:
    """An empty prefix on the local S3 server."""
    return f"s3://tests/{uuid.uuid4().hex}"


@pytest.fixture(params=["local", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty root, once on the local disk and once on S3."""
    return str(tmp_path / "root") if request.param == "local" else request.getfixturevalue("s3_root")


def make_bert(path: Path, words: Iterable[str]) -> Path:
    """The directory of a tiny BERT with random weights and a WordPiece tokenizer of the words, whose file cuts texts at 8 tokens."""
    import torch
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    entries = list(dict.fromkeys(["[PAD]", "[UNK]", "[CLS]", "[SEP]", ".", ",", "?", ":", "'", "s", "question", "answer", *sorted(words)]))
    tokenizer = Tokenizer(models.WordPiece({word: number for number, word in enumerate(entries)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    tokenizer.enable_truncation(8)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(path)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        BertModel(
            BertConfig(vocab_size=len(entries), hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64),
            add_pooling_layer=False,
        ).save_pretrained(path)
    return path


def write_world(data: Path) -> None:
    """A synthetic world of 60 chunks as the files that `data.source: jsonl` reads: passages.jsonl, questions/b.<split>.jsonl."""
    from intra.config import SyntheticConfig
    from intra.data import synthetic

    passages, questions = synthetic.generate(SyntheticConfig(chunks=60, train_questions=24, test_questions=6), 0)
    (data / "questions").mkdir(parents=True)
    texts = [{"id": item.passage_id, "title": item.title, "text": item.text} for item in passages]
    (data / "passages.jsonl").write_text("\n".join(map(json.dumps, texts)))
    for split in ("train", "test"):
        rows = [{"id": item.question_id, "question": item.question, "answers": list(item.answers), "gold_ids": list(item.gold_ids)}
                for item in questions if item.split == split]  # fmt: skip
        (data / "questions" / f"b.{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
