"""Whether compiling a merge's programs pays, and doing it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from streammerge.base.dtypes import DTYPES
from streammerge.base.units import format_size
from streammerge.kernels.compiled import (
    BYTES_TO_COMPILE,
    SECONDS_TO_COMPILE,
    Cache,
    Signature,
    can_be_compiled,
    compiler_missing,
    default_cache,
)
from streammerge.kernels.contract import BLOCK, Program
from streammerge.kernels.dtypes import torch_dtype
from streammerge.plan.budget import Schedule, keeps
from streammerge.plan.tensor import Step, TensorPlan

Compile = Literal["auto", "on", "off"]
# Per element and model on one thread, where eager code takes what the program says (docs/design.md has a table).
_COMPILED_NS = 0.5
_SLOWER = "running uncompiled, which is slower and gives the same bits"


@dataclass(frozen=True)
class Compiling:
    """What is compiled, and what it is worth.

    `cache` is where programs are taken from, None for eager code only; `missing` are to be built first.
    `seconds` is a guess at the arithmetic of one run, building included.
    """

    cache: Cache | None
    missing: tuple[tuple[Program, Signature], ...]
    note: str | None
    seconds: float

    def build(self, tell: Callable[[str], None]) -> None:
        """Compile what is missing; tells what happens and what went wrong."""
        if self.note is not None:
            tell(self.note)
        if self.cache is None or not self.missing:
            return
        count, seconds = len(self.missing), len(self.missing) * SECONDS_TO_COMPILE
        tell(f"compiling {count} program{'s'[: count > 1]} once for this machine, about {seconds:.0f} s")
        if (failure := self.cache.build(self.missing)) is not None:
            tell(f"compiling failed ({failure}); {_SLOWER}")


def consider(tensors: Sequence[TensorPlan], schedule: Schedule, mode: Compile, *, on_gpu: bool) -> Compiling:
    """Decide what to compile for `tensors`: with "auto" what saves more time than it costs, if there is memory."""
    return weigh(programs_of(tensors, schedule), schedule.threads, schedule.limit_bytes, "off" if on_gpu else mode)


def weigh(wanted: Mapping[tuple[Program, Signature], int], threads: int, limit_bytes: int, mode: Compile) -> Compiling:
    """The same for programs with the elements times models that each sees."""
    eager = sum(count * program.eager_ns for (program, _), count in wanted.items()) * 1e-9 / threads
    if mode == "off":
        return Compiling(None, (), None, eager)
    cache = default_cache()
    missing = tuple(pair for pair in wanted if not cache.package(*pair).exists())
    saved = sum(wanted[pair] * (pair[0].eager_ns - _COMPILED_NS) for pair in missing) * 1e-9 / threads
    compiled = sum(wanted.values()) * _COMPILED_NS * 1e-9 / threads
    cost = len(missing) * SECONDS_TO_COMPILE
    if not missing:
        return Compiling(cache, (), None, compiled)
    reason = _cannot(limit_bytes)
    if mode == "auto" and (saved < cost or reason is not None):
        return Compiling(cache, (), None, compiled + saved)
    if reason is not None:
        return Compiling(cache, (), f"--compile on: {reason}; {_SLOWER}", compiled + saved)
    return Compiling(cache, missing, None, compiled + cost)


def _cannot(limit_bytes: int) -> str | None:
    """Why nothing can be compiled now, or None."""
    if limit_bytes < BYTES_TO_COMPILE:
        return f"compiling takes {format_size(BYTES_TO_COMPILE)}, the budget is {format_size(limit_bytes)}"
    return compiler_missing()


def programs_of(
    tensors: Sequence[TensorPlan], schedule: Schedule | None = None
) -> dict[tuple[Program, Signature], int]:
    """The programs of these tensors that can be compiled, with the elements times models that each sees in all.

    Those are of whole blocks: so many small tensors are worth a compiler.
    """
    counts: dict[tuple[Program, Signature], int] = {}
    for tensor in tensors:
        for step in tensor.steps:
            if step.settings.sequential is not None:
                continue
            method, look = step.method, signature_of(tensor, step)
            merging, looks = method.program(step.settings), method.looks(step.settings)
            if schedule is not None and step.kept_bytes(tensor.shape) and keeps(tensor, schedule):
                assert method.kept_programs is not None
                merging, looks = method.kept_programs(step.settings)
            used = [(program, look) for program in looks]
            if DTYPES[step.dtype].bits > 8:
                used.append((merging, look._replace(out=torch_dtype(step.dtype))))
            grain = step.grain(tensor.shape)
            for pair in used:
                if not can_be_compiled(pair[0], grain):
                    continue
                orders = pair[0].orders
                for each in (pair,) if orders is None else (pair, (orders, look)):
                    counts[each] = counts.get(each, 0) + -(-tensor.elements // BLOCK) * BLOCK * look.models
    return counts


def signature_of(tensor: TensorPlan, step: Step) -> Signature:
    """The types a step's looks are run with."""
    inputs = tuple(torch_dtype(tensor.dtypes[i]) for i in step.operands)
    return Signature(torch_dtype(step.work), inputs, step.has_base, None)
