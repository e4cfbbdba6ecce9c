"""Exact cuts: the k entries of largest size, in one total order, without sorting the tensor.

A `Quantity` gives the sizes, one column or several: |delta| of every model, or what else a method ranks. The order is
size descending, then index ascending; NaN counts as infinite. A cut is a threshold and the last index that stays among
the entries equal to it, so that exactly k entries stay however many are tied.

    sample    a few thousand sizes, spread over the tensor, say where the threshold must be
    count     per unit, how many sizes are >= each of some pivots; the threshold's interval shrinks
    collect   when few entries are left in the interval, or only tied ones: fetch them and pick the cut

The counts are exact integers and decide alone; the sample only makes it fast (two looks for bf16 inputs, where many
entries are tied, three for float32).
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from streammerge.kernels.contract import BLOCK, Argument, Arguments, Look, Problem, Program, Tile
from streammerge.kernels.select import counted_at_least, infinite_for_nan

# For one search of a column.
PIVOTS = 8
# So few entries in the interval are fetched and sorted rather than counted again.
COLLECT_AT_MOST = 1 << 17
_SAMPLE_PIECES, _SAMPLE_PIECE = 64, 1024
_SAMPLE_UNITS = 16
_SAMPLED_ROUNDS = 4

T = TypeVar("T")
Looking = Generator[Look, Any, T]


@dataclass(frozen=True)
class Cut:
    """Keep what is larger than `threshold`, and what equals it up to and including index `last`."""

    threshold: float
    last: int


KEEP_ALL, KEEP_NONE = Cut(-1.0, -1), Cut(float("inf"), -1)

CUT_ARGUMENTS = (Argument("threshold"), Argument("last", dtype=torch.int64))


def magnitude(values: Tensor) -> Tensor:
    """|values|, with NaN as infinity."""
    return infinite_for_nan(values.abs())


def magnitudes(tile: Tile, arguments: Arguments) -> list[Tensor]:
    """|delta| of every model."""
    return [magnitude(delta) for delta in tile.deltas()]


def cut_mask(size: Tensor, starts: Tensor, threshold: Tensor, last: Tensor) -> Tensor:
    """Which entries a cut keeps, by their sizes (blocks, BLOCK): bool. `starts` (blocks, 1) are the tile's."""
    position = torch.arange(size.shape[-1], dtype=torch.int32, device=size.device)[None, :]
    # Positions in the block fit int32, which compares twice as fast as int64.
    last_here = (last - starts).clamp(-1, BLOCK).to(torch.int32)
    return (size > threshold) | ((size == threshold) & (position <= last_here))


def cut_arguments(problem: Problem, cuts: list[Cut]) -> dict[str, Tensor]:
    """Cuts as the arguments of a program that takes CUT_ARGUMENTS."""
    return {
        "threshold": problem.tensor([cut.threshold for cut in cuts]),
        "last": torch.tensor([cut.last for cut in cuts], dtype=torch.int64),
    }


Sizes = Callable[[Tile, Arguments], list[Tensor]]


def _count(tile: Tile, arguments: Arguments, sizes: Sizes) -> Tensor:
    """(units, columns, pivots): how many sizes of a unit are >= each pivot."""
    pivots = arguments["pivots"]
    counts = []
    for column, size in enumerate(sizes(tile, arguments)):
        counts.append(counted_at_least(size.flatten(1), pivots[column]))
    return torch.stack(counts, 1)


def _fetch(tile: Tile, arguments: Arguments, sizes: Sizes) -> Tensor:
    """(units, columns, elements)."""
    return torch.stack([size.flatten(1) for size in sizes(tile, arguments)], 1)


