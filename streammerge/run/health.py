"""`streammerge inspect --health`: one read of all weights, for what a merge should not begin with."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import xxhash
from torch import Tensor

from streammerge.base.dtypes import DTYPES
from streammerge.base.errors import DoesNotFit, Stopped
from streammerge.base.units import format_size
from streammerge.kernels.dtypes import torch_dtype
from streammerge.plan.scaled import CODES
from streammerge.run.memory import memory_limit, usage
from streammerge.storage.checkpoint import Checkpoint, TensorSpec
from streammerge.storage.source import Source

_PIECE = 4 << 20
# A piece, and what is worked out of it.
_ROOM = 64 << 20


@dataclass(frozen=True)
class Health:
    """What is odd in the weights: numbers that are not finite by tensor, tensors of nothing but zeros, and groups of
    matrices that hold the same bytes."""

    nonfinite: dict[str, int]
    zeros: tuple[str, ...]
    duplicates: tuple[tuple[str, ...], ...]


def check_health(checkpoint: Checkpoint, *, max_memory: int | None, stopping: Callable[[], bool],
                 progress: Callable[[float, float], None]) -> Health:  # fmt: skip
    """Read every tensor once, a piece at a time. Raises InputError, DoesNotFit, Stopped."""
    limit, limited_by = memory_limit(max_memory)
    need = usage().resident + _ROOM
    if need > limit:
        raise DoesNotFit(
            f"{format_size(limit)} of memory ({limited_by}) is too little: reading takes {format_size(need)}."
        )
    nonfinite: dict[str, int] = {}
    zeros: list[str] = []
    same: dict[tuple[str, tuple[int, ...], str], list[str]] = {}
    done = 0
    buffer = bytearray(_PIECE)
    source = Source(checkpoint)
    try:
        for spec in checkpoint.tensors.values():
            hashing, bad, any_set = xxhash.xxh3_128(), 0, False
            for start in range(0, spec.nbytes, _PIECE):
                if stopping():
                    raise Stopped("stopped")
                view = memoryview(buffer)[: min(_PIECE, spec.nbytes - start)]
                source.read_into(view, spec.file, spec.offset + start)
                hashing.update(view)
                values = _values(spec, view)
                bad += int(values.isfinite().logical_not().sum()) if values.is_floating_point() else 0
                any_set = any_set or bool((values != 0).any())
                done += len(view)
                progress(done, checkpoint.nbytes)
            if bad:
                nonfinite[spec.name] = bad
            if spec.nbytes and not any_set:
                zeros.append(spec.name)
            elif len(spec.shape) > 1 and math.prod(spec.shape) > 1:
                same.setdefault((spec.dtype, spec.shape, hashing.hexdigest()), []).append(spec.name)
        source.check_unchanged()
    finally:
        source.close()
    return Health(nonfinite, tuple(zeros), tuple(tuple(names) for names in same.values() if len(names) > 1))


def _values(spec: TensorSpec, view: memoryview) -> Tensor:
    """A piece as floats, codes of 8 bits too; as bytes where it holds anything else."""
    if spec.dtype in CODES:
        return torch.frombuffer(view, dtype=torch_dtype(spec.dtype)).to(torch.float32)
    is_float = DTYPES[spec.dtype].kind == "float"
    return torch.frombuffer(view, dtype=torch_dtype(spec.dtype) if is_float else torch.uint8)
