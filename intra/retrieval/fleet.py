"""The pool across machines: its parts lie in the memory of Ray actors, each answers a batch of questions, the driver puts it together.

    fleet = Fleet(functools.partial(ChunkStore, url), len(store), Keys.of(backbone), workers=8, gpus=1)
    best = fleet.best(ask, Form(), 20, normalisers)                # as pools.Local

A part is a range of rows that begins at a multiple of `scorers.ALIGN` and is read by whoever is asked for it first. Where an actor dies its
parts go to those that are left (to a new one where none is), and what it was asked is asked again: no question is lost. Results are put
together in the order of parts, so neither the number of parts nor of actors changes a ranking. Where not all actors fit the cluster there
are fewer.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from intra import cluster
from intra.errors import UserError, WorkflowError
from intra.retrieval import pools, scoring
from intra.retrieval.pools import Ask, Form, Resident, Source, aligned
from intra.retrieval.scorers import Keys
from intra.retrieval.scoring import TopK

Part = tuple[int, int]  # first row, number of rows


class Holder:
    """In a worker: parts of the pool, in memory once they were asked for. Maps {"part", "what", "ask", ...} to {"result"}."""

    def __init__(self, opens: Callable[[], Source], keys: Keys, tile_chunks: int, device: str, threads: int) -> None:
        torch.set_num_threads(threads)
        self._device, self._keys = device, keys.to(device)
        self._source, self._tile_chunks = opens(), tile_chunks
        self._parts: dict[Part, Resident] = {}
        self._ask: tuple[Any, Ask] | None = None

    def __call__(self, row: Mapping[str, Any]) -> dict[str, Any]:
        if row["part"] not in self._parts:
            self._parts[row["part"]] = Resident(self._source, self._keys, row["part"], self._device)
        part, ask, form = self._parts[row["part"]], self._asked(row["ask"]), row["form"]
        if row["what"] == "components":
            return {"result": part.components(ask, self._keys, form, row["rows"])}
        scorer = ask.scorer(self._keys, form, scalars=True)
        tiles = part.tiles(self._tile_chunks)
        if row["what"] == "log_sums":
            return {"result": scoring.log_sums(tiles, scorer).cpu()}  # type: ignore[arg-type]
        normalisers = None if row["normalisers"] is None else row["normalisers"].to(self._device)
        return {"result": pools.best(tiles, scorer, row["k"], normalisers, form.rough)}

    def _asked(self, reference: Any) -> Ask:
        import ray

        if self._ask is None or self._ask[0] != reference:
            self._ask = reference, ray.get(reference).to(self._device)
        return self._ask[1]


class _Worker(cluster.Stage):
    def work(self, row: dict[str, Any]) -> dict[str, Any]:
        return self(row)


class Fleet:
    """`pools.Pool` over `workers` actors of so many threads or GPUs each. Ray must be connected."""

    def __init__(
        self, opens: Callable[[], Source], rows: int, keys: Keys, *, workers: int, parts: int | None = None, threads: int = 1,
        gpus: float = 0, tile_chunks: int = 2048,
    ) -> None:  # fmt: skip
        """`opens` gives a worker the pool; `parts` is the number of ranges (the workers' where None), fewer where the pool is small.

        Raises UserError where no machine of the cluster holds a worker.
        """
        import ray

        size = aligned(-(-rows // (parts or workers)))
        self.parts: list[Part] = [(first, min(size, rows - first)) for first in range(0, rows, size)]
        self._rows, self._losses, self._most = rows, 0, cluster.DEATHS * workers
        build = (opens, ray.put(keys.to("cpu")), aligned(tile_chunks), "cuda" if gpus else "cpu", threads)
        actor: Any = ray.remote(num_cpus=threads, num_gpus=gpus or None, max_restarts=0)(_Worker)
        self._start: Callable[[], Any] = lambda: actor.remote(Holder, *build)
        self.actors: list[Any] = [self._start() for _ in range(_fitting(min(workers, max(1, len(self.parts))), threads, gpus))]
        self._place = {part: self.actors[number % len(self.actors)] for number, part in enumerate(self.parts)}

    def __len__(self) -> int:
        return self._rows

    def log_sums(self, ask: Ask, form: Form) -> Tensor:
        if not self.parts:
            raise WorkflowError("the chunk store holds no chunk; run workflows/encode.py again")
        found = self._each({part: {"what": "log_sums"} for part in self.parts}, ask, form)
        total = found[self.parts[0]]
        for part in self.parts[1:]:
            total = torch.logaddexp(total, found[part])
        return scoring.rounded(total)

    def best(self, ask: Ask, form: Form, k: int, normalisers: Tensor | None) -> TopK:
        sums = None if normalisers is None else normalisers.cpu()
        found = self._each({part: {"what": "best", "k": k, "normalisers": sums} for part in self.parts}, ask, form)
        total = TopK(k)
        for part in self.parts:
            total.merge(found[part])
        return total

    def components(self, ask: Ask, form: Form, rows: Sequence[Sequence[int]]) -> list[Tensor]:
        size = self.parts[0][1] if self.parts else 1
        wanted = [torch.tensor(each, dtype=torch.int64) for each in rows]
        owners = [each // size for each in wanted]
        mine = {part: [each[own == number] for each, own in zip(wanted, owners, strict=True)] for number, part in enumerate(self.parts)}
        work = {part: {"what": "components", "rows": [each.tolist() for each in own]} for part, own in mine.items() if any(map(len, own))}
        found = self._each(work, ask, form)
        together = [torch.empty(ask.components, len(each)) for each in wanted]
        for number, part in enumerate(self.parts):
            for all_mine, own, piece in zip(together, owners, found.get(part, []), strict=False):
                all_mine[:, own == number] = piece
        return together

    def close(self) -> None:
        import ray

        for actor in self.actors:
            ray.kill(actor)  # type: ignore[no-untyped-call]
        self.actors = []

    def _each(self, work: Mapping[Part, dict[str, Any]], ask: Ask, form: Form) -> dict[Part, Any]:
        """The result of each part's work; what a dead actor was doing is asked of another."""
        import ray
        from ray.exceptions import OutOfMemoryError, RayActorError

        reference = ray.put(ask.to("cpu"))
        rows = {part: {**row, "part": part, "ask": reference, "form": form} for part, row in work.items()}
        asked = {self._place[part].work.remote(row): (part, self._place[part]) for part, row in rows.items()}
        found: dict[Part, Any] = {}
        while asked:
            (done,), _ = ray.wait(list(asked), num_returns=1)
            part, actor = asked.pop(done)
            try:
                row = ray.get(done)
            except (RayActorError, OutOfMemoryError) as error:
                self._lost(actor, error)
                asked[self._place[part].work.remote(rows[part])] = (part, self._place[part])
                continue
            cluster.check(row, f"search, chunks {part[0]} to {sum(part) - 1}")
            found[part] = row["result"]
        return found

    def _lost(self, actor: Any, error: Exception) -> None:
        """Moves the parts of a dead actor. Raises WorkflowError where actors die again and again."""
        if actor not in self.actors:
            return  # another of its parts has told already
        self.actors.remove(actor)
        self._losses += 1
        if self._losses > self._most:
            reason = " ".join(str(error).split())[:300]
            raise WorkflowError(f"search: workers are lost again and again ({reason}); check memory and the cluster, then run it again")
        if not self.actors:
            self.actors = [self._start()]
        orphans = [part for part, owner in self._place.items() if owner == actor]
        for number, part in enumerate(orphans):
            self._place[part] = self.actors[number % len(self.actors)]


def _fitting(wanted: int, threads: int, gpus: float) -> int:
    """So many of the workers that are wanted as fit the cluster as it stands: others would never start, in silence. Raises UserError where
    none does."""
    worker = {"CPU": threads, "GPU": gpus}
    fit, needs = cluster.fits(worker), cluster.amounts(worker)
    if not fit:
        raise UserError(
            f"retriever.search.workers: no worker of {needs} fits: there are {cluster.here()} here; lower "
            "retriever.search.gpus_per_worker or retriever.search.threads, or add machines"
        )
    if fit < wanted:
        print(f"search: {fit} of {wanted} workers ({needs} each) fit the cluster now; it goes on with those", file=sys.stderr)
    return min(fit, wanted)
