"""What a model with experts is made of, tensor by tensor: those of the base as they are, and in place of its MLPs a
router and the MLPs of other models. The engine sees copies, some of them scaled, and rows that the plan holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from streammerge.base.dtypes import DTYPES, promote
from streammerge.base.errors import RecipeError
from streammerge.kernels.contract import Settings
from streammerge.methods.linear import LINEAR
from streammerge.methods.passthrough import AS_IT_IS, PASSTHROUGH
from streammerge.plan.architecture import EMBEDDING, HEAD, LAST, NORM, PROJECTIONS, STACK, Architecture, mlp_name
from streammerge.plan.draft import Draft, check_readable
from streammerge.plan.given import Given, drawn
from streammerge.plan.moe import Expert, Moe
from streammerge.plan.names import is_buffer, layer_of, listing, stacks
from streammerge.plan.view import MOST_LAYERS, Model, Operand, View, view_of, with_heads
from streammerge.storage.checkpoint import Checkpoint

# The deviation of random gates, which is what transformers gives those of a new model.
GATE_DEVIATION = 0.02
_SHOWN = 10

Rows = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Ground:
    """What planning such a model must know beyond the headers: its architecture, and the rows of its gates.

    `rows` are one per expert (experts, hidden), None for random ones; `shared` those of experts that all tokens go
    through, None where they count half whatever the token.
    """

    architecture: Architecture
    rows: Rows | None
    shared: tuple[Rows | None, ...]


def draft_experts(moe: Moe, where: str, models: Sequence[Model], checkpoints: Sequence[Checkpoint], ground: Ground,
                  seed: int) -> tuple[View, list[str]]:  # fmt: skip
    """What the output is made of, and warnings. `where` names the recipe.

    `models` are one per input of the recipe, the base first. Raises RecipeError with everything that does not fit,
    and UserError for quantised weights that cannot be read.
    """
    check_readable(models, checkpoints)
    views = {model.reference: view_of(model, checkpoints) for model in models}
    (base,), _ = with_heads([views[moe.base]])
    work = _Drafting(moe, base, views, ground, seed)
    problems = work.problems()
    if problems:
        more = [f"and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else []
        raise RecipeError(where, [*problems[:_SHOWN], *more])
    tensors = work.run()
    return replace(base, model="", tensors=tensors), work.warnings()


class _Drafting:
    """The work on one model."""

    def __init__(self, moe: Moe, base: View, views: Mapping[str, View], ground: Ground, seed: int) -> None:
        self._moe, self._base, self._views, self._ground, self._seed = moe, base, views, ground, seed
        self._kind = ground.architecture
        self._layers = _layers_of(base)
        # One of each, so that all layers share it.
        self._rows = None if ground.rows is None else Given(ground.rows)

    def problems(self) -> list[str]:
        """Everything that does not fit."""
        own, kind = self._base.tensors, self._kind
        expected = [EMBEDDING, NORM]
        for layer in range(self._layers):
            expected += [f"{STACK}.{layer}.{name}" for name in kind.in_layer]
            expected += [mlp_name(layer, projection) for projection in PROJECTIONS]
        found: list[str] = []
        if missing := [name for name in expected if name not in own]:
            found.append(f"{self._moe.base} has no {listing(missing)}: {kind.title} is made of "
                         f"{' and '.join(kind.inputs)} models")  # fmt: skip
        known = {*expected, HEAD}
        if strange := [name for name in own if name not in known and not is_buffer(name)]:
            found.append(f"{self._moe.base} has {listing(strange)}, for which {kind.title} has no place")
        if self._layers == 0:
            found.append(f"{self._moe.base} has no layers named {STACK}.0 and so on")
        for model in self._moe.sources:
            if model != self._moe.base:
                found += self._problems_of(model)
        return found

    def _problems_of(self, model: str) -> list[str]:
        """What is wrong with the MLPs of a model."""
        view, base = self._views[model], self._base.tensors
        layers = _layers_of(view)
        if layers != self._layers:
            return [f"{model} has {layers} layers, and the base {self._moe.base} {self._layers}: experts have as many"]
        names = [mlp_name(layer, projection) for layer in range(layers) for projection in PROJECTIONS]
        own = [name for name in view.tensors if ".mlp." in name and layer_of(name) is not None]
        found: list[str] = []
        if missing := [name for name in names if name not in view.tensors]:
            found.append(f"{model} has no {listing(missing)}: an expert is an MLP of {', '.join(PROJECTIONS)}")
        if strange := [name for name in own if name not in set(names)]:
            found.append(f"{model} has {listing(strange)}, for which an expert of {self._kind.title} has no place")
        unlike = [
            name for name in names
            if name in view.tensors and name in base and view.tensors[name].shape != base[name].shape
        ]  # fmt: skip
        if unlike:
            name = unlike[0]
            more = f", and {len(unlike) - 1} more differ" if len(unlike) > 1 else ""
            found.append(f"{name} is {list(view.tensors[name].shape)} in {model} and {list(base[name].shape)} in the "
                         f"base {self._moe.base}{more}: experts have the MLPs of models of one size")  # fmt: skip
        return found

    def warnings(self) -> list[str]:
        """What the user should know."""
        told = []
        own = self._base.tensors[EMBEDDING].shape[0]
        for model in self._moe.sources:
            table = self._views[model].tensors.get(EMBEDDING)
            if table is not None and table.shape[0] != own:
                told.append(f"{model} has {table.shape[0]} rows in its embedding, and the base {own}: the output has "
                            f"the base's tokens, and never one of {model} alone")  # fmt: skip
        rows, experts = self._ground.rows, self._moe.experts
        first: dict[bytes, Expert] = {}
        for i, expert in enumerate(experts if rows is not None else ()):
            assert rows is not None
            if (same := first.setdefault(rows[i].tobytes(), expert)) is not expert:
                told.append(f"{expert.place}has the same gate as {same.place.split(': ')[1]}: the router cannot tell "
                            f"them apart; give them prompts that differ")  # fmt: skip
        return told

    def run(self) -> dict[str, Operand]:
        """All tensors, in the order of the base's: where the first matrix of a layer's MLP is, all that replaces it."""
        tensors: dict[str, Operand] = {}
        replaced: set[int] = set()
        layers = {mlp_name(layer, name): layer for layer in range(self._layers) for name in PROJECTIONS}
        for name, operand in self._base.tensors.items():
            layer = layers.get(name)
            if layer is None:
                tensors[name] = self._draft(name, operand, self._stored([operand]))
            elif layer not in replaced:
                replaced.add(layer)
                tensors |= self._block(layer)
        return tensors

    def _block(self, layer: int) -> dict[str, Operand]:
        """What stands in a layer in place of its MLP."""
        kind, moe = self._kind, self._moe
        name = kind.router(layer)
        tensors: dict[str, Operand] = {name: self._router(name)}
        dtypes = {projection: self._stored(self._matrices(layer, projection)) for projection in PROJECTIONS}
        for i, expert in enumerate(moe.experts):
            for projection in PROJECTIONS:
                name = kind.expert(layer, i, projection)
                tensors[name] = self._matrix(name, expert, layer, projection, dtypes[projection])
        for expert, row in zip(moe.shared, self._ground.shared, strict=True):
            name, stored = kind.shared_gate(layer), self._stored([self._base.tensors[EMBEDDING]])
            tensors[name] = self._draft(name, Given(np.zeros((1, self._width)) if row is None else row), stored)
            for projection in PROJECTIONS:
                name = kind.shared_expert(layer, projection)
                tensors[name] = self._matrix(name, expert, layer, projection, dtypes[projection])
        return tensors

    @property
    def _width(self) -> int:
        return self._base.tensors[EMBEDDING].shape[1]

    def _matrices(self, layer: int, projection: str) -> list[Operand]:
        """The same matrix of every expert."""
        every = (*self._moe.experts, *self._moe.shared)
        return [self._views[expert.model].tensors[mlp_name(layer, projection)] for expert in every]

    def _router(self, name: str) -> Operand:
        stored = self._stored([self._base.tensors[EMBEDDING]])
        if self._rows is not None:
            return self._draft(name, self._rows, stored)
        shape = (len(self._moe.experts), self._width)
        return self._draft(name, drawn(self._seed, name, shape), stored, scale=GATE_DEVIATION)

    def _matrix(self, name: str, expert: Expert, layer: int, projection: str, stored: str) -> Operand:
        """A matrix of an expert: with its noise, and the last one times its scale."""
        operand = self._views[expert.model].tensors[mlp_name(layer, projection)]
        scale = expert.scale if projection == LAST else 1.0
        if expert.noise == 0:
            return self._draft(name, operand, stored, scale=scale)
        settings = Settings({"normalize": False}, {"weight": (scale, scale * expert.noise)})
        noise = drawn(self._seed, name, operand.shape)
        return Draft(stored, operand.shape, LINEAR, settings, (operand, noise), False, name)

    def _draft(self, name: str, operand: Operand, stored: str, *, scale: float = 1.0) -> Operand:
        settings = AS_IT_IS if scale == 1 else Settings({}, {"scale": (scale,)})
        return Draft(stored, operand.shape, PASSTHROUGH, settings, (operand,), False, name)

    def _stored(self, operands: Sequence[Operand]) -> str:
        """What they are stored in: transformers makes one tensor of a layer's experts, so all have one dtype."""
        if DTYPES[operands[0].dtype].kind == "exact":
            return operands[0].dtype
        return self._moe.dtype or promote([operand.dtype for operand in operands])


def _layers_of(view: View) -> int:
    """How many layers a model has; 0 where a name speaks of more than any has."""
    found = stacks(view.tensors).get(STACK, 0)
    return found if found <= MOST_LAYERS else 0
