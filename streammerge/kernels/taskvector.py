"""The family of task-vector methods: base plus a weighted sum of sparsified deltas, with or without sign election.

For each model i, Δ_i = x_i − b is sparsified to S_i (sparsify.py) and, if asked, scaled by r_i = Σ|Δ_i| / Σ|S_i|, or
by 1/density; D_i = w_i s_i r_i f S_i, where s_i is 1 unless the method has a scale of its own, and f is the factor of
LiNeS. Without election N = Σ D_i and q = Σ w_i; with it, an element's majority sign is that of Σ D_i (zero counts as
positive), N sums the D_i of that sign, and q their weights.
The result is b + λ N, or b + λ N / q when normalised; a q of 0 (without election: below 1e-8) counts as 1.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from streammerge.kernels.blocksum import block_sum, total
from streammerge.kernels.contract import (
    KEPT,
    WORDS,
    Argument,
    Arguments,
    Look,
    Measuring,
    Method,
    Param,
    Problem,
    Program,
    Scope,
    Settings,
    Tile,
)
from streammerge.kernels.cut import looks_at_everything
from streammerge.kernels.select import masked, of_sign, one_for_zero
from streammerge.kernels.sparsify import (
    NEEDS,
    PARAMS,
    SCOPE,
    SURVEY_PASSES,
    Sparsifier,
    check,
    cut_survey,
    measured,
    scope_of,
    sparse,
)

LINES_PARAMS = (
    Param("lines_alpha", "factor on the deltas of the first layer (LiNeS)", 1.0),
    Param("lines_beta", "what that factor has grown by at the last layer (LiNeS)", 0.0),
)

_RESCALE_BY = Param(
    "rescale_by", "to the sum of magnitudes (mass), or by 1/density", "mass", kind="text", choices=("mass", "density")
)
# Ranks are drawn, looked up and sorted: per element and model, compiled.
_RANKED_NS = 8.5
# Deltas whose sum of magnitudes is smaller are not rescaled, as in mergekit.
_SMALLEST_MASS = 1e-7
_SMALLEST_WEIGHT_SUM = 1e-8


def task_vector_method(name: str, doc: str, *, sparsifier: Sparsifier, election: bool | Literal["optional"],
                       normalize: bool, rescale: bool, density_meaning: str, scales: bool = False,
                       prunes_vectors: bool = True) -> Method:  # fmt: skip
    """A method of the family. `normalize` and `rescale` are the defaults of its parameters.

    An "optional" election is asked for with `sign_consensus`. `scales` gives every model a `scale` of its own;
    `prunes_vectors` says whether `density` counts for tensors of fewer than two dimensions.
    """
    draws = NEEDS[sparsifier].keys

    def elects(settings: Settings) -> bool:
        return settings.flag("sign_consensus") if election == "optional" else election

    def scale_of(settings: Settings) -> list[float]:
        return settings.numbers("scale") if scales else [1.0] * len(settings.numbers("weight"))

    def masks(settings: Settings) -> bool:
        return sparsifier != "none" and any(density < 1 for density in settings.numbers("density"))

    def by_mass(settings: Settings) -> bool:
        return masks(settings) and settings.flag("rescale") and not (draws and settings.text("rescale_by") == "density")

    def used(settings: Settings) -> Sparsifier:
        if settings.sequential is not None and sparsifier == "random" and masks(settings):
            return "sequential"
        return sparsifier if masks(settings) else "none"

    def scope(settings: Settings) -> Scope:
        return scope_of(settings, sparsifier)

    def program(settings: Settings) -> Program:
        return _merging(used(settings), elects(settings), elects(settings) and settings.flag("normalize"))

    def looks(settings: Settings, narrow: bool, elements: int) -> tuple[Program, ...]:
        ranked = NEEDS[used(settings)].cuts
        # Many tensors together are counted.
        cutting = () if ranked is None else ranked.looks(narrow or scope(settings) != "tensor", elements)
        return cutting + ((_weighing(used(settings)),) if by_mass(settings) else ())

    def passes(settings: Settings, narrow: bool, elements: int) -> int:
        counts = NEEDS[used(settings)].cuts is not None and scope(settings) == "tensor"
        cutting = looks_at_everything(narrow, elements) if counts else 0
        return 1 + cutting + by_mass(settings)

    def measure(problem: Problem) -> Measuring:
        settings = problem.settings
        weights, densities = settings.numbers("weight"), settings.numbers("density")
        arguments = yield from measured(problem, used(settings))
        factors = [1.0] * problem.models
        if by_mass(settings) and problem.keeps:
            factors, kept = yield from _factors_and_masks(problem, arguments, densities)
            # The masks say all that the draws and ranks did.
            arguments = {KEPT: kept}
        elif by_mass(settings):
            factors = yield from _rescale_factors(_weighing(used(settings)), arguments, densities)
        elif masks(settings) and settings.flag("rescale"):
            factors = [1 / density if 0 < density < 1 else 1.0 for density in densities]
        scaled = zip(weights, scale_of(settings), factors, strict=True)
        coefficients = [weight * own * factor * lines_factor(settings) for weight, own, factor in scaled]
        scale = settings.number("lambda")
        if not elects(settings):
            weight_sum = sum(weights)
            if settings.flag("normalize") and abs(weight_sum) >= _SMALLEST_WEIGHT_SUM:
                scale /= weight_sum
            coefficients = [coefficient * scale for coefficient in coefficients]
        else:
            arguments["lambda"] = problem.tensor([scale])
            if settings.flag("normalize"):
                arguments["weight"] = problem.tensor(weights)
        return arguments | {"coefficient": problem.tensor(coefficients)}

    def keeps(settings: Settings) -> bool:
        return used(settings) == "ranked" and by_mass(settings)

    def kept_programs(settings: Settings) -> tuple[Program, tuple[Program, ...]]:
        return _merging("kept", elects(settings), elects(settings) and settings.flag("normalize")), (_WEIGHING_MASKS,)

    def copies(settings: Settings) -> int | None:
        factor = settings.number("lambda") * lines_factor(settings)
        rows = zip(settings.numbers("weight"), scale_of(settings), settings.numbers("density"), strict=True)
        counting = [
            (i, weight * own * factor, density)
            for i, (weight, own, density) in enumerate(rows, 1)
            if weight * own * factor != 0 and (density > 0 or sparsifier == "none")
        ]
        if not counting:
            return 0
        i, coefficient, density = counting[0]
        whole = sparsifier == "none" or density >= 1
        # One model's whole delta, once: that is the model.
        alone = len(counting) == 1 and whole and coefficient == 1 and not settings.flag("normalize")
        return i if alone else None

    return Method(
        name=name,
        doc=doc,
        params=(
            Param("weight", "how strongly the model's delta counts", per_model=True),
            Param("density", density_meaning, 1.0, per_model=True, vectors=prunes_vectors),
            *(
                replace(param, vectors=prunes_vectors) if param.name == SCOPE.name else param
                for param in PARAMS.get(sparsifier, ())
            ),
            *([Param("scale", "factor on the model's sparsified delta", 1.0, per_model=True)] if scales else []),
            Param("normalize", "divide by the sum of the weights that count", normalize, kind="boolean"),
            Param("lambda", "factor on the merged delta", 1.0),
            Param("rescale", "scale each sparsified delta back to its sum of magnitudes", rescale, kind="boolean"),
            *([_RESCALE_BY] if draws else []),
            Param("int8_mask", "accepted for mergekit's sake; has no effect here", False, kind="boolean"),
            *LINES_PARAMS,
            *(
                [Param("sign_consensus", "elect a sign per element, as TIES does", False, kind="boolean")]
                if election == "optional"
                else []
            ),
        ),
        base="required",
        min_models=0,
        max_models=None,
        program=program,
        measure=measure,
        passes=passes,
        looks=looks,
        copies=copies,
        keeps=keeps,
        kept_programs=kept_programs,
        check=lambda settings: check(settings, sparsifier),
        cuts=lambda settings: NEEDS[used(settings)].cuts is not None,
        by_rows=lambda settings: used(settings) == "ranked",
        by_depth=by_depth,
        scope=scope,
        survey=None if NEEDS[sparsifier].cuts is None else cut_survey(sparsifier),
        survey_passes=SURVEY_PASSES,
    )


def lines_factor(settings: Settings) -> float:
    """What LiNeS multiplies deltas by: α at the first layer, α + β at the last."""
    return settings.number("lines_alpha") + settings.number("lines_beta") * settings.depth


def by_depth(settings: Settings) -> bool:
    """Whether that factor differs by layer."""
    return settings.number("lines_beta") != 0


def _merging(sparsifier: Sparsifier, election: bool, normalize: bool) -> Program:
    arguments = [Argument("coefficient"), *NEEDS[sparsifier].arguments]
    if election:
        arguments.append(Argument("lambda", (1,)))
    if normalize:
        arguments.append(Argument("weight"))
    return Program(
        _merge,
        tuple(arguments),
        (("election", election), ("normalize", normalize), ("sparsifier", sparsifier)),
        merges=True,
        needs_starts=NEEDS[sparsifier].starts,
        needs_keys=NEEDS[sparsifier].keys,
        orders=NEEDS[sparsifier].order,
        sees_no_rows=sparsifier == "kept",
        kept=sparsifier == "kept",
        eager_ns=22 if election or sparsifier != "none" else 4,
        compiled_ns=_RANKED_NS if sparsifier == "ranked" else 0.6,
    )


def _weighing(sparsifier: Sparsifier) -> Program:
    return Program(
        _weigh,
        NEEDS[sparsifier].arguments,
        (("sparsifier", sparsifier),),
        needs_starts=NEEDS[sparsifier].starts,
        needs_keys=NEEDS[sparsifier].keys,
        orders=NEEDS[sparsifier].order,
        eager_ns=18,
        compiled_ns=_RANKED_NS if sparsifier == "ranked" else 1.6,
    )


def _weigh(tile: Tile, arguments: Arguments, sparsifier: Sparsifier) -> Tensor:
    """(blocks, 2 · models) float64: Σ|Δ_i| and Σ|S_i| of each block."""
    values = tile.deltas() + sparse(tile, arguments, sparsifier)
    if sparsifier == "ranked":
        # A unit of rows is one block.
        assert tile.keys is not None
        values = [value.reshape(tile.keys.shape[0], -1) for value in values]
    # As one tensor that is there before it is summed: a compiled sum would ask for every slice of it anew.
    return block_sum(torch.stack(values, 1).abs())


def _weigh_for_masks(tile: Tile, arguments: Arguments) -> Tensor:
    """What `_weigh` makes of ranked deltas, as it lies in memory, and the sparse deltas: (units, …) of the work dtype.

    Masks themselves would take three times as long as all of this: the compiler has no good way with single bytes.
    """
    assert tile.keys is not None
    units = tile.keys.shape[0]
    stay = [delta.reshape(units, -1) for delta in sparse(tile, arguments, "ranked")]
    deltas = [delta.reshape(units, -1) for delta in tile.deltas()]
    sums = torch.stack([block_sum(value.abs()) for value in (*deltas, *stay)], -1)
    return torch.cat([sums.view(stay[0].dtype), *stay], -1)


_WEIGHING_MASKS = Program(
    _weigh_for_masks,
    NEEDS["ranked"].arguments,
    needs_keys=True,
    orders=NEEDS["ranked"].order,
    eager_ns=22,
    compiled_ns=_RANKED_NS,
)


def _merge(tile: Tile, arguments: Arguments, sparsifier: Sparsifier, election: bool, normalize: bool) -> Tensor:
    assert tile.base is not None
    coefficients = arguments["coefficient"]
    parts = [delta * coefficients[i] for i, delta in enumerate(sparse(tile, arguments, sparsifier))]
    merged = torch.zeros_like(tile.base)
    for part in parts:
        merged = merged + part
    if not election:
        return tile.base + merged
    positive = merged >= 0
    merged, weight_sum = torch.zeros_like(merged), torch.zeros_like(merged)
    for i, part in enumerate(parts):
        agrees = of_sign(part, positive)
        merged = merged + masked(agrees, part)
        if normalize:
            weight_sum = weight_sum + masked(agrees, arguments["weight"][i].expand(agrees.shape))
    if normalize:
        merged = merged / one_for_zero(weight_sum)
    return tile.base + merged * arguments["lambda"]


def _rescale_factors(
    weighing: Program, arguments: Arguments, densities: list[float]
) -> Generator[Look, Any, list[float]]:
    answer: Tensor = yield Look(weighing, dict(arguments))
    return _factors(total(answer), densities)


def _factors_and_masks(
    problem: Problem, arguments: Arguments, densities: list[float]
) -> Generator[Look, Any, tuple[list[float], Tensor]]:
    """The same of ranked deltas, and the masks as KEPT has them."""
    kept = torch.zeros(problem.units, problem.models, WORDS, dtype=torch.int32)
    bits = kept.numpy().view(np.uint8)

    def pack(found: Tensor, starts: Tensor) -> Tensor:
        """In the threads that compute: masks go where they are kept, as bits; sums are left."""
        count = 2 * problem.models * 8 // found.element_size()
        stay = found[:, count:].reshape(len(found), problem.models, -1).numpy() != 0
        # What is 0 counts as nothing either way.
        packed = np.packbits(stay, -1, "little")
        bits[starts[:, 0].numpy() // problem.grain.unit, :, : packed.shape[-1]] = packed
        return found[:, :count].clone(memory_format=torch.contiguous_format).view(torch.float64)

    sums = yield Look(_WEIGHING_MASKS, dict(arguments), digest=pack)
    return _factors(total(torch.cat(sums)), densities), kept


def _factors(masses: list[float], densities: list[float]) -> list[float]:
    factors = []
    for density, before, after in zip(densities, masses[: len(densities)], masses[len(densities) :], strict=True):
        small = before < _SMALLEST_MASS or after < _SMALLEST_MASS
        factors.append(1.0 if density >= 1 or small else before / after)
    return factors
