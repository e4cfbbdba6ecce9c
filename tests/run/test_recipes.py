"""The recipe language from end to end: slices, modules, stages, single files; what comes out, byte by byte."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

import streammerge
from streammerge.base.errors import InputError, RecipeError
from streammerge.plan.recipe import load_recipe
from tests.models import make_models, make_tensors, save_model

LAYERS = 4
SHAPES: dict[str, tuple[int, ...]] = {
    "model.embed_tokens.weight": (40, 8),
    **{f"model.layers.{i}.{name}.weight": shape for i in range(LAYERS)
       for name, shape in (("mlp.up_proj", (300, 256)), ("self_attn.q_proj", (8, 8)), ("norm", (8,)))},
    "model.norm.weight": (8,),
    "lm_head.weight": (40, 8),
}  # fmt: skip


@pytest.fixture
def models(tmp_path: Path) -> list[Path]:
    paths = make_models(tmp_path / "models", 3, shapes=SHAPES)
    for number, path in enumerate(paths):
        text = {"num_hidden_layers": LAYERS, "layer_types": list("abcd")}
        types = [f"{number}{i}" for i in range(LAYERS)]
        config = {"num_hidden_layers": LAYERS, "layer_types": types, "ids": [1, 2, 3, 4], "text_config": text}
        (path / "config.json").write_text(json.dumps(config))
    return paths


def merge(tmp_path: Path, *documents: dict[str, Any], name: str = "out", **options: Any) -> dict[str, Tensor]:
    recipe = tmp_path / f"{name}.yaml"
    recipe.write_text(yaml.safe_dump_all(documents, sort_keys=False))
    streammerge.merge(recipe, tmp_path / name, **{"compile": "off", "threads": 1, **options})
    return load_file(tmp_path / name / "model.safetensors")


def problems(tmp_path: Path, *documents: dict[str, Any]) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        merge(tmp_path, *documents)
    return caught.value.problems


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return set(one) == set(other) and all(torch.equal(one[name], other[name]) for name in one)


def source(model: Path | str, first: int, stop: int, **parameters: Any) -> dict[str, Any]:
    return {"model": str(model), "layer_range": [first, stop], **({"parameters": parameters} if parameters else {})}


def stack(*sources: dict[str, Any], **top: Any) -> dict[str, Any]:
    return {"merge_method": "passthrough", "slices": [{"sources": [each]} for each in sources], **top}


# --- slices ----------------------------------------------------------------------------------------------------------


def test_a_frankenmerge_stacks_layers_and_its_config_says_so(tmp_path: Path, models: list[Path]) -> None:
    base, one, *_ = models
    merged = merge(tmp_path, stack(source(base, 0, 3), source(one, 1, 4)))
    a, b = (load_file(path / "model.safetensors") for path in (base, one))
    for layer, (model, index) in enumerate([(a, 0), (a, 1), (a, 2), (b, 1), (b, 2), (b, 3)]):
        for part in ("mlp.up_proj", "self_attn.q_proj", "norm"):
            name = f"model.layers.{{}}.{part}.weight"
            assert torch.equal(merged[name.format(layer)], model[name.format(index)])
    # What comes before the layers is of the first slice, what comes after of the last.
    assert torch.equal(merged["model.embed_tokens.weight"], a["model.embed_tokens.weight"])
    assert torch.equal(merged["lm_head.weight"], b["lm_head.weight"])
    assert torch.equal(merged["model.norm.weight"], b["model.norm.weight"])
    assert len(merged) == 6 * 3 + 3
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_hidden_layers"] == config["text_config"]["num_hidden_layers"] == 6
    assert config["layer_types"] == ["00", "01", "02", "11", "12", "13"]
    assert config["text_config"]["layer_types"] == list("abcbcd")
    assert config["ids"] == [1, 2, 3, 4]


def test_slices_of_several_sources_merge_layer_by_layer_with_their_own_parameters(
    tmp_path: Path, models: list[Path]
) -> None:
    base, one, two, _ = models
    recipe = {
        "merge_method": "task_arithmetic", "base_model": str(base), "parameters": {"weight": 0.25},
        "slices": [
            {"sources": [source(base, 0, 2), source(one, 0, 2, weight=[0.5, 1.0])]},
            # Another number of sources, layers of another place, and parameters of the slice.
            {"sources": [source(base, 1, 3), source(one, 2, 4), source(two, 0, 2)], "parameters": {"lambda": 2.0}},
        ],
    }  # fmt: skip
    merged = merge(tmp_path, recipe)
    x, a, b = ({k: v.float() for k, v in load_file(path / "model.safetensors").items()} for path in models[:3])
    name = "model.layers.{}.mlp.up_proj.weight"
    at = [name.format(i) for i in range(4)]
    assert_near(merged[at[0]], x[at[0]] + 0.5 * (a[at[0]] - x[at[0]]))
    assert_near(merged[at[1]], x[at[1]] + 1.0 * (a[at[1]] - x[at[1]]))
    for i in range(2):
        lent = x[at[1 + i]]
        assert_near(merged[at[2 + i]], lent + 2 * 0.25 * ((a[at[2 + i]] - lent) + (b[at[i]] - lent)))
    # mergekit takes as many sources for what comes after the layers as the first slice has; here all of the last count.
    head = "lm_head.weight"
    assert_near(merged[head], x[head] + 2 * 0.25 * ((a[head] - x[head]) + (b[head] - x[head])))
    # Before the layers it is the first slice, and a gradient has its first value.
    embed = "model.embed_tokens.weight"
    assert_near(merged[embed], x[embed] + 0.5 * (a[embed] - x[embed]))


def test_filters_of_a_model_go_by_its_own_layers_and_shared_ones_by_the_output(
    tmp_path: Path, models: list[Path]
) -> None:
    _, one, two, _ = models
    weight = [{"filter": "layers.2.", "value": 1.0}, {"value": 0.0}]
    recipe = {
        "merge_method": "linear", "parameters": {"normalize": False, "weight": 1.0},
        "slices": [{"sources": [source(one, 2, 3, weight=weight), source(two, 0, 1, weight=0.0)]}],
    }  # fmt: skip
    merged = merge(tmp_path, recipe)
    a = load_file(one / "model.safetensors")
    assert torch.equal(merged["model.layers.0.mlp.up_proj.weight"], a["model.layers.2.mlp.up_proj.weight"])
    assert not merged["lm_head.weight"].any()


def assert_near(merged: Tensor, expected: Tensor) -> None:
    assert (merged.float() - expected).abs().max() <= expected.abs().max() * 2**-8


def test_a_whole_model_in_slices_is_the_whole_model(tmp_path: Path, models: list[Path]) -> None:
    base, one, *_ = models
    whole = {"merge_method": "ties", "base_model": str(base), "parameters": {"weight": 0.7, "density": 0.3},
             "models": [{"model": str(base)}, {"model": str(one)}]}  # fmt: skip
    sliced = {key: value for key, value in whole.items() if key != "models"}
    sliced["slices"] = [{"sources": [source(base, 0, LAYERS), source(one, 0, LAYERS)]}]
    assert equal(merge(tmp_path, whole, name="whole"), merge(tmp_path, sliced, name="sliced"))
    # The config is as it was, byte for byte, but for its dtype.
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("whole", "sliced")]
    assert configs[0] == configs[1]


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([0, -1], "holds no layers"), ([3, 1], "holds no layers"), ([2, 2], "holds no layers"),
        ([2, 5], "goes beyond its 4 layers"),
    ],
)  # fmt: skip
def test_impossible_layer_ranges_are_refused(
    tmp_path: Path, models: list[Path], layers: list[int], message: str
) -> None:
    (problem,) = problems(tmp_path, stack(source(models[0], *layers)))
    assert message in problem


def test_slices_that_do_not_fit_are_all_named(tmp_path: Path, models: list[Path]) -> None:
    base, one, two, _ = map(str, models)
    found = problems(tmp_path, {
        "merge_method": "ties", "base_model": base, "parameters": {"weight": 1},
        "slices": [
            {"sources": [source(base, 0, 2), source(one, 0, 3)]},
            {"sources": [source(one, 0, 1), source(two, 0, 1)]},
            {"sources": [source(base, 0, 1), {"model": one}]},
        ],
    })  # fmt: skip
    assert any("take 2 and 3 layers; all sources of a slice must have as many" in problem for problem in found)
    assert any("is not among the sources; list it, with its layer_range" in problem for problem in found)
    assert any("layer_range is missing" in problem for problem in found)


def test_models_and_slices_exclude_each_other(tmp_path: Path, models: list[Path]) -> None:
    recipe = stack(source(models[0], 0, 1), models=[{"model": str(models[0])}])
    assert any("models and slices exclude each other; keep one" in problem for problem in problems(tmp_path, recipe))


# --- modules ---------------------------------------------------------------------------------------------------------


def test_modules_merge_apart_and_what_none_names_is_copied(tmp_path: Path) -> None:
    shapes = {"vision_tower.blocks.0.w": (8, 8), "language_model.layers.0.w": (8, 8), "projector.w": (8, 8)}
    base, one = (str(path) for path in make_models(tmp_path / "models", 1, shapes=shapes))
    both = {"models": [{"model": base}, {"model": one}]}
    first = {"models": [{"model": base}, {"model": one, "parameters": {"weight": 0.0}}]}
    recipe = {
        "merge_method": "linear", "base_model": base,
        "modules": {
            "text_decoder": {**both, "parameters": {"weight": 0.5}},
            "vision_tower": {**first, "parameters": {"weight": [{"filter": "vision", "value": 3.0}]}},
        },
    }  # fmt: skip
    notes: list[str] = []
    merged = merge(tmp_path, recipe, note=notes.append)
    x, a = (load_file(Path(path) / "model.safetensors") for path in (base, one))
    name = "language_model.layers.0.w"
    assert_near(merged[name], (x[name].float() + a[name].float()) / 2)
    assert torch.equal(merged["vision_tower.blocks.0.w"], x["vision_tower.blocks.0.w"])
    assert torch.equal(merged["projector.w"], x["projector.w"])
    assert any("no module of the recipe has projector.w; copied from" in note for note in notes)


def test_an_unknown_module_is_refused_with_the_nearest_name(tmp_path: Path, models: list[Path]) -> None:
    both = {"models": [{"model": str(models[0])}, {"model": str(models[1])}]}
    recipe = {"merge_method": "linear", "parameters": {"weight": 1}, "modules": {"layer": both, "default": both}}
    (problem,) = problems(tmp_path, recipe)
    assert "belongs to 'layer'. Did you mean layers?" in problem


# --- stages ----------------------------------------------------------------------------------------------------------


def stages(models: list[Path]) -> list[dict[str, Any]]:
    """TIES of two models, DARE of that with a third, and a stack of the result: three methods of different passes."""
    base, one, two, three = map(str, models)
    return [
        {"name": "first", "merge_method": "ties", "base_model": base, "parameters": {"weight": 0.8, "density": 0.4},
         "models": [{"model": one}, {"model": two}], "dtype": "bfloat16"},
        {"name": "second", "merge_method": "slerp", "base_model": "first", "models": [{"model": three}],
         "parameters": {"t": 0.3}, "out_dtype": "float32"},
        {"merge_method": "ties", "base_model": base, "models": [{"model": "second"}, {"model": one}],
         "parameters": {"weight": [1.0, 0.5], "density": 0.5}, "dtype": "bfloat16"},
    ]  # fmt: skip


@pytest.mark.parametrize("tile_blocks", [1, 1000])
@pytest.mark.parametrize("stays", [True, False])
def test_stages_in_one_run_give_the_bytes_of_stages_one_by_one(
    tmp_path: Path, models: list[Path], monkeypatch: pytest.MonkeyPatch, tile_blocks: int, stays: bool
) -> None:
    first, second, last = stages(models)
    monkeypatch.setattr("streammerge.plan.budget._TILE_BLOCKS", tile_blocks)
    if not stays:
        monkeypatch.setattr("streammerge.plan.budget._SLOTS", 3)
        monkeypatch.setattr("streammerge.plan.budget._DEFAULT_ARENA", 0)
    together = merge(tmp_path, first, second, last, name="together", threads=2)
    for document in (first, second):
        name = document.pop("name")
        text = json.dumps(document).replace('"first"', json.dumps(str(tmp_path / "first")))
        merge(tmp_path, json.loads(text), name=name)
    text = json.dumps(last).replace('"second"', json.dumps(str(tmp_path / "second")))
    assert equal(merge(tmp_path, json.loads(text), name="apart"), together)


def test_the_order_of_documents_does_not_matter(tmp_path: Path, models: list[Path]) -> None:
    first, second, last = stages(models)
    one = merge(tmp_path, first, second, last, name="one")
    assert equal(one, merge(tmp_path, last, second, first, name="other"))


def test_a_stage_can_be_sliced_and_its_layers_are_known_to_the_config(tmp_path: Path, models: list[Path]) -> None:
    base, one, *_ = models
    tall = {"name": "tall", **stack(source(base, 0, 4), source(one, 2, 4))}
    merged = merge(tmp_path, tall, stack(source("tall", 4, 6), source("tall", 0, 1)))
    b = load_file(one / "model.safetensors")
    assert torch.equal(merged["model.layers.0.norm.weight"], b["model.layers.2.norm.weight"])
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_hidden_layers"] == 3
    assert config["layer_types"] == ["12", "13", "00"]


def test_chance_in_a_stage_is_another_than_in_the_last_one(tmp_path: Path, models: list[Path]) -> None:
    base, one, *_ = map(str, models)
    dare = {"merge_method": "dare_linear", "base_model": base, "models": [{"model": one}],
            "parameters": {"weight": 1.0, "density": 0.5, "rescale": False}}  # fmt: skip
    last = {**dare, "models": [{"model": "thin"}]}
    merged = merge(tmp_path, {"name": "thin", **dare}, last)
    x, a = (load_file(Path(path) / "model.safetensors") for path in (base, one))
    name = "model.layers.0.mlp.up_proj.weight"
    share = (merged[name] != x[name]).float().mean() / (a[name] != x[name]).float().mean()
    # A half of a half stays; with the same mask twice it would be a half.
    assert 0.23 < share < 0.27


def _needing(name: str | None, *needed: str) -> dict[str, Any]:
    named = {} if name is None else {"name": name}
    return {**named, "merge_method": "linear", "models": [{"model": model} for model in needed],
            "parameters": {"weight": 1}}  # fmt: skip


def test_documents_come_after_those_they_need_however_many(tmp_path: Path, models: list[Path]) -> None:
    chain = [_needing(f"s{i}", f"s{i - 1}" if i else str(models[0]), str(models[1])) for i in range(299)]
    recipe = tmp_path / "chain.yaml"
    recipe.write_text(yaml.safe_dump_all([_needing(None, "s298"), *reversed(chain)]))
    assert [stage.name for stage in load_recipe(recipe).stages] == [*(f"s{i}" for i in range(299)), None]
    assert problems(tmp_path, *chain, *chain) == ["598 documents; there may be 300"]


def test_documents_nobody_needs_and_circles_beside_the_output_are_refused(tmp_path: Path, models: list[Path]) -> None:
    output = _needing(None, str(models[0]))
    assert problems(tmp_path, _needing("a", str(models[0])), output) == [
        "no document uses a; take it out, or use it as a model"
    ]
    (circle,) = problems(tmp_path, _needing("a", "b"), _needing("b", "a"), output)
    assert circle.startswith(("the documents need each other in a circle: a needs b needs a;",
                              "the documents need each other in a circle: b needs a needs b;"))  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda first, last: first.update(name="other"), "several documents could be the output"),
        (lambda first, last: last.update(name="first"), "is given to two documents"),
        (lambda first, last: first.update(models=[{"model": "last"}]) or last.update(name="last"), "in a circle"),
    ],
    ids=["unused", "twice", "circle"],
)
def test_documents_that_do_not_fit_together_are_refused(
    tmp_path: Path, models: list[Path], change: Any, message: str
) -> None:
    first = {
        "name": "first",
        "merge_method": "linear",
        "models": [{"model": str(models[0])}],
        "parameters": {"weight": 1},
    }
    last = {"merge_method": "linear", "models": [{"model": "first"}], "parameters": {"weight": 1}}
    if message.startswith("several"):
        last["name"] = "last"
        last["models"] = [{"model": str(models[1])}]
    change(first, last)
    found = problems(tmp_path, first, last)
    assert any(message in problem for problem in found), found


def test_only_models_are_replaced_by_stages(tmp_path: Path, models: list[Path]) -> None:
    # mergekit-multi replaces every string, even merge_method.
    documents = [{"name": "linear", **stack(source(models[0], 0, 4))},
                 {"merge_method": "linear", "models": [{"model": "linear"}], "parameters": {"weight": 1}}]  # fmt: skip
    assert equal(merge(tmp_path, *documents), load_file(models[0] / "model.safetensors"))


# --- other files -----------------------------------------------------------------------------------------------------


def test_single_files_of_any_kind_merge_without_a_config(tmp_path: Path) -> None:
    shapes = {"unet.down_blocks.0.attn.to_q.lora_down.weight": (4, 64), "alpha": (), "vae.conv.weight": (8, 3, 3, 3)}
    base = make_tensors(0, shapes=shapes, dtype=torch.float16)
    files = []
    for i in range(2):
        tensors = make_tensors(i + 1, around=base, shapes=shapes, dtype=torch.float16)
        files.append(tmp_path / f"lora{i}.safetensors")
        save_file(tensors, files[i])
    recipe = {"merge_method": "linear", "models": [{"model": str(file)} for file in files], "parameters": {"weight": 1}}
    merged = merge(tmp_path, recipe)
    expected = [load_file(file) for file in files]
    for name in shapes:
        assert_near(merged[name], (expected[0][name].float() + expected[1][name].float()) / 2)
    assert not (tmp_path / "out" / "config.json").exists()


def test_mergekits_map_for_a_model_is_read(tmp_path: Path, models: list[Path]) -> None:
    entry = {"model": {"model": {"path": str(models[0]), "revision": None}, "lora": None}}
    merged = merge(tmp_path, {"merge_method": "passthrough", "models": [entry]})
    assert equal(merged, load_file(models[0] / "model.safetensors"))


def test_filters_may_use_the_names_of_transformers(tmp_path: Path) -> None:
    shapes = {f"model.layers.0.block_sparse_moe.experts.{i}.w{j}.weight": (8, 8) for i in range(2) for j in (1, 2, 3)}
    base, one = (str(path) for path in make_models(tmp_path / "models", 1, shapes=shapes))
    weight = [{"filter": "mlp.experts.gate_up_proj", "value": 0.0}, {"filter": "experts.1.w2", "value": 1.0},
              {"value": 0.0}]  # fmt: skip
    recipe = {"merge_method": "task_arithmetic", "base_model": base,
              "models": [{"model": one, "parameters": {"weight": weight}}]}  # fmt: skip
    merged = merge(tmp_path, recipe, strict=True)
    x, a = (load_file(Path(path) / "model.safetensors") for path in (base, one))
    for name in shapes:
        assert torch.equal(merged[name], (a if "experts.1.w2" in name else x)[name])


def test_a_stack_with_holes_in_it_is_still_copied_whole(tmp_path: Path) -> None:
    path = save_model(tmp_path / "m", make_tensors(0, shapes={"layers.0.w": (4,), "layers.7.w": (4,)}))
    merged = merge(tmp_path, {"merge_method": "passthrough", "models": [{"model": str(path)}]})
    assert set(merged) == {"layers.0.w", "layers.7.w"}


def test_models_of_other_architectures_are_merged_with_a_warning(tmp_path: Path, models: list[Path]) -> None:
    for path, name in zip(models, ("LlamaForCausalLM", "MistralForCausalLM"), strict=False):
        (path / "config.json").write_text(json.dumps({"architectures": [name]}))
    notes: list[str] = []
    recipe = {"merge_method": "linear", "models": [{"model": str(path)} for path in models[:2]],
              "parameters": {"weight": 1.0}}  # fmt: skip
    merge(tmp_path, recipe, note=notes.append)
    assert any("is LlamaForCausalLM" in note and "is MistralForCausalLM: merged because" in note for note in notes)


def test_everything_that_is_wrong_with_the_tensors_is_said_at_once(tmp_path: Path, models: list[Path]) -> None:
    base = load_file(models[0] / "model.safetensors")
    other = {**base, "ids": torch.arange(4, dtype=torch.int32)}
    save_model(models[0], {**base, "ids": torch.arange(4)})
    save_model(models[1], {**other, "model.norm.weight": torch.zeros(9)})
    recipe = {"merge_method": "linear", "models": [{"model": str(path)} for path in models[:2]],
              "parameters": {"normalize": "perhaps"}}  # fmt: skip
    found = " ".join(problems(tmp_path, recipe))
    for part in ("integers are copied", "linear needs weight of", "expected true or false, found 'perhaps'",
                 "model.norm.weight differs between inputs"):  # fmt: skip
        assert part in found


def test_all_models_that_are_not_there_are_named_at_once(tmp_path: Path) -> None:
    recipe = {"merge_method": "linear", "models": [{"model": "x"}, {"model": "y"}], "parameters": {"weight": 1}}
    with pytest.raises(InputError, match=r"(?s)model 'x' is not there.*model 'y' is not there") as caught:
        merge(tmp_path, recipe)
    assert caught.value.exit_code == 4


def test_slices_lose_nothing_that_only_one_model_has_outside_the_layers(tmp_path: Path, models: list[Path]) -> None:
    base, one, *_ = models
    tensors = load_file(base / "model.safetensors")
    save_model(base, {**tensors, "score.weight": torch.ones(2, 8)})
    for sources in ([[source(base, 0, 4), source(one, 0, 4)]], [[source(base, 0, 4)], [source(one, 1, 3)]],
                    [[source(one, 0, 4)], [source(base, 1, 2)], [source(one, 1, 3)]]):  # fmt: skip
        recipe = {"merge_method": "linear", "parameters": {"weight": 1},
                  "slices": [{"sources": each} for each in sources]}  # fmt: skip
        merged = merge(tmp_path, recipe)
        assert torch.equal(merged["score.weight"], torch.ones(2, 8))
        shutil.rmtree(tmp_path / "out")


def test_slices_of_a_tied_and_an_untied_model_have_the_head_of_the_last(tmp_path: Path, models: list[Path]) -> None:
    base, one, *_ = models
    tensors = load_file(one / "model.safetensors")
    save_model(one, {name: tensor for name, tensor in tensors.items() if "lm_head" not in name})
    recipe = {"merge_method": "passthrough",
              "slices": [{"sources": [source(base, 0, 4)]}, {"sources": [source(one, 1, 3)]}]}  # fmt: skip
    merged = merge(tmp_path, recipe)
    assert torch.equal(merged["lm_head.weight"], tensors["model.embed_tokens.weight"])


def test_modules_lose_no_tensor_that_only_one_model_has(tmp_path: Path, models: list[Path]) -> None:
    base, one, *_ = models
    tensors = load_file(one / "model.safetensors")
    save_model(one, {**tensors, "model.layers.0.q_proj.bias": torch.zeros(8)})
    both = {"models": [{"model": str(base)}, {"model": str(one)}]}
    recipe = {"merge_method": "linear", "parameters": {"weight": 1}, "modules": {"default": both}}
    assert "tensor 'model.layers.0.q_proj.bias' is in" in problems(tmp_path, recipe)[0]


def test_modules_may_be_sliced_from_a_model_with_more_layers_than_the_donor(tmp_path: Path, models: list[Path]) -> None:
    base = models[0]
    tall = dict(load_file(base / "model.safetensors"))
    for part in ("mlp.up_proj", "self_attn.q_proj", "norm"):
        tall[f"model.layers.4.{part}.weight"] = tall[f"model.layers.3.{part}.weight"] + 1
    path = save_model(tmp_path / "tall", tall)
    slices = [{"sources": [source(base, 0, 2)]}, {"sources": [source(path, 4, 5)]}]
    merged = merge(tmp_path, {"merge_method": "passthrough", "base_model": str(base),
                              "modules": {"default": {"slices": slices}}})  # fmt: skip
    assert torch.equal(merged["model.layers.2.norm.weight"], tall["model.layers.4.norm.weight"])


def test_tensors_of_no_module_get_the_dtype_of_the_recipe(tmp_path: Path) -> None:
    shapes = {"vision_tower.w": (8, 8), "language_model.layers.0.w": (8, 8)}
    base, one = (str(path) for path in make_models(tmp_path / "models", 1, shapes=shapes, dtype=torch.float32))
    recipe = {"merge_method": "linear", "parameters": {"weight": 1}, "dtype": "bfloat16",
              "modules": {"text_decoder": {"models": [{"model": base}, {"model": one}]}}}  # fmt: skip
    assert {tensor.dtype for tensor in merge(tmp_path, recipe).values()} == {torch.bfloat16}


def test_lists_of_the_numbers_of_layers_follow_the_layers(tmp_path: Path, models: list[Path]) -> None:
    base = models[0]
    (base / "config.json").write_text(json.dumps({"num_hidden_layers": LAYERS, "mlp_only_layers": [1, 2, 3]}))
    merge(tmp_path, stack(source(base, 2, 4), source(base, 0, 4)))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == {"num_hidden_layers": 6, "mlp_only_layers": [0, 1, 3, 4, 5], "dtype": "bfloat16"}


def test_a_source_whose_config_has_null_for_a_list_has_the_donors(tmp_path: Path, models: list[Path]) -> None:
    base, one = models[:2]
    config = {"num_hidden_layers": LAYERS, "layer_types": list("abcd"), "mlp_only_layers": [1, 3]}
    (base / "config.json").write_text(json.dumps({**config, "text_config": config}))
    null = {"num_hidden_layers": LAYERS, "layer_types": None, "mlp_only_layers": None, "text_config": None}
    (one / "config.json").write_text(json.dumps(null))
    merge(tmp_path, stack(source(base, 0, 4), source(one, 2, 4)))
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    expected = {"num_hidden_layers": 6, "layer_types": list("abcdcd"), "mlp_only_layers": [1, 3, 5]}
    assert written == {**expected, "text_config": expected, "dtype": "bfloat16"}


def test_layers_of_different_widths_are_a_warning(tmp_path: Path, models: list[Path]) -> None:
    tensors = load_file(models[1] / "model.safetensors")
    tensors |= {f"model.layers.{i}.norm.weight": torch.zeros(9) for i in range(LAYERS)}
    save_model(models[1], tensors)
    notes: list[str] = []
    merge(tmp_path, stack(source(models[0], 0, 2), source(models[1], 0, 2)), note=notes.append)
    assert any("different widths" in note for note in notes)


def test_a_name_of_the_billionth_layer_takes_no_memory_and_cannot_be_sliced(tmp_path: Path) -> None:
    path = save_model(tmp_path / "m", make_tensors(0, shapes={"layers.0.w": (4,), "layers.999999999.w": (4,)}))
    merged = merge(tmp_path, {"merge_method": "passthrough", "models": [{"model": str(path)}]})
    assert "layers.999999999.w" in merged
    (problem,) = problems(tmp_path, stack(source(path, 0, 999_999_999)))
    assert "no model has so many layers" in problem
