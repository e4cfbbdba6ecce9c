"""Reading recipes: mergekit's language, every mistake at once with its line, nothing skipped in silence."""

from __future__ import annotations

import time
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streammerge.base.errors import InputError, RecipeError
from streammerge.methods import METHODS
from streammerge.plan.recipe import Recipe, load_recipe, parse_recipe
from streammerge.plan.reference import resolve_local
from streammerge.plan.setting import Entry

LINEAR = "merge_method: linear\nmodels:\n  - model: a\n    parameters: {weight: 1}\n"
TIES = "merge_method: ties\nbase_model: base\nmodels:\n  - model: a\n  - model: b\nparameters: {weight: 1}\n"


def parse(text: str, *, strict: bool = False) -> Recipe:
    return parse_recipe(text, Path("recipe.yaml"), strict=strict)


def problems(text: str, *, strict: bool = False) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        parse(text, strict=strict)
    assert caught.value.exit_code == 2
    assert str(caught.value).startswith("recipe.yaml: ")
    return caught.value.problems


# What is read.


def test_a_recipe_is_read_as_written() -> None:
    text = """\
# a comment
merge_method: ties
base_model: meta/base-8b
dtype: torch.bfloat16
out_dtype: float32
models:
  - model: meta/base-8b
  - model: acme/math-8b
    parameters:
      density: [1, 0.7, 0.1]
      weight:
        - filter: mlp
          value: 0.5
        - value: 0
parameters: {normalize: true, lambda: 1e-5}
"""
    recipe = parse(text)
    assert recipe.text == text
    assert recipe.method is METHODS["ties"]
    assert (recipe.last.dtype, recipe.last.out_dtype) == ("BF16", "F32")
    assert recipe.only.base is not None
    assert recipe.only.base.model == "meta/base-8b"
    assert [model.model for model in recipe.only.models] == ["acme/math-8b"]
    assert recipe.only.models[0].parameters == {
        "density": (Entry(None, (1, 0.7, 0.1)),),
        "weight": (Entry("mlp", (0.5,)), Entry(None, (0,))),
    }
    assert recipe.last.parameters == {"normalize": (Entry(None, (True,)),), "lambda": (Entry(None, ("1e-5",)),)}
    assert recipe.warnings == ()


def test_the_base_comes_first_among_the_inputs_wherever_it_is_listed() -> None:
    for models in ("[{model: a}, {model: b}]", "[{model: base}, {model: a}, {model: b}]",
                   "[{model: a}, {model: b}, {model: base}]"):  # fmt: skip
        recipe = parse(f"merge_method: ties\nbase_model: base\nmodels: {models}\nparameters: {{weight: 1}}\n")
        assert recipe.inputs == ("base", "a", "b")


def test_a_base_that_the_method_does_not_use_joins_as_the_last_model() -> None:
    recipe = parse(LINEAR + "base_model: base\n")
    assert recipe.only.base is None
    assert [model.model for model in recipe.only.models] == ["a", "base"]
    assert [model.model for model in parse(LINEAR + "base_model: a\n").only.models] == ["a"]


def test_anchors_and_merge_keys_work() -> None:
    recipe = parse("merge_method: linear\nmodels:\n- model: a\n  parameters: &p {weight: 0.5}\n- model: b\n"
                   "  parameters: *p\n- model: c\n  parameters:\n    <<: *p\n")  # fmt: skip
    assert [model.parameters["weight"] for model in recipe.only.models] == [(Entry(None, (0.5,)),)] * 3


def test_json_is_a_recipe_too() -> None:
    text = '{"merge_method": "linear", "models": [{"model": "a", "parameters": {"weight": 1}}]}'
    assert parse(text).only.models[0].model == "a"


