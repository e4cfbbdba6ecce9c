"""What every stage of a recipe makes, tensor by tensor: a method, its parameters, its operands; before any layout."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from streammerge.base.dtypes import DTYPES, promote
from streammerge.base.errors import RecipeError, ShapeMismatch, UserError
from streammerge.kernels.contract import Method, Settings
from streammerge.methods.passthrough import AS_IT_IS, PASSTHROUGH
from streammerge.plan.align import align
from streammerge.plan.names import embedding_of, head_of, in_first_layer, in_layer, layer_of, listing
from streammerge.plan.parameters import resolve, unmatched_filters
from streammerge.plan.places import Place, Places, shorten
from streammerge.plan.recipe import Recipe, Stage
from streammerge.plan.renamed import Reach, check_renamed, check_shapes, renamed, without_more
from streammerge.plan.scaled import Scaled, Scaling, is_usual, quantised_as, scaling_like, usual_scaling
from streammerge.plan.view import Folded, Model, Operand, View, view_of, with_heads
from streammerge.storage.checkpoint import Checkpoint


@dataclass(frozen=True, eq=False)
class Draft:
    """One tensor of the recipe's stage number `stage`, named `stream` in the recipe; its random bits go by that.

    `settings` are the method's parameters for it. With `scaling` it is stored as codes, and `dtype` is that of the
    numbers they are made of.
    """

    dtype: str
    shape: tuple[int, ...]
    method: Method
    settings: Settings
    operands: tuple[Operand, ...]
    has_base: bool
    stream: str
    stage: int = 0
    scaling: Scaling | None = None

    @property
    def is_surveyed(self) -> bool:
        """Whether others of its stage cannot be merged without looking at it."""
        exact = DTYPES[self.operands[0].dtype].kind == "exact"
        return not exact and self.method.scope(self.settings) != "tensor"

    @property
    def copied(self) -> Operand | None:
        """The operand that is the result as it stands, if one is."""
        if DTYPES[self.operands[0].dtype].kind == "exact":
            return self.operands[0] if len(self.operands) == 1 else None
        if self.is_surveyed or self.scaling is not None:
            # Others ask about it; or it is rounded again.
            return None
        number = self.method.copies(self.settings)
        return self.operands[number] if number is not None and self.operands[number].dtype == self.dtype else None

    @property
    def copied_codes(self) -> Scaled | None:
        """The 8-bit weights that are the result with their scales as they stand, if one's are."""
        number = None if self.is_surveyed or self.scaling is None else self.method.copies(self.settings)
        operand = None if number is None else self.operands[number]
        if self.scaling is None or not isinstance(operand, Folded) or operand.change is not None:
            return None
        read = operand.read
        if not isinstance(read, Scaled):
            return None
        same = (read.codes.dtype, read.scales.dtype, read.grid, read.scales.shape)
        own = self.scaling
        return read if same == (own.dtype, own.scale_dtype, own.grid, own.scale_shape) else None


def draft_stages(
    recipe: Recipe, models: Sequence[Model], checkpoints: Sequence[Checkpoint], *, sequential: bool = False
) -> tuple[list[View], list[Reach], list[str]]:
    """What every stage makes, in their order; how much of that renamed models take part in; and warnings.

    `models` are one per `recipe.inputs`.

    Raises RecipeError, ShapeMismatch for shapes alone, UserError for an adapter that does not fit and for quantised
    weights that cannot be read.

    With `sequential`, random numbers are drawn as mergekit draws them.
    """
    check_readable(models, checkpoints)
    views = {model.reference: view_of(model, checkpoints) for model in models}
    warnings = [
        f"{view.model}: {listing(view.left_out)} {'are' if len(view.left_out) > 1 else 'is'} of activations, which a "
        f"merged model would have to measure anew: left out"
        for view in views.values()
        if view.left_out
    ]
    results, reaches = [], []
    for number, stage in enumerate(recipe.stages):
        own, tied = inputs_of(stage, views, recipe.path)
        aligned = align(stage, own, recipe.path)
        if (mismatch := check_shapes(stage, aligned.views)) is not None:
            raise ShapeMismatch(mismatch)
        drafting = _Drafting(recipe, number, aligned.views, sequential=sequential)
        result = replace(drafting.run(), vocabulary=aligned.vocabulary, tied=tied)
        reaches += [
            Reach(model, names, drafting.parts[model], len(result.tensors)) for model, names in stage.names.items()
        ]
        warnings += aligned.warnings
        head, embedding = head_of(result.tensors), embedding_of(result.tensors)
        if tied and head is not None and embedding is not None:
            # They are one tensor, and stay one.
            result = replace(result, tensors={**result.tensors, head: result.tensors[embedding]})
        results.append(result)
        warnings += drafting.warnings
        if stage.name is not None:
            views[stage.name] = replace(results[-1], model=stage.name)
    return results, reaches, warnings


