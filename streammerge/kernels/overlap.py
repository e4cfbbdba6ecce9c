"""Deltas by whether their entries are one model's own or shared: what RAM and RAM+ merge.

Model i changed an entry when |Δ_i| > ε; a NaN counts as a change, so that it is seen. With c models that changed it,
the entry becomes b + f_i Δ_i for c = 1, and b plus the mean of the changes for c > 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from streammerge.kernels.contract import Argument, Arguments, Program, Tile
from streammerge.kernels.select import counted, masked

_EPSILON = Argument("epsilon", (1,))


def count_changes(tile: Tile, arguments: Arguments) -> Tensor:
    """(blocks, 2K): per model, how many of its changes are shared, and how many its own. Exact up to a block."""
    changes = _changes(tile, arguments)
    count = _count(changes)
    shared = [counted(changed & (count > 1)) for changed in changes]
    own = [counted(changed & (count == 1)) for changed in changes]
    return torch.stack(shared + own, -1)


def merge_changes(tile: Tile, arguments: Arguments, scaled: bool) -> Tensor:
    """The merged tile; `scaled` says whether there are factors f_i."""
    assert tile.base is not None
    changes = _changes(tile, arguments)
    count = _count(changes)
    merged = torch.zeros_like(tile.base)
    for i, (changed, delta) in enumerate(zip(changes, tile.deltas(), strict=True)):
        part = torch.where(count == 1, delta * arguments["factor"][i], delta) if scaled else delta
        merged = merged + masked(changed, part)
    return tile.base + merged / count.clamp(min=1.0)


COUNT = Program(count_changes, (_EPSILON,), eager_ns=10)
MERGE = Program(merge_changes, (_EPSILON,), (("scaled", False),), merges=True, eager_ns=8)
MERGE_SCALED = Program(
    merge_changes, (_EPSILON, Argument("factor")), (("scaled", True),), merges=True, eager_ns=10
)  # fmt: skip


def _changes(tile: Tile, arguments: Arguments) -> list[Tensor]:
    return [~(delta.abs() <= arguments["epsilon"]) for delta in tile.deltas()]


def _count(changes: list[Tensor]) -> Tensor:
    count = changes[0].to(torch.float32)
    for changed in changes[1:]:
        count = count + changed.to(torch.float32)
    return count
