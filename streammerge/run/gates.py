"""What planning a model with experts must know beyond the headers: its architecture, and the rows of its gates.

cheap_embed: for each expert, from the base's input embedding,

    p, n = the sums of the rows of all tokens of its positive, and of its negative prompts
    row  = u(u(p) − u(n)), where u(x) = x / |x|; or u(p) without negative prompts

the same in every layer. Tokens count as often as they occur; special ones that a tokenizer adds to every text, which
say nothing for one expert, do not. Only those rows are read, and all of it is float64.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch

from streammerge.base.dtypes import DTYPES
from streammerge.base.errors import RecipeError
from streammerge.kernels.dtypes import torch_dtype
from streammerge.plan.architecture import ARCHITECTURES, EMBEDDING, Architecture, architecture_of
from streammerge.plan.experts import Ground, Rows
from streammerge.plan.gather import Read
from streammerge.plan.moe import Expert, Moe
from streammerge.plan.recipe import Recipe
from streammerge.plan.view import Folded, Model, view_of
from streammerge.plan.vocab import encode
from streammerge.run.configuration import CONFIG_NAME
from streammerge.run.sidefiles import tokenizer_directory
from streammerge.storage.checkpoint import Checkpoint
from streammerge.storage.jsonfile import read_map
from streammerge.storage.source import Source


def ground_of(recipe: Recipe, models: Sequence[Model], checkpoints: Sequence[Checkpoint]) -> Ground | None:
    """The ground of a recipe that makes experts, None for any other. Raises RecipeError with all that is wrong."""
    moe = recipe.moe
    if moe is None:
        return None
    configs = {model.reference: read_map(checkpoints[model.checkpoint].directory / CONFIG_NAME) for model in models}
    architecture, problems = _architecture(moe, configs[moe.base])
    problems += _unlike_activations(moe, configs)
    gates = _Gates(moe, models[0], checkpoints)
    rows, shared = gates.run() if moe.gates == "cheap_embed" else (None, (None,) * len(moe.shared))
    problems += gates.problems
    if problems or architecture is None:
        raise RecipeError(str(recipe.path), problems)
    return Ground(architecture, rows, shared)


def _architecture(moe: Moe, config: dict[str, Any]) -> tuple[Architecture | None, list[str]]:
    """What is made, by the recipe or else by the base's config.json; and what speaks against it."""
    kind = config.get("model_type")
    if not isinstance(kind, str):
        return None, [f"{moe.base}: has no {CONFIG_NAME} that says its model_type, so nobody knows what it is"]
    chosen = architecture_of(kind) if moe.architecture is None else ARCHITECTURES[moe.architecture]
    if chosen is None or kind not in chosen.inputs:
        made = [f"{each.title} of {' and '.join(each.inputs)}" for each in ARCHITECTURES.values()]
        return None, [f"the base {moe.base} is a {kind} model; what can be made is {', '.join(made)} models"]
    problems = []
    if len(moe.shared) != chosen.shared:
        problems.append(
            f"{chosen.title} has one shared expert, found {len(moe.shared)}: name a model under shared_experts"
            if chosen.shared
            else f"{chosen.title} has no shared experts; take shared_experts out"
        )
    kinds = config.get("layer_types")
    windows = isinstance(kinds, list) and any(each != "full_attention" for each in kinds)
    if config.get("use_sliding_window") or windows:
        problems.append(f"{moe.base}: some of its layers see a window only (use_sliding_window, layer_types), and "
                        f"those of {chosen.title} do not")  # fmt: skip
    return chosen, problems


def _unlike_activations(moe: Moe, configs: dict[str, dict[str, Any]]) -> list[str]:
    own = configs[moe.base].get("hidden_act", "silu")
    found = {model: configs[model].get("hidden_act", "silu") for model in moe.sources}
    return [
        f"the MLPs of {model} go through {other}, and those of the base {moe.base} through {own}"
        for model, other in found.items()
        if other != own
    ]


