"""Artifacts: folders named by a fingerprint of what made them, complete when their manifest exists.

    <root>/<kind>/<fingerprint>/...            the manifest, `manifest.json`, is written last

What makes each artifact's fingerprint is said where the artifact is made (`intra.lineage`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from intra import storage
from intra.errors import UserError

MANIFEST = "manifest.json"


def fingerprint(parts: Mapping[str, Any]) -> str:
    """16 hex digits of the SHA-256 of the parts' canonical JSON."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Artifact:
    kind: str  # dataset | backbone | store | retriever | results
    url: str
    fingerprint: str
    made_by: str  # the workflow that makes it

    def path(self, *parts: str) -> str:
        return storage.join(self.url, *parts)

    def complete(self) -> bool:
        return storage.exists(self.path(MANIFEST))

    def manifest(self) -> dict[str, Any]:
        """The manifest. Raises UserError where the artifact is absent or incomplete."""
        try:
            return dict(storage.read_json(self.path(MANIFEST)))
        except FileNotFoundError:
            state = "incomplete" if storage.names(self.url) else "missing"
            raise UserError(
                f"{self.kind} {self.url} is {state} (no {MANIFEST}); run workflows/{self.made_by}.py with the same configuration"
            ) from None
        except ValueError:
            raise UserError(f"{self.path(MANIFEST)}: not valid JSON; delete it and run workflows/{self.made_by}.py again") from None

    def finish(self, manifest: Mapping[str, Any]) -> None:
        """Writes the manifest: from now on the artifact is complete."""
        storage.write_json(self.path(MANIFEST), {"kind": self.kind, "fingerprint": self.fingerprint, **manifest})
