"""Exponentials and logarithms near 0, against Python's, which are right to the last bit or nearly."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from streammerge.kernels import series
from streammerge.kernels.series import EXP_REACH, EXPM1_REACH, REACH, economised

_NEAR_ZERO = [0.0, 1e-300, 1e-20, 1e-9, 1e-4, 0.01, 0.1, REACH]


def near_zero() -> list[float]:
    spread = torch.linspace(-REACH, REACH, 999, dtype=torch.float64).tolist()
    return [*_NEAR_ZERO, *(-x for x in _NEAR_ZERO), *spread]


def of(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_exp_is_a_multiple_of_the_exponential() -> None:
    values = torch.linspace(-EXP_REACH, 0, 999, dtype=torch.float64)
    found = series.exp(values)
    factor = found[-1].item()
    expected = [factor * math.exp(x) for x in values.tolist()]
    assert found.tolist() == pytest.approx(expected, rel=1e-12, abs=0)


def test_expm1_is_right_to_the_last_bits() -> None:
    values = [x for x in near_zero() if -EXPM1_REACH <= x <= 0]
    expected = [math.expm1(x) for x in values]
    assert series.expm1(of(values)).tolist() == pytest.approx(expected, rel=1e-15, abs=0)


def test_economised_polynomials_lose_the_least_that_can_be() -> None:
    """T₃ on [-1, 1] is 4 x³ − 3 x: of x³ is left 3/4 x, which is 1/4 off at most; elsewhere, moved and stretched."""
    cube = [Fraction(0), Fraction(0), Fraction(0), Fraction(1)]
    assert economised(cube, -1.0, 1.0, terms=3) == [0.0, 0.75, 0.0]
    constant, slope, square = economised(cube, 0.0, 4.0, terms=3)
    off = [x**3 - (constant + slope * x + square * x * x) for x in torch.linspace(0, 4, 999).tolist()]
    assert max(map(abs, off)) == pytest.approx(2.0, rel=1e-5)


def test_entropy() -> None:
    values = [x for x in near_zero() if abs(x) > 1e-4]
    # Python's loses 1e-16 of t where t² / 2 is left.
    for x, found in zip(values, series.entropy(of(values)).tolist(), strict=True):
        assert found == pytest.approx((1 + x) * math.log1p(x) - x, rel=1e-11 + 4e-16 / abs(x), abs=0)
    assert series.entropy(of([0.0, 1e-9])).tolist() == [0.0, pytest.approx(0.5e-18, rel=1e-9)]
