"""Rows of several tensors put together as one: a model's embedding or head in the vocabulary of the output.

Which row comes from where is known before a tensor byte is read, so a tile of it is read like any other.
A row of the output is, for every model:

    a token that the model has      its own row, unless the recipe forces another
    a token that it lacks           what the recipe says; or else the row of the only model that has it; the base's;
                                    the mean over the models that have it; zeros if none has
    no token                        its own row there if that has no token either; or else such a row of the model that
                                    the tokenizer is of; or else the mean of 64 of its own, spread over the tokens
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from streammerge.base.dtypes import DTYPES, promote
from streammerge.plan.tokenizer import Tokenizer
from streammerge.plan.vocab import Vocabulary, listed
from streammerge.storage.checkpoint import TensorSpec

# Owners of rows that are no tensor's.
ZERO, MEAN = -1, -2
_SPREAD = 64

Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Read:
    """One tensor of one of the plan's checkpoints."""

    checkpoint: int
    spec: TensorSpec

    @property
    def dtype(self) -> str:
        return self.spec.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.spec.shape

    @property
    def nbytes(self) -> int:
        return self.spec.nbytes

    @property
    def facts(self) -> list[Any]:
        """What decides its bytes, besides the file."""
        return [self.checkpoint, self.spec.name]


@dataclass(frozen=True, eq=False)
class Gathered:
    """Rows of `parts`, in the order of the output's vocabulary, as numbers of `dtype`, which holds those of all parts.

    Run number i are rows starts[i] to starts[i + 1], of the tensor parts[owners[i]] from its row rows[i] on. Of an
    owner that is no tensor all are the same: ZERO, or the MEAN over means[rows[i]], pairs of a part and its row.
    """

    dtype: str
    shape: tuple[int, ...]
    parts: tuple[Read, ...]
    starts: Numbers
    owners: Numbers
    rows: Numbers
    means: tuple[tuple[tuple[int, int], ...], ...]

    @property
    def width(self) -> int:
        """The elements of a row."""
        return math.prod(self.shape[1:])

    @cached_property
    def used(self) -> set[int]:
        """The numbers of the parts that rows are taken from."""
        return {owner for owner in self.owners.tolist() if owner >= 0} | {
            part for number in set(self.rows[self.owners == MEAN].tolist()) for part, _ in self.means[number]
        }

    @property
    def nbytes(self) -> int:
        """What is read for it, about."""
        sizes = [DTYPES[self.parts[number].dtype].itemsize for number in self.used]
        return math.prod(self.shape) * max(sizes, default=0)

    @cached_property
    def facts(self) -> list[Any]:
        """What decides its bytes, besides the files."""
        hashing = xxhash.xxh3_128()
        for numbers in (self.starts, self.owners, self.rows):
            hashing.update(numbers.tobytes())
        return [[part.facts for part in self.parts], hashing.hexdigest(), [list(map(list, m)) for m in self.means]]


