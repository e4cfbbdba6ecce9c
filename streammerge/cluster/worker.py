"""A worker: makes units of a cluster run, one after the other, until there is none left that nobody else works on.

Killing it is as safe as stopping it. It may join late, leave early, and be started again; several in one run know of
each other only through the ledger.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from streammerge.base.errors import DoesNotFit, OutputError, Stopped, StreamMergeError, UserError
from streammerge.base.fields import made_of
from streammerge.cluster.job import Prepared, open_job
from streammerge.cluster.ledger import Committed, Failed, Ledger
from streammerge.cluster.rank import Rank
from streammerge.cluster.units import Unit, order_for
from streammerge.plan.plan import Plan
from streammerge.plan.tensor import TensorPlan
from streammerge.run.claims import BEATS, Claim, Heart
from streammerge.run.compiling import consider
from streammerge.run.estimate import estimate_seconds
from streammerge.run.gpu import choose_device
from streammerge.run.journal import Done
from streammerge.run.memory import Meter, refusals, usage
from streammerge.run.merge import Observer, Options, schedule_for, stop_signals
from streammerge.run.output import manifest_digest
from streammerge.run.survey import SurveyBook
from streammerge.run.walk import Equipment, walk
from streammerge.storage.sink import Shard, partial_path

_POLL_SECONDS = 1.0


@dataclass
class Worked:
    """What one worker has done, as others read it in the ledger. Seconds are since the epoch where they are times."""

    worker: str
    host: str
    index: int
    count: int
    pid: int
    began: float
    state: str = "starting"
    unit: str = ""
    units: int = 0
    lost: int = 0
    # Of the units that count, everything once; and what was really read and written.
    moved_bytes: int = 0
    read_bytes: int = 0
    written_bytes: int = 0
    seconds: float = 0.0
    peak_bytes: int = 0
    peak_own_bytes: int = 0
    failures: list[str] = field(default_factory=list)


# States after which nothing more is to be heard of a worker.
ENDED = ("finished", "stopped", "failed")


def worked_by(ledger: Ledger) -> list[tuple[Worked, float]]:
    """What every worker said last, and how many seconds ago. What is damaged does not count."""
    found = [(made_of(Worked, facts), age) for facts, age in ledger.workers()]
    return [(worked, age) for worked, age in found if worked is not None]


def work(out: Path, options: Options, rank: Rank, observer: Observer, *, wait: bool = False) -> Worked:
    """Make units of the cluster run in OUT as worker `rank`. With `wait`, until all units of all workers are done.

    Raises Stopped when asked to stop, and the first error of a unit, after the other units are done.
    """
    worked = Worked(rank.name, socket.gethostname(), rank.index, rank.count, os.getpid(), time.time())
    with stop_signals(signal.SIGUSR1) as stopping:
        found = open_job(out, observer.note)
        if found is None:
            return worked
        with (
            equipped(found, options, observer) as bench,
            Worker(found, bench, worked, stopping, observer) as worker,
        ):
            worker.run(order_for(found.units, rank.index, rank.count), wait=wait)
    return worked


@dataclass(frozen=True)
class Bench:
    """What a worker works with."""

    equipment: Equipment
    meter: Meter


@contextmanager
def equipped(found: Prepared, options: Options, observer: Observer) -> Iterator[Bench]:
    """Device, sizes and compiled programs for the units that are left."""
    plan = found.plan
    device = choose_device(options.device)
    if plan.draws_in_turn and device.type != "cpu":
        raise UserError("--rng mergekit: numbers are drawn in mergekit's order on the CPU only; add --device cpu.")
    with refusals():
        schedule = schedule_for(plan, options)
        pending = _tensors_left(found)
        compiling = consider(pending, schedule, options.compile, on_gpu=device.type == "cuda")
        seconds = estimate_seconds(plan, pending, schedule, compiling.seconds)
        observer.planned(plan, schedule, len(plan.tensors) - len(pending), seconds)
        compiling.build(observer.note)
        touch = options.max_memory is not None
        equipment = Equipment(schedule, device, compiling.cache, options.max_gpu_memory, touch)
        with Meter() as meter:
            yield Bench(equipment, meter)


def _tensors_left(found: Prepared) -> list[TensorPlan]:
    return [tensor for unit in found.units if not found.ledger.is_done(unit.number) for tensor in unit.tensors]


class Worker:
    """Makes units. From entering to leaving it tells of itself in the ledger."""

    def __init__(self, found: Prepared, bench: Bench, worked: Worked, stopping: Callable[[], bool],
                 observer: Observer) -> None:  # fmt: skip
        self._out, self._plan, self._units, self._ledger = found.out, found.plan, found.units, found.ledger
        self._bench, self._stopping, self._observer = bench, stopping, observer
        self.worked = worked
        self._heart = Heart(found.job.stale_seconds / BEATS, self.tell)

    def __enter__(self) -> Worker:
        self._heart.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._heart.__exit__(kind, error, trace)
        self.worked.state = "finished" if error is None else "stopped" if isinstance(error, Stopped) else "failed"
        self.tell()

    def run(self, order: Sequence[Unit], *, wait: bool) -> None:
        """Make every unit of `order` that nobody has made or makes."""
        errors: list[StreamMergeError] = []
        try:
            while not self._ledger.is_gone():
                unit = self._next(order)
                if unit is not None:
                    try:
                        self.make(*unit)
                    except (Stopped, DoesNotFit, OutputError):
                        raise
                    except StreamMergeError as error:
                        if _is_passing(error):
                            raise
                        errors.append(error)
                elif wait and self._others_work():
                    self._pause()
                else:
                    break
        except FileNotFoundError:
            if not self._is_over():
                raise
        if errors:
            raise errors[0]

    def make(self, unit: Unit, claim: Claim) -> bool:
        """Make one unit that is claimed; whether it counts, or another attempt was first.

        Raises Stopped, DoesNotFit and what this machine could not read with the unit given back, and any error of the
        unit itself after writing it down.
        """
        attempt = f"{unit.shard}.{self.worked.worker}.{os.getpid()}.{time.time_ns()}"
        path = self._ledger.attempt_path(attempt)
        self.worked.state, self.worked.unit = "merging", unit.shard
        self.tell()
        try:
            with self._heart.holding(claim):
                return self._attempt(unit, attempt, path)
        except (Stopped, DoesNotFit):
            raise
        except StreamMergeError as error:
            if self._is_over():
                return False
            if not isinstance(error, OutputError) and not _is_passing(error):
                text = f"{type(error).__name__}: {error}"
                self._ledger.fail(Failed(unit.number, text, error.exit_code, self.worked.worker))
                self.worked.failures.append(f"{unit.shard}: {text}")
            raise
        finally:
            partial_path(path).unlink(missing_ok=True)
            # One that counts and has not got its name yet is left to whoever finds it.
            if not self._ledger.is_done(unit.number):
                path.unlink(missing_ok=True)
            self.worked.unit = ""
            self.tell()

    def claim(self, unit: Unit, *, steal: bool = False) -> Claim | None:
        """The claim of a unit that is still to be made; None if it is not, or somebody makes it."""
        if self._ledger.is_done(unit.number):
            return None
        claim = self._ledger.claims.take(f"{unit.number:05d}", self.worked.worker, steal=steal)
        if claim is not None and self._ledger.is_done(unit.number):
            claim.release()
            return None
        return claim

    def tell(self) -> None:
        """Write down what we do. That the folder is gone, or full, is no reason to stop working."""
        self.worked.seconds = time.time() - self.worked.began
        self.worked.peak_bytes = usage().peak_resident
        self.worked.peak_own_bytes = self._bench.meter.peak_own
        with contextlib.suppress(OSError):
            self._ledger.note_worker(f"{self.worked.worker}.{os.getpid()}", asdict(self.worked))

    def _next(self, order: Sequence[Unit]) -> tuple[Unit, Claim] | None:
        failed = self._ledger.failed()
        for unit in order:
            if self._stopping():
                raise Stopped("stopped")
            if unit.number not in failed and (claim := self.claim(unit)) is not None:
                return unit, claim
        return None

    def _attempt(self, unit: Unit, attempt: str, path: Path) -> bool:
        began = time.perf_counter()
        shard = self._plan.shards[unit.number]
        notes = _Notes()

        def open_attempt(number: int) -> Shard:
            assert number == unit.number
            return Shard(path, shard.header, shard.nbytes)

        with _SharedBook(self._ledger, self._plan, self.worked.worker, self._heart, self._stopping) as book:
            walked = walk(self._plan, unit.tensors, self._bench.equipment, notes, open_attempt, book,
                          self._bench.meter, self._stopping, self._observer.running)  # fmt: skip
        self.worked.read_bytes += walked.read_bytes
        self.worked.written_bytes += walked.written_bytes
        tensors = tuple(notes.done[name] for tensor in unit.tensors for name in tensor.names)
        seconds = time.perf_counter() - began
        committed = Committed(unit.number, attempt, self.worked.worker, round(seconds, 3), walked.read_bytes,
                              walked.written_bytes, tensors)  # fmt: skip
        won = self._ledger.commit(committed, self._out / unit.shard)
        self.worked.units += won
        self.worked.lost += not won
        self.worked.moved_bytes += unit.moved_bytes * won
        return won

    def _others_work(self) -> bool:
        """Whether units are left that may still come to us: claimed, and neither done nor failed."""
        failed = self._ledger.failed()
        return any(unit.number not in failed and not self._ledger.is_done(unit.number) for unit in self._units)

    def _pause(self) -> None:
        self.worked.state = "waiting"
        for _ in range(10):
            if self._stopping():
                raise Stopped("stopped")
            time.sleep(_POLL_SECONDS / 10)

    def _is_over(self) -> bool:
        """Whether somebody has completed the whole run meanwhile."""
        return manifest_digest(self._out) == self._plan.digest


def _is_passing(error: BaseException | None) -> bool:
    """Whether an error comes from the system, which may be well elsewhere or later, and not from what was read."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__
    return error is not None


