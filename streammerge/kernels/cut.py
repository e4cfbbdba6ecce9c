"""Exact magnitude cuts: the k entries of largest |delta|, in one total order, without sorting the tensor.

The order is |delta| descending, then index ascending; NaN counts as infinite. A cut is a threshold and the last index
that stays among the entries equal to it, so that exactly k entries stay however many are tied.

    sample    a few thousand magnitudes, spread over the tensor, say where the threshold must be
    count     per block, how many magnitudes are >= each of eight pivots; the threshold's interval shrinks
    collect   when few entries are left in the interval, or only tied ones: fetch them and pick the cut

The counts are exact integers and decide alone; the sample only makes it fast (two looks for bf16 inputs, where many
entries are tied, three for float32).
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from streammerge.kernels.contract import BLOCK, Argument, Arguments, Look, Problem, Program, Tile

PIVOTS = 8
# So few entries in the interval are fetched and sorted rather than counted again.
COLLECT_AT_MOST = 1 << 17
_SAMPLE_PIECES, _SAMPLE_PIECE = 64, 1024
_SAMPLED_ROUNDS = 4

T = TypeVar("T")
Looking = Generator[Look, Any, T]


@dataclass(frozen=True)
class Cut:
    """Keep |delta| > threshold, and |delta| == threshold up to and including index `last`."""

    threshold: float
    last: int


KEEP_ALL, KEEP_NONE = Cut(-1.0, -1), Cut(float("inf"), -1)

CUT_ARGUMENTS = (Argument("threshold"), Argument("last", dtype=torch.int64))


def magnitude(delta: Tensor) -> Tensor:
    """|delta|, with NaN as infinity."""
    size = delta.abs()
    return torch.where(size == size, size, float("inf"))  # noqa: PLR0124 - false for NaN only


def cut_mask(delta: Tensor, starts: Tensor, threshold: Tensor, last: Tensor) -> Tensor:
    """Which entries a cut keeps: (blocks, BLOCK) bool. `starts` (blocks, 1) are the tile's."""
    size = magnitude(delta)
    position = torch.arange(delta.shape[-1], dtype=torch.int32, device=delta.device)[None, :]
    # Positions in the block fit int32, which compares twice as fast as int64.
    last_here = (last - starts).clamp(-1, BLOCK).to(torch.int32)
    return (size > threshold) | ((size == threshold) & (position <= last_here))


def cut_arguments(problem: Problem, cuts: list[Cut]) -> dict[str, Tensor]:
    """Cuts as the arguments of a program that takes CUT_ARGUMENTS."""
    return {
        "threshold": problem.tensor([cut.threshold for cut in cuts]),
        "last": torch.tensor([cut.last for cut in cuts], dtype=torch.int64),
    }


def _count(tile: Tile, arguments: Arguments) -> Tensor:
    """(blocks, models, PIVOTS): how many magnitudes of a block are >= each pivot.

    float32 holds every count up to 65,536 exactly, and adds them faster than integers.
    """
    pivots = arguments["pivots"]
    counts = []
    for model, delta in enumerate(tile.deltas()):
        size = magnitude(delta)
        counts.append(torch.stack([torch.where(size >= pivots[model, i], 1.0, 0.0).sum(-1) for i in range(PIVOTS)], -1))
    return torch.stack(counts, 1)


def _magnitudes(tile: Tile, arguments: Arguments) -> Tensor:
    """(blocks, models, BLOCK)."""
    return torch.stack([magnitude(delta) for delta in tile.deltas()], 1)


COUNT = Program(_count, (Argument("pivots", ("K", PIVOTS)),), eager_ns=16)
_MAGNITUDES = Program(_magnitudes)


