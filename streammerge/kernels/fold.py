"""Folding a low-rank change into a weight, block by block: W + left · right, and DoRA's norms.

    y = W + L·R                      L (rows, rank), R (rank, columns), the scale in R
    y = (W + L·R) · m / ‖W + L·R‖    DoRA: the norm of each row, or of each column where L and R are transposes

Products and sums are float64, so a float32 result is rounded once. What is multiplied at a time is fixed by the tensor,
not by the tile: the same bits for every tiling. (Hu et al. 2021; Liu et al. 2024, DoRA.)
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
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

# Panels of L and R that are multiplied at a time: so many rows at most, fewer of wide ones, and so many columns. R's
# stays in the cache meanwhile: 64 ranks of 30,720 columns took 18 ns per element without panels, 3 with them
# (1 core, 2026-11-24).
_MOST_ROWS, _COLUMNS, _PANEL = 64, 2048, 131_072


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


def fold(tile: Tile, arguments: Arguments, *, short: bool) -> Tensor:
    """W + L·R; `short` says that it will be rounded to 16 bits or fewer."""
    return _as_worked_with(_changed(tile, arguments), tile, short=short)


def fold_with_norms(tile: Tile, arguments: Arguments, *, short: bool, columns: bool) -> Tensor:
    """(W + L·R) · share, the share of each row or column."""
    return _as_worked_with(_scaled(tile, arguments, columns=columns), tile, short=short)


def squares(tile: Tile, arguments: Arguments) -> Tensor:
    """The squares of W + L·R, in float64."""
    return _changed(tile, arguments).square_()


def _scaled(tile: Tile, arguments: Arguments, *, columns: bool) -> Tensor:
    changed = _changed(tile, arguments)
    assert tile.starts is not None
    width, share = arguments["right"].shape[1], arguments["share"]
    index = tile.starts + torch.arange(changed.shape[1], device=changed.device)
    index = index % width if columns else (index // width).clamp_(max=len(share) - 1)
    return changed.mul_(share[index])


def _changed(tile: Tile, arguments: Arguments) -> Tensor:
    """W + L·R in float64, of blocks that follow each other; what fills up the last one stays as it is."""
    (weights,) = tile.models
    assert tile.starts is not None
    left, right = arguments["left"], arguments["right"]
    start = int(tile.starts[0, 0])
    stop = min(start + weights.numel(), left.shape[0] * right.shape[1])
    if stop - start == weights.numel():
        return product(left, right, start, stop).add_(weights.view(-1)).view(weights.shape)
    changed = weights.to(torch.float64, copy=True)
    changed.view(-1)[: max(0, stop - start)] += product(left, right, start, max(start, stop))
    return changed


def _as_worked_with(values: Tensor, tile: Tile, *, short: bool) -> Tensor:
    """float64 as the work dtype, such that the rounding to the result's dtype is the only one.

    Before it is rounded to 16 bits, a float32 has its last bit set when something was left out behind it: a number
    halfway between two others can then be told from one that only looks like it.
    """
    (weights,) = tile.models
    if weights.dtype == torch.float64:
        return values
    if short:
        bits = values.view(torch.int64)
        bits |= (bits & _BEYOND).add_(_BEYOND)
        bits &= ~_BEYOND
    return values.to(weights.dtype)


def product(left: Tensor, right: Tensor, start: int, stop: int) -> Tensor:
    """Elements [start, stop) of left · right, counted row by row, in float64.

    What is multiplied are panels that lie at the same places and have the same sizes whatever is asked for, so that
    every element is the same sum, added up in the same order.
    """
    rows, width = left.shape[0], right.shape[1]
    group = max(1, min(_MOST_ROWS, _PANEL // width))
    first, last = start // width, -(-stop // width)
    first, last = first // group * group, min(rows, -(-last // group) * group)
    # Of a part of one row only the panels that it lies in.
    inside = last - first == 1
    begin, end = (start - first * width, stop - first * width) if inside else (0, width)
    made = torch.empty(last - first, width, dtype=right.dtype, device=right.device)
    some = left[first:last].to(right.dtype)
    whole = (last - first) // group
    # All panels of some columns in one call, each multiplied for itself; and the rows that are left at the end.
    groups = some[: whole * group].view(whole, group, left.shape[1])
    places = made[: whole * group].view(whole, group, width)
    for column in range(begin // _COLUMNS * _COLUMNS, end, _COLUMNS):
        panel = right[:, column : column + _COLUMNS]
        if whole:
            torch.bmm(groups, panel.expand(whole, *panel.shape), out=places[:, :, column : column + _COLUMNS])
        if whole * group < last - first:
            torch.mm(some[whole * group :], panel, out=made[whole * group :, column : column + _COLUMNS])
    return made.view(-1)[start - first * width : stop - first * width]


# The bits of a float64's fraction that a float32 has no room for.
_BEYOND = (1 << 29) - 1
# Of fewer blocks much would be multiplied for nothing: rows begin and end in the midst of groups.
_BLOCKS = 8
_MATRICES = (Argument("left", ("any", "any"), torch.float32), Argument("right", ("any", "any"), torch.float64))
_SHARE = Argument("share", ("any",), torch.float64)
_SQUARES = Program(squares, _MATRICES, needs_starts=True, eager_blocks=_BLOCKS)


@cache
def _program_of(norms: bool, columns: bool, short: bool) -> Program:
    function, options = (fold_with_norms, (("columns", columns),)) if norms else (fold, ())
    return Program(
        function, (*_MATRICES, _SHARE) if norms else _MATRICES, (("short", short), *options), merges=True,
        needs_starts=True, eager_blocks=_BLOCKS,
    )  # fmt: skip


def _program(settings: Settings) -> Program:
    return _program_of(settings.flag("norms"), settings.flag("columns"), settings.flag("short"))


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
    passes=lambda settings, narrow, elements: 2 if settings.flag("norms") else 1,
)


def fold_settings(*, norms: bool, columns: bool, short: bool) -> Settings:
    """Of a change with or without norms, of columns or of rows; `short` when the result has 16 bits or fewer."""
    return Settings({"norms": norms, "columns": columns, "short": short}, {})


def fold_span(weights: Tensor, start: int, arguments: Mapping[str, Tensor], settings: Settings) -> Tensor:
    """Elements [start, start + len(weights)) of the folded tensor, in float64."""
    tile = Tile(None, [weights.view(1, -1)], torch.tensor([[start]]), None)
    if settings.flag("norms"):
        return _scaled(tile, arguments, columns=settings.flag("columns"))[0]
    return _changed(tile, arguments)[0]
