"""What a warm start leaves beside its weights: the training curve as table and figure, what it reads, and the model card."""

from __future__ import annotations

import io
import random
from collections.abc import Mapping, Sequence
from typing import Any

from tqdm import tqdm

from intra import lineage
from intra.artifact import Artifact
from intra.backbone import locate
from intra.config import Config

QUESTIONS = 300  # of the test split, for the scores of reading
CHUNKS = 5


def curve(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Any:
    """A row a checkpoint, in order: step, stage (from 1), its name, then the metrics; null where a stage has none. A pyarrow Table."""
    import pyarrow as pa

    columns = [name for name in dict.fromkeys(name for row in rows for name in row) if name not in ("run", "step", "stage")]
    return pa.table(
        {
            "step": pa.array([row["step"] for row in rows], pa.int64()),
            "stage": pa.array([int(row["stage"]) for row in rows], pa.int64()),
            "stage_name": pa.array([names[int(row["stage"]) - 1] for row in rows], pa.string()),
            **{name: pa.array([row.get(name) for row in rows], pa.float64()) for name in columns},
        }
    )


def figure(rows: Sequence[Mapping[str, Any]], stages: Mapping[int, str]) -> bytes:
    """The curve as a PNG: losses above, accuracies below, over the steps; a line where a stage starts (first step -> name)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 7), layout="constrained")
    FigureCanvasAgg(figure)
    columns = [name for name in dict.fromkeys(name for row in rows for name in row) if name not in ("run", "step", "stage")]
    shares = [name for name in columns if name.endswith(("_accuracy", "_attention"))]
    for axes, label, names in zip(
        figure.subplots(2, 1, sharex=True), ("loss", "share"), ([name for name in columns if name not in shares], shares), strict=True
    ):
        for name in names:
            points = [(row["step"], row[name]) for row in rows if name in row]
            style = "--" if name.startswith("fresh_") else "-"
            axes.plot(*zip(*points, strict=True), style, marker=".", markersize=3, linewidth=1, label=name.replace("_", " "))
        for start in list(stages)[1:]:
            axes.axvline(start, color="0.6", linewidth=1)
        axes.set_ylabel(label)
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        if names:
            axes.legend(fontsize="x-small")
    if len(stages) > 1:
        for start, name in stages.items():
            figure.axes[0].annotate(name, (start, 1), xycoords=("data", "axes fraction"), fontsize="x-small", va="bottom")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


def reading(config: Config, backbone: Any) -> dict[str, tuple[float, int]]:
    """Exact match of test questions read from their gold and random chunks, by benchmark and type: name -> (value, questions)."""
    import torch

    from intra.data.chunking import chunk_text
    from intra.data.schema import read_pool, read_questions
    from intra.evaluation.metrics import exact_match

    dataset = lineage.dataset(config).url
    pool, questions = read_pool(dataset), [item for item in read_questions(dataset, "test") if item.answers and item.gold]
    rng = random.Random(f"intra warm start reading {config.seed}")
    questions = rng.sample(questions, min(QUESTIONS, len(questions)))
    backbone.model.eval()
    hits: dict[str, list[float]] = {}
    with torch.no_grad():
        for question in tqdm(questions, desc="reading", unit="question", disable=None):
            rows = list(dict.fromkeys(pool.row_of[group[0]] for group in question.gold))
            while len(rows) < min(CHUNKS, len(pool)):
                row = rng.randrange(len(pool))
                if row not in rows:
                    rows.append(row)
            texts = [chunk_text(pool.titles[row], pool.texts[row], config.data.template) for row in rows]
            memory = backbone.pack([backbone.encode(backbone.tokenize(texts))])
            answer = backbone.answer(backbone.prompt_ids([question.question]), memory, config.backbone.answer_tokens)[0]
            name = f"{question.benchmark}/{question.type}" if question.type else question.benchmark
            hits.setdefault(name, []).append(exact_match(answer, question.answers))
    return {name: (sum(values) / len(values), len(values)) for name, values in sorted(hits.items())}


def _start(config: Config) -> str:
    """Where the backbone starts, for its card."""
    size = config.backbone.architecture
    decoder = f"hidden size {size.hidden_size}, {size.heads} heads, {size.kv_heads} key-value heads"
    if lineage.over_encoder(config):
        return (
            f"the frozen encoder `{size.encoder}`, its states whitened, and a decoder of {size.decoder_layers} layers ({decoder}) "
            f"whose first {size.matching_heads} heads began as the identity"
        )
    if lineage.from_scratch(config):
        return f"random weights ({size.encoder_layers} encoder and {size.decoder_layers} decoder layers, {decoder})"
    return f"`{config.backbone.model}`"


def _license(config: Config) -> str:
    """The lines of the card that say whose weights these are made of, whose licence goes with them; "other": not one that is known here."""
    model = config.backbone.model
    if lineage.over_encoder(config):
        return "license: other"
    if lineage.from_scratch(config) or model == "quickstart":
        return "license: apache-2.0"
    if not locate.on_hub(model):
        return "license: other"
    return f"license: {'gemma' if model.lower().startswith('google/t5gemma') else 'other'}\nbase_model: {model}"


def card(
    config: Config, dataset: Artifact, parameters: int, seconds: float, metrics: Mapping[str, Any], scores: dict[str, tuple[float, int]]
) -> str:
    from intra.backbone import curriculum

    recipe = config.backbone.warmstart
    stages = curriculum.stages(recipe)
    losses = "; ".join(
        (f"{stage.name}, {stage.stop - stage.start:,} steps: " if recipe.stages else "")
        + ", ".join(f"{name} {weight}" for name, weight in stage.recipe.losses if weight)
        for stage in stages
    )
    kinds = {
        "retrieval": "its decoder's queries were trained to find the gold chunks among those of a batch",
        "hop": "early layers to find the first of them and late layers the last",
        "attention": "its cross-attention to look at the answer's words (late layers) and at those that name the last chunk (early ones)",
    }
    supervised = [text for name, text in kinds.items() if any(getattr(stage.recipe.losses, name) for stage in stages)]
    if not any(stage.recipe.losses.answer for stage in stages):
        supervision = f"Trained to retrieve alone: {'; '.join(supervised)}. It was **not** trained to answer."
    elif supervised:
        supervision = f"Trained with supervision beyond answers: {'; '.join(supervised)}. It is **not** pretrained only for generation."
    else:
        supervision = "Trained on answers alone, without any supervision of retrieval."
    if config.data.source == "synthetic":
        data = f"mini-worlds of the synthetic generator (seed {config.seed}, training names only)"
    else:
        data = f"the training questions of the dataset {dataset.fingerprint} (source `{config.data.source}`)"
        if share := max(stage.recipe.cloze_share for stage in stages):
            data += f"; up to {share:.0%} of the worlds ask what was made of its passages: a sentence without the name it leads to"
    split = recipe.shard and recipe.workers > 1
    options = ["weights sharded"] * split + ["bfloat16"] * (recipe.precision == "bfloat16") + ["AdamW"] * (recipe.optimizer == "adamw")
    how = f"; {', '.join(options)}" if options else ""
    title, classes = "A warm-started T5Gemma 2", "`T5Gemma2ForConditionalGeneration`, unmodified"
    if lineage.over_encoder(config):
        title = "A T5Gemma 2 decoder over a frozen encoder"
        classes = "`T5Gemma2ForConditionalGeneration`, a `BertModel` its encoder"
    reading = [f"| {name} | {value:.3f} | {count} |" for name, (value, count) in scores.items()]
    if reading:
        read = f"answered from the stored states of their gold chunks and random ones, {CHUNKS} in all"
        head = ["| benchmark/type | exact match | questions |", "|---|---|---|"]
        reading = ["", f"Reading: exact match on test questions, {read}.", "", *head, *reading]
    length = f"{recipe.steps:,} steps of {recipe.batch_size} worlds with {recipe.questions} questions each"
    last = ", ".join(f"{name} {value:.3f}" for name, value in sorted(metrics.items()) if name not in ("run", "step", "stage"))
    return f"""---
library_name: transformers
{_license(config)}
tags: [t5gemma2, intra]
---
# {title} for intrinsic retrieval

Text only; {parameters:,} parameters ({classes}). {supervision}

- Data: {data}.
- Start: {_start(config)}.
- Loss weights: {losses}.
- Training: {length}; seed {config.seed}; {seconds / 60:.1f} minutes with {recipe.workers} worker(s) of
  {recipe.threads} thread(s) (since the last start, where the run was cut off){how}.
- Command: `python workflows/warmstart.py --config configs/{config.tracking.experiment}.yaml backbone.train=true seed={config.seed}`
- Training metrics, mean of the last steps: {last} (`curve.parquet`, `curve.png`: the whole run).
""" + "".join(f"{line}\n" for line in reading)
