"""What the search of the whole pool costs, as ratios taken in one run, on the run's own questions, retriever and pooled vectors.

Reads dataset, store and retriever of the configuration. Its parts, `retriever.search.benchmark.parts`, begin the names of
their records (times of one torch thread are processor times, see `peers.seconds`):

    pool_*       scoring of `chunks` of the pool's chunks by a batch of `questions`, beside its peers (`peers.compare`)
    shape_*      the same at the sizes of one layer of T5Gemma 2 4B (random vectors: times and rounding do not depend on them)
    batch_B_*    a question's share in a batch of B
    search_*     searches of the pool (of its first `search_chunks`): agreement of the exact forms on `checked` questions, recall and cost
                 of the approximate ones with so many candidates: cascade, int8, and int8 by the strongest heads alone (pruned);
                 search_exact_to_cascade is of the fewest candidates that keep KEPT of the exact top 20
    ivf_*        candidates from a faiss IVF index over the pooled vectors by `mixed` queries, instead of a scan
    rows_N_*     pools of N chunks (the pool's vectors again and again, streamed from a file): time and memory
    latency_*    one question at a time, end to end

and figures of them, in <root>/benchmark/search/ and MLflow.
"""

from __future__ import annotations

import functools
import gc
import importlib.util
import io
import itertools
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm

from intra import cluster, lineage, storage, tracking
from intra.config import Config
from intra.data.schema import Question, read_questions
from intra.errors import UserError
from intra.retrieval import intrinsic, peers, scoring, search
from intra.retrieval.pools import Ask, Form, Local
from intra.retrieval.scorers import ALIGN, Keys
from intra.retrieval.scoring import Scored
from intra.retrieval.vectorfile import VectorFile

if TYPE_CHECKING:
    from intra.store.reader import ChunkStore

TOP = 20
LAYER_4B = {"d": 2560, "heads": 8, "groups": 4, "e": 256, "tokens": 64}
LAYER_CHUNKS = 256
BATCHES = (1, 2, 4, 16, 64)
CANDIDATES = (25, 50, 100, 200, 400, 800)
FEW = 100  # candidates of the integer scans
KEPT = 0.99
PROBES = (4, 16, 64)
PRUNED = 0.98  # of the heads' squared weight and spread, in the scan `pruned`
Records = dict[str, tuple[float, str]]  # name -> value, unit


class _First:
    """The first rows of a source, as `pools.Source`."""

    def __init__(self, source: ChunkStore, rows: int) -> None:
        self._source, self._rows = source, rows

    def __len__(self) -> int:
        return self._rows

    def tiles(self, tile_chunks: int, start: int = 0, count: int | None = None) -> Iterator[tuple[int, Tensor]]:
        return self._source.tiles(tile_chunks, start, len(self) - start if count is None else count)

    def pooled(self, wanted: Any) -> Tensor:
        return self._source.pooled(wanted)


class Bench:
    """What all parts of the benchmark read."""

    def __init__(self, config: Config) -> None:
        from intra.backbone import model
        from intra.retrieval.retriever import Retriever
        from intra.store.reader import ChunkStore

        self.config, self.settings = config, config.retriever.search.benchmark
        self.questions = read_questions(lineage.dataset(config).url, "test")
        if not self.questions:
            raise UserError("benchmark search: the dataset has no test question; take another data.test_split")
        settings = config.backbone
        self.retriever = Retriever.from_pretrained(lineage.retriever(config).url)
        if self.retriever.settings.scoring == "mixed":
            raise UserError("benchmark search: retriever.scoring=mixed has one form, there is nothing to compare; take per_head or mixture")
        self.backbone = model.load(lineage.backbone(config).url, dtype=settings.dtype, device=settings.device, prompt=settings.prompt)
        self.store: ChunkStore = ChunkStore(lineage.store(config).url)
        self.keys = Keys.of(self.backbone)
        if config.retriever.search.workers:
            cluster.connect(config)
        self.passes = search.Passes(
            self.backbone, self.store, self.retriever, query_batch=self.settings.questions, tile_chunks=config.retriever.tile_chunks,
            search=config.retriever.search,
        )  # fmt: skip
        self.records: Records = {}

    @functools.cached_property
    def asks(self) -> list[Ask]:
        """The first `checked` test questions, in batches of `questions`."""
        chosen = self.questions[: self.settings.checked]
        batches = self.passes.retrieval_pass(chosen, "queries")
        with torch.no_grad():
            return [Ask.of(self.retriever, queries, self.backbone) for _, queries in batches]

    @functools.cached_property
    def part(self) -> _First:
        """What is searched."""
        return _First(self.store, min(self.settings.search_chunks or len(self.store), len(self.store)))

    @functools.cached_property
    def sample(self) -> Tensor:
        """The vectors of the pool's first `chunks`, as the keys are made of them."""
        _, pooled = next(iter(self.store.tiles(min(self.settings.chunks, len(self.store)))))
        return pooled.to(self.backbone.device, self.keys.projections.dtype)

    def local(self, source: Any = None, in_memory: bool = False) -> Local:
        """A pool of `source`, or of the part that is searched."""
        source = source if source is not None else self.part
        return Local(source, self.keys, self.config.retriever.tile_chunks, self.backbone.device, in_memory)

    def add(self, name: str, value: float, unit: str) -> None:
        self.records[name] = (float(value), unit)