def inputs_of(stage: Stage, views: Mapping[str, View], path: Path) -> tuple[dict[str, View], bool]:
    """The models of a stage under the names of its result, with heads; and whether all are tied. Raises RecipeError."""
    problems: list[str] = []
    named = [
        renamed(views[model], stage.names[model], problems) if model in stage.names else views[model]
        for model in stage.inputs
    ]
    made, tied = with_heads(named)
    own = dict(zip(stage.inputs, made, strict=True))
    problems = problems or check_renamed(stage, own)
    if problems:
        raise _error(path, stage, problems)
    return {model: without_more(stage, view, own) for model, view in own.items()}, tied


def _error(path: Path, stage: Stage, problems: Sequence[str]) -> RecipeError:
    where = "" if stage.name is None else f"stage {stage.name}: "
    return RecipeError(str(path), [where + problem for problem in shorten(list(problems))])


def check_readable(models: Sequence[Model], checkpoints: Sequence[Checkpoint]) -> None:
    """Raise UserError for all models whose weights are quantised in a way that cannot be merged."""
    found = {model.reference: quantised_as(checkpoints[model.checkpoint].tensors) for model in models}
    problems = [f"{name}: its weights are quantised by {form[0]}. {form[1]}." for name, form in found.items() if form]
    if problems:
        raise UserError("\n".join(problems))


def _is_scaled(operand: Operand) -> Scaled | None:
    """The first 8-bit weights that a tensor is made of, or None."""
    if isinstance(operand, Folded):
        return operand.read if isinstance(operand.read, Scaled) else None
    if isinstance(operand, Draft):
        return next((found for each in operand.operands if (found := _is_scaled(each)) is not None), None)
    return None


def _unlike_layers(places: Sequence[Place], operands: Mapping[str, Sequence[Operand]]) -> list[str]:
    """A sentence where slices put together layers whose vectors are of different lengths."""
    first: dict[str, Place] = {}
    for place in places:
        if place.part.inputs[0].layers is None or layer_of(place.name) is None:
            continue
        like = first.setdefault(in_layer(place.name, 0), place)
        shape, other = operands[like.name][0].shape, operands[place.name][0].shape
        if len(shape) == 1 and shape != other:
            found = f"{like.name} is {list(shape)} and {place.name} is {list(other)}"
            return [f"{found}: a model whose layers are of different widths does not load in most programs"]
    return []


