"""Exact cuts over many tensors at once: the share p of largest entries of a layer or of a whole model.

The order is size descending, tensor, index ascending, where tensors come in the order they are given in. As for one
tensor (cut.py), a sample says where a threshold lies, counts narrow it down, and what is left is fetched; here counts
are kept per tensor, so that memory does not grow with the model.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Sequence
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from streammerge.kernels.contract import Look, Problem
from streammerge.kernels.cut import (
    COLLECT_AT_MOST,
    KEEP_ALL,
    KEEP_NONE,
    Cut,
    Looking,
    Quantity,
    Search,
    choose_pivots,
    find_cuts,
    float_of,
    keys_of,
    narrow,
)

# So many entries of a column are sampled, and of all columns together, in pieces of so many.
_SAMPLES, _SAMPLES_OF_ALL, _PIECE = 1 << 20, 1 << 22, 1024

T = TypeVar("T")
_Asking = Generator[list[Look | None], list[Any], T]


def group_cuts(
    problems: Sequence[Problem], quantity: Quantity, wanted: Collection[tuple[int, int]]
) -> _Asking[dict[tuple[int, int], list[Cut]]]:
    """For every (column, k) of `wanted` the cuts, one per tensor, that keep the k largest entries of all tensors.

    All problems have one work dtype.
    """
    sizes = np.array([problem.elements for problem in problems], np.int64)
    total = int(sizes.sum())
    searches = {
        (column, k): Search(column, k, sizes, problems[0].work) for column, k in sorted(wanted) if 0 < k < total
    }
    cuts = {(column, k): [KEEP_NONE if k <= 0 else KEEP_ALL] * len(problems) for column, k in wanted}
    if searches:
        ranking = _Ranking(problems, quantity)
        sample = yield from ranking.sample()
        yield from ranking.narrow_all(list(searches.values()), sample)
        found = yield from ranking.cuts(list(searches.values()))
        cuts |= dict(zip(searches, found, strict=True))
    return cuts


class _Ranking:
    """The looks at one quantity of many tensors."""

    def __init__(self, problems: Sequence[Problem], quantity: Quantity) -> None:
        self._problems, self._quantity = problems, quantity
        self._work = problems[0].work

    def sample(self) -> _Asking[NDArray[np.int64]]:
        """The sorted keys (columns, samples) of about a million entries of every column, from the large tensors."""
        total = sum(problem.elements for problem in self._problems)
        largest = max(problem.elements for problem in self._problems)
        columns = self._quantity.columns_of(self._problems[0])
        most = min(_SAMPLES, _SAMPLES_OF_ALL // columns)
        spans: list[tuple[tuple[int, int], ...] | None] = []
        for problem in self._problems:
            n = problem.elements
            pieces = min(max(1, round(most / _PIECE * n / total)), n // _PIECE)
            if n * 4096 < total and n < largest:
                spans.append(None)
            elif pieces < 2:
                spans.append(((0, min(n, _PIECE)),))
            else:
                step = (n - _PIECE) // (pieces - 1)
                spans.append(tuple((i * step, _PIECE) for i in range(pieces)))
        sizes = [sum(count for _, count in some or ()) for some in spans]
        keys = np.empty((columns, sum(sizes)), np.int64)
        rows = np.split(keys, np.cumsum(sizes)[:-1], axis=1)
        yield [
            None if some is None else Look(self._quantity.fetching, {}, some, _columns_first, _filling(row))
            for some, row in zip(spans, rows, strict=True)
        ]
        keys.sort(axis=1)
        return keys

    def narrow_all(self, searches: Sequence[Search], sample: NDArray[np.int64]) -> _Asking[None]:
        """Count until every interval is one value, or has few entries."""
        round_number = 0
        while True:
            counting = [s for s in searches if s.high - s.low > 1 and int(s.inside.sum()) > COLLECT_AT_MOST]
            if not counting:
                return
            table, chosen = choose_pivots(counting, list(sample), round_number, self._work, self._quantity.pivots)
            counts = np.zeros((len(self._problems), *table.shape), np.int64)
            yield [
                Look(self._quantity.counting, {"pivots": table}, None, _added, partial(np.add, here, out=here))
                for here in counts
            ]
            narrow(chosen, counts)
            round_number += 1

    def cuts(self, searches: Sequence[Search]) -> _Asking[list[list[Cut]]]:
        """For each search the cut of every tensor, once it has narrowed to few entries or one value."""
        wide = [search for search in searches if search.high - search.low > 1]
        if wide:
            yield from self._settle(wide)
        cuts: list[list[Cut]] = []
        # By tensor: the searches whose last entry lies there, and how many of its entries stay.
        last: dict[int, dict[int, int]] = {}
        for number, search in enumerate(searches):
            value = float_of(search.low, self._work)
            before = np.concatenate([[0], np.cumsum(search.inside)])
            place = int(np.searchsorted(before, search.wanted, side="left")) - 1
            # All equal entries of earlier tensors stay, none of later ones, and of this one the first few.
            cuts.append([Cut(value, 2**62 if i < place else -1) for i in range(len(self._problems))])
            keep = int(search.at_least_high[place]) + search.wanted - int(before[place])
            last.setdefault(place, {})[number] = keep
        asking = {
            place: self._cuts_in(place, [(searches[number].column, keep) for number, keep in here.items()])
            for place, here in last.items()
        }
        answers: list[Any] = [None] * len(self._problems)
        while asking:
            looks: list[Look | None] = [None] * len(self._problems)
            for place in list(asking):
                try:
                    looks[place] = asking[place].send(answers[place])
                except StopIteration as stop:
                    del asking[place]
                    for number, cut in zip(last[place], stop.value, strict=True):
                        everything = Cut(float_of(searches[number].low, self._work), 2**62)
                        cuts[number][place] = everything if cut == KEEP_ALL else cut
            if asking:
                answers = yield looks
        return cuts

    def _cuts_in(self, place: int, wanted: Sequence[tuple[int, int]]) -> Looking[list[Cut]]:
        """The cuts of one tensor; of each column as many at a time as there is room for in the quantity's programs."""
        found: dict[tuple[int, int], Cut] = {}
        while rest := [pair for pair in wanted if pair not in found]:
            columns = [column for column, _ in rest]
            some = [pair for i, pair in enumerate(rest) if columns[:i].count(columns[i]) < self._quantity.searches]
            cuts = yield from find_cuts(self._problems[place], self._quantity, some)
            found |= dict(zip(some, cuts, strict=True))
        return [found[pair] for pair in wanted]

    def _settle(self, searches: Sequence[Search]) -> _Asking[None]:
        """Fetch what lies in the intervals, and narrow each to the value of the last entry that stays."""
        intervals = [(search.column, search.low, search.high) for search in searches]

        def digest(sizes: Tensor, starts: Tensor) -> list[NDArray[np.int64]]:
            found = []
            for column, low, high in intervals:
                keys = keys_of(sizes[:, column].contiguous().numpy())
                found.append(keys[(keys >= low) & (keys < high)])
            return found

        # By search and tensor.
        found = [[[np.empty(0, np.int64)] for _ in self._problems] for _ in searches]
        anything = np.any([search.inside > 0 for search in searches], axis=0)
        yield [
            Look(self._quantity.fetching, {}, None, digest, _keeping([own[i] for own in found])) if here else None
            for i, here in enumerate(anything)
        ]
        for search, own in zip(searches, found, strict=True):
            parts = [np.concatenate(here) for here in own]
            # The zeros that fill up a block are in the interval when zero is. They are the smallest keys there are.
            parts = [np.sort(part)[::-1][:inside] for part, inside in zip(parts, search.inside.tolist(), strict=True)]
            pivot = int(np.sort(np.concatenate(parts))[::-1][search.wanted - 1])
            low, high, above = search.low, search.high, search.at_least_high.copy()
            for key in (pivot + 1, pivot):
                if low < key < high:
                    counts = np.array([[np.count_nonzero(part >= key)] for part in parts], np.int64) + above[:, None]
                    search.narrow([key], counts)


