"""The pool across Ray actors: parts, workers and deaths change no ranking. One Ray for all of it."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from intra import cluster
from intra.backbone.model import Backbone
from intra.errors import UserError, WorkflowError
from intra.retrieval import intrinsic
from intra.retrieval.fleet import Fleet
from intra.retrieval.pools import Ask, Form, Local
from intra.retrieval.scorers import Keys
from intra.retrieval.vectorfile import VectorFile

from .conftest import POOLED

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


@pytest.mark.slow
def test_parts_workers_and_deaths_change_no_ranking(
    ray_cluster: None, vectors: VectorFile, backbone: Backbone, queries: Tensor, weights: Tensor, tmp_path: Path
) -> None:
    import ray

    asks = [Ask(kind, queries, weights, 1.0) for kind in ("per_head", "mixture")]
    truth = {}
    for ask in asks:
        local = Local(vectors, Keys.of(backbone), 2048, "cpu")
        truth[ask.kind] = (intrinsic.exact(local, ask, 50, Form("head_space")), intrinsic.approximate(local, ask, 50, Form("linear"), 100))

    def same(pool: Fleet, ask: Ask) -> None:
        exact, approximate = truth[ask.kind]
        assert intrinsic.exact(pool, ask, 50, Form("head_space")).pairs == exact.pairs  # to the bit
        found = intrinsic.approximate(pool, ask, 50, Form("linear"), 100)
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
