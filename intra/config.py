"""The one typed configuration of every workflow: YAML plus dotted overrides, validated before anything starts.

    config = load("configs/quickstart.yaml", ["root=/tmp/run", "retriever.tokens=16"])

Every section owns its keys. An unknown key, a wrong type and a value out of range are `UserError`s that name the key,
what was found, and the remedy.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from intra import storage
from intra.data_config import DataConfig
from intra.data_config import SyntheticConfig as SyntheticConfig
from intra.errors import UserError
from intra.evaluate_config import EvaluateConfig, ModelConfig
from intra.section import NO_NUMBER, Section, merged
from intra.store_config import StoreConfig


class ArchitectureConfig(Section):
    """Size of a backbone that is made from scratch (T5Gemma 2 classes, random weights).

    With `encoder`, the size of the decoder alone, over that encoder, frozen (intra/backbone/adopted.py); its tokenizer is the encoder's.
    """

    encoder: str | None = Field(None, description="a BERT: its directory, or package:NAME/FOLDER of an installed Python package")
    encoder_sample: int = Field(10_000, ge=1, description="the pool's chunks that the frozen encoder's states are whitened by")
    matching_heads: int = Field(0, ge=0, description="heads that begin as the identity, over a frozen encoder; not all of them")
    hidden_size: int = Field(96, ge=8)
    intermediate_size: int = Field(256, ge=8)
    encoder_layers: int = Field(2, ge=1)
    decoder_layers: int = Field(4, ge=1)
    heads: int = Field(4, ge=1)
    kv_heads: int = Field(4, ge=1)
    head_dim: int = Field(32, ge=2)
    vocabulary: int = Field(8192, ge=64)
    tokenizer: Literal["word", "byte_bpe"] = "word"

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.heads % self.kv_heads:
            raise ValueError("backbone.architecture.heads must be a multiple of backbone.architecture.kv_heads")
        if self.encoder is None and self.matching_heads:
            raise ValueError("backbone.architecture.matching_heads needs a backbone.architecture.encoder")
        if self.encoder is not None:
            if self.heads != self.kv_heads or self.matching_heads >= self.heads:
                raise ValueError("backbone.architecture: over an encoder, heads must equal kv_heads and be more than matching_heads")
            if self.matching_heads and (
                self.hidden_size % (2 * self.matching_heads) or self.hidden_size // self.matching_heads > self.head_dim
            ):
                raise ValueError("backbone.architecture: hidden_size / matching_heads must be even and at most head_dim")
        return self


class LossConfig(Section):
    """Weights of the warm start's losses; 0 turns one off."""

    answer: float = Field(1.0, ge=0)
    retrieval: float = Field(0.0, ge=0)
    hop: float = Field(0.0, ge=0)
    attention: float = Field(0.0, ge=0)


class StageConfig(Section):
    """One stage of the warm start's curriculum. A key that is left out keeps what `backbone.warmstart` says."""

    name: str = Field(min_length=1)
    share: float = Field(gt=0, le=1, description="of the steps; the stages' shares sum to 1")
    losses: LossConfig | None = Field(None, description="all of them: what is not named has its default, answer 1 and the others 0")
    world_chunks: int | None = Field(None, ge=3)
    growth: float | None = Field(None, ge=0, le=1, description="share of this stage's steps, at its start")
    binding: float | None = Field(None, ge=0, le=1)
    bridge: float | None = Field(None, ge=0, le=1)
    comparison: float | None = Field(None, ge=0, le=1)
    name_parts: list[int] | None = None
    extra_chunks: int | None = Field(None, ge=0)
    learning_rate_factor: float = Field(1.0, gt=0, description="times the learning rates that the schedule gives")


