"""The benchmark of encoding as a user starts it, at a size that says nothing about speed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from intra import lineage, storage
from intra.backbone import locate
from intra.config import load
from intra.store import benchmark
from workflows import benchmark as workflow
from workflows import prepare

PROJECT = Path(__file__).parents[2]
SMALL = ["store.benchmark.chunks=60", "store.benchmark.repeats=1", "store.shard_chunks=20", "store.batch_tokens=256"]


def test_padding_is_the_share_of_what_the_encoder_is_given() -> None:
    assert benchmark.padding([[[1], [1, 2, 3, 4]], [[5, 6]]]) == pytest.approx(3 / 10)


def test_an_unknown_benchmark_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert workflow.main(["speed", "--config", "x.yaml"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: benchmark 'speed': there is no such one; name encode")


def test_a_plan_makes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert workflow.main(["encode", "--config", str(PROJECT / "configs/quickstart.yaml"), f"root={tmp_path}/root", "--dry-run"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"benchmark encode: to be measured; writes {tmp_path}/root/benchmark/encode.json"
    assert list(tmp_path.iterdir()) == []


def test_random_weights_are_a_backbone_that_a_store_can_be_made_of(tmp_path: Path) -> None:
    pool = ["data.synthetic.chunks=60", "data.synthetic.train_questions=1", "data.synthetic.test_questions=1"]
    config = load(PROJECT / "configs/quickstart.yaml", [f"root={tmp_path}", "backbone.train=true", *pool])
    prepare.run(config)
    benchmark._random_weights(config)
    assert lineage.weights_digest(config) == locate.digest(*lineage.model(config))


@pytest.mark.slow
@pytest.mark.parametrize("trained", [False, True])
def test_encode_gives_every_ratio(tmp_path: Path, trained: bool) -> None:
    command = [sys.executable, str(PROJECT / "workflows/benchmark.py"), "encode", "--config", str(PROJECT / "configs/quickstart.yaml"),
               f"backbone.train={str(trained).lower()}"]  # fmt: skip
    done = subprocess.run([*command, f"root={tmp_path}/root", *SMALL], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    place = f"{tmp_path}/root/benchmark/encode.json"
    assert done.stdout.splitlines()[-1] == place
    records = {record["name"]: record["value"] for record in storage.read_json(place)}
    assert all(value > 0 for name, value in records.items() if name != "padding")
    assert records["chunks"] == 60
    assert records["job_to_bare_loop"] == pytest.approx(records["job_active"] / records["bare_loop"])
    assert records["share_of_gemm_peak"] == pytest.approx(records["job_flops"] / records["gemm_peak"])
    assert records["padding"] <= 0.05 < records["random_batches_padding"]
    assert {"two_workers_to_one", "job_to_random_batches", "compute_share", "job_start_up"} <= set(records)
    assert storage.names(f"{tmp_path}/root/benchmark") == ["encode.json"]
    assert not Path(tmp_path, "root", "store").exists()