def run(config: Config, keep: Callable[[list[dict[str, Any]]], None]) -> list[dict[str, Any]]:
    """`keep` is given all records so far after every part, of which one may take an hour."""
    before = torch.get_num_threads()
    torch.set_num_threads(config.retriever.search.threads)
    try:
        bench = Bench(config)
        for name in tqdm(bench.settings.parts, desc="benchmark", unit="part", disable=None):
            PARTS[name](bench)
            records = [{"name": name, "value": value, "unit": unit} for name, (value, unit) in bench.records.items()]
            keep(records)
        _publish(bench)
    finally:
        torch.set_num_threads(before)
    return records


def _compared(bench: Bench, prefix: str, times: peers.Times, errors: peers.Errors) -> None:
    for name, error in errors.items():
        bench.add(f"{prefix}_{name}_error", error, "of the spread")
    for name, taken in times.items():
        bench.add(f"{prefix}_{name}", taken, "s")
    exact = times["exact"]
    bench.add(f"{prefix}_exact_share_of_gemm", times["gemm"] / exact, "share")
    for name in ("int8", "linear"):
        if name in times:
            bench.add(f"{prefix}_exact_to_{name}", exact / times[name], "ratio")
    for name in ("reverse", "chunked", "naive", "naive_hidden", "sentence_transformers", "maxsim_cpu", "faiss_flat"):
        if name in times:
            bench.add(f"{prefix}_{name}_to_exact", times[name] / exact, "ratio")


def _pool(bench: Bench) -> None:
    times, errors = peers.compare(bench.asks[0], bench.keys, bench.sample, bench.settings.repeats)
    _compared(bench, "pool", times, errors)


def _shape(bench: Bench) -> None:
    size, generator = LAYER_4B, torch.Generator().manual_seed(bench.config.seed)
    device, dtype = bench.backbone.device, bench.keys.projections.dtype

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    projections = random(1, size["groups"] * size["e"], size["d"]) / size["d"] ** 0.5
    keys = Keys(projections, None, torch.ones(1, size["e"], device=device), 1e-6, size["groups"], size["e"] ** -0.5)
    queries = random(bench.settings.questions, 1, size["heads"], size["tokens"], size["e"])
    ask = Ask("per_head", queries, torch.ones(1, size["heads"], device=device), 1.0)
    pooled = random(min(LAYER_CHUNKS, bench.settings.chunks), 7, size["d"])
    names = ["exact", "gemm", "reverse", "chunked", "naive", "naive_hidden", "sentence_transformers"]
    times, errors = peers.compare(ask, keys, pooled, bench.settings.repeats, names if pooled.is_cuda else [*names, "int8"])
    _compared(bench, "shape", times, errors)


def _batch(bench: Bench) -> None:
    pooled, ask = bench.sample, bench.asks[0]
    forms = ["exact", "reverse", "int8", "linear"] if not pooled.is_cuda else ["exact", "reverse", "linear"]
    for size in [batch for batch in BATCHES if batch <= len(ask)]:
        part = replace(ask, queries=ask.queries[:size].contiguous())
        times, _ = peers.compare(part, bench.keys, pooled, bench.settings.repeats, forms)
        for name, taken in times.items():
            bench.add(f"batch_{size}_{name}", taken / size / len(pooled) * 1e6, "us a question and chunk")


