"""How long scoring takes beside what others would do: the same queries, the same pooled vectors, the scores compared before the times.

Names of `compare`:
    exact                   LayerScorer, head_space
    gemm                    its matrix products alone, in the same blocks
    reverse, int8, linear   the other forms; `linear` and `int8` are scans, which a search follows up (`intrinsic.approximate`)
    chunked                 torch's product and maximum in blocks that are allocated anew, head by head: the training's scorer
    naive                   the keys of a layer, then one einsum and a maximum over all of it
    naive_hidden            the paper's pseudocode (App. A): queries lifted into the hidden space, one einsum, a maximum
    sentence_transformers   its `util.similarity.maxsim` over the keys of each layer and key-value head
    maxsim_cpu              the package of that name, where it is installed, a query after the other
    faiss_flat              IndexFlatIP over the keys, the best 20 vectors of each query: products without a MaxSim
"""

from __future__ import annotations

import importlib
import importlib.util
import time
from collections.abc import Callable

import torch
from torch import Tensor

from intra.retrieval import scoring
from intra.retrieval.pools import Ask
from intra.retrieval.scorers import Keys, LayerScorer, Linear

SAME = 1e-4  # of the spread of the scores: from there on a peer computes something else
# The same in bfloat16, where each rounds elsewhere: .02 at the size of the quick start, .08 at that of one layer of 4B; `linear` is 2 off.
SAME_BFLOAT16 = 0.25
Times = dict[str, float]  # seconds
Errors = dict[str, float]  # greatest difference of the scores, in their standard deviations


def compare(ask: Ask, keys: Keys, pooled: Tensor, repeats: int, names: list[str] | None = None) -> tuple[Times, Errors]:
    """Of `per_head` and `mixture` for vectors [N, P, d]: the best time of each name, and how far its scores are from the exact ones.

    A name whose scores are no scores (gemm, faiss_flat) has no error. Where others than int8 and linear are further off than SAME (in
    bfloat16 SAME_BFLOAT16) they have an error and no time. Times are of the processor where torch has one thread: another program
    lengthens them least.
    """
    made = _makers(ask, keys, pooled)
    truth = made["exact"]()
    assert truth is not None
    spread = float(truth.std(dim=2).mean())
    same = SAME_BFLOAT16 if keys.projections.dtype == torch.bfloat16 else SAME
    times: Times = {}
    errors: Errors = {}
    ready = {}
    for name in names or list(made):
        found = made[name]()  # the first run also maps memory and fills caches
        if found is not None:
            errors[name] = float((found - truth).abs().max()) / spread
            if errors[name] > same and name not in ("int8", "linear"):
                continue
        ready[name] = made[name]
    for _ in range(repeats):  # in turn, so that a busy moment does not fall on one alone
        for name, run in ready.items():
            times[name] = min(times.get(name, float("inf")), seconds(run))
    return times, errors


def seconds(run: Callable[[], object]) -> float:
    """Processor time of all threads with one torch thread, else wall time."""
    clock = time.process_time if torch.get_num_threads() == 1 and not torch.cuda.is_available() else time.perf_counter
    begun = clock()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return clock() - begun


def _makers(ask: Ask, keys: Keys, pooled: Tensor) -> dict[str, Callable[[], Tensor | None]]:
    """name -> components [B, C, N], or None."""

    def layers(form: str) -> LayerScorer:
        return LayerScorer(ask.queries, keys, ask.weights, ask.kind, form=form, temperature=ask.temperature)

    exact, reverse = layers("head_space"), layers("reverse")
    scalars = keys.scalars(pooled)
    linear = Linear(ask.queries, keys, ask.weights, ask.kind, temperature=ask.temperature)
    made: dict[str, Callable[[], Tensor | None]] = {
        "exact": lambda: exact(pooled),
        "gemm": lambda: exact.products(pooled),
        "reverse": lambda: reverse(pooled, scalars),
        "linear": lambda: linear(pooled),
        "chunked": lambda: _by_layer(ask, keys, pooled, scoring.layer_scores),
        "naive": lambda: _by_layer(ask, keys, pooled, _naive),
        "naive_hidden": lambda: _naive_hidden(ask, keys, pooled, scalars),
        "sentence_transformers": lambda: _by_layer(ask, keys, pooled, _sentence_transformers),
    }
    if not pooled.is_cuda:
        integers = layers("int8")
        made["int8"] = lambda: integers(pooled)
        if importlib.util.find_spec("maxsim_cpu"):
            made["maxsim_cpu"] = lambda: _by_layer(ask, keys, pooled, _maxsim_cpu)
        if importlib.util.find_spec("faiss"):
            made["faiss_flat"] = lambda: _faiss_flat(ask, keys, pooled)
    return made


