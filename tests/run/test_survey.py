"""Parameters of a whole layer or model: surveys before the merge, exact, same bits for any tiles, kept for a resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

import streammerge
from streammerge.plan.names import layer_of
from streammerge.run import survey
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


def test_tiles_and_resumes_change_no_bit_of_a_survey(
    tmp_path: Path, models: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of(tmp_path, models, "metagpt")
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
