"""The one piece of memory that tiles are read into and written from, cut into equal slots and a scratch area."""

from __future__ import annotations

import mmap
import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from streammerge.base.dtypes import DTYPES
from streammerge.base.errors import DoesNotFit
from streammerge.base.units import format_size
from streammerge.kernels.contract import BLOCK
from streammerge.kernels.dtypes import torch_dtype

# Not in Python's mmap module.
_MADV_HUGEPAGE, _MADV_POPULATE_WRITE = 14, 23


class Arena:
    """Owns the memory. `slots` parts of `slot_bytes`, then a scratch part."""

    def __init__(self, slots: int, slot_bytes: int, scratch_bytes: int) -> None:
        """Reserve and touch all of it, so that a budget that does not fit fails now. Raises DoesNotFit."""
        size = slots * slot_bytes + scratch_bytes
        size += -size % mmap.PAGESIZE
        try:
            # Private: Python's default is shared memory, which limits on data do not see.
            self._memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            if sys.platform == "linux":
                self._advise(_MADV_HUGEPAGE)
                self._advise(_MADV_POPULATE_WRITE)
        except (OSError, MemoryError) as error:
            raise DoesNotFit(f"No memory for buffers of {format_size(size)}: {error}. Give a smaller --max-memory.") from error
        self._bytes = torch.frombuffer(self._memory, dtype=torch.uint8)
        self.slots, self.slot_bytes, self.scratch_bytes = slots, slot_bytes, scratch_bytes

    @property
    def tensor(self) -> Tensor:
        """All of it as one uint8 tensor, for pinning."""
        return self._bytes

    def slot(self, number: int) -> Tensor:
        """Slot `number` as a uint8 tensor."""
        return self._bytes[number * self.slot_bytes : (number + 1) * self.slot_bytes]

    def scratch(self) -> Tensor:
        start = self.slots * self.slot_bytes
        return self._bytes[start : start + self.scratch_bytes]

    def _advise(self, advice: int) -> None:
        try:
            self._memory.madvise(advice)
        except OSError as error:
            # Kernels before 5.14 do not populate; then memory is touched when it is first used.
            if advice == _MADV_POPULATE_WRITE and error.errno != 22:
                raise


def areas(memory: Tensor, dtypes: Sequence[str], blocks: int) -> list[Tensor]:
    """Cut a slot into one (blocks, BLOCK) tensor per dtype name, one after the other."""
    tensors = []
    start = 0
    for name in dtypes:
        size = DTYPES[name].itemsize * blocks * BLOCK
        tensors.append(memory[start : start + size].view(torch_dtype(name)).view(blocks, BLOCK))
        start += size
    return tensors


def raw(tensor: Tensor, elements: int) -> memoryview:
    """The bytes of the first `elements` elements of a contiguous CPU tensor, without a copy."""
    return memoryview(tensor.view(-1)[:elements].view(torch.uint8).numpy()).cast("B")
