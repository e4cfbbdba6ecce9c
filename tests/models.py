"""Small checkpoints for tests, made with a seed, and recipes over them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

# One tensor of several blocks, one of an odd size, a vector, a scalar, and two layers for gradients.
SHAPES: dict[str, tuple[int, ...]] = {
    "model.embed_tokens.weight": (1100, 64),
    "model.layers.0.self_attn.q_proj.weight": (64, 64),
    "model.layers.0.mlp.up_proj.weight": (2051, 64),
    "model.layers.0.input_layernorm.weight": (64,),
    "model.layers.1.self_attn.q_proj.weight": (64, 64),
    "model.layers.1.mlp.up_proj.weight": (2051, 64),
    "model.layers.1.input_layernorm.weight": (64,),
    "model.scale": (),
    "lm_head.weight": (1100, 64),
}


def make_tensors(seed: int, *, around: Mapping[str, Tensor] | None = None, dtype: torch.dtype = torch.bfloat16,
                 shapes: Mapping[str, tuple[int, ...]] = SHAPES) -> dict[str, Tensor]:  # fmt: skip
    """Random tensors, or those of `around` with small changes."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        values = noise * 0.02 if around is None else around[name].float() + noise * 1e-3
        tensors[name] = values.to(dtype)
    return tensors


def save_model(path: Path, tensors: Mapping[str, Tensor], *, shards: int = 1) -> Path:
    """Write a checkpoint directory: config.json, one file, or `shards` files with an index."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], "torch_dtype": "bfloat16"}))
    if shards == 1:
        save_file(dict(tensors), path / "model.safetensors", metadata={"format": "pt"})
        return path
    names = list(tensors)
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = names[i::shards]
        save_file({name: tensors[name] for name in part}, path / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return path


def make_models(path: Path, count: int = 2, *, dtype: torch.dtype = torch.bfloat16,
                shapes: Mapping[str, tuple[int, ...]] = SHAPES) -> list[Path]:  # fmt: skip
    """`base`, and `count` models around it named m0, m1, …; returns their paths, the base first."""
    base = make_tensors(0, dtype=dtype, shapes=shapes)
    paths = [save_model(path / "base", base)]
    for i in range(count):
        paths.append(save_model(path / f"m{i}", make_tensors(i + 1, around=base, dtype=dtype, shapes=shapes)))
    return paths


def write_recipe(path: Path, method: str, models: Sequence[Path | str], *, base: Path | str | None = None,
                 per_model: Mapping[str, Any] | None = None, **top: Any) -> Path:  # fmt: skip
    """Write a recipe; `per_model` parameters are given under every model, `top` are keys of the top level."""
    content: dict[str, Any] = {"merge_method": method, **top}
    if base is not None:
        content["base_model"] = str(base)
    content["models"] = [
        {"model": str(model), **({"parameters": dict(per_model)} if per_model else {})} for model in models
    ]
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def read_tensors(path: Path) -> dict[str, bytes]:
    """The bytes of every tensor of a checkpoint, with dtype and shape, by the library's reader."""
    tensors: dict[str, bytes] = {}
    for file in sorted(path.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            values = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            tensors[name] = f"{tensor.dtype} {tuple(tensor.shape)} ".encode() + values
    return tensors
