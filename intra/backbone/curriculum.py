"""What the warm start reads, and when: its stages; mini-worlds of the synthetic generator, or a dataset's own training questions.

Every function here is a function of (seed, step): nothing is kept between steps.
"""

from __future__ import annotations

import functools
import itertools
import random
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from intra.backbone.model import Backbone
from intra.backbone.packing import EARLY, LATE, Batch, Look, PackedWorld, answer_segment, collate, retrieval_segment
from intra.config import Config, LossConfig, WarmstartConfig
from intra.data import synthetic
from intra.data.chunking import chunk_text
from intra.data.schema import Pool, Question
from intra.data.synthetic_words import KINDS
from intra.errors import UserError

Batches = Callable[[int], list[Batch]]

# Question types that name both their chunks. Early layers are to find the last, whose name stands nearest to where the query is read: to
# tell a name by its place among several takes more layers than to tell the nearest.
NAMED = ("comparison",)
STAGE_KEYS = (
    "losses",
    "world_chunks",
    "growth",
    "binding",
    "bridge",
    "comparison",
    "name_parts",
    "extra_chunks",
)  # what a stage may set anew
NEAR_SHARE = 0.5  # of the extra chunks of a gold entity's kind, those under a near name of it
FRESH_WORLDS = 8  # mini-worlds that are never trained on, for `fresh_batches`


@dataclass(frozen=True)
class Stage:
    """A stretch of the steps, [start, stop), and the recipe that holds in it."""

    number: int  # from 1
    name: str
    start: int
    stop: int
    recipe: WarmstartConfig  # with the stage's own values in place
    factor: float  # of the learning rates
    grows_from: int  # mini-worlds grow from this step on ...
    grows_for: float  # ... over so many steps


def stages(recipe: WarmstartConfig) -> list[Stage]:
    """The stages in order; together they are all the steps. One where the recipe names none."""
    if recipe.stages is None:
        return [Stage(1, "all", 0, recipe.steps, recipe, 1.0, 0, recipe.growth * recipe.steps)]
    made, start, share = [], 0, 0.0
    for number, item in enumerate(recipe.stages, 1):
        share += item.share
        stop = recipe.steps if number == len(recipe.stages) else int(share * recipe.steps + 0.5)
        values = {key: value for key in STAGE_KEYS if (value := getattr(item, key)) is not None}
        grows = (0, recipe.growth * recipe.steps) if item.growth is None else (start, item.growth * (stop - start))
        made.append(Stage(number, item.name, start, stop, recipe.model_copy(update=values), item.learning_rate_factor, *grows))
        start = stop
    return made


def stage_at(recipe: WarmstartConfig, step: int) -> Stage:
    """The stage a step belongs to; the last one for the steps behind the end."""
    every = stages(recipe)
    return next((stage for stage in every if step < stage.stop), every[-1])


def synthetic_batches(config: Config, backbone: Backbone, rank: int = 0, workers: int = 1) -> Batches:
    """Step -> this worker's micro-batches of mini-worlds (training names only)."""
    recipe = config.backbone.warmstart

    def batches(step: int) -> list[Batch]:
        now = stage_at(recipe, step).recipe
        made = []
        for micro in _micros(recipe.batch_size, recipe.micro_batch, rank, workers):
            worlds: list[PackedWorld] = []
            titles: list[str] = []
            gold: list[str] = []
            for number in micro:
                index = step * recipe.batch_size + number
                rng = random.Random(f"intra warm start {config.seed} {index}")
                size = world_size(rng, step, recipe)
                parts = _name_parts(config, now, index)
                world = synthetic.world(
                    config.seed,
                    index,
                    chunks=size,
                    questions=recipe.questions,
                    binding=now.binding,
                    bridge=now.bridge,
                    comparison=now.comparison,
                    parts=parts,
                )
                texts, asked = _asked(world, config)
                worlds.append(_pack(backbone, rng, backbone.tokenize(texts), asked, now))
                titles += [passage.title for passage in world.passages]
                gold += [world.passages[chunk].title for item in asked for chunk in item.gold]
            extra, kept = [], []
            if now.extra_chunks and (now.losses.retrieval or now.losses.hop):
                first = step * recipe.batch_size + micro[0]
                rng = random.Random(f"intra warm start extra {config.seed} {first}")
                passages = extra_passages(rng, config.seed, now.extra_chunks, gold, titles, _name_parts(config, now, first))
                extra = backbone.tokenize([chunk_text(title, text, config.data.template) for title, text in passages])
                kept = _kept(rng, len(extra), recipe)
            made.append(collate(worlds, backbone.tokenizer.pad_token_id, extra, kept))
        return made

    return batches