class WarmstartConfig(Section):
    """A world is a set of chunks and questions about them that share the encoded chunks."""

    stages: list[StageConfig] | None = Field(None, description="one stage of all the steps when null")
    steps: int = Field(1000, ge=1)
    batch_size: int = Field(16, ge=1, description="worlds a step, over all workers")
    micro_batch: int = Field(16, ge=1, description="worlds a forward pass; the retrieval loss is over a micro-batch's chunks")
    questions: int = Field(12, ge=1, description="questions a world")
    world_chunks: int = Field(8, ge=3, description="chunks a mini-world in the mean (synthetic)")
    growth: float = Field(0.0, ge=0, le=1, description="share of the steps, at the start, over which mini-worlds grow from 2 chunks")
    binding: float = Field(0.5, ge=0, le=1, description="share of mini-worlds of one kind of entity only (synthetic)")
    bridge: float = Field(0.5, ge=0, le=1, description="share of bridge questions in the other mini-worlds (synthetic)")
    comparison: float = Field(0.25, ge=0, le=1, description="share of comparisons among the questions that are no bridges (synthetic)")
    name_parts: list[int] | None = Field(None, description="words of names, drawn for each mini-world; null takes the pool's (synthetic)")
    distractors: int = Field(8, ge=0, description="random chunks a question, packed beside the gold ones (other sources)")
    bm25_distractors: int = Field(0, ge=0, description="of those, at most so many from BM25's first 50 that are not gold (other sources)")
    cloze_share: float = Field(0.0, ge=0, le=1, description="share of the worlds with questions made of the passages (other sources)")
    extra_chunks: int = Field(0, ge=0, description="further chunks a micro-batch, negatives of the retrieval and hop losses alone")
    bm25_extra: int = Field(
        0, ge=0, description="of those, at most so many a question from BM25's first 50, none of them gold (other sources)"
    )
    extra_from: int | None = Field(None, ge=1, description="the pool's chunks that the others are drawn from; null: all (other sources)")
    optimizer: Literal["muon", "adamw"] = Field("muon", description="of the layers' matrices; all else is AdamW's")
    learning_rate: float = Field(3e-3, gt=0, description="for embeddings and norms")
    matrix_learning_rate: float = Field(0.02, gt=0, description="for the layers' weight matrices")
    matching_rate: float = Field(0.1, ge=0, le=1, description="of those, for the matching heads over a frozen encoder")
    weight_decay: float = Field(0.0, ge=0, description="of the weight matrices")
    clip: float = Field(1.0, gt=0, description="largest norm of the gradient")
    warmup_steps: int = Field(50, ge=0)
    decay: float = Field(0.4, ge=0, le=1, description="share of the steps, at the end, over which the learning rates fall to 0")
    losses: LossConfig = LossConfig()
    retrieval_scoring: Literal["per_head", "mixture"] = Field("per_head", description="of the retrieval loss: a sum, or layers' softmaxes")
    head_weights: Literal["trained", "equal"] = Field("trained", description="in those losses: a weight a head, or one a layer")
    retrieval_share: float = Field(0.5, gt=0, le=1, description="share of the questions that the retrieval and hop losses see")
    pooled_length: int = Field(7, ge=1, description="pooled vectors a chunk in those losses")
    vector_dropout: float = Field(0.0, ge=0, lt=1, description="share of the pooled vectors those losses leave out, at random")
    probes: int = Field(2, ge=1, description="positions a question whose queries retrieve (retrieval and hop losses)")
    probe_span: int = Field(16, ge=1, description="they stand within so many positions behind the prompt")
    precision: Literal["float32", "bfloat16"] = Field("float32", description="of the arithmetic; the trained weights are float32")
    shard: bool = Field(False, description="weights and optimizer split over the workers (FSDP), where there are several")
    gradient_checkpointing: bool = Field(False, description="layers are computed again in the backward pass, to save memory")
    checkpoint_every: int = Field(200, ge=1)
    workers: int = Field(1, ge=1)
    threads: int = Field(1, ge=1)
    gpus_per_worker: float = Field(0, ge=0)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.shard and self.optimizer == "muon":
            raise ValueError("backbone.warmstart.shard: Muon needs whole matrices; set backbone.warmstart.optimizer=adamw or shard=false")
        for parts in (self.name_parts, *(stage.name_parts for stage in self.stages or [])):
            if parts is not None and (not parts or not set(parts) <= {2, 3, 4}):
                raise ValueError("backbone.warmstart: name_parts must be null or a list of 2, 3 and 4, such as [2, 3]")
        if self.stages is not None:
            names, total = [stage.name for stage in self.stages], sum(stage.share for stage in self.stages)
            if len(set(names)) < len(names):
                raise ValueError("backbone.warmstart.stages must have different names")
            if abs(total - 1) > 1e-6:
                raise ValueError(f"backbone.warmstart.stages: their shares sum to {total:g}; they must sum to 1")
            if min(stage.share for stage in self.stages) * self.steps < 1:
                raise ValueError("backbone.warmstart.stages: each needs a step at least; raise its share or backbone.warmstart.steps")
        for losses in (self.losses, *(stage.losses for stage in self.stages or [])):
            if losses is not None and not (losses.answer or losses.retrieval or losses.hop):
                raise ValueError("backbone.warmstart: losses must have one of answer, retrieval and hop above 0")
        if self.batch_size % self.micro_batch:
            raise ValueError("backbone.warmstart.batch_size must be a multiple of backbone.warmstart.micro_batch")
        if self.batch_size // self.micro_batch % self.workers:
            raise ValueError("backbone.warmstart.batch_size / micro_batch must be a multiple of backbone.warmstart.workers")
        if self.bm25_distractors > self.distractors:
            raise ValueError("backbone.warmstart.bm25_distractors must not exceed backbone.warmstart.distractors")
        if self.probes > self.probe_span:
            raise ValueError("backbone.warmstart.probes must not exceed backbone.warmstart.probe_span")
        return self


