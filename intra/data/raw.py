"""What a source yields before chunking: passages and questions as they stand in the files."""

from __future__ import annotations

from dataclasses import dataclass


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
    gold_ids: tuple[str, ...]  # passage ids, in hop order where the source gives one
    hops: int
    type: str
    gold_source: str = "annotated"
    where: str = ""  # "file:line", for messages
