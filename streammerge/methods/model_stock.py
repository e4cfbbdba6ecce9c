"""Model Stock: between the base and the mean of the models, as far as the angles between their deltas say.

With Δ_i = x_i − b, each tensor one vector, and c the mean over all pairs of cos_ij = Δ_i · Δ_j / max(‖Δ_i‖‖Δ_j‖, 1e-6):

    t = K c / (1 + (K − 1) c),  0 where the denominator is below 1e-6
    y = b + t · mean(Δ_i)

With `filter_wise` every row of a tensor, along its last dimension, has its own t. t is not clipped: deltas that point
away from each other give a negative one. As in mergekit the 1e-6 shrinks t for short deltas (two equal ones of length
1e-4 give 0.02 instead of 1), and `weight` is ignored. Jang et al., "Model Stock: all we need is just a few fine-tuned
models" (2024).
"""

from __future__ import annotations

from itertools import combinations_with_replacement

import torch
from torch import Tensor

from streammerge.kernels.blocksum import total
from streammerge.kernels.contract import Arguments, Look, Measuring, Method, Param, Problem, Program, Settings, Tile
from streammerge.kernels.gram import PRODUCTS_FROM_BASE, SUM_FROM_BASE, combined, inner_products

_SMALLEST = 1e-6


def stock_coefficient(products: Tensor, models: int) -> Tensor:
    """t / K, from the inner products of the deltas (..., pairs) in float64."""
    place = {pair: i for i, pair in enumerate(combinations_with_replacement(range(models), 2))}
    norms = [products[..., place[i, i]].sqrt() for i in range(models)]
    cosine = torch.zeros_like(norms[0])
    for (i, j), at in place.items():
        if i < j:
            cosine = cosine + (products[..., at] / (norms[i] * norms[j]).clamp(min=_SMALLEST)).clamp(-1, 1)
    cosine = cosine / (models * (models - 1) / 2)
    denominator = 1 + (models - 1) * cosine
    small = denominator.abs() < _SMALLEST
    return torch.where(small, 0.0, cosine / torch.where(small, 1.0, denominator))


def by_row(tile: Tile, arguments: Arguments) -> Tensor:
    """Every row with its own coefficient."""
    models = len(tile.models)
    coefficient = stock_coefficient(inner_products(tile, {}, from_base=True), models)
    return combined(tile, coefficient.to(tile.models[0].dtype)[None, :, None].expand(models, -1, 1), from_base=True)


_BY_ROW = Program(by_row, merges=True, eager_ns=12)


def _measure(problem: Problem) -> Measuring:
    if problem.settings.flag("filter_wise"):
        return {}
    answer: Tensor = yield Look(PRODUCTS_FROM_BASE, {})
    coefficient = stock_coefficient(torch.tensor(total(answer), dtype=torch.float64), problem.models)
    return {"coefficient": problem.tensor([float(coefficient)] * problem.models)}


def _by_rows(settings: Settings) -> bool:
    return settings.flag("filter_wise")


MODEL_STOCK = Method(
    name="model_stock",
    doc=__doc__,
    params=(Param("filter_wise", "each row by itself", False, kind="boolean", vectors=False),),
    base="required",
    min_models=2,
    max_models=None,
    program=lambda settings: _BY_ROW if _by_rows(settings) else SUM_FROM_BASE,
    measure=_measure,
    passes=lambda settings, narrow, elements: 1 if _by_rows(settings) else 2,
    looks=lambda settings, narrow, elements: () if _by_rows(settings) else (PRODUCTS_FROM_BASE,),
    by_rows=_by_rows,
)
