"""Kinds of models with experts that can be made of dense ones: of what, and how their tensors are called.

All have the dense model's attention, norms, embedding and head under the same names; only what stands for the MLP of a
layer differs: a router, its experts, and in Qwen2-MoE one more expert that every token goes through.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

STACK = "model.layers"
EMBEDDING, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
# The matrices of a dense MLP, y = down(act(gate(x)) · up(x)). The last one writes into the residual stream.
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
LAST = "down_proj"
_IN_LAYER = ("input_layernorm.weight", "post_attention_layernorm.weight",
             *(f"self_attn.{letter}_proj.weight" for letter in "qkvo"))  # fmt: skip


@dataclass(frozen=True)
class Architecture:
    """One kind: `name` is its model_type for transformers, `title` its name for people, `class_name` its class.

    It is made of models of the types `inputs`, whose layers have `_IN_LAYER` and `more`. `block` is what stands in a
    layer in place of the MLP; `words` are what it calls the matrices of an expert. It has so many `shared` experts.
    """

    name: str
    title: str
    class_name: str
    inputs: tuple[str, ...]
    block: str
    words: Mapping[str, str]
    more: tuple[str, ...] = ()
    shared: int = 0

    @property
    def in_layer(self) -> tuple[str, ...]:
        """What a layer of the dense model has beside its MLP."""
        return (*_IN_LAYER, *self.more)

    def router(self, layer: int) -> str:
        """The router's tensor: a row for every expert."""
        return f"{STACK}.{layer}.{self.block}.gate.weight"

    def expert(self, layer: int, number: int, projection: str) -> str:
        """A matrix of an expert."""
        return f"{STACK}.{layer}.{self.block}.experts.{number}.{self.words[projection]}.weight"

    def shared_expert(self, layer: int, projection: str) -> str:
        """A matrix of the expert that every token goes through."""
        return f"{STACK}.{layer}.{self.block}.shared_expert.{self.words[projection]}.weight"

    def shared_gate(self, layer: int) -> str:
        """One row: the sigmoid of its product with a hidden state is what the shared expert counts."""
        return f"{STACK}.{layer}.{self.block}.shared_expert_gate.weight"


_AS_DENSE = {projection: projection for projection in PROJECTIONS}

ARCHITECTURES: dict[str, Architecture] = {
    each.name: each
    for each in (
        Architecture("mixtral", "Mixtral", "MixtralForCausalLM", ("llama", "mistral"), "block_sparse_moe",
                     {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}),
        Architecture("qwen3_moe", "Qwen3-MoE", "Qwen3MoeForCausalLM", ("qwen3",), "mlp", _AS_DENSE,
                     more=("self_attn.q_norm.weight", "self_attn.k_norm.weight")),
        Architecture("qwen2_moe", "Qwen2-MoE", "Qwen2MoeForCausalLM", ("qwen2",), "mlp", _AS_DENSE,
                     more=tuple(f"self_attn.{letter}_proj.bias" for letter in "qkv"), shared=1),
    )
}  # fmt: skip
# What mergekit-moe's recipes call them.
_OTHER_NAMES = {"qwen": "qwen2_moe", "qwen2": "qwen2_moe", "qwen3": "qwen3_moe"}


def architecture_named(name: str) -> Architecture | None:
    """The kind that a recipe names, or None."""
    plain = name.lower().replace("-", "_")
    return ARCHITECTURES.get(_OTHER_NAMES.get(plain, plain))


def architecture_of(model_type: str) -> Architecture | None:
    """The kind that is made of dense models of this type, or None."""
    return next((each for each in ARCHITECTURES.values() if model_type in each.inputs), None)


def mlp_name(layer: int, projection: str) -> str:
    """A matrix of a dense model's MLP."""
    return f"{STACK}.{layer}.mlp.{projection}.weight"
