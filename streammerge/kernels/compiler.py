"""The child process that compiles: reads a pickled list of (program, signature, package path) and makes the packages.

Its own process because the compiler takes hundreds of megabytes that the merge must not pay for.
"""

from __future__ import annotations

import os
import pickle
import sys
from pathlib import Path

import torch
from torch import Tensor
from torch.export import Dim

from streammerge.kernels.compiled import Signature, flatten
from streammerge.kernels.contract import BLOCK, WORDS, Program, evaluate


class _Flat(torch.nn.Module):
    """A program as a module that takes its inputs in the order of `flatten`."""

    def __init__(self, program: Program, signature: Signature) -> None:
        super().__init__()
        self._program, self._signature = program, signature

    def forward(self, flat: tuple[Tensor, ...]) -> Tensor:
        program, signature = self._program, self._signature
        rest = list(flat)
        inputs = [rest.pop(0) for _ in signature.inputs]
        out = rest.pop(0) if signature.out is not None else None
        starts = rest.pop(0) if program.needs_starts else None
        keys = rest.pop(0) if program.needs_keys else None
        ordered = rest.pop(0) if program.orders is not None else None
        arguments = {argument.name: rest.pop(0) for argument in program.arguments}
        return evaluate(program, signature.work, inputs, signature.has_base, out, starts, keys, arguments, ordered)


def _example_keys(program: Program, blocks: int, models: int) -> Tensor:
    if program.kept:
        return torch.zeros(blocks, models, WORDS, dtype=torch.int32)
    return torch.zeros(blocks, models, 2, dtype=torch.int32)


def _example(program: Program, signature: Signature) -> list[Tensor]:
    units, width = 2, signature.width
    shape = (units, BLOCK) if width is None else (units, BLOCK // width, width)
    sizes: dict[int | str, int] = {"K": signature.models, "any": 3}
    shapes = [[sizes[size] if isinstance(size, str) else size for size in a.shape] for a in program.arguments]
    return flatten(
        program,
        [torch.zeros(shape, dtype=dtype) for dtype in signature.inputs],
        None if signature.out is None else torch.zeros(shape, dtype=signature.out),
        torch.zeros(units, 1, dtype=torch.int64),
        _example_keys(program, units, signature.models),
        torch.zeros(units, signature.models, BLOCK, dtype=signature.work),
        {
            a.name: torch.zeros(s, dtype=a.dtype or signature.work)
            for s, a in zip(shapes, program.arguments, strict=True)
        },
    )


def _free(program: Program, tensors: int) -> tuple[dict[int, Dim] | None, ...]:
    """Which sizes of the example's tensors are free: the number of units, and what depends on the tensor."""
    units = {0: Dim("blocks", min=1, max=1 << 20)}
    arguments = [
        {i: Dim(argument.name, min=1) for i, size in enumerate(argument.shape) if size == "any"} or None
        for argument in program.arguments
    ]
    return (*[units] * (tensors - len(arguments)), *arguments)


def compile_program(program: Program, signature: Signature, package: Path) -> None:
    """Export, compile and save one program; `package` appears when it is complete."""
    flat = _example(program, signature)
    free = _free(program, len(flat))
    exported = torch.export.export(_Flat(program, signature), (tuple(flat),), dynamic_shapes=(free,))
    partial = package.with_name(f"{package.stem}.{os.getpid()}.pt2")
    torch._inductor.aoti_compile_and_package(exported, package_path=str(partial))
    partial.rename(package)


if __name__ == "__main__":
    for request in pickle.load(sys.stdin.buffer):  # noqa: S301 - from our own parent
        compile_program(*request)
