"""The edges of every method: odd values, odd parameters, and numbers that are not finite.

What is tried depends on the parameters a method has, not on its name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from streammerge.kernels.contract import Method
from tests.methods.cases import (
    DTYPES,
    FORMS,
    Case,
    fits,
    make,
    make_case,
    merge,
    profiles,
    sees_rows,
    settings_of,
    takes,
    usual,
)
from tests.methods.closeness import assert_equals_oracle

every_method = pytest.mark.parametrize("name", FORMS)

NAN, INF = float("nan"), float("inf")

# Parameters, on ordinary tensors.
PARAMETERS: dict[str, dict[str, Any]] = {
    "density 0": {"density": 0.0},
    "density 1": {"density": 1.0},
    "density above 1": {"density": 2.5},
    "density that keeps one entry": {"density": 1e-9},
    "one dense model beside sparse ones": {"density": (1.0, 0.25, 0.5, 0.5)},
    "one empty model beside sparse ones": {"density": (0.0, 0.25, 0.5, 0.5)},
    "density with rescale": {"density": (0.2, 0.6, 0.4, 0.4), "rescale": True},
    "density 0 with rescale": {"density": 0.0, "rescale": True},
    "density that keeps one entry with rescale": {"density": 1e-9, "rescale": True},
    "all weights 0": {"weight": 0.0, "normalize": False},
    "all weights 0 and normalised": {"weight": 0.0, "normalize": True},
    "one weight 0": {"weight": (0.0, 0.8127, 0.0, 0.3)},
    "negative weights": {"weight": (1.7031, -0.6113, 0.4, 0.2)},
    "all weights negative": {"weight": (-0.7129, -0.4507, -0.3, -0.2)},
    "weights that sum to 0": {"weight": (1.0, -1.0, 0.5, -0.5), "normalize": False},
    "weights that sum to 0 and are normalised": {"weight": (1.0, -1.0, 0.5, -0.5), "normalize": True},
    # 1 - 2⁻¹⁰: the sum is exact in float32, too.
    "weights that nearly sum to 0": {"weight": (1.0, -0.9990234375, 0.0, 0.0), "normalize": True},
    "large weights": {"weight": (1e6, 2e6, 1e6, 1e6)},
    "select_topk 0": {"select_topk": 0.0},
    "select_topk 1": {"select_topk": 1.0},
    "select_topk above 1": {"select_topk": 1.5},
    "negative select_topk": {"select_topk": -0.5},
    "select_topk that keeps one entry": {"select_topk": 1.6e-5},
    "select_topk that keeps none": {"select_topk": 1e-9},
    "equal_below 0": {"equal_below": 0.0},
    "equal_below that many stay under": {"equal_below": 1.0},
    "gamma 0": {"gamma": 0.0},
    "gamma 1": {"gamma": 1.0},
    "gamma that leaves too few": {"gamma": 0.8, "density": 0.6},
    "gamma with rescale": {"gamma": 0.2, "rescale": True},
    "epsilon 0": {"epsilon": 0.0},
    "negative epsilon": {"epsilon": (-0.1, 0.15, -0.05, 0.05)},
    "lines_alpha 0": {"lines_alpha": 0.0},
    "negative lines_alpha": {"lines_alpha": -0.7717},
    "lambda 0": {"lambda": 0.0},
    "negative lambda": {"lambda": -1.2503},
    "t 0": {"t": 0.0},
    "t 1": {"t": 1.0},
    "t below 0": {"t": -0.5},
    "t above 1": {"t": 1.6},
    "scale 0": {"scale": 0.0},
    "scale 1": {"scale": 1.0},
    "scale 2": {"scale": 2.0},
    "negative scale": {"scale": -2.0},
    "weights that sum to 0, by default": {"weight": (1.0, -1.0, 0.5, -0.5)},
    "all weights 0, by default": {"weight": 0.0},
    "all weights 0 and not divided": {"weight": 0.0, "normalize_weights": False},
    "a log map with a negative weight": {"weight": (1.7031, -0.6113, 0.4, 0.2), "log_map": True},
    "large eps": {"eps": 0.5},
    "no iteration": {"max_iter": 0},
    "one iteration": {"max_iter": 1},
    "large tol": {"tol": 0.5},
    "small tol": {"tol": 1e-12},
    "t below 1e-6": {"t": 3e-7},
    "alpha 0": {"alpha": 0.0},
    "a consensus of one": {"consensus": 1},
    "a consensus of none": {"consensus": 0},
    "a consensus of more than there are": {"consensus": 9},
    "mask_lambda 0": {"mask_lambda": 0.0},
    "mask_lambda 1 and whole deltas": {"mask_lambda": 1.0, "weight": 1.0},
    "large mask_lambda": {"mask_lambda": 30.0},
    "decay 0": {"schedule": "ema", "decay": 0.0},
    "decay 1": {"schedule": "ema", "decay": 1.0},
    "a cosine decay": {"schedule": "wsd", "decay_shape": "cosine"},
    "a square root decay": {"schedule": "wsd", "decay_shape": "sqrt"},
}


def replaced(change: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Case], Case]:
    """Every model but the first input becomes `change(first input, itself)`."""

    def apply(case: Case) -> Case:
        first = case.inputs[0]
        if case.base is not None:
            return Case(case.label, first, tuple(change(first, model) for model in case.models), case.parameters)
        return Case(case.label, None, (first, *(change(first, model) for model in case.models[1:])), case.parameters)

    return apply


def everywhere(change: Callable[[Tensor], Tensor]) -> Callable[[Case], Case]:
    """Every input becomes `change(itself)`."""

    def apply(case: Case) -> Case:
        base = None if case.base is None else change(case.base)
        return Case(case.label, base, tuple(map(change, case.models)), case.parameters)

    return apply


def zero_first(case: Case) -> Case:
    """The base, or else the first model, is all zeros."""
    zeros = torch.zeros_like(case.inputs[0])
    if case.base is not None:
        return Case(case.label, zeros, case.models, case.parameters)
    return Case(case.label, None, (zeros, *case.models[1:]), case.parameters)


# Values, with the usual parameters.
VALUES: dict[str, Callable[[Case], Case]] = {
    "identical models": replaced(lambda first, model: first + 0.01),
    "models that are the base": replaced(lambda first, model: first.clone()),
    "zero models": replaced(lambda first, model: torch.zeros_like(model)),
    "zero base": zero_first,
    "all zeros": everywhere(torch.zeros_like),
    "negative zeros": everywhere(lambda tensor: -torch.zeros_like(tensor)),
    "parallel": replaced(lambda first, model: first * 2),
    "antiparallel": replaced(lambda first, model: -first),
    "nearly parallel": replaced(lambda first, model: first + (model - first) / 16),
    "cosine above 0.9995": replaced(lambda first, model: first + (model - first) * 0.49),
    "cosine below 0.9995": replaced(lambda first, model: first + (model - first) * 0.7),
    "unlike": replaced(lambda first, model: model.flip(0)),
    "shorter than 1e-8": everywhere(lambda tensor: tensor * 1e-12),
    "longer than 1e-8": everywhere(lambda tensor: tensor * 1e-7),
    "one short vector": replaced(lambda first, model: model * 1e-12),
    "denormal": everywhere(lambda tensor: tensor * 1e-37),
    "few distinct deltas": replaced(lambda first, model: first + ((model - first) * 1e3).round().clamp(-1, 1) / 1024),
    "one distinct delta": replaced(lambda first, model: first * 0 + 1),
    "large": everywhere(lambda tensor: tensor * 1e4),
}


# Methods that give back what all models agree on, by way of b + Σ c_i (x_i − b): where the models are nothing, that is
# the last bit of float32, which a bf16 shows and float32 tolerances allow for.
_AGREEING = ("nuslerp", "multislerp", "model_stock", "ram", "ramplus_tl")
_NOTHING = ("zero models", "one short vector")


def edge_cases(method: Method, dtype: torch.dtype) -> Iterator[Case]:
    for seed, (label, parameters) in enumerate(PARAMETERS.items()):
        if not fits(method, parameters):
            continue
        case = make_case(method, label, (66_000,), seed=seed, dtypes=(dtype,), **{**usual(method), **parameters})
        # What a method refuses is no case.
        if not method.check(settings_of(method, case)):
            yield case
    for seed, (label, change) in enumerate(VALUES.items()):
        cancels = method.base == "required" and method.name in _AGREEING and label in _NOTHING
        if cancels and dtype == torch.bfloat16:
            continue
        yield change(make_case(method, label, (66_000,), seed=100 + seed, dtypes=(dtype,), **usual(method)))
        for profile, parameters in profiles(method).items():
            if sees_rows(method, parameters):
                name = f"{profile} {label}"
                yield change(make_case(method, name, (67, 999), seed=200 + seed, dtypes=(dtype,), **parameters))


@every_method
@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
def test_edges_equal_the_oracle(tmp_path: Path, name: str, dtype: str) -> None:
    method = FORMS[name]
    assert_equals_oracle(tmp_path, method, list(edge_cases(method, DTYPES[dtype])))


def spoiled(case: Case) -> Case:
    """NaN and infinities in the first input and in the last, some of them at the same place."""
    shape = case.inputs[0].shape
    first, *others = (tensor.clone().reshape(-1) for tensor in case.inputs)
    last = others[-1] if others else first
    first[[5, 65_535]] = NAN
    first[[6, 8, 65_536]] = INF
    last[[7, 8]] = -INF
    last[9] = NAN
    inputs = [tensor.reshape(shape) for tensor in (first, *others)]
    return Case(case.label, None if case.base is None else inputs.pop(0), tuple(inputs), case.parameters)


@every_method
@pytest.mark.parametrize("dtype", ["F32", "BF16", "F64"])
def test_numbers_that_are_not_finite_are_counted_and_stop_nothing(tmp_path: Path, name: str, dtype: str) -> None:
    method = FORMS[name]
    unscaled = {"rescale": False} if takes(method, "rescale") else {}
    cases = [
        spoiled(make_case(method, "spoiled", (66_000,), seed=1, dtypes=(DTYPES[dtype],), **usual(method), **unscaled)),
        spoiled(make_case(method, "spoiled and rescaled", (66_000,), seed=2, dtypes=(DTYPES[dtype],), **usual(method))),
        make_case(method, "sound", (66_000,), seed=3, dtypes=(DTYPES[dtype],), **usual(method)),
    ]
    for profile, parameters in profiles(method).items():
        if sees_rows(method, parameters):
            cases.append(spoiled(make_case(method, profile, (67, 999), seed=4, dtypes=(DTYPES[dtype],), **parameters)))
    # Compares the report with counts over inputs and result.
    assert_equals_oracle(tmp_path, method, cases)


def test_nan_in_a_copied_tensor_is_counted(tmp_path: Path) -> None:
    method = FORMS["passthrough"]
    made = make(tmp_path, method, [spoiled(make_case(method, "spoiled", (66_000,), seed=1))])
    report, _ = merge(made, tmp_path / "out")
    assert list(report.nonfinite.values()) == [(7, 7)]


@every_method
def test_results_too_large_for_their_dtype_are_counted(tmp_path: Path, name: str) -> None:
    method = FORMS[name]
    case = make_case(method, "large", (66_000,), seed=1, dtypes=(torch.float32,))
    made = make(tmp_path, method, [everywhere(lambda tensor: tensor * 1e6)(case)], out_dtype="float16")
    report, merged = merge(made, tmp_path / "out")
    (tensor,) = merged.values()
    infinite = int(torch.isinf(tensor).sum())
    assert 0 < infinite < 66_000
    assert list(report.nonfinite.values()) == [(0, infinite)]


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_a_tiny_density_changes_exactly_one_element(tmp_path: Path, dtype: str) -> None:
    method = FORMS["ties"]
    case = make_case(method, "tiny", (200_000,), seed=1, models=1, dtypes=(DTYPES[dtype],), weight=1.0, density=1e-9)
    made = make(tmp_path, method, [case])
    _, merged = merge(made, tmp_path / "out")
    (tensor,) = merged.values()
    assert case.base is not None
    (changed,) = torch.nonzero(tensor != case.base).reshape(-1).tolist()
    assert changed == int((case.models[0].float() - case.base.float()).abs().argmax())
