"""Cases for merges: many in one checkpoint, each a tensor of its own with parameters of its own.

A recipe can give every tensor its parameters through filters, so one merge of a small checkpoint tries dozens of
settings, shapes and values at once. A method that is new in the list is tried with what its parameters say about
themselves: defaults, booleans both ways, and the numbers below for the names that are known.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

import streammerge
from streammerge.kernels.contract import Method, Param, Settings, Value
from streammerge.methods import METHODS
from streammerge.run.merge import Report
from tests.methods.oracles import Given
from tests.models import save_model

# Every method; one whose base is optional with and without it.
FORMS: dict[str, Method] = {
    label: form
    for name, method in METHODS.items()
    for label, form in (
        {name: replace(method, base="ignored"), f"{name} with base": replace(method, base="required")}
        if method.base == "optional"
        else {name: method}
    ).items()
}

# Values that are nobody's default; a tuple has one per model. Four digits each: 1.3 times a float16 often lies exactly
# between two float16, and there the last bit of a float32 decides the rounding.
USUAL: dict[str, Value | tuple[Value, ...]] = {
    "weight": (0.7129, 0.4507, 0.3011, 0.2513),
    "density": (0.3, 0.55, 0.8, 0.1),
    "scale": (1.2693, 0.8371, 1.1309, 0.6607, 0.9409, 1.0513, 0.7717, 1.1117),
    "lambda": 1.4983,
    "t": 0.3019,
    "mask_lambda": (0.4127, 0.6301, 0.2903, 0.5209),
    "decay": 0.3517,
    "r": 0.2917,
    "alpha": 0.6113,
    "select_topk": 0.4337,
    "equal_below": 1e-9,
    "lines_alpha": 0.9137,
}
# What goes for parameters per model only.
_USUAL_PER_MODEL: dict[str, tuple[Value, ...]] = {
    "gamma": (0.0371, 0.25, 0.0113, 0.5),
    "epsilon": (0.1107, 0.2513, 0.15, 0.0709),
}
# What only one method means by a name.
_OWN: dict[str, dict[str, Value]] = {
    "ram": {"epsilon": 1.0307e-3},
    "ramplus_tl": {"epsilon": 1.0307e-3},
    "nearswap": {"t": 7.1303e-4},
}
# For a required number that is not known.
_ANY_NUMBER = 0.4

# Around every edge of a block, and what is not a vector.
SHAPES: dict[str, tuple[int, ...]] = {
    "empty": (0,),
    "scalar": (),
    "one": (1,),
    "sixty-three": (63,),
    "cube": (3, 5, 7),
    "rows": (70, 999),
    "wide rows": (3, 65541),
    "column": (77, 1),
    "block": (65536,),
    "block and one": (65537,),
    "blocks": (2, 131, 1021),
}

# For what sees rows: one column, odd widths, several units, rows wider than a block, more dimensions, a vector.
ROWS: dict[str, tuple[int, ...]] = {
    "column": (300, 1),
    "narrow": (43, 7),
    "units": (131, 1021),
    "wide": (7, 65_539),
    "cube": (3, 5, 7),
    "sixty-three": (63,),
}

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Case:
    """A tensor to merge: what it tries, its inputs, and the parameters that are not defaults."""

    label: str
    base: Tensor | None
    models: tuple[Tensor, ...]
    parameters: Mapping[str, Value | tuple[Value, ...]] = field(default_factory=dict)

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        return self.models if self.base is None else (self.base, *self.models)


def model_count(method: Method, wished: int = 2) -> int:
    """So many models, or as near to it as the method takes."""
    return max(method.min_models, min(wished, method.max_models or wished))


def make_case(method: Method, label: str, shape: Sequence[int], *, seed: int, models: int = 2,
              dtypes: Sequence[torch.dtype] = (torch.bfloat16,), **parameters: Any) -> Case:  # fmt: skip
    """A case with random values: models near a base. `dtypes` are those of base and models, the last one repeated."""
    generator = torch.Generator().manual_seed(seed)
    count = model_count(method, models)
    types = [*dtypes, *[dtypes[-1]] * count][: count + 1]
    base = torch.randn(tuple(shape), generator=generator, dtype=torch.float64) * 0.02
    near = [base + torch.randn(tuple(shape), generator=generator, dtype=torch.float64) * 1e-3 for _ in range(count)]
    return Case(
        label,
        base.to(types[0]) if method.base == "required" else None,
        tuple(model.to(dtype) for model, dtype in zip(near, types[1:], strict=True)),
        parameters,
    )


def usual(method: Method) -> dict[str, Value | tuple[Value, ...]]:
    """A value for every parameter that has one in USUAL."""
    pairs = [(param, {**USUAL, **_USUAL_PER_MODEL} if param.per_model else USUAL) for param in method.params]
    known = {param.name: values[param.name] for param, values in pairs if param.name in values}
    return known | _OWN.get(method.name, {})


def profiles(method: Method) -> dict[str, dict[str, Any]]:
    """Parameters to try: all defaults, all usual ones, and those with each boolean the other way, or all of them, and
    each other text."""
    flips = {param.name: not param.default for param in method.params if param.kind == "boolean"}
    changes: dict[str, dict[str, Any]] = {f"{name} {value}": {name: value} for name, value in flips.items()}
    if len(flips) > 1:
        changes["all flags"] = flips
    for param in method.params:
        if param.name.endswith("_scope"):
            # Only one of them is judged here: see _unless_given.
            continue
        others = [choice for choice in param.choices if choice != param.default]
        changes |= {f"{param.name} {choice}": {param.name: choice} for choice in others}
    return {"defaults": {}, "usual": usual(method)} | {
        label: {**usual(method), **change} for label, change in changes.items()
    }


def sees_rows(method: Method, parameters: Mapping[str, Any]) -> bool:
    """Whether a matrix with these parameters is merged by rows."""
    case = make_case(method, "any", (1, 1), seed=0, **parameters)
    return method.by_rows(settings_of(method, case))


def takes(method: Method, *parameters: str) -> bool:
    """Whether the method has all these parameters."""
    return set(parameters) <= {param.name for param in method.params}


def fits(method: Method, parameters: Mapping[str, Any]) -> bool:
    """Whether the method has all these parameters, and those with a value per model are per model."""
    per_model = {param.name for param in method.params if param.per_model}
    return takes(method, *parameters) and all(
        name in per_model for name, value in parameters.items() if isinstance(value, tuple)
    )


def settings_of(method: Method, case: Case) -> Settings:
    """Every parameter of a case: given, default, or for a required one some value."""
    shared: dict[str, Value | None] = {}
    each: dict[str, tuple[Value | None, ...]] = {}
    for param in method.params:
        value = case.parameters.get(param.name, _unless_given(param))
        if not param.vectors and case.inputs[0].dim() < 2:
            value = param.default
        if param.per_model:
            count = len(case.models)
            each[param.name] = value[:count] if isinstance(value, tuple) else (value,) * count
        else:
            assert not isinstance(value, tuple), f"{param.name} is not per model"
            shared[param.name] = value
    return Settings(shared, each)


def _unless_given(param: Param) -> Value | tuple[Value, ...] | None:
    if param.name.endswith("_scope"):
        # A tensor is judged for itself here; tests/run/test_survey.py has the others.
        return "tensor"
    if param.default is not None or param.optional:
        return param.default
    return USUAL.get(param.name, False if param.kind == "boolean" else _ANY_NUMBER)


def given_of(method: Method, name: str, case: Case, *, out_dtype: str, seed: int = 0) -> Given:
    """A case as its oracle takes it."""
    settings = settings_of(method, case)
    wide = out_dtype == "F64" or any(tensor.dtype == torch.float64 for tensor in case.inputs)
    return Given(
        name,
        None if case.base is None else flat(case.base),
        [flat(model) for model in case.models],
        settings.shared,
        settings.models,
        np.float64 if wide else np.float32,
        seed,
        tuple(case.inputs[0].shape),
    )


def flat(tensor: Tensor) -> np.ndarray:
    """A tensor's values as a flat float64 array."""
    return tensor.to(torch.float64).reshape(-1).numpy()


