"""How a recipe names a model: a path or a name on the Hub, a revision, an adapter: `path@revision+adapter`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streammerge.base.errors import InputError


@dataclass(frozen=True)
class Reference:
    """A model and, if one is named, the adapter that is folded into it. A `revision` is a branch, tag or commit."""

    model: str
    revision: str | None = None
    adapter: str | None = None
    adapter_revision: str | None = None


def parse_reference(text: str, recipe_path: Path) -> Reference:
    """What `text` names. A path that exists is taken whole, whatever `+` and `@` are in it.

    Raises ValueError with a sentence.
    """
    if find_local(text, recipe_path) is not None:
        return Reference(text)
    # The first `+` whose both sides can stand: a path that exists may have others in it.
    places = [i for i, letter in enumerate(text) if letter == "+"]
    place = next((i for i in places if find_local(text[:i], recipe_path) is not None), places[0] if places else None)
    if place is None:
        return Reference(*_split(text, recipe_path))
    model, adapter = text[:place], text[place + 1 :]
    if "+" in adapter and find_local(adapter, recipe_path) is None:
        raise ValueError(f"{text!r} names several adapters; one can be folded in. Merge the others one after the other")
    if not model or not adapter:
        raise ValueError(f"{text!r} names nothing {'before' if not model else 'after'} `+`")
    return Reference(*_split(model, recipe_path), *_split(adapter, recipe_path))


def find_local(model: str, recipe_path: Path) -> Path | None:
    """A path as written in a recipe, relative to the working directory, or else to the recipe's own; None if absent."""
    written = _expanded(model)
    for path in [written] if written.is_absolute() else [written, recipe_path.parent / written]:
        if model and _exists(path):
            return path
    return None


def resolve_local(model: str, recipe_path: Path) -> Path:
    """The same. Raises InputError when it is in neither place."""
    path = find_local(model, recipe_path)
    if path is not None:
        return path
    places = f"{Path.cwd()}" if recipe_path.parent.resolve() == Path.cwd() else f"{Path.cwd()} and {recipe_path.parent}"
    raise InputError(f"{recipe_path}: model {model!r} is not there (looked in {places}).")


def _split(text: str, recipe_path: Path) -> tuple[str, str | None]:
    """A name and its revision."""
    if "@" not in text or find_local(text, recipe_path) is not None:
        return text, None
    name, _, revision = text.partition("@")
    if "@" in revision or not name or not revision:
        raise ValueError(f"{text!r}: expected one name and one revision around a single `@`")
    return name, revision


def _expanded(model: str) -> Path:
    try:
        return Path(model).expanduser()
    except RuntimeError:
        # `~name` of nobody known here.
        return Path(model)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):
        # A name that no file can have, or a directory nobody may look into.
        return False


def reference_text(content: Any) -> Any:
    """mergekit's map {model: {path, revision}, lora: {path, revision}} as text: `path@revision+path@revision`.

    What is no map is given back as it is. Raises ValueError with a sentence.
    """
    if not isinstance(content, dict):
        return content
    inner = content.get("model", content)
    text = _named(inner)
    if content.get("lora") is not None:
        text += f"+{_named(content['lora'])}"
    return text


def _named(content: Any) -> str:
    """A path, or a map of a path and a revision, as text."""
    path, revision = (content.get("path"), content.get("revision")) if isinstance(content, dict) else (content, None)
    if not isinstance(path, str) or not isinstance(revision, str | None):
        raise ValueError("expected a path, or a map {model: {path: …, revision: …}, lora: {path: …}}")
    return path if revision is None else f"{path}@{revision}"
