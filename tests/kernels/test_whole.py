"""A tensor merged in memory in one go has the bits that a merge of files writes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from streammerge.kernels.chance import stream_key
from streammerge.kernels.compiled import Run, Signature, eager
from streammerge.kernels.contract import BLOCK, Method, Program
from streammerge.kernels.whole import merge_whole, pad
from tests.methods.cases import FORMS, ROWS, Case, bits, make, make_case, merge, profiles, sees_rows, settings_of
from tests.methods.test_edges import spoiled

every_method = pytest.mark.parametrize("name", FORMS)

SHAPES: dict[str, tuple[int, ...]] = {
    "nothing": (0,),
    "scalar": (),
    "one": (1,),
    "sixty-three": (63,),
    "sixty-five": (65,),
    "half a block": (32768,),
    "half a block and one": (32769,),
    "block": (65536,),
    "block and one": (65537,),
    "blocks": (200, 1000),
    "cube": (3, 50, 701),
    "wide rows": (3, 65541),
    "column": (77, 1),
}
_SEED = 11


def in_memory(tensor: Tensor) -> Tensor:
    """A tensor in the buffer that `merge_whole` wants."""
    flat = tensor.reshape(-1)
    buffer = torch.zeros(pad(len(flat)), dtype=flat.dtype)
    buffer.view(-1)[: len(flat)] = flat
    return buffer


def no_programs(program: Program, signature: Signature) -> Run | None:
    return None


def whole(method: Method, name: str, case: Case, out: torch.dtype,
          find: Callable[[Program, Signature], Run | None] = no_programs) -> Tensor:  # fmt: skip
    """A case as `merge_whole` merges it under a tensor name to the dtype `out`."""
    return merge_whole(
        method, settings_of(method, case), [in_memory(tensor) for tensor in case.inputs], case.inputs[0].shape,
        has_base=case.base is not None, work=torch.float64 if out == torch.float64 else torch.float32, out=out,
        stream_keys=[stream_key(_SEED, name, i) for i in range(len(case.models))], find=find,
    )  # fmt: skip


def cases_of(method: Method) -> list[Case]:
    usual = profiles(method)["usual"]
    cases = [
        make_case(method, f"{dtype} {label}".replace("torch.", ""), shape, seed=i, dtypes=(dtype,), **usual)
        for dtype in (torch.bfloat16, torch.float32)
        for i, (label, shape) in enumerate(SHAPES.items())
    ]
    cases += [
        make_case(method, label, (70_000,), seed=40 + i, **parameters)
        for i, (label, parameters) in enumerate(profiles(method).items())
    ]
    cases.append(make_case(method, "mixed", (70_000,), seed=50, dtypes=(torch.float32, torch.bfloat16), **usual))
    cases += [
        make_case(method, f"{profile} {label}", shape, seed=70 + i, **parameters)
        for profile, parameters in profiles(method).items()
        if sees_rows(method, parameters)
        for i, (label, shape) in enumerate(ROWS.items())
    ]
    # More blocks than are merged at once.
    cases.append(make_case(method, "long", (5, BLOCK + 7), seed=51, **usual))
    return [*cases, spoiled(make_case(method, "spoiled", (70_000,), seed=60, **usual))]


@every_method
def test_in_memory_a_merge_has_the_bits_of_one_of_files(tmp_path: Path, name: str) -> None:
    method = FORMS[name]
    made = make(tmp_path, method, cases_of(method))
    _, written = merge(made, tmp_path / "out", seed=_SEED)
    assert len(written) == len(made.cases) > 2 * len(SHAPES)
    for tensor, case in made.cases.items():
        merged = whole(method, tensor, case, written[tensor].dtype)
        assert merged.shape == (written[tensor].numel(),)
        assert merged.dtype == written[tensor].dtype
        assert torch.equal(bits(merged), bits(written[tensor])), case.label


@every_method
def test_in_float64_too(tmp_path: Path, name: str) -> None:
    method = FORMS[name]
    usual = profiles(method)["usual"]
    cases = [make_case(method, label, SHAPES[label], seed=i, dtypes=(torch.float64,), **usual)
             for i, label in enumerate(["sixty-five", "blocks"])]  # fmt: skip
    made = make(tmp_path, method, cases)
    _, written = merge(made, tmp_path / "out", seed=_SEED)
    for tensor, case in made.cases.items():
        assert torch.equal(bits(whole(method, tensor, case, torch.float64)), bits(written[tensor])), case.label


@every_method
def test_the_inputs_stay_as_they_were(name: str) -> None:
    method = FORMS[name]
    case = make_case(method, "blocks", SHAPES["blocks"], seed=1, **profiles(method)["usual"])
    before = [tensor.clone() for tensor in case.inputs]
    whole(method, "tensor", case, torch.bfloat16)
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(before, case.inputs, strict=True))


@every_method
def test_a_program_that_is_found_runs_on_more_blocks_at_once_and_changes_no_bit(name: str) -> None:
    method = FORMS[name]
    case = make_case(method, "long", (33 * BLOCK + 7,), seed=2, models=1, **profiles(method)["usual"])
    asked: list[Signature] = []
    pieces: list[int] = []

    def find(program: Program, signature: Signature) -> Run:
        asked.append(signature)
        run = eager(program, signature)

        def counting(inputs: Sequence[Tensor], *rest: object) -> Tensor:
            pieces.append(len(inputs[0]))
            return run(inputs, *rest)  # type: ignore[arg-type]

        return counting  # type: ignore[return-value]

    found = whole(method, "tensor", case, torch.bfloat16, find)
    if method.by_rows(settings_of(method, case)):
        assert not asked
        return
    assert torch.equal(bits(found), bits(whole(method, "tensor", case, torch.bfloat16)))
    assert asked[-1].out == torch.bfloat16
    assert max(pieces) == 8


@pytest.mark.parametrize("elements", [0, 1, 63, 64, 65, 32768, 32769, 65536, 65537, 200_000])
def test_the_buffer_of_a_tensor_is_whole_blocks_or_one_row_of_a_power_of_two(elements: int) -> None:
    rows, width = pad(elements)
    assert rows * width >= elements
    if elements > BLOCK // 2:
        assert width == BLOCK
        assert (rows - 1) * width < elements
    else:
        assert rows == 1
        assert width == max(64, 1 << max(0, elements - 1).bit_length())
