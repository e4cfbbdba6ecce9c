"""Exponentials and logarithms near 0, from additions and multiplications only.

A library's exp may differ in its last bit from one processor to the next, and from eager code to compiled; these do
not. All take and give float64.

Polynomials are Taylor's, economised after Lanczos: from the highest power down, the multiple of a Chebyshev polynomial
that has the same first term is taken off, which changes the least that can be anywhere in the interval. Their
coefficients are worked out in fractions, so that no machine has others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

from torch import Tensor

# exp takes 0 to −EXP_REACH, expm1 0 to −EXPM1_REACH, entropy −REACH to REACH.
EXP_REACH = 8.0
EXPM1_REACH = 0.125
REACH = 0.15


def economised(taylor: Sequence[Fraction], low: float, high: float, terms: int) -> list[float]:
    """The coefficients, by power, of a polynomial of so many terms that is near one of more in an interval."""
    half, middle = Fraction(high - low) / 2, Fraction(high + low) / 2
    slope, start = 1 / half, -middle / half
    chebyshev = [[Fraction(1)], [start, slope]]
    while len(chebyshev) < len(taylor):
        *_, before, last = chebyshev
        following = [Fraction(0)] * (len(last) + 1)
        for power, factor in enumerate(last):
            following[power] += 2 * start * factor
            following[power + 1] += 2 * slope * factor
        for power, factor in enumerate(before):
            following[power] -= factor
        chebyshev.append(following)
    left = list(taylor)
    while len(left) > terms:
        polynomial = chebyshev[len(left) - 1]
        share = left[-1] / polynomial[-1]
        left = [own - share * factor for own, factor in zip(left, polynomial, strict=True)][:-1]
    return [float(coefficient) for coefficient in left]


_HALVINGS = 3
_EXP = economised(
    [Fraction(1, math.factorial(n)) for n in range(14)],
    -EXP_REACH / 2 ** (_HALVINGS + 1), EXP_REACH / 2 ** (_HALVINGS + 1), terms=11,
)  # fmt: skip
_EXPM1 = economised([Fraction(1, math.factorial(n + 1)) for n in range(10)], -EXPM1_REACH, 0.0, terms=8)
_ENTROPY = economised([Fraction((-1) ** n, (n + 1) * (n + 2)) for n in range(16)], -REACH, REACH, terms=9)


def exp(x: Tensor) -> Tensor:
    """eˣ times one constant; to 1e-12."""
    power = _polynomial((x + EXP_REACH / 2) * 2.0**-_HALVINGS, _EXP)
    for _ in range(_HALVINGS):
        power = power * power
    return power


def expm1(x: Tensor) -> Tensor:
    """eˣ − 1, to the last bits."""
    return x * _polynomial(x, _EXPM1)


def entropy(x: Tensor) -> Tensor:
    """(1 + x) ln(1 + x) − x, which is never negative; to 1e-11."""
    return x * x * entropy_by_square(x)


def entropy_by_square(x: Tensor) -> Tensor:
    """The same over x²; to 1e-11."""
    return _polynomial(x, _ENTROPY)


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