@dataclass(frozen=True)
class Quantity:
    """What is ranked: `sizes` gives columns of numbers >= 0, NaN as infinity, each in the shape of the tile.

    They have the work dtype, or `dtype`. `arguments` are what `sizes` needs, beside the pivots. `searches` is how many
    cuts of a column are wanted at a time: each has eight pivots of its own. `by_width`: the tensors are cut by rows.
    """

    sizes: Sizes
    columns: int | Literal["K"] = "K"
    dtype: torch.dtype | None = None
    arguments: tuple[Argument, ...] = ()
    needs_starts: bool = False
    by_width: bool = False
    eager_ns: float = 4
    compiled_ns: float = 0.6
    searches: int = 1

    @property
    def pivots(self) -> int:
        return self.searches * PIVOTS

    @property
    def counting(self) -> Program:
        return Program(
            _count,
            (Argument("pivots", (self.columns, self.pivots), self.dtype), *self.arguments),
            (("sizes", self.sizes),),
            needs_starts=self.needs_starts,
            by_width=self.by_width,
            eager_ns=self.eager_ns,
            compiled_ns=self.compiled_ns,
        )

    @property
    def fetching(self) -> Program:
        return Program(
            _fetch,
            self.arguments,
            (("sizes", self.sizes),),
            needs_starts=self.needs_starts,
            by_width=self.by_width,
            eager_ns=self.eager_ns,
            compiled_ns=self.compiled_ns,
        )


MAGNITUDES = Quantity(magnitudes)


