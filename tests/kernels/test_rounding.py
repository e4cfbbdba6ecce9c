"""Results are rounded once: to the nearest number of the output dtype, and in the middle to the even one."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from streammerge.kernels.contract import round_once
from tests.methods.cases import DTYPES, bits, flat
from tests.methods.oracles import Array, rounded


def hard_values(dtype: str) -> Array:
    """Numbers of a dtype, the middles between neighbours, and what is next to a middle in float32 and in float64."""
    generator = np.random.default_rng(0)
    near = [
        np.array([0.0, -0.0, 1e-60, -1e-60, 65519.99, 65520.0, 3.3961775e38, 1e39, -1e300, np.inf, -np.inf, np.nan])
    ]
    for exponent in (-140, -126, -30, -15, -14, 0, 7, 120):
        numbers = flat(torch.from_numpy(generator.normal(size=2000) * 2.0**exponent).to(DTYPES[dtype]))
        numbers = numbers[np.isfinite(numbers)]
        stored = torch.from_numpy(numbers).to(DTYPES[dtype])
        after = flat(torch.nextafter(stored, torch.full_like(stored, torch.inf)))
        middle = np.where(np.isfinite(after), (numbers + after) / 2, numbers)
        for step in (0.0, 2.0**-52, -(2.0**-52), 2.0**-26, -(2.0**-26), 2.0**-20, 2.0**-9):
            near.append(middle * (1 + step))
    return np.concatenate(near)


@pytest.mark.parametrize(
    ("work", "dtype"), [("F32", "BF16"), ("F32", "F16"), ("F64", "BF16"), ("F64", "F16"), ("F64", "F32")]
)
def test_a_result_is_rounded_once(work: str, dtype: str) -> None:
    values = torch.from_numpy(hard_values("F16" if dtype == "F16" else "BF16")).to(DTYPES[work])
    found = flat(round_once(values, DTYPES[dtype]))
    expected = rounded(flat(values), dtype)
    assert np.array_equal(found, expected, equal_nan=True)
    numbers = ~np.isnan(found)
    assert np.array_equal(np.signbit(found[numbers]), np.signbit(expected[numbers]))


def test_a_block_is_rounded_to_the_same_bits_in_any_piece() -> None:
    values = torch.from_numpy(np.resize(hard_values("BF16"), 4 * 65536)).view(4, 65536)
    for dtype in (torch.bfloat16, torch.float16):
        whole = round_once(values, dtype)
        for i in range(4):
            assert torch.equal(bits(round_once(values[i : i + 1], dtype)), bits(whole[i : i + 1]))