class _Search:
    """The interval [low, high) that holds one model's threshold, as integer keys in the order of the floats."""

    def __init__(self, keep: int, elements: int, blocks: int, work: torch.dtype) -> None:
        self.keep = keep
        self.low, self.high = 0, int(_keys(np.array([np.inf], _float(work)))[0]) + 1
        self.at_least_low = np.full(blocks, BLOCK, np.int64)
        self.at_least_low[-1] -= blocks * BLOCK - elements
        self.at_least_high = np.zeros(blocks, np.int64)
        self.cut: Cut | None = None

    @property
    def inside(self) -> NDArray[np.int64]:
        """Per block, how many entries lie in the interval."""
        return self.at_least_low - self.at_least_high

    @property
    def wanted(self) -> int:
        """How many entries of the interval stay."""
        return self.keep - int(self.at_least_high.sum())

    def pivots(self, sample: NDArray[np.int64], round_number: int) -> list[int]:
        """At most PIVOTS keys inside (low, high), ascending: from the sorted sample, or evenly spread."""
        seen = sample[np.searchsorted(sample, self.low) : np.searchsorted(sample, self.high)]
        if round_number < _SAMPLED_ROUNDS and len(seen):
            if round_number == 0:
                seen = _window(seen, self.wanted / max(1, int(self.inside.sum())))
            values = np.unique(seen)
            if len(values) > PIVOTS // 2:
                values = np.unique(seen[np.linspace(0, len(seen) - 1, PIVOTS // 2).astype(int)])
            # A value and its successor: many entries may be equal, and then the cut lies among them.
            candidates = np.unique(np.concatenate([values, values + 1]))
            inside = [int(key) for key in candidates if self.low < key < self.high]
            if inside:
                return inside
        width = self.high - self.low
        return sorted({self.low + width * i // (PIVOTS + 1) for i in range(1, PIVOTS + 1)} - {self.low})

    def narrow(self, pivots: list[int], counts: NDArray[np.int64]) -> None:
        """Take in the counts (blocks, len(pivots)) of magnitudes >= each pivot."""
        for i, (pivot, total) in enumerate(zip(pivots, counts.sum(0).tolist(), strict=True)):
            if total >= self.keep:
                self.low, self.at_least_low = pivot, counts[:, i]
            else:
                self.high, self.at_least_high = pivot, counts[:, i]
                break

    def settle(self, work: torch.dtype) -> bool:
        """The cut is known once the interval is one value and all its entries stay."""
        if self.high - self.low == 1 and int(self.inside.sum()) == self.wanted:
            self.cut = Cut(float(_floats(np.array([self.low]), work)[0]), 2**62)
        return self.cut is not None

    def blocks_to_fetch(self) -> NDArray[np.int64] | None:
        """The blocks that hold what the cut is picked from, or None if counting must go on."""
        cumulative = np.cumsum(self.inside)
        if self.high - self.low == 1:
            return np.array([np.searchsorted(cumulative, self.wanted)])
        return np.flatnonzero(self.inside) if cumulative[-1] <= COLLECT_AT_MOST else None

    def pick(self, keys: NDArray[np.int64], index: NDArray[np.int64], work: torch.dtype) -> None:
        """Choose the cut among fetched entries, given by key and index in ascending order of index."""
        wanted = self.wanted
        if self.high - self.low == 1:
            wanted -= int(self.inside[: index[0] // BLOCK].sum())
        chosen = np.lexsort((index, -keys))[wanted - 1]
        self.cut = Cut(float(_floats(keys[chosen : chosen + 1], work)[0]), int(index[chosen]))


def magnitude_cuts(problem: Problem, densities: list[float]) -> Looking[list[Cut]]:
    """The cuts that keep the share `densities[i]` of model i's delta: exactly max(1, int(density · n)) entries.

    A density of 1 or more keeps everything, of 0 or less nothing.
    """
    n, work = problem.elements, problem.work
    cuts: list[Cut | None] = [
        KEEP_ALL if density >= 1 else KEEP_NONE if density <= 0 else None for density in densities
    ]
    blocks = -(-n // BLOCK)
    searches = {
        i: _Search(max(1, int(density * n)), n, blocks, work) for i, density in enumerate(densities) if cuts[i] is None
    }
    if searches:
        sample = yield from _sample(problem)
        if blocks == 1:
            for i, search in searches.items():
                search.pick(sample[i], np.arange(n), work)
        else:
            yield from _narrow_all(problem, searches, [np.sort(keys) for keys in sample])
    return [cut or searches[i].cut or KEEP_NONE for i, cut in enumerate(cuts)]


def _sample(problem: Problem) -> Looking[NDArray[np.int64]]:
    """(models, samples) keys; of a tensor of one block, all of them in order."""
    n = problem.elements
    if n <= BLOCK:
        spans: tuple[tuple[int, int], ...] = ((0, n),)
    else:
        step = (n - _SAMPLE_PIECE) // (_SAMPLE_PIECES - 1)
        spans = tuple((i * step, _SAMPLE_PIECE) for i in range(_SAMPLE_PIECES))
    answer = yield Look(_MAGNITUDES, {}, spans)
    sizes: Tensor = answer[0, :, : min(n, BLOCK)]
    return _keys(sizes.numpy())


def _narrow_all(problem: Problem, searches: dict[int, _Search], sample: list[NDArray[np.int64]]) -> Looking[None]:
    round_number = 0
    while open_searches := {i: s for i, s in searches.items() if not s.settle(problem.work)}:
        counting = {i: s for i, s in open_searches.items() if s.blocks_to_fetch() is None}
        if not counting:
            yield from _collect(problem, open_searches)
            return
        chosen = {i: s.pivots(sample[i], round_number) for i, s in counting.items()}
        table = np.zeros((problem.models, PIVOTS), np.int64)
        for i, pivots in chosen.items():
            table[i] = pivots + [pivots[-1]] * (PIVOTS - len(pivots))
        answer = yield Look(COUNT, {"pivots": torch.from_numpy(_floats(table, problem.work))})
        counts = answer.numpy().astype(np.int64)
        for i, pivots in chosen.items():
            counting[i].narrow(pivots, counts[:, i, : len(pivots)])
        round_number += 1


def _collect(problem: Problem, searches: dict[int, _Search]) -> Looking[None]:
    """Fetch what lies in the open intervals and pick the cuts."""
    fetched = {i: blocks for i, search in searches.items() if (blocks := search.blocks_to_fetch()) is not None}
    needed = np.unique(np.concatenate(list(fetched.values())))
    n = problem.elements
    spans = tuple((block * BLOCK, min(BLOCK, n - block * BLOCK)) for block in needed.tolist())
    bounds = {i: (s.low, s.high) for i, s in searches.items()}

    def digest(sizes: Tensor, starts: Tensor) -> dict[int, tuple[NDArray[np.int64], NDArray[np.int64]]]:
        found = {}
        for i, (low, high) in bounds.items():
            keys = _keys(sizes[:, i].numpy())
            index = np.arange(BLOCK)[None, :] + starts.numpy()
            inside = (keys >= low) & (keys < high) & (index < n)
            found[i] = (keys[inside], index[inside])
        return found

    whole = len(spans) * BLOCK >= n
    answers = yield Look(_MAGNITUDES, {}, None if whole else spans, digest)
    for i, search in searches.items():
        keys = np.concatenate([answer[i][0] for answer in answers])
        index = np.concatenate([answer[i][1] for answer in answers])
        if search.high - search.low == 1:
            # Other searches may have asked for other blocks: only the one where the cut lies counts.
            here = np.isin(index // BLOCK, fetched[i])
            keys, index = keys[here], index[here]
        search.pick(keys, index, problem.work)


def _window(seen: NDArray[np.int64], share_kept: float) -> NDArray[np.int64]:
    """The part of a sorted sample in which the threshold lies but for a chance in some ten thousand."""
    count = len(seen)
    middle = count * (1 - share_kept)
    reach = 4 * (count * share_kept * (1 - share_kept)) ** 0.5 + 2
    return seen[max(0, int(middle - reach)) : min(count, int(middle + reach) + 1)]


def _float(work: torch.dtype) -> type[np.floating[Any]]:
    return np.float64 if work is torch.float64 else np.float32


def _keys(sizes: NDArray[Any]) -> NDArray[np.int64]:
    """Non-negative floats as integers in the same order: their bits."""
    return np.ascontiguousarray(sizes).view(np.int64 if sizes.dtype == np.float64 else np.int32).astype(np.int64)


def _floats(keys: NDArray[np.int64], work: torch.dtype) -> NDArray[Any]:
    return keys.astype(np.int64 if work is torch.float64 else np.int32).view(_float(work))
