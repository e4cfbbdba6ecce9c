"""The recipes that both mergekit and StreamMerge are given, over the stand-ins of standins.py.

`forms(method)` puts every method into the four forms of the language. A parameter has two values: constants take the
first, gradients run from one to the other, filters and slices use both. The lists below are for one method each: shapes
of published recipes, and what is easily got wrong. Models are named as in standins.py.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

Recipe = dict[str, Any]
Pair = tuple[Any, Any]


@dataclass(frozen=True)
class Usage:
    """How a method is called here: its models, its base, and two values of each parameter, per model and shared."""

    models: tuple[str, ...]
    base: str | None = None
    each: dict[str, tuple[Pair, ...]] = field(default_factory=dict)
    shared: dict[str, Pair] = field(default_factory=dict)


_WEIGHTS = ((0.7, 0.1), (0.4, 0.8), (-0.2, 0.3))
DENSITIES = ((0.5, 0.9), (0.3, 0.6), (0.8, 0.02))
_GAMMAS = ((0.01, 0.2), (0.05, 0.0), (0.4, 0.1))
_THREE = ("one", "two", "three")


def _family(normalize: Pair, rescale: Pair | None = None, **each: tuple[Pair, ...]) -> Usage:
    shared = {"normalize": normalize, "lambda": (0.8, 1.3), **({} if rescale is None else {"rescale": rescale})}
    return Usage(_THREE, "base", {"weight": _WEIGHTS, **each}, shared)


USAGES: dict[str, Usage] = {
    "linear": Usage(_THREE, None, {"weight": _WEIGHTS}, {"normalize": (True, True)}),
    "passthrough": Usage(("one",), None, {"scale": ((1.25, 0.5),)}),
    "slerp": Usage(("one",), "base", {}, {"t": (0.35, 0.8)}),
    "nuslerp": Usage(("one", "two"), None, {"weight": ((0.6, 0.2), (0.4, 0.9))}),
    "multislerp": Usage(_THREE, "base", {"weight": ((0.7, 0.1), (0.4, 0.8), (0.2, 0.3))}),
    "karcher": Usage(_THREE, None, {}, {"tol": (1e-5, 1e-9), "max_iter": (12, 12)}),
    "model_stock": Usage(_THREE, "base", {}, {"filter_wise": (False, True)}),
    "nearswap": Usage(("one",), "base", {}, {"t": (5e-4, 2e-3)}),
    "arcee_fusion": Usage(("strong",), "base"),
    "sce": Usage(_THREE, "base", {}, {"select_topk": (0.3, 0.9)}),
    "ram": Usage(_THREE, "base", {}, {"epsilon": (3e-4, 1e-3)}),
    "ramplus_tl": Usage(_THREE, "base", {}, {"r": (0.1, 0.4), "alpha": (0.2, 0.6), "epsilon": (3e-4, 1e-3)}),
    "task_arithmetic": _family((False, True)),
    "ties": _family((True, False), density=DENSITIES),
    # At density 1, as the tools draw other masks.
    "dare_linear": _family((False, True), (True, False), density=((1.0, 1.0),) * 3),
    "dare_ties": _family((False, True), (True, False), density=((1.0, 1.0),) * 3),
    "breadcrumbs": _family((False, True), (False, True), density=DENSITIES, gamma=_GAMMAS),
    "breadcrumbs_ties": _family((False, True), (False, True), density=DENSITIES, gamma=_GAMMAS),
    "della": _family((True, False), (True, False), density=((1.0, 1.0),) * 3),
    "della_linear": _family((False, True), (True, False), density=((1.0, 1.0),) * 3),
}

# --- the four forms ---------------------------------------------------------------------------------------------------


def forms(method: str, **each: tuple[Pair, ...]) -> dict[str, Recipe]:
    """One recipe for each of models, slices, gradient and filter; `each` are other values per model than the usual."""
    usage = replace(USAGES[method], each={**USAGES[method].each, **each})
    return {
        "models": _of_models(method, usage, lambda pair: pair[0]),
        "slices": _of_slices(method, usage),
        "gradient": _of_models(method, usage, list),
        "filter": _of_models(method, usage, _filters),
    }


def _filters(pair: Pair) -> list[Recipe]:
    # Everything after the list of `mlp` is never reached for it; `no.such` matches nothing.
    here, there = pair
    return [{"filter": "attn", "value": [there, here]}, {"filter": "mlp", "value": there},
            {"filter": "no.such", "value": there}, {"value": here}]  # fmt: skip


def _of_models(method: str, usage: Usage, value: Callable[[Pair], Any]) -> Recipe:
    entries = []
    for i, model in enumerate(usage.models):
        own = {name: value(pairs[i]) for name, pairs in usage.each.items()}
        entries.append({"model": model, **({"parameters": own} if own else {})})
    return _top(method, usage, {"models": entries}, {name: value(pair) for name, pair in usage.shared.items()})


def _of_slices(method: str, usage: Usage) -> Recipe:
    """A slice of one layer, and one of three with layers of a model that are elsewhere in it; as many as before, as
    mergekit cannot write Qwen2 with another number."""
    slices = []
    for number, (start, stop) in enumerate(((0, 1), (0, 3))):
        sources = []
        for i, model in enumerate(usage.models):
            own = {name: pairs[i][number] for name, pairs in usage.each.items()}
            shift = (i + 1) % 2 if number else 0
            sources.append({"model": model, "layer_range": [start + shift, stop + shift], "parameters": own})
        if usage.base is not None:
            sources.insert(min(1, len(sources)), {"model": usage.base, "layer_range": [start, stop]})
        shared = {name: list(pair) if number else pair[0] for name, pair in usage.shared.items()}
        slices.append({"sources": sources, "parameters": shared})
    return _top(method, usage, {"slices": slices}, {})


def _top(method: str, usage: Usage, body: Recipe, parameters: Recipe) -> Recipe:
    base = {} if usage.base is None else {"base_model": usage.base}
    return {"merge_method": method, **base, **body, **({"parameters": parameters} if parameters else {})}


# --- one by one -------------------------------------------------------------------------------------------------------


def _models(*entries: tuple[str, Recipe]) -> list[Recipe]:
    return [{"model": model, **({"parameters": given} if given else {})} for model, given in entries]


def _recipe(method: str, *entries: tuple[str, Recipe], base: str | None = None, **parameters: Any) -> Recipe:
    top = {} if base is None else {"base_model": base}
    renamed = {name.rstrip("_"): value for name, value in parameters.items()}
    return {"merge_method": method, **top, "models": _models(*entries),
            **({"parameters": renamed} if renamed else {})}  # fmt: skip


def _stack(method: str, *slices: list[Recipe], base: str | None = None, **parameters: Any) -> Recipe:
    top = {} if base is None else {"base_model": base}
    return {"merge_method": method, **top, "slices": [{"sources": sources} for sources in slices],
            **({"parameters": parameters} if parameters else {})}  # fmt: skip


def _source(model: str, start: int, stop: int, **parameters: Any) -> Recipe:
    return {"model": model, "layer_range": [start, stop], **({"parameters": parameters} if parameters else {})}


_T = [{"filter": "self_attn", "value": [0, 0.5, 0.3, 0.7, 1]}, {"filter": "mlp", "value": [1, 0.5, 0.7, 0.3, 0]},
      {"value": 0.5}]  # fmt: skip
_ZERO = [{"filter": "o_proj", "value": 0.0}, {"filter": "down_proj", "value": 0.0}, {"value": 1.0}]

# Of the shapes that people publish, each written anew.
PUBLISHED: dict[str, Recipe] = {
    "gradient slerp in slices": _stack(
        "slerp", [_source("one", 0, 4), _source("two", 0, 4)], base="one", t=_T
    ),
    "ties with gradients of density and weight, int8_mask": _recipe(
        "ties", ("one", {"density": [1, 0.7, 0.1], "weight": 1.0}),
        ("two", {"density": 0.5, "weight": [0, 0.3, 0.7, 1]}),
        ("three", {"density": 0.33, "weight": [{"filter": "mlp", "value": 0.5}, {"value": 0}]}),
        base="base", normalize=True, int8_mask=True,
    ),
    "stack of overlapping layers": _stack(
        "passthrough", [_source("one", 0, 3)], [_source("two", 1, 4)], [_source("one", 2, 4)]
    ),
    "blocks added that do nothing yet": _stack(
        "passthrough", [_source("one", 0, 2)], [_source("one", 1, 2, scale=_ZERO)], [_source("one", 2, 4)],
        [_source("one", 3, 4, scale=_ZERO)],
    ),
    "linear soup of three": _recipe("linear", ("one", {"weight": 1.0}), ("two", {"weight": 0.3}),
                                    ("three", {"weight": 0.5})),
    "dare_ties of two, density 1": _recipe(
        "dare_ties", ("base", {}), ("one", {"density": 1.0, "weight": 0.4}), ("two", {"density": 1.0, "weight": 0.3}),
        base="base", int8_mask=True,
    ),
    "model_stock, base listed": _recipe("model_stock", ("base", {}), ("one", {}), ("two", {}), base="base"),
    "task arithmetic by negation": _recipe("task_arithmetic", ("one", {"weight": 1.0}), ("three", {"weight": -0.5}),
                                           base="base"),
    "breadcrumbs_ties of two": _recipe(
        "breadcrumbs_ties", ("one", {"weight": 0.4, "density": 0.9, "gamma": 0.01}), ("two", {"weight": 0.3}),
        base="base", density=0.9, gamma=0.01, normalize=True,
    ),
    "linear, slices that end with more sources": _stack(
        "linear", [_source("one", 0, 2, weight=1.0)], [_source("two", 2, 4, weight=0.5),
                                                       _source("far", 2, 4, weight=0.5)],
    ),
}  # fmt: skip

# What is easily got wrong: values at the edge of their range, or beyond.
AWKWARD: dict[str, Recipe] = {
    "linear, base joins": _recipe("linear", ("one", {"weight": 0.7}), ("two", {}), base="base", weight=0.25),
    "linear, not normalised": _recipe("linear", ("one", {"weight": 0.7}), ("two", {"weight": -1.4}), normalize=False),
    "linear, weights of 0 and 1": _recipe("linear", ("one", {"weight": 0.0}), ("two", {"weight": 1.0})),
    "linear, weights all but cancel": _recipe("linear", ("one", {"weight": 1.0}), ("two", {"weight": -0.999})),
    "linear, very different models": _recipe("linear", ("one", {"weight": 1.0}), ("far", {"weight": 3.0})),
    "passthrough, no scale": _recipe("passthrough", ("one", {})),
    "passthrough, scale of 0 and below": _recipe("passthrough", ("one", {"scale": [0.0, -2.0]})),
    "slerp, t of 0 to 1": _recipe("slerp", ("one", {}), base="base", t=[0, 1]),
    "slerp, t beyond": _recipe("slerp", ("far", {}), base="base", t=[-0.5, 1.7]),
    "slerp, very different models": _recipe("slerp", ("far", {}), base="base", t=0.4),
    "slerp, the same model": _recipe("slerp", ("base", {}), ("three", {}), base="base", t=0.4),
    "nuslerp, deltas": _recipe("nuslerp", ("one", {"weight": 0.6}), ("two", {"weight": 0.4}), base="base"),
    "nuslerp, rows": _recipe("nuslerp", ("one", {"weight": 0.6}), ("far", {"weight": 0.4}), nuslerp_flatten=False),
    "nuslerp, columns": _recipe("nuslerp", ("one", {"weight": 0.6}), ("far", {"weight": 0.4}), nuslerp_flatten=False,
                                nuslerp_row_wise=True),
    "nuslerp, rows of deltas": _recipe("nuslerp", ("one", {"weight": 0.6}), ("two", {"weight": 0.4}), base="base",
                                       nuslerp_flatten=False),
    "nuslerp, frozen tensors": _recipe("nuslerp", ("one", {"weight": 1.0}), ("three", {"weight": 2.0}), base="base"),
    "nuslerp, weights that cancel": _recipe("nuslerp", ("one", {"weight": 0.5}), ("far", {"weight": -0.5})),
    "nuslerp, negative weight": _recipe("nuslerp", ("one", {"weight": 1.5}), ("far", {"weight": -0.5})),
    "multislerp, no base": _recipe("multislerp", ("one", {"weight": 0.6}), ("far", {"weight": 0.4})),
    "multislerp, not normalised": _recipe("multislerp", ("one", {"weight": 0.6}), ("two", {"weight": 0.9}),
                                          ("far", {"weight": 0.4}), normalize_weights=False),
    "multislerp, one model": _recipe("multislerp", ("one", {"weight": 0.6}), base="base"),
    "multislerp, large eps": _recipe("multislerp", ("one", {"weight": 0.6}), ("two", {"weight": 0.4}), base="base",
                                     eps=1e-3),
    "karcher, defaults": _recipe("karcher", ("one", {}), ("two", {})),
    "karcher, very different models": _recipe("karcher", ("one", {}), ("far", {}), max_iter=50, tol=1e-9),
    "karcher, one model": _recipe("karcher", ("one", {})),
    "karcher, base joins, one round": _recipe("karcher", ("one", {}), ("far", {}), base="base", max_iter=1),
    "model_stock, rows": _recipe("model_stock", ("one", {}), ("two", {}), base="base", filter_wise=True),
    "model_stock, very different models": _recipe("model_stock", ("one", {}), ("far", {}), base="base"),
    "nearswap, t of 0": _recipe("nearswap", ("one", {}), base="base", t=0.0),
    "nearswap, t below 0": _recipe("nearswap", ("one", {}), base="base", t=-1e-3),
    "nearswap, large t": _recipe("nearswap", ("far", {}), base="base", t=0.02),
    "arcee_fusion, very different models": _recipe("arcee_fusion", ("far", {}), base="base"),
    "arcee_fusion, small change": _recipe("arcee_fusion", ("one", {}), base="base"),
    "arcee_fusion, smaller change, frozen tensors": _recipe("arcee_fusion", ("three", {}), base="base"),
    "arcee_fusion, small change, sparse": _recipe("arcee_fusion", ("two", {}), base="base"),
    "sce, all": _recipe("sce", ("one", {}), ("two", {}), ("far", {}), base="base"),
    "sce, nothing selected": _recipe("sce", ("one", {}), ("two", {}), base="base", select_topk=0.0),
    "sce, very few": _recipe("sce", ("one", {}), ("far", {}), base="base", select_topk=0.001),
    "sce, small deltas": _recipe("sce", ("three", {}), ("two", {}), base="base", select_topk=1.0),
    "ram, default epsilon": _recipe("ram", ("one", {}), ("two", {}), ("three", {}), base="base"),
    "ram, one model": _recipe("ram", ("two", {}), base="base"),
    "ramplus_tl, defaults": _recipe("ramplus_tl", ("one", {}), ("two", {}), ("three", {}), base="base"),
    "ramplus_tl, nothing shared": _recipe("ramplus_tl", ("two", {}), base="base", r=3.0),
    "ramplus_tl, negative r": _recipe("ramplus_tl", ("one", {}), ("two", {}), base="base", r=-0.5, alpha=1.0,
                                      epsilon=5e-4),
    "task_arithmetic, weights that cancel": _recipe(
        "task_arithmetic", ("one", {"weight": 0.5}), ("two", {"weight": -0.5}), base="base", normalize=True,
    ),
    "task_arithmetic, density changes nothing": _recipe(
        "task_arithmetic", ("one", {"weight": 0.5, "density": 0.1}), ("two", {"weight": 0.3}), base="base",
        lambda_=-1.5,
    ),
    "ties, density 1": _recipe("ties", ("one", {"weight": 0.7}), ("two", {"weight": 0.4}), base="base"),
    "ties, density of 0 and beyond 1": _recipe(
        "ties", ("one", {"weight": 0.7, "density": 0.0}), ("two", {"weight": 0.4, "density": 1.5}), base="base",
    ),
    "ties, one element stays": _recipe("ties", ("one", {"weight": 0.7}), ("two", {"weight": 0.4}), base="base",
                                       density=1e-9),
    "ties, rescale": _recipe("ties", ("one", {"weight": 0.7, "density": 0.5}), ("two", {"weight": 0.4, "density": 0.3}),
                             base="base", rescale=True),
    "ties, opposite weights": _recipe("ties", ("one", {"weight": 0.7}), ("two", {"weight": -0.4}), base="base",
                                      density=0.6),
    "ties, base listed": _recipe("ties", ("base", {}), ("one", {"weight": 1.0, "density": 0.4}), base="base"),
    "task_arithmetic, weights that sum to next to nothing": _recipe(
        "task_arithmetic", ("one", {"weight": 0.1}), ("two", {"weight": 0.2}), ("strong", {"weight": -0.3}),
        base="base", normalize=True,
    ),
    "dare_ties, normalised": _recipe("dare_ties", ("one", {"weight": 0.7}), ("two", {"weight": 0.4}), base="base",
                                     normalize=True),
    "breadcrumbs, large gamma": _recipe("breadcrumbs", ("one", {"weight": 0.7}), ("two", {"weight": 0.4}),
                                        base="base", density=0.6, gamma=0.9),
    "breadcrumbs, no gamma": _recipe("breadcrumbs", ("one", {"weight": 0.7}), ("two", {"weight": 0.4}), base="base",
                                     density=0.2, gamma=0.0, rescale=True),
    "breadcrumbs, density 1": _recipe("breadcrumbs", ("one", {"weight": 0.7}), base="base", gamma=0.1),
    "breadcrumbs_ties, very sparse": _recipe("breadcrumbs_ties", ("one", {"weight": 0.7}), ("two", {"weight": 0.4}),
                                             base="base", density=0.01, gamma=0.05),
    "della, one model": _recipe("della", ("one", {"weight": 0.7}), base="base"),
}  # fmt: skip

# One model, its delta whole: which elements changed, and the sum of their magnitudes, say what the mask did.
CHANCE: dict[str, Recipe] = {
    f"{method}, density {density}{'' if rescale else ', no rescale'}": _recipe(
        method, ("one", {"weight": 1.0, "density": density}), base="base", rescale=rescale
    )
    for method in ("dare_linear", "dare_ties")
    for density, rescale in ((0.1, True), (0.5, True), (0.5, False), (0.9, True))
} | {
    f"{method}, density {density}, epsilon {epsilon}{'' if rescale else ', no rescale'}": _recipe(
        method, ("one", {"weight": 1.0, "density": density, "epsilon": epsilon}), base="base", rescale=rescale
    )
    for method in ("della", "della_linear")
    for density, epsilon, rescale in ((0.2, 0.15, True), (0.5, 0.4, True), (0.5, 0.1, False), (0.8, 0.15, True))
} | {
    "dare_linear, densities by filter": _recipe(
        "dare_linear", ("one", {"weight": 1.0, "density": [{"filter": "mlp", "value": [0.2, 0.8]}, {"value": 0.5}]}),
        base="base",
    ),
    "della, densities by gradient": _recipe("della", ("one", {"weight": 1.0, "density": [0.3, 0.7]}), base="base",
                                            epsilon=0.2),
}  # fmt: skip


# Several documents in one file, the last of which uses the others by name; for mergekit-multi there.
STAGED: dict[str, list[Recipe]] = {
    "slerp of a ties merge": [
        {"name": "both", **_recipe("ties", ("one", {"weight": 0.6, "density": 0.5}),
                                   ("two", {"weight": 0.5, "density": 0.7}), base="base")},
        _recipe("slerp", ("far", {}), base="both", t=[0.1, 0.6]),
    ],
    "stack of merges": [
        {"name": "soup", **_recipe("linear", ("one", {"weight": 0.5}), ("far", {"weight": 0.5}))},
        {"name": "sum", **_recipe("task_arithmetic", ("one", {"weight": 1.0}), ("three", {"weight": 2.0}),
                                  base="base")},
        _stack("passthrough", [_source("soup", 0, 3)], [_source("sum", 1, 4)]),
    ],
}  # fmt: skip


def placed(recipe: Recipe, folder: str, stages: Sequence[str] = (), **top: Any) -> Recipe:
    """The recipe with its models, unless they are names of `stages`, in `folder`, and `top` added."""

    def place(model: str) -> str:
        return model if model in stages else f"{folder}/{model}"

    content = {**copy.deepcopy(recipe), **top}
    parts = [content, *content.get("slices", [])]
    for source in [each for part in parts for each in (*part.get("models", []), *part.get("sources", []))]:
        source["model"] = place(source["model"])
    if "base_model" in content:
        content["base_model"] = place(content["base_model"])
    return content
