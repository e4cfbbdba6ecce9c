"""The child process that compiles: reads a pickled list of (program, signature, package path) and makes the packages.

Its own process because the compiler takes hundreds of megabytes that the merge must not pay for. A package gets its
name only after it has given the bits of the eager program: compilers err, and nobody has tried them all.
"""

from __future__ import annotations

import os
import pickle
import platform
import sys
from pathlib import Path

import torch
from torch import Tensor
from torch._inductor import config
from torch.export import Dim

from streammerge.kernels.compiled import Signature, flatten, unpacked
from streammerge.kernels.contract import BLOCK, WORDS, Program, evaluate
from streammerge.kernels.library import Library


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


def _example(program: Program, signature: Signature) -> list[Tensor]:
    """Two units of numbers like those of models that were made from one base, and arguments of their size."""
    generator = torch.Generator().manual_seed(0)
    units, models, width = 2, signature.models, signature.width
    shape = (units, BLOCK) if width is None else (units, BLOCK // width, width)
    # Enough for a number per row, however narrow rows are.
    sizes: dict[int | str, int] = {"K": models, "any": units * BLOCK}

    def integers(shape: tuple[int, ...], most: int, dtype: torch.dtype) -> Tensor:
        return torch.randint(most, shape, generator=generator).to(dtype)

    base = torch.randn(shape, generator=generator) * 0.02
    inputs = [(base + torch.randn(shape, generator=generator) * 0.002).to(dtype=dtype) for dtype in signature.inputs]
    ordered = (torch.randn(units, models, BLOCK, generator=generator) * 0.002).sort(-1).values.to(signature.work)
    arguments = {}
    for argument in program.arguments:
        dtype = argument.dtype or signature.work
        of = tuple(sizes[size] if isinstance(size, str) else size for size in argument.shape)
        arguments[argument.name] = (
            (torch.rand(of, generator=generator) * 0.004).to(dtype) if dtype.is_floating_point
            else integers(of, 2048, dtype)
        )  # fmt: skip
    return flatten(
        program,
        inputs,
        None if signature.out is None else torch.zeros(shape, dtype=signature.out),
        torch.arange(units)[:, None] * BLOCK,
        integers((units, models, WORDS if program.kept else 2), 2**32, torch.int32),
        ordered,
        arguments,
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
    """Export, compile, try and save one program; `package` appears when it is complete. Raises RuntimeError."""
    module, flat = _Flat(program, signature), _example(program, signature)
    free = _free(program, len(flat))
    exported = torch.export.export(module, (tuple(flat),), dynamic_shapes=(free,))
    partial = package.with_name(f"{package.stem}.{os.getpid()}.pt2")
    torch._inductor.aoti_compile_and_package(exported, package_path=str(partial))
    library = unpacked(partial)
    try:
        if not _alike(module, Library(library, 1), flat):
            raise RuntimeError(f"{program.label} gives other bits compiled than eagerly")
    except BaseException:
        partial.unlink()
        library.unlink()
        raise
    library.rename(package.with_suffix(".so"))
    partial.rename(package)


def _alike(module: _Flat, library: Library, flat: list[Tensor]) -> bool:
    """Whether results, and what is written into `flat`, have the same bits eagerly and compiled, but for NaNs'."""
    eagerly, compiled = [tensor.clone() for tensor in flat], [tensor.clone() for tensor in flat]
    pairs = [(module(tuple(eagerly)), library(compiled)), *zip(eagerly, compiled, strict=True)]
    return all(torch.equal(_bits(one), _bits(other)) for one, other in pairs)


def _bits(tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    # One NaN is like another: which of two operands it comes from is the compiler's affair.
    return torch.where(tensor.isnan(), float("nan"), tensor).contiguous().view(torch.uint8)


def _let_loops_be_vectorised() -> None:
    """Take back the flag by which torch keeps g++ from vectorising loops.

    By such loops it turns float32 into float64, of which all sums are made: 14 ns per element for what takes 7
    (docs/log.md). Torch keeps g++ from it since one came out wrong; here what comes out is compared. Its flags come
    from nowhere else, and those for the processor are the last.
    """
    ours = platform.machine() == "x86_64" and "clang" not in os.environ.get("CXX", "g++")
    if ours and getattr(config.cpp, "march", "") is None:
        config.cpp.march = "native -ftree-loop-vectorize"


if __name__ == "__main__":
    _let_loops_be_vectorised()
    for request in pickle.load(sys.stdin.buffer):  # noqa: S301 - from our own parent
        compile_program(*request)
