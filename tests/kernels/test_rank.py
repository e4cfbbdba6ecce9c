"""Chance by rank: each entry has the probability of its rank, equal ones the mean of theirs, and rows do not mix."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from streammerge.kernels.chance import block_keys, random_bits, stream_key
from streammerge.kernels.contract import grain_of
from streammerge.kernels.rank import Chances, rank_arguments, ranked, stays
from streammerge.kernels.rowsort import sort_rows

UNITS = 4000


def shares(
    row: list[float], chances: Chances, *, rows: int = 1, dtype: torch.dtype = torch.float32
) -> NDArray[np.float64]:
    """How often each entry of `row` stays in many units of `rows` such rows: (rows, width)."""
    sizes = torch.tensor(row, dtype=dtype).repeat(rows)
    kept = kept_of(sizes.expand(UNITS, -1), chances, rows, len(row))
    found: NDArray[np.float64] = kept.numpy().mean(0).reshape(rows, len(row))
    return found


def kept_of(sizes: Tensor, chances: Chances, rows: int, width: int) -> Tensor:
    grain = grain_of((rows, width), by_rows=True)._replace(unit=rows * width)
    arguments = rank_arguments([chances], grain, sizes.dtype)
    numbers = ranked(sizes, arguments, 0)
    keys = block_keys([stream_key(0, "w", 0)], 0, len(sizes))[:, 0]
    return stays(numbers, sort_rows(numbers.clone(), width), keys, arguments, 0)


def assert_near(found: NDArray[np.float64], expected: list[float]) -> None:
    wanted = np.array(expected)
    sigma = np.sqrt(wanted * (1 - wanted) / UNITS)
    assert (np.abs(found - wanted) <= 5 * sigma).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_entry_has_the_probability_of_its_rank(dtype: torch.dtype) -> None:
    found = shares([0.5, 3.0, 0.0, float("inf"), 2.0], Chances(0.1, 0.9), dtype=dtype)
    assert_near(found, [0.3, 0.7, 0.1, 0.9, 0.5])


def test_small_entries_may_be_the_likelier_ones() -> None:
    assert_near(shares([0.5, 3.0, 0.0, 4.0, 2.0], Chances(0.9, 0.1)), [0.7, 0.3, 0.9, 0.1, 0.5])


def test_equal_entries_have_the_mean_of_their_probabilities() -> None:
    assert_near(shares([1.0, 0.0, 1.0, 1.0, 7.0], Chances(0.1, 0.9)), [0.5, 0.1, 0.5, 0.5, 0.9])
    assert_near(shares([0.0, -0.0, 0.0, 2.0, 2.0], Chances(0.1, 0.9)), [0.3, 0.3, 0.3, 0.8, 0.8])
    assert_near(shares([5.0] * 4, Chances(0.1, 0.9)), [0.5] * 4)


def test_two_entries_have_the_two_ends() -> None:
    assert_near(shares([2.0, 1.0], Chances(0.01, 0.99)), [0.99, 0.01])


@pytest.mark.parametrize("row", [[3.0], [2.0, 1.0, 5.0]])
def test_where_all_have_one_probability_ranks_do_not_count(row: list[float]) -> None:
    assert_near(shares(row, Chances(0.3, 0.3)), [0.3] * len(row))


def test_the_only_entry_of_a_row_has_the_mean() -> None:
    assert_near(shares([3.0], Chances(0.1, 0.5)), [0.3])


def test_0_is_never_and_1_always() -> None:
    assert not shares([1.0, 2.0], Chances(0.0, 0.0)).any()
    assert shares([1.0, 2.0], Chances(1.0, 1.0)).all()


def test_rows_of_a_unit_are_ranked_by_themselves() -> None:
    found = shares([0.5, 3.0, 2.0], Chances(0.2, 0.8), rows=7)
    assert_near(found, [0.2, 0.8, 0.5])


@pytest.mark.parametrize("width", [2047, 2048, 65_536, 70_000])
def test_wide_rows_are_decided_as_by_their_ranks(width: int) -> None:
    """Ranks and chances by numpy, in double precision; float32 may decide one draw in 10 million otherwise."""
    rows = max(1, 65_536 // width)
    sizes = torch.randint(0, 900, (1, rows * width), generator=torch.Generator().manual_seed(width)).float()
    kept = kept_of(sizes, Chances(0.3, 0.7), rows, width).numpy().reshape(rows, width)
    values = sizes.numpy().reshape(rows, width)
    order = np.sort(values, axis=1)
    least = np.stack([np.searchsorted(o, v, "left") for o, v in zip(order, values, strict=True)])
    most = np.stack([np.searchsorted(o, v, "right") - 1 for o, v in zip(order, values, strict=True)])
    keys = block_keys([stream_key(0, "w", 0)], 0, 1)[0, 0]
    bits = _bits(keys, rows * width).reshape(rows, width)
    rank = np.where(bits & 1, most, least)
    expected = (bits >> 1) / 2.0**31 <= 0.3 + 0.4 * rank / (width - 1)
    assert (kept == expected).all()


def _bits(keys: Tensor, count: int) -> NDArray[np.int64]:
    return random_bits(keys[None], count).numpy().astype(np.int64).reshape(-1) & 0xFFFFFFFF


def test_what_is_left_of_a_block_is_not_sorted() -> None:
    values = torch.tensor([[[3.0, 1.0, 2.0, 0.0, 9.0, 8.0, 7.0]]])
    assert sort_rows(values, 2).tolist() == [[[1.0, 3.0, 0.0, 2.0, 8.0, 9.0, 7.0]]]
