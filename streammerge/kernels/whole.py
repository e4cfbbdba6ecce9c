"""A tensor that is in memory whole, merged in one go: the bits that the engine's tiles would give.

For looking at models that are never written. The engine (run/engine.py) does the same for tensors of any size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from streammerge.kernels.chance import block_keys
from streammerge.kernels.compiled import Run, Signature, compiled_with, eager
from streammerge.kernels.contract import BLOCK, Grain, Look, Method, Problem, Program, Settings, grain_of

Finder = Callable[[Program, Signature], Run | None]

# So many blocks at once: eager code makes some fifty temporaries of a piece.
_EAGER_PIECE, _COMPILED_PIECE = 4, 8
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


def padded(flat: Tensor) -> Tensor:
    """A flat tensor in the buffer of `pad`, filled up with zeros."""
    buffer = torch.zeros(pad(len(flat)), dtype=flat.dtype)
    buffer.view(-1)[: len(flat)] = flat
    return buffer


def merge_whole(method: Method, settings: Settings, inputs: Sequence[Tensor], shape: Sequence[int], *, has_base: bool,
                work: torch.dtype, out: torch.dtype, stream_keys: Sequence[int], find: Finder,
                found: Any = None) -> Tensor:  # fmt: skip
    """The merged tensor, flat, of a tensor of `shape` in the dtype `out`.

    `inputs` are as stored, base first, each in a buffer of the shape of `pad`, filled up with zeros. `find` gives
    compiled programs where there are any; `found` is what a survey said of this tensor.
    """
    elements = math.prod(shape)
    if elements == 0:
        return torch.empty(0, dtype=out)
    signature = Signature(work, tuple(stored.dtype for stored in inputs), has_base, None)
    grain = grain_of(shape, by_rows=method.by_rows(settings))
    runner = _Runner(inputs, elements, grain, signature, stream_keys, find)
    measuring = method.measure(Problem(elements, signature.models, settings, work, grain, has_base, found))
    answer: Any = None
    while True:
        try:
            look = measuring.send(answer)
        except StopIteration as stop:
            return runner.merge(method.program(settings), stop.value, out)
        answer = runner.look(look)


class _Piece(NamedTuple):
    """Some whole units, as a program takes them."""

    inputs: list[Tensor]
    starts: Tensor
    first: int
    stop: int


class _Runner:
    """Runs programs over one tensor."""

    def __init__(self, inputs: Sequence[Tensor], elements: int, grain: Grain, signature: Signature,
                 stream_keys: Sequence[int], find: Finder) -> None:  # fmt: skip
        self._inputs, self._elements, self._grain, self._signature = inputs, elements, grain, signature
        self._keys, self._find = stream_keys, find
        self._width = inputs[0].shape[1]

    def look(self, look: Look) -> Any:
        run, size = self._run(look.program, self._signature)
        parts = []
        for piece in self._pieces(size, look.spans):
            keys = self._block_keys(look.program, piece.starts)
            part = run(piece.inputs, None, piece.starts, keys, look.arguments)
            if look.digest is not None:
                part = look.digest(part, piece.starts)
            if look.fold is not None:
                look.fold(part)
            else:
                parts.append(part)
        return look.answer(parts)

    def merge(self, program: Program, arguments: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
        out = torch.empty(self._inputs[0].shape, dtype=dtype)
        run, size = self._run(program, self._signature._replace(out=dtype))
        for piece in self._pieces(size, None):
            keys = self._block_keys(program, piece.starts)
            place = out.view(-1)[piece.first : piece.stop].view(piece.inputs[0].shape)
            run(piece.inputs, place, piece.starts, keys, arguments)
        return out.view(-1)[: self._elements]

    def _run(self, program: Program, signature: Signature) -> tuple[Run, int]:
        wanted = compiled_with(program, signature, self._grain)
        if self._width != BLOCK and not program.by_width:
            wanted = None
        compiled = None if wanted is None else self._find(program, wanted)
        if compiled is not None:
            return compiled, _COMPILED_PIECE
        return eager(program, signature), max(_EAGER_PIECE, program.eager_blocks)

    def _pieces(self, size: int, spans: Sequence[tuple[int, int]] | None) -> Iterator[_Piece]:
        """The tensor, or spans of it, in pieces of `size` blocks; by rows in units."""
        unit = self._grain.unit
        if self._grain.width is not None:
            every = [(start, min(unit, self._elements - start)) for start in range(0, self._elements, unit)]
            for start, count in every if spans is None else spans:
                inputs = [x.view(-1)[start : start + count].view(-1, self._grain.width) for x in self._inputs]
                yield _Piece(inputs, torch.tensor([[start]]), start, start + count)
            return
        inputs, starts = list(self._inputs), list(range(0, self._elements, BLOCK))
        if spans is not None:
            inputs, starts = self._pack(spans)
        for first in range(0, len(starts), size):
            stop = min(len(starts), first + size)
            yield _Piece(
                [x[first:stop] for x in inputs],
                torch.tensor(starts[first:stop])[:, None], first * self._width, stop * self._width,
            )  # fmt: skip

    def _pack(self, spans: Sequence[tuple[int, int]]) -> tuple[list[Tensor], list[int]]:
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
        return inputs, starts

    def _block_keys(self, program: Program, starts: Tensor) -> Tensor | None:
        if not program.needs_keys:
            return None
        unit = self._grain.unit
        return torch.cat([block_keys(self._keys, start // unit, 1) for start in starts[:, 0].tolist()])
