"""Where models differ in their experts: a few sentences, in place of one for every tensor."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from streammerge.plan.names import expert_of, experts_in_one, layer_of, stacks

_SHOWN = 3


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
                blocks = {layer_of(f"{where}.") for where in mixed}
                return [sentence], {name for names in sets for name in names if layer_of(name) in blocks}
    depths = [stacks(names) for names in sets]
    sentences: list[str] = []
    missing: set[tuple[str, int]] = set()
    layers = {where: layer for own in found for where in own if (layer := layer_of(f"{where}.")) is not None}
    for where, (stack, number) in sorted(layers.items(), key=lambda each: each[1]):
        pairs = [
            (model, own.get(where, {}))
            for model, own, depth in zip(models, found, depths, strict=True)
            # A model without such layers at all, as without a tower, lacks more than experts.
            if stack in depth
        ]
        sentences += _counts(pairs, f"layer {number}")
        numbers = {expert for _, own in pairs for expert in own}
        missing |= {(where, expert) for expert in numbers if any(expert not in own for _, own in pairs)}
    more = len(sentences) - _SHOWN
    said = [*sentences[:_SHOWN], *([f"and {more} more like these"] if more > 0 else [])]
    return said, {name for names in sets for name in names if expert_of(name) in missing}


def _experts_of(names: Collection[str]) -> dict[str, dict[int, str]]:
    """The experts that there are tensors of, by where they are, with the first tensor of each."""
    found: dict[str, dict[int, str]] = {}
    for name in names:
        expert = expert_of(name)
        if expert is not None:
            found.setdefault(expert[0], {}).setdefault(expert[1], name)
    return found


def _counts(pairs: Sequence[tuple[str, Mapping[int, str]]], place: str) -> list[str]:
    """A sentence for every model that lacks experts that the one with the most has in this place."""
    most, numbers = max(pairs, key=lambda pair: len(pair[1]))
    sentences = []
    for model, own in pairs:
        lacking = [number for number in numbers if number not in own]
        if lacking:
            sentences.append(
                f"{model} has {len(own)} experts in {place}, {most} has {len(numbers)}: it lacks "
                f"{', '.join(map(str, lacking[:_SHOWN]))}{' and more' if len(lacking) > _SHOWN else ''} "
                f"({numbers[lacking[0]]})"
            )
    return sentences
