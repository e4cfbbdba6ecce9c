"""Hi-Merging's models: which part of which specialist is in a merge, and how strongly.

A `Group` is what decisions are made about: the tensors of one block, or the attention or the rest of one, or what lies
outside the blocks. A `Mixture` says for every group and model how it is treated; a `Family` makes variants and recipes
of mixtures.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from streammerge.base.errors import UserError
from streammerge.kernels.contract import Problem, Settings
from streammerge.kernels.cut import MAGNITUDES, Cut, kept
from streammerge.kernels.groupcut import group_cuts
from streammerge.kernels.whole import padded
from streammerge.methods.passthrough import AS_IT_IS, PASSTHROUGH
from streammerge.plan.draft import Draft, inputs_of
from streammerge.plan.group import Group as Scope
from streammerge.plan.group import groups_of
from streammerge.plan.names import layer_of
from streammerge.plan.plan import Plan
from streammerge.plan.tensor import TensorPlan, work_of
from streammerge.plan.view import Folded, Operand, view_of
from streammerge.study.network import Network
from streammerge.study.variants import Shelf, Variant, Version, check_network, make_version


@dataclass(frozen=True)
class Treatment:
    """What becomes of a model's delta in a group: factors on its stage-1 density and scale. A scale of 0 drops it."""

    density: float = 1.0
    scale: float = 1.0

    @property
    def label(self) -> str:
        """`keep`, `drop`, `half`, or the factors."""
        known = {KEEP: "keep", DROP: "drop", HALF: "half"}
        factors = f"density × {self.density:g}, scale × {self.scale:g}"
        return known.get(self, f"scale × {self.scale:g}" if self.density == 1 else factors)


KEEP, DROP, HALF = Treatment(), Treatment(1.0, 0.0), Treatment(0.5, 0.5)


@dataclass(frozen=True)
class Group:
    """Tensors that are decided about together. `filters` name them, and no other, in a recipe."""

    label: str
    names: tuple[str, ...]
    filters: tuple[str, ...]
    is_layer: bool


@dataclass(frozen=True)
class Mixture:
    """A merge of models: stage-1 density, scale and weight per model, and treatments (groups, models)."""

    density: tuple[float, ...]
    scale: tuple[float, ...]
    weight: tuple[float, ...]
    parts: tuple[tuple[Treatment, ...], ...]

    def with_part(self, group: int, model: int, treatment: Treatment) -> Mixture:
        """One model treated otherwise in one group."""
        row = list(self.parts[group])
        row[model] = treatment
        return self.with_row(group, tuple(row))

    def with_row(self, group: int, row: tuple[Treatment, ...]) -> Mixture:
        """All models treated otherwise in one group."""
        return replace(self, parts=(*self.parts[:group], row, *self.parts[group + 1 :]))

    def without(self, group: int) -> Mixture:
        """All deltas of a group left out."""
        return self.with_row(group, (DROP,) * len(self.weight))

    def only(self, group: int) -> Mixture:
        """The base with the deltas of one group."""
        nothing = (DROP,) * len(self.weight)
        return replace(self, parts=tuple(row if i == group else nothing for i, row in enumerate(self.parts)))

    def with_weight(self, weight: Sequence[float]) -> Mixture:
        return replace(self, weight=tuple(weight))


# Asks many tensors together what a function of their problems wants to know.
Asking = Callable[[Scope, Callable[[Sequence[Problem]], Any]], Any]


