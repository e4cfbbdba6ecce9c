"""How two tensors differ, and two from a base: sums over blocks that everything else is worked out of."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from streammerge.kernels.blocksum import block_sum
from streammerge.kernels.contract import Arguments, Program, Tile


class Moments(NamedTuple):
    """Sums over a tensor of what two models a and b, and a base c, hold in it; numbers that are not finite count as 0.

    The last five are 0 without a base: u = a - c and v = b - c; `opposed` counts u and v of different sign, `both`
    those of which neither is 0.
    """

    aa: float
    bb: float
    ab: float
    dd: float
    changed: float
    nonfinite_a: float
    nonfinite_b: float
    uu: float = 0.0
    vv: float = 0.0
    uv: float = 0.0
    opposed: float = 0.0
    both: float = 0.0


def moments(tile: Tile, arguments: Arguments) -> Tensor:
    """(blocks, 7 or 12) float64: the sums of `Moments` of each block."""
    bad = [~torch.isfinite(model) for model in tile.models]
    a, b, *base = (model.masked_fill(mask, 0.0) for model, mask in zip(tile.models, bad, strict=True))
    d = b - a
    sums = [a * a, b * b, a * b, d * d, (d != 0) | (bad[0] != bad[1]), bad[0], bad[1]]
    if base:
        u, v = a - base[0], b - base[0]
        sums += [u * u, v * v, u * v, u * v < 0, (u != 0) & (v != 0)]
    return torch.stack([block_sum(each) for each in sums], -1)


MOMENTS = Program(moments, eager_ns=30)
