"""Programs compiled ahead of time, kept between runs.

A program is exported with a free number of blocks and turned by AOTInductor into a package with one shared library.
Loading one takes milliseconds and no part of the compiler. Making one takes seven to fifteen seconds and a C++
compiler, so that happens in a child process, before the arena exists. Compiled and eager give the same bits (tested),
so which of them ran is nobody's business but the clock's.
"""

from __future__ import annotations

import os
import pickle
import platform
import shutil
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from torch import Tensor

from streammerge.kernels.contract import BLOCK, Arguments, Grain, Program, evaluate
from streammerge.kernels.library import Library
from streammerge.kernels.rowsort import sort_rows

# What making packages costs: time of each, and memory of the child and its C++ compiler.
SECONDS_TO_COMPILE = 9.0
BYTES_TO_COMPILE = 1_200_000_000


class Signature(NamedTuple):
    """The types a program is used with: work dtype, stored dtypes of the inputs (base first), of the result or None.

    `width` is that of the rows, for a program that is compiled by width.
    """

    work: torch.dtype
    inputs: tuple[torch.dtype, ...]
    has_base: bool
    out: torch.dtype | None
    width: int | None = None

    @property
    def models(self) -> int:
        return len(self.inputs) - self.has_base


Run = Callable[[Sequence[Tensor], Tensor | None, Tensor | None, Tensor | None, Arguments], Tensor]


def eager(program: Program, signature: Signature) -> Run:
    """The program as it stands."""

    def run(inputs: Sequence[Tensor], out: Tensor | None, starts: Tensor | None, keys: Tensor | None,
            arguments: Arguments) -> Tensor:  # fmt: skip
        return evaluate(program, signature.work, inputs, signature.has_base, out, starts, keys, arguments)

    return run


@dataclass(frozen=True)
class Cache:
    """Compiled packages in one directory, named by everything that decides their bits and their speed."""

    directory: Path

    def package(self, program: Program, signature: Signature) -> Path:
        # Programs of one label may differ in the shapes of their arguments.
        text = f"{program.label} {program.arguments} {signature} {_environment()}"
        return self.directory / f"{xxhash.xxh3_128_hexdigest(text.encode())}.pt2"

    def load(self, program: Program, signature: Signature, threads: int) -> Run | None:
        """The compiled program, callable from `threads` threads at a time; None if it was never compiled."""
        library = self._library(program, signature, threads)
        if library is None:
            return None
        if signature.width is not None:
            return _run_by_width(library, program, signature)
        if program.orders is None:
            return _run_by_rows(library, program, None, signature) if program.sees_no_rows else _run(library, program)
        order = self._library(program.orders, signature._replace(out=None), threads)
        return None if order is None else _run_by_rows(library, program, order, signature)

    def _library(self, program: Program, signature: Signature, threads: int) -> Library | None:
        package = self.package(program, signature)
        if not package.exists():
            return None
        try:
            return Library(unpacked(package), threads)
        except (OSError, zipfile.BadZipFile):
            # Damaged: gone, it is compiled again when that pays, and eager code gives the same bits.
            package.unlink(missing_ok=True)
            package.with_suffix(".so").unlink(missing_ok=True)
            return None

    def build(self, wanted: Sequence[tuple[Program, Signature]]) -> str | None:
        """Compile the missing ones in a child process. Returns why it failed, or None."""
        missing = [pair for pair in wanted if not self.package(*pair).exists()]
        if not missing:
            return None
        if (reason := compiler_missing()) is not None:
            return reason
        try:
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            return f"{self.directory} cannot be made: {error.strerror}"
        request = pickle.dumps(
            [(program, signature, self.package(program, signature)) for program, signature in missing]
        )
        # One compiler process at a time: the plan counts one.
        environment = os.environ | {"TORCHINDUCTOR_COMPILE_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-m", "streammerge.kernels.compiler"],
            input=request, env=environment, capture_output=True, check=False,
        )  # fmt: skip
        return None if done.returncode == 0 else (done.stderr.decode().strip().splitlines() or ["no message"])[-1]


def _run(library: Library, program: Program) -> Run:
    def run(inputs: Sequence[Tensor], out: Tensor | None, starts: Tensor | None, keys: Tensor | None,
            arguments: Arguments) -> Tensor:  # fmt: skip
        return library(flatten(program, inputs, out, starts, keys, None, arguments))

    return run


