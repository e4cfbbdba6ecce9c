"""Without data: which layers look like conflicts, by their weights alone. A proxy, and every output says so.

    conflict(l) = Σ min(|δ_A|, |δ_B|) · [δ_A δ_B < 0] / Σ |δ|

over the elements of a layer, for every pair of models; Σ |δ| is over all models. The layers with the most are treated
as partial conflicts: every model's delta there is pruned and scaled again by halves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from streammerge.kernels.blocksum import block_sum, total
from streammerge.study.mixture import Family


@dataclass(frozen=True)
class Clash:
    """One layer: its label, and the share of its deltas' mass that cancels between models of opposite sign."""

    layer: int
    label: str
    share: float


def weigh_conflicts(family: Family) -> list[Clash]:
    """The sign-conflict mass of every layer, in one pass over the weights, a tensor at a time."""
    clashes = []
    for layer in family.layers:
        opposed = mass = 0.0
        for inputs in family.stored(layer):
            a, b = _masses(inputs)
            opposed, mass = opposed + a, mass + b
        clashes.append(Clash(layer, family.groups[layer].label, opposed / mass if mass else 0.0))
    return clashes


def _masses(inputs: Sequence[torch.Tensor]) -> tuple[float, float]:
    opposed, mass = [], []
    for row in range(len(inputs[0])):
        values = [stored[row : row + 1].to(torch.float32) for stored in inputs]
        deltas = [model - values[0] for model in values[1:]]
        mass.append(torch.stack([block_sum(delta.abs()) for delta in deltas]).sum(0))
        pairs = [(a, b) for i, a in enumerate(deltas) for b in deltas[i + 1 :]]
        parts = [block_sum(torch.where(a * b < 0, torch.minimum(a.abs(), b.abs()), 0.0)) for a, b in pairs]
        opposed.append(torch.stack(parts).sum(0))
    return total(torch.cat(opposed)[:, None])[0], total(torch.cat(mass)[:, None])[0]
