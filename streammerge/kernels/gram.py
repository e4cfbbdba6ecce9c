"""Methods for which a tensor is a vector, or each row one: a few inner products, then a weighted sum of the inputs.

    v_i      the inputs, base first; or, from the base, the deltas where there is one and the models where not
    look     the inner products v_i · v_j, in float64
    decide   coefficients c_i from them alone
    merge    Σ c_i v_i, plus the base if the v_i are deltas

The directions of such methods are points on a sphere: u = Σ a_i v_i, held as the list of the a_i.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from streammerge.kernels.blocksum import block_sum
from streammerge.kernels.contract import Argument, Arguments, Program, Tile

Matrix = Sequence[Sequence[float]]

# Nearer than this to the opposite of a point, float64 cannot tell which way it is.
_OPPOSITE = 1e-6


def inner_products(tile: Tile, arguments: Arguments, from_base: bool) -> Tensor:
    """(blocks, pairs) float64: v_i · v_j for i <= j of each block, or row. Products of two float32 are exact there."""
    return torch.stack([block_sum(one * other) for one, other in _pairs(tile, from_base)], -1)


def column_products(tile: Tile, arguments: Arguments) -> Tensor:
    """(1, pairs, width) float64: the inner products from the base, down every column of a unit of rows."""
    return torch.stack([_column_sum(one * other) for one, other in _pairs(tile, from_base=True)])[None]


def weighted_sum(tile: Tile, arguments: Arguments, from_base: bool) -> Tensor:
    """Σ c_i v_i (+ b)."""
    return combined(tile, arguments["coefficient"], from_base)


def combined(tile: Tile, coefficients: Tensor, from_base: bool) -> Tensor:
    """Σ c_i v_i (+ b): a coefficient per vector, or for each a tensor that spreads over the tile."""
    vectors = _vectors(tile, from_base)
    merged = vectors[0] * coefficients[0]
    for i, vector in enumerate(vectors[1:], 1):
        merged = merged + vector * coefficients[i]
    return merged if tile.base is None or not from_base else tile.base + merged


PRODUCTS_FROM_BASE = Program(inner_products, options=(("from_base", True),), eager_ns=6)
SUM_FROM_BASE = Program(weighted_sum, (Argument("coefficient"),), (("from_base", True),), merges=True)


def square_matrix(products: Sequence[float]) -> list[list[float]]:
    """The inner products of all pairs i <= j as a symmetric matrix."""
    size = math.isqrt(2 * len(products))
    matrix = [[0.0] * size for _ in range(size)]
    found = iter(products)
    for i in range(size):
        for j in range(i, size):
            matrix[i][j] = matrix[j][i] = next(found)
    return matrix


def scaled_matrix(matrix: Matrix, factors: Sequence[float]) -> list[list[float]]:
    """The inner products of the vectors f_i v_i."""
    return [[f * value * g for value, g in zip(row, factors, strict=True)]
            for row, f in zip(matrix, factors, strict=True)]  # fmt: skip


def length(gram: Matrix, point: Sequence[float]) -> float:
    """The norm of Σ a_i v_i."""
    square = math.fsum(a * b * value for a, row in zip(point, gram, strict=True)
                       for b, value in zip(point, row, strict=True))  # fmt: skip
    return math.sqrt(max(0.0, square))


def log_sum(gram: Matrix, weights: Sequence[float], point: Sequence[float], nearest: float) -> list[float]:
    """Σ w_i log_u(v_i): the weighted sum of the ways along the sphere from the point u to the unit vectors v_i.

    log_u(v) = θ / sin θ (v − cos θ u). A vector nearer than `nearest`, or opposite to u, which is no one's way, adds
    nothing.
    """
    tangent = [0.0] * len(point)
    for i, (weight, row) in enumerate(zip(weights, gram, strict=True)):
        cosine = max(-1.0, min(1.0, math.fsum(a * value for a, value in zip(point, row, strict=True))))
        angle = math.acos(cosine)
        if angle < nearest or angle == 0 or math.pi - angle < _OPPOSITE:
            continue
        factor = weight * angle / math.sin(angle)
        tangent = [t - factor * cosine * a for t, a in zip(tangent, point, strict=True)]
        tangent[i] += factor
    return tangent


def exp_step(gram: Matrix, point: Sequence[float], tangent: Sequence[float]) -> list[float]:
    """Where the way `tangent` from a point along the sphere ends: cos‖T‖ u + sin‖T‖ T/‖T‖, of norm 1."""
    angle = length(gram, tangent)
    if angle == 0:
        return list(point)
    moved = [math.cos(angle) * a + math.sin(angle) / angle * t for a, t in zip(point, tangent, strict=True)]
    norm = length(gram, moved)
    return [a / norm for a in moved]


def _vectors(tile: Tile, from_base: bool) -> Sequence[Tensor]:
    if tile.base is None:
        return tile.models
    return tile.deltas() if from_base else [tile.base, *tile.models]


def _pairs(tile: Tile, from_base: bool) -> list[tuple[Tensor, Tensor]]:
    """The vectors v_i and v_j, i <= j, in float64: there deltas are all but exact."""
    base = None if tile.base is None else tile.base.to(torch.float64)
    wide = tile._replace(base=base, models=[model.to(torch.float64) for model in tile.models])
    vectors = _vectors(wide, from_base)
    return [(one, other) for i, one in enumerate(vectors) for other in vectors[i:]]


def _column_sum(values: Tensor) -> Tensor:
    """(rows, width) -> (width,): halves added to halves, elementwise additions only."""
    while len(values) > 1:
        half = len(values) // 2
        added = values[:half] + values[half : 2 * half]
        values = added if len(values) % 2 == 0 else torch.cat([added, values[-1:]])
    return values[0]
