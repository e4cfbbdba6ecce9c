"""The verbs of cluster runs: submit, work, status, finalize."""

from __future__ import annotations

import shlex
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from streammerge.base.errors import Stopped, UserError
from streammerge.command import (
    Compile,
    Device,
    Json,
    MaxGpuMemory,
    MaxMemory,
    OutPath,
    Quiet,
    Random,
    RecipePath,
    Restart,
    Seed,
    ShardSize,
    Strict,
    Threads,
    VerifyOutput,
    Watcher,
    make_options,
    open_terminal,
)

if TYPE_CHECKING:
    from streammerge.cluster.job import Prepared
    from streammerge.ui import Terminal

_WATCH_SECONDS = 2.0


def submit(
    recipe: RecipePath,
    out: OutPath,
    workers: Annotated[int, typer.Option(min=1, metavar="N", help="Tasks of the job array.")] = 1,
    partition: Annotated[str | None, typer.Option(metavar="NAME", help="Slurm's partition.")] = None,
    time_: Annotated[
        str | None, typer.Option("--time", metavar="LIMIT", help="Time limit of a task, like 2:00:00.")
    ] = None,
    sbatch: Annotated[
        str | None, typer.Option(metavar="OPTIONS", help="More options for sbatch: '--account=lab --gres=gpu:1'.")
    ] = None,
    stale_after: Annotated[
        float, typer.Option(metavar="SECONDS", min=1, help="A worker not heard of for so long counts as dead.")
    ] = 180,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Plan, and print the job scripts; send nothing.")] = False,
    plan_only: Annotated[
        bool, typer.Option("--plan-only", help="Write the job into OUT and send nothing: for any other scheduler.")
    ] = False,
    max_memory: MaxMemory = None,
    max_gpu_memory: MaxGpuMemory = None,
    device: Device = "auto",
    out_shard_size: ShardSize = "5GB",
    threads: Threads = None,
    compile_: Compile = "auto",
    seed: Seed = 0,
    rng: Random = "position",
    restart: Restart = False,
    strict: Strict = False,
    as_json: Json = False,
) -> None:
    """Merge RECIPE into OUT as a Slurm job array: plans, writes the job into OUT, sends workers and a finaliser.

    Memory and threads are those of each worker. A shard is the unit of work: for more workers than shards give a
    smaller --out-shard-size. Send it again to go on after a failure.
    """
    with open_terminal(as_json=as_json) as terminal:
        options = make_options(
            max_memory, max_gpu_memory, device, out_shard_size, threads, compile_, seed, restart, strict
        )
        options = replace(options, rng=rng)
        from streammerge import cluster_report
        from streammerge.cluster import slurm
        from streammerge.cluster.finalizer import missing_units
        from streammerge.cluster.job import prepare
        from streammerge.run.merge import make_plan

        flags = {
            "--max-memory": max_memory, "--max-gpu-memory": max_gpu_memory, "--threads": threads, "--device": device,
            "--compile": compile_,
        }  # fmt: skip
        submission = slurm.Submission(
            out=str(out.absolute()),
            directory=str(Path.cwd()),
            workers=workers,
            work=tuple(f"{flag}={value}" for flag, value in flags.items() if value not in (None, "auto")),
            partition=partition,
            time=time_,
            cpus=threads,
            memory_mb=None if options.max_memory is None else -(-options.max_memory // 2**20),
            sbatch=_split(sbatch),
        )
        if dry_run:
            shards = len(make_plan(recipe, options, terminal.note).shards)
            terminal.lines(slurm.job_script(submission, min(workers, shards)).splitlines())
            terminal.lines(["", *slurm.finaliser_script(submission).splitlines()])
            return
        found = prepare(recipe, out, options, terminal.note, stale_seconds=stale_after)
        if found is None:
            terminal.rows("submit", [("finished", f"{out} holds this very merge already; nothing was sent")])
            terminal.event("done", {"out": str(out), "already_finished": True})
            return
        left = len(missing_units(found))
        to_make = ("shards", f"{left} of {len(found.units)} to make")
        if plan_only:
            terminal.rows("submit", [to_make, ("workers", f"streammerge work {out}"),
                                     ("at the end", f"streammerge finalize {out}")])  # fmt: skip
            terminal.event("planned", {"out": str(out), "units": len(found.units), "left": left})
            return
        if workers > left > 0:
            terminal.note(f"shards to make: {left}. So many workers are sent; a smaller --out-shard-size is for more.")
        sent = slurm.submit(submission, len(found.units) - left, left)
        terminal.rows("submit", [to_make, *cluster_report.submission_rows(sent)])
        terminal.event("submitted", {"out": str(out), "array": sent.rounds[-1][0], "finaliser": sent.rounds[-1][1]})


def work(
    out: OutPath,
    index: Annotated[int | None, typer.Option(metavar="I", help="Which worker this is, from 0.")] = None,
    count: Annotated[int | None, typer.Option(metavar="N", help="How many workers there are.")] = None,
    wait: Annotated[
        bool, typer.Option("--wait", help="Stay until all is done, to take over from workers that die.")
    ] = False,
    max_memory: MaxMemory = None,
    max_gpu_memory: MaxGpuMemory = None,
    device: Device = "auto",
    threads: Threads = None,
    compile_: Compile = "auto",
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Make shards of the cluster run in OUT. Any scheduler may start any number of these, at any time.

    Which worker of how many it is only decides with which shard it begins.
    """
    with open_terminal(quiet=quiet, as_json=as_json) as terminal:
        options = make_options(max_memory, max_gpu_memory, device, "5GB", threads, compile_, 0, False, False)
        from streammerge import cluster_report
        from streammerge.cluster.rank import find_rank
        from streammerge.cluster.slurm import requeue, task_to_requeue
        from streammerge.cluster.worker import work as run_work

        rank = find_rank(index, count)
        try:
            done = run_work(out, options, rank, Watcher(terminal), wait=wait)
        except Stopped as error:
            # Said at every step: the next signal ends this process, and Slurm may be quicker than its last words.
            terminal.note(f"{str(error).split(':')[0]}.")
            left = "Any worker goes on with what is left."
            if (job := task_to_requeue()) is None:
                raise Stopped(left) from None
            terminal.note("Slurm is asked to start this worker again.")
            raise Stopped("Slurm starts this worker again." if requeue(job) else f"Slurm refuses. {left}") from None
        terminal.rows("work", cluster_report.worked_rows(done))
        terminal.event("done", vars(done))


def status(
    out: OutPath,
    watch: Annotated[bool, typer.Option("--watch", help="Look again every two seconds until it is complete.")] = False,
    as_json: Json = False,
) -> None:
    """Show how far the cluster run in OUT is: shards, rate, time left, and who works where."""
    with open_terminal(as_json=as_json) as terminal:
        from streammerge import cluster_report
        from streammerge.cluster.status import progress_of

        progress = progress_of(out)
        if not watch:
            terminal.event("status", cluster_report.progress_json(progress))
            terminal.rows("status", cluster_report.progress_rows(progress))
            if progress.workers:
                terminal.table("workers", cluster_report.progress_table(progress))
            return
        with terminal.live() as show:
            while True:
                table = cluster_report.progress_table(progress) if progress.workers else []
                show(cluster_report.progress_rows(progress), table)
                terminal.event("status", cluster_report.progress_json(progress))
                if progress.finished:
                    return
                time.sleep(_WATCH_SECONDS)
                progress = progress_of(out)


def finalize(
    out: OutPath,
    resubmit: Annotated[
        bool, typer.Option("--resubmit", help="Send what is missing to Slurm again, until two rounds made nothing.")
    ] = False,
    verify_output: VerifyOutput = False,
    as_json: Json = False,
) -> None:
    """Complete the cluster run in OUT once all shards are made: side files, manifest, index, and who did what."""
    with open_terminal(as_json=as_json) as terminal:
        from streammerge import cluster_report
        from streammerge.cluster.finalizer import complete, finished_result
        from streammerge.cluster.job import open_job

        found = open_job(out, terminal.note)
        if found is None:
            done = finished_result(out, check=verify_output)
        else:
            try:
                done = complete(found, check=verify_output)
            except Stopped:
                if not resubmit:
                    raise
                _resubmit(terminal, found)
                return
        terminal.rows("finalize", cluster_report.finalized_rows(done))
        if done.workers:
            terminal.table("workers", cluster_report.workers_table(done.workers))
        terminal.event("done", cluster_report.finalized_json(done))


VERBS = (submit, work, status, finalize)


def _resubmit(terminal: Terminal, found: Prepared) -> None:
    from streammerge import cluster_report
    from streammerge.cluster import slurm
    from streammerge.cluster.finalizer import missing_units

    missing = missing_units(found)
    names = ", ".join(found.plan.shards[number].name for number in missing[:5])
    sent = slurm.resubmit(found.out, len(found.units) - len(missing), len(missing))
    if sent is None:
        raise UserError(
            f"{found.out}: {len(missing)} shards are missing ({names}), and the last workers made none, so none are "
            "sent again. Their logs say why; when that is mended, submit the same recipe again."
        )
    terminal.rows("finalize", [("missing", f"{len(missing)} shards: {names}"), *cluster_report.submission_rows(sent)])
    terminal.event("submitted", {"out": str(found.out), "array": sent.rounds[-1][0], "finaliser": sent.rounds[-1][1]})


def _split(options: str | None) -> tuple[str, ...]:
    try:
        return tuple(shlex.split(options)) if options else ()
    except ValueError as error:
        raise UserError(f"--sbatch {options!r}: {error}.") from None
