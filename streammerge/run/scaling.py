"""Weights in 8-bit floats with scales: read as numbers, and written with scales that are found on the way."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from concurrent.futures import Executor

import torch
from torch import Tensor

from streammerge.kernels.dtypes import torch_dtype
from streammerge.kernels.scaling import Strip, codes_of, largest, numbers, scales_for
from streammerge.plan.gather import Read
from streammerge.plan.scaled import Scaled, Scaling
from streammerge.run.arena import Area
from streammerge.storage.source import Source


def read_scaled(sources: Sequence[Source], scaled: Scaled, into: Area, start: int, elements: int, at: int,
                *, keep_cached: bool) -> int:  # fmt: skip
    """Read elements [start, start + elements) as numbers into `into`, from its element `at` on.

    Returns the bytes read.
    """
    out = into.tensor.view(-1)[at : at + elements]
    grid = scaled.grid
    # At the end of the place of its numbers, four times as long: each strip is taken before it is written over.
    codes = out.view(torch.uint8)[3 * elements :].view(torch_dtype(scaled.codes.dtype))
    count = _read(sources, scaled.codes, start, codes, keep_cached=keep_cached)
    strips = list(grid.strips(start, elements))
    # Whole rows of blocks: a range that begins within a row goes on at the beginning of the next one.
    first, stop = (row * grid.columns for row in (strips[0].row_of_blocks, strips[-1].row_of_blocks + 1))
    scales = torch.empty(stop - first, dtype=torch_dtype(scaled.scales.dtype))
    count += _read(sources, scaled.scales, first, scales, keep_cached=keep_cached)
    scales = scales.to(torch.float32)
    for strip in strips:
        begin = strip.first_block(grid) - first
        own = strip.spread(scales[begin : begin + strip.blocks(grid)], grid)
        strip.of(out).copy_(numbers(strip.of(codes), own))
    return count


def _read(sources: Sequence[Source], read: Read, start: int, into: Tensor, *, keep_cached: bool) -> int:
    """Fill `into` with elements from `start` on. Returns the bytes read."""
    # Through bytes: numpy knows no 8-bit floats.
    view = memoryview(into.view(torch.uint8).numpy().data)
    offset = read.spec.offset + start * into.element_size()
    sources[read.checkpoint].read_into(view, read.spec.file, offset, keep_cached=keep_cached)
    return len(view)


class Scaler:
    """Finds the scales of one output and makes its codes, range by range, on the threads of `pool`."""

    def __init__(self, scaling: Scaling, elements: int, pool: Executor) -> None:
        self._pool = pool
        self._scaling, self._dtype = scaling, torch_dtype(scaling.dtype)
        rows = elements // scaling.grid.width
        blocks = (scaling.grid.row_of_blocks(rows - 1) + 1) * scaling.grid.columns if rows else 0
        self._largest = torch.zeros(blocks)

    @property
    def is_quick(self) -> bool:
        """Whether every tile has whole blocks, so that it needs no look before."""
        return self._scaling.quantum is not None

    def look(self, area: Area, start: int, elements: int) -> None:
        """Take in the magnitudes of a range."""
        grid, values = self._scaling.grid, area.tensor.view(-1)
        strips = list(grid.strips(start, elements))
        found = self._pool.map(lambda strip: largest(strip, strip.of(values), grid), strips)
        for strip, magnitudes in zip(strips, found, strict=True):
            first = strip.first_block(grid)
            known = self._largest[first : first + strip.blocks(grid)]
            torch.maximum(known, magnitudes, out=known)

    def store(self, area: Area, codes: Area, start: int, elements: int) -> None:
        """Make the codes of a range: of whole blocks, or after all were looked at."""
        if self.is_quick:
            self.look(area, start, elements)
        grid, values, out = self._scaling.grid, area.tensor.view(-1), codes.tensor.view(-1)

        def code(strip: Strip) -> None:
            first = strip.first_block(grid)
            scales = strip.spread(self._scales(first, first + strip.blocks(grid)), grid)
            strip.of(out).copy_(codes_of(strip.of(values), scales, self._dtype))

        deque(self._pool.map(code, grid.strips(start, elements)), maxlen=0)

    def stored(self) -> memoryview:
        """The bytes of all scales."""
        return memoryview(self._scales(0, len(self._largest)).view(torch.uint8).numpy().data)

    def _scales(self, first: int, stop: int) -> Tensor:
        return scales_for(self._largest[first:stop], self._dtype, torch_dtype(self._scaling.scale_dtype))
