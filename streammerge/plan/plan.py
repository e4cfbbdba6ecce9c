"""The plan: everything about the output that is fixed before a tensor byte is read.

`build_plan` is pure: recipe and headers in, plan out, or one error with every problem. Its digest names the output:
same digest, same bytes. Memory, threads, tile sizes and devices are not in it; they are the schedule's (budget.py).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import xxhash

from streammerge.base.dtypes import DTYPES, promote
from streammerge.base.errors import RecipeError, ShapeMismatch
from streammerge.kernels.contract import BLOCK, Grain, Method, Param, Settings, Value, grain_of
from streammerge.plan.layout import ShardLayout, lay_out
from streammerge.plan.names import gradient_positions
from streammerge.plan.recipe import Recipe, nearest
from streammerge.plan.setting import Setting, value_at
from streammerge.storage.checkpoint import Checkpoint, TensorSpec

# Raised when a change alters the bytes of an output.
FORMAT = 2
_SHOWN = 10


@dataclass(frozen=True)
class Read:
    """One tensor of one of the plan's checkpoints."""

    checkpoint: int
    spec: TensorSpec


@dataclass(frozen=True)
class Step:
    """One merge: a method over some operands, base first if `has_base`.

    An operand below the number of a tensor's reads is one of them, the next ones are the results of earlier steps.
    `work` is the dtype of the arithmetic, F32 or F64; `stream` names the random bits.
    """

    method: Method
    settings: Settings
    operands: tuple[int, ...]
    has_base: bool
    dtype: str
    work: str
    stream: str

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

    @cached_property
    def quantum(self) -> int:
        """A tile's elements are a multiple of this, for the units of every step to be whole; or else all of them."""
        units = {step.grain(self.shape).unit for step in self.steps} or {BLOCK}
        return min(math.lcm(*units), max(1, self.elements) if len(units) > 1 else math.lcm(*units))

    def _narrow(self, step: Step) -> bool:
        return all(DTYPES[self.dtypes[i]].bits == 16 for i in step.operands)


@dataclass(frozen=True)
class Plan:
    """What a merge will write. `tensors` are in the order of the output bytes: shard by shard, by offset."""

    recipe: Recipe
    checkpoints: tuple[Checkpoint, ...]
    tensors: tuple[TensorPlan, ...]
    settings: Mapping[str, Settings]
    shards: tuple[ShardLayout, ...]
    seed: int
    facts: dict[str, Any]
    warnings: tuple[str, ...]

    @property
    def method(self) -> Method:
        return self.recipe.method

    @property
    def has_base(self) -> bool:
        return self.recipe.base is not None

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
    names = list(checkpoints[0].tensors)
    problems = _names_problems(recipe, checkpoints)
    if problems:
        advice = "every model must hold the same tensors: are these models of one architecture?"
        raise RecipeError(str(recipe.path), [*_shorten(problems), advice])
    _check_shapes(recipe, checkpoints)
    _check_dtypes(recipe, checkpoints)

    unmatched = _unmatched_filters(recipe, names)
    if strict and unmatched:
        raise RecipeError(str(recipe.path), unmatched)
    vectors = {name for name in names if len(checkpoints[0].tensors[name].shape) < 2}
    settings = _resolve_settings(recipe, names, vectors)
    drafts: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name in names:
        spec = checkpoints[0].tensors[name]
        drafts[name] = (_output_dtype(recipe, [checkpoint.tensors[name] for checkpoint in checkpoints]), spec.shape)
    shards = lay_out(drafts, shard_bytes)
    tensors = []
    for number, shard in enumerate(shards):
        for entry in shard.entries:
            everywhere = [Read(i, checkpoint.tensors[entry.name]) for i, checkpoint in enumerate(checkpoints)]
            reads, steps = work_of(entry.name, entry.dtype, everywhere, recipe.method, settings[entry.name],
                                   has_base=recipe.base is not None)  # fmt: skip
            elements = reads[0].spec.elements
            tensors.append(
                TensorPlan(entry.name, entry.dtype, entry.shape, elements, reads, steps, number, entry.start)
            )
    facts = _facts(recipe, checkpoints, settings, shards, seed)
    return Plan(
        recipe, tuple(checkpoints), tuple(tensors), settings, shards, seed, facts, (*recipe.warnings, *unmatched)
    )