def _components(ask: Ask, keys: Keys, heads: list[Tensor]) -> Tensor:
    """From unweighted scores [B, H, N] of each layer."""
    factors = ask.weights.float() * (keys.scaling / ask.temperature)
    z = torch.stack([torch.einsum("bhn,h->bn", each, factors[layer]) for layer, each in enumerate(heads)], dim=1)
    return z if ask.kind == "mixture" else z.sum(dim=1, keepdim=True)


@torch.no_grad()  # type: ignore[untyped-decorator]
def _by_layer(ask: Ask, keys: Keys, pooled: Tensor, score: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """`score` takes queries [B, H, R, e] and keys [N, P, G, e] of a layer and gives [B, H, N]."""
    flat, heads = pooled.reshape(-1, pooled.shape[-1]), []
    for layer in range(ask.queries.shape[1]):
        made = (keys.normed(flat, layer).unflatten(0, pooled.shape[:2]) * keys.gains[layer]).to(keys.projections.dtype)
        heads.append(score(ask.queries[:, layer], made))
    return _components(ask, keys, heads)


def _grouped(queries: Tensor, groups: int) -> Tensor:
    """[B, H, R, e] -> [B, G, H / G, R, e]."""
    return queries.unflatten(1, (groups, -1))


def _naive(queries: Tensor, keys: Tensor) -> Tensor:
    logits = torch.einsum("bgsre,npge->bgsrnp", _grouped(queries, keys.shape[2]), keys)
    return logits.amax(dim=-1).sum(dim=3, dtype=torch.float32).flatten(1, 2)


def _sentence_transformers(queries: Tensor, keys: Tensor) -> Tensor:
    from sentence_transformers.util.similarity import maxsim

    found = []
    for group, mine in enumerate(_grouped(queries, keys.shape[2]).unbind(1)):  # [B, s, R, e]
        found.append(maxsim(mine.flatten(0, 1), keys[:, :, group].contiguous()).unflatten(0, mine.shape[:2]))
    return torch.cat(found, dim=1)


def _maxsim_cpu(queries: Tensor, keys: Tensor) -> Tensor:
    scores = importlib.import_module("maxsim_cpu").maxsim_scores
    found = torch.empty(*queries.shape[:2], len(keys))
    shared = queries.shape[1] // keys.shape[2]
    for group in range(keys.shape[2]):
        documents = keys[:, :, group].float().contiguous().numpy()  # it knows no bfloat16
        for question in range(len(queries)):
            for head in range(group * shared, (group + 1) * shared):
                found[question, head] = torch.from_numpy(scores(queries[question, head].float().contiguous().numpy(), documents))
    return found


@torch.no_grad()  # type: ignore[untyped-decorator]
def _naive_hidden(ask: Ask, keys: Keys, pooled: Tensor, scalars: Tensor) -> Tensor:
    heads = []
    for layer in range(ask.queries.shape[1]):
        projection = keys.projections[layer].unflatten(0, (keys.groups, -1))  # [G, e, d]
        queries = (ask.queries[:, layer] * keys.gains[layer]).to(keys.projections.dtype)
        lifted = torch.einsum("bgsre,ged->bgsrd", _grouped(queries, keys.groups), projection)
        logits = torch.einsum("bgsrd,npd->bgsrnp", lifted, pooled) * scalars[layer][None, :, None, None]
        heads.append(logits.amax(dim=-1).sum(dim=3).flatten(1, 2))
    return _components(ask, keys, heads)


@torch.no_grad()  # type: ignore[untyped-decorator]
def _faiss_flat(ask: Ask, keys: Keys, pooled: Tensor) -> None:
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    flat = pooled.reshape(-1, pooled.shape[-1])
    for layer in range(ask.queries.shape[1]):
        made = keys.normed(flat, layer).float()  # it knows no bfloat16
        for group, mine in enumerate(_grouped(ask.queries[:, layer], keys.groups).unbind(1)):
            index = faiss.IndexFlatIP(made.shape[-1])
            index.add(made[:, group].contiguous().numpy())
            index.search(mine.reshape(-1, mine.shape[-1]).float().contiguous().numpy(), min(20, len(flat)))
