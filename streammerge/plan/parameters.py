"""The parameters of every tensor of a stage: from models, slices, modules, the document, and the method's defaults."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace

from streammerge.kernels.contract import Param, Settings, Value
from streammerge.plan.document import nearest
from streammerge.plan.names import answers_to, experts_in_one, names_one_expert
from streammerge.plan.places import Place
from streammerge.plan.recipe import Input, Module, Parameters, Slice, Stage
from streammerge.plan.setting import Setting, value_at

Finder = Callable[[Place, dict[str, None]], tuple[Value | None, ...]]


def resolve(
    stage: Stage, places: Sequence[Place], vectors: Collection[str], all_problems: list[str]
) -> dict[str, Settings]:
    """The parameters of every tensor; what is wrong with them is added to `all_problems`.

    `vectors` are the names of those with fewer than two dimensions.
    """
    method = stage.method
    problems: dict[str, None] = {}
    made: dict[tuple[object, ...], Settings] = {}
    finders: dict[tuple[int, int], list[Finder]] = {}
    settings = {}
    for place in places:
        key = (id(place.module), id(place.part))
        if key not in finders:
            finders[key] = [_finder(stage, place.module, place.part, param) for param in method.params]
        found = [find(place, problems) for find in finders[key]]
        if place.name in vectors:
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
    return settings


def _finder(stage: Stage, module: Module, part: Slice, param: Param) -> Finder:
    """Finds the values of one parameter for a tensor: one per model, or one in all.

    What a model says comes before its slice, that before its module, that before the recipe, and that before the
    default.
    """
    levels: list[Parameters] = [part.parameters, module.parameters, stage.parameters]
    shared = [setting for level in levels if (setting := level.get(param.name))]
    owners: Sequence[Input | None] = part.models if param.per_model else [None]
    own = [() if owner is None else owner.parameters.get(param.name, ()) for owner in owners]
    shift = int(part.base is not None)
    method = stage.method.name

    def find(place: Place, problems: dict[str, None]) -> tuple[Value | None, ...]:
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
                    value = param.default if param.default is not None else 0.0  # goes on to find the other problems
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

    def find_once(place: Place, problems: dict[str, None]) -> tuple[Value | None, ...]:
        if not answers:
            answers.append(find(place, problems))
        return answers[0]

    return find_once


def unmatched_filters(stage: Stage, places: Sequence[Place]) -> list[str]:
    """A sentence for every filter that no tensor's name contains."""
    names = dict.fromkeys(name for place in places for name in (place.name, *place.sources))
    filters = dict.fromkeys(
        (name, entry.filter)
        for parameters in _all_parameters(stage)
        for name, setting in parameters.items()
        for entry in setting
        if entry.filter is not None and entry.filter != "*"
    )
    unmatched = [(name, text) for name, text in filters if not any(answers_to(tensor, text) for tensor in names)]
    if not unmatched:
        return []
    parts = sorted({part for name in names for part in name.split(".")})
    fused = next((name for name in names if experts_in_one(name) is not None), None)
    return [
        f"{name}: the filter {text!r} matches no tensor."
        + (f" {fused} holds all experts of its layer, which have one set of parameters: no filter can tell them apart"
           if fused is not None and names_one_expert(text) else nearest(text, parts))
        for name, text in unmatched
    ]  # fmt: skip


def _all_parameters(stage: Stage) -> Iterator[Parameters]:
    yield stage.parameters
    for module in stage.modules:
        yield module.parameters
        for part in module.slices:
            yield part.parameters
            for source in part.models:
                yield source.parameters


def _is_constant(setting: Setting) -> bool:
    return not setting or (setting[0].filter in (None, "*") and len(setting[0].values) == 1)
