"""Tensors that must be looked at together before one of them can be merged: those of a layer, or of a whole stage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from streammerge.plan.names import layer_of
from streammerge.plan.tensor import TensorPlan


@dataclass(frozen=True)
class Group:
    """Tensors that are looked at together for one of their steps, in the order of the stage's names."""

    key: str
    members: tuple[tuple[TensorPlan, int], ...]


def groups_of(tensors: Sequence[TensorPlan]) -> list[Group]:
    """The groups that must be surveyed, earlier stages first. A tensor that stands twice in the output counts once."""
    found: dict[tuple[int, str, str], dict[str, tuple[TensorPlan, int]]] = {}
    for tensor in tensors:
        for number, step in enumerate(tensor.steps):
            scope = step.method.scope(step.settings)
            if scope != "tensor" and tensor.elements > 0:
                layer = layer_of(step.stream)
                place = "" if scope == "model" or layer is None else f"{layer[0]}.{layer[1]}"
                members = found.setdefault((step.stage, scope, place), {})
                members.setdefault(step.stream, (tensor, number))
    return [
        Group(" ".join(map(str, key)), tuple(members[name] for name in sorted(members)))
        for key, members in sorted(found.items())
    ]


def with_one_work(tensors: Sequence[TensorPlan]) -> list[TensorPlan]:
    """The same tensors, but in a group where one is worked on in float64 all are: their numbers are compared."""
    wide = {
        tensor.steps[number].stream
        for group in groups_of(tensors)
        if any(tensor.steps[number].work == "F64" for tensor, number in group.members)
        for tensor, number in group.members
    }
    if not wide:
        return list(tensors)
    return [
        replace(tensor, steps=tuple(replace(s, work="F64") if s.stream in wide else s for s in tensor.steps))
        for tensor in tensors
    ]
