"""One output tensor, planned: what is read for it, the steps that are done with it, and where its bytes go."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

from streammerge.base.dtypes import DTYPES
from streammerge.kernels.contract import BLOCK, WORDS, Grain, Method, Settings, grain_of
from streammerge.kernels.fold import FOLD, fold_settings
from streammerge.methods.passthrough import AS_IT_IS, PASSTHROUGH
from streammerge.plan.adapter import Change
from streammerge.plan.draft import Draft
from streammerge.plan.gather import Gathered, Read
from streammerge.plan.given import Drawn, Given
from streammerge.plan.scaled import Scaled, Scaling
from streammerge.plan.view import Folded, Operand

# Everything that can be read for a tensor: of a checkpoint, of several, or of none.
Leaf = Read | Gathered | Scaled | Given | Drawn

# The shard of a tensor that is only looked at.
UNWRITTEN = -1


@dataclass(frozen=True)
class Step:
    """One merge: a method over some operands, base first if `has_base`.

    An operand below the number of a tensor's reads is one of them, the next ones are the results of earlier steps.
    `work` is the dtype of the arithmetic, F32 or F64; `stream` names the random bits ("" where there are none).
    `found` is what a survey of many tensors found for this one, once there was one.
    """

    method: Method
    settings: Settings
    operands: tuple[int, ...]
    has_base: bool
    dtype: str
    work: str
    stream: str
    stage: int
    found: Any = None
    # What a step of FOLD folds in.
    change: Change | None = None

    def grain(self, shape: Sequence[int]) -> Grain:
        return grain_of(shape, by_rows=self.method.by_rows(self.settings))

    def kept_bytes(self, shape: Sequence[int]) -> int:
        """What its method would like to keep of its looks for the merging pass; 0 where units are more than a block."""
        grain = self.grain(shape)
        if not self.method.keeps(self.settings) or grain.unit > BLOCK:
            return 0
        return grain.units(math.prod(shape)) * (len(self.operands) - self.has_base) * WORDS * 4


@dataclass(frozen=True)
class TensorPlan:
    """One output tensor: what is read for it, what is done, and where its bytes go.

    Without steps the bytes of the first read are copied, after making sure that all reads agree (integers are never
    computed with). With steps, the last one's result is written; with `scaling` as codes, whose scales go to
    `scale_offset` in the same shard.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    elements: int
    reads: tuple[Leaf, ...]
    steps: tuple[Step, ...]
    shard: int
    offset: int
    scaling: Scaling | None = None
    scale_offset: int = 0

    @property
    def nbytes(self) -> int:
        return self.elements * DTYPES[self.dtype].itemsize

    @property
    def names(self) -> tuple[str, ...]:
        """The tensors that it writes: itself, and its scales."""
        return (self.name,) if self.scaling is None else (self.name, self.scaling.scale_name)

    @property
    def factor_bytes(self) -> int:
        """The most that the factors of its adapters take, in float64, with what is read for them."""
        changes = [step.change for step in self.steps if step.change is not None]
        return sum(spec.elements * 16 for change in changes for spec in change.specs)

    @property
    def kept_bytes(self) -> int:
        """What all steps together would like to keep."""
        return sum(step.kept_bytes(self.shape) for step in self.steps)

    @property
    def read_bytes(self) -> int:
        """The bytes of all that is read, once."""
        return sum(read.nbytes for read in self.reads)

    @property
    def action(self) -> Literal["merge", "copy", "equal"]:
        return "merge" if self.steps else "copy" if len(self.reads) == 1 else "equal"

    @cached_property
    def dtypes(self) -> tuple[str, ...]:
        """The dtype of every operand: of the reads, then of the steps; and of the codes where there are such."""
        codes = () if self.scaling is None else (self.dtype,)
        return (*(read.dtype for read in self.reads), *(step.dtype for step in self.steps), *codes)

    @cached_property
    def passes(self) -> int:
        """How often it is read when what is read does not stay in memory."""
        asked = sum(step.method.passes(step.settings, self.narrow(step), self.elements) - 1 for step in self.steps)
        # Scales of blocks that are longer than a tile are found before the first code.
        return 1 + asked + (self.scaling is not None and self.scaling.quantum is None)

    @property
    def has_cuts(self) -> bool:
        """Whether entries are taken out of it."""
        return any(step.method.cuts(step.settings) for step in self.steps)

    @property
    def survey_passes(self) -> int:
        """How often it is read before the first tensor is merged, together with others."""
        surveyed = [step.method for step in self.steps if step.method.scope(step.settings) != "tensor"]
        return sum(method.survey_passes for method in surveyed)

    @cached_property
    def quantum(self) -> int:
        """A tile's elements are a multiple of this, for the units of every step to be whole; or else all of them."""
        units = {step.grain(self.shape).unit for step in self.steps} or {BLOCK}
        if self.scaling is not None and self.scaling.quantum is not None:
            units.add(self.scaling.quantum)
        return min(math.lcm(*units), max(1, self.elements) if len(units) > 1 else math.lcm(*units))

    def narrow(self, step: Step) -> bool:
        """Whether all that a step works with is of 16 bits."""
        return all(DTYPES[self.dtypes[i]].bits == 16 for i in step.operands)


