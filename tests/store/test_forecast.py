from __future__ import annotations

from pathlib import Path

import pytest

from intra import config as configuration
from intra.config import Config
from intra.errors import UserError
from intra.store import benchmark, forecast

CONFIGS = Path(__file__).parents[2] / "configs"


def load(*overrides: str) -> Config:
    return configuration.load(CONFIGS / "paper.yaml", ["backbone.train=false", *overrides])


def test_the_papers_pool_on_paper() -> None:
    """512 GB of bf16 states, 256 GB of int8 for 100M tokens of width 2560; a 4B encoder of 34 layers."""
    found = forecast.forecast(load(), 759_000, 100_000_000)
    assert found.shards == 742
    assert found.states == pytest.approx(512e9, rel=0.001)
    assert forecast.forecast(load("store.dtype=int8"), 759_000, 100_000_000).states == pytest.approx(256e9, rel=0.002)
    # The linear maps of an encoder of about 3.2B parameters beside its embedding: 2 operations a parameter and token.
    assert found.flops == pytest.approx(2 * 3.2e9 * 100e6, rel=0.02)
    assert found.seconds == pytest.approx(found.flops / (0.6 * 790e12))


def test_a_worker_without_a_gpu_is_reckoned_by_its_threads() -> None:
    cpu = load("store.gpus_per_worker=0", "store.threads=4", "store.forecast.utilisation=0.5")
    found = forecast.forecast(cpu, 1000, 100_000)
    assert found.seconds == pytest.approx(found.flops / (0.5 * 0.4e12))
    assert "hours of one worker at 50% of 0.4 TFLOP/s" in "\n".join(forecast.lines(cpu, found))
    stated = load("store.gpus_per_worker=0", "store.forecast.tflops=2")
    assert forecast.tflops(stated.store) == 2


def test_what_cannot_fit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load(f"root={tmp_path}", "store.workers=2")
    found = forecast.forecast(config, 759_000, 100_000_000)
    monkeypatch.setattr(forecast.shutil, "disk_usage", lambda place: type("Usage", (), {"free": 10**11}))
    with pytest.raises(UserError, match=r"the store needs 539\.\d GB more, the disk has 100 GB free; .* or store.dtype=int8"):
        forecast.check(config, found)
    monkeypatch.setattr(forecast.shutil, "disk_usage", lambda place: type("Usage", (), {"free": 10**12}))
    monkeypatch.setattr(forecast, "available_memory", lambda: 30 * 10**9)
    with pytest.raises(UserError, match=r"store.workers: 2 workers of \d+\.?\d* GB need .* lower store.workers"):
        forecast.check(config, found)
    forecast.check(load(f"root={tmp_path}", "store.workers=1"), found)


@pytest.mark.parametrize(("gpus", "asked", "found"), [(0, "auto", "cpu"), (0, "cpu", "cpu"), (1, "auto", "cuda"), (1, "cpu", "cpu")])
def test_the_benchmarks_bare_loop_computes_where_the_workers_do(monkeypatch: pytest.MonkeyPatch, gpus: int, asked: str, found: str) -> None:
    """Also where the driver has no GPU: there the load refuses, and the job is not compared with a CPU."""
    config = configuration.load(CONFIGS / "quickstart.yaml", [f"store.gpus_per_worker={gpus}", f"backbone.device={asked}"])

    class Loaded(Exception):
        pass

    def load(*_: object, device: str, **__: object) -> None:
        raise Loaded(device)

    monkeypatch.setattr("intra.backbone.model.load", load)
    assert forecast.device(config) == found
    with pytest.raises(Loaded, match=found):
        benchmark._measured(config, lambda _: None, lambda _: None, lambda _: 1)  # type: ignore[arg-type,return-value]
