"""Spherical interpolation between the base (t = 0) and one other model (t = 1), each tensor as one vector.

With cosine d of the angle θ between them: y = [sin((1−t)θ) b + sin(tθ) x] / sin θ, applied to the vectors as they
are, not normalised. Nearly parallel or antiparallel ones, |d| > 0.9995, are interpolated linearly; a vector shorter
than 1e-8 counts as orthogonal. t is not limited to [0, 1]. Shoemake, "Animating rotation with quaternion curves"
(1985); the rules at the edges are mergekit's.
"""

from __future__ import annotations

import math

from torch import Tensor

from streammerge.kernels.blocksum import total
from streammerge.kernels.contract import Argument, Look, Measuring, Method, Param, Problem, Program
from streammerge.kernels.gram import inner_products, weighted_sum

_PARALLEL = 0.9995
_SHORTEST = 1e-8

_INPUTS = (("from_base", False),)
_LOOK = Program(inner_products, options=_INPUTS)
_PROGRAM = Program(weighted_sum, (Argument("coefficient", (2,)),), _INPUTS, merges=True)


def slerp_coefficients(t: float, base_square: float, product: float, model_square: float) -> tuple[float, float]:
    """The factors of base and model, from t and the inner products of the two vectors."""
    base_norm, model_norm = math.sqrt(base_square), math.sqrt(model_square)
    # mergekit leaves a short vector as it is: its inner product with the other is then all but zero.
    cosine = product / ((base_norm if base_norm > _SHORTEST else 1.0) * (model_norm if model_norm > _SHORTEST else 1.0))
    cosine = max(-1.0, min(1.0, cosine))
    if abs(cosine) > _PARALLEL:
        return 1 - t, t
    angle = math.acos(cosine)
    return math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)


def _measure(problem: Problem) -> Measuring:
    answer: Tensor = yield Look(_LOOK, {})
    base_square, product, model_square = total(answer)
    if not all(map(math.isfinite, (base_square, product, model_square))):
        return {"coefficient": problem.tensor([math.nan, math.nan])}
    factors = slerp_coefficients(problem.settings.number("t"), base_square, product, model_square)
    return {"coefficient": problem.tensor(factors)}


SLERP = Method(
    name="slerp",
    doc=__doc__,
    params=(Param("t", "where between base (0) and the other model (1)"),),
    base="required",
    min_models=1,
    max_models=1,
    program=lambda settings: _PROGRAM,
    measure=_measure,
    passes=lambda settings, narrow, elements: 2,
    looks=lambda settings, narrow, elements: (_LOOK,),
    copies=lambda settings: {0.0: 0, 1.0: 1}.get(settings.number("t")),
)
