"""Every method of the list gives what its mathematics says: any shape, any dtype, any parameter.

Reads like the contract of design.md section 8.1. A method added to FORMS is tried here without an edit; it needs
its oracle in oracles.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from streammerge.kernels.contract import Method
from tests.methods.cases import (
    DTYPES,
    FORMS,
    NAMES,
    ROWS,
    SHAPES,
    Case,
    make,
    make_case,
    merge,
    model_count,
    profiles,
    sees_rows,
)
from tests.methods.closeness import assert_equals_oracle
from tests.methods.oracles import ORACLES, Given, oracle

every_method = pytest.mark.parametrize("name", FORMS)

# Base, then models; what the recipe says; what comes out.
DTYPE_CASES = [
    pytest.param(("F32",), {}, "F32", id="float32"),
    pytest.param(("F16",), {}, "F16", id="float16"),
    pytest.param(("BF16",), {}, "BF16", id="bfloat16"),
    pytest.param(("F64",), {}, "F64", id="float64"),
    pytest.param(("BF16", "F32"), {}, "F32", id="bfloat16 base, float32 models"),
    pytest.param(("F16", "BF16"), {}, "F32", id="float16 with bfloat16"),
    pytest.param(("F32", "F64"), {}, "F64", id="float32 base, float64 models"),
    pytest.param(("F32",), {"dtype": "bfloat16"}, "BF16", id="float32 to bfloat16"),
    pytest.param(("BF16",), {"dtype": "float32", "out_dtype": "float16"}, "F16", id="bfloat16 to float16"),
    pytest.param(("BF16",), {"out_dtype": "float64"}, "F64", id="bfloat16 to float64"),
    pytest.param(("F64", "BF16"), {"out_dtype": "bfloat16"}, "BF16", id="float64 base to bfloat16"),
]


def cases_for(method: Method, dtypes: tuple[str, ...], *, models: int = 2) -> list[Case]:
    """The usual parameters at every shape, and every profile at two."""
    types = [DTYPES[dtype] for dtype in dtypes]
    tried = [("usual", label, shape) for label, shape in SHAPES.items()]
    few = {label: SHAPES[label] for label in ("sixty-three", "block and one")}
    tried += [(profile, label, shape) for profile, parameters in profiles(method).items() if profile != "usual"
              for label, shape in (ROWS if sees_rows(method, parameters) else few).items()]  # fmt: skip
    return [
        make_case(method, f"{profile} {label}", shape, seed=number, models=models, dtypes=types,
                  **profiles(method)[profile])
        for number, (profile, label, shape) in enumerate(tried)
    ]  # fmt: skip


@every_method
def test_a_method_has_an_oracle(name: str) -> None:
    name = FORMS[name].name
    assert name in ORACLES, f"write the mathematics of {name} in tests/methods/oracles.py"


def test_a_missing_oracle_is_said_in_words() -> None:
    with pytest.raises(LookupError, match="write its mathematics as a function"):
        oracle("new_method", Given("w", None, [], {}, {}))


@every_method
@pytest.mark.parametrize(("dtypes", "top", "out"), DTYPE_CASES)
def test_a_merge_equals_the_oracle(tmp_path: Path, name: str, dtypes: tuple[str, ...], top: dict[str, str],
                                   out: str) -> None:  # fmt: skip
    method = FORMS[name]
    if method.base == "ignored":
        # Its first model stands where others have the base.
        dtypes = (dtypes[0], *dtypes)
    cases = cases_for(method, dtypes)
    if len(cases[0].inputs) == 1 and not top:
        out = dtypes[0]
    merged = assert_equals_oracle(tmp_path, method, cases, **top)
    assert {NAMES[tensor.dtype] for tensor in merged.values()} == {out}


@pytest.mark.parametrize(
    ("name", "models"),
    [(name, n) for name, method in FORMS.items() for n in (1, 3, 4) if model_count(method, n) == n],
)
def test_any_number_of_models_equals_the_oracle(tmp_path: Path, name: str, models: int) -> None:
    method = FORMS[name]
    assert_equals_oracle(tmp_path, method, cases_for(method, ("BF16",), models=models))


@pytest.mark.parametrize("name", [name for name, method in FORMS.items() if method.min_models == 0])
def test_a_base_alone_stays_as_it_is_in_another_dtype(tmp_path: Path, name: str) -> None:
    method = FORMS[name]
    case = make_case(method, "base alone", (65537,), seed=1, models=0)
    made = make(tmp_path, method, [case], out_dtype="float32")
    _, merged = merge(made, tmp_path / "out")
    (tensor,) = merged.values()
    assert torch.equal(tensor, case.inputs[0].float())