class BackboneConfig(Section):
    model: str = Field("quickstart", description="'quickstart' (shipped), a T5Gemma 2 directory, s3:// folder or hub id")
    revision: str | None = Field(None, description="pinned revision of a hub id")
    train: bool = Field(False, description="warm-start a backbone in this run, from backbone.initial")
    initial: Literal["scratch", "model"] = Field("scratch", description="where backbone.train starts")
    architecture: ArchitectureConfig = ArchitectureConfig()
    warmstart: WarmstartConfig = WarmstartConfig()
    dtype: Literal["float32", "bfloat16"] = "float32"
    device: str = Field("auto", description="auto | cpu | cuda")
    prompt: str = Field("Question: {question}\nAnswer:", description="what the decoder reads")
    answer_tokens: int = Field(24, ge=1, description="longest answer in tokens")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if "{question}" not in self.prompt:
            raise ValueError("backbone.prompt must contain {question}")
        if self.architecture.encoder is not None and self.warmstart.shard:
            raise ValueError("backbone.warmstart.shard does not serve backbone.architecture.encoder; set one of them to its default")
        return self


class RetrieverTrainConfig(Section):
    steps: int = Field(300, ge=1)
    batch_size: int = Field(32, ge=1, description="questions a step, over all workers")
    micro_batch: int = Field(8, ge=1, description="questions a forward pass; fixes the arithmetic for any worker count")
    learning_rate: float = Field(3e-3, gt=0)
    weights_rate: float = Field(0.1, gt=0, description="of the learning rate, for the layer and head weights")
    weight_decay: float = Field(0.0, ge=0)
    warmup_steps: int = Field(100, ge=0)
    schedule: Literal["linear", "cosine", "constant"] = Field("linear", description="of the learning rate after the warm-up")
    temperature: float = Field(0.25, gt=0, description="what scores are divided by; they start with a standard deviation of 1 over it")
    train_tokens: bool = Field(True, description="false trains the layer and head weights alone")
    hard_negatives: int = Field(16, ge=0, description="S_0 chunks that are not gold, per question")
    bm25_negatives: int = Field(0, ge=0, description="BM25 chunks that are not gold, per question")
    bm25_skip: int = Field(10, ge=0, description="first ranks of BM25 that are no negatives: unmarked evidence stands there")
    sampled_negatives: int = Field(256, ge=0, description="uniform chunks, shared by a micro-batch")
    prefix_cache_mb: int = Field(0, ge=0, description="room for the decoder's states of questions and S_0, kept between steps")
    checkpoint_every: int = Field(100, ge=1)
    workers: int = Field(1, ge=1)
    threads: int = Field(2, ge=1)
    gpus_per_worker: float = Field(0, ge=0)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.batch_size % self.micro_batch:
            raise ValueError("retriever.train.batch_size must be a multiple of retriever.train.micro_batch")
        if self.batch_size // self.micro_batch % self.workers:
            raise ValueError("retriever.train.batch_size / micro_batch must be a multiple of retriever.train.workers")
        return self