def test_a_byte_order_mark_is_no_trouble(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_bytes(b"\xef\xbb\xbf" + LINEAR.encode())
    assert load_recipe(tmp_path / "r.yaml").method.name == "linear"


@pytest.mark.parametrize(
    ("written", "meant"),
    [("bfloat16", "BF16"), ("float16", "F16"), ("float32", "F32"), ("float64", "F64"), ("float8_e4m3fn", "F8_E4M3")],
)
def test_dtypes_have_mergekits_names(written: str, meant: str) -> None:
    assert parse(LINEAR + f"dtype: {written}\n").last.dtype == meant
    assert parse(LINEAR + f"out_dtype: torch.{written}\n").last.out_dtype == meant


@pytest.mark.parametrize("written", ["bf16", "auto", "int64", "float8", "BFLOAT16", "torch.bf16"])
def test_an_unknown_dtype_is_refused_with_the_known_ones(written: str) -> None:
    assert problems(LINEAR + f"dtype: {written}\n") == [
        f"line 5: dtype: {written!r} is none of bfloat16, float16, float32, float64, float8_e4m3fn, float8_e5m2"
    ]


# What is warned of, and refused under --strict.


WARNED = {
    "top": (LINEAR + "dtyp: float32\n", "line 5: dtyp: unknown key, ignored. Did you mean dtype?"),
    "far from any": (LINEAR + "zebra: 1\n", "line 5: zebra: unknown key, ignored."),
    "model": (
        LINEAR.replace("parameters", "paramaters"),
        "line 4: models[0].paramaters: unknown key, ignored. Did you mean parameters?",
    ),
    "parameter of a model": (
        LINEAR.replace("weight: 1", "weight: 1, weigth: 2"),
        "line 4: models[0].parameters.weigth: linear has no such parameter. Did you mean weight?",
    ),
    "parameter": (
        TIES.replace("weight: 1", "weight: 1, densty: 2"),
        "line 6: parameters.densty: ties has no such parameter. Did you mean density?",
    ),
    "shared under a model": (
        LINEAR.replace("weight: 1", "weight: 1, normalize: 1"),
        "line 4: models[0].parameters.normalize: has no effect under one model; write normalize under `parameters:`",
    ),
}


@pytest.mark.parametrize("case", WARNED)
def test_what_mergekit_ignores_in_silence_is_a_warning_and_an_error_under_strict(case: str) -> None:
    text, warning = WARNED[case]
    assert parse(text).warnings == (warning,)
    assert problems(text, strict=True) == [warning]


def test_a_sound_recipe_is_sound_under_strict() -> None:
    assert parse(LINEAR, strict=True).warnings == ()
    assert parse(TIES, strict=True).warnings == ()


# What is refused.


def test_several_mistakes_are_named_at_once_with_their_lines() -> None:
    text = """\
merge_method: tise
models:
  - model: a+
  - model: b
    paramters: {weight: 1}
tokenizer_source: uniom
"""
    assert problems(text, strict=True) == [
        "line 3: models[0].model: 'a+' names nothing after `+`",
        "line 6: tokenizer_source: uniom is no model of this recipe. Did you mean union?",
        "line 1: merge_method: 'tise' is no method here. Did you mean ties?",
        "line 5: models[1].paramters: unknown key, ignored. Did you mean parameters?",
    ]


def test_mistakes_of_form_are_named_at_once_with_their_lines() -> None:
    found = problems("merge_method: linear\ndtype: bf16\nmodels:\n  - model: 5\n  - parameters: [1]\nbase_model: [x]\n")
    assert sorted(found) == [
        "line 2: dtype: 'bf16' is none of bfloat16, float16, float32, float64, float8_e4m3fn, float8_e5m2",
        "line 4: models[0].model: expected text, found 5",
        "line 5: models[1].model: is missing",
        "line 5: models[1].parameters: expected a map from parameter names to values",
        "line 6: base_model: expected text, found ['x']",
    ]


def test_mistakes_of_form_do_not_hide_mistakes_of_meaning() -> None:
    # Principle 1: everything that is wrong is said at once, not in two rounds.
    found = problems("merge_method: tise\ndtype: bf16\nmodels:\n  - model: a\n")
    assert any("'tise' is no method here" in problem for problem in found)
    assert any("'bf16' is none of" in problem for problem in found)


def test_two_bad_parameters_of_one_model_are_both_named() -> None:
    text = TIES.replace("- model: b", "- {model: b, parameters: {weight: null, density: null}}")
    found = " ".join(problems(text))
    assert "weight: expected" in found
    assert "density: expected" in found


@pytest.mark.parametrize("text", ["", "\n\n", "# nothing\n", "---\n"])
def test_an_empty_file_is_called_empty(text: str) -> None:
    (problem,) = problems(text)
    assert "the file is empty" in problem or "expected a map, found None" in problem


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a: [1,\nb: }", "line 2: not YAML: "),
        ("a:\n\t- b", "line 2: not YAML: found character '\\t' that cannot start any token"),
        ("a: \0", "not YAML: "),
        ("a: *nowhere", "line 1: not YAML: found undefined alias"),
        ("a: !!python/object:os.system x", "line 1: not YAML: could not determine a constructor"),
        ("? [a, b]\n: c\n", "line 1: not YAML: found unhashable key"),
    ],
    ids=["syntax", "tab", "nul", "alias", "tag", "key"],
)
def test_what_is_no_yaml_is_refused_with_the_line(text: str, problem: str) -> None:
    (found,) = problems(text)
    assert found.startswith(problem)


