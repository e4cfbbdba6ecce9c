"""Average of the checkpoints of one run: y = Σ c_i x_i, the models listed in the order of training, x_1 the oldest.

The coefficients sum to 1 and follow from the `schedule`, for N checkpoints:

    sma    the same for all, 1/N
    wma    in proportion to i
    ema    M_1 = x_1, M_i = α x_i + (1 − α) M_{i−1}, α the `decay`: c_i = α (1 − α)^(N−i), and c_1 = (1 − α)^(N−1)
    wsd    what decaying the learning rate would have done, by the `decay_shape`

For wsd every checkpoint stands for the updates since the one before it. A decay would have taken those of checkpoint
j with the weight w_j = s((j − 1) / N): all of what led to x_1, and less and less of the rest. Written in checkpoints
that is c_j = w_j − w_(j+1), with w_(N+1) = s(1) = 0. The shapes are s(z) = 1 − z (linear, the same as sma),
(1 + cos πz) / 2 (cosine), and 1 − √z (sqrt).

There are no weights, and a base model in the recipe is one more checkpoint, the last unless it is listed. Izmailov et
al., "Averaging weights leads to wider optima" (2018); Tian et al., "WSM: decay-free learning rate schedule via
checkpoint merging" (arXiv 2507.17634); Li et al., "Model merging in pre-training" (arXiv 2505.12082).
"""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor

from streammerge.kernels.contract import Argument, Arguments, Measuring, Method, Param, Problem, Program, Settings, Tile
from streammerge.kernels.gram import weighted_sum


def averaged(tile: Tile, arguments: Arguments) -> Tensor:
    """Σ a_i x_i / d. Whole a_i of 16-bit numbers add up exactly, so that what lies between two of them is rounded as
    it should be."""
    return weighted_sum(tile, arguments, from_base=False) / arguments["divisor"]


_PROGRAM = Program(averaged, (Argument("coefficient"), Argument("divisor", (1,))), merges=True)

_SHAPES: dict[str, Callable[[float], float]] = {
    "linear": lambda z: 1 - z,
    "cosine": lambda z: (1 + math.cos(math.pi * z)) / 2,
    "sqrt": lambda z: 1 - math.sqrt(z),
}


def shares(settings: Settings, count: int) -> list[float]:
    """In what proportion `count` checkpoints count, oldest first."""
    schedule = settings.text("schedule")
    if schedule == "wma":
        return [float(i) for i in range(1, count + 1)]
    if schedule == "ema":
        alpha = settings.number("decay")
        return [(1 - alpha) ** (count - 1), *(alpha * (1 - alpha) ** (count - i) for i in range(2, count + 1))]
    if schedule == "wsd":
        weight = [_SHAPES[settings.text("decay_shape")](j / count) for j in range(count + 1)]
        return [weight[j] - weight[j + 1] for j in range(count)]
    return [1.0] * count


def _measure(problem: Problem) -> Measuring:
    found = shares(problem.settings, problem.models)
    # Those of ema and wsd sum to 1 but for rounding.
    return {"coefficient": problem.tensor(found), "divisor": problem.tensor([float(round(math.fsum(found)))])}
    yield  # a generator that asks nothing


def _check(settings: Settings) -> list[str]:
    decay = settings.number("decay")
    return [] if 0 <= decay <= 1 else [f"decay {decay:g} is not between 0 and 1"]


AVERAGE = Method(
    name="average",
    doc=__doc__,
    params=(
        Param("schedule", "how the checkpoints count", "sma", kind="text", choices=("sma", "wma", "ema", "wsd")),
        Param("decay", "share of each newer checkpoint in ema", 0.2),
        Param("decay_shape", "the decay that wsd stands for", "linear", kind="text", choices=tuple(_SHAPES)),
    ),
    base="ignored",
    min_models=1,
    max_models=None,
    program=lambda settings: _PROGRAM,
    measure=_measure,
    passes=lambda settings, narrow, elements: 1,
    check=_check,
)
