"""Arcee Fusion: take over the entries of the other model that matter most, and keep the base's where they do not.

    y = x where importance >= threshold, else b;   importance = |x − b| · KL of the row
    threshold = median + 1.5 (q3 − q1) of the importance of all entries

The KL of a row (last dimension) is that of its softmax in the model from that in the base, 1e-8 added to every
probability. Quartiles are the entries at floor(q (n − 1)) in ascending order, exactly; mergekit takes them from a
random sample of a million when there are more. Its KL, worked out in the stored dtype, is mostly noise, with which the
signs of importances change; here it is float64, by a formula without cancellation, and never negative. A row with a
number that is not finite counts as infinitely important.

mergekit writes float32 whatever was asked for; here the result has the output's dtype. Arcee AI (2025), no paper.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from streammerge.kernels import series
from streammerge.kernels.blocksum import block_sum
from streammerge.kernels.contract import Argument, Arguments, Look, Measuring, Method, Problem, Program, Tile
from streammerge.kernels.cut import LARGEST_SAMPLE, Quantity, looks_at_everything, magnitude, order_statistics

_SMOOTHING = 1e-8
_EAGER_ELEMENTS = 16384
# One entry of so many, in other columns in every row as a rule, tells where the quartiles will lie.
_SAMPLED_EVERY = 61


def divergence(tile: Tile, arguments: Arguments) -> Tensor:
    """(units, rows) float64: KL(p ‖ q) of each row's softmax p in the model and q in the base; NaN for a wide row.

    With t = (p − q) / (q + 1e-8) it is Σ (q + 1e-8) [(1 + t) ln(1 + t) − t], as p and q have the same sum: no term is
    negative. p − q = q (e^δ / Σ q e^δ − 1) = q (E − S) / (1 + S) with E = e^δ − 1 and S = Σ q E. δ is counted from the
    largest of the row, which is nothing on paper, and leaves none for a row that is moved as a whole. In a wide row
    deltas or entries of the base differ by more than the series take.
    """
    assert tile.base is not None
    if torch.compiler.is_compiling() or not tile.base.is_cpu:
        return _near_divergence(tile.base, tile.models[0])
    # Eagerly a few rows at a time, whose temporaries stay in the nearest cache: half of the time.
    _, rows, width = tile.base.shape
    step = max(1, _EAGER_ELEMENTS // width)
    parts = [slice(first, first + step) for first in range(0, rows, step)]
    return torch.cat([_near_divergence(tile.base[:, part], tile.models[0][:, part]) for part in parts], 1)


def _near_divergence(base: Tensor, model: Tensor) -> Tensor:
    base, delta, low = _rows(base, model)
    largest = base.amax(-1, keepdim=True)
    # As one tensor, that is there before it is summed: a compiled sum would work all of it out anew.
    both = torch.stack([series.exp(base - largest), series.expm1(delta)], 1)
    powers, grown = both[:, 0], both[:, 1]
    share = 1 / block_sum(powers)[..., None]
    mean = block_sum(powers * grown)[..., None] * share
    q = powers * share
    moved = q * ((grown - mean) * (1 / (1 + mean)))
    t = moved / (q + _SMOOTHING)
    # (q + 1e-8) times the entropy of t, which is t² times a series.
    found = block_sum(moved * t * series.entropy_by_square(t))
    wide = (low < -series.EXPM1_REACH) | (base.amin(-1) < largest[..., 0] - series.EXP_REACH)
    return torch.where(wide, float("nan"), found)


def _look(tile: Tile, arguments: Arguments) -> Tensor:
    """(units, rows + sample) float64: the divergence of every row, then |Δ| of some entries of the unit."""
    (delta,) = tile.deltas()
    sample = magnitude(delta.flatten(1)[:, ::_SAMPLED_EVERY]).to(torch.float64)
    return torch.cat([divergence(tile, arguments), sample], 1)


def wide_divergence(tile: Tile, arguments: Arguments) -> Tensor:
    """The same for rows of any width; NaN where a number is not finite."""
    assert tile.base is not None
    base, delta, low = _rows(tile.base, tile.models[0])
    q, base_log = _softmax(base)
    p, model_log = _softmax(base + delta)
    near = torch.log1p(block_sum(q * torch.expm1(delta.clamp(min=-1)))[..., None])
    d = delta - torch.where(low[..., None] > -1, near, model_log - base_log)
    smoothed = q + _SMOOTHING
    t = torch.where(d.abs() < 1, q * torch.expm1(d), p - q) / smoothed
    found = block_sum(smoothed * torch.where(t.abs() < series.REACH, series.entropy(t), (1 + t) * torch.log1p(t) - t))
    return found + (low - low)


def _rows(base: Tensor, model: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The base, the deltas counted from the largest of their row, which is 0 then, and the smallest of these."""
    base = base.to(torch.float64)
    delta = model.to(torch.float64) - base
    largest = delta.amax(-1, keepdim=True)
    return base, delta - largest, delta.amin(-1) - largest[..., 0]


