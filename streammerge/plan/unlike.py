"""Where models differ in their experts: a few sentences, in place of one for every tensor."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from streammerge.plan.names import expert_of, experts_in_one, layer_of

_SHOWN = 3

# The experts that a model has tensors of, by where they are, with the first tensor of each.
Experts = Mapping[str, Mapping[int, str]]


def unlike_experts(models: Sequence[str], sets: Sequence[Collection[str]]) -> tuple[list[str], set[str]]:
    """What is wrong with the experts of models that hold these tensors, and the tensors that this accounts for."""
    found = [_experts_of(names) for names in sets]
    in_one = [{where: name for name in names if (where := experts_in_one(name)) is not None} for names in sets]
    for one, apart in zip(models, found, strict=True):
        for other, together in zip(models, in_one, strict=True):
            mixed = [where for where in apart if where in together]
            if mixed and one != other:
                (first, *_), fused = apart[mixed[0]].values(), together[mixed[0]]
                sentence = (
                    f"{one} has every expert in tensors of its own ({first}), and {other} all experts of a layer in "
                    f"one ({fused}): store both in the same way, then merge them"
                )
                # Routers and experts that all share have other names then, too.
                layers = {layer_of(f"{where}.") for where in mixed}
                return [sentence], {name for names in sets for name in names if layer_of(name) in layers}
    missing = {
        (where, number)
        for where in {where for own in found for where in own}
        for number in {number for own in found for number in own.get(where, ())}
        if any(number not in own.get(where, ()) for own in found)
    }
    return _counts(models, found), {name for names in sets for name in names if expert_of(name) in missing}


def _experts_of(names: Collection[str]) -> dict[str, dict[int, str]]:
    found: dict[str, dict[int, str]] = {}
    for name in names:
        expert = expert_of(name)
        if expert is not None:
            found.setdefault(expert[0], {}).setdefault(expert[1], name)
    return found


def _counts(models: Sequence[str], found: Sequence[Experts]) -> list[str]:
    """A sentence for every layer in which a model lacks experts that another has: the first few, and how many more."""
    sentences = []
    for where in sorted({where for own in found for where in own}, key=_order):
        pairs = [(model, own.get(where, {})) for model, own in zip(models, found, strict=True)]
        most, numbers = max(pairs, key=lambda pair: len(pair[1]))
        for model, own in pairs:
            lacking = [number for number in numbers if number not in own]
            if lacking:
                layer = layer_of(f"{where}.")
                place = where if layer is None else f"layer {layer[1]}"
                sentences.append(
                    f"{model} has {len(own)} experts in {place}, {most} has {len(numbers)}: it lacks "
                    f"{', '.join(map(str, lacking[:_SHOWN]))}{' and more' if len(lacking) > _SHOWN else ''} "
                    f"({numbers[lacking[0]]})"
                )
    more = len(sentences) - _SHOWN
    return [*sentences[:_SHOWN], *([f"and so in {more} more layer{'s'[: more > 1]}"] if more > 0 else [])]


def _order(where: str) -> tuple[tuple[str, int], str]:
    return layer_of(f"{where}.") or ("", -1), where
