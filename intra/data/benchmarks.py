"""Readers of the benchmarks' own files: each turns one record into its passages and questions.

    clara             CLaRa's multi-stage data, JSONL: `pretraining` {question[], answers[], docs[]} and `e2e_*_with_pos` {question, answer,
                      docs, pos_index}
    hotpotqa          HotpotQA, distractor setting: JSON list of {_id, question, answer, type, supporting_facts, context}
    hotpotqa_fullwiki the same fields; a supporting page that is not in `context` is looked up by its title among all passages
    2wikimultihopqa   2WikiMultihopQA: HotpotQA's fields and `evidences`
    musique           MuSiQue, answerable or full, JSONL: {id, question, answer, answer_aliases, answerable, paragraphs,
                      question_decomposition}
    dpr               Natural Questions (or another) in DPR's JSON: {question, answers, positive_ctxs, negative_ctxs, hard_negative_ctxs}
    nq_open           open Natural Questions with passages, JSONL: {question, answer or answers, ctxs: [{title, text, isgold}]}

JSON lists and JSONL are told apart by their first character, Parquet, which the hub has much of this in, by its name (`.parquet`).
HotpotQA's `context` and `supporting_facts` may be columns as there, {title[], sentences[]} and {title[], sent_id[]}.

A passage's id is the hash of its title and text, so one paragraph in several files is one passage. Questions keep their own ids; where the
format has none, the id is a hash of question and evidence. Whatever a record holds wrong is a UserError that names file, line and field.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from intra.data import files
from intra.data.files import Record
from intra.data.raw import TITLE, Item, LeftOut, Passage, RawQuestion, content_id, hashed_id
from intra.data_config import FileConfig
from intra.errors import UserError

# CLaRa's documents begin so; what stands between is the page's title.
_CLARA_TITLE = re.compile(r"This a document about (.+?)\. ?\n ?")

Reader = Callable[[str, Record, FileConfig], Iterator[Item]]


def clara(where: str, record: Record, entry: FileConfig) -> Iterator[Item]:
    """A `pretraining` row makes one question for each pair, all about the row's documents; an `e2e` row makes one."""
    if record.get("data_type") == "paraphrase":
        raise LeftOut("CLaRa paraphrases, which ask nothing")
    documents = [_clara_document(text, where, entry) for text in files.strings(record, "docs", where, "document")]
    if isinstance(record.get("question"), list):
        kind = files.string(record, "data_type", where, default="qa")
        questions = files.strings(record, "question", where, "question")
        answers = files.strings(record, "answers", where, "answer")
        if len(questions) != len(answers):
            raise UserError(f"{where}: 'question' holds {len(questions)}, 'answers' {len(answers)}; each question needs its answer")
        yield from documents
        for question, answer in zip(questions, answers, strict=True):
            yield _question(where, entry, "", question, (answer,), _ids(documents), len(documents), kind)
        return
    question = files.string(record, "question", where)
    found = [key for key in ("answer", "answers", "golden_answers") if record.get(key) is not None]
    if not found:
        raise UserError(f"{where}: 'answer' is missing; found the fields {', '.join(sorted(record))}")
    answers = _one_or_more(record, found[0], where)
    positions = record.get("pos_index")
    if positions is not None and not isinstance(positions, list):
        positions = [positions]
    positions = files.listed({"pos_index": positions} if positions is not None else {}, "pos_index", where, "index of a document")
    gold = [documents[files.index(value, len(documents), "pos_index", where)] for value in positions]
    yield from documents
    hops = 1 if entry.benchmark == "nq" else len(_ids(gold))  # of Natural Questions each gold passage alone is the evidence
    yield _question(where, entry, "", question, answers, _ids(gold), hops, "")


