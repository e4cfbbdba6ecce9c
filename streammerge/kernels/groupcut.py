"""Exact cuts over many tensors at once: the share p of largest entries of a layer or of a whole model.

The order is size descending, tensor, index ascending, where tensors come in the order they are given in. As for one
tensor (cut.py), a sample says where a threshold lies, counts narrow it down, and what is left is fetched; here counts
are kept per tensor, so that memory does not grow with the model.
"""

from __future__ import annotations

from collections.abc import Collection, Generator, Sequence
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
    Quantity,
    Search,
    choose_pivots,
    find_cuts,
    float_of,
    keys_of,
    narrow,
)

_SAMPLES, _PIECE = 1 << 20, 1024

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
        for pair, search in searches.items():
            cuts[pair] = yield from ranking.cuts(search)
    return cuts


class _Ranking:
    """The looks at one quantity of many tensors."""

    def __init__(self, problems: Sequence[Problem], quantity: Quantity) -> None:
        self._problems, self._quantity = problems, quantity
        self._work = problems[0].work

    def sample(self) -> _Asking[list[NDArray[np.int64]]]:
        """The sorted keys of about a million entries of every column, from the tensors that are large."""
        total = sum(problem.elements for problem in self._problems)
        largest = max(problem.elements for problem in self._problems)
        looks: list[Look | None] = []
        for problem in self._problems:
            n = problem.elements
            pieces = min(max(1, round(_SAMPLES / _PIECE * n / total)), n // _PIECE)
            if n * 4096 < total and n < largest:
                looks.append(None)
            elif pieces < 2:
                looks.append(Look(self._quantity.fetching, {}, ((0, min(n, _PIECE)),), _columns_first))
            else:
                step = (n - _PIECE) // (pieces - 1)
                spans = tuple((i * step, _PIECE) for i in range(pieces))
                looks.append(Look(self._quantity.fetching, {}, spans, _columns_first))
        answers = yield looks
        values = [
            np.concatenate(answer, axis=1)[:, : sum(count for _, count in look.spans)]
            for look, answer in zip(looks, answers, strict=True)
            if look is not None and look.spans is not None
        ]
        return [np.sort(keys_of(column)) for column in np.concatenate(values, axis=1)]

    def narrow_all(self, searches: Sequence[Search], sample: Sequence[NDArray[np.int64]]) -> _Asking[None]:
        """Count until every interval is one value, or has few entries."""
        round_number = 0
        while True:
            counting = [s for s in searches if s.high - s.low > 1 and int(s.inside.sum()) > COLLECT_AT_MOST]
            if not counting:
                return
            table, chosen = choose_pivots(counting, sample, round_number, self._work, self._quantity.pivots)
            look = Look(self._quantity.counting, {"pivots": table}, digest=_added)
            answers = yield [look] * len(self._problems)
            narrow(chosen, np.stack([np.sum(answer, axis=0) for answer in answers]))
            round_number += 1

    def cuts(self, search: Search) -> _Asking[list[Cut]]:
        """The cut of every tensor, once its search has narrowed to few entries or one value."""
        if search.high - search.low > 1:
            yield from self._settle(search)
        value = float_of(search.low, self._work)
        before = np.concatenate([[0], np.cumsum(search.inside)])
        place = int(np.searchsorted(before, search.wanted, side="left")) - 1
        # All equal entries of earlier tensors stay, none of later ones, and of this one the first few.
        cuts = [Cut(value, 2**62) if i < place else Cut(value, -1) for i in range(len(self._problems))]
        keep = int(search.at_least_high[place]) + search.wanted - int(before[place])
        looks: list[Look | None] = [None] * len(self._problems)
        asking = find_cuts(self._problems[place], self._quantity, [(search.column, keep)])
        answer: Any = None
        while True:
            try:
                looks[place] = asking.send(answer)
            except StopIteration as stop:
                (cut,) = stop.value
                cuts[place] = Cut(value, 2**62) if cut == KEEP_ALL else cut
                return cuts
            answers = yield list(looks)
            answer = answers[place]

    def _settle(self, search: Search) -> _Asking[None]:
        """Fetch what lies in the interval, and narrow it to the value of the last entry that stays."""
        low, high, column = search.low, search.high, search.column

        def digest(sizes: Tensor, starts: Tensor) -> NDArray[np.int64]:
            keys = keys_of(sizes[:, column].contiguous().numpy())
            return keys[(keys >= low) & (keys < high)]

        looks = [Look(self._quantity.fetching, {}, None, digest) if inside else None for inside in search.inside]
        answers = yield list(looks)
        parts = [np.empty(0, np.int64) if answer is None else np.concatenate(answer) for answer in answers]
        # The zeros that fill up a block are in the interval when zero is. They are the smallest keys there are.
        parts = [np.sort(part)[::-1][:inside] for part, inside in zip(parts, search.inside.tolist(), strict=True)]
        pivot = int(np.sort(np.concatenate(parts))[::-1][search.wanted - 1])
        above = search.at_least_high.copy()
        for key in (pivot + 1, pivot):
            if low < key < high:
                counts = np.array([[np.count_nonzero(part >= key)] for part in parts], np.int64) + above[:, None]
                search.narrow([key], counts)


def _columns_first(sizes: Tensor, starts: Tensor) -> NDArray[Any]:
    """(columns, elements) of some blocks."""
    found: NDArray[Any] = sizes.transpose(0, 1).reshape(sizes.shape[1], -1).numpy()
    return found


def _added(counts: Tensor, starts: Tensor) -> NDArray[np.int64]:
    """(columns, pivots), over some blocks."""
    found: NDArray[np.int64] = counts.to(torch.int64).sum(0).numpy()
    return found
