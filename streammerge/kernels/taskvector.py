"""The family of task-vector methods: base plus a weighted sum of sparsified deltas, with or without sign election.

For each model i, Δ_i = x_i − b is sparsified to S_i (all of it, its largest entries, or random ones) and, if asked,
scaled by r_i = Σ|Δ_i| / Σ|S_i|; D_i = w_i s_i r_i S_i, where s_i is 1 unless the method has a scale of its own.
Without election N = Σ D_i and q = Σ w_i; with it, an element's majority sign is that of Σ D_i (zero counts as
positive), N sums the D_i of that sign, and q their weights.
The result is b + λ N, or b + λ N / q when normalised; a q of 0 (without election: below 1e-8) counts as 1.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any, Literal

import torch
from torch import Tensor

from streammerge.kernels.blocksum import block_sum, total
from streammerge.kernels.chance import keep_limit, keep_mask
from streammerge.kernels.contract import (
    Argument,
    Arguments,
    Look,
    Measuring,
    Method,
    Param,
    Problem,
    Program,
    Settings,
    Tile,
)
from streammerge.kernels.cut import CUT_ARGUMENTS, MAGNITUDES, cut_arguments, cut_mask, magnitude, magnitude_cuts

Sparsifier = Literal["none", "magnitude", "random"]

_LIMIT = Argument("limit", dtype=torch.int32)
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

    def elects(settings: Settings) -> bool:
        return settings.flag("sign_consensus") if election == "optional" else election

    def scale_of(settings: Settings) -> list[float]:
        return settings.numbers("scale") if scales else [1.0] * len(settings.numbers("weight"))

    def masks(settings: Settings) -> bool:
        return sparsifier != "none" and any(density < 1 for density in settings.numbers("density"))

    def rescales(settings: Settings) -> bool:
        return masks(settings) and settings.flag("rescale")

    def used(settings: Settings) -> Sparsifier:
        return sparsifier if masks(settings) else "none"

    def program(settings: Settings) -> Program:
        return _merging(used(settings), elects(settings), elects(settings) and settings.flag("normalize"))

    def looks(settings: Settings) -> tuple[Program, ...]:
        counting = (MAGNITUDES.counting,) if used(settings) == "magnitude" else ()
        return counting + ((_weighing(used(settings)),) if rescales(settings) else ())

    def passes(settings: Settings, narrow: bool) -> int:
        counting = (1 if narrow else 2) if used(settings) == "magnitude" else 0
        return 1 + counting + rescales(settings)

    def measure(problem: Problem) -> Measuring:
        settings = problem.settings
        weights, densities = settings.numbers("weight"), settings.numbers("density")
        arguments: dict[str, Tensor] = {}
        if used(settings) == "magnitude":
            cuts = yield from magnitude_cuts(problem, densities)
            arguments |= cut_arguments(problem, cuts)
        if used(settings) == "random":
            arguments["limit"] = torch.tensor([keep_limit(density) for density in densities], dtype=torch.int32)
        factors = [1.0] * problem.models
        if rescales(settings):
            factors = yield from _rescale_factors(_weighing(used(settings)), arguments, densities)
        scaled = zip(weights, scale_of(settings), factors, strict=True)
        coefficients = [weight * own * factor for weight, own, factor in scaled]
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

    def copies(settings: Settings) -> int | None:
        factor = settings.number("lambda")
        rows = zip(settings.numbers("weight"), scale_of(settings), settings.numbers("density"), strict=True)
        counting = [
            (i, weight, weight * own * factor, density)
            for i, (weight, own, density) in enumerate(rows, 1)
            if weight * own * factor != 0 and (density > 0 or sparsifier == "none")
        ]
        if not counting:
            return 0
        i, _, coefficient, density = counting[0]
        whole = sparsifier == "none" or density >= 1
        # One model's whole delta, once: that is the model.
        alone = len(counting) == 1 and whole and coefficient == 1 and not settings.flag("normalize")
        return i if alone else None

    def check(settings: Settings) -> list[str]:
        densities = [density for density in settings.numbers("density") if density < 0]
        return [f"density {density:g} is below 0; it is a share, from 0 to 1" for density in densities]

    return Method(
        name=name,
        doc=doc,
        params=(
            Param("weight", "how strongly the model's delta counts", per_model=True),
            Param("density", density_meaning, 1.0, per_model=True, vectors=prunes_vectors),
            *([Param("scale", "factor on the model's sparsified delta", 1.0, per_model=True)] if scales else []),
            Param("normalize", "divide by the sum of the weights that count", normalize, kind="boolean"),
            Param("lambda", "factor on the merged delta", 1.0),
            Param("rescale", "scale each sparsified delta back to its sum of magnitudes", rescale, kind="boolean"),
            Param("int8_mask", "accepted for mergekit's sake; has no effect here", False, kind="boolean"),
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
        check=check,
    )


def _merging(sparsifier: Sparsifier, election: bool, normalize: bool) -> Program:
    arguments = [Argument("coefficient"), *_mask_arguments(sparsifier)]
    if election:
        arguments.append(Argument("lambda", (1,)))
    if normalize:
        arguments.append(Argument("weight"))
    return Program(
        _merge,
        tuple(arguments),
        (("election", election), ("normalize", normalize), ("sparsifier", sparsifier)),
        merges=True,
        needs_starts=sparsifier == "magnitude",
        needs_keys=sparsifier == "random",
        eager_ns=22 if election else 4,
    )


def _weighing(sparsifier: Sparsifier) -> Program:
    return Program(
        _weigh,
        _mask_arguments(sparsifier),
        (("sparsifier", sparsifier),),
        needs_starts=sparsifier == "magnitude",
        needs_keys=sparsifier == "random",
        eager_ns=18,
    )


def _mask_arguments(sparsifier: Sparsifier) -> tuple[Argument, ...]:
    return {"none": (), "magnitude": CUT_ARGUMENTS, "random": (_LIMIT,)}[sparsifier]


def _masks(tile: Tile, deltas: list[Tensor], arguments: Arguments, sparsifier: Sparsifier) -> list[Tensor]:
    """For each model which entries stay."""
    if sparsifier == "magnitude":
        assert tile.starts is not None
        return [
            cut_mask(magnitude(delta), tile.starts, arguments["threshold"][i], arguments["last"][i])
            for i, delta in enumerate(deltas)
        ]
    assert tile.keys is not None
    return [keep_mask(tile.keys[:, i], arguments["limit"][i], delta.shape[-1]) for i, delta in enumerate(deltas)]


def _sparse(tile: Tile, arguments: Arguments, sparsifier: Sparsifier) -> list[Tensor]:
    deltas = tile.deltas()
    if sparsifier == "none":
        return deltas
    masks = _masks(tile, deltas, arguments, sparsifier)
    return [torch.where(mask, delta, 0.0) for mask, delta in zip(masks, deltas, strict=True)]


def _weigh(tile: Tile, arguments: Arguments, sparsifier: Sparsifier) -> Tensor:
    """(blocks, 2 · models) float64: Σ|Δ_i| and Σ|S_i| of each block."""
    before = [block_sum(delta.abs()) for delta in tile.deltas()]
    after = [block_sum(sparse.abs()) for sparse in _sparse(tile, arguments, sparsifier)]
    return torch.stack(before + after, -1)


def _merge(tile: Tile, arguments: Arguments, sparsifier: Sparsifier, election: bool, normalize: bool) -> Tensor:
    assert tile.base is not None
    coefficients = arguments["coefficient"]
    parts = [sparse * coefficients[i] for i, sparse in enumerate(_sparse(tile, arguments, sparsifier))]
    merged = torch.zeros_like(tile.base)
    for part in parts:
        merged = merged + part
    if not election:
        return tile.base + merged
    positive = merged >= 0
    merged, weight_sum = torch.zeros_like(merged), torch.zeros_like(merged)
    for i, part in enumerate(parts):
        agrees = torch.where(positive, part > 0, part < 0)
        merged = merged + torch.where(agrees, part, 0.0)
        if normalize:
            weight_sum = weight_sum + torch.where(agrees, arguments["weight"][i], 0.0)
    if normalize:
        merged = merged / torch.where(weight_sum == 0, 1.0, weight_sum)
    return tile.base + merged * arguments["lambda"]


def _rescale_factors(
    weighing: Program, arguments: Arguments, densities: list[float]
) -> Generator[Look, Any, list[float]]:
    answer: Tensor = yield Look(weighing, dict(arguments))
    masses = total(answer)
    factors = []
    for density, before, after in zip(densities, masses[: len(densities)], masses[len(densities) :], strict=True):
        small = before < _SMALLEST_MASS or after < _SMALLEST_MASS
        factors.append(1.0 if density >= 1 or small else before / after)
    return factors
