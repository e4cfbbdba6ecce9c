"""When reading or writing fails: a clear error, the right exit code, no hang, nothing half-written, and going on."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import streammerge
from tests.command import streammerge as run
from tests.models import make_models, write_recipe

SHAPES = {f"model.layers.{i}.mlp.up_proj.weight": (300, 1024) for i in range(12)}
FAULT = """
import errno, os, sys
call, code, left = sys.argv[1], getattr(errno, sys.argv[2]), int(sys.argv[3])
del sys.argv[1:4]
whole = getattr(os, call)
def faulty(*args, **kwargs):
    global left
    left -= 1
    if left <= 0:
        raise OSError(code, os.strerror(code))
    return whole(*args, **kwargs)
setattr(os, call, faulty)
from streammerge.cli import main
main()
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faults")
    base, *models = make_models(folder, shapes=SHAPES)
    recipe = write_recipe(folder / "r.yaml", "task_arithmetic", models, base=base, per_model={"weight": 0.5})
    streammerge.merge(recipe, folder / "whole", out_shard_size="2MB", compile="off")
    return recipe


@pytest.mark.parametrize(
    ("call", "code", "number", "exit_code"),
    [
        ("pwritev", "ENOSPC", 4, 3),
        ("pwritev", "EDQUOT", 8, 3),
        ("pwritev", "EIO", 6, 2),
        ("fdatasync", "EIO", 1, 2),
        ("fsync", "EIO", 2, 2),
        ("preadv", "EIO", 9, 4),
        ("preadv", "ESTALE", 20, 4),
    ],
)
def test_a_fault_is_one_error_and_the_next_run_goes_on(
    recipe: Path, tmp_path: Path, call: str, code: str, number: int, exit_code: int
) -> None:
    out = tmp_path / "out"
    arguments = [str(recipe), str(out), "--out-shard-size", "2MB", "--compile", "off", "--max-memory", "600MB"]
    broken = subprocess.run([sys.executable, "-c", FAULT, call, code, str(number), *arguments], capture_output=True,
                            text=True, check=False, timeout=60)  # fmt: skip
    assert broken.returncode == exit_code, broken.stderr
    assert broken.stderr.count("error:") == 1
    assert "Traceback" not in broken.stderr
    whole = recipe.parent / "whole"
    for shard in out.glob("*.safetensors"):
        assert shard.read_bytes() == (whole / shard.name).read_bytes()
    assert run(*arguments).code == 0
    for file in whole.iterdir():
        assert (out / file.name).read_bytes() == file.read_bytes()


def test_a_truncated_input_is_named(recipe: Path, tmp_path: Path) -> None:
    _, *models = make_models(tmp_path, shapes=SHAPES)
    weights = models[1] / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    broken = write_recipe(tmp_path / "r.yaml", "linear", models, per_model={"weight": 1})
    result = run(broken, tmp_path / "out")
    assert result.code == 4
    assert str(weights) in result.err
    assert not (tmp_path / "out").exists()


def test_integers_that_differ_are_refused(tmp_path: Path) -> None:
    import torch

    from tests.models import save_model

    models = [save_model(tmp_path / name, {"w": torch.ones(70000), "ids": torch.arange(5) + i})
              for i, name in enumerate("ab")]  # fmt: skip
    recipe = write_recipe(tmp_path / "r.yaml", "linear", models, per_model={"weight": 1})
    result = run(recipe, tmp_path / "out")
    assert result.code == 2
    assert "ids" in result.err
    assert not list((tmp_path / "out").glob("*.safetensors"))
