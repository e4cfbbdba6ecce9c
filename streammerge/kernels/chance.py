"""Random bits that are a function of where they are used: (seed, tensor name, model's position, element index).

No generator, no state, no order: any tile can be made again at any time, on any device, with the same bits.

    stream key   64 bits from the seed, the name and the position (xxh3)
    block key    64 bits from the stream key and the block's number (the finaliser of splitmix64)
    bits         32 bits from the block key and the index in the block: murmur3's finaliser, twice, a key before each
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import xxhash
from torch import Tensor

from streammerge.kernels.contract import BLOCK

# murmur3's multipliers 0x85ebca6b and 0xc2b2ae35 as int32.
_FIRST, _SECOND = -2048144789, -1028477387


def stream_key(seed: int, tensor_name: str, position: int) -> int:
    """The key of one model's random bits in one tensor. `position` is the model's place in the recipe."""
    return xxhash.xxh3_64_intdigest(f"{seed}\0{position}\0{tensor_name}".encode())


def block_keys(stream_keys: Sequence[int], first_block: int, blocks: int) -> Tensor:
    """The keys of a tile's blocks: (blocks, models, 2) int32."""
    number = np.arange(first_block + 1, first_block + 1 + blocks, dtype=np.uint64)[:, None]
    key = np.array(stream_keys, dtype=np.uint64)[None, :] + number * np.uint64(0x9E3779B97F4A7C15)
    key = (key ^ (key >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    key = (key ^ (key >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    key = np.ascontiguousarray(key ^ (key >> np.uint64(31)))
    return torch.from_numpy(key.astype("<u8").view("<i4").reshape(blocks, len(stream_keys), 2))


def random_bits(keys: Tensor, width: int) -> Tensor:
    """32 bits for each of the first `width` elements of blocks: (blocks, 2) int32 keys -> (blocks, width) int32."""
    index = torch.arange(width, dtype=torch.int32, device=keys.device)[None, :]
    return _mix(_mix(index ^ keys[:, 0:1]) ^ keys[:, 1:2])


def keep_mask(keys: Tensor, limit: Tensor, width: int = BLOCK) -> Tensor:
    """Which elements stay: (blocks, 2) int32 keys and a `keep_limit` -> (blocks, width) bool."""
    return ((random_bits(keys, width) >> 1) & 0x7FFFFFFF) <= limit


def keep_limit(density: float) -> int:
    """The limit that 31 random bits do not exceed with probability `density`: -1 for 0, all bits for 1."""
    return min(2**31, max(0, round(density * 2**31))) - 1


def _mix(bits: Tensor) -> Tensor:
    # >> of an int32 copies the sign; the masks make it the logical shift.
    bits = (bits ^ ((bits >> 16) & 0xFFFF)) * _FIRST
    bits = (bits ^ ((bits >> 13) & 0x7FFFF)) * _SECOND
    return bits ^ ((bits >> 16) & 0xFFFF)
