"""The recipe: mergekit's YAML, read strictly, with every mistake in one error and its line.

What mergekit ignores silently (a misspelt key, a parameter no method has) is a warning here, and an error under
`--strict`. Parts of the language that are still to come are refused by name.
"""

from __future__ import annotations

import copy
import difflib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from pydantic_core import ErrorDetails

from streammerge.base.dtypes import RECIPE_DTYPES
from streammerge.base.errors import InputError, RecipeError
from streammerge.kernels.contract import Method
from streammerge.methods import METHODS
from streammerge.plan.analysis import AnalysisOptions, Decisions
from streammerge.plan.setting import Setting, parse_setting

_MAX_BYTES = 4_000_000
_MAX_NODES = 200_000
_SHOWN = 100
_LATER = ("slices", "modules", "tokenizer", "chat_template", "name")


class _Document(BaseModel):
    """What a recipe may hold. Unknown keys are kept, to be warned of."""

    model_config = ConfigDict(extra="allow", arbitrary_types_allowed=True)


def _settings(content: Any) -> Any:
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ValueError("expected a map from parameter names to values")
    parsed: dict[str, Setting] = {}
    problems = []
    for name, setting in content.items():
        try:
            parsed[str(name)] = parse_setting(setting)
        except ValueError as error:
            problems.append(f"{name}: {error}")
    if problems:
        raise ValueError("; ".join(problems))
    return parsed


class _ModelEntry(_Document):
    model: str
    parameters: dict[str, Any] = Field(default_factory=dict)

    _parse = field_validator("parameters", mode="before")(_settings)


class _Recipe(_Document):
    merge_method: str
    models: list[_ModelEntry] = Field(default_factory=list)
    base_model: str | None = None
    dtype: str | None = None
    out_dtype: str | None = None
    tokenizer_source: str | None = None
    parameters: dict[str, Any] = Field(default_factory=dict)
    tasks: list[Any] | None = None
    proxy: Literal["weights"] | None = None
    decisions: Decisions = "guarded"
    analysis: AnalysisOptions = Field(default_factory=AnalysisOptions)

    _parse = field_validator("parameters", mode="before")(_settings)

    @field_validator("dtype", "out_dtype")
    @classmethod
    def _known_dtype(cls, name: str | None) -> str | None:
        if name is None:
            return None
        dtype = RECIPE_DTYPES.get(name.removeprefix("torch."))
        if dtype is None:
            raise ValueError(f"{name!r} is none of {', '.join(RECIPE_DTYPES)}")
        return dtype


@dataclass(frozen=True)
class Input:
    """One model of the recipe: as written, and the parameters given under it."""

    model: str
    parameters: dict[str, Setting]


@dataclass(frozen=True)
class Recipe:
    """What the user asked for.

    `base` is the base model where the method has one, else None; `models` are the other inputs, in the order that
    counts. `dtype` and `out_dtype` are names of base/dtypes.py. `text` is the file as given. `tasks` is the list under
    that key as it stands (study/tasks.py reads it); `proxy`, `decisions` and `analysis` say how to analyse.
    """

    path: Path
    text: str
    method: Method
    base: Input | None
    models: tuple[Input, ...]
    dtype: str | None
    out_dtype: str | None
    parameters: dict[str, Setting]
    warnings: tuple[str, ...]
    tasks: tuple[Any, ...] | None = None
    proxy: Literal["weights"] | None = None
    decisions: Decisions = "guarded"
    analysis: AnalysisOptions = field(default_factory=AnalysisOptions)

    @property
    def is_analysed(self) -> bool:
        """Whether the parameters are to be found by an analysis before the merge."""
        return self.tasks is not None or self.proxy is not None

    @property
    def inputs(self) -> tuple[Input, ...]:
        """Every input, the base first."""
        return (() if self.base is None else (self.base,)) + self.models


def load_recipe(path: Path, *, strict: bool = False) -> Recipe:
    """Read and check the recipe at `path`. Raises InputError when it is not there, RecipeError for what is in it."""
    try:
        with path.open("rb") as file:
            raw = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise InputError(f"{path}: the recipe cannot be read: {error.strerror}.") from error
    if len(raw) > _MAX_BYTES:
        raise RecipeError(str(path), [f"larger than {_MAX_BYTES} bytes; this is no recipe"])
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecipeError(str(path), [f"not UTF-8 text ({error.reason} at byte {error.start})"]) from None
    return parse_recipe(text, path, strict=strict)


