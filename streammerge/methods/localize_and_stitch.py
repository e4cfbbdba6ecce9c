"""Localize-and-Stitch without data: graft the largest entries of each delta onto the base, and average overlaps.

    y = b + λ Σ w_i m_i Δ_i / Σ w_i m_i

m_i marks exactly max(1, int(density · n)) entries of largest magnitude of model i's delta; among equal magnitudes those
of the tensor that comes first by name, and of lower index, stay. Where no mask lies the base stays; a sum of weights of
0 counts as 1. The paper also trains masks on
data. Entries are ranked over the whole model, as there, unless `density_scope` says otherwise. He et al.,
"Localize-and-Stitch" (2024).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from streammerge.kernels.contract import (
    Argument,
    Arguments,
    Measuring,
    Method,
    Param,
    Problem,
    Program,
    Scope,
    Settings,
    Tile,
)
from streammerge.kernels.cut import CUT_ARGUMENTS, MAGNITUDES, cut_mask, looks_at_everything, magnitude
from streammerge.kernels.select import masked, one_for_zero
from streammerge.kernels.sparsify import SCOPE, SURVEY_PASSES, check, cut_survey, measured, scope_of
from streammerge.kernels.taskvector import LINES_PARAMS, by_depth, lines_factor


def stitched(tile: Tile, arguments: Arguments) -> Tensor:
    """b + λ Σ w_i m_i Δ_i / Σ w_i m_i."""
    assert tile.base is not None
    assert tile.starts is not None
    merged, weight_sum = torch.zeros_like(tile.base), torch.zeros_like(tile.base)
    for i, delta in enumerate(tile.deltas()):
        mask = cut_mask(magnitude(delta), tile.starts, arguments["threshold"][i], arguments["last"][i])
        merged = merged + masked(mask, delta * arguments["weight"][i])
        weight_sum = weight_sum + masked(mask, arguments["weight"][i].expand(mask.shape))
    return tile.base + merged / one_for_zero(weight_sum) * arguments["lambda"]


_PROGRAM = Program(
    stitched,
    (Argument("weight"), Argument("lambda", (1,)), *CUT_ARGUMENTS),
    merges=True,
    needs_starts=True,
    eager_ns=20,
)


def _factor(settings: Settings) -> float:
    return settings.number("lambda") * lines_factor(settings)


def _measure(problem: Problem) -> Measuring:
    settings = problem.settings
    cuts = yield from measured(problem, "magnitude")
    return cuts | {
        "weight": problem.tensor(settings.numbers("weight")),
        "lambda": problem.tensor([_factor(settings)]),
    }


def _cuts(settings: Settings) -> bool:
    return any(0 < density < 1 for density in settings.numbers("density"))


def _scope(settings: Settings) -> Scope:
    return scope_of(settings, "magnitude")


def _looks(settings: Settings, narrow: bool, elements: int) -> tuple[Program, ...]:
    return MAGNITUDES.looks(narrow or _scope(settings) != "tensor", elements) if _cuts(settings) else ()


def _passes(settings: Settings, narrow: bool, elements: int) -> int:
    return 1 + looks_at_everything(narrow, elements) * (_cuts(settings) and _scope(settings) == "tensor")


def _copies(settings: Settings) -> int | None:
    rows = zip(settings.numbers("weight"), settings.numbers("density"), strict=True)
    counting = [(i, density) for i, (weight, density) in enumerate(rows, 1) if weight != 0 and density > 0]
    if not counting or _factor(settings) == 0:
        return 0
    i, density = counting[0]
    # Divided by its own weight.
    return i if len(counting) == 1 and density >= 1 and _factor(settings) == 1 else None


LOCALIZE_AND_STITCH = Method(
    name="localize_and_stitch",
    doc=__doc__,
    params=(
        Param("weight", "the model's share where masks overlap", 1.0, per_model=True),
        Param("density", "the share of the delta's entries that are grafted, the largest ones", 0.05, per_model=True),
        replace(SCOPE, default="model"),
        Param("lambda", "factor on the merged delta", 1.0),
        *LINES_PARAMS,
    ),
    base="required",
    min_models=0,
    max_models=None,
    program=lambda settings: _PROGRAM,
    measure=_measure,
    passes=_passes,
    looks=_looks,
    cuts=_cuts,
    copies=_copies,
    check=lambda settings: check(settings, "magnitude"),
    by_depth=by_depth,
    scope=_scope,
    survey=cut_survey("magnitude"),
    survey_passes=SURVEY_PASSES,
)
