"""Compiled programs give the bits of eager ones: every look, every argument measured from it, every merged element.

The packages are kept in the user's cache, where merges keep theirs, so only the first run after a change of the
kernels waits for the compiler (some ten seconds a program). In bfloat16, with sparse deltas, every time; every dtype
and every parameter in scripts/nightly.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from streammerge.kernels.chance import block_keys, stream_key
from streammerge.kernels.compiled import Cache, Run, Signature, compiler_missing, default_cache, eager
from streammerge.kernels.contract import BLOCK, Method, Problem, Program, Settings
from tests.kernels.looking import Memory, block_starts, in_blocks
from tests.methods.cases import DTYPES, FORMS, bits, make, make_case, merge, profiles, sees_rows, settings_of

# Programs by rows run eagerly, or are tested below.
COMPILED = [name for name, method in FORMS.items() if not sees_rows(method, profiles(method)["usual"])]
every_method = pytest.mark.parametrize("name", COMPILED)

# Elements that are looked at with every program a method has.
_MANY = 1 << 40
_BLOCKS = 5
_ODD_VALUES = [0.0, -0.0, 1e-40, -1e-40, 6e-8, 1.0, -1.0, 3e38, -3e38]
_NOT_FINITE = [float("nan"), float("inf"), float("-inf")]


@dataclass(frozen=True)
class Work:
    """What a method has to do: its parameters, the stored dtypes of its inputs (base first) and of the result."""

    method: Method
    settings: Settings
    dtypes: tuple[torch.dtype, ...]
    out: torch.dtype

    @property
    def has_base(self) -> bool:
        return self.method.base == "required"

    @property
    def signature(self) -> Signature:
        work = torch.float64 if torch.float64 in (*self.dtypes, self.out) else torch.float32
        return Signature(work, self.dtypes, self.has_base, None)

    @property
    def programs(self) -> list[tuple[Program, Signature]]:
        looks = [(program, self.signature) for program in self.method.looks(self.settings, False, _MANY)]
        return [*looks, (self.method.program(self.settings), self.signature._replace(out=self.out))]


def work_for(method: Method, profile: dict[str, Any], dtypes: Sequence[str] = ("BF16",), out: str = "BF16") -> Work:
    case = make_case(method, "any", (1,), seed=0, dtypes=[DTYPES[dtype] for dtype in dtypes], **profile)
    return Work(method, settings_of(method, case), tuple(tensor.dtype for tensor in case.inputs), DTYPES[out])


def compiled(work: Sequence[Work]) -> Cache:
    """The cache, with every program of `work` in it. Skips, or fails, when that cannot be."""
    if (reason := compiler_missing()) is not None:
        pytest.skip(f"NOTHING COMPILED IS TESTED HERE: {reason}")
    cache = default_cache()
    wanted = dict.fromkeys(pair for each in work for pair in each.programs)
    # One child process compiles them all; the other workers of a parallel run wait for it.
    with (Path(tempfile.gettempdir()) / f"streammerge-tests-{os.getuid()}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        failure = cache.build(list(wanted))
    assert failure is None, f"compiling failed: {failure}"
    return cache


def values(dtype: torch.dtype, seed: int, odd: Sequence[float]) -> Tensor:
    """Random blocks, one value in fifty out of `odd`; the last block half empty, as a tensor's is."""
    generator = torch.Generator().manual_seed(seed)
    elements = _BLOCKS * BLOCK - BLOCK // 2
    found = torch.randn(elements, generator=generator, dtype=torch.float64) * 0.02
    where = torch.rand(elements, generator=generator) < 0.02
    choice = torch.randint(0, len(odd), (int(where.sum()),), generator=generator)
    found[where] = torch.tensor(odd, dtype=torch.float64)[choice]
    return in_blocks(found.to(dtype))


