"""The one piece of memory that tiles are read into and written from, cut into equal slots and a scratch area."""

from __future__ import annotations

import errno
import mmap
import sys

import torch
from torch import Tensor

from streammerge.base.dtypes import DTYPES
from streammerge.base.errors import DoesNotFit
from streammerge.base.units import format_size
from streammerge.kernels.contract import BLOCK, Grain
from streammerge.kernels.dtypes import torch_dtype

# Not in Python's mmap module.
_MADV_HUGEPAGE, _MADV_POPULATE_WRITE = 14, 23
_ZEROS = bytes(BLOCK * 8)


class Area:
    """A part of the arena that holds one input or output of a tile: as a tensor (blocks, BLOCK), and as bytes.

    Views are made once: every torch call lets other threads in, and waiting to be let in again costs more than the
    call (2.4 s became 1.9 for a linear merge, measured 2026-11-24).
    """

    def __init__(self, tensor: Tensor, data: memoryview) -> None:
        self.tensor, self.bytes = tensor, data
        self.itemsize = tensor.element_size()
        self._pieces: dict[int, list[Tensor]] = {}
        self._rows: dict[tuple[Grain, int, int], list[Tensor]] = {}

    def pieces(self, size: int) -> list[Tensor]:
        """The tensor in pieces of at most `size` blocks."""
        if size not in self._pieces:
            self._pieces[size] = [self.tensor[first : first + size] for first in range(0, len(self.tensor), size)]
        return self._pieces[size]

    def rows(self, grain: Grain, elements: int, units: int = 1) -> list[Tensor]:
        """The first `elements`, in pieces of so many units of whole rows; a unit that is not full is a piece."""
        key = (grain, elements, units)
        if key not in self._rows:
            flat, step, full = self.tensor.view(-1), units * grain.unit, elements - elements % grain.unit
            spans = [(start, min(start + step, full)) for start in range(0, full, step)]
            if full < elements:
                spans.append((full, elements))
            assert grain.width is not None
            self._rows[key] = [flat[start:stop].view(-1, grain.width) for start, stop in spans]
        return self._rows[key]

    def zero_from(self, elements: int) -> None:
        """Fill with zeros from `elements` on to the end of that block."""
        start, stop = elements * self.itemsize, -(-elements // BLOCK) * BLOCK * self.itemsize
        self.bytes[start:stop] = _ZEROS[: stop - start]


class Arena:
    """Owns the memory: `slots` parts of `slot_bytes`, numbered from 0, then a scratch part with the next number."""

    def __init__(self, slots: int, slot_bytes: int, scratch_bytes: int, *, touch: bool) -> None:
        """Reserve the memory; with `touch` take all of it now, so that a budget that does not fit fails at once.

        Raises DoesNotFit.
        """
        size = slots * slot_bytes + scratch_bytes
        size += -size % mmap.PAGESIZE
        try:
            # Private: Python's default is shared memory, which limits on data do not see.
            self._memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            if sys.platform == "linux":
                self._advise(_MADV_HUGEPAGE)
                if touch:
                    self._advise(_MADV_POPULATE_WRITE)
        except (OSError, MemoryError) as error:
            raise DoesNotFit(
                f"No memory for buffers of {format_size(size)}: {error}. Give a smaller --max-memory."
            ) from error
        self._bytes = memoryview(self._memory)
        self._made: dict[tuple[int, tuple[str, ...], int], list[Area]] = {}
        # All of it, for pinning.
        self.tensor = torch.frombuffer(self._memory, dtype=torch.uint8)
        self.slots, self.slot_bytes = slots, slot_bytes

    def areas(self, slot: int, dtypes: tuple[str, ...], blocks: int) -> list[Area]:
        """Slot number `slot` cut into one area of `blocks` blocks per dtype name. Made once, then the same again."""
        key = (slot, dtypes, blocks)
        if key not in self._made:
            areas = []
            start = slot * self.slot_bytes
            for name in dtypes:
                stop = start + DTYPES[name].itemsize * blocks * BLOCK
                tensor = self.tensor[start:stop].view(torch_dtype(name)).view(blocks, BLOCK)
                areas.append(Area(tensor, self._bytes[start:stop]))
                start = stop
            self._made[key] = areas
        return self._made[key]

    def _advise(self, advice: int) -> None:
        try:
            self._memory.madvise(advice)
        except OSError as error:
            # Kernels before 5.14 do not populate; then memory is touched when it is first used.
            if advice == _MADV_POPULATE_WRITE and error.errno != errno.EINVAL:
                raise
