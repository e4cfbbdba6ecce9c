"""What goes wrong in mergekit 0.1.5 and must not go wrong here: its defects of recipes, methods and architectures.

Numbers are those of the list this project was built from. Tested elsewhere, by name:

    2   config of a frankenmerge          tests/run/test_recipes.py: a frankenmerge stacks layers and its config says so
    4   found late                        tests/plan/test_recipe.py, test_plan.py: all before a tensor byte is read
    6   layer_range [0, -1]               test_recipes.py: impossible layer ranges are refused
    8   sources of the last slice         test_recipes.py: slices of several sources …
    9   a tied flag gone stale            tests/run/test_tied.py, and here
    17  quadratic in the tensors          tests/run/test_many_tensors.py, and here
    20  strings replaced everywhere       test_recipes.py: only models are replaced by stages
    22  filters with names of another age test_recipes.py, tests/run/test_experts.py: experts by either name
    26  Whisper does not load             tests/run/test_architectures.py
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

import streammerge
from streammerge.base.errors import OutputError, RecipeError, UserError
from streammerge.methods import METHODS
from streammerge.plan.names import stacks
from tests.models import SHAPES, make_models, make_tensors, save_model
from tests.run.test_architectures import architecture_of, load, make_base, run
from tests.scales import FORMS, save_scaled


def merge(tmp_path: Path, recipe: dict[str, Any], name: str = "out", **options: Any) -> dict[str, Tensor]:
    path = tmp_path / f"{name}.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    streammerge.merge(path, tmp_path / name, **{"compile": "off", "threads": 1, **options})
    return load_file(tmp_path / name / "model.safetensors")


def task_vectors(method: str, models: list[Path], **parameters: Any) -> dict[str, Any]:
    base, *others = map(str, models)
    return {"merge_method": method, "base_model": base, "models": [{"model": other} for other in others],
            "parameters": {"weight": 0.5, **parameters}}  # fmt: skip


def test_1_codes_are_merged_as_what_they_stand_for_or_refused(tmp_path: Path) -> None:
    """There their bytes are averaged and their scales dropped: garbage, with exit code 0."""
    name = "model.layers.0.mlp.up_proj.weight"
    weights = [make_tensors(seed, shapes={name: (128, 128)}, dtype=torch.float32) for seed in range(2)]
    for seed, own in enumerate(weights):
        save_scaled(tmp_path / f"m{seed}", own, FORMS["blocks"])
    recipe = {"merge_method": "linear", "parameters": {"weight": 0.5}, "dtype": "bfloat16",
              "models": [{"model": str(tmp_path / f"m{seed}")} for seed in range(2)]}  # fmt: skip
    merged = merge(tmp_path, recipe)
    assert set(merged) == {name}
    mean = (weights[0][name] + weights[1][name]) / 2
    assert (merged[name].float() - mean).norm() < 0.04 * mean.norm()
    save_model(tmp_path / "m1", {name: torch.zeros(128, 64, dtype=torch.uint8), f"{name}.absmax": torch.ones(256)})
    with pytest.raises(UserError, match=r"bitsandbytes \(4 bits\)"):
        merge(tmp_path, recipe, "refused")
    assert not (tmp_path / "refused").exists()


# Kinds of which mergekit has no table, or whose config has lists by layer; some have layers of several kinds.
STACKED = ["qwen2", "gemma3_text", "deepseek_v3", "olmoe", "gpt_oss", "mamba", "falcon_h1", "lfm2"]


@pytest.mark.filterwarnings("ignore")  # transformers' own
@pytest.mark.parametrize("name", STACKED)
def test_2_stacked_layers_of_any_architecture_load_with_their_number(tmp_path: Path, name: str) -> None:
    """There the old number stays where there is no table, and writing the config fails after the weights."""
    architecture = architecture_of(name)
    base = str(make_base(tmp_path, architecture))
    ranges = ([0, 2], [1, 2], [1, 2])
    slices = [{"sources": [{"model": base, "layer_range": layers}]} for layers in ranges]
    merged = merge(tmp_path, {"merge_method": "passthrough", "slices": slices})
    model, found = load(tmp_path / "out", architecture)
    assert not any(found[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), found
    assert model.config.num_hidden_layers == 4
    assert stacks(merged) == dict.fromkeys(architecture.stacks, 4)
    assert run(model, architecture).isfinite().all()


def test_5_the_donor_of_config_and_tokenizer_does_not_hang_on_a_hash(tmp_path: Path) -> None:
    models = make_models(tmp_path / "models", 2, shapes={"w": (4, 4)})
    for number, model in enumerate(models):
        (model / "tokenizer.json").write_text(json.dumps({"of": number}))
    recipe = tmp_path / "r.yaml"
    recipe.write_text(yaml.safe_dump({"merge_method": "linear", "parameters": {"weight": 1},
                                      "models": [{"model": str(model)} for model in models[1:]]}))  # fmt: skip
    for seed in range(4):
        out = tmp_path / str(seed)
        program = f"import streammerge; streammerge.merge({str(recipe)!r}, {str(out)!r}, compile='off')"
        environment = os.environ | {"PYTHONHASHSEED": str(seed)}
        subprocess.run([sys.executable, "-c", program], env=environment, check=True, capture_output=True)
        assert json.loads((out / "tokenizer.json").read_text()) == {"of": 1}


def test_7_a_gradient_at_lm_head_is_its_first_value_as_there(tmp_path: Path) -> None:
    shapes = {"model.layers.0.w": (4, 4), "model.layers.1.w": (4, 4), "lm_head.weight": (4, 4)}
    models = make_models(tmp_path / "models", 1, shapes=shapes)
    merged = merge(tmp_path, task_vectors("task_arithmetic", models, weight=[1.0, 0.0]))
    base, one = (load_file(path / "model.safetensors") for path in models)
    assert torch.equal(merged["lm_head.weight"], one["lm_head.weight"])
    assert torch.equal(merged["model.layers.1.w"], base["model.layers.1.w"])


@pytest.mark.filterwarnings("ignore")  # transformers' own
@pytest.mark.parametrize("name", ["gemma2", "cohere2", "lfm2", "mamba"])
def test_9_a_head_beside_a_tied_embedding_is_used_by_what_loads_it(tmp_path: Path, name: str) -> None:
    """There the flag of the tied model stays, and the head is thrown away; some kinds have no head in their table."""
    architecture = architecture_of(name)
    tied = make_base(tmp_path, architecture)
    untied = tmp_path / "untied"
    tensors = load_file(tied / "model.safetensors")
    assert architecture.embedding is not None
    embedding = tensors[architecture.embedding]
    save_model(untied, {**tensors, "lm_head.weight": -3 * embedding})
    config = json.loads((tied / "config.json").read_text())
    (untied / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    recipe = {"merge_method": "linear", "parameters": {"weight": 0.5},
              "models": [{"model": str(tied)}, {"model": str(untied)}]}  # fmt: skip
    merged = merge(tmp_path, recipe)
    assert torch.allclose(merged["lm_head.weight"], -embedding)
    model, found = load(tmp_path / "out", architecture)
    assert not any(found[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), found
    assert torch.equal(model.get_output_embeddings().weight, merged["lm_head.weight"])
    assert torch.equal(model.get_input_embeddings().weight, embedding)


def test_10_tensors_that_no_table_of_an_architecture_has_are_merged(tmp_path: Path) -> None:
    """There what a model holds beyond its table is dropped without a word."""
    shapes = {**SHAPES, "model.layers.0.self_attn.q_proj.bias": (64,), "model.layers.1.mlp.router.scale": (4,),
              "model.layers.0.mlp.experts.3.lora_like": (4, 4), "value_head.weight": (1, 64)}  # fmt: skip
    models = make_models(tmp_path / "models", 1, shapes=shapes)
    merged = merge(tmp_path, task_vectors("task_arithmetic", models, weight=1.0))
    assert merged.keys() == shapes.keys()
    assert all(torch.equal(merged[name], own) for name, own in load_file(models[1] / "model.safetensors").items())


def test_10_a_tensor_that_one_model_lacks_is_named_and_never_dropped(tmp_path: Path) -> None:
    models = make_models(tmp_path / "models", 1, shapes={"w": (4, 4)})
    tensors = load_file(models[1] / "model.safetensors")
    save_model(models[1], {**tensors, "q_proj.bias": torch.zeros(4)})
    notes: list[str] = []
    merged = merge(tmp_path, task_vectors("task_arithmetic", models), note=notes.append)
    assert torch.equal(merged["q_proj.bias"], torch.zeros(4))
    assert any("q_proj.bias is not in every model: copied from" in note for note in notes)
    save_model(models[1], {**tensors, "model.layers.0.q_proj.bias": torch.zeros(4)})
    save_model(models[0], {**load_file(models[0] / "model.safetensors"), "model.layers.0.w": torch.zeros(4)})
    with pytest.raises(RecipeError, match=r"tensor 'model.layers.0.q_proj.bias' is in .*m0 and not in .*base"):
        merge(tmp_path, task_vectors("task_arithmetic", models))


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.base == "required"])
def test_11_every_method_writes_the_dtype_that_was_asked_for(tmp_path: Path, name: str) -> None:
    method = METHODS[name]
    count = max(method.min_models, 1)
    models = make_models(tmp_path / "models", count, shapes={"w": (16, 16)})
    values = {param.name: 0.4 for param in method.params if param.default is None and not param.optional}
    recipe = task_vectors(name, models, **values, density=0.5)
    merged = merge(tmp_path, {**recipe, "dtype": "bfloat16"})
    assert {tensor.dtype for tensor in merged.values()} == {torch.bfloat16}


def test_12_another_merge_into_a_finished_output_is_refused_and_leaves_it_whole(tmp_path: Path) -> None:
    models = make_models(tmp_path / "models", 1, shapes={"a": (300, 300), "b": (300, 300)})
    recipe = task_vectors("task_arithmetic", models)
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(recipe))
    streammerge.merge(path, tmp_path / "out", compile="off", out_shard_size="200KB")
    before = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    assert len([name for name in before if name.endswith(".safetensors")]) == 2
    path.write_text(yaml.safe_dump({**recipe, "parameters": {"weight": 0.25}}))
    with pytest.raises(OutputError):
        streammerge.merge(path, tmp_path / "out", compile="off")
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()} == before


@pytest.mark.parametrize("method", ["dare_ties", "ties"])
def test_15_rescaling_in_float16_does_not_overflow(tmp_path: Path, method: str) -> None:
    # Σ|Δ| is far beyond 65,504, the largest float16.
    base = {"w": torch.zeros(1000, 1000, dtype=torch.float16)}
    model = {"w": torch.full((1000, 1000), 0.5, dtype=torch.float16)}
    models = [save_model(tmp_path / "base", base), save_model(tmp_path / "one", model)]
    merged = merge(tmp_path, task_vectors(method, models, weight=1.0, density=0.5, rescale=True))
    assert torch.isfinite(merged["w"]).all()
    assert abs(float(merged["w"].double().abs().sum()) / 500_000 - 1) < 1e-3


def test_17_planning_is_linear_in_the_number_of_tensors(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    looked_up: list[int] = []
    for count in (1000, 4000):
        tensors = {f"model.layers.{i // 100}.mlp.experts.{i % 100}.w1.weight": torch.zeros(1) for i in range(count)}
        models = [save_model(tmp_path / f"{name}{count}", tensors) for name in ("a", "b")]
        recipe.write_text(yaml.safe_dump({"merge_method": "linear", "models": [{"model": str(m)} for m in models],
                                          "parameters": {"weight": [0.5, 1.0]}}))  # fmt: skip
        calls = 0

        def count_calls(frame: object, event: str, argument: object) -> None:
            nonlocal calls
            calls += event == "call"

        sys.setprofile(count_calls)
        try:
            streammerge.make_plan(recipe)
        finally:
            sys.setprofile(None)
        looked_up.append(calls)
    assert looked_up[1] < 5 * looked_up[0]


def test_22_a_filter_that_matches_nothing_is_a_warning_with_the_nearest_name(tmp_path: Path) -> None:
    models = make_models(tmp_path / "models", 1, shapes={"model.layers.0.self_attn.w": (4, 4)})
    recipe = task_vectors("task_arithmetic", models, weight=[{"filter": "self_atn", "value": 1.0}, {"value": 0.5}])
    notes: list[str] = []
    merge(tmp_path, recipe, note=notes.append)
    assert any("the filter 'self_atn' matches no tensor. Did you mean self_attn?" in note for note in notes)
    with pytest.raises(RecipeError, match="self_atn"):
        merge(tmp_path, recipe, "strict", strict=True)


def test_25_the_config_says_what_most_of_the_file_is(tmp_path: Path) -> None:
    base, one = make_models(tmp_path / "models", 1, shapes={"w": (64, 64)})
    wide = {name: tensor.float() for name, tensor in load_file(one / "model.safetensors").items()}
    save_file(wide, one / "model.safetensors", metadata={"format": "pt"})
    merged = merge(tmp_path, task_vectors("task_arithmetic", [base, one]))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert merged["w"].dtype == torch.float32
    assert config["torch_dtype"] == "float32"


def test_a_weight_sum_near_zero_is_reported_and_stops_nothing(tmp_path: Path) -> None:
    models = make_models(tmp_path / "models", 2, shapes={"w": (64, 64)})
    weighted = zip(models[1:], (1.0, -1.0), strict=True)
    sources = [{"model": str(model), "parameters": {"weight": weight}} for model, weight in weighted]
    recipe = {"merge_method": "linear", "models": sources}
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(recipe))
    report = streammerge.merge(path, tmp_path / "out", compile="off")
    assert report.nonfinite == {"w": (0, 64 * 64)}
    assert not np.isfinite(load_file(tmp_path / "out" / "model.safetensors")["w"].float().numpy()).any()


@pytest.mark.filterwarnings("ignore")  # transformers' own
def test_26_a_buffer_of_positions_that_only_one_bert_has_is_no_crash(tmp_path: Path) -> None:
    """There its entry in the table of BERT, optional and with another name, ends in a TypeError."""
    bert = architecture_of("bert")
    new = make_base(tmp_path, bert)
    old, positions = tmp_path / "old", torch.arange(64).view(1, 64)
    save_model(old, {**load_file(new / "model.safetensors"), "bert.embeddings.position_ids": positions})
    (old / "config.json").write_text((new / "config.json").read_text())
    recipe = {"merge_method": "linear", "parameters": {"weight": 0.5},
              "models": [{"model": str(new)}, {"model": str(old)}]}  # fmt: skip
    merged = merge(tmp_path, recipe)
    assert torch.equal(merged["bert.embeddings.position_ids"], positions)
    model, found = load(tmp_path / "out", bert)
    assert not found["missing_keys"]
    assert run(model, bert).isfinite().all()
