"""A tensor that is in memory whole, merged in one go: the bits that the engine's tiles would give.

For looking at models that are never written. The engine (run/engine.py) does the same for tensors of any size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from streammerge.kernels.chance import block_keys
from streammerge.kernels.compiled import Run, Signature, eager
from streammerge.kernels.contract import BLOCK, Look, Method, Problem, Program, Settings

Finder = Callable[[Program, Signature], Run | None]

# So many blocks at once: eager code makes some fifty temporaries of a piece.
_EAGER_PIECE, _COMPILED_PIECE = 4, 32
_NARROWEST = 64


def pad(elements: int) -> tuple[int, int]:
    """Rows and columns of the buffer that holds a tensor: whole blocks, or for a small tensor one narrower row.

    A row is a power of two wide, so its sums are the last steps of a whole block's sums: the same bits.
    """
    if elements > BLOCK // 2:
        return -(-elements // BLOCK), BLOCK
    width = _NARROWEST
    while width < elements:
        width *= 2
    return 1, width


def merge_whole(method: Method, settings: Settings, inputs: Sequence[Tensor], elements: int, *, has_base: bool,
                work: torch.dtype, out: torch.dtype, stream_keys: Sequence[int],
                find: Finder) -> Tensor:  # fmt: skip
    """The merged tensor, flat, of `elements` elements in the dtype `out`.

    `inputs` are as stored, base first, each in a buffer of the shape of `pad`, filled up with zeros. `find` gives
    compiled programs where there are any.
    """
    if elements == 0:
        return torch.empty(0, dtype=out)
    signature = Signature(work, tuple(stored.dtype for stored in inputs), has_base, None)
    runner = _Runner(inputs, elements, signature, stream_keys, find)
    measuring = method.measure(Problem(elements, signature.models, settings, work))
    answer: Any = None
    while True:
        try:
            look = measuring.send(answer)
        except StopIteration as stop:
            return runner.merge(method.program(settings), stop.value, out)
        answer = runner.look(look)


class _Runner:
    """Runs programs over one tensor."""

    def __init__(self, inputs: Sequence[Tensor], elements: int, signature: Signature, stream_keys: Sequence[int],
                 find: Finder) -> None:  # fmt: skip
        self._inputs, self._elements, self._signature = inputs, elements, signature
        self._keys, self._find = stream_keys, find
        self._width = inputs[0].shape[1]

    def look(self, look: Look) -> Any:
        inputs, starts = self._inputs, self._starts(range(0, self._elements, BLOCK))
        if look.spans is not None:
            inputs, starts = self._pack(look.spans)
        parts = []
        for piece, run in self._pieces(look.program, self._signature, inputs[0].shape[0]):
            keys = self._block_keys(look.program, starts[piece])
            result = run([values[piece] for values in inputs], None, starts[piece], keys, look.arguments)
            parts.append(result if look.digest is None else look.digest(result, starts[piece]))
        return parts if look.digest is not None else torch.cat(parts)

    def merge(self, program: Program, arguments: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
        out = torch.empty(self._inputs[0].shape, dtype=dtype)
        starts = self._starts(range(0, self._elements, BLOCK))
        signature = self._signature._replace(out=dtype)
        for piece, run in self._pieces(program, signature, len(out)):
            keys = self._block_keys(program, starts[piece])
            run([values[piece] for values in self._inputs], out[piece], starts[piece], keys, arguments)
        return out.view(-1)[: self._elements]

    def _pieces(self, program: Program, signature: Signature, rows: int) -> list[tuple[slice, Run]]:
        compiled = self._find(program, signature) if self._width == BLOCK else None
        run, size = (eager(program, signature), _EAGER_PIECE) if compiled is None else (compiled, _COMPILED_PIECE)
        return [(slice(first, first + size), run) for first in range(0, rows, size)]

    def _pack(self, spans: Sequence[tuple[int, int]]) -> tuple[list[Tensor], Tensor]:
        """Spans one after the other in blocks of their own. A block's start is that of the span it begins with."""
        total = sum(elements for _, elements in spans)
        rows = -(-total // self._width)
        inputs = [torch.zeros(rows, self._width, dtype=values.dtype) for values in self._inputs]
        starts, at = [0] * rows, 0
        for start, elements in spans:
            if at % self._width == 0:
                starts[at // self._width] = start
            for packed, values in zip(inputs, self._inputs, strict=True):
                packed.view(-1)[at : at + elements] = values.view(-1)[start : start + elements]
            at += elements
        return inputs, self._starts(starts)

    def _starts(self, starts: Sequence[int]) -> Tensor:
        return torch.tensor(list(starts), dtype=torch.int64)[:, None]

    def _block_keys(self, program: Program, starts: Tensor) -> Tensor | None:
        if not program.needs_keys:
            return None
        return torch.cat([block_keys(self._keys, start // BLOCK, 1) for start in starts[:, 0].tolist()])
