"""The plan: everything about the output that is fixed before a tensor byte is read.

`build_plan` is pure: recipe and headers in, plan out, or one error with every problem. Its digest names the output:
same digest, same bytes. Memory, threads, tile sizes and devices are not in it; they are the schedule's (budget.py).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import xxhash

from streammerge.base.errors import RecipeError
from streammerge.kernels.contract import Method, Settings
from streammerge.plan.draft import Draft, draft_stages
from streammerge.plan.experts import Ground, draft_experts
from streammerge.plan.group import with_one_work
from streammerge.plan.layout import ShardLayout, lay_out
from streammerge.plan.names import head_of
from streammerge.plan.recipe import Recipe
from streammerge.plan.renamed import Reach
from streammerge.plan.template import AUTO, NAMES, marks_of, most_common, template_named
from streammerge.plan.tensor import UNWRITTEN, TensorPlan, work_of
from streammerge.plan.view import Model, Operand, Origins
from streammerge.plan.vocab import Vocabulary, listed
from streammerge.storage.checkpoint import Checkpoint

# Raised when a change alters the bytes of an output.
FORMAT = 8


@dataclass(frozen=True)
class Plan:
    """What a merge will write. `tensors` are in the order of the output bytes: shard by shard, by offset.

    `asked` are tensors of earlier stages that the output does not use, but surveys of their stage must see.
    `models` are one per `recipe.inputs`, and the first `checkpoints` theirs, each once, that one first whose config and
    tokenizer the output takes; after them come those of adapters. `settings` are the parameters of the last stage, by
    tensor. `layers` says by stack which checkpoint's layer, if only for config.json, is behind each of the output's;
    `tied`, that all models use their embedding as head, and so does the output. `vocabulary` is the output's where the
    recipe says something of it, and `template` its chat template likewise. `ground` is what a model with experts stands
    on. `reaches` are of the models whose tensors the recipe calls otherwise.
    """

    recipe: Recipe
    models: tuple[Model, ...]
    checkpoints: tuple[Checkpoint, ...]
    tensors: tuple[TensorPlan, ...]
    asked: tuple[TensorPlan, ...]
    settings: Mapping[str, Settings]
    layers: Origins
    tied: bool
    vocabulary: Vocabulary | None
    template: str | None
    shards: tuple[ShardLayout, ...]
    seed: int
    facts: dict[str, Any]
    warnings: tuple[str, ...]
    ground: Ground | None = None
    reaches: tuple[Reach, ...] = ()

    @property
    def method(self) -> Method:
        return self.recipe.method

    @cached_property
    def digest(self) -> str:
        """xxh3-128 of the facts, as canonical JSON."""
        text = json.dumps(self.facts, sort_keys=True, separators=(",", ":"))
        return xxhash.xxh3_128_hexdigest(text.encode())

    @property
    def donor_is_tied(self) -> bool:
        """Whether the model whose config the output takes has no head of its own."""
        return head_of(self.checkpoints[0].tensors) is None

    @property
    def draws_in_turn(self) -> bool:
        """Whether random numbers are drawn one after the other."""
        return any(settings.sequential is not None for settings in self.settings.values())

    @cached_property
    def bytes_to_write(self) -> int:
        return sum(shard.nbytes for shard in self.shards)


def build_plan(recipe: Recipe, models: Sequence[Model], checkpoints: Sequence[Checkpoint], *, seed: int,
               shard_bytes: int, strict: bool = False, sequential: bool = False,
               ground: Ground | None = None) -> Plan:  # fmt: skip
    """The plan of `recipe` over its models (one per `recipe.inputs`, in that order). `strict`: no warnings pass.

    With `sequential`, random numbers are drawn one after the other, as mergekit draws them. A recipe that makes experts
    needs its `ground`.

    Raises ShapeMismatch when only shapes disagree, UserError when an adapter does not fit, RecipeError for everything
    else; all name every tensor (the first ten) that is wrong.
    """
    if sequential and not recipe.is_simple:
        advice = "--rng mergekit works for one document with `models:`, not for slices, modules or several documents"
        raise RecipeError(str(recipe.path), [advice])
    reaches: list[Reach] = []
    if recipe.moe is not None:
        assert ground is not None
        made, warnings = draft_experts(recipe.moe, str(recipe.path), models, checkpoints, ground, seed)
        results = [made]
    else:
        results, reaches, warnings = draft_stages(recipe, models, checkpoints, sequential=sequential)
    result = results[-1]
    vocabulary = result.vocabulary if any(stage.tokenizer is not None for stage in recipe.stages) else None
    template = _template(recipe, models)
    if template is not None and result.vocabulary is not None:
        unknown = [mark for mark in marks_of(template) if mark not in result.vocabulary.ids]
        if unknown:
            warnings.append(f"chat_template: {listed(unknown)} {'are' if len(unknown) > 1 else 'is'} no token of the "
                            f"output and will be cut into pieces; add it under tokenizer.tokens")  # fmt: skip
    if strict and warnings:
        raise RecipeError(str(recipe.path), warnings)
    drafts = _with_copied_scales(result.tensors)
    scalings = {name: draft.scaling for name, draft in drafts.items() if isinstance(draft, Draft) and draft.scaling}
    shards = lay_out(
        {
            name: (scalings[name].dtype if name in scalings else draft.dtype, draft.shape)
            for name, draft in drafts.items()
        },
        shard_bytes,
        {name: (own.scale_name, (own.scale_dtype, own.scale_shape)) for name, own in scalings.items()},
    )
    tensors = []
    for number, shard in enumerate(shards):
        places = {entry.name: entry.start for entry in shard.entries}
        for entry in shard.entries:
            if entry.name not in drafts:
                # Scales, which are written with their weights.
                continue
            reads, steps = work_of(drafts[entry.name])
            elements = math.prod(entry.shape)
            scaling = scalings.get(entry.name)
            tensors.append(
                TensorPlan(
                    entry.name, entry.dtype, entry.shape, elements, reads, steps, number, entry.start, scaling,
                    0 if scaling is None else places[scaling.scale_name],
                )
            )  # fmt: skip
    used = {step.stream for tensor in tensors for step in tensor.steps}
    asked = [
        TensorPlan(draft.stream, draft.dtype, draft.shape, math.prod(draft.shape), *work_of(draft), UNWRITTEN, 0)
        for view in results[:-1]
        for draft in view.tensors.values()
        if isinstance(draft, Draft) and draft.stream not in used and draft.is_surveyed
    ]
    together = with_one_work([*tensors, *asked])
    tensors, asked = together[: len(tensors)], together[len(tensors) :]
    settings = {name: draft.settings for name, draft in drafts.items() if isinstance(draft, Draft)}
    facts = _facts(recipe, models, checkpoints, together, settings, shards, seed)
    if vocabulary is not None:
        facts["vocabulary"] = [vocabulary.digest, *_models_of(vocabulary, models)]
    if template is not None:
        facts["chat_template"] = xxhash.xxh3_128_hexdigest(template.encode("utf-8", "surrogatepass"))
    if recipe.moe is not None and ground is not None:
        # What only config.json says.
        facts["moe"] = [ground.architecture.name, recipe.moe.per_token]
    return Plan(recipe, tuple(models), tuple(checkpoints), tuple(tensors), tuple(asked), settings, result.origins,
                result.tied, vocabulary, template, shards, seed, facts, (*recipe.warnings, *warnings), ground,
                tuple(reaches))  # fmt: skip


def _with_copied_scales(drafts: Mapping[str, Operand]) -> dict[str, Operand]:
    """The same, where 8-bit weights that are copied are so as they stand: their codes, and beside them their scales."""
    made: dict[str, Operand] = {}
    for name, draft in drafts.items():
        copied = draft.copied_codes if isinstance(draft, Draft) else None
        if copied is None:
            made[name] = draft
        else:
            assert isinstance(draft, Draft)
            assert draft.scaling is not None
            made |= {name: copied.codes, draft.scaling.scale_name: copied.scales}
    return made


def _models_of(vocabulary: Vocabulary, models: Sequence[Model]) -> list[str]:
    """The models whose tokenizer's files a vocabulary has."""
    known = [(model.reference, model.vocabulary) for model in models]
    return [name for name, own in known if own is not None and own.directory == vocabulary.directory][:1]


