"""The benchmark of encoding as a user starts it, at a size that says nothing about speed."""

from __future__ import annotations

import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest

from intra import lineage, storage
from intra.backbone import locate
from intra.config import load
from intra.store import benchmark
from intra.store.benchmark import Turn
from intra.store.progress import Progress
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


def progress(*shards: tuple[str, int, float, float]) -> Progress:
    """Of (worker, tokens, start, end)."""
    made = Progress(len(shards), len(shards), 0.0)
    for worker, tokens, start, end in shards:
        line = {"rows": 1, "tokens": tokens, "bytes": 8, "memory": 1, "compute": end - start}
        made.add({**line, "worker": worker, "started": 2.0 + start, "ended": 2.0 + end})
    return made


def alone(active: float) -> Progress:
    return progress(("a", 4, 0.0, active))


def pair(one: float, other: float) -> Progress:
    return progress(("a", 2, 0.0, one), ("b", 2, 0.0, other))


def test_a_ratio_is_taken_within_a_turn_and_the_median_counts() -> None:
    """The machine is three times slower in the second turn: no ratio moves. In the third another program takes half of a core: one does."""
    turns = [
        Turn(peak=100.0, bare=10.0, mixed=4.0, job=alone(11.0), pair=pair(5.5, 5.5), stolen=0.0),
        Turn(peak=100.0 / 3, bare=30.0, mixed=12.0, job=alone(33.0), pair=pair(16.5, 16.5), stolen=0.0),
        Turn(peak=100.0, bare=10.0, mixed=4.0, job=alone(11.0), pair=pair(9.0, 9.0), stolen=0.2),
    ]
    made = benchmark.records([[1, 2], [3, 4]], [[[1, 2], [3, 4]]], [[[1, 2]]], 550.0, turns)
    found = {record["name"]: record["value"] for record in made}
    assert found["job_to_bare_loop"] == pytest.approx(1.1)
    assert found["two_workers_to_one"] == pytest.approx(2.0)
    assert found["share_of_gemm_peak"] == pytest.approx(550 / 11 / 100)
    assert found["job_to_random_batches"] == pytest.approx(4 / 11 / (2 / 4))
    assert found["stolen"] == 0.0


def test_waiting_for_the_last_shard_is_in_the_wall_time_alone() -> None:
    """One worker does two shards of 1 token a second each, then waits for the other's third."""
    both = progress(("a", 2, 0.0, 2.0), ("b", 2, 0.0, 2.0), ("b", 2, 2.0, 4.0))
    turn = Turn(peak=1.0, bare=6.0, mixed=6.0, job=progress(("a", 6, 0.0, 6.0)), pair=both, stolen=0.0)
    found = {record["name"]: record["value"] for record in benchmark.records([[1]], [[[1]]], [[[1]]], 1.0, [turn])}
    assert found["two_workers_to_one"] == pytest.approx(2.0)
    assert found["two_workers_to_one_wall"] == pytest.approx(1.5)


def test_stolen_time_is_a_share_of_all() -> None:
    clocks = namedtuple("clocks", "user system idle steal guest")
    assert benchmark.stolen(clocks(10, 5, 5, 1, 3), clocks(16, 6, 6, 3, 9)) == pytest.approx(0.2)
    assert benchmark.stolen(clocks(10, 5, 5, 1, 3), clocks(10, 5, 5, 1, 3)) == 0.0


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
    assert all(value > 0 for name, value in records.items() if name not in ("padding", "stolen"))
    assert records["chunks"] == 60
    assert records["job_to_bare_loop"] == pytest.approx(records["job_active"] / records["bare_loop"])
    assert records["share_of_gemm_peak"] == pytest.approx(records["job_flops"] / records["gemm_peak"])
    assert records["padding"] <= 0.05 < records["random_batches_padding"]
    assert {"two_workers_to_one", "job_to_random_batches", "compute_share", "job_start_up"} <= set(records)
    assert storage.names(f"{tmp_path}/root/benchmark") == ["encode.json"]
    assert not Path(tmp_path, "root", "store").exists()