def hotpotqa(where: str, record: Record, entry: FileConfig) -> Iterator[Item]:
    """The paragraphs of `context`, and the question with its supporting pages in the order in which they are first named."""
    paragraphs: dict[str, tuple[Passage, int]] = {}
    passages = []
    for element in _pairs(record, "context", "sentences", where, "paragraph"):
        title, sentences = _context(element, where)
        passages.append(_passage(title, _joined(sentences), where, entry))
        paragraphs.setdefault(title, (passages[-1], len(sentences)))
    gold: list[str] = []
    for fact in _pairs(record, "supporting_facts", "sent_id", where, "supporting fact"):
        if not isinstance(fact, list) or len(fact) != 2 or not isinstance(fact[0], str):
            raise UserError(f"{where}: 'supporting_facts' must hold pairs of a title and a sentence's number, found {str(fact)[:80]}")
        title, sentence = fact
        if title in paragraphs:
            passage, size = paragraphs[title]
            files.index(sentence, size, f"supporting_facts ({title})", where)
            gold.append(passage.passage_id)
        elif entry.format == "hotpotqa_fullwiki":
            files.index(sentence, None, f"supporting_facts ({title})", where)
            gold.append(TITLE + title)
        else:
            raise UserError(f"{where}: 'supporting_facts' names '{title}', which is not in 'context'; mend it, or, for a fullwiki file, "
                            "set format: hotpotqa_fullwiki and name a file of the pages beside it")  # fmt: skip
    gold_ids = tuple(dict.fromkeys(gold))
    question = _question(
        where, entry, files.identifier(record, "id" if "id" in record else "_id", where), files.string(record, "question", where),
        (files.string(record, "answer", where),), gold_ids, len(gold_ids), files.string(record, "type", where, default="", blank=True),
    )  # fmt: skip
    yield from passages
    yield question


def two_wiki(where: str, record: Record, entry: FileConfig) -> Iterator[Item]:
    """As HotpotQA's; `evidences`, the triples of the reasoning, must be there and whole."""
    for triple in files.listed(record, "evidences", where, "triple"):
        if not isinstance(triple, list) or len(triple) != 3 or not all(isinstance(part, str) for part in triple):
            raise UserError(f"{where}: 'evidences' must hold triples of strings, found {str(triple)[:80]}")
    yield from hotpotqa(where, record, entry)


def musique(where: str, record: Record, entry: FileConfig) -> Iterator[Item]:
    """The paragraphs, and the question with the decomposition's supporting paragraphs in hop order; `type` is the id's, as in `3hop1`.

    Of the full set, questions that are not answerable are left out: their evidence is not whole.
    """
    if record.get("answerable") is False:
        raise LeftOut("MuSiQue questions that are not answerable")
    passages: dict[int, Passage] = {}
    for paragraph in files.listed(record, "paragraphs", where, "paragraph"):
        if not isinstance(paragraph, dict):
            raise UserError(f"{where}: 'paragraphs' must hold objects, found {files.kind(paragraph)}")
        number = paragraph.get("idx")
        if type(number) is not int or number in passages:
            raise UserError(f"{where}: 'paragraphs' need an 'idx' each, a number of its own; found {number!r}")
        passages[number] = _passage(
            files.string(paragraph, "title", where, blank=True), files.string(paragraph, "paragraph_text", where), where, entry
        )
    steps = files.listed(record, "question_decomposition", where, "step")
    gold = []
    for step in steps:
        support = step.get("paragraph_support_idx") if isinstance(step, dict) else None
        if type(support) is not int or support not in passages:
            raise UserError(f"{where}: 'question_decomposition' names the paragraph {str(support)[:80]} (paragraph_support_idx), out of "
                            f"range: 'paragraphs' has idx {min(passages)} to {max(passages)}; mend it")  # fmt: skip
        gold.append(passages[support].passage_id)
    name = files.identifier(record, "id", where)
    aliases = files.strings(record, "answer_aliases", where, "alias") if record.get("answer_aliases") else ()
    answers = tuple(dict.fromkeys((files.string(record, "answer", where), *aliases)))
    kind = name.split("__")[0] if "__" in name else ""
    yield from passages.values()
    yield _question(where, entry, name, files.string(record, "question", where), answers, tuple(dict.fromkeys(gold)), len(steps), kind)


def dpr(where: str, record: Record, entry: FileConfig) -> Iterator[Item]:
    """All passages; every positive one is gold, best first. `data.nq_gold` says whether all of them count."""
    gold = [_dpr_passage(value, "positive_ctxs", where, entry) for value in files.listed(record, "positive_ctxs", where, "passage")]
    others = [
        _dpr_passage(value, key, where, entry)
        for key in ("hard_negative_ctxs", "negative_ctxs")
        if record.get(key)
        for value in files.listed(record, key, where, "passage")
    ]
    question, answers = files.string(record, "question", where), files.strings(record, "answers", where, "answer")
    yield from gold
    yield from others
    yield _question(where, entry, "", question, answers, _ids(gold), 1, "", "dpr")


