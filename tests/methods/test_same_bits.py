"""Memory, tiles, threads, shards and hash seeds change the speed of a merge, never its bits.

Every method, with every parameter away from its default, over tensors of all shapes and dtypes at once: one of them of
eleven blocks, one with NaN and infinities. Compared with a merge in whatever way is the default.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from streammerge.kernels.contract import Method
from streammerge.plan import budget
from streammerge.run.merge import Report
from tests.methods.cases import (
    FORMS,
    ROWS,
    SHAPES,
    Case,
    Made,
    bits,
    make,
    make_case,
    merge,
    profiles,
    sees_rows,
    settings_of,
)
from tests.methods.test_edges import spoiled

every_method = pytest.mark.parametrize("name", FORMS)

_BLOCKS = (11, 65536)


@dataclass(frozen=True)
class Reference:
    """A method's merge in the default way."""

    made: Made
    out: Path
    report: Report
    tensors: dict[str, Tensor]


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Reference]:
    found = {}
    for name, method in FORMS.items():
        folder = tmp_path_factory.mktemp(name)
        made = make(folder, method, cases_for(method))
        report, tensors = merge(made, folder / "reference")
        found[name] = Reference(made, folder / "reference", report, tensors)
    return found


def cases_for(method: Method) -> list[Case]:
    usual = profiles(method)["usual"]
    rescaled = profiles(method).get("rescale True", profiles(method).get("rescale False", usual))
    cases = [
        make_case(method, f"{dtype} {label}".replace("torch.", ""), shape, seed=i, dtypes=(dtype,), **usual)
        for dtype in (torch.bfloat16, torch.float32)
        for i, (label, shape) in enumerate(SHAPES.items())
    ]
    cases += [
        make_case(method, f"{dtype} long".replace("torch.", ""), _BLOCKS, seed=50, dtypes=(dtype,), **parameters)
        for dtype, parameters in ((torch.bfloat16, rescaled), (torch.float16, usual), (torch.float64, rescaled))
    ]
    cases += [
        make_case(method, f"{profile} {label}", shape, seed=70 + i, **parameters)
        for profile, parameters in profiles(method).items()
        if sees_rows(method, parameters)
        for i, (label, shape) in enumerate(ROWS.items())
    ]
    return [*cases, spoiled(make_case(method, "spoiled", (200_000,), seed=60, **rescaled))]


def assert_same_files(out: Path, reference: Reference) -> None:
    for file in sorted(reference.out.glob("*.safetensors")):
        assert (out / file.name).read_bytes() == file.read_bytes(), file.name


@every_method
@pytest.mark.parametrize(
    ("tile_blocks", "read_again", "threads"),
    [
        pytest.param(1, True, 1, id="tiles of one block, read again for every pass"),
        pytest.param(1, False, 4, id="tiles of one block that stay in memory, four threads"),
        pytest.param(3, True, 4, id="tiles of three blocks, read again for every pass, four threads"),
        pytest.param(1000, False, 1, id="whole tensors"),
    ],
)
def test_tiles_threads_and_passes_change_no_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str,
                                                references: dict[str, Reference], tile_blocks: int, read_again: bool,
                                                threads: int) -> None:  # fmt: skip
    monkeypatch.setattr(budget, "_TILE_BLOCKS", tile_blocks)
    if read_again:
        # Three slots, one of them for a tensor to stay in.
        monkeypatch.setattr(budget, "_SLOTS", 3)
        monkeypatch.setattr(budget, "_DEFAULT_ARENA", 0)
    reference = references[name]
    report, _ = merge(reference.made, tmp_path / "out", threads=threads)
    assert_same_files(tmp_path / "out", reference)
    assert report.nonfinite == reference.report.nonfinite
    # The tiles were what this test is about.
    looks = any(reference.made.method.looks(settings_of(reference.made.method, case), False, 1)
                for case in reference.made.cases.values())  # fmt: skip
    if read_again and looks:
        assert report.read_bytes > reference.report.read_bytes
    else:
        assert report.read_bytes <= reference.report.read_bytes


@every_method
def test_shards_change_no_bit(tmp_path: Path, name: str, references: dict[str, Reference]) -> None:
    reference = references[name]
    _, tensors = merge(reference.made, tmp_path / "out", out_shard_size="300KB")
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 5
    assert set(tensors) == set(reference.tensors)
    for tensor, expected in reference.tensors.items():
        assert tensors[tensor].dtype == expected.dtype
        assert torch.equal(bits(tensors[tensor]), bits(expected)), tensor


_CHILD = """
import json, sys
import streammerge
for recipe, out in json.loads(sys.argv[1]):
    streammerge.merge(recipe, out, compile="off", threads=2, max_memory=json.loads(sys.argv[2]))
"""


@pytest.mark.parametrize(("hash_seed", "max_memory"), [("1", None), ("2", "700MB")])
def test_hash_seed_and_budget_change_no_bit(tmp_path: Path, references: dict[str, Reference], hash_seed: str,
                                            max_memory: str | None) -> None:  # fmt: skip
    jobs = [(str(reference.made.recipe), str(tmp_path / name)) for name, reference in references.items()]
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", _CHILD, json.dumps(jobs), json.dumps(max_memory)],
        env=os.environ | {"PYTHONHASHSEED": hash_seed}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for name, reference in references.items():
        assert_same_files(tmp_path / name, reference)


@every_method
def test_merging_twice_gives_the_same_bits_and_another_seed_only_other_chance(
    tmp_path: Path, name: str, references: dict[str, Reference]
) -> None:
    reference = references[name]
    merge(reference.made, tmp_path / "again")
    assert_same_files(tmp_path / "again", reference)
    _, tensors = merge(reference.made, tmp_path / "seeded", seed=7)
    same = all(torch.equal(bits(tensors[tensor]), bits(expected)) for tensor, expected in reference.tensors.items())
    method = reference.made.method
    draws = any(
        program.needs_keys
        for case in reference.made.cases.values()
        for settings in [settings_of(method, case)]
        for program in (method.program(settings), *method.looks(settings, False, 1))
    )
    assert same != draws
