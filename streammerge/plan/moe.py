"""A recipe that makes experts of dense models: mergekit-moe's YAML, read as strictly as any other recipe.

base_model: models/base            # attention, norms, embedding and head
gate_mode: cheap_embed             # or random
dtype: bfloat16
experts_per_token: 2
experts:
  - source_model: models/math      # its MLPs
    positive_prompts: ["solve this equation", "how many"]
    negative_prompts: ["write a poem"]
    residual_scale: 0.9            # times the last matrix of its MLPs
    noise_scale: 0.001             # normal noise of that deviation, in all three
shared_experts: []                 # one for Qwen2-MoE
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, Field, ValidationError, field_validator

from streammerge.base.dtypes import DTYPES
from streammerge.base.errors import RecipeError
from streammerge.methods.passthrough import PASSTHROUGH
from streammerge.plan.architecture import ARCHITECTURES, architecture_named
from streammerge.plan.document import Document, Place, known_dtype, nearest, problem_text, where
from streammerge.plan.reference import parse_reference, reference_text

Gates = Literal["cheap_embed", "random"]

# What the stage of such a recipe does: weights go where they belong, as they are.
MOE = replace(PASSTHROUGH, name="moe", params=(), doc=__doc__)

# What mergekit's other gates would take, and what does instead.
_OTHER_GATES = {
    "hidden": "needs the base model to run over the prompts, which is not done here; write cheap_embed, which reads "
              "the prompts' rows of its embedding",
    "uniform_random": "is not made here; write random, whose numbers are normal",
}  # fmt: skip
_OTHER_GATES |= dict.fromkeys(("hidden_avg", "hidden_last"), _OTHER_GATES["hidden"])


@dataclass(frozen=True)
class Expert:
    """A model whose MLPs become an expert. `place` is its line and name in the recipe, for messages about it."""

    model: str
    positive: tuple[str, ...]
    negative: tuple[str, ...]
    scale: float
    noise: float
    place: str


@dataclass(frozen=True)
class Moe:
    """What is asked for. `architecture` is a name of plan/architecture.py, `dtype` one of base/dtypes.py, or None."""

    base: str
    gates: Gates
    experts: tuple[Expert, ...]
    shared: tuple[Expert, ...]
    per_token: int
    architecture: str | None
    dtype: str | None

    @property
    def sources(self) -> tuple[str, ...]:
        """The models that experts are made of, each once."""
        return tuple(dict.fromkeys(expert.model for expert in (*self.experts, *self.shared)))


class _Expert(Document):
    source_model: str
    positive_prompts: list[str] = Field(default_factory=list)
    negative_prompts: list[str] = Field(default_factory=list)
    residual_scale: float | None = Field(default=None, allow_inf_nan=False)
    noise_scale: float | None = Field(default=None, ge=0, allow_inf_nan=False)

    _path = field_validator("source_model", mode="before")(reference_text)


class _Moe(Document):
    base_model: str
    gate_mode: str | None = None
    experts: list[_Expert]
    shared_experts: list[_Expert] | None = None
    experts_per_token: int = Field(default=2, ge=1)
    architecture: str | None = None
    dtype: str | None = None

    _path = field_validator("base_model", mode="before")(reference_text)
    _dtype = field_validator("dtype")(known_dtype)


def is_moe(content: Any) -> bool:
    """Whether a document is such a recipe: it lists experts."""
    return isinstance(content, dict) and "experts" in content


def read_moe(content: Any, lines: dict[Place, int], path: Path, *, strict: bool) -> tuple[Moe, list[str]]:
    """What a document says, and warnings. Raises RecipeError with every mistake; if `strict`, warnings are some."""
    try:
        form = _Moe.model_validate(content)
    except ValidationError as error:
        raise RecipeError(str(path), [problem_text(details, lines) for details in error.errors()]) from None
    checks = _Checks(form, lines, path)
    checks.run()
    problems = [*checks.problems, *(checks.warnings if strict else ())]
    if problems:
        raise RecipeError(str(path), problems)
    gates: Gates = "random" if form.gate_mode == "random" else "cheap_embed"
    named = None if form.architecture is None else architecture_named(form.architecture)
    made = {
        key: tuple(_expert(each, where((key, i), lines)) for i, each in enumerate(getattr(form, key) or ()))
        for key in ("experts", "shared_experts")
    }
    moe = Moe(form.base_model, gates, made["experts"], made["shared_experts"], form.experts_per_token,
              None if named is None else named.name, form.dtype)  # fmt: skip
    return moe, checks.warnings


def _expert(form: _Expert, place: str) -> Expert:
    scale = 1.0 if form.residual_scale is None else form.residual_scale
    return Expert(form.source_model, tuple(form.positive_prompts), tuple(form.negative_prompts), scale,
                  form.noise_scale or 0.0, place)  # fmt: skip


class _Checks:
    """What a schema cannot say."""

    def __init__(self, form: _Moe, lines: dict[Place, int], path: Path) -> None:
        self._form, self._lines, self._path = form, lines, path
        self.problems: list[str] = []
        self.warnings: list[str] = []

    def run(self) -> None:
        form = self._form
        self._unknown_keys(form, ())
        self._reference(form.base_model, ("base_model",))
        self._gates()
        if form.architecture is not None and architecture_named(form.architecture) is None:
            known = ", ".join(ARCHITECTURES)
            self._problem(("architecture",), f"{form.architecture!r} is none that is made here; there are {known}")
        if form.dtype is not None and DTYPES[form.dtype].bits == 8:
            self._problem(("dtype",), "experts are made in no 8 bits; write bfloat16, and store the result in 8 bits "
                                      "by a recipe of passthrough with an out_dtype")  # fmt: skip
        if len(form.experts) < 2:
            self._problem(("experts",), f"a router chooses among two at least, found {len(form.experts)}")
        if form.experts_per_token > len(form.experts) >= 2:
            self._problem(("experts_per_token",), f"is {form.experts_per_token}, and there are {len(form.experts)} "
                                                  f"experts")  # fmt: skip
        for i, expert in enumerate(form.experts):
            self._expert(expert, ("experts", i))
            if form.gate_mode == "cheap_embed" and not expert.positive_prompts:
                self._problem(("experts", i), "positive_prompts is missing: with gate_mode: cheap_embed the router "
                                              "knows an expert by them")  # fmt: skip
        for i, expert in enumerate(form.shared_experts or ()):
            self._expert(expert, ("shared_experts", i))
            if expert.negative_prompts and not expert.positive_prompts:
                self._problem(("shared_experts", i), "has negative_prompts, and no positive_prompts")
        if form.gate_mode == "random" and any(each.positive_prompts or each.negative_prompts for each in self._all()):
            self._warn(("gate_mode",), "with random gates the prompts have no effect")

    def _all(self) -> list[_Expert]:
        return [*self._form.experts, *(self._form.shared_experts or ())]

    def _gates(self) -> None:
        asked, known = self._form.gate_mode, get_args(Gates)
        if asked is None:
            self._problem(("gate_mode",), f"is missing; mergekit's default, hidden, {_OTHER_GATES['hidden']}")
        elif asked in _OTHER_GATES:
            self._problem(("gate_mode",), f"{asked} {_OTHER_GATES[asked]}")
        elif asked not in known:
            self._problem(("gate_mode",), f"{asked!r} is none of {', '.join(known)}.{nearest(asked, list(known))}")

    def _expert(self, expert: _Expert, place: Place) -> None:
        self._unknown_keys(expert, place)
        self._reference(expert.source_model, (*place, "source_model"))
        for key in ("positive_prompts", "negative_prompts"):
            for i, prompt in enumerate(getattr(expert, key)):
                if not prompt.strip():
                    self._problem((*place, key, i), "is empty; a prompt needs a word")

    def _reference(self, model: str, place: Place) -> None:
        try:
            parse_reference(model, self._path)
        except ValueError as error:
            self._problem(place, str(error))

    def _unknown_keys(self, form: BaseModel, place: Place) -> None:
        for key in form.model_extra or {}:
            if key == "merge_method":
                self._problem((*place, key), "a recipe with `experts:` has no merge_method; keep one of the two")
                continue
            self._warn((*place, key), f"unknown key, ignored.{nearest(key, list(type(form).model_fields))}")

    def _problem(self, place: Place, message: str) -> None:
        self.problems.append(where(place, self._lines) + message)

    def _warn(self, place: Place, message: str) -> None:
        self.warnings.append(where(place, self._lines) + message)
