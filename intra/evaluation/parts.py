"""What an evaluation is made of: backbone, store, retriever, encoded corpora and the methods, each loaded when first used."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import TYPE_CHECKING, Any

from intra import cluster, lineage
from intra.artifact import Artifact
from intra.config import Config
from intra.data.schema import Pool
from intra.errors import UserError, WorkflowError
from intra.evaluate_config import CrossConfig, DenseConfig, FusionConfig, LateConfig, ModelConfig, RerankConfig
from intra.method import Method, Rankings

if TYPE_CHECKING:
    from intra.backbone.model import Backbone
    from intra.baselines.corpus import Corpus
    from intra.retrieval.retriever import Retriever
    from intra.retrieval.search import Passes
    from intra.store.reader import ChunkStore

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
        settings, on_gpu = self.config.backbone, self.config.evaluate.gpus_per_worker > 0
        device = "cuda" if settings.device == "auto" and on_gpu else settings.device  # a GPU that was asked for and is not seen is refused
        return model.load(lineage.backbone(self.config).url, dtype=settings.dtype, device=device, prompt=settings.prompt)

    @cached_property
    def store(self) -> ChunkStore:
        from intra.store.reader import ChunkStore

        lineage.check_store(self.config)
        return ChunkStore(lineage.store(self.config).url)

    @cached_property
    def retriever(self) -> Retriever:
        from intra.retrieval.retriever import Retriever

        return Retriever.from_pretrained(lineage.retriever(self.config).url)

    @cached_property
    def passes(self) -> Passes:
        from intra.retrieval.search import Passes

        settings = self.config.retriever
        if settings.search.workers:
            cluster.connect(self.config)
        return Passes(
            self.backbone,
            self.store,
            self.retriever,
            query_batch=settings.query_batch,
            tile_chunks=settings.tile_chunks,
            search=settings.search,
        )

    @cached_property
    def intrinsic(self) -> dict[str, Method]:
        from intra.retrieval import search

        settings = self.config.retriever
        return {method.name: method for method in search.methods(self.passes, settings.answer_size, settings.answer_initial)}

    def corpus(self, name: str, pool: Pool) -> Corpus:
        """The pool as the dense or late baseline `name` encodes it."""
        from intra.baselines import models, tuning
        from intra.baselines.corpus import Corpus

        evaluate, settings = self.config.evaluate, self.config.evaluate.models[name]
        place = lineage.vectors(self.config, name)
        if isinstance(settings, LateConfig):
            late = settings
            return Corpus(
                name, place, pool, lambda: models.Late(name, late, evaluate.device, evaluate.threads), evaluate.shard_chunks, half=True
            )
        dense = lineage.dense(self.config, name)

        def encoder() -> models.Dense:
            tuned = tuning.folder(self.config, name) if dense.tune else None
            return models.Dense(name, dense, evaluate.device, evaluate.threads, tuned)

        return Corpus(name, place, pool, encoder, evaluate.shard_chunks, half=False)

    def method(self, name: str, first: Callable[[str, int], Rankings]) -> Method:
        """The method `name`. `first(other, depth)` gives another method's ranking."""
        from intra.baselines import dense, lexical, reference, wrappers

        model = self.config.evaluate.models.get(name)
        if isinstance(model, FusionConfig):
            fusion = model
            fills = [self.config.evaluate.fills(part) for part in fusion.of]
            return wrappers.Fusion(name, lambda: [first(part, fusion.depth) for part in fusion.of], fusion.k, fills)
        if isinstance(model, RerankConfig):
            rerank = model
            return wrappers.Rerank(name, lambda: first(rerank.of, rerank.depth), self._scorer(rerank.by))
        if model is not None:
            if isinstance(model, DenseConfig):
                return dense.Dense(name, lambda pool: self.corpus(name, pool), model.ivf)
            return dense.Late(name, lambda pool: self.corpus(name, pool))
        if name in INTRINSIC:
            return self.intrinsic[name]
        if name == "bm25":
            return lexical.BM25(self.config.evaluate.bm25)
        if name == "tfidf":
            return lexical.TfIdf()
        return reference.Random(self.config.seed) if name == "random" else reference.Oracle(self.config.seed)

    def _scorer(self, name: str) -> Any:
        from intra.baselines import dense, models, wrappers

        evaluate, model = self.config.evaluate, self.config.evaluate.models[name]
        if isinstance(model, CrossConfig):
            cross = model
            return wrappers.CrossScorer(name, lambda: models.Cross(name, cross, evaluate.device, evaluate.threads))
        return (dense.Late if isinstance(model, LateConfig) else dense.Dense)(name, lambda pool: self.corpus(name, pool))


def model(config: Config, name: str) -> str | None:
    """The model by which the method itself, without its parts, reads texts; None: it has none."""
    settings = config.evaluate.models.get(name)
    name = settings.by if isinstance(settings, RerankConfig) else name
    return name if isinstance(config.evaluate.models.get(name), ModelConfig) else None


def encoder(config: Config, name: str) -> str | None:
    """The model whose corpus the method itself reads; None: it reads none."""
    found = model(config, name)
    return None if found is None or isinstance(config.evaluate.models[found], CrossConfig) else found


def check(config: Config) -> None:
    """What would end an evaluation and is known before anything is made: the files of expected values, the models, their libraries.

    Raises UserError.
    """
    from intra.baselines import lexical, models
    from intra.evaluation import expectations

    for place in config.evaluate.expected:
        expectations.load(place)
    for name in dict.fromkeys(found for method in config.evaluate.depths() if (found := model(config, method))):
        settings = config.evaluate.models[name]
        assert isinstance(settings, ModelConfig)
        if importlib.util.find_spec("sentence_transformers") is None:
            models.sentence_transformers(name)  # says what to install
        if settings.revision is None:
            models.folder(name, settings)
    if "bm25" in config.evaluate.depths():
        lexical.stemmer(config.evaluate.bm25.stemming)


def unloadable(config: Config) -> dict[str, Exception]:
    """Of the cross-encoders that rankings still need those that cannot be loaded, and why. Each is loaded on the CPU and let go.

    What one lacks is so told before the hours of encoding and of its first list.
    """
    from intra.baselines import models

    marks, found = lineage.Marks(config), dict[str, Exception]()
    for name in config.evaluate.depths():
        scorer = model(config, name)
        settings = config.evaluate.models[scorer] if scorer else None
        if scorer and isinstance(settings, CrossConfig) and not lineage.ranking(config, name, marks).complete():
            try:
                models.Cross(scorer, settings, "cpu", config.evaluate.threads)
            except (UserError, WorkflowError) as error:
                found[scorer] = error
    return found


def encoded(config: Config) -> list[str]:
    """The models whose corpora the methods need."""
    return list(dict.fromkeys(found for name in config.evaluate.depths() if (found := encoder(config, name))))


def needed(config: Config) -> Iterator[Artifact]:
    """The artifacts an evaluation reads beside the dataset: the fewer, the fewer methods are asked for. A retriever is known by what is
    before it: ask for its place where that is complete."""
    intrinsic = not INTRINSIC.isdisjoint(config.evaluate.depths())
    tuned = any(isinstance(model := config.evaluate.models[name], DenseConfig) and model.tune for name in encoded(config))
    if config.evaluate.answers or intrinsic or tuned:
        if config.backbone.train:
            yield lineage.backbone(config)
        yield lineage.store(config)
    if intrinsic or tuned:
        yield lineage.retriever(config)
