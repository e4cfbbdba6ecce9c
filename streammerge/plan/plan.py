"""The plan: everything about the output that is fixed before a tensor byte is read.

`build_plan` is pure: recipe and headers in, plan out, or one error with every problem. Its digest names the output:
same digest, same bytes. Memory, threads, tile sizes and devices are not in it; they are the schedule's (budget.py).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import xxhash

from streammerge.base.dtypes import DTYPES
from streammerge.base.errors import RecipeError
from streammerge.kernels.contract import BLOCK, Grain, Method, Settings, grain_of
from streammerge.plan.draft import Draft, Read, draft_stages
from streammerge.plan.layout import ShardLayout, lay_out
from streammerge.plan.recipe import Recipe
from streammerge.storage.checkpoint import Checkpoint

# Raised when a change alters the bytes of an output.
FORMAT = 3


@dataclass(frozen=True)
class Step:
    """One merge: a method over some operands, base first if `has_base`.

    An operand below the number of a tensor's reads is one of them, the next ones are the results of earlier steps.
    `work` is the dtype of the arithmetic, F32 or F64; `stream` names the random bits. `found` is what a survey of many
    tensors found for this one, once there was one.
    """

    method: Method
    settings: Settings
    operands: tuple[int, ...]
    has_base: bool
    dtype: str
    work: str
    stream: str
    stage: str
    found: Any = None

    def grain(self, shape: Sequence[int]) -> Grain:
        return grain_of(shape, by_rows=self.method.by_rows(self.settings))


@dataclass(frozen=True)
class TensorPlan:
    """One output tensor: what is read for it, what is done, and where its bytes go.

    Without steps the bytes of the first read are copied, after making sure that all reads agree (integers are never
    computed with). With steps, the last one's result is written.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    elements: int
    reads: tuple[Read, ...]
    steps: tuple[Step, ...]
    shard: int
    offset: int

    @property
    def nbytes(self) -> int:
        return self.elements * DTYPES[self.dtype].itemsize

    @property
    def read_bytes(self) -> int:
        """The bytes of all that is read, once."""
        return sum(read.spec.nbytes for read in self.reads)

    @property
    def action(self) -> Literal["merge", "copy", "equal"]:
        return "merge" if self.steps else "copy" if len(self.reads) == 1 else "equal"

    @property
    def dtypes(self) -> tuple[str, ...]:
        """The dtype of every operand: of the reads, then of the steps."""
        return (*(read.spec.dtype for read in self.reads), *(step.dtype for step in self.steps))

    @property
    def passes(self) -> int:
        """How often it is read when what is read does not stay in memory."""
        return 1 + sum(step.method.passes(step.settings, self._narrow(step)) - 1 for step in self.steps)

    @property
    def survey_passes(self) -> int:
        """How often it is read before the first tensor is merged, together with others."""
        surveyed = [step.method for step in self.steps if step.method.scope(step.settings) != "tensor"]
        return sum(method.survey_passes for method in surveyed)

    @cached_property
    def quantum(self) -> int:
        """A tile's elements are a multiple of this, for the units of every step to be whole; or else all of them."""
        units = {step.grain(self.shape).unit for step in self.steps} or {BLOCK}
        return min(math.lcm(*units), max(1, self.elements) if len(units) > 1 else math.lcm(*units))

    def _narrow(self, step: Step) -> bool:
        return all(DTYPES[self.dtypes[i]].bits == 16 for i in step.operands)


@dataclass(frozen=True)
class Plan:
    """What a merge will write. `tensors` are in the order of the output bytes: shard by shard, by offset.

    `checkpoints` are one per `recipe.inputs`, the one first whose config and tokenizer the output takes; `settings` are
    the parameters of the last stage, by tensor. `layers` says which checkpoint's layer, if only for config.json, is
    behind each layer of the output.
    """

    recipe: Recipe
    checkpoints: tuple[Checkpoint, ...]
    tensors: tuple[TensorPlan, ...]
    settings: Mapping[str, Settings]
    layers: tuple[tuple[int, int], ...]
    shards: tuple[ShardLayout, ...]
    seed: int
    facts: dict[str, Any]
    warnings: tuple[str, ...]

    @property
    def method(self) -> Method:
        return self.recipe.method

    @cached_property
    def digest(self) -> str:
        """xxh3-128 of the facts, as canonical JSON."""
        text = json.dumps(self.facts, sort_keys=True, separators=(",", ":"))
        return xxhash.xxh3_128_hexdigest(text.encode())

    @cached_property
    def bytes_to_write(self) -> int:
        return sum(shard.nbytes for shard in self.shards)


