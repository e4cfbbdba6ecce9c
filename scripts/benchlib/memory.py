"""Peak memory and cost per byte against model size, at one budget: they should not move.

Synthetic bf16 checkpoints of each size, merged by linear (two models) and by ties (two models and a base) within
--max-memory 700MB. Only two models are on disk: the base of ties is `a`, its models are `b` and a hard link to `b`.
Inputs and outputs are deleted after each size.
"""

import argparse
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from benchlib.checkpoints import (
    TINYLLAMA,
    WEIGHTS_NAME,
    CheckpointSpec,
    LlamaShape,
    prepare_checkpoints,
    read_tensor_bytes,
)
from benchlib.errors import BenchError
from benchlib.machine import describe_machine, describe_versions
from benchlib.measure import Measurement, measure
from benchlib.project import ROOT, child_environment, streammerge_command
from benchlib.recipes import METHODS, write_recipe
from benchlib.tables import format_mib, markdown_facts, markdown_table, save_json

SUMMARY = "peak memory and cost per byte against model size, at one budget"
RECIPES = (METHODS["linear"], replace(METHODS["ties"], models=("b", "b-again"), base="a"))


@dataclass(frozen=True)
class Peak:
    method: str
    model_bytes: int
    measurement: Measurement


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sizes", default="0.3,1,4,8", metavar="GB,…", help="of one model (default: %(default)s)")
    parser.add_argument("--max-memory", default="700MB", metavar="SIZE", help="the budget (default: %(default)s)")


def run(options: argparse.Namespace) -> int:
    try:
        sizes = [float(size) for size in options.sizes.split(",")]
    except ValueError:
        raise BenchError(f"--sizes {options.sizes}: expected numbers of gigabytes, such as 0.3,1,4,8.") from None
    facts = {**describe_machine(), "environment": describe_versions(), "budget": options.max_memory}
    peaks: list[Peak] = []
    directory: Path = options.work / "memory"
    shutil.rmtree(directory, ignore_errors=True)  # what an interrupted bench left
    try:
        for size in sizes:
            shape = _shape_of_size(int(size * 1e9))
            spec = CheckpointSpec(models=("a", "b"), tensors=shape.tensors, config=shape.config, repeat_noise=True)
            checkpoints = prepare_checkpoints(directory / "inputs", spec)
            checkpoints["b-again"] = link_again(checkpoints["b"])
            for method in RECIPES:
                recipe = write_recipe(directory / f"{method.name}.yml", method, checkpoints)
                measurement = merge_within(recipe, directory / "merged", options.max_memory, spec.tensor_bytes)
                peaks.append(Peak(method.name, spec.tensor_bytes, measurement))
                save_json(options.json, {"facts": facts, "runs": [asdict(peak) for peak in peaks]})
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    print(markdown_facts(facts))
    _print_peaks(peaks)
    return 0


def _shape_of_size(wanted_bytes: int) -> LlamaShape:
    """TinyLlama with as many layers as come nearest to this size."""
    one = CheckpointSpec((), replace(TINYLLAMA, layers=1).tensors, {}).tensor_bytes
    per_layer = CheckpointSpec((), replace(TINYLLAMA, layers=2).tensors, {}).tensor_bytes - one
    return replace(TINYLLAMA, layers=max(1, 1 + round((wanted_bytes - one) / per_layer)))


def link_again(checkpoint: Path) -> Path:
    again = checkpoint.with_name(checkpoint.name + "-again")
    again.mkdir()
    shutil.copyfile(checkpoint / "config.json", again / "config.json")
    os.link(checkpoint / WEIGHTS_NAME, again / WEIGHTS_NAME)
    return again


def merge_within(recipe: Path, output: Path, max_memory: str, output_bytes: int) -> Measurement:
    print(f"{recipe.stem} of {output_bytes / 1e9:.2f} GB: ", end="", file=sys.stderr, flush=True)
    command = [*streammerge_command(), str(recipe), str(output), "--max-memory", max_memory, "--json"]
    measurement = measure(command, cwd=ROOT, environment=child_environment(), sync_at=output.parent)
    print(f"{measurement.seconds:.1f} s", file=sys.stderr)
    if measurement.exit_code != 0:
        raise BenchError(f"streammerge ended with exit code {measurement.exit_code}: {measurement.stderr_tail}")
    if read_tensor_bytes(output) != output_bytes:
        raise BenchError(f"{output} does not hold {output_bytes} bytes of tensors.")
    shutil.rmtree(output)
    return measurement


def _print_peaks(peaks: Sequence[Peak]) -> None:
    headers = ["method", "model GB", "seconds", "merging s", "merging s per GB", "VmHWM MiB", "anon + shmem MiB"]
    rows = [
        [
            peak.method,
            f"{peak.model_bytes / 1e9:.2f}",
            f"{peak.measurement.seconds:.1f}",
            f"{peak.measurement.report['engine_seconds']:.1f}",
            f"{peak.measurement.report['engine_seconds'] / peak.model_bytes * 1e9:.2f}",
            format_mib(peak.measurement.largest_process_bytes),
            format_mib(peak.measurement.peak_anonymous_bytes),
        ]
        for peak in peaks
    ]
    print(f"\n{markdown_table(headers, rows)}\n")
    for method in dict.fromkeys(peak.method for peak in peaks):
        measured = [peak.measurement for peak in peaks if peak.method == method]
        high_water = _spread_percent([m.largest_process_bytes for m in measured])
        anonymous = _spread_percent([m.peak_anonymous_bytes for m in measured])
        print(f"{method}: largest over smallest peak, VmHWM +{high_water:.1f} %, anon + shmem +{anonymous:.1f} %")


def _spread_percent(values: Sequence[int]) -> float:
    return 100 * (max(values) / min(values) - 1)
