"""Masks that are kept from a look to the merging pass: the same bytes as those that are drawn again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import streammerge
from streammerge.plan.budget import Schedule, keeps
from streammerge.run.merge import Options, make_plan, schedule_for
from tests.models import make_models, read_tensors, write_recipe

# Rows that fill a block, that do not, one that is longer than a block, a vector, three dimensions, one element.
SHAPES = {
    "even.weight": (70, 2048),
    "odd.weight": (130, 1111),
    "odder.weight": (3, 7),
    "long.weight": (3, 70_001),
    "vector": (9000,),
    "three.weight": (5, 40, 64),
    "one": (1,),
}


@pytest.fixture
def recipe(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    method, dtype = request.param
    base, *models = make_models(tmp_path / "models", shapes=SHAPES, dtype=dtype)
    per_model = {"weight": 0.5, "density": 0.4, "epsilon": 0.1}
    return write_recipe(tmp_path / "r.yaml", method, models, base=base, per_model=per_model)


def schedule_of(recipe: Path) -> Schedule:
    return schedule_for(make_plan(recipe, Options()), Options())


@pytest.mark.parametrize(
    "recipe",
    [("della", torch.bfloat16), ("della_linear", torch.bfloat16), ("della", torch.float64)],
    indirect=True, ids=["della", "della_linear", "della, float64"],
)  # fmt: skip
@pytest.mark.parametrize("compiled", ["off", "on"])
def test_kept_masks_give_the_bytes_of_masks_that_are_drawn_again(
    recipe: Path, tmp_path: Path, compiled: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    # Of 16th parts of the budget, and of none; with tiles of one unit and of many.
    for share, tile_blocks in ((16, 64), (16, 1), (10**12, 64)):
        monkeypatch.setattr("streammerge.plan.budget._KEPT_SHARE", share)
        monkeypatch.setattr("streammerge.plan.budget._TILE_BLOCKS", tile_blocks)
        plan, schedule = make_plan(recipe, Options()), schedule_of(recipe)
        kept = {tensor.name for tensor in plan.tensors if tensor.kept_bytes and keeps(tensor, schedule)}
        # What has rows that are longer than a block is drawn again in any case.
        assert kept == (set(SHAPES) - {"long.weight"} if share == 16 else set())
        out = tmp_path / f"{share}-{tile_blocks}"
        streammerge.merge(recipe, out, compile=compiled, threads=2)
        found.append(read_tensors(out))
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("recipe", [("della", torch.bfloat16)], indirect=True)
def test_what_is_kept_is_in_the_budget(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    schedule = schedule_of(recipe)
    # A bit per element and model, in whole units.
    assert schedule.keep_bytes == max(tensor.kept_bytes for tensor in make_plan(recipe, Options()).tensors)
    assert schedule.keep_bytes == 3 * 2 * 65536 // 8
    monkeypatch.setattr("streammerge.plan.budget._KEPT_SHARE", 10**12)
    without = schedule_of(recipe)
    # Where the interpreter's own memory is taken off, which is measured each time.
    assert schedule.peak_bytes - schedule.baseline_bytes == (
        without.peak_bytes - without.baseline_bytes + 2 * schedule.keep_bytes
    )