class _Drafting:
    """The work on one stage."""

    def __init__(self, recipe: Recipe, number: int, views: Mapping[str, View], *, sequential: bool) -> None:
        self._recipe, self._number, self._views = recipe, number, views
        self._stage: Stage = recipe.stages[number]
        self._sequential = sequential
        # In 8 bits the output is stored where, and as, the first model is that is so stored.
        self._bare: set[str] = set()
        self._like: dict[str, Scaled] = {}
        for model in sorted(self._stage.inputs, key=lambda model: model != self._stage.donor):
            pairs = [(name, _is_scaled(tensor)) for name, tensor in views[model].tensors.items()]
            scaled = {name: found for name, found in pairs if found is not None}
            if not scaled:
                self._bare.add(model)
            elif not self._like:
                self._like = {in_first_layer(name): found for name, found in scaled.items()} | scaled
        self._in_more_bits: list[str] = []
        self._drawing: dict[tuple[int, str], Settings] = {}
        self.warnings: list[str] = []
        # By model, how many tensors it takes part in.
        self.parts: Counter[str] = Counter()

    def run(self) -> View:
        stage = self._stage
        places = Places(stage, self._views)
        problems = list(places.problems)
        operands = {place.name: self._operands(place) for place in places.all}
        mismatch = self._check(places.all, operands, problems)
        vectors = {name for name, own in operands.items() if len(own[0].shape) < 2}
        settings = resolve(stage, places.all, vectors, problems)
        problems += [
            f"tensor {name!r} is not in every model, and {stage.method.name} compares models over many tensors here"
            for name in sorted(places.partial & set(settings))
            if stage.method.scope(settings[name]) != "tensor"
        ]
        if mismatch is not None:
            if not problems:
                raise ShapeMismatch(mismatch)
            problems.append(mismatch)
        if problems:
            raise self._error(problems)
        self.warnings += [
            *places.warnings,
            *unmatched_filters(stage, places.all),
            *_unlike_layers(places.all, operands),
        ]
        self.parts.update(source.model for place in places.all for source in place.part.inputs)
        self.parts.update(places.copied.values())
        prefix = "" if stage.name is None else f"{stage.name}/"
        tensors: dict[str, Operand] = {}
        for place in places.all:
            own = operands[place.name]
            dtype, scaling = self._stored(place.name, own, [source.model for source in place.part.inputs])
            tensors[place.name] = Draft(
                dtype, own[0].shape, stage.method, self._drawn(settings[place.name], own), own,
                place.part.base is not None, prefix + place.name, self._number, scaling,
            )  # fmt: skip
        for name, model in places.copied.items():
            alone = (self._views[model].tensors[name],)
            dtype, scaling = self._stored(name, alone, [model])
            tensors[name] = Draft(
                dtype, alone[0].shape, PASSTHROUGH, AS_IT_IS, alone, False, prefix + name, self._number, scaling
            )
        scaled = [draft.scaling for draft in tensors.values() if isinstance(draft, Draft) and draft.scaling is not None]
        taken = [scaling.scale_name for scaling in scaled if scaling.scale_name in tensors]
        if taken:
            raise self._error([f"{listing(taken)} would hold scales of the output, and an input has such a tensor"])
        self._check_scaling(scaled)
        return View(stage.name or "", tensors, places.origins)

    def _error(self, problems: Sequence[str]) -> RecipeError:
        return _error(self._recipe.path, self._stage, problems)

    def _operands(self, place: Place) -> tuple[Operand, ...]:
        pairs = zip(place.part.inputs, place.sources, strict=True)
        return tuple(self._views[source.model].tensors[name] for source, name in pairs)

    def _check(self, places: Sequence[Place], operands: Mapping[str, Sequence[Operand]],
               problems: list[str]) -> str | None:  # fmt: skip
        """Add what is wrong with dtypes to `problems`; say what is wrong with shapes."""
        wrong = []
        for place in places:
            dtypes = [operand.dtype for operand in operands[place.name]]
            kinds = {DTYPES[dtype].kind for dtype in dtypes}
            if "exact" in kinds and len(set(dtypes)) > 1:
                problems.append(f"tensor {place.name!r} is {listing(dtypes)} in the inputs: integers are copied, and "
                                f"only when every input has the same")  # fmt: skip
            shapes = [operand.shape for operand in operands[place.name]]
            if len(set(shapes)) > 1:
                wrong.append((place, shapes))
        return self._mismatch(wrong) if wrong else None

    def _mismatch(self, wrong: Sequence[tuple[Place, list[tuple[int, ...]]]]) -> str:
        place, shapes = wrong[0]
        sources = place.part.inputs
        width = max(len(source.model) for source in sources)
        rows = [
            f"  {'base ' if i == 0 and place.part.base else 'model'}  {source.model:<{width}}  {list(shape)}"
            for i, (source, shape) in enumerate(zip(sources, shapes, strict=True))
        ]
        names = [other.name for other, _ in wrong[1:]]
        more = f"\nSo do {len(names)} more: {listing(names)}" if names else ""
        rows_differ = all(len({shape[1:] for shape in found}) == 1 for _, found in wrong)
        advice = (
            "These look like vocabularies: add  tokenizer: {source: union}  to the recipe."
            if rows_differ
            and self._stage.tokenizer is None
            and any(word in place.name for word in ("embed", "wte", "lm_head"))
            and "position" not in place.name
            else "Are these models of one architecture and size?"
        )
        return (
            f"{place.name} differs between inputs\n" + "\n".join(rows) + more
            + f"\n{self._stage.method.name} needs equal shapes. {advice}"
        )  # fmt: skip

    def _check_scaling(self, scaled: Sequence[Scaling]) -> None:
        """Say what programs will make of an output in 8 bits. Raises RecipeError where none can read it."""
        asked = self._stage.out_dtype or self._stage.dtype
        if asked is None or DTYPES[asked].kind == "float":
            return
        if self._in_more_bits:
            self.warnings.append(
                f"{'no matrix' if not scaled else f'{len(self._in_more_bits)} matrices'} in layers "
                f"{'is' if not scaled else 'are not'} stored in 8 bits, as their sides are no multiples of 128: "
                f"{listing(self._in_more_bits)}"
            )
        if asked != "F8_E5M2" or not scaled:
            return
        if any(scaling.suffix == "_scale" for scaling in scaled):
            problem = "out_dtype: float8_e5m2 is none of compressed-tensors, as these are stored; write float8_e4m3fn"
            raise self._error([problem])
        self.warnings.append("transformers takes codes of float8_e5m2 for such of float8_e4m3fn, unless it is told to "
                             "dequantize")  # fmt: skip

    def _stored(self, name: str, operands: Sequence[Operand],
                models: Sequence[str]) -> tuple[str, Scaling | None]:  # fmt: skip
        """The dtype in which a tensor is made of these `models`, and how it is stored if as codes."""
        if DTYPES[operands[0].dtype].kind == "exact":
            return operands[0].dtype, None
        asked = self._stage.out_dtype or self._stage.dtype
        if asked is None or DTYPES[asked].kind == "float":
            return asked or promote([operand.dtype for operand in operands]), None
        scaling, shape = None, operands[0].shape
        if self._like:
            found = next((scaled for each in operands if (scaled := _is_scaled(each)) is not None), None)
            alike = self._like.get(name) or self._like.get(in_first_layer(name))
            # What models in 8 bits leave in more stays so; a layer of another model becomes as theirs are.
            if found is not None or (alike is not None and self._bare.issuperset(models)):
                # The one with most scales: a matrix of one block looks like one with a scale for all of it.
                alike = alike or max(self._like.values(), key=lambda each: math.prod(each.scales.shape))
                scaling = scaling_like(alike, name, shape, asked)
        else:
            scaling = usual_scaling(name, shape, asked)
            if scaling is None and is_usual(name, shape):
                self._in_more_bits.append(name)
        return ("F32" if scaling is not None else promote([operand.dtype for operand in operands])), scaling

    def _drawn(self, settings: Settings, operands: Sequence[Operand]) -> Settings:
        """The settings, saying in which dtype mergekit would draw."""
        method = self._stage.method
        if not self._sequential or not method.program(settings).needs_keys:
            return settings
        if method.by_rows(settings):
            raise self._error([f"--rng mergekit can repeat what DARE draws there, not what {method.name} does"])
        stored = self._stage.dtype or promote([operand.dtype for operand in operands])
        key = (id(settings), stored)
        if key not in self._drawing:
            dtype = torch.bfloat16 if stored == "BF16" else torch.float32
            self._drawing[key] = replace(settings, sequential=dtype)
        return self._drawing[key]
