"""Modules are named for PEFT so that it takes these and no others."""

from __future__ import annotations

from typing import Any

import pytest
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from streammerge.plan.peft import alike, configuration, target_modules, usual_rank

LAYERS = [f"model.layers.{i}.{part}" for i in range(12) for part in ("attn.q", "attn.k", "mlp.up", "norm")]
NAMES = {
    "all of a kind": (LAYERS, [name for name in LAYERS if name.endswith(".q")]),
    "one layer": (LAYERS, [name for name in LAYERS if ".1." in name and "norm" not in name]),
    "some": (LAYERS, ["model.layers.1.attn.q", "model.layers.11.attn.q", "model.layers.0.mlp.up"]),
    "a name that ends another": (["a", "b.a", "c.b.a", "d"], ["a", "d"]),
    "in the midst": (["b.a", "c.b.a"], ["b.a"]),
    "odd letters": (["x+y.(a)", "x+y.[a]"], ["x+y.(a)"]),
}


@pytest.mark.parametrize("case", NAMES)
def test_peft_takes_the_targets_and_no_others(case: str) -> None:
    modules, targets = NAMES[case]
    config = LoraConfig(target_modules=target_modules(targets, modules))
    assert {module for module in modules if check_target_module_exists(config, module)} == set(targets)


def _configuration(ranks: dict[str, int], **more: Any) -> dict[str, Any]:
    together = alike(list(ranks), set(ranks))
    return configuration(base="b", ranks=ranks, usual=usual_rank(ranks, together), modules=list(ranks), whole=[],
                         transposes=False, task=None, **more)  # fmt: skip


def test_every_module_has_its_own_rank_and_a_scale_of_one() -> None:
    ranks = {"layers.1.q": 4, "layers.11.q": 7, "x.layers.1.q": 9, "layers.2.q": 4, "layersA1.q": 5}
    config = _configuration(ranks)
    assert (config["r"], config["lora_alpha"]) == (4, 4)
    assert config["rank_pattern"] == config["alpha_pattern"]
    for module, rank in ranks.items():
        key = get_pattern_key(list(config["rank_pattern"]), module)
        assert config["rank_pattern"].get(key, config["r"]) == rank
    LoraConfig(**{key: value for key, value in config.items() if key != "peft_type"})


def test_the_most_frequent_rank_is_the_usual_one_and_of_two_the_larger() -> None:
    assert _configuration({"a": 1, "b": 2, "c": 2})["r"] == 2
    assert _configuration({"a": 1, "b": 2})["r"] == 2


def test_experts_and_their_router_stand_together_and_others_apart() -> None:
    modules = ["l.0.mlp.experts.0.up", "l.0.mlp.experts.1.up", "l.0.mlp.gate", "l.0.mlp.shared.gate", "l.0.q", "m.gate"]
    assert alike(modules, {"l.0.mlp.experts.1.up"}) == modules[:2]
    assert alike(modules, {"l.0.mlp.gate", "l.0.q"}) == modules[2:3]
    assert alike(modules, set(modules)) == modules[:3]
    assert alike(modules, {"l.0.q"}) == []
