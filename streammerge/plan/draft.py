"""What every stage of a recipe makes, tensor by tensor: names, shapes, inputs and parameters, before any layout.

A `View` is a model as a stage sees it: a checkpoint, or what an earlier stage makes. A `Draft` is one tensor of a
stage: a method over operands, each a tensor of a checkpoint or a draft of an earlier stage.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from streammerge.base.dtypes import DTYPES, promote
from streammerge.base.errors import RecipeError, ShapeMismatch
from streammerge.kernels.contract import Method, Param, Settings, Value
from streammerge.plan.names import aliases, in_layer, is_front, layer_of, modules_of, position, stacks
from streammerge.plan.recipe import Input, Module, Parameters, Recipe, Slice, Stage, nearest
from streammerge.plan.setting import Setting, value_at
from streammerge.storage.checkpoint import Checkpoint, TensorSpec

_SHOWN = 10


@dataclass(frozen=True)
class Read:
    """One tensor of one of the plan's checkpoints."""

    checkpoint: int
    spec: TensorSpec

    @property
    def dtype(self) -> str:
        return self.spec.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.spec.shape


@dataclass(frozen=True, eq=False)
class Draft:
    """One tensor of a stage. `stream` names its random bits; `settings` are the method's parameters for it."""

    dtype: str
    shape: tuple[int, ...]
    method: Method
    settings: Settings
    operands: tuple[Read | Draft, ...]
    has_base: bool
    stream: str
    stage: str = ""

    @property
    def copied(self) -> Read | Draft | None:
        """The operand that is the result as it stands, if one is."""
        if DTYPES[self.operands[0].dtype].kind == "exact":
            return self.operands[0] if len(self.operands) == 1 else None
        if self.method.scope(self.settings) != "tensor":
            # Others ask about it.
            return None
        number = self.method.copies(self.settings)
        return self.operands[number] if number is not None and self.operands[number].dtype == self.dtype else None


@dataclass(frozen=True)
class View:
    """A model: its tensors by name, in order, and for each layer of its only stack the checkpoint's layer behind it."""

    model: str
    tensors: Mapping[str, Read | Draft]
    origins: tuple[tuple[int, int], ...]

    @property
    def layers(self) -> int:
        return len(self.origins)


@dataclass(frozen=True)
class _Place:
    """An output tensor before its parameters are known: its part of the recipe and its operands' names."""

    part: Slice
    module: Module
    name: str
    sources: tuple[str, ...]
    position: float
    depth: float


def view_of(model: str, number: int, checkpoint: Checkpoint) -> View:
    """A checkpoint as a stage sees it. Layers are counted in its only stack, or else in the longest."""
    depth = max(stacks(checkpoint.tensors).values(), default=0)
    tensors = {name: Read(number, spec) for name, spec in checkpoint.tensors.items()}
    return View(model, tensors, tuple((number, layer) for layer in range(depth)))


def draft_stages(
    recipe: Recipe, checkpoints: Sequence[Checkpoint], *, sequential: bool = False
) -> tuple[View, list[str]]:
    """What the last stage makes, and warnings. Raises RecipeError, or ShapeMismatch when only shapes disagree.

    With `sequential`, random numbers are drawn as mergekit draws them.
    """
    views = {
        model: view_of(model, i, each) for i, (model, each) in enumerate(zip(recipe.inputs, checkpoints, strict=True))
    }
    warnings: list[str] = []
    for stage in recipe.stages:
        made = _Drafting(recipe, stage, views, sequential=sequential)
        result = made.run()
        warnings += made.warnings
        if stage.name is not None:
            views[stage.name] = replace(result, model=stage.name)
    return result, warnings