@dataclass(frozen=True)
class Made:
    """Checkpoints and a recipe on disk, and the case of every tensor name."""

    method: Method
    recipe: Path
    cases: dict[str, Case]


def make(folder: Path, method: Method, cases: Sequence[Case], **top: Any) -> Made:
    """Write checkpoints that hold the cases, one tensor each, and the recipe that merges them; `top` are keys of it."""
    # Names of one width: none is a part of another, so each is the filter of its own parameters.
    named = {f"case-{number:03d}.{case.label.replace(' ', '-')}": case for number, case in enumerate(cases)}
    counts = {len(case.models) for case in cases}
    assert len(counts) == 1, "all cases of a recipe have as many models"
    (count,) = counts
    paths = [
        save_model(folder / f"m{i}", {name: case.models[i].contiguous() for name, case in named.items()})
        for i in range(count)
    ]
    recipe: dict[str, Any] = {"merge_method": method.name, **top}
    if cases[0].base is not None:
        base = save_model(folder / "base", {name: case.inputs[0].contiguous() for name, case in named.items()})
        recipe["base_model"] = str(base)
        # A method that takes no other model than its base still wants one listed.
        paths = paths or [base]
    settings = {name: settings_of(method, case) for name, case in named.items()}
    shared: dict[str, list[dict[str, Any]]] = {}
    each: list[dict[str, list[dict[str, Any]]]] = [{} for _ in paths]
    for name, setting in settings.items():
        for parameter, value in setting.shared.items():
            if value is not None:
                shared.setdefault(parameter, []).append({"filter": name, "value": value})
        for parameter, values in setting.models.items():
            for i, value in enumerate(values):
                if value is not None:
                    each[i].setdefault(parameter, []).append({"filter": name, "value": value})
    recipe["models"] = [
        {"model": str(path), "parameters": parameters} for path, parameters in zip(paths, each, strict=True)
    ]
    recipe["parameters"] = shared
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return Made(method, path, named)


def merge(made: Made, out: Path, **options: Any) -> tuple[Report, dict[str, Tensor]]:
    """Merge, eagerly unless told otherwise, and read the output."""
    report = streammerge.merge(made.recipe, out, **{"compile": "off", "threads": 1, **options})
    return report, read(out)


def read(out: Path) -> dict[str, Tensor]:
    """Every tensor of a finished output, by the library's reader."""
    tensors: dict[str, Tensor] = {}
    for file in sorted(out.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def bits(tensor: Tensor) -> Tensor:
    """A tensor's bytes."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)
