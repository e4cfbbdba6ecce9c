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
from streammerge.plan.tokenizer import RowSource, Tokenizer, TokenRule
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


def rows_of(read: Read) -> int:
    """How many tokens a tensor has a row for: its first dimension, or where that is 1 its last."""
    return read.shape[-1] if read.shape[0] == 1 else read.shape[0]


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
        return math.prod(self.shape) // int(self.starts[-1])

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
                 source: str, tables: Mapping[str, int]) -> None:  # fmt: skip
        """`tables` are the numbers of rows of `source`'s tensors, the embedding first."""
        self._models, self._chosen, self._base, self._source = models, chosen, base, source
        self._joined, self._tables = joined, tables
        self._tokens = list(joined.ids)
        self._places = np.fromiter(joined.ids.values(), np.int64, len(joined.ids))
        # For every model the row of each of the output's tokens; −1 where it has none.
        self._rows = {
            name: np.array([own.ids.get(token, -1) for token in self._tokens], np.int64)
            for name, own in models.items()
        }  # fmt: skip
        self.warnings: list[str] = []
        self.problems: list[str] = []
        # Tokens whose rules named a model that has a row for them.
        self.used_rules: set[str] = set()

    def gather(self, table: str, tensors: Mapping[str, Read]) -> dict[str, Read | Gathered]:
        """One table as the models have it (all of one width), in the output's vocabulary."""
        rows = self._length(table)
        return _Gathering(self, tensors, rows).run()

    def _length(self, table: str) -> int:
        """How many rows a table has in the output."""
        count = int(self._places.max()) + 1
        embedding, *_ = self._tables.values()
        before = self._tables.get(table, embedding)
        multiple = self._chosen.multiple
        if multiple is None and (count <= before or count <= max(self._models[self._source].ids.values()) + 1):
            return before
        if before != embedding:
            name = next(iter(self._tables))
            self._tell(
                self.problems,
                f"tensor {table!r} of {self._source} has {before} rows, and {name!r} has {embedding}: how more tokens "
                f"would be put in both is not known here",
            )
        return count if multiple is None else -(-count // multiple) * multiple

    def own_rows(self, model: str, rows: int, limit: int) -> Numbers:
        """For each of so many rows of the output, the row that a model has in a table of `limit` rows, or −1."""
        found = np.full(rows, -1, np.int64)
        inside = self._places < rows
        own = self._rows[model][inside]
        found[self._places[inside]] = np.where(own < limit, own, -1)
        return found

    def with_token(self, rows: int) -> npt.NDArray[np.bool_]:
        """Which of so many rows are of a token."""
        found = np.zeros(rows, bool)
        found[self._places[self._places < rows]] = True
        return found

    def rules(self, rows: int) -> list[tuple[int, str, TokenRule]]:
        """The rules by row."""
        found = [(self._joined.ids[token], token, rule) for token, rule in self._chosen.rules.items()]
        return [each for each in found if each[0] < rows]

    def asked(self, token: str, source: RowSource, tensors: Mapping[str, Read]) -> tuple[int, int]:
        """Owner and row that the recipe names for a token."""
        model, wanted = source.model, token if source.token is None else source.token
        if model is None or model not in tensors:
            # Or this tensor is in other models only.
            self.used_rules |= {token} if model is None else set()
            return ZERO, 0
        self.used_rules.add(token)
        count = rows_of(tensors[model])
        row = wanted if isinstance(wanted, int) else self._models[model].ids.get(wanted, -1)
        if not 0 <= row < count:
            what = f"row {row}: it has {count}" if isinstance(wanted, int) else f"token {wanted!r}"
            self._tell(self.problems, f"tokenizer.tokens.{token}: {model} has no {what}")
            return ZERO, 0
        return list(tensors).index(model), row

    def lost(self, having: npt.NDArray[np.int64]) -> None:
        """Warn of tokens that no model has a row for, by how many have one for each row."""
        named = {token for _, token, rule in self.rules(len(having)) if rule.source is not None}
        inside = [(token, place) for token, place in self._joined.ids.items() if place < len(having)]
        lost = [token for token, place in inside if having[place] == 0 and token not in named]
        if lost:
            self._tell(self.warnings, f"tokenizer: no model has a row for {listed(lost)}: zeros")

    @property
    def base(self) -> str | None:
        return self._base

    @property
    def source(self) -> str:
        return self._source

    def vocabulary(self, model: str) -> Vocabulary:
        return self._models[model]

    @staticmethod
    def _tell(where: list[str], sentence: str) -> None:
        if sentence not in where:
            where.append(sentence)


class _Gathering:
    """The work on one table."""

    def __init__(self, aligned: Aligned, tensors: Mapping[str, Read], rows: int) -> None:
        self._aligned, self._tensors, self._rows = aligned, tensors, rows
        self._parts = tuple(tensors.values())
        self._own = np.stack([aligned.own_rows(name, rows, rows_of(read)) for name, read in tensors.items()])
        self._means: list[tuple[tuple[int, int], ...]] = []

    def run(self) -> dict[str, Read | Gathered]:
        owners, rows = self._defaults()
        forced = np.zeros(self._rows, bool)
        for place, token, rule in self._aligned.rules(self._rows):
            forced[place] = rule.force
            if rule.source is not None:
                owners[place], rows[place] = self._aligned.asked(token, rule.source, self._tensors)
        for place in np.flatnonzero((owners == MEAN) & ((self._own < 0).any(0) | forced)).tolist():
            rows[place] = len(self._means)
            having = enumerate(self._own[:, place].tolist())
            self._means.append(tuple((number, row) for number, row in having if row >= 0))
        return {
            name: self._of_model(number, name, owners, rows, forced) for number, name in enumerate(self._tensors)
        }  # fmt: skip

    def _defaults(self) -> tuple[Numbers, Numbers]:
        """Owner and row of every token in models that lack it."""
        having, names = self._own >= 0, list(self._tensors)
        counts = having.sum(0)
        owners = np.where(counts == 1, having.argmax(0), np.where(counts > 1, MEAN, ZERO)).astype(np.int64)
        if self._aligned.base in names:
            base = names.index(self._aligned.base)
            owners = np.where(having[base], base, owners)
        rows = np.where(owners >= 0, np.take_along_axis(self._own, np.maximum(owners, 0)[None], 0)[0], 0)
        self._aligned.lost(counts)
        return owners, rows

    def _of_model(self, number: int, name: str, owners: Numbers, rows: Numbers,
                  forced: npt.NDArray[np.bool_]) -> Read | Gathered:  # fmt: skip
        read, own = self._tensors[name], self._own[number]
        mine = (own >= 0) & ~forced
        owners, rows = np.where(mine, number, owners), np.where(mine, own, rows)
        self._fill(number, owners, rows)
        if self._rows == rows_of(read) and (owners == number).all() and (rows == np.arange(self._rows)).all():
            return read
        goes_on = (owners[1:] == owners[:-1]) & (rows[1:] == rows[:-1] + (owners[1:] >= 0))
        begins = np.flatnonzero(np.concatenate([[True], ~goes_on]))
        used = set(owners.tolist())
        dtypes = [self._parts[owner].dtype for owner in used if owner >= 0] or [read.dtype]
        if MEAN in used:
            # A mean of numbers is seldom one of their dtype.
            dtypes += [self._parts[part].dtype for mean in self._means for part, _ in mean] + ["F32"]
        shape = (*read.shape[:-1], self._rows) if read.shape[0] == 1 else (self._rows, *read.shape[1:])
        return Gathered(promote(dtypes), shape, self._parts, np.append(begins, self._rows), owners[begins],
                        rows[begins], tuple(self._means))  # fmt: skip

    def _fill(self, number: int, owners: Numbers, rows: Numbers) -> None:
        """The rows without a token."""
        left, names = ~self._aligned.with_token(self._rows), list(self._tensors)
        source = [names.index(self._aligned.source)] if self._aligned.source in names else []
        for owner in dict.fromkeys([number, *source]):
            free = np.ones(self._rows, bool)
            free[rows_of(self._parts[owner]) :] = False
            vocabulary = self._aligned.vocabulary(names[owner])
            taken = np.fromiter(vocabulary.ids.values(), np.int64, len(vocabulary.ids))
            free[taken[taken < self._rows]] = False
            here = left & free
            owners[here], rows[here] = owner, np.flatnonzero(here)
            left &= ~here
        known = self._own[number][self._own[number] >= 0]
        if not left.any():
            return
        if len(known) == 0:
            owners[left], rows[left] = ZERO, 0
            return
        spread = known[np.linspace(0, len(known) - 1, min(_SPREAD, len(known))).astype(np.int64)]
        owners[left], rows[left] = MEAN, len(self._means)
        self._means.append(tuple((number, int(row)) for row in spread))
