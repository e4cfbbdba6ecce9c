"""MetaGPT: task arithmetic with coefficients in closed form, from the sizes of the deltas; nothing to tune.

    y = b + λ Σ λ_i Δ_i        λ_i = ‖Δ_i‖² / Σ_k ‖Δ_k‖²

The norms are over the whole model, as in the paper; `weight_scope` takes them over each layer or each tensor instead.
What lies outside the layers counts as one layer. Zhou et al., "MetaGPT: Merging Large Language Models Using Model
Exclusive Task Arithmetic" (2024).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from streammerge.kernels.blocksum import block_sum, total
from streammerge.kernels.contract import (
    Arguments,
    Look,
    Measuring,
    Method,
    Param,
    Problem,
    Program,
    Scope,
    Settings,
    Surveying,
    Tile,
)
from streammerge.kernels.gram import SUM_FROM_BASE


def squares(tile: Tile, arguments: Arguments) -> Tensor:
    """(blocks, models) float64: the sum of squares of each delta."""
    wide = [delta.to(torch.float64) for delta in tile.deltas()]
    return torch.stack([block_sum(delta * delta) for delta in wide], -1)


_LOOK = Program(squares, eager_ns=4)


def _shares(squares_of: Sequence[Sequence[float]]) -> list[float]:
    """λ of every model, from the sums of squares of each tensor."""
    sums = total(torch.tensor(squares_of, dtype=torch.float64))
    (everything,) = total(torch.tensor(sums, dtype=torch.float64)[:, None])
    return [share / everything if everything else 0.0 for share in sums]


def _scope(settings: Settings) -> Scope:
    return cast("Scope", settings.text("weight_scope"))


def _survey(problems: Sequence[Problem]) -> Surveying:
    answers: list[Any] = yield [Look(_LOOK, {})] * len(problems)
    shares = _shares([total(answer) for answer in answers])
    return [shares] * len(problems)


def _measure(problem: Problem) -> Measuring:
    if _scope(problem.settings) == "tensor":
        answer: Tensor = yield Look(_LOOK, {})
        shares = _shares([total(answer)])
    else:
        shares = problem.found
    scale = problem.settings.number("lambda")
    return {"coefficient": problem.tensor([share * scale for share in shares])}


METAGPT = Method(
    name="metagpt",
    doc=__doc__,
    params=(
        Param("lambda", "factor on the merged delta", 1.0),
        Param("weight_scope", "what the sizes of deltas are taken over", "model", kind="text",
              choices=("model", "layer", "tensor")),
    ),
    base="required",
    min_models=1,
    max_models=None,
    program=lambda settings: SUM_FROM_BASE,
    measure=_measure,
    passes=lambda settings, narrow, elements: 2 if _scope(settings) == "tensor" else 1,
    looks=lambda settings, narrow, elements: (_LOOK,),
    copies=lambda settings: 0 if settings.number("lambda") == 0 else None,
    scope=_scope,
    survey=_survey,
    survey_passes=1,
)  # fmt: skip
