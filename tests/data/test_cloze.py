"""Questions made of passages: what is asked, what answers it."""

from __future__ import annotations

import pyarrow as pa

from intra.data import cloze
from intra.data.schema import POOL_SCHEMA, Pool

PASSAGES = [
    ("Red Moon (film)", "It opened in May. Red Moon is a film directed by Ada Bell, born in Oldtown. It ran long."),
    ("Ada Bell", "Ada Bell was born in Oldtown. She made Red Moon with Oldtown's mayor."),
    ("Oldtown", "Oldtown is a town on the River Ann."),
    ("May", "May is the fifth month; Oldtowner is nobody."),
    ("River Ann", " ".join(["word"] * 60) + " Ada Bell " + "word."),
    ("Twice", "A first one of that title."),
    ("Twice", "A second, with Twice in it."),
    ("Twice", "A third."),
]


def pool(passages: list[tuple[str, str]]) -> Pool:
    rows = [{"chunk_id": f"c{n}", "title": title, "text": text, "source": "s", "n_tokens": 9} for n, (title, text) in enumerate(passages)]
    return Pool(pa.Table.from_pylist(rows, schema=POOL_SCHEMA))


def test_a_link_is_a_name_that_another_passage_bears() -> None:
    titles, texts = zip(*PASSAGES, strict=True)
    found = {(row, name): targets for row, targets, name, _ in cloze.links(titles, texts)}
    assert found == {
        (0, "Ada Bell"): [1], (0, "Oldtown"): [2], (1, "Red Moon"): [0], (1, "Oldtown"): [2], (2, "River Ann"): [4], (4, "Ada Bell"): [1],
    }  # fmt: skip
    for row, _, name, place in cloze.links(titles, texts):
        assert texts[row].startswith(name, place)


def test_questions_blank_the_name_and_keep_the_title() -> None:
    made = cloze.questions(pool(PASSAGES), 0)
    assert len(made) == 5  # not the sentence of sixty words
    assert len({item.question_id for item in made}) == 5
    assert [item.type for item in made] == ["cloze_bridge", "cloze", "cloze_bridge", "cloze", "cloze_bridge"]
    for item in made:
        (name,) = item.answers
        row = int(item.gold[0][0][1:])
        title, text = PASSAGES[row]
        assert name in text
        assert name not in item.question
        assert title.removesuffix(" (film)").lower() in item.question.lower()
        assert any(blank in item.question for blank in cloze.BLANKS)
        if item.type == "cloze_bridge":
            assert (item.hops, len(item.gold)) == (2, 2)
            assert PASSAGES[int(item.gold[1][0][1:])][0].startswith(name)
        else:
            assert (item.hops, len(item.gold)) == (1, 1)


def test_the_seed_decides() -> None:
    assert cloze.questions(pool(PASSAGES), 0) == cloze.questions(pool(PASSAGES), 0)
    assert cloze.questions(pool(PASSAGES), 0) != cloze.questions(pool(PASSAGES), 1)
    assert cloze.questions(pool(PASSAGES[3:4]), 0) == []


def test_a_name_that_everything_names_is_left_out() -> None:
    many = [*PASSAGES[1:3], *[(f"Passage {n}", f"Number {n} is near Oldtown.") for n in range(cloze.LINKS + 1)]]
    assert all(item.answers != ("Oldtown",) for item in cloze.questions(pool(many), 0))