def test_a_scalar_that_yaml_cannot_build_is_refused_like_other_mistakes() -> None:
    # PyYAML raises ValueError, KeyError or AttributeError for these, no error of its own.
    tagged = [f"!!{tag} x" for tag in ("int", "float", "bool", "timestamp")]
    for value in ("2024-02-30", "2024-01-01T25:00:00Z", "0b_", "9" * 5000, *tagged):
        assert problems(LINEAR + f"dtype: {value}\n")


def test_a_key_given_twice_is_refused_with_its_line() -> None:
    assert problems(LINEAR + "merge_method: slerp\n") == ["line 5: 'merge_method' is given twice"]
    assert problems(LINEAR.replace("weight: 1", "weight: 1, weight: 2")) == ["line 4: 'weight' is given twice"]


def test_an_alias_bomb_is_refused_at_once() -> None:
    letters = "abcdefghij"
    bomb = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"{new}: &{new} [{', '.join([f'*{old}'] * 10)}]\n" for old, new in pairwise(letters)
    )
    began = time.process_time()
    assert problems(bomb) == ["more than 200000 values; this is no recipe"]
    assert time.process_time() - began < 5


@pytest.mark.parametrize(
    "text",
    ["a: &a [*a]\n", "a: &a {b: *a}\n", "[" * 5000, "a: " + "[" * 3000 + "]" * 3000, "{a: " * 3000 + "}" * 3000],
    ids=["list in itself", "map in itself", "open lists", "lists", "maps"],
)
def test_deep_nesting_is_refused_at_once(text: str) -> None:
    began = time.process_time()
    assert problems(text) == ["nested too deeply"]
    assert time.process_time() - began < 5


def test_a_file_of_another_kind_is_refused_in_few_words() -> None:
    for text in ("Dear reader, " * 10_000, "[1, 2]\n", "5\n"):
        (problem,) = problems(text)
        assert problem.startswith("line 1: expected a map, found ")
        assert len(problem) < 500


def test_a_missing_or_unreadable_recipe_is_an_input_error(tmp_path: Path) -> None:
    for path in (tmp_path / "nowhere.yaml", tmp_path):
        with pytest.raises(InputError, match="the recipe cannot be read: "):
            load_recipe(path)


def test_a_huge_or_binary_recipe_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(b"#" * 4_000_001)
    with pytest.raises(RecipeError, match="larger than 4000000 bytes"):
        load_recipe(path)
    path.write_bytes(b"merge_method: \xff")
    with pytest.raises(RecipeError, match=r"not UTF-8 text \(invalid start byte at byte 14\)"):
        load_recipe(path)


FORMS = {
    "models: []\n": "line 1: merge_method: is missing",
    "merge_method: 5\nmodels: []\n": "line 1: merge_method: expected text, found 5",
    "merge_method: linear\n": "line 1: models: list at least one model",
    "merge_method: linear\nmodels: []\n": "line 2: models: list at least one model",
    "merge_method: linear\nmodels:\n": "line 2: models: expected a list, found None",
    "merge_method: linear\nmodels: {model: a}\n": "line 2: models: expected a list, found {'model': 'a'}",
    "merge_method: linear\nmodels:\n- a\n": "line 3: models[0]: expected a map, found 'a'",
    "merge_method: linear\nmodels:\n- parameters: {}\n": "line 3: models[0].model: is missing",
    LINEAR.replace("{weight: 1}", "[weight]"): (
        "line 4: models[0].parameters: expected a map from parameter names to values"
    ),
    LINEAR.replace("weight: 1", "weight: null"): (
        "line 4: models[0].parameters: weight: expected a number, true or false, found None"
    ),
    LINEAR.replace("weight: 1", "weight: [1, {value: 2}]"): (
        "line 4: models[0].parameters: weight: a list holds either numbers or {filter, value} mappings, not both"
    ),
}


@pytest.mark.parametrize("text", FORMS)
def test_a_mistake_of_form_is_refused_with_place_and_expectation(text: str) -> None:
    assert problems(text) == [FORMS[text]]


