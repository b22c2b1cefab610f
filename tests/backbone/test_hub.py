"""Hub ids. The hub's client reads its variables once, at import: each case is a process of its own."""

from __future__ import annotations

import http.server
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from intra.backbone.model import digest

PROGRAM = """
import sys
from intra.backbone import locate
from intra.errors import UserError, WorkflowError
locate.HUB_TIMEOUT = 0.5
try:
    print(locate.digest("someone/some-model", sys.argv[1] if len(sys.argv) > 1 else None))
except (UserError, WorkflowError) as error:
    print(f"{type(error).__name__}: {error}")
"""


COMMIT = "0123456789abcdef0123456789abcdef01234567"


def ask(cache: Path, *arguments: str, **variables: str) -> str:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {"HF_HOME": str(cache), "HF_HUB_DISABLE_TELEMETRY": "1", **variables}
    process = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments], capture_output=True, text=True, env=environment, cwd=cache, timeout=60, check=True
    )
    return process.stdout.strip()


class Refusing(http.server.BaseHTTPRequestHandler):
    """A hub that knows nobody: 404 with the code the hub gives."""

    code = "RepoNotFound"

    def do_GET(self) -> None:
        self.send_response(404)
        self.send_header("X-Error-Code", self.code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, *arguments: object) -> None:
        pass


class Gated(Refusing):
    """A hub that tells what a gated model's files are, and gives none of them."""

    def do_GET(self) -> None:
        file = {"type": "file", "path": "config.json", "rfilename": "config.json", "size": 2, "oid": COMMIT}
        told = [file] if "/tree/" in self.path else {"id": "someone/some-model", "sha": COMMIT, "siblings": [file]}
        body = json.dumps(told).encode() if self.path.startswith("/api/models/") else b""
        self.send_response(200 if body else 401)
        self.send_header("X-Error-Code", "GatedRepo")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET


class RefusingRevision(Refusing):
    code = "RevisionNotFound"


@pytest.fixture
def hub(request: pytest.FixtureRequest) -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), request.param)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


UNREACHABLE = "WorkflowError: backbone.model 'someone/some-model': no such directory here, not in the local cache, and the hub cannot"


def test_offline_mode_is_honoured(tmp_path: Path) -> None:
    found = ask(tmp_path, HF_HUB_OFFLINE="1")
    assert found.startswith(UNREACHABLE)
    assert "OfflineModeIsEnabled" in found
    assert "\n" not in found


def test_no_network(tmp_path: Path) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        found = ask(tmp_path, HF_ENDPOINT=f"http://127.0.0.1:{closed.getsockname()[1]}")
    assert found.startswith(UNREACHABLE)
    assert "\n" not in found


def test_a_hub_that_never_answers(tmp_path: Path) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(16)
        found = ask(tmp_path, HF_ENDPOINT=f"http://127.0.0.1:{silent.getsockname()[1]}")
    assert found.startswith(UNREACHABLE)


@pytest.mark.parametrize("hub", [Refusing], indirect=True)
def test_no_such_model(hub: str, tmp_path: Path) -> None:
    found = ask(tmp_path, HF_ENDPOINT=hub)
    assert found.startswith("UserError: backbone.model 'someone/some-model': neither a directory here nor on the hub")


@pytest.mark.parametrize("hub", [RefusingRevision], indirect=True)
def test_no_such_revision(hub: str, tmp_path: Path) -> None:
    found = ask(tmp_path, "v9", HF_ENDPOINT=hub)
    assert found.startswith("UserError: backbone.model 'someone/some-model' at revision 'v9': the hub has no such revision")


@pytest.mark.parametrize("hub", [Gated], indirect=True)
def test_a_model_whose_licence_was_not_accepted(hub: str, tmp_path: Path) -> None:
    found = ask(tmp_path, HF_ENDPOINT=hub)
    assert found.startswith("UserError: backbone.model 'someone/some-model': the hub asks for its licence to be accepted")
    assert found.endswith("set HF_TOKEN")


def test_a_cached_model_is_found_offline(folder: Path, tmp_path: Path) -> None:
    """As the hub's client lays it out; its digest is that of the same files in a directory."""
    cached = tmp_path / "hub" / "models--someone--some-model"
    shutil.copytree(folder, cached / "snapshots" / COMMIT)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(COMMIT)
    assert ask(tmp_path, HF_HUB_OFFLINE="1") == digest(str(folder))
    assert ask(tmp_path, COMMIT, HF_HUB_OFFLINE="1") == digest(str(folder))