def build_plan(recipe: Recipe, checkpoints: Sequence[Checkpoint], *, seed: int, shard_bytes: int,
               strict: bool = False) -> Plan:  # fmt: skip
    """The plan of `recipe` over its checkpoints (one per `recipe.inputs`, in that order). `strict`: no warnings pass.

    Raises ShapeMismatch when only shapes disagree, RecipeError for everything else; both name every tensor (the first
    ten) that is wrong.
    """
    result, warnings = draft_stages(recipe, checkpoints)
    if strict and warnings:
        raise RecipeError(str(recipe.path), warnings)
    drafts = result.tensors
    shards = lay_out({name: (draft.dtype, draft.shape) for name, draft in drafts.items()}, shard_bytes)
    tensors = []
    for number, shard in enumerate(shards):
        for entry in shard.entries:
            reads, steps = work_of(drafts[entry.name])
            elements = math.prod(entry.shape)
            tensors.append(
                TensorPlan(entry.name, entry.dtype, entry.shape, elements, reads, steps, number, entry.start)
            )
    settings = {name: draft.settings for name, draft in drafts.items() if isinstance(draft, Draft)}
    facts = _facts(recipe, checkpoints, tensors, settings, shards, seed)
    return Plan(recipe, tuple(checkpoints), tuple(tensors), settings, result.origins, shards, seed, facts,
                (*recipe.warnings, *warnings))  # fmt: skip


def work_of(draft: Read | Draft) -> tuple[tuple[Read, ...], tuple[Step, ...]]:
    """What is read for an output tensor, and the steps that are done with it; none if it comes to a copy."""
    reads: list[Read] = []
    # A step is an operand by its number, counted from −1 downwards until the number of reads is known.
    steps: list[Step] = []
    known: dict[int, int] = {}

    def operand(of: Read | Draft) -> int:
        if isinstance(of, Read):
            if of not in reads:
                reads.append(of)
            return reads.index(of)
        if (copied := of.copied) is not None:
            return operand(copied)
        if id(of) not in known:
            operands = tuple(operand(each) for each in of.operands)
            work = "F64" if "F64" in {of.dtype, *(each.dtype for each in of.operands)} else "F32"
            steps.append(Step(of.method, of.settings, operands, of.has_base, of.dtype, work, of.stream, of.stage))
            known[id(of)] = -len(steps)
        return known[id(of)]

    if DTYPES[draft.dtype].kind == "exact":
        return tuple(dict.fromkeys(_leaves(draft))), ()
    operand(draft)
    count = len(reads)
    numbered = [replace(step, operands=tuple(i if i >= 0 else count - 1 - i for i in step.operands)) for step in steps]
    return tuple(reads), tuple(numbered)


def _leaves(draft: Read | Draft) -> Iterator[Read]:
    """Everything that a tensor is made of. Of integers all of it must agree."""
    if isinstance(draft, Read):
        yield draft
        return
    for each in draft.operands:
        yield from _leaves(each)


def _facts(recipe: Recipe, checkpoints: Sequence[Checkpoint], tensors: Sequence[TensorPlan],
           settings: Mapping[str, Settings], shards: Sequence[ShardLayout], seed: int) -> dict[str, Any]:  # fmt: skip
    """What the digest is made of, and what a refusal to resume compares."""
    return {
        "format": FORMAT,
        "method": recipe.method.name,
        "seed": seed,
        "dtype": recipe.last.dtype,
        "out_dtype": recipe.last.out_dtype,
        "inputs": [
            {
                "model": model,
                "files": {file.name: [file.size, file.mtime_ns, file.header] for file in checkpoint.files},
            }
            for model, checkpoint in zip(recipe.inputs, checkpoints, strict=True)
        ],
        "shards": {shard.name: xxhash.xxh3_128_hexdigest(shard.header) for shard in shards},
        "parameters": _parameter_facts(settings),
        "work": _work_facts(tensors),
    }


def _work_facts(tensors: Sequence[TensorPlan]) -> str:
    """What is done for every tensor: which inputs, which methods, in which order."""
    hashing = xxhash.xxh3_128()
    for tensor in tensors:
        reads = [[read.checkpoint, read.spec.name] for read in tensor.reads]
        steps = [
            [step.method.name, _settings_text(step.settings), step.operands, step.has_base, step.dtype, step.work,
             step.stream]
            for step in tensor.steps
        ]  # fmt: skip
        hashing.update(json.dumps([tensor.name, tensor.dtype, reads, steps]).encode())
    return hashing.hexdigest()


def _parameter_facts(settings: Mapping[str, Settings]) -> dict[str, Any]:
    """The parameters, and for each set of them the tensors that have it."""
    groups: dict[str, list[str]] = {}
    for name, own in settings.items():
        groups.setdefault(_settings_text(own), []).append(name)
    return {
        text: xxhash.xxh3_128_hexdigest("\n".join(sorted(names)).encode()) for text, names in sorted(groups.items())
    }


def _settings_text(settings: Settings) -> str:
    values: Mapping[str, Any] = {**settings.shared, **settings.models}
    text = ", ".join(f"{name} {_values_text(value)}" for name, value in sorted(values.items()))
    return text if settings.depth == 0 else f"{text}, depth {settings.depth}"


def _values_text(value: Any) -> str:
    return "/".join(map(str, value)) if isinstance(value, tuple) else str(value)
