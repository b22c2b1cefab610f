"""What the warm start reads: mini-worlds of the synthetic generator, or a dataset's own training questions.

Every function here is a function of (seed, step): nothing is kept between steps.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from intra.backbone.model import Backbone
from intra.backbone.packing import EARLY, LATE, Batch, Look, PackedWorld, answer_segment, collate, retrieval_segment
from intra.config import Config, WarmstartConfig
from intra.data import synthetic
from intra.data.chunking import chunk_text
from intra.data.schema import Pool, Question

Batches = Callable[[int], list[Batch]]


def synthetic_batches(config: Config, backbone: Backbone, rank: int = 0, workers: int = 1) -> Batches:
    """Step -> this worker's micro-batches of mini-worlds (training names only)."""
    recipe = config.backbone.warmstart
    parts = synthetic.name_parts(config.data.synthetic.chunks)

    def batches(step: int) -> list[Batch]:
        made = []
        for micro in _micros(recipe.batch_size, recipe.micro_batch, rank, workers):
            worlds = []
            for number in micro:
                index = step * recipe.batch_size + number
                rng = random.Random(f"intra warm start {config.seed} {index}")
                size = world_size(rng, step, recipe)
                world = synthetic.world(
                    config.seed, index, chunks=size, questions=recipe.questions, binding=recipe.binding, bridge=recipe.bridge, parts=parts
                )
                place = {passage.passage_id: number for number, passage in enumerate(world.passages)}
                texts = [chunk_text(passage.title, passage.text, config.data.template) for passage in world.passages]
                titles = [passage.title for passage in world.passages]
                asked = []
                for item in world.questions:
                    gold = [place[passage] for passage in item.gold_ids]
                    asked.append(Asked(item.question, item.answers[0], gold, titles[gold[-1]]))
                worlds.append(_pack(backbone, rng, backbone.tokenize(texts), asked, config))
            made.append(collate(worlds, backbone.tokenizer.pad_token_id))
        return made

    return batches


