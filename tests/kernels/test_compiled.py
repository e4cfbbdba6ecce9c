"""The cache of compiled programs: what names a package, and what happens when one cannot be made or read.

That compiled programs give the right bits is tested in tests/methods/test_compiled_bits.py.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from streammerge.kernels import compiled
from streammerge.kernels.compiled import Cache, Signature, compiler_missing, default_cache
from streammerge.kernels.contract import BLOCK, Arguments, Program, Tile
from streammerge.kernels.cut import MAGNITUDES
from streammerge.methods import METHODS
from streammerge.run.memory import usage
from tests.methods.cases import make_case, settings_of

BF16, F32 = torch.bfloat16, torch.float32
# Elements that are looked at with every program a method has.
MANY = 1 << 40
SIGNATURE = Signature(F32, (BF16, BF16), False, BF16)
LINEAR = METHODS["linear"].program(settings_of(METHODS["linear"], make_case(METHODS["linear"], "any", (1,), seed=0)))


@pytest.fixture(autouse=True)
def _fresh_environment() -> Iterator[None]:
    compiled._environment.cache_clear()
    yield
    compiled._environment.cache_clear()


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "kernels")


# --- names -----------------------------------------------------------------------------------------------------------


def test_a_package_has_one_name(cache: Cache, tmp_path: Path) -> None:
    assert cache.package(LINEAR, SIGNATURE) == cache.package(LINEAR, SIGNATURE)
    assert Cache(tmp_path / "other").package(LINEAR, SIGNATURE).name == cache.package(LINEAR, SIGNATURE).name


def test_dtypes_and_models_name_different_packages(cache: Cache) -> None:
    signatures = [
        SIGNATURE,
        SIGNATURE._replace(out=F32),
        SIGNATURE._replace(out=None),
        SIGNATURE._replace(work=torch.float64),
        SIGNATURE._replace(inputs=(BF16, F32)),
        SIGNATURE._replace(inputs=(F32, BF16)),
        SIGNATURE._replace(inputs=(BF16, BF16, BF16)),
        SIGNATURE._replace(has_base=True),
    ]
    assert len({cache.package(LINEAR, signature) for signature in signatures}) == len(signatures)


def test_programs_and_their_options_name_different_packages(cache: Cache) -> None:
    programs = {}
    sparse = {"density": 0.5}
    for method in METHODS.values():
        for parameters in ({}, sparse, {**sparse, "normalize": True}, {**sparse, "rescale": True}):
            settings = settings_of(method, make_case(method, "any", (1,), seed=0, **parameters))
            programs |= {
                program.label: program for program in (method.program(settings), *method.looks(settings, False, MANY))
            }
    assert len(programs) > 10
    assert len({cache.package(program, SIGNATURE) for program in programs.values()}) == len(programs)


def test_another_torch_names_another_package(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    before = cache.package(LINEAR, SIGNATURE)
    compiled._environment.cache_clear()
    monkeypatch.setattr(torch, "__version__", "9.9.9")
    assert cache.package(LINEAR, SIGNATURE) != before


@pytest.mark.parametrize("changed", ["kernels/blocksum.py", "kernels/contract.py", "methods/linear.py"])
def test_another_source_names_another_package(
    cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: str
) -> None:
    before = cache.package(LINEAR, SIGNATURE)
    package = tmp_path / "streammerge"
    for folder in ("kernels", "methods"):
        shutil.copytree(Path(compiled.__file__).parent.parent / folder, package / folder)
    monkeypatch.setattr(compiled, "__file__", str(package / "kernels" / "compiled.py"))
    compiled._environment.cache_clear()
    assert cache.package(LINEAR, SIGNATURE) == before
    with (package / changed).open("a") as file:
        file.write("# changed\n")
    compiled._environment.cache_clear()
    assert cache.package(LINEAR, SIGNATURE) != before


def test_the_cache_is_where_the_user_keeps_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache().directory == tmp_path / "streammerge" / "kernels"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/somebody")
    assert default_cache().directory == Path("/somebody/.cache/streammerge/kernels")


# --- failures --------------------------------------------------------------------------------------------------------


def test_what_was_never_compiled_is_not_loaded(cache: Cache) -> None:
    assert cache.load(LINEAR, SIGNATURE, 1) is None


def test_nothing_missing_starts_no_process(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr(subprocess, "run", refuse)
    cache.directory.mkdir()
    cache.package(LINEAR, SIGNATURE).touch()
    assert cache.build([(LINEAR, SIGNATURE)]) is None
    assert cache.build([]) is None


def test_a_missing_compiler_is_a_reason(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/nowhere/g++")
    assert compiler_missing() == "there is no C++ compiler (g++, or CXX)"
    assert cache.build([(LINEAR, SIGNATURE)]) == compiler_missing()
    assert not cache.directory.exists()


@pytest.mark.skipif(shutil.which("false") is None, reason="needs /bin/false")
def test_a_compiler_that_fails_is_a_reason_and_leaves_nothing(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", str(shutil.which("false")))
    reason = cache.build([(LINEAR, SIGNATURE)])
    assert reason is not None
    assert "No working C++ compiler" in reason
    assert list(cache.directory.iterdir()) == []
    assert cache.load(LINEAR, SIGNATURE, 1) is None


def _other_bits_compiled(tile: Tile, arguments: Arguments) -> Tensor:
    return tile.models[0] * (1.5 if torch.compiler.is_compiling() else 1.0)


@pytest.mark.skipif(compiler_missing() is not None, reason="needs a C++ compiler")
def test_a_program_that_comes_out_otherwise_is_not_used(cache: Cache) -> None:
    program = Program(_other_bits_compiled, merges=True)
    reason = cache.build([(program, SIGNATURE._replace(inputs=(BF16,)))])
    assert reason is not None
    assert "_other_bits_compiled() gives other bits compiled than eagerly" in reason
    assert list(cache.directory.iterdir()) == []


@pytest.mark.skipif(compiler_missing() is not None, reason="needs a C++ compiler")
def test_a_result_lasts_as_long_as_it_is_held(cache: Cache) -> None:
    signature = Signature(F32, (BF16, BF16), True, None)
    assert cache.build([(MAGNITUDES.fetching, signature)]) is None
    run = cache.load(MAGNITUDES.fetching, signature, 1)
    assert run is not None
    base = torch.zeros(8, BLOCK, dtype=BF16)
    models = [torch.full((8, BLOCK), float(i), dtype=BF16) for i in range(4)]
    found = [run([base, model], None, None, None, {}) for model in models]
    assert [result.unique().tolist() for result in found] == [[0.0], [1.0], [2.0], [3.0]]
    part = found[3][7, 0, 5:]
    before = usage().own
    for _ in range(200):
        found = [run([base, models[1]], None, None, None, {})]
    # One result is 2 MiB.
    assert usage().own - before < 40 << 20
    assert part.unique().tolist() == [3.0]


@pytest.mark.skipif(compiler_missing() is not None, reason="needs a C++ compiler to come so far")
def test_a_cache_that_cannot_be_made_is_a_reason(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    reason = Cache(tmp_path / "file" / "kernels").build([(LINEAR, SIGNATURE)])
    assert reason is not None
    assert "cannot be made" in reason


@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\x03\x04" + bytes(1000)])
def test_a_damaged_package_is_as_good_as_none(cache: Cache, content: bytes) -> None:
    cache.directory.mkdir()
    cache.package(LINEAR, SIGNATURE).write_bytes(content)
    assert cache.load(LINEAR, SIGNATURE, 1) is None
    # Gone, so that it is compiled again.
    assert list(cache.directory.iterdir()) == []
