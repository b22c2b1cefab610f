"""Where passages and questions come from: `data.source` = synthetic, jsonl, beir or files.

A source is read in parts, one an input file, each for itself and in any process.
"""

from __future__ import annotations

import fnmatch
import functools
from collections.abc import Iterator

from intra import storage
from intra.data import beir, benchmarks, corpora, files, jsonl
from intra.data.raw import Item, Mistakes, items
from intra.data_config import DataConfig, FileConfig
from intra.errors import UserError

LATER = ("files", "on_error", "deduplicate", "pool_chunks", "pool_tokens", "nq_gold", "musique_train", "near_duplicates")


def inputs(data: DataConfig) -> dict[str, str]:
    """Name -> URL of every input file; {} for the synthetic source. Raises UserError where one is missing."""
    if data.source == "jsonl":
        layout = jsonl.layout(data)
        return {name: storage.join(layout.folder, name) for name in layout.names()}
    if data.source == "beir":
        found = beir.layout(data)
        # The folder's name is data too: it names the benchmark.
        return {f"{found.benchmark}/{name}": storage.join(found.folder, name) for name in found.names()}
    if data.source == "files":
        return {name: url for entry, url in entries(data) for name, url in _files_of(entry, url).items()}
    return {}


def identity(data: DataConfig) -> dict[str, object]:
    """What of the section shapes a dataset, beside the bytes of its input files: a part of the dataset's fingerprint.

    Keys that came later count only where they are set, so that they leave the names of older datasets as they were.
    """
    values = data.model_dump(exclude={"path", "passages", "workers", "offline"} | (set() if data.source == "synthetic" else {"synthetic"}))
    unset = {name for name in LATER if values[name] == DataConfig.model_fields[name].default}
    values = {name: value for name, value in values.items() if name not in unset}
    if data.files:  # where a file was fetched from says nothing that its bytes do not
        values["files"] = [entry.model_dump(exclude={"repo", "revision", "sha256"}) for entry in data.files]
    return values


def digests(data: DataConfig) -> dict[str, str]:
    """Name -> SHA-256 (hex) of every input file's bytes; {} for the synthetic source. Raises UserError where one is missing."""
    return {name: digest(url) for name, url in inputs(data).items()}


def digest(url: str) -> str:
    """SHA-256 (hex) of an input file's bytes. Every step of a run asks, and an unchanged file is hashed once a process."""
    return _digest(url, storage.stamp(url))


def parts(data: DataConfig) -> list[str]:
    """The names of the parts of a source, in the order of their numbers."""
    if data.source == "jsonl":
        layout = jsonl.layout(data)
        return [*layout.passages, *(name for name, _, _ in layout.questions)]
    if data.source == "beir":
        return ["corpus", "queries"]
    return [entry.path for entry, _ in entries(data)] if data.source == "files" else ["synthetic"]


def read(data: DataConfig, seed: int, part: int, mistakes: Mistakes) -> Iterator[Item]:
    """The passages and questions of a part as the source gives them, before limits and chunking; `seed` makes the synthetic world.

    What is malformed goes to `mistakes`, as a UserError that names file and line.
    """
    if data.source == "jsonl":
        return jsonl.read(data, part, mistakes)
    if data.source == "beir":
        layout = beir.layout(data)
        return beir.read_corpus(layout, mistakes) if part == 0 else beir.read_questions(layout, mistakes)
    if data.source == "files":
        return _read_file(data, part, mistakes)
    from intra.data import synthetic

    passages, questions = synthetic.generate(data.synthetic, seed)
    return iter([*passages, *questions])


def own_ids(data: DataConfig) -> list[bool]:
    """For each part, whether its passages have ids of their own, of which none may stand twice; else they are hashes of content."""
    return [entry.format == "beir" for entry, _ in entries(data)] if data.source == "files" else [True] * len(parts(data))


def repeats(data: DataConfig, part: int) -> bool:
    """Whether a part may hold one passage many times, beside each question that it was found for."""
    return data.source == "files" and entries(data)[part][0].format in benchmarks.READERS


def equivalents(data: DataConfig, mistakes: Mistakes) -> list[tuple[str, ...]]:
    """Groups of passage ids of which any counts as a hit for any other."""
    if data.source == "jsonl":
        return jsonl.equivalents(data, mistakes)
    if data.source == "beir":
        return beir.equivalents(beir.layout(data))
    folders = [(entry, url) for entry, url in entries(data) if entry.format == "beir"]
    return [group for entry, url in folders for group in beir.equivalents(beir.entry_layout(entry, url))]


def entries(data: DataConfig) -> list[tuple[FileConfig, str]]:
    """Every input of `data.files` with its URL, globs expanded. Raises UserError where a file is missing."""
    folder = storage.absolute(data.path or ".")
    found = []
    for entry in data.files:
        url = entry.path if storage.is_s3(entry.path) or entry.path.startswith("/") else storage.join(folder, entry.path)
        if any(sign in entry.path for sign in "*?["):
            place, _, pattern = url.rpartition("/")
            names = [name for name in storage.names(place) if fnmatch.fnmatchcase(name, pattern)]
            if not names:
                raise UserError(f"data.files: {url}: no file matches; {place} holds {', '.join(storage.names(place)[:8]) or 'nothing'}")
            prefix = entry.path.rpartition("/")[0]
            found += [(entry.model_copy(update={"path": f"{prefix}/{name}".lstrip("/")}), f"{place}/{name}") for name in names]
            continue
        if not storage.exists(url):
            remedy = "workflows/prepare.py fetches it" if entry.repo else "fetch it, name it .gz or .zst if it is packed, or mend the path"
            raise UserError(f"data.files: {url}: no such file; {remedy}")
        found.append((entry, url))
    return found


def _files_of(entry: FileConfig, url: str) -> dict[str, str]:
    if entry.format != "beir":
        return {entry.path: url}
    return {f"{entry.path}/{name}": storage.join(url, name) for name in beir.entry_layout(entry, url).names()}


def _read_file(data: DataConfig, part: int, mistakes: Mistakes) -> Iterator[Item]:
    found = entries(data)
    entry, url = found[part]
    if entry.format == "beir":
        layout = beir.entry_layout(entry, url)
        if not any((other.format, other.benchmark, place) == ("beir", entry.benchmark, url) for other, place in found[:part]):
            yield from beir.read_corpus(layout, mistakes)  # once, of a folder that is named for each split
        yield from beir.read_questions(layout, mistakes)
    elif entry.format in corpora.READERS:
        yield from corpora.READERS[entry.format](url, entry, mistakes)
    else:
        reader = benchmarks.READERS[entry.format]
        yield from items(files.objects(url, mistakes), lambda where, record: reader(where, record, entry), mistakes)


@functools.lru_cache(maxsize=4096)
def _digest(url: str, stamp: str) -> str:
    # The stamp is only the cache's key.
    return files.digest(url)
