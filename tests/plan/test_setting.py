"""Parameters as mergekit's YAML writes them: scalars, gradients, filters (mergekit-compat.md, section 1.2)."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from streammerge.kernels.contract import Param, Value
from streammerge.plan.setting import parse_setting, value_at

WEIGHT = Param("weight", "the model's share", per_model=True)
FLAG = Param("normalize", "divide by the sum", True, kind="boolean")


def value(text: str, name: str = "model.layers.0.w", position: float = 0.0, param: Param = WEIGHT) -> Value | None:
    """The value that a setting, as YAML, has for a tensor."""
    return value_at(parse_setting(yaml.safe_load(text)), name, position, param)


@pytest.mark.parametrize("position", [0.0, 0.3, 1.0])
def test_a_scalar_is_the_same_everywhere(position: float) -> None:
    assert value("0.25", position=position) == 0.25
    assert value("3", position=position) == 3.0
    assert value("true", param=FLAG, position=position) is True


@pytest.mark.parametrize(
    ("position", "expected"), [(0.0, 0.0), (0.125, 0.25), (0.25, 0.5), (0.5, 1.0), (0.75, 0.6), (1.0, 0.2)]
)
def test_a_gradient_is_interpolated_between_its_values(position: float, expected: float) -> None:
    assert value("[0, 1, 0.2]", position=position) == pytest.approx(expected, abs=1e-15)


def test_a_gradient_of_one_value_is_that_value() -> None:
    assert value("[0.7]", position=0.0) == value("[0.7]", position=0.4) == value("[0.7]", position=1.0) == 0.7


@settings(derandomize=True, database=None, max_examples=100)
@given(values=st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=6), position=st.floats(0, 1))
def test_a_gradient_follows_the_formula_and_hits_its_ends(values: list[float], position: float) -> None:
    setting = parse_setting(values)
    assert value_at(setting, "x", 0.0, WEIGHT) == values[0]
    assert value_at(setting, "x", 1.0, WEIGHT) == values[-1]
    scaled = position * (len(values) - 1)
    first = int(scaled)
    second = min(len(values) - 1, first + 1)
    expected = (1 - (scaled - first)) * values[first] + (scaled - first) * values[second]
    assert value_at(setting, "x", position, WEIGHT) == pytest.approx(expected, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize(
    ("position", "expected"), [(0.0, True), (0.49, True), (0.5, False), (0.99, False), (1.0, True)]
)
def test_booleans_step_along_a_gradient(position: float, expected: bool) -> None:
    assert value("[true, false, true]", param=FLAG, position=position) is expected


def test_yes_and_one_are_booleans_and_other_numbers_are_not() -> None:
    assert value("yes", param=FLAG) is True
    assert value("0", param=FLAG) is False
    for text in ("2", "0.5", "maybe", "[true, 7]"):
        with pytest.raises(ValueError, match="expected true or false"):
            value(text, param=FLAG, position=1.0)


def test_numbers_without_a_dot_are_text_to_yaml_and_numbers_to_us() -> None:
    assert yaml.safe_load("1e-5") == "1e-5"
    assert value("1e-5") == 1e-5
    assert value("[1e-5, 3e-5]", position=0.5) == pytest.approx(2e-5)
    assert value("'0.5'") == 0.5


@pytest.mark.parametrize("text", ["foo", "''", ".nan", ".inf", "-.inf", "1e999", "'nan'"])
def test_what_is_no_finite_number_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"expected a (finite )?number, found"):
        value(text)


def test_an_integer_too_large_for_any_float_is_refused_with_a_sentence() -> None:
    with pytest.raises(ValueError, match=r"expected a (finite )?number"):
        value("9" * 400)


def test_a_filter_is_a_plain_part_of_the_name() -> None:
    text = "[{filter: mlp, value: 1}, {filter: self_attn, value: 2}, {value: 3}]"
    assert value(text, "model.layers.0.mlp.up.weight") == 1
    assert value(text, "model.layers.0.self_attn.q.weight") == 2
    assert value(text, "lm_head.weight") == 3


def test_a_filter_is_no_pattern_and_minds_case() -> None:
    for pattern in ("mlp.*", "^model", "MLP", "mlp*", "m?p"):
        assert value(f"[{{filter: '{pattern}', value: 1}}]", "model.layers.0.mlp.up.weight") is None
    assert value("[{filter: '*', value: 1}]", "anything") == 1
    assert value("[{filter: layers.1, value: 1}]", "model.layers.10.w") == 1


def test_the_first_entry_that_matches_wins() -> None:
    text = "[{filter: layers, value: 1}, {filter: mlp, value: 2}]"
    assert value(text, "model.layers.0.mlp.w") == 1
    assert value("[{value: 5}, {filter: mlp, value: 2}]", "model.layers.0.mlp.w") == 5


def test_a_single_mapping_without_a_list_is_accepted() -> None:
    assert value("{filter: mlp, value: 0.5}", "mlp.w") == 0.5
    assert value("{filter: mlp, value: 0.5}", "attn.w") is None
    assert value("{value: [0, 1]}", position=0.25) == 0.25


def test_a_gradient_in_a_filter_is_interpolated() -> None:
    assert value("[{filter: mlp, value: [0, 1]}, {value: 9}]", "mlp.w", 0.75) == 0.75


def test_an_empty_list_is_not_set() -> None:
    assert value("[]") is None


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "expected a number, true or false, found None"),
        ([1, None], "expected a number, true or false, found None"),
        ([[1, 2]], r"expected a number, true or false, found \[1, 2\]"),
        ([1, {"value": 2}], "either numbers or {filter, value} mappings, not both"),
        ({"filter": "mlp"}, "found the keys filter"),
        ({}, "found the keys none"),
        ({"value": 1, "filters": "x"}, "found the keys value, filters"),
        ({"value": 1, "filter": 3}, "filter must be text, found 3"),
        ({"value": []}, "an empty list has no value"),
        ({"value": {"value": 1}}, "expected a number, true or false, found"),
    ],
)
def test_what_is_no_setting_is_refused_with_a_sentence(content: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        parse_setting(content)