def _columns_first(sizes: Tensor, starts: Tensor) -> NDArray[Any]:
    """(columns, elements) of some blocks."""
    found: NDArray[Any] = sizes.transpose(0, 1).reshape(sizes.shape[1], -1).numpy()
    return found


def _filling(keys: NDArray[np.int64]) -> Callable[[NDArray[Any]], None]:
    """Fills `keys` (columns, elements) from the left with those of the sizes that are handed to it."""
    left = keys

    def fill(sizes: NDArray[Any]) -> None:
        nonlocal left
        # The last block is filled up with what is no size.
        count = min(sizes.shape[1], left.shape[1])
        left[:, :count] = keys_of(sizes[:, :count])
        left = left[:, count:]

    return fill


def _keeping(found: Sequence[list[NDArray[np.int64]]]) -> Callable[[list[NDArray[np.int64]]], None]:
    """Keeps copies of the keys of every search that are handed to it: they lie among their thread's temporaries."""

    def keep(parts: list[NDArray[np.int64]]) -> None:
        for mine, keys in zip(found, parts, strict=True):
            if len(keys):
                mine.append(keys.copy())

    return keep


def _added(counts: Tensor, starts: Tensor) -> Tensor:
    """(columns, pivots), over some blocks."""
    return counts.to(torch.int64).sum(0)
