"""Which worker of how many this is, as schedulers say it."""

from __future__ import annotations

import pytest

from streammerge.base.errors import UserError
from streammerge.cluster.rank import find_rank

ARRAY = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "5", "SLURM_ARRAY_TASK_MIN": "1",
         "SLURM_ARRAY_TASK_STEP": "2", "SLURM_ARRAY_TASK_COUNT": "4"}  # fmt: skip


@pytest.mark.parametrize(
    ("environment", "place"),
    [
        ({}, (0, 1)),
        (ARRAY, (2, 4)),
        # A list like 3,7,9: a place, if not a good one.
        (ARRAY | {"SLURM_ARRAY_TASK_ID": "9", "SLURM_ARRAY_TASK_MIN": "3", "SLURM_ARRAY_TASK_STEP": "1",
                  "SLURM_ARRAY_TASK_COUNT": "3"}, (0, 3)),
        # The array comes before what torchrun says, and that before MPI.
        (ARRAY | {"RANK": "1", "WORLD_SIZE": "2"}, (2, 4)),
        ({"RANK": "1", "WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "8"}, (1, 2)),
        ({"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "8"}, (3, 8)),
        ({"AWS_BATCH_JOB_ARRAY_INDEX": "2", "AWS_BATCH_JOB_ARRAY_SIZE": "5"}, (2, 5)),
        # Nobody says how many: all begin alike, and order is all that is lost.
        ({"JOB_COMPLETION_INDEX": "3"}, (0, 1)),
        # Outside a step SLURM_PROCID is 0 for everybody.
        ({"SLURM_PROCID": "3", "SLURM_NTASKS": "4"}, (0, 1)),
        ({"SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_STEP_ID": "0"}, (3, 4)),
        ({"RANK": "no number"}, (0, 1)),
    ],
)  # fmt: skip
def test_schedulers(environment: dict[str, str], place: tuple[int, int]) -> None:
    rank = find_rank(None, None, environment)
    assert (rank.index, rank.count) == place


def test_flags_come_first() -> None:
    rank = find_rank(1, 3, ARRAY)
    assert (rank.index, rank.count) == (1, 3)
    assert find_rank(None, 10, ARRAY).index == 2
    assert find_rank(3, None, {"JOB_COMPLETION_INDEX": "3"}).count == 1


@pytest.mark.parametrize(("index", "count"), [(-1, None), (2, 2), (None, 0)])
def test_flags_that_make_no_sense(index: int | None, count: int | None) -> None:
    with pytest.raises(UserError):
        find_rank(index, count, {})


def test_a_worker_that_slurm_starts_again_has_its_name() -> None:
    again = ARRAY | {"SLURM_RESTART_COUNT": "1", "SLURM_JOB_ID": "99"}
    assert find_rank(None, None, ARRAY).name == find_rank(None, None, again).name == "slurm-7-5"
    assert find_rank(None, None, {}).name != "slurm-7-5"


def test_tasks_of_one_step_have_names_of_their_own() -> None:
    steps = [ARRAY | {"SLURM_STEP_ID": "0", "SLURM_PROCID": str(number)} for number in range(3)]
    assert len({find_rank(None, None, step).name for step in steps}) == 3
