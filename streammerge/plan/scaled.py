"""Weights that are stored as 8-bit floats with scales, and what else there is of quantised weights.

    DeepSeek             W (F8_E4M3)   W_scale_inv, one for every block of 128 × 128
    compressed-tensors   W (F8_E4M3)   W_scale, one for all, for every row, or for every block

A weight is code × scale, whatever the second tensor's name says. Scales of activations are not of the weights: a merged
model would need its own.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from streammerge.base.dtypes import DTYPES
from streammerge.kernels.scaling import Grid
from streammerge.plan.gather import Read
from streammerge.plan.names import layer_of
from streammerge.storage.checkpoint import TensorSpec

# What a name has after that of its weight.
SUFFIXES = ("_scale_inv", "_scale")
_USUAL_BLOCK = (128, 128)
_USUAL_SUFFIX = "_scale_inv"
# Dtypes of weights in 8 bits.
CODES = ("F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ")
_SCALE_DTYPES = ("F32", "BF16", "F16", "F8_E8M0")
# Scales of what goes in and out of layers, which only a run over data can know.
_OF_ACTIVATIONS = re.compile(r"\.(input|output|activation|[qkv])_scale(_inv)?$|\.(input|output)_global_scale$")
_OF_WEIGHTS = re.compile(r"(_scale_inv|(^|\.)weight_scale)$")
# Matrices that models of 8 bits leave in more.
_LEFT = re.compile(r"(^|[._])(gate|router|norm|embed\w*|wte|wpe|lora_\w+)\.weight$")


@dataclass(frozen=True)
class Scaled:
    """A tensor that is read as numbers: its codes, each times the scale of its block."""

    codes: Read
    scales: Read
    grid: Grid

    @property
    def dtype(self) -> str:
        return "F32"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes

    @property
    def facts(self) -> list[Any]:
        """What decides its bytes, besides the files."""
        return [*self.codes.facts, *self.scales.facts, list(self.grid.block)]

    @property
    def suffix(self) -> str:
        return self.scales.spec.name.removeprefix(self.codes.spec.name)


@dataclass(frozen=True)
class Scaling:
    """How an output is stored: codes of `dtype`, and their scales in a tensor of their own."""

    dtype: str
    grid: Grid
    scale_name: str
    scale_dtype: str
    scale_shape: tuple[int, ...]

    @property
    def suffix(self) -> str:
        """What the scales' name has after that of the weight."""
        return "_scale_inv" if self.scale_name.endswith("_scale_inv") else "_scale"

    @cached_property
    def quantum(self) -> int | None:
        """A range of so many elements, or a multiple, has whole blocks only; None where that would be a long one."""
        height, rows = self.grid.height, self.grid.block[0]
        whole = rows if height % rows == 0 else height
        elements = whole * self.grid.width
        return elements if elements <= _LONGEST else None


# Elements whose scales can be found before the first of them is written, without making tiles any longer than usual.
_LONGEST = 4 << 20


