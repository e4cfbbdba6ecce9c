"""Which tensors a stage makes, and of which tensors of its models: whole models, slices of layers, modules."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from streammerge.plan.document import nearest
from streammerge.plan.names import (
    in_layer,
    is_buffer,
    is_front,
    layer_of,
    listing,
    modules_of,
    position,
    sense_of,
    stacks,
)
from streammerge.plan.recipe import Input, Module, Slice, Stage
from streammerge.plan.renamed import suggested
from streammerge.plan.unlike import unlike_experts
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

    `origins` are the checkpoint's layers behind those of the output, by stack; `copied` are tensors that are not
    merged, with the model they come from.

    A tensor that some models lack is merged of those that have it, or copied where that cannot be; unless it is of a
    layer that they have: then they are of another architecture. What models lack that the recipe renames, it says so.
    """

    def __init__(self, stage: Stage, views: Mapping[str, View]) -> None:
        self._stage, self._views = stage, views
        self._layers: dict[tuple[str, str | None], dict[int, list[str]]] = {}
        self.problems: list[str] = []
        self.all: list[Place] = []
        self.origins: dict[str, tuple[tuple[int, int], ...]] = dict(views[stage.donor].origins)
        # Tensors that are not in every model, by the models they are taken from, and whether these are merged.
        self._some: dict[tuple[tuple[str, ...], bool], list[str]] = {}
        # By module and model, the tensors that belong to it; None for all.
        self._wanted: dict[tuple[str | None, str], set[str] | None] = {}
        self.copied: dict[str, str] = {}
        # Tensors that are merged of some models only.
        self.partial: set[str] = set()
        self.warnings: list[str] = []
        self._find_owners()
        for module in stage.modules:
            self.all += self._places(module, self.problems)
        self._check_senses()
        self.warnings += self._warnings_of_some()

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
            left = [name for name, owner in owners.items() if owner is None]
            self.copied |= dict.fromkeys(left, model)
            if left:
                self.warnings.append(f"no module of the recipe has {listing(left)}; copied from {model}")
            for name in named:
                if name not in owners.values():
                    parts = {part for tensor in names for part in tensor.split(".") if not part.isdigit()} - {name}
                    self.problems.append(f"modules: no tensor of {model} belongs to {name!r}."
                                         f"{nearest(name, sorted(parts))}")  # fmt: skip

    def _names(self, model: str, module: Module) -> list[str]:
        """The tensors of a model in a module."""
        wanted = self._wanted[module.name, model]
        return [name for name in self._views[model].tensors if wanted is None or name in wanted]

    def _places(self, module: Module, problems: list[str]) -> list[Place]:
        """The tensors of a module."""
        first = module.slices[0]
        if first.inputs[0].layers is None:
            return self._whole_places(module, first, problems)
        return self._sliced_places(module, problems)

    def _whole_places(self, module: Module, part: Slice, problems: list[str]) -> list[Place]:
        sets = [dict.fromkeys(self._names(source.model, module)) for source in part.inputs]
        names = list(dict.fromkeys(name for each in sets for name in each))
        if any(each.keys() != sets[0].keys() for each in sets):
            unlike, explained = unlike_experts([source.model for source in part.inputs], sets)
            found = self._names_problems(part.inputs, sets, [name for name in names if name not in explained])
            if found:
                advice = "every model must hold the same tensors: are these models of one architecture?"
                found = [*shorten(found, 1), advice + self._suggestion(part)]
            if unlike or found:
                problems += [*unlike, *found]
                return []
        depth = stacks(names)
        places = []
        for name in names:
            layer = layer_of(name)
            at = 0.0 if layer is None else position(layer[1], depth[layer[0]])
            deep = at if layer is not None else float(not is_front(name))
            having = [source for source, each in zip(part.inputs, sets, strict=True) if name in each]
            places += self._place(part, module, name, having, at, deep)
        # The donor's, where it takes part: they are what its config speaks of.
        ordered = sorted(part.inputs, key=lambda source: source.model != self._stage.donor)
        for source in reversed(ordered):
            layers = self._views[source.model].origins
            self.origins |= {stack: layers[stack] for stack in depth if stack in layers}
        return places

    def _suggestion(self, part: Slice) -> str:
        """How a model could be merged with the language part of another."""
        for source in part.inputs:
            for other in part.inputs:
                names = suggested(self._views[source.model].tensors, self._views[other.model].tensors)
                if names and all(names.values()) and source.model not in self._stage.names:
                    ((mine, theirs),) = names.items()
                    return (f" If {source.model} is to be merged into a part of {other.model}, list it under models "
                            f'with  names: {{"{mine}": "{theirs}"}}')  # fmt: skip
        return ""

    def _place(self, part: Slice, module: Module, name: str, having: Sequence[Input], at: float,
               deep: float) -> list[Place]:  # fmt: skip
        """The place of a tensor that lies outside sliced layers; none if it is copied. `having` are its inputs."""
        if len(having) < len(part.inputs):
            base = part.base if part.base in having else None
            some = Slice(base, tuple(model for model in part.models if model in having), part.parameters)
            method = self._stage.method
            enough = method.min_models <= len(some.models) <= (method.max_models or len(some.models))
            merged = enough and len(having) > 1 and (base is not None or part.base is None)
            source = having[0].model
            # Where it is said in the recipe that a model is of a part only, the plan says how much that is.
            if any(each not in having and each.model not in self._stage.names for each in part.inputs):
                self._some.setdefault(
                    (tuple(each.model for each in having) if merged else (source,), merged), []
                ).append(name)
            if not merged:
                self.copied[name] = source
                return []
            part = some
            self.partial.add(name)
        return [Place(part, module, name, (name,) * len(part.inputs), at, deep)]

    def _warnings_of_some(self) -> list[str]:
        """What becomes of the tensors that not every model has."""
        return [
            f"{listing(names)} {'are' if len(names) > 1 else 'is'} not in every model: "
            + (f"merged of {', '.join(models)} only" if merged else f"copied from {models[0]}")
            for (models, merged), names in self._some.items()
        ]

    def _check_senses(self) -> None:
        """Layers that see or hear are of no use under the config of a model that knows of none."""
        donor = self._stage.donor
        known = {sense_of(stack) for stack in stacks(self._views[donor].tensors)}
        strange: dict[str, str] = {}
        for (models, _), names in self._some.items():
            if donor not in models:
                strange |= {stack: models[0] for stack in stacks(names) if sense_of(stack) not in known}
        for stack, model in list(strange.items())[:1]:
            self.problems.append(
                f"{stack} is in {model}, and {donor}, whose config and tokenizer the output would have, has nothing of "
                f"the kind: list {donor} under models with the names that {model} has for it, as in  "
                f'names: {{"model.": "model."}};  then the output is as {model} is'
            )

    def _sliced_places(self, module: Module, problems: list[str]) -> list[Place]:
        places: list[Place] = []
        origins: list[tuple[int, int]] = []
        total = sum(stop - start for part in module.slices for start, stop in [_range(part.inputs[0])])
        first, last = module.slices[0], module.slices[-1]
        for part in module.slices:
            begin = len(origins)
            for source in part.inputs:
                self._check_range(source, module, problems)
            if problems:
                return []
            start, stop = _range(part.inputs[0])
            layers = self._views[part.inputs[0].model].origins[self._stack(part.inputs[0], module)]
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
                origins.append(layers[start + index])
        front = self._outer_places(first, module, front=True)
        back = self._outer_places(last, module, front=False)
        # What neither end has is not lost either.
        known = {place.name for place in (*front, *back)} | set(self.copied)
        for source in (source for part in module.slices for source in part.inputs):
            for name in self._outside(source, module):
                if name not in known:
                    known.add(name)
                    self.copied[name] = source.model
                    self._some.setdefault(((source.model,), False), []).append(name)
        self.origins[self._stack(first.inputs[0], module)] = tuple(origins)
        return [*front, *places, *back]

    def _stack(self, source: Input, module: Module) -> str:
        """The only stack of a model in a module."""
        (stack,) = stacks(self._names(source.model, module))
        return stack

    def _outer_places(self, part: Slice, module: Module, *, front: bool) -> list[Place]:
        """The places of the tensors before the layers, or after them, of the inputs of one end."""
        sets = [dict.fromkeys(self._outside(source, module)) for source in part.inputs]
        names = [name for name in dict.fromkeys(name for each in sets for name in each) if is_front(name) == front]
        places = []
        for name in names:
            having = [source for source, each in zip(part.inputs, sets, strict=True) if name in each]
            places += self._place(part, module, name, having, 0.0, 0.0 if front else 1.0)
        return places

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

    def _names_problems(self, sources: Sequence[Input], sets: Sequence[Collection[str]],
                        names: Sequence[str]) -> list[str]:  # fmt: skip
        """Tensors of layers that some models have and others, which have such layers, lack.

        Of models that have nothing in common with the first, or no layers in common where both have some, all of them.
        """
        depths = [stacks(each) for each in sets]
        layered = [{name for name in each if layer_of(name) is not None} for each in sets]
        strange = [
            not (here & layered[0] if here and layered[0] else set(each) & set(sets[0]))
            for here, each in zip(layered, sets, strict=True)
        ]
        problems = []
        for name in names:
            layer = layer_of(name)
            if is_buffer(name):
                continue
            first = next(i for i, each in enumerate(sets) if name in each)
            problems += [
                f"tensor {name!r} is in {sources[first].model} and not in {source.model}"
                for source, each, depth, other in zip(sources, sets, depths, strange, strict=True)
                if name not in each and (other or strange[first] or (layer is not None and layer[0] in depth))
            ]
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


def shorten(problems: list[str], spare: int = 0) -> list[str]:
    """The first ten problems, and how many more there are; so short that `spare` more can come after it."""
    if len(problems) <= _SHOWN + 2 - spare:
        return problems
    return [*problems[:_SHOWN], f"and {len(problems) - _SHOWN} more"]
