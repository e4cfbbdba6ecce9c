"""config.json of a dense model, made that of a model with experts.

What the dense model's class takes for granted where its config says nothing, another class may take otherwise: so it is
written out.
"""

from __future__ import annotations

from typing import Any

from streammerge.plan.architecture import Architecture

_EVERY: dict[str, Any] = {
    "hidden_act": "silu", "initializer_range": 0.02, "rms_norm_eps": 1e-6, "attention_dropout": 0.0,
    "tie_word_embeddings": False, "num_hidden_layers": 32, "num_attention_heads": 32, "hidden_size": 4096,
}  # fmt: skip
_QWEN = {"vocab_size": 151936, "intermediate_size": 22016, "num_key_value_heads": 32, "max_position_embeddings": 32768}
_MISTRAL = {"vocab_size": 32000, "bos_token_id": 1, "eos_token_id": 2}
# What transformers 5 takes for granted, by model_type.
_GRANTED: dict[str, dict[str, Any]] = {
    "llama": {**_MISTRAL, "intermediate_size": 11008, "max_position_embeddings": 2048},
    "mistral": {
        **_MISTRAL, "intermediate_size": 14336, "max_position_embeddings": 131072, "num_key_value_heads": 8,
        "sliding_window": 4096,
    },
    "qwen2": _QWEN,
    "qwen3": {**_QWEN, "head_dim": 128},
}  # fmt: skip
_THETA = 10000.0
# Keys of dense models that the others have not, or whose value is that of other classes' code.
_GONE = ("mlp_bias", "attention_bias", "pretraining_tp", "layer_types", "auto_map")


def make_moe_config(config: dict[str, Any], architecture: Architecture, experts: int, per_token: int) -> None:
    """Change the config of a dense model to that of one with so many experts, `per_token` of which a token takes."""
    for key, value in (_EVERY | _GRANTED[config["model_type"]]).items():
        config.setdefault(key, value)
    if config.get("num_key_value_heads") is None:
        config["num_key_value_heads"] = config["num_attention_heads"]
    _set_theta(config)
    for key in _GONE:
        config.pop(key, None)
    config |= {
        "architectures": [architecture.class_name],
        "model_type": architecture.name,
        "num_experts_per_tok": per_token,
        "output_router_logits": False,
        "router_aux_loss_coef": 0.001,
    }
    if architecture.name == "mixtral":
        config["num_local_experts"] = experts
        return
    size = config["intermediate_size"]
    config |= {
        "num_experts": experts,
        "moe_intermediate_size": size,
        # Without it the weights of the chosen experts would not sum to 1, as Mixtral's do.
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }
    if architecture.shared:
        config |= {"shared_expert_intermediate_size": size, "qkv_bias": True}
    if architecture.name == "qwen3_moe":
        config.pop("max_window_layers", None)
        config["attention_bias"] = False


def _set_theta(config: dict[str, Any]) -> None:
    """The base of the rotary angles, which transformers 5 keeps in `rope_parameters` and others beside it."""
    inner = config.get("rope_parameters")
    owner = inner if isinstance(inner, dict) else config
    if "rope_theta" not in owner and "rope_theta" not in config:
        owner["rope_theta"] = _THETA
