"""Recipes over models with experts: filters for one of them, for the router, for what is shared; models that differ."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

import streammerge
from streammerge.base.errors import RecipeError, ShapeMismatch
from tests.models import make_models, make_tensors, save_model

Shapes = dict[str, tuple[int, ...]]


def mixtral(experts: int = 4, layers: int = 2) -> Shapes:
    """As Mixtral is stored."""
    shapes: Shapes = {}
    for block in (f"model.layers.{layer}.block_sparse_moe" for layer in range(layers)):
        shapes[f"{block}.gate.weight"] = (experts, 8)
        shapes |= {f"{block}.experts.{i}.{w}.weight": (8, 8) for i in range(experts) for w in ("w1", "w2", "w3")}
    return shapes


def qwen(experts: int = 4, layers: int = 2) -> Shapes:
    """As Qwen's and DeepSeek's models are stored, with an expert that all share."""
    shapes: Shapes = {}
    for block in (f"model.layers.{layer}.mlp" for layer in range(layers)):
        shapes |= {f"{block}.gate.weight": (experts, 8), f"{block}.shared_expert_gate.weight": (1, 8)}
        for part in ("shared_expert", *(f"experts.{i}" for i in range(experts))):
            shapes |= {f"{block}.{part}.{w}_proj.weight": (8, 8) for w in ("gate", "up", "down")}
    return shapes


def fused(experts: int = 4, layers: int = 2) -> Shapes:
    """As gpt-oss is stored, and as transformers 5 has all of them in memory."""
    shapes: Shapes = {}
    for block in (f"model.layers.{layer}.mlp" for layer in range(layers)):
        shapes |= {f"{block}.router.weight": (experts, 8), f"{block}.experts.gate_up_proj": (experts, 16, 8),
                   f"{block}.experts.down_proj": (experts, 8, 8)}  # fmt: skip
    return shapes


def write(folder: Path, models: list[Path], weight: Any = 1.0) -> Path:
    base, *others = map(str, models)
    path = folder / "r.yaml"
    path.write_text(yaml.safe_dump({
        "merge_method": "task_arithmetic", "base_model": base, "models": [{"model": other} for other in others],
        "parameters": {"weight": weight},
    }))  # fmt: skip
    return path


def save(folder: Path, **models: Mapping[str, tuple[int, ...]]) -> list[Path]:
    """Checkpoints of these names with tensors of these shapes."""
    return [
        save_model(folder / name, make_tensors(seed, shapes=shapes))
        for seed, (name, shapes) in enumerate(models.items())
    ]


@pytest.mark.parametrize(
    ("shapes", "text", "meant"),
    [
        (mixtral(12), "experts.1.", "block_sparse_moe.experts.1."),
        (mixtral(), "experts.3.w2", "experts.3.w2"),
        (mixtral(), "block_sparse_moe.gate", "gate.weight"),
        (mixtral(), "mlp.gate.", "gate.weight"),
        (qwen(12), "experts.1.", "mlp.experts.1."),
        (qwen(), "experts.2.gate_proj", "experts.2.gate_proj"),
        (qwen(), "mlp.experts.", "mlp.experts."),
        (qwen(), "shared_expert.", "shared_expert."),
        (qwen(), "mlp.gate.", "mlp.gate."),
        (fused(), "mlp.experts.gate_up_proj", "experts.gate_up_proj"),
        (fused(), "router", "router"),
    ],
)
def test_a_filter_chooses_one_expert_or_the_router_or_what_is_shared(
    tmp_path: Path, shapes: Shapes, text: str, meant: str
) -> None:
    models = make_models(tmp_path / "models", 1, shapes=shapes)
    recipe = write(tmp_path, models, [{"filter": text, "value": 1.0}, {"value": 0.0}])
    streammerge.merge(recipe, tmp_path / "out", compile="off", strict=True)
    base, one, merged = (load_file(path / "model.safetensors") for path in (*models, tmp_path / "out"))
    assert any(meant in name for name in merged)
    assert not all(meant in name for name in merged)
    for name, tensor in merged.items():
        assert torch.equal(tensor, (one if meant in name else base)[name]), name


def test_one_expert_of_fused_ones_cannot_be_chosen_and_that_is_said(tmp_path: Path) -> None:
    models = make_models(tmp_path / "models", 1, shapes=fused())
    recipe = write(tmp_path, models, [{"filter": "experts.3.", "value": 1.0}, {"value": 0.0}])
    notes: list[str] = []
    streammerge.merge(recipe, tmp_path / "out", compile="off", note=notes.append)
    said = ("the filter 'experts.3.' matches no tensor. model.layers.0.mlp.experts.down_proj holds all experts of its "
            "layer, which have one set of parameters: no filter can tell them apart")  # fmt: skip
    assert [said in note for note in notes] == [True]
    with pytest.raises(RecipeError, match="no filter can tell them apart"):
        streammerge.merge(recipe, tmp_path / "strict", compile="off", strict=True)
    assert not (tmp_path / "strict").exists()


def problems(tmp_path: Path, models: list[Path]) -> list[str]:
    """What is said to be wrong, with the models' folder left out of it. Nothing is written."""
    with pytest.raises(RecipeError) as error:
        streammerge.merge(write(tmp_path, models), tmp_path / "out", compile="off")
    assert not (tmp_path / "out").exists()
    assert error.value.exit_code == 2
    return [problem.replace(f"{tmp_path}/", "") for problem in error.value.problems]


