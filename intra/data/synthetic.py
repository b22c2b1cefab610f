"""The synthetic corpus: a small invented world of people, films, books, companies, teams, towns and rivers.

`generate` writes a pool with questions, `world` a mini-world for the warm start. Every chunk is about one entity and states
all its relations, with paraphrases, pronouns and near names (entities of one kind share name words).

Questions (benchmark `synthetic`; gold in hop order):
    single       one chunk                      Who directed The Silver Harbor?
    bridge       two chunks, the second is not named     Where was the director of The Silver Harbor born?
    comparison   two chunks, both named          Who was born earlier, Ada Adler or Bruno Becker?

Names are split by a hash of the full name: a quarter are test names and stand in no training question and no mini-world. The world is
closed within a split: a test entity's relations lead to test entities. Closed lists (years, countries, genres, ...) are shared.
A fact is stated in one chunk only, its subject's; names are unique in a pool; so each question has one answer.
"""

from __future__ import annotations

import hashlib
import itertools
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from intra.config import SyntheticConfig
from intra.data.raw import Passage, RawQuestion
from intra.data.synthetic_words import KINDS, Kind, Relation
from intra.errors import UserError

BENCHMARK = "synthetic"
TYPES = ("single", "bridge", "comparison")
TEST_SHARE = 4  # one name in four is a test name
_FILL = 0.5  # a kind's names are used up to this share, so that drawing them stays quick


@dataclass
class Entity:
    kind: Kind
    name: str
    facts: dict[str, str] = field(default_factory=dict)  # relation -> the object as it stands in the chunk
    links: dict[str, Entity] = field(default_factory=dict)  # relation -> the object, where it has a chunk
    passage_id: str = ""
    text: str = ""


@dataclass(frozen=True)
class World:
    passages: list[Passage]
    questions: list[RawQuestion]


def is_test_name(name: str) -> bool:
    """Whether a full name belongs to the test split, whatever the seed."""
    return hashlib.sha256(name.encode()).digest()[0] % TEST_SHARE == 0


def name_parts(chunks: int) -> int:
    """Words a name needs (beside "The", "of") in a pool of so many chunks: 2, 3 or 4. Raises UserError beyond."""
    for parts in (2, 3, 4):
        if all(chunks * kind.share <= _FILL * _capacity(kind, parts) for kind in KINDS.values()):
            return parts
    raise UserError(f"data.synthetic.chunks: found {chunks}, more than the synthetic world has names for; lower it")


def vocabulary() -> list[str]:
    """Every word and number that the generator can write, sorted: what a word tokenizer must know."""
    texts = itertools.chain.from_iterable(
        (
            *(kind.pattern, *kind.first, *kind.last, *kind.pronouns, *(text for _, text in kind.merged)),
            *(
                text
                for relation in kind.relations
                for group in (relation.statements, relation.questions, relation.values, relation.phrases, relation.order, relation.same)
                for text in group
            ),
        )
        for kind in KINDS.values()
    )
    words = {word for text in texts for word in re.findall(r"\w+|[^\w\s]", re.sub(r"\{\w*\}", " ", text))}
    return sorted(words | {"an", "An", "yes", "no"})


