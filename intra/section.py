"""What every section of the configuration is, and how one's values stand over another's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    # Defaults are validated as values are: what is written out and what is left out then give one dump, and one fingerprint.
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), validate_default=True)


def merged(base: dict[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` over `base`, section by section."""
    for key, value in values.items():
        base[key] = merged(base[key], value) if isinstance(value, dict) and isinstance(base.get(key), dict) else value
    return base