def _search(bench: Bench) -> None:
    streamed, memory = bench.local(), bench.local(in_memory=True)
    pool = memory if bench.config.retriever.search.in_memory else streamed
    coarse = bench.config.retriever.search.coarse_candidates
    truth, same, furthest = [], 0, 0.0
    for ask in tqdm(bench.asks, desc="exact", unit="batch", disable=None):
        exact = intrinsic.exact(streamed, ask, TOP, Form("head_space"))
        other = intrinsic.exact(memory, ask, TOP, Form("reverse"))
        same += sum({row for row, _ in one} == {row for row, _ in two} for one, two in zip(exact.pairs, other.pairs, strict=True))
        furthest = max(furthest, peers.compare(ask, bench.keys, bench.sample, 0, ["reverse"])[1]["reverse"])
        truth.append(exact.pairs)
    count = sum(map(len, bench.asks))
    bench.add("search_questions", count, "")
    bench.add("search_chunks", len(bench.part), "")
    bench.add("search_same_top_20", same / count, "of the questions, head_space and reverse")
    bench.add("search_reverse_error", furthest, "of the spread, of all batches")
    bench.add("search_coarse_candidates", coarse, "of the cascade's scan")
    scans = [("cascade", intrinsic.cascade(pool, coarse), list(CANDIDATES))]
    if not bench.sample.is_cuda:
        pooled = next(iter(bench.part.tiles(min(ALIGN, len(bench.part)))))[1].to(bench.keys.projections.dtype)
        fewer = intrinsic.pruned(bench.asks[0], bench.keys, pooled, PRUNED)
        bench.add("search_pruned_heads", sum(map(sum, fewer.kept or ())), f"of {bench.backbone.layers * bench.backbone.heads}")
        scans += [("int8", Form("int8"), [FEW]), ("pruned", fewer, [FEW])]
    for name, form, depths in scans:
        for depth, kept in _recalls(pool, bench.asks, truth, form, depths, coarse, name).items():
            for k, value in kept.items():
                bench.add(f"search_{name}_{depth}_recall_{k}", value, "of the exact top")
    # Time against time: all in turn, on the first batch; exact in whichever form is the cheaper one here.
    works: dict[str, Callable[[], Any]] = {"exact": functools.partial(intrinsic.exact, pool, bench.asks[0], TOP)}
    for name, form, depths in scans:
        works |= {
            f"{name}_{depth}": functools.partial(intrinsic.approximate, pool, bench.asks[0], TOP, form, depth, coarse) for depth in depths
        }  # fmt: skip
    times = dict.fromkeys(works, float("inf"))
    for _ in range(bench.settings.repeats):
        for name, work in works.items():
            times[name] = min(times[name], peers.seconds(work))
    for name, taken in times.items():
        bench.add(f"search_{name}", taken / len(bench.asks[0]), "s a question")
        if name != "exact":
            bench.add(f"search_exact_to_{name}", times["exact"] / taken, "ratio")
    enough = [depth for depth in CANDIDATES if bench.records[f"search_cascade_{depth}_recall_{TOP}"][0] >= KEPT]
    if enough:
        bench.add("search_cascade_candidates", enough[0], f"keep {KEPT} of the exact top {TOP}")
        bench.add("search_exact_to_cascade", times["exact"] / times[f"cascade_{enough[0]}"], "ratio")


def _recalls(
    pool: Local, asks: list[Ask], truth: list[list[Scored]], form: Form, depths: list[int], coarse: int, name: str
) -> dict[int, dict[int, float]]:  # fmt: skip
    """Of the exact top 5 and top 20, what a search with so many candidates keeps: candidates -> k -> share. One scan serves all."""
    kept = {depth: {5: 0.0, TOP: 0.0} for depth in depths}
    count = sum(map(len, asks))
    for ask, exact in zip(tqdm(asks, desc=name, unit="batch", disable=None), truth, strict=True):
        scan = intrinsic.scanned(pool, ask, form, max(TOP, *depths, coarse if form.name == "linear" else 0))
        for depth in depths:
            mine = scan if form.name == "linear" else scan._replace(rows=scan.rows[:, : max(TOP, depth)])
            found = intrinsic.followed(pool, mine, TOP, form, depth).pairs
            for k in kept[depth]:
                share = intrinsic.recall([mine[:k] for mine in exact], [mine[:k] for mine in found])
                kept[depth][k] += len(ask) * share / count
    return kept


