"""The generated world: reproducible, split by name, and every question has one answer in its gold."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from intra.config import SyntheticConfig
from intra.data import synthetic
from intra.data.raw import Passage, RawQuestion
from intra.data.synthetic_words import KINDS
from intra.errors import UserError

SIZE = SyntheticConfig(chunks=400, train_questions=240, test_questions=91)


@pytest.fixture(scope="module")
def made() -> tuple[list[Passage], list[RawQuestion]]:
    return synthetic.generate(SIZE, seed=7)


def test_the_same_seed_gives_the_same_world(made: tuple[list[Passage], list[RawQuestion]]) -> None:
    assert synthetic.generate(SIZE, seed=7) == made
    assert synthetic.generate(SIZE, seed=8) != made
    assert synthetic.world(3, 11) == synthetic.world(3, 11)
    assert synthetic.world(3, 11) != synthetic.world(3, 12)
    assert list(synthetic.worlds(3, 2)) == [synthetic.world(3, 0), synthetic.world(3, 1)]


def test_sizes_types_and_ids(made: tuple[list[Passage], list[RawQuestion]]) -> None:
    passages, questions = made
    assert len(passages) == 400
    assert [p.passage_id for p in passages] == sorted({p.passage_id for p in passages})
    assert len({q.question_id for q in questions}) == len(questions)
    assert {q.benchmark for q in questions} == {"synthetic"}
    counts = Counter((q.split, q.type) for q in questions)
    assert counts == {
        ("train", "single"): 80, ("train", "bridge"): 80, ("train", "comparison"): 80,
        ("test", "single"): 31, ("test", "bridge"): 30, ("test", "comparison"): 30,
    }  # fmt: skip
    assert all(q.hops == len(q.gold_ids) == (1 if q.type == "single" else 2) for q in questions)
    assert len({(q.split, q.question) for q in questions}) == len(questions)


def test_names_are_unique_and_every_chunk_is_short(made: tuple[list[Passage], list[RawQuestion]]) -> None:
    passages, _ = made
    assert len({p.title for p in passages}) == len(passages)
    assert all(1 <= len(re.findall(r"[.](?:\s|$)", p.text)) <= 4 for p in passages)
    assert all("{" not in p.text and " a e" not in p.text for p in passages)


def test_names_are_near_to_each_other(made: tuple[list[Passage], list[RawQuestion]]) -> None:
    heads = Counter(p.title.split()[0] for p in made[0] if not p.title.startswith("The "))
    assert max(heads.values()) > 3


def test_no_test_name_is_seen_in_training(made: tuple[list[Passage], list[RawQuestion]]) -> None:
    passages, questions = made
    names = {p.title for p in passages if synthetic.is_test_name(p.title)}
    assert len(names) == 100
    by_id = {p.passage_id: p for p in passages}
    for question in questions:
        golden = [by_id[gold].title for gold in question.gold_ids]
        assert all(synthetic.is_test_name(title) == (question.split == "test") for title in golden)
    seen = [f"{q.question} {q.answers[0]} " + " ".join(by_id[g].text for g in q.gold_ids) for q in questions if q.split == "train"]
    for index in range(60):
        world = synthetic.world(7, index, chunks=10)
        seen += [f"{p.title} {p.text}" for p in world.passages] + [f"{q.question} {q.answers[0]}" for q in world.questions]
    everything = "\n".join(seen)
    assert not [name for name in names if re.search(rf"\b{re.escape(name)}\b", everything)]


def test_gold_holds_the_answer(made: tuple[list[Passage], list[RawQuestion]]) -> None:
    passages, questions = made
    by_id = {p.passage_id: p for p in passages}
    for question in questions:
        golden = [by_id[gold] for gold in question.gold_ids]
        if question.type == "comparison":
            assert question.answers[0] in ("yes", "no", *(p.title for p in golden))
            assert all(p.title in question.question for p in golden)
        else:
            assert question.answers[0] in golden[-1].text


def test_the_second_hop_is_not_named_in_the_question(made: tuple[list[Passage], list[RawQuestion]]) -> None:
    passages, questions = made
    by_id = {p.passage_id: p for p in passages}
    bridges = [q for q in questions if q.type == "bridge"]
    for question in bridges:
        first, second = (by_id[gold] for gold in question.gold_ids)
        assert first.title in question.question
        assert second.title in first.text  # the bridge
        assert second.title not in question.question
        assert first.title not in f"{second.title} {second.text}"


def test_a_question_has_one_answer(made: tuple[list[Passage], list[RawQuestion]]) -> None:
    passages, questions = made
    # A single question's subject has one chunk, and only there is it the subject: elsewhere it may only be named as an object.
    titles = Counter(p.title for p in passages)
    by_id = {p.passage_id: p for p in passages}
    for question in questions:
        assert titles[by_id[question.gold_ids[0]].title] == 1
        if question.type == "single":
            named = [p.title for p in passages if re.search(rf"\b{re.escape(p.title)}\b", question.question)]
            assert named == [by_id[question.gold_ids[0]].title]


def test_comparisons_say_what_the_chunks_say(made: tuple[list[Passage], list[RawQuestion]]) -> None:
    passages, questions = made
    by_id = {p.passage_id: p for p in passages}
    checked = Counter[str]()
    for question in questions:
        if question.type != "comparison":
            continue
        golden = [by_id[gold] for gold in question.gold_ids]
        if "country" in question.question:
            countries = [[c for c in KINDS["person"].relations[2].values if c in p.text] for p in golden]
            assert question.answers[0] == ("yes" if countries[0] == countries[1] else "no")
            checked[question.answers[0]] += 1
        elif re.search("earlier|older|later|younger", question.question):
            years = [int(re.findall(r"\b19\d\d\b", p.text)[0]) for p in golden]
            assert years[0] != years[1]
            earlier = re.search("earlier|older", question.question) is not None
            wanted = min(years) if earlier else max(years)
            assert question.answers[0] == golden[years.index(wanted)].title
            checked["year"] += 1
    assert all(checked[kind] for kind in ("yes", "no", "year"))


def test_every_relation_is_stated_once(made: tuple[list[Passage], list[RawQuestion]]) -> None:
    """Each chunk holds all facts of its kind: as many objects as relations."""
    for passage in made[0]:
        kind = next(k for k in KINDS.values() if passage.title.removeprefix("The ").split()[0] in k.first)
        for relation in kind.relations:
            if not relation.target:
                found = [v for v in relation.values if re.search(rf"\b{v}\b", passage.text.replace(passage.title, ""))]
                assert len(found) == 1, (passage, relation.name)


def test_worlds_of_one_kind_share_relations() -> None:
    for index in range(20):
        world = synthetic.world(0, index, chunks=8, questions=10, binding=1.0)
        kinds = {next(k.name for k in KINDS.values() if p.title.removeprefix("The ").split()[0] in k.first) for p in world.passages}
        assert len(kinds) == 1
        assert len(world.passages) == 8
        assert 1 <= len(world.questions) <= 10
    mixed = [synthetic.world(0, index, chunks=9, questions=12, binding=0.0, bridge=1.0) for index in range(20)]
    assert all(len(world.passages) == 9 for world in mixed)
    assert all(any(q.type == "bridge" for q in world.questions) for world in mixed)
    ids = {p.passage_id for world in mixed for p in world.passages}
    assert all(gold in ids for world in mixed for q in world.questions for gold in q.gold_ids)


def test_the_vocabulary_covers_what_is_written(made: tuple[list[Passage], list[RawQuestion]]) -> None:
    known = set(synthetic.vocabulary())
    assert 700 < len(known) < 1500
    texts = [f"{p.title} {p.text}" for p in made[0]] + [f"{q.question} {q.answers[0]}" for q in made[1]]
    assert {word for text in texts for word in re.findall(r"\w+|[^\w\s]", text)} <= known


def test_large_worlds_use_longer_names() -> None:
    assert [synthetic.name_parts(chunks) for chunks in (1000, 20_000, 800_000)] == [2, 3, 4]
    passages, _ = synthetic.generate(SyntheticConfig(chunks=12_000, train_questions=30, test_questions=30), seed=0)
    assert len({p.title for p in passages}) == 12_000


def test_a_world_that_cannot_be_is_refused() -> None:
    with pytest.raises(UserError, match=r"data\.synthetic\.chunks: found 100000000"):
        synthetic.generate(SyntheticConfig(chunks=100_000_000), seed=0)
    with pytest.raises(UserError, match=r"lower data\.synthetic\.test_questions or raise data\.synthetic\.chunks"):
        synthetic.generate(SyntheticConfig(chunks=50, train_questions=3, test_questions=900), seed=0)
