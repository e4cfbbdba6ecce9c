"""Which worker of how many this process is. A wrong answer costs order, never correctness.

Asked in turn: flags; a Slurm array; RANK and WORLD_SIZE (torchrun, accelerate); the indexes of Kubernetes and of AWS
and Google Batch; PBS and LSF arrays; MPI's ranks; Slurm's rank of a step. Otherwise it is 0 of 1.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from streammerge.base.errors import UserError

# Variables that hold an index, and those that hold how many there are (None: nothing does).
_PAIRS = (
    ("RANK", "WORLD_SIZE"),
    ("JOB_COMPLETION_INDEX", None),
    ("AWS_BATCH_JOB_ARRAY_INDEX", "AWS_BATCH_JOB_ARRAY_SIZE"),
    ("BATCH_TASK_INDEX", "BATCH_TASK_COUNT"),
    ("PBS_ARRAY_INDEX", None),
    ("LSB_JOBINDEX", None),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("PMI_RANK", "PMI_SIZE"),
)
_UNNAMED = re.compile(r"[^A-Za-z0-9._-]+")


@dataclass(frozen=True)
class Rank:
    """Worker `index` of `count`; `name` stays the same when the scheduler starts the worker again."""

    index: int
    count: int
    name: str


def find_rank(index: int | None, count: int | None, environment: Mapping[str, str] | None = None) -> Rank:
    """The rank of this process. Raises UserError for flags that make no sense."""
    environment = os.environ if environment is None else environment
    if count is not None and count < 1:
        raise UserError(f"--count {count}: there is at least one worker.")
    if index is not None and index < 0:
        raise UserError(f"--index {index}: the first worker is 0.")
    if index is not None and count is not None and index >= count:
        raise UserError(f"--index {index} --count {count}: the last of {count} workers is {count - 1}.")
    found = _slurm_array(environment) or _by_variables(environment) or _slurm_step(environment)
    own_index, own_count = found or (0, None)
    own_index = own_index if index is None else index
    own_count = own_count if count is None else count
    number = 1 if own_count is None else max(1, own_count)
    return Rank(own_index % number, number, _name(environment, own_index))


def _slurm_array(environment: Mapping[str, str]) -> tuple[int, int | None] | None:
    """Place in the array. Ranges, steps and lists of task numbers exist; where it is a list, the place is a guess."""
    task = _number(environment, "SLURM_ARRAY_TASK_ID")
    if task is None:
        return None
    first = _number(environment, "SLURM_ARRAY_TASK_MIN") or 0
    step = _number(environment, "SLURM_ARRAY_TASK_STEP") or 1
    return max(0, task - first) // max(1, step), _number(environment, "SLURM_ARRAY_TASK_COUNT")


def _by_variables(environment: Mapping[str, str]) -> tuple[int, int | None] | None:
    for index, count in _PAIRS:
        if (found := _number(environment, index)) is not None:
            return found, None if count is None else _number(environment, count)
    return None


def _slurm_step(environment: Mapping[str, str]) -> tuple[int, int | None] | None:
    # Without a step it is 0 for every task, whatever their number.
    if "SLURM_STEP_ID" not in environment or (rank := _number(environment, "SLURM_PROCID")) is None:
        return None
    return rank, _number(environment, "SLURM_NTASKS")


def _name(environment: Mapping[str, str], index: int) -> str:
    """One that a scheduler gives again to the same worker, or one that nobody else has."""
    array, task = environment.get("SLURM_ARRAY_JOB_ID"), environment.get("SLURM_ARRAY_TASK_ID")
    if array and task:
        # Tasks of one step are workers, too.
        step = f"-{environment.get('SLURM_PROCID')}" if "SLURM_STEP_ID" in environment else ""
        return _clean(f"slurm-{array}-{task}{step}")
    if environment.get("JOB_COMPLETION_INDEX") and (pod := environment.get("JOB_NAME")):
        return _clean(f"pod-{pod}-{index}")
    if batch := environment.get("AWS_BATCH_JOB_ID"):
        return _clean(f"aws-{batch}")
    return _clean(f"{socket.gethostname()}-{os.getpid()}")


def _clean(name: str) -> str:
    return _UNNAMED.sub("-", name)[:100]


def _number(environment: Mapping[str, str], name: str) -> int | None:
    text = environment.get(name, "")
    return int(text) if text.isascii() and text.isdigit() else None
