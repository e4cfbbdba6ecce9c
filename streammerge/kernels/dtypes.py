"""torch's dtypes by the names of base/dtypes.py."""

from __future__ import annotations

import torch

from streammerge.base.dtypes import DTYPES


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of a safetensors dtype that has one."""
    dtype = getattr(torch, DTYPES[name].torch_name or "")
    assert isinstance(dtype, torch.dtype)
    return dtype
