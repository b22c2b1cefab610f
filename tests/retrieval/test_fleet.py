"""The pool across Ray actors: parts, workers and deaths change no ranking. One Ray for all of it."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from intra import cluster
from intra.backbone.model import Backbone
from intra.config import SearchConfig
from intra.data.schema import Question
from intra.errors import UserError, WorkflowError
from intra.retrieval import intrinsic, search
from intra.retrieval.fleet import Fleet, Holder
from intra.retrieval.pools import Ask, Form, Local
from intra.retrieval.retriever import Retriever
from intra.retrieval.scorers import Keys
from intra.retrieval.vectorfile import VectorFile

from .conftest import POOLED, MemoryStore

ROWS = 7 * 1024 - 100  # seven tiles


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[None]:
    import ray

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_worker_niceness", "0")
        patch.delenv("RAY_ADDRESS", raising=False)
        cluster.connect()
        yield
        ray.shutdown()


@pytest.fixture(scope="module")
def vectors(tmp_path_factory: pytest.TempPathFactory) -> VectorFile:
    made = torch.randn(ROWS, POOLED, 32, generator=torch.Generator().manual_seed(0))
    made[6000:6500] = made[500:1000]  # equal scores in parts far from each other
    return VectorFile.write(str(tmp_path_factory.mktemp("pool") / "pooled"), made.split(1000))


def fleet(vectors: VectorFile, backbone: Backbone, **settings: int) -> Fleet:
    opens = functools.partial(VectorFile, vectors.path, *vectors.shape)
    return Fleet(opens, len(vectors), Keys.of(backbone), **settings)  # type: ignore[arg-type]


def test_a_vector_file_is_read_as_a_store(vectors: VectorFile) -> None:
    whole = torch.cat([tile for _, tile in vectors.tiles(ROWS)])
    assert [first for first, _ in vectors.tiles(3000)] == [0, 3000, 6000]
    assert torch.equal(torch.cat([tile for _, tile in vectors.tiles(1000, 1500, 2500)]), whole[1500:4000])
    assert torch.equal(vectors.pooled([7000, 3, 3]), whole[[7000, 3, 3]])
    assert list(vectors.tiles(1000, 5, 0)) == []


class InProcess:
    """What the fleet asks of Ray, in this process: an actor is an object, a reference what it stands for, or the error it ends in."""

    def __init__(self, patch: pytest.MonkeyPatch, **node: float) -> None:
        import ray

        self.started = 0
        self.fails: list[Exception] = []  # of the next results that are fetched
        patch.setattr(ray, "remote", lambda **_: lambda made: type("Actor", (), {"remote": functools.partial(self._start, made)}))
        patch.setattr(ray, "put", lambda value: [lambda: value])
        patch.setattr(ray, "get", self._get)
        patch.setattr(ray, "wait", lambda asked, **_: (asked[:1], asked[1:]))
        patch.setattr(ray, "nodes", lambda: [{"Alive": True, "NodeID": "n1", "Resources": node}])
        patch.setattr(ray, "cluster_resources", lambda: node)

    def _start(self, made: Callable[..., Any], *arguments: Any) -> Any:
        build, opens, (keys,), *settings = arguments  # a reference that an actor is given comes to it as what it stands for
        self.started += 1
        worker = made(build, opens, keys(), *settings)
        return type("Handle", (), {"work": type("Method", (), {"remote": lambda row: (lambda: worker.work(row),)})})()

    def _get(self, reference: Any) -> Any:
        if isinstance(reference, tuple) and self.fails:
            raise self.fails.pop()
        return reference[0]()


def test_workers_of_the_configuration_rank_as_this_process(
    backbone: Backbone, store: MemoryStore, retriever: Retriever, questions: list[Question], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    store.url = "here"  # type: ignore[attr-defined]
    monkeypatch.setattr("intra.store.reader.ChunkStore", lambda url: {"here": store}[url])
    expected = [each.search(questions, 10) for each in search.methods(search.Passes(backbone, store, retriever))]  # type: ignore[arg-type]
    process = InProcess(monkeypatch, CPU=8.0)
    settings = SearchConfig(workers=2, threads=1)
    found = search.methods(search.Passes(backbone, store, retriever, search=settings))  # type: ignore[arg-type]
    assert [each.search(questions, 10) for each in found] == expected
    assert process.started == 1  # all chunks are in one tile
    assert capsys.readouterr().err.count("workers") == 0


def test_workers_that_do_not_fit_are_left_out_and_none_is_one_line(
    vectors: VectorFile, backbone: Backbone, queries: Tensor, weights: Tensor, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    process, ask = InProcess(monkeypatch, CPU=7.0), Ask("per_head", queries, weights, 1.0)
    pool = fleet(vectors, backbone, workers=4, threads=3)
    assert (process.started, len(pool.actors), len(pool.parts)) == (2, 2, 4)
    assert capsys.readouterr().err == "search: 2 of 4 workers (3 CPU each) fit the cluster now; it goes on with those\n"
    truth = intrinsic.exact(Local(vectors, Keys.of(backbone), 2048, "cpu"), ask, 50, Form("head_space"))
    assert intrinsic.exact(pool, ask, 50, Form("head_space")).pairs == truth.pairs
    with pytest.raises(
        UserError, match=r"^retriever\.search\.workers: no worker of 1 CPU and 1 GPU fits: there are 7 CPU and 0 GPU here; lower"
    ):
        fleet(vectors, backbone, workers=4, gpus=1)
    assert process.started == 2


def test_a_gpu_that_this_process_holds_is_no_workers(
    vectors: VectorFile, backbone: Backbone, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import ray

    class Task:
        """As Ray tells the process that does a task."""

        worker = type("Worker", (), {"mode": ray.WORKER_MODE})
        held: ClassVar[dict[str, float]] = {"CPU": 8.0, "GPU": 1.0}  # the CPUs go to others while it waits for them

        def get_node_id(self) -> str:
            return "n1"

        def get_assigned_resources(self) -> dict[str, float]:
            return self.held

    process = InProcess(monkeypatch, CPU=8.0, GPU=4.0)
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray, "get_runtime_context", Task)
    monkeypatch.setattr(Holder, "__init__", lambda *_: None)
    fleet(vectors, backbone, workers=4, gpus=1)
    assert process.started == 3
    assert capsys.readouterr().err == "search: 3 of 4 workers (1 CPU and 1 GPU each) fit the cluster now; it goes on with those\n"
    Task.held["GPU"] = 4.0
    with pytest.raises(UserError, match=r"of 1 CPU and 1 GPU fits: there are 8 CPU and 4 GPU \(this process holds 4 GPU\) here; lower"):
        fleet(vectors, backbone, workers=4, gpus=1)
    monkeypatch.setattr(Task, "get_node_id", lambda self: "n2")
    fleet(vectors, backbone, workers=4, gpus=1)
    assert process.started == 3 + 4


def test_what_a_worker_did_that_was_killed_for_memory_is_done_again(
    vectors: VectorFile, backbone: Backbone, queries: Tensor, weights: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray.exceptions import OutOfMemoryError

    process, ask = InProcess(monkeypatch, CPU=8.0), Ask("per_head", queries, weights, 1.0)
    pool = fleet(vectors, backbone, workers=2, parts=3)
    killed = pool.actors[0]
    process.fails = [OutOfMemoryError("the node runs out of memory")]
    truth = intrinsic.exact(Local(vectors, Keys.of(backbone), 2048, "cpu"), ask, 50, Form("head_space"))
    assert intrinsic.exact(pool, ask, 50, Form("head_space")).pairs == truth.pairs
    assert killed not in pool.actors
    process.fails = [OutOfMemoryError("the node runs out of memory")] * 99
    with pytest.raises(WorkflowError, match=r"workers are lost again and again \(the node runs out of memory\); check memory"):
        pool.best(ask, Form(), 5, None)


@pytest.mark.slow
def test_a_worker_that_fits_no_machine_is_told_at_once(ray_cluster: None, vectors: VectorFile, backbone: Backbone) -> None:
    begun = time.monotonic()
    with pytest.raises(UserError, match=r"no worker of 9999 CPU fits: there are \d+ CPU and 0 GPU here"):
        fleet(vectors, backbone, workers=1, threads=9999)
    assert time.monotonic() - begun < 30


@pytest.mark.slow
def test_parts_workers_and_deaths_change_no_ranking(
    ray_cluster: None, vectors: VectorFile, backbone: Backbone, queries: Tensor, weights: Tensor, tmp_path: Path
) -> None:
    import ray

    asks = [Ask(kind, queries, weights, 1.0) for kind in ("per_head", "mixture")]
    truth = {}
    for ask in asks:
        local = Local(vectors, Keys.of(backbone), 2048, "cpu")
        truth[ask.kind] = (
            intrinsic.exact(local, ask, 50, Form("head_space")),
            intrinsic.approximate(local, ask, 50, Form("linear"), 100, 600),
        )

    def same(pool: Fleet, ask: Ask) -> None:
        exact, approximate = truth[ask.kind]
        assert intrinsic.exact(pool, ask, 50, Form("head_space")).pairs == exact.pairs  # to the bit
        found = intrinsic.approximate(pool, ask, 50, Form("linear"), 100, 600)
        assert [[row for row, _ in each] for each in found.pairs] == [[row for row, _ in each] for each in approximate.pairs]

    def dies_at_work(victim: object) -> pytest.MonkeyPatch:
        """Its tasks have been handed out, and some are perhaps done, when it is killed."""
        patch, wait = pytest.MonkeyPatch(), ray.wait

        def kill_and_wait(*arguments: object, **named: object) -> object:
            ray.kill(victim)
            patch.undo()
            return wait(*arguments, **named)

        patch.setattr(ray, "wait", kill_and_wait)
        return patch

    damaged = tmp_path / "damaged"
    damaged.write_bytes(Path(vectors.path).read_bytes())
    for workers, parts in ((1, 2), (2, 3), (2, 7)):
        pool = fleet(VectorFile(str(damaged), *vectors.shape), backbone, workers=workers, parts=parts, tile_chunks=1024)
        assert (len(pool.parts), len(pool.actors)) == (parts, workers)
        for ask in asks:
            same(pool, ask)
        victim = pool.actors[0]
        dies_at_work(victim)
        same(pool, asks[1])
        assert victim not in pool.actors
        assert len(pool.actors) == 1  # the other one, or one in its place
        if parts < 7:
            pool.close()
    with pytest.raises(UserError, match=r"^search, chunks \d+ to \d+: .*int8 does not serve retriever.scoring=mixed"):
        pool.log_sums(replace(asks[0], kind="mixed", queries=torch.zeros(1, 5, 32)), Form("int8"))
    ray.kill(pool.actors[0])
    damaged.write_bytes(damaged.read_bytes()[:-400])
    with pytest.raises(WorkflowError, match="rows 6144 to 7067 are not all there"):
        pool.best(asks[0], Form("head_space"), 5, None)
    pool.close()
