"""What a tensor's name says: its layer, and where along the layers that is."""

from __future__ import annotations

import re
from collections.abc import Iterable

# The first number between dots, or at the start, counts the layers: model.layers.3.mlp.experts.5 is layer 3.
_LAYER = re.compile(r"(?:^|(?P<stack>.*?)\.)(?P<index>\d{1,9})\.")


def layer_of(name: str) -> tuple[str, int] | None:
    """The stack of layers a tensor belongs to (the name before the number) and its layer, or None."""
    match = _LAYER.match(name)
    return None if match is None else (match["stack"] or "", int(match["index"]))


def gradient_positions(names: Iterable[str]) -> dict[str, float]:
    """For every tensor where gradients are read: 0 at the first layer of its stack, 1 at the last.

    Tensors outside the layers, before or after, are at 0, and the layer of a stack of one is at 1, as in mergekit.
    """
    layers = {name: layer_of(name) for name in names}
    depth: dict[str, int] = {}
    for layer in layers.values():
        if layer is not None:
            depth[layer[0]] = max(depth.get(layer[0], 0), layer[1] + 1)
    positions: dict[str, float] = {}
    for name, layer in layers.items():
        if layer is None:
            positions[name] = 0.0
        else:
            stack, index = layer
            positions[name] = index / (depth[stack] - 1) if depth[stack] > 1 else 1.0
    return positions
