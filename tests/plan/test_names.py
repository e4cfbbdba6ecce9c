"""What a name says about layers, and where along a gradient a tensor lies."""

from __future__ import annotations

import pytest

from streammerge.plan.names import gradient_positions, layer_of


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("model.layers.3.mlp.up_proj.weight", ("model.layers", 3)),
        ("model.layers.10.mlp.experts.5.w1.weight", ("model.layers", 10)),
        ("transformer.h.0.attn.c_attn.bias", ("transformer.h", 0)),
        ("0.weight", ("", 0)),
        ("vision_tower.encoder.layers.7.ln.weight", ("vision_tower.encoder.layers", 7)),
        ("model.layers.03.w", ("model.layers", 3)),
        ("lm_head.weight", None),
        ("model.embed_tokens.weight", None),
        ("model.layers.3", None),
        ("layer3.weight", None),
        ("model.conv1d.weight", None),
        ("", None),
        (".", None),
    ],
)
def test_the_first_number_between_dots_is_the_layer(name: str, layer: tuple[str, int] | None) -> None:
    assert layer_of(name) == layer


def test_a_number_of_thousands_of_digits_in_a_name_is_no_crash() -> None:
    # Names come from files of strangers; Python's int() refuses more than 4,300 digits.
    layer_of(f"a.{'9' * 5000}.w")


def test_layers_are_spread_from_0_to_1() -> None:
    names = [f"model.layers.{i}.w" for i in range(5)]
    assert list(gradient_positions(names).values()) == [0.0, 0.25, 0.5, 0.75, 1.0]


def test_layers_are_counted_by_number_not_by_order_of_the_file() -> None:
    positions = gradient_positions(["model.layers.10.w", "model.layers.2.w", "model.layers.0.w"])
    assert positions == {"model.layers.10.w": 1.0, "model.layers.2.w": 0.2, "model.layers.0.w": 0.0}


def test_what_lies_before_and_after_the_layers_takes_the_first_value() -> None:
    positions = gradient_positions(
        ["lm_head.weight", "model.norm.weight", "model.embed_tokens.weight", "model.layers.0.w", "model.layers.1.w"]
    )
    assert positions["lm_head.weight"] == positions["model.norm.weight"] == positions["model.embed_tokens.weight"] == 0


def test_one_layer_takes_the_last_value() -> None:
    positions = gradient_positions(["model.layers.0.w", "lm_head.weight"])
    assert positions == {"model.layers.0.w": 1.0, "lm_head.weight": 0.0}


def test_every_stack_of_layers_has_a_gradient_of_its_own() -> None:
    names = [f"encoder.layers.{i}.w" for i in range(3)] + [f"decoder.layers.{i}.w" for i in range(2)]
    assert list(gradient_positions(names).values()) == [0.0, 0.5, 1.0, 0.0, 1.0]


def test_experts_lie_where_their_layer_does() -> None:
    names = [f"model.layers.{i}.mlp.experts.{j}.w" for i in range(3) for j in range(4)]
    assert list(gradient_positions(names).values()) == [0.0] * 4 + [0.5] * 4 + [1.0] * 4
