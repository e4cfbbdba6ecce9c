"""Reading predictions: how likely a network finds the choices of a batch, and how far it is from another network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from streammerge.study.batches import Batch, TaskBatches
from streammerge.study.network import Network
from streammerge.study.scorebook import Score

# Logits at a time. Fixed: how rows are grouped may change the last bits of a product of matrices.
LOGITS_AT_ONCE = 4 << 20


@dataclass(frozen=True)
class Reading:
    """Of one batch: per `batch.scored` the sum of its tokens' log-probabilities, and the divergences from a reference
    at its positions (none without a reference)."""

    log_probs: tuple[float, ...]
    distances: tuple[tuple[float, ...], ...]


def read_batch(network: Network, batch: Batch, hidden: Tensor, other: Network | None,
               reference: Tensor | None) -> Reading:  # fmt: skip
    """What `network`, its back in place, says of hidden states (rows, width, hidden) after the last block.

    With `other` and its hidden states `reference`, also the divergence KL(other || network) at every scored position.
    """
    wanted = torch.tensor(batch.wanted)
    place = {position: i for i, position in enumerate(batch.wanted)}
    rows = torch.tensor([place[row] for one in batch.scored for row in one.rows])
    targets = torch.tensor([target for one in batch.scored for target in one.targets])
    found, apart = torch.zeros(len(rows)), torch.zeros(len(wanted))
    picked = hidden.flatten(0, 1)[wanted]
    at_once = max(1, LOGITS_AT_ONCE // int(network.config.vocab_size))
    for first in range(0, len(wanted), at_once):
        part = slice(first, first + at_once)
        log_probs = _log_probs(network, picked[part])
        here = (rows >= first) & (rows < first + at_once)
        found[here] = log_probs[rows[here] - first, targets[here]]
        if other is not None and reference is not None:
            expected = _log_probs(other, reference.flatten(0, 1)[wanted[part]])
            apart[part] = (expected.exp() * (expected - log_probs)).sum(-1)
    values, distances = found.tolist(), apart.tolist()
    sums, at = [], 0
    for one in batch.scored:
        sums.append(sum(values[at : at + len(one.targets)]))
        at += len(one.targets)
    if reference is None:
        return Reading(tuple(sums), ())
    return Reading(tuple(sums), tuple(tuple(distances[place[row]] for row in one.rows) for one in batch.scored))


def as_score(task: TaskBatches, readings: Sequence[Reading]) -> Score:
    """The readings of a task's batches, put together by example."""
    choices: dict[tuple[int, int], float] = {}
    distances: dict[int, list[float]] = {}
    for batch, reading in zip(task.batches, readings, strict=True):
        for i, one in enumerate(batch.scored):
            choices[one.example, one.choice] = reading.log_probs[i]
            if reading.distances:
                distances.setdefault(one.example, []).extend(reading.distances[i])
    log_probs = tuple(
        tuple(choices[number, choice] for choice in range(max(1, len(example.choices))))
        for number, example in enumerate(task.examples)
    )
    means = tuple(sum(distances[i]) / len(distances[i]) for i in range(len(task.examples))) if distances else ()
    return Score(log_probs, means)


def _log_probs(network: Network, hidden: Tensor) -> Tensor:
    """(positions, vocabulary) float32."""
    return network.logits(hidden.to(network.device)).to(torch.float32).log_softmax(-1).to("cpu")
