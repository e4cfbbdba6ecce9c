"""Which tensors a stage makes, and of which tensors of its models: whole models, slices of layers, modules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from streammerge.plan.names import in_layer, is_front, layer_of, modules_of, position, stacks
from streammerge.plan.recipe import Input, Module, Slice, Stage, nearest
from streammerge.plan.view import View

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
        owners = self._owners(self.problems)
        self._wanted = {
            module.name: None if module.name is None else {n for n, owner in owners.items() if owner == module.name}
            for module in stage.modules
        }
        self.left = [name for name, owner in owners.items() if owner is None]
        for module in stage.modules:
            made, layers = self._places(module, self.problems)
            self.all += made
            if len(layers) > len(self.origins):
                self.origins = layers

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

    def _places(self, module: Module, problems: list[str]) -> tuple[list[Place], list[tuple[int, int]]]:
        """The tensors of a module, and the origins of its layers."""
        first = module.slices[0]
        if first.inputs[0].layers is None:
            return self._whole_places(module, first, problems)
        return self._sliced_places(module, problems)

    def _whole_places(
        self, module: Module, part: Slice, problems: list[str]
    ) -> tuple[list[Place], list[tuple[int, int]]]:
        views = [self._views[source.model] for source in part.inputs]
        wanted = self._wanted[module.name]
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
            places.append(Place(part, module, name, (name,) * len(views), at, deep))
        return places, list(views[0].origins)

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
        for place in (*front, *back):
            for source in place.part.inputs:
                if place.name not in self._views[source.model].tensors:
                    problems.append(f"tensor {place.name!r} is not in {source.model}")
        return [*front, *places, *back], origins

    def _check_range(self, source: Input, module: Module, problems: list[str]) -> None:
        wanted = self._wanted[module.name]
        tensors = self._views[source.model].tensors
        found = stacks(name for name in tensors if wanted is None or name in wanted)
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

    def _layer(self, source: Input, index: int, module: Module) -> list[str]:
        return self._by_layer(source.model, module.name).get(index, [])

    def _outside(self, source: Input, module: Module) -> list[str]:
        return self._by_layer(source.model, module.name).get(-1, [])

    def _by_layer(self, model: str, module: str | None) -> dict[int, list[str]]:
        """The names of a model's tensors in a module by layer, −1 for those outside."""
        if (model, module) not in self._layers:
            wanted = self._wanted[module]
            grouped: dict[int, list[str]] = {}
            for name in self._views[model].tensors:
                if wanted is None or name in wanted:
                    layer = layer_of(name)
                    grouped.setdefault(-1 if layer is None else layer[1], []).append(name)
            self._layers[model, module] = grouped
        return self._layers[model, module]

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


def listing(names: Sequence[str]) -> str:
    """The first three names, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