class _Notes:
    """Finished tensors of one attempt, kept in memory: they count with the whole unit only."""

    def __init__(self) -> None:
        self.done: dict[str, Done] = {}

    def append(self, tensors: Sequence[Done]) -> None:
        self.done |= {done.tensor: done for done in tensors}


class _SharedBook(SurveyBook):
    """What surveys found, for all workers: one looks at a group, the others wait for what it finds."""

    def __init__(self, ledger: Ledger, plan: Plan, worker: str, heart: Heart, stopping: Callable[[], bool]) -> None:
        super().__init__(ledger.folder, plan.digest)
        self._ledger, self._worker, self._heart, self._stopping = ledger, worker, heart, stopping
        self._held: dict[str, ExitStack] = {}

    def __enter__(self) -> _SharedBook:
        return self

    def __exit__(self, *_: object) -> None:
        """Give back what we were to look at and have not found."""
        for stack in self._held.values():
            stack.close()

    def get(self, key: str) -> Any:
        """What was found in a group; None if it is ours to look at it now."""
        path = self.path(key)
        assert path is not None
        while (found := super().get(key)) is None:
            claim = self._ledger.claims.take(path.stem, self._worker)
            if claim is not None:
                stack = self._held[key] = ExitStack()
                stack.enter_context(self._heart.holding(claim))
                # Between our look and our claim another may have put it there.
                if (found := super().get(key)) is not None:
                    self._held.pop(key).close()
                return found
            if self._stopping():
                raise Stopped("stopped")
            time.sleep(_POLL_SECONDS / 4)
        return found

    def put(self, key: str, found: list[Any]) -> None:
        """Keep it for all. Returns when it is on disk."""
        super().put(key, found)
        self._held.pop(key).close()

    def keep(self, path: Path, content: bytes) -> None:
        self._ledger.replace(path, content, self._worker)
