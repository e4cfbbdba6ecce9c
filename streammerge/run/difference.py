"""`streammerge diff`: how far two models, or two models and their base, lie apart, tensor by tensor, in one pass."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import yaml

from streammerge.base.dtypes import DTYPES
from streammerge.kernels.blocksum import total
from streammerge.kernels.contract import Look, Problem, Surveying
from streammerge.kernels.difference import MOMENTS, Moments
from streammerge.plan.gather import Read
from streammerge.plan.group import Group
from streammerge.plan.names import layer_of, order_of
from streammerge.plan.plan import Plan
from streammerge.plan.recipe import parse_recipe
from streammerge.plan.tensor import TensorPlan
from streammerge.plan.view import Folded, Operand, view_of, with_heads
from streammerge.run.memory import refusals
from streammerge.run.merge import Options, plan_recipe, schedule_for, stop_signals
from streammerge.run.survey import ask_together
from streammerge.storage.source import Source

_PIECE = 8 << 20


@dataclass(frozen=True)
class Distance:
    """How two models differ in some tensors. Shares and cosines are None where there is nothing to take them of."""

    elements: int
    sums: Moments

    @property
    def relative(self) -> float | None:
        """The size of the difference over that of the first model: ‖b - a‖ / ‖a‖."""
        return math.sqrt(self.sums.dd / self.sums.aa) if self.sums.aa else None

    @property
    def size(self) -> float:
        """‖b - a‖."""
        return math.sqrt(self.sums.dd)

    @property
    def cosine(self) -> float | None:
        """Of the angle between the two."""
        return _cosine(self.sums.ab, self.sums.aa, self.sums.bb)

    @property
    def changed(self) -> float | None:
        """The share of elements that differ."""
        return self.sums.changed / self.elements if self.elements else None

    @property
    def delta_cosine(self) -> float | None:
        """Of the angle between the two deltas from the base."""
        return _cosine(self.sums.uv, self.sums.uu, self.sums.vv)

    @property
    def conflict(self) -> float | None:
        """The share of elements whose deltas have different signs, of those that both models changed."""
        return self.sums.opposed / self.sums.both if self.sums.both else None


@dataclass(frozen=True)
class Difference:
    """Two models compared. `integers` are tensors that are no floats, and whether they differ; `alone` the tensors that
    only some of the models have, which are not compared."""

    models: tuple[str, str]
    base: str | None
    tensors: dict[str, Distance]
    integers: dict[str, bool]
    alone: tuple[str, ...]
    warnings: tuple[str, ...]

    def in_order(self) -> dict[str, Distance]:
        """The tensors before the layers, those in them, and those after them."""
        return dict(sorted(self.tensors.items(), key=lambda item: order_of(item[0])))

    def by_layer(self) -> dict[str, Distance]:
        """The distances of layers, in order, and of each tensor before and after them."""
        groups: dict[str, list[Distance]] = {}
        for name, distance in self.in_order().items():
            layer = layer_of(name)
            key = name if layer is None else f"{layer[0]}.{layer[1]}".lstrip(".")
            groups.setdefault(key, []).append(distance)
        return {key: together(members) for key, members in groups.items()}

    @property
    def whole(self) -> Distance:
        """Of all compared tensors."""
        return together(list(self.tensors.values()))


def together(distances: Sequence[Distance]) -> Distance:
    """The distance over several tensors."""
    if not distances:
        return Distance(0, Moments(*[0.0] * 7))
    sums = Moments(*total(torch.tensor([each.sums for each in distances], dtype=torch.float64)))
    return Distance(sum(each.elements for each in distances), sums)


@refusals()
def compare(first: str, second: str, base: str | None, *, max_memory: int | None = None, threads: int | None = None,
            note: Callable[[str], None], progress: Callable[[float, float], None]) -> Difference:  # fmt: skip
    """Compare two models, named as in a recipe. Reads everything once, within the budget.

    Raises InputError, UserError when they do not hold the same tensors in the same shapes, DoesNotFit, Stopped.
    """
    models = [{"model": model} for model in (first, second, *([] if base is None else [base]))]
    text = yaml.safe_dump({"merge_method": "linear", "models": models, "parameters": {"weight": 1}})
    options = Options(max_memory=max_memory, threads=threads)
    plan = plan_recipe(parse_recipe(text, Path("diff")), options, note)
    merged = [tensor for tensor in plan.tensors if tensor.steps and len(tensor.steps[-1].operands) == len(models)]
    whole = {tensor.name for tensor in merged}
    rest = [tensor.name for tensor in plan.tensors if tensor.name not in whole]
    views, _ = with_heads([view_of(model, plan.checkpoints) for model in plan.models])
    integers = {
        name: [view.tensors[name] for view in views[:2]]
        for name in rest
        if all(name in view.tensors and DTYPES[view.tensors[name].dtype].kind == "exact" for view in views)
    }
    alone = [name for name in rest if name not in integers]
    with stop_signals() as stopping:
        tensors = _measure(plan, merged, options, stopping, progress)
        sources = [Source(checkpoint) for checkpoint in plan.checkpoints]
        try:
            differing = {name: _differs(pair, sources) for name, pair in integers.items()}
        finally:
            for source in sources:
                source.close()
    return Difference((first, second), base, tensors, differing, tuple(alone), plan.warnings)


def _measure(plan: Plan, tensors: Sequence[TensorPlan], options: Options, stopping: Callable[[], bool],
             progress: Callable[[float, float], None]) -> dict[str, Distance]:  # fmt: skip
    if not tensors:
        return {}
    # Worked on in float64: the angle between a model and its fine-tune is lost in float32.
    wide = [replace(tensor, steps=(*tensor.steps[:-1], replace(tensor.steps[-1], work="F64"))) for tensor in tensors]
    filled = [tensor for tensor in wide if tensor.elements]
    sums = {tensor.name: torch.zeros(7 if len(plan.models) == 2 else 12, dtype=torch.float64) for tensor in wide}
    blocks = sum(tensor.elements for tensor in filled) or 1
    done = 0

    def adding(tensor: TensorPlan) -> Callable[[torch.Tensor], None]:
        def add(part: torch.Tensor) -> None:
            nonlocal done
            sums[tensor.name] += part.sum(0)
            done += part.shape[0]
            progress(done * 65536, blocks)

        return add

    def ask(problems: Sequence[Problem]) -> Surveying:
        yield [Look(MOMENTS, {}, fold=adding(tensor)) for tensor in filled]
        return []

    group = Group("diff", tuple((tensor, len(tensor.steps) - 1) for tensor in filled))
    if filled:
        ask_together(plan, group, ask, schedule_for(plan, options), lambda program, signature: None, stopping)
    return {tensor.name: Distance(tensor.elements, Moments(*sums[tensor.name].tolist())) for tensor in wide}


def _differs(pair: Sequence[Operand], sources: Sequence[Source]) -> bool:
    """Whether the bytes of two tensors of one shape and dtype differ."""
    one, two = bytearray(_PIECE), bytearray(_PIECE)
    reads = [operand.read if isinstance(operand, Folded) else operand for operand in pair]
    assert isinstance(reads[0], Read)
    nbytes = reads[0].spec.nbytes
    for start in range(0, nbytes, _PIECE):
        size = min(_PIECE, nbytes - start)
        for read, buffer in zip(reads, (one, two), strict=True):
            assert isinstance(read, Read)
            spec = read.spec
            sources[read.checkpoint].read_into(memoryview(buffer)[:size], spec.file, spec.offset + start)
        if one[:size] != two[:size]:
            return True
    return False


def _cosine(product: float, one: float, other: float) -> float | None:
    length = math.sqrt(one) * math.sqrt(other)
    return max(-1.0, min(1.0, product / length)) if length else None