@pytest.mark.parametrize("shapes", [mixtral, qwen])
def test_experts_that_a_model_lacks_are_counted(tmp_path: Path, shapes: Any) -> None:
    whole = shapes(8, 5)
    first = min(name for name in whole if ".experts.6." in name and "layers.3" in name)
    some = {name: shape for name, shape in whole.items() if not any(f"layers.3.{block}.experts.{i}." in name
            for block in ("mlp", "block_sparse_moe") for i in (6, 7))}  # fmt: skip
    expected = [f"m2 has 6 experts in layer 3, base has 8: it lacks 6, 7 ({first})"]
    assert problems(tmp_path, save(tmp_path, base=whole, m2=some)) == expected
    # The other way round, in all layers, with routers of as many rows.
    found = problems(tmp_path, save(tmp_path, base=shapes(8, 300), m1=shapes(8, 300), m2=shapes(2, 300)))
    assert [problem.partition(": ")[0] for problem in found] == [
        "m2 has 2 experts in layer 0, base has 8", "m2 has 2 experts in layer 1, base has 8",
        "m2 has 2 experts in layer 2, base has 8", "and 297 more like these",
    ]  # fmt: skip
    assert "it lacks 2, 3, 4 and more" in found[0]
    assert problems(tmp_path, save(tmp_path, base=some, m2=whole))[0].startswith("base has 6 experts in layer 3, m2 ")


def test_what_is_missing_besides_experts_is_said_with_them(tmp_path: Path) -> None:
    some = {
        name: shape for name, shape in qwen().items() if "0.mlp.experts.1." not in name and "1.mlp.gate" not in name
    }
    counted, *others = problems(tmp_path, save(tmp_path, base=qwen(), m=some))
    assert counted.startswith("m has 3 experts in layer 0, base has 4: it lacks 1 (")
    assert others[0] == "tensor 'model.layers.1.mlp.gate.weight' is in base and not in m"
    assert len(others) == 2


def test_a_dense_model_beside_one_with_experts_has_none(tmp_path: Path) -> None:
    dense = {f"model.layers.{i}.mlp.up_proj.weight": (8, 8) for i in range(2)}
    found = problems(tmp_path, save(tmp_path, base=qwen(), dense=dense))
    assert found[0].startswith("dense has 0 experts in layer 0, base has 4")


def test_a_tower_of_experts_that_one_model_lacks_whole_is_copied_as_any_tower(tmp_path: Path) -> None:
    tower = {name.replace("model.", "audio."): shape for name, shape in qwen().items()}
    models = save(tmp_path, base={**qwen(), **tower}, one=qwen())
    notes: list[str] = []
    streammerge.merge(write(tmp_path, models), tmp_path / "out", compile="off", note=notes.append)
    assert any("not in every model: copied from" in note for note in notes)
    base, merged = (load_file(path / "model.safetensors") for path in (models[0], tmp_path / "out"))
    assert all(torch.equal(merged[name], base[name]) for name in tower)


@pytest.mark.parametrize("apart", [mixtral, qwen])
def test_fused_experts_beside_separate_ones_are_one_sentence(tmp_path: Path, apart: Any) -> None:
    (sentence,) = problems(tmp_path, save(tmp_path, base=apart(64, 40), one=fused(64, 40)))
    assert sentence.startswith("base has every expert in tensors of its own (model.layers.0.")
    assert "one all experts of a layer in one (model.layers.0.mlp.experts.gate_up_proj)" in sentence
    (sentence,) = problems(tmp_path, save(tmp_path, base=fused(), one=apart()))
    assert sentence.startswith("one has every expert in tensors of its own")


@pytest.mark.parametrize("shapes", [qwen, fused])
def test_routers_of_different_lengths_are_an_error_of_shapes_that_names_both(tmp_path: Path, shapes: Any) -> None:
    # With as many experts where they have tensors of their own: only the router says otherwise.
    other = {name: (6, *shape[1:]) if shape[0] == 4 else shape for name, shape in shapes().items()}
    models = save(tmp_path, base=shapes(), one=other)
    with pytest.raises(ShapeMismatch) as error:
        streammerge.merge(write(tmp_path, models), tmp_path / "out", compile="off")
    assert "[4, " in str(error.value)
    assert "[6, " in str(error.value)
    assert f"{models[0]}" in str(error.value)
    assert f"{models[1]}" in str(error.value)
    assert error.value.exit_code == 2
    assert not (tmp_path / "out").exists()
