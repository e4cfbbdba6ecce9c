"""Models whose tensors are called otherwise than the output's: `names:` of a recipe.

So a text model meets the language part of one that sees: `model.layers.3` of the one is `language_model.model.layers.3`
of the other. The output is the model without such a map, the stage's donor: a map reaches a part of it, and all the
rest is merged of the others, or copied. A model that does not fill its part, or reaches beyond it, is an error.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile

from streammerge.plan.document import nearest
from streammerge.plan.names import in_first_layer, is_buffer, layer_of, listing, sense_of, stacks
from streammerge.plan.recipe import Stage
from streammerge.plan.view import Operand, View

_SHOWN = 3


@dataclass(frozen=True)
class Reach:
    """How much of an output's `of` tensors a model takes part in that has a map of `names`."""

    model: str
    names: Mapping[str, str]
    tensors: int
    of: int


def renamed(view: View, names: Mapping[str, str], problems: list[str]) -> View:
    """A model under the names of the output: the longest beginning in `names` counts, and what none fits stays.

    Beginnings that no tensor has, and tensors that would share a name, are added to `problems`.
    """
    where = f"names of {view.model}"
    for begin in names:
        if not any(name.startswith(begin) for name in view.tensors):
            known = _beginnings(view.tensors)
            near = (
                nearest(begin, known) or f" They begin with {listing([repr(b) for b in known if b.count('.') == 1])}."
            )
            problems.append(f"{where}: none of its tensors begins with {begin!r}.{near}")
    longest = sorted(names, key=len, reverse=True)
    tensors: dict[str, Operand] = {}
    origins: dict[str, tuple[tuple[int, int], ...]] = {}
    before: dict[str, str] = {}
    twice = []
    for name, tensor in view.tensors.items():
        fitting = [each for each in longest if name.startswith(each)]
        new = names[fitting[0]] + name[len(fitting[0]) :] if fitting else name
        if new in tensors:
            twice.append(f"{before[new]} and {name} would both be {new}")
        tensors[new], before[new] = tensor, name
        own, layer = layer_of(name), layer_of(new)
        if own is not None and layer is not None and own[0] in view.origins:
            origins.setdefault(layer[0], view.origins[own[0]])
    problems += [f"{where}: {sentence}" for sentence in twice[:_SHOWN]]
    if len(twice) > _SHOWN:
        problems.append(f"{where}: so would {len(twice) - _SHOWN} more pairs")
    return replace(view, tensors=tensors, origins=origins)


def check_renamed(stage: Stage, views: Mapping[str, View]) -> list[str]:
    """A sentence for everything that renamed models have and the donor lacks, or lack of the part that they reach.

    Where layers are put together anew, a tensor counts as there if any layer has one like it.
    """
    donor = views[stage.donor]
    problems = []
    for model, names in stage.names.items():
        problems += _Part(views[model], donor, tuple(names.values()), anew=_is_sliced(stage, model)).problems()
    return problems


def without_more(stage: Stage, view: View, views: Mapping[str, View]) -> View:
    """A renamed model without what nobody learned and the donor does not store either; any other as it is."""
    if view.model not in stage.names or not any(is_buffer(name) for name in view.tensors):
        return view
    key = in_first_layer if _is_sliced(stage, view.model) else str
    theirs = {key(name) for name in views[stage.donor].tensors}
    kept = {name: tensor for name, tensor in view.tensors.items() if key(name) in theirs or not is_buffer(name)}
    return replace(view, tensors=kept)


def check_shapes(stage: Stage, views: Mapping[str, View]) -> str | None:
    """What a user is told where tensors of renamed models are of other shapes than the donor's."""
    donor = views[stage.donor]
    for model in stage.names:
        key = in_first_layer if _is_sliced(stage, model) else str
        shapes: dict[str, set[tuple[int, ...]]] = {}
        for name, tensor in donor.tensors.items():
            shapes.setdefault(key(name), set()).add(tensor.shape)
        own = views[model].tensors
        wrong = [name for name, tensor in own.items() if tensor.shape not in shapes.get(key(name), {tensor.shape})]
        if wrong:
            return _mismatch(stage, donor, views[model], wrong, min(shapes[key(wrong[0])]))
    return None


