"""Evaluates every method on the test questions and writes the results artifact.

    <root>/ranking/<fingerprint>/   a method's ranking: ranking.parquet, and what it cost in manifest.json
    <root>/answers/<fingerprint>/   the answers read from a ranking's first chunks: answers.parquet
    <root>/results/<fingerprint>/   runs/<method>.<benchmark>.trec, per_question.parquet, significance.json, breakdowns.json, costs.json,
                                    results.json, report.html, figures/*.svg, config.json and, last, manifest.json

Rankings and answers are used again by every evaluation that asks for the same. A method that fails leaves the others' results:
they are written, without the manifest, and the failures are raised at the end.
<root>/results/results.json and report.html are those of the configuration that was evaluated last.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from intra import lineage, storage, tracking
from intra.artifact import Artifact
from intra.baselines import models
from intra.config import Config
from intra.data.schema import POOL, QUESTIONS, Pool, Question, read_pool, read_questions, to_parquet
from intra.errors import Regression, UserError, WorkflowError
from intra.evaluate_config import NDCG_DEPTH
from intra.evaluation import cost, expectations, metrics, report, results, significance
from intra.evaluation.answers import Reader
from intra.evaluation.parts import INTRINSIC, Parts, encoder, model, needed
from intra.evaluation.results import Outcome, Record
from intra.method import Method, Rankings, check

LOGGER = logging.getLogger(__name__)
RESULTS = "results.json"
REPORT = "report.html"
RANKING = "ranking.parquet"
ANSWERS = "answers.parquet"
STORED = "the encoding of the corpus is the chunk store's, not in this index: all answers are read from it"
ANSWER_COSTS = ("answer_seconds", "answers_read", "answer_operations", "answer_peak_bytes")


def make(config: Config, artifact: Artifact, failed: Mapping[str, Exception] | None = None) -> None:
    """Evaluates `config.evaluate.methods` and completes the results artifact.

    `failed`: models of baselines that cannot be loaded, or whose corpora could not be encoded, and why. Their methods fail by it.

    Raises UserError: a predecessor is missing, no test questions, one without an answer (evaluate.answers), a pool
    smaller than evaluate.k, a device for the baselines' models that this machine does not have. Where methods failed, after the others'
    results are written: WorkflowError, or UserError where all the failures are the user's to mend; it names them.
    """
    dataset = lineage.dataset(config)
    facts = dataset.manifest()
    questions, pool = test_set(config)
    sources = {source.kind: source.fingerprint for source in needed(config)}
    searches = Searches(Parts(config), questions, pool, failed)
    searches.check_device()
    with tracking.step(config, "evaluate", artifact) as run:
        run.log_input("pool", facts["pool_sha256"], dataset.path(POOL))
        run.log_input("questions", facts["questions_sha256"], dataset.path(QUESTIONS))
        for kind, mark in sources.items():
            run.log_input(kind, mark, getattr(lineage, kind)(config).url)
        reader = _reader(searches.parts, pool) if config.evaluate.answers else None
        passages = metrics.Passages(pool)
        outcomes: list[tuple[Outcome, dict[str, metrics.Values]]] = []
        records: list[Record] = []
        costs: list[Record] = []
        for name in config.evaluate.methods:
            try:
                with run.child(name, {"method": name}) as child:
                    outcome, seconds = _outcome(name, searches, reader)
                    values = outcome.values(questions, config.evaluate.k, passages)
                    found = results.records(name, questions, values, config.evaluate.bootstrap, config.seed)
                    measured = {key: value for key, value in seconds.items() if value is not None}
                    child.log_metrics({f"{r['benchmark']}/{r['metric']}": r["value"] for r in found} | measured)
                    _log_curves(child, found)
                    for file, text in _run_files(outcome, questions).items():
                        storage.write_bytes(artifact.path("runs", file), text.encode())
                        child.log_artifact(text, f"runs/{file}")
            except Exception as error:  # whatever it was, it is this method's: the others go on, and it is raised at the end
                searches.failed(name, error)
                continue
            outcomes.append((outcome, values))
            records += found
            whole = results.whole(found)
            run.log_metrics({f"{name}/{r['benchmark']}/{r['metric']}": r["value"] for r in found if r["benchmark"] in whole})
            costs.append({"method": name, "questions": len(questions), **seconds, "note": _note(config, name, seconds)})
        if outcomes:
            failures = {name: str(error) for name, error in searches.failures.items()}
            about = _facts(config, artifact, facts, sources)
            encoded = _write(config, artifact, run, questions, pool, outcomes, records, costs, about, failures)
            if searches.failures:
                publish(config, artifact)
        searches.raise_failures(bool(outcomes))
        artifact.finish(
            {
                "methods": config.evaluate.methods,
                "questions": len(questions),
                "chunks": len(pool),
                "dataset": dataset.fingerprint,
                "made_from": sources,
                "commit": tracking.commit(),
                "results_sha256": hashlib.sha256(encoded).hexdigest(),
            }
        )


def _write(
    config: Config, artifact: Artifact, run: tracking.Run, questions: Sequence[Question], pool: Pool,
    outcomes: Sequence[tuple[Outcome, dict[str, metrics.Values]]], records: list[Record], costs: list[Record], facts: Mapping[str, str],
    failures: Mapping[str, str],
) -> bytes:  # fmt: skip
    """Everything of the results artifact but the manifest; the bytes of results.json."""
    settings, encoded = config.evaluate, (json.dumps(records, indent=1) + "\n").encode()
    values = {outcome.method: mine for outcome, mine in outcomes}
    size = config.retriever.answer_size
    contents = report.Contents(
        records,
        facts,
        tracking.resolved(config),
        size,
        tests=significance.compare(values, questions, settings.permutations, config.seed),
        gap_closure=[
            r for name in ("em", "f1") for r in significance.gap_closure(values, questions, name, settings.bootstrap, config.seed)
        ],
        breakdowns=results.breakdowns(values, questions, settings.bootstrap, config.seed),
        costs=costs,
        weights=_weights(config) if not INTRINSIC.isdisjoint(values) else (),
        failures=failures,
        judged=judged(config, records),
        asked=report.sample(outcomes, questions, pool, size, settings.report_questions, config.seed),
    )
    page = report.html(contents)
    storage.write_bytes(artifact.path(results.PER_QUESTION), to_parquet(results.per_question(outcomes, questions)))
    storage.write_json(artifact.path("significance.json"), {"tests": contents.tests, "gap_closure": contents.gap_closure})
    storage.write_json(artifact.path("breakdowns.json"), contents.breakdowns)
    storage.write_json(artifact.path("costs.json"), costs)
    storage.write_bytes(artifact.path(RESULTS), encoded)
    storage.write_bytes(artifact.path(REPORT), page.encode())
    storage.write_json(artifact.path("config.json"), contents.config)
    _tag_retriever(config, run, artifact, records)
    run.log_artifact(encoded, RESULTS)
    run.log_artifact(page, REPORT)
    for figure in (figure for made in report.drawn(contents).values() for figure in made):
        name = "figures/" + re.sub(r"[^\w.-]", "_", figure.name) + ".svg"
        storage.write_bytes(artifact.path(name), figure.standalone().encode())
        run.log_artifact(figure.standalone(), name)
    return encoded


def _note(config: Config, name: str, cost: Mapping[str, float | None]) -> str:
    """What a method's cost does not say by itself."""
    if cost.get("ivf_recall") is not None:
        return f"approximate: {cost['ivf_recall']:.3f} of the exact top {cost['ivf_recall_k']} ({cost['ivf_recall_questions']} questions)"
    if name == "s0_reranked" and config.retriever.scoring == "mixture" and "intra" in config.evaluate.methods:
        return f"{STORED}; its time is without the normalisers over the pool, which INTRA has computed; its operations are with them"
    return STORED if name in INTRINSIC else ""


