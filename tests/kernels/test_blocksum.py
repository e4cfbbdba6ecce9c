"""Sums have the same bits however many blocks are summed at a time, and lose next to nothing."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from streammerge.kernels.blocksum import block_sum, total
from streammerge.kernels.contract import BLOCK


def random_blocks(blocks: int, *, dtype: torch.dtype = torch.float32, spread: float = 0.0) -> Tensor:
    """Random numbers whose exponents differ by up to `spread` decades."""
    generator = np.random.default_rng(0)
    values = generator.normal(size=(blocks, BLOCK)) * 10 ** generator.uniform(0, spread, (blocks, BLOCK))
    return torch.from_numpy(values).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_block_sums_to_the_same_bits_alone_and_among_others(dtype: torch.dtype) -> None:
    values = random_blocks(7, dtype=dtype, spread=6)
    together = block_sum(values)
    assert together.dtype == torch.float64
    assert together.tolist() == [block_sum(values[i : i + 1]).item() for i in range(7)]
    assert together[2:5].tolist() == block_sum(values[2:5]).tolist()


def test_leading_dimensions_are_kept() -> None:
    values = random_blocks(6)
    assert torch.equal(block_sum(values.view(2, 3, BLOCK)), block_sum(values).view(2, 3))


@pytest.mark.parametrize("spread", [0.0, 12.0])
def test_a_block_sum_is_exact_to_sixteen_roundings(spread: float) -> None:
    values = random_blocks(3, spread=spread)
    for found, block in zip(block_sum(values).tolist(), values.double().tolist(), strict=True):
        # A tree over 65,536 values is sixteen additions deep.
        assert abs(found - math.fsum(block)) <= 16 * 2**-53 * math.fsum(map(abs, block))


def test_whole_numbers_are_summed_exactly() -> None:
    values = torch.from_numpy(np.random.default_rng(1).integers(-(1 << 20), 1 << 20, (4, BLOCK))).float()
    assert block_sum(values).tolist() == values.double().sum(-1).tolist()


def test_zeros_that_fill_a_block_change_nothing() -> None:
    values = random_blocks(1)
    values[:, 1000:] = 0
    assert block_sum(values).item() == pytest.approx(math.fsum(values[0, :1000].tolist()), rel=1e-15)
    assert block_sum(torch.zeros(2, BLOCK)).tolist() == [0.0, 0.0]


def test_a_total_is_exact_and_knows_no_order() -> None:
    sums = torch.tensor([[1e16, 1.0], [1.0, 2.0], [-1e16, 3.0], [1.0, 4.0]], dtype=torch.float64)
    assert total(sums) == [2.0, 10.0]
    assert total(sums.flip(0)) == [2.0, 10.0]
    assert total(sums.view(4, 2, 1)) == [2.0, 10.0]


def test_a_total_of_halves_is_the_total_of_the_whole() -> None:
    values = random_blocks(9, spread=9)
    tiled = torch.cat([block_sum(values[:4]), block_sum(values[4:5]), block_sum(values[5:])])
    assert total(tiled[:, None]) == total(block_sum(values)[:, None])


@pytest.mark.parametrize(
    ("column", "expected"),
    [([1.0, math.inf], math.inf), ([math.inf, -math.inf], math.nan), ([1.0, math.nan], math.nan)],
)
def test_a_total_of_what_is_not_finite_is_not_finite(column: list[float], expected: float) -> None:
    (found,) = total(torch.tensor(column, dtype=torch.float64)[:, None])
    assert found == expected or (math.isnan(found) and math.isnan(expected))


def test_a_total_too_large_for_a_float_is_infinite() -> None:
    assert total(torch.tensor([[1.7e308], [1.7e308]], dtype=torch.float64)) == [math.inf]
