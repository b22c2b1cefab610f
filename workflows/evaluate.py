"""Evaluates the methods on the test questions: recall from their rankings, answers of the same backbone from stored states.

    python workflows/evaluate.py --config configs/quickstart.yaml
    python workflows/evaluate.py --config configs/nightly.yaml --expect > accepted.yaml     # to judge later nights by
    python workflows/evaluate.py --compare runs/a runs/b             # two runs side by side, with paired significance
    python workflows/evaluate.py --config configs/quickstart.yaml evaluate.methods=[bm25,tfidf] evaluate.answers=false     # dataset only
    ray job submit --address http://HEAD:8265 --working-dir . -- python workflows/evaluate.py --config configs/paper.yaml \\
        root=s3://bucket/run data.path=s3://bucket/data tracking.uri=http://MLFLOW:5000

With evaluate.workers > 1, or GPUs for them, Ray Data encodes the corpora of the baselines' models; their bytes do not depend on it. A
submitted job with evaluate.gpus_per_worker evaluates in a process of the cluster that has a GPU: its own, on the head, has none.
Reads the dataset, the chunk store (for answers and INTRA's methods) and the retriever; writes <root>/results/. Prints a table, and the
path of results.json as its last line. A method that is done stays done: the same command goes on after an interruption.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from intra import cli, cluster, lineage, tracking
from intra.config import Config
from intra.errors import UserError, WorkflowError
from intra.evaluate_config import DenseConfig, EvaluateConfig
from intra.evaluation import parts
from intra.evaluation import run as evaluation

if TYPE_CHECKING:
    from intra.baselines.corpus import Corpus


def plan(config: Config) -> list[str]:
    """What exists and what will be made. Makes nothing."""
    parts.check(config)
    dataset = lineage.dataset(config)
    if not dataset.complete():
        return [f"evaluate: waits for the dataset {dataset.url} (workflows/prepare.py)"]
    waits = []
    for source in parts.needed(config):
        if not source.complete():
            waits.append(f"evaluate: waits for the {source.kind} {source.url} (workflows/{source.made_by}.py)")
            if source.kind == "backbone":
                return waits  # what is made with it is named by its weights
    artifact, names = lineage.results(config), config.evaluate.methods
    if artifact.complete():
        return [f"evaluate: results {artifact.url} are complete ({', '.join(names)})"]
    questions = sum(splits.get("test", 0) for splits in dataset.manifest()["questions"].values())
    marks = lineage.Marks(config)
    kinds = (lineage.ranking, lineage.answers) if config.evaluate.answers else (lineage.ranking,)
    done = [name for name in names if all(kind(config, name, marks).complete() for kind in kinds)]
    answers = f"answers from {config.retriever.answer_size} chunks each" if config.evaluate.answers else "no answers"
    return [
        f"evaluate: results {artifact.url}: {questions:,} questions, {answers}, by {', '.join(names)}; done: {', '.join(done) or 'none'}",
        *waits,
    ]


def run(config: Config) -> str:
    """Makes the results unless they are complete, prints the table and the places. Returns the place of results.json."""
    parts.check(config)
    make(config)
    return evaluation.publish(config, lineage.results(config))


def make(config: Config) -> None:
    """Makes the results unless they are complete: what loads a model on the workers, where there are some.

    Raises UserError and WorkflowError as `evaluation.make`.
    """
    artifact = lineage.results(config)
    if artifact.complete():
        return
    failed = parts.unloadable(config)
    for name, error in failed.items():
        print(f"error: model {name} fails its methods: {error}", file=sys.stderr)
    if config.evaluate.workers > 1 or config.evaluate.gpus_per_worker > 0:
        failed |= _encode(config)
    parent = tracking.current()
    _placed(config, "evaluate", _evaluate, parent and (parent.uri, parent.run_id), failed)


def _placed(config: Config, name: str, work: Callable[..., None], *arguments: Any) -> None:
    """Does `work(configuration's values, *arguments)` here, or, in a submitted job with evaluate.gpus_per_worker, where there is a GPU."""
    if not cluster.joined() or config.evaluate.gpus_per_worker == 0:
        work(config.model_dump(), *arguments)
        return
    cluster.connect(config)
    worker = {"CPU": float(config.evaluate.threads), "GPU": max(1.0, config.evaluate.gpus_per_worker)}
    cluster.wait_for(worker, 1, config.cluster.wait_minutes, "evaluate.gpus_per_worker", "set it to 0 to evaluate without")
    cluster.apart(work, config.model_dump(), *arguments, worker=worker, name=name)


def _evaluate(values: dict[str, Any], parent: tuple[str, str] | None, failed: dict[str, Exception]) -> None:
    """The evaluation; `parent` is the MLflow run (uri, id) that it lies below, `failed` what `_encode` returned."""
    from intra.config import parse

    config = parse(values)
    with tracking.below(parent):
        evaluation.make(config, lineage.results(config), failed)


def _tune(values: dict[str, Any], name: str) -> None:
    from intra.baselines import tuning
    from intra.config import parse

    tuning.folder(parse(values), name)


def _encode(config: Config) -> dict[str, Exception]:
    """Makes the missing shards of the baselines' corpora on the cluster, for rankings that are to be made. The evaluation then finds them.

    Returns the models whose corpora could not be made, and why. Raises UserError where no worker fits, or the evaluation itself would end.
    """
    _, pool = evaluation.test_set(config)
    made_of, marks = parts.Parts(config), lineage.Marks(config)
    open_ = [name for name in config.evaluate.depths() if not lineage.ranking(config, name, marks).complete()]
    todo: list[dict[str, Any]] = []
    failed: dict[str, Exception] = {}
    for name in dict.fromkeys(filter(None, (parts.encoder(config, method) for method in open_))):
        try:
            if missing := made_of.corpus(name, pool).missing():
                model = config.evaluate.models[name]
                if isinstance(model, DenseConfig) and model.tune is not None:
                    _placed(config, f"fine-tuning of {name}", _tune, name)  # by one process, before many read it
                todo += [{"name": name, "first": shard.start, "stop": shard.stop} for shard in missing]
        except (UserError, WorkflowError) as error:
            failed[name] = error
    if todo:
        cluster.connect(config)
        failed |= _on_cluster(config, lineage.dataset(config).url, todo)
    return failed


def _on_cluster(config: Config, dataset: str, todo: list[dict[str, Any]]) -> dict[str, Exception]:
    import ray
    from ray.data import ActorPoolStrategy
    from ray.exceptions import RayError
    from tqdm import tqdm

    settings = config.evaluate
    if settings.gpus_per_worker == 0 and settings.device not in ("auto", "cpu"):
        raise UserError(f"evaluate.device={settings.device}, but evaluate.gpus_per_worker is 0; set it to 1, or set evaluate.device=cpu")
    worker = {"CPU": float(settings.threads)} | ({"GPU": settings.gpus_per_worker} if settings.gpus_per_worker else {})
    remedy = "lower evaluate.threads or evaluate.gpus_per_worker"
    cluster.wait_for(worker, settings.workers, config.cluster.wait_minutes, "evaluate.workers", remedy)
    cluster.quiet_data()
    rows = cluster.stage(
        ray.data.from_items(todo, override_num_blocks=len(todo)),
        (EncodeShard, config.model_dump(), dataset),
        ActorPoolStrategy(min_size=1, max_size=min(settings.workers, len(todo)), max_tasks_in_flight_per_actor=2),
        settings.threads,
        settings.gpus_per_worker,
    )
    lost = {_shard(row): row for row in todo}
    failed: dict[str, Exception] = {}
    why = "their workers were lost again and again (killed, or out of memory)"
    try:
        with tqdm(total=len(todo), desc="encode for the baselines", unit="shard", disable=None) as bar:
            for row in rows.iter_rows():
                del lost[_shard(row)]
                bar.update()
                try:
                    cluster.check(row, _shard(row))
                except (UserError, WorkflowError) as error:
                    failed.setdefault(row["name"], error)
    except RayError as error:
        why = f"a worker was lost ({' '.join(str(error).split())[:300]})"
    for name in dict.fromkeys(row["name"] for row in lost.values()):
        mine = [shard for shard, row in lost.items() if row["name"] == name]
        text = f"{len(mine)} shards were not encoded, {why}: {'; '.join(mine)}; the others are kept: mend the cause"
        failed.setdefault(name, WorkflowError(text))
    return failed


def _shard(row: Mapping[str, Any]) -> str:
    return f"{row['name']}, shard {row['first']:09d}"


class EncodeShard:
    """In a worker: makes a shard of a baseline's corpus. The pool is read once; a model stays until another's shards come."""

    def __init__(self, values: dict[str, Any], dataset: str) -> None:
        from intra.config import parse
        from intra.data.schema import read_pool

        self._parts, self._pool = parts.Parts(parse(values)), read_pool(dataset)
        self._corpus: Corpus | None = None

    def __call__(self, row: Mapping[str, Any]) -> dict[str, Any]:
        if self._corpus is None or self._corpus.name != row["name"]:
            self._corpus = self._parts.corpus(row["name"], self._pool)
        self._corpus.encode(range(row["first"], row["stop"]))
        return dict(row)


def expect(config: Config) -> str:
    """YAML that expects the results that there are of the same dataset again: a file for `evaluate.expected`."""
    from intra import storage
    from intra.evaluation import expectations

    artifact, facts = lineage.results(config), lineage.dataset(config).manifest()
    source = f"commit {artifact.manifest().get('commit', 'unknown')[:8]}"
    return expectations.written(storage.read_json(artifact.path(evaluation.RESULTS)), "the last nightly run", source, facts)


def compare(places: Sequence[str]) -> str:
    """Two runs side by side, each a results folder or a root."""
    from intra.evaluation import compare

    if len(places) != 2:
        raise UserError("usage: workflows/evaluate.py --compare RUN_A RUN_B (each a root, or a folder of its results)")
    a, b = map(compare.read, places)
    settings = EvaluateConfig()  # as many resamples as usual
    return compare.text(a, b, compare.compare(a, b, settings.permutations, settings.bootstrap, 0))


def main(arguments: Sequence[str]) -> int:
    if arguments[:1] == ["--compare"]:
        return cli.status(lambda: compare(arguments[1:]))
    others = {"expect": (expect, "print the results as a file of evaluate.expected; make nothing")}
    return cli.main(__doc__, plan, run, arguments, others)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
