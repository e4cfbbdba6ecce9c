"""SCE: select the entries on which the models differ most, weigh models by their squared deltas, erase minorities.

    W_i = mean(Δ_i²) / Σ_j mean(Δ_j²),   y = b + Σ W_i M_i Δ_i / max(Σ W_i M_i, 1e-6)

M_i marks where Δ_i has the sign of Σ Δ_j, unweighted; a sum of 0 counts as positive. With select_topk < 1 all but
int(select_topk · n) entries are first set to 0 in every Δ: those with the largest variance across the models stay, n
being the number of entries whose variance is not 0. They are ranked by standard deviation, which has the same order and
does not underflow; among equal ones the lower index stays.

If the means sum to less than `equal_below` all W_i are equal. The default is mergekit's 1e-6: deltas below some 7e-4
(root mean square), which most fine-tunes are, are then merged with equal weights. Write `equal_below: 0` to follow the
paper. Wan et al., "FuseChat" (2024).
"""

from __future__ import annotations

import torch
from torch import Tensor

from streammerge.kernels.blocksum import block_sum, total
from streammerge.kernels.contract import (
    Argument,
    Arguments,
    Look,
    Measuring,
    Method,
    Param,
    Problem,
    Program,
    Settings,
    Tile,
)
from streammerge.kernels.cut import (
    CUT_ARGUMENTS,
    Looking,
    Quantity,
    cut_arguments,
    cut_mask,
    find_cuts,
    looks_at_everything,
)
from streammerge.kernels.select import infinite_for_nan, masked, of_sign
from streammerge.kernels.taskvector import LINES_PARAMS, by_depth, lines_factor

_SMALLEST_WEIGHT_SUM = 1e-6


def deviation(tile: Tile, arguments: Arguments) -> list[Tensor]:
    """The standard deviation of each entry across the models, worked out in float64; NaN as infinity."""
    assert tile.base is not None
    base = tile.base.to(torch.float64)
    deltas = [model.to(torch.float64) - base for model in tile.models]
    if len(deltas) == 2:
        # The same on paper, in a tenth of the time.
        return [infinite_for_nan(((deltas[0] - deltas[1]).abs() * 0.5).to(tile.base.dtype))]
    mean = _sum(deltas) / len(deltas)
    variance = _sum([(delta - mean) * (delta - mean) for delta in deltas]) / len(deltas)
    return [infinite_for_nan(variance.sqrt().to(tile.base.dtype))]


DEVIATION = Quantity(deviation, columns=1)


def selected(tile: Tile, arguments: Arguments, selects: bool) -> list[Tensor]:
    """The deltas, what is not selected set to 0."""
    deltas = tile.deltas()
    if not selects:
        return deltas
    assert tile.starts is not None
    mask = cut_mask(deviation(tile, arguments)[0], tile.starts, arguments["threshold"][0], arguments["last"][0])
    return [masked(mask, delta) for delta in deltas]


def squares(tile: Tile, arguments: Arguments, selects: bool) -> Tensor:
    """(blocks, models) float64: Σ Δ_i² of what is selected."""
    # As one tensor that is there before it is summed: a compiled sum would ask for every slice of it anew.
    deltas = torch.stack(selected(tile, arguments, selects), 1).to(torch.float64)
    return block_sum(deltas * deltas)


def fused(tile: Tile, arguments: Arguments, selects: bool) -> Tensor:
    """b + f Σ W_i M_i Δ_i / max(Σ W_i M_i, 1e-6)."""
    assert tile.base is not None
    deltas = selected(tile, arguments, selects)
    positive = _sum(deltas) >= 0
    merged, weight_sum = torch.zeros_like(tile.base), torch.zeros_like(tile.base)
    for i, delta in enumerate(deltas):
        agrees = of_sign(delta, positive)
        merged = merged + masked(agrees, delta * arguments["weight"][i])
        weight_sum = weight_sum + masked(agrees, arguments["weight"][i].expand(agrees.shape))
    return tile.base + merged / weight_sum.clamp(min=_SMALLEST_WEIGHT_SUM) * arguments["factor"]


def _sum(values: list[Tensor]) -> Tensor:
    result = torch.zeros_like(values[0])
    for value in values:
        result = result + value
    return result


def _selects(settings: Settings) -> bool:
    return settings.number("select_topk") < 1


def _program(settings: Settings) -> Program:
    cut = _CUT if _selects(settings) else ()
    return Program(fused, (Argument("weight"), Argument("factor", (1,)), *cut), (("selects", _selects(settings)),),
                   merges=True, needs_starts=_selects(settings), eager_ns=25)  # fmt: skip


def _weighing(settings: Settings) -> Program:
    cut = _CUT if _selects(settings) else ()
    return Program(squares, cut, (("selects", _selects(settings)),), needs_starts=_selects(settings), eager_ns=20,
                   compiled_ns=1.4)  # fmt: skip


# One cut, for all models.
_CUT = tuple(Argument(argument.name, (1,), argument.dtype) for argument in CUT_ARGUMENTS)


def _selection(problem: Problem) -> Looking[dict[str, Tensor]]:
    share = problem.settings.number("select_topk")
    if share >= 1:
        return {}
    smallest = torch.finfo(problem.work).smallest_normal * torch.finfo(problem.work).eps
    pivots = torch.full((1, DEVIATION.pivots), smallest, dtype=problem.work)
    counts: Tensor = yield Look(DEVIATION.counting, {"pivots": pivots})
    differing = int(counts[:, 0, 0].to(torch.float64).sum())
    cuts = yield from find_cuts(problem, DEVIATION, [(0, int(share * differing))])
    return cut_arguments(problem, cuts)


def _measure(problem: Problem) -> Measuring:
    settings = problem.settings
    arguments = yield from _selection(problem)
    weights: list[float] = []
    if problem.models:
        answer: Tensor = yield Look(_weighing(settings), dict(arguments))
        means = [square / problem.elements for square in total(answer)]
        mean_sum = sum(means)
        equal = mean_sum < settings.number("equal_below") or mean_sum == 0
        weights = [1 / len(means) if equal else mean / mean_sum for mean in means]
    return arguments | {"weight": problem.tensor(weights), "factor": problem.tensor([lines_factor(settings)])}


def _looks(settings: Settings, narrow: bool, elements: int) -> tuple[Program, ...]:
    if not _selects(settings):
        return (_weighing(settings),)
    # What differs is counted first.
    return (*dict.fromkeys((DEVIATION.counting, *DEVIATION.looks(narrow, elements))), _weighing(settings))


def _passes(settings: Settings, narrow: bool, elements: int) -> int:
    return 2 + (1 + looks_at_everything(narrow, elements)) * _selects(settings)


def _copies(settings: Settings) -> int | None:
    return 0 if settings.number("select_topk") <= 0 or lines_factor(settings) == 0 else None


def _check(settings: Settings) -> list[str]:
    below = settings.number("equal_below")
    return [] if below >= 0 else [f"equal_below {below:g} is below 0; write 0 to weigh models by their deltas always"]


SCE = Method(
    name="sce",
    doc=__doc__,
    params=(
        Param("select_topk", "the share of the entries that differ between models that is kept", 1.0),
        Param("equal_below", "models whose mean squared deltas sum to less get equal weights", 1e-6),
        Param("int8_mask", "accepted for mergekit's sake; has no effect here", False, kind="boolean"),
        *LINES_PARAMS,
    ),
    base="required",
    min_models=1,
    max_models=None,
    program=_program,
    measure=_measure,
    passes=_passes,
    looks=_looks,
    cuts=_selects,
    copies=_copies,
    check=_check,
    by_depth=by_depth,
)
