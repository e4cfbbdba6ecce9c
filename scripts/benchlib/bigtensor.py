"""One tensor of several gigabytes, merged by TIES inside a control group of exactly the budget.

    make      a base and two models that hold one bf16 tensor each (2 GiB)
    control   a process that takes more than the limit must be killed, else the limit proves nothing
    small     streammerge --max-memory 700MB in a memory control group of 700,000,000 bytes, page cache cold
    large     streammerge --max-memory 4GB, without a control group
    compare   the two outputs, byte by byte

--reference computes TIES over the whole tensor as well, by sorting instead of histograms (about 5 GB of memory).
"""

import argparse
import filecmp
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchlib.cgroup import CgroupFacts, MemoryCgroup, memory_cgroup
from benchlib.checkpoints import CheckpointSpec, prepare_checkpoints, weights_of
from benchlib.errors import BenchError
from benchlib.machine import describe_machine, describe_versions
from benchlib.measure import Measurement, measure
from benchlib.project import ROOT, child_environment, helper_environment, streammerge_command
from benchlib.recipes import METHODS, write_recipe
from benchlib.tables import format_mib, markdown_facts, markdown_table, save_json

SUMMARY = "one tensor far larger than the budget, in a control group of exactly the budget"
LIMIT_BYTES = 700_000_000
SMALL_BUDGET = "700MB"
LARGE_BUDGET = "4GB"
TENSOR_NAME = "model.layers.0.mlp.up_proj.weight"
WIDTH = 32768
DENSITY = 0.5
WEIGHT = 0.5
TAKE_TOO_MUCH = f"b = bytearray(b'x') * {LIMIT_BYTES + LIMIT_BYTES // 4}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--gib", type=float, default=2, metavar="N", help="size of the tensor (default: %(default)s)")
    parser.add_argument("--reference", action="store_true", help="compare with TIES over the whole tensor as well")
    parser.add_argument("--keep-inputs", action="store_true", help="leave the inputs for the next time")


def run(options: argparse.Namespace) -> int:
    directory: Path = options.work / "bigtensor"
    spec = _spec_of_size(options.gib)
    facts = {**describe_machine(), "environment": describe_versions()}
    facts["tensor"] = f"bf16 {list(spec.tensors[TENSOR_NAME])}, {spec.tensor_bytes:,} bytes in each of 3 checkpoints"
    small, large = directory / "small", directory / "large"
    for output in (small, large):
        shutil.rmtree(output, ignore_errors=True)
    try:
        checkpoints = prepare_checkpoints(directory / "inputs", spec)
        weights = weights_of(list(checkpoints.values()))
        recipe = write_recipe(directory / "ties.yml", METHODS["ties"], checkpoints)
        with memory_cgroup(LIMIT_BYTES) as group:
            facts["control group"] = f"version {group.version}, limit {group.read_facts().limit_bytes:,} bytes"
            _check_limit_works(group)
        with memory_cgroup(LIMIT_BYTES) as group:  # a new one: its counters start at zero
            _leave_page_cache(weights)
            in_group = _merge(recipe, small, SMALL_BUDGET, group)
            group_facts = group.read_facts()
        outcome: dict[str, Any] = {"facts": facts, "group": asdict(group_facts), "small": asdict(in_group)}
        save_json(options.json, outcome)
        print(markdown_facts(facts))
        _require_success(in_group, f"; {group_facts}")
        outside = _merge(recipe, large, LARGE_BUDGET, None)
        outcome |= {"large": asdict(outside), "equal": None, "reference": None}
        save_json(options.json, outcome)
        _print_runs(in_group, group_facts, outside)
        _require_success(outside)
        outcome["equal"] = _are_equal(small, large)
        print(f"\nOutputs of the two budgets, byte by byte: {'equal' if outcome['equal'] else 'DIFFERENT'}")
        if options.reference:
            outcome["reference"] = _compare_with_reference(weights, small)
            _print_reference(outcome["reference"])
        save_json(options.json, outcome)
        return 0 if outcome["equal"] and group_facts.oom_kills == 0 else 1
    finally:
        for output in (small, large):
            shutil.rmtree(output, ignore_errors=True)
        if not options.keep_inputs:
            shutil.rmtree(directory, ignore_errors=True)


