"""Where arithmetic runs: the two things the engine asks of a device, and the processor's way of doing them.

    look     partial results of a program over a tile
    merge    the merged tile, into its output area

A tile is cut into pieces of whole blocks, small enough for the caches, or of a unit of whole rows, and the threads of a
pool take one after the other. (gpu.py is the other lane.)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from streammerge.base.dtypes import DTYPES
from streammerge.kernels.compiled import Run, Signature, compiled_with, eager
from streammerge.kernels.contract import Arguments, Grain, Look, Program
from streammerge.run.arena import Area
from streammerge.run.profile import Spent

# Blocks that stay in the caches, with what is summed over them. More make temporaries that the system gives anew for
# every call: glibc keeps nothing of 32 MB.
_COMPILED_PIECE = 8
# Of rows: what is summed over them needs temporaries then, too.
_COMPILED_UNITS = 4
# Results of so many bytes are kept in Python's own memory, which takes objects of up to 512.
_PACKED_BYTES, _PYTHON_BYTES = 1 << 13, 448

Finder = Callable[[Program, Signature], Run | None]
T = TypeVar("T")


@dataclass(frozen=True)
class Merged:
    """A tile on its way into its output area.

    `ready` returns when it is there, and raises what computing it raised. `nonfinite` then gives how many elements of
    each input and of the result are not finite ([] and 0 when none is).
    """

    ready: Callable[[], None]
    nonfinite: Callable[[], tuple[list[int], int]]


@dataclass(frozen=True)
class Stretch:
    """Whole units of one tensor, in memory: what a program is run on.

    `inputs` are the step's operands, of which the first `elements` count; `starts` and `keys` have a row per unit and
    are None where the program needs none.
    """

    inputs: Sequence[Area]
    elements: int
    grain: Grain
    starts: Tensor | None
    keys: Tensor | None


class Lane(Protocol):
    """What the engine asks of a device.

    Both calls return at once; inputs must stay as they are until the results were taken. `spent` has the seconds of
    each program, over all threads.
    """

    spent: Spent

    def look(self, look: Look, signature: Signature, stretch: Stretch) -> Callable[[], list[Any]]:
        """Look at a tile. What is returned waits for the partial results, tensors or what the look's digest made."""

    def merge(
        self, program: Program, signature: Signature, stretch: Stretch, out: Area, arguments: Arguments
    ) -> Merged:
        """Fill `out`."""

    def close(self) -> None:
        """Give up threads and device memory."""


def scan(area: Area, dtype: str, elements: int) -> Merged:
    """A tile that is copied: `ready` counts what is not finite in it, where that can be."""
    counts: list[int] = []

    def ready() -> None:
        if DTYPES[dtype].kind == "float" and not counts:
            values = area.tensor.view(-1)[:elements]
            # x - x is 0 for every finite x and NaN otherwise: any() is the quickest look there is.
            counts.append(int(count_nonfinite(area.tensor, elements)) if bool((values - values).any()) else 0)

    return Merged(ready, lambda: ([counts[0]], counts[0]) if counts and counts[0] else ([], 0))


def count_nonfinite(tensor: Tensor, elements: int) -> Tensor:
    """How many of the first `elements` elements are NaN or infinite, as a tensor."""
    values = tensor.view(-1)[:elements]
    # torch cannot tell of 8-bit floats.
    return torch.isfinite(values if values.element_size() > 1 else values.to(torch.float32)).logical_not_().sum()


