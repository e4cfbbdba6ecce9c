"""Which tensors a stage makes, and of which tensors of its models: whole models, slices of layers, modules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from streammerge.plan.names import in_layer, is_front, layer_of, modules_of, position, stacks
from streammerge.plan.recipe import Input, Module, Slice, Stage, nearest
from streammerge.plan.view import MOST_LAYERS, View

_SHOWN = 10


@dataclass(frozen=True)
class Place:
    """An output tensor before its parameters are known: its part of the recipe, and its names in the inputs.

    `position` is where gradients are read, `depth` how far along all layers it is; both from 0 to 1.
    """

    part: Slice
    module: Module
    name: str
    sources: tuple[str, ...]
    position: float
    depth: float


class Places:
    """The places of one stage, over the models it sees. What is wrong is collected in `problems`.

    `origins` are the checkpoint's layers behind the layers of the output; `left` are tensors of no module.
    """

    def __init__(self, stage: Stage, views: Mapping[str, View]) -> None:
        self._stage, self._views = stage, views
        self._layers: dict[tuple[str, str | None], dict[int, list[str]]] = {}
        self.problems: list[str] = []
        self.all: list[Place] = []
        self.origins: list[tuple[int, int]] = []
        # By module and model, the tensors that belong to it; None for all.
        self._wanted: dict[tuple[str | None, str], set[str] | None] = {}
        self.left: list[str] = []
        self._find_owners()
        for module in stage.modules:
            made, layers = self._places(module, self.problems)
            self.all += made
            if len(layers) > len(self.origins):
                self.origins = layers

    def _find_owners(self) -> None:
        """Which tensors of every model belong to which module."""
        named = [module.name for module in self._stage.modules if module.name is not None]
        for model in self._stage.inputs:
            names = list(self._views[model].tensors)
            owners = modules_of(named, names) if named else {}
            for module in self._stage.modules:
                mine = {name for name, owner in owners.items() if owner == module.name}
                self._wanted[module.name, model] = mine if named else None
            if not named or model != self._stage.donor:
                continue
            self.left = [name for name, owner in owners.items() if owner is None]
            for name in named:
                if name not in owners.values():
                    parts = {part for tensor in names for part in tensor.split(".") if not part.isdigit()} - {name}
                    self.problems.append(f"modules: no tensor of {model} belongs to {name!r}."
                                         f"{nearest(name, sorted(parts))}")  # fmt: skip

    def _names(self, model: str, module: Module) -> list[str]:
        """The tensors of a model in a module."""
        wanted = self._wanted[module.name, model]
        return [name for name in self._views[model].tensors if wanted is None or name in wanted]

    def _places(self, module: Module, problems: list[str]) -> tuple[list[Place], list[tuple[int, int]]]:
        """The tensors of a module, and the origins of its layers."""
        first = module.slices[0]
        if first.inputs[0].layers is None:
            return self._whole_places(module, first, problems)
        return self._sliced_places(module, problems)

    def _whole_places(
        self, module: Module, part: Slice, problems: list[str]
    ) -> tuple[list[Place], list[tuple[int, int]]]:
        names = self._names(part.inputs[0].model, module)
        found = self._names_problems(module, part.inputs)
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
            places.append(Place(part, module, name, (name,) * len(part.inputs), at, deep))
        return places, list(self._views[part.inputs[0].model].origins)

    def _sliced_places(self, module: Module, problems: list[str]) -> tuple[list[Place], list[tuple[int, int]]]:
        places: list[Place] = []
        origins: list[tuple[int, int]] = []
        total = sum(stop - start for part in module.slices for start, stop in [_range(part.inputs[0])])
        first, last = module.slices[0], module.slices[-1]
        for part in module.slices:
            begin = len(origins)
            for source in part.inputs:
                self._check_range(source, module, problems)
            if problems:
                return [], []
            start, stop = _range(part.inputs[0])
            for index in range(stop - start):
                names = [self._layer(source, _range(source)[0] + index, module) for source in part.inputs]
                templates = [{in_layer(name, 0): name for name in found} for found in names]
                self._check_templates(part, index, templates, problems)
                for template in templates[0]:
                    if all(template in other for other in templates):
                        places.append(Place(
                            part, module, in_layer(template, begin + index),
                            tuple(other[template] for other in templates), position(index, stop - start),
                            position(begin + index, total),
                        ))  # fmt: skip
                origins.append(self._views[part.inputs[0].model].origins[start + index])
        front, back = [], []
        for name in self._outside(first.inputs[0], module):
            if is_front(name):
                front.append(Place(first, module, name, (name,) * len(first.inputs), 0.0, 0.0))
        for name in self._outside(last.inputs[0], module):
            if not is_front(name):
                back.append(Place(last, module, name, (name,) * len(last.inputs), 0.0, 1.0))
        sources = {source.model: source for part in module.slices for source in part.inputs}
        lacking = self._names_problems(module, list(sources.values()), outside=True)
        if lacking:
            problems += shorten(lacking)
            return [], []
        return [*front, *places, *back], origins

    def _check_range(self, source: Input, module: Module, problems: list[str]) -> None:
        found = stacks(self._names(source.model, module))
        start, stop = _range(source)
        if len(found) != 1:
            listed = ", ".join(stack or "(without a name)" for stack in sorted(found))
            what = f"{source.model} has the stacks {listed}" if found else f"{source.model} has no layers"
            problems.append(f"slices cut one stack of layers, and {what}; use modules, or models")
        elif (count := next(iter(found.values()))) > MOST_LAYERS:
            problems.append(f"{source.model} has a tensor of layer {count - 1}; no model has so many layers")
        elif stop > count:
            problems.append(f"layer_range [{start}, {stop}] of {source.model} goes beyond its {count} layers")

    def _layer(self, source: Input, index: int, module: Module) -> list[str]:
        return self._by_layer(source.model, module).get(index, [])

    def _outside(self, source: Input, module: Module) -> list[str]:
        return self._by_layer(source.model, module).get(-1, [])

    def _by_layer(self, model: str, module: Module) -> dict[int, list[str]]:
        """The names of a model's tensors in a module by layer, −1 for those outside."""
        if (model, module.name) not in self._layers:
            grouped: dict[int, list[str]] = {}
            for name in self._names(model, module):
                layer = layer_of(name)
                grouped.setdefault(-1 if layer is None else layer[1], []).append(name)
            self._layers[model, module.name] = grouped
        return self._layers[model, module.name]

    def _names_problems(self, module: Module, sources: Sequence[Input], *, outside: bool = False) -> list[str]:
        """Tensors, or only those outside the layers, that not all sources have."""
        names = {
            source.model: self._outside(source, module) if outside else self._names(source.model, module)
            for source in sources
        }
        problems = []
        first, *others = names
        for other in others:
            for one, two in ((first, other), (other, first)):
                has = set(names[two])
                problems += [f"tensor {n!r} is in {one} and not in {two}" for n in names[one] if n not in has]
        return problems

    def _check_templates(
        self, part: Slice, index: int, templates: Sequence[Mapping[str, str]], problems: list[str]
    ) -> None:
        for one, mine in zip(part.inputs, templates, strict=True):
            for other, theirs in zip(part.inputs, templates, strict=True):
                missing = [name for template, name in mine.items() if template not in theirs]
                if missing:
                    problems.append(f"{listing(missing)} of {one.model} has nothing beside it in layer "
                                    f"{_range(other)[0] + index} of {other.model}")  # fmt: skip


def _range(source: Input) -> tuple[int, int]:
    assert source.layers is not None
    return source.layers


def shorten(problems: list[str]) -> list[str]:
    """The first ten problems, and how many more there are."""
    if len(problems) <= _SHOWN + 2:
        return problems
    return [*problems[:_SHOWN], f"and {len(problems) - _SHOWN} more"]


def listing(names: Sequence[str]) -> str:
    """The first three names, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
