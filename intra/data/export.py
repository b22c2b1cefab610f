"""A dataset in BEIR's layout, for other tools, and to be read back (`data.source=beir`).

    python -m intra.data.export DATASET FOLDER           DATASET: the place that prepare prints; both may lie on s3://

    <FOLDER>/corpus.jsonl       {"_id": chunk id, "title", "text", "metadata": {"source"}}
    <FOLDER>/queries.jsonl      {"_id", "text", "metadata": {"answers", "benchmark", "gold", "gold_source", "hops", "type"}}
    <FOLDER>/qrels/<split>.tsv  query-id, corpus-id, score: every chunk of every gold group, with score 1

The same dataset always gives the same bytes; prepared again from them, with the same tokenizer, it is the same, byte for byte. BEIR knows
no alternatives among gold passages: they stand in "metadata.gold", lists of chunks of which any one counts.
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from intra import cli, storage
from intra.artifact import Artifact
from intra.data import schema
from intra.data.schema import Question
from intra.errors import UserError

SLICE = 65536  # chunks decoded at once
HEADER = "query-id\tcorpus-id\tscore"


def export(dataset: str, folder: str) -> None:
    """Writes the dataset at `dataset` to `folder`, which must hold nothing. Raises UserError: no complete dataset, a folder with files."""
    dataset, folder = storage.absolute(dataset), storage.absolute(folder)
    Artifact("dataset", dataset, "", "prepare").manifest()
    if storage.names(folder):
        raise UserError(f"{folder}: holds files already; name a new folder, or remove it")
    questions = schema.read_questions(dataset)
    storage.write_bytes(storage.join(folder, "corpus.jsonl"), _lines(_corpus(schema.PoolFile(dataset))))
    storage.write_bytes(storage.join(folder, "queries.jsonl"), _lines(_json(_query(question)) for question in questions))
    for split in sorted({question.split for question in questions}):
        judged = (
            f"{question.question_id}\t{chunk}\t1"
            for question in questions
            if question.split == split
            for chunk in dict.fromkeys(chunk for group in question.gold for chunk in group)
        )
        storage.write_bytes(storage.join(folder, "qrels", f"{split}.tsv"), _lines([HEADER, *judged]))


def _corpus(pool: schema.PoolFile) -> Iterator[str]:
    for start in range(0, len(pool), SLICE):
        for row in pool.rows(start, SLICE).table.to_pylist():
            yield _json({"_id": row["chunk_id"], "title": row["title"], "text": row["text"], "metadata": {"source": row["source"]}})


def _query(question: Question) -> dict[str, Any]:
    metadata = {
        "answers": list(question.answers),
        "benchmark": question.benchmark,
        "gold": [list(group) for group in question.gold],
        "gold_source": question.gold_source,
        "hops": question.hops,
        "type": question.type,
    }
    if not question.answers:
        del metadata["answers"]
    return {"_id": question.question_id, "text": question.question, "metadata": metadata}


def _json(record: dict[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False, sort_keys=True)


def _lines(lines: Iterable[str]) -> bytes:
    buffer = io.BytesIO()
    for line in lines:
        buffer.write(f"{line}\n".encode())
    return buffer.getvalue()


def main(arguments: Sequence[str]) -> int:
    """The command line. Exit status: 0 done, 1 failed, 2 the user's mistake."""

    def work() -> str:
        if len(arguments) != 2:
            raise UserError("usage: python -m intra.data.export DATASET FOLDER")
        export(*arguments)
        return storage.absolute(arguments[1])

    return cli.status(work)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
