"""Consensus merging by TALL masks: the summed deltas, where enough models want them.

    τ = Σ w_i Δ_i,  Δ_i = x_i − b
    model i wants an entry when |Δ_i| >= l_i · |τ − Δ_i|,  l_i its `mask_lambda`
    y = b + λ τ where at least `consensus` models want the entry, else b

A `consensus` above the number of models counts as that number; 0 keeps everything, which is task arithmetic. A larger
mask_lambda wants less. A NaN is wanted by all, so that it is seen. Entries that no model changed stay. Wang et al.,
"Localizing Task Information for Improved Model Merging and Compression" (ICML 2024, arXiv 2405.07813); the paper's
weights are 1 and its mask_lambda is chosen from 0.2 to 0.6 for each task.
"""

from __future__ import annotations

import torch
from torch import Tensor

from streammerge.kernels.contract import Argument, Arguments, Measuring, Method, Param, Problem, Program, Settings, Tile
from streammerge.kernels.select import masked


def agreed(tile: Tile, arguments: Arguments) -> Tensor:
    """b + λ τ where enough models want it."""
    assert tile.base is not None
    deltas = tile.deltas()
    merged = torch.zeros_like(tile.base)
    for i, delta in enumerate(deltas):
        merged = merged + delta * arguments["weight"][i]
    wanted = torch.zeros_like(tile.base)
    for i, delta in enumerate(deltas):
        unwanted = delta.abs() < (merged - delta).abs() * arguments["mask_lambda"][i]
        wanted = wanted + (~unwanted).to(wanted.dtype)
    kept = masked(wanted >= arguments["consensus"], merged)
    return tile.base + kept * arguments["lambda"]


_PROGRAM = Program(
    agreed,
    (Argument("weight"), Argument("mask_lambda"), Argument("consensus", (1,)), Argument("lambda", (1,))),
    merges=True,
    eager_ns=10,
)


def _measure(problem: Problem) -> Measuring:
    settings = problem.settings
    return {
        "weight": problem.tensor(settings.numbers("weight")),
        "mask_lambda": problem.tensor(settings.numbers("mask_lambda")),
        "consensus": problem.tensor([min(settings.number("consensus"), problem.models)]),
        "lambda": problem.tensor([settings.number("lambda")]),
    }
    yield  # a generator that asks nothing


def _copies(settings: Settings) -> int | None:
    return 0 if settings.number("lambda") == 0 or not any(settings.numbers("weight")) else None


CONSENSUS = Method(
    name="consensus",
    doc=__doc__,
    params=(
        Param("weight", "how strongly the model's delta counts", per_model=True),
        Param("mask_lambda", "how much the others' delta must give way for the model to want an entry", 0.4,
              per_model=True),
        Param("consensus", "how many models must want an entry", 2, kind="integer"),
        Param("lambda", "factor on the merged delta", 1.0),
    ),
    base="required",
    min_models=1,
    max_models=None,
    program=lambda settings: _PROGRAM,
    measure=_measure,
    passes=lambda settings, narrow, elements: 1,
    copies=_copies,
)  # fmt: skip
