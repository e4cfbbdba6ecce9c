"""How large a sketch of a matrix is, and how an extraction runs inside a number of bytes.

    limit = baseline (interpreter and torch, measured) + reserve (5 %, at least 64 MiB)
          + sketch (what is as wide as the matrix, and the factors) + slots (panels of rows) + threads + held

Widths and panels are fixed by the matrix and by what is asked for: they are in the bits. How many panels are in memory
at a time, on how many threads, and whether a difference is held for the next pass or read again, is not.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from streammerge.base.dtypes import DTYPES
from streammerge.base.errors import DoesNotFit
from streammerge.base.units import format_size
from streammerge.plan.budget import BASELINE_VARIES, MIB, reserve, smallest_limit
from streammerge.plan.extraction import Extraction, Pair, Wanted

# Passes over the difference that make the sketch; one more makes the factors. Of a matrix of 1536 x 1024 whose singular
# values fall as 1/sqrt(i), 64 vectors hold 0.992 of what the best 64 do after two, and 0.998 after three (2026-11-28).
SKETCH_PASSES = 3
# More vectors than asked for, so that those asked for are found.
_LEAST_OVERSAMPLING = 16
# A first width where the rank is not known.
_FIRST_RANK = 32
# Elements of a panel, and its fewest rows: products of fewer are slow.
_PANEL, _FEWEST_ROWS = 1 << 19, 8
# What lies in a slot for each element: the difference in float64, the two inputs in float32, and what was read.
_SLOT_BYTES = 8 + 4 + 4
# What BLAS takes for each thread, with its stack.
_PER_THREAD = 16 * MIB
# What LAPACK has besides, for matrices of a width by a width.
_SQUARES, _TALL = 8, 5
# Differences are held for the next pass in so much, where no limit was named.
_DEFAULT_HELD = 512 * MIB
# Where factors are collected, and read back.
SPILL_BYTES = 8 * MIB


def sketch_width(rank: int, rows: int, columns: int) -> int:
    """Vectors of a sketch from which `rank` are taken."""
    return min(rows, columns, rank + max(_LEAST_OVERSAMPLING, rank // 2))


def widths(pair: Pair, wanted: Wanted) -> Iterator[tuple[int, int]]:
    """Sketches to try one after the other: how wide, and up to which rank it can be trusted. The last is the widest."""
    most = min(wanted.most, pair.rows, pair.columns)
    rank = most if wanted.energy is None else min(_FIRST_RANK, most)
    while True:
        width = sketch_width(rank, pair.rows, pair.columns)
        # As wide as the matrix, a sketch is all of it.
        if rank == most or width == min(pair.rows, pair.columns):
            yield width, most
            return
        yield width, rank
        rank = min(2 * rank, most)


def panel_rows(pair: Pair) -> int:
    """Rows of a panel, but for the last."""
    return max(1, min(pair.rows, max(_FEWEST_ROWS, _PANEL // max(pair.columns, 1))))


@dataclass(frozen=True)
class SketchSchedule:
    """Sizes of one extraction: `slots` panels in memory on `threads`, and `held_bytes` for differences that are needed
    again."""

    limit_bytes: int
    baseline_bytes: int
    sketch_bytes: int
    slot_elements: int
    raw_bytes: int
    slots: int
    threads: int
    held_bytes: int

    @property
    def peak_bytes(self) -> int:
        """The planned peak of the process."""
        working = self.threads * _PER_THREAD + self.slots * self.slot_elements * (_SLOT_BYTES + self.raw_bytes)
        return self.baseline_bytes + self.sketch_bytes + SPILL_BYTES + working + self.held_bytes


def make_sketch_schedule(extraction: Extraction, wanted: Wanted, *, limit_bytes: int, limited_by: str, allowed: bool,
                         baseline_bytes: int, threads: int) -> SketchSchedule:  # fmt: skip
    """Cut `limit_bytes` up. `allowed` says that the user named the limit, so that all of it may be used.

    Raises DoesNotFit with the smallest limit that would do.
    """
    targets = [target.pair for target in extraction.targets]
    pairs = [*targets, *(left.pair for left in extraction.left if not left.exact)]
    largest = max(panel_rows(pair) * pair.columns for pair in pairs)
    raw = max(DTYPES[operand.dtype].itemsize for pair in pairs for operand in pair.operands)
    sketch = max(_sketch_bytes(pair, wanted) for pair in targets)
    most_held = max(pair.elements for pair in targets) * 4
    room = limit_bytes - reserve(limit_bytes)

    def schedule(slots: int, threads: int, held: int) -> SketchSchedule:
        return SketchSchedule(limit_bytes, baseline_bytes, sketch, largest, raw, slots, threads, held)

    for count in range(threads, 0, -1):
        # One more is read ahead.
        for slots in (count + 1, count):
            tried = schedule(slots, count, 0)
            if tried.peak_bytes <= room:
                left = room - tried.peak_bytes
                return schedule(slots, count, min(left if allowed else min(left, _DEFAULT_HELD), most_held))
    need = schedule(1, 1, 0).peak_bytes + BASELINE_VARIES
    wide = max(targets, key=lambda pair: _sketch_bytes(pair, wanted))
    raise DoesNotFit(
        f"{format_size(limit_bytes)} of memory ({limited_by}) is too little for rank {min(wanted.most, *wide.shape)}: "
        f"the interpreter and torch take {format_size(baseline_bytes)}, a sketch of {wide.name} {format_size(sketch)}, "
        f"the smallest panels {format_size(need - baseline_bytes - sketch)}, besides a reserve. The smallest budget "
        f"that works is {-(-smallest_limit(need) // 1_000_000)}MB."
    )


def _sketch_bytes(pair: Pair, wanted: Wanted) -> int:
    """What is as wide as the matrix while it is sketched and its factors are made, the panels apart."""
    most = min(wanted.most, pair.rows, pair.columns)
    width = sketch_width(most, pair.rows, pair.columns)
    panels = width * panel_rows(pair) * 8 * 2
    factors = most * (pair.rows + pair.columns) * DTYPES[wanted.dtype].itemsize
    making = factors + most * pair.columns * 8 * 3 + most * pair.rows * DTYPES[wanted.dtype].itemsize
    return max(_TALL * width * pair.columns * 8 + _SQUARES * width * width * 8, making) + panels
