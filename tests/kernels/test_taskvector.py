"""What the task-vector methods share beyond the contract: LiNeS by depth, refusals, and what needs no looks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from streammerge.kernels.chance import stream_key
from streammerge.kernels.contract import Problem, Settings, grain_of
from streammerge.kernels.whole import merge_whole
from streammerge.methods import METHODS
from tests.kernels.test_whole import in_memory
from tests.methods.cases import flat, given_of, make_case, profiles, settings_of
from tests.methods.oracles import oracle

LINES = [name for name, method in METHODS.items() if any(param.name == "lines_beta" for param in method.params)]


def settings_for(name: str, depth: float = 0.0, **parameters: Any) -> Settings:
    method = METHODS[name]
    case = make_case(method, "any", (3,), seed=1, **parameters)
    return replace(settings_of(method, case), depth=depth)


@pytest.mark.parametrize("name", LINES)
def test_lines_grows_with_the_depth(name: str) -> None:
    method = METHODS[name]
    usual = {**profiles(method)["usual"], "lines_alpha": 0.3137, "lines_beta": 1.2711}
    case = make_case(method, "deep", (40, 50), seed=3, dtypes=(torch.float32,), **usual)
    settings = replace(settings_of(method, case), depth=0.7)
    assert method.by_depth(settings)
    merged = merge_whole(
        method, settings, [in_memory(tensor) for tensor in case.inputs], (40, 50), has_base=True, work=torch.float32,
        out=torch.float32, stream_keys=[stream_key(0, "w", i) for i in range(2)], find=lambda program, signature: None,
    )  # fmt: skip
    expected = oracle(name, replace(given_of(method, "w", case, out_dtype="F32"), depth=0.7)).values
    assert np.abs(flat(merged) - expected).max() < 1e-7


@pytest.mark.parametrize("name", LINES)
def test_without_lines_beta_depth_is_not_asked_for(name: str) -> None:
    assert not METHODS[name].by_depth(settings_for(name))


def test_what_lines_makes_of_a_copy() -> None:
    copies = METHODS["task_arithmetic"].copies
    alone = {"weight": (0.5, 0.0), "lines_alpha": 0.0, "lines_beta": 4.0}
    assert copies(settings_for("task_arithmetic", **alone)) == 0
    assert copies(settings_for("task_arithmetic", 0.5, **alone)) == 1
    assert copies(settings_for("task_arithmetic", 1.0, **alone)) is None
    copies = METHODS["localize_and_stitch"].copies
    grafted = {"density": (1.0, 0.0), "lines_alpha": 0.0, "lines_beta": 2.0}
    assert copies(settings_for("localize_and_stitch", **grafted)) == 0
    assert copies(settings_for("localize_and_stitch", 0.5, **grafted)) == 1
    assert copies(settings_for("localize_and_stitch", 1.0, **grafted)) is None
    assert METHODS["sce"].copies(settings_for("sce", lines_alpha=0.0)) == 0


@pytest.mark.parametrize("name", ["della", "della_linear"])
def test_probabilities_outside_0_and_1_are_refused_with_what_to_write(name: str) -> None:
    check = METHODS[name].check
    (problem,) = check(settings_for(name, density=(0.9, 0.5)))
    assert "from 0.75 to 1.05" in problem
    assert "below 0.1" in problem
    assert len(check(settings_for(name, density=0.1, epsilon=0.1))) == 2
    assert check(settings_for(name, density=(1.0, 0.2))) == []
    assert check(settings_for(name, density=(0.0, 0.85), epsilon=0.1)) == []


def test_a_gamma_that_is_no_share_is_refused() -> None:
    (problem,) = METHODS["breadcrumbs"].check(settings_for("breadcrumbs", gamma=(-0.1, 0.1)))
    assert "gamma -0.1" in problem


@pytest.mark.parametrize("name", ["dare_linear", "dare_ties", "della", "della_linear"])
def test_rescaled_by_density_nothing_is_looked_at(name: str) -> None:
    method = METHODS[name]
    settings = settings_for(name, density=0.5, rescale_by="density")
    assert method.looks(settings, True, 1) == ()
    assert method.passes(settings, True, 1) == 1
    assert method.passes(settings_for(name, density=0.5), True, 1) == 2
    assert list(method.measure(Problem(3, 2, settings, torch.float32, grain_of((3,), by_rows=True)))) == []


@pytest.mark.parametrize("name", ["della", "della_linear"])
def test_dense_models_are_not_run_by_rows(name: str) -> None:
    assert METHODS[name].by_rows(settings_for(name, density=(0.5, 1.0)))
    assert not METHODS[name].by_rows(settings_for(name, density=1.0))