class SearchBenchmarkConfig(Section):
    """What `workflows/benchmark.py search` measures, and sizes."""

    parts: list[Literal["pool", "shape", "batch", "search", "ivf", "rows", "latency"]] = Field(
        ["pool", "shape", "batch", "search", "ivf", "rows", "latency"], min_length=1, description="see intra/retrieval/benchmark.py"
    )
    questions: int = Field(64, ge=1, description="in a batch, as far as there are so many")
    checked: int = Field(1000, ge=1, description="test questions on which rankings are compared")
    chunks: int = Field(2048, ge=1, description="of the pool, on which scorers are compared")
    search_chunks: int | None = Field(None, ge=1, description="the first so many of the pool, in which is searched; null: all")
    pools: list[int] = Field([], description="sizes of pools made of the pool's vectors again and again, such as [75900, 759000]")
    repeats: int = Field(3, ge=1, description="of which the shortest counts")
    latency_questions: int = Field(100, ge=1)


class SearchConfig(Section):
    """How s_i of the whole pool is computed (intra/retrieval/intrinsic.py)."""

    scorer: Literal["exact", "head_space", "reverse", "paper", "int8", "cascade", "auto"] = Field(
        "exact", description="exact: head_space or reverse, by the batch; int8, cascade: a scan, then exact; auto: by the pool"
    )
    candidates: int = Field(200, ge=1, description="chunks a question that int8 and cascade score exactly")
    coarse_candidates: int = Field(4000, ge=1, description="chunks a question of which cascade's one query a head chooses them")
    heads: float = Field(1.0, gt=0, le=1, description="share of the heads' |alpha| times spread, squared, that int8 scans by")
    recall: float = Field(0.99, ge=0, le=1, description="of the exact top k, what int8 and cascade must keep, or exact follows")
    rescore: int = Field(0, ge=0, description="the best so many by their pooled vectors are scored again by all their token states")
    in_memory: bool = Field(False, description="pooled vectors stay in memory, for S_0 too (as float32, unless by dot)")
    workers: int = Field(0, ge=0, description="Ray actors that hold the pooled vectors in their memory; 0: this process alone")
    parts: int | None = Field(None, ge=1, description="ranges of the pool that the workers share; null: as many as workers")
    threads: int = Field(1, ge=1)
    gpus_per_worker: float = Field(0, ge=0)
    benchmark: SearchBenchmarkConfig = SearchBenchmarkConfig()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.scorer == "int8" and self.gpus_per_worker > 0:
            raise ValueError(
                "retriever.search.scorer=int8 is for CPUs; take exact or cascade, or set retriever.search.gpus_per_worker to 0"
            )
        if self.scorer in ("int8", "cascade", "auto") and self.candidates <= self.rescore:
            raise ValueError(
                f"retriever.search.candidates={self.candidates} must exceed retriever.search.rescore={self.rescore}: of those "
                f"{self.scorer} finds the best"
            )
        return self


