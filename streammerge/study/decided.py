"""The recipe an analysis ends with: an ordinary one, which a person can read, edit and run without data."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from streammerge.plan.recipe import Recipe
from streammerge.plan.reference import find_local, parse_reference


def decided_recipe(recipe: Recipe, parameters: Sequence[Mapping[str, Any]], comments: Mapping[str, str],
                   heading: Sequence[str], out: Path) -> str:  # fmt: skip
    """The text of the recipe at `out`. `parameters` are one map per model; `comments` belong to filters.

    Keys of the analysis are left out, everything else is as in `recipe`. Models are named so that they are found from
    where the new recipe lies.
    """
    content = yaml.safe_load(recipe.text)
    lines = [f"# {line}".rstrip() for line in heading]
    lines.append("merge_method: hi_merging")
    part = recipe.only
    if part.base is not None:
        lines.append(_field("base_model", _reference(part.base.model, recipe.path, out)))
    lines.append("models:")
    if part.base is not None and part.base.model in recipe.last.names:
        lines += _named_entry(recipe, part.base.model, out)
    for source, own in zip(part.models, parameters, strict=True):
        lines += [*_named_entry(recipe, source.model, out), "    parameters:"]
        for name, value in own.items():
            if not isinstance(value, list):
                lines.append(f"      {_field(name, value)}")
                continue
            lines.append(f"      {name}:")
            for entry in value:
                text = f"        - {_flow(entry)}"
                comment = comments.get(str(entry.get("filter")))
                lines.append(text if comment is None else f"{text}  # {comment}")
    shared = {
        name: value
        for name, value in (content.get("parameters") or {}).items()
        if name not in ("weight", "density", "scale")
    }
    if shared:
        lines.append(_field("parameters", shared))
    for key in ("dtype", "out_dtype", "chat_template"):
        if key in content:
            lines.append(_field(key, content[key]))
    if (tokenizer := recipe.last.tokenizer) is not None:
        # It changes no ids, or there would have been no analysis: so its source is all that counts.
        named = (
            tokenizer.source
            if tokenizer.source in ("union", "base")
            else _reference(tokenizer.source, recipe.path, out)
        )
        lines.append(_field("tokenizer_source", named))
    return "\n".join(lines) + "\n"


def _named_entry(recipe: Recipe, model: str, out: Path) -> list[str]:
    """A model of the list, with its names where it has any."""
    names = recipe.last.names.get(model)
    lines = [f"  - {_field('model', _reference(model, recipe.path, out))}"]
    return lines if names is None else [*lines, f"    {_field('names', dict(names))}"]


def _reference(model: str, recipe: Path, out: Path) -> str:
    """How the recipe at `out` names a model of `recipe`: as it was where that is found, else by its full path."""
    if Path(model).expanduser().is_absolute() or out.parent.resolve() == recipe.parent.resolve():
        return model
    reference = parse_reference(model, recipe)
    parts = [(reference.model, reference.revision), (reference.adapter, reference.adapter_revision)]
    return "+".join(_named(name, revision, recipe) for name, revision in parts if name is not None)


def _named(name: str, revision: str | None, recipe: Path) -> str:
    """A path in full, a name on the Hub as it was."""
    local = find_local(name, recipe)
    if local is not None:
        return os.fspath(local.resolve())
    return name if revision is None else f"{name}@{revision}"


def _field(name: str, value: Any) -> str:
    return f"{name}: {_flow(value)}"


def _flow(value: Any) -> str:
    text: str = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10**6, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")
