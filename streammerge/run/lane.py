"""Where arithmetic runs: the two things the engine asks of a device, and the processor's way of doing them.

    look     partial results of a program over a tile
    merge    the merged tile, into its output area

A tile is cut into pieces of whole blocks, small enough for the caches, and the threads of a pool take one after the
other. (gpu.py is the other lane.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from streammerge.kernels.compiled import Run, Signature, eager
from streammerge.kernels.contract import Arguments, Look, Program

# Pieces that stay in the caches: eager code makes many temporaries of a piece, compiled code few.
_EAGER_PIECE, _COMPILED_PIECE = 1, 16

Finder = Callable[[Program, Signature], Run | None]
T = TypeVar("T")


@dataclass(frozen=True)
class Merged:
    """A tile on its way into its output area: `ready` returns when it is there.

    `nonfinite` gives, once it is, how many elements of each input and of the result are not finite.
    """

    ready: Callable[[], None]
    nonfinite: Callable[[], tuple[list[int], int]]


class Lane(Protocol):
    """What the engine asks of a device. All tensors given are in the arena; `starts` and `keys` are a tile's."""

    def look(self, look: Look, signature: Signature, inputs: Sequence[Tensor], starts: Tensor,
             keys: Tensor | None) -> list[Any]:  # fmt: skip
        """The look's partial results over a tile, in order: tensors, or what its digest made of them."""

    def merge(self, program: Program, signature: Signature, inputs: Sequence[Tensor], out: Tensor, elements: int,
              starts: Tensor, keys: Tensor | None, arguments: Arguments) -> Merged:  # fmt: skip
        """Fill `out`, of which the first `elements` count."""

    def close(self) -> None:
        """Give up threads and device memory."""


def count_nonfinite(tensor: Tensor, elements: int) -> Tensor:
    """How many of the first `elements` elements are NaN or infinite, as a tensor."""
    return torch.isfinite(tensor.view(-1)[:elements]).logical_not_().sum()


class CpuLane:
    """The processor's cores. Owns a pool of threads."""

    def __init__(self, threads: int, compiled: Finder) -> None:
        # The pool is the parallelism; torch's own threads would only spin beside it and the readers.
        torch.set_num_threads(1)
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads, "compute", initializer=torch.set_num_threads, initargs=(1,))
        self._find = compiled
        self._runs: dict[tuple[Program, Signature], tuple[Run, int]] = {}

    def look(self, look: Look, signature: Signature, inputs: Sequence[Tensor], starts: Tensor,
             keys: Tensor | None) -> list[Any]:  # fmt: skip
        run, size = self._run(look.program, signature)

        def work(piece: slice) -> Any:
            result = run(
                [x[piece] for x in inputs], None, starts[piece], None if keys is None else keys[piece], look.arguments
            )
            return result if look.digest is None else look.digest(result, starts[piece])

        return self._map(work, len(starts), size)

    def merge(self, program: Program, signature: Signature, inputs: Sequence[Tensor], out: Tensor, elements: int,
              starts: Tensor, keys: Tensor | None, arguments: Arguments) -> Merged:  # fmt: skip
        run, size = self._run(program, signature)

        def work(piece: slice) -> bool:
            probe = run(
                [x[piece] for x in inputs], out[piece], starts[piece], None if keys is None else keys[piece], arguments
            )
            return bool((probe == 0).all())

        counts: tuple[list[int], int] = ([], 0)
        if not all(self._map(work, len(starts), size)):
            counts = [int(count_nonfinite(x, elements)) for x in inputs], int(count_nonfinite(out, elements))
        return Merged(lambda: None, lambda: counts)

    def close(self) -> None:
        self._pool.shutdown()

    def _map(self, work: Callable[[slice], T], blocks: int, size: int) -> list[T]:
        """`work` on every piece of `size` blocks; each thread takes the next one that is left."""
        pieces = [slice(first, first + size) for first in range(0, blocks, size)]
        if len(pieces) == 1 or self._threads == 1:
            return [work(piece) for piece in pieces]
        left = iter(range(len(pieces)))
        results: dict[int, T] = {}

        def take() -> None:
            for i in left:
                results[i] = work(pieces[i])

        for future in [self._pool.submit(take) for _ in range(min(self._threads, len(pieces)))]:
            future.result()
        return [results[i] for i in range(len(pieces))]

    def _run(self, program: Program, signature: Signature) -> tuple[Run, int]:
        key = (program, signature)
        if key not in self._runs:
            compiled = self._find(program, signature)
            self._runs[key] = (eager(program, signature), _EAGER_PIECE) if compiled is None else (compiled, _COMPILED_PIECE)
        return self._runs[key]