def _template(recipe: Recipe, models: Sequence[Model]) -> str | None:
    """The chat template that the recipe asks for. Raises RecipeError when no model has one to choose."""
    asked = recipe.chat_template
    if asked is None or asked in NAMES:
        return None if asked is None else template_named(asked)
    if asked != AUTO:
        return asked
    found = most_common([model.template for model in models if model.template is not None])
    if found is None:
        raise RecipeError(str(recipe.path), ["chat_template: auto, and no model has one; name one, or take it out"])
    return found


def _facts(recipe: Recipe, models: Sequence[Model], checkpoints: Sequence[Checkpoint],
           tensors: Sequence[TensorPlan], settings: Mapping[str, Settings], shards: Sequence[ShardLayout],
           seed: int) -> dict[str, Any]:  # fmt: skip
    """What the digest is made of, and what a refusal to resume compares."""
    return {
        "format": FORMAT,
        "method": recipe.method.name,
        "seed": seed,
        "dtype": recipe.last.dtype,
        "out_dtype": recipe.last.out_dtype,
        "inputs": [
            {"model": model.reference, "files": _file_facts(checkpoints[model.checkpoint])}
            | ({} if model.adapter is None else {"adapter": _file_facts(checkpoints[model.adapter[0]])})
            | ({"commits": list(model.commits)} if model.commits else {})
            for model in models
        ],
        "shards": {shard.name: xxhash.xxh3_128_hexdigest(shard.header) for shard in shards},
        "parameters": _parameter_facts(settings),
        "work": _work_facts(tensors),
    }


