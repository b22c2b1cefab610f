"""The whole path by one command, with Ray, on a local path and on S3: two runs with one seed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from intra import config as configuration
from intra import storage
from intra.data import synthetic
from intra.errors import UserError
from workflows import nightly as workflow

from ..conftest import make_bert, write_world

PROJECT = Path(__file__).parents[2]
SMALL = [
    "data.synthetic.chunks=80", "data.synthetic.train_questions=24", "data.synthetic.test_questions=20", "retriever.tokens=4",
    "retriever.train.steps=4", "retriever.train.batch_size=8", "evaluate.k=[5,10]", "evaluate.bootstrap=100", "store.shard_chunks=32",
]  # fmt: skip


def nightly(root: str, folder: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(PROJECT / "workflows/nightly.py"), "--config", str(PROJECT / "configs/quickstart.yaml")]
    return subprocess.run([*command, f"root={root}", *SMALL, *overrides], cwd=folder, capture_output=True, text=True)


@pytest.mark.slow
def test_local_and_s3_runs_with_one_seed_give_the_same_rankings_and_metrics(s3_root: str, tmp_path: Path) -> None:
    """The second run is on S3, with another number of encoding workers and another query batch; then both redo nothing."""
    roots = str(tmp_path / "root"), s3_root
    outputs = []
    for root, other in zip(roots, ((), ("store.workers=1", "retriever.query_batch=5", "retriever.tile_chunks=17")), strict=True):
        done = nightly(root, tmp_path, *other)
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1] == f"{root}/results/results.json"
        outputs.append(done.stdout.partition("\nreport ")[0].splitlines()[-8:])
    assert outputs[0] == outputs[1]

    records = [storage.read_json(f"{root}/results/results.json") for root in roots]
    assert records[0] == records[1]
    assert {record["method"] for record in records[0]} == {"intra", "maxsim", "s0_reranked", "bm25", "tfidf", "random", "oracle"}
    runs = [sorted(name for name in storage.files(f"{root}/results") if name.endswith(".trec")) for root in roots]
    assert runs[0] == runs[1]
    assert len(runs[0]) == 7
    for name in runs[0]:
        assert storage.read_bytes(f"{roots[0]}/results/{name}") == storage.read_bytes(f"{roots[1]}/results/{name}"), name
    assert [name for name in storage.files(f"{s3_root}/store") if name.endswith("manifest.json")]

    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{roots[0]}/mlflow/mlflow.db")
    (version,) = client.search_model_versions("name = 'quickstart-retriever'")
    (recall,) = [r for r in records[0] if (r["method"], r["benchmark"], r["metric"]) == ("intra", "synthetic", "complete_recall_at_5")]
    assert version.tags["synthetic/complete_recall_at_5"].startswith(f"{recall['value']:.3f} [")
    (folder,) = Path(roots[0], "retriever").iterdir()
    assert version.tags["fingerprint"] == folder.name
    registered = Path(client.download_artifacts(version.run_id, "quickstart-retriever", str(tmp_path)))
    assert (registered / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert {file.name for file in registered.iterdir()} == {"model.safetensors", "config.json", "README.md"}

    again = nightly(s3_root, tmp_path)
    assert again.returncode == 0
    assert again.stderr.splitlines() == [f"{step}: complete" for step in ("prepare", "encode", "train", "evaluate")]


@pytest.mark.slow
def test_over_a_frozen_encoder_two_runs_rank_alike(tmp_path: Path) -> None:
    """From files to results: another query batch and another scorer, in a store of another shard size, change no ranking."""
    write_world(tmp_path / "data")
    encoder = make_bert(tmp_path / "bert", {word.lower() for text in synthetic.vocabulary() for word in text.split()})
    path = tmp_path / "frozen.yaml"
    values = {
        "root": "unused",
        "data": {"source": "jsonl", "path": str(tmp_path / "data"), "passages": "passages.jsonl"},
        "backbone": {
            "train": True,
            "architecture": {"encoder": str(encoder), "encoder_sample": 30, "matching_heads": 3, "hidden_size": 48, "intermediate_size": 48,
                             "decoder_layers": 2, "heads": 6, "kv_heads": 6, "head_dim": 24},
            "warmstart": {"steps": 4, "batch_size": 4, "micro_batch": 2, "questions": 1, "distractors": 2, "bm25_distractors": 1,
                          "cloze_share": 0.3, "extra_chunks": 8, "extra_from": 20, "retrieval_scoring": "mixture", "warmup_steps": 0,
                          "losses": {"answer": 0.5, "retrieval": 1.0, "hop": 0.5, "attention": 0.5}, "checkpoint_every": 2},
            "answer_tokens": 3,
        },
        "retriever": {"tokens": 4, "initial_context": 3, "scoring": "mixture", "train": {"steps": 3, "batch_size": 8, "threads": 1}},
        "evaluate": {"k": [5, 10], "bootstrap": 100, "methods": ["intra", "maxsim", "bm25"], "threads": 1},
    }  # fmt: skip
    path.write_text(yaml.safe_dump(values))
    outputs = []
    for number, other in enumerate(((), ("store.shard_chunks=16", "retriever.query_batch=3", "retriever.search.scorer=int8"))):
        command = [sys.executable, str(PROJECT / "workflows/nightly.py"), "--config", str(path), f"root={tmp_path / str(number)}", *other]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        outputs.append(storage.read_json(f"{tmp_path / str(number)}/results/results.json"))
    assert outputs[0] == outputs[1]
    (card,) = (tmp_path / "0" / "backbone").glob("*/README.md")
    assert f"the frozen encoder `{encoder}`" in card.read_text()
    assert "unmodified" not in card.read_text()
    assert "30% of the worlds" in card.read_text()
    (folder,) = (tmp_path / "0" / "backbone").iterdir()
    assert {"config.json", "model.safetensors", "tokenizer.json", "curve.png"} <= {file.name for file in folder.iterdir()}


@pytest.mark.parametrize(
    ("overrides", "status", "found"),
    [
        (["data.sauce=jsonl"], 2, "unknown key 'data.sauce'; did you mean 'data.source'?"),
        (["retriever.tokens=many"], 2, "'retriever.tokens': found 'many'"),
        (["data.source=jsonl", "data.path=absent"], 2, "/absent: no such folder"),
        (["backbone.model=absent/"], 2, "absent"),
        (["root=s3://nowhere/run"], 1, "http://127.0.0.1:9"),
    ],
)
def test_a_mistake_is_one_line(overrides: list[str], status: int, found: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"AWS_ENDPOINT_URL": "http://127.0.0.1:9", "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}.items():
        monkeypatch.setenv(name, value)
    done = nightly(str(tmp_path / "root"), tmp_path, *overrides)
    assert done.returncode == status
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith("error: ")
    assert found in done.stderr
    assert not (tmp_path / "root").exists()


def test_the_plan_makes_nothing_and_shows_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a-secret-of-the-environment")
    done = nightly(str(tmp_path / "root"), tmp_path, "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "a-secret-of-the-environment" not in done.stdout + done.stderr
    plan = done.stdout.partition("---\n")[2].splitlines()
    assert plan[0].startswith("prepare: to be made")
    assert sum("waits for the dataset" in line for line in plan) == 3
    assert not (tmp_path / "root").exists()


def test_files_of_the_hub_come_first(tmp_path: Path) -> None:
    """Without them no step has a fingerprint: the plan names them, and a run fetches them before it asks for one."""
    entry = {"format": "hotpotqa", "path": "dev.json", "benchmark": "hotpotqa", "split": "test", "repo": "org/set", "revision": "a" * 40}
    values = {"root": str(tmp_path / "run"), "data": {"source": "files", "path": str(tmp_path), "files": [entry], "offline": True}}
    config = configuration.parse(values)
    fetched, others = workflow.plan(config)[1:]
    assert fetched == f"  org/set at {'a' * 40}: dev.json"
    assert others == "the other steps have their plans once these files are there"
    with pytest.raises(UserError, match=r"dev.json of org/set .* offline nothing is fetched"):
        workflow.run(config)