def work_of(name: str, dtype: str, reads: Sequence[Read], method: Method, settings: Settings, *,
            has_base: bool) -> tuple[tuple[Read, ...], tuple[Step, ...]]:  # fmt: skip
    """Reads and steps of an output tensor: a method over `reads`, or the copy of one if that is all it comes to."""
    dtypes = [read.spec.dtype for read in reads]
    if DTYPES[dtypes[0]].kind == "exact":
        return tuple(reads), ()
    copied = method.copies(settings)
    if copied is not None and dtypes[copied] == dtype:
        return (reads[copied],), ()
    work = "F64" if "F64" in {dtype, *dtypes} else "F32"
    return tuple(reads), (Step(method, settings, tuple(range(len(reads))), has_base, dtype, work, name),)


def _output_dtype(recipe: Recipe, inputs: Sequence[TensorSpec]) -> str:
    if DTYPES[inputs[0].dtype].kind == "exact":
        return inputs[0].dtype
    return recipe.out_dtype or recipe.dtype or promote([spec.dtype for spec in inputs])


def _names_problems(recipe: Recipe, checkpoints: Sequence[Checkpoint]) -> list[str]:
    problems = []
    first, *others = zip(recipe.inputs, checkpoints, strict=True)
    for other_input, other in others:
        for name in first[1].tensors:
            if name not in other.tensors:
                problems.append(f"tensor {name!r} is in {first[0].model} and not in {other_input.model}")
        for name in other.tensors:
            if name not in first[1].tensors:
                problems.append(f"tensor {name!r} is in {other_input.model} and not in {first[0].model}")
    return problems


def _check_shapes(recipe: Recipe, checkpoints: Sequence[Checkpoint]) -> None:
    wrong = []
    for name, spec in checkpoints[0].tensors.items():
        shapes = [checkpoint.tensors[name].shape for checkpoint in checkpoints]
        if any(shape != spec.shape for shape in shapes):
            wrong.append((name, shapes))
    if not wrong:
        return
    name, shapes = wrong[0]
    width = max(len(source.model) for source in recipe.inputs)
    rows = [
        f"  {'base ' if i == 0 and recipe.base else 'model'}  {source.model:<{width}}  {list(shape)}"
        for i, (source, shape) in enumerate(zip(recipe.inputs, shapes, strict=True))
    ]
    more = "" if len(wrong) == 1 else f"\nSo do {len(wrong) - 1} more: " + _listing([name for name, _ in wrong[1:]])
    rows_differ = all(len({shape[1:] for shape in shapes}) == 1 for _, shapes in wrong)
    advice = (
        "These look like vocabularies of different size: models must share one until tokenizers can be merged."
        if rows_differ and any(word in name for word in ("embed", "wte", "lm_head"))
        else "Are these models of one architecture and size?"
    )
    raise ShapeMismatch(
        f"{name} differs between inputs\n" + "\n".join(rows) + more
        + f"\n{recipe.method.name} needs equal shapes. {advice}"
    )  # fmt: skip


def _check_dtypes(recipe: Recipe, checkpoints: Sequence[Checkpoint]) -> None:
    problems = []
    for name in checkpoints[0].tensors:
        dtypes = [checkpoint.tensors[name].dtype for checkpoint in checkpoints]
        kinds = {DTYPES[dtype].kind for dtype in dtypes}
        if "quantised" in kinds:
            problems.append(f"tensor {name!r} is stored as {_listing(dtypes)}: quantised weights cannot be merged yet; "
                            f"convert the model to bfloat16 first")  # fmt: skip
        elif "exact" in kinds and len(set(dtypes)) > 1:
            problems.append(f"tensor {name!r} is {_listing(dtypes)} in the inputs: integers are copied, and only when "
                            f"every input has the same")  # fmt: skip
    if problems:
        raise RecipeError(str(recipe.path), _shorten(problems))


def _unmatched_filters(recipe: Recipe, names: Sequence[str]) -> list[str]:
    """A sentence for every filter that no tensor's name contains."""
    groups = [recipe.parameters, *(source.parameters for source in recipe.models)]
    filters = [
        (name, entry.filter)
        for parameters in groups
        for name, setting in parameters.items()
        for entry in setting
        if entry.filter not in (None, "*")
    ]
    parts = sorted({part for name in names for part in name.split(".")})
    return [
        f"{name}: the filter {text!r} matches no tensor.{nearest(text, parts)}"
        for name, text in dict.fromkeys(filters)
        if text is not None and not any(text in tensor for tensor in names)
    ]


