"""What a name says about layers, and where along a gradient a tensor lies."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from streammerge.plan.names import answers_to, in_layer, is_front, layer_of, modules_of, position, stacks


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


def gradient_positions(names: Iterable[str]) -> dict[str, float]:
    """Where a gradient over whole models is read."""
    found = list(names)
    depth = stacks(found)
    layers = {name: layer_of(name) for name in found}
    return {name: 0.0 if each is None else position(each[1], depth[each[0]]) for name, each in layers.items()}


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


def test_a_tensor_is_found_in_another_layer() -> None:
    assert in_layer("model.layers.3.mlp.experts.5.w1.weight", 12) == "model.layers.12.mlp.experts.5.w1.weight"
    assert in_layer("3.weight", 0) == "0.weight"


@pytest.mark.parametrize(
    ("name", "front"),
    [
        ("model.embed_tokens.weight", True), ("transformer.wte.weight", True), ("wpe.weight", True),
        ("bert.embeddings.LayerNorm.weight", True), ("model.norm.weight", False), ("lm_head.weight", False),
        ("embed_out.weight", False), ("transformer.ln_f.bias", False), ("gpt_neox.embed_in.weight", True),
        ("gpt_neox.final_layer_norm.weight", False), ("shared.weight", True),
    ],
)  # fmt: skip
def test_embeddings_come_before_the_layers_and_norms_and_heads_after(name: str, front: bool) -> None:
    assert is_front(name) is front


def test_a_tensor_is_also_known_by_its_name_in_transformers() -> None:
    name = "model.layers.3.block_sparse_moe.experts.7.w1.weight"
    for text in ("experts.7.w1", "block_sparse_moe", "mlp.experts.gate_up_proj", "layers.3.mlp"):
        assert answers_to(name, text), text
    assert not answers_to(name, "experts.down_proj")
    assert answers_to("h.0.attn.c_attn.weight", "transformer.h.0")
    assert answers_to("h.0.attn.c_attn.weight", "h.0.attn")


def test_a_prefix_alone_is_no_part_of_a_name_that_lacks_it() -> None:
    assert not answers_to("visual_projection.weight", "model")
    assert not answers_to("h.0.attn.c_attn.weight", "transformer.")
    assert not answers_to("logit_scale", "former")
    assert answers_to("text_model.a.weight", "model")


def test_modules_are_found_by_stack_by_part_and_by_mergekits_words() -> None:
    names = ["model.language_model.layers.0.w", "model.visual.blocks.0.w", "model.visual.merger.w", "lm_head.weight"]
    assert list(modules_of(["visual"], names).values()) == [None, "visual", "visual", None]
    assert list(modules_of(["vision_tower", "text_decoder"], names).values()) == [
        "text_decoder", "vision_tower", "vision_tower", "text_decoder",
    ]  # fmt: skip
    names = ["model.vision_tower.decoder.0.w", "model.language_model.0.w"]
    assert list(modules_of(["vision_tower", "text_decoder"], names).values()) == ["vision_tower", "text_decoder"]
    names = ["encoder.block.0.w", "decoder.block.0.w", "shared.weight"]
    assert list(modules_of(["encoder", "decoder", "default"], names).values()) == ["encoder", "decoder", "default"]
    assert list(modules_of(["text_decoder", "vision_tower"], ["model.layers.0.w", "vision_tower.x"]).values()) == [
        "text_decoder", "vision_tower",
    ]  # fmt: skip
