"""The mean direction of any number of models, at their mean length; with a base, of their deltas.

Each tensor is one vector: v_i = x_i, or x_i − b where the recipe has a base; n_i = ‖v_i‖, u_i = v_i / (n_i + eps),
and the w_i are divided by their sum unless `normalize_weights` is off (weights that sum to 0 then give NaN, as in
mergekit; that is reported).

    M = Σ w_i u_i,  m = M / ‖M‖
    y = m Σ w_i n_i (+ b)

mergekit goes on from m by a step in its tangent space that is zero for any input, so this is its result, too. With
`log_map` it is the step that was meant: T = Σ w_i log_m(u_i), log_m(u) = θ / sin θ (u − cos θ m), and the direction
is cos‖T‖ m + sin‖T‖ T/‖T‖; vectors up to eps long then have no direction, nor has one opposite to m a way to it.

One model is the result as it is. Where the directions cancel, ‖M‖ below eps or below what float64 inner products
tell from nothing, the vectors are added as they are, Σ w_i v_i (+ b): so does mergekit for two models, where for more
it raises an error; for a tensor that no model changed that is the base.
Buss and Fillmore, "Spherical averages and applications to spherical splines and interpolation" (2001).
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

# Inner products in float64 are right to some 1e-16 of the lengths squared, and a length that cancels to half as many
# digits.
_SMALLEST_SHARE = 1e-7


def multislerp_coefficients(
    products: Sequence[float], weights: Sequence[float], eps: float, log_map: bool
) -> list[float]:
    """The coefficients of the vectors, from their inner products and their weights."""
    gram = square_matrix(products)
    norms = [math.sqrt(gram[i][i]) for i in range(len(gram))]
    inverse = [1 / norm if norm > eps else 0.0 for norm in norms] if log_map else [1 / (norm + eps) for norm in norms]
    units = scaled_matrix(gram, inverse)
    norm = length(units, weights)
    most = math.fsum(abs(weight) * n * f for weight, n, f in zip(weights, norms, inverse, strict=True))
    if not norm >= max(eps, _SMALLEST_SHARE * most):
        return list(weights)
    point = [weight / norm for weight in weights]
    if log_map:
        pulls = [weight if factor else 0.0 for weight, factor in zip(weights, inverse, strict=True)]
        point = exp_step(units, point, log_sum(units, pulls, point, 0.0))
    scale = math.fsum(weight * n for weight, n in zip(weights, norms, strict=True))
    return [scale * value * factor for value, factor in zip(point, inverse, strict=True)]


def _weights(settings: Settings) -> list[float]:
    weights = settings.numbers("weight")
    if not settings.flag("normalize_weights"):
        return weights
    weight_sum = math.fsum(weights)
    return [weight / weight_sum if weight_sum else math.nan for weight in weights]


def _measure(problem: Problem) -> Measuring:
    if problem.models == 1:
        return {"coefficient": problem.tensor([1.0])}
    answer: Tensor = yield Look(PRODUCTS_FROM_BASE, {})
    products, weights, settings = total(answer), _weights(problem.settings), problem.settings
    if not all(map(math.isfinite, [*products, *weights])):
        return {"coefficient": problem.tensor([math.nan] * problem.models)}
    coefficients = multislerp_coefficients(products, weights, settings.number("eps"), settings.flag("log_map"))
    return {"coefficient": problem.tensor(coefficients)}


def _check(settings: Settings) -> list[str]:
    eps = settings.number("eps")
    return [f"eps {eps:g} is not above 0"] if eps <= 0 else []


MULTISLERP = Method(
    name="multislerp",
    doc=__doc__,
    params=(
        Param("weight", "the model's share in direction and length", per_model=True),
        Param("normalize_weights", "divide the weights by their sum", True, kind="boolean"),
        Param("eps", "the length that counts as none", 1e-8),
        Param("log_map", "take the step along the sphere that mergekit leaves out", False, kind="boolean"),
    ),
    base="optional",
    min_models=1,
    max_models=None,
    program=lambda settings: SUM_FROM_BASE,
    measure=_measure,
    passes=lambda settings, narrow, elements: 2,
    looks=lambda settings, narrow, elements: (PRODUCTS_FROM_BASE,),
    check=_check,
)