class RetrieverConfig(Section):
    tokens: int = Field(64, ge=1, description="R, paper section 4.2")
    pooled_length: int = Field(7, ge=1, description="L_p, paper section 3.3")
    initial_context: int = Field(20, ge=0, description="n_0; 0 leaves S_0 empty")
    initial_scoring: Literal["dot", "cosine", "whitened"] = Field("dot", description="MaxSim of S_0 (dot: Eq. 6)")
    scoring: Literal["per_head", "mixture", "mixed"] = Field(
        "per_head", description="per_head: the paper's; mixture: of a softmax per layer; mixed: layers and heads before one MaxSim"
    )
    answer_size: int = Field(5, ge=1, description="chunks the answer is read from")
    answer_initial: int = Field(1, ge=0, description="of those, taken from the top of S_0 (the paper's 4 + 1)")
    query_batch: int = Field(16, ge=1)
    tile_chunks: int = Field(2048, ge=1, description="chunks scored at once; rounded up to a multiple of 1,024 for s_i")
    search: SearchConfig = SearchConfig()
    train: RetrieverTrainConfig = RetrieverTrainConfig()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.answer_initial > self.answer_size:
            raise ValueError("retriever.answer_initial must not exceed retriever.answer_size")
        if self.scoring == "mixed" and self.search.scorer not in ("exact", "auto"):
            raise ValueError(f"retriever.search.scorer={self.search.scorer} does not serve retriever.scoring=mixed; take exact")
        if self.search.scorer == "paper" and self.search.rescore:
            raise ValueError("retriever.search.rescore is by the exact score; with retriever.search.scorer=paper set it to 0")
        return self


class AblationConfig(Section):
    """Variants of this configuration, each run for every seed (workflows/ablate.py)."""

    seeds: list[int] = Field([0, 1, 2], min_length=1)
    rows: dict[str, list[str]] = Field(min_length=1, description="name -> overrides (section.key=value); the first is the reference")


class TrackingConfig(Section):
    uri: str | None = Field(None, description="MLflow; null keeps a SQLite store beside the run")
    experiment: str | None = Field(None, description="null takes the configuration file's name")
    system_metrics: bool = Field(True, description="the machine's load, every ten seconds of a step")


class ClusterConfig(Section):
    """What every step that asks a Ray cluster for workers has in common."""

    wait_minutes: float = Field(0, ge=0, description="how long to wait for machines that an autoscaler adds, where no worker fits yet")


class Config(Section):
    root: str
    seed: int = Field(0, ge=0)
    cluster: ClusterConfig = ClusterConfig()
    data: DataConfig = DataConfig()
    backbone: BackboneConfig = BackboneConfig()
    store: StoreConfig = StoreConfig()
    retriever: RetrieverConfig = RetrieverConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    tracking: TrackingConfig = TrackingConfig()
    ablation: AblationConfig | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.retriever.answer_size > max(self.evaluate.k):
            raise ValueError("retriever.answer_size must not exceed the largest evaluate.k")
        return self


class _Twice(yaml.YAMLError):
    """A key that is written twice in one section."""


class _Loader(yaml.SafeLoader):
    """YAML whose values all count: PyYAML keeps the last of two equal keys, and raises errors of Python's for a date that there is not."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        first: dict[tuple[str, str], yaml.Node] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and first.setdefault((key.tag, key.value), key) is not key:
                before = first[key.tag, key.value].start_mark.line + 1
                raise _Twice(f"line {key.start_mark.line + 1}: '{key.value}' stands in line {before} already; write it once")
        return node

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except ValueError as error:
            raise yaml.constructor.ConstructorError(None, None, str(error), node.start_mark) from error


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The configuration of `path` with `section.key=value` overrides (values are YAML).

    Raises UserError: a missing or malformed file, an unknown key, a wrong type, a value out of range.
    """
    path = Path(path)
    values = _read(path)
    for override in overrides:
        _override(values, override)
    tracking = values.setdefault("tracking", {})
    if isinstance(tracking, dict):
        tracking.setdefault("experiment", path.stem)
    return _anchored(parse(values, str(path)))


def varied(config: Config, overrides: Sequence[str]) -> Config:
    """The configuration with overrides, without its ablation. Raises UserError as `load`."""
    values = config.model_dump(exclude={"ablation"})
    for override in overrides:
        _override(values, override)
    return _anchored(parse(values, f"ablation ({' '.join(overrides)})"))