def _log_curves(run: tracking.Run, found: Sequence[Record]) -> None:
    """Metrics at k once more, with k as the step: MLflow draws them as curves."""
    by_k: dict[int, dict[str, float]] = {}
    for record in found:
        name, _, k = record["metric"].partition("_at_")
        if k and name != "ndcg":
            by_k.setdefault(int(k), {})[f"{record['benchmark']}/{name}"] = record["value"]
    for k, values in sorted(by_k.items()):
        run.log_metrics(values, k)


def _tag_retriever(config: Config, run: tracking.Run, artifact: Artifact, records: Sequence[Record]) -> None:
    """How the registered retriever did: INTRA's figures of the main table, as tags of its version."""
    shown, whole = results.shown(records), results.whole(records)
    mine = [r for r in records if r["method"] == "intra" and r["metric"] in shown and r["benchmark"] in whole]
    if mine:
        tags = {f"{r['benchmark']}/{r['metric']}": results.interval(r) for r in mine}
        run.tag_model(tracking.model_name(config), lineage.retriever(config).fingerprint, {**tags, "results": artifact.fingerprint})


def judged(config: Config, records: Sequence[Record]) -> list[Record]:
    """The records against the files of `evaluate.expected`; one of another dataset judges nothing."""
    facts = lineage.dataset(config).manifest()
    files = map(expectations.load, config.evaluate.expected)
    return [record for expected in files if expected.of_dataset(facts) for record in expectations.judge(records, expected)]


