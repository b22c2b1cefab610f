"""What every section of the configuration is, and how one's values stand over another's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, model_validator
from pydantic_core import PydanticCustomError

NO_NUMBER = "no_number"  # the type of the error below; its context holds `field` and `value`, since its place is the section


class Section(BaseModel):
    # Defaults are validated as values are: what is written out and what is left out then give one dump, and one fingerprint.
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), validate_default=True)

    @model_validator(mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, values: Any) -> Any:
        """Refuses true and false, which pydantic takes for 1 and 0, where a field is a number or a list of numbers."""
        for name, value in values.items() if isinstance(values, dict) else ():
            if name in cls.model_fields and any(isinstance(item, bool) for item in (value if isinstance(value, list) else [value])):
                kinds = list(_kinds(cls.model_fields[name].annotation))
                if bool not in kinds and (int in kinds or float in kinds):
                    message = "input should be a number; true, yes, on and their opposites are none"
                    raise PydanticCustomError(NO_NUMBER, message, {"field": name, "value": value})
        return values


def _kinds(annotation: Any) -> Iterator[Any]:
    """The types that an annotation is made of: int and NoneType of `int | None`."""
    parts = get_args(annotation)
    if not parts:
        yield annotation
    for part in parts:
        yield from _kinds(part)


def merged(base: dict[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` over `base`, section by section."""
    for key, value in values.items():
        base[key] = merged(base[key], value) if isinstance(value, dict) and isinstance(base.get(key), dict) else value
    return base
