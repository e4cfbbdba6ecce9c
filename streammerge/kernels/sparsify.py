"""Which entries of each model's delta stay: the sparsifiers of the task-vector family.

    none        all
    magnitude   the share `density`, the largest
    outliers    the share `density`, the largest but for the share `gamma` of the very largest
    random      each with probability `density`
    ranked      each with a probability that grows with its rank among the entries of its row

`measured` gives the arguments of `sparse`. A density of 1 or more keeps everything, of 0 nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from streammerge.kernels.chance import keep_limit, keep_limits, keep_mask
from streammerge.kernels.contract import Argument, Arguments, Param, Problem, Settings, Tile
from streammerge.kernels.cut import (
    CUT_ARGUMENTS,
    MAGNITUDES,
    Looking,
    Quantity,
    cut_arguments,
    cut_mask,
    find_cuts,
    magnitude,
    magnitude_cuts,
)
from streammerge.kernels.rank import by_rank

Sparsifier = Literal["none", "magnitude", "outliers", "random", "ranked"]


class Needs(NamedTuple):
    """What programs need for a sparsifier, and the quantity that is ranked over the whole tensor."""

    arguments: tuple[Argument, ...] = ()
    starts: bool = False
    keys: bool = False
    cuts: Quantity | None = None


_TWO_CUTS = replace(MAGNITUDES, searches=2, eager_ns=2 * MAGNITUDES.eager_ns)
# The cut above which entries are outliers.
_TOP_ARGUMENTS = tuple(replace(argument, name=f"top_{argument.name}") for argument in CUT_ARGUMENTS)

NEEDS: dict[Sparsifier, Needs] = {
    "none": Needs(),
    "magnitude": Needs(CUT_ARGUMENTS, starts=True, cuts=MAGNITUDES),
    "outliers": Needs((*CUT_ARGUMENTS, *_TOP_ARGUMENTS), starts=True, cuts=_TWO_CUTS),
    "random": Needs((Argument("limit", dtype=torch.int32),), keys=True),
    # A limit for every rank of a row.
    "ranked": Needs((Argument("limits", ("K", "any"), torch.int32),), keys=True),
}

# Parameters beside the density.
PARAMS: dict[Sparsifier, tuple[Param, ...]] = {
    "outliers": (Param("gamma", "the share of the delta's largest entries that is dropped", 0.01, per_model=True),),
    "ranked": (Param("epsilon", "how far probabilities reach below and above the density", 0.15, per_model=True),),
}


def check(settings: Settings, sparsifier: Sparsifier) -> list[str]:
    """What is wrong with densities and the sparsifier's own parameters."""
    densities = settings.numbers("density")
    problems = [f"density {density:g} is below 0; it is a share, from 0 to 1" for density in densities if density < 0]
    if sparsifier == "outliers":
        gammas = [gamma for gamma in settings.numbers("gamma") if not 0 <= gamma <= 1]
        problems += [f"gamma {gamma:g} is no share; write a number from 0 to 1" for gamma in gammas]
    if sparsifier == "ranked":
        pairs = zip(densities, settings.numbers("epsilon"), strict=True)
        problems += [
            _no_probability(density, epsilon)
            for density, epsilon in pairs
            if 0 < density < 1 and abs(epsilon) >= min(density, 1 - density)
        ]
    return problems


def _no_probability(density: float, epsilon: float) -> str:
    reach = abs(epsilon)
    return (
        f"density {density:g} with epsilon {epsilon:g} gives probabilities from {density - reach:g} to "
        f"{density + reach:g}, which must lie between 0 and 1: write an epsilon below {min(density, 1 - density):g}, "
        f"or density: 1 to keep everything"
    )


