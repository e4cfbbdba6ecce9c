"""`streammerge inspect`: what a checkpoint holds, from its headers alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from streammerge.base.errors import InputError
from streammerge.plan.names import embedding_of, layer_of
from streammerge.plan.pickled import open_model
from streammerge.run.configuration import quantisation_of
from streammerge.storage.checkpoint import Checkpoint, TensorSpec


@dataclass(frozen=True)
class Inspection:
    """The facts of one checkpoint. `layers` counts the layers of each stack, by the name before the number.

    `vocabulary` are the rows of its token embedding, if it has one that is known by its name; `quantised` says how
    config.json says that the weights are quantised.
    """

    checkpoint: Checkpoint
    elements: int
    dtypes: dict[str, tuple[int, int]]
    layers: dict[str, int]
    vocabulary: int | None
    quantised: str | None

    @property
    def tensors(self) -> list[TensorSpec]:
        return list(self.checkpoint.tensors.values())


def inspect(path: Path) -> Inspection:
    """Look at the checkpoint at `path`. Raises InputError, naming the file that is missing or damaged."""
    if not path.exists():
        raise InputError(f"{path}: there is no such file or directory.")
    checkpoint = open_model(path)
    dtypes: dict[str, tuple[int, int]] = {}
    layers: dict[str, int] = {}
    for spec in checkpoint.tensors.values():
        count, nbytes = dtypes.get(spec.dtype, (0, 0))
        dtypes[spec.dtype] = (count + 1, nbytes + spec.nbytes)
        if (layer := layer_of(spec.name)) is not None:
            layers[layer[0]] = max(layers.get(layer[0], 0), layer[1] + 1)
    elements = sum(spec.elements for spec in checkpoint.tensors.values())
    embedding = embedding_of(checkpoint.tensors)
    rows = checkpoint.tensors[embedding].shape if embedding is not None else ()
    return Inspection(checkpoint, elements, dtypes, layers, rows[0] if rows else None, quantisation_of(checkpoint))
