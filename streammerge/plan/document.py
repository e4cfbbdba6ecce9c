"""A YAML document that a person wrote: its content, the line of every key, and sentences about what is wrong in it."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict
from pydantic_core import ErrorDetails

from streammerge.base.dtypes import RECIPE_DTYPES
from streammerge.base.errors import RecipeError

_MAX_NODES = 200_000
_SHOWN = 100
# Where something stands: keys, and numbers of items.
Place = tuple[str | int, ...]


class Document(BaseModel):
    """What a document may hold. Unknown keys are kept, to be warned of."""

    model_config = ConfigDict(extra="allow", arbitrary_types_allowed=True)


def known_dtype(name: str | None) -> str | None:
    """The name in base/dtypes.py of a dtype as recipes call it. Raises ValueError with a sentence."""
    if name is None:
        return None
    dtype = RECIPE_DTYPES.get(name.removeprefix("torch."))
    if dtype is None:
        raise ValueError(f"{name!r} is none of {', '.join(RECIPE_DTYPES)}")
    return dtype


def read_yaml(text: str, path: Path) -> list[tuple[Any, dict[Place, int]]]:
    """The content of every YAML document that has any, and the line of every key and item."""
    try:
        numbered = []
        for root in yaml.compose_all(text, Loader=yaml.SafeLoader):
            lines: dict[Place, int] = {}
            _walk(root, (), lines, path)
            numbered.append(lines)
        contents = list(yaml.safe_load_all(text))
        if not any(content is not None for content in contents):
            raise RecipeError(str(path), ["the file is empty; a recipe needs at least merge_method and models"])
        return [pair for pair in zip(contents, numbered, strict=True) if pair[0] is not None]
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise RecipeError(str(path), [f"{line}not YAML: {error.problem or error.context}"]) from None
    except yaml.YAMLError as error:
        raise RecipeError(str(path), [f"not YAML: {error}"]) from None
    except (ValueError, OverflowError, KeyError, AttributeError, TypeError) as error:
        # A scalar that looks like a date or a number and is none: PyYAML has no error of its own for these.
        raise RecipeError(str(path), [f"not YAML: a value cannot be read: {error}"]) from None
    except RecursionError:
        raise RecipeError(str(path), ["nested too deeply"]) from None


def _walk(node: yaml.Node, place: Place, lines: dict[Place, int], path: Path) -> None:
    lines[place] = node.start_mark.line + 1
    # Aliases make a small file large: every visit counts.
    if len(lines) > _MAX_NODES:
        raise RecipeError(str(path), [f"more than {_MAX_NODES} values; this is no recipe"])
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            name = str(key.value)
            if (*place, name) in lines:
                raise RecipeError(str(path), [f"line {key.start_mark.line + 1}: {name!r} is given twice"])
            _walk(value, (*place, name), lines, path)
            lines[(*place, name)] = key.start_mark.line + 1
    elif isinstance(node, yaml.SequenceNode):
        for i, item in enumerate(node.value):
            _walk(item, (*place, i), lines, path)


def problem_text(details: ErrorDetails, lines: dict[Place, int]) -> str:
    """What pydantic found wrong, as a sentence with its line."""
    place = details["loc"]
    message = details["msg"].removeprefix("Value error, ")
    if details["type"] == "missing":
        message = "is missing"
    elif details["type"] == "string_type":
        message = f"expected text, found {_brief(details['input'])}"
    elif details["type"] in ("list_type", "model_type", "dict_type"):
        kind = "list" if details["type"] == "list_type" else "map"
        message = f"expected a {kind}, found {_brief(details['input'])}"
    return f"{where(place, lines)}{message}"


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "…"


def where(place: Place, lines: dict[Place, int]) -> str:
    """`line 7: models[1].parameters: `, with the line of the nearest thing that exists."""
    known = place
    while known and known not in lines:
        known = known[:-1]
    name = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place).lstrip(".")
    return f"line {lines.get(known, 1)}: {name + ': ' if name else ''}"


def nearest(name: str, known: list[str]) -> str:
    """A question after the most similar of the `known` names, or nothing."""
    near = difflib.get_close_matches(name, known, n=1)
    return f" Did you mean {near[0]}?" if near else ""