class Search:
    """The interval [low, high) that holds one column's threshold, as integer keys in the order of the floats.

    Counts are kept apart for parts of what is cut: the units of a tensor, or the tensors of a group.
    """

    def __init__(self, column: int, keep: int, sizes: NDArray[np.int64], work: torch.dtype) -> None:
        self.column, self.keep = column, keep
        self.low, self.high = 0, int(keys_of(np.array([np.inf], _float(work)))[0]) + 1
        self.at_least_low, self.at_least_high = sizes, np.zeros_like(sizes)
        self.cut: Cut | None = None

    @property
    def inside(self) -> NDArray[np.int64]:
        """Per part, how many entries lie in the interval."""
        return self.at_least_low - self.at_least_high

    @property
    def wanted(self) -> int:
        """How many entries of the interval stay."""
        return self.keep - int(self.at_least_high.sum())

    def pivots(self, sample: NDArray[np.int64], round_number: int, most: int) -> list[int]:
        """At most `most` keys inside (low, high), ascending: from the sorted sample, or evenly spread."""
        seen = sample[np.searchsorted(sample, self.low) : np.searchsorted(sample, self.high)]
        if round_number < _SAMPLED_ROUNDS and len(seen):
            if round_number == 0:
                seen = _window(seen, self.wanted / max(1, int(self.inside.sum())))
            values = np.unique(seen)
            if len(values) > most // 2:
                values = np.unique(seen[np.linspace(0, len(seen) - 1, most // 2).astype(int)])
            # A value and its successor: many entries may be equal, and then the cut lies among them.
            candidates = np.unique(np.concatenate([values, values + 1]))
            inside = [int(key) for key in candidates if self.low < key < self.high]
            if inside:
                return inside
        width = self.high - self.low
        return sorted({self.low + width * i // (most + 1) for i in range(1, most + 1)} - {self.low})

    def narrow(self, pivots: list[int], counts: NDArray[np.int64]) -> None:
        """Take in the counts (parts, len(pivots)) of sizes >= each pivot."""
        for i, (pivot, total) in enumerate(zip(pivots, counts.sum(0).tolist(), strict=True)):
            if total >= self.keep:
                self.low, self.at_least_low = pivot, counts[:, i]
            else:
                self.high, self.at_least_high = pivot, counts[:, i]
                break

    def settle(self, work: torch.dtype) -> bool:
        """The cut is known once the interval is one value and all its entries stay."""
        if self.high - self.low == 1 and int(self.inside.sum()) == self.wanted:
            self.cut = Cut(float(floats_of(np.array([self.low]), work)[0]), 2**62)
        return self.cut is not None

    def units_to_fetch(self) -> NDArray[np.int64] | None:
        """The units that hold what the cut is picked from, or None if counting must go on."""
        cumulative = np.cumsum(self.inside)
        if self.high - self.low == 1:
            return np.array([np.searchsorted(cumulative, self.wanted)])
        return np.flatnonzero(self.inside) if cumulative[-1] <= COLLECT_AT_MOST else None

    def pick(self, keys: NDArray[np.int64], index: NDArray[np.int64], unit: int, work: torch.dtype) -> None:
        """Choose the cut among fetched entries, given by key and index in ascending order of index."""
        wanted = self.wanted
        if self.high - self.low == 1:
            wanted -= int(self.inside[: index[0] // unit].sum())
        chosen = np.lexsort((index, -keys))[wanted - 1]
        self.cut = Cut(float(floats_of(keys[chosen : chosen + 1], work)[0]), int(index[chosen]))


def kept(density: float, elements: int) -> int:
    """How many of `elements` entries a density keeps: at least one, unless it is 0 or less."""
    return 0 if density <= 0 else elements if density >= 1 else max(1, int(density * elements))


def find_cuts(problem: Problem, quantity: Quantity, wanted: Sequence[tuple[int, int]],
              arguments: Arguments | None = None) -> Looking[list[Cut]]:  # fmt: skip
    """For every (column, k) of `wanted` the cut that keeps the k largest entries of that column.

    `arguments` are those of the quantity.
    """
    n = problem.elements
    found = {i: pair for i, pair in enumerate(wanted) if 0 < pair[1] < n}
    cuts = yield from _Ranking(problem, quantity, arguments or {}).cuts(list(found.values()))
    cut_of = dict(zip(found, cuts, strict=True))
    return [KEEP_NONE if k <= 0 else KEEP_ALL if k >= n else cut_of[i] for i, (_, k) in enumerate(wanted)]


def order_statistics(problem: Problem, quantity: Quantity, ranks: Sequence[int],
                     arguments: Arguments | None = None) -> Looking[list[float]]:  # fmt: skip
    """The sizes of one column at these ranks, counted from the smallest, which has rank 0."""
    cuts = yield from _Ranking(problem, quantity, arguments or {}).cuts(
        [(0, problem.elements - rank) for rank in ranks]
    )
    return [cut.threshold for cut in cuts]


@dataclass(frozen=True)
class _Ranking:
    """The looks at one quantity of one tensor."""

    problem: Problem
    quantity: Quantity
    arguments: Arguments

    @property
    def work(self) -> torch.dtype:
        """The dtype of the sizes."""
        return self.quantity.dtype or self.problem.work

    def cuts(self, wanted: Sequence[tuple[int, int]]) -> Looking[list[Cut]]:
        """The cut of every (column, k), k from 1 to the number of elements."""
        if not wanted:
            return []
        n, unit, work = self.problem.elements, self.problem.grain.unit, self.work
        sizes = np.full(self.problem.units, unit, np.int64)
        sizes[-1] -= self.problem.units * unit - n
        searches = [Search(column, k, sizes, work) for column, k in wanted]
        sample = yield from self.sample()
        if self.problem.units == 1:
            for search in searches:
                search.pick(sample[search.column], np.arange(n), unit, work)
        else:
            yield from self.narrow_all(searches, [np.sort(keys) for keys in sample])
        return [search.cut or KEEP_NONE for search in searches]

    def sample(self) -> Looking[NDArray[np.int64]]:
        """(columns, samples) keys; of a tensor of one unit, all of them in order."""
        n, grain = self.problem.elements, self.problem.grain
        if self.problem.units == 1:
            spans: tuple[tuple[int, int], ...] = ((0, n),)
        elif grain.width is None:
            step = (n - _SAMPLE_PIECE) // (_SAMPLE_PIECES - 1)
            spans = tuple((i * step, _SAMPLE_PIECE) for i in range(_SAMPLE_PIECES))
        else:
            whole = n // grain.unit
            chosen = sorted({i * (whole - 1) // (_SAMPLE_UNITS - 1) for i in range(_SAMPLE_UNITS)})
            spans = tuple((unit * grain.unit, grain.unit) for unit in chosen)
        answers = yield Look(self.quantity.fetching, self.arguments, spans, digest=_as_is)
        sizes: Tensor = torch.cat([part.transpose(0, 1).reshape(part.shape[1], -1) for part in answers], 1)
        if self.problem.units == 1:
            return keys_of(sizes[:, :n].numpy())
        step = max(1, sizes.shape[1] // (_SAMPLE_PIECES * _SAMPLE_PIECE))
        return keys_of(sizes[:, ::step].contiguous().numpy())

    def narrow_all(self, searches: Sequence[Search], sample: list[NDArray[np.int64]]) -> Looking[None]:
        work = self.work
        round_number = 0
        while open_searches := [search for search in searches if not search.settle(work)]:
            counting = [search for search in open_searches if search.units_to_fetch() is None]
            if not counting:
                yield from self._collect(open_searches)
                return
            table, chosen = choose_pivots(counting, sample, round_number, work, self.quantity.pivots)
            answer = yield Look(self.quantity.counting, {**self.arguments, "pivots": table})
            narrow(chosen, answer.numpy().astype(np.int64))
            round_number += 1

    def _collect(self, searches: Sequence[Search]) -> Looking[None]:
        """Fetch what lies in the open intervals and pick the cuts."""
        n, unit, work = self.problem.elements, self.problem.grain.unit, self.work
        fetched = [(search, units) for search in searches if (units := search.units_to_fetch()) is not None]
        needed = np.unique(np.concatenate([units for _, units in fetched]))
        spans = tuple((number * unit, min(unit, n - number * unit)) for number in needed.tolist())
        bounds = [(search.column, float_of(search.low, work), float_of(search.high - 1, work)) for search, _ in fetched]

        def digest(sizes: Tensor, starts: Tensor) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
            found = []
            for column, least, most in bounds:
                values = sizes[:, column].numpy()
                # Floats are compared first: keys of everything would take most of the time.
                unit_of, place = np.divmod(np.flatnonzero((values >= least) & (values <= most)), values.shape[1])
                index = starts.numpy()[unit_of, 0] + place
                inside = index < n
                found.append((keys_of(values[unit_of, place])[inside], index[inside]))
            return found

        whole = len(spans) == self.problem.units
        answers = yield Look(self.quantity.fetching, self.arguments, None if whole else spans, digest)
        for i, (search, units) in enumerate(fetched):
            keys = np.concatenate([answer[i][0] for answer in answers])
            index = np.concatenate([answer[i][1] for answer in answers])
            if search.high - search.low == 1:
                # Other searches may have asked for other units: only the one where the cut lies counts.
                here = np.isin(index // unit, units)
                keys, index = keys[here], index[here]
            search.pick(keys, index, unit, work)


Chosen = list[tuple[Search, int, list[int]]]


def choose_pivots(
    searches: Sequence[Search],
    sample: Sequence[NDArray[np.int64]],
    round_number: int,
    work: torch.dtype,
    width: int = PIVOTS,
) -> tuple[Tensor, Chosen]:
    """The pivots (columns, width) of a round, and which of them are whose: search, first, keys."""
    table = np.zeros((len(sample), width), np.int64)
    chosen: Chosen = []
    for column in sorted({search.column for search in searches}):
        here = [search for search in searches if search.column == column][: width // 2]
        at = 0
        for search in here:
            pivots = search.pivots(sample[column], round_number, width // len(here))
            chosen.append((search, at, pivots))
            table[column, at : at + len(pivots)] = pivots
            at += len(pivots)
    return torch.from_numpy(floats_of(table, work)), chosen


def narrow(chosen: Chosen, counts: NDArray[np.int64]) -> None:
    """Take in the counts (parts, columns, PIVOTS) of a round."""
    for search, at, pivots in chosen:
        search.narrow(pivots, counts[:, search.column, at : at + len(pivots)])


def _as_is(sizes: Tensor, starts: Tensor) -> Tensor:
    return sizes


def _window(seen: NDArray[np.int64], share_kept: float) -> NDArray[np.int64]:
    """The part of a sorted sample in which the threshold lies but for a chance in some ten thousand."""
    count = len(seen)
    middle = count * (1 - share_kept)
    reach = 4 * (count * share_kept * (1 - share_kept)) ** 0.5 + 2
    return seen[max(0, int(middle - reach)) : min(count, int(middle + reach) + 1)]


def _float(work: torch.dtype) -> type[np.floating[Any]]:
    return np.float64 if work is torch.float64 else np.float32


def keys_of(sizes: NDArray[Any]) -> NDArray[np.int64]:
    """Non-negative floats as integers in the same order: their bits."""
    return np.ascontiguousarray(sizes).view(np.int64 if sizes.dtype == np.float64 else np.int32).astype(np.int64)


def float_of(key: int, work: torch.dtype) -> float:
    """The number that has a key."""
    return float(floats_of(np.array([key]), work)[0])


def floats_of(keys: NDArray[np.int64], work: torch.dtype) -> NDArray[Any]:
    """The numbers that have these keys."""
    return keys.astype(np.int64 if work is torch.float64 else np.int32).view(_float(work))
