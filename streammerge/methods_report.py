"""What the merge methods say about themselves, as tables and as docs/methods.md. Facts in, text out."""

from __future__ import annotations

from typing import Any

from streammerge.kernels.contract import Method, Param, Settings, Value
from streammerge.methods import METHODS

Rows = list[tuple[str, str]]
# More than can be cut in one look.
_MANY_ELEMENTS = 1 << 40
# What parameters are set to, to see how often a method that sparsifies reads its inputs.
_SPARSE = {"density": 0.5, "select_topk": 0.5, "density_scope": "tensor"}


def method_list() -> Rows:
    """Every method's name and first sentence."""
    return [(name, _first_sentence(method)) for name, method in METHODS.items()]


def method_rows(method: Method) -> Rows:
    """One method but for its text and parameters."""
    return [
        ("base_model", {"required": "required", "ignored": "joins as one of the models, if named",
                        "optional": "deltas are measured from it, if named"}[method.base]),
        ("models", _count(method)),
        ("passes", _passes(method)),
    ]  # fmt: skip


def method_text(method: Method) -> str:
    """Its docstring: formula, rules at the edges, source."""
    return method.doc.strip()


def parameter_table(method: Method) -> list[tuple[str, ...]]:
    """The parameters: name, kind, default, where it goes, meaning; the first row names the columns."""
    rows = [(param.name, _kind(param), _default(param), _where(param), param.meaning) for param in method.params]
    return [("parameter", "type", "default", "given", "meaning"), *rows]


def method_json(method: Method) -> dict[str, Any]:
    """One method whole."""
    return {
        "name": method.name,
        "text": method_text(method),
        "base_model": method.base,
        "min_models": method.min_models,
        "max_models": method.max_models,
        "passes": _pass_counts(method),
        "parameters": [
            {"name": param.name, "type": _kind(param), "default": param.default, "per_model": param.per_model,
             "required": param.default is None and not param.optional, "meaning": param.meaning}
            for param in method.params
        ],
    }  # fmt: skip


def methods_page() -> str:
    """docs/methods.md."""
    lines = [
        "# The merge methods",
        "",
        "Written by `streammerge methods --markdown` from the methods; a test keeps it current. One of them:",
        "`streammerge methods ties`. `passes` is how often inputs that do not stay in memory are read.",
        "",
        "| method | what it does |",
        "|---|---|",
        *(f"| [{name}](#{name}) | {_cell(text)} |" for name, text in method_list()),
    ]
    for name, method in METHODS.items():
        lines += ["", f"## {name}", "", _as_markdown(method_text(method)), ""]
        lines += [f"- **{label}**: {text}" for label, text in method_rows(method)]
        table = parameter_table(method)
        if len(table) > 1:
            lines += ["", f"| {' | '.join(table[0])} |", "|---" * len(table[0]) + "|"]
            lines += [f"| {' | '.join(_cell(text) for text in row)} |" for row in table[1:]]
    return "\n".join(lines) + "\n"


def _as_markdown(text: str) -> str:
    """A docstring: indented lines are formulas, and stay as they are."""
    return text.replace("_", "\\_") if "    " not in text else "\n".join(
        line if line.startswith("    ") else line.replace("_", "\\_") for line in text.splitlines()
    )  # fmt: skip


def _first_sentence(method: Method) -> str:
    text = " ".join(method_text(method).split("\n\n")[0].split())
    return text if ". " not in text else text[: text.index(". ") + 1]


def _kind(param: Param) -> str:
    return {"number": "number", "integer": "whole number", "boolean": "true or false",
            "text": " or ".join(param.choices)}[param.kind]  # fmt: skip


def _default(param: Param) -> str:
    if param.default is None:
        return "none" if param.optional else "required"
    return _value(param.default)


def _value(value: Value) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return value if isinstance(value, str) else f"{value:g}"


def _where(param: Param) -> str:
    where = "for each model, or for all" if param.per_model else "under parameters"
    return where if param.vectors else f"{where}; not for vectors"


def _count(method: Method) -> str:
    least, most = method.min_models, method.max_models
    count = "any number" if (least, most) == (0, None) else f"{least} or more" if most is None else str(least)
    if most not in (None, least):
        count = f"{least} to {most}"
    return f"{count}, the base not counted" if method.base != "ignored" else count


def _passes(method: Method) -> str:
    low, high = _pass_counts(method)
    return str(low) if low == high else f"{low} to {high}"


def _pass_counts(method: Method) -> tuple[int, int]:
    """The fewest and the most, for 16-bit and 32-bit inputs, small and large, all of the deltas or a part of them."""
    found = []
    for sparse in ({}, _SPARSE):
        settings = _settings(method, sparse)
        surveyed = method.survey_passes * (method.scope(settings) != "tensor")
        found += [method.passes(settings, narrow, elements) + surveyed
                  for narrow in (True, False) for elements in (1, _MANY_ELEMENTS)]  # fmt: skip
    return min(found), max(found)


def _settings(method: Method, values: dict[str, Any]) -> Settings:
    models = max(2, method.min_models) if method.max_models is None else method.max_models
    resolved = {param.name: values.get(param.name, _stand_in(param)) for param in method.params}
    return Settings(
        {param.name: resolved[param.name] for param in method.params if not param.per_model},
        {param.name: (resolved[param.name],) * models for param in method.params if param.per_model},
    )


def _stand_in(param: Param) -> Value | None:
    return 0.5 if param.default is None and not param.optional else param.default


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
