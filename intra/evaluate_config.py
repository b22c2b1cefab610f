"""The `evaluate` section of the configuration: methods, the table of the baselines' models, metrics.

A method is one of METHODS or a model of `evaluate.models`: a bi-encoder, late interaction, or a wrapper of other methods (rerank, fusion).
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import Field, model_validator

from intra.section import Section, merged

METHODS = ("intra", "maxsim", "s0_reranked", "bm25", "tfidf", "random", "oracle")
NDCG_DEPTH = 10
MODELS = Path(__file__).parent / "models.yaml"


class BM25Config(Section):
    k1: float = Field(1.5, ge=0)
    b: float = Field(0.75, ge=0, le=1)
    stemming: Literal["none", "english"] = Field("none", description="english: Snowball's stemmer (PyStemmer)")


class TuneConfig(Section):
    """Fine-tuning of a bi-encoder on the training questions; gold and hard negatives are those of `retriever.train`."""

    steps: int = Field(300, ge=1)
    held_out: float = Field(
        0.1, ge=0, lt=1, description="share of the training questions that choose the step whose weights are kept; 0: last"
    )
    held_out_chunks: int = Field(4096, ge=1, description="chunks of the pool, beside their gold, among which these are searched for")
    measure_every: int = Field(100, ge=1, description="steps between two searches; the weights it starts from are measured too")
    batch_size: int = Field(16, ge=1, description="questions a step; each sees the others' passages too")
    hard_negatives: int = Field(3, ge=0, description="a question and step, drawn from the mined ones")
    learning_rate: float = Field(2e-5, gt=0)
    warmup_steps: int = Field(20, ge=0)
    temperature: float = Field(0.05, gt=0)
    gradient_checkpointing: bool = Field(False, description="layers are computed again in the backward pass, to save memory")
    checkpoint_every: int = Field(50, ge=1)


class IvfConfig(Section):
    """An inverted-file index (faiss IVF,Flat) in place of exact search; its recall against exact search is measured and reported."""

    lists: int | None = Field(None, ge=1, description="cells of the corpus; null: 4 sqrt(texts)")
    probes: int = Field(32, ge=1, description="cells that a question looks into")
    checked: int = Field(200, ge=1, description="questions that are searched exactly too, to measure the recall")


class ModelConfig(Section):
    """A model that sentence-transformers loads."""

    model: str = Field(min_length=1, description="a directory, a hub id, or package:NAME/FOLDER of an installed Python package")
    revision: str | None = Field(None, pattern="^[0-9a-f]{40}$", description="commit of a hub id; needed there")
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="of the arithmetic")
    max_length: int = Field(ge=8, description="longest passage in tokens; what is cut is counted")
    batch_size: int = Field(32, ge=1)


class DenseConfig(ModelConfig):
    """A bi-encoder: one vector a text, compared by their inner product (the cosine where they are normalised)."""

    kind: Literal["dense"]
    query_prompt: str = Field("", description="stands before a question")
    passage_prompt: str = Field("", description="stands before a passage")
    pooling: Literal["mean", "cls", "lasttoken"]
    normalize: bool = True
    tune: TuneConfig | None = Field(None, description="fine-tuned in this run, where given")
    ivf: IvfConfig | None = Field(None, description="approximate search, where given; null: exact")


class LateConfig(ModelConfig):
    """Late interaction: a vector a token, compared by MaxSim. Prefixes and query expansion are those of the model's own files."""

    kind: Literal["late"]
    projection: bool = Field(True, description="false: the encoder's own token states, of a model never trained for late interaction")
    query_length: int = Field(32, ge=4, description="longest question in tokens")


class CrossConfig(ModelConfig):
    """A cross-encoder: reads question and passage together. No method by itself: others rerank by it."""

    kind: Literal["cross"]


class RerankConfig(Section):
    kind: Literal["rerank"]
    of: str = Field(description="the method whose first `depth` chunks are reranked")
    by: str = Field(description="the model of evaluate.models that scores them: cross, dense or late")
    depth: int = Field(100, ge=1)


class FusionConfig(Section):
    """Reciprocal rank fusion: the sum over the methods of 1 / (k + rank). What a lexical method did not find (score zero) has no rank."""

    kind: Literal["fusion"]
    of: list[str] = Field(min_length=1)
    k: int = Field(60, ge=0)
    depth: int = Field(100, ge=1, description="ranks of each method that count")


Baseline = Annotated[DenseConfig | LateConfig | CrossConfig | RerankConfig | FusionConfig, Field(discriminator="kind")]


