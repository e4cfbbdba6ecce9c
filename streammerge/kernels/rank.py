"""Values by rank: what every entry of a row gets for its place among the entries of that row.

The order is size descending, then index ascending, as in cut.py.
"""

from __future__ import annotations

import sys

import numpy as np
import torch
from torch import Tensor


def by_rank(sizes: Tensor, table: Tensor) -> Tensor:
    """The value of `table` (width,) for the rank of each of `sizes` (rows, width) in its row, the largest first.

    Sizes are >= 0 and have no NaN.
    """
    if bool(table[0] == table[-1]):
        # Tables are monotonic: all values are equal, and ranks say nothing.
        return table[0].expand(sizes.shape)
    if sizes.dtype is torch.float32 and sizes.device.type == "cpu":
        return _scatter(table, _order_by_keys(sizes))
    return _scatter(table, torch.sort(sizes, dim=-1, descending=True, stable=True).indices)


def _order_by_keys(sizes: Tensor) -> Tensor:
    """The indices of each row in order of rank, by sorting integers: bits of the size, from above, and the index.

    numpy sorts 64-bit integers with vector instructions; a stable sort by torch takes seven times as long.
    """
    # The bits of floats that are not negative have their order. + 0.0 makes a negative zero positive.
    bits = (sizes + 0.0).view(torch.int32).numpy()
    keys = np.empty(bits.shape, np.int64)
    low, high = (0, 1) if sys.byteorder == "little" else (1, 0)
    halves = keys.view(np.int32).reshape(*bits.shape, 2)
    np.subtract(np.int32(0x7FFFFFFF), bits, out=halves[..., high])
    halves[..., low] = np.arange(bits.shape[-1], dtype=np.int32)
    keys.sort(axis=-1)
    return torch.from_numpy(halves[..., low].astype(np.int64))


def _scatter(table: Tensor, order: Tensor) -> Tensor:
    values = torch.empty(order.shape, dtype=table.dtype, device=table.device)
    return values.scatter_(-1, order, table.expand(order.shape))
