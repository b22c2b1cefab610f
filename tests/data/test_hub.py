"""Fetching from the hub, against a local server that speaks as much of its protocol as is needed."""

from __future__ import annotations

import gzip
import hashlib
import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest

from intra import storage
from intra.data import hub, sources
from intra.data.raw import Mistakes
from intra.data_config import DataConfig
from intra.errors import UserError, WorkflowError
from tests.data import formats

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CONTENT = formats.text_of("musique", formats.MUSIQUE * 400).encode()  # some 300 KB
SMALL = b"small file\n"


class Hub:
    """What the server has, and what was asked of it."""

    def __init__(self) -> None:
        self.files = {"big.jsonl": CONTENT, "small.txt": SMALL}
        self.etags = {"big.jsonl": hashlib.sha256(CONTENT).hexdigest(), "small.txt": hashlib.sha1(b"blob 11\0" + SMALL).hexdigest()}
        self.commit = COMMIT  # that it answers with
        self.cuts: list[int | None] = []  # after so many bytes the next answers end; None refuses with 500
        self.asked: list[tuple[str, str | None]] = []  # (method, Range) of requests for files
        self.elsewhere = False  # whether the bytes of files lie at another host, as the hub's large ones do
        self.tokens: dict[str, str | None] = {}  # the last authorization that each host was shown
        self.url = ""


def handler(state: Hub) -> type[http.server.BaseHTTPRequestHandler]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *arguments: Any) -> None:
            pass

        def answer(self, code: int, headers: dict[str, str], body: bytes = b"") -> None:
            self.send_response(code)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            if self.path.startswith(f"/api/datasets/org/set/tree/{COMMIT}"):
                tree = [{"type": "file", "path": name, "oid": "0", "size": 1} for name in state.files]
                return self.answer(200, {"Content-Type": "application/json"}, json.dumps(tree).encode())
            if self.path.startswith("/api/datasets/org/set"):
                return self.answer(200, {"Content-Type": "application/json"}, json.dumps({"id": "org/set", "sha": COMMIT}).encode())
            if not self.path.startswith("/datasets/org/"):
                return self.answer(404, {"X-Error-Code": "RepoNotFound"})
            if self.path.startswith("/datasets/org/gated"):
                return self.answer(403, {"X-Error-Code": "GatedRepo"})
            if f"/resolve/{COMMIT}/" not in self.path:
                return self.answer(404, {"X-Error-Code": "RevisionNotFound"})
            name = self.path.rpartition("/")[2]
            if name not in state.files:
                return self.answer(404, {"X-Error-Code": "EntryNotFound"})
            content = state.files[name]
            host = self.headers["Host"].split(":")[0]
            state.tokens[host] = self.headers.get("Authorization")
            if state.elsewhere and host == "127.0.0.1":
                place = f"{state.url.replace(host, 'localhost')}{self.path}"
                linked = {"X-Linked-Etag": f'"{state.etags[name]}"', "X-Linked-Size": str(len(content)), "X-Repo-Commit": state.commit}
                return self.answer(302, {"Location": place, "ETag": '"of the pointer"', **linked})
            state.asked.append((self.command, self.headers.get("Range")))
            headers = {"X-Repo-Commit": state.commit, "ETag": f'"{state.etags[name]}"', "Accept-Ranges": "bytes"}
            if self.command == "HEAD":
                return self.answer(200, {**headers, "Content-Length": str(len(content))})
            start = int(self.headers["Range"].removeprefix("bytes=").rstrip("-")) if "Range" in self.headers else 0
            cut = state.cuts.pop(0) if state.cuts else len(content)
            if cut is None:
                return self.answer(500, {})
            self.send_response(206 if start else 200)
            for key, value in {**headers, "Content-Length": str(len(content) - start)}.items():
                self.send_header(key, value)
            self.end_headers()
            self.wfile.write(content[start : start + cut])
            return self.wfile.flush()

    return Handler


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 10_000)  # what is written at once: 10 MB else
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between the client's attempts
    state = Hub()
    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler(state))
    state.url = f"http://127.0.0.1:{running.server_address[1]}"
    thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield state
    running.shutdown()
    running.server_close()
    thread.join()


def config(folder: Path, *, offline: bool = False, **entry: str) -> DataConfig:
    values = {
        "format": "musique",
        "path": "big.jsonl",
        "benchmark": "musique",
        "split": "train",
        "repo": "org/set",
        "revision": COMMIT,
        **entry,
    }
    values = {name: value for name, value in values.items() if value}
    return DataConfig.model_validate({"source": "files", "path": str(folder), "files": [values], "offline": offline})


