"""Units of work: one output shard each, and who begins with which.

Largest first into the lightest bin, by bytes read and written; every worker finds the same bins, and needs nobody for
it. After its own bin a worker goes on with those of others, from their ends.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from streammerge.plan.plan import Plan
from streammerge.plan.tensor import TensorPlan


@dataclass(frozen=True)
class Unit:
    """Output shard `number`, with its tensors."""

    number: int
    shard: str
    tensors: tuple[TensorPlan, ...]
    read_bytes: int
    written_bytes: int

    @property
    def moved_bytes(self) -> int:
        return self.read_bytes + self.written_bytes


def units_of(plan: Plan) -> list[Unit]:
    """The units of a plan, by number. What is read several times counts once: whether it is, memory decides."""
    tensors: list[list[TensorPlan]] = [[] for _ in plan.shards]
    for tensor in plan.tensors:
        tensors[tensor.shard].append(tensor)
    return [
        Unit(number, shard.name, tuple(own), sum(tensor.read_bytes for tensor in own), shard.nbytes)
        for number, (shard, own) in enumerate(zip(plan.shards, tensors, strict=True))
    ]


def order_for(units: Sequence[Unit], index: int, count: int) -> list[Unit]:
    """All units in the order in which worker `index` of `count` asks for them."""
    bins: list[list[Unit]] = [[] for _ in range(count)]
    loads = [(0, number) for number in range(count)]
    for unit in sorted(units, key=lambda unit: (-unit.moved_bytes, unit.number)):
        load, number = heapq.heappop(loads)
        bins[number].append(unit)
        heapq.heappush(loads, (load + unit.moved_bytes, number))
    own = bins[index]
    # The next worker's first: not all that are ready early ask the same one.
    others = [bins[(index + step) % count] for step in range(1, count)]
    return own + [unit for other in others for unit in reversed(other)]