def suggested(names: Iterable[str], others: Iterable[str]) -> dict[str, str]:
    """How names might become those of the language part of others: by one tensor of a layer, or else of none.

    Empty where nothing fits.
    """
    mine = min(names, key=lambda name: layer_of(name) is None, default="")
    best, found = 0, {}
    for other in others:
        if (layer_of(other) is None) != (layer_of(mine) is None) or sense_of(other) != "text":
            continue
        end = _common_end(mine, other)
        # It must reach beyond the number of the layer, if there is one.
        if len(end) > best and (end == mine or (layer_of(mine) is not None and layer_of(f"x.{end}") is not None)):
            best, found = len(end), {mine.removesuffix(end): other.removesuffix(end)}
    return found


def _common_end(one: str, other: str) -> str:
    """The longest end of two names, whole between dots."""
    pairs = zip(reversed(one.split(".")), reversed(other.split(".")), strict=False)
    return ".".join([part for part, _ in takewhile(lambda pair: pair[0] == pair[1], pairs)][::-1])


def _is_sliced(stage: Stage, model: str) -> bool:
    inputs = [source for module in stage.modules for part in module.slices for source in part.inputs]
    return any(source.layers is not None for source in inputs if source.model == model)


def _beginnings(names: Iterable[str]) -> list[str]:
    """Everything up to a dot that names begin with, the shortest first."""
    found = dict.fromkeys(name[: i + 1] for name in names for i, letter in enumerate(name) if letter == ".")
    return sorted(found, key=len)


class _Part:
    """A renamed model beside the part of the donor that it is to be merged with."""

    def __init__(self, view: View, donor: View, targets: tuple[str, ...], *, anew: bool) -> None:
        key = in_first_layer if anew else str
        mine, theirs = {key(name) for name in view.tensors}, {key(name) for name in donor.tensors}
        self._view, self._donor = view, donor
        self._strange = [name for name in view.tensors if key(name) not in theirs and not is_buffer(name)]
        self._lacking = [
            name
            for name in donor.tensors
            if name.startswith(targets) and key(name) not in mine and not is_buffer(name)
        ]  # fmt: skip

    def problems(self) -> list[str]:
        view, donor = self._view.model, self._donor.model
        where = f"names of {view}"
        if self._strange and len(self._strange) == len([name for name in self._view.tensors if not is_buffer(name)]):
            return [f"{where}: {donor} has none of its tensors, not even {self._strange[0]}.{self._advice()}"]
        strange, lacking = self._strange, self._lacking
        problems: list[str] = []
        mine, theirs = stacks(self._view.tensors), stacks(self._donor.tensors)
        for stack in [stack for stack in mine if stack in theirs and mine[stack] != theirs[stack]]:
            beyond = [name for name in (*strange, *lacking) if _is_beyond(name, stack, min(mine[stack], theirs[stack]))]
            if beyond:
                problems.append(f"{where}: it has {mine[stack]} layers, and {donor} has {theirs[stack]} under {stack}: "
                                f"take as many with slices and layer_range, or a model of that depth")  # fmt: skip
                strange, lacking = ([name for name in each if name not in beyond] for each in (strange, lacking))
        if strange:
            problems.append(f"{where}: {donor} has no {listing(strange)}.{self._advice()}")
        if lacking:
            problems.append(f"{where}: it has nothing for {listing(lacking)} of {donor}")
        return problems

    def _advice(self) -> str:
        found = suggested(self._strange, self._donor.tensors)
        if "" in found:
            found = {self._strange[0]: found[""] + self._strange[0]}
        return "".join(f" Should {mine!r} there be {theirs!r}?" for mine, theirs in found.items())


def _is_beyond(name: str, stack: str, depth: int) -> bool:
    layer = layer_of(name)
    return layer is not None and layer[0] == stack and layer[1] >= depth


def _mismatch(stage: Stage, donor: View, view: View, wrong: Sequence[str], expected: tuple[int, ...]) -> str:
    name = wrong[0]
    found = view.tensors[name].shape
    width = max(len(donor.model), len(view.model))
    more = f"\nSo do {len(wrong) - 1} more: {listing(wrong[1:])}" if len(wrong) > 1 else ""
    by_rows = all(
        each in donor.tensors and view.tensors[each].shape[1:] == donor.tensors[each].shape[1:] for each in wrong
    ) and any(word in name for word in ("embed", "lm_head"))
    advice = (
        "These look like vocabularies: add  tokenizer: {source: union}  to the recipe."
        if by_rows and stage.tokenizer is None
        else "A model merges with a part of its own size only: take the text model that the part was made of, or one "
        "that was fine-tuned from it."
    )
    return (
        f"{name} differs between {donor.model} and {view.model}, which `names` puts there\n"
        f"  expected  {donor.model:<{width}}  {list(expected)}\n"
        f"  found     {view.model:<{width}}  {list(found)}{more}\n{advice}"
    )