def _run_by_width(library: Library, program: Program, signature: Signature) -> Run:
    """A program that was compiled for full units of rows; one that is not full is run eagerly."""
    full, rest = _run(library, program), eager(program, signature)
    assert signature.width is not None
    shape = (-1, BLOCK // signature.width, signature.width)

    def run(inputs: Sequence[Tensor], out: Tensor | None, starts: Tensor | None, keys: Tensor | None,
            arguments: Arguments) -> Tensor:  # fmt: skip
        if len(inputs[0]) % shape[1]:
            return rest(inputs, out, starts, keys, arguments)
        units = [stored.view(shape) for stored in inputs]
        return full(units, None if out is None else out.view(shape), starts, keys, arguments)

    return run


def _run_by_rows(library: Library, program: Program, order: Library | None, signature: Signature) -> Run:
    """A program, after the one that orders its rows if there is one. Units are blocks, if need be filled with zeros."""
    first = program.orders
    # Blocks that stay with their thread: new ones for every call would take longest of all.
    own = threading.local()

    def run(inputs: Sequence[Tensor], out: Tensor | None, starts: Tensor | None, keys: Tensor | None,
            arguments: Arguments) -> Tensor:  # fmt: skip
        width, elements = inputs[0].shape[-1], inputs[0].numel()
        unit = min(elements, BLOCK // width * width)
        units = elements // unit
        if unit == BLOCK:
            blocks = [stored.view(units, BLOCK) for stored in inputs]
            place = None if out is None else out.view(units, BLOCK)
        else:
            if not hasattr(own, "inputs") or len(own.inputs[0]) < units:
                own.inputs = [torch.empty(units, BLOCK, dtype=dtype) for dtype in signature.inputs]
                own.out = None if signature.out is None else torch.empty(units, BLOCK, dtype=signature.out)
            blocks = [block[:units] for block in own.inputs]
            place = None if own.out is None else own.out[:units]
            for block, stored in zip(blocks, inputs, strict=True):
                _units(block)[:, : unit * block.itemsize] = _units(stored.view(units, unit))
                _units(block)[:, unit * block.itemsize :] = 0
        if first is None or order is None:
            result = library(flatten(program, blocks, place, starts, keys, None, arguments))
        else:
            ordered = order(flatten(first, blocks, None, starts, keys, None, arguments))
            sort_rows(ordered, width)
            result = library(flatten(program, blocks, place, starts, keys, ordered, arguments))
        if out is not None and place is not None and unit != BLOCK:
            _units(out.view(units, unit))[:] = _units(place)[:, : unit * out.itemsize]
        return result

    return run


def _units(tensor: Tensor) -> NDArray[np.uint8]:
    """The bytes of a tensor, (units, …)."""
    # Through numpy: torch would let the other threads in for each little copy, and wait for them.
    found: NDArray[np.uint8] = tensor.view(torch.uint8).numpy()
    return found


def unpacked(package: Path) -> Path:
    """The library in a package, beside it. Raises OSError, BadZipFile."""
    path = package.with_suffix(".so")
    if not path.exists():
        with zipfile.ZipFile(package) as archive:
            names = [name for name in archive.namelist() if name.endswith(".so")]
            if len(names) != 1:
                raise OSError(f"{package}: holds {len(names)} libraries")
            partial = path.with_name(f"{path.stem}.{os.getpid()}.{threading.get_ident()}.so")
            partial.write_bytes(archive.read(names[0]))
            partial.rename(path)
    return path


def default_cache() -> Cache:
    """The cache of this user: $XDG_CACHE_HOME/streammerge/kernels, or ~/.cache/streammerge/kernels."""
    root = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Cache(Path(root).expanduser() / "streammerge" / "kernels")


def compiler_missing() -> str | None:
    """Why nothing can be compiled here, or None."""
    return None if shutil.which(os.environ.get("CXX", "g++")) else "there is no C++ compiler (g++, or CXX)"


def compiled_with(program: Program, signature: Signature, grain: Grain) -> Signature | None:
    """The types that a program is compiled with for tensors that `grain` cuts; None if it cannot be.

    It can if it is of blocks; by rows, if it needs none, or sees them beforehand, or is made for their width.
    """
    if program.by_width:
        return signature._replace(width=grain.width) if grain.width is not None and grain.unit <= BLOCK else None
    if program.orders is not None or program.sees_no_rows:
        return signature if grain.width is None or grain.unit <= BLOCK else None
    free = any("any" in argument.shape for argument in program.arguments)
    return None if free or grain.width is not None else signature


@cache
def _environment() -> str:
    """What else decides a package: our sources, torch, and the processor it was compiled for."""
    sources = xxhash.xxh3_128()
    package = Path(__file__).parent.parent
    for file in sorted([*(package / "kernels").glob("*.py"), *(package / "methods").glob("*.py")]):
        sources.update(file.read_bytes())
    flags = ""
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return f"{sources.hexdigest()} {torch.__version__} {platform.machine()} {flags}"


def flatten(program: Program, inputs: Sequence[Tensor], out: Tensor | None, starts: Tensor | None,
             keys: Tensor | None, ordered: Tensor | None, arguments: Arguments) -> list[Tensor]:  # fmt: skip
    """The inputs of a compiled program in their fixed order."""
    flat = [*inputs]
    if out is not None:
        flat.append(out)
    if program.needs_starts:
        assert starts is not None
        flat.append(starts)
    if program.needs_keys:
        assert keys is not None
        flat.append(keys)
    if program.orders is not None:
        assert ordered is not None
        flat.append(ordered)
    return flat + [arguments[argument.name] for argument in program.arguments]
