"""Evaluates every method on the test questions and writes the results artifact.

The artifact holds methods/<method>.parquet (rankings and answers: the unit of commit, read instead of made again on resuming),
runs/<method>.<benchmark>.trec, per_question.parquet, results.json, report.html, config.json and, last, manifest.json.
<root>/results/results.json and report.html are those of the configuration that was evaluated last.
"""

from __future__ import annotations

import hashlib
import io
import json
import time
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq

from intra import lineage, storage, tracking
from intra.artifact import Artifact
from intra.config import Config
from intra.data.schema import POOL, QUESTIONS, Pool, Question, read_pool, read_questions, to_parquet
from intra.errors import UserError
from intra.evaluation import metrics, report, results
from intra.evaluation.answers import Reader
from intra.evaluation.results import Outcome, Record
from intra.method import Method, check

if TYPE_CHECKING:
    from intra.backbone.model import Backbone
    from intra.store.reader import ChunkStore

RESULTS = "results.json"
REPORT = "report.html"
INTRINSIC = {"intra", "maxsim", "s0_reranked"}  # methods that need the chunk store and the retriever (S_0's settings are its own)


class Parts:
    """What methods and answers share, loaded when first used."""

    def __init__(self, config: Config) -> None:
        self.config = config

    @cached_property
    def backbone(self) -> Backbone:
        import torch

        from intra.backbone import model

        torch.set_num_threads(self.config.evaluate.threads)
        settings = self.config.backbone
        return model.load(lineage.backbone(self.config).url, dtype=settings.dtype, device=settings.device, prompt=settings.prompt)

    @cached_property
    def store(self) -> ChunkStore:
        from intra.store.reader import ChunkStore

        return ChunkStore(lineage.store(self.config).url)

    @cached_property
    def intrinsic(self) -> dict[str, Method]:
        from intra.retrieval import search
        from intra.retrieval.retriever import Retriever

        settings = self.config.retriever
        passes = search.Passes(
            self.backbone,
            self.store,
            Retriever.from_pretrained(lineage.retriever(self.config).url),
            query_batch=settings.query_batch,
            tile_chunks=settings.tile_chunks,
        )
        return {method.name: method for method in search.methods(passes, settings.answer_size, settings.answer_initial)}

    def method(self, name: str) -> Method:
        from intra.baselines import dense, lexical, models, reference

        if name in INTRINSIC:
            return self.intrinsic[name]
        if name in self.config.evaluate.models:
            evaluate = self.config.evaluate
            settings, place = evaluate.models[name], lineage.vectors(self.config, name)
            return dense.Dense(
                name, settings, place, lambda: models.Dense(name, settings, evaluate.device, evaluate.threads), evaluate.shard_chunks
            )
        if name == "bm25":
            return lexical.BM25()
        if name == "tfidf":
            return lexical.TfIdf()
        return reference.Random(self.config.seed) if name == "random" else reference.Oracle(self.config.seed)


def needed(config: Config) -> list[Artifact]:
    """The artifacts an evaluation reads beside the dataset: the fewer, the fewer methods are asked for."""
    artifacts = []
    intrinsic = not INTRINSIC.isdisjoint(config.evaluate.methods)
    if config.evaluate.answers or intrinsic:
        artifacts += [lineage.backbone(config)] if config.backbone.train else []
        artifacts.append(lineage.store(config))
    if intrinsic:
        artifacts.append(lineage.retriever(config))
    return artifacts


def make(config: Config, artifact: Artifact) -> None:
    """Evaluates `config.evaluate.methods` and completes the results artifact.

    Raises UserError: a predecessor is missing, no test questions, one without an answer (evaluate.answers), a pool
    smaller than evaluate.k. WorkflowError: a method's
    ranking is not one.
    """
    dataset = lineage.dataset(config)
    facts = dataset.manifest()
    sources = {source.kind: source.fingerprint for source in needed(config) if source.manifest()}
    questions, pool = read_questions(dataset.url, "test"), read_pool(dataset.url)
    if not questions:
        raise UserError(f"dataset {dataset.url} holds no test questions; check data.test_split and run workflows/prepare.py")
    silent = next((question.question_id for question in questions if not question.answers), None) if config.evaluate.answers else None
    if silent is not None:
        raise UserError(f"question {silent} of dataset {dataset.url} has no answer to compare with; set evaluate.answers=false")
    if len(pool) < metrics.depth(config.evaluate.k):
        raise UserError(
            f"evaluate.k: rankings of {metrics.depth(config.evaluate.k)} chunks need a larger pool than {len(pool)}; lower evaluate.k "
            f"(nDCG@{metrics.NDCG_DEPTH} needs {metrics.NDCG_DEPTH}) or raise data.pool_limit"
        )
    parts = Parts(config)
    with tracking.step(config, "evaluate", artifact) as run:
        run.log_input("pool", facts["pool_sha256"], dataset.path(POOL))
        run.log_input("questions", facts["questions_sha256"], dataset.path(QUESTIONS))
        for kind, mark in sources.items():
            run.log_input(kind, mark, getattr(lineage, kind)(config).url)
        reader = _reader(parts, pool) if config.evaluate.answers else None
        outcomes: list[tuple[Outcome, dict[str, metrics.Values]]] = []
        records: list[Record] = []
        for name in config.evaluate.methods:
            with run.child(name, {"method": name}) as child:
                outcome, seconds = _outcome(name, parts, artifact, questions, pool, reader)
                values = outcome.values(questions, config.evaluate.k)
                found = results.records(name, questions, values, config.evaluate.bootstrap, config.seed)
                child.log_metrics({f"{r['benchmark']}/{r['metric']}": r["value"] for r in found} | seconds)
                for file, text in _run_files(outcome, questions).items():
                    storage.write_bytes(artifact.path("runs", file), text.encode())
                    child.log_artifact(text, f"runs/{file}")
            outcomes.append((outcome, values))
            records += found
        storage.write_bytes(artifact.path("per_question.parquet"), to_parquet(results.per_question(outcomes, questions)))
        encoded = (json.dumps(records, indent=1) + "\n").encode()
        page = report.html(records, _facts(config, artifact, facts, sources), tracking.resolved(config))
        storage.write_bytes(artifact.path(RESULTS), encoded)
        storage.write_bytes(artifact.path(REPORT), page.encode())
        storage.write_json(artifact.path("config.json"), tracking.resolved(config))
        run.log_artifact(encoded, RESULTS)
        run.log_artifact(page, REPORT)
        artifact.finish(
            {
                "methods": config.evaluate.methods,
                "questions": len(questions),
                "chunks": len(pool),
                "dataset": dataset.fingerprint,
                "made_from": sources,
                "results_sha256": hashlib.sha256(encoded).hexdigest(),
            }
        )