class CpuLane:
    """The processor's cores. Owns a pool of threads."""

    def __init__(self, threads: int, compiled: Finder) -> None:
        # The pool is the parallelism; torch's own threads would only spin beside it and the readers.
        torch.set_num_threads(1)
        self._pool = ThreadPoolExecutor(threads, "compute", initializer=torch.set_num_threads, initargs=(1,))
        self._find = compiled
        self.spent = Spent()
        self._runs: dict[tuple[Program, Signature, bool], tuple[Run, int]] = {}

    def look(self, look: Look, signature: Signature, stretch: Stretch) -> Callable[[], list[Any]]:
        run, size = self._run(look.program, signature, stretch.grain)
        pieces = _Pieces(size, stretch, None)

        def work(i: int) -> Any:
            began = time.perf_counter()
            result = run(*pieces[i], look.arguments)
            if look.digest is not None:
                assert pieces.starts is not None
                result = look.digest(result, pieces.starts[i])
            self.spent.add(look.program.label, began)
            return _Packed.of(result)

        futures = [self._pool.submit(work, i) for i in range(len(pieces))]
        return lambda: [_Packed.unpacked(future.result()) for future in futures]

    def merge(
        self, program: Program, signature: Signature, stretch: Stretch, out: Area, arguments: Arguments
    ) -> Merged:
        run, size = self._run(program, signature, stretch.grain)
        pieces = _Pieces(size, stretch, out)

        def work(i: int) -> bool:
            # 0 for finite blocks, and NaN counts as true. Through numpy: it keeps other threads out for an instant,
            # where torch would let them in and wait.
            began = time.perf_counter()
            finite = not run(*pieces[i], arguments).numpy().any()
            self.spent.add(program.label, began)
            return finite

        futures = [self._pool.submit(work, i) for i in range(len(pieces))]
        counts: list[tuple[list[int], int]] = []

        def ready() -> None:
            finite = [future.result() for future in futures]
            # The inputs are still there: whoever waits has not given the tile back yet.
            if not counts and not all(finite):
                before = [int(count_nonfinite(area.tensor, stretch.elements)) for area in stretch.inputs]
                counts.append((before, int(count_nonfinite(out.tensor, stretch.elements))))

        return Merged(ready, lambda: counts[0] if counts else ([], 0))

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)

    def _run(self, program: Program, signature: Signature, grain: Grain) -> tuple[Run, int]:
        wanted = compiled_with(program, signature, grain)
        key = (program, wanted or signature, wanted is not None)
        if key not in self._runs:
            compiled = None if wanted is None else self._find(program, wanted)
            if compiled is None:
                self._runs[key] = (eager(program, signature), program.eager_blocks if grain.width is None else 1)
            else:
                self._runs[key] = (compiled, _COMPILED_PIECE if grain.width is None else _COMPILED_UNITS)
        return self._runs[key]


class _Packed(NamedTuple):
    """A small result while others are worked out, in memory that Python keeps for small objects.

    As a tensor it would lie among the temporaries of its thread, and where those were, none would fit any more: 210 MB
    of holes in the counts of TIES (glibc 2.36, 2026-11-28).
    """

    content: list[bytes]
    dtype: torch.dtype
    shape: torch.Size

    @classmethod
    def of(cls, result: Any) -> Any:
        """Small tensors packed, also of a tuple; anything else as it is."""
        if type(result) is tuple:
            return tuple(map(cls.of, result))
        if not isinstance(result, Tensor) or not 0 < result.nbytes <= _PACKED_BYTES:
            return result
        content = result.numpy().tobytes()
        parts = [content[first : first + _PYTHON_BYTES] for first in range(0, len(content), _PYTHON_BYTES)]
        return cls(parts, result.dtype, result.shape)

    @staticmethod
    def unpacked(result: Any) -> Any:
        """What `of` was given."""
        if type(result) is tuple:
            return tuple(map(_Packed.unpacked, result))
        if not isinstance(result, _Packed):
            return result
        return torch.frombuffer(bytearray().join(result.content), dtype=result.dtype).view(result.shape)


class _Pieces:
    """A stretch and its output, cut into pieces of `size` units."""

    def __init__(self, size: int, stretch: Stretch, out: Area | None) -> None:
        grain = stretch.grain

        def cut(area: Area) -> list[Tensor]:
            return area.pieces(size) if grain.width is None else area.rows(grain, stretch.elements, size)

        # By rows a unit that is not full is a piece of its own.
        full = grain.units(stretch.elements) if grain.width is None else stretch.elements // grain.unit
        self._inputs = [cut(area) for area in stretch.inputs]
        self._out = None if out is None else cut(out)
        self.starts = None if stretch.starts is None else _cut(stretch.starts, size, full)
        self._keys = None if stretch.keys is None else _cut(stretch.keys, size, full)

    def __len__(self) -> int:
        return len(self._inputs[0])

    def __getitem__(self, i: int) -> tuple[list[Tensor], Tensor | None, Tensor | None, Tensor | None]:
        return (
            [pieces[i] for pieces in self._inputs],
            None if self._out is None else self._out[i],
            None if self.starts is None else self.starts[i],
            None if self._keys is None else self._keys[i],
        )


def _cut(tensor: Tensor, size: int, full: int) -> list[Tensor]:
    """The first `full` rows in pieces of `size`, and the rest."""
    pieces = [tensor[first : min(first + size, full)] for first in range(0, full, size)]
    return pieces if full == len(tensor) else [*pieces, tensor[full:]]
