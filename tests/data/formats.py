"""Small files of our own in exactly the formats of the public benchmarks."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

CLARA_PRETRAINING = [
    {"data_type": "qa", "question": ["Where does Lake Orla lie?", "What is north of Brenn?"], "answers": ["north of Brenn", "Lake Orla"],
     "docs": ["This a document about Lake Orla. \n Lake Orla lies north of the town of Brenn."]},
    {"data_type": "qa", "question": ["Who is mayor of Brenn?"], "answers": ["Ada Moss"],
     "docs": ["This a document about Brenn. \n Brenn is a town whose mayor is Ada Moss."]},
]  # fmt: skip
CLARA_E2E = [
    {"question": "Who is mayor of the town by Lake Orla?", "answer": "Ada Moss",
     "docs": ["This a document about Silo. \n A silo stores grain.",
              "This a document about Lake Orla. \n Lake Orla lies north of Brenn.",
              "A document without a title.",
              "This a document about Brenn. \n Brenn is a town whose mayor is Ada Moss."], "pos_index": [1, 3]},
    {"question": "What does a silo store?", "answer": ["grain", "fodder"], "docs": ["A silo stores grain."], "pos_index": [0]},
]  # fmt: skip
HOTPOTQA = [
    {"_id": "5a7a06935542990198eaf050", "question": "Who is mayor of the town by Lake Orla?", "answer": "Ada Moss", "type": "bridge",
     "level": "hard", "supporting_facts": [["Brenn", 1], ["Lake Orla", 0], ["Brenn", 0]],
     "context": [["Lake Orla", ["Lake Orla lies north of Brenn."]], ["Silo", ["A silo stores grain.", " It is tall."]],
                 ["Brenn", ["Brenn is a town.", " Its mayor is Ada Moss."]]]},
    {"_id": "5a879ab05542996e4f30887e", "question": "Are Tarn and Orla both rivers?", "answer": "no", "type": "comparison", "level": "easy",
     "supporting_facts": [["Tarn", 0], ["Lake Orla", 0]],
     "context": [["Tarn", ["Tarn is a river."]], ["Lake Orla", ["Lake Orla lies north of Brenn."]]]},
]  # fmt: skip
TWO_WIKI = [
    {"_id": "13f5ad2c088c11ebbd6fac1f6bf848b6", "type": "bridge_comparison", "question": "Is the director of Lantern older than Ada Moss?",
     "context": [["Lantern", ["Lantern is a film.", "It was directed by Bo Reed."]],
                 ["Bo Reed", ["Bo Reed (born 1 May 1940) is a director."]],
                 ["Ada Moss", ["Ada Moss was born in 1950."]]],
     "supporting_facts": [["Lantern", 1], ["Bo Reed", 0], ["Ada Moss", 0]],
     "evidences": [["Lantern", "director", "Bo Reed"], ["Bo Reed", "date of birth", "1 May 1940"]], "answer": "yes"},
]  # fmt: skip
MUSIQUE = [
    {"id": "3hop1__12_34_56", "question": "When was the mayor of the town by Lake Orla born?", "answer": "1950",
     "answer_aliases": ["in 1950"], "answerable": True,
     "paragraphs": [{"idx": 0, "title": "Silo", "paragraph_text": "A silo stores grain.", "is_supporting": False},
                    {"idx": 1, "title": "Ada Moss", "paragraph_text": "Ada Moss was born in 1950.", "is_supporting": True},
                    {"idx": 2, "title": "Lake Orla", "paragraph_text": "Lake Orla lies north of Brenn.", "is_supporting": True},
                    {"idx": 3, "title": "Brenn", "paragraph_text": "Brenn has the mayor Ada Moss.", "is_supporting": True}],
     "question_decomposition": [{"id": 12, "question": "Lake Orla >> town", "answer": "Brenn", "paragraph_support_idx": 2},
                                {"id": 34, "question": "mayor of #1", "answer": "Ada Moss", "paragraph_support_idx": 3},
                                {"id": 56, "question": "#2 >> born", "answer": "1950", "paragraph_support_idx": 1}]},
]  # fmt: skip
DPR = [
    {"dataset": "nq_train_psgs_w100", "question": "who is the mayor of brenn", "answers": ["Ada Moss"],
     "positive_ctxs": [{"title": "Brenn", "text": "Brenn has the mayor Ada Moss.", "score": 1000, "title_score": 1, "passage_id": "7"},
                       {"title": "Ada Moss", "text": "Ada Moss, mayor of Brenn.", "score": 11.5, "title_score": 0, "passage_id": "9"}],
     "negative_ctxs": [{"title": "Tarn", "text": "Tarn is a river.", "score": 0, "title_score": 0, "passage_id": "11"}],
     "hard_negative_ctxs": [{"title": "Silo", "text": "A silo stores grain.", "score": 9.1, "title_score": 0, "passage_id": "12"}]},
]  # fmt: skip
NQ_OPEN = [
    {"question": "who is the mayor of brenn", "answers": ["Ada Moss"],
     "ctxs": [{"id": "1", "title": "Silo", "text": "A silo stores grain.", "hasanswer": False, "isgold": False},
              {"id": None, "title": "Brenn", "text": "Brenn has the mayor Ada Moss.", "hasanswer": True, "isgold": True}]},
]  # fmt: skip
PSGS = "id\ttext\ttitle\n" + '1\t"Brenn is a town; its ""old"" mill stands."\tBrenn\n2\tTarn is a river.\t"Tarn ""the"" river"\n'
PASSAGES = [{"title": "Tarn", "text": "Tarn is a river."}, {"text": "A silo stores grain."}]

LISTS = {"hotpotqa", "hotpotqa_fullwiki", "2wikimultihopqa", "dpr"}  # one JSON list; the others are JSONL
RECORDS: dict[str, list[dict[str, Any]]] = {
    "clara": CLARA_E2E, "hotpotqa": HOTPOTQA, "hotpotqa_fullwiki": HOTPOTQA, "2wikimultihopqa": TWO_WIKI, "musique": MUSIQUE, "dpr": DPR,
    "nq_open": NQ_OPEN, "passages": PASSAGES,
}  # fmt: skip


def text_of(kind: str, records: list[Any]) -> str:
    if kind in LISTS:
        return json.dumps(records, ensure_ascii=False, indent=2 if kind == "dpr" else None)
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def write(path: Path, data: str | bytes) -> Path:
    """The file, packed as its name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    raw = data.encode() if isinstance(data, str) else data
    if path.suffix == ".gz":
        raw = gzip.compress(raw)
    elif path.suffix == ".zst":
        raw = pa.compress(raw, codec="zstd", asbytes=True)
    path.write_bytes(raw)
    return path


def write_parquet(path: Path, rows: list[dict[str, Any]], schema: pa.Schema | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path)
    return path