class EvaluateConfig(Section):
    methods: list[str] = Field(list(METHODS))
    models: dict[str, Baseline] = Field({}, description="by method name; what is not given here comes from intra/models.yaml")
    bm25: BM25Config = BM25Config()
    k: list[int] = Field([5, 10, 20])
    answers: bool = True
    answer_batch: int = Field(32, ge=1)
    bootstrap: int = Field(1000, ge=100, description="resamples of the 95 % intervals")
    permutations: int = Field(10000, ge=100, description="of the paired tests against the first method")
    report_questions: int = Field(50, ge=0, description="questions of each benchmark that the report shows, drawn by the seed")
    expected: list[str] = Field([], description="files of expected values the results are judged against (configs/expected/*.yaml)")
    shard_chunks: int = Field(4096, ge=1, description="texts a shard of an encoded corpus")
    device: str = Field("auto", description="of the baselines' models: auto | cpu | cuda")
    workers: int = Field(1, ge=1, description="encoders of a corpus at once; one that asks for no GPU works without Ray")
    gpus_per_worker: float = Field(0, ge=0)
    threads: int = Field(2, ge=1)

    @model_validator(mode="before")
    @classmethod
    def _with_defaults(cls, values: Any) -> Any:
        """The models that the methods need, from intra/models.yaml where they are not given in full."""
        if not isinstance(values, dict):
            return values
        given, methods = values.get("models", {}), values.get("methods", [])
        if not isinstance(given, dict) or not isinstance(methods, list) or not all(isinstance(name, str) for name in methods):
            return values  # for the fields' own validation to refuse
        if not given and set(methods) <= set(METHODS):
            return values  # nothing to add
        known, models = yaml.safe_load(MODELS.read_text()), {}
        wanted = [*given, *methods]
        while wanted:
            name = wanted.pop(0)
            if isinstance(name, str) and name not in models and (name in given or name in known):
                own = given.get(name, {})
                models[name] = merged(dict(known.get(name, {})), own) if isinstance(own, dict) else own
                wanted += _parts(models[name])
        return {**values, "models": models}

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.k or min(self.k) < 1:
            raise ValueError("evaluate.k must be a list of positive numbers, such as [5, 10, 20]")
        if not self.methods or len(set(self.methods)) != len(self.methods):
            raise ValueError("evaluate.methods must name each method once")
        for number, name in enumerate(self.methods):
            if name not in METHODS and (name not in self.models or self.models[name].kind == "cross"):
                known = ", ".join(
                    [*METHODS, *(key for key, value in yaml.safe_load(MODELS.read_text()).items() if value["kind"] != "cross")]
                )
                raise ValueError(f"'evaluate.methods.{number}': found '{name}'; name some of {known}, or a model of evaluate.models")
        for name in self.models:
            if name in METHODS or not name.replace("_", "").isalnum():
                raise ValueError(f"evaluate.models: found '{name}'; a model's name is a new one, of letters, digits and _")
        for name in self.methods:
            self._check_model(name, ())
        return self

    def parts(self, name: str) -> list[str]:
        """The methods that a method is made of, or starts from."""
        if name in ("intra", "s0_reranked"):
            return ["maxsim"]  # S_0
        model = self.models.get(name)
        return [model.of] if isinstance(model, RerankConfig) else list(model.of) if isinstance(model, FusionConfig) else []

    def depths(self) -> dict[str, int]:
        """How many chunks each method ranks, those included that others are made of: components come first."""
        found: dict[str, int] = {}

        def visit(name: str, depth: int) -> None:
            model = self.models.get(name)
            for part in self.parts(name):
                visit(part, model.depth if isinstance(model, RerankConfig | FusionConfig) else depth)
            found[name] = max(depth, found.get(name, 0))

        for name in self.methods:
            visit(name, max(*self.k, NDCG_DEPTH))
        return found

    def fills(self, name: str) -> bool:
        """Whether a method that finds fewer chunks than are asked for fills its ranking up with others, of score zero."""
        model = self.models.get(name)
        return name in ("bm25", "tfidf") or (isinstance(model, FusionConfig) and any(map(self.fills, model.of)))

    def _check_model(self, name: str, within: tuple[str, ...]) -> None:
        """That all a method is made of is there, and each hub id is pinned."""
        key, model = f"evaluate.models.{name}", self.models.get(name)
        if name in within:
            raise ValueError(f"{key}: it is made of itself ({' of '.join([*within, name])})")
        if model is None:
            if within and name not in ("bm25", "tfidf", "intra", "maxsim", "s0_reranked"):
                raise ValueError(
                    f"evaluate.models.{within[-1]}: found '{name}'; name a method that searches, or a model of evaluate.models"
                )
        elif isinstance(model, ModelConfig):
            if model.revision is None and is_hub_id(model.model):
                raise ValueError(
                    f"{key}.revision is missing: '{model.model}' is a hub id; set the commit of the weights you mean (40 hex digits, under "
                    f"'Files and versions' of its page), or a directory as {key}.model"
                )
        else:
            around = [outer.depth for outer in map(self.models.get, within) if isinstance(outer, RerankConfig | FusionConfig)]
            if model.depth < (wanted := max(*self.k, NDCG_DEPTH, *around)):
                raise ValueError(f"{key}.depth: found {model.depth}; {wanted} chunks are asked of it (evaluate.k, or what wraps it)")
            if isinstance(model, RerankConfig) and getattr(self.models.get(model.by), "kind", None) not in ("cross", "dense", "late"):
                raise ValueError(f"{key}.by: found '{model.by}'; name a model of evaluate.models that scores (cross, dense or late)")
            for part in self.parts(name):
                if getattr(self.models.get(part), "kind", None) == "cross":
                    raise ValueError(f"{key}.of: '{part}' reranks only; name a method that searches")
                self._check_model(part, (*within, name))
            if isinstance(model, RerankConfig):
                self._check_model(model.by, (*within, name))


def _parts(model: Any) -> list[Any]:
    """The names in `of` and `by` of a wrapper's plain values."""
    if not isinstance(model, dict):
        return []
    of = model.get("of", [])
    return [*(of if isinstance(of, list) else [of]), *([model["by"]] if "by" in model else [])]


def is_hub_id(model: str) -> bool:
    """Whether a baseline's model is fetched from the hub: no package and no directory of this machine."""
    return not model.startswith("package:") and not Path(model).expanduser().is_dir()