def _reader(parts: Parts, pool: Pool) -> Reader:
    lengths = dict(zip(pool.chunk_ids, pool.table["n_tokens"].to_pylist(), strict=True))
    return Reader(parts, lengths, parts.config.evaluate.answer_batch, parts.config.backbone.answer_tokens)


def _outcome(
    name: str, parts: Parts, artifact: Artifact, questions: Sequence[Question], pool: Pool, reader: Reader | None
) -> tuple[Outcome, dict[str, float]]:
    """The method's rankings and answers, read where they are committed; and the seconds that making them took."""
    place, size = artifact.path("methods", f"{name}.parquet"), parts.config.retriever.answer_size
    depth = metrics.depth(parts.config.evaluate.k)
    if storage.exists(place):
        outcome = Outcome.from_table(name, pq.read_table(io.BytesIO(storage.read_bytes(place))))
        check(name, outcome.rankings, questions, depth)
        if reader is not None:
            for question_id, answer in outcome.answers.items():
                reader.remember(question_id, _top(outcome, question_id, size), answer)
        return outcome, {}
    start = time.perf_counter()
    method = parts.method(name)
    method.index(pool)
    indexed = time.perf_counter()
    outcome = Outcome(name, method.search(questions, depth))
    check(name, outcome.rankings, questions, depth)
    seconds = {"index_seconds": indexed - start, "search_seconds": time.perf_counter() - indexed}
    if reader is not None:
        start = time.perf_counter()
        chosen = {question.question_id: _top(outcome, question.question_id, size) for question in questions}
        outcome.answers = reader.answer(questions, chosen, f"{name}: answers")
        seconds["answer_seconds"] = time.perf_counter() - start
    storage.write_bytes(place, to_parquet(outcome.table(questions)))
    return outcome, seconds


def _top(outcome: Outcome, question_id: str, size: int) -> list[str]:
    return [chunk_id for chunk_id, _ in outcome.rankings[question_id][:size]]


def _run_files(outcome: Outcome, questions: Sequence[Question]) -> dict[str, str]:
    files = {}
    for benchmark in dict.fromkeys(question.benchmark for question in questions):
        own = [question for question in questions if question.benchmark == benchmark]
        files[f"{outcome.method}.{benchmark}.trec"] = results.trec(outcome.method, outcome.rankings, own)
    return files


def _facts(config: Config, artifact: Artifact, dataset: Mapping[str, Any], sources: Mapping[str, str]) -> dict[str, str]:
    return {
        "results": artifact.fingerprint,
        "dataset": f"{dataset['fingerprint']}, {dataset['chunks']} chunks",
        "backbone": config.backbone.model if not config.backbone.train else "trained in this run",
        **sources,
        "seed": str(config.seed),
        "commit": tracking.commit(),
        "MLflow": tracking.how_to_open(config),
    }


def publish(config: Config, artifact: Artifact) -> str:
    """Copies results and report to <root>/results/, prints the table and the places, returns the place of results.json."""
    folder = storage.join(storage.absolute(config.root), "results")
    for name in (RESULTS, REPORT):
        data, place = storage.read_bytes(artifact.path(name)), storage.join(folder, name)
        if not storage.exists(place) or storage.read_bytes(place) != data:
            storage.write_bytes(place, data)
    print(results.text_table(storage.read_json(artifact.path(RESULTS))))
    print(f"\nreport  {storage.join(folder, REPORT)}")
    print(f"MLflow  {tracking.how_to_open(config)}")
    return storage.join(folder, RESULTS)