def left(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_fetched_once_and_read(server: Hub, tmp_path: Path) -> None:
    data = config(tmp_path, sha256=hashlib.sha256(CONTENT).hexdigest())
    with pytest.raises(UserError, match=r"big.jsonl: no such file; workflows/prepare.py fetches it"):
        sources.digests(data)
    assert hub.fetch(data, server.url) == [str(tmp_path / "big.jsonl")]
    assert (tmp_path / "big.jsonl").read_bytes() == CONTENT
    assert left(tmp_path) == [".fetched/big.jsonl.json", "big.jsonl"]
    assert len(list(sources.read(data, 0, 0, Mistakes()))) == 5 * 400
    server.asked.clear()
    assert hub.fetch(data, server.url) == []
    assert hub.fetch(data.model_copy(update={"offline": True}), server.url) == []
    assert server.asked == []


def test_large_files_lie_elsewhere_and_the_token_stays_here(server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    server.elsewhere = True
    server.cuts = [100_000]
    hub.fetch(config(tmp_path), server.url)
    assert (tmp_path / "big.jsonl").read_bytes() == CONTENT
    assert server.asked == [("GET", None), ("GET", "bytes=100000-")]
    assert server.tokens == {"127.0.0.1": "Bearer hf_secret", "localhost": None}


def test_a_download_that_was_cut_after_its_last_byte(server: Hub, tmp_path: Path) -> None:
    (tmp_path / f"big.jsonl.{server.etags['big.jsonl'][:12]}.partial").write_bytes(CONTENT)
    hub.fetch(config(tmp_path), server.url)
    assert (server.asked, left(tmp_path)) == ([("HEAD", None)], [".fetched/big.jsonl.json", "big.jsonl"])


def test_a_place_that_cannot_be_written(server: Hub, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/big.jsonl\..*partial: cannot be written \(File exists\); name a folder"):
        hub.fetch(config(tmp_path / "file"), server.url)


def test_a_small_file_is_checked_as_git_knows_it(server: Hub, tmp_path: Path) -> None:
    hub.fetch(config(tmp_path, path="small.txt"), server.url)
    assert (tmp_path / "small.txt").read_bytes() == SMALL
    server.etags["small.txt"] = "0" * 40
    with pytest.raises(WorkflowError, match="another checksum than the hub says"):
        hub.fetch(config(tmp_path / "other", path="small.txt"), server.url)


def test_a_cut_download_goes_on_by_itself(server: Hub, tmp_path: Path) -> None:
    server.cuts = [100_000, 50_000]
    hub.fetch(config(tmp_path), server.url)
    assert (tmp_path / "big.jsonl").read_bytes() == CONTENT
    assert server.asked == [("HEAD", None), ("GET", None), ("GET", "bytes=100000-"), ("GET", "bytes=150000-")]


def test_a_cut_download_goes_on_in_another_process(server: Hub, tmp_path: Path) -> None:
    server.cuts = [100_000, None, None, None, None, None, None]
    with pytest.raises(WorkflowError, match=r"the download failed .*partial keeps what came, and the same command goes on from there"):
        hub.fetch(config(tmp_path), server.url)
    (partial,) = left(tmp_path)
    assert (tmp_path / partial).stat().st_size == 100_000
    assert hub.missing(config(tmp_path))
    server.asked.clear()
    server.cuts = []
    hub.fetch(config(tmp_path), server.url)
    assert (tmp_path / "big.jsonl").read_bytes() == CONTENT
    assert server.asked == [("HEAD", None), ("GET", "bytes=100000-")]


def test_wrong_bytes_are_refused_and_removed(server: Hub, tmp_path: Path) -> None:
    server.files["big.jsonl"] = CONTENT.replace(b"1950", b"1951", 1)
    with pytest.raises(WorkflowError, match=r"what came has another checksum than the hub says .* and was removed"):
        hub.fetch(config(tmp_path), server.url)
    assert left(tmp_path) == []


def test_a_pinned_checksum_is_refused_before_the_download(server: Hub, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"sha256 is pinned as 0+, the hub has [0-9a-f]{64}"):
        hub.fetch(config(tmp_path, sha256="0" * 64), server.url)
    assert server.asked == [("HEAD", None)]
    with pytest.raises(UserError, match=r"sha256 is pinned as 0+, what came has [0-9a-f]{64} and was removed"):
        hub.fetch(config(tmp_path, path="small.txt", sha256="0" * 64), server.url)
    assert left(tmp_path) == []


@pytest.mark.parametrize(
    ("entry", "found"),
    [
        ({"revision": ""}, f"no revision is set; to pin what the hub has now, set revision: {COMMIT}"),
        ({"revision": "main"}, f"'main' is no commit; to pin what the hub has now, set revision: {COMMIT}"),
        ({"revision": "f" * 40}, "the hub has no such commit; mend revision"),
        ({"repo": "other/set"}, "the hub has no such data set"),
        ({"repo": "org/gated"}, "asks for its licence to be accepted"),
        ({"path": "bag.jsonl"}, "org/set at .* has no such file; it has, for one, big.jsonl"),
    ],
)
def test_what_the_hub_does_not_have(server: Hub, tmp_path: Path, entry: dict[str, str], found: str) -> None:
    with pytest.raises(UserError, match=found) as caught:
        hub.fetch(config(tmp_path, **entry), server.url)
    assert "\n" not in str(caught.value)
    assert left(tmp_path) == []


def test_another_commit_than_asked_for(server: Hub, tmp_path: Path) -> None:
    server.commit = "e" * 40
    with pytest.raises(UserError, match=f"the hub answers with the commit {'e' * 40}"):
        hub.fetch(config(tmp_path), server.url)


def test_offline_and_unreachable(server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    why = r"big.jsonl of org/set .commit .* is not in .*offline nothing is fetched .*configs/quickstart.yaml makes a synthetic world"
    with pytest.raises(UserError, match=why):
        hub.fetch(config(tmp_path, offline=True), server.url)
    assert server.asked == []
    with pytest.raises(WorkflowError, match=r"the download failed .*configs/quickstart.yaml makes a synthetic world"):
        hub.fetch(config(tmp_path), "http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=why):
        hub.fetch(config(tmp_path), server.url)


def test_a_file_in_the_way(server: Hub, tmp_path: Path) -> None:
    (tmp_path / "big.jsonl").write_bytes(CONTENT)
    hub.fetch(config(tmp_path, sha256=hashlib.sha256(CONTENT).hexdigest()), server.url)  # known by its checksum
    assert server.asked == []
    with pytest.raises(UserError, match=r"big.jsonl: is not known as what data.files names .* but of unknown origin; remove it"):
        hub.fetch(config(tmp_path), server.url)
    (tmp_path / ".fetched" / "big.jsonl.json").parent.mkdir()
    (tmp_path / ".fetched" / "big.jsonl.json").write_text("{")
    with pytest.raises(UserError, match="but of unknown origin; remove it"):
        hub.fetch(config(tmp_path), server.url)
    (tmp_path / "big.jsonl").unlink()
    hub.fetch(config(tmp_path), server.url)
    with pytest.raises(UserError, match=f"but commit {COMMIT}; remove it"):
        hub.fetch(config(tmp_path, revision="f" * 40), server.url)


def test_not_onto_s3(server: Hub, s3_root: str) -> None:
    data = config(Path("x")).model_copy(update={"path": s3_root})
    with pytest.raises(UserError, match="fetched to a local folder"):
        hub.fetch(data, server.url)


def test_a_pinned_checksum_is_compared_with_the_bytes(server: Hub, tmp_path: Path) -> None:
    data = config(tmp_path, sha256=hashlib.sha256(CONTENT).hexdigest())
    hub.fetch(data, server.url)
    (tmp_path / "big.jsonl").write_bytes(CONTENT.replace(b"1950", b"1951", 1))  # as many as before
    with pytest.raises(
        UserError, match=rf"{tmp_path}/big.jsonl: data.files pins its sha256 as [0-9a-f]{{64}}, the file has [0-9a-f]{{64}};"
    ):
        hub.missing(data)


def test_what_was_copied_to_s3_is_judged_as_on_the_disk(server: Hub, tmp_path: Path, s3_root: str) -> None:
    def there(revision: str = COMMIT, sha256: str = "") -> DataConfig:
        return config(tmp_path, revision=revision, sha256=sha256).model_copy(update={"path": s3_root})

    assert len(hub.missing(there())) == 1
    hub.fetch(config(tmp_path), server.url)
    storage.write_bytes(f"{s3_root}/big.jsonl", CONTENT)
    with pytest.raises(
        UserError, match=rf"^{s3_root}/big.jsonl: is not known as what data.files names .* but of unknown origin; remove it"
    ):
        hub.missing(there())
    assert hub.missing(there(sha256=hashlib.sha256(CONTENT).hexdigest())) == []
    storage.upload(tmp_path, s3_root)
    assert hub.missing(there()) == []
    with pytest.raises(UserError, match=f"but commit {COMMIT}; remove it"):
        hub.missing(there(revision="f" * 40))
    with pytest.raises(UserError, match=r"pins its sha256 as 0{64}, the file has [0-9a-f]{64}; remove it, or mend"):
        hub.missing(there(sha256="0" * 64))


def test_packed_files_stay_packed(server: Hub, tmp_path: Path) -> None:
    server.files["big.jsonl.gz"] = gzip.compress(CONTENT)
    server.etags["big.jsonl.gz"] = hashlib.sha256(server.files["big.jsonl.gz"]).hexdigest()
    data = config(tmp_path, path="big.jsonl.gz")
    hub.fetch(data, server.url)
    assert len(list(sources.read(data, 0, 0, Mistakes()))) == 5 * 400
