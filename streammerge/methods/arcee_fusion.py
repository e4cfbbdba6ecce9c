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

from dataclasses import replace

import torch
from torch import Tensor

from streammerge.kernels.blocksum import block_sum
from streammerge.kernels.contract import Argument, Arguments, Look, Measuring, Method, Problem, Program, Tile
from streammerge.kernels.cut import Quantity, magnitude, order_statistics
from streammerge.kernels.select import masked

_SMOOTHING = 1e-8
_ROUNDING = 2.0**-49
# Of t smaller than this, four terms of the series are nearer than the logarithm.
_SMALL = 1e-3


def divergence(tile: Tile, arguments: Arguments) -> Tensor:
    """(1, rows) float64: KL(p ‖ q) of each row's softmax p in the model and q in the base.

    With t = (p − q) / (q + 1e-8) it is Σ (q + 1e-8) [(1 + t) ln(1 + t) − t], as p and q have the same sum: no term is
    negative. p − q = q (e^d − 1), where d = ln p − ln q.
    """
    # Whatever no number of the tile needs is left out: it would be half of the work.
    assert tile.base is not None
    base, model = tile.base.to(torch.float64), tile.models[0].to(torch.float64)
    q, base_log = _softmax(base)
    delta = model - base
    most = delta.abs().amax(-1, keepdim=True)
    # Small differences of logarithms are lost in the logarithms themselves.
    growth = torch.log1p(block_sum(q * torch.expm1(delta.clamp(-1, 1)))[:, None])
    if not bool((most < 1).all()):
        growth = torch.where(most < 1, growth, _softmax(model)[1] - base_log)
    d = delta - growth
    size = d.abs()
    # What is left of a row that is moved as a whole is rounding, and another one on another processor.
    d = masked(~(size <= _ROUNDING * most), d)
    smoothed = q + _SMOOTHING
    change = q * torch.expm1(d)
    if not bool(size.amax() < 1):
        change = torch.where(size < 1, change, _softmax(model)[0] - q)
    t = change / smoothed
    excess = t * t * (1 / 2 - t * (1 / 6 - t * (1 / 12 - t / 20)))
    if not bool(t.abs().amax() < _SMALL):
        excess = torch.where(t.abs() < _SMALL, excess, (1 + t) * torch.log1p(t) - t)
    return block_sum(smoothed * excess)[None]


def _softmax(values: Tensor) -> tuple[Tensor, Tensor]:
    """The softmax of every row, and the logarithm of its denominator, (rows, 1)."""
    largest = values.amax(-1, keepdim=True)
    powers = torch.exp(values - largest)
    row_sum = block_sum(powers)[:, None]
    return powers / row_sum, largest + torch.log(row_sum)


def importance(tile: Tile, arguments: Arguments) -> list[Tensor]:
    """|Δ| times the divergence of its row, in float64; NaN as infinity."""
    (delta,) = tile.deltas()
    assert tile.starts is not None
    rows, width = delta.shape
    first = tile.starts[0] // width
    factor = arguments["divergence"][first + torch.arange(rows, device=delta.device)][:, None]
    return [magnitude(delta.to(torch.float64) * factor.to(torch.float64))]


def fused(tile: Tile, arguments: Arguments) -> Tensor:
    """The model where it is important enough, else the base."""
    assert tile.base is not None
    (size,) = importance(tile, arguments)
    return torch.where(size >= arguments["threshold"], tile.models[0], tile.base)


# In float32: products with deltas of float32 are then exact, and what is equal on paper, as the many equal deltas of
# bf16 models, meets the threshold as on paper.
_DIVERGENCES = Argument("divergence", ("any",), torch.float32)
_LOOK = Program(divergence, eager_ns=30)
IMPORTANCE = Quantity(importance, columns=1, arguments=(_DIVERGENCES,), needs_starts=True, searches=3, eager_ns=8)
_PROGRAM = Program(
    fused,
    (_DIVERGENCES, Argument("threshold", (1,), torch.float64)),
    merges=True,
    needs_starts=True,
    eager_ns=4,
)


def _measure(problem: Problem) -> Measuring:
    found: list[Tensor] = yield Look(_LOOK, {}, digest=_as_it_is)
    arguments = {"divergence": torch.cat([part[0] for part in found]).to(torch.float32)}
    last = problem.elements - 1
    low, median, high = yield from order_statistics(
        replace(problem, work=torch.float64), IMPORTANCE, [last // 4, last // 2, 3 * last // 4], arguments
    )
    return arguments | {"threshold": torch.tensor([median + 1.5 * (high - low)], dtype=torch.float64)}


def _as_it_is(divergences: Tensor, starts: Tensor) -> Tensor:
    return divergences


ARCEE_FUSION = Method(
    name="arcee_fusion",
    doc=__doc__,
    params=(),
    base="required",
    min_models=1,
    max_models=1,
    program=lambda settings: _PROGRAM,
    measure=_measure,
    passes=lambda settings, narrow: 4 if narrow else 5,
    looks=lambda settings: (_LOOK, IMPORTANCE.counting),
    by_rows=lambda settings: True,
)
