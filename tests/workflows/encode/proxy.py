"""A proxy before an S3 server that fails at a tenth of the requests, in the ways a network and a busy server do."""

from __future__ import annotations

import http.client
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

SHARE = 0.1
KINDS = ("500", "503", "silence", "cut before", "cut answer", "answer lost")  # the last: what was asked for has been done
SILENCE = 4.0  # seconds; who asks waits for two (faults.hasten)
MESSAGE = '<?xml version="1.0"?><Error><Code>{}</Code><Message>again, please</Message></Error>'


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Proxy

    def log_message(self, *_: object) -> None:
        pass

    def _pass(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault = self.server.fault(self.path)
        if fault in ("500", "503"):
            return self._answer(int(fault), {}, MESSAGE.format("InternalError" if fault == "500" else "SlowDown").encode())
        if fault == "silence":
            time.sleep(SILENCE)
        if fault in ("silence", "cut before"):
            return self._cut()
        behind = http.client.HTTPConnection(self.server.behind, timeout=60)
        behind.request(self.command, self.path, body, {key: value for key, value in self.headers.items() if key.lower() != "expect"})
        answer = behind.getresponse()
        data = answer.read()
        behind.close()
        if fault == "answer lost":
            return self._cut()
        return self._answer(answer.status, dict(answer.getheaders()), data, cut=fault == "cut answer")

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _pass

    def _answer(self, status: int, headers: dict[str, str], data: bytes, cut: bool = False) -> None:
        self.send_response(status)
        for name, value in headers.items():
            if name.lower() not in ("content-length", "transfer-encoding", "connection", "date", "server"):
                self.send_header(name, value)
        length = headers.get("Content-Length", str(len(data))) if self.command == "HEAD" else str(len(data))
        self.send_header("Content-Length", length)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[: len(data) // 2] if cut else data)
        if cut:
            self._cut()

    def _cut(self) -> None:
        self.close_connection = True
        try:
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # the other side has gone already


class Proxy(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, endpoint: str, seed: int) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.behind = urlsplit(endpoint).netloc
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.faults: Counter[str] = Counter()
        self.requests = 0
        self._chance = random.Random(seed)
        self._lock = threading.Lock()

    def fault(self, path: str) -> str | None:
        """How this request fails, if it does."""
        with self._lock:
            self.requests += 1
            kinds = [kind for kind in KINDS if kind != "silence" or "/mlflow/" not in path]  # MLflow's own client waits a minute
            kind = self._chance.choice(kinds) if self._chance.random() < SHARE else None
            if kind:
                self.faults[kind] += 1
            return kind


@contextmanager
def before(endpoint: str, seed: int = 0) -> Iterator[Proxy]:
    proxy = Proxy(endpoint, seed)
    thread = threading.Thread(target=proxy.serve_forever, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        proxy.shutdown()
        thread.join()
        proxy.server_close()
