"""The recipe: mergekit's YAML, read strictly, with every mistake in one error and its line.

What mergekit ignores silently (a misspelt key, a parameter no method has) is a warning here, and an error under
`--strict`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field, ValidationError, field_validator

from streammerge.base.dtypes import DTYPES
from streammerge.base.errors import InputError, RecipeError
from streammerge.kernels.contract import Method
from streammerge.methods import METHODS
from streammerge.plan.analysis import AnalysisOptions, Decisions
from streammerge.plan.document import Document, Place, known_dtype, nearest, problem_text, read_yaml, where
from streammerge.plan.moe import MOE, Moe, is_moe, read_moe
from streammerge.plan.reference import parse_reference, reference_text
from streammerge.plan.setting import Setting, parse_setting
from streammerge.plan.template import check_template
from streammerge.plan.tokenizer import Tokenizer, TokenizerForm

_MAX_BYTES = 4_000_000
# A chain of 400 works; one of 1,200 is deeper than Python's stack.
_MAX_DOCUMENTS = 300


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


class _Source(Document):
    model: str
    layer_range: tuple[int, int] | None = None
    names: dict[str, str] = Field(default_factory=dict)
    parameters: dict[str, Any] = Field(default_factory=dict)

    _parse = field_validator("parameters", mode="before")(_settings)
    _path = field_validator("model", mode="before")(reference_text)

    @field_validator("layer_range")
    @classmethod
    def _in_order(cls, layers: tuple[int, int] | None) -> tuple[int, int] | None:
        if layers is not None and not 0 <= layers[0] < layers[1]:
            raise ValueError(f"[{layers[0]}, {layers[1]}] holds no layers; it is half open, [0, 32] are layers 0 to 31")
        return layers


class _Slice(Document):
    sources: list[_Source]
    base_model: str | None = None
    residual_weight: Any = None
    parameters: dict[str, Any] = Field(default_factory=dict)

    _parse = field_validator("parameters", mode="before")(_settings)
    _path = field_validator("base_model", mode="before")(reference_text)


class _Module(Document):
    models: list[_Source] = Field(default_factory=list)
    slices: list[_Slice] = Field(default_factory=list)
    parameters: dict[str, Any] = Field(default_factory=dict)

    _parse = field_validator("parameters", mode="before")(_settings)


class _Recipe(Document):
    merge_method: str
    name: str | None = None
    models: list[_Source] = Field(default_factory=list)
    slices: list[_Slice] = Field(default_factory=list)
    modules: dict[str, _Module] = Field(default_factory=dict)
    base_model: str | None = None
    dtype: str | None = None
    out_dtype: str | None = None
    tokenizer_source: str | None = None
    tokenizer: TokenizerForm | None = None
    chat_template: str | None = None
    parameters: dict[str, Any] = Field(default_factory=dict)
    tasks: list[Any] | None = None
    proxy: Literal["weights"] | None = None
    decisions: Decisions = "guarded"
    analysis: AnalysisOptions = Field(default_factory=AnalysisOptions)

    _parse = field_validator("parameters", mode="before")(_settings)
    _path = field_validator("base_model", "tokenizer_source", mode="before")(reference_text)
    _dtype = field_validator("dtype", "out_dtype")(known_dtype)

    @field_validator("chat_template")
    @classmethod
    def _can_be_read(cls, text: str | None) -> str | None:
        if text is not None:
            check_template(text)
        return text


Parameters = dict[str, Setting]


@dataclass(frozen=True)
class Input:
    """One model of the recipe: as written, the parameters given under it, and its layers, start and stop, or all."""

    model: str
    parameters: Parameters
    layers: tuple[int, int] | None = None


@dataclass(frozen=True)
class Slice:
    """Some layers of the output, or all of it.

    `base` is the base model where the method has one, else None; `models` are the other inputs, in the order that
    counts.
    """

    base: Input | None
    models: tuple[Input, ...]
    parameters: Parameters = field(default_factory=dict)

    @property
    def inputs(self) -> tuple[Input, ...]:
        """Every input, the base first."""
        return (() if self.base is None else (self.base,)) + self.models


@dataclass(frozen=True)
class Module:
    """A part of the model that is merged in its own way; `name` is None for all of it. Its slices follow each other."""

    name: str | None
    slices: tuple[Slice, ...]
    parameters: Parameters = field(default_factory=dict)


@dataclass(frozen=True)
class Stage:
    """One document of a recipe: a merge, whose result others may use by its name.

    `dtype` and `out_dtype` are names of base/dtypes.py. `donor` is the model whose config it takes, and whose tokenizer
    if there is none of its own. `base` is the base model as written, whatever the method makes of it. `names` are the
    models whose tensors are called otherwise than the output's: for each how its names begin, and what begins the
    output's in place of that.
    """

    name: str | None
    method: Method
    donor: str
    modules: tuple[Module, ...]
    dtype: str | None
    out_dtype: str | None
    parameters: Parameters
    base: str | None = None
    tokenizer: Tokenizer | None = None
    names: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    @property
    def inputs(self) -> list[str]:
        """The models it names, each once, the donor first."""
        named = [source.model for module in self.modules for part in module.slices for source in part.inputs]
        return list(dict.fromkeys([self.donor, *named]))


@dataclass(frozen=True)
class Recipe:
    """What the user asked for: `stages` in the order in which they need each other; the last one is what is written.

    `text` is the file as given. `chat_template` is the name of one, "auto", or one itself. `tasks` is the list under
    that key as it stands (study/tasks.py reads it); `proxy`, `decisions` and `analysis` say how to analyse. `moe` is
    what a recipe says that makes experts of dense models.
    """

    path: Path
    text: str
    stages: tuple[Stage, ...]
    warnings: tuple[str, ...]
    chat_template: str | None = None
    tasks: tuple[Any, ...] | None = None
    proxy: Literal["weights"] | None = None
    decisions: Decisions = "guarded"
    analysis: AnalysisOptions = field(default_factory=AnalysisOptions)
    moe: Moe | None = None

    @property
    def is_analysed(self) -> bool:
        """Whether the parameters are to be found by an analysis before the merge."""
        return self.tasks is not None or self.proxy is not None

    @property
    def last(self) -> Stage:
        """The stage that is written."""
        return self.stages[-1]

    @property
    def method(self) -> Method:
        return self.last.method

    @property
    def is_simple(self) -> bool:
        """Whether it merges whole models in one stage."""
        module = self.last.modules[0]
        return len(self.stages) == 1 and module.name is None and not any(i.layers for i in module.slices[0].inputs)

    @property
    def only(self) -> Slice:
        """All inputs of a recipe that merges whole models in one stage. Raises RecipeError for any other."""
        if not self.is_simple:
            advice = "this works for one document with `models:`, not for slices, modules or several documents"
            raise RecipeError(str(self.path), [advice])
        return self.last.modules[0].slices[0]

    @property
    def needs_tokenizers(self) -> bool:
        """Whether the tokenizers of its models must be read."""
        return self.chat_template is not None or any(stage.tokenizer is not None for stage in self.stages)

    @property
    def bases(self) -> set[str]:
        """The models that deltas are measured from."""
        parts = [part for stage in self.stages for module in stage.modules for part in module.slices]
        return {part.base.model for part in parts if part.base is not None}

    @property
    def inputs(self) -> tuple[str, ...]:
        """Every checkpoint it names, each once: first the one whose config and tokenizer the output takes."""
        stages = {stage.name: stage for stage in self.stages}
        donor = self.last.donor
        while donor in stages:
            donor = stages[donor].donor
        named = [model for stage in reversed(self.stages) for model in stage.inputs if model not in stages]
        return tuple(dict.fromkeys([donor, *named]))


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
    documents: list[tuple[_Recipe, dict[Place, int]]] = []
    problems: list[str] = []
    warnings: list[str] = []
    contents = read_yaml(text, path)
    if any(is_moe(content) for content, _ in contents):
        return _moe_recipe(text, path, contents, strict=strict)
    for content, lines in contents:
        try:
            document = _Recipe.model_validate(content)
        except ValidationError as error:
            problems += [problem_text(details, lines) for details in error.errors()]
            problems += _problems_of_the_rest(content, [details["loc"] for details in error.errors()], lines, path)
            continue
        found, warned = _Checks(document, lines, path).run()
        problems += found
        warnings += warned
        documents.append((document, lines))
    if strict:
        problems, warnings = problems + warnings, []
    if problems:
        raise RecipeError(str(path), problems)
    ordered = _in_order([document for document, _ in documents], path)
    last = ordered[-1]
    if problems := [
        f"the document {document.name}: 8 bits are for what is written; give them in the document that is the output"
        for document in ordered[:-1]
        if (stored := document.out_dtype or document.dtype) is not None and DTYPES[stored].bits == 8
    ]:
        raise RecipeError(str(path), problems)
    warnings += [
        f"chat_template of the document {document.name} has no effect; write it in the one that is the output"
        for document in ordered[:-1]
        if document.chat_template is not None
    ]
    if strict and warnings:
        raise RecipeError(str(path), warnings)
    return Recipe(
        path=path,
        text=text,
        stages=tuple(_stage(document) for document in ordered),
        warnings=tuple(warnings),
        chat_template=last.chat_template,
        tasks=None if last.tasks is None else tuple(last.tasks),
        proxy=last.proxy,
        decisions=last.decisions,
        analysis=last.analysis,
    )


def _moe_recipe(text: str, path: Path, contents: list[tuple[Any, dict[Place, int]]], *, strict: bool) -> Recipe:
    """A recipe that makes experts of dense models."""
    if len(contents) > 1:
        advice = "a document with `experts:` stands alone: merge the others first, and name their directories"
        raise RecipeError(str(path), [advice])
    moe, warnings = read_moe(*contents[0], path, strict=strict)
    sources = tuple(Input(model, {}) for model in moe.sources)
    modules = (Module(None, (Slice(Input(moe.base, {}), sources),)),)
    stage = Stage(None, MOE, moe.base, modules, moe.dtype, None, {}, moe.base)
    return Recipe(path=path, text=text, stages=(stage,), warnings=tuple(warnings), moe=moe)


def _in_order(documents: list[_Recipe], path: Path) -> list[_Recipe]:
    """The documents that the output needs, each after those it needs. Raises RecipeError."""
    if len(documents) > _MAX_DOCUMENTS:
        raise RecipeError(str(path), [f"{len(documents)} documents; there may be {_MAX_DOCUMENTS}"])
    names = [document.name for document in documents if document.name is not None]
    problems = [f"the name {name!r} is given to two documents" for name in {n for n in names if names.count(n) > 1}]
    unnamed = [document for document in documents if document.name is None]
    needs = {document.name: [name for name in _stage(document).inputs if name in names] for document in documents}
    used = {name for needed in needs.values() for name in needed}
    ends = unnamed or [document for document in documents if document.name not in used]
    if len(ends) > 1:
        called = ", ".join(document.name or "one without a name" for document in ends)
        problems.append(
            f"several documents could be the output: {called}. Give all but the last one a name that it uses"
        )
    if problems:
        raise RecipeError(str(path), sorted(problems))
    by_name = {document.name: document for document in documents}
    try:
        ordered = [by_name[name] for name in TopologicalSorter(needs).static_order()]
    except CycleError as error:
        circle = " needs ".join(reversed(error.args[1]))
        advice = "leave one of them without a name, and let it use them"
        raise RecipeError(str(path), [f"the documents need each other in a circle: {circle}; {advice}"]) from None
    left = [document.name for document in documents if document.name not in used and document is not ends[0]]
    if left:
        raise RecipeError(
            str(path), [f"no document uses {', '.join(map(str, left))}; take it out, or use it as a model"]
        )
    return ordered


def _problems_of_the_rest(content: Any, places: list[Place], lines: dict[Place, int], path: Path) -> list[str]:
    """What else is wrong with a recipe once the values at `places` are taken out, if it can be read then."""
    if any(place == ("models",) or "layer_range" in place for place in places):
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
    return _Checks(document, lines, path).run()[0]


class _Checks:
    """What a schema cannot say: the method, its parameters, the number of models."""

    def __init__(self, document: _Recipe, lines: dict[Place, int], path: Path) -> None:
        self._document, self._lines, self._path = document, lines, path
        self._problems: list[str] = []
        self._warnings: list[str] = []

    def run(self) -> tuple[list[str], list[str]]:
        document = self._document
        self._unknown_keys(document, ())
        for source, place in _sources(document):
            self._unknown_keys(source, place)
            self._reference(source.model, (*place, "model"))
        for owner, place in _owners(document):
            self._unknown_keys(owner, place)
            if isinstance(owner, _Slice) and owner.residual_weight is not None:
                self._warn((*place, "residual_weight"), "has no effect, as in mergekit")
            base = getattr(owner, "base_model", None)
            if base is not None:
                self._reference(base, (*place, "base_model"))
        if document.base_model is not None:
            self._reference(document.base_model, ("base_model",))
        self._tokenizer()
        self._names()
        method = METHODS.get(document.merge_method)
        if method is None:
            self._problem(("merge_method",), f"{document.merge_method!r} is no method here.{self._nearest_method()}")
        else:
            self._parameters(method)
        self._parts(method)
        if method is not None:
            self._analysis(method)
        return self._problems, self._warnings

    def _problem(self, place: Place, message: str) -> None:
        self._problems.append(where(place, self._lines) + message)

    def _warn(self, place: Place, message: str) -> None:
        self._warnings.append(where(place, self._lines) + message)

    def _unknown_keys(self, document: BaseModel, place: Place) -> None:
        known = list(type(document).model_fields)
        for key in document.model_extra or {}:
            self._warn((*place, key), f"unknown key, ignored.{nearest(key, known)}")

    def _reference(self, model: str, place: Place) -> None:
        try:
            parse_reference(model, self._path)
        except ValueError as error:
            self._problem(place, str(error))

    def _tokenizer(self) -> None:
        """The tokenizer's keys, and the models that it names: of others there are no rows."""
        document, chosen = self._document, _tokenizer(self._document)
        if chosen is None:
            return
        key = "tokenizer_source" if document.tokenizer_source is not None else "tokenizer"
        if document.tokenizer is not None:
            if document.tokenizer_source is not None:
                self._problem(("tokenizer_source",), "says the same as tokenizer.source; keep one of the two")
                return
            self._unknown_keys(document.tokenizer, ("tokenizer",))
            for token, form in document.tokenizer.tokens.items():
                self._unknown_keys(form, ("tokenizer", "tokens", token))
        named = [source.model for sources, _, _ in _groups(document) for source in sources]
        bases = [base for _, base, _ in _groups(document) if base is not None]
        known = list(dict.fromkeys([*bases, *named]))
        for model in sorted(chosen.models - set(known)):
            self._problem((key,), f"{model} is no model of this recipe.{nearest(model, [*known, 'union', 'base'])}")

    def _names(self) -> None:
        """A model has one map of names, and one model has none: the output's names are its own."""
        maps: dict[str, dict[str, str]] = {}
        for source, place in _sources(self._document):
            if source.names and maps.setdefault(source.model, source.names) != source.names:
                self._problem((*place, "names"), f"{source.model} has other names elsewhere in this document")
        base = self._document.base_model
        if maps and all(source.model in maps for source, _ in _sources(self._document)) and base in (None, *maps):
            self._problem((), "every model has `names`; the one whose names, config and tokenizer the output has goes "
                              "without")  # fmt: skip

    def _nearest_method(self) -> str:
        return nearest(self._document.merge_method, list(METHODS)) or f" There are {', '.join(METHODS)}."

    def _parameters(self, method: Method) -> None:
        shared = {param.name for param in method.params if not param.per_model}
        known = [param.name for param in method.params]
        groups: list[tuple[Place, Parameters, bool]] = [((), self._document.parameters, False)]
        groups += [(place, owner.parameters, False) for owner, place in _owners(self._document)]
        groups += [(place, source.parameters, True) for source, place in _sources(self._document)]
        for owner_place, parameters, of_model in groups:
            place = (*owner_place, "parameters")
            for name in parameters:
                if name not in known:
                    self._warn((*place, name), f"{method.name} has no such parameter.{nearest(name, known)}")
                elif name in shared and of_model:
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

    def _parts(self, method: Method | None) -> None:
        """Exactly one of models, slices and modules; and in each as many models as the method takes."""
        document = self._document
        given = [key for key in ("models", "slices", "modules") if getattr(document, key)]
        if len(given) > 1:
            self._problem((given[1],), f"{' and '.join(given)} exclude each other; keep one")
            return
        if not given:
            named = [key for key in ("models", "slices", "modules") if key in document.model_fields_set]
            self._problem((named[0] if named else "models",), "list at least one model")
            return
        for name, module in document.modules.items():
            if bool(module.models) == bool(module.slices):
                self._problem(("modules", name), "needs either models or slices")
        if method is not None:
            for sources, base, place in _groups(document):
                self._count(method, sources, base, place)

    def _count(self, method: Method, sources: list[_Source], base: str | None, place: Place) -> None:
        sliced = place[-1] == "sources"
        names = [(source.model, source.layer_range) for source in sources]
        repeated = sorted({model for model, layers in names if names.count((model, layers)) > 1})
        if repeated:
            self._problem(place, f"{', '.join(repeated)} is listed more than once")
        lengths = {source.layer_range[1] - source.layer_range[0] for source in sources if source.layer_range}
        for i, source in enumerate(sources):
            if sliced and source.layer_range is None:
                self._problem((*place, i), "layer_range is missing: [first, one after the last]")
            elif not sliced and source.layer_range is not None:
                self._problem((*place, i, "layer_range"), "belongs to the sources of slices, not to models")
        if len(lengths) > 1:
            self._problem(place, f"take {' and '.join(map(str, sorted(lengths)))} layers; all sources of a slice must "
                                 f"have as many")  # fmt: skip
        if not names:
            self._problem(place, "list at least one model")
            return
        if method.base == "required" and base is None:
            self._problem((), f"{method.name} needs a base_model")
            return
        listed = base in [model for model, _ in names]
        if sliced and base is not None and not listed and method.base != "ignored":
            self._problem(place, f"the base {base} is not among the sources; list it, with its layer_range")
            return
        models = len([model for model, _ in names if method.base == "ignored" or model != base])
        if method.base == "ignored" and base is not None and not listed and not sliced:
            models += 1
        if models < method.min_models or (method.max_models is not None and models > method.max_models):
            least, most = method.min_models, method.max_models
            expected = str(least) if least == most else f"at least {least}" if most is None else f"{least} to {most}"
            besides = " besides the base" if method.base == "required" else ""
            self._problem(place, f"{method.name} merges {expected} model{'s'[: expected != '1']}{besides}, "
                                 f"found {models}")  # fmt: skip