def _ivf(bench: Bench) -> None:
    """The mixed queries of `scoring.mixed` against unit vectors: what one inner-product index can hold."""
    if not importlib.util.find_spec("faiss"):
        return
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    ask, length = bench.asks[0], bench.store.pooled_length
    flat = torch.cat([scoring.unit(tile).flatten(0, 1) for _, tile in bench.part.tiles(4096)])
    lists = max(1, min(int(4 * len(flat) ** 0.5), len(flat) // 39))
    index = faiss.IndexIVFFlat(faiss.IndexFlatIP(flat.shape[1]), flat.shape[1], lists, faiss.METRIC_INNER_PRODUCT)
    index.train(flat[:: max(1, len(flat) // (64 * lists))].contiguous().numpy())
    index.add(flat.numpy())
    vectors = scoring.mixed(ask.queries, bench.backbone, ask.weights).sum(dim=1).cpu().contiguous().numpy()  # tokens summed: R times fewer
    exact = intrinsic.exact(bench.local(), ask, TOP)
    for probes in [number for number in PROBES if number <= lists]:
        index.nprobe = probes
        look = functools.partial(index.search, vectors, 200 * length)
        _, places = look()
        taken = min(peers.seconds(look) for _ in range(bench.settings.repeats))
        rows = [list(dict.fromkeys(place // length for place in each if place >= 0))[:200] for each in places.tolist()]
        kept = sum(len({row for row, _ in one} & set(two)) for one, two in zip(exact.pairs, rows, strict=True))
        bench.add(f"ivf_{probes}_recall_20", kept / sum(len(each) for each in exact.pairs), "of the exact top, in 200 candidates")
        bench.add(f"ivf_{probes}_candidates", taken / len(ask), "s a question")


class _Memory:
    """The most resident memory of this process while it is open, in bytes, looked at every 20 ms."""

    def __enter__(self) -> _Memory:
        gc.collect()
        self.most, self._done = 0, threading.Event()
        self._watch = threading.Thread(target=self._look, daemon=True)
        self._watch.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._watch.join()

    def _look(self) -> None:
        page, done = os.sysconf("SC_PAGE_SIZE"), False
        while not done:
            done = self._done.wait(0.02)
            self.most = max(self.most, page * int(Path("/proc/self/statm").read_text().split()[1]))


def repeated(store: ChunkStore, rows: int) -> Iterator[Tensor]:
    """The store's pooled vectors again and again, `rows` in all."""
    left = rows
    while left > 0:
        for _, tile in store.tiles(min(4096, len(store))):
            yield tile[:left]
            left -= len(tile)
            if left <= 0:
                return


def _rows(bench: Bench) -> None:
    """Per head, one pass over the pool: a mixture takes two."""
    coarse = bench.config.retriever.search.coarse_candidates
    first = replace(bench.asks[0], kind="per_head")
    for rows in sorted(bench.settings.pools):
        with tempfile.TemporaryDirectory() as folder:
            pool = bench.local(VectorFile.write(str(Path(folder) / "pooled"), repeated(bench.store, rows)))
            for name, work in {
                "exact": functools.partial(intrinsic.exact, pool, first, TOP),
                "cascade": functools.partial(intrinsic.approximate, pool, first, TOP, intrinsic.cascade(pool, coarse), 200, coarse),
            }.items():
                begun = time.perf_counter()
                with _Memory() as memory:
                    taken = peers.seconds(work)
                bench.add(f"rows_{rows}_{name}", taken / len(first), "s a question")
                bench.add(f"rows_{rows}_{name}_wall", time.perf_counter() - begun, f"s for {len(first)} questions")
                bench.add(f"rows_{rows}_{name}_memory", memory.most / 2**30, "GiB at most")


STAGES = ("S_0", "retrieval pass", "search", "answer")


def _latency(bench: Bench) -> None:
    """One question after the other, nothing shared but what is loaded. The first are not counted: files and code are read, and an
    approximate scorer is only checked on them."""
    taken: dict[str, list[float]] = {stage: [] for stage in STAGES}
    settings = bench.config.retriever
    passes = search.Passes(
        bench.backbone, bench.store, bench.retriever, tile_chunks=settings.tile_chunks, search=settings.search,
        beside=bench.passes,
    )  # fmt: skip
    warm = min(intrinsic.CHECKED + 2, len(bench.questions) - 1)
    for number, question in enumerate(bench.questions[: warm + bench.settings.latency_questions]):
        times = _answered(bench, passes, question)
        for stage, seconds in zip(STAGES, times, strict=True):
            if number >= warm:
                taken[stage].append(seconds)
    totals = [sum(each) for each in zip(*taken.values(), strict=True)]
    for stage, values in {**taken, "total": totals}.items():
        name = stage.replace(" ", "_")
        bench.add(f"latency_{name}_median", statistics.median(values), "s")
        bench.add(f"latency_{name}_p99", sorted(values)[min(len(values) - 1, int(0.99 * len(values)))], "s")


def _answered(bench: Bench, passes: search.Passes, question: Question) -> list[float]:
    settings, clock = bench.config.retriever, time.perf_counter
    marks = [clock()]
    first = passes.initial([question], settings.answer_size)[question.question_id]
    marks.append(clock())
    ((_, queries),) = list(passes.retrieval_pass([question], "queries"))
    marks.append(clock())
    with torch.no_grad():
        found = passes.searcher.find(Ask.of(bench.retriever, queries, bench.backbone), settings.answer_size).pairs[0]
    marks.append(clock())
    rows = search.compose([row for row, _ in found], [row for row, _ in first], settings.answer_size, settings.answer_initial)
    memory = search.read_context(bench.backbone, bench.store, [rows[: settings.answer_size]], settings.answer_size)
    bench.backbone.answer(bench.backbone.prompt_ids([question.question]), memory, bench.config.backbone.answer_tokens)
    marks.append(clock())
    return [end - begin for begin, end in itertools.pairwise(marks)]


PARTS: dict[str, Callable[[Bench], None]] = {
    "pool": _pool,
    "shape": _shape,
    "batch": _batch,
    "search": _search,
    "ivf": _ivf,
    "rows": _rows,
    "latency": _latency,
}


def _publish(bench: Bench) -> None:
    current = tracking.current()
    for name, image in figures({name: value for name, (value, _) in bench.records.items()}).items():
        storage.write_bytes(storage.join(storage.absolute(bench.config.root), "benchmark", "search", name), image)
        if current is not None:
            current.log_artifact(image, f"figures/search_{name}")


def figures(values: dict[str, float]) -> dict[str, bytes]:
    """PNG files by name, of what the records hold."""
    drawn = {"recall": (_draw_recall, "search_"), "latency": (_draw_latency, "latency_"), "batch": (_draw_batch, "batch_"),
             "rows": (_draw_rows, "rows_")}  # fmt: skip
    return {
        f"{name}.png": _figure(draw, values)
        for name, (draw, prefix) in drawn.items()
        if any(record.startswith(prefix) for record in values)
    }


def _figure(draw: Callable[[Any, dict[str, float]], None], values: dict[str, float]) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    draw(axes, values)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


def _draw_recall(axes: Any, values: dict[str, float]) -> None:
    exact = values["search_exact"]
    for name, marker in (("cascade", "o"), ("int8", "s"), ("pruned", "v")):
        found = [
            (values[f"search_{name}_{n}"] / exact, values[f"search_{name}_{n}_recall_20"])
            for n in CANDIDATES
            if f"search_{name}_{n}" in values
        ]
        if found:
            axes.plot(*zip(*found, strict=True), marker=marker, label=name)
    axes.plot([1], [1], "k*", label="exact")
    axes.set(xscale="log", xlabel="cost, of the exact search's", ylabel="kept of the exact top 20")
    axes.legend()


def _draw_latency(axes: Any, values: dict[str, float]) -> None:
    for place, kind in enumerate(("median", "p99")):
        left = 0.0
        for number, stage in enumerate(STAGES):
            width = values[f"latency_{stage.replace(' ', '_')}_{kind}"] * 1000
            axes.barh(place, width, left=left, color=f"C{number}", label=stage if place == 0 else None)
            left += width
    axes.set(yticks=[0, 1], yticklabels=["median", "99th percentile"], xlabel="ms a question, stages each by itself")
    axes.legend()


def _draw_batch(axes: Any, values: dict[str, float]) -> None:
    for name in ("exact", "reverse", "int8", "linear"):
        found = [(size, values[f"batch_{size}_{name}"]) for size in BATCHES if f"batch_{size}_{name}" in values]
        if found:
            axes.plot(*zip(*found, strict=True), marker="o", label=name)
    axes.set(xscale="log", yscale="log", xlabel="questions in a batch", ylabel="us a question and chunk")
    axes.legend()


def _draw_rows(axes: Any, values: dict[str, float]) -> None:
    sizes = sorted({int(name.split("_")[1]) for name in values if name.startswith("rows_")})
    for name in ("exact", "cascade"):
        axes.plot(sizes, [values[f"rows_{size}_{name}"] for size in sizes], marker="o", label=name)
    axes.set(xscale="log", yscale="log", xlabel="chunks in the pool", ylabel="s a question")
    axes.legend()