class Family:
    """All mixtures of one recipe's models: their variants, and the parameters that write one down."""

    def __init__(self, plan: Plan, network: Network, shelf: Shelf, *, split_blocks: bool, outside: bool,
                 ask: Asking | None = None) -> None:  # fmt: skip
        """`plan` is of the method hi_merging; its parameters are replaced. `outside` makes layers of what is none.

        `ask` looks at many tensors together; it is needed when densities are shares of a layer or a whole model.
        """
        self._plan, self._shelf = plan, shelf
        check_network(plan)
        network.check_shapes({tensor.name: tensor.shape for tensor in plan.tensors})
        units = network.units_of(tensor.name for tensor in plan.tensors)
        # A tensor that the network does not know has no score; it is merged like what lies outside.
        self._units = [
            [tensor for tensor in plan.tensors if unit in units[tensor.name]] for unit in range(network.num_units)
        ]
        self.groups = _groups(plan.tensors, units, network.num_units, split_blocks, outside)
        self._group_of = {name: i for i, group in enumerate(self.groups) for name in group.names}
        self._checkpoints = [shelf.add(checkpoint) for checkpoint in plan.checkpoints]
        views = {model.reference: view_of(model, plan.checkpoints) for model in plan.models}
        own, _ = inputs_of(plan.recipe.last, views, plan.recipe.path)
        # The base first.
        self._views = [own[source.model] for source in plan.recipe.only.inputs]
        self._check_names(units)
        self._versions: dict[Any, Version] = {}
        self._scopes = groups_of(plan.tensors)
        self._ask = ask
        # By model and density, the cut of every tensor whose density is a share of more than itself.
        self._cuts: dict[tuple[int, float], dict[str, Cut]] = {}

    def _check_names(self, units: Mapping[str, tuple[int, ...]]) -> None:
        """Raise UserError when models lack a tensor that the network has: there is no deciding about it."""
        lacking = [
            f"tensor {tensor.name!r} is not in {view.model}"
            for tensor in self._plan.tensors
            for view in self._views
            if units[tensor.name] and tensor.name not in view.tensors
        ]
        if lacking:
            raise UserError(f"{self._plan.recipe.path}: an analysis needs every tensor in every model: {lacking[0]}.")

    @property
    def models(self) -> list[str]:
        return [source.model for source in self._plan.recipe.only.models]

    @property
    def layers(self) -> list[int]:
        """The groups that are analysed."""
        return [i for i, group in enumerate(self.groups) if group.is_layer]

    def mixture(self, density: Sequence[float], scale: Sequence[float], weight: Sequence[float]) -> Mixture:
        """Every group of every model kept."""
        parts = ((KEEP,) * len(self.models),) * len(self.groups)
        return Mixture(tuple(density), tuple(scale), tuple(weight), parts)

    def variant(self, mixture: Mixture) -> Variant:
        """The model of a mixture."""
        if self._scopes:
            rows = [zip(row, mixture.density, strict=True) for row in mixture.parts]
            self.prepare({own * part.density for row in rows for part, own in row})
        return Variant(tuple(self._version(unit, mixture) for unit in range(len(self._units))))

    def prepare(self, densities: Collection[float]) -> None:
        """Find the cuts of these densities, of all models at once, where they are not known yet."""
        pairs = [(m, p) for m in range(len(self.models)) for p in sorted(densities) if (m, p) not in self._cuts]
        if not self._scopes or not pairs:
            return
        assert self._ask is not None
        self._cuts |= {pair: {} for pair in pairs}
        for scope in self._scopes:
            total = sum(tensor.elements for tensor, _ in scope.members)
            wanted = {(m, kept(p, total)) for m, p in pairs}
            found = self._ask(scope, partial(group_cuts, quantity=MAGNITUDES, wanted=wanted))
            for m, p in pairs:
                for (tensor, _), cut in zip(scope.members, found[m, kept(p, total)], strict=True):
                    self._cuts[m, p][tensor.name] = cut

    def equal_models(self) -> list[list[int]]:
        """Models whose files hold the same bytes, as lists of their numbers; the tensors are read for it."""
        numbers = list(range(len(self.models)))
        same = {(i, j) for i in numbers for j in numbers if i < j}
        for tensor in self._plan.tensors:
            if not same:
                break
            values = [value.view(torch.uint8) for value in self._inputs(tensor)[1:]]
            if len(values) < len(numbers):
                # Not in every model.
                same.clear()
                break
            same = {(i, j) for i, j in same if torch.equal(values[i], values[j])}
            self._shelf.forget()
        groups: list[list[int]] = []
        for i in numbers:
            mine = next((group for group in groups if (group[0], i) in same), None)
            if mine is None:
                groups.append([i])
            else:
                mine.append(i)
        return groups

    def stored(self, group: int) -> Iterator[list[Tensor]]:
        """The inputs of every tensor of a group, base first, in buffers as `pad` makes them; one tensor at a time."""
        wanted = set(self.groups[group].names)
        for tensor in self._plan.tensors:
            if tensor.name not in wanted or tensor.elements == 0 or tensor.action == "equal":
                continue
            if len(self._operands(tensor)) < len(self._views):
                continue
            yield [padded(value.view(-1)) for value in self._inputs(tensor)]
            self._shelf.forget()

    def parameters(self, mixture: Mixture, model: int) -> dict[str, Any]:
        """The parameters of one model in a recipe of this mixture."""
        density: list[dict[str, Any]] = []
        scale: list[dict[str, Any]] = []
        for group, row in zip(self.groups, mixture.parts, strict=True):
            treatment = row[model]
            for text in group.filters:
                if treatment.density != 1:
                    density.append({"filter": text, "value": mixture.density[model] * treatment.density})
                if treatment.scale != 1:
                    scale.append({"filter": text, "value": mixture.scale[model] * treatment.scale})
        return {
            "weight": mixture.weight[model],
            "density": [*density, {"value": mixture.density[model]}] if density else mixture.density[model],
            "scale": [*scale, {"value": mixture.scale[model]}] if scale else mixture.scale[model],
        }

    def _version(self, unit: int, mixture: Mixture) -> Version:
        groups = sorted({self._group_of[tensor.name] for tensor in self._units[unit]})
        key = (unit, mixture.density, mixture.scale, mixture.weight, tuple(mixture.parts[i] for i in groups))
        if key not in self._versions:
            made: dict[tuple[int, bool, float], Settings] = {}
            tensors = [self._tensor(tensor, mixture, made) for tensor in self._units[unit]]
            self._versions[key] = self._version_of(tensors)
        return self._versions[key]

    def _version_of(self, tensors: Sequence[TensorPlan]) -> Version:
        return make_version(self._plan.seed, tensors, self._checkpoints, self._shelf)

    def _operands(self, tensor: TensorPlan) -> tuple[Operand, ...]:
        """The tensor in every model, the base first; or in those that have it."""
        return tuple(view.tensors[tensor.name] for view in self._views if tensor.name in view.tensors)

    def _inputs(self, tensor: TensorPlan) -> list[Tensor]:
        """The same, read: as stored, or with an adapter folded in float32."""
        alone = []
        for operand in self._operands(tensor):
            dtype = "F32" if isinstance(operand, Folded) and operand.dtype != "F64" else operand.dtype
            draft = Draft(dtype, tensor.shape, PASSTHROUGH, AS_IT_IS, (operand,), has_base=False, stream=tensor.name)
            reads, steps = work_of(draft)
            alone.append(self._version_of([replace(tensor, dtype=dtype, reads=reads, steps=steps)]))
        self._shelf.load(alone)
        return [self._shelf.alone(version).contiguous() for version in alone]

    def _tensor(
        self, tensor: TensorPlan, mixture: Mixture, made: dict[tuple[int, bool, float], Settings]
    ) -> TensorPlan:
        if len(self._operands(tensor)) < len(self._views):
            # Not in every model, nor in the network: as it is without an analysis.
            return tensor
        group, vector = self._group_of[tensor.name], len(tensor.shape) < 2
        usual = self._plan.settings[tensor.name]
        key = (group, vector, usual.depth)
        if key not in made:
            rows = list(zip(mixture.parts[group], mixture.density, mixture.scale, strict=True))
            density = tuple(1.0 if vector else own * part.density for part, own, _ in rows)
            scale = tuple(own * part.scale for part, _, own in rows)
            models = {**usual.models, "weight": mixture.weight, "density": density, "scale": scale}
            made[key] = replace(usual, models=models)
        draft = Draft(tensor.dtype, tensor.shape, self._plan.method, made[key], self._operands(tensor),
                      has_base=True, stream=tensor.name)  # fmt: skip
        reads, steps = work_of(draft)
        if self._cuts and not vector:
            densities = made[key].numbers("density")
            cuts = [self._cuts[m, density][tensor.name] for m, density in enumerate(densities)]
            found = [[cut.threshold, cut.last] for cut in cuts]
            steps = (*steps[:-1], replace(steps[-1], found=found, work=tensor.steps[-1].work))
        return replace(tensor, reads=reads, steps=steps)