def _sources(document: _Recipe) -> list[tuple[_Source, Place]]:
    """Every source with its place."""
    return [(source, (*place, i)) for sources, _, place in _groups(document) for i, source in enumerate(sources)]


def _owners(document: _Recipe) -> list[tuple[_Slice | _Module, Place]]:
    """Every slice and module with its place."""
    owners: list[tuple[_Slice | _Module, Place]] = [(part, ("slices", i)) for i, part in enumerate(document.slices)]
    for name, module in document.modules.items():
        owners.append((module, ("modules", name)))
        owners += [(part, ("modules", name, "slices", i)) for i, part in enumerate(module.slices)]
    return owners


def _groups(document: _Recipe) -> list[tuple[list[_Source], str | None, Place]]:
    """Sources that are merged with each other: they, their base, and their place."""
    base = document.base_model
    groups: list[tuple[list[_Source], str | None, Place]] = []
    if document.models:
        groups.append((document.models, base, ("models",)))
    modules: list[tuple[_Recipe | _Module, Place]] = [(document, ())]
    for name, module in document.modules.items():
        if module.models:
            groups.append((module.models, base, ("modules", name, "models")))
        modules.append((module, ("modules", name)))
    for owner, place in modules:
        groups += [
            (part.sources, part.base_model or base, (*place, "slices", i, "sources"))
            for i, part in enumerate(owner.slices)
        ]
    return groups