class _Drafting:
    """The work on one stage."""

    def __init__(self, recipe: Recipe, stage: Stage, views: Mapping[str, View], *, sequential: bool) -> None:
        self._recipe, self._stage, self._views = recipe, stage, views
        self._sequential = sequential
        self._drawing: dict[tuple[int, str], Settings] = {}
        self._layers: dict[tuple[str, int], dict[int, list[str]]] = {}
        self.warnings: list[str] = []

    def run(self) -> View:
        stage = self._stage
        places: list[_Place] = []
        problems: list[str] = []
        origins: list[tuple[int, int]] = []
        owners = self._owners(problems)
        for module in stage.modules:
            wanted = None if module.name is None else {name for name, owner in owners.items() if owner == module.name}
            made, layers = self._places(module, wanted, problems)
            places += made
            if len(layers) > len(origins):
                origins = layers
        mismatch = self._check(places, problems)
        settings = self._settings(places, problems)
        if mismatch is not None:
            if not problems:
                raise ShapeMismatch(mismatch)
            problems.append(mismatch)
        if problems:
            raise self._error(problems)
        tensors: dict[str, Read | Draft] = {}
        for place in places:
            operands = self._operands(place)
            own = stage.name or ""
            dtype = self._output_dtype(operands)
            stream = f"{own}/{place.name}" if own else place.name
            tensors[place.name] = Draft(
                dtype, operands[0].shape, stage.method, self._drawn(settings[place.name], operands), operands,
                place.part.base is not None, stream, own,
            )  # fmt: skip
        left = [name for name, owner in owners.items() if owner is None]
        if left:
            self.warnings.append(f"no module of the recipe has {_listing(left)}; copied from {stage.donor}")
            tensors |= {name: self._views[stage.donor].tensors[name] for name in left}
        return View(stage.name or "", tensors, tuple(origins))

    def _error(self, problems: Sequence[str]) -> RecipeError:
        where = "" if self._stage.name is None else f"stage {self._stage.name}: "
        return RecipeError(str(self._recipe.path), [where + problem for problem in shorten(list(problems))])

    def _view(self, source: Input) -> View:
        return self._views[source.model]

    def _owners(self, problems: list[str]) -> dict[str, str | None]:
        """For stages with modules the module of every tensor."""
        named = [module.name for module in self._stage.modules if module.name is not None]
        if not named:
            return {}
        names = list(self._views[self._stage.donor].tensors)
        owners = modules_of(named, names)
        for module in named:
            if module not in owners.values():
                parts = sorted({part for name in names for part in name.split(".") if not part.isdigit()})
                problems.append(
                    f"modules: no tensor of {self._stage.donor} belongs to {module!r}.{nearest(module, parts)}"
                )
        return owners

    # --- which tensors -----------------------------------------------------------------------------------------------

    def _places(
        self, module: Module, wanted: set[str] | None, problems: list[str]
    ) -> tuple[list[_Place], list[tuple[int, int]]]:
        """The tensors of a module, and the origins of its layers."""
        first = module.slices[0]
        if first.inputs[0].layers is None:
            return self._whole_places(module, first, wanted, problems)
        return self._sliced_places(module, wanted, problems)

    def _whole_places(
        self, module: Module, part: Slice, wanted: set[str] | None, problems: list[str]
    ) -> tuple[list[_Place], list[tuple[int, int]]]:
        views = [self._view(source) for source in part.inputs]
        names = [name for name in views[0].tensors if wanted is None or name in wanted]
        found = _names_problems(views, wanted)
        if found:
            advice = "every model must hold the same tensors: are these models of one architecture?"
            problems += [*shorten(found), advice]
            return [], []
        depth = stacks(names)
        places = []
        for name in names:
            layer = layer_of(name)
            at = 0.0 if layer is None else position(layer[1], depth[layer[0]])
            deep = at if layer is not None else float(not is_front(name))
            places.append(_Place(part, module, name, (name,) * len(views), at, deep))
        return places, list(views[0].origins)

    def _sliced_places(
        self, module: Module, wanted: set[str] | None, problems: list[str]
    ) -> tuple[list[_Place], list[tuple[int, int]]]:
        places: list[_Place] = []
        origins: list[tuple[int, int]] = []
        total = sum(stop - start for part in module.slices for start, stop in [_range(part.inputs[0])])
        first, last = module.slices[0], module.slices[-1]
        for part in module.slices:
            begin = len(origins)
            for source in part.inputs:
                self._check_range(source, wanted, problems)
            if problems:
                return [], []
            start, stop = _range(part.inputs[0])
            for index in range(stop - start):
                names = [self._layer(source, _range(source)[0] + index, wanted) for source in part.inputs]
                templates = [{in_layer(name, 0): name for name in found} for found in names]
                self._check_templates(part, index, templates, problems)
                for template in templates[0]:
                    if all(template in other for other in templates):
                        places.append(_Place(
                            part, module, in_layer(template, begin + index),
                            tuple(other[template] for other in templates), position(index, stop - start),
                            position(begin + index, total),
                        ))  # fmt: skip
                origins.append(self._view(part.inputs[0]).origins[start + index])
        front, back = [], []
        for name in self._outside(first.inputs[0], wanted):
            if is_front(name):
                front.append(_Place(first, module, name, (name,) * len(first.inputs), 0.0, 0.0))
        for name in self._outside(last.inputs[0], wanted):
            if not is_front(name):
                back.append(_Place(last, module, name, (name,) * len(last.inputs), 0.0, 1.0))
        for place in (*front, *back):
            for source in place.part.inputs:
                if place.name not in self._view(source).tensors:
                    problems.append(f"tensor {place.name!r} is not in {source.model}")
        return [*front, *places, *back], origins

    def _check_range(self, source: Input, wanted: set[str] | None, problems: list[str]) -> None:
        view = self._view(source)
        found = stacks(name for name in view.tensors if wanted is None or name in wanted)
        stop = _range(source)[1]
        if len(found) != 1:
            what = (
                f"{source.model} has the stacks {', '.join(sorted(found))}"
                if found
                else f"{source.model} has no layers"
            )
            problems.append(f"slices cut one stack of layers, and {what}; use modules, or models")
        elif stop > next(iter(found.values())):
            count = next(iter(found.values()))
            problems.append(
                f"layer_range [{_range(source)[0]}, {stop}] of {source.model} goes beyond its {count} layers"
            )

    def _layer(self, source: Input, index: int, wanted: set[str] | None) -> list[str]:
        return self._by_layer(source.model, wanted).get(index, [])

    def _outside(self, source: Input, wanted: set[str] | None) -> list[str]:
        return self._by_layer(source.model, wanted).get(-1, [])

    def _by_layer(self, model: str, wanted: set[str] | None) -> dict[int, list[str]]:
        """The names of a model's tensors by layer, −1 for those outside."""
        if (model, id(wanted)) not in self._layers:
            grouped: dict[int, list[str]] = {}
            for name in self._views[model].tensors:
                if wanted is None or name in wanted:
                    layer = layer_of(name)
                    grouped.setdefault(-1 if layer is None else layer[1], []).append(name)
            self._layers[model, id(wanted)] = grouped
        return self._layers[model, id(wanted)]

    def _check_templates(
        self, part: Slice, index: int, templates: Sequence[Mapping[str, str]], problems: list[str]
    ) -> None:
        for one, mine in zip(part.inputs, templates, strict=True):
            for other, theirs in zip(part.inputs, templates, strict=True):
                missing = [name for template, name in mine.items() if template not in theirs]
                if missing:
                    problems.append(f"{_listing(missing)} of {one.model} has nothing beside it in layer "
                                    f"{_range(other)[0] + index} of {other.model}")  # fmt: skip

    def _operands(self, place: _Place) -> tuple[Read | Draft, ...]:
        pairs = zip(place.part.inputs, place.sources, strict=True)
        return tuple(self._view(source).tensors[name] for source, name in pairs)

    # --- shapes and dtypes -------------------------------------------------------------------------------------------

    def _check(self, places: Sequence[_Place], problems: list[str]) -> str | None:
        """Add what is wrong with dtypes to `problems`; say what is wrong with shapes."""
        wrong = []
        for place in places:
            operands = self._operands(place)
            dtypes = [operand.dtype for operand in operands]
            kinds = {DTYPES[dtype].kind for dtype in dtypes}
            if "quantised" in kinds:
                problems.append(f"tensor {place.name!r} is stored as {_listing(dtypes)}: quantised weights cannot be "
                                f"merged yet; convert the model to bfloat16 first")  # fmt: skip
            elif "exact" in kinds and len(set(dtypes)) > 1:
                problems.append(f"tensor {place.name!r} is {_listing(dtypes)} in the inputs: integers are copied, and "
                                f"only when every input has the same")  # fmt: skip
            if len({operand.shape for operand in operands}) > 1:
                wrong.append((place, [operand.shape for operand in operands]))
        return self._mismatch(wrong) if wrong else None

    def _mismatch(self, wrong: Sequence[tuple[_Place, list[tuple[int, ...]]]]) -> str:
        place, shapes = wrong[0]
        sources = place.part.inputs
        width = max(len(source.model) for source in sources)
        rows = [
            f"  {'base ' if i == 0 and place.part.base else 'model'}  {source.model:<{width}}  {list(shape)}"
            for i, (source, shape) in enumerate(zip(sources, shapes, strict=True))
        ]
        names = [other.name for other, _ in wrong[1:]]
        more = f"\nSo do {len(names)} more: {_listing(names)}" if names else ""
        rows_differ = all(len({shape[1:] for shape in found}) == 1 for _, found in wrong)
        advice = (
            "These look like vocabularies of different size: models must share one until tokenizers can be merged."
            if rows_differ and any(word in place.name for word in ("embed", "wte", "lm_head"))
            else "Are these models of one architecture and size?"
        )
        return (
            f"{place.name} differs between inputs\n" + "\n".join(rows) + more
            + f"\n{self._stage.method.name} needs equal shapes. {advice}"
        )  # fmt: skip

    def _output_dtype(self, operands: Sequence[Read | Draft]) -> str:
        if DTYPES[operands[0].dtype].kind == "exact":
            return operands[0].dtype
        return self._stage.out_dtype or self._stage.dtype or promote([operand.dtype for operand in operands])

    def _drawn(self, settings: Settings, operands: Sequence[Read | Draft]) -> Settings:
        """The settings, saying in which dtype mergekit would draw."""
        method = self._stage.method
        if not self._sequential or not method.program(settings).needs_keys:
            return settings
        if method.by_rows(settings):
            raise self._error([f"--rng mergekit can repeat what DARE draws there, not what {method.name} does"])
        stored = self._stage.dtype or promote([operand.dtype for operand in operands])
        key = (id(settings), stored)
        if key not in self._drawing:
            dtype = torch.bfloat16 if stored == "BF16" else torch.float32
            self._drawing[key] = replace(settings, sequential=dtype)
        return self._drawing[key]

    # --- parameters --------------------------------------------------------------------------------------------------

    def _settings(self, places: Sequence[_Place], all_problems: list[str]) -> dict[str, Settings]:
        """The parameters of every tensor; what is wrong with them is added to `all_problems`."""
        method = self._stage.method
        problems: dict[str, None] = {}
        made: dict[tuple[object, ...], Settings] = {}
        finders: dict[tuple[int, int], list[Finder]] = {}
        settings = {}
        for place in places:
            key = (id(place.module), id(place.part))
            if key not in finders:
                finders[key] = [self._finder(place.module, place.part, param) for param in method.params]
            found = [find(place, problems) for find in finders[key]]
            if len(self._operands(place)[0].shape) < 2:
                found = [
                    values if param.vectors else (param.default,) * len(values)
                    for param, values in zip(method.params, found, strict=True)
                ]
            values = (*(repr(value) for values in found for value in values), len(place.part.models))
            if (*values, place.depth) not in made:
                pairs = list(zip(method.params, found, strict=True))
                resolved = Settings(
                    {param.name: values[0] for param, values in pairs if not param.per_model},
                    {param.name: values for param, values in pairs if param.per_model},
                )
                if not problems and method.by_depth(resolved):
                    resolved = replace(resolved, depth=place.depth)
                if not problems:
                    problems |= dict.fromkeys(method.check(resolved))
                # One object for all tensors that have the same.
                made[*values, place.depth] = made.setdefault((*values, "at", resolved.depth), resolved)
            settings[place.name] = made[*values, place.depth]
        all_problems += problems
        if places:
            self.warnings += self._unmatched_filters(places)
        return settings

    def _finder(self, module: Module, part: Slice, param: Param) -> Finder:
        """Finds the values of one parameter for a tensor: one per model, or one in all.

        What a model says comes before its slice, that before its module, that before the recipe, and that before the
        default.
        """
        levels: list[Parameters] = [part.parameters, module.parameters, self._stage.parameters]
        shared = [setting for level in levels if (setting := level.get(param.name))]
        owners: Sequence[Input | None] = part.models if param.per_model else [None]
        own = [() if owner is None else owner.parameters.get(param.name, ()) for owner in owners]
        shift = int(part.base is not None)
        method = self._stage.method.name

        def find(place: _Place, problems: dict[str, None]) -> tuple[Value | None, ...]:
            values = []
            for i, (owner, setting) in enumerate(zip(owners, own, strict=True)):
                # A model's parameters go by the names in that model, the others by those of the output.
                name = place.name if owner is None else place.sources[i + shift]
                value = None
                for each in (setting, *shared):
                    try:
                        value = value_at(each, name, place.position, param)
                    except ValueError as error:
                        problems[f"{param.name}: {error}"] = None
                        value = (
                            param.default if param.default is not None else 0.0
                        )  # goes on to find the other problems
                    if value is not None:
                        break
                if value is None:
                    value = param.default
                if value is None and not param.optional:
                    whose = "" if owner is None else f" of {owner.model}"
                    problems[f"{method} needs {param.name}{whose} for {place.name}"] = None
                    value = 0.0  # goes on to find the other problems
                values.append(value)
            return tuple(values)

        if not all(_is_constant(setting) for setting in (*own, *shared)):
            return find
        answers: list[tuple[Value | None, ...]] = []

        def find_once(place: _Place, problems: dict[str, None]) -> tuple[Value | None, ...]:
            if not answers:
                answers.append(find(place, problems))
            return answers[0]

        return find_once

    def _unmatched_filters(self, places: Sequence[_Place]) -> list[str]:
        """A sentence for every filter that no tensor's name contains."""
        names = dict.fromkeys(name for place in places for name in (place.name, *place.sources))
        filters = dict.fromkeys(
            (name, entry.filter)
            for parameters in self._all_parameters()
            for name, setting in parameters.items()
            for entry in setting
            if entry.filter not in (None, "*")
        )
        parts = sorted({part for name in names for part in name.split(".")})
        return [
            f"{name}: the filter {text!r} matches no tensor.{nearest(text, parts)}"
            for name, text in filters
            if text is not None and not any(text in alias for tensor in names for alias in aliases(tensor))
        ]

    def _all_parameters(self) -> Iterator[Parameters]:
        yield self._stage.parameters
        for module in self._stage.modules:
            yield module.parameters
            for part in module.slices:
                yield part.parameters
                for source in part.models:
                    yield source.parameters


Finder = Callable[[_Place, dict[str, None]], tuple[Value | None, ...]]


def _range(source: Input) -> tuple[int, int]:
    assert source.layers is not None
    return source.layers


def _is_constant(setting: Setting) -> bool:
    return not setting or (setting[0].filter in (None, "*") and len(setting[0].values) == 1)


def _names_problems(views: Sequence[View], wanted: set[str] | None) -> list[str]:
    problems = []
    first, *others = views
    for other in others:
        for one, two in ((first, other), (other, first)):
            problems += [
                f"tensor {name!r} is in {one.model} and not in {two.model}"
                for name in one.tensors
                if name not in two.tensors and (wanted is None or name in wanted)
            ]
    return problems


def shorten(problems: list[str]) -> list[str]:
    """The first ten problems, and how many more there are."""
    if len(problems) <= _SHOWN + 2:
        return problems
    return [*problems[:_SHOWN], f"and {len(problems) - _SHOWN} more"]


def _listing(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
