"""The job of a cluster run, as it lies in OUT: all that a worker anywhere must know to make the same plan.

OUT/.streammerge/plan.json       facts and digest of the plan
OUT/.streammerge/cluster/        job.json, units.json, and the ledger in a folder named after the plan
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from streammerge.base.errors import OutputError, UserError
from streammerge.base.fields import made_of
from streammerge.cluster.ledger import FOLDERS, Ledger
from streammerge.cluster.units import Unit, units_of
from streammerge.plan.plan import Plan
from streammerge.plan.recipe import load_recipe, parse_recipe
from streammerge.run.claims import STALE_SECONDS
from streammerge.run.journal import WORK_FOLDER, Journal
from streammerge.run.merge import Options, check_disk, file_names, plan_recipe
from streammerge.run.output import (
    CLUSTER_FOLDER,
    begins_with,
    check_apart,
    check_record,
    claim,
    finished_digest,
    sweep,
    trust,
)
from streammerge.run.sidefiles import left_files, side_files
from streammerge.storage.sink import partial_path, write_file

_DIGEST = re.compile("[0-9a-f]{32}")


@dataclass(frozen=True)
class Job:
    """What was submitted. Only what decides the bytes of the result, and how workers know that others are gone."""

    recipe: str
    path: str
    directory: str
    seed: int
    rng: Literal["position", "mergekit"]
    shard_bytes: int
    strict: bool
    stale_seconds: float
    digest: str


@dataclass(frozen=True)
class Prepared:
    """A job with its plan and the ledger of its units."""

    out: Path
    job: Job
    plan: Plan
    units: list[Unit]
    ledger: Ledger


def folder_of(out: Path) -> Path:
    return out / WORK_FOLDER / CLUSTER_FOLDER


def prepare(
    recipe: Path, out: Path, options: Options, note: Callable[[str], None], *, stale_seconds: float = STALE_SECONDS
) -> Prepared | None:
    """Plan a merge into OUT and write its job there; None when OUT is its finished result.

    What a merge in one process has finished there counts. A worker that is not heard of for `stale_seconds` will be
    taken for dead. Raises what planning raises, and OutputError.
    """
    if load_recipe(recipe, strict=options.strict).is_analysed:
        raise UserError(
            f"{recipe}: its parameters are to be found first. Run `streammerge analyze {recipe} -o decided.yaml`, "
            "and submit decided.yaml."
        )
    job = Job(recipe.read_text(encoding="utf-8-sig"), str(recipe.resolve()), str(Path.cwd()), options.seed, options.rng,
              options.shard_bytes, options.strict, stale_seconds, "")  # fmt: skip
    plan = _plan(job, note)
    job = replace(job, digest=plan.digest)
    for warning in (*plan.warnings, *left_files(plan)):
        note(f"{recipe}: {warning}")
    check_apart(out, plan.checkpoints)
    out = out.absolute()
    if finished_digest(out) == plan.digest:
        sweep(out)
        return None
    check_disk(plan, out)
    files = file_names(plan, side_files(plan))
    with claim(out, plan, files, restart=options.restart, joins=True) as work:
        folder = folder_of(out)
        ledger = ledger_of(out, job)
        for name in FOLDERS:
            (ledger.folder / name).mkdir(parents=True, exist_ok=True)
        units = units_of(plan)
        sizes = {unit.number: unit.moved_bytes for unit in units}
        write_file(folder / "units.json", json.dumps(sizes).encode())
        _take_over(out, work, plan, units, ledger)
        write_file(folder / "job.json", json.dumps(asdict(job), indent=1).encode())
        ledger.forgive()
    return Prepared(out, job, plan, units, ledger)


def open_job(out: Path, note: Callable[[str], None]) -> Prepared | None:
    """The job in OUT, planned again here; None when OUT is finished.

    The process goes to the directory where the job was submitted, if it is there: models are named relative to that.
    Raises OutputError when there is none, or when what is planned here is another merge than what was submitted.
    """
    out = out.absolute()
    folder = folder_of(out)
    if not folder.is_dir():
        if finished_digest(out) is not None:
            sweep(out)
            return None
        raise OutputError(
            f"{out}: no cluster run is there to work on. `streammerge submit RECIPE {out}` begins one; if it was "
            "submitted elsewhere, this machine does not see that directory: it must be on a file system they share."
        )
    job = read_job(folder / "job.json")
    if Path(job.directory).is_dir():
        os.chdir(job.directory)
    plan = _plan(job, note)
    check_record(out, plan)
    return Prepared(out, job, plan, units_of(plan), ledger_of(out, job))


def _plan(job: Job, note: Callable[[str], None]) -> Plan:
    recipe = parse_recipe(job.recipe, Path(job.path), strict=job.strict)
    options = Options(seed=job.seed, rng=job.rng, shard_bytes=job.shard_bytes, strict=job.strict)
    return plan_recipe(recipe, options, note)


def read_job(path: Path) -> Job:
    """The job in a file. Raises OutputError."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise OutputError(f"{path}: cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError):
        content = None
    job = made_of(Job, content)
    if job is None or not _DIGEST.fullmatch(job.digest) or job.rng not in ("position", "mergekit"):
        raise OutputError(f"{path}: is damaged, or of another version. Submit the same recipe again.")
    return job


def ledger_of(out: Path, job: Job) -> Ledger:
    """The ledger of a job, in a folder of its plan: who sleeps through a --restart must not commit to what follows."""
    return Ledger(folder_of(out) / job.digest, stale_seconds=job.stale_seconds)


def _take_over(out: Path, work: Path, plan: Plan, units: list[Unit], ledger: Ledger) -> None:
    """Shards that a merge in one process has finished are done; what it has begun is begun again."""
    if not (work / "journal").exists():
        return
    journal = Journal(work / "journal")
    try:
        trust(out, plan, journal)
    finally:
        journal.close()
    for unit in units:
        shard = plan.shards[unit.number]
        if begins_with(out / shard.name, shard.header, shard.nbytes):
            ledger.take(unit.number, [journal.done[name] for tensor in unit.tensors for name in tensor.names])
        partial_path(out / shard.name).unlink(missing_ok=True)
    (work / "journal").unlink()
