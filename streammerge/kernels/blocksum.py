"""Sums with the same bits everywhere.

A block is summed in float64 by a fixed binary tree (halves added to halves), made of elementwise additions only, so
that eager and compiled code, any thread count and any device give the same bits. Blocks are added exactly
(`math.fsum`), so their order does not matter either.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def block_sum(values: Tensor) -> Tensor:
    """Sums over the last dimension, (..., BLOCK) -> (...,) in float64. Rows of any other width are filled up."""
    full = max(8, 1 << (values.shape[-1] - 1).bit_length())
    if full != values.shape[-1]:
        values = torch.nn.functional.pad(values, (0, full - values.shape[-1]))
    width = full // 8
    # Eight slices at once: a compiled program reads the values once and keeps no float64 copy of them.
    part = [values[..., i * width : (i + 1) * width].to(torch.float64) for i in range(8)]
    tree = ((part[0] + part[4]) + (part[2] + part[6])) + ((part[1] + part[5]) + (part[3] + part[7]))
    while tree.shape[-1] > 1:
        half = tree.shape[-1] // 2
        tree = tree[..., :half] + tree[..., half:]
    return tree[..., 0]


def total(block_sums: Tensor) -> list[float]:
    """The exact sum, rounded once, of each column of (blocks, columns) float64."""
    return [_total(column) for column in block_sums.reshape(block_sums.shape[0], -1).T.tolist()]


def _total(column: list[float]) -> float:
    # fsum refuses infinities of both signs and sums beyond the range; a plain sum gives the NaN or infinity that the
    # report will count.
    try:
        return math.fsum(column) if all(math.isfinite(value) for value in column) else sum(column)
    except OverflowError:
        return sum(column)