def world_size(rng: random.Random, step: int, recipe: WarmstartConfig) -> int:
    """Chunks of a mini-world: within a third of a mean that grows from 2 to `world_chunks` over the first `growth` of the steps.

    In a world of two chunks the answer is one of few words: reading is learnt there, and telling many chunks apart later.
    """
    grown = min(1.0, step / (recipe.growth * recipe.steps)) if recipe.growth else 1.0
    mean = round(2 + (recipe.world_chunks - 2) * grown)
    return rng.randint(max(2, mean - mean // 3), mean + mean // 3)


def question_batches(
    config: Config, backbone: Backbone, pool: Pool, questions: Sequence[Question], rank: int = 0, workers: int = 1
) -> Batches:
    """Step -> this worker's micro-batches of the dataset's questions: each world has some questions, their gold and distractors.

    `recipe.questions` questions share a world of their gold chunks (one of each group) and `recipe.distractors` random chunks
    a question. Questions come in epochs, each in another order.
    """
    recipe = config.backbone.warmstart
    answered = [question for question in questions if question.answers and question.gold]

    def epoch(number: int) -> list[int]:
        order = list(range(len(answered)))
        random.Random(f"intra warm start epoch {config.seed} {number}").shuffle(order)
        return order

    orders: dict[int, list[int]] = {}

    def draw(position: int) -> Question:
        number, place = divmod(position, len(answered))
        if number not in orders:
            for old in [key for key in orders if key < number - 1]:
                del orders[old]
            orders[number] = epoch(number)
        return answered[orders[number][place]]

    def batches(step: int) -> list[Batch]:
        made = []
        for micro in _micros(recipe.batch_size, recipe.micro_batch, rank, workers):
            worlds = []
            for number in micro:
                index = step * recipe.batch_size + number
                rng = random.Random(f"intra warm start {config.seed} {index}")
                drawn = [draw(index * recipe.questions + offset) for offset in range(recipe.questions)]
                gold = [[pool.row_of[rng.choice(group)] for group in question.gold] for question in drawn]
                rows = list(dict.fromkeys(row for group in gold for row in group))
                taken = {pool.row_of[chunk] for question in drawn for group in question.gold for chunk in group}
                wanted = min(recipe.distractors * len(drawn), len(pool) - len(taken))
                while wanted > 0:
                    row = rng.randrange(len(pool))
                    if row not in taken:
                        taken.add(row)
                        rows.append(row)
                        wanted -= 1
                rng.shuffle(rows)
                place = {row: number for number, row in enumerate(rows)}
                texts = [chunk_text(pool.titles[row], pool.texts[row], config.data.template) for row in rows]
                asked = [
                    Asked(question.question, rng.choice(question.answers), [place[row] for row in group], pool.titles[group[-1]])
                    for question, group in zip(drawn, gold, strict=True)
                ]
                worlds.append(_pack(backbone, rng, backbone.tokenize(texts), asked, config))
            made.append(collate(worlds, backbone.tokenizer.pad_token_id))
        return made

    return batches


def _micros(batch_size: int, micro_batch: int, rank: int, workers: int) -> list[range]:
    """This worker's micro-batches, as numbers of worlds in the step."""
    return [range(start, start + micro_batch) for start in range(0, batch_size, micro_batch)][rank::workers]


@dataclass(frozen=True)
class Asked:
    question: str
    answer: str
    gold: list[int]  # chunks of the world, in hop order
    bridge: str  # the title of the last gold chunk


def _pack(backbone: Backbone, rng: random.Random, chunks: list[list[int]], asked: Sequence[Asked], config: Config) -> PackedWorld:
    """One world: an answer segment for each question, and a retrieval segment for a share of them.

    The answer is read from the whole world. A retrieval pass will read S_0, which has the first hop and seldom the last: so
    its segment sees each chunk with a chance of its own, and of the gold mostly the first alone.
    """
    recipe = config.backbone.warmstart
    prompts = backbone.prompt_ids([item.question for item in asked])
    answers = backbone.answer_ids([item.answer for item in asked])
    everything = list(range(len(chunks)))
    segments = [answer_segment(prompt, answer, everything) for prompt, answer in zip(prompts, answers, strict=True)]
    bridges: list[list[tuple[int, int]]] = [[] for _ in asked]
    if recipe.losses.attention:
        titles = backbone.answer_ids([item.bridge for item in asked])
        for number, item in enumerate(asked):
            bridges[number] = _bridge(chunks, item, titles[number])
            segments[number].looks = _looks(chunks, item, len(prompts[number]), answers[number], bridges[number])
    if recipe.losses.retrieval or recipe.losses.hop:
        chosen = rng.sample(range(len(asked)), max(1, round(recipe.retrieval_share * len(asked))))
        for index in chosen:
            gold = asked[index].gold
            visible = [chunk for chunk in everything if chunk not in gold and rng.random() < 0.8]
            visible += [chunk for hop, chunk in enumerate(gold) if rng.random() < (0.9 if hop == 0 else 0.2)]
            offsets = sorted(rng.sample(range(recipe.probe_span), recipe.probes))
            segment = retrieval_segment(prompts[index], offsets, visible, gold)
            if bridges[index] and gold[0] in visible:
                segment.looks = [Look(place, EARLY, bridges[index]) for place in segment.probes]
            segments.append(segment)
    kept = [[rng.random() >= recipe.vector_dropout for _ in range(recipe.pooled_length)] for _ in chunks]
    for row in kept:
        row[rng.randrange(recipe.pooled_length)] = True
    return PackedWorld(chunks, segments, kept)


def _bridge(chunks: Sequence[list[int]], item: Asked, title: list[int]) -> list[tuple[int, int]]:
    """The tokens of the first gold chunk that name the last one; none where there is one chunk, or it is not named."""
    if len(item.gold) < 2:
        return []
    first, name = item.gold[0], title[:-1]
    return [(first, start + offset) for start in _places(chunks[first], name) for offset in range(len(name))]


def _looks(chunks: Sequence[list[int]], item: Asked, prompt: int, answer: list[int], bridge: list[tuple[int, int]]) -> list[Look]:
    """Each place that writes a word of the answer looks at that word in the last gold chunk that has it; before, at the bridge."""
    looks = [Look(prompt - 1, EARLY, bridge)] if bridge else []
    words = answer[:-1]
    for chunk in reversed(item.gold):
        starts = _places(chunks[chunk], words)
        if starts:
            return looks + [Look(prompt - 1 + offset, LATE, [(chunk, start + offset) for start in starts]) for offset in range(len(words))]
    return looks


def _places(ids: Sequence[int], wanted: Sequence[int]) -> list[int]:
    return [start for start in range(len(ids) - len(wanted) + 1) if list(ids[start : start + len(wanted)]) == list(wanted)]
