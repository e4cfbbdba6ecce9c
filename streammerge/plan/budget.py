"""The schedule: how a plan runs inside a number of bytes. Printed, never hashed: it changes the speed, not the bits.

The budget is for the whole process:

    limit = baseline (interpreter and torch, measured) + reserve (5 %, at least 64 MiB)
          + work (temporaries of the arithmetic) + dirty (written, not yet on disk) + arena

The arena is one piece of memory, cut into equal slots. A slot holds one tile of every input and of the output.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from streammerge.base.dtypes import DTYPES
from streammerge.base.errors import DoesNotFit
from streammerge.base.units import format_size
from streammerge.kernels.contract import BLOCK, FEWEST_SIFTED, MOST_SIFTED
from streammerge.plan.gather import Read
from streammerge.plan.given import Given
from streammerge.plan.plan import Plan
from streammerge.plan.tensor import UNWRITTEN, TensorPlan

MIB = 1 << 20
# Tiles of 2 Mi elements: reads of 4 MiB per bf16 input. Larger ones were not faster (docs/bench.md).
_TILE_BLOCKS = 32
_SLOTS = 6
_FEWEST_SLOTS = 3
SCRATCH_BLOCKS = 4
# More memory than this is used only when it is allowed and keeps the inputs of a tensor for its later passes.
_DEFAULT_ARENA = 192 * MIB
# An allowance for the temporaries of one thread on one block of eager code: 48 of them in float32, 8 more per model.
_WORK_PER_THREAD = 12 * MIB
_WORK_PER_MODEL = 2 * MIB
# Rows that are gathered as wider numbers, codes that are made numbers, or numbers that are drawn, by every thread that
# reads.
_WORK_OF_GATHERING = 4 * MIB
# Strips that are made codes, by every thread, with what is worked out of them.
_WORK_OF_SCALING = 12 * MIB
# More for folding adapters in: eight blocks at a time, in float64.
_WORK_OF_FOLDING = 24 * MIB
# Random numbers in mergekit's order, of the tiles in work.
_DRAWS = 96 * MIB
# What is taken out of a tensor for its cuts (MOST_SIFTED), with the copies that are made of it.
_WORK_OF_SIFTING = 72 * MIB
# Of the budget what methods keep of a tensor takes twice this share at most.
_KEPT_SHARE = 16
_MOST_DIRTY, _LEAST_DIRTY = 256 * MIB, 16 * MIB
# The interpreter and torch take some MB more or less each time they are started: a budget we name has room for that.
BASELINE_VARIES = 8 * MIB


@dataclass(frozen=True)
class Schedule:
    """Sizes of one run. About `tile_blocks` of 65,536 elements make a tile; `slots` tiles are in memory at a time.

    The scratch area has room for the samples and single units that some methods look at.
    """

    limit_bytes: int
    baseline_bytes: int
    work_bytes: int
    dirty_bytes: int
    tile_blocks: int
    slot_bytes: int
    scratch_bytes: int
    slots: int
    threads: int
    # Passes over a tensor's inputs are saved when it has at most so many tiles: they stay in their slots.
    resident_tiles: int
    # Methods may keep so much of one tensor from a look to the merging pass.
    keep_bytes: int
    # Methods may take so many entries out of one tensor at a time.
    sifts: int
    # Of a tensor that is read again, so much is left in the page cache meanwhile: memory nobody else claims.
    cache_bytes: int

    @property
    def arena_bytes(self) -> int:
        return self.slots * self.slot_bytes + self.scratch_bytes

    @property
    def peak_bytes(self) -> int:
        """The planned peak of the process."""
        return self.baseline_bytes + self.work_bytes + self.dirty_bytes + self.arena_bytes + 2 * self.keep_bytes


def tile_elements(tensor: TensorPlan, tile_blocks: int) -> int:
    """The elements of one tile of a tensor: whole units of all its steps."""
    return max(1, tile_blocks * BLOCK // tensor.quantum) * tensor.quantum


def tiles_of(tensor: TensorPlan, tile_blocks: int) -> int:
    """How many tiles a tensor has."""
    return -(-tensor.elements // tile_elements(tensor, tile_blocks))


def tile_bytes(tensor: TensorPlan, tile_blocks: int) -> int:
    """What one tile of a tensor takes in a slot: a part for everything read, and one for every step's result."""
    blocks = -(-tile_elements(tensor, tile_blocks) // BLOCK)
    return sum(DTYPES[dtype].itemsize for dtype in tensor.dtypes) * blocks * BLOCK


def make_schedule(plan: Plan, *, limit_bytes: int, limited_by: str, allowed: bool, available_bytes: int,
                  baseline_bytes: int, threads: int) -> Schedule:  # fmt: skip
    """Cut `limit_bytes` up. `allowed` says that the user named the limit, so that all of it may be used.

    `available_bytes` is what machine and cgroups would give this process, the limit apart.

    Raises DoesNotFit with the smallest limit that would do; `limited_by` says in the message where it came from.
    """
    kinds = _kinds(plan)
    models = max(len(tensor.dtypes) for tensor in kinds)
    units = [step.grain(tensor.shape).unit for tensor in kinds for step in tensor.steps]
    widest = max((-(-unit // BLOCK) for unit in units), default=1)
    work = threads * (_WORK_PER_THREAD + models * _WORK_PER_MODEL) * widest
    work += _DRAWS if plan.draws_in_turn else 0
    factors = max(tensor.factor_bytes for tensor in (*plan.tensors, *plan.asked))
    # Those of the tensor before may still be there.
    work += _WORK_OF_GATHERING if any(_is_made(tensor) for tensor in kinds) else 0
    work += threads * _WORK_OF_SCALING if any(tensor.scaling is not None for tensor in kinds) else 0
    work += 2 * factors + (threads * _WORK_OF_FOLDING if factors else 0)
    dirty = min(max(_LEAST_DIRTY, min(_MOST_DIRTY, limit_bytes // 8)), max(plan.bytes_to_write, 1))
    fixed = baseline_bytes + work + dirty
    room = limit_bytes - reserve(limit_bytes) - fixed
    scratch = max(tile_bytes(tensor, SCRATCH_BLOCKS) for tensor in kinds)
    fewest = _FEWEST_SLOTS * max(tile_bytes(tensor, 1) for tensor in kinds) + scratch

    if room < fewest:
        least_dirty = min(_LEAST_DIRTY, dirty)
        need = baseline_bytes + work + least_dirty + fewest
        if smallest_limit(need) > limit_bytes:
            works = smallest_limit(need + BASELINE_VARIES)
            raise DoesNotFit(
                f"{format_size(limit_bytes)} of memory ({limited_by}) is too little for this merge: the interpreter "
                f"and torch take {format_size(baseline_bytes)}, arithmetic on {threads} threads "
                f"{format_size(work)}, the smallest buffers {format_size(fewest)}, besides a "
                f"reserve. The smallest budget that works is {-(-works // 1_000_000)}MB."
            )
        dirty = least_dirty
        room = limit_bytes - reserve(limit_bytes) - (baseline_bytes + work + dirty)

    room -= scratch
    # What was kept of the tensor before may still be there.
    keep = max(
        (size for tensor in plan.tensors if (size := tensor.kept_bytes) <= limit_bytes // _KEPT_SHARE), default=0
    )
    keep = keep if room - 2 * keep >= 2 * fewest else 0
    room -= 2 * keep
    sifts = min(limit_bytes // _KEPT_SHARE, room - 2 * fewest) >= _WORK_OF_SIFTING
    if sifts and any(tensor.has_cuts for tensor in (*plan.tensors, *plan.asked)):
        work += _WORK_OF_SIFTING
        room -= _WORK_OF_SIFTING
    tile_blocks = min(_TILE_BLOCKS, max(-(-tensor.elements // BLOCK) for tensor in kinds) or 1)
    slot = max(tile_bytes(tensor, tile_blocks) for tensor in kinds)
    while tile_blocks > 1 and room // slot < _SLOTS:
        tile_blocks = -(-tile_blocks // 2)
        slot = max(tile_bytes(tensor, tile_blocks) for tensor in kinds)
    most = room // slot if allowed else min(room, max(_SLOTS * slot, _DEFAULT_ARENA)) // slot
    slots = max(_FEWEST_SLOTS, min(_slots_wanted(plan, tile_blocks, most), most))
    # Half of the slots go on reading ahead while the tiles of the tensor in work stay in the other half.
    resident = slots // 2
    return Schedule(
        limit_bytes=limit_bytes,
        baseline_bytes=baseline_bytes,
        work_bytes=work,
        dirty_bytes=dirty,
        tile_blocks=tile_blocks,
        slot_bytes=slot,
        scratch_bytes=scratch,
        slots=slots,
        threads=threads,
        resident_tiles=resident,
        keep_bytes=keep,
        sifts=MOST_SIFTED if sifts else FEWEST_SIFTED,
        cache_bytes=max(0, (available_bytes - limit_bytes) // 2) if allowed else available_bytes // 2,
    )


def _slots_wanted(plan: Plan, tile_blocks: int, most: int) -> int:
    """Enough to read ahead, and to keep every tensor that is looked at more than once and can be kept in `most`."""
    tiles = [tiles_of(tensor, tile_blocks) for tensor in plan.tensors if tensor.passes > 1]
    return max(_SLOTS, 2 * max((count for count in tiles if 2 * count <= most), default=0))


def stays(tensor: TensorPlan, schedule: Schedule) -> bool:
    """Whether the inputs of a tensor stay in memory through all its passes."""
    return tiles_of(tensor, schedule.tile_blocks) <= schedule.resident_tiles


def keeps(tensor: TensorPlan, schedule: Schedule) -> bool:
    """Whether methods may keep what they would like to of a tensor."""
    return tensor.kept_bytes <= schedule.keep_bytes


def bytes_to_read(tensors: Iterable[TensorPlan], schedule: Schedule) -> int:
    """What merging `tensors` reads in all its passes."""
    return sum(tensor.read_bytes * (tensor.survey_passes + _merging_passes(tensor, schedule)) for tensor in tensors)


def _merging_passes(tensor: TensorPlan, schedule: Schedule) -> int:
    if tensor.shard == UNWRITTEN:
        return 0
    return 1 if stays(tensor, schedule) else tensor.passes


def _kinds(plan: Plan) -> list[TensorPlan]:
    """The largest tensor of every kind that takes its own room in a slot."""
    largest: dict[Any, TensorPlan] = {}
    for tensor in (*plan.tensors, *plan.asked):
        kind = (tensor.dtypes, tensor.quantum, len(tensor.steps), _is_made(tensor), tensor.scaling is not None)
        if kind not in largest or tensor.elements > largest[kind].elements:
            largest[kind] = tensor
    return list(largest.values())


def _is_made(tensor: TensorPlan) -> bool:
    """Whether the threads that read need memory of their own for it."""
    return any(not isinstance(read, Read | Given) for read in tensor.reads)


def reserve(limit: int) -> int:
    """What of a limit is left alone: for what nobody counted."""
    return max(limit // 20, 64 * MIB)


def smallest_limit(need: int) -> int:
    """The least limit that leaves `need` after its reserve."""
    return max(need + 64 * MIB, -(-need * 20 // 19) + 1)
