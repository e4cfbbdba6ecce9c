"""How near a merged tensor must be to its oracle, by its dtype.

F64, F32      1e-14 and 1e-6 of the largest magnitude, of inputs or result
BF16, F16     the oracle rounded once, but for one element in 500 that is one step off (the arithmetic is float32);
              and on average 1.02 times as far from the oracle as that rounding alone
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from streammerge.kernels.contract import Method
from tests.methods.cases import DTYPES, NAMES, Case, flat, given_of, make, merge
from tests.methods.oracles import Array, Expected, oracle, rounded

_TOLERANCE = {"F64": 1e-14, "F32": 1e-6, "BF16": 1e-6, "F16": 1e-6}
_STEPS_OFF = 1 / 500
_MEAN_ERROR = 1.02
# What an oracle leaves open must stay rare, or it judges nothing.
_CONTESTED = 0.02


def assert_equals_oracle(folder: Path, method: Method, cases: Sequence[Case], **top: str) -> dict[str, Tensor]:
    """Merge the cases, compare every tensor with its oracle and the report with the numbers that are not finite.

    `top` are keys of the recipe. Returns the merged tensors.
    """
    made = make(folder, method, cases, **top)
    report, merged = merge(made, folder / "out")
    assert set(merged) == set(made.cases)
    for name, case in made.cases.items():
        tensor = merged[name]
        assert tensor.shape == case.inputs[0].shape
        expected = oracle(method.name, given_of(method, name, case, out_dtype=NAMES[tensor.dtype]))
        assert _share_contested(expected) <= _CONTESTED
        assert_close(tensor, expected, case.inputs, f"{method.name}, {name}")
    assert report.nonfinite == nonfinite(made.cases, merged)
    return merged


def nonfinite(cases: Mapping[str, Case], merged: Mapping[str, Tensor]) -> dict[str, tuple[int, int]]:
    """What a report must say: per tensor that has any, the numbers not finite in its inputs and in its result."""
    counts = {
        name: (sum(_count(tensor) for tensor in case.inputs), _count(merged[name])) for name, case in cases.items()
    }
    return {name: count for name, count in counts.items() if any(count)}


def assert_close(merged: Tensor, expected: Expected, inputs: tuple[Tensor, ...], what: str) -> None:
    """Raise AssertionError, saying how far and where, unless `merged` is as near as its dtype allows."""
    dtype = NAMES[merged.dtype]
    values = flat(merged)
    assert values.shape == expected.values.shape, what
    target = nearer(values, expected)
    once = rounded(target, dtype)
    finite = np.isfinite(once)
    _assert_same(np.isnan(values), np.isnan(once), values, once, f"{what}: NaN elsewhere")
    infinite = ~finite & ~np.isnan(once)
    _assert_same(values[infinite], once[infinite], values[infinite], once[infinite], f"{what}: infinity elsewhere")
    if not finite.any():
        return
    values, target, once = values[finite], target[finite], once[finite]
    error = np.abs(values - target)
    largest = max(float(np.abs(target).max()), *(_largest(tensor) for tensor in inputs))
    if dtype in ("BF16", "F16"):
        steps = np.abs(_order(values, dtype) - _order(once, dtype))
        off = int((steps > 0).sum())
        assert off <= max(1, len(values) * _STEPS_OFF), f"{what}: {off} of {len(values)} elements are rounded otherwise"
        # Further off may be only what all but cancelled: its steps are smaller than what float32 can tell.
        error = np.where(steps <= 1, 0.0, error)
    worst = int(error.argmax())
    assert error[worst] <= _TOLERANCE[dtype] * largest, (
        f"{what}: element {worst} is {values[worst]!r}, expected {target[worst]!r}, "
        f"{error[worst] / max(largest, 1e-300):.1e} of the largest magnitude off"
    )
    # Of few elements, the one that may be off is more than a fiftieth of all rounding.
    if dtype in ("BF16", "F16") and len(values) >= 1000:
        mean, unavoidable = float(np.abs(values - target).mean()), float(np.abs(once - target).mean())
        assert mean <= _MEAN_ERROR * unavoidable, f"{what}: mean error {mean:.3e}, rounding alone {unavoidable:.3e}"


def _share_contested(expected: Expected) -> float:
    """The share of elements for which the oracle allows two outcomes."""
    same = (expected.values == expected.rival) | np.isnan(expected.values)
    return 1 - float(same.mean()) if len(same) else 0.0


def nearer(values: Array, expected: Expected) -> Array:
    """Of the outcomes an oracle allows, the one that each element of `values` took."""
    with np.errstate(invalid="ignore"):
        rival = np.abs(values - expected.rival) < np.abs(values - expected.values)
    return np.where(rival, expected.rival, expected.values)


def _largest(tensor: Tensor) -> float:
    values = np.abs(flat(tensor))
    values = values[np.isfinite(values)]
    return float(values.max()) if len(values) else 0.0


def _order(values: Array, dtype: str) -> NDArray[np.int64]:
    """Numbers of a 16-bit dtype as integers in their order, neighbours one apart."""
    stored = torch.from_numpy(values).to(DTYPES[dtype]).view(torch.int16).numpy().astype(np.int64)
    return np.where(stored < 0, -(stored & 0x7FFF), stored)


def _assert_same(found: np.ndarray, wanted: np.ndarray, values: Array, once: Array, what: str) -> None:
    differ = np.flatnonzero(found != wanted)
    assert len(differ) == 0, f"{what}: {len(differ)}, first {values[differ[:1]]} where {once[differ[:1]]} is expected"


def _count(tensor: Tensor) -> int:
    return int((~torch.isfinite(tensor)).sum())
