"""Questions made of passages alone: a passage names another one's title, and the sentence that does becomes a question.

    cloze          the sentence with that name taken out, asked with the passage's own title; gold: the passage; answer: the name
    cloze_bridge   the same question; gold: the passage, then the one of that title, which only the first one names

Self-supervised: what they train is to read a passage for a name, and to look for what a passage names. They are meant to stand beside real
questions, never to be evaluated on.
"""

from __future__ import annotations

import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence

from intra.data.schema import Pool, Question

BENCHMARK = "cloze"
HOLDERS = 2  # chunks that may bear a title, for it to name one thing
LETTERS = 7  # of a name of one word: shorter ones are words of the language, too
LINKS = 30  # to one name; beyond that its name is a common one
WORDS = 45  # of the longest sentence
BEFORE, AFTER = (4, 14), (3, 10)  # words of the sentence that stay on each side of the name, at random between the two
BLANKS = ("which", "what", "who", "that one")
_WORD = re.compile(r"\w[\w'’.-]*")
_QUALIFIER = re.compile(r" \(.*\)$")  # of a title: "Mercury (planet)"


def questions(pool: Pool, seed: int) -> list[Question]:
    """Of every link between two chunks of the pool, in an order drawn by `seed`: alternately a `cloze_bridge` and a `cloze`.

    The same pool and seed give the same questions. None where no passage names another.
    """
    found = list(links(pool.titles, pool.texts))
    to = Counter(name for _, _, name, _ in found)
    found = [link for link in found if to[link[2]] <= LINKS]
    rng = random.Random(f"intra cloze {seed}")
    rng.shuffle(found)
    made: list[Question] = []
    for row, targets, name, place in found:
        asked = _question(rng, pool.titles[row], pool.texts[row], name, place)
        if asked is None:
            continue
        bridge = len(made) % 2 == 0
        gold = [(pool.chunk_ids[row],), tuple(pool.chunk_ids[target] for target in targets)]
        made.append(
            Question(
                question_id=f"cloze-{pool.chunk_ids[row]}-{place}",
                benchmark=BENCHMARK,
                split="train",
                question=asked,
                answers=(name,),
                gold=tuple(gold if bridge else gold[:1]),
                hops=2 if bridge else 1,
                type="cloze_bridge" if bridge else "cloze",
            )
        )
    return made


def links(titles: Sequence[str], texts: Sequence[str]) -> Iterator[tuple[int, list[int], str, int]]:
    """(row, rows of the chunks whose title it names, the name, its place in the text): each name once a chunk, the longest that fits."""
    rows = defaultdict(list)
    for row, title in enumerate(titles):
        rows[_plain(title)].append(row)
    names = {
        name: held for name, held in rows.items() if len(held) <= HOLDERS and name[:1].isupper() and (" " in name or len(name) >= LETTERS)
    }
    by_start: dict[tuple[str, str], list[str]] = defaultdict(list)
    for name in sorted(names, key=lambda name: (-len(name), name)):
        by_start[_start(_WORD.findall(name), 0)].append(name)
    for row, text in enumerate(texts):
        seen = set()
        words = list(_WORD.finditer(text))
        plain = [word.group() for word in words]
        for number, word in enumerate(words):
            first = _start(plain, number)
            for name in (*by_start.get(first, ()), *by_start.get((first[0], ""), ())):
                end = word.start() + len(name)
                if not text.startswith(name, word.start()) or text[end : end + 1].isalnum():
                    continue
                if name not in seen and name not in titles[row] and row not in names[name]:
                    seen.add(name)
                    yield row, names[name], name, word.start()
                break


def _start(words: Sequence[str], number: int) -> tuple[str, str]:
    """A word and the next one, "" where there is none, without what may stand behind a name: that finds the names that begin here."""
    first, second = words[number], words[number + 1] if number + 1 < len(words) else ""
    return _bare(first), _bare(second)


def _bare(word: str) -> str:
    word = word.rstrip(".'’-")
    return word[:-2] if word.endswith(("'s", "’s")) else word


def _plain(title: str) -> str:
    return _QUALIFIER.sub("", title).strip()


def _question(rng: random.Random, title: str, text: str, name: str, place: int) -> str | None:
    """The words around the name with a blank for it, and the title where they lack it; None where the sentence is too long."""
    start = text.rfind(". ", 0, place) + 2 if text.rfind(". ", 0, place) >= 0 else 0
    end = text.find(". ", place + len(name))
    before, after = text[start:place].split(), text[place + len(name) : end if end >= 0 else len(text)]
    if len(before) + len(after.split()) > WORDS:
        return None
    keep = rng.randint(*BEFORE), rng.randint(*AFTER)
    blank = rng.choice(BLANKS) + (" " if after[:1].isspace() else "")  # a comma or an apostrophe stands close
    asked = " ".join([*before[-keep[0] :], blank + " ".join(after.split()[: keep[1]])]).rstrip(" .,;")
    own = _plain(title)
    if own and own.lower() not in asked.lower():
        asked = rng.choice((f"{own} {asked}", f"{asked} of {own}", f"in {own}, {asked}"))
    return asked + rng.choice(("", "?"))
