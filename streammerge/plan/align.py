"""The models of one stage in one vocabulary: which tensors have a row for every token, and what they become."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from streammerge.base.dtypes import DTYPES
from streammerge.base.errors import RecipeError
from streammerge.plan.gather import Aligned, Gathered, Read, rows_of
from streammerge.plan.names import vocabulary_of
from streammerge.plan.places import shorten
from streammerge.plan.recipe import Stage
from streammerge.plan.tokenizer import Tokenizer
from streammerge.plan.view import Folded, Operand, View
from streammerge.plan.vocab import Vocabulary, join, listed
from streammerge.storage.checkpoint import TensorSpec


@dataclass(frozen=True)
class InOneVocabulary:
    """What a stage sees: all views, those of its models in the vocabulary of its result; and warnings."""

    views: Mapping[str, View]
    vocabulary: Vocabulary | None
    warnings: list[str] = field(default_factory=list)


def align(stage: Stage, views: Mapping[str, View], where: Path) -> InOneVocabulary:
    """The models of a stage as its tokenizer wants them; as they are if it has none of its own.

    Raises RecipeError, with everything that is wrong.
    """
    if stage.tokenizer is None:
        unlike = _unlike(stage, views)
        return InOneVocabulary(views, views[stage.donor].vocabulary, [unlike] if unlike else [])
    return _Alignment(stage, stage.tokenizer, views, where).run()


def _unlike(stage: Stage, views: Mapping[str, View]) -> str | None:
    """A sentence where models whose tokenizers are known give tokens other ids, and nothing is done about it."""
    donor = views[stage.donor].vocabulary
    others = [(name, views[name].vocabulary) for name in stage.inputs]
    unlike = [name for name, own in others if donor is not None and own is not None and not own.agrees_with(donor)]
    if not unlike:
        return None
    return (
        f"{', '.join(unlike)} and {stage.donor} give tokens other ids, and their rows are merged as they lie: add  "
        f"tokenizer: {{source: union}}  to the recipe"
    )


class _Alignment:
    """The work on one stage."""

    def __init__(self, stage: Stage, chosen: Tokenizer, views: Mapping[str, View], where: Path) -> None:
        self._stage, self._chosen, self._views, self._where = stage, chosen, views, where
        self._source = stage.donor if chosen.source in ("union", "base") else chosen.source
        self._warnings: list[str] = []
        self._problems: list[str] = []

    def run(self) -> InOneVocabulary:
        tables: dict[str, dict[str, int]] = {}
        for name in self._stage.inputs:
            found = vocabulary_of({each: tensor.shape for each, tensor in self._views[name].tensors.items()})
            if found is not None:
                tables[name] = found
        if self._source not in tables:
            self._problems.append(f"tokenizer: {self._source} has no token embedding that is known here")
            raise self._error()
        models = self._vocabularies({name: next(iter(found.values())) for name, found in tables.items()})
        joined, warnings = join(self._chosen, models, self._source)
        self._warnings += warnings
        aligned = Aligned(models, joined, self._chosen, base=self._stage.base, source=self._source,
                          tables=tables[self._source])  # fmt: skip
        changed: dict[str, dict[str, Operand]] = {name: {} for name in models}
        for tensor in dict.fromkeys(name for found in tables.values() for name in found):
            for name, operand in self._gather(tensor, list(models), aligned).items():
                changed[name][tensor] = operand
        self._warnings += aligned.warnings
        self._problems += aligned.problems
        self._problems += [
            f"tokenizer.tokens.{token}: {rule.source.model} has no tensor with a row for it"
            for token, rule in self._chosen.rules.items()
            if rule.source is not None and token not in aligned.used_rules and not aligned.problems
        ]
        if self._problems:
            raise self._error()
        made = {
            name: replace(self._views[name], tensors={**self._views[name].tensors, **own})
            for name, own in changed.items()
        }
        return InOneVocabulary({**self._views, **made}, joined, self._warnings)

    def _vocabularies(self, rows: Mapping[str, int]) -> dict[str, Vocabulary]:
        """The tokens that every model has rows for."""
        source = self._views[self._source].vocabulary
        if source is None:
            self._problems.append(f"tokenizer: {self._source} has none in its directory")
            raise self._error()
        models = {}
        for name, count in rows.items():
            own = self._views[name].vocabulary
            if own is None:
                self._warnings.append(f"tokenizer: {name} has none; it is taken to be that of {self._source}")
                own = source
            models[name] = own.within(count)
            beyond = [token for token in own.ids if token not in models[name].ids]
            if beyond:
                self._warnings.append(f"tokenizer: the embedding of {name} has {count} rows, and none for "
                                      f"{listed(beyond)}: left out there")  # fmt: skip
        return models

    def _gather(self, tensor: str, models: list[str], aligned: Aligned) -> dict[str, Operand]:
        """One tensor of all models that have it."""
        operands = {name: own for name in models if (own := self._views[name].tensors.get(tensor)) is not None}
        reads = {name: _as_read(own) for name, own in operands.items()}
        if len({math.prod(read.shape) // max(1, rows_of(read)) for read in reads.values()}) > 1:
            # Of different widths: said where shapes are compared.
            return {}
        found: dict[str, Operand] = {}
        for name, gathered in aligned.gather(tensor, reads).items():
            if isinstance(gathered, Read):
                continue
            taken = [list(reads)[number] for number in gathered.used] or [name]
            if strange := [each for each in taken if DTYPES[reads[each].dtype].kind != "float"]:
                self._problems.append(f"tensor {tensor!r} of {strange[0]} is stored as {reads[strange[0]].dtype}: its "
                                      f"rows cannot be put in another order")  # fmt: skip
            elif unread := [each for each in taken if reads[each].checkpoint < 0]:
                self._problems.append(f"tensor {tensor!r} of {unread[0]} is made by an adapter or another document and "
                                      f"its tokens have other rows in the output: write {unread[0]} to a directory of "
                                      f"its own first (passthrough), and merge that")  # fmt: skip
            dtype = operands[name].dtype
            found[name] = gathered if gathered.dtype == dtype else Folded(gathered, None, dtype)
        return found

    def _error(self) -> RecipeError:
        where = "" if self._stage.name is None else f"stage {self._stage.name}: "
        return RecipeError(str(self._where), [where + problem for problem in shorten(self._problems)])


def _as_read(operand: Operand) -> Read:
    """What can be read of it row by row; a stand-in of checkpoint −1 for what must be made first."""
    if isinstance(operand, Folded) and operand.change is None:
        operand = operand.read
    if isinstance(operand, Read):
        return operand
    assert not isinstance(operand, Gathered)
    return Read(-1, TensorSpec("", operand.dtype, operand.shape, 0, 0, 0))