def generate(synthetic: SyntheticConfig, seed: int) -> tuple[list[Passage], list[RawQuestion]]:
    """A pool of exactly `synthetic.chunks` passages, sorted by id, and the train and test questions, a third of each type.

    Raises UserError where the world is too large for its names, or too small for so many different questions.
    """
    rng = random.Random(f"intra synthetic pool {seed}")
    parts = name_parts(synthetic.chunks)
    test = round(synthetic.chunks / TEST_SHARE)
    sides = {
        "train": _entities(rng, _shares(synthetic.chunks - test), parts, test=False),
        "test": _entities(rng, _shares(test), parts, test=True),
    }
    everything = [entity for side in sides.values() for entity in side]
    numbers = list(range(len(everything)))
    rng.shuffle(numbers)
    for number, entity in zip(numbers, everything, strict=True):
        entity.passage_id = f"s{number:07d}"
    questions = []
    for split, wanted in (("train", synthetic.train_questions), ("test", synthetic.test_questions)):
        made = [
            question
            for number, kind in enumerate(TYPES)
            for question in _questions(rng, sides[split], kind, wanted // 3 + (number < wanted % 3), split)
        ]
        rng.shuffle(made)
        questions += [replace(question, question_id=f"{BENCHMARK}-{split}-{number:06d}") for number, question in enumerate(made)]
    return sorted((_passage(entity) for entity in everything), key=lambda passage: passage.passage_id), questions


def world(
    seed: int, index: int, *, chunks: int = 8, questions: int = 12, binding: float = 0.5, bridge: float = 0.5, comparison: float = 0.25,
    parts: int = 2,
) -> World:  # fmt: skip
    """Mini-world number `index` of a seed: `chunks` passages of training names and up to `questions` questions about them.

    A share `binding` of the worlds holds one kind only, so that every chunk states the same relations and only the name
    tells which chunk answers; half of the others are a source kind and the kind it leads to, so that bridges are many.
    `bridge` is the share of bridge questions where the world has any, `comparison` that of comparisons among the others. Same
    arguments, same world; worlds of different (seed, index) are independent.
    """
    rng = random.Random(f"intra synthetic world {seed} {index}")
    if rng.random() < binding:
        counts = {rng.choice(list(KINDS)): chunks}
    else:
        source, targets = rng.choice([(kind.name, _targets(kind)) for kind in KINDS.values() if _targets(kind)])
        target = rng.choice(targets)
        counts = {source: chunks - chunks // 2, target: chunks // 2}
        if rng.random() < 0.5 and chunks > 2:
            extra = rng.choice([name for name in KINDS if name not in counts])
            counts = {source: chunks - 2 * (chunks // 3), target: chunks // 3, extra: chunks // 3}
    entities = _entities(rng, counts, parts, test=False, near=rng.random() < 0.5)
    rng.shuffle(entities)
    for number, entity in enumerate(entities):
        entity.passage_id = f"w{index:07d}-{number:03d}"
    bridges = _bridges(entities)
    share = bridge if bridges else 0.0
    made: list[RawQuestion] = []
    wanted = round(questions * share)
    made += _questions(rng, entities, "bridge", min(wanted, len(bridges)), "train")
    compared = min(int((questions - len(made)) * comparison), len(entities))
    made += _questions(rng, entities, "comparison", compared, "train", strict=False)
    singles = min(questions - len(made), sum(len(entity.kind.relations) for entity in entities))
    made += _questions(rng, entities, "single", singles, "train")
    rng.shuffle(made)
    return World(
        [_passage(entity) for entity in entities],
        [replace(question, question_id=f"world-{index:07d}-{number:03d}") for number, question in enumerate(made)],
    )


def worlds(seed: int, count: int, *, chunks: int = 8, questions: int = 12, binding: float = 0.5, bridge: float = 0.5, parts: int = 2
           ) -> Iterator[World]:  # fmt: skip
    """The first `count` mini-worlds of a seed; see `world`."""
    return (world(seed, index, chunks=chunks, questions=questions, binding=binding, bridge=bridge, parts=parts) for index in range(count))


# -- entities ---------------------------------------------------------------------------------------------------------


def _capacity(kind: Kind, parts: int) -> int:
    first, last = len(kind.first), len(kind.last)
    return first * last * (first - 1 if parts > 2 else 1) * (last - 1 if parts > 3 else 1)


def _shares(count: int) -> dict[str, int]:
    """How many entities of each kind: by share, at least one, largest remainder first; sums to `count`."""
    exact = {kind.name: kind.share * (count - len(KINDS)) for kind in KINDS.values()}
    counts = {name: 1 + int(value) for name, value in exact.items()}
    short = count - sum(counts.values())
    for name in sorted(exact, key=lambda name: (int(exact[name]) - exact[name], name))[:short]:
        counts[name] += 1
    return counts


def _targets(kind: Kind) -> list[str]:
    return sorted({relation.target for relation in kind.relations if relation.target})


def _names(rng: random.Random, kind: Kind, count: int, parts: int, test: bool, near: bool = False) -> list[str]:
    first, last = kind.first, kind.last
    if near:  # few words, so that many names share one
        few = max(4, round((2 * TEST_SHARE * count) ** 0.5))
        first, last = tuple(rng.sample(first, min(few, len(first)))), tuple(rng.sample(last, min(few, len(last))))
    names: dict[str, None] = {}
    for _ in range(200 * count + 2000):
        if len(names) == count:
            return list(names)
        heads = rng.sample(first, 2) if parts > 2 else [rng.choice(first)]
        tails = rng.sample(last, 2) if parts > 3 else [rng.choice(last)]
        name = kind.pattern.format(" ".join(heads), " ".join(tails))
        if is_test_name(name) == test:
            names[name] = None
    if near:
        return _names(rng, kind, count, parts, test)
    raise UserError(f"data.synthetic: the world has fewer than {count} names for a {kind.name}; lower data.synthetic.chunks")


def _entities(rng: random.Random, counts: dict[str, int], parts: int, *, test: bool, near: bool = False) -> list[Entity]:
    """Entities with their facts and texts. A relation leads to an entity of the group, or to a mere name where none fits."""
    groups = {name: [Entity(KINDS[name], entity) for entity in _names(rng, KINDS[name], count, parts, test, near)]
              for name, count in counts.items()}  # fmt: skip
    entities = [entity for group in groups.values() for entity in group]
    for entity in entities:
        for relation in entity.kind.relations:
            if relation.target is None:
                entity.facts[relation.name] = rng.choice(relation.values)
            elif relation.target in groups:
                group = groups[relation.target]
                taken = {id(other) for other in entity.links.values()}
                choice = rng.choice(group)
                while id(choice) in taken and len(group) > 1:  # director and star differ
                    choice = rng.choice(group)
                entity.links[relation.name] = choice
                entity.facts[relation.name] = choice.name
            else:
                entity.facts[relation.name] = _names(rng, KINDS[relation.target], 1, parts, test)[0]
        entity.text = _write(rng, entity)
    return entities


def _write(rng: random.Random, entity: Entity) -> str:
    """The chunk: each relation once, one or two a sentence; the title already holds the name, so a pronoun may begin."""
    kind = entity.kind
    merged = [(names, text) for names, text in kind.merged if rng.random() < 0.5]
    rng.shuffle(merged)
    left = [relation.name for relation in kind.relations]
    sentences = []
    for names, text in merged:
        if all(name in left for name in names):
            left = [name for name in left if name not in names]
            sentences.append(text)
    by_name = {relation.name: relation for relation in kind.relations}
    sentences += [rng.choice(by_name[name].statements).replace("{o}", "{" + name + "}") for name in left]
    rng.shuffle(sentences)
    pronoun = rng.choice(kind.pronouns)
    written = []
    for number, sentence in enumerate(sentences):
        by_pronoun = sentence.startswith("{s}") and rng.random() < (0.8 if number else 0.25)
        text = sentence.format(s=pronoun if by_pronoun else entity.name, **entity.facts)
        written.append(re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text))
    return " ".join(written)


def _passage(entity: Entity) -> Passage:
    return Passage(entity.passage_id, entity.name, entity.text, BENCHMARK)


# -- questions --------------------------------------------------------------------------------------------------------


def _bridges(entities: Sequence[Entity]) -> list[tuple[Entity, Relation, Relation]]:
    return [
        (entity, link, relation)
        for entity in entities
        for link in entity.kind.relations
        if link.name in entity.links
        for relation in entity.links[link.name].kind.relations
    ]


def _questions(
    rng: random.Random, entities: Sequence[Entity], kind: str, wanted: int, split: str, strict: bool = True
) -> list[RawQuestion]:
    """`wanted` different questions of a type about these entities. Raises UserError where there are fewer (if strict)."""
    if not wanted:
        return []
    sample = list(entities) if len(entities) <= 4 * wanted + 100 else rng.sample(entities, 4 * wanted + 100)
    if kind == "single":
        facts = [(entity, relation) for entity in sample for relation in entity.kind.relations]
        made = [_single(rng, *item, split) for item in rng.sample(facts, min(wanted, len(facts)))]
    elif kind == "bridge":
        paths = _bridges(sample)
        made = [_bridge(rng, *item, split) for item in rng.sample(paths, min(wanted, len(paths)))]
    else:
        made = _comparisons(rng, sample, wanted, split)
    if strict and len(made) < wanted:
        raise UserError(
            f"data.synthetic: {wanted} {kind} questions for {split} are more than {len(entities)} {split} chunks give ({len(made)}); "
            f"lower data.synthetic.{split}_questions or raise data.synthetic.chunks"
        )
    return made


def _question(split: str, text: str, answer: str, gold: Sequence[Entity], kind: str) -> RawQuestion:
    return RawQuestion("", BENCHMARK, split, text, (answer,), tuple(entity.passage_id for entity in gold), len(gold), kind)


def _single(rng: random.Random, entity: Entity, relation: Relation, split: str) -> RawQuestion:
    text = rng.choice(relation.questions).format(s=entity.name)
    return _question(split, text, entity.facts[relation.name], [entity], "single")


def _bridge(rng: random.Random, entity: Entity, link: Relation, relation: Relation, split: str) -> RawQuestion:
    middle = entity.links[link.name]
    text = rng.choice(relation.questions).format(s=rng.choice(link.phrases).format(s=entity.name))
    return _question(split, text, middle.facts[relation.name], [entity, middle], "bridge")


def _comparisons(rng: random.Random, entities: Sequence[Entity], wanted: int, split: str) -> list[RawQuestion]:
    """Half "which is earlier", half yes/no; of the latter half the answers are yes, as far as the facts allow."""
    groups: dict[str, list[Entity]] = {}
    for entity in entities:
        groups.setdefault(entity.kind.name, []).append(entity)
    pools = [group for group in groups.values() if len(group) > 1]
    made: dict[tuple[str, frozenset[str]], RawQuestion] = {}
    for attempt in range(60 * wanted + 200):
        if len(made) == wanted or not pools:
            break
        group = rng.choices(pools, weights=[len(pool) for pool in pools])[0]
        first = rng.choice(group)
        relations = [relation for relation in first.kind.relations if (relation.order if attempt % 2 else relation.same)]
        if not relations:
            continue
        relation = rng.choice(relations)
        value = first.facts[relation.name]
        others = [entity for entity in group if entity is not first]
        if relation.same and rng.random() < 0.5:
            others = [entity for entity in others if entity.facts[relation.name] == value]
        else:
            others = [entity for entity in others if entity.facts[relation.name] != value]
        if not others:
            continue
        second = rng.choice(others)
        key = (relation.name, frozenset((first.name, second.name)))
        if key not in made:
            made[key] = _comparison(rng, first, second, relation, split)
    return list(made.values())


def _comparison(rng: random.Random, first: Entity, second: Entity, relation: Relation, split: str) -> RawQuestion:
    values = first.facts[relation.name], second.facts[relation.name]
    if relation.same:
        text, answer = rng.choice(relation.same), "yes" if values[0] == values[1] else "no"
    else:
        number = rng.randrange(len(relation.order))
        text, later = relation.order[number], number >= len(relation.order) // 2
        answer = (first if (int(values[0]) < int(values[1])) != later else second).name
    return _question(split, text.format(a=first.name, b=second.name), answer, [first, second], "comparison")
