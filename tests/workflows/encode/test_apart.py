"""What a submitted job does on a machine of its cluster that has a GPU, since its driver's has none."""

from __future__ import annotations

import os

import pytest

from intra import cluster, lineage, tracking
from intra.errors import UserError, WorkflowError
from workflows import evaluate

from .runs import Head, World

ONE = {"CPU": 1.0, "GPU": 1.0}


def seen(error: Exception | None = None) -> tuple[int, str]:
    if error is not None:
        raise error
    return os.getpid(), os.environ["CUDA_VISIBLE_DEVICES"]


def lost() -> None:
    os._exit(1)


@pytest.mark.slow
def test_work_apart_sees_its_gpu_and_its_errors_come_back(joined: Head) -> None:
    cluster.connect()
    process, gpu = cluster.apart(seen, worker=ONE, name="evaluate")
    assert process != os.getpid()
    assert gpu in ("0", "1")
    for error in (UserError("no such key; mend it"), WorkflowError("shard 3 is damaged")):
        with pytest.raises(type(error)) as caught:
            cluster.apart(seen, error, worker=ONE, name="evaluate")
        assert type(caught.value) is type(error)
        assert str(caught.value) == str(error)
    with pytest.raises(WorkflowError, match=r"^evaluate: ValueError: not foreseen; run the same command again$"):
        cluster.apart(seen, ValueError("not foreseen"), worker=ONE, name="evaluate")
    with pytest.raises(WorkflowError, match=r"evaluate: the process on the cluster was lost .*run the same command again"):
        cluster.apart(lost, worker=ONE, name="evaluate")


@pytest.mark.slow
def test_a_submitted_evaluation_with_gpus_is_done_apart_below_the_same_run(
    world: World, joined: Head, tmp_path_factory: pytest.TempPathFactory
) -> None:
    from mlflow import MlflowClient

    root = world.clone(str(tmp_path_factory.mktemp("apart")))
    asked = ["evaluate.methods=[bm25,tfidf]", "evaluate.answers=false", "evaluate.k=[5]"]
    alone = world.load(root, *asked, "seed=0")
    config = world.load(root, *asked, "evaluate.gpus_per_worker=1")
    with tracking.step(config, "nightly") as parent:
        evaluate.run(config)
    client = MlflowClient(tracking_uri=parent.uri)
    experiment = client.get_run(parent.run_id).info.experiment_id
    (run,) = client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{parent.run_id}'")
    assert run.info.run_name == "evaluate"
    assert run.info.status == "FINISHED"
    assert lineage.results(alone).manifest()["methods"] == ["bm25", "tfidf"]
