"""The budget holds: a process in a memory cgroup of exactly the budget finishes, and a careless one does not."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import streammerge
from tests.command import streammerge as run
from tests.models import make_models, write_recipe

BUDGET = 500_000_000
# 112 MB per model: base, two models and the result are four fifths of the budget, and torch takes half of it.
SHAPES = {"model.layers.0.mlp.up_proj.weight": (7000, 8000)}


@pytest.fixture
def group() -> Iterator[Path]:
    """A memory cgroup limited to BUDGET (v2 where it is delegated, else v1)."""
    v2, v1 = Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/memory")
    name = f"streammerge-test-{os.getpid()}"
    for root, limit in ((v2, "memory.max"), (v1, "memory.limit_in_bytes")):
        folder = root / name
        try:
            folder.mkdir()
        except OSError:
            continue
        if not (folder / limit).exists():
            # No cgroup file system, or the memory controller is not here.
            folder.rmdir()
            continue
        (folder / limit).write_text(str(BUDGET))
        yield folder
        folder.rmdir()
        return
    pytest.skip("NO MEMORY CGROUP CAN BE MADE HERE: the budget is not proven on this machine (run as root)")


def joining(group: Path) -> Callable[[], None]:
    def join() -> None:
        (group / "cgroup.procs").write_text(str(os.getpid()))

    return join


def test_a_merge_in_a_cgroup_of_exactly_the_budget_finishes(group: Path, tmp_path: Path) -> None:
    base, *models = make_models(tmp_path, shapes=SHAPES)
    recipe = write_recipe(tmp_path / "r.yaml", "ties", models, base=base, per_model={"weight": 0.5, "density": 0.3})
    done = run(recipe, tmp_path / "small", "--max-memory", str(BUDGET), "--json", "--compile", "off",
               before=joining(group)).done  # fmt: skip
    assert done["peak_own_bytes"] <= BUDGET
    large = streammerge.merge(recipe, tmp_path / "large", compile="off")
    assert large.tensors == 1
    small, whole = (tmp_path / name / "model.safetensors" for name in ("small", "large"))
    assert small.read_bytes() == whole.read_bytes()


def test_the_cgroup_kills_who_takes_more(group: Path) -> None:
    """The control: without this the test above would prove nothing."""
    hog = f"x = bytearray({BUDGET} + 50_000_000)\nfor i in range(0, len(x), 4096): x[i] = 1\n"
    done = subprocess.run([sys.executable, "-c", hog], preexec_fn=joining(group), check=False, timeout=60)
    assert done.returncode != 0


def test_the_limit_of_the_cgroup_counts_without_a_flag(group: Path, tmp_path: Path) -> None:
    _, *models = make_models(tmp_path, shapes={"w": (100, 100)})
    recipe = write_recipe(tmp_path / "r.yaml", "linear", models, per_model={"weight": 1})
    result = run("plan", recipe, "--json", before=joining(group))
    assert result.code == 0, result.err
    assert f'"limit_bytes": {BUDGET // 4096 * 4096}' in result.out


def test_a_budget_that_cannot_work_is_refused_before_any_file(tmp_path: Path) -> None:
    _, *models = make_models(tmp_path, shapes={"w": (100, 100)})
    recipe = write_recipe(tmp_path / "r.yaml", "linear", models, per_model={"weight": 1})
    result = run(recipe, tmp_path / "out", "--max-memory", "100MB")
    assert result.code == 3
    assert "The smallest budget that works is" in result.err
    assert not (tmp_path / "out").exists()
    smallest = result.err.rsplit("is ", 1)[1].strip().rstrip(".")
    assert run(recipe, tmp_path / "out", "--max-memory", smallest).code == 0


def test_no_room_on_disk_is_refused_before_any_file(tmp_path: Path) -> None:
    _, *models = make_models(tmp_path, shapes={"w": (100, 100)})
    recipe = write_recipe(tmp_path / "r.yaml", "linear", models, per_model={"weight": 1})
    full = (
        "import streammerge.run.merge as m\nm.free_bytes = lambda folder: 1000\n"
        "from streammerge.cli import main\nmain()\n"
    )
    done = subprocess.run([sys.executable, "-c", full, recipe, tmp_path / "out"], capture_output=True, text=True,
                          check=False)  # fmt: skip
    assert done.returncode == 3
    assert "of disk" in done.stderr
    assert not (tmp_path / "out").exists()
