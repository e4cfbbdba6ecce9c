"""Runs over a real Dask: its own workers here, or as Slurm jobs; killed and cancelled ones are made up for."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import threading
from pathlib import Path

import pytest

import streammerge
from streammerge.base.errors import OutputError
from streammerge.cluster.dask import dask_executor
from streammerge.run.journal import WORK_FOLDER
from tests.cluster.real_slurm import Slurm, is_there, wait_for
from tests.cluster.test_workers import worker_pids
from tests.command import COMMAND
from tests.command import streammerge as command
from tests.models import make_models, write_recipe
from tests.run.test_crash import files

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(importlib.util.find_spec("distributed") is None, reason="Dask is not installed here"),
    # What Dask's processes leave open when they are killed.
    pytest.mark.filterwarnings("ignore"),
]
SHARDS = 8
ROOT = Path(__file__).resolve().parents[2]
FLAGS = ("--out-shard-size", "700KB", "--threads", "1", "--compile", "off", "--json")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A merge whose every shard takes a worker about half a second, and what one machine makes of it beside it."""
    folder = tmp_path_factory.mktemp("dask")
    shapes = {f"model.layers.{i}.mlp.up_proj.weight": (300, 10240) for i in range(SHARDS)}
    base, *models = make_models(folder, shapes=shapes)
    path = write_recipe(folder / "recipe.yaml", "arcee_fusion", models[:1], base=base)
    assert command(path, folder / "one", *FLAGS).code == 0
    return path


def check(recipe: Path, out: Path) -> None:
    assert files(out) == files(recipe.parent / "one")
    assert not (out / WORK_FOLDER).exists()
    assert not streammerge.verify(out).problems


def test_local_workers_one_of_them_killed(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    killed = []

    def kill_one() -> None:
        wait_for(lambda: len(working(out)) == 2)
        pid = working(out)[0]
        os.kill(pid, signal.SIGKILL)
        killed.append(pid)

    killing = threading.Thread(target=kill_one)
    with dask_executor("local", 2) as executor:
        killing.start()
        streammerge.merge(recipe, out, out_shard_size=700_000, threads=1, compile="off", executor=executor)
    killing.join()
    assert killed
    check(recipe, out)


def working(out: Path) -> list[int]:
    """The processes that are making a shard."""
    try:
        return sorted(set(worker_pids(out).values()))
    except OutputError:
        # Not begun yet.
        return []


def test_the_command_with_local_workers(recipe: Path, tmp_path: Path) -> None:
    done = command(recipe, tmp_path / "out", *FLAGS, "--dask", "local", "--workers", "2")
    assert done.done["tensors"] == SHARDS
    check(recipe, tmp_path / "out")


def test_a_scheduler_that_runs_already(recipe: Path, tmp_path: Path) -> None:
    from distributed import LocalCluster

    with LocalCluster(n_workers=2, host="127.0.0.1", dashboard_address="127.0.0.1:0") as cluster:
        done = command(recipe, tmp_path / "out", *FLAGS, "--dask", cluster.scheduler_address)
    assert done.done["tensors"] == SHARDS
    check(recipe, tmp_path / "out")


@pytest.mark.parametrize("where", ["here", "tcp://127.0.0.1:1"])
def test_no_such_scheduler(recipe: Path, tmp_path: Path, where: str) -> None:
    done = command(recipe, tmp_path / "out", *FLAGS, "--dask", where)
    assert done.code == 2
    assert "--dask" in done.events[-1]["text"]


@pytest.mark.skipif(not is_there(), reason="Slurm is not installed here")
def test_slurm_jobs_one_of_them_cancelled(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    settings = tmp_path / "dask"
    settings.mkdir()
    (settings / "jobqueue.yaml").write_text(
        "jobqueue:\n  slurm:\n    cores: 1\n    processes: 1\n    memory: 800MB\n    interface: lo\n"
        f"    walltime: '00:10:00'\n    log-directory: {tmp_path}\n    local-directory: {tmp_path}\n"
    )
    with Slurm(tmp_path / "daemons") as slurm:
        environment = slurm.environment | {"DASK_CONFIG": str(settings)}
        process = subprocess.Popen(
            [*COMMAND, str(recipe), str(out), *FLAGS, "--dask", "slurm", "--workers", "2"], env=environment, cwd=ROOT,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        # How many jobs Dask asks for, and when, is its own affair: one that is at work is cancelled.
        wait_for(lambda: working(out), 60)
        job = slurm.ask("squeue", "-h", "-t", "RUNNING", "-o", "%i").split()[0]
        slurm.ask("scancel", job)
        _, errors = process.communicate(timeout=90)
        assert process.returncode == 0, errors
        assert slurm.states(job) == ["CANCELLED"]
        wait_for(lambda: slurm.ask("squeue", "-h") == "")
    check(recipe, out)