def _spec_of_size(gib: float) -> CheckpointSpec:
    rows = max(1, round(gib * 2**30 / 2 / WIDTH))
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": WIDTH, "intermediate_size": rows,
        "num_hidden_layers": 1, "num_attention_heads": 256, "num_key_value_heads": 256, "vocab_size": 1,
        "torch_dtype": "bfloat16",
    }  # fmt: skip
    return CheckpointSpec(models=("base", "a", "b"), tensors={TENSOR_NAME: (rows, WIDTH)}, config=config)


def _check_limit_works(group: MemoryCgroup) -> None:
    """A process that takes more than the limit must not live: the control of the experiment."""
    greedy = subprocess.run(group.wrap([sys.executable, "-c", TAKE_TOO_MUCH]), check=False, stderr=subprocess.DEVNULL)
    if greedy.returncode == 0:
        raise BenchError("the control group does not hold: a process in it took more than its limit and lived.")


def _leave_page_cache(paths: Sequence[Path]) -> None:
    # Pages that are cached already are charged to whoever read them first: the group would read them for nothing.
    for path in paths:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _merge(recipe: Path, output: Path, max_memory: str, group: MemoryCgroup | None) -> Measurement:
    print(f"streammerge --max-memory {max_memory}: ", end="", file=sys.stderr, flush=True)
    command = [*streammerge_command(), str(recipe), str(output), "--max-memory", max_memory, "--json"]
    wrapped = command if group is None else group.wrap(command)
    measurement = measure(wrapped, cwd=ROOT, environment=child_environment(), sync_at=output.parent)
    print(f"{measurement.seconds:.1f} s", file=sys.stderr)
    return measurement


def _require_success(measurement: Measurement, more: str = "") -> None:
    if measurement.exit_code != 0:
        raise BenchError(f"streammerge ended with exit code {measurement.exit_code}: {measurement.stderr_tail}{more}")


def _are_equal(left: Path, right: Path) -> bool:
    names = sorted(path.name for path in left.glob("*.safetensors"))
    if not names or names != sorted(path.name for path in right.glob("*.safetensors")):
        return False
    return all(filecmp.cmp(left / name, right / name, shallow=False) for name in names)


def _compare_with_reference(weights: Sequence[Path], output: Path) -> dict[str, Any]:
    (merged,) = sorted(output.glob("*.safetensors"))
    base, *models = weights
    command = [
        sys.executable, "-m", "benchlib.ties_reference", "--tensor", TENSOR_NAME, "--base", str(base),
        "--density", str(DENSITY), "--weight", str(WEIGHT), "--merged", str(merged), *map(str, models),
    ]  # fmt: skip
    print("computing the reference", file=sys.stderr)
    answer = subprocess.run(command, env=helper_environment(), stdout=subprocess.PIPE, text=True, check=False)
    if answer.returncode != 0:
        raise BenchError("the reference could not be computed (see above).")
    comparison: dict[str, Any] = json.loads(answer.stdout)
    return comparison


def _print_runs(in_group: Measurement, group: CgroupFacts, outside: Measurement) -> None:
    headers = [
        "TIES", "seconds", "CPU s", "anon + shmem MiB", "VmHWM MiB", "group's peak bytes", "limit hits", "OOM kills",
    ]  # fmt: skip
    inside_cells = [f"{group.peak_bytes:,}", str(group.limit_hits), str(group.oom_kills)]
    rows = [
        [f"{SMALL_BUDGET} in a group of {LIMIT_BYTES:,}", *_cells(in_group), *inside_cells],
        [f"{LARGE_BUDGET}, no group", *_cells(outside), "", "", ""],
    ]
    print(f"\n{markdown_table(headers, rows)}")


def _cells(measurement: Measurement) -> list[str]:
    return [
        f"{measurement.seconds:.1f}",
        f"{measurement.user_seconds + measurement.system_seconds:.1f}",
        format_mib(measurement.peak_anonymous_bytes),
        format_mib(measurement.largest_process_bytes),
    ]


def _print_reference(comparison: dict[str, Any]) -> None:
    for precision in ("float32", "float64"):
        different, most = comparison[precision]["different"], comparison[precision]["most_steps"]
        print(
            f"Against whole-tensor TIES in {precision}: {different:,} of {comparison['elements']:,} elements differ, "
            f"by at most {most} bf16 steps"
        )
