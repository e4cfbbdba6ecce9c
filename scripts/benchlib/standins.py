"""Tiny stand-ins for the models people merge: Llama, Qwen2 with and without a head of its own, and GPT-2.

Of each a `base` and models near it, as fine-tunes are: `one` differs everywhere, `two` in two elements of five, `three`
little, and not at all in embeddings, head and norms; `strong` as `one`, and five times as much. `far` is another model
altogether.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

HIDDEN, INNER, LAYERS, HEADS, VOCABULARY = 48, 132, 4, 4, 200
MODELS = ("base", "one", "two", "three", "strong", "far")

_ROPE = {
    "hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS // 2, "vocab_size": VOCABULARY, "max_position_embeddings": 128, "hidden_act": "silu",
    "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "tie_word_embeddings": False, **_ROPE}
_QWEN2 = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "tie_word_embeddings": False, **_ROPE}
_GPT2 = {
    "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_embd": HIDDEN, "n_layer": LAYERS, "n_head": HEADS,
    "n_positions": 96, "vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip

CONFIGS: dict[str, dict[str, Any]] = {
    "llama": _LLAMA,
    "qwen2": _QWEN2,
    "qwen2 tied": {**_QWEN2, "tie_word_embeddings": True},
    "gpt2": _GPT2,
}


def make_family(folder: Path, family: str, dtype: torch.dtype) -> None:
    """Write the models of `family` into folders under `folder`, named as in MODELS."""
    common, base = _noise(family, 99), {}
    for seed, model in enumerate(MODELS):
        noise = _noise(family, seed)
        if model == "base":
            base = tensors = {name: _start(name, tensor) for name, tensor in noise.items()}
        elif model == "far":
            tensors = {name: _start(name, tensor) for name, tensor in noise.items()}
        else:
            tensors = {name: base[name] + _delta(model, name, noise[name], common[name]) for name in base}
        (folder / model).mkdir(parents=True)
        config = CONFIGS[family] | {"torch_dtype": str(dtype).removeprefix("torch.")}
        (folder / model / "config.json").write_text(json.dumps(config))
        stored = {name: tensor.to(dtype).contiguous() for name, tensor in tensors.items()}
        save_file(stored, folder / model / "model.safetensors", metadata={"format": "pt"})


def _noise(family: str, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in _shapes(family)}


def _start(name: str, noise: Tensor) -> Tensor:
    """Weights of norms are near 1, all else is small."""
    is_gain = noise.dim() == 1 and not name.endswith("bias")
    return 1 + 0.1 * noise if is_gain else 0.02 * noise


def _delta(model: str, name: str, noise: Tensor, common: Tensor) -> Tensor:
    delta = 1e-3 * (0.8 * noise + 0.6 * common)
    if model == "two":
        return torch.where(noise.frac().abs() < 0.4, delta, 0.0)
    if model == "strong":
        return 5 * delta
    if model == "three":
        is_frozen = delta.dim() == 1 or ("layers." not in name and ".h." not in name)
        return torch.zeros_like(delta) if is_frozen else delta / 3
    return delta


def _shapes(family: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    if family == "gpt2":
        yield from _gpt2_shapes()
        return
    narrow = HIDDEN // 2
    yield "model.embed_tokens.weight", (VOCABULARY, HIDDEN)
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        for name, rows in (("q_proj", HIDDEN), ("k_proj", narrow), ("v_proj", narrow)):
            yield f"{prefix}.self_attn.{name}.weight", (rows, HIDDEN)
            if family != "llama":
                yield f"{prefix}.self_attn.{name}.bias", (rows,)
        yield f"{prefix}.self_attn.o_proj.weight", (HIDDEN, HIDDEN)
        yield f"{prefix}.mlp.gate_proj.weight", (INNER, HIDDEN)
        yield f"{prefix}.mlp.up_proj.weight", (INNER, HIDDEN)
        yield f"{prefix}.mlp.down_proj.weight", (HIDDEN, INNER)
        yield f"{prefix}.input_layernorm.weight", (HIDDEN,)
        yield f"{prefix}.post_attention_layernorm.weight", (HIDDEN,)
    yield "model.norm.weight", (HIDDEN,)
    if family != "qwen2 tied":
        yield "lm_head.weight", (VOCABULARY, HIDDEN)


def _gpt2_shapes() -> Iterator[tuple[str, tuple[int, ...]]]:
    """As transformers saves it: Conv1D keeps its weights (in, out)."""
    yield "transformer.wte.weight", (VOCABULARY, HIDDEN)
    yield "transformer.wpe.weight", (96, HIDDEN)
    for layer in range(LAYERS):
        prefix = f"transformer.h.{layer}"
        for norm in ("ln_1", "ln_2"):
            yield f"{prefix}.{norm}.weight", (HIDDEN,)
            yield f"{prefix}.{norm}.bias", (HIDDEN,)
        for name, rows, columns in (
            ("attn.c_attn", HIDDEN, 3 * HIDDEN), ("attn.c_proj", HIDDEN, HIDDEN),
            ("mlp.c_fc", HIDDEN, 4 * HIDDEN), ("mlp.c_proj", 4 * HIDDEN, HIDDEN),
        ):  # fmt: skip
            yield f"{prefix}.{name}.weight", (rows, columns)
            yield f"{prefix}.{name}.bias", (columns,)
    yield "transformer.ln_f.weight", (HIDDEN,)
    yield "transformer.ln_f.bias", (HIDDEN,)