def nq_open(where: str, record: Record, entry: FileConfig) -> Iterator[Item]:
    """The passages of `ctxs`; those marked `isgold` are gold."""
    if "ctxs" not in record:
        raise UserError(f"{where}: 'ctxs' is missing: questions and answers alone name no evidence; take DPR's files (format: dpr), or a "
                        "file with 'ctxs' that mark the gold passages with 'isgold'")  # fmt: skip
    contexts = files.listed(record, "ctxs", where, "passage")
    passages = [_dpr_passage(value, "ctxs", where, entry) for value in contexts]
    gold = [passage for passage, value in zip(passages, contexts, strict=True) if value.get("isgold") is True]
    if not gold:
        raise UserError(f"{where}: 'ctxs' marks no passage as gold ('isgold': true); a question needs at least one gold passage")
    answers = _one_or_more(record, "answers" if "answers" in record else "answer", where)
    yield from passages
    yield _question(where, entry, "", files.string(record, "question", where), answers, _ids(gold), 1, "")


READERS: dict[str, Reader] = {
    "clara": clara,
    "hotpotqa": hotpotqa,
    "hotpotqa_fullwiki": hotpotqa,
    "2wikimultihopqa": two_wiki,
    "musique": musique,
    "dpr": dpr,
    "nq_open": nq_open,
}


def _question(
    where: str, entry: FileConfig, name: str, question: str, answers: tuple[str, ...], gold: tuple[str, ...], hops: int, kind: str,
    gold_source: str = "annotated",
) -> RawQuestion:  # fmt: skip
    assert entry.benchmark is not None  # the configuration sees to both
    assert entry.split is not None
    made = RawQuestion(
        question_id=name,
        benchmark=entry.benchmark,
        split=entry.split,
        question=question,
        answers=answers,
        gold_ids=gold,
        hops=hops,
        type=kind,
        gold_source=gold_source,
        where=where,
    )
    return made if name else replace(made, question_id=hashed_id(made))


def _passage(title: str, text: str, where: str, entry: FileConfig) -> Passage:
    return Passage(content_id(title, text), title, text, entry.path, where)


def _ids(passages: list[Passage]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(passage.passage_id for passage in passages))


def _one_or_more(record: Record, key: str, where: str) -> tuple[str, ...]:
    if isinstance(record.get(key), str):
        return (files.string(record, key, where),)
    return tuple(dict.fromkeys(files.strings(record, key, where, "answer")))


def _clara_document(text: str, where: str, entry: FileConfig) -> Passage:
    found = _CLARA_TITLE.match(text)
    title, body = (found[1], text[found.end() :]) if found else ("", text)
    return _passage(title, body, where, entry) if body.strip() else _passage("", text, where, entry)


def _pairs(record: Record, key: str, second: str, where: str, meaning: str) -> list[Any]:
    """The list `record[key]`, or the pairs of its columns `title` and `second`."""
    columns = record.get(key)
    if not isinstance(columns, dict):
        return files.listed(record, key, where, meaning)
    titles, others = (files.listed(columns, name, f"{where}: '{key}'", meaning) for name in ("title", second))
    if len(titles) != len(others):
        raise UserError(f"{where}: '{key}' holds {len(titles)} of 'title', {len(others)} of '{second}'; each {meaning} needs both")
    return [list(pair) for pair in zip(titles, others, strict=True)]


def _context(element: Any, where: str) -> tuple[str, list[str]]:
    """(title, sentences) of an element of `context`."""
    if not isinstance(element, list) or len(element) != 2:
        raise UserError(f"{where}: 'context' must hold pairs of a title and sentences, found {str(element)[:80]}")
    pair: Record = {"context": element[0], "sentences": element[1]}
    sentences = files.listed(pair, "sentences", where, "sentence")
    for number, _ in enumerate(sentences):
        files.string({"context": sentences[number]}, "context", where, blank=True)
    title = files.string(pair, "context", where)
    if not "".join(sentences).strip():
        raise UserError(f"{where}: 'context': the paragraph '{title}' is empty; fill it or remove it")
    return title, sentences


def _joined(sentences: list[str]) -> str:
    """HotpotQA's sentences carry their spaces, 2WikiMultihopQA's do not."""
    text = ""
    for sentence in sentences:
        text += sentence if not text or text[-1:].isspace() or sentence[:1].isspace() else f" {sentence}"
    return text.strip()


def _dpr_passage(value: Any, key: str, where: str, entry: FileConfig) -> Passage:
    if not isinstance(value, dict):
        raise UserError(f"{where}: '{key}' must hold objects, found {files.kind(value)}")
    try:
        return _passage(files.string(value, "title", where, default="", blank=True), files.string(value, "text", where), where, entry)
    except UserError as error:
        raise UserError(f"{error} (in '{key}')") from None
