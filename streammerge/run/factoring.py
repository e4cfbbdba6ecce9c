"""The factors of one matrix: sketched in some passes over its panels, made in one more."""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import wait
from dataclasses import dataclass

import torch
from torch import Tensor

from streammerge.base.errors import InputError
from streammerge.kernels.chance import stream_key
from streammerge.kernels.dtypes import torch_dtype
from streammerge.kernels.lowrank import (
    STRIP,
    Leading,
    add_strip,
    leading,
    orthonormal,
    random_signs,
    rank_for,
    split,
    sum_of_squares,
)
from streammerge.plan.extraction import Pair, Wanted
from streammerge.plan.sketch import SKETCH_PASSES, widths
from streammerge.run.panels import Panels


@dataclass(frozen=True)
class Factors:
    """D ≈ left · right, (rows, rank) and (rank, columns), as they are stored.

    `squares` is ‖D‖²; `kept` the part of it that the vectors hold; `missed` is ‖D - left · right‖², measured.
    """

    left: Tensor
    right: Tensor
    squares: float
    kept: float
    missed: float


def norm(panels: Panels, pair: Pair) -> float:
    """‖D‖², exact but for one rounding per panel. Raises InputError when it is no number."""
    return _total(pair, [square for _, square in panels.each(pair, sum_of_squares)])


def factor(panels: Panels, pair: Pair, wanted: Wanted) -> Factors | None:
    """The factors of a pair's difference, or None where there is none. Raises InputError, Stopped."""
    sketched = _sketch(panels, pair, wanted)
    if sketched is None:
        return None
    vectors, squares, total = sketched
    singular = squares.sqrt()
    dtype = torch_dtype(wanted.dtype)
    right = (vectors * singular.sqrt()).t().to(dtype).contiguous()
    towards, stored = vectors / singular.sqrt(), right.to(torch.float64)
    left = torch.empty(pair.rows, len(singular), dtype=dtype)
    kept, missed, row = [], [], 0
    for _, part in panels.each(pair, lambda panel: split(panel, towards, singular, stored, dtype)):
        left[row : row + len(part.left)] = part.left
        row += len(part.left)
        kept.append(part.kept)
        missed.append(part.missed)
    return Factors(left, right, total, math.fsum(kept), math.fsum(missed))


def _sketch(panels: Panels, pair: Pair, wanted: Wanted) -> tuple[Tensor, Tensor, float] | None:
    """Singular vectors (columns, rank), squares of their singular values, and ‖D‖²; None where D is zero."""
    key = stream_key(wanted.seed, pair.name, 0)
    for width, trusted in widths(pair, wanted):
        basis = random_signs(key, pair.columns, width)
        for _ in range(SKETCH_PASSES - 1):
            image, total = _image(panels, pair, basis)
            if total == 0:
                return None
            basis = orthonormal(image)
        found = leading(basis, _image(panels, pair, basis)[0])
        rank = min(wanted.most, len(found.squares))
        if wanted.share is not None:
            rank = rank_for(found.squares, total, wanted.share, rank)
            if rank > trusted or not _reaches(found, rank, wanted.share * total):
                continue
        break
    return found.vectors[:, :rank].clone(), found.squares[:rank].clone(), total


def _reaches(found: Leading, rank: int, wanted: float) -> bool:
    return math.fsum(found.squares[:rank].tolist()) >= wanted


def _image(panels: Panels, pair: Pair, basis: Tensor) -> tuple[Tensor, float]:
    """DᵀD·V, and ‖D‖²: one pass. Panels are added in their order, strip by strip."""
    image = torch.zeros_like(basis)
    strips = range(-(-pair.columns // STRIP))
    squares = []
    for panel, (product, square) in panels.each(pair, _multiply(basis), again=True):
        squares.append(square)
        if product is None:
            continue
        adding = [panels.pool.submit(add_strip, image, panel, product, strip) for strip in strips]
        wait(adding)
        for done in adding:
            done.result()
    return image, _total(pair, squares)


def _multiply(basis: Tensor) -> Callable[[Tensor], tuple[Tensor | None, float]]:
    def multiply(panel: Tensor) -> tuple[Tensor | None, float]:
        square = sum_of_squares(panel)
        return (panel @ basis if square else None), square

    return multiply


def _total(pair: Pair, squares: list[float]) -> float:
    total = math.fsum(square for square in squares if math.isfinite(square))
    if not all(map(math.isfinite, squares)) or not math.isfinite(total):
        raise InputError(
            f"{pair.name}: the difference of the two models holds NaN or infinities. `streammerge inspect MODEL "
            "--health` says which of them has such numbers."
        )
    return total
