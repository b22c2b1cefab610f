"""Packs worlds for the warm start: separately encoded chunks as memory, many questions in one decoder row.

A world is a set of chunks and questions about them. Its chunks are encoded alone, then laid side by side as the memory of one
row; its questions stand one behind another in that row as *segments*. The masks say what a plain run of the model on each
question says by itself: a segment sees itself causally, with positions from 0, and the chunks made visible to it. So a
world's keys and values are made once, not once a question. (T5Gemma 2 takes ready masks by layer type: no patched code.)

Shapes: W worlds, C chunks of all worlds, N tokens of the longest chunk, M tokens of the longest memory, Q tokens of the
longest row, S retrieval segments, R retrieval positions, K looks, d hidden size, P pooled vectors, E extra chunks of no world,
which the retrieval and hop losses score beside the C.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor

IGNORE = -100  # label of a position that is not trained on


EARLY, LATE = 0, 1  # halves of the decoder's layers


@dataclass
class Look:
    """Where a place of a segment should look: tokens of chunks, in the early or the late half of the layers."""

    place: int
    half: int
    tokens: list[tuple[int, int]]  # (chunk of the world, token of the chunk)


@dataclass
class Segment:
    """One question's stretch of the decoder row.

    ids, positions, labels: one entry a token; visible: the chunks of its world it may read, by index. A retrieval
    segment also has `probes`, the places (in the segment) whose queries retrieve, and `gold`, chunks in the order in which the
    layers are to find them. Where the backbone echoes the question, `echo` is its encoder input and its states stand right before the
    first probe. `looks` is what the attention loss supervises. `answering`: rows of the pool that are or could stand for its gold.
    """

    ids: list[int]
    positions: list[int]
    labels: list[int]
    visible: list[int]
    probes: list[int] = field(default_factory=list)
    gold: list[int] = field(default_factory=list)
    echo: list[int] = field(default_factory=list)
    looks: list[Look] = field(default_factory=list)
    answering: set[int] = field(default_factory=set)


@dataclass
class PackedWorld:
    chunks: list[list[int]]  # encoder token ids
    segments: list[Segment]
    kept: list[list[bool]]  # of each chunk's pooled vectors, the ones to score; at least one
    rows: list[int] = field(default_factory=list)  # of the chunks, where they are a pool's


@dataclass(frozen=True)
class Batch:
    chunks: list[list[int]]  # of all worlds
    extra: list[list[int]]  # of no world
    rows: list[int]  # of `chunks` in the pool, where they are a pool's; else none
    extra_rows: list[int]  # the same of `extra`
    gather: Tensor  # long [W, M]: place of each memory token in the flat [C * N] encoder output
    memory_chunk: Tensor  # long [W, M]: index of the chunk in its world, -1 for padding
    ids: Tensor  # long [W, Q]
    positions: Tensor  # long [W, Q]
    labels: Tensor  # long [W, Q]
    segment: Tensor  # long [W, Q]: index of the segment in its world, -1 for padding
    visible: Tensor  # bool [W, segments, chunks of the world]
    probe_rows: Tensor  # long [S, R]
    probe_columns: Tensor  # long [S, R]
    gold: Tensor  # float [S, C + E]: the share of each chunk among the question's gold
    first: Tensor  # float [S, C + E]: 1 for the first gold chunk
    last: Tensor  # float [S, C + E]: the same for the last
    left_out: Tensor  # bool [S, C + E]: chunks that answer the question as its gold does, and so are no negatives of it
    kept: Tensor  # bool [C + E, P]: the pooled vectors of each chunk that the retrieval and hop losses score
    echoes: list[list[int]]  # encoder inputs of S questions, or none; each has X_s states between its first and its last
    echo_columns: Tensor  # long [S, X]: where they stand, X of the longest
    echoed: Tensor  # bool [S, X]
    look_row: Tensor  # long [K]
    look_column: Tensor  # long [K]
    look_half: Tensor  # long [K]
    look_target: Tensor  # bool [K, M]

    def to(self, device: torch.device) -> Batch:
        """The batch with its tensors on a device; token ids stay lists."""
        tensors = [item.name for item in fields(self) if item.name not in ("chunks", "extra", "rows", "extra_rows", "echoes")]
        return replace(self, **{name: getattr(self, name).to(device) for name in tensors})


def answer_segment(prompt: Sequence[int], answer: Sequence[int], visible: Sequence[int]) -> Segment:
    """Prompt and answer, teacher-forced: the loss stands on the answer's tokens and <eos> only."""
    ids = [*prompt, *answer[:-1]]
    return Segment(ids, list(range(len(ids))), [IGNORE] * (len(prompt) - 1) + list(answer), list(visible))