def assert_same_bits(cache: Cache, work: Work, odd: Sequence[float], *, any_nan: bool = False) -> None:
    """Run everything twice, and compare looks, arguments and results."""
    inputs = [values(dtype, i, odd) for i, dtype in enumerate(work.dtypes)]

    def find(program: Program, signature: Signature) -> Run:
        run = cache.load(program, signature, 1)
        # Looks that are not worth compiling are eager in a merge, too.
        assert run is not None or (program, signature) not in work.programs
        return run or eager(program, signature)

    plain, fast = (
        Memory(inputs, work.has_base, work.signature.work,
               [stream_key(0, "w", i) for i in range(work.signature.models)], runner)
        for runner in (eager, find)
    )  # fmt: skip
    problem = Problem(_BLOCKS * BLOCK - BLOCK // 2, work.signature.models, work.settings, work.signature.work)
    expected, found = (memory.solve(work.method.measure(problem)) for memory in (plain, fast))
    for one, other in zip(plain.answers, fast.answers, strict=True):
        if isinstance(one, Tensor):
            assert same_bits(one, other, any_nan=True), "a look"
    assert list(found) == list(expected)
    for name, argument in expected.items():
        assert same_bits(found[name], argument, any_nan=True), name

    program, signature = work.programs[-1]
    starts, keys = block_starts(0, _BLOCKS), block_keys(plain.stream_keys, 0, _BLOCKS)
    slow_out = torch.zeros(_BLOCKS, BLOCK, dtype=work.out)
    slow_probe = eager(program, signature)(inputs, slow_out, starts, keys, expected)
    # A piece is one block or several; what a block gives must not depend on it.
    for piece in (slice(0, _BLOCKS), slice(2, 3), slice(1, 4), slice(4, 5)):
        out = torch.zeros(_BLOCKS, BLOCK, dtype=work.out)
        run = find(program, signature)
        probe = run([x[piece] for x in inputs], out[piece], starts[piece], keys[piece], expected)
        assert torch.equal(probe == 0, slow_probe[piece] == 0)
        assert same_bits(out[piece], slow_out[piece], any_nan=any_nan), f"blocks {piece.start} to {piece.stop}"


def same_bits(one: Tensor, other: Tensor, *, any_nan: bool) -> bool:
    """Whether two tensors are equal to the bit; with `any_nan` a NaN is like every other.

    Which of them comes of two is a matter of the order of two operands, and compilers choose that.
    """
    if any_nan and one.is_floating_point():
        if not torch.equal(torch.isnan(one), torch.isnan(other)):
            return False
        one, other = (torch.where(torch.isnan(x), 0.0, x) for x in (one, other))
    return torch.equal(bits(one), bits(other))


# --- in the suite ----------------------------------------------------------------------------------------------------


def suite_work(name: str) -> Work:
    """Two models in bfloat16; sparse, so that every kind of program is among them."""
    return work_for(FORMS[name], profiles(FORMS[name])["usual"])


@pytest.fixture(scope="session")
def suite_cache() -> Cache:
    return compiled([suite_work(name) for name in COMPILED])


@every_method
def test_compiled_programs_give_the_bits_of_eager_ones(name: str, suite_cache: Cache) -> None:
    assert_same_bits(suite_cache, suite_work(name), _ODD_VALUES)


@every_method
def test_compiled_programs_see_nan_and_infinity_as_eager_ones_do(name: str, suite_cache: Cache) -> None:
    assert_same_bits(suite_cache, suite_work(name), _ODD_VALUES + _NOT_FINITE)


@every_method
def test_a_compiled_merge_writes_the_file_of_an_eager_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, suite_cache: Cache
) -> None:
    method = FORMS[name]
    assert suite_cache.directory == default_cache().directory
    made = make(tmp_path, method, [make_case(method, "usual", (200_000,), seed=1, **profiles(method)["usual"])])
    loaded = []
    load = Cache.load

    def spy(cache: Cache, program: Program, signature: Signature, threads: int) -> Run | None:
        run = load(cache, program, signature, threads)
        loaded.append((program, signature, run is not None))
        return run

    monkeypatch.setattr(Cache, "load", spy)
    notes: list[str] = []
    merge(made, tmp_path / "compiled", compile="on", threads=2, note=notes.append)
    assert notes == []
    used = {(program, signature) for program, signature, found in loaded if found}
    assert used == set(suite_work(name).programs)
    merge(made, tmp_path / "eager")
    file = "model.safetensors"
    assert (tmp_path / "compiled" / file).read_bytes() == (tmp_path / "eager" / file).read_bytes()


