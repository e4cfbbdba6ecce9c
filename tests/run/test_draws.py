"""`--rng mergekit`: DARE keeps the entries that mergekit 0.1.5 keeps for the same seed (scripts/compat asks mergekit).

What it does is done again here: one generator, tensors by name, models in order, a Bernoulli number per element.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

import streammerge
from streammerge.base.errors import RecipeError, UserError
from streammerge.run.draws import Draws
from tests.models import make_models

SHAPES: dict[str, tuple[int, ...]] = {
    "model.layers.10.w": (300, 700), "model.layers.2.w": (64, 64), "embed": (1100, 64), "norm": (64,), "scalar": (),
}  # fmt: skip
DENSITIES = (0.3, 0.66)


def recipe_of(folder: Path, models: list[Path], method: str = "dare_linear", **top: Any) -> Path:
    base, *others = map(str, models)
    sources = [
        {"model": other, "parameters": {"weight": 0.5, "density": density}}
        for other, density in zip(others, DENSITIES, strict=True)
    ]
    path = folder / "r.yaml"
    path.write_text(yaml.safe_dump({"merge_method": method, "base_model": base, "models": sources, **top}))
    return path


def merge(recipe: Path, out: Path, **options: Any) -> dict[str, Tensor]:
    streammerge.merge(recipe, out, **{"compile": "off", "rng": "mergekit", "device": "cpu", **options})
    return load_file(out / "model.safetensors")


def expected(models: list[Path], seed: int, dtype: torch.dtype) -> dict[str, Tensor]:
    base, *others = ({k: v.double() for k, v in load_file(path / "model.safetensors").items()} for path in models)
    torch.manual_seed(seed)
    merged = {}
    for name in sorted(SHAPES):
        merged[name] = base[name].clone()
        for other, density in zip(others, DENSITIES, strict=True):
            mask = torch.bernoulli(torch.full(SHAPES[name], density, dtype=dtype)).double()
            delta = other[name] - base[name]
            kept = delta * mask
            before, after = delta.abs().sum(), kept.abs().sum()
            merged[name] += 0.5 * kept * (before / after if min(before, after) >= 1e-7 else 1.0)
    return merged


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seed", [0, 17])
def test_the_entries_are_those_that_mergekit_keeps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, seed: int
) -> None:
    models = make_models(tmp_path / "models", 2, shapes=SHAPES, dtype=dtype)
    monkeypatch.setattr("streammerge.plan.budget._TILE_BLOCKS", 1)
    merged = merge(recipe_of(tmp_path, models), tmp_path / "out", seed=seed)
    for name, target in expected(models, seed, dtype).items():
        step = 1e-6 if dtype == torch.float32 else 2**-8
        assert (merged[name].double() - target).abs().max() <= step * target.abs().max(), name


def test_tiles_threads_and_a_resume_change_no_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = make_models(tmp_path / "models", 2, shapes=SHAPES)
    recipe = recipe_of(tmp_path, models, "dare_ties")
    whole = merge(recipe, tmp_path / "whole")
    monkeypatch.setattr("streammerge.plan.budget._TILE_BLOCKS", 1)
    monkeypatch.setattr("streammerge.plan.budget._SLOTS", 3)
    monkeypatch.setattr("streammerge.plan.budget._DEFAULT_ARENA", 0)
    tiles = merge(recipe, tmp_path / "tiles", threads=2)
    assert all(torch.equal(whole[name], tiles[name]) for name in SHAPES)

    seen: set[str] = set()
    tile = Draws.tile

    def stop_at_the_third(self: Draws, tensor: str, *given: int) -> Tensor:
        seen.add(tensor)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return tile(self, tensor, *given)

    with monkeypatch.context() as patch:
        patch.setattr(Draws, "tile", stop_at_the_third)
        with pytest.raises(KeyboardInterrupt):
            merge(recipe, tmp_path / "resumed")
    report = streammerge.merge(recipe, tmp_path / "resumed", compile="off", rng="mergekit", device="cpu")
    assert 0 < report.resumed < len(SHAPES)
    resumed = load_file(tmp_path / "resumed" / "model.safetensors")
    assert all(torch.equal(whole[name], resumed[name]) for name in SHAPES)


def test_a_dense_model_takes_no_numbers(tmp_path: Path) -> None:
    models = make_models(tmp_path / "models", 2, shapes=SHAPES)
    content = yaml.safe_load(recipe_of(tmp_path, models).read_text())
    content["models"][0]["parameters"]["density"] = 1.0
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(content))
    merged = merge(tmp_path / "r.yaml", tmp_path / "out")
    torch.manual_seed(0)
    name = min(SHAPES)
    base, one, two = (load_file(path / "model.safetensors")[name].double() for path in models)
    mask = torch.bernoulli(torch.full(SHAPES[name], 0.66, dtype=torch.bfloat16)).double()
    delta = two - base
    target = base + 0.5 * (one - base) + 0.5 * delta * mask * delta.abs().sum() / (delta * mask).abs().sum()
    assert (merged[name].double() - target).abs().max() <= 2**-8 * target.abs().max()


def test_it_is_another_plan_and_other_methods_are_refused(tmp_path: Path) -> None:
    models = make_models(tmp_path / "models", 2, shapes=SHAPES)
    recipe = recipe_of(tmp_path, models)
    merge(recipe, tmp_path / "out")
    assert streammerge.make_plan(recipe).digest not in (tmp_path / "out" / "streammerge.manifest.json").read_text()
    with pytest.raises(RecipeError, match="what DARE draws there, not what della does"):
        merge(recipe_of(tmp_path, models, "della", parameters={"epsilon": 0.1}), tmp_path / "della")


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_that_mergekit_has_not_is_refused(tmp_path: Path, seed: int) -> None:
    recipe = recipe_of(tmp_path, make_models(tmp_path / "models", 2, shapes=SHAPES))
    with pytest.raises(UserError, match="mergekit's are from 0 to 4294967295"):
        merge(recipe, tmp_path / "out", seed=seed)
    assert not (tmp_path / "out").exists()
