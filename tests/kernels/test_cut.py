"""Magnitude cuts keep exactly the entries that a stable sort would, whatever the values, in few looks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from streammerge.kernels import cut as cutting
from streammerge.kernels.contract import BLOCK, MOST_SIFTED, Problem, Settings, grain_of
from streammerge.kernels.cut import (
    COLLECT_AT_MOST,
    KEEP_ALL,
    KEEP_NONE,
    MAGNITUDES,
    Cut,
    cut_mask,
    magnitude,
    order_statistics,
)
from tests.kernels.looking import Memory, block_starts, in_blocks
from tests.methods.oracles import top

TEN_BLOCKS = 10 * BLOCK - 77
DENSITIES = [1e-9, 0.01, 0.3, 0.5, 0.9, 0.9999]


def find_cuts(
    deltas: Sequence[Tensor], densities: Sequence[float], base: Tensor | None = None, sifts: int = MOST_SIFTED
) -> tuple[list[Cut], Memory]:
    """The cuts of models that differ from `base` (or zero) by `deltas`, and the memory that was looked at."""
    base = torch.zeros_like(deltas[0]) if base is None else base
    models = [base + delta for delta in deltas]
    work = torch.float64 if base.dtype == torch.float64 else torch.float32
    memory = Memory([base, *models], work=work)
    problem = Problem(base.numel(), len(models), Settings({}, {}), work, sifts=sifts)
    wanted = [(i, cutting.kept(density, problem.elements)) for i, density in enumerate(densities)]
    return memory.solve(cutting.find_cuts(problem, MAGNITUDES, wanted)), memory


def kept(delta: Tensor, cut: Cut) -> NDArray[np.bool_]:
    """Which entries of a delta, in the work dtype, a cut keeps."""
    blocks = in_blocks(delta)
    mask = cut_mask(magnitude(blocks), block_starts(0, len(blocks)), torch.tensor(cut.threshold, dtype=delta.dtype),
                    torch.tensor(cut.last))  # fmt: skip
    return mask.reshape(-1)[: delta.numel()].numpy()


def assert_exact(values: Tensor, densities: Sequence[float]) -> Memory:
    """The cuts of `values`, one model for each density, keep the entries of a stable sort."""
    cuts, memory = find_cuts([values] * len(densities), densities)
    delta = values.to(memory.work)
    for density, cut in zip(densities, cuts, strict=True):
        expected = top(delta.abs().numpy(), density)
        found = kept(delta, cut)
        assert found.sum() == expected.sum(), f"density {density}"
        assert (found == expected).all(), f"density {density}"
    return memory


def normal(elements: int, seed: int = 0) -> NDArray[np.float64]:
    return np.random.default_rng(seed).normal(size=elements)


# --- exactly k, and which ones ---------------------------------------------------------------------------------------

PALETTE = [0.0, -0.0, 1.0, -1.0, 1.5, 1e-3, -1e-3, 2.0**-130, 1e-40, 1e30, float("inf"), float("-inf"), float("nan")]
SIZES = [1, 2, 63, 1000, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, 3 * BLOCK + 5]


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    palette=st.lists(st.sampled_from(PALETTE), min_size=1, max_size=5),
    elements=st.sampled_from(SIZES),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    densities=st.lists(st.floats(0, 1.2), min_size=1, max_size=3),
    seed=st.integers(0, 1000),
)
def test_few_distinct_values_are_cut_as_a_stable_sort_would(
    palette: list[float], elements: int, dtype: torch.dtype, densities: list[float], seed: int
) -> None:
    chosen = np.random.default_rng(seed).choice(palette, elements)
    assert_exact(torch.from_numpy(chosen).to(dtype), densities)


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(
    elements=st.sampled_from(SIZES),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    density=st.floats(0, 1),
    exponent=st.floats(-30, 30),
    odd=st.lists(st.sampled_from(PALETTE), max_size=8),
    seed=st.integers(0, 1000),
)
def test_many_distinct_values_are_cut_as_a_stable_sort_would(
    elements: int, dtype: torch.dtype, density: float, exponent: float, odd: list[float], seed: int
) -> None:
    values = normal(elements, seed) * 10**exponent
    for i, value in enumerate(odd):
        values[(i * 7919) % elements] = value
    assert_exact(torch.from_numpy(values).to(dtype), [density])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    "values",
    [
        pytest.param(np.zeros(TEN_BLOCKS), id="all zero"),
        pytest.param(np.full(TEN_BLOCKS, -0.25), id="all equal"),
        pytest.param(np.full(TEN_BLOCKS, np.nan), id="all NaN"),
        pytest.param(np.sort(np.abs(normal(TEN_BLOCKS))), id="ascending"),
        pytest.param(-np.sort(-np.abs(normal(TEN_BLOCKS))), id="descending"),
        pytest.param(np.where(np.arange(TEN_BLOCKS) < 2, 5.0, 1.0), id="two large ones first"),
        pytest.param(np.where(np.arange(TEN_BLOCKS) >= TEN_BLOCKS - 2, 5.0, 1.0), id="two large ones last"),
        pytest.param((np.arange(TEN_BLOCKS) % 7) * 2.0**-149, id="the seven smallest numbers"),
        pytest.param(np.where(np.arange(TEN_BLOCKS) % 3 == 0, np.inf, normal(TEN_BLOCKS)), id="a third infinite"),
        pytest.param(np.exp(np.random.default_rng(1).uniform(-80, 80, TEN_BLOCKS)), id="all magnitudes"),
    ],
)
def test_large_tensors_are_cut_as_a_stable_sort_would(values: NDArray[np.float64], dtype: torch.dtype) -> None:
    assert_exact(torch.from_numpy(values).to(dtype), [1e-9, 0.4, 0.9999])


def test_every_count_of_a_small_tensor_is_kept_exactly() -> None:
    values = torch.tensor([3.0, -3.0, 1.0, 0.0, -2.0, 2.0, 2.0, -0.0])
    order = [0, 1, 4, 5, 6, 2, 3, 7]
    for keep in range(1, 9):
        (cut,), _ = find_cuts([values], [keep / 8])
        assert np.flatnonzero(kept(values, cut)).tolist() == sorted(order[:keep])


def test_a_density_outside_its_range_keeps_all_or_nothing_without_a_look() -> None:
    cuts, memory = find_cuts([torch.ones(5)] * 4, [1.0, 7.0, 0.0, -1.0])
    assert cuts == [KEEP_ALL, KEEP_ALL, KEEP_NONE, KEEP_NONE]
    assert memory.answers == []
    infinite = torch.tensor([float("inf"), float("nan"), 1.0])
    assert kept(infinite, KEEP_ALL).all()
    assert not kept(infinite, KEEP_NONE).any()


def test_models_are_cut_each_for_itself() -> None:
    base = torch.from_numpy(normal(TEN_BLOCKS, 1)).to(torch.bfloat16)
    deltas = [torch.from_numpy(normal(TEN_BLOCKS, seed)).to(torch.bfloat16) for seed in (2, 3, 4)]
    densities = [0.2, 1.0, 0.6]
    cuts, memory = find_cuts(deltas, densities, base)
    for model, density, cut in zip(memory.inputs[1:], densities, cuts, strict=True):
        delta = model.float() - base.float()
        assert (kept(delta, cut) == top(delta.abs().numpy(), density)).all()


def test_ties_are_cut_inside_any_block() -> None:
    # All equal: the cut lies at an index alone, first, last or in the middle of a block.
    values = torch.ones(3 * BLOCK + 5)
    for keep in (1, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, 3 * BLOCK, 3 * BLOCK + 4):
        (cut,), _ = find_cuts([values], [(keep + 0.5) / len(values)])
        assert kept(values, cut).sum() == keep
        assert kept(values, cut)[:keep].all()


# --- how often all of a tensor is looked at --------------------------------------------------------------------------


def real_deltas(seed: int) -> Tensor:
    """What a fine-tune in bfloat16 gives: the difference of two stored models."""
    base = torch.from_numpy(normal(TEN_BLOCKS, 5) * 0.02).to(torch.bfloat16)
    model = (base.double() + torch.from_numpy(normal(TEN_BLOCKS, seed) * 1e-3)).to(torch.bfloat16)
    return model.float() - base.float()


@pytest.mark.parametrize("density", DENSITIES)
def test_one_look_finds_the_cut(density: float) -> None:
    assert assert_exact(real_deltas(6), [density]).full_looks == 1
    assert assert_exact(torch.from_numpy(normal(TEN_BLOCKS)).float(), [density]).full_looks == 1
    assert assert_exact(torch.from_numpy(normal(TEN_BLOCKS)), [density]).full_looks == 1


@pytest.mark.parametrize("deltas", [real_deltas(6), torch.from_numpy(normal(TEN_BLOCKS)).float()], ids=["bf16", "f32"])
def test_where_little_may_be_sifted_out_more_looks_find_the_same(deltas: Tensor) -> None:
    for density in DENSITIES:
        (most,), _ = find_cuts([deltas], [density])
        (none,), memory = find_cuts([deltas], [density], sifts=0)
        assert kept(deltas, most).tobytes() == kept(deltas, none).tobytes()
        assert memory.full_looks <= 3


def unseen(outside: Callable[[int], NDArray[np.float64]]) -> NDArray[np.float64]:
    """Small values where the sample looks, and others everywhere else: the worst that a sample can meet."""
    step = (TEN_BLOCKS - 1024) // 63
    sampled = np.zeros(TEN_BLOCKS, bool)
    for piece in range(64):
        sampled[piece * step : piece * step + 1024] = True
    return np.where(sampled, normal(TEN_BLOCKS) * 1e-3, outside(TEN_BLOCKS))


HOSTILE = {
    "large values unseen": unseen(lambda n: 1 + np.abs(normal(n, 1))),
    "nearly equal values unseen": unseen(lambda n: 1 + np.random.default_rng(2).integers(0, 1 << 20, n) / (1 << 23)),
    "most where the sample has the threshold": unseen(lambda n: 6.7e-4 + np.random.default_rng(2).random(n) * 1e-6),
    "small values unseen": 1 / (unseen(lambda n: 1 + np.abs(normal(n, 1))) + 1e-9),
}  # fmt: skip


# With 0.5 more lie where one of the samples has the threshold than there is room for.
@pytest.mark.parametrize("density", [1e-9, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_float32_values_are_cut_exactly_in_an_end_of_looks(name: str, density: float) -> None:
    assert assert_exact(torch.from_numpy(HOSTILE[name]).float(), [density]).full_looks <= 8


def test_hostile_float64_values_are_cut_exactly_in_an_end_of_looks() -> None:
    for values in HOSTILE.values():
        assert assert_exact(torch.from_numpy(values), [0.3]).full_looks <= 14


def test_little_is_fetched_beside_the_full_looks() -> None:
    memory = assert_exact(torch.from_numpy(normal(TEN_BLOCKS)).float(), [0.3])
    assert memory.elements_in_spans <= BLOCK + COLLECT_AT_MOST


@pytest.mark.parametrize("shape", [(1,), (4,), (70_001,), (300, 1001), (9, 70_000)])
@pytest.mark.parametrize("by_rows", [False, True])
def test_order_statistics_are_those_of_a_sort(shape: tuple[int, ...], by_rows: bool) -> None:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(4)).bfloat16().float()
    n = values.numel()
    grain = grain_of(shape, by_rows=by_rows)
    problem = Problem(n, 1, Settings({}, {}), torch.float32, grain)
    ranks = [0, (n - 1) // 4, (n - 1) // 2, 3 * (n - 1) // 4, n - 1]
    memory = Memory([torch.zeros(shape), values], grain=grain)
    quantity = replace(MAGNITUDES, searches=len(ranks), by_width=by_rows)
    sample = values.abs().reshape(1, -1)[:, ::61].numpy() if by_rows else None
    found = memory.solve(order_statistics(problem, quantity, ranks, sample=sample))
    assert found == values.abs().reshape(-1).sort().values[ranks].tolist()
    assert memory.full_looks <= 4
