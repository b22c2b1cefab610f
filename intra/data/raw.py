"""What a source yields before chunking: passages and questions as they stand in the files, and what is wrong in them."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TypeVar

from intra.errors import UserError

LISTED = 1000  # mistakes kept word for word; all are counted
TITLE = "title: "  # begins a gold id that names a passage by its title (`RawQuestion.gold_ids`); no passage's id holds white space
OR_SKIP = "data.on_error=skip leaves such records out, counted and listed"
REST = "the rest of the file is left out"

Record = TypeVar("Record")


@dataclass(frozen=True, slots=True)
class Passage:
    passage_id: str
    title: str
    text: str
    source: str  # file name, or "synthetic"
    where: str = ""  # "file:line", for messages


@dataclass(frozen=True, slots=True)
class RawQuestion:
    question_id: str
    benchmark: str
    split: str  # "train" | "test": the role in this run
    question: str
    answers: tuple[str, ...]
    gold_ids: tuple[str, ...]  # passage ids (or TITLE and a title), in hop order where the source gives one
    hops: int
    type: str
    gold_source: str = "annotated"
    where: str = ""  # "file:line", for messages


Item = Passage | RawQuestion


class LeftOut(Exception):
    """A record that is sound but not wanted; its text says why. Counted, never an error."""


@dataclass
class Mistakes:
    """What is wrong in the input: raised at once (data.on_error=stop), or counted and listed (data.on_error=skip)."""

    skip: bool = False
    count: int = 0
    messages: list[str] = field(default_factory=list)  # the first LISTED
    left_out: Counter[str] = field(default_factory=Counter)

    def add(self, error: UserError, *, whole: bool = False) -> None:
        """Of one record; `whole`: of a file, in which nothing further can be read."""
        if not self.skip:
            raise error if whole else UserError(f"{error} ({OR_SKIP})")
        self.count += 1
        if len(self.messages) < LISTED:
            self.messages.append(f"{error} ({REST})" if whole else str(error))

    def nothing(self, what: str, remedy: str) -> UserError:
        """What is said where the input holds none of what a dataset needs."""
        left_out = f"{self.count:,} bad records were left out, the first: {self.messages[0]}" if self.count else remedy
        return UserError(f"the input files hold no {what}; {left_out}")

    def merge(self, count: int, messages: Iterable[str], left_out: dict[str, int]) -> None:
        """Takes over what another process has counted."""
        self.count += count
        self.messages = [*self.messages, *messages][:LISTED]
        self.left_out.update(left_out)


def items(records: Iterable[tuple[str, Record]], parse: Callable[[str, Record], Iterable[Item]], mistakes: Mistakes) -> Iterator[Item]:
    """What `parse(where, record)` makes of each record: all of it, or, where it raises, none."""
    for where, record in records:
        try:
            made = list(parse(where, record))
        except UserError as error:
            mistakes.add(error)
        except LeftOut as reason:
            mistakes.left_out[str(reason)] += 1
        else:
            yield from made


def named_twice(kind: str, name: str, first: str, second: str) -> UserError:
    """What is said of an id that stands at two places ("file:line")."""
    there = f" stands already at {first}" if first else " stands twice"
    return UserError(f"{second or kind}: {kind} id '{name}'{there}; ids are unique over all files: remove one or rename it")


def hashed_id(question: RawQuestion) -> str:
    """The id of a question whose format has none: of its benchmark, split, words, answers and evidence."""
    words = (question.question, *question.answers, *question.gold_ids)
    return f"{question.benchmark}.{question.split}.{content_id(*words)}"


def content_id(*parts: str) -> str:
    """An id of the parts' content: 20 hex digits of the SHA-256 of the parts between NUL characters."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]
