"""Weighted average: y = Σ w_i x_i, divided by Σ w_i when normalised.

The base model, if the recipe names one, is an ordinary input and needs a weight of its own.
Weights that sum to zero give NaN when normalised, as in mergekit; here that is reported.
Wortsman et al., "Model soups" (2022).
"""

from __future__ import annotations

import math

from torch import Tensor

from streammerge.kernels.contract import Argument, Arguments, Measuring, Method, Param, Problem, Program, Settings, Tile


def weighted_sum(tile: Tile, arguments: Arguments) -> Tensor:
    """Σ c_i x_i."""
    coefficients = arguments["coefficient"]
    merged = tile.models[0] * coefficients[0]
    for i, model in enumerate(tile.models[1:], 1):
        merged = merged + model * coefficients[i]
    return merged


_PROGRAM = Program(weighted_sum, (Argument("coefficient"),), merges=True)


def _coefficients(settings: Settings) -> list[float]:
    weights = settings.numbers("weight")
    if not settings.flag("normalize"):
        return weights
    weight_sum = math.fsum(weights)
    return [weight / weight_sum if weight_sum else math.nan for weight in weights]


def _measure(problem: Problem) -> Measuring:
    return {"coefficient": problem.tensor(_coefficients(problem.settings))}
    yield  # a generator that asks nothing


def _copies(settings: Settings) -> int | None:
    coefficients = _coefficients(settings)
    one = [i for i, coefficient in enumerate(coefficients) if coefficient == 1]
    others_are_zero = sum(1 for coefficient in coefficients if coefficient != 0) == 1
    return one[0] if one and others_are_zero else None


LINEAR = Method(
    name="linear",
    doc=__doc__,
    params=(
        Param("weight", "the model's share", per_model=True),
        Param("normalize", "divide by the sum of the weights", True, kind="boolean"),
    ),
    base="ignored",
    min_models=1,
    max_models=None,
    program=lambda settings: _PROGRAM,
    measure=_measure,
    passes=lambda settings, narrow, elements: 1,
    copies=_copies,
)