def _weights(config: Config) -> list[list[float]]:
    """The retriever's alpha [layers][heads]."""
    from safetensors.numpy import load

    found: list[list[float]] = load(storage.read_bytes(lineage.retriever(config).path("model.safetensors")))["weights"].tolist()
    return found


def test_set(config: Config) -> tuple[list[Question], Pool]:
    """Test questions and pool. Raises UserError where an evaluation of them would end: a predecessor is missing, or they do not suit it."""
    dataset = lineage.dataset(config)
    dataset.manifest()
    for source in needed(config):
        source.manifest()
    questions, pool = read_questions(dataset.url, "test"), read_pool(dataset.url)
    if not questions:
        raise UserError(f"dataset {dataset.url} holds no test questions; check data.test_split and run workflows/prepare.py")
    silent = next((question.question_id for question in questions if not question.answers), None) if config.evaluate.answers else None
    if silent is not None:
        raise UserError(f"question {silent} of dataset {dataset.url} has no answer to compare with; set evaluate.answers=false")
    if len(pool) < metrics.depth(config.evaluate.k):
        raise UserError(
            f"evaluate.k: rankings of {metrics.depth(config.evaluate.k)} chunks need a larger pool than {len(pool)}; lower evaluate.k "
            f"(nDCG@{NDCG_DEPTH} needs {NDCG_DEPTH}) or raise data.pool_limit"
        )
    return questions, pool


