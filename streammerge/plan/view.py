"""A model as a stage of a recipe sees it: a checkpoint, or what an earlier stage makes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from streammerge.plan.names import stacks
from streammerge.storage.checkpoint import Checkpoint, TensorSpec

MOST_LAYERS = 100_000


class Operand(Protocol):
    """A tensor that can be merged with others: of a checkpoint, or made by a stage."""

    @property
    def dtype(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...


@dataclass(frozen=True)
class Read:
    """One tensor of one of the plan's checkpoints."""

    checkpoint: int
    spec: TensorSpec

    @property
    def dtype(self) -> str:
        return self.spec.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.spec.shape


@dataclass(frozen=True)
class View:
    """A model: its tensors by name, in order, and for each layer of its only stack the checkpoint's layer behind it."""

    model: str
    tensors: Mapping[str, Operand]
    origins: tuple[tuple[int, int], ...]

    @property
    def layers(self) -> int:
        return len(self.origins)


def view_of(model: str, number: int, checkpoint: Checkpoint) -> View:
    """A checkpoint as a stage sees it. Layers are counted in its only stack, or else in the longest."""
    depth = max(stacks(checkpoint.tensors).values(), default=0)
    # A name may hold any number: then nothing is known of layers.
    depth = depth if depth <= MOST_LAYERS else 0
    tensors = {name: Read(number, spec) for name, spec in checkpoint.tensors.items()}
    return View(model, tensors, tuple((number, layer) for layer in range(depth)))
