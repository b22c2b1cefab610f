"""One run at a time makes a store, and a dead one's claim does not hold for ever."""

from __future__ import annotations

import json

import pytest

from intra import storage
from intra.errors import WorkflowError
from intra.store import claim

from .conftest import artifact


def test_a_claim_of_another_machine_is_taken_over_once_nobody_renews_it(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claim, "PATIENCE", 0.4)
    store = artifact(root, "x")
    dead = {"token": "t", "host": "elsewhere", "name": "elsewhere", "pid": 1, "born": "1", "renewed": "2026-01-01 00:00:00"}
    storage.write_bytes(store.path("claim", "000001.json"), json.dumps(dead).encode())
    with claim.hold(store) as mine:
        assert mine.number == 2
    assert storage.names(store.path("claim")) == []


def test_a_claim_that_another_machine_renews_holds(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claim, "RENEWED", 0.05)
    store = artifact(root, "x")
    with claim.hold(store):
        monkeypatch.setattr(claim, "_host", lambda: "elsewhere")
        with pytest.raises(WorkflowError, match=r"store/x is being made by another run \(process \d+ on .*\); wait until it is done"):
            claim.take(store)


def test_a_run_that_was_suspended_finds_itself_taken_over(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = artifact(root, "x")
    monkeypatch.setattr(claim, "RENEWED", 2.0)
    suspended = claim.take(store)
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(claim, "_host", lambda: "elsewhere")
        elsewhere.setattr(claim, "PATIENCE", 0.1)
        other = claim.take(store)
    suspended._thread.join(60)  # it ends where it finds out
    with pytest.raises(WorkflowError, match="has taken it over; this run stops, what it committed is kept"):
        suspended.check()
    suspended.release()
    assert storage.names(store.path("claim")) != []  # of the other
    other.release()
