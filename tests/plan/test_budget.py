"""The schedule keeps the promise: no planned peak above the limit, and a refusal names the least that would do."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streammerge.base.errors import DoesNotFit
from streammerge.plan.budget import Schedule, bytes_to_read, make_schedule, tile_bytes, tiles_of
from streammerge.plan.plan import Plan
from tests.plan.headers import Specs, make_checkpoint, make_plan

MB = 1_000_000
GB = 1_000_000_000

TIES = "merge_method: ties\nbase_model: base\nmodels: [{models}]\nparameters: {{weight: 1, density: {density}}}\n"
# A matrix of a billion elements, small ones around it: some 2 GB to write, in no file.
LARGE: Specs = {"embed": ("BF16", (128_256, 8192)), "layers.0.w": ("BF16", (4096, 4096)), "norm": ("BF16", (8192,))}
SMALL: Specs = {"w": ("BF16", (1000, 100)), "b": ("BF16", (100,))}
EMPTY: Specs = {"w": ("F32", (0, 5))}
WIDE: Specs = {"w": ("F64", (70_000, 1000)), "v": ("F32", (3,))}


def ties_plan(specs: Specs, models: int = 2, density: float = 0.5) -> Plan:
    listed = ", ".join(f"{{model: m{i}}}" for i in range(models))
    return make_plan(TIES.format(models=listed, density=density), *(make_checkpoint(specs),) * (models + 1))


PLANS = {
    "large": ties_plan(LARGE),
    "large, many models": ties_plan(LARGE, 7),
    "large, one pass": ties_plan(LARGE, density=1),
    "small": ties_plan(SMALL),
    "empty": ties_plan(EMPTY),
    "wide": ties_plan(WIDE, 3),
    "copies": make_plan("merge_method: passthrough\nmodels: [{model: a}]\n", make_checkpoint(LARGE)),
}


def schedule(plan: Plan, limit: int, *, baseline: int = 230 * MB, threads: int = 2, allowed: bool = True) -> Schedule:
    return make_schedule(
        plan, limit_bytes=limit, limited_by="--max-memory", allowed=allowed, available_bytes=64 * GB,
        baseline_bytes=baseline, threads=threads,
    )  # fmt: skip


def named_budget(error: DoesNotFit) -> int:
    match = re.search(r"The smallest budget that works is (\d+)MB\.", str(error))
    assert match is not None, str(error)
    return int(match[1]) * MB


def smallest_budget(plan: Plan, baseline: int, threads: int) -> int:
    """The budget that a refusal names."""
    with pytest.raises(DoesNotFit) as caught:
        schedule(plan, 10 * MB, baseline=baseline, threads=threads)
    assert caught.value.exit_code == 3
    return named_budget(caught.value)


def check_sound(plan: Plan, made: Schedule, limit: int) -> None:
    """What every schedule must keep."""
    assert made.peak_bytes <= limit - max(limit // 20, 64 << 20)
    assert made.peak_bytes == made.baseline_bytes + made.work_bytes + made.dirty_bytes + made.arena_bytes
    assert made.slots >= 3
    assert 1 <= made.tile_blocks <= 32
    assert made.resident_tiles < made.slots
    assert made.dirty_bytes > 0
    once = sum(tensor.read_bytes for tensor in plan.tensors)
    assert once <= bytes_to_read(plan.tensors, made) <= once * max(tensor.passes for tensor in plan.tensors)
    for tensor in plan.tensors:
        assert tile_bytes(tensor, made.tile_blocks) <= made.slot_bytes
        assert tile_bytes(tensor, 4) <= made.scratch_bytes


@pytest.mark.parametrize("name", PLANS)
@settings(derandomize=True, database=None, deadline=None, max_examples=120)
@given(
    limit=st.one_of(st.integers(1, 3 * GB), st.integers(350 * MB, 600 * MB), st.integers(GB, 500 * GB)),
    baseline=st.integers(150 * MB, 450 * MB),
    threads=st.sampled_from([1, 2, 4, 16, 64]),
    allowed=st.booleans(),
)
def test_the_planned_peak_is_below_any_limit_or_it_is_refused(
    name: str, limit: int, baseline: int, threads: int, allowed: bool
) -> None:
    plan = PLANS[name]
    try:
        made = schedule(plan, limit, baseline=baseline, threads=threads, allowed=allowed)
    except DoesNotFit as error:
        assert named_budget(error) > limit  # noqa: PT017
    else:
        check_sound(plan, made, limit)


@pytest.mark.parametrize("name", PLANS)
@settings(derandomize=True, database=None, deadline=None, max_examples=40)
@given(baseline=st.integers(150 * MB, 3 * GB), threads=st.sampled_from([1, 2, 4, 16, 64]))
def test_the_smallest_budget_that_a_refusal_names_works(name: str, baseline: int, threads: int) -> None:
    smallest = smallest_budget(PLANS[name], baseline, threads)
    made = schedule(PLANS[name], smallest, baseline=baseline, threads=threads)
    check_sound(PLANS[name], made, smallest)


@pytest.mark.parametrize("name", [name for name, plan in PLANS.items() if plan.bytes_to_write > 20 * MB])
@settings(derandomize=True, database=None, deadline=None, max_examples=40)
@given(baseline=st.integers(150 * MB, 3 * GB), threads=st.sampled_from([1, 2, 4, 16, 64]))
def test_the_smallest_budget_works_when_the_interpreter_takes_more_the_next_time_and_much_less_does_not(
    name: str, baseline: int, threads: int
) -> None:
    smallest = smallest_budget(PLANS[name], baseline, threads)
    check_sound(PLANS[name], schedule(PLANS[name], smallest, baseline=baseline + (8 << 20), threads=threads), smallest)
    with pytest.raises(DoesNotFit) as caught:
        schedule(PLANS[name], smallest - 10 * MB, baseline=baseline, threads=threads)
    assert named_budget(caught.value) == smallest


def test_the_smallest_budget_is_the_smallest_also_for_a_small_output() -> None:
    for name in ("small", "empty"):
        smallest = smallest_budget(PLANS[name], 230 * MB, 2)
        with pytest.raises(DoesNotFit):
            schedule(PLANS[name], smallest - 10 * MB)


def test_a_refusal_says_where_the_limit_comes_from_and_what_takes_the_memory() -> None:
    with pytest.raises(DoesNotFit) as caught:
        make_schedule(PLANS["large"], limit_bytes=300 << 20, limited_by="the cgroup limit of 300 MiB", allowed=False,
                      available_bytes=GB, baseline_bytes=225 << 20, threads=2)  # fmt: skip
    message = str(caught.value)
    assert message.startswith("300 MiB of memory (the cgroup limit of 300 MiB) is too little for this merge: ")
    assert "the interpreter and torch take 225 MiB, arithmetic on 2 threads " in message


def test_five_hundred_megabytes_are_enough_for_a_base_and_two_models_of_any_size() -> None:
    # Design, section 5: the smallest budget to aim for is 500 MB, with a measured baseline of 225 MB.
    made = schedule(PLANS["large"], 500 * MB, baseline=225 << 20, threads=2)
    check_sound(PLANS["large"], made, 500 * MB)


def test_more_memory_never_means_more_reading() -> None:
    plan = PLANS["large"]
    reads = [bytes_to_read(plan.tensors, schedule(plan, limit)) for limit in (500 * MB, GB, 4 * GB, 30 * GB)]
    assert reads == sorted(reads, reverse=True)
    once = sum(tensor.read_bytes for tensor in plan.tensors)
    assert reads[-1] == once, "all of the inputs stay in memory"


def test_a_limit_that_nobody_named_is_not_used_up() -> None:
    made = schedule(PLANS["large"], 64 * GB, allowed=False)
    assert made.arena_bytes < 400 << 20
    assert schedule(PLANS["large"], 64 * GB, allowed=True).arena_bytes > GB


def test_a_tensor_has_as_many_tiles_as_its_elements_need() -> None:
    (tensor,) = ties_plan({"w": ("BF16", (65_536 * 32 + 1,))}).tensors
    assert [tiles_of(tensor, blocks) for blocks in (1, 16, 32, 33)] == [33, 3, 2, 1]
    (empty,) = ties_plan(EMPTY).tensors
    assert tiles_of(empty, 32) == 0
