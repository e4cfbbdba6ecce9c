"""Reading rows that are gathered from several tensors: run by run, each from its own place."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from streammerge.kernels.contract import BLOCK
from streammerge.kernels.dtypes import torch_dtype
from streammerge.plan.gather import ZERO, Gathered, Read
from streammerge.run.arena import Area
from streammerge.storage.source import Source


def read_rows(sources: Sequence[Source], gathered: Gathered, into: Area, start: int, elements: int, at: int,
              *, keep_cached: bool) -> int:  # fmt: skip
    """Read elements [start, start + elements) of what is gathered into `into`, from its element `at` on.

    Returns the bytes read.
    """
    return _Reading(sources, gathered, into, keep_cached).run(start, elements, at)


class _Reading:
    """The work on one range."""

    def __init__(self, sources: Sequence[Source], gathered: Gathered, into: Area, keep_cached: bool) -> None:
        self._sources, self._gathered, self._keep = sources, gathered, keep_cached
        self._into, self._out = into, into.tensor.view(-1)
        self._count = 0

    def run(self, start: int, elements: int, at: int) -> int:
        gathered, width, stop = self._gathered, self._gathered.width, start + elements
        number = int(np.searchsorted(gathered.starts, start // width, "right")) - 1
        while start < stop:
            begin, end = (int(row) * width for row in gathered.starts[number : number + 2])
            owner, row = int(gathered.owners[number]), int(gathered.rows[number])
            count = min(end, stop) - start
            if owner >= 0:
                self._copy(gathered.parts[owner], row * width + start - begin, count, at)
            elif owner == ZERO:
                self._out[at : at + count].zero_()
            else:
                self._repeat(self._mean(row), start - begin, count, at)
            start, at, number = start + count, at + count, number + 1
        return self._count

    def _copy(self, part: Read, first: int, count: int, at: int) -> None:
        """Elements of a part, as they are or as numbers of the wider dtype."""
        if part.dtype == self._gathered.dtype:
            size = self._into.itemsize
            self._read(part, first, self._into.bytes[at * size : (at + count) * size])
            return
        for done in range(0, count, BLOCK):
            some = min(BLOCK, count - done)
            self._out[at + done : at + done + some] = self._values(part, first + done, some)

    def _values(self, part: Read, first: int, count: int) -> Tensor:
        values = torch.empty(count, dtype=torch_dtype(part.dtype))
        # Through bytes: numpy knows no bfloat16.
        self._read(part, first, memoryview(values.view(torch.uint8).numpy().data))
        return values

    def _read(self, part: Read, first: int, buffer: memoryview) -> None:
        spec = part.spec
        size = spec.nbytes // spec.elements
        self._sources[part.checkpoint].read_into(buffer, spec.file, spec.offset + first * size, keep_cached=self._keep)
        self._count += len(buffer)

    def _mean(self, number: int) -> Tensor:
        """A mean over rows, worked out in float64."""
        pairs, width = self._gathered.means[number], self._gathered.width
        total = torch.zeros(width, dtype=torch.float64)
        for owner, row in pairs:
            total += self._values(self._gathered.parts[owner], row * width, width)
        return total.div_(len(pairs)).to(self._out.dtype)

    def _repeat(self, row: Tensor, first: int, count: int, at: int) -> None:
        """The same row again and again, from its element `first` on (counted over repetitions)."""
        width, done = len(row), 0
        while done < count:
            begin = (first + done) % width
            some = min(width - begin, count - done)
            self._out[at + done : at + done + some] = row[begin : begin + some]
            done += some
