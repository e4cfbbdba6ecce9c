"""What a recipe says of the output's tokenizer: whose tokens it has, and where the rows of some of them come from.

tokenizer:
  source: union                        # or base, or one of the models
  tokens:
    <|im_start|>: {source: a/model}    # in models that lack it; with `force: true` in all
    <|new|>: {source: {kind: model_token, model: a/model, token: <s>}}
    <|empty|>: {source: {kind: zero}}
  pad_to_multiple_of: 64
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

from streammerge.plan.reference import reference_text

_KINDS = ("zero", "model_token")


@dataclass(frozen=True)
class RowSource:
    """Where a row comes from: a model's row of `token` (text, or an id; None is the same token); zeros without one."""

    model: str | None
    token: str | int | None = None


@dataclass(frozen=True)
class TokenRule:
    """The row of one token in models that lack it, or with `force` in all. Without a source, the usual one."""

    source: RowSource | None
    force: bool = False


@dataclass(frozen=True)
class Tokenizer:
    """The output's tokenizer: `source` is "union", "base" or a model of the recipe; rules go by token."""

    source: str = "union"
    rules: Mapping[str, TokenRule] = field(default_factory=dict)
    multiple: int | None = None

    @property
    def models(self) -> set[str]:
        """The models it names."""
        rows = [rule.source.model for rule in self.rules.values() if rule.source is not None]
        return {model for model in rows if model is not None} | ({self.source} - {"union", "base"})


class TokenForm(BaseModel):
    """A token's rule as a recipe has it."""

    model_config = ConfigDict(extra="allow", arbitrary_types_allowed=True)

    source: RowSource | None = None
    force: bool = False

    @field_validator("source", mode="before")
    @classmethod
    def _parse(cls, content: Any) -> RowSource | None:
        if not isinstance(content, dict) or "kind" not in content:
            return None if content is None else RowSource(str(_model(content)))
        kind, rest = content["kind"], {key: value for key, value in content.items() if key != "kind"}
        if kind not in _KINDS:
            raise ValueError(f"{kind!r} is no kind of source; there are {' and '.join(_KINDS)}, or name a model")
        known = () if kind == "zero" else ("model", "token", "token_id")
        if strange := sorted(set(rest) - set(known)):
            raise ValueError(f"{kind} has no {', '.join(map(str, strange))}")
        if kind == "zero":
            return RowSource(None)
        given = [key for key in ("token", "token_id") if rest.get(key) is not None]
        if len(given) != 1 or "model" not in rest:
            raise ValueError("model_token needs a model, and either token or token_id")
        token = rest[given[0]]
        if given == ["token"] and not isinstance(token, str):
            raise ValueError(f"token is {token!r}, not text; an id is written as token_id")
        if given == ["token_id"] and (isinstance(token, bool) or not isinstance(token, int) or token < 0):
            raise ValueError(f"token_id is {token!r}, not the number of a row")
        return RowSource(str(_model(rest["model"])), token)


class TokenizerForm(BaseModel):
    """The map under `tokenizer:`."""

    model_config = ConfigDict(extra="allow")

    source: str = "union"
    tokens: dict[str, TokenForm] = Field(default_factory=dict)
    pad_to_multiple_of: int | None = Field(default=None, ge=1, le=1 << 20)

    _text = field_validator("source", mode="before")(reference_text)

    def read(self) -> Tokenizer:
        """What it says."""
        rules = {token: TokenRule(form.source, form.force) for token, form in self.tokens.items()}
        return Tokenizer(self.source, rules, self.pad_to_multiple_of)


def _model(content: Any) -> Any:
    text = reference_text(content)
    if not isinstance(text, str):
        raise ValueError("expected a model, {kind: zero}, or {kind: model_token, model: …, token: …}")
    return text
