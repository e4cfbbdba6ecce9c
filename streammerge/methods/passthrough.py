"""One model as it is, or every weight of it times `scale`.

Without a scale and without a change of dtype the bytes are copied; integer tensors are never scaled.
"""

from __future__ import annotations

from torch import Tensor

from streammerge.kernels.contract import Argument, Arguments, Measuring, Method, Param, Problem, Program, Settings, Tile


def scaled(tile: Tile, arguments: Arguments) -> Tensor:
    """x · scale."""
    return tile.models[0] * arguments["scale"]


# Without a scale.
AS_IT_IS = Settings({}, {"scale": (None,)})

_PROGRAM = Program(scaled, (Argument("scale", (1,)),), merges=True)


def _scale(settings: Settings) -> float:
    (scale,) = settings.models["scale"]
    return 1.0 if scale is None else float(scale)


def _measure(problem: Problem) -> Measuring:
    return {"scale": problem.tensor([_scale(problem.settings)])}
    yield  # a generator that asks nothing


PASSTHROUGH = Method(
    name="passthrough",
    doc=__doc__,
    params=(Param("scale", "factor on every weight", per_model=True, optional=True),),
    base="ignored",
    min_models=1,
    max_models=1,
    program=lambda settings: _PROGRAM,
    measure=_measure,
    passes=lambda settings, narrow, elements: 1,
    copies=lambda settings: 0 if _scale(settings) == 1 else None,
)