def _tokenizer(document: _Recipe) -> Tokenizer | None:
    """What a document says of its tokenizer, in either way of writing it."""
    if document.tokenizer is not None:
        return document.tokenizer.read()
    return None if document.tokenizer_source is None else Tokenizer(document.tokenizer_source)


def _stage(document: _Recipe) -> Stage:
    """A document that has passed the checks."""
    method = METHODS[document.merge_method]

    def slices(owner: _Recipe | _Module) -> tuple[Slice, ...]:
        if owner.models:
            return (_slice(method, owner.models, document.base_model, {}),)
        return tuple(
            _slice(method, part.sources, part.base_model or document.base_model, part.parameters)
            for part in owner.slices
        )

    modules = [Module(name, slices(module), module.parameters) for name, module in document.modules.items()]
    modules = modules or [Module(None, slices(document))]
    names = {source.model: source.names for source, _ in _sources(document) if source.names}
    inputs = [source.model for module in modules for part in module.slices for source in part.inputs]
    donor = next(model for model in (document.base_model or inputs[0], *inputs) if model not in names)
    return Stage(
        document.name, method, donor, tuple(modules), document.dtype, document.out_dtype, document.parameters,
        document.base_model, _tokenizer(document), names,
    )  # fmt: skip


def _slice(method: Method, sources: list[_Source], base_model: str | None, parameters: Parameters) -> Slice:
    models = [Input(source.model, source.parameters, source.layer_range) for source in sources]
    sliced = any(model.layers for model in models)
    base: Input | None = None
    if base_model is not None:
        listed = [model for model in models if model.model == base_model]
        base = listed[0] if listed else Input(base_model, {})
        if method.base != "ignored":
            models = [model for model in models if model is not base]
        elif not listed and not sliced:
            # As mergekit does: a base that the method does not treat as one joins as the last ordinary input.
            models.append(base)
    return Slice(base if method.base != "ignored" else None, tuple(models), parameters)
