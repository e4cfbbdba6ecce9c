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
    compiled_with,
    compiler_missing,
    default_cache,
)
from streammerge.kernels.contract import BLOCK, Program
from streammerge.kernels.dtypes import torch_dtype
from streammerge.plan.budget import Schedule, keeps
from streammerge.plan.tensor import Step, TensorPlan

Compile = Literal["auto", "on", "off"]
# Programs and the types they are compiled with, None for those that never are: the elements times models that they see.
Uses = Mapping[tuple[Program, Signature | None], int]
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


def weigh(wanted: Uses, threads: int, limit_bytes: int, mode: Compile) -> Compiling:
    """The same for programs with the elements times models that each sees."""
    eager = {pair: count * pair[0].eager_ns * 1e-9 / threads for pair, count in wanted.items()}
    if mode == "off":
        return Compiling(None, (), None, sum(eager.values()))
    cache = default_cache()
    saved, absent = {}, []
    for (program, signature), count in wanted.items():
        if signature is not None:
            pair = program, signature
            saved[pair] = count * (program.eager_ns - program.compiled_ns) * 1e-9 / threads
            if not cache.package(*pair).exists():
                absent.append(pair)
    now = sum(eager.values()) - sum(seconds for pair, seconds in saved.items() if pair not in absent)
    missing = absent
    if mode == "auto":
        # Of rows of one width there may be few; other programs are used together.
        missing = [pair for pair in absent if not pair[0].by_width or saved[pair] >= SECONDS_TO_COMPILE]
    if not missing:
        return Compiling(cache, (), None, now)
    gain, cost = sum(saved[pair] for pair in missing), len(missing) * SECONDS_TO_COMPILE
    reason = _cannot(limit_bytes)
    if mode == "auto" and (gain < cost or reason is not None):
        return Compiling(cache, (), None, now)
    if reason is not None:
        return Compiling(cache, (), f"--compile on: {reason}; {_SLOWER}", now)
    return Compiling(cache, tuple(missing), None, now - gain + cost)


def _cannot(limit_bytes: int) -> str | None:
    """Why nothing can be compiled now, or None."""
    if limit_bytes < BYTES_TO_COMPILE:
        return f"compiling takes {format_size(BYTES_TO_COMPILE)}, the budget is {format_size(limit_bytes)}"
    return compiler_missing()


def programs_of(tensors: Sequence[TensorPlan], schedule: Schedule | None = None) -> Uses:
    """The programs of these tensors, with the elements times models that each sees in all.

    Those are of whole blocks: so many small tensors are worth a compiler.
    """
    counts: dict[tuple[Program, Signature | None], int] = {}
    for tensor in tensors:
        for step in tensor.steps:
            draws_in_turn = step.settings.sequential is not None
            method, look = step.method, signature_of(tensor, step)
            merging = method.program(step.settings)
            looks = method.looks(step.settings, tensor.narrow(step), tensor.elements)
            if schedule is not None and step.kept_bytes(tensor.shape) and keeps(tensor, schedule):
                assert method.kept_programs is not None
                merging, looks = method.kept_programs(step.settings)
            used = [(program, look) for program in looks]
            if DTYPES[step.dtype].bits > 8:
                used.append((merging, look._replace(out=torch_dtype(step.dtype))))
            grain = step.grain(tensor.shape)
            for program, signature in used:
                wanted = None if draws_in_turn else compiled_with(program, signature, grain)
                orders = program.orders
                each = [(program, wanted)]
                if orders is not None:
                    each.append((orders, None if wanted is None else look))
                for pair in each:
                    counts[pair] = counts.get(pair, 0) + -(-tensor.elements // BLOCK) * BLOCK * look.models
    return counts


def signature_of(tensor: TensorPlan, step: Step) -> Signature:
    """The types a step's looks are run with."""
    inputs = tuple(torch_dtype(tensor.dtypes[i]) for i in step.operands)
    return Signature(torch_dtype(step.work), inputs, step.has_base, None)