def assert_same_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, dtype: torch.dtype, shapes: Sequence[tuple[int, ...]]
) -> None:
    """Merge tensors of these shapes compiled and eagerly; programs must have been found."""
    method = FORMS[name]
    cases = [
        make_case(method, str(shape), shape, seed=i, dtypes=(dtype,), **profiles(method)["usual"])
        for i, shape in enumerate(shapes)
    ]
    made = make(tmp_path, method, cases)
    loaded = []
    load = Cache.load

    def spy(cache: Cache, program: Program, signature: Signature, threads: int) -> Run | None:
        run = load(cache, program, signature, threads)
        loaded.append(run is not None)
        return run

    monkeypatch.setattr(Cache, "load", spy)
    merge(made, tmp_path / "compiled", compile="on", threads=2)
    assert any(loaded)
    merge(made, tmp_path / "eager")
    file = "model.safetensors"
    assert (tmp_path / "compiled" / file).read_bytes() == (tmp_path / "eager" / file).read_bytes()


BY_ROWS = [name for name, method in FORMS.items() if method.program(suite_work(name).settings).orders is not None]
BY_WIDTH = [name for name, method in FORMS.items() if method.program(suite_work(name).settings).by_width]


@pytest.mark.parametrize("name", BY_ROWS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_programs_that_see_rows_beforehand_write_the_file_of_eager_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, dtype: torch.dtype
) -> None:
    """Rows that fill blocks, rows that do not, one row longer than a block, and a vector."""
    assert_same_file(tmp_path, monkeypatch, name, dtype, [(64, 2048), (300, 700), (3, 70_000), (5,), (1,)])


@pytest.mark.parametrize("name", BY_WIDTH)
def test_programs_of_a_width_write_the_file_of_eager_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Several full units and one that is not, one that is full, a vector, and a row longer than a block."""
    shapes = [(600, 700), (93, 700), (700,), (2, 70_000)]
    assert_same_file(tmp_path, monkeypatch, name, torch.bfloat16, shapes)


@pytest.mark.nightly
@pytest.mark.parametrize("name", BY_WIDTH)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_programs_of_any_width_and_dtype_write_the_file_of_eager_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, dtype: torch.dtype
) -> None:
    assert_same_file(tmp_path, monkeypatch, name, dtype, [(100, 2048), (40, 5632), (70_000, 1), (3, 65_536)])


# --- every night -----------------------------------------------------------------------------------------------------

DTYPE_CASES = [
    pytest.param(("BF16",), "BF16", id="bfloat16"),
    pytest.param(("F32",), "F32", id="float32"),
    pytest.param(("F16",), "F16", id="float16"),
    pytest.param(("F64",), "F64", id="float64"),
    pytest.param(("BF16", "F32"), "F32", id="bfloat16 base, float32 models"),
    pytest.param(("F32",), "BF16", id="float32 to bfloat16"),
    pytest.param(("F64",), "BF16", id="float64 to bfloat16"),
]


def night_work(name: str, dtypes: Sequence[str], out: str) -> list[Work]:
    """Every profile of a method, and one whose weights are negative, which turns the signs of zeros."""
    method = FORMS[name]
    tried = list(profiles(method).values())
    usual = profiles(method)["usual"]
    negative = {"weight": (-0.7129, -0.4507), "scale": (-1.2717,)}
    tried.append(usual | {key: value for key, value in negative.items() if key in usual})
    work = [work_for(method, profile, dtypes, out) for profile in tried]
    return [each for each in work if not method.by_rows(each.settings)]


@pytest.fixture(scope="session")
def night_cache() -> Cache:
    return compiled([work for name in FORMS for case in DTYPE_CASES for work in night_work(name, *case.values)])


@pytest.mark.nightly
@every_method
@pytest.mark.parametrize(("dtypes", "out"), DTYPE_CASES)
def test_compiled_programs_of_every_dtype_give_the_bits_of_eager_ones(
    name: str, dtypes: Sequence[str], out: str, night_cache: Cache
) -> None:
    for work in night_work(name, dtypes, out):
        assert_same_bits(night_cache, work, _ODD_VALUES)
        assert_same_bits(night_cache, work, _ODD_VALUES + _NOT_FINITE, any_nan=True)