class Searches:
    """The rankings of the methods and of the parts they are made of: each read where it is stored, else made and stored, once."""

    def __init__(self, parts: Parts, questions: Sequence[Question], pool: Pool, failed: Mapping[str, Exception] | None = None) -> None:
        self.parts = parts
        self._models = failed or {}
        self.questions = questions
        self.pool = pool
        self.marks = lineage.Marks(parts.config)
        self._depths = parts.config.evaluate.depths()
        self._known: dict[str, Rankings] = {}
        self._failures: dict[str, Exception] = {}

    def ranking(self, name: str, part: bool = False) -> Rankings:
        """As deep as anything asks of it. `part`: asked for by a method that is made of it."""
        if name in self._failures:
            before = self._failures[name]
            if part:
                raise (UserError if isinstance(before, UserError) else WorkflowError)(f"its part {name} failed")
            raise before
        if name not in self._known:
            try:
                self._known[name] = self._ranking(name)
            except Exception as error:
                self._failures[name] = error  # a method that shares this part shall not try again
                raise
        return self._known[name]

    def check_device(self) -> None:
        """Raises UserError where a ranking that is to be made needs a model, and evaluate.device is none of this machine's."""
        config = self.parts.config
        if any(model(config, name) and not lineage.ranking(config, name, self.marks).complete() for name in self._depths):
            models.device_of(config.evaluate.device)

    def cost(self, name: str) -> dict[str, float | None]:
        """What index and search took when they were made, seconds and operations with those of the parts; None: not written down then.

        The index of a dense or late method holds the encoding of its corpus, by all processes together, once.
        """
        config, names = self.parts.config, self._all_of(name)
        made = [lineage.ranking(config, part, self.marks).manifest() for part in names]
        found: dict[str, float | None] = {key: sum(facts[key] for facts in made) for key in ("index_seconds", "search_seconds")}
        encoded: dict[str, float | None] = {}
        for part, facts in zip(names, made, strict=True):
            encoded |= facts.get("encoding", {part: None} if encoder(config, part) else {})
        known = [seconds for seconds in encoded.values() if seconds is not None]
        found["index_seconds"] = sum([found["index_seconds"] or 0.0, *known]) if len(known) == len(encoded) else None
        counted = [facts["operations"] for facts in made if facts.get("operations") is not None]
        found["search_operations"] = sum(counted) if len(counted) == len(made) else None
        found |= {key: value for key, value in made[-1].items() if key.startswith("ivf_")}
        return found | {"peak_bytes": made[-1].get("peak_bytes")}

    def _all_of(self, name: str) -> list[str]:
        """The method and all it is made of, each once."""
        parts = [inner for part in self.parts.config.evaluate.parts(name) for inner in self._all_of(part)]
        return list(dict.fromkeys([*parts, name]))

    @property
    def failures(self) -> dict[str, Exception]:
        """Of the methods that were asked for."""
        return {name: error for name, error in self._failures.items() if name in self.parts.config.evaluate.methods}

    def failed(self, name: str, error: Exception) -> None:
        self._failures[name] = error
        if isinstance(error, UserError | WorkflowError):
            reason = str(error)
        else:
            LOGGER.exception("method %s", name, exc_info=error)  # not foreseen: where it happened matters
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        self._failures[name] = type(error)(reason) if isinstance(error, UserError | WorkflowError) else WorkflowError(reason)
        print(f"error: method {name} failed: {reason}", file=sys.stderr)

    def raise_failures(self, others: bool) -> None:
        """Raises what `failed` was told, in one line."""
        failures = self.failures
        if not failures:
            return
        kind = UserError if all(isinstance(error, UserError) for error in failures.values()) else WorkflowError
        text = "; ".join(f"method {name} failed: {error}" for name, error in failures.items())
        raise kind(f"{text}; " + ("the other methods' results are written; " if others else "") + "run the same command again")

    def _ranking(self, name: str) -> Rankings:
        artifact, depth = lineage.ranking(self.parts.config, name, self.marks), min(self._depths[name], len(self.pool))
        own = model(self.parts.config, name)
        if own is not None and own in self._models and not artifact.complete():
            raise self._models[own]
        for part in self.parts.config.evaluate.parts(name):
            # Before the clock starts: their cost is theirs. And where this ranking is complete: theirs may be deeper this time, or deleted.
            self.ranking(part, part=True)
        if artifact.complete():
            rankings = results.rankings_of(pq.read_table(io.BytesIO(storage.read_bytes(artifact.path(RANKING)))))
            check(name, rankings, self.questions, depth, self.pool)
            return rankings
        if name in INTRINSIC - {"maxsim"}:
            self.parts.passes.remember(self.ranking("maxsim", part=True))  # S_0, where an earlier run has made it
        with cost.Meter() as meter:
            method = self.parts.method(name, self._first)
            method.index(self.pool)
            indexed = meter.seconds
            rankings = method.search(self.questions, depth)
        check(name, rankings, self.questions, depth, self.pool)
        storage.write_bytes(artifact.path(RANKING), to_parquet(results.rankings_table(rankings, self.questions)))
        taken: dict[str, Any] = {"index_seconds": indexed, "search_seconds": meter.seconds - indexed, "peak_bytes": meter.peak_bytes}
        corpus = getattr(method, "corpus", None)
        if corpus is not None:  # encoded here, by workers or by an earlier run: told apart
            taken |= {"index_seconds": indexed - corpus.here, "encoding": {corpus.fingerprint: corpus.seconds}}
        taken |= {"operations": self._operations(name, method), **getattr(method, "facts", {})}
        artifact.finish({"method": name, "depth": depth, **taken})
        return rankings

    def _first(self, part: str, depth: int) -> Rankings:
        return {key: found[:depth] for key, found in self.ranking(part, part=True).items()}

    def _operations(self, name: str, method: Method) -> float:
        """Of one question's search, without the parts'; 0 for chance, the oracle and a fusion."""
        if name not in INTRINSIC:
            counted = getattr(method, "operations", None)
            return 0.0 if counted is None else counted(self.questions) / len(self.questions)
        backbone, settings, chunks = self.parts.backbone, self.parts.retriever.settings, len(self.pool)
        if name == "maxsim":
            return cost.initial(backbone, self.questions, chunks, settings.pooled_length)
        echoed, tokens = cost.echoed(backbone, self.questions), sum(self.pool.table["n_tokens"].to_pylist()) / chunks
        read = cost.retrieval_pass(backbone, self.questions, settings, tokens, echoed)
        batch = self.parts.config.retriever.query_batch
        # A mixture's normalisers take a scan of the pool of their own.
        scans = (name == "intra") + (settings.scoring == "mixture")
        context, again = settings.initial_context if name == "s0_reranked" else 0, self.parts.config.retriever.search.rescore
        scored = read + cost.scoring(backbone, settings, chunks, batch, scans, echoed)
        if not again:
            return scored + cost.scoring(backbone, settings, context, batch, 1, echoed)
        # By their token states: as many vectors as so many more chunks have. What is kept of their keys is not counted.
        whole = context + (again if scans else 0)
        return scored + cost.scoring(backbone, settings, whole * tokens / settings.pooled_length, 1, 1, echoed)