def _groups(tensors: Sequence[TensorPlan], units: Mapping[str, tuple[int, ...]], num_units: int, split_blocks: bool,
            outside: bool) -> list[Group]:  # fmt: skip
    names = [tensor.name for tensor in tensors]
    groups = []
    for unit in range(1, num_units - 1):
        here = [name for name in names if units[name] == (unit,)]
        parts: dict[str, list[str]] = {}
        for name in here:
            parts.setdefault(_part(name) if split_blocks else "block", []).append(name)
        for part, members in parts.items():
            label = _prefix(here[0]).rstrip(".") + ("" if part == "block" else f" {part}")
            groups.append(Group(label, tuple(members), _filters(members, names), is_layer=True))
    inside = {name for group in groups for name in group.names}
    rest = [name for name in names if name not in inside]
    places: dict[str, list[str]] = {}
    for name in rest:
        place = "front" if 0 in units[name] else "back" if units[name] else "unused"
        places.setdefault(place if outside else "outside", []).append(name)
    for place, members in places.items():
        groups.append(Group(place, tuple(members), tuple(members), outside and place != "unused"))
    return groups


def _part(name: str) -> Literal["attention", "rest"]:
    child = name[len(_prefix(name)) :].split(".", 1)[0]
    return "attention" if "attn" in child.replace("layernorm", "") or child == "attention" else "rest"


def _prefix(name: str) -> str:
    """`model.layers.3.` of `model.layers.3.mlp.up_proj.weight`."""
    layer = layer_of(name)
    if layer is None:
        return ""
    stack, index = layer
    return f"{stack}.{index}." if stack else f"{index}."


def _filters(members: Sequence[str], names: Sequence[str]) -> tuple[str, ...]:
    """Few texts that every member contains and no other tensor does: a block's prefix, its children, or names."""
    wanted = set(members)
    prefix = _prefix(members[0])
    children = dict.fromkeys(prefix + name[len(prefix) :].split(".", 1)[0] + "." for name in members)
    for texts in ((prefix,), tuple(children)):
        found = {name for name in names if any(text in name for text in texts)}
        if found == wanted:
            return texts
    return tuple(members)
