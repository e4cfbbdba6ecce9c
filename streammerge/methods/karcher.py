"""The Karcher mean: the point of the sphere with the least squared angles to all models, at their mean length.

Each tensor is one vector, n_i = ‖x_i‖ and u_i = x_i / n_i. From the normalised mean of the u_i (or u_1, if they
cancel to less than `tol`), up to `max_iter` times:

    T = 1/K Σ log_u(u_i),  log_u(v) = θ / sin θ (v − cos θ u);  stop if ‖T‖ < tol
    u ← cos‖T‖ u + sin‖T‖ T/‖T‖

The result is u times the mean of all n_i. All models count the same (`weight` is ignored, as in mergekit), the base,
if the recipe names one, among them. A vector of length up to `tol` has no direction and counts for the length only;
if none has one the result is zeros. One nearer to u than `tol` adds nothing to T, and neither does one opposite to
it, where every way is as short as any other (mergekit follows rounding errors there). The iteration runs on inner
products in float64. Karcher, "Riemannian center of mass and mollifier smoothing" (1977).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from streammerge.kernels.blocksum import total
from streammerge.kernels.contract import Look, Measuring, Method, Param, Problem, Settings
from streammerge.kernels.gram import (
    PRODUCTS_FROM_BASE,
    SUM_FROM_BASE,
    exp_step,
    length,
    log_sum,
    scaled_matrix,
    square_matrix,
)


def karcher_coefficients(products: Sequence[float], max_iter: int, tol: float) -> list[float]:
    """The coefficients of the models, from their inner products."""
    gram = square_matrix(products)
    norms = [math.sqrt(gram[i][i]) for i in range(len(gram))]
    # A vector without a direction becomes 0, and its share in every sum as well.
    inverse = [1 / norm if norm > tol else 0.0 for norm in norms]
    share = [1 / len(norms) if factor else 0.0 for factor in inverse]
    if not any(share):
        return [0.0] * len(norms)
    units = scaled_matrix(gram, inverse)
    point = share
    if length(units, share) < tol:
        first = share.index(max(share))
        point = [float(i == first) for i in range(len(norms))]
    point = [value / length(units, point) for value in point]
    for _ in range(max_iter):
        tangent = log_sum(units, share, point, tol)
        # Shorter ones are rounding: they would go on for ever.
        if length(units, tangent) < max(tol, 1e-15):
            break
        point = exp_step(units, point, tangent)
    scale = math.fsum(norms) / len(norms)
    return [scale * value * factor for value, factor in zip(point, inverse, strict=True)]


def _measure(problem: Problem) -> Measuring:
    answer: Tensor = yield Look(PRODUCTS_FROM_BASE, {})
    products, settings = total(answer), problem.settings
    if not all(map(math.isfinite, products)):
        return {"coefficient": problem.tensor([math.nan] * problem.models)}
    coefficients = karcher_coefficients(products, int(settings.number("max_iter")), settings.number("tol"))
    return {"coefficient": problem.tensor(coefficients)}


def _check(settings: Settings) -> list[str]:
    tol = settings.number("tol")
    return [f"tol {tol:g} is not above 0"] if tol <= 0 else []


KARCHER = Method(
    name="karcher",
    doc=__doc__,
    params=(
        Param("max_iter", "how many steps at most", 10, kind="integer"),
        Param("tol", "the length of a step, and of a vector, that counts as none", 1e-5),
    ),
    base="ignored",
    min_models=1,
    max_models=None,
    program=lambda settings: SUM_FROM_BASE,
    measure=_measure,
    passes=lambda settings, narrow, elements: 2,
    looks=lambda settings, narrow, elements: (PRODUCTS_FROM_BASE,),
    check=_check,
)
