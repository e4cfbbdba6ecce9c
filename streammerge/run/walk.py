"""The walk of the data: some tensors of a plan, from their inputs into output shards that somebody opens.

arena, sources, lane → survey → engine → WriteBehind
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any

import torch

from streammerge.kernels.compiled import Cache, Run, Signature
from streammerge.kernels.contract import Program
from streammerge.plan.budget import Schedule, bytes_to_read
from streammerge.plan.plan import Plan
from streammerge.plan.tensor import TensorPlan
from streammerge.run.arena import Arena
from streammerge.run.engine import Engine
from streammerge.run.gpu import CudaLane
from streammerge.run.journal import Record
from streammerge.run.lane import CpuLane, Lane
from streammerge.run.looking import Looker
from streammerge.run.memory import Meter
from streammerge.run.pipeline import READ_THREADS, ReadAhead, WriteBehind
from streammerge.run.survey import SurveyBook, survey
from streammerge.storage.sink import Shard
from streammerge.storage.source import Source


@dataclass(frozen=True)
class Status:
    """How far a merge is."""

    read_bytes: int
    written_bytes: int
    own_bytes: int


Running = Callable[[Callable[[], Status], int, int], AbstractContextManager[None]]


@dataclass(frozen=True)
class Equipment:
    """What tensors are merged with. `touch` says that all memory of the budget is taken at once."""

    schedule: Schedule
    device: torch.device
    cache: Cache | None
    max_gpu_memory: int | None
    touch: bool

    def lane(self, arena: Arena) -> Lane:
        """Where the arithmetic runs. Its owner closes it."""
        if self.device.type == "cuda":
            return CudaLane(self.device, arena, self.max_gpu_memory)

        def find(program: Program, signature: Signature) -> Run | None:
            return self.cache.load(program, signature, self.schedule.threads) if self.cache is not None else None

        return CpuLane(self.schedule.threads, find)


@dataclass(frozen=True)
class Walked:
    """Bytes read and written, and where the time went."""

    read_bytes: int
    written_bytes: int
    spent: dict[str, Any]


def walk(plan: Plan, pending: Sequence[TensorPlan], equipment: Equipment, record: Record,
         open_shard: Callable[[int], Shard], book: SurveyBook, meter: Meter, stopping: Callable[[], bool],
         running: Running) -> Walked:  # fmt: skip
    """Merge the `pending` tensors of a plan. What is finished is in `record`, also when this raises.

    A shard, opened by its number, is published when the last of its tensors that are pending is on disk. Raises Stopped
    at the next tile once `stopping()` is true.
    """
    schedule = equipment.schedule
    remaining = dict.fromkeys(range(len(plan.shards)), 0)
    for tensor in pending:
        remaining[tensor.shard] += len(tensor.names)
    with ExitStack() as stack:
        arena = Arena(schedule.slots, schedule.slot_bytes, schedule.scratch_bytes, touch=equipment.touch)
        sources = []
        for checkpoint in plan.checkpoints:
            source = Source(checkpoint)
            stack.callback(source.close)
            sources.append(source)
        lane = equipment.lane(arena)
        stack.callback(lane.close)
        reader = ReadAhead(sources, arena, READ_THREADS)
        stack.callback(reader.close)

        def check_inputs() -> None:
            for source in sources:
                source.check_unchanged()

        writer = WriteBehind(record, open_shard, schedule.dirty_bytes, remaining, check_inputs)
        looker = Looker(schedule, sources=sources, arena=arena, reader=reader, lane=lane, stopping=stopping)

        def status() -> Status:
            return Status(reader.bytes_read, writer.bytes_written, meter.now_own)

        to_read, to_write = bytes_to_read((*pending, *plan.asked), schedule), sum(tensor.nbytes for tensor in pending)
        with running(status, to_read, to_write):
            try:
                tensors = survey(plan, pending, looker, reader, book)
                Engine(plan, schedule, looker=looker, reader=reader, writer=writer).run(tensors)
            finally:
                # Also when stopped or failed: what is finished goes to disk and into the record.
                writer.close()
        spent: dict[str, Any] = {name: reader.spent.of(name) for name in ("reading", "waiting")}
        spent |= {name: writer.spent.of(name) for name in ("unready", "hashing", "writing", "syncing")}
        return Walked(reader.bytes_read, writer.bytes_written, spent | {"programs": lane.spent.all})
