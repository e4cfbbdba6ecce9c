"""Exponentials and logarithms near 0, from additions, multiplications and divisions only.

A library's exp may differ in its last bit from one processor to the next, and from eager code to compiled; these do
not.
All take and give float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

# exp takes 0 to −EXP_REACH; the others take −REACH to REACH.
EXP_REACH = 8.0
REACH = 0.15

_HALVINGS = 3
_EXP = [1 / math.factorial(n) for n in range(13)]
_EXPM1 = [1 / math.factorial(n + 1) for n in range(11)]
_LOG1P = [2 / (2 * n + 1) for n in range(8)]
_ENTROPY = [(-1) ** n / ((n + 1) * (n + 2)) for n in range(12)]


def exp(x: Tensor) -> Tensor:
    """eˣ times one constant; to 1e-13."""
    power = _polynomial((x + EXP_REACH / 2) * 2.0**-_HALVINGS, _EXP)
    for _ in range(_HALVINGS):
        power = power * power
    return power


def expm1(x: Tensor) -> Tensor:
    """eˣ − 1, to the last bits."""
    return x * _polynomial(x, _EXPM1)


def log1p(x: Tensor) -> Tensor:
    """ln(1 + x), to the last bits."""
    z = x / (2 + x)
    return z * _polynomial(z * z, _LOG1P)


def entropy(x: Tensor) -> Tensor:
    """(1 + x) ln(1 + x) − x, which is never negative; to 1e-11."""
    return x * x * _polynomial(x, _ENTROPY)


def _polynomial(x: Tensor, coefficients: Sequence[float]) -> Tensor:
    """The sum of coefficients times powers of x, from the power 0 on."""
    *rest, second, last = coefficients
    # In place: eagerly that takes two thirds of the time.
    found = x * last
    found += second
    for coefficient in reversed(rest):
        found *= x
        found += coefficient
    return found