def _name_parts(config: Config, recipe: WarmstartConfig, index: int) -> int:
    """The name words of world number `index`: drawn by its own rng where the recipe names several, else what the pool needs."""
    if recipe.name_parts is None:
        return synthetic.name_parts(config.data.synthetic.chunks)
    return random.Random(f"intra warm start names {config.seed} {index}").choice(recipe.name_parts)


def _asked(world: synthetic.World, config: Config) -> tuple[list[str], list[Asked]]:
    """The encoder's texts of a mini-world's chunks, and its questions."""
    place = {passage.passage_id: number for number, passage in enumerate(world.passages)}
    texts = [chunk_text(passage.title, passage.text, config.data.template) for passage in world.passages]
    asked = []
    for item in world.questions:
        gold = [place[passage] for passage in item.gold_ids]
        asked.append(Asked(item.question, item.answers[0], gold, world.passages[gold[-1]].title, item.type in NAMED))
    return texts, asked


def extra_passages(
    rng: random.Random, seed: int, count: int, gold: Iterable[str], taken: Iterable[str], parts: int
) -> list[tuple[str, str]]:
    """`count` synthetic passages (title, text) of training names, none of them in `taken`.

    They come from mini-worlds of one kind that are not trained on. Where that is the kind of an entity of `gold`, a share of
    them goes under a near name of it: one word differs, so that only the whole name tells them apart.
    """
    names = set(taken)
    near: dict[str, list[str]] = {}
    for name in gold:
        near.setdefault(_kind(name), []).append(name)
    made: list[tuple[str, str]] = []
    for _ in range(20 + count):
        world = synthetic.world(seed, -1 - 2 * rng.getrandbits(48), chunks=16, questions=0, binding=1.0, parts=parts)
        for passage in world.passages:
            title, text, kind = passage.title, passage.text, _kind(passage.title)
            other = _near_name(rng, rng.choice(near[kind]), kind, names) if kind in near and rng.random() < NEAR_SHARE else None
            if other is not None:
                title, text = other, re.sub(rf"\b{re.escape(title)}\b", other, text)
            if title not in names:
                names.add(title)
                made.append((title, text))
            if len(made) == count:
                return made
    raise UserError(f"backbone.warmstart.extra_chunks: found {count}, more than the synthetic world has names for; lower it")


def _near_name(rng: random.Random, name: str, kind: str, names: set[str]) -> str | None:
    """The name with one word exchanged: a training name that is not in `names`, or None where twenty tries find none."""
    words = name.split()
    for _ in range(20):
        place = rng.choice([place for place, word in enumerate(words) if word in _kinds()])
        choice = KINDS[kind].first if words[place] in KINDS[kind].first else KINDS[kind].last
        other = " ".join([*words[:place], rng.choice(choice), *words[place + 1 :]])
        if other not in names and not synthetic.is_test_name(other):
            return other
    return None


@functools.cache
def _kinds() -> dict[str, str]:
    """The kind that a name word belongs to."""
    return {word: kind.name for kind in KINDS.values() for word in (*kind.first, *kind.last)}


def _kind(name: str) -> str:
    return next(_kinds()[word] for word in name.split() if word in _kinds())


def fresh_batches(config: Config, backbone: Backbone) -> dict[str, Batch]:
    """What tells how far training is: two batches of mini-worlds that are never trained on, the same for every step.

    `single`: single-hop questions in worlds of one kind, where every chunk answers such a question of its own entity. `bridge`:
    bridge questions. Empty where the data is not synthetic.
    """
    if config.data.source != "synthetic":
        return {}
    recipe = config.backbone.warmstart
    every = recipe.model_copy(update={"losses": LossConfig(retrieval=1, hop=1), "retrieval_share": 1.0, "vector_dropout": 0.0})
    numbers = itertools.count()
    made: dict[str, Batch] = {}
    for kind, binding in (("single", 1.0), ("bridge", 0.0)):
        worlds: list[PackedWorld] = []
        while len(worlds) < FRESH_WORLDS:
            index = -2 - 2 * next(numbers)
            parts = _name_parts(config, stages(recipe)[-1].recipe, index)
            world = synthetic.world(
                config.seed, index, chunks=recipe.world_chunks, questions=recipe.questions, binding=binding, bridge=1.0, parts=parts
            )
            texts, asked = _asked(world, config)
            asked = [item for item, question in zip(asked, world.questions, strict=True) if question.type == kind]
            if asked:
                rng = random.Random(f"intra warm start {config.seed} {index}")
                worlds.append(_pack(backbone, rng, backbone.tokenize(texts), asked, every))
        made[kind] = collate(worlds, backbone.tokenizer.pad_token_id)
    return made


