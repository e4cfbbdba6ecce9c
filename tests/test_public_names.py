"""What `import streammerge` promises."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import streammerge
from streammerge.api import make_plan
from tests.models import make_models, write_recipe

ROOT = Path(__file__).resolve().parent.parent


def test_every_public_name_is_a_function_however_often_it_is_used() -> None:
    # The package `streammerge.plan` must not hide the function of the same name once it is imported.
    names = [name for name in streammerge.__all__ if name != "__version__"]
    program = f"import streammerge as s; print([n for _ in range(3) for n in {names} if not callable(getattr(s, n))])"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'mrege'"):
        _ = streammerge.mrege


def test_the_shard_size_of_mergekit_means_the_same_from_python(tmp_path: Path) -> None:
    _, model = make_models(tmp_path, 1)
    recipe = write_recipe(tmp_path / "r.yaml", "linear", [model], per_model={"weight": 1.0})
    assert len(make_plan(recipe, out_shard_size="5B").shards) == 1
