"""The recipes that are measured, in the YAML that mergekit and StreamMerge share."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Method:
    """One recipe over the checkpoints `base`, `a` and `b`, or some of them."""

    name: str
    models: tuple[str, ...]  # the list under `models:`
    base: str | None = None  # `base_model:`, one of the models or another
    model_parameters: str = ""  # flow-style YAML under each model
    parameters: str = ""  # the same, for the whole recipe
    num_passes: int = 1  # how often the inputs must be seen: the reductions before the result, and the result

    @property
    def inputs(self) -> tuple[str, ...]:
        """Every checkpoint that is read, once."""
        is_extra = self.base is not None and self.base not in self.models
        return (self.base, *self.models) if is_extra and self.base else self.models


_BREADCRUMBS = "{weight: 0.5, density: 0.5, gamma: 0.01}"
_DELLA = "{weight: 0.5, density: 0.5, epsilon: 0.1}"
_ALL = [
    Method("linear", ("a", "b"), model_parameters="{weight: 0.5}"),
    Method("task_arithmetic", ("a", "b"), base="base", model_parameters="{weight: 0.5}"),
    Method("slerp", ("a", "b"), base="a", parameters="{t: 0.4}", num_passes=2),
    Method("ties", ("a", "b"), base="base", model_parameters="{weight: 0.5, density: 0.5}", num_passes=2),
    # Two passes: the recipe language's DARE rescales by a sum over the whole tensor before and after its mask.
    Method("dare_ties", ("a", "b"), base="base", model_parameters="{weight: 0.5, density: 0.5}", num_passes=2),
    Method("dare_linear", ("a", "b"), base="base", model_parameters="{weight: 0.5, density: 0.5}", num_passes=2),
    Method("breadcrumbs", ("a", "b"), base="base", model_parameters=_BREADCRUMBS, num_passes=2),
    Method("breadcrumbs_ties", ("a", "b"), base="base", model_parameters=_BREADCRUMBS, num_passes=2),
    Method("della", ("a", "b"), base="base", model_parameters=_DELLA, num_passes=2),
    Method("della_linear", ("a", "b"), base="base", model_parameters=_DELLA, num_passes=2),
    Method("nuslerp", ("a", "b"), model_parameters="{weight: 0.5}", num_passes=2),
    Method("multislerp", ("a", "b"), base="base", model_parameters="{weight: 0.5}", num_passes=2),
    Method("karcher", ("a", "b"), num_passes=2),
    Method("model_stock", ("a", "b"), base="base", num_passes=2),
    Method("nearswap", ("a", "b"), base="a", parameters="{t: 0.001}"),
    Method("arcee_fusion", ("a", "b"), base="a", num_passes=3),
    Method("sce", ("a", "b"), base="base", parameters="{select_topk: 0.5}", num_passes=4),
    Method("ram", ("a", "b"), base="base"),
    Method("ramplus_tl", ("a", "b"), base="base", num_passes=2),
    Method("passthrough", ("a",)),
]
# mergekit knows these too; it lacks the ones below.
OURS_ALONE = [
    Method("hi_merging", ("a", "b"), base="base", model_parameters="{weight: 0.5, density: 0.5}", num_passes=2),
    Method("metagpt", ("a", "b"), base="base", num_passes=2),
    Method("localize_and_stitch", ("a", "b"), base="base", num_passes=4),
    Method("consensus", ("a", "b"), base="base", model_parameters="{weight: 0.5}"),
    Method("average", ("base", "a", "b")),
]
METHODS = {method.name: method for method in _ALL + OURS_ALONE}


def write_recipe(path: Path, method: Method, checkpoints: Mapping[str, Path]) -> Path:
    """Write the recipe of `method` over these checkpoints; returns `path`."""
    lines = [f"merge_method: {method.name}"]
    if method.base is not None:
        lines.append(f"base_model: {_quote(checkpoints[method.base])}")
    lines.append("models:")
    for model in method.models:
        lines.append(f"  - model: {_quote(checkpoints[model])}")
        if method.model_parameters:
            lines.append(f"    parameters: {method.model_parameters}")
    if method.parameters:
        lines.append(f"parameters: {method.parameters}")
    lines.append("dtype: bfloat16")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    return path


def _quote(path: Path) -> str:
    return json.dumps(str(path))  # a JSON string is a YAML string
