"""From recipe and headers to a plan: parameters per tensor, dtypes, actions, refusals, and the digest."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import streammerge
from streammerge.api import make_plan as plan
from streammerge.base.errors import RecipeError, ShapeMismatch, UserError
from streammerge.plan.plan import Plan, build_plan
from streammerge.plan.recipe import parse_recipe
from streammerge.plan.tensor import TensorPlan
from streammerge.plan.view import Model
from streammerge.run.memory import usage
from tests.models import make_models, write_recipe
from tests.plan.headers import SPECS, Specs, alter, make_checkpoint, make_plan

ROOT = Path(__file__).resolve().parents[2]
LINEAR = "merge_method: linear\nmodels: [{{model: a, parameters: {{{a}}}}}, {{model: b, parameters: {{{b}}}}}]\n{top}\n"
TIES = """\
merge_method: ties
base_model: meta/base-8b
models:
  - model: acme/math-8b
    parameters: {weight: 0.5, density: 0.3}
  - model: acme/code
    parameters: {weight: 0.25, density: 1}
"""
COPY = "merge_method: passthrough\nmodels: [{model: a}]\n"


def linear(a: str = "weight: 1", b: str = "weight: 1", top: str = "") -> str:
    return LINEAR.format(a=a, b=b, top=top)


def weights(made: Plan) -> dict[str, tuple[Any, ...]]:
    return {name: settings.models["weight"] for name, settings in made.settings.items()}


def tensor_of(made: Plan, word: str) -> TensorPlan:
    return next(tensor for tensor in made.tensors if word in tensor.name)


def problems(text: str, *specs: Specs) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        make_plan(text, *(make_checkpoint(spec) for spec in specs))
    return caught.value.problems


# Parameters.


def test_a_gradient_is_spread_over_the_layers() -> None:
    found = weights(make_plan(linear("weight: [0, 1]", "weight: [1, 0, 1]")))
    for i, expected in enumerate([(0.0, 1.0), (0.5, 0.0), (1.0, 1.0)]):
        assert found[f"model.layers.{i}.mlp.up_proj.weight"] == expected
        assert found[f"model.layers.{i}.self_attn.q_proj.weight"] == expected


def test_lm_head_embeddings_and_norm_take_the_first_value_of_a_gradient() -> None:
    found = weights(make_plan(linear("weight: [0.25, 1]")))
    for name in ("lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"):
        assert found[name] == (0.25, 1.0)


def test_a_model_of_one_layer_takes_the_last_value() -> None:
    one = make_checkpoint({name: spec for name, spec in SPECS.items() if ".1." not in name and ".2." not in name})
    found = weights(make_plan(linear("weight: [0, 0.5, 1]"), one, one))
    assert found["model.layers.0.mlp.up_proj.weight"] == (1.0, 1.0)
    assert found["lm_head.weight"] == (0.0, 1.0)


def test_a_boolean_gradient_steps() -> None:
    made = make_plan(linear(top="parameters: {normalize: [true, false]}"))
    flags = {name: settings.shared["normalize"] for name, settings in made.settings.items()}
    assert [flags[f"model.layers.{i}.mlp.up_proj.weight"] for i in range(3)] == [True, True, False]
    assert flags["lm_head.weight"] is True


def test_text_that_is_a_number_is_interpolated_as_one() -> None:
    found = weights(make_plan(linear("weight: [1e-5, 3e-5]")))
    assert found["model.layers.1.mlp.up_proj.weight"][0] == pytest.approx(2e-5)


def test_the_model_comes_before_the_recipe_and_that_before_the_default() -> None:
    text = TIES.replace(", density: 0.3", "") + "parameters: {density: 0.7}\n"
    made = make_plan(text)
    assert made.settings[made.tensors[0].name].models["density"] == (0.7, 1.0)
    made = make_plan(TIES.replace(", density: 0.3", ""))
    assert made.settings[made.tensors[0].name].models["density"] == (1.0, 1.0)


def test_a_filter_that_does_not_match_leaves_the_choice_to_the_next_level() -> None:
    made = make_plan(linear("weight: [{filter: mlp, value: 0.5}]", "weight: 2",
                            "parameters: {weight: [{filter: self_attn, value: 7}, {value: 9}]}"))  # fmt: skip
    found = weights(made)
    assert found["model.layers.0.mlp.up_proj.weight"] == (0.5, 2.0)
    assert found["model.layers.0.self_attn.q_proj.weight"] == (7.0, 2.0)
    assert found["lm_head.weight"] == (9.0, 2.0)


def test_the_first_filter_that_matches_wins_within_a_level() -> None:
    found = weights(make_plan(linear("weight: [{filter: layers.1, value: 1}, {filter: mlp, value: 2}, {value: 3}]")))
    assert found["model.layers.1.mlp.up_proj.weight"][0] == 1
    assert found["model.layers.2.mlp.up_proj.weight"][0] == 2
    assert found["model.layers.2.self_attn.q_proj.weight"][0] == 3


def test_a_shared_parameter_under_a_model_has_no_effect() -> None:
    made = make_plan(linear("weight: 1, normalize: false"))
    assert made.settings[made.tensors[0].name].shared["normalize"] is True
    assert any("has no effect under one model" in warning for warning in made.recipe.warnings)


def test_a_missing_parameter_is_refused_with_method_model_and_tensor() -> None:
    assert problems(linear("")) == ["linear needs weight of a for lm_head.weight"]
    found = problems(linear("weight: [{filter: mlp, value: 1}]"))
    assert "linear needs weight of a for model.layers.1.self_attn.q_proj.weight" in found
    assert not any(".mlp." in problem for problem in found)


def test_values_of_the_wrong_type_are_all_named() -> None:
    found = " ".join(problems(linear("weight: foo", top="parameters: {normalize: 5}")))
    assert "weight: expected a number, found 'foo'" in found
    assert "normalize: expected true or false, found 5" in found


def test_many_problems_are_shortened() -> None:
    other = {f"model.layers.{i}.new.weight": ("BF16", (8,)) for i in range(40)}
    found = problems(linear(), SPECS, SPECS | other)
    assert len(found) <= 12
    assert any(problem.startswith("and ") and problem.endswith(" more") for problem in found)


# Dtypes and actions.


def one_dtype(text: str, *dtypes: str) -> TensorPlan:
    (tensor,) = make_plan(text, *(make_checkpoint({"w": (dtype, (4,))}) for dtype in dtypes)).tensors
    return tensor


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        (("BF16", "BF16"), "BF16"), (("BF16", "F16"), "F32"), (("F16", "BF16"), "F32"), (("BF16", "F32"), "F32"),
        (("F16", "F32"), "F32"), (("F32", "F64"), "F64"), (("BF16", "F64"), "F64"), (("F16", "F16"), "F16"),
    ],
)  # fmt: skip
def test_dtypes_of_the_inputs_are_promoted(dtypes: tuple[str, str], expected: str) -> None:
    tensor = one_dtype(linear(), *dtypes)
    assert tensor.dtype == expected
    assert tensor.steps[0].work == ("F64" if "F64" in dtypes else "F32")


def test_dtype_and_out_dtype_decide_the_output_in_that_order() -> None:
    assert one_dtype(linear(top="dtype: float16"), "BF16", "BF16").dtype == "F16"
    assert one_dtype(linear(top="dtype: float16\nout_dtype: float64"), "BF16", "BF16").dtype == "F64"
    assert one_dtype(linear(top="dtype: float64"), "BF16", "BF16").steps[0].work == "F64"


def test_every_tensor_is_promoted_for_itself() -> None:
    other = alter(SPECS, norm=("F32", (8,)))
    made = make_plan(linear(), make_checkpoint(), make_checkpoint(other))
    assert tensor_of(made, "norm").dtype == "F32"
    assert tensor_of(made, "lm_head").dtype == "BF16"


def checkpoints_of(tensor: TensorPlan) -> tuple[int, ...]:
    return tuple(read.checkpoint for read in tensor.reads)


@pytest.mark.parametrize("dtype", ["I64", "U8", "BOOL", "I32"])
def test_integers_are_copied_whatever_the_recipe_says(dtype: str) -> None:
    tensor = one_dtype(linear(top="dtype: float32"), dtype, dtype)
    assert (tensor.action, tensor.dtype) == ("equal", dtype)
    assert checkpoints_of(tensor) == (0, 1)
    tensor = one_dtype(COPY + "out_dtype: float32\n", dtype)
    assert (tensor.action, tensor.dtype, checkpoints_of(tensor)) == ("copy", dtype, (0,))


def test_integers_of_different_dtypes_are_refused() -> None:
    (problem,) = problems(linear(), {"w": ("I64", (4,))}, {"w": ("I32", (4,))})
    assert problem.startswith(
        "tensor 'w' is I64, I32 in the inputs: integers are copied, and only when every input has"
    )
    (problem,) = problems(linear(), {"w": ("I64", (4,))}, {"w": ("F32", (4,))})
    assert "integers are copied" in problem


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2", "F8_E8M0", "F4"])
def test_quantised_weights_are_refused_by_name_and_not_merged_as_numbers(dtype: str) -> None:
    with pytest.raises(UserError, match=f"w is stored as {dtype}"):
        make_plan(linear(), make_checkpoint({"w": (dtype, (4,))}), make_checkpoint({"w": ("BF16", (4,))}))


def test_all_tensors_of_unusable_dtypes_are_named_at_once() -> None:
    found = problems(linear(), {"a": ("I32", (4,)), "b": ("I64", ())}, {"a": ("F32", (4,)), "b": ("I32", ())})
    assert len(found) == 2


def test_what_needs_no_arithmetic_is_copied() -> None:
    assert one_dtype(COPY, "BF16").action == "copy"
    assert one_dtype(COPY + "dtype: float32\n", "BF16").action == "merge"
    tensor = one_dtype(linear("weight: 0", "weight: 1"), "BF16", "BF16")
    assert (tensor.action, checkpoints_of(tensor)) == ("copy", (1,))
    assert one_dtype(linear("weight: 0.5", "weight: 0.5"), "BF16", "BF16").action == "merge"
    zero = TIES.replace("0.5", "0").replace("0.25", "0")
    assert one_dtype(zero, "F16", "BF16", "F32").action == "merge"
    assert one_dtype(zero, "F16", "F16", "F16").action == "copy"


# Names and shapes that differ.


def test_a_missing_and_an_extra_tensor_of_a_layer_are_both_named_with_their_models() -> None:
    gate = {"model.layers.1.mlp.gate_proj.weight": ("BF16", (8,))}
    less = {name: spec for name, spec in SPECS.items() if name != "model.layers.2.mlp.up_proj.weight"}
    found = problems(linear(), SPECS, {**less, **gate})
    assert found[:2] == [
        "tensor 'model.layers.2.mlp.up_proj.weight' is in a and not in b",
        "tensor 'model.layers.1.mlp.gate_proj.weight' is in b and not in a",
    ]
    assert found[2] == "every model must hold the same tensors: are these models of one architecture?"


def test_models_without_a_layer_in_common_are_of_other_architectures() -> None:
    other = {name.replace("model.layers", "transformer.h"): spec for name, spec in SPECS.items()}
    found = problems(linear(), SPECS, other)
    assert any("are these models of one architecture?" in problem for problem in found)
    assert problems(linear(), {"a": ("BF16", (4,))}, {"b": ("BF16", (4,))})[:2] == [
        "tensor 'a' is in a and not in b",
        "tensor 'b' is in b and not in a",
    ]


def test_what_lies_outside_the_layers_and_is_in_some_models_is_merged_of_those_or_copied() -> None:
    extra = {"score.weight": ("BF16", (2, 8)), "v_head.bias": ("BF16", (8,))}
    one, three = {"score.weight": extra["score.weight"]}, extra
    more = "  - model: acme/more\n    parameters: {weight: 1, density: 1}\n"
    text = TIES.replace("  - model: acme/code\n", f"{more}  - model: acme/code\n")
    # base, math, more, code: the first two and the last have a score.
    made = make_plan(text, *(make_checkpoint({**SPECS, **own}) for own in (one, one, {}, three)))
    score, head = tensor_of(made, "score"), tensor_of(made, "v_head")
    assert (score.action, checkpoints_of(score)) == ("merge", (0, 1, 3))
    assert made.settings["score.weight"].models["weight"] == (0.5, 0.25)
    assert (head.action, checkpoints_of(head)) == ("copy", (3,))
    assert made.warnings == (
        "score.weight is not in every model: merged of meta/base-8b, acme/math-8b, acme/code only",
        "v_head.bias is not in every model: copied from acme/code",
    )


@pytest.mark.parametrize("scope", ["layer", "model"])
def test_a_survey_needs_every_tensor_in_every_model(scope: str) -> None:
    score = {"score.weight": ("BF16", (2, 8))}
    text = f"{TIES}parameters: {{density_scope: {scope}}}\n"
    with pytest.raises(RecipeError, match=r"'score.weight' is not in every model, and ties compares models"):
        make_plan(text, make_checkpoint(SPECS | score), make_checkpoint(SPECS | score), make_checkpoint())


def test_what_the_base_lacks_has_no_delta_and_is_copied() -> None:
    score = {"score.weight": ("BF16", (2, 8))}
    made = make_plan(TIES, make_checkpoint(), make_checkpoint(SPECS | score), make_checkpoint(SPECS | score))
    assert checkpoints_of(tensor_of(made, "score")) == (1,)
    slerp = "merge_method: slerp\nbase_model: a\nmodels: [{model: a}, {model: b}]\nparameters: {t: 0.5}\n"
    made = make_plan(slerp, make_checkpoint(SPECS | score), make_checkpoint())
    assert checkpoints_of(tensor_of(made, "score")) == (0,)


def test_a_stack_of_layers_that_only_one_model_has_is_copied() -> None:
    tower = {f"visual.blocks.{i}.w": ("BF16", (4,)) for i in range(3)}
    made = make_plan(linear(), make_checkpoint(SPECS | tower), make_checkpoint())
    assert checkpoints_of(tensor_of(made, "visual.blocks.2")) == (0,)
    assert made.warnings == (
        "visual.blocks.0.w, visual.blocks.1.w, visual.blocks.2.w are not in every model: copied from a",
    )


def test_buffers_that_older_programs_saved_are_copied() -> None:
    buffers = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": ("F32", (4,)) for i in range(3)}
    made = make_plan(TIES, make_checkpoint(), make_checkpoint(SPECS | buffers), make_checkpoint())
    assert checkpoints_of(tensor_of(made, "layers.1.self_attn.rotary_emb")) == (1,)


def test_strict_makes_an_error_of_a_tensor_that_is_not_in_every_model() -> None:
    recipe = parse_recipe(linear(), Path("r.yaml"))
    found = (make_checkpoint(SPECS | {"x": ("BF16", (4,))}), make_checkpoint())
    with pytest.raises(RecipeError, match="x is not in every model"):
        build_plan(recipe, [Model("a", 0), Model("b", 1)], found, seed=0, shard_bytes=1 << 30, strict=True)


# A model whose head is its embedding.


def tied(text: str, *models: tuple[Specs, bool | None]) -> Plan:
    recipe = parse_recipe(text, Path("recipe.yaml"))
    found = [Model(name, i, tied=flag) for i, (name, (_, flag)) in enumerate(zip(recipe.inputs, models, strict=True))]
    checkpoints = [make_checkpoint(specs) for specs, _ in models]
    return build_plan(recipe, found, checkpoints, seed=0, shard_bytes=1 << 30)


def sources_of(tensor: TensorPlan) -> list[tuple[int, str]]:
    return [(read.checkpoint, read.spec.name) for read in tensor.reads]


HEADLESS = alter(SPECS, lm_head=None)
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


@pytest.mark.parametrize("flag", [True, None])
def test_a_tied_models_head_is_its_embedding(flag: bool | None) -> None:
    made = tied(linear(), (HEADLESS, flag), (SPECS, False))
    assert sources_of(tensor_of(made, "lm_head")) == [(0, EMBEDDING), (1, HEAD)]
    assert not made.tied
    assert made.warnings == ()


def test_a_head_that_is_stored_although_the_config_says_tied_does_not_count() -> None:
    made = tied(linear(), (SPECS, True), (SPECS, False))
    assert sources_of(tensor_of(made, "lm_head")) == [(0, EMBEDDING), (1, HEAD)]


def test_of_tied_models_head_and_embedding_stay_one() -> None:
    text = LINEAR.replace("linear", "dare_linear").replace("models:", "base_model: c\nmodels:")
    made = tied(text.format(a="weight: 1, density: 0.5", b="weight: 1, density: 0.5", top=""),
                (SPECS, True), (HEADLESS, True), (HEADLESS, None))  # fmt: skip
    head, embedding = tensor_of(made, "lm_head"), tensor_of(made, "embed_tokens")
    assert (head.reads, head.steps) == (embedding.reads, embedding.steps)
    assert made.tied


def test_no_head_is_made_where_no_model_has_one() -> None:
    made = tied(linear(), (HEADLESS, True), (HEADLESS, True))
    assert not [tensor for tensor in made.tensors if "head" in tensor.name]


def test_a_missing_head_of_a_model_that_says_it_is_not_tied_is_a_warning() -> None:
    made = tied(linear(), (HEADLESS, False), (SPECS, False))
    assert sources_of(tensor_of(made, "lm_head")) == [(1, HEAD)]
    assert made.warnings == ("lm_head.weight is not in every model: copied from b",)


def test_the_advice_about_different_tensors_is_kept_when_there_are_many() -> None:
    other = {f"model.layers.{i}.new.weight": ("BF16", (8,)) for i in range(40)}
    found = problems(linear(), SPECS, SPECS | other)
    assert any("are these models of one architecture?" in problem for problem in found)


def test_a_shape_mismatch_reads_like_the_example_of_the_style_page() -> None:
    specs = alter(SPECS, embed=("BF16", (128256, 4096)))
    other = alter(SPECS, embed=("BF16", (128264, 4096)))
    with pytest.raises(ShapeMismatch) as caught:
        make_plan(TIES, make_checkpoint(specs), make_checkpoint(other), make_checkpoint(specs))
    assert caught.value.exit_code == 2
    assert str(caught.value) == (
        "model.embed_tokens.weight differs between inputs\n"
        "  base   meta/base-8b  [128256, 4096]\n"
        "  model  acme/math-8b  [128264, 4096]\n"
        "  model  acme/code     [128256, 4096]\n"
        "ties needs equal shapes. These look like vocabularies: add  tokenizer: {source: union}  to the recipe."
    )


def test_several_shapes_that_differ_are_counted_and_named() -> None:
    other = alter(SPECS, norm=("BF16", (16,)), lm_head=("BF16", (100, 16)))
    with pytest.raises(ShapeMismatch, match=r"So do 1 more: (model\.norm|lm_head)\.weight\n") as caught:
        make_plan(linear(), make_checkpoint(), make_checkpoint(other))
    assert "Are these models of one architecture and size?" in str(caught.value)


def test_the_same_number_of_elements_in_another_shape_is_a_mismatch() -> None:
    with pytest.raises(ShapeMismatch, match=r"\[4, 2\]\n.*\[2, 4\]"):
        make_plan(linear(), make_checkpoint({"w": ("F32", (4, 2))}), make_checkpoint({"w": ("F32", (2, 4))}))


# The digest.


def digest(text: str = TIES, **options: Any) -> str:
    return make_plan(text, **options).digest


def test_the_digest_does_not_mind_how_the_recipe_is_written() -> None:
    assert digest() == digest("# a comment\n" + TIES.replace("0.5", "5.0e-1"))
    moved = TIES.replace("base_model: meta/base-8b\n", "") + "base_model: meta/base-8b\n"
    assert digest() == digest(moved)
    assert digest() == digest(TIES + "parameters: {normalize: true}\n"), "a default written out is the default"


@pytest.mark.parametrize(
    "text",
    [TIES.replace("0.5", "0.50000001"), TIES.replace("0.3", "0.31"), TIES.replace("method: ties", "method: dare_ties"),
     TIES + "dtype: float32\n", TIES + "parameters: {normalize: false}\n", TIES.replace("acme/code", "acme/chat")],
    ids=["weight", "density", "method", "dtype", "shared", "model"],
)  # fmt: skip
def test_the_digest_changes_with_the_recipe(text: str) -> None:
    assert digest(text) != digest()


def test_the_digest_changes_with_the_order_of_models_and_where_a_value_holds() -> None:
    assert digest(linear("weight: 1", "weight: 2")) != digest(linear("weight: 2", "weight: 1"))
    mlp, attention = (linear(f"weight: [{{filter: {word}, value: 1}}, {{value: 2}}]") for word in ("mlp", "self_attn"))
    assert digest(mlp) != digest(attention)


def test_the_digest_changes_with_seed_and_shards_and_inputs() -> None:
    base = make_checkpoint()
    assert digest(seed=1) != digest()
    assert make_plan(TIES, shard_bytes=1000).digest != digest()
    assert make_plan(TIES, shard_bytes=10**9).digest == digest(), "another limit, the same shards"
    assert make_plan(TIES, base, base, make_checkpoint(time=1)).digest != digest()
    other = make_checkpoint(alter(SPECS, lm_head=("F32", (100, 8))))
    assert make_plan(TIES, base, base, other).digest != digest()


def test_the_digest_is_the_same_in_every_process() -> None:
    program = "from tests.plan.test_plan import TIES, make_plan; print(make_plan(TIES).digest)"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env={**os.environ, "PYTHONHASHSEED": "123"}, capture_output=True,
        text=True, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == make_plan(TIES).digest


def test_memory_and_threads_do_not_change_digest_or_bytes(tmp_path: Path) -> None:
    base, *models = make_models(tmp_path)
    recipe = write_recipe(tmp_path / "r.yaml", "ties", models, base=base, per_model={"weight": 1.0, "density": 0.5})
    files = []
    # This process holds what other tests imported.
    held = usage().resident
    for i, (memory, threads) in enumerate([(None, 1), (held + 900_000_000, 2), (held + 250_000_000, 1)]):
        out = tmp_path / f"out{i}"
        report = streammerge.merge(recipe, out, max_memory=memory, threads=threads, compile="off")
        assert report.digest == plan(recipe).digest
        files.append({path.name: path.read_bytes() for path in out.iterdir()})
    assert files[0] == files[1] == files[2]


def test_the_plan_covers_the_output_exactly() -> None:
    made = make_plan(TIES, shard_bytes=1000)
    assert len(made.shards) > 1
    for number, shard in enumerate(made.shards):
        end = len(shard.header)
        for tensor in made.tensors:
            if tensor.shard == number:
                assert tensor.offset == end
                end += tensor.nbytes
        assert end == shard.nbytes
    assert made.bytes_to_write == sum(shard.nbytes for shard in made.shards)
    assert sorted(tensor.name for tensor in made.tensors) == sorted(SPECS)
