"""Chat templates: those that a recipe may name, and what can be one."""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib.resources import files

NAMES = ("alpaca", "chatml", "exaone", "llama3", "mistral")
AUTO = "auto"
# A name that was misspelt is no template, however well it parses.
_SHORTEST = 20
# A tag of transformers that says nothing about the text.
_GENERATION = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")
# Tokens as templates write them: <|im_end|>, [INST].
_MARKS = re.compile(r"<\|[^|<>\s]+\|>|\[\|[^|\s]+\|\]|\[/?INST\]")


def check_template(text: str) -> None:
    """Raise ValueError with a sentence when `text` is neither the name of a template nor one."""
    if text == AUTO or text in NAMES:
        return
    if len(text) < _SHORTEST or "{" not in text:
        raise ValueError(f"{text!r} is no template: write {AUTO}, {', '.join(NAMES)}, or a template itself (Jinja)")
    # Here, as reading a recipe without a template should not wait for it.
    from jinja2 import Environment, TemplateSyntaxError

    try:
        Environment(extensions=["jinja2.ext.loopcontrols"]).parse(_GENERATION.sub("", text))  # noqa: S701 - not run
    except TemplateSyntaxError as error:
        raise ValueError(f"is no template that Jinja can read: {error.message} (line {error.lineno} of it)") from None
    except RecursionError:
        raise ValueError("is no template: nested too deeply") from None


def template_named(name: str) -> str:
    """The text of one of `NAMES`."""
    return (files("streammerge.plan") / "templates" / f"{name}.jinja").read_text(encoding="utf-8")


def marks_of(template: str) -> list[str]:
    """The words of a template that look like tokens, each once."""
    return list(dict.fromkeys(_MARKS.findall(template)))


def most_common(templates: Sequence[str]) -> str | None:
    """The template that most models have, of equal ones the first; None when there is none."""
    return max(dict.fromkeys(templates), key=templates.count, default=None)