class _Gates:
    """The work on the rows of gates."""

    def __init__(self, moe: Moe, base: Model, checkpoints: Sequence[Checkpoint]) -> None:
        self._moe, self._base, self._checkpoints = moe, base, checkpoints
        self.problems: list[str] = []

    def run(self) -> tuple[Rows | None, tuple[Rows | None, ...]]:
        """The rows of experts, and of shared ones; nothing of worth when there are problems."""
        every = (*self._moe.experts, *self._moe.shared)
        table = self._table()
        tokens = self._tokens(every, None if table is None else table.shape[0])
        if table is None or self.problems:
            return None, ()
        source = Source(self._checkpoints[table.checkpoint])
        try:
            rows = [self._row(expert, positive, negative, table, source)
                    for expert, (positive, negative) in zip(every, tokens, strict=True)]  # fmt: skip
        finally:
            source.close()
        if self.problems:
            return None, ()
        count = len(self._moe.experts)
        shared = tuple(None if row is None else row[None] for row in rows[count:])
        return np.stack([row for row in rows[:count] if row is not None]), shared

    def _table(self) -> Read | None:
        """The base's embedding; None where there is none, which planning will tell."""
        found = view_of(self._base, self._checkpoints).tensors.get(EMBEDDING)
        if isinstance(found, Folded):
            if found.change is not None:
                self.problems.append(f"{self._moe.base}: its adapter changes the embedding, whose rows are then in no "
                                     f"file; write that model first, by a recipe of passthrough, or write gate_mode: "
                                     f"random")  # fmt: skip
                return None
            found = found.read
        known = isinstance(found, Read) and len(found.shape) == 2 and DTYPES[found.dtype].kind == "float"
        if not known:
            self.problems.append(f"{self._moe.base}: has no {EMBEDDING} whose rows can be read, which gate_mode: "
                                 f"cheap_embed takes gates from")  # fmt: skip
            return None
        assert isinstance(found, Read)
        return found

    def _tokens(self, experts: Sequence[Expert], rows: int | None) -> list[tuple[Counter[int], Counter[int]]]:
        """How often every token is in the positive and the negative prompts of experts."""
        directory = tokenizer_directory(self._base, self._checkpoints)
        found = []
        for expert in experts:
            counts = []
            for key, prompts in (("positive_prompts", expert.positive), ("negative_prompts", expert.negative)):
                ids = encode(directory, prompts)
                if ids is None:
                    self.problems.append(f"{self._moe.base}: has no tokenizer, which gate_mode: cheap_embed needs; "
                                         f"write gate_mode: random")  # fmt: skip
                    return []
                for i, (prompt, own) in enumerate(zip(prompts, ids, strict=True)):
                    self._check(f"{expert.place}{key}[{i}]: {prompt!r}", own, rows)
                counts.append(Counter(token for own in ids for token in own))
            found.append((counts[0], counts[1]))
        return found

    def _check(self, prompt: str, tokens: Sequence[int], rows: int | None) -> None:
        if not tokens:
            self.problems.append(f"{prompt} has no tokens in the tokenizer of {self._moe.base}")
        beyond = [token for token in tokens if rows is not None and token >= rows]
        if beyond:
            where = f"the embedding of {self._moe.base} has {rows} rows"
            self.problems.append(f"{prompt} has the token {beyond[0]}, and {where}")

    def _row(self, expert: Expert, positive: Counter[int], negative: Counter[int], table: Read,
             source: Source) -> Rows | None:  # fmt: skip
        """The row of an expert, None for a shared one without prompts."""
        if not positive:
            return None
        row = _unit(_sum(positive.items(), table, source))
        if negative:
            row = _unit(row - _unit(_sum(negative.items(), table, source)))
        if not np.isfinite(row).all():
            why = "positive and negative prompts cancel each other" if negative else "the sum of its rows is no vector"
            self.problems.append(f"{expert.place}its prompts make no gate: {why}")
        return row


def _sum(counts: Iterable[tuple[int, int]], table: Read, source: Source) -> Rows:
    """The sum of rows of a table, each so many times."""
    spec, width = table.spec, table.shape[1]
    total = np.zeros(width, np.float64)
    row = torch.empty(width, dtype=torch_dtype(spec.dtype))
    # Through bytes: numpy knows no bfloat16.
    buffer = memoryview(row.view(torch.uint8).numpy().data)
    for token, count in sorted(counts):
        source.read_into(buffer, spec.file, spec.offset + token * len(buffer))
        total += row.double().numpy() * count
    return total


def _unit(vector: Rows) -> Rows:
    """A vector of length 1; NaN where there is none. The sum of squares is exact, so that its bits are everywhere."""
    with np.errstate(all="ignore"):
        squares = vector * vector
        if not np.isfinite(squares).all():
            return np.full_like(vector, math.nan)
        length = math.sqrt(math.fsum(squares.tolist()))
        return vector / np.float64(length)