def work_of(draft: Operand) -> tuple[tuple[Leaf, ...], tuple[Step, ...]]:
    """What is read for an output tensor, and the steps that are done with it; none if it comes to a copy."""
    reads: list[Leaf] = []
    # A step is an operand by its number, counted from −1 downwards until the number of reads is known.
    steps: list[Step] = []
    known: dict[int | tuple[Folded, str], int] = {}

    def folded(of: Folded, dtype: str) -> int:
        """The number of a tensor as an adapter makes it, in this dtype."""
        if of.change is None and of.read.dtype == dtype:
            return operand(of.read)
        if (of, dtype) not in known:
            read, change = operand(of.read), of.change
            if change is None:
                steps.append(Step(PASSTHROUGH, AS_IT_IS, (read,), False, dtype, "F64", "", 0))
            else:
                settings = fold_settings(
                    norms=change.magnitude is not None, columns=change.transposed, short=DTYPES[dtype].bits <= 16
                )
                # What it adds is in float64 in any case.
                work = "F64" if "F64" in (dtype, of.read.dtype) else "F32"
                steps.append(Step(FOLD, settings, (read,), False, dtype, work, "", 0, change=change))
            known[of, dtype] = -len(steps)
        return known[of, dtype]

    def operand(of: Operand) -> int:
        if isinstance(of, Leaf):
            if of not in reads:
                reads.append(of)
            return reads.index(of)
        if isinstance(of, Folded):
            wide = "F64" if "F64" in (of.dtype, of.read.dtype) else "F32"
            return folded(of, of.read.dtype if of.change is None else wide)
        assert isinstance(of, Draft)
        if (copied := of.copied) is not None:
            # A stage's result is what it would be if it were written.
            return folded(copied, of.dtype) if isinstance(copied, Folded) else operand(copied)
        if id(of) not in known:
            operands = tuple(operand(each) for each in of.operands)
            work = "F64" if "F64" in {of.dtype, *(each.dtype for each in of.operands)} else "F32"
            steps.append(Step(of.method, of.settings, operands, of.has_base, of.dtype, work, of.stream, of.stage))
            known[id(of)] = -len(steps)
        return known[id(of)]

    if DTYPES[draft.dtype].kind == "exact":
        return tuple(dict.fromkeys(_leaves(draft))), ()
    operand(draft)
    count = len(reads)
    numbered = [
        step if min(step.operands) >= 0
        else replace(step, operands=tuple(i if i >= 0 else count - 1 - i for i in step.operands))
        for step in steps
    ]  # fmt: skip
    return tuple(reads), tuple(numbered)


def _leaves(draft: Operand) -> Iterator[Leaf]:
    """Everything that a tensor is made of. Of integers all of it must agree."""
    if isinstance(draft, Leaf | Folded):
        # Integers are in no adapter's change.
        yield draft.read if isinstance(draft, Folded) else draft
        return
    assert isinstance(draft, Draft)
    for each in draft.operands:
        yield from _leaves(each)
