"""`--profile`: where the time of a merge went."""

from __future__ import annotations

from pathlib import Path

import pytest

from streammerge.run.profile import Profile
from tests.command import streammerge as run
from tests.models import make_models, write_recipe


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    base, *models = make_models(tmp_path / "models")
    per_model = {"weight": 0.5, "density": 0.4}
    return write_recipe(tmp_path / "r.yaml", "ties", models, base=base, per_model=per_model)


def test_every_kind_of_work_is_counted_and_the_phases_are_the_whole_time(recipe: Path, tmp_path: Path) -> None:
    done = run(recipe, tmp_path / "out", "--json", "--compile", "off", "--threads", "2").done
    found = Profile(**done["profile"])
    phases = found.planning + found.compiling + found.merging + found.finishing
    assert 0 < phases < done["seconds"]
    for name in ("planning", "merging", "reading", "hashing", "writing", "syncing"):
        assert getattr(found, name) > 0, name
    # What one thread does one after the other takes no longer than all of it.
    assert found.unready + found.hashing + found.writing <= found.merging
    assert found.waiting <= found.merging
    labels = [label for label in done["profile"]["programs"] if label.startswith("streammerge.kernels.")]
    assert any("taskvector" in label for label in labels)
    assert any("cut" in label for label in labels)
    spent = sum(each["seconds"] for each in done["profile"]["programs"].values())
    assert 0 < spent <= 2 * found.merging


def test_the_table_names_phases_and_programs(recipe: Path, tmp_path: Path) -> None:
    out = run(recipe, tmp_path / "out", "--profile", "--compile", "off").out
    for name in ("starting Python", "planning", "merging", "finishing", "reading", "kernels.taskvector", "syncing"):
        assert name in out
    assert "where the time went" not in run(recipe, tmp_path / "other", "--compile", "off").out


def test_a_finished_merge_has_nothing_to_tell(recipe: Path, tmp_path: Path) -> None:
    run(recipe, tmp_path / "out", "--compile", "off")
    again = run(recipe, tmp_path / "out", "--json", "--profile")
    assert again.code == 0
    assert again.done["profile"]["merging"] == 0
