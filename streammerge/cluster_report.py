"""A cluster run in text and JSON. Computes nothing and prints nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from streammerge.base.units import format_seconds, format_size
from streammerge.cluster.finalizer import Finalized
from streammerge.cluster.slurm import Submission
from streammerge.cluster.status import Progress
from streammerge.cluster.worker import ENDED, Worked

Rows = list[tuple[str, str]]
_HEADING = ["worker", "host", "state", "shards", "read", "written", "time", "memory"]


def submission_rows(submission: Submission) -> Rows:
    """What was sent to Slurm, and how to go on."""
    array, finaliser, _ = submission.rounds[-1]
    return [
        ("workers", f"job {array}, then job {finaliser}, which completes the output or sends what is missing again"),
        ("logs", str(submission.logs)),
        ("watch", f"streammerge status {submission.out} --watch"),
        ("cancel", f"scancel {finaliser} {array}"),
    ]


def worked_rows(worked: Worked) -> Rows:
    """What this worker has done."""
    if worked.state == "starting":
        return [("finished", "the output is complete; there was nothing to do")]
    again = f"; {worked.lost} that another worker had made first" if worked.lost else ""
    return [
        ("worker", f"{worked.worker} ({worked.index} of {worked.count})"),
        ("shards", f"{worked.units}{again}"),
        ("read", format_size(worked.read_bytes)),
        ("written", format_size(worked.written_bytes)),
        ("peak memory", format_size(worked.peak_bytes)),
        ("time", format_seconds(worked.seconds)),
    ]


def progress_rows(progress: Progress) -> Rows:
    """How far a run is."""
    if progress.finished:
        return [("finished", f"{progress.out} is complete")]
    share = progress.moved_bytes / max(1, progress.total_bytes)
    working = len(progress.claims)
    left = progress.units - progress.done - len(progress.failed) - working
    moved = f"{format_size(progress.moved_bytes)} of {format_size(progress.total_bytes)}"
    rows = [
        ("shards", f"{progress.done} of {progress.units} done, {working} in work, {left} waiting"),
        ("bytes", f"{moved} read and written, {share:.0%}"),
    ]
    if progress.rate:
        rows.append(("rate", f"{format_size(int(progress.rate))}/s"))
    if progress.seconds_left is not None and progress.done < progress.units:
        rows.append(("left", f"about {format_seconds(progress.seconds_left)}"))
    if progress.done == progress.units:
        rows.append(("left", f"streammerge finalize {progress.out}"))
    rows += [("failed", failed.error) for failed in progress.failed]
    return rows


def progress_table(progress: Progress) -> list[list[str]]:
    """Who works where."""
    rows = [["worker", "host", "state", "at", "shards", "rate", "peak memory", "heard of"]]
    for each in progress.workers:
        worked = each.worked
        rows.append([
            worked.worker, worked.host, worked.state if each.alive or worked.state in ENDED else "silent", worked.unit,
            str(worked.units), f"{format_size(int(each.rate))}/s", format_size(worked.peak_bytes),
            f"{format_seconds(max(0.0, each.age))} ago",
        ])  # fmt: skip
    return rows


def progress_json(progress: Progress) -> dict[str, Any]:
    """All of it."""
    return asdict(progress) | {"out": str(progress.out), "seconds_left": progress.seconds_left}


def workers_table(workers: Sequence[Worked]) -> list[list[str]]:
    """What every worker has done, and all of them together."""

    def row(name: str, host: str, state: str, of: Sequence[Worked]) -> list[str]:
        twice = sum(each.lost for each in of)
        return [
            name, host, state, f"{sum(each.units for each in of)}{f', {twice} twice' if twice else ''}",
            format_size(sum(each.read_bytes for each in of)), format_size(sum(each.written_bytes for each in of)),
            format_seconds(sum(each.seconds for each in of)),
            format_size(max((each.peak_bytes for each in of), default=0)),
        ]  # fmt: skip

    rows = [row(each.worker, each.host, each.state, [each]) for each in workers]
    return [_HEADING, *rows, row("all", str(len({each.host for each in workers})), "", workers)]


def finalized_rows(finalized: Finalized) -> Rows:
    """A complete run."""
    if finalized.report.already_finished:
        return [("finished", f"{finalized.report.out} is complete; nothing was done")]
    report = finalized.report
    return [
        ("output", str(report.out)),
        ("shards", f"{finalized.units}"),
        ("tensors", f"{report.tensors:,}"),
        ("read", format_size(report.read_bytes)),
        ("written", format_size(report.written_bytes)),
        ("most memory", f"{format_size(report.peak_bytes)} of one worker"),
    ]


def finalized_json(finalized: Finalized) -> dict[str, Any]:
    """All of it."""
    return {"out": str(finalized.report.out), "digest": finalized.report.digest, "units": finalized.units,
            "already_finished": finalized.report.already_finished,
            "workers": [asdict(worked) for worked in finalized.workers]}  # fmt: skip
