"""Sorting rows."""

from __future__ import annotations

import torch
from torch import Tensor


def sort_rows(values: Tensor, width: int) -> Tensor:
    """Sort every `width` numbers of the last dimension upwards, in place if it can be. No number may be NaN.

    What is left at the end of the dimension stays as it is.
    """
    count = values.shape[-1] // width
    rows = values[..., : count * width].view(*values.shape[:-1], count, width)
    if values.device.type == "cpu":
        # numpy sorts floats with vector instructions.
        rows.numpy().sort(axis=-1)
    else:
        rows.copy_(torch.sort(rows, dim=-1).values)
    return values