class Aligned:
    """Models whose tensors are put in one vocabulary. `warnings` and `problems` are what was found on the way.

    `base` is the base model, where there is one; `source` is the model whose tokens the output keeps.
    """

    def __init__(self, models: Mapping[str, Vocabulary], joined: Vocabulary, chosen: Tokenizer, *, base: str | None,
                 source: str, rows: int) -> None:  # fmt: skip
        """`rows` are those of `source`'s embedding."""
        self._models, self._chosen, self._base, self._source = models, chosen, base, source
        self._tokens = list(joined.ids)
        self._places = np.fromiter(joined.ids.values(), np.int64, len(joined.ids))
        count = int(self._places.max(initial=-1)) + 1
        multiple = chosen.multiple
        self.rows = max(count, rows) if multiple is None else -(-count // multiple) * multiple
        self._joined = joined
        self.warnings: list[str] = []
        self.problems: list[str] = []
        # For every model the row of each of the output's tokens, by the token's place; −1 where it has none.
        self._own = {name: self._rows_of(own) for name, own in models.items()}
        self._has_token = np.zeros(self.rows, bool)
        self._has_token[self._places] = True

    def gather(self, tensors: Mapping[str, Read]) -> dict[str, Read | Gathered]:
        """One tensor as the models have it (all of one width), in the output's vocabulary."""
        parts = tuple(tensors.values())
        numbers = {name: i for i, name in enumerate(tensors)}
        own = np.stack([
            np.where(self._own[name] < read.shape[0], self._own[name], -1) for name, read in tensors.items()
        ])  # fmt: skip
        means: list[tuple[tuple[int, int], ...]] = []
        owners, rows = self._defaults(own, numbers)
        forced = np.zeros(self.rows, bool)
        for token, rule in self._chosen.rules.items():
            place = self._joined.ids[token]
            forced[place] = rule.force
            if rule.source is not None:
                owners[place], rows[place] = self._asked(token, rule.source.model, rule.source.token, tensors, numbers)
        self._number_means(own, owners, rows, forced, means)
        return {
            name: self._of_model(number, read, parts, own[number], owners, rows, forced, means, tensors)
            for (name, read), number in zip(tensors.items(), numbers.values(), strict=True)
        }

    def _rows_of(self, vocabulary: Vocabulary) -> Numbers:
        found = np.full(self.rows, -1, np.int64)
        ids = vocabulary.ids
        found[self._places] = [ids.get(token, -1) for token in self._tokens]
        return found

    def _defaults(self, own: Numbers, numbers: Mapping[str, int]) -> tuple[Numbers, Numbers]:
        """Owner and row of every token in models that lack it."""
        having = own >= 0
        counts = having.sum(0)
        owners = np.where(counts == 1, having.argmax(0), np.where(counts > 1, MEAN, ZERO)).astype(np.int64)
        if self._base is not None and self._base in numbers:
            owners = np.where(having[numbers[self._base]], numbers[self._base], owners)
        rows = np.where(owners >= 0, np.take_along_axis(own, np.maximum(owners, 0)[None], 0)[0], 0)
        lost = [
            token
            for token, place in self._joined.ids.items()
            if counts[place] == 0 and (token not in self._chosen.rules or self._chosen.rules[token].source is None)
        ]
        if lost:
            sentence = f"tokenizer: no model has a row for {listed(lost)}: zeros"
            self.warnings += [sentence] if sentence not in self.warnings else []
        return owners, rows

    def _asked(self, token: str, model: str | None, other: str | int | None, tensors: Mapping[str, Read],
               numbers: Mapping[str, int]) -> tuple[int, int]:  # fmt: skip
        """Owner and row that the recipe names for a token."""
        if model is None:
            return ZERO, 0
        wanted = token if other is None else other
        if model not in tensors:
            # This tensor is in other models only.
            return ZERO, 0
        count = tensors[model].shape[0]
        row = wanted if isinstance(wanted, int) else self._models[model].ids.get(wanted, -1)
        if not 0 <= row < count:
            what = f"row {row}: it has {count}" if isinstance(wanted, int) else f"token {wanted!r}"
            sentence = f"tokenizer.tokens.{token}: {model} has no {what}"
            self.problems += [sentence] if sentence not in self.problems else []
            return ZERO, 0
        return numbers[model], row

    def _number_means(self, own: Numbers, owners: Numbers, rows: Numbers, forced: npt.NDArray[np.bool_],
                      means: list[tuple[tuple[int, int], ...]]) -> None:  # fmt: skip
        """Say of what each mean is that some model needs."""
        needed = (owners == MEAN) & ((own < 0).any(0) | forced)
        for place in np.flatnonzero(needed).tolist():
            rows[place] = len(means)
            means.append(tuple((number, int(row)) for number, row in enumerate(own[:, place]) if row >= 0))

    def _of_model(self, number: int, read: Read, parts: tuple[Read, ...], own: Numbers, owners: Numbers, rows: Numbers,
                  forced: npt.NDArray[np.bool_], means: list[tuple[tuple[int, int], ...]],
                  tensors: Mapping[str, Read]) -> Read | Gathered:  # fmt: skip
        mine = (own >= 0) & ~forced
        owners, rows = np.where(mine, number, owners), np.where(mine, own, rows)
        self._fill(number, read, own, owners, rows, means, tensors)
        if len(owners) == read.shape[0] and (owners == number).all() and (rows == np.arange(len(rows))).all():
            return read
        goes_on = (owners[1:] == owners[:-1]) & (rows[1:] == rows[:-1] + (owners[1:] >= 0))
        begins = np.flatnonzero(np.concatenate([[True], ~goes_on]))
        starts = np.append(begins, len(owners))
        used = set(owners.tolist())
        dtypes = [parts[owner].dtype for owner in used if owner >= 0] or [read.dtype]
        if MEAN in used:
            # A mean of numbers is seldom one of their dtype.
            dtypes += [parts[part].dtype for mean in means for part, _ in mean] + ["F32"]
        return Gathered(promote(dtypes), (self.rows, *read.shape[1:]), parts, starts, owners[begins], rows[begins],
                        tuple(means))  # fmt: skip

    def _fill(self, number: int, read: Read, own: Numbers, owners: Numbers, rows: Numbers,
              means: list[tuple[tuple[int, int], ...]], tensors: Mapping[str, Read]) -> None:  # fmt: skip
        """The rows without a token."""
        names = list(tensors)
        left = ~self._has_token
        for owner in dict.fromkeys([number, *(i for i, name in enumerate(names) if name == self._source)]):
            vocabulary, count = self._models[names[owner]], tensors[names[owner]].shape[0]
            free = np.ones(self.rows, bool)
            free[count:] = False
            taken = np.fromiter(vocabulary.ids.values(), np.int64, len(vocabulary.ids))
            free[taken[taken < self.rows]] = False
            here = left & free
            owners[here], rows[here] = owner, np.flatnonzero(here)
            left &= ~here
        if left.any():
            known = own[own >= 0]
            if len(known) == 0:
                owners[left], rows[left] = ZERO, 0
                return
            spread = known[np.linspace(0, len(known) - 1, min(_SPREAD, len(known))).astype(np.int64)]
            owners[left], rows[left] = MEAN, len(means)
            means.append(tuple((number, int(row)) for row in spread))
