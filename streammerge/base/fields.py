"""Records that come back from files: dataclasses of plain fields, made only of what fits."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields
from typing import Any, TypeVar

T = TypeVar("T")


def _is_integer(value: Any) -> bool:
    return type(value) is int


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


_FITS: dict[str, Callable[[Any], bool]] = {
    "int": _is_integer,
    "float": _is_number,
    "str": lambda value: isinstance(value, str),
    "bool": lambda value: isinstance(value, bool),
    "str | None": lambda value: value is None or isinstance(value, str),
    "int | None": lambda value: value is None or _is_integer(value),
    "list[str]": lambda value: isinstance(value, list) and all(isinstance(each, str) for each in value),
}


def made_of(kind: type[T], found: Any) -> T | None:
    """An instance of a dataclass, or None where `found` is not exactly its fields, each of its type.

    The types of its fields are those of `_FITS`; of any other every value is taken, for the caller to look at.
    """
    if not isinstance(found, dict) or found.keys() != {field.name for field in fields(kind)}:  # type: ignore[arg-type]
        return None
    checks = {field.name: _FITS.get(str(field.type)) for field in fields(kind)}  # type: ignore[arg-type]
    fitting = all(check is None or check(found[name]) for name, check in checks.items())
    return kind(**found) if fitting else None