def _read(path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The values of a file, over those of the file it `extends` (a path beside it); `above` are the files that extend this one."""
    try:
        values = yaml.load(path.read_text(), _Loader)
    except FileNotFoundError:
        raise UserError(f"{path}: no such configuration file; configs/ holds the ones that come with the project") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as a configuration file ({error})") from None
    except _Twice as error:
        raise UserError(f"{path}, {error}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected a mapping of sections, found {type(values).__name__}")
    base = values.pop("extends", None)
    if base is None:
        return values
    above = (*above, path.resolve())
    if not isinstance(base, str) or (path.parent / base).resolve() in above:
        raise UserError(f"{path}: extends: found {base!r}; name another configuration file, one that does not extend this one")
    return merged(_read(path.parent / base, above), values)


def _anchored(config: Config) -> Config:
    """With local paths made absolute: a worker's directory is not the one the command was given in."""
    data, backbone, tracking = config.data, config.backbone, config.tracking
    if data.path:
        data = data.model_copy(update={"path": storage.absolute(data.path, "data.path")})
    if backbone.model != "quickstart" and Path(backbone.model).expanduser().is_dir():
        backbone = backbone.model_copy(update={"model": storage.absolute(backbone.model)})
    encoder = backbone.architecture.encoder
    if encoder and not encoder.startswith("package:"):
        architecture = backbone.architecture.model_copy(update={"encoder": storage.absolute(encoder, "backbone.architecture.encoder")})
        backbone = backbone.model_copy(update={"architecture": architecture})
    models = {
        name: model.model_copy(update={"model": storage.absolute(model.model)})
        if isinstance(model, ModelConfig) and Path(model.model).expanduser().is_dir()
        else model
        for name, model in config.evaluate.models.items()
    }
    expected = [storage.absolute(place, "evaluate.expected") for place in config.evaluate.expected]
    evaluate = config.evaluate.model_copy(update={"models": models, "expected": expected})
    if tracking.uri and (database := re.fullmatch(r"(sqlite(?:\+\w+)?:///)(?![/:])(.+)", tracking.uri)):
        tracking = tracking.model_copy(update={"uri": database[1] + storage.absolute(database[2], "tracking.uri")})
    return config.model_copy(
        update={
            "root": storage.absolute(config.root, "root"),
            "data": data,
            "backbone": backbone,
            "evaluate": evaluate,
            "tracking": tracking,
        }
    )


def parse(values: Mapping[str, Any], origin: str = "configuration") -> Config:
    """A validated Config from plain values; `origin` names the source in errors."""
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{origin}: " + "; ".join(_explain(item) for item in error.errors())) from None


def _override(values: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise UserError(f"override '{override}': expected section.key=value, such as retriever.tokens=16")
    try:
        value = yaml.load(text, _Loader)
    except _Twice as error:
        raise UserError(f"override '{override}': {error}") from None
    except yaml.YAMLError as error:
        reason = getattr(error, "problem", None) or "it holds a character that YAML does not know"
        raise UserError(f"override '{override}': the value is not valid YAML ({reason}); quote it") from None
    *sections, last = key.split(".")
    place = values
    for section in sections:
        place = place.setdefault(section, {})
        if not isinstance(place, dict):
            raise UserError(f"override '{override}': {section} is a value, not a section")
    place[last] = value


def _explain(error: Any) -> str:
    # A model's kind, which pydantic puts into the path, is no key.
    key = ".".join(str(part) for n, part in enumerate(error["loc"]) if n != 3 or error["loc"][:2] != ("evaluate", "models"))
    if error["type"] == "extra_forbidden":
        near = difflib.get_close_matches(key, _keys(Config), n=1) or difflib.get_close_matches(
            key.rsplit(".")[-1], [k.rsplit(".")[-1] for k in _keys(Config)], n=1
        )
        return f"unknown key '{key}'" + (f"; did you mean '{near[0]}'?" if near else "; remove it")
    if error["type"] == "missing":
        return f"'{key}' is missing; set it in the file or as {key}=VALUE"
    if error["type"] == NO_NUMBER:
        return f"'{key and key + '.'}{error['ctx']['field']}': found {error['ctx']['value']}; {error['msg']}"
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    return f"'{key}': found {error['input']!r}; {error['msg'][0].lower()}{error['msg'][1:]}"


def _keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    keys = []
    for name, field in model.model_fields.items():
        keys.append(prefix + name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            keys += _keys(field.annotation, f"{prefix}{name}.")
    return keys
