"""Slurm: job scripts, submitting them, and being started again.

A run is an array of workers, and a finaliser that runs after them whatever became of them (afterany). The finaliser is
the guarantee: it completes the output, or sends what is missing again, until two rounds made no progress. So a worker
that is killed needs nobody; one that Slurm asks to stop while it should go on puts itself back into the queue.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from streammerge.base.errors import OutputError, UserError
from streammerge.base.fields import made_of
from streammerge.cluster.job import folder_of
from streammerge.storage.sink import translate, write_file

# A worker that was put back so often is left to the finaliser.
_MOST_RESTARTS = 20
_VAIN_ROUNDS = 2
_SIGNAL_SECONDS = 60
_ANSWER_SECONDS = 60
_OURS = re.compile(r"(--(array|dependency|signal)\b|-[ad])")
_JOB = re.compile(r"\s*(\d+)(;.*)?\s*")


@dataclass(frozen=True)
class Submission:
    """How a run is sent to Slurm. `work` are flags of `streammerge work`; `sbatch` are options for sbatch."""

    out: str
    directory: str
    workers: int
    work: tuple[str, ...]
    partition: str | None = None
    time: str | None = None
    cpus: int | None = None
    memory_mb: int | None = None
    sbatch: tuple[str, ...] = ()
    # The ids of the array and of its finaliser, in every round; and how many units were done when a round began.
    rounds: tuple[tuple[str, str, int], ...] = ()

    @property
    def logs(self) -> Path:
        """Beside OUT: what is in it goes when it is complete."""
        out = Path(self.out)
        return out.with_name(f"{out.name}.logs")


def job_script(submission: Submission, workers: int) -> str:
    """The script of the array: its process becomes the worker."""
    lines = [
        *_head(submission, "merge", "%A_%a"),
        f"#SBATCH --array=0-{workers - 1}",
        f"#SBATCH --signal=B:USR1@{_SIGNAL_SECONDS}",
        *([f"#SBATCH --cpus-per-task={submission.cpus}"] if submission.cpus else []),
        *([f"#SBATCH --mem={submission.memory_mb}M"] if submission.memory_mb else []),
    ]
    # In a second round what is missing may be claimed by workers that are dead: it waits until that shows.
    command = [*_command(), "work", submission.out, *submission.work, *(["--wait"] if submission.rounds else [])]
    return "\n".join([*lines, "", f"exec {shlex.join(command)}", ""])


def finaliser_script(submission: Submission) -> str:
    """The script of the finaliser."""
    command = [*_command(), "finalize", submission.out, "--resubmit"]
    return "\n".join([*_head(submission, "finish", "finish_%j"), "", f"exec {shlex.join(command)}", ""])


def submit(submission: Submission, units_done: int, units_left: int) -> Submission:
    """Send an array of as many workers as there are units left, at most, and its finaliser.

    Raises UserError with Slurm's own words when it takes them not; then neither is queued.
    """
    try:
        submission.logs.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise translate(submission.logs, error) from error
    workers = max(1, min(submission.workers, units_left))
    array = _sbatch(job_script(submission, workers), ())
    try:
        finaliser = _sbatch(finaliser_script(submission), (f"--dependency=afterany:{array}",))
    except UserError:
        cancel([array])
        raise
    sent = replace(submission, rounds=(*submission.rounds, (array, finaliser, units_done)))
    write_file(_record(Path(submission.out)), json.dumps(asdict(sent), indent=1).encode())
    return sent


def resubmit(out: Path, units_done: int, units_left: int) -> Submission | None:
    """Send what is missing again; None when two rounds have made no progress, or OUT was not sent by `submit`.

    One may be cut off by whoever cancels its tasks.
    """
    submission = read_submission(out)
    if submission is None or len([1 for _, _, before in submission.rounds if before >= units_done]) >= _VAIN_ROUNDS:
        return None
    return submit(submission, units_done, units_left)


def read_submission(out: Path) -> Submission | None:
    """How the run in OUT was sent, or None. Raises OutputError when that is damaged."""
    path = _record(out)
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text())
        tuples: dict[str, Any] = {key: tuple(map(str, content[key])) for key in ("work", "sbatch")}
        tuples["rounds"] = tuple((str(array), str(last), int(done)) for array, last, done in content["rounds"])
        submission = made_of(Submission, content | tuples)
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        submission = None
    if submission is None:
        raise OutputError(f"{path}: is damaged. Submit the same recipe again.")
    return submission


def task_to_requeue(environment: Mapping[str, str] | None = None) -> str | None:
    """The array task that this process is, if Slurm would let it go on; else None.

    Only while it is RUNNING: COMPLETING says that it is cancelled, requeued or preempted already, and a cancelled one
    that comes back is a nuisance. SLURM_JOB_ID would name the whole array for one of its tasks.
    """
    environment = os.environ if environment is None else environment
    array, task = environment.get("SLURM_ARRAY_JOB_ID"), environment.get("SLURM_ARRAY_TASK_ID")
    restarts = environment.get("SLURM_RESTART_COUNT", "0")
    if not array or not task or not restarts.isdigit() or int(restarts) >= _MOST_RESTARTS:
        return None
    job = f"{array}_{task}"
    state = _ask(["squeue", "-h", "-j", job, "-o", "%T"])
    return job if state is not None and state.strip() == "RUNNING" else None


def requeue(job: str) -> bool:
    """Put an array task back into the queue, which ends the processes it has; whether it was done."""
    return _ask(["scontrol", "requeue", job]) is not None


def cancel(jobs: Sequence[str]) -> None:
    """Cancel jobs that we have sent. That they are gone already is no error."""
    _ask(["scancel", *jobs])


def _head(submission: Submission, what: str, log: str) -> list[str]:
    """The lines that array and finaliser share."""
    name = Path(submission.out).name
    options = [
        f"--job-name=streammerge-{what}-{name}",
        f"--output={str(submission.logs).replace('%', '%%')}/{log}.log",
        "--open-mode=append",
        "--requeue",
        f"--chdir={submission.directory}",
        *([f"--partition={submission.partition}"] if submission.partition else []),
        *([f"--time={submission.time}"] if submission.time else []),
        *submission.sbatch,
    ]
    for option in options:
        if "\n" in option:
            raise UserError(f"{option!r}: a line break cannot be in an option of sbatch.")
    for option in submission.sbatch:
        # They would reach the finaliser, too: as an array it would send an array for each of its tasks.
        if _OURS.match(option):
            raise UserError(f"--sbatch {option}: that is set by submit; --workers says how many tasks there are.")
    return ["#!/bin/bash", *(f"#SBATCH {_quoted(option)}" for option in options)]


def _quoted(option: str) -> str:
    """An option as sbatch reads it from a script: in quotes where a letter would mean something."""
    if not re.search(r"""[\s#"'\\]""", option):
        return option
    return '"' + re.sub(r'(["\\])', r"\\\1", option) + '"'


def _command() -> list[str]:
    return [sys.executable, "-m", "streammerge"]


def _record(out: Path) -> Path:
    return folder_of(out) / "submission.json"


def _sbatch(script: str, flags: Sequence[str]) -> str:
    """Send a script; returns the id of its job."""
    command = ["sbatch", "--parsable", *flags]
    try:
        done = subprocess.run(command, input=script, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise UserError(
            "sbatch is not here: submit from a machine where Slurm's commands are, or start `streammerge work OUT` by "
            "another scheduler."
        ) from None
    if done.returncode != 0 or (job := _JOB.fullmatch(done.stdout)) is None:
        words = " ".join((done.stderr or done.stdout).split())
        raise UserError(f"Slurm did not take the job: {words}")
    return job[1]


def _ask(command: Sequence[str]) -> str | None:
    """What a command of Slurm prints; None when it fails or is not there."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_ANSWER_SECONDS)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
