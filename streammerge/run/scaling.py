"""Weights in 8-bit floats with scales: read as numbers, and written with scales that are found on the way."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from streammerge.kernels.dtypes import torch_dtype
from streammerge.kernels.scaling import codes_of, largest, numbers, scales_for
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
    first = strips[0].first_block(grid)
    stop = strips[-1].first_block(grid) + strips[-1].blocks(grid)
    # Between the first and the last block a range may touch few; yet all of them are small.
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
    """Finds the scales of one output and makes its codes, range by range."""

    def __init__(self, scaling: Scaling, elements: int) -> None:
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
        for strip in grid.strips(start, elements):
            first = strip.first_block(grid)
            known = self._largest[first : first + strip.blocks(grid)]
            torch.maximum(known, largest(strip, strip.of(values), grid), out=known)

    def store(self, area: Area, codes: Area, start: int, elements: int) -> None:
        """Make the codes of a range: of whole blocks, or after all were looked at."""
        if self.is_quick:
            self.look(area, start, elements)
        grid, values, out = self._scaling.grid, area.tensor.view(-1), codes.tensor.view(-1)
        for strip in grid.strips(start, elements):
            first = strip.first_block(grid)
            scales = strip.spread(self._scales(first, first + strip.blocks(grid)), grid)
            strip.of(out).copy_(codes_of(strip.of(values), scales, self._dtype))

    def stored(self) -> memoryview:
        """The bytes of all scales."""
        return memoryview(self._scales(0, len(self._largest)).view(torch.uint8).numpy().data)

    def _scales(self, first: int, stop: int) -> Tensor:
        return scales_for(self._largest[first:stop], self._dtype, torch_dtype(self._scaling.scale_dtype))
