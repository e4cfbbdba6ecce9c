"""Parameters of a whole layer or model: surveys before the merge, exact, same bits for any tiles, kept for a resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

import streammerge
from streammerge.plan.names import layer_of
from streammerge.run import survey
from tests.methods.oracles import top
from tests.models import make_models

SHAPES: dict[str, tuple[int, ...]] = {
    "model.embed_tokens.weight": (1100, 64),
    **{f"model.layers.{i}.{name}.weight": shape for i in range(3)
       for name, shape in (("up", (2051, 64)), ("q", (64, 64)), ("norm", (64,)))},
    "model.norm.weight": (64,),
}  # fmt: skip


@pytest.fixture
def models(tmp_path: Path) -> list[Path]:
    return make_models(tmp_path / "models", 2, shapes=SHAPES, dtype=torch.float32)


def recipe_of(tmp_path: Path, models: list[Path], method: str, **parameters: Any) -> Path:
    base, *others = map(str, models)
    content = {"merge_method": method, "base_model": base, "models": [{"model": other} for other in others],
               "parameters": parameters}  # fmt: skip
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def merge(recipe: Path, out: Path, **options: Any) -> dict[str, Tensor]:
    streammerge.merge(recipe, out, **{"compile": "off", "threads": 2, **options})
    return load_file(out / "model.safetensors")


def tensors_of(models: list[Path]) -> list[dict[str, Tensor]]:
    return [{k: v.double() for k, v in load_file(path / "model.safetensors").items()} for path in models]


def group_of(name: str, scope: str) -> object:
    return "model" if scope == "model" else layer_of(name)


@pytest.mark.parametrize("scope", ["model", "layer"])
def test_coefficients_of_metagpt_are_of_the_whole_scope(tmp_path: Path, models: list[Path], scope: str) -> None:
    merged = merge(recipe_of(tmp_path, models, "metagpt", weight_scope=scope), tmp_path / "out")
    base, one, two = tensors_of(models)
    sums: dict[object, np.ndarray] = {}
    for name in SHAPES:
        squares = np.array([float(((other[name] - base[name]) ** 2).sum()) for other in (one, two)])
        sums[group_of(name, scope)] = sums.get(group_of(name, scope), 0) + squares
    for name in SHAPES:
        first, second = sums[group_of(name, scope)] / sums[group_of(name, scope)].sum()
        expected = base[name] + first * (one[name] - base[name]) + second * (two[name] - base[name])
        assert (merged[name].double() - expected).abs().max() <= 1e-6 * expected.abs().max()


def kept_entries(sizes: dict[str, np.ndarray], density: float, scope: str) -> dict[str, np.ndarray]:
    """Which entries are among the largest of their layer or model: size descending, then tensor name, then index."""
    found = {}
    for group in {group_of(name, scope) for name in sizes}:
        names = sorted(name for name in sizes if group_of(name, scope) == group)
        everything = np.concatenate([sizes[name].reshape(-1) for name in names])
        mask = top(everything, density)
        parts = np.split(mask, np.cumsum([sizes[name].size for name in names])[:-1])
        found |= {name: part.reshape(sizes[name].shape) for name, part in zip(names, parts, strict=True)}
    return found


@pytest.mark.parametrize("scope", ["model", "layer"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_largest_entries_are_of_the_whole_scope(tmp_path: Path, scope: str, dtype: torch.dtype) -> None:
    models = make_models(tmp_path / "models", 2, shapes=SHAPES, dtype=dtype)
    recipe = recipe_of(tmp_path, models, "localize_and_stitch", density=0.15, density_scope=scope, weight=1.0)
    merged = merge(recipe, tmp_path / "out")
    base, one, two = tensors_of(models)
    changed = [kept_entries({n: np.abs((m[n].float() - base[n].float()).numpy()) for n in SHAPES}, 0.15, scope)
               for m in (one, two)]  # fmt: skip
    for name, shape in SHAPES.items():
        total, count = np.zeros(shape), np.zeros(shape)
        for model, masks in zip((one, two), changed, strict=True):
            total += np.where(masks[name], (model[name] - base[name]).numpy(), 0)
            count += masks[name]
        expected = base[name].numpy() + total / np.maximum(count, 1)
        error = np.abs(merged[name].double().numpy() - expected).max()
        assert error <= (1e-7 if dtype == torch.float32 else 2**-8) * np.abs(expected).max(), name


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("ties", {"weight": 0.7, "density": 0.2}), ("breadcrumbs", {"weight": 0.7, "density": 0.2, "gamma": 0.02}),
        ("hi_merging", {"weight": 0.7, "density": 0.2}),
    ],
)  # fmt: skip
def test_a_scope_of_one_tensor_is_the_tensor(tmp_path: Path, method: str, parameters: dict[str, Any]) -> None:
    models = make_models(tmp_path / "models", 2, shapes={"model.layers.0.w": (300, 700)}, dtype=torch.float32)
    merged = [
        merge(recipe_of(tmp_path, models, method, **parameters, density_scope=scope), tmp_path / scope)
        for scope in ("tensor", "layer", "model")
    ]
    name = "model.layers.0.w"
    assert torch.equal(merged[0][name], merged[1][name])
    assert torch.equal(merged[0][name], merged[2][name])


def test_tensors_of_one_scope_may_have_densities_of_their_own(tmp_path: Path, models: list[Path]) -> None:
    density = [{"filter": "layers.1.", "value": 0.05}, {"filter": "embed", "value": 1.0}, {"value": 0.3}]
    recipe = recipe_of(tmp_path, models[:2], "localize_and_stitch", density=density, density_scope="model")
    merged = merge(recipe, tmp_path / "out")
    base, one = (load_file(path / "model.safetensors") for path in models[:2])
    sizes = {name: (one[name] - base[name]).abs().numpy() for name in SHAPES}
    thick, thin = (kept_entries(sizes, share, "model") for share in (0.3, 0.05))
    for name, size in sizes.items():
        expected = np.ones(size.shape) > 0 if "embed" in name else (thin if ".1." in name else thick)[name]
        assert ((merged[name] != base[name]).numpy() == (expected & (size > 0))).all(), name


@pytest.mark.parametrize("method", ["metagpt", "ties"])
def test_tiles_change_no_bit_of_a_survey(
    tmp_path: Path, models: list[Path], monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    recipe = recipe_of(
        tmp_path,
        models,
        method,
        **({"weight": 0.6, "density": 0.3, "density_scope": "model"} if method == "ties" else {}),
    )
    expected = merge(recipe, tmp_path / "out")
    monkeypatch.setattr("streammerge.plan.budget._TILE_BLOCKS", 1)
    monkeypatch.setattr("streammerge.plan.budget._SLOTS", 3)
    monkeypatch.setattr("streammerge.plan.budget._DEFAULT_ARENA", 0)
    found = merge(recipe, tmp_path / "tiles")
    assert all(torch.equal(found[name], expected[name]) for name in SHAPES)
    assert not (tmp_path / "tiles" / ".streammerge").exists()


def test_a_merge_that_goes_on_does_not_survey_again(
    tmp_path: Path, models: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of(tmp_path, models, "metagpt")
    expected = merge(recipe, tmp_path / "out")

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("streammerge.run.engine.Engine.run", stop)
        with pytest.raises(KeyboardInterrupt):
            merge(recipe, tmp_path / "again")
    asked: list[Any] = []
    ask = survey._survey_group
    monkeypatch.setattr(survey, "_survey_group", lambda *given: asked.append(given) or ask(*given))
    found = merge(recipe, tmp_path / "again")
    assert asked == []
    assert all(torch.equal(found[name], expected[name]) for name in SHAPES)


def test_the_plan_counts_what_a_survey_reads(tmp_path: Path, models: list[Path]) -> None:
    plan = streammerge.make_plan(recipe_of(tmp_path, models, "metagpt"))
    assert {tensor.survey_passes for tensor in plan.tensors} == {1}
    report = streammerge.merge(recipe_of(tmp_path, models, "metagpt"), tmp_path / "out", compile="off")
    assert report.read_bytes == 2 * sum(tensor.read_bytes for tensor in plan.tensors)


def test_float64_among_others_makes_all_of_a_scope_float64(tmp_path: Path) -> None:
    models = make_models(tmp_path / "models", 1, shapes=SHAPES, dtype=torch.float32)
    for path in models:
        tensors = load_file(path / "model.safetensors")
        tensors["model.layers.1.up.weight"] = tensors["model.layers.1.up.weight"].double()
        save_file(tensors, path / "model.safetensors")
    recipe = recipe_of(tmp_path, models, "localize_and_stitch", density=0.1)
    plan = streammerge.make_plan(recipe)
    assert {step.work for tensor in plan.tensors for step in tensor.steps} == {"F64"}
    merged = merge(recipe, tmp_path / "out")
    base, one = tensors_of(models)
    masks = kept_entries({name: (one[name] - base[name]).abs().numpy() for name in SHAPES}, 0.1, "model")
    for name, mask in masks.items():
        changed = (merged[name].double() != base[name]).numpy()
        assert not (changed & ~mask).any()
        assert changed.sum() >= 0.99 * mask.sum()


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("ties", {"weight": 0.6, "density": 0.3, "density_scope": "model"}), ("metagpt", {}),
        ("localize_and_stitch", {"density": 0.2, "density_scope": "layer"}),
    ],
)  # fmt: skip
def test_a_stage_sees_all_of_itself_whatever_the_output_uses(
    tmp_path: Path, models: list[Path], method: str, parameters: dict[str, Any]
) -> None:
    stage = yaml.safe_load(recipe_of(tmp_path, models, method, **parameters).read_text())
    whole = merge(tmp_path / "r.yaml", tmp_path / "A")
    # Scaled here and copied there: the stage is the first step of some tensors and the second of others.
    scale = {"scale": [{"filter": "up", "value": 0.9}]}
    scaled = {"name": "B", "merge_method": "passthrough",
              "models": [{"model": str(models[1]), "parameters": scale}]}  # fmt: skip
    sources = [{"model": model, "layer_range": [1, 3]} for model in ("B", "A")]
    last = {"merge_method": "linear", "slices": [{"sources": sources}],
            "parameters": {"weight": [{"filter": "q.", "value": 0.25}, {"value": 0.5}]}}  # fmt: skip
    path = tmp_path / "stages.yaml"
    path.write_text(yaml.safe_dump_all([{"name": "A", **stage}, scaled, last]))
    together = merge(path, tmp_path / "together")
    apart = yaml.safe_dump_all([scaled, last]).replace("model: A", f"model: {tmp_path / 'A'}")
    path.write_text(apart)
    expected = merge(path, tmp_path / "apart")
    assert set(whole) == set(SHAPES)
    assert all(torch.equal(together[name], expected[name]) for name in expected)