def world_size(rng: random.Random, step: int, recipe: WarmstartConfig) -> int:
    """Chunks of a mini-world: within a third of a mean that grows from 2 to `world_chunks` over the first `growth` of the steps.

    In a world of two chunks the answer is one of few words: reading is learnt there, and telling many chunks apart later.
    A stage that sets `growth` grows over that share of its own steps.
    """
    stage = stage_at(recipe, step)
    grown = min(1.0, (step - stage.grows_from) / stage.grows_for) if stage.grows_for else 1.0
    mean = round(2 + (stage.recipe.world_chunks - 2) * grown)
    return rng.randint(max(2, mean - mean // 3), mean + mean // 3)


def question_batches(
    config: Config, backbone: Backbone, pool: Pool, questions: Sequence[Question], rank: int = 0, workers: int = 1,
    near: Mapping[str, Sequence[int]] | None = None, made: Sequence[Question] = (),
) -> Batches:  # fmt: skip
    """Step -> this worker's micro-batches of the dataset's questions: each world has some questions, their gold and distractors.

    `recipe.questions` questions share a world of their gold chunks (one of each group) and `recipe.distractors` further chunks
    a question: `recipe.bm25_distractors` of them, as far as there are so many, from the rows that `near` gives for its id, the others at
    random. Of the extra chunks `recipe.bm25_extra` a question come from there too. Questions come in epochs, each in another order. A
    share `recipe.cloze_share` of the worlds has questions of `made` instead, drawn at random.
    """
    recipe = config.backbone.warmstart
    answered = [question for question in questions if question.answers and question.gold]
    bank = extra_rows(len(pool), recipe.extra_from, config.seed)

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
        now = stage_at(recipe, step).recipe
        micros = []
        for micro in _micros(recipe.batch_size, recipe.micro_batch, rank, workers):
            worlds = []
            seen: set[int] = set()  # rows of the micro-batch's chunks, and all that answer its questions
            hard: list[int] = []
            for number in micro:
                index = step * recipe.batch_size + number
                rng = random.Random(f"intra warm start {config.seed} {index}")
                drawn = [draw(index * recipe.questions + offset) for offset in range(recipe.questions)]
                if made and rng.random() < recipe.cloze_share:
                    drawn = rng.sample(made, min(recipe.questions, len(made)))
                gold = [[pool.row_of[rng.choice(group)] for group in question.gold] for question in drawn]
                rows = list(dict.fromkeys(row for group in gold for row in group))
                taken = {pool.row_of[chunk] for question in drawn for group in question.gold for chunk in group}
                found = []
                for question in drawn:
                    beside = [row for row in (near or {}).get(question.question_id, ()) if row not in taken]
                    found += rng.sample(beside, min(recipe.bm25_distractors, len(beside)))
                    taken.update(found)
                    beside = [row for row in beside if row not in taken]
                    hard += rng.sample(beside, min(recipe.bm25_extra, len(beside)))
                rows += found
                wanted = min(recipe.distractors * len(drawn) - len(found), len(pool) - len(taken))
                while wanted > 0:
                    row = rng.randrange(len(pool))
                    if row not in taken:
                        taken.add(row)
                        rows.append(row)
                        wanted -= 1
                seen |= taken
                rng.shuffle(rows)
                place = {row: number for number, row in enumerate(rows)}
                texts = [chunk_text(pool.titles[row], pool.texts[row], config.data.template) for row in rows]
                asked = [
                    Asked(
                        question.question,
                        rng.choice(question.answers),
                        [place[row] for row in group],
                        pool.titles[group[-1]],
                        question.type in NAMED,
                        {pool.row_of[chunk] for chunks in question.gold for chunk in chunks},
                    )
                    for question, group in zip(drawn, gold, strict=True)
                ]
                worlds.append(_pack(backbone, rng, backbone.tokenize(texts), asked, now, rows))
            extra, kept, others = [], [], []
            if now.extra_chunks and (now.losses.retrieval or now.losses.hop):
                rng = random.Random(f"intra warm start extra {config.seed} {step * recipe.batch_size + micro[0]}")
                drawn_rows = rng.sample(bank, min(len(bank), now.extra_chunks + len(seen)))
                others = [row for row in dict.fromkeys([*hard, *drawn_rows]) if row not in seen][: now.extra_chunks]
                extra = backbone.tokenize([chunk_text(pool.titles[row], pool.texts[row], config.data.template) for row in others])
                kept = _kept(rng, len(extra), recipe)
            micros.append(collate(worlds, backbone.tokenizer.pad_token_id, extra, kept, others))
        return micros

    return batches


def extra_rows(pool: int, count: int | None, seed: int) -> Sequence[int]:
    """Rows of the pool that extra chunks are drawn from: `count` of them at random, or all."""
    if count is None or count >= pool:
        return range(pool)
    return random.Random(f"intra warm start bank {seed}").sample(range(pool), count)


def _micros(batch_size: int, micro_batch: int, rank: int, workers: int) -> list[range]:
    """This worker's micro-batches, as numbers of worlds in the step."""
    return [range(start, start + micro_batch) for start in range(0, batch_size, micro_batch)][rank::workers]


@dataclass(frozen=True)
class Asked:
    question: str
    answer: str
    gold: list[int]  # chunks of the world, in hop order
    bridge: str  # the title of the last gold chunk
    named: bool = False  # the question names all its gold chunks
    answering: set[int] = field(default_factory=set)  # rows of a pool: its gold, and what could stand for it


def _pack(
    backbone: Backbone, rng: random.Random, chunks: list[list[int]], asked: Sequence[Asked], recipe: WarmstartConfig,
    rows: Sequence[int] = (),
) -> PackedWorld:  # fmt: skip
    """One world: an answer segment for each question, where answers are trained, and a retrieval segment for a share of them.

    `rows`: those of the chunks, where they are a pool's.

    The answer is read from the whole world. A retrieval pass will read S_0, which has the first hop and, unless the question names
    it, seldom the last: so its segment sees each chunk with a chance of its own, and of the gold mostly the first alone.
    """
    prompts = backbone.prompt_ids([item.question for item in asked])
    answers = backbone.answer_ids([item.answer for item in asked])
    everything = list(range(len(chunks)))
    segments = []
    if recipe.losses.answer:
        segments = [answer_segment(prompt, answer, everything) for prompt, answer in zip(prompts, answers, strict=True)]
    bridges: list[list[tuple[int, int]]] = [[] for _ in asked]
    if recipe.losses.attention:
        titles = backbone.answer_ids([item.bridge for item in asked])
        for number, item in enumerate(asked):
            bridges[number] = _bridge(chunks, item, titles[number])
            if segments:
                segments[number].looks = _looks(chunks, item, len(prompts[number]), answers[number], bridges[number])
    if recipe.losses.retrieval or recipe.losses.hop:
        chosen = rng.sample(range(len(asked)), max(1, round(recipe.retrieval_share * len(asked))))
        for index in chosen:
            gold, named = asked[index].gold, asked[index].named
            visible = [chunk for chunk in everything if chunk not in gold and rng.random() < 0.8]
            visible += [chunk for hop, chunk in enumerate(gold) if rng.random() < (0.9 if hop == 0 else 0.6 if named else 0.2)]
            offsets = sorted(rng.sample(range(recipe.probe_span), recipe.probes))
            echo = backbone.echo_ids([prompts[index]])[0] if backbone.frozen_encoder else ()
            segment = retrieval_segment(prompts[index], offsets, visible, gold[::-1] if named else gold, echo)
            if bridges[index] and gold[0] in visible:
                segment.looks = [Look(place, EARLY, bridges[index]) for place in segment.probes]
            segment.answering = asked[index].answering
            segments.append(segment)
    return PackedWorld(chunks, segments, _kept(rng, len(chunks), recipe), list(rows))


def _kept(rng: random.Random, chunks: int, recipe: WarmstartConfig) -> list[list[bool]]:
    """Which pooled vectors of each chunk the retrieval and hop losses score: at least one."""
    kept = [[rng.random() >= recipe.vector_dropout for _ in range(recipe.pooled_length)] for _ in range(chunks)]
    for row in kept:
        row[rng.randrange(recipe.pooled_length)] = True
    return kept


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