def _resolve_settings(recipe: Recipe, names: Sequence[str], vectors: Set[str]) -> dict[str, Settings]:
    """The parameters of every tensor; `vectors` are those of fewer than two dimensions. Raises RecipeError."""
    positions = gradient_positions(names)
    problems: dict[str, None] = {}
    made: dict[tuple[Value | None, ...], Settings] = {}
    finders = [_finder(recipe, param) for param in recipe.method.params]
    settings = {}
    for name in names:
        found = [find(name, positions[name], problems) for find in finders]
        if name in vectors:
            found = [
                values if param.vectors else (param.default,) * len(values)
                for param, values in zip(recipe.method.params, found, strict=True)
            ]
        key = tuple(value for values in found for value in values)
        if key not in made:
            pairs = list(zip(recipe.method.params, found, strict=True))
            made[key] = Settings(
                {param.name: values[0] for param, values in pairs if not param.per_model},
                {param.name: values for param, values in pairs if param.per_model},
            )
            if not problems:
                problems |= dict.fromkeys(recipe.method.check(made[key]))
        settings[name] = made[key]
    if problems:
        raise RecipeError(str(recipe.path), _shorten(list(problems)))
    return settings


Finder = Callable[[str, float, dict[str, None]], tuple[Value | None, ...]]


def _finder(recipe: Recipe, param: Param) -> Finder:
    """Finds the values of one parameter for a tensor: one per model, or one in all.

    What a model says comes before what the recipe says for all, that before the default.
    """
    shared = recipe.parameters.get(param.name, ())
    models = [source.parameters.get(param.name, ()) for source in recipe.models] if param.per_model else [()]

    def find(name: str, position: float, problems: dict[str, None]) -> tuple[Value | None, ...]:
        values = []
        for i, own in enumerate(models):
            value = None
            for setting in (own, shared):
                try:
                    value = value_at(setting, name, position, param)
                except ValueError as error:
                    problems[f"{param.name}: {error}"] = None
                    value = 0.0  # goes on to find the other problems
                if value is not None:
                    break
            if value is None:
                value = param.default
            if value is None and not param.optional:
                owner = f" of {recipe.models[i].model}" if param.per_model else ""
                problems[f"{recipe.method.name} needs {param.name}{owner} for {name}"] = None
                value = 0.0  # goes on to find the other problems
            values.append(value)
        return tuple(values)

    constant = all(_is_constant(setting) for setting in (*models, shared))
    if not constant:
        return find
    answers: list[tuple[Value | None, ...]] = []

    def find_once(name: str, position: float, problems: dict[str, None]) -> tuple[Value | None, ...]:
        if not answers:
            answers.append(find(name, position, problems))
        return answers[0]

    return find_once


def _is_constant(setting: Setting) -> bool:
    return not setting or (setting[0].filter in (None, "*") and len(setting[0].values) == 1)


def _facts(recipe: Recipe, checkpoints: Sequence[Checkpoint], settings: Mapping[str, Settings],
           shards: Sequence[ShardLayout], seed: int) -> dict[str, Any]:  # fmt: skip
    """What the digest is made of, and what a refusal to resume compares."""
    return {
        "format": FORMAT,
        "method": recipe.method.name,
        "seed": seed,
        "dtype": recipe.dtype,
        "out_dtype": recipe.out_dtype,
        "inputs": [
            {
                "model": source.model,
                "files": {file.name: [file.size, file.mtime_ns, file.header] for file in checkpoint.files},
            }
            for source, checkpoint in zip(recipe.inputs, checkpoints, strict=True)
        ],
        "shards": {shard.name: xxhash.xxh3_128_hexdigest(shard.header) for shard in shards},
        "parameters": _parameter_facts(settings),
    }


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
    return ", ".join(f"{name} {_values_text(value)}" for name, value in sorted(values.items()))


def _values_text(value: Any) -> str:
    return "/".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _shorten(problems: list[str]) -> list[str]:
    if len(problems) <= _SHOWN + 1:
        return problems
    return [*problems[:_SHOWN], f"and {len(problems) - _SHOWN} more"]


def _listing(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