def _reader(parts: Parts, pool: Pool) -> Reader:
    lengths = dict(zip(pool.chunk_ids, pool.table["n_tokens"].to_pylist(), strict=True))
    return Reader(parts, lengths, parts.config.evaluate.answer_batch, parts.config.backbone.answer_tokens)


def _outcome(name: str, searches: Searches, reader: Reader | None) -> tuple[Outcome, dict[str, float | None]]:
    """The method's rankings, as deep as they are judged, and its answers; and the seconds that making them took."""
    config, questions = searches.parts.config, searches.questions
    depth, size = metrics.depth(config.evaluate.k), config.retriever.answer_size
    outcome = Outcome(name, {key: ranking[:depth] for key, ranking in searches.ranking(name).items()})
    seconds = searches.cost(name)
    if reader is None:
        return outcome, seconds | dict.fromkeys(ANSWER_COSTS)
    artifact = lineage.answers(config, name, searches.marks)
    if artifact.complete():
        rows = pq.read_table(io.BytesIO(storage.read_bytes(artifact.path(ANSWERS)))).to_pylist()
        outcome.answers = {row["question_id"]: row["answer"] for row in rows}
        for question_id, answer in outcome.answers.items():
            reader.remember(question_id, _top(outcome, question_id, size), answer)
    else:
        chosen = {question.question_id: _top(outcome, question.question_id, size) for question in questions}
        before = reader.read
        with cost.Meter() as meter:
            outcome.answers = reader.answer(questions, chosen, f"{name}: answers")
        table = pa.table({"question_id": list(outcome.answers), "answer": list(outcome.answers.values())})
        storage.write_bytes(artifact.path(ANSWERS), to_parquet(table))
        read = reader.read - before
        counted = reader.operations(questions, chosen, outcome.answers) if read else None
        taken = {"answer_seconds": meter.seconds, "answers_read": read, "answer_peak_bytes": meter.peak_bytes, "answer_operations": counted}
        artifact.finish({"method": name, **taken})
    facts = artifact.manifest()
    return outcome, seconds | {key: facts.get(key) for key in ANSWER_COSTS}


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
        "device": tracking.device(),
        "MLflow": tracking.how_to_open(config),
    }


def publish(config: Config, artifact: Artifact) -> str:
    """Copies results and report to <root>/results/, prints the table, what it is judged by and the places; returns results.json's."""
    folder = storage.join(storage.absolute(config.root), "results")
    for name in (RESULTS, REPORT):
        data, place = storage.read_bytes(artifact.path(name)), storage.join(folder, name)
        if not storage.exists(place) or storage.read_bytes(place) != data:
            storage.write_bytes(place, data)
    records = storage.read_json(artifact.path(RESULTS))
    print(results.text_table(records))
    if config.evaluate.expected:
        found, names = judged(config, records), [expectations.load(place).name for place in config.evaluate.expected]
        apart = [
            f"against {name}: not judged, its values are of another dataset" for name in names if name not in {r["name"] for r in found}
        ]
        print("", *expectations.text(found), *apart, sep="\n")
    print(f"\nreport  {storage.join(folder, REPORT)}")
    print(f"MLflow  {tracking.how_to_open(config)}")
    return storage.join(folder, RESULTS)


def check_regressions(config: Config) -> None:
    """By the files of `evaluate.expected` with `gate`: raises Regression, naming each figure, where the complete results fell below one.

    Else UserError where one could not judge all it expects: its values are of another dataset, or were not measured.
    """
    records, facts = storage.read_json(lineage.results(config).path(RESULTS)), lineage.dataset(config).manifest()
    failed, unjudged = [], []
    for expected in map(expectations.load, config.evaluate.expected):
        if expected.gate:
            found = expectations.judge(records, expected) if expected.of_dataset(facts) else []
            failed += [expectations.one_line(record) for record in expectations.regressions(found)]
            unjudged += expectations.unjudged(found, expected)
    if failed:
        raise Regression("; ".join(failed + unjudged))
    if unjudged:
        raise UserError(f"{'; '.join(unjudged)}: this night cannot be told to be good; evaluate what evaluate.expected names, or accept "
                        "this night's figures in its place (workflows/evaluate.py --expect)")  # fmt: skip
