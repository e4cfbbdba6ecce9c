"""Folding a low-rank change into a weight, block by block: W + left · right, and DoRA's norms.

    y = W + L·R                      L (rows, rank), R (rank, columns), the scale in R
    y = (W + L·R) · m / ‖W + L·R‖    DoRA: the norm of each row, or of each column where L and R are transposes

Products and sums are float64, so a float32 result is rounded once. A block multiplies the rows that it covers, wherever
the tile begins: the same bits for every tiling. (Hu et al. 2021; Liu et al. 2024, DoRA.)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from streammerge.kernels.contract import (
    Argument,
    Arguments,
    Look,
    Measuring,
    Method,
    Problem,
    Program,
    Settings,
    Tile,
)


class Factors(NamedTuple):
    """The matrices of a change as they are used: `left` (rows, rank), and `right` (rank, columns) with the scale in it.

    `magnitude` has a number per row, or per column. All are float64 but `left`, which is as precise as stored.
    """

    left: Tensor
    right: Tensor
    magnitude: Tensor | None

    @property
    def arguments(self) -> dict[str, Tensor]:
        return {"left": self.left, "right": self.right}


def factors(left: Tensor, right: Tensor, magnitude: Tensor | None, *, rank: int, scale: float,
            transposed: bool) -> Factors:  # fmt: skip
    """Factors from what is stored."""
    wide = torch.float64 if left.dtype == torch.float64 else torch.float32
    if transposed:
        left, right = left.reshape(rank, -1).t(), right.reshape(-1, rank).t()
    else:
        left, right = left.reshape(-1, rank), right.reshape(rank, -1)
    return Factors(
        left.to(wide).contiguous(),
        right.to(torch.float64).contiguous() * scale,
        None if magnitude is None else magnitude.reshape(-1).to(torch.float64),
    )


def fold(tile: Tile, arguments: Arguments) -> Tensor:
    """W + L·R."""
    return _changed(tile, arguments)


def fold_with_norms(tile: Tile, arguments: Arguments, *, columns: bool) -> Tensor:
    """(W + L·R) · share, the share of each row or column."""
    changed = _changed(tile, arguments)
    assert tile.starts is not None
    width, share = arguments["right"].shape[1], arguments["share"]
    index = tile.starts + torch.arange(changed.shape[1], device=changed.device)
    index = index % width if columns else (index // width).clamp_(max=len(share) - 1)
    return changed * share[index]


def squares(tile: Tile, arguments: Arguments) -> Tensor:
    """The squares of W + L·R, 0 beyond the end."""
    return _changed(tile, arguments).square()


def _changed(tile: Tile, arguments: Arguments) -> Tensor:
    (weights,) = tile.models
    assert tile.starts is not None
    left, right = arguments["left"], arguments["right"]
    end = left.shape[0] * right.shape[1]
    changed = weights.clone()
    for block, start in zip(changed, tile.starts[:, 0].tolist(), strict=True):
        stop = min(start + len(block), end)
        if start < stop:
            block[: stop - start] += product(left, right, start, stop)
    return changed


def product(left: Tensor, right: Tensor, start: int, stop: int) -> Tensor:
    """Elements [start, stop) of left · right, counted row by row."""
    width = right.shape[1]
    first, last = start // width, -(-stop // width)
    if last - first == 1:
        # Part of one row: of a very wide one only the columns that count.
        return left[first : first + 1].to(right.dtype).mm(right[:, start - first * width : stop - first * width])[0]
    rows = left[first:last].to(right.dtype).mm(right)
    return rows.view(-1)[start - first * width : stop - first * width]


_MATRICES = (Argument("left", ("any", "any"), torch.float32), Argument("right", ("any", "any"), torch.float64))
_FOLD = Program(fold, _MATRICES, merges=True, needs_starts=True)
_SQUARES = Program(squares, _MATRICES, needs_starts=True)
_SHARE = Argument("share", ("any",), torch.float64)
_WITH_NORMS = {
    columns: Program(fold_with_norms, (*_MATRICES, _SHARE), (("columns", columns),), merges=True, needs_starts=True)
    for columns in (False, True)
}


def _program(settings: Settings) -> Program:
    return _WITH_NORMS[settings.flag("columns")] if settings.flag("norms") else _FOLD


def _measure(problem: Problem) -> Measuring:
    """The factors, which are `problem.found`, and the share of every row or column."""
    found: Factors = problem.found
    if found.magnitude is None:
        return found.arguments
    columns, width = problem.settings.flag("columns"), found.right.shape[1]
    sums = torch.zeros(len(found.magnitude), dtype=torch.float64)

    def digest(squared: Tensor, starts: Tensor) -> list[tuple[int, Tensor]]:
        return [
            _sums_of(block, start, min(start + len(block), problem.elements) - start, width, columns=columns)
            for block, start in zip(squared, starts[:, 0].tolist(), strict=True)
        ]

    def add(parts: list[tuple[int, Tensor]]) -> None:
        for first, part in parts:
            sums[first : first + len(part)] += part

    yield Look(_SQUARES, found.arguments, digest=digest, fold=add)
    return {**found.arguments, "share": found.magnitude / sums.sqrt()}


def _sums_of(block: Tensor, start: int, elements: int, width: int, *, columns: bool) -> tuple[int, Tensor]:
    """The sums of a block by rows or columns, and the first row or column that they are of."""
    first, last = start // width, -(-(start + elements) // width)
    rows = torch.zeros((last - first) * width, dtype=block.dtype)
    rows[start - first * width :][:elements] = block[:elements]
    rows = rows.view(-1, width)
    return (0, rows.sum(0)) if columns else (first, rows.sum(1))


FOLD = Method(
    name="fold",
    doc=__doc__,
    params=(),
    base="ignored",
    min_models=1,
    max_models=1,
    program=_program,
    measure=_measure,
    passes=lambda settings, narrow: 2 if settings.flag("norms") else 1,
)


def fold_settings(*, norms: bool, columns: bool) -> Settings:
    """Of a change with or without norms, of columns or of rows."""
    return Settings({"norms": norms, "columns": columns}, {})


def fold_span(weights: Tensor, start: int, arguments: Mapping[str, Tensor], settings: Settings) -> Tensor:
    """Elements [start, start + len(weights)) of the folded tensor, in float64."""
    tile = Tile(None, [weights.to(torch.float64).view(1, -1)], torch.tensor([[start]]), None)
    return _program(settings)(tile, arguments)[0]