def _softmax(values: Tensor) -> tuple[Tensor, Tensor]:
    """The softmax of every row, and the logarithm of its denominator, (rows, 1)."""
    largest = values.amax(-1, keepdim=True)
    powers = torch.exp(values - largest)
    row_sum = block_sum(powers)[..., None]
    return powers / row_sum, largest + torch.log(row_sum)


def importance(tile: Tile, arguments: Arguments) -> list[Tensor]:
    """|Δ| times the divergence of its row, in float64; NaN as infinity."""
    (delta,) = tile.deltas()
    assert tile.starts is not None
    _, rows, width = delta.shape
    row = tile.starts // width + torch.arange(rows, device=delta.device)
    factor = arguments["divergence"][row][..., None]
    return [magnitude(delta.to(torch.float64) * factor.to(torch.float64))]


def fused(tile: Tile, arguments: Arguments) -> Tensor:
    """The model where it is important enough, else the base."""
    assert tile.base is not None
    (size,) = importance(tile, arguments)
    return torch.where(size >= arguments["threshold"], tile.models[0], tile.base)


# In float32: products with deltas of float32 are then exact, and what is equal on paper, as the many equal deltas of
# bf16 models, meets the threshold as on paper.
_DIVERGENCES = Argument("divergence", ("any",), torch.float32)
_LOOK = Program(_look, by_width=True, eager_ns=50, compiled_ns=7)
_WIDE = Program(wide_divergence, by_width=True)
IMPORTANCE = Quantity(
    importance,
    columns=1,
    dtype=torch.float64,
    arguments=(_DIVERGENCES,),
    needs_starts=True,
    by_width=True,
    searches=3,
    eager_ns=8,
    compiled_ns=7,
)
_PROGRAM = Program(
    fused,
    (_DIVERGENCES, Argument("threshold", (1,), torch.float64)),
    merges=True,
    needs_starts=True,
    by_width=True,
    eager_ns=4,
    compiled_ns=3,
)


def _divergences(problem: Problem) -> Generator[Look, Any, tuple[Tensor, NDArray[np.float64]]]:
    """Those of all rows, float64; and a sample of importances, in the order of the tensor."""
    unit, width = problem.grain
    assert width is not None
    divergences = np.empty(problem.elements // width)
    every = _SAMPLED_EVERY * -(-problem.elements // (_SAMPLED_EVERY * LARGEST_SAMPLE))
    # What a unit that is not full lacks stays at -1.
    sampled = np.full((problem.units, -(-unit // every)), -1.0)

    def digest(looked: Tensor, starts: Tensor) -> None:
        """In the threads that compute: everything goes where it is kept."""
        for unit_of, start in zip(looked.numpy(), starts[:, 0].tolist(), strict=True):
            rows = min(unit, problem.elements - start) // width
            divergences[start // width : start // width + rows] = unit_of[:rows]
            some = unit_of[rows :: every // _SAMPLED_EVERY]
            sampled[start // unit, : len(some)] = some

    yield Look(_LOOK, {}, digest=digest)
    found = torch.from_numpy(divergences)
    wide = found.isnan()
    if bool(wide.any()):
        unit_of = torch.arange(len(found)) * width // unit
        units = torch.unique(unit_of[wide])
        # To read it all is quicker than to read most of it, unit by unit.
        all_of_it = 2 * len(units) > problem.units
        spans = None if all_of_it else tuple((i * unit, min(unit, problem.elements - i * unit)) for i in units.tolist())
        others = torch.cat((yield Look(_WIDE, {}, spans, digest=_of_rows)))
        found[wide] = others[wide if all_of_it else wide[torch.isin(unit_of, units)]]
    places = np.arange(problem.units)[:, None] * unit + np.arange(sampled.shape[1]) * every
    there = sampled >= 0
    sample = magnitude(torch.from_numpy(sampled[there]) * found[torch.from_numpy(places[there] // width)])
    return found, sample.numpy()


def _measure(problem: Problem) -> Measuring:
    divergences, sample = yield from _divergences(problem)
    arguments = {"divergence": divergences.to(torch.float32)}
    last = problem.elements - 1
    low, median, high = yield from order_statistics(
        problem, IMPORTANCE, [last // 4, last // 2, 3 * last // 4], arguments, sample[None]
    )
    return arguments | {"threshold": torch.tensor([median + 1.5 * (high - low)], dtype=torch.float64)}


def _of_rows(divergences: Tensor, starts: Tensor) -> Tensor:
    return divergences.flatten()


ARCEE_FUSION = Method(
    name="arcee_fusion",
    doc=__doc__,
    params=(),
    base="required",
    min_models=1,
    max_models=1,
    program=lambda settings: _PROGRAM,
    measure=_measure,
    passes=lambda settings, narrow, elements: 2 + looks_at_everything(narrow=False, elements=elements),
    looks=lambda settings, narrow, elements: (_LOOK, *IMPORTANCE.looks(narrow=False, elements=elements)),
    cuts=lambda settings: True,
    by_rows=lambda settings: True,
)
