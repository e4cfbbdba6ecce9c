"""A cluster run in text and JSON. Computes nothing and prints nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from streammerge.base.units import format_seconds, format_size
from streammerge.cluster.finalizer import Finalized
from streammerge.cluster.slurm import Submission
from streammerge.cluster.status import Progress
from streammerge.cluster.worker import Worked

Rows = list[tuple[str, str]]
_HEADING = ["worker", "host", "state", "shards", "twice", "read", "written", "seconds", "peak memory"]


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
    for worker in progress.workers:
        facts = worker.facts
        seconds = max(1e-3, float(facts["seconds"]))
        state = facts["state"] if worker.alive or facts["state"] in {"finished", "stopped", "failed"} else "silent"
        rows.append([
            facts["worker"], facts["host"], state, facts["unit"], str(facts["units"]),
            f"{format_size(int(facts['moved_bytes'] / seconds))}/s", format_size(facts["peak_bytes"]),
            f"{format_seconds(max(0.0, worker.age))} ago",
        ])  # fmt: skip
    return rows


def progress_json(progress: Progress) -> dict[str, Any]:
    """All of it."""
    return asdict(progress) | {"out": str(progress.out), "seconds_left": progress.seconds_left}


def workers_table(workers: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """What every worker has done, and all of them together."""
    rows = [_HEADING]
    for facts in workers:
        rows.append([
            facts["worker"], facts["host"], facts["state"], str(facts["units"]), str(facts["lost"]),
            format_size(facts["read_bytes"]), format_size(facts["written_bytes"]), f"{facts['seconds']:.1f}",
            format_size(facts["peak_bytes"]),
        ])  # fmt: skip
    numbers = ("units", "lost", "read_bytes", "written_bytes", "seconds")
    total = {key: sum(facts[key] for facts in workers) for key in numbers}
    rows.append([
        "all", str(len({facts["host"] for facts in workers})), "", str(total["units"]), str(total["lost"]),
        format_size(total["read_bytes"]), format_size(total["written_bytes"]), f"{total['seconds']:.1f}",
        format_size(max((facts["peak_bytes"] for facts in workers), default=0)),
    ])  # fmt: skip
    return rows


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
            "workers": [dict(facts) for facts in finalized.workers]}  # fmt: skip
