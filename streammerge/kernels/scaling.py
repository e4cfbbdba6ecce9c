"""Numbers as 8-bit floats with scales: code × scale, a scale for every block of rows and columns.

A range of such a tensor is worked on in *strips*: whole rows of one row of blocks, or a part of one row. So any range
will do, and no strip is large.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

# The most elements of a strip; what is worked out of it at a time is a few times as much.
STRIP = 1 << 18
# Of a float32 the bits that are none in an element that an 8-bit float holds, or that lies between two of them.
_TAIL = 0x7FFFF


@dataclass(frozen=True)
class Grid:
    """Matrices of (height, width) one below the other, each cut into blocks of (rows, columns) from its first on.

    The scales of all blocks are counted row by row, matrix by matrix.
    """

    height: int
    width: int
    block: tuple[int, int]

    @property
    def columns(self) -> int:
        """How many blocks lie beside each other."""
        return -(-self.width // self.block[1])

    def row_of_blocks(self, row: int) -> int:
        """The row of blocks that a row lies in."""
        matrix, inside = divmod(row, self.height)
        return matrix * -(-self.height // self.block[0]) + inside // self.block[0]

    def rows_left(self, row: int) -> int:
        """How many rows there are from this one to the end of its blocks."""
        inside = row % self.height
        return min(self.block[0] - inside % self.block[0], self.height - inside)

    def strips(self, start: int, elements: int) -> Iterator[Strip]:
        """Elements [start, start + elements) in strips, in order."""
        at = 0
        while at < elements:
            row, column = divmod(start + at, self.width)
            left = elements - at
            if column or left < self.width or self.width > STRIP:
                rows, columns = 1, min(self.width - column, left, STRIP)
            else:
                rows, columns = min(self.rows_left(row), left // self.width, STRIP // self.width), self.width
            yield Strip(at, rows, columns, self.row_of_blocks(row), column)
            at += rows * columns


@dataclass(frozen=True)
class Strip:
    """Elements [at, at + rows · columns) of a range; they begin in `column`, in this row of blocks."""

    at: int
    rows: int
    columns: int
    row_of_blocks: int
    column: int

    def of(self, values: Tensor) -> Tensor:
        """The strip of a flat range, (rows, columns)."""
        return values[self.at : self.at + self.rows * self.columns].view(self.rows, self.columns)

    def first_block(self, grid: Grid) -> int:
        """The number of the block it begins in."""
        return self.row_of_blocks * grid.columns + self.column // grid.block[1]

    def blocks(self, grid: Grid) -> int:
        """How many blocks it touches."""
        width = grid.block[1]
        return (self.column + self.columns - 1) // width - self.column // width + 1

    def spread(self, scales: Tensor, grid: Grid) -> Tensor:
        """The scale of each column, out of those of the blocks it touches."""
        width = grid.block[1]
        if len(scales) == 1:
            return scales
        first = self.column % width
        return scales.repeat_interleave(width)[first : first + self.columns]


def numbers(codes: Tensor, scales: Tensor) -> Tensor:
    """Codes × scales, in float32; the product of the two is rounded once."""
    table = _table(codes.dtype)
    # torch's own conversion takes six times as long.
    values = torch.index_select(table, 0, codes.reshape(-1).view(torch.uint8).to(torch.int32))
    return values.view(codes.shape).mul_(scales)


@cache
def _table(dtype: torch.dtype) -> Tensor:
    """The 256 numbers of an 8-bit float."""
    return torch.arange(256, dtype=torch.int16).to(torch.uint8).view(dtype).to(torch.float32)


def largest(strip: Strip, values: Tensor, grid: Grid) -> Tensor:
    """The largest magnitude of every block that a strip touches; what is not finite does not count."""
    columns = values.abs().amax(0)
    if not bool(torch.isfinite(columns).all()):
        columns = values.abs().nan_to_num_(0.0, 0.0, 0.0).amax(0)
    width = grid.block[1]
    before = strip.column % width
    after = strip.blocks(grid) * width - before - strip.columns
    return torch.nn.functional.pad(columns, (before, after)).view(-1, width).amax(1)


def scales_for(magnitudes: Tensor, dtype: torch.dtype, stored: torch.dtype) -> Tensor:
    """The scale of every block, as it is stored: its largest magnitude becomes the largest of `dtype`.

    A block of zeros has the scale 1.
    """
    scales = (magnitudes.to(torch.float64) / torch.finfo(dtype).max).to(stored)
    # What is smaller than any number of the scales' dtype still needs one.
    least = torch.finfo(stored).tiny
    return torch.where(magnitudes == 0, torch.ones_like(scales), scales.clamp(min=least))


def codes_of(values: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """values / scales, rounded to nearest even in `dtype`, once. NaN for what is not finite."""
    scales = scales.to(torch.float32)
    quotients = values / scales
    # A quotient may have been rounded onto the middle between two codes; then the exact one says to which side it goes.
    # numpy finds the few of them in a tenth of torch's time.
    near = torch.from_numpy(np.flatnonzero(quotients.view(torch.int32).bitwise_and(_TAIL).eq_(0).numpy()))
    if len(near):
        flat, found = quotients.view(-1), quotients.view(-1)[near]
        divisors = scales[near % len(scales)]
        exact = values.reshape(-1)[near].to(torch.float64) / divisors.to(torch.float64)
        towards = torch.where(exact > found, torch.inf, -torch.inf).to(torch.float32)
        flat[near] = torch.where(exact == found, found, torch.nextafter(found, towards))
    codes = quotients.to(dtype)
    # Finite ones are far too small for their sum to overflow.
    if not math.isfinite(float(quotients.sum())):
        codes = torch.where(torch.isfinite(quotients), codes, torch.full_like(quotients, torch.nan).to(dtype))
    return codes
