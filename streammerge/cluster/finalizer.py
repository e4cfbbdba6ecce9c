"""Completing a cluster run: every unit done and under its name, then side files, manifest and index."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from streammerge.base.errors import OutputError, Stopped, StreamMergeError, error_of
from streammerge.cluster.job import Prepared
from streammerge.cluster.worker import Worked, worked_by
from streammerge.run.manifest import read_manifest
from streammerge.run.merge import Report, count_nonfinite, file_names, publish_rest, verify_output
from streammerge.run.output import begins_with, claim, manifest_digest
from streammerge.run.profile import NOTHING_DONE
from streammerge.run.sidefiles import side_files

_SHOWN = 5


@dataclass(frozen=True)
class Finalized:
    """A complete run: its units, what each worker said last, and all of it as the report of one merge.

    Where OUT was complete before, there are no units.
    """

    units: int
    workers: tuple[Worked, ...]
    report: Report


def missing_units(found: Prepared) -> list[int]:
    """The units that are not done."""
    done = found.ledger.done()
    return [unit.number for unit in found.units if unit.number not in done]


def failure_of(found: Prepared) -> StreamMergeError | None:
    """What failed for good, as one error, or None."""
    failed = [each for each in found.ledger.failed().values() if each.unit < len(found.units)]
    if not failed:
        return None
    listed = "\n".join(f"  {found.plan.shards[each.unit].name}: {each.error}" for each in failed[:_SHOWN])
    more = f"\n  and {len(failed) - _SHOWN} more" if len(failed) > _SHOWN else ""
    return error_of(failed[0].exit_code)(
        f"{found.out}: {len(failed)} of {len(found.units)} shards failed:\n{listed}{more}\n"
        "When that is mended, submit the same recipe again: what is done stays done."
    )


def finished_result(out: Path, *, check: bool) -> Finalized:
    """What was complete before. Raises VerificationFailed if asked to look and it is not what was written."""
    if check:
        verify_output(out)
    tensors = len(read_manifest(out)["tensors"])
    report = Report(out, manifest_digest(out) or "", True, tensors, tensors, 0, 0, 0, 0, NOTHING_DONE, {})
    return Finalized(0, (), report)


def complete(found: Prepared, *, check: bool = False) -> Finalized:
    """Complete a run. With `check`, all of it is read again from the disk afterwards.

    Raises Stopped while units are missing, the error of those that failed, and OutputError.
    """
    plan, out, ledger = found.plan, found.out, found.ledger
    missing = missing_units(found)
    if missing and (failure := failure_of(found)) is not None:
        raise failure
    if missing:
        raise Stopped(
            f"{out}: {len(missing)} of {len(found.units)} shards are still to be made. `streammerge status {out}` says "
            f"who works on them, `streammerge work {out}` makes them."
        )
    with claim(out, plan, file_names(plan, side_files(plan)), restart=False, joins=True):
        done = ledger.done()
        for unit in found.units:
            ledger.settle(done[unit.number], out / unit.shard)
            shard = plan.shards[unit.number]
            if not begins_with(out / shard.name, shard.header, shard.nbytes):
                raise OutputError(
                    f"{out / shard.name}: is not what was written there: its size or its header differs. Remove it and "
                    f"{ledger.folder / 'done'}/{unit.number:05d}, and submit the merge again."
                )
        workers = tuple(worked for worked, _ in worked_by(ledger))
        tensors = {each.tensor: each for unit in done.values() for each in unit.tensors}
        publish_rest(plan, out, tensors)
    if check:
        verify_output(out)
    report = Report(
        out=out,
        digest=plan.digest,
        already_finished=False,
        tensors=len(plan.tensors),
        resumed=0,
        read_bytes=sum(each.read_bytes for each in done.values()),
        written_bytes=sum(each.written_bytes for each in done.values()),
        peak_bytes=max((worked.peak_bytes for worked in workers), default=0),
        peak_own_bytes=max((worked.peak_own_bytes for worked in workers), default=0),
        profile=NOTHING_DONE,
        nonfinite=count_nonfinite(tensors),
    )
    return Finalized(len(found.units), workers, report)
