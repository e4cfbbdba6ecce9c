"""Exact cuts: the k entries of largest size, in one total order, without sorting the tensor.

A `Quantity` gives the sizes, one column or several: |delta| of every model, or what else a method ranks. The order is
size descending, then index ascending; NaN counts as infinite. A cut is a threshold and the last index that stays among
the entries equal to it, so that exactly k entries stay however many are tied.

    sample    a few thousand sizes, spread over the tensor, say where the threshold must be
    sift      where few entries lie there: fetch them, count what is larger, and pick the cut, in one look
    count     else: per unit, how many sizes are >= each of some pivots; the threshold's interval shrinks
    collect   when few entries are left in the interval, or only tied ones: fetch them and pick the cut

The counts are exact integers and decide alone; the sample only makes it fast: one look at everything for float32, and
for bf16 inputs one and a look at the block in which the cut lies, as many entries are tied.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from streammerge.kernels.contract import BLOCK, Argument, Arguments, Look, Problem, Program, Tile
from streammerge.kernels.select import between, counted_at_least, infinite_for_nan

# For one search of a column.
PIVOTS = 8
# So few entries in the interval are fetched and sorted rather than counted again.
COLLECT_AT_MOST = 1 << 17
# A sample is of so many entries at least and at most; of one in `_SAMPLE_EVERY` where that lies between.
_SMALLEST_SAMPLE, LARGEST_SAMPLE, _SAMPLE_EVERY = 1 << 16, 1 << 18, 256
_SAMPLE_PIECE = 1024
_SAMPLE_PARTS = 16
_SAMPLED_ROUNDS = 4
# How many standard errors the threshold may lie from where a sample has it.
_ERRORS = 3
# Added to indices of each column after the first.
_COLUMN = 1 << 48
# With the largest sample, where half of the entries are kept, of so many elements that few are sifted out.
_SIFTED_AT_ONCE = 75_000_000

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


def _sift(tile: Tile, arguments: Arguments, sizes: Sizes) -> Tensor:
    """(units, columns, bounds + elements) of the dtype of the sizes, for bounds that are pairs [low, high).

    How many sizes are >= each bound, as -1 - n; then the sizes, with -1 in place of those that lie in no pair. A high
    of NaN is above everything, a low of NaN, too.
    """
    found = []
    for bounds, size in zip(arguments["bounds"], sizes(tile, arguments), strict=True):
        flat = size.flatten(1)
        counts = counted_at_least(flat, bounds).to(flat.dtype)
        found.append(torch.cat([-1 - counts, between(flat, bounds.view(-1, 2))], -1))
    return torch.stack(found, 1)


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
        return replace(self.counting, function=_fetch, arguments=self.arguments)

    @property
    def sifting(self) -> Program:
        bounds = Argument("bounds", (self.columns, 2 * self.searches), self.dtype)
        return replace(self.counting, function=_sift, arguments=(bounds, *self.arguments))

    def columns_of(self, problem: Problem) -> int:
        """How many columns there are."""
        return problem.models if self.columns == "K" else self.columns

    def looks(self, narrow: bool, elements: int) -> tuple[Program, ...]:
        """What everything of a tensor is looked at with for its cuts, as a rule."""
        if narrow:
            return (self.counting,)
        return (self.sifting,) if looks_at_everything(narrow, elements) == 1 else (self.counting, self.sifting)


MAGNITUDES = Quantity(magnitudes)


class Search:
    """The interval [low, high) that holds one column's threshold, as integer keys in the order of the floats.

    Counts are kept apart for parts of what is cut: the units of a tensor, or the tensors of a group.
    """

    def __init__(self, column: int, keep: int, sizes: NDArray[np.int64], work: torch.dtype) -> None:
        self.column, self.keep = column, keep
        self.low, self.high = 0, _above_all(work)
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

    def bracket(self, sample: NDArray[np.int64], ordered: NDArray[np.int64]) -> Bracket | None:
        """An interval that most likely holds the threshold, by a sample as it lies in the tensor and sorted.

        None if so many entries are equal there that it is better to count first.
        """
        count, total = len(sample), int(self.inside.sum())
        share = self.wanted / max(1, total)
        # What one part of the tensor has may be unlike another: parts of the sample tell.
        value = ordered[min(count - 1, int(count * (1 - share)))]
        shares = [np.mean(part >= value) for part in np.array_split(sample, _SAMPLE_PARTS)]
        error = max((share * (1 - share) / count) ** 0.5, float(np.std(shares)) / (_SAMPLE_PARTS - 1) ** 0.5)
        middle, reach = count * (1 - share), _ERRORS * count * error + 2
        first, last = int(middle - reach), int(middle + reach) + 1
        low = int(ordered[first]) if first > 0 else self.low
        high = int(ordered[last]) + 1 if last < count else self.high
        seen = ordered[np.searchsorted(ordered, low) : np.searchsorted(ordered, high)]
        # The cut may lie among equal ones: then a count finds it.
        tied = PIVOTS * int(np.unique(seen, return_counts=True)[1].max(initial=0)) > len(seen)
        # A few more than the sample says.
        return None if tied else Bracket(self, low, high, len(seen) * total * 9 // (8 * count))

    def pick(self, keys: NDArray[np.int64], index: NDArray[np.int64], unit: int, work: torch.dtype) -> None:
        """Choose the cut among the entries of the interval, and maybe others, by key and index in any order."""
        wanted = self.wanted
        if self.high - self.low == 1:
            # All are equal: what counts is the unit where the cut lies.
            place = int(np.searchsorted(np.cumsum(self.inside), wanted))
            wanted -= int(self.inside[:place].sum())
            here = index // unit == place
            keys, index = keys[here], index[here]
        inside = keys[(keys >= self.low) & (keys < self.high)]
        key = np.partition(inside, len(inside) - wanted)[len(inside) - wanted]
        equal, wanted = index[keys == key], wanted - int(np.count_nonzero(inside > key))
        self.cut = Cut(float_of(int(key), work), int(np.partition(equal, wanted - 1)[wanted - 1]))


class Bracket(NamedTuple):
    """An interval [low, high) in which a search looks for its threshold, and about how many entries lie there."""

    search: Search
    low: int
    high: int
    entries: int

    def narrow(self, counts: NDArray[np.int64]) -> None:
        """Take in how many of each unit are >= low and >= high."""
        inner = [(i, key) for i, key in enumerate(self[1:3]) if self.search.low < key < self.search.high]
        self.search.narrow([key for _, key in inner], counts[:, [i for i, _ in inner]])


def kept(density: float, elements: int) -> int:
    """How many of `elements` entries a density keeps: at least one, unless it is 0 or less."""
    return 0 if density <= 0 else elements if density >= 1 else max(1, int(density * elements))


def looks_at_everything(narrow: bool, elements: int) -> int:
    """How often all of a tensor is looked at for its cuts, as a rule. `narrow`: all inputs are of 16 bits."""
    # Of larger ones too much lies where a sample says that a threshold is.
    return 1 if narrow or elements <= _SIFTED_AT_ONCE else 2


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


def order_statistics(problem: Problem, quantity: Quantity, ranks: Sequence[int], arguments: Arguments | None = None,
                     sample: NDArray[np.floating[Any]] | None = None) -> Looking[list[float]]:  # fmt: skip
    """The sizes of one column at these ranks, counted from the smallest, which has rank 0.

    `sample` (1, entries) has some sizes in the order of the tensor; it must be given of a tensor that is cut by rows.
    """
    cuts = yield from _Ranking(problem, quantity, arguments or {}).cuts(
        [(0, problem.elements - rank) for rank in ranks], None if sample is None else keys_of(sample)
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

    def cuts(self, wanted: Sequence[tuple[int, int]], sample: NDArray[np.int64] | None = None) -> Looking[list[Cut]]:
        """The cut of every (column, k), k from 1 to the number of elements. A tensor of one unit is its own sample."""
        if not wanted:
            return []
        n, unit, work = self.problem.elements, self.problem.grain.unit, self.work
        sizes = np.full(self.problem.units, unit, np.int64)
        sizes[-1] -= self.problem.units * unit - n
        searches = [Search(column, k, sizes, work) for column, k in wanted]
        if sample is None or self.problem.units == 1:
            sample = yield from self.sample()
        if self.problem.units == 1:
            for search in searches:
                search.pick(sample[search.column], np.arange(n), unit, work)
        else:
            yield from self.narrow_all(searches, sample)
        return [search.cut or KEEP_NONE for search in searches]

    def sample(self) -> Looking[NDArray[np.int64]]:
        """(columns, samples) keys in the order of the tensor; of a tensor of one unit, all of them."""
        n, grain = self.problem.elements, self.problem.grain
        size = min(max(_SMALLEST_SAMPLE, n // _SAMPLE_EVERY // BLOCK * BLOCK), LARGEST_SAMPLE)
        if self.problem.units == 1:
            spans: tuple[tuple[int, int], ...] = ((0, n),)
        else:
            # By rows only whole units are looked at: a sample of them is far more than is needed, and is given.
            assert grain.width is None
            pieces = size // _SAMPLE_PIECE
            step = (n - _SAMPLE_PIECE) // (pieces - 1)
            spans = tuple((i * step, _SAMPLE_PIECE) for i in range(pieces))
        bounds = self.bounds([(column, 0, _above_all(self.work)) for column in range(self.columns)])
        answers = yield Look(self.quantity.sifting, bounds, spans, digest=_as_is)
        skip = 2 * self.quantity.searches
        sizes: Tensor = torch.cat([part.transpose(0, 1)[..., skip:].flatten(1) for part in answers], 1)
        # The last block is filled up with what is no size.
        return keys_of(sizes[:, : sum(count for _, count in spans)].numpy())

    @property
    def columns(self) -> int:
        return self.quantity.columns_of(self.problem)

    def bounds(self, intervals: Sequence[tuple[int, int, int]]) -> Arguments:
        """The arguments of sifting for some (column, low, high)."""
        table = np.full((self.columns, 2 * self.quantity.searches), _above_all(self.work))
        used = [0] * self.columns
        for column, *interval in intervals:
            table[column, used[column] : used[column] + 2] = interval
            used[column] += 2
        return {**self.arguments, "bounds": torch.from_numpy(floats_of(table, self.work))}

    def narrow_all(self, searches: Sequence[Search], sample: NDArray[np.int64]) -> Looking[None]:
        work, ordered = self.work, np.sort(sample)
        brackets = [search.bracket(sample[search.column], ordered[search.column]) for search in searches]
        promising = [bracket for bracket in brackets if bracket is not None]
        entries = sum(bracket.entries for bracket in promising)
        round_number = 0
        if len(promising) == len(searches) and entries <= self.problem.sifts:
            yield from self._sift(promising, None)
            # What is open now is not where the sample has it.
            round_number = 1
        while open_searches := [search for search in searches if not search.settle(work)]:
            counting = [search for search in open_searches if search.units_to_fetch() is None]
            if not counting:
                yield from self._collect(open_searches)
                return
            table, chosen = choose_pivots(counting, list(ordered), round_number, work, self.quantity.pivots)
            answer = yield Look(self.quantity.counting, {**self.arguments, "pivots": table})
            narrow(chosen, answer.numpy().astype(np.int64))
            round_number += 1

    def _collect(self, searches: Sequence[Search]) -> Looking[None]:
        """Fetch what lies in the open intervals, of which each holds little or is one value, and pick the cuts."""
        tied = [search for search in searches if search.high - search.low == 1]
        for some in (tied, [search for search in searches if search not in tied]):
            # Of one value there may be many in other units.
            units = [found for search in some if (found := search.units_to_fetch()) is not None]
            if units:
                needed = np.unique(np.concatenate(units))
                most = [int(search.inside[needed].sum()) for search in some]
                brackets = [Bracket(search, search.low, search.high, n) for search, n in zip(some, most, strict=True)]
                yield from self._sift(brackets, needed)

    def _sift(self, brackets: Sequence[Bracket], units: NDArray[np.int64] | None) -> Looking[None]:
        """Sift some units, or all, and pick the cuts that are there. Of all units the intervals are narrowed, too."""
        n, unit, skip = self.problem.elements, self.problem.grain.unit, 2 * self.quantity.searches
        spans = None
        if units is not None and len(units) < self.problem.units:
            spans = tuple((i * unit, min(unit, n - i * unit)) for i in units.tolist())
        # The zeros that fill up a block may be among them.
        sieve = _Sieve(BLOCK * self.columns + sum(bracket.entries for bracket in brackets), self.work)

        def digest(found: Tensor, starts: Tensor) -> Tensor:
            sieve.add(found, starts, skip)
            return found[..., :skip].clone(memory_format=torch.contiguous_format)

        bounds = self.bounds([(bracket.search.column, bracket.low, bracket.high) for bracket in brackets])
        answers = yield Look(self.quantity.sifting, bounds, spans, digest)
        counts = -1 - torch.cat(answers).numpy().astype(np.int64)
        for column in range(self.columns):
            here = [bracket for bracket in brackets if bracket.search.column == column]
            if spans is None:
                for i, bracket in enumerate(here):
                    bracket.narrow(counts[:, column, 2 * i : 2 * i + 2])
            if not sieve.overflows:
                keys, index = sieve.entries(column, n)
                for bracket in here:
                    if (bracket.search.low, bracket.search.high) == (bracket.low, bracket.high):
                        bracket.search.pick(keys, index, unit, self.work)


class _Sieve:
    """The entries that are sifted out, with room for so many, as threads find them."""

    def __init__(self, room: int, work: torch.dtype) -> None:
        self._sizes, self._places = np.empty(room, _float(work)), np.empty(room, np.int64)
        self._found = 0
        self._lock = threading.Lock()

    @property
    def overflows(self) -> bool:
        """Whether there were too many."""
        return self._found > len(self._sizes)

    def add(self, found: Tensor, starts: Tensor, skip: int) -> None:
        """Take in what `_sift` gives of some units, after so many counts."""
        units, columns, width = found.shape
        flat = found.numpy().reshape(-1)
        where = np.flatnonzero(flat >= 0)
        # What an entry's place in all of this has over its index, row by row.
        rows = np.arange(units * columns)
        over = rows * width + skip - np.repeat(starts.numpy()[:, 0], columns) - rows % columns * _COLUMN
        counts = np.diff(np.searchsorted(where, np.append(rows, len(rows)) * width))
        sizes, places = flat[where], where - np.repeat(over, counts)
        with self._lock:
            first, self._found = self._found, self._found + len(where)
            if not self.overflows:
                self._sizes[first : self._found], self._places[first : self._found] = sizes, places

    def entries(self, column: int, elements: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Keys and indices of a column's entries, in any order."""
        keys, places = keys_of(self._sizes[: self._found]), self._places[: self._found]
        if column:
            places = places - column * _COLUMN
        here = (places >= 0) & (places < elements)
        return (keys, places) if here.all() else (keys[here], places[here])


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
    return (
        np.ascontiguousarray(sizes)
        .view(np.int64 if sizes.dtype == np.float64 else np.int32)
        .astype(np.int64, copy=False)
    )


def _above_all(work: torch.dtype) -> int:
    """The key after that of infinity."""
    return int(keys_of(np.array([np.inf], _float(work)))[0]) + 1


def float_of(key: int, work: torch.dtype) -> float:
    """The number that has a key."""
    return float(floats_of(np.array([key]), work)[0])


def floats_of(keys: NDArray[np.int64], work: torch.dtype) -> NDArray[Any]:
    """The numbers that have these keys."""
    return keys.astype(np.int64 if work is torch.float64 else np.int32).view(_float(work))
