"""Exponentials and logarithms near 0, against Python's, which are right to the last bit or nearly."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from streammerge.kernels import series
from streammerge.kernels.series import EXP_REACH, REACH

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


@pytest.mark.parametrize("name", ["expm1", "log1p"])
def test_what_is_right_to_the_last_bits(name: str) -> None:
    values = near_zero()
    expected = [getattr(math, name)(x) for x in values]
    assert getattr(series, name)(of(values)).tolist() == pytest.approx(expected, rel=1e-15, abs=0)


def test_entropy() -> None:
    values = [x for x in near_zero() if abs(x) > 1e-4]
    # Python's loses 1e-16 of t where t² / 2 is left.
    for x, found in zip(values, series.entropy(of(values)).tolist(), strict=True):
        assert found == pytest.approx((1 + x) * math.log1p(x) - x, rel=1e-11 + 4e-16 / abs(x), abs=0)
    assert series.entropy(of([0.0, 1e-9])).tolist() == [0.0, pytest.approx(0.5e-18, rel=1e-9)]