def measured(problem: Problem, sparsifier: Sparsifier) -> Looking[dict[str, Tensor]]:
    """The arguments of a sparsifier."""
    if sparsifier == "none":
        return {}
    settings = problem.settings
    densities = settings.numbers("density")
    if sparsifier == "magnitude":
        cuts = yield from magnitude_cuts(problem, densities)
        return cut_arguments(problem, cuts)
    if sparsifier == "outliers":
        return (yield from _two_cuts(problem, densities, settings.numbers("gamma")))
    if sparsifier == "random":
        return {"limit": torch.tensor([keep_limit(density) for density in densities], dtype=torch.int32)}
    return {"limits": _rank_limits(problem, densities, settings.numbers("epsilon"))}


def sparse(tile: Tile, arguments: Arguments, sparsifier: Sparsifier) -> list[Tensor]:
    """The deltas of a tile with what does not stay set to 0."""
    deltas = tile.deltas()
    if sparsifier == "none":
        return deltas
    stays = _STAYS[sparsifier]
    return [torch.where(stays(tile, arguments, delta, i), delta, 0.0) for i, delta in enumerate(deltas)]


def _under_cut(tile: Tile, arguments: Arguments, delta: Tensor, i: int) -> Tensor:
    assert tile.starts is not None
    return cut_mask(magnitude(delta), tile.starts, arguments["threshold"][i], arguments["last"][i])


def _between_cuts(tile: Tile, arguments: Arguments, delta: Tensor, i: int) -> Tensor:
    assert tile.starts is not None
    size = magnitude(delta)
    stays = cut_mask(size, tile.starts, arguments["threshold"][i], arguments["last"][i])
    return stays & ~cut_mask(size, tile.starts, arguments["top_threshold"][i], arguments["top_last"][i])


def _drawn(tile: Tile, arguments: Arguments, delta: Tensor, i: int) -> Tensor:
    assert tile.keys is not None
    return keep_mask(tile.keys[:, i], arguments["limit"][i], delta.shape[-1])


def _drawn_by_rank(tile: Tile, arguments: Arguments, delta: Tensor, i: int) -> Tensor:
    assert tile.keys is not None
    limits = by_rank(magnitude(delta), arguments["limits"][i])
    return keep_mask(tile.keys[:, i], limits.reshape(1, -1), limits.numel()).view(delta.shape)


_STAYS: dict[Sparsifier, Callable[[Tile, Arguments, Tensor, int], Tensor]] = {
    "magnitude": _under_cut,
    "outliers": _between_cuts,
    "random": _drawn,
    "ranked": _drawn_by_rank,
}


def _two_cuts(problem: Problem, densities: Sequence[float], gammas: Sequence[float]) -> Looking[dict[str, Tensor]]:
    """Cuts between which int(density · n) entries stay, after the int(gamma · n) largest or what leaves so many."""
    n = problem.elements
    wanted: list[tuple[int, int]] = []
    for i, (density, gamma) in enumerate(zip(densities, gammas, strict=True)):
        keep = n if density >= 1 else int(density * n)
        top = min(int(gamma * n), n - keep)
        wanted += [(i, top + keep), (i, top)]
    cuts = yield from find_cuts(problem, _TWO_CUTS, wanted)
    outliers = cut_arguments(problem, cuts[1::2])
    return cut_arguments(problem, cuts[::2]) | {f"top_{name}": argument for name, argument in outliers.items()}


def _rank_limits(problem: Problem, densities: Sequence[float], epsilons: Sequence[float]) -> Tensor:
    """(models, width): keep limits of the ranks of a row, the largest entry first."""
    width = problem.grain.width
    assert width is not None
    # The share of smaller entries in the row; a row of one entry has the density.
    smaller = np.arange(width - 1, -1, -1) / (width - 1) if width > 1 else np.full(1, 0.5)
    chances = [
        density - epsilon + 2 * epsilon * smaller if 0 < density < 1 else np.full(width, float(density > 0))
        for density, epsilon in zip(densities, epsilons, strict=True)
    ]
    return torch.from_numpy(keep_limits(np.stack(chances)))
