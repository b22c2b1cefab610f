"""One run at a time makes a store (or dataset, backbone, retriever): a claim lies in it while one does; a dead run's is taken over.

    with claim.hold(store) as mine:
        ... mine.check() ...

Claims are numbered, `<store>/claim/000001.json`, and made so that only one run can make a number: the highest number holds the
store. Who finds a claim of a process of its own machine that no longer runs takes the next number at once; any other claim it watches
for PATIENCE seconds, and takes over where nobody has renewed it. A run that finds itself taken over (it was suspended, say) stops. Were
two ever to write at once, they would write the same bytes: a claim spares work, it does not guard the content.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from intra import storage
from intra.artifact import Artifact
from intra.errors import UserError, WorkflowError

CLAIM = "claim"
RENEWED = 10.0  # seconds between renewals
PATIENCE = 45.0  # seconds without one, after which a run on another machine is taken for dead


class Claim:
    """The store is ours until `check` raises. `release` gives it back."""

    def __init__(self, store: Artifact, number: int, token: str) -> None:
        self.store, self.number, self.token = store, number, token
        self._lost: str | None = None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="claim", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raises WorkflowError where another run has taken the store over."""
        if self._lost is not None:
            made = f"{self.store.kind} {self.store.url}"
            raise WorkflowError(f"{made}: {self._lost} has taken it over; this run stops, what it committed is kept")

    def release(self) -> None:
        self._over.set()
        self._thread.join()
        if self._lost is None:
            storage.remove(self.store.path(CLAIM))

    def _renew(self) -> None:
        while not self._over.wait(RENEWED):
            try:
                number = _highest(self.store)
                if number > self.number:
                    self._lost = _who(_read(self.store, number))
                    return
                storage.write_bytes(_place(self.store, self.number), _text(self.token))
            except (UserError, WorkflowError):
                continue  # the storage is away for a moment: the work itself will say so if it stays away


@contextlib.contextmanager
def hold(store: Artifact) -> Iterator[Claim]:
    """Claims the store. Raises WorkflowError where another run makes it."""
    claim = take(store)
    try:
        yield claim
    finally:
        claim.release()


def take(store: Artifact) -> Claim:
    token = uuid.uuid4().hex
    while True:
        number = _highest(store)
        found = _read(store, number) if number else None
        if found is not None and not _dead(store, number, found):
            raise WorkflowError(
                f"{store.kind} {store.url} is being made by {_who(found)}; wait until it is done, or end it and run the same command again"
            )
        if storage.create(_place(store, number + 1), _text(token)) or (_read(store, number + 1) or {}).get("token") == token:
            return Claim(store, number + 1, token)  # the second: created, but the answer was lost on its way


def holder(store: Artifact) -> str | None:
    """Who makes the store, in words, or None."""
    number = _highest(store)
    found = _read(store, number) if number else None
    return None if found is None or _dead(store, number, found) else _who(found)


def sweep(store: Artifact) -> None:
    """Of a complete store: removes the claim that a run of this machine left, killed between the last write and giving the store back."""
    number = _highest(store)
    found = _read(store, number) if number else None
    if found is not None and found.get("host") == _host() and not _runs(int(found.get("pid", 0)), found.get("born")):
        storage.remove(store.path(CLAIM))


def _dead(store: Artifact, number: int, found: dict[str, Any]) -> bool:
    if found.get("host") == _host():
        return not _runs(int(found.get("pid", 0)), found.get("born"))
    before, deadline = storage.stamp(_place(store, number)), time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        time.sleep(min(2.0, PATIENCE / 4))  # storage tells nobody of a change: one has to look again
        try:
            if storage.stamp(_place(store, number)) != before:
                return False
        except FileNotFoundError:
            return True  # given back meanwhile
    return True


def _place(store: Artifact, number: int) -> str:
    return store.path(CLAIM, f"{number:06d}.json")


def _highest(store: Artifact) -> int:
    numbers = [int(name.removesuffix(".json")) for name in storage.names(store.path(CLAIM)) if name.removesuffix(".json").isdigit()]
    return max(numbers, default=0)


def _read(store: Artifact, number: int) -> dict[str, Any] | None:
    try:
        return dict(storage.read_json(_place(store, number)))
    except FileNotFoundError:
        return None
    except ValueError:
        return {}


def _text(token: str) -> bytes:
    now = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime())
    values = {"token": token, "host": _host(), "name": socket.gethostname(), "pid": os.getpid(), "born": _born(os.getpid()), "renewed": now}
    return json.dumps(values).encode()


def _who(found: dict[str, Any] | None) -> str:
    if not found:
        return "another run"
    return f"another run (process {found['pid']} on {found['name']}, last heard of at {found['renewed']} UTC)"


def _host() -> str:
    """This machine, as it was started: after a restart its processes are others. A container has its own name."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        boot = ""
    return f"{socket.gethostname()} {boot}"


def _born(pid: int) -> str | None:
    """When the process was started, in the kernel's ticks: a process id comes back, this does not. None where there is no /proc."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None


def _runs(pid: int, born: str | None) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return born is None or _born(pid) in (None, born)
