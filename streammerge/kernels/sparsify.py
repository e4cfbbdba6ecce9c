"""Which entries of each model's delta stay: the sparsifiers of the task-vector family.

    none        all
    magnitude   the share `density`, the largest
    outliers    the share `density`, the largest but for the share `gamma` of the very largest
    random      each with probability `density`; `sequential` with numbers that are drawn one after the other
    ranked      each with a probability that grows with its rank among the entries of its row

`measured` gives the arguments of `sparse`. A density of 1 or more keeps everything, of 0 nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor

from streammerge.kernels.chance import keep_limit, keep_mask
from streammerge.kernels.contract import Argument, Arguments, Param, Problem, Program, Scope, Settings, Surveying, Tile
from streammerge.kernels.cut import (
    CUT_ARGUMENTS,
    MAGNITUDES,
    Cut,
    Looking,
    Quantity,
    cut_arguments,
    cut_mask,
    find_cuts,
    kept,
    magnitude,
)
from streammerge.kernels.groupcut import group_cuts
from streammerge.kernels.rank import RANK_ARGUMENTS, UPWARDS, Chances, rank_arguments, ranked, stays
from streammerge.kernels.select import masked

Sparsifier = Literal["none", "magnitude", "outliers", "random", "sequential", "ranked", "kept"]


class Needs(NamedTuple):
    """What programs need for a sparsifier, and what is ranked: over the whole tensor, or in rows."""

    arguments: tuple[Argument, ...] = ()
    starts: bool = False
    keys: bool = False
    cuts: Quantity | None = None
    order: Program | None = None


def _ranked_deltas(tile: Tile, arguments: Arguments) -> Tensor:
    """(blocks, models, BLOCK), or by rows (rows, models, width): what is ranked."""
    return torch.stack([ranked(magnitude(delta), arguments, i) for i, delta in enumerate(tile.deltas())], 1)


_RANKED_DELTAS = Program(_ranked_deltas, (UPWARDS,), eager_ns=6)


_TWO_CUTS = replace(MAGNITUDES, searches=2, eager_ns=2 * MAGNITUDES.eager_ns)
# The cut above which entries are outliers.
_TOP_ARGUMENTS = tuple(replace(argument, name=f"top_{argument.name}") for argument in CUT_ARGUMENTS)

NEEDS: dict[Sparsifier, Needs] = {
    "none": Needs(),
    "magnitude": Needs(CUT_ARGUMENTS, starts=True, cuts=MAGNITUDES),
    "outliers": Needs((*CUT_ARGUMENTS, *_TOP_ARGUMENTS), starts=True, cuts=_TWO_CUTS),
    "random": Needs((Argument("limit", dtype=torch.int32),), keys=True),
    "sequential": Needs((Argument("share", dtype=torch.float32),), keys=True),
    "ranked": Needs(RANK_ARGUMENTS, keys=True, order=_RANKED_DELTAS),
    "kept": Needs(keys=True),
}

SCOPE = Param(
    "density_scope",
    "what shares are taken of: each tensor, each layer, or the whole model, of which a tensor keeps what is its own",
    "tensor",
    kind="text",
    choices=("tensor", "layer", "model"),
)

# Parameters beside the density.
PARAMS: dict[Sparsifier, tuple[Param, ...]] = {
    "magnitude": (SCOPE,),
    "outliers": (
        SCOPE,
        Param("gamma", "the share of the delta's largest entries that is dropped", 0.01, per_model=True),
    ),
    "ranked": (Param("epsilon", "how far probabilities reach below and above the density", 0.15, per_model=True),),
}


# How often a survey usually reads everything: counts, twice, and what is left.
SURVEY_PASSES = 3


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


def scope_of(settings: Settings, sparsifier: Sparsifier) -> Scope:
    """What must be looked at to know what stays: the tensor, its layer, or the whole model."""
    return cast("Scope", settings.text(SCOPE.name)) if NEEDS[sparsifier].cuts is not None else "tensor"


def cut_survey(sparsifier: Sparsifier) -> Callable[[Sequence[Problem]], Surveying]:
    """The survey of many tensors that finds the cuts of each: [[threshold, last], …] in the order of `_wanted`.

    A density of p keeps what is among the largest share p of all entries of all of them; tensors may have different
    ones.
    """

    def survey(problems: Sequence[Problem]) -> Surveying:
        quantity = NEEDS[sparsifier].cuts
        assert quantity is not None
        total = sum(problem.elements for problem in problems)
        rows = [_wanted(problem.settings, sparsifier, total) for problem in problems]
        cuts = yield from group_cuts(problems, quantity, {pair for row in rows for pair in row})
        return [[[cuts[pair][i].threshold, cuts[pair][i].last] for pair in row] for i, row in enumerate(rows)]

    return survey


def _wanted(settings: Settings, sparsifier: Sparsifier, n: int) -> list[tuple[int, int]]:
    """What is cut of `n` entries: model and number of largest entries; with outliers, then how many of these go."""
    densities = settings.numbers("density")
    if sparsifier == "magnitude":
        return [(i, kept(density, n)) for i, density in enumerate(densities)]
    wanted = []
    for i, (density, gamma) in enumerate(zip(densities, settings.numbers("gamma"), strict=True)):
        keep = n if density >= 1 else int(density * n)
        top = min(int(gamma * n), n - keep)
        wanted += [(i, top + keep), (i, top)]
    return wanted


def measured(problem: Problem, sparsifier: Sparsifier) -> Looking[dict[str, Tensor]]:
    """The arguments of a sparsifier."""
    settings = problem.settings
    quantity = NEEDS[sparsifier].cuts
    if quantity is not None:
        if problem.found is not None:
            cuts = [Cut(threshold, int(last)) for threshold, last in problem.found]
        else:
            cuts = yield from find_cuts(problem, quantity, _wanted(settings, sparsifier, problem.elements))
        if sparsifier == "magnitude":
            return cut_arguments(problem, cuts)
        outliers = cut_arguments(problem, cuts[1::2])
        return cut_arguments(problem, cuts[::2]) | {f"top_{name}": argument for name, argument in outliers.items()}
    if sparsifier == "none":
        return {}
    densities = settings.numbers("density")
    if sparsifier == "sequential":
        # torch compares numbers of float32 with a share of the dtype of the deltas.
        shares = [2.0 if density >= 1 else density for density in densities]
        return {"share": torch.tensor(shares, dtype=settings.sequential).to(torch.float32)}
    if sparsifier == "random":
        return {"limit": torch.tensor([keep_limit(density) for density in densities], dtype=torch.int32)}
    chances = [
        Chances(density - epsilon, density + epsilon) if 0 < density < 1 else Chances(density, density)
        for density, epsilon in zip(densities, settings.numbers("epsilon"), strict=True)
    ]
    return rank_arguments(chances, problem.grain, problem.work)


def _kept(tile: Tile, arguments: Arguments, delta: Tensor, i: int) -> Tensor:
    assert tile.keys is not None
    words = tile.keys[:, i]
    places = torch.arange(32, dtype=torch.int32, device=words.device)
    # Not len(): an exported program would be of that many units for ever.
    units = words.shape[0]
    bits = ((words[..., None] >> places) & 1).reshape(units, -1)
    return (bits[:, : delta.numel() // units] != 0).reshape(delta.shape)


def sparse(tile: Tile, arguments: Arguments, sparsifier: Sparsifier) -> list[Tensor]:
    """The deltas of a tile with what does not stay set to 0."""
    deltas = tile.deltas()
    if sparsifier == "none":
        return deltas
    mask = _MASKS[sparsifier]
    return [masked(mask(tile, arguments, delta, i), delta) for i, delta in enumerate(deltas)]


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


def _drawn_in_turn(tile: Tile, arguments: Arguments, delta: Tensor, i: int) -> Tensor:
    assert tile.keys is not None
    return tile.keys[:, i] < arguments["share"][i]


def _drawn_by_rank(tile: Tile, arguments: Arguments, delta: Tensor, i: int) -> Tensor:
    assert tile.keys is not None
    assert tile.ordered is not None
    units = tile.keys.shape[0]
    numbers = ranked(magnitude(delta), arguments, i).reshape(units, -1)
    return stays(numbers, tile.ordered[:, i].reshape(units, -1), tile.keys[:, i], arguments, i).view(delta.shape)


_MASKS: dict[Sparsifier, Callable[[Tile, Arguments, Tensor, int], Tensor]] = {
    "magnitude": _under_cut,
    "outliers": _between_cuts,
    "random": _drawn,
    "sequential": _drawn_in_turn,
    "ranked": _drawn_by_rank,
    "kept": _kept,
}