def parse_recipe(text: str, path: Path, *, strict: bool = False) -> Recipe:
    """Check the recipe `text`; `path` names it in errors, and its directory may hold the models it names."""
    content, lines = _read_yaml(text, path)
    try:
        document = _Recipe.model_validate(content)
    except ValidationError as error:
        problems = [_problem(details, lines) for details in error.errors()]
        problems += _problems_of_the_rest(content, [details["loc"] for details in error.errors()], lines)
        raise RecipeError(str(path), problems) from None
    problems, warnings = _Checks(document, lines).run()
    if strict:
        problems, warnings = problems + warnings, []
    if problems:
        raise RecipeError(str(path), problems)
    return _build(document, path, text, warnings)


Place = tuple[str | int, ...]


def _problems_of_the_rest(content: Any, places: list[Place], lines: dict[Place, int]) -> list[str]:
    """What else is wrong with a recipe once the values at `places` are taken out, if it can be read then."""
    if ("models",) in places:
        return []
    rest = copy.deepcopy(content)
    for place in places:
        owner = rest
        for part in place[:-1]:
            owner = owner[part]
        if not isinstance(owner, dict) or place[-1] not in owner:
            return []
        del owner[place[-1]]
    try:
        document = _Recipe.model_validate(rest)
    except ValidationError:
        return []
    return _Checks(document, lines).run()[0]


def _read_yaml(text: str, path: Path) -> tuple[Any, dict[Place, int]]:
    """The content of one YAML document, and the line of every key and item."""
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        if root is None:
            raise RecipeError(str(path), ["the file is empty; a recipe needs at least merge_method and models"])
        lines: dict[Place, int] = {}
        _walk(root, (), lines, path)
        return yaml.safe_load(text), lines
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


def _problem(details: ErrorDetails, lines: dict[Place, int]) -> str:
    place = details["loc"]
    message = details["msg"].removeprefix("Value error, ")
    if details["type"] == "missing":
        message = "is missing"
    elif details["type"] == "string_type":
        message = f"expected text, found {_brief(details['input'])}"
    elif details["type"] in ("list_type", "model_type", "dict_type"):
        kind = "list" if details["type"] == "list_type" else "map"
        message = f"expected a {kind}, found {_brief(details['input'])}"
    return f"{_where(place, lines)}{message}"


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "…"


def _where(place: Place, lines: dict[Place, int]) -> str:
    """`line 7: models[1].parameters: `, with the line of the nearest thing that exists."""
    known = place
    while known and known not in lines:
        known = known[:-1]
    name = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place).lstrip(".")
    return f"line {lines.get(known, 1)}: {name + ': ' if name else ''}"


