"""The candidates of a micro-batch, and the order of questions."""

from __future__ import annotations

from collections import Counter

import pytest

from intra.data.schema import Question
from intra.errors import UserError
from intra.retrieval import negatives
from intra.retrieval.negatives import Example

ROW_OF = {name: row for row, name in enumerate("abcdefgh")}


def question(gold: tuple[tuple[str, ...], ...]) -> Question:
    return Question("q1", "toy", "train", "who ?", ("x",), gold, 1, "single")


def test_example_takes_hard_negatives_that_are_not_gold() -> None:
    item = negatives.example(question((("a", "c"), ("h",))), ROW_OF, [2, 1, 0, 3, 7, 4, 5], 3, 3)
    assert tuple(item.context) == (2, 1, 0)
    assert tuple(item.hard) == (1, 3, 4)
    assert item.positives == {0, 2, 7}


def test_bm25_negatives_are_behind_the_first_ranks_and_never_gold_nor_equivalent() -> None:
    """Gold groups hold the equivalents of a passage and the pieces of a split one: none of them is mined."""
    asked = question((("a", "c"), ("h",)))
    ranking = [3, 0, 5, 7, 2, 1, 4, 6]  # d a f h c b e g
    for skip, expected in ((0, (3, 5, 1)), (1, (5, 1, 4)), (3, (1, 4, 6)), (6, (4, 6)), (8, ())):
        item = negatives.example(asked, ROW_OF, [], 0, 0, ranking, 3, skip)
        assert tuple(item.hard) == expected
        assert not set(item.hard) & (set(ranking[:skip]) | {0, 2, 7})
    assert not negatives.example(asked, ROW_OF, [], 0, 0, ranking, 0, 0).hard


def test_both_kinds_of_negatives_stand_once() -> None:
    item = negatives.example(question((("a",),)), ROW_OF, [1, 2, 0, 3], 2, 2, [9, 3, 2, 0, 4], 3, 1)
    assert tuple(item.hard) == (1, 2, 3, 4)
    assert tuple(item.context) == (1, 2)


def test_bm25_is_deep_enough_for_its_negatives() -> None:
    asked = question((("a", "c"), ("h",)))
    ranking = [0, 2, 7, *range(10, 30)]
    for skip in (0, 2, 10):
        depth = negatives.bm25_depth([asked], 5, skip)
        assert len(negatives.example(asked, ROW_OF, [], 0, 0, ranking[:depth], 5, skip).hard) == 5


def test_initial_is_deep_enough_for_context_and_negatives() -> None:
    assert negatives.depth([question((("a", "c"), ("h",)))], 20, 16) == 20
    assert negatives.depth([question((("a", "c"), ("h",)))], 20, 19) == 22
    assert negatives.depth([question((("a",),))], 0, 0) == 0


def test_example_refuses_missing_gold() -> None:
    with pytest.raises(UserError, match="q1: gold chunk 'z' is not in the chunk store"):
        negatives.example(question((("z",),)), ROW_OF, [], 3, 3)
    with pytest.raises(UserError, match="q1: it has no gold chunk"):
        negatives.example(question(()), ROW_OF, [], 3, 3)


def test_own_gold_is_never_a_negative() -> None:
    """Another question's hard negative, or a sampled chunk, that is an equivalent of my gold counts as gold for me."""
    one = Example("1", "", ((0, 4),), (), (5,))
    two = Example("2", "", ((6,),), (), (4, 0))
    rows, gold = negatives.candidates([one, two], 8, 8, (0,))
    assert rows == list(range(8))
    assert [row for row, positive in zip(rows, gold[0].tolist(), strict=True) if positive] == [0, 4]
    assert [row for row, positive in zip(rows, gold[1].tolist(), strict=True) if positive] == [6]


def test_candidates_are_the_union_and_follow_the_key() -> None:
    one, two = Example("1", "", ((0,), (1,)), (), (2, 3)), Example("2", "", ((1,),), (), (3, 9))
    assert negatives.candidates([one, two], 1000, 0, (0,))[0] == [0, 1, 2, 3, 9]
    first, again, other = (negatives.candidates([one, two], 1000, 50, (5, key))[0] for key in (0, 0, 1))
    assert first == again != other
    assert len(set(first)) == len(first)
    assert {0, 1, 2, 3, 9} <= set(first)
    assert 50 <= len(first) <= 55


def test_an_epoch_shows_every_question_once() -> None:
    steps = [negatives.order(10, 4, step, seed=3) for step in range(5)]
    assert Counter(index for step in steps for index in step) == Counter(dict.fromkeys(range(10), 2))
    assert sorted(steps[0] + steps[1] + steps[2][:2]) == list(range(10))
    assert steps != [negatives.order(10, 4, step, seed=4) for step in range(5)]
    assert Counter(negatives.order(3, 7, 0, seed=0)).most_common()[-1][1] >= 2  # a batch larger than the data
