"""A merge led from one process over an executor: whoever runs the units, the bytes are those of one machine."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

import streammerge
from streammerge.base.errors import InputError, Stopped, UserError
from streammerge.run.journal import WORK_FOLDER
from streammerge.run.memory import usage
from tests.models import make_models, make_tensors, save_model, write_recipe
from tests.run.test_crash import files

SHAPES = {f"model.layers.{i}.mlp.up_proj.weight": (300, 256) for i in range(6)}
SIZE = 200_000


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    base, *models = make_models(tmp_path, shapes=SHAPES)
    return write_recipe(tmp_path / "recipe.yaml", "ties", models, base=base, per_model={"weight": 0.5, "density": 0.4})


def merge(recipe: Path, out: Path, executor: Executor | None = None) -> Any:
    return streammerge.merge(recipe, out, out_shard_size=SIZE, compile="off", threads=1, executor=executor)


class Twice(ThreadPoolExecutor):
    """Runs everything twice, in two threads at once."""

    def submit(self, function: Callable[..., Any], /, *arguments: Any, **named: Any) -> Future[Any]:
        super().submit(function, *arguments, **named)
        return super().submit(function, *arguments, **named)


@pytest.mark.parametrize("kind", ["threads", "processes", "twice"])
def test_executors(recipe: Path, tmp_path: Path, kind: str) -> None:
    merge(recipe, tmp_path / "one")
    executors: dict[str, Callable[[], Executor]] = {
        "threads": lambda: ThreadPoolExecutor(3),
        "processes": lambda: ProcessPoolExecutor(2, multiprocessing.get_context("spawn")),
        "twice": lambda: Twice(4),
    }
    out = tmp_path / "out"
    with executors[kind]() as executor:
        report = merge(recipe, out, executor)
        assert merge(recipe, out, executor).already_finished
    assert files(out) == files(tmp_path / "one")
    assert not (out / WORK_FOLDER).exists()
    assert report.tensors == len(SHAPES)
    assert report.written_bytes == sum(path.stat().st_size for path in out.glob("*.safetensors")) - headers(out)
    assert not streammerge.verify(out).problems


def headers(out: Path) -> int:
    return sum(8 + int.from_bytes(path.read_bytes()[:8], "little") for path in out.glob("*.safetensors"))


def test_it_goes_on_after_a_worker_was_killed(recipe: Path, tmp_path: Path) -> None:
    merge(recipe, tmp_path / "one")
    out = tmp_path / "out"
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as executor:
        executor.submit(os.getpid).result()
        (pid,) = executor._processes
        killer = ThreadPoolExecutor(1)

        def kill() -> None:
            while not list(out.glob("*.safetensors")):
                pass
            os.kill(pid, signal.SIGKILL)

        killing = killer.submit(kill)
        # All may have been made before it dies.
        with suppress(Stopped):
            merge(recipe, out, executor)
        killing.result()
        killer.shutdown()
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as executor:
        merge(recipe, out, executor)
    assert files(out) == files(tmp_path / "one")


class Broken(Executor):
    """Takes work, and loses whoever does it."""

    def submit(self, function: Callable[..., Any], /, *arguments: Any, **named: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_exception(BrokenProcessPool("a process was terminated abruptly"))
        return future


def test_what_an_executor_raises_is_no_fault_of_ours(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(Stopped, match=r"executor failed \(BrokenProcessPool.*run the same again"):
        merge(recipe, out, Broken())
    gone = ThreadPoolExecutor(1)
    gone.shutdown()
    with pytest.raises(Stopped, match="cannot schedule new futures"):
        merge(recipe, out, gone)
    with ThreadPoolExecutor(2) as executor:
        merge(recipe, out, executor)


def test_a_fault_in_a_worker_is_shown_whole(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise KeyError("a fault of ours")

    monkeypatch.setattr("streammerge.cluster.executor._make_unit", fail)
    with ThreadPoolExecutor(2) as executor, pytest.raises(RuntimeError, match=r"(?s)Traceback.*a fault of ours"):
        merge(recipe, tmp_path / "out", executor)


def test_threads_of_one_process_share_its_memory(recipe: Path, tmp_path: Path) -> None:
    # Room for one: two at once would have none.
    limit = f"{usage().resident // 1_000_000 + 500}MB"
    with ThreadPoolExecutor(4) as executor:
        streammerge.merge(
            recipe, tmp_path / "out", compile="off", max_memory=limit, out_shard_size=SIZE, executor=executor
        )
    assert not streammerge.verify(tmp_path / "out").problems


class Never(Executor):
    """A full queue: nobody ever comes to do anything."""

    def submit(self, function: Callable[..., Any], /, *arguments: Any, **named: Any) -> Future[Any]:
        return Future()


def test_a_stop_is_heard_while_nobody_works(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    stopping = threading.Timer(1.0, lambda: os.kill(os.getpid(), signal.SIGTERM))
    stopping.start()
    with pytest.raises(Stopped, match="Stopped by SIGTERM"):
        merge(recipe, out, Never())
    stopping.join()
    with ThreadPoolExecutor(2) as executor:
        merge(recipe, out, executor)


def test_inputs_are_verified_first_if_asked(recipe: Path, tmp_path: Path) -> None:
    heard: list[str] = []
    with ThreadPoolExecutor(2) as executor:
        streammerge.merge(
            recipe, tmp_path / "out", compile="off", verify_inputs=True, executor=executor, note=heard.append
        )
    # None of these models has checksums to be compared with.
    assert any("checksum" in text for text in heard)


def test_errors_come_back_as_ours(tmp_path: Path) -> None:
    models = [
        save_model(tmp_path / f"m{i}", make_tensors(i, shapes=SHAPES) | {"model.layers.3.ids": torch.tensor([i])})
        for i in range(2)
    ]
    recipe = write_recipe(tmp_path / "recipe.yaml", "linear", models, per_model={"weight": 1})
    with ThreadPoolExecutor(2) as executor:
        with pytest.raises(UserError, match="integers"):
            merge(recipe, tmp_path / "out", executor)
        (models[0] / "model.safetensors").unlink()
        with pytest.raises(InputError):
            merge(recipe, tmp_path / "out", executor)
