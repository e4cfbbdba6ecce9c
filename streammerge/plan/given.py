"""What a tensor is made of that is in no file: numbers that the plan holds, and random ones.

Both are read like tensors of a checkpoint, tile by tile (run/given.py fills the tiles), and cost no reading.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from streammerge.kernels.chance import stream_key

# A random number is the sum of twelve uniform ones of 16 bits, two from each word of 32.
WORDS = 6


@dataclass(frozen=True, eq=False)
class Given:
    """A small tensor that was worked out when the plan was made: float64, in row-major order."""

    values: npt.NDArray[np.float64]

    @property
    def dtype(self) -> str:
        return "F64"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def nbytes(self) -> int:
        """Nothing is read for it."""
        return 0

    @cached_property
    def facts(self) -> list[Any]:
        """What decides its bytes."""
        return ["given", list(self.shape), xxhash.xxh3_128_hexdigest(np.ascontiguousarray(self.values).tobytes())]


@dataclass(frozen=True)
class Drawn:
    """Random numbers of mean 0 and deviation 1, near to normal ones, as a function of their place. float32.

    A sum of twelve uniform numbers less its mean: integers, and so the same bits on every machine, which logarithms and
    cosines are not. None is beyond 6.
    """

    keys: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def dtype(self) -> str:
        return "F32"

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Nothing is read for it."""
        return 0

    @property
    def facts(self) -> list[Any]:
        """What decides its bytes."""
        return ["drawn", list(self.shape), list(self.keys)]


def drawn(seed: int, name: str, shape: tuple[int, ...]) -> Drawn:
    """The random numbers of the tensor `name`."""
    return Drawn(tuple(stream_key(seed, name, word) for word in range(WORDS)), shape)
