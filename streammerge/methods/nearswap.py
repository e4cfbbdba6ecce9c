"""The other model where it is near to the base, and elsewhere the base moved towards it by at most t.

    y = b + w (x − b),  w = t / max(|x − b|, 1e-6), within [0, 1]

So entries that differ by up to t are taken over, others move by t; with a t of 0 or less the base stays. As in
mergekit a t below 1e-6 takes nothing over whole but entries that are equal already.
"""

from __future__ import annotations

import torch
from torch import Tensor

from streammerge.kernels.contract import Argument, Arguments, Measuring, Method, Param, Problem, Program, Settings, Tile

_SMALLEST = 1e-6


def swapped(tile: Tile, arguments: Arguments) -> Tensor:
    """b + w (x − b), and exactly x where w is 1."""
    assert tile.base is not None
    (model,) = tile.models
    (delta,) = tile.deltas()
    share = (arguments["t"] / delta.abs().clamp(min=_SMALLEST)).clamp(0, 1)
    return torch.where(share == 1, model, tile.base + share * delta)


_PROGRAM = Program(swapped, (Argument("t", (1,)),), merges=True, eager_ns=6)


def _measure(problem: Problem) -> Measuring:
    return {"t": problem.tensor([problem.settings.number("t")])}
    yield  # a generator that asks nothing


def _copies(settings: Settings) -> int | None:
    return 0 if settings.number("t") <= 0 else None


NEARSWAP = Method(
    name="nearswap",
    doc=__doc__,
    params=(Param("t", "how far an entry of the base may move"),),
    base="required",
    min_models=1,
    max_models=1,
    program=lambda settings: _PROGRAM,
    measure=_measure,
    passes=lambda settings, narrow, elements: 1,
    copies=_copies,
)