def _file_facts(checkpoint: Checkpoint) -> dict[str, list[Any]]:
    return {file.name: [file.size, file.mtime_ns, file.header] for file in checkpoint.files}


def _work_facts(tensors: Sequence[TensorPlan]) -> str:
    """What is done for every tensor: which inputs, which methods, in which order."""
    hashing = xxhash.xxh3_128()
    texts = {id(step.settings): step.settings for tensor in tensors for step in tensor.steps}
    named = {key: _settings_text(settings) for key, settings in texts.items()}
    for tensor in tensors:
        reads = [read.facts for read in tensor.reads]
        steps = [
            [step.method.name, named[id(step.settings)], step.operands, step.has_base, step.dtype, step.work,
             step.stream, *([] if step.change is None else [step.change.facts])]
            for step in tensor.steps
        ]  # fmt: skip
        hashing.update(json.dumps([tensor.name, tensor.dtype, reads, steps]).encode())
    return hashing.hexdigest()


def _parameter_facts(settings: Mapping[str, Settings]) -> dict[str, Any]:
    """The parameters, and for each set of them the tensors that have it."""
    named = {key: _settings_text(own) for key, own in {id(own): own for own in settings.values()}.items()}
    groups: dict[str, list[str]] = {}
    for name, own in settings.items():
        groups.setdefault(named[id(own)], []).append(name)
    return {
        text: xxhash.xxh3_128_hexdigest("\n".join(sorted(names)).encode()) for text, names in sorted(groups.items())
    }


def _settings_text(settings: Settings) -> str:
    values: Mapping[str, Any] = {**settings.shared, **settings.models}
    text = ", ".join(f"{name} {_values_text(value)}" for name, value in sorted(values.items()))
    text += f", depth {settings.depth}" if settings.depth else ""
    return text + (f", drawn in turn in {settings.sequential}" if settings.sequential is not None else "")


def _values_text(value: Any) -> str:
    return "/".join(map(str, value)) if isinstance(value, tuple) else str(value)
