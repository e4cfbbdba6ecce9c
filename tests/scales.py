"""Weights in 8 bits with scales, made and read by other means than ours: whole, and in float64."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor


class Form(NamedTuple):
    """How a weight is stored: rows and columns of a block (0: all of them), the name and dtype of its scales."""

    block: tuple[int, int]
    suffix: str = "_scale_inv"
    dtype: torch.dtype = torch.float32
    codes: torch.dtype = torch.float8_e4m3fn


FORMS = {
    "blocks": Form((128, 128)),
    "one": Form((0, 0), "_scale"),
    "rows": Form((1, 0), "_scale", torch.bfloat16),
    "e5m2": Form((128, 128), codes=torch.float8_e5m2),
}


def blocks_of(shape: tuple[int, ...], form: Form) -> tuple[int, int]:
    return form.block[0] or shape[-2], form.block[1] or shape[-1]


def quantise(weight: Tensor, form: Form) -> tuple[Tensor, Tensor]:
    """Codes, and scales (…, rows of blocks, columns of blocks)."""
    *before, height, width = weight.shape
    tall, wide = blocks_of(tuple(weight.shape), form)
    down, across = -(-height // tall), -(-width // wide)
    padded = torch.zeros(*before, down * tall, across * wide, dtype=torch.float64)
    padded[..., :height, :width] = weight
    most = padded.view(*before, down, tall, across, wide).abs().amax((-3, -1))
    scales = (most / torch.finfo(form.codes).max).to(form.dtype)
    scales[most == 0] = 1
    quotients = weight.double() / spread(scales, tuple(weight.shape), form)
    # By way of float32 it is rounded twice: then a neighbour may be nearer.
    codes = quotients.to(torch.float32).to(form.codes).view(torch.uint8)
    for step in (1, -1):
        near, other = ((each.view(form.codes).double() - quotients).abs() for each in (codes, codes + step))
        codes = torch.where(other < near, codes + step, codes)
    return codes.view(form.codes), scales


def spread(scales: Tensor, shape: tuple[int, ...], form: Form) -> Tensor:
    """The scale of every element, in float64."""
    tall, wide = blocks_of(shape, form)
    own = scales.double().reshape(*shape[:-2], -(-shape[-2] // tall), -(-shape[-1] // wide))
    return own.repeat_interleave(tall, -2).repeat_interleave(wide, -1)[..., : shape[-2], : shape[-1]]


def numbers(codes: Tensor, scales: Tensor, form: Form) -> Tensor:
    """What codes and scales stand for, in float64."""
    return codes.double() * spread(scales, tuple(codes.shape), form)


def save_scaled(path: Path, weights: Mapping[str, Tensor], form: Form, *, config: Mapping[str, Any] | None = None,
                more: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:  # fmt: skip
    """Write a model whose `weights` are in 8 bits; `more` are tensors as they are. Returns what is stored."""
    stored = dict(more or {})
    for name, weight in weights.items():
        codes, scales = quantise(weight, form)
        stored[name] = codes
        stored[name + form.suffix] = scales.squeeze() if form.block == (0, 0) else scales
    path.mkdir(parents=True)
    save_file(stored, path / "model.safetensors", metadata={"format": "pt"})
    told = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "static"}
    content = {"architectures": ["LlamaForCausalLM"], "torch_dtype": "bfloat16", "quantization_config": told}
    (path / "config.json").write_text(json.dumps({**content, **(config or {})}))
    return stored
