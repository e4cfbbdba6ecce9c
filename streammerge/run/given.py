"""Filling tiles with what is in no file: numbers that the plan holds, and random ones."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from streammerge.kernels.chance import block_keys, random_bits
from streammerge.kernels.contract import BLOCK
from streammerge.plan.given import WORDS, Drawn, Given
from streammerge.run.arena import Area


def fill_given(read: Given | Drawn, into: Area, start: int, elements: int, at: int) -> None:
    """Put elements [start, start + elements) of what is given into `into`, from its element `at` on."""
    out = into.tensor.view(-1)
    if isinstance(read, Given):
        values = np.ascontiguousarray(read.values).reshape(-1)[start : start + elements]
        out[at : at + elements] = torch.from_numpy(values.copy())
        return
    stop = start + elements
    while start < stop:
        # A block at a time: so much memory is enough for any tile.
        block, first = divmod(start, BLOCK)
        count = min(BLOCK - first, stop - start)
        out[at : at + count] = _block(read, block)[first : first + count]
        start, at = start + count, at + count


def _block(read: Drawn, number: int) -> Tensor:
    """The random numbers of one block."""
    total = torch.zeros(BLOCK, dtype=torch.int32)
    keys = block_keys(read.keys, number, 1)
    for word in range(WORDS):
        bits = random_bits(keys[:, word], BLOCK)[0]
        total += (bits & 0xFFFF) + ((bits >> 16) & 0xFFFF)
    # The mean of twelve numbers from 0 to 65,535 is 12 · 32,767.5.
    return (total - 12 * 65_535 // 2).to(torch.float32).div_(65_536)
