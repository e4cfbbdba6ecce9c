"""Spherical interpolation between two models, or between their deltas where the recipe has a base.

v_i = x_i, or x_i − b with a base. t = w_2 / (w_1 + w_2), or 1/2 if the weights sum to less than 1e-6. With θ the angle
between v_1 and v_2:

    y = [sin((1 − t)θ) v_1 + sin(tθ) v_2] / sin θ (+ b)

on the vectors as they are. A tensor is one vector; without `nuslerp_flatten` every row is one, along the last
dimension, and with `nuslerp_row_wise` then every column: the name is mergekit's, and the reverse of what it does.
Vectors of one dimension are always one vector; a column of a tensor of more than two dimensions runs over all but the
last. Lengths below 1e-7 count as 1e-7 in the cosine. All but parallel or opposite vectors, 1 − cos² up to 1e-12, are
interpolated linearly: mergekit writes 1e-16, which its float32 tells from zero as little as float64 does here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from streammerge.kernels.blocksum import total
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
from streammerge.kernels.gram import (
    PRODUCTS_FROM_BASE,
    SUM_FROM_BASE,
    column_products,
    combined,
    inner_products,
)

_SHORTEST = 1e-7
_SMALLEST_WEIGHT_SUM = 1e-6
_PARALLEL = 1e-12


def nuslerp_coefficients(t: Tensor, products: Tensor) -> Tensor:
    """The factors (2, ...) of the two vectors, from their inner products (3, ...) in float64."""
    first, between, second = products
    lengths = first.sqrt().clamp(min=_SHORTEST) * second.sqrt().clamp(min=_SHORTEST)
    cosine = (between / lengths).clamp(-1, 1)
    linear = 1 - cosine * cosine <= _PARALLEL
    angle = torch.acos(torch.where(linear, 0.0, cosine))
    sine = torch.sin(angle)
    factors = torch.stack([torch.sin((1 - t) * angle) / sine, torch.sin(t * angle) / sine])
    return torch.where(linear, torch.stack([1 - t, t]).view(2, *[1] * between.dim()), factors)


def by_row(tile: Tile, arguments: Arguments) -> Tensor:
    """Every row with its own angle."""
    factors = nuslerp_coefficients(arguments["t"][0], inner_products(tile, {}, from_base=True).T)
    return combined(tile, factors.to(tile.models[0].dtype)[:, :, None], from_base=True)


_BY_ROW = Program(by_row, (Argument("t", (1,), torch.float64),), merges=True, eager_ns=12)
_COLUMN_PRODUCTS = Program(column_products, eager_ns=8)


def _t(settings: Settings) -> Tensor:
    first, second = settings.numbers("weight")
    weight_sum = first + second
    return torch.tensor(0.5 if abs(weight_sum) < _SMALLEST_WEIGHT_SUM else second / weight_sum, dtype=torch.float64)


def _measure(problem: Problem) -> Measuring:
    settings, t = problem.settings, _t(problem.settings)
    if settings.flag("nuslerp_flatten"):
        answer: Tensor = yield Look(PRODUCTS_FROM_BASE, {})
        products = torch.tensor(total(answer), dtype=torch.float64)
    elif settings.flag("nuslerp_row_wise"):
        products = torch.zeros(3, problem.grain.width or 1, dtype=torch.float64)

        def add(part: Any) -> None:
            products.add_(part[0])

        yield Look(_COLUMN_PRODUCTS, {}, fold=add)
    else:
        return {"t": t[None]}
    return {"coefficient": nuslerp_coefficients(t, products).to(problem.work)}


def _program(settings: Settings) -> Program:
    rows = not settings.flag("nuslerp_flatten") and not settings.flag("nuslerp_row_wise")
    return _BY_ROW if rows else SUM_FROM_BASE


NUSLERP = Method(
    name="nuslerp",
    doc=__doc__,
    params=(
        Param("weight", "the model's share", per_model=True),
        Param("nuslerp_flatten", "a tensor is one vector", True, kind="boolean", vectors=False),
        Param("nuslerp_row_wise", "if it is not: its columns are, not its rows", False, kind="boolean", vectors=False),
    ),
    base="optional",
    min_models=2,
    max_models=2,
    program=_program,
    measure=_measure,
    passes=lambda settings, narrow, elements: 1 if _program(settings) is _BY_ROW else 2,
    looks=lambda settings, narrow, elements: (PRODUCTS_FROM_BASE,) if settings.flag("nuslerp_flatten") else (),
    by_rows=lambda settings: not settings.flag("nuslerp_flatten"),
)
