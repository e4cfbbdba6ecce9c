"""A parameter as a recipe writes it, and the value it has for one tensor.

A setting is a scalar, a gradient (a list of scalars spread over the layers), a mapping {filter, value}, or a list of
such mappings. A filter is a plain substring of one of the tensor's names; the first entry that matches wins.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from streammerge.kernels.contract import Param, Value
from streammerge.plan.names import answers_to

Scalar = float | int | bool | str


@dataclass(frozen=True)
class Entry:
    """One alternative: `values` is a gradient of at least one scalar; a filter of None or "*" matches every name."""

    filter: str | None
    values: tuple[Scalar, ...]

    def matches(self, name: str) -> bool:
        if self.filter is None or self.filter == "*":
            return True
        return answers_to(name, self.filter)


Setting = tuple[Entry, ...]


def parse_setting(content: Any) -> Setting:
    """The setting that a recipe holds. Raises ValueError with one sentence."""
    if isinstance(content, dict):
        return (_mapping(content),)
    if isinstance(content, list):
        if any(isinstance(item, dict) for item in content):
            if not all(isinstance(item, dict) for item in content):
                raise ValueError("a list holds either numbers or {filter, value} mappings, not both")
            return tuple(_mapping(item) for item in content)
        return (Entry(None, _values(content)),) if content else ()
    return (Entry(None, _values(content)),)


def value_at(setting: Setting, name: str, position: float, param: Param) -> Value | None:
    """The value for tensor `name` at `position` (0 the first layer, 1 the last), or None if no entry matches.

    Numbers are interpolated along a gradient, booleans and texts step. Raises ValueError for a scalar of a wrong
    type.
    """
    for entry in setting:
        if entry.matches(name):
            values = [_typed(value, param) for value in entry.values]
            if param.kind in ("boolean", "text"):
                return values[int(position * (len(values) - 1))]
            number = _interpolate([float(value) for value in values], position)
            if param.kind == "integer" and not number.is_integer():
                raise ValueError(f"expected a whole number, found {number:g}")
            return number
    return None


def _interpolate(values: list[float], position: float) -> float:
    scaled = position * (len(values) - 1)
    first = math.floor(scaled)
    second = min(len(values) - 1, first + 1)
    share = scaled - first
    return (1 - share) * values[first] + share * values[second] if share else values[first]


def _mapping(content: dict[Any, Any]) -> Entry:
    unknown = [key for key in content if key not in ("filter", "value")]
    if unknown or "value" not in content:
        raise ValueError(f"expected {{filter: …, value: …}}, found the keys {', '.join(map(str, content)) or 'none'}")
    name = content.get("filter")
    if name is not None and not isinstance(name, str):
        raise ValueError(f"filter must be text, found {name!r}")
    return Entry(name, _values(content["value"]))


def _values(content: Any) -> tuple[Scalar, ...]:
    values = content if isinstance(content, list) else [content]
    if not values:
        raise ValueError("an empty list has no value")
    for value in values:
        if not isinstance(value, float | int | bool | str):
            raise ValueError(f"expected a number, true or false, found {value!r}")
    return tuple(values)


def _typed(value: Scalar, param: Param) -> Value:
    if param.kind == "text":
        if value in param.choices:
            return value
        raise ValueError(f"expected {' or '.join(param.choices)}, found {value!r}")
    if param.kind == "boolean":
        if isinstance(value, bool) or value in (0, 1):
            return bool(value)
        raise ValueError(f"expected true or false, found {value!r}")
    if isinstance(value, bool) and param.kind == "integer":
        raise ValueError(f"expected a whole number, found {value!r}")
    # YAML 1.1 reads 1e-5, without a dot, as text.
    try:
        number = float(value)
    except (ValueError, OverflowError):
        raise ValueError(f"expected a number, found {value!r}") from None
    if not math.isfinite(number):
        raise ValueError(f"expected a finite number, found {value!r}")
    return number