class _Checks:
    """What a schema cannot say: the method, its parameters, the number of models."""

    def __init__(self, document: _Recipe, lines: dict[Place, int]) -> None:
        self._document, self._lines = document, lines
        self._problems: list[str] = []
        self._warnings: list[str] = []

    def run(self) -> tuple[list[str], list[str]]:
        document = self._document
        self._unknown_keys(document, ())
        for i, entry in enumerate(document.models):
            self._unknown_keys(entry, ("models", i))
            self._reference(entry.model, ("models", i, "model"))
        if document.base_model is not None:
            self._reference(document.base_model, ("base_model",))
        if document.tokenizer_source not in (None, "base"):
            self._problem(("tokenizer_source",), "only `base` works yet; other tokenizers are still to come")
        method = METHODS.get(document.merge_method)
        if method is None:
            self._problem(("merge_method",), f"{document.merge_method!r} is no method here.{self._nearest_method()}")
        else:
            self._parameters(method)
            self._count(method)
            self._analysis(method)
        return self._problems, self._warnings

    def _problem(self, place: Place, message: str) -> None:
        self._problems.append(_where(place, self._lines) + message)

    def _warn(self, place: Place, message: str) -> None:
        self._warnings.append(_where(place, self._lines) + message)

    def _unknown_keys(self, document: _Document, place: Place) -> None:
        known = list(type(document).model_fields)
        for key in document.model_extra or {}:
            if not place and key in _LATER:
                self._problem((key,), "this part of mergekit's language is still to come; it cannot be merged yet")
            else:
                self._warn((*place, key), f"unknown key, ignored.{nearest(key, known)}")

    def _reference(self, model: str, place: Place) -> None:
        if "+" in model and not _exists(_expanded(model)):
            self._problem(place, f"{model!r} names an adapter after `+`; adapters are still to come. Merge it first")

    def _nearest_method(self) -> str:
        return nearest(self._document.merge_method, list(METHODS)) or f" There are {', '.join(METHODS)}."

    def _parameters(self, method: Method) -> None:
        shared = {param.name for param in method.params if not param.per_model}
        known = [param.name for param in method.params]
        groups: list[tuple[Place, dict[str, Setting]]] = [(("parameters",), self._document.parameters)]
        groups += [(("models", i, "parameters"), entry.parameters) for i, entry in enumerate(self._document.models)]
        for place, parameters in groups:
            for name in parameters:
                if name not in known:
                    self._warn((*place, name), f"{method.name} has no such parameter.{nearest(name, known)}")
                elif name in shared and place[0] == "models":
                    self._warn((*place, name), f"has no effect under one model; write {name} under `parameters:`")

    def _analysis(self, method: Method) -> None:
        document = self._document
        given = sorted(document.model_fields_set & {"tasks", "proxy", "decisions", "analysis"})
        if given and method.name != "hi_merging":
            self._warn((given[0],), f"only hi_merging is analysed; {method.name} is merged as it stands")
        elif document.tasks is not None and document.proxy is not None:
            self._problem(("proxy",), "tasks and a proxy for them exclude each other; keep one")
        elif given and document.tasks is None and document.proxy is None:
            self._warn((given[0],), "has no effect without tasks (or `proxy: weights`)")

    def _count(self, method: Method) -> None:
        document = self._document
        names = [entry.model for entry in document.models]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            self._problem(("models",), f"{', '.join(repeated)} is listed more than once")
        if not names:
            self._problem(("models",), "list at least one model")
            return
        if method.base == "required" and document.base_model is None:
            self._problem((), f"{method.name} needs a base_model")
            return
        models = len([name for name in names if method.base == "ignored" or name != document.base_model])
        if method.base == "ignored" and document.base_model is not None and document.base_model not in names:
            models += 1
        if models < method.min_models or (method.max_models is not None and models > method.max_models):
            least, most = method.min_models, method.max_models
            expected = str(least) if least == most else f"at least {least}" if most is None else f"{least} to {most}"
            besides = " besides the base" if method.base == "required" else ""
            self._problem(("models",), f"{method.name} merges {expected} model{'s'[: expected != '1']}{besides}, "
                                       f"found {models}")  # fmt: skip


def nearest(name: str, known: list[str]) -> str:
    """A question after the most similar of the `known` names, or nothing."""
    near = difflib.get_close_matches(name, known, n=1)
    return f" Did you mean {near[0]}?" if near else ""


def _build(document: _Recipe, path: Path, text: str, warnings: list[str]) -> Recipe:
    method = METHODS[document.merge_method]
    models = [Input(entry.model, entry.parameters) for entry in document.models]
    base: Input | None = None
    if document.base_model is not None:
        listed = [model for model in models if model.model == document.base_model]
        base = listed[0] if listed else Input(document.base_model, {})
        if method.base == "required":
            models = [model for model in models if model is not base]
        elif not listed:
            # As mergekit does: a base that the method does not treat as one joins as the last ordinary input.
            models.append(base)
    return Recipe(
        path=path,
        text=text,
        method=method,
        base=base if method.base == "required" else None,
        models=tuple(models),
        dtype=document.dtype,
        out_dtype=document.out_dtype,
        parameters=document.parameters,
        warnings=tuple(warnings),
        tasks=None if document.tasks is None else tuple(document.tasks),
        proxy=document.proxy,
        decisions=document.decisions,
        analysis=document.analysis,
    )


def resolve_model(model: str, recipe_path: Path) -> Path:
    """Where a model named in a recipe is: relative to the working directory, or else to the recipe's own.

    Raises InputError when it is in neither.
    """
    written = _expanded(model)
    for path in [written] if written.is_absolute() else [written, recipe_path.parent / written]:
        if _exists(path):
            return path
    places = f"{Path.cwd()}" if recipe_path.parent.resolve() == Path.cwd() else f"{Path.cwd()} and {recipe_path.parent}"
    hub = " Names on the Hub are still to come: download it first." if model.count("/") == 1 else ""
    raise InputError(f"{recipe_path}: model {model!r} is not there (looked in {places}).{hub}")


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
