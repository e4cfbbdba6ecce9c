"""Chance by rank: which entries of a row stay, when large ones stay more often than small ones.

Of the m entries of a row, the one with r smaller ones stays with probability

    low + spread · r / (m − 1)

An entry that draws u, uniform from 0 to 1, stays if r ≥ c = ⌈(u − low) · (m − 1) / spread⌉. To know that, it is
compared with one entry of the sorted row, and nobody needs to know r.

Equal entries share the ranks a to b − 1: each tosses a coin for a or b − 1, and so has the mean of their probabilities,
wherever it lies in the row. All numbers are rounded to float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from streammerge.kernels.chance import random_bits
from streammerge.kernels.contract import Argument, Arguments, Grain

# Stands for (m − 1) / spread when all have the same chance: any u but `low` then gives a c far below 0 or above m.
_SAME_FOR_ALL = 2.0**60

# 1, or −1 where small entries stay more often.
UPWARDS = Argument("upwards")
RANK_ARGUMENTS = (
    UPWARDS,
    Argument("low", dtype=torch.float32),
    Argument("ranks", dtype=torch.float32),
    Argument("width", (1,), torch.int32),
    Argument("rows_per_entry", (1,), torch.float32),
)


class Chances(NamedTuple):
    """Probabilities of the smallest entry of a row and of the largest."""

    smallest: float
    largest: float


def rank_arguments(models: Sequence[Chances], grain: Grain, work: torch.dtype) -> dict[str, Tensor]:
    """`RANK_ARGUMENTS` for a tensor that `grain` cuts into rows."""
    assert grain.width is not None
    lows, ranks, upwards = [], [], []
    for smallest, largest in models:
        spread = largest - smallest
        if spread == 0 or grain.width == 1:
            chance = (smallest + largest) / 2
            # Below the least u there is, or above the largest.
            lows.append(-1.0 if chance <= 0 else 2.0 if chance >= 1 else chance)
            ranks.append(_SAME_FOR_ALL)
        else:
            lows.append(min(smallest, largest))
            ranks.append((grain.width - 1) / abs(spread))
        upwards.append(1.0 if spread >= 0 else -1.0)
    several = grain.unit > grain.width
    return {
        "low": torch.tensor(lows, dtype=torch.float32),
        "ranks": torch.tensor(ranks, dtype=torch.float32),
        "upwards": torch.tensor(upwards, dtype=work),
        "width": torch.tensor([grain.width], dtype=torch.int32),
        "rows_per_entry": torch.tensor([1 / grain.width if several else 0.0], dtype=torch.float32),
    }


def ranked(sizes: Tensor, arguments: Arguments, i: int) -> Tensor:
    """Numbers that are larger the likelier an entry of model i stays."""
    return sizes * arguments["upwards"][i]


def stays(numbers: Tensor, ordered: Tensor, keys: Tensor, arguments: Arguments, i: int) -> Tensor:
    """Which entries of model i stay: (units, elements) bool.

    `numbers` (units, elements) are from `ranked`, `ordered` are the same with every row sorted upwards, and `keys`
    (units, 2) int32 are those of the units' random bits.
    """
    elements = numbers.shape[-1]
    bits = random_bits(keys, elements)
    coin = bits & 1
    u = ((bits >> 1) & 0x7FFFFFFF).to(torch.float32) * 2.0**-31
    width = arguments["width"]
    c = torch.ceil((u - arguments["low"][i]) * arguments["ranks"][i]).clamp(min=0.0)
    c = torch.minimum(c, width.to(torch.float32)).to(torch.int32)
    # Counted from 0: b − 1 ≥ c if the entry is not smaller than number c, and a ≥ c if it is larger than number c − 1.
    entry = torch.arange(elements, dtype=torch.int32, device=numbers.device)[None, :]
    row = ((entry.to(torch.float32) + 0.5) * arguments["rows_per_entry"]).to(torch.int32)
    place = (row * width + c + coin - 1).clamp(0, elements - 1)
    limit = torch.gather(ordered, -1, place.to(torch.int64))
    large = (numbers > limit) | ((numbers == limit) & (coin == 1))
    return (c == 0) | ((c < width) & large)
