"""A merge that is stopped or killed goes on, and ends with the bytes of an unbroken one."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import streammerge
from streammerge.run.journal import WORK_FOLDER
from tests.command import COMMAND
from tests.command import streammerge as run
from tests.models import make_models, write_recipe

SHAPES = {f"model.layers.{i}.mlp.up_proj.weight": (300, 1024) for i in range(12)}
# Kills the process at the given write, fsync or rename: as a power cut would, but for the page cache.
KILLER = """
import os, signal, sys
left = int(sys.argv.pop(1))
def deadly(call):
    def wrapped(*args, **kwargs):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*args, **kwargs)
    return wrapped
for name in ("pwritev", "pwrite", "fdatasync", "fsync", "write", "rename", "ftruncate", "mkdir", "open"):
    setattr(os, name, deadly(getattr(os, name)))
import pathlib
for name in ("rename", "unlink", "mkdir"):
    setattr(pathlib.Path, name, deadly(getattr(pathlib.Path, name)))
from streammerge.cli import main
main()
"""


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A recipe, and the result of running it without a break."""
    folder = tmp_path_factory.mktemp("resume")
    base, *models = make_models(folder, shapes=SHAPES)
    recipe = write_recipe(folder / "recipe.yaml", "ties", models, base=base, per_model={"weight": 0.5, "density": 0.4})
    streammerge.merge(recipe, folder / "whole", out_shard_size="2MB", compile="off")
    return recipe, folder / "whole"


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def arguments(recipe: Path, out: Path) -> list[str]:
    return [str(recipe), str(out), "--out-shard-size", "2MB", "--compile", "off", "--json"]


def killed_at(number: int, recipe: Path, out: Path) -> int:
    command = [sys.executable, "-c", KILLER, str(number), *arguments(recipe, out)]
    return subprocess.run(command, capture_output=True, check=False, timeout=60).returncode


def test_resume_after_kill_gives_the_same_bytes(merged: tuple[Path, Path], tmp_path: Path) -> None:
    recipe, whole = merged
    out = tmp_path / "out"
    deaths = 0
    # Each attempt dies a few calls later than the one before, on top of what that one left.
    for number in (3, 9, 14, 20, 33, 47, 60):
        code = killed_at(number, recipe, out)
        assert code in (0, -signal.SIGKILL)
        deaths += code == -signal.SIGKILL
        for name in files(out) if out.exists() else ():
            if name.endswith(".safetensors"):
                assert files(out)[name] == files(whole)[name]
    assert deaths >= 4
    done = run(*arguments(recipe, out)).done
    assert files(out) == files(whole)
    assert not (out / WORK_FOLDER).exists()
    assert done["tensors"] == len(SHAPES)


@pytest.mark.parametrize("seed", range(3))
def test_a_fresh_run_killed_once_anywhere_resumes(merged: tuple[Path, Path], tmp_path: Path, seed: int) -> None:
    recipe, whole = merged
    out = tmp_path / "out"
    killed_at(random.Random(seed).randrange(10, 90), recipe, out)
    assert run(*arguments(recipe, out)).code == 0
    assert files(out) == files(whole)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_saves_the_work_and_exits_75(
    merged: tuple[Path, Path], tmp_path: Path, number: signal.Signals
) -> None:
    recipe, whole = merged
    out = tmp_path / "out"
    # Reads slowed down, so that the signal finds the merge at work.
    slow = (
        "import os, sys, time\n"
        "read = os.preadv\n"
        "os.preadv = lambda *a: (time.sleep(0.1), read(*a))[1]\n"
        "from streammerge.cli import main\nmain()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", slow, *arguments(recipe, out)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while not list(out.glob("*.partial")) and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.5)
    process.send_signal(number)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 75, output + errors
    assert "run the same command again" in output
    done = run(*arguments(recipe, out)).done
    assert done["resumed"] > 0
    assert files(out) == files(whole)


def test_a_finished_merge_is_left_alone(merged: tuple[Path, Path], tmp_path: Path) -> None:
    recipe, _ = merged
    out = tmp_path / "out"
    assert run(*arguments(recipe, out)).done["already_finished"] is False
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert run(*arguments(recipe, out)).done["already_finished"] is True
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before


def test_another_recipe_is_refused_and_the_difference_shown(merged: tuple[Path, Path], tmp_path: Path) -> None:
    recipe, whole = merged
    out = tmp_path / "out"
    killed_at(40, recipe, out)
    other = tmp_path / "other.yaml"
    other.write_text(recipe.read_text().replace("density: 0.4", "density: 0.3"))
    refused = run(*arguments(other, out))
    assert refused.code == 2
    assert "density" in refused.out
    assert "--restart" in refused.out
    assert run(*arguments(other, out), "--restart").code == 0
    assert files(out)["mergekit_config.yml"] == other.read_bytes()
    assert files(out).keys() == files(whole).keys()


def test_more_memory_or_threads_may_finish_what_others_began(merged: tuple[Path, Path], tmp_path: Path) -> None:
    recipe, whole = merged
    out = tmp_path / "out"
    assert killed_at(45, recipe, out) == -signal.SIGKILL
    assert run(*arguments(recipe, out), "--max-memory", "500MB", "--threads", "1").code == 0
    assert files(out) == files(whole)


def test_two_runs_into_one_directory_do_not_meet(merged: tuple[Path, Path], tmp_path: Path) -> None:
    recipe, _ = merged
    out = tmp_path / "out"
    slow = "import os, time\nsync = os.fdatasync\nos.fdatasync = lambda fd: (time.sleep(3), sync(fd))[1]\n"
    first = subprocess.Popen(
        [sys.executable, "-c", slow + "from streammerge.cli import main\nmain()\n", *arguments(recipe, out)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    while not (out / WORK_FOLDER / "plan.json").exists():
        assert first.poll() is None
        time.sleep(0.01)
    second = run(*arguments(recipe, out))
    assert second.code == 2
    assert "another merge is running" in second.out
    first.communicate(timeout=60)
    assert first.returncode == 0


def test_inputs_that_change_between_runs_are_noticed(tmp_path: Path) -> None:
    _, *models = make_models(tmp_path, shapes=SHAPES)
    recipe = write_recipe(tmp_path / "r.yaml", "linear", models, per_model={"weight": 1})
    out = tmp_path / "out"
    killed_at(40, recipe, out)
    weights = models[0] / "model.safetensors"
    os.utime(weights, ns=(1, 1))
    refused = run(*arguments(recipe, out))
    assert refused.code == 2
    assert "model.safetensors" in refused.out


def test_the_command_is_also_a_module() -> None:
    assert COMMAND[1:] == ("-m", "streammerge")
    assert run("--version").out.strip() == f"streammerge {streammerge.__version__}"