def scaling_like(read: Scaled, name: str, shape: tuple[int, ...], dtype: str) -> Scaling:
    """How an output `name` is stored in `dtype` as an input is, if need be of another shape."""
    stored = read.scales.dtype if read.scales.dtype in ("F32", "BF16", "F16") else "F32"
    grid, scale_shape = read.grid, read.scales.shape
    if shape != read.shape:
        *before, width = shape
        height = before[-1] if before else 1
        tall, wide = grid.block
        if math.prod(scale_shape) == 1:
            rows = math.prod(before)
            grid = Grid(rows, width, (rows, width))
        elif (tall, wide) == (1, grid.width):
            grid = Grid(height, width, (1, width))
            scale_shape = (*before, 1) if len(scale_shape) == len(read.shape) else tuple(before)
        else:
            grid = Grid(height, width, (height, width) if (tall, wide) == (grid.height, grid.width) else (tall, wide))
            scale_shape = (*before[:-1], -(-height // grid.block[0]), grid.columns)
    return Scaling(dtype, grid, name + read.suffix, stored, scale_shape)


def is_usual(name: str, shape: tuple[int, ...]) -> bool:
    """Whether models in 8 bits have scales for such a weight: a matrix in a layer, but no router."""
    return len(shape) == 2 and layer_of(name) is not None and name.endswith(".weight") and not _LEFT.search(name)


def usual_scaling(name: str, shape: tuple[int, ...], dtype: str) -> Scaling | None:
    """How a weight of a model that has no scales is stored in `dtype`, as DeepSeek's are; None for those that are not.

    Of blocks that are not whole transformers 5.23 takes the size for another one.
    """
    if not is_usual(name, shape) or any(side % size for side, size in zip(shape, _USUAL_BLOCK, strict=True)):
        return None
    height, width = shape
    grid = Grid(height, width, _USUAL_BLOCK)
    return Scaling(dtype, grid, name + _USUAL_SUFFIX, "F32", (height // _USUAL_BLOCK[0], grid.columns))


class Found:
    """The scaled weights of one checkpoint, and what is wrong or left out."""

    def __init__(self, number: int, tensors: Mapping[str, TensorSpec], block: tuple[int, int] | None) -> None:
        """`number` is that of the checkpoint in the plan; `block` is what its configuration says, if it does."""
        self.scaled: dict[str, Scaled] = {}
        self.left_out: list[str] = []
        self.problems: list[str] = []
        scales: set[str] = set()
        for name, spec in tensors.items():
            if spec.dtype not in CODES:
                continue
            beside = next((name + suffix for suffix in SUFFIXES if name + suffix in tensors), None)
            if beside is None:
                self.problems.append(f"{name} is stored as {spec.dtype} without scales ({name}{SUFFIXES[0]} or "
                                     f"{name}{SUFFIXES[1]}): what its numbers mean is not known")  # fmt: skip
                continue
            grid = _grid(spec, tensors[beside], block)
            if grid is None:
                self.problems.append(f"{beside} is {tensors[beside].dtype} of shape {list(tensors[beside].shape)}: no "
                                     f"scales for {name}, {list(spec.shape)}")  # fmt: skip
                continue
            self.scaled[name] = Scaled(Read(number, spec), Read(number, tensors[beside]), grid)
            scales.add(beside)
        self.problems += [
            f"{name} has scales for a weight that is not stored in 8 bits, or is not there"
            for name in tensors
            if name not in scales and _OF_WEIGHTS.search(name)
        ]
        self.problems += [
            f"{name} is stored as {spec.dtype}, which is for scales, and is none of a weight here"
            for name, spec in tensors.items()
            if spec.dtype == "F8_E8M0" and name not in scales
        ]
        if self.scaled:
            self.left_out = [name for name in tensors if name not in scales and _OF_ACTIVATIONS.search(name)]
        self.hidden = scales | set(self.left_out)


def _grid(codes: TensorSpec, scales: TensorSpec, block: tuple[int, int] | None) -> Grid | None:
    """What part of a weight each scale is for, by the shapes; None when they do not go together."""
    if scales.dtype not in _SCALE_DTYPES or not codes.shape or 0 in codes.shape:
        return None
    *before, width = codes.shape
    rows, height = math.prod(before), before[-1] if before else 1
    if scales.elements == 1:
        return Grid(rows, width, (rows, width))
    if scales.elements == rows and (scales.shape[-1] == 1 or len(scales.shape) == len(before)):
        return Grid(height, width, (1, width))
    if len(before) > 1 and scales.elements * height == rows:
        return Grid(height, width, (height, width))
    found = fitting_block(codes.shape, scales.shape, block)
    return None if found is None else Grid(height, width, found)


def fitting_block(shape: tuple[int, ...], scale_shape: tuple[int, ...],
                  told: tuple[int, int] | None) -> tuple[int, int] | None:  # fmt: skip
    """The block of a matrix that each scale is for: what a configuration told, or the usual one, if it fits."""
    if len(shape) < 2 or len(scale_shape) != len(shape) or scale_shape[:-2] != shape[:-2]:
        return None
    for tall, wide in (*([told] if told else []), _USUAL_BLOCK):
        if scale_shape[-2:] == (-(-shape[-2] // tall), -(-shape[-1] // wide)):
            return tall, wide
    return None


# Forms of weights in integers and smaller floats: what tells them, how they are called, and the way out.
_ORIGINAL = "Merge the models it was made from, and quantise the result"
_FORMS: tuple[tuple[str, str, str], ...] = (
    (r"\.quant_state\.bitsandbytes__|\.weight\.(absmax|quant_map|nested_absmax)$", "bitsandbytes (4 bits)",
     "Load it with transformers, call model.dequantize(), save it, and merge that"),
    (r"\.(SCB|weight_format)$", "bitsandbytes (8 bits)",
     "Load it with transformers, call model.dequantize(), save it, and merge that"),
    (r"\.g_idx$", "GPTQ", _ORIGINAL),
    (r"\.qweight$", "AWQ or GPTQ", _ORIGINAL),
    (r"(_proj|experts|\.w[123])_blocks$", "MXFP4",
     "Load it with transformers' Mxfp4Config(dequantize=True), save it, and merge that"),
    (r"\.weight_packed$", "compressed-tensors (packed)", _ORIGINAL),
    (r"\.weight_scale_2$", "NVFP4", _ORIGINAL),
    (r"\.(W_q|Qidxs|codebooks|qscales)$", "HQQ, QuIP or AQLM", _ORIGINAL),
)  # fmt: skip


def quantised_as(tensors: Mapping[str, TensorSpec]) -> tuple[str, str] | None:
    """How weights are quantised that cannot be merged, and what to do; None when there are none.

    Sums of their codes would mean nothing, and equal codes with other scales are other weights.
    """
    for pattern, called, advice in _FORMS:
        known = re.compile(pattern)
        name = next((name for name in tensors if known.search(name)), None)
        if name is not None:
            return f"{called}: it holds {name}", advice
    for name, spec in tensors.items():
        kind = DTYPES[spec.dtype].kind
        whole = kind == "exact" and spec.dtype != "BOOL"
        small = kind == "quantised" and spec.dtype not in (*CODES, "F8_E8M0")
        if small or (whole and len(spec.shape) > 1 and name.endswith(".weight") and layer_of(name) is not None):
            return f"a way that is not known here: {name} is stored as {spec.dtype}", _ORIGINAL
    return None
