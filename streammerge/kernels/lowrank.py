"""The leading part of a matrix that is only ever seen in panels of rows: a randomised SVD.

    Ω             (columns, width) random signs
    Z = DᵀD·Ω     one pass: Σ over panels of Dᵢᵀ(Dᵢ·Ω)
    V = orth(Z)
    Z = DᵀD·V     another pass, and as many more as asked
    DᵀD ≈ Z (VᵀZ)⁺ Zᵀ,  whose eigenvectors are the leading right singular vectors of D

The last line is what Q = orth(D·V), B = QᵀD and the SVD of B would give, but nothing as tall as D is ever held.
(Halko, Martinsson, Tropp 2011, algorithms 4.4 and 5.5: power iterations, and the Nyström form for DᵀD. They sketch the
range of D; this sketches the range of Dᵀ, so that a panel is read once for two products.)

All is float64. Torch must run on one thread here: how LAPACK and BLAS sum depends on how many there are.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from streammerge.kernels.chance import block_keys, random_bits

# Signs that are made at a time.
_COLUMNS = 8
# Columns of a panel whose part of Z is added up at a time: fixed, so that the bits are.
STRIP = 1024


class Leading(NamedTuple):
    """Right singular vectors (columns, rank), orthonormal, and the squares of their singular values, descending."""

    vectors: Tensor
    squares: Tensor


def random_signs(key: int, rows: int, width: int) -> Tensor:
    """A (rows, width) matrix of ±1; its first columns are the same for every width. `key` is a `stream_key`."""
    keys = block_keys([key], 0, width)[:, 0]
    signs = torch.empty(rows, width, dtype=torch.float64)
    for first in range(0, width, _COLUMNS):
        bits = random_bits(keys[first : first + _COLUMNS], rows)
        signs[:, first : first + _COLUMNS] = ((bits & 1) * 2 - 1).t()
    return signs


def orthonormal(matrix: Tensor) -> Tensor:
    """Columns that span those of a (columns, width) matrix."""
    basis: Tensor = torch.linalg.qr(matrix)[0]
    return basis


def add_strip(image: Tensor, panel: Tensor, product: Tensor, strip: int) -> None:
    """Add one strip of Dᵢᵀ·(Dᵢ·V) to Z, in place: `panel` is Dᵢ (rows, columns), `product` is Dᵢ·V (rows, width)."""
    place = slice(strip * STRIP, (strip + 1) * STRIP)
    image[place].addmm_(panel[:, place].t(), product)


def leading(basis: Tensor, image: Tensor) -> Leading:
    """What an orthonormal V and Z = DᵀD·V, (columns, width) each, say of D."""
    gram = basis.t() @ image
    values, turns = torch.linalg.eigh((gram + gram.t()).mul_(0.5))
    # Below this the eigenvalues are rounding.
    keep = values > values[-1] * (torch.finfo(values.dtype).eps * len(values))
    tall, small = torch.linalg.qr(image @ (turns[:, keep] / values[keep].sqrt()))
    left, singular, _ = torch.linalg.svd(small)
    return Leading(tall @ left, singular.square())


def sum_of_squares(values: Tensor) -> float:
    """The squares of all elements, summed."""
    flat = values.reshape(-1)
    return float(torch.dot(flat, flat))


def rank_for(squares: Tensor, total: float, energy: float, most: int) -> int:
    """The fewest leading vectors whose squares are `energy` of `total`; `most` where those do not reach it."""
    reached = 0.0
    for rank, square in enumerate(squares[:most].tolist(), start=1):
        reached += square
        if reached >= energy * total:
            return rank
    return min(most, len(squares))


class Part(NamedTuple):
    """What one panel of rows comes to: its rows of the left factor, as stored; the squares of what the vectors hold of
    it; and the squares of what the stored factors leave of it."""

    left: Tensor
    kept: float
    missed: float


def split(panel: Tensor, towards: Tensor, singular: Tensor, right: Tensor, dtype: torch.dtype) -> Part:
    """Rows of L in D ≈ L·R, in `dtype`. `panel` (rows, columns) is overwritten.

    `towards` is V/√σ (columns, rank), `singular` is σ, `right` is R = √σ·Vᵀ (rank, columns) as it was rounded to be
    stored; all in float64.
    """
    product = panel @ towards
    left = product.to(dtype)
    kept = float(product.square_().sum(0) @ singular)
    panel.addmm_(left.to(torch.float64), right, alpha=-1)
    return Part(left, kept, sum_of_squares(panel))
