"""What becomes of one tensor after the other: factored, looked at, or kept whole; what is made goes into the spill."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from streammerge.plan.extraction import Extraction, Left, Target, Wanted
from streammerge.plan.gather import Read
from streammerge.plan.peft import alike, factor_names, whole_name
from streammerge.plan.sketch import SKETCH_PASSES
from streammerge.run.extracted import Factored, LeftOut
from streammerge.run.factoring import factor, norm
from streammerge.run.panels import Panels
from streammerge.run.spill import Spill


class Observer(Protocol):
    """Who is told what happens."""

    def note(self, text: str) -> None:
        """Something the user should know."""

    def stage(self, text: str) -> None:
        """A stage begins."""

    def progress(self, done: float, total: float) -> None:
        """So much of it is done."""


class Progress:
    """Tells an observer how many elements have been worked on: so many passes over every matrix, one over the rest."""

    def __init__(self, extraction: Extraction, observer: Observer) -> None:
        self.total = sum(target.pair.elements for target in extraction.targets) * (SKETCH_PASSES + 1)
        self.total += sum(each.pair.elements for each in extraction.left)
        self._observer, self._done, self._until = observer, 0, 0

    def begin(self, elements: int) -> None:
        """The next tensor, which is so much work, however often it is read in the end."""
        self._done = self._until
        self._until += elements

    def advance(self, elements: int) -> None:
        self._done = min(self._done + elements, self._until)
        self._observer.progress(self._done, self.total)


class Collector:
    """What is done to one tensor after the other."""

    def __init__(self, panels: Panels, spill: Spill, wanted: Wanted, done: Progress) -> None:
        self._panels, self._spill, self._wanted, self._done = panels, spill, wanted, done

    def factor(self, target: Target) -> Factored | None:
        """Make the factors of a matrix and keep them; None when it does not differ."""
        pair = target.pair
        self._done.begin(pair.elements * (SKETCH_PASSES + 1))
        made = factor(self._panels, pair, self._wanted)
        if made is None:
            return None
        rank = made.left.shape[1]
        first, second = (made.left.t(), made.right.t()) if target.transposed else (made.right, made.left)
        for name, values in zip(factor_names(target.module, embedding=target.embedding), (first, second), strict=True):
            self._spill.add(name, self._wanted.dtype, tuple(values.shape), [_bytes(values.contiguous())])
        kept = min(1.0, made.kept / made.squares)
        return Factored(pair.name, pair.shape, rank, kept, (made.missed / made.squares) ** 0.5, made.squares)

    def ranks(self, targets: Sequence[Target], factored: Sequence[Factored]) -> dict[str, int]:
        """The rank of every module's factors as they are stored; those that must be there and are not are added."""
        own = {each.name.removesuffix(".weight"): each.rank for each in factored}
        together = alike([target.module for target in targets], set(own))
        if not together:
            return own
        rank = self._wanted.most if self._wanted.energy is None else max(own.get(module, 0) for module in together)
        for target in targets:
            if target.module in together and target.module not in own:
                names = factor_names(target.module, embedding=target.embedding)
                for name, shape in zip(names, ((0, target.pair.columns), (target.pair.rows, 0)), strict=True):
                    self._spill.add(name, self._wanted.dtype, shape, [])
        return {**own, **dict.fromkeys(together, rank)}

    def filled(self, targets: Sequence[Target], ranks: Mapping[str, int]) -> dict[str, tuple[int, int]]:
        """The shapes of factors, by their names in the file."""
        shapes: dict[str, tuple[int, int]] = {}
        for target in targets:
            if (rank := ranks.get(target.module)) is not None:
                inputs, outputs = target.pair.columns, target.pair.rows
                if target.transposed:
                    inputs, outputs = outputs, inputs
                first, second = factor_names(target.module, embedding=target.embedding)
                shapes |= {first: (rank, inputs), second: (outputs, rank)}
        return shapes

    def look(self, left: Left) -> LeftOut | None:
        """What is left out of a tensor; None when it does not differ."""
        pair = left.pair
        self._done.begin(pair.elements)
        squares = None if left.exact else norm(self._panels, pair)
        if not squares and not (left.exact and self._panels.differ(pair)):
            return None
        return LeftOut(pair.name, pair.shape, left.why, squares, whole=False)

    def with_whole(self, extraction: Extraction, left: Sequence[LeftOut], factored: set[str]) -> list[LeftOut]:
        """What is left out, with those tensors put into the adapter that are to go along whole."""
        if not self._wanted.keep_whole:
            return list(left)
        modules = {name.removesuffix(".weight") for name in factored}
        found = {each.name: each for each in left}
        tensors = {each.pair.name: each.pair for each in extraction.left}
        whys = {each.pair.name: each.why for each in extraction.left}
        for name in extraction.whole_beside(set(found)):
            pair = tensors[name]
            assert isinstance(pair.model, Read)
            self._spill.add(whole_name(name, modules), pair.model.dtype, pair.shape, self._panels.whole(pair.model))
            found[name] = LeftOut(
                name, pair.shape, whys[name], found[name].squares if name in found else 0.0, whole=True
            )
        return list(found.values())


def _bytes(values: Tensor) -> memoryview:
    return memoryview(values.view(torch.uint8).numpy().data).cast("B")
