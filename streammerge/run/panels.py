"""The difference of two tensors, panel by panel: read on threads, handed out in order, as often as it is asked for.

A panel is MODEL - BASE of some rows, rounded once to float32, and then made float64 to be multiplied. Differences that
fit in what the schedule allows are held in float32 for the next pass: the same numbers, and no reading.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

from streammerge.base.dtypes import DTYPES
from streammerge.base.errors import Stopped
from streammerge.kernels.dtypes import torch_dtype
from streammerge.plan.extraction import Pair
from streammerge.plan.gather import Read
from streammerge.plan.scaled import Scaled
from streammerge.plan.sketch import SketchSchedule, panel_rows
from streammerge.run.arena import Area
from streammerge.run.scaling import read_scaled
from streammerge.storage.source import Source

T = TypeVar("T")


class _Slot:
    """The buffers of one panel in work."""

    def __init__(self, elements: int, raw_bytes: int) -> None:
        self.wide = torch.empty(elements, dtype=torch.float64)
        self.numbers = [torch.empty(elements, dtype=torch.float32) for _ in range(2)]
        self.raw = torch.empty(elements * raw_bytes, dtype=torch.uint8)


class Panels:
    """Reads the differences of an extraction. Owns its buffers and its threads; close it."""

    def __init__(self, sources: Sequence[Source], schedule: SketchSchedule, stopping: Callable[[], bool],
                 advance: Callable[[int], None]) -> None:  # fmt: skip
        """`stopping` is asked before each panel; `advance` is told of the elements of each when it has been used."""
        # A BLAS call must not depend on how many threads there are: each has one, here and in the pool.
        torch.set_num_threads(1)
        self._sources, self._stopping, self._advance = sources, stopping, advance
        self._free = deque(_Slot(schedule.slot_elements, schedule.raw_bytes) for _ in range(schedule.slots))
        self._room = schedule.held_bytes
        self._held_of: Pair | None = None
        self._held: dict[int, Tensor] = {}
        self.pool = ThreadPoolExecutor(schedule.threads, "panel", torch.set_num_threads, (1,))
        self.read_bytes = 0

    def each(self, pair: Pair, work: Callable[[Tensor], T], *, again: bool = False) -> Iterator[tuple[Tensor, T]]:
        """Every panel of a pair in order, (rows, columns) float64, with what `work` made of it on a thread.

        A panel is there until the next is asked for. `again` says that the same pair will be asked for once more.
        Raises Stopped, InputError.
        """
        if pair is not self._held_of:
            self._held, self._held_of = {}, pair
        height = panel_rows(pair)
        starts = deque(range(0, pair.rows, height))
        hold = again and pair.elements * 4 <= self._room
        ahead: deque[tuple[_Slot, Future[tuple[Tensor, T, int]]]] = deque()
        try:
            while starts or ahead:
                while starts and self._free:
                    slot, first = self._free.popleft(), starts.popleft()
                    rows = min(height, pair.rows - first)
                    ahead.append((slot, self.pool.submit(self._make, slot, pair, first, rows, hold, work)))
                if self._stopping():
                    raise Stopped("stopped")
                slot, future = ahead.popleft()
                try:
                    panel, made, count = future.result()
                    self.read_bytes += count
                    yield panel, made
                    self._advance(panel.numel())
                finally:
                    self._free.append(slot)
        finally:
            # What is still read goes into slots that others will be given.
            for slot, future in ahead:
                if not future.cancel():
                    future.exception()
                self._free.append(slot)
            if not again:
                self._held, self._held_of = {}, None

    def differ(self, pair: Pair) -> bool:
        """Whether two tensors of one shape that are not of floats hold other bytes."""
        specs = [operand.spec for operand in pair.operands if isinstance(operand, Read)]
        if len(specs) != 2 or specs[0].dtype != specs[1].dtype:
            return True
        slot = self._free[0]
        size = slot.wide.numel() * 4
        views = [memoryview(numbers.view(torch.uint8).numpy().data) for numbers in slot.numbers]
        for start in range(0, specs[0].nbytes, size):
            count = min(size, specs[0].nbytes - start)
            for operand, view in zip(pair.operands, views, strict=True):
                assert isinstance(operand, Read)
                spec = operand.spec
                self._sources[operand.checkpoint].read_into(view[:count], spec.file, spec.offset + start)
            if views[0][:count] != views[1][:count]:
                return True
        return False

    def whole(self, read: Read) -> Iterator[memoryview]:
        """The bytes of a tensor as they are stored, in pieces. Each is there until the next is asked for."""
        view = memoryview(self._free[0].numbers[0].view(torch.uint8).numpy().data)
        for start in range(0, read.nbytes, len(view)):
            piece = view[: min(len(view), read.nbytes - start)]
            self._sources[read.checkpoint].read_into(piece, read.spec.file, read.spec.offset + start)
            yield piece

    def close(self) -> None:
        self.pool.shutdown(wait=True, cancel_futures=True)
        self._held = {}

    def _make(self, slot: _Slot, pair: Pair, first: int, rows: int, hold: bool,
              work: Callable[[Tensor], T]) -> tuple[Tensor, T, int]:  # fmt: skip
        elements, start = rows * pair.columns, first * pair.columns
        wide, count = slot.wide[:elements], 0
        if first in self._held:
            wide.copy_(self._held[first])
        else:
            narrow, count = self._difference(slot, pair, start, elements)
            wide.copy_(narrow)
            if hold:
                self._held[first] = narrow.clone()
        panel = wide.view(rows, pair.columns)
        return panel, work(panel), count

    def _difference(self, slot: _Slot, pair: Pair, start: int, elements: int) -> tuple[Tensor, int]:
        """MODEL - BASE, rounded once to float32, and the bytes that were read."""
        narrow, other = (numbers[:elements] for numbers in slot.numbers)
        if "F64" in (pair.model.dtype, pair.base.dtype):
            wide = slot.wide[:elements]
            values, first = self._values(slot, pair.model, start, elements, other)
            wide.copy_(values)
            values, second = self._values(slot, pair.base, start, elements, other)
            return narrow.copy_(wide.sub_(values)), first + second
        values, first = self._values(slot, pair.model, start, elements, narrow)
        # Those of float32 are there already.
        narrow.copy_(values)
        values, second = self._values(slot, pair.base, start, elements, other)
        other.copy_(values)
        return narrow.sub_(other), first + second

    def _values(self, slot: _Slot, operand: Read | Scaled, start: int, elements: int,
                numbers: Tensor) -> tuple[Tensor, int]:  # fmt: skip
        """What is stored, in the slot's buffer, or in `numbers` if it is of float32 or scaled; and the bytes read."""
        if isinstance(operand, Scaled):
            area = Area(numbers.view(1, -1), memoryview(numbers.view(torch.uint8).numpy().data))
            return numbers, read_scaled(self._sources, operand, area, start, elements, 0, keep_cached=False)
        values = numbers
        if operand.dtype != "F32":
            size = elements * DTYPES[operand.dtype].itemsize
            values = slot.raw[:size].view(torch_dtype(operand.dtype))
        # Through bytes: numpy knows no bfloat16.
        view = memoryview(values.view(torch.uint8).numpy().data)
        offset = operand.spec.offset + start * values.element_size()
        self._sources[operand.checkpoint].read_into(view, operand.spec.file, offset)
        return values, len(view)
