"""A merge led from one process over any `concurrent.futures.Executor`: process pools, Dask, MPI.

The executor decides who makes which unit; everything else is as with workers that come by themselves. It may run a unit
twice, or in two places: the ledger has the last word.
"""

from __future__ import annotations

import os
import socket
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

from streammerge.base.errors import Stopped, StreamMergeError, error_of
from streammerge.cluster.finalizer import Finalized, complete, finished_result
from streammerge.cluster.job import Prepared, folder_of, open_job, prepare
from streammerge.cluster.rank import Rank, find_rank
from streammerge.cluster.units import order_for
from streammerge.cluster.worker import Worked, Worker, equipped
from streammerge.run.check import verify_inputs
from streammerge.run.merge import Options, Unwatched, stop_signals

# So often it is asked whether to stop.
_STOP_SECONDS = 1.0
_ALONE = threading.Lock()


def merge_over(executor: Executor, recipe: Path, out: Path, options: Options, note: Callable[[str], None],
               progress: Callable[[int, int], None]) -> Finalized:  # fmt: skip
    """Merge `recipe` into OUT with the workers of `executor`, which must see OUT and the inputs under the same paths.

    Memory and threads of `options` are those of every worker. `progress` is called with the bytes moved and all of
    them. Raises the errors of base/errors.py; Stopped also when the executor itself fails, as when its processes die.
    """
    found = prepare(recipe, out, options, note)
    if found is None:
        return finished_result(out, check=options.verify_output)
    left = [unit for unit in order_for(found.units, 0, 1) if not found.ledger.is_done(unit.number)]
    total = sum(unit.moved_bytes for unit in found.units)
    moved = total - sum(unit.moved_bytes for unit in left)
    progress(moved, total)
    if options.verify_inputs:
        verify_inputs(found.plan.checkpoints, note)
    with stop_signals() as stopping:
        futures: dict[Future[dict[str, Any]], int] = {}
        try:
            for unit in left:
                with _failures():
                    future = executor.submit(make_unit, str(found.out), unit.number, options)
                futures[future] = unit.moved_bytes
            waiting = set(futures)
            while waiting:
                # A unit may take long, and an executor may have nobody yet to give it to.
                finished, waiting = wait(waiting, timeout=_STOP_SECONDS, return_when=FIRST_COMPLETED)
                if stopping():
                    raise Stopped("stopped")
                for future in finished:
                    with _failures():
                        answer = future.result()
                    if (fault := answer.get("fault")) is not None:
                        raise RuntimeError(f"in a worker:\n{fault}")
                    if (error := answer["error"]) is not None:
                        raise error_of(answer["exit_code"])(error)
                    moved += futures[future]
                    progress(moved, total)
        finally:
            for future in futures:
                future.cancel()
    return complete(found, check=options.verify_output)


@contextmanager
def _failures() -> Iterator[None]:
    """Raise Stopped for whatever an executor raises: each has errors of its own, and `make_unit` raises none."""
    try:
        yield
    except Exception as error:
        raise Stopped(
            f"The executor failed ({type(error).__name__}: {error}). What is finished is saved: run the same again to "
            "go on."
        ) from error


def make_unit(out: str, number: int, options: Options) -> dict[str, Any]:
    """Make unit `number` of the run in `out`, here. Returns what it took, or what went wrong: not all errors travel."""
    try:
        # Threads of one process share its memory.
        with _ALONE if options.max_memory is not None else nullcontext():
            return {"error": None, "exit_code": 0, **asdict(_make_unit(Path(out), number, options))}
    except StreamMergeError as error:
        return {"error": str(error), "exit_code": error.exit_code}
    except Exception:  # noqa: BLE001 - raised again, with this, by whoever leads
        return {"fault": traceback.format_exc()}


def _make_unit(out: Path, number: int, options: Options) -> Worked:
    record = folder_of(out) / "job.json"
    found = _opened(out, record.stat().st_mtime_ns if record.exists() else 0)
    own = find_rank(None, None)
    # Threads of one process are workers, too.
    rank = Rank(0, 1, f"{own.name}-{threading.get_ident()}")
    worked = Worked(rank.name, socket.gethostname(), 0, 1, os.getpid(), time.time())
    if found is None:
        return worked
    observer = Unwatched()
    with (
        equipped(found, options, observer) as bench,
        Worker(found, bench, worked, lambda: False, observer) as worker,
    ):
        # Whoever had it before: the executor has given it to us.
        claim = worker.claim(found.units[number], steal=True)
        if claim is not None:
            worker.make(found.units[number], claim)
    return worked


@lru_cache(maxsize=4)
def _opened(out: Path, begun: int) -> Prepared | None:
    """The run in OUT, planned once per process. `begun` tells it from others that were there."""
    return open_job(out, Unwatched().note)
