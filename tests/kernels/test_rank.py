"""Values by rank follow one total order, and the quick way to it equals the plain one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from streammerge.kernels.rank import by_rank

_GENERATOR = torch.Generator().manual_seed(3)
SIZES = {
    "random": torch.rand(7, 513, generator=_GENERATOR),
    "few distinct": torch.randint(0, 3, (5, 300), generator=_GENERATOR).float(),
    "all equal": torch.ones(3, 17),
    "zeros of both signs": torch.tensor([[0.0, -0.0, 1.0, -0.0, 0.0]]),
    "subnormal and infinite": torch.tensor([[1e-45, float("inf"), 0.0, 3e38, 1e-40, float("inf")]]),
    "one entry": torch.rand(9, 1, generator=_GENERATOR),
    "wider than a block": torch.rand(1, 70_000, generator=_GENERATOR),
}


def table(width: int) -> Tensor:
    return torch.arange(width, dtype=torch.int32) * 3


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_largest_comes_first_and_of_equal_ones_the_first(name: str, dtype: torch.dtype) -> None:
    sizes = SIZES[name].to(dtype)
    found = by_rank(sizes, table(sizes.shape[1])).numpy()
    for row, values in zip(sizes.numpy(), found, strict=True):
        order = np.argsort(-row, kind="stable")
        assert np.array_equal(values[order], np.arange(len(row)) * 3)


def test_a_table_of_one_value_needs_no_order() -> None:
    sizes = SIZES["random"]
    assert torch.equal(by_rank(sizes, torch.full((513,), 5)), torch.full((7, 513), 5))


def test_float32_is_ranked_without_a_stable_sort(monkeypatch: pytest.MonkeyPatch) -> None:
    # Which takes seven times as long (scripts/bench times della).
    sizes, values = SIZES["random"], table(513)
    expected = by_rank(sizes.double(), values)
    monkeypatch.delattr(torch, "sort")
    assert torch.equal(by_rank(sizes, values), expected)
