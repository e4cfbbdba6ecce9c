"""How far a cluster run is, from its ledger alone: no plan is made, no tensor is read."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from streammerge.base.errors import OutputError
from streammerge.cluster.job import folder_of, ledger_of, read_job
from streammerge.cluster.ledger import Failed
from streammerge.cluster.worker import ENDED, Worked, worked_by
from streammerge.run.claims import Claimed
from streammerge.run.output import finished_digest


@dataclass(frozen=True)
class WorkerStatus:
    """What a worker said last, how many seconds ago, and whether it can still be alive."""

    worked: Worked
    age: float
    alive: bool

    @property
    def rate(self) -> float:
        """Bytes per second of what it has finished."""
        return self.worked.moved_bytes / max(1e-3, self.worked.seconds)


@dataclass(frozen=True)
class Progress:
    """Units of a run and what was moved for them. `rate` is bytes per second of the workers that are at it now."""

    out: Path
    finished: bool
    units: int
    done: int
    failed: tuple[Failed, ...]
    claims: tuple[Claimed, ...]
    total_bytes: int
    moved_bytes: int
    rate: float
    workers: tuple[WorkerStatus, ...]

    @property
    def seconds_left(self) -> float | None:
        """At the rate of now; None where nobody is at it."""
        return (self.total_bytes - self.moved_bytes) / self.rate if self.rate > 0 else None


def progress_of(out: Path) -> Progress:
    """How far the run in OUT is. Raises OutputError where there is none."""
    folder = folder_of(out)
    if not folder.is_dir():
        if finished_digest(out) is not None:
            return Progress(out, True, 0, 0, (), (), 0, 0, 0.0, ())
        raise OutputError(f"{out}: no cluster run is there. `streammerge submit RECIPE {out}` begins one.")
    job = read_job(folder / "job.json")
    ledger = ledger_of(out, job)
    done = ledger.done()
    workers = []
    for worked, age in worked_by(ledger):
        alive = worked.state not in ENDED and age < job.stale_seconds
        workers.append(WorkerStatus(worked, age, alive))
    sizes = _sizes(out)
    return Progress(
        out=out,
        finished=False,
        units=len(sizes),
        done=len(done),
        failed=tuple(ledger.failed().values()),
        claims=tuple(claim for claim in ledger.claims.all() if claim.name.isdigit()),
        total_bytes=sum(sizes.values()),
        moved_bytes=sum(sizes.get(unit, 0) for unit in done),
        rate=sum(worker.rate for worker in workers if worker.alive),
        workers=tuple(workers),
    )


def _sizes(out: Path) -> dict[int, int]:
    """Bytes to read and write of every unit, as written down with the job."""
    path = folder_of(out) / "units.json"
    try:
        content = json.loads(path.read_text())
        return {int(number): int(size) for number, size in content.items()}
    except (OSError, ValueError, AttributeError, TypeError, RecursionError, OverflowError):
        raise OutputError(f"{path}: is damaged. Submit the same recipe again.") from None
