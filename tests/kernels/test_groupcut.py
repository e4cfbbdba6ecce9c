"""Cuts over many tensors keep what a sort of all their entries would: of a layer, or of a whole model."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from streammerge.kernels import groupcut
from streammerge.kernels.contract import BLOCK, Problem, Settings
from streammerge.kernels.cut import MAGNITUDES, kept
from streammerge.kernels.groupcut import group_cuts
from tests.kernels.looking import Memory
from tests.kernels.test_cut import kept as kept_by
from tests.methods.oracles import top

DENSITIES = [1e-9, 0.01, 0.3, 0.5, 0.9, 0.9999]


def survey(tensors: Sequence[Sequence[Tensor]], wanted: Collection[tuple[int, int]]) -> tuple[Any, int]:
    """The cuts of tensors, each given by its models' deltas; and how often the first one was looked at whole."""
    memories = [Memory([torch.zeros_like(deltas[0]), *deltas]) for deltas in tensors]
    problems = [Problem(deltas[0].numel(), len(deltas), Settings({}, {}), torch.float32) for deltas in tensors]
    surveying = group_cuts(problems, MAGNITUDES, wanted)
    answers: Any = None
    while True:
        try:
            looks = surveying.send(answers)
        except StopIteration as stop:
            return stop.value, memories[0].full_looks
        answers = [None if look is None else memory.answer(look) for look, memory in zip(looks, memories, strict=True)]


def assert_exact(tensors: Sequence[Sequence[Tensor]], densities: Sequence[Sequence[float]]) -> int:
    """All the densities of each column at once."""
    sizes = [deltas[0].numel() for deltas in tensors]
    wanted = {(column, kept(p, sum(sizes))) for column, some in enumerate(densities) for p in some}
    found, looks = survey(tensors, wanted)
    for column, some in enumerate(densities):
        everything = np.concatenate([deltas[column].abs().float().numpy() for deltas in tensors])
        for density in some:
            expected = np.split(top(everything, density), np.cumsum(sizes)[:-1])
            for deltas, cut, mask in zip(tensors, found[column, kept(density, sum(sizes))], expected, strict=True):
                here = kept_by(deltas[column].float(), cut)
                assert here.sum() == mask.sum(), (column, density)
                assert (here == mask).all(), (column, density)
    return looks


@settings(max_examples=50, deadline=None, derandomize=True, database=None)
@given(
    sizes=st.lists(st.sampled_from([1, 63, 1000, BLOCK, BLOCK + 1, 3 * BLOCK + 5]), min_size=1, max_size=5),
    palette=st.lists(st.sampled_from([0.0, -0.0, 1.0, -1.0, 1.5, 1e-3, 1e30, float("inf"), float("nan")]), min_size=1),
    densities=st.lists(st.floats(0, 1.1), min_size=1, max_size=2),
    seed=st.integers(0, 1000),
)
def test_few_distinct_values_are_cut_as_a_sort_of_all_would(
    sizes: list[int], palette: list[float], densities: list[float], seed: int
) -> None:
    rng = np.random.default_rng(seed)
    tensors = [[torch.tensor(rng.choice(palette, size), dtype=torch.float32) for _ in densities] for size in sizes]
    assert_exact(tensors, [[density] for density in densities])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("most", [1 << 17, 100])
def test_random_values_of_different_scales(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, most: int) -> None:
    monkeypatch.setattr(groupcut, "COLLECT_AT_MOST", most)
    generator = torch.Generator().manual_seed(0)
    tensors = [
        [(torch.randn(size, generator=generator) * scale).to(dtype) for _ in DENSITIES[:2]]
        for size, scale in ((5 * BLOCK + 3, 1.0), (2 * BLOCK, 0.1), (17, 5.0), (BLOCK // 2, 1.0))
    ]
    assert_exact(tensors, [(0.3, 0.15), (0.5, 1e-9, 0.9999, 1.0, 0.0)])


def test_counting_takes_few_looks_at_everything() -> None:
    generator = torch.Generator().manual_seed(1)
    tensors = [[torch.randn(20 * BLOCK, generator=generator)] for _ in range(4)]
    for density in DENSITIES:
        assert assert_exact(tensors, [(density,)]) <= 4


def test_many_columns_take_no_more_looks_than_one() -> None:
    generator = torch.Generator().manual_seed(2)
    tensors = [[torch.randn(3 * BLOCK, generator=generator) for _ in DENSITIES] for _ in range(4)]
    assert assert_exact(tensors, [(density,) for density in DENSITIES]) <= 4


def test_many_cuts_of_a_column_may_lie_in_one_tensor() -> None:
    generator = torch.Generator().manual_seed(3)
    large, small = torch.randn(3 * BLOCK, generator=generator), torch.zeros(BLOCK)
    assert_exact([[small], [large.bfloat16()], [small]], [(0.1, 0.2, 0.2001, 0.3, 0.4, 0.5)])