def retrieval_segment(
    prompt: Sequence[int], offsets: Sequence[int], visible: Sequence[int], gold: Sequence[int], echo: Sequence[int] = ()
) -> Segment:
    """The prompt and, at the given distances behind it, copies of its last token, which stand for retrieval tokens.

    `echo`: an encoder input whose states, but for the first and the last, come between.
    """
    start = len(prompt) + max(0, len(echo) - 2)
    ids = [*prompt, *echo[1:-1], *[prompt[-1]] * len(offsets)]
    positions = [*range(start), *(start + offset for offset in offsets)]
    return Segment(ids, positions, [IGNORE] * len(ids), list(visible), list(range(start, len(ids))), list(gold), list(echo))


def collate(
    worlds: Sequence[PackedWorld], pad: int, extra: Sequence[list[int]] = (), extra_kept: Sequence[list[bool]] = (),
    extra_rows: Sequence[int] = (),
) -> Batch:  # fmt: skip
    """One batch of the worlds, padded on the right, with `extra` chunks, what to score of their pooled vectors, and their rows in the pool.

    Every retrieval segment must have the same number of probes.
    """
    chunks = [chunk for world in worlds for chunk in world.chunks]
    longest = max(len(chunk) for chunk in chunks)
    gather, memory_chunk, rows = [], [], []
    probe_rows, probe_columns, golds, answering = [], [], [], []
    echoes, echo_columns = [], []
    looks: list[tuple[int, int, int, list[int]]] = []
    width = max(len(world.chunks) for world in worlds)
    visible = torch.zeros(len(worlds), max(len(world.segments) for world in worlds), width, dtype=torch.bool)
    offset = 0
    for number, world in enumerate(worlds):
        gather.append([(offset + i) * longest + j for i, chunk in enumerate(world.chunks) for j in range(len(chunk))])
        memory_chunk.append([i for i, chunk in enumerate(world.chunks) for _ in chunk])
        starts = list(itertools.accumulate((len(chunk) for chunk in world.chunks), initial=0))
        row: dict[str, list[int]] = {"ids": [], "positions": [], "labels": [], "segment": []}
        for index, segment in enumerate(world.segments):
            start = len(row["ids"])
            row["ids"] += segment.ids
            row["positions"] += segment.positions
            row["labels"] += segment.labels
            row["segment"] += [index] * len(segment.ids)
            visible[number, index, segment.visible] = True
            for look in segment.looks:
                looks.append((number, start + look.place, look.half, [starts[chunk] + token for chunk, token in look.tokens]))
            if segment.probes:
                probe_rows.append([number] * len(segment.probes))
                probe_columns.append([start + place for place in segment.probes])
                golds.append([offset + chunk for chunk in segment.gold])
                answering.append(segment.answering)
                if segment.echo:
                    first_probe = start + segment.probes[0]
                    echoes.append(segment.echo)
                    echo_columns.append(list(range(first_probe - len(segment.echo) + 2, first_probe)))
        rows.append(row)
        offset += len(world.chunks)
    gold = torch.zeros(len(golds), len(chunks) + len(extra))
    for number, group in enumerate(golds):
        gold[number, group] = 1 / len(group)
    first, last = torch.zeros_like(gold), torch.zeros_like(gold)
    for number, group in enumerate(golds):
        first[number, group[0]] = last[number, group[-1]] = 1
    chunk_rows = [row for world in worlds for row in world.rows]
    left_out = torch.zeros_like(gold, dtype=torch.bool)
    for number, rows_of_gold in enumerate(answering):
        if rows_of_gold:
            left_out[number] = torch.tensor([row in rows_of_gold for row in (*chunk_rows, *extra_rows)]) & (gold[number] == 0)
    places = _padded(gather, 0)
    target = torch.zeros(len(looks), places.shape[1], dtype=torch.bool)
    for number, look_at in enumerate(looks):
        target[number, look_at[3]] = True
    return Batch(
        chunks=chunks,
        extra=list(extra),
        rows=chunk_rows,
        extra_rows=list(extra_rows),
        gather=places,
        memory_chunk=_padded(memory_chunk, -1),
        ids=_padded([row["ids"] for row in rows], pad),
        positions=_padded([row["positions"] for row in rows], 0),
        labels=_padded([row["labels"] for row in rows], IGNORE),
        segment=_padded([row["segment"] for row in rows], -1),
        visible=visible,
        probe_rows=torch.tensor(probe_rows, dtype=torch.long),
        probe_columns=torch.tensor(probe_columns, dtype=torch.long),
        gold=gold,
        first=first,
        last=last,
        left_out=left_out,
        echoes=echoes,
        echo_columns=_padded(echo_columns, 0) if echoes else torch.zeros(0, 0, dtype=torch.long),
        echoed=_padded([[1] * len(columns) for columns in echo_columns], 0).bool() if echoes else torch.zeros(0, 0, dtype=torch.bool),
        look_row=torch.tensor([item[0] for item in looks], dtype=torch.long),
        look_column=torch.tensor([item[1] for item in looks], dtype=torch.long),
        look_half=torch.tensor([item[2] for item in looks], dtype=torch.long),
        look_target=target,
        kept=torch.tensor([*(row for world in worlds for row in world.kept), *extra_kept], dtype=torch.bool),
    )