def test_an_unknown_method_far_from_any_other_gets_the_list() -> None:
    (problem,) = problems("merge_method: nope\nmodels: [{model: a}]\n")
    assert problem == f"line 1: merge_method: 'nope' is no method here. There are {', '.join(METHODS)}."


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.base == "required"])
def test_a_missing_base_is_refused(method: str) -> None:
    assert problems(f"merge_method: {method}\nmodels: [{{model: a}}]\n") == [f"line 1: {method} needs a base_model"]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("merge_method: slerp\nbase_model: b\nmodels: [{model: a}, {model: c}]\n",
         "slerp merges 1 model besides the base, found 2"),
        ("merge_method: slerp\nbase_model: b\nmodels: [{model: b}]\n",
         "slerp merges 1 model besides the base, found 0"),
        ("merge_method: passthrough\nmodels: [{model: a}, {model: c}]\n", "passthrough merges 1 model, found 2"),
        ("merge_method: passthrough\nbase_model: b\nmodels: [{model: a}]\n", "passthrough merges 1 model, found 2"),
    ],
)  # fmt: skip
def test_a_wrong_number_of_models_is_refused(text: str, problem: str) -> None:
    (found,) = problems(text)
    assert found.endswith(f"models: {problem}")


def test_a_model_listed_twice_is_refused() -> None:
    found = problems("merge_method: linear\nmodels: [{model: a}, {model: b}, {model: a}]\nparameters: {weight: 1}\n")
    assert found == ["line 2: models: a is listed more than once"]


@settings(derandomize=True, database=None, deadline=None, max_examples=200)
@given(data=st.data())
def test_a_damaged_recipe_is_read_or_refused_and_never_crashes(data: st.DataObject) -> None:
    text = data.draw(st.sampled_from([LINEAR, TIES]))
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(text)))
        cut = data.draw(st.integers(0, 3))
        new = data.draw(
            st.sampled_from([*list("{}[]:,-#&*!|>'\"%@` \n\t?1"), "a: b\n", "- ", "<<: ", "&a ", "*a", "null"])
        )
        text = text[:place] + new + text[place + cut :]
    try:
        parse(text)
    except RecipeError as error:
        assert error.problems  # noqa: PT017


# Where models are.


def test_a_model_is_sought_from_here_and_from_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here" / "m").mkdir(parents=True)
    (tmp_path / "there" / "n").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    recipe = tmp_path / "there" / "r.yaml"
    assert resolve_local("m", recipe) == Path("m")
    assert resolve_local("n", recipe) == tmp_path / "there" / "n"
    assert resolve_local(str(tmp_path / "here" / "m"), recipe) == tmp_path / "here" / "m"


def test_a_model_that_is_nowhere_says_where_it_was_sought(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=rf"model 'x' is not there \(looked in .* and {tmp_path}\)\.$"):
        resolve_local("x", tmp_path / "r.yaml")


def test_a_model_name_that_no_disk_can_hold_is_not_there(tmp_path: Path) -> None:
    for name in ("a\0b", "x" * 300, "~nobody-of-this-name/x"):
        with pytest.raises(InputError, match="is not there"):
            resolve_local(name, tmp_path / "r.yaml")


ANALYSED = """merge_method: hi_merging
base_model: base
models: [{model: a}, {model: b}]
"""


def test_a_recipe_with_tasks_is_to_be_analysed() -> None:
    recipe = parse_recipe(ANALYSED + "tasks: [{name: t, model: a, dev: t.jsonl}]\n", Path("r.yaml"))
    assert recipe.is_analysed
    assert recipe.decisions == "guarded"
    assert recipe.analysis.errors is None
    assert not parse_recipe(ANALYSED, Path("r.yaml")).is_analysed


def test_options_of_the_analysis_are_checked_by_name_and_value() -> None:
    text = ANALYSED + "tasks: []\ndecisions: bold\nanalysis: {wieghts: sum, rounds: 0}\n"
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text, Path("r.yaml"))
    problems = "\n".join(caught.value.problems)
    assert "line 5: decisions" in problems
    assert "line 6: analysis.wieghts" in problems
    assert "line 6: analysis.rounds" in problems


def test_tasks_of_another_method_are_a_warning() -> None:
    recipe = parse_recipe(ANALYSED.replace("hi_merging", "ties") + "tasks: []\n", Path("r.yaml"))
    assert any("only hi_merging is analysed" in warning for warning in recipe.warnings)


def test_tasks_and_proxy_exclude_each_other() -> None:
    with pytest.raises(RecipeError, match="exclude each other"):
        parse_recipe(ANALYSED + "tasks: []\nproxy: weights\n", Path("r.yaml"))


def test_decisions_without_tasks_are_a_warning() -> None:
    recipe = parse_recipe(ANALYSED + "decisions: paper\n", Path("r.yaml"))
    assert any("no effect without tasks" in warning for warning in recipe.warnings)