def masks(batch: Batch, window: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The decoder's self and cross masks by layer type, True where a query may look: bool [W, 1, Q, Q] and [W, 1, Q, M].

    Padding sees itself (an empty row of a softmax is not a number) and no memory; what it yields is not read.
    """
    same = batch.segment[:, :, None] == batch.segment[:, None, :]
    distance = batch.positions[:, :, None] - batch.positions[:, None, :]
    columns = torch.arange(batch.ids.shape[1], device=batch.ids.device)
    full = (same & (columns[:, None] >= columns[None, :]))[:, None]
    sliding = full & (distance < window)[:, None]
    worlds = torch.arange(len(batch.ids), device=batch.ids.device)[:, None, None]
    seen = batch.visible[worlds, batch.segment.clamp(min=0)[:, :, None], batch.memory_chunk.clamp(min=0)[:, None, :]]
    cross = (seen & (batch.segment >= 0)[:, :, None] & (batch.memory_chunk >= 0)[:, None, :])[:, None]
    return {"full_attention": full, "sliding_attention": sliding}, {"full_attention": cross}


def pooled(states: Tensor, lengths: Tensor, count: int) -> Tensor:
    """`intra.backbone.model.pool` of padded states, with its gradient: Tensor[C, N, d], long [C] -> Tensor[C, count, d]."""
    places = torch.arange(count + 1, device=states.device)
    bounds = places[None, :] * lengths[:, None] // count
    start, end = bounds[:, :-1], torch.maximum(bounds[:, 1:], bounds[:, :-1] + 1)
    tokens = torch.arange(states.shape[1], device=states.device)
    inside = (tokens >= start[..., None]) & (tokens < end[..., None])
    return (inside / (end - start)[..., None]).to(states) @ states


def _padded(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    width = max(len(row) for row in rows)
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows], dtype=torch.long)
