"""Seconds against the number of tensors: planning and merging should take linear time.

Two bf16 models of N tensors with 64 elements each, named like the experts of a mixture, merged by linear.
"""

import argparse
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchlib.checkpoints import CheckpointSpec, prepare_checkpoints, read_tensor_bytes
from benchlib.errors import BenchError
from benchlib.machine import describe_machine, describe_versions
from benchlib.measure import Measurement, measure
from benchlib.project import ROOT, child_environment, streammerge_command
from benchlib.recipes import METHODS, write_recipe
from benchlib.tables import format_mib, markdown_facts, markdown_table, save_json

SUMMARY = "seconds against the number of tensors"
ELEMENTS = 64
EXPERTS_PER_LAYER = 100


@dataclass(frozen=True)
class Count:
    num_tensors: int
    plan: Measurement
    merge: Measurement


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--counts", default="5000,10000,20000,50000", metavar="N,…", help="numbers of tensors (default: %(default)s)"
    )


def run(options: argparse.Namespace) -> int:
    try:
        counts = [int(count) for count in options.counts.split(",")]
    except ValueError:
        raise BenchError(f"--counts {options.counts}: expected whole numbers, such as 5000,10000.") from None
    facts = {**describe_machine(), "environment": describe_versions()}
    measured: list[Count] = []
    directory: Path = options.work / "manytensors"
    shutil.rmtree(directory, ignore_errors=True)  # what an interrupted bench left
    try:
        for num_tensors in counts:
            measured.append(_measure_count(directory, num_tensors))
            save_json(options.json, {"facts": facts, "runs": [asdict(count) for count in measured]})
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    print(markdown_facts(facts))
    _print_counts(measured)
    return 0


def _measure_count(directory: Path, num_tensors: int) -> Count:
    spec = _spec_of_count(num_tensors)
    checkpoints = prepare_checkpoints(directory / "inputs", spec)
    recipe = write_recipe(directory / "linear.yml", METHODS["linear"], checkpoints)
    output = directory / "merged"
    print(f"{num_tensors:,} tensors: ", end="", file=sys.stderr, flush=True)
    plan = _streammerge("plan", str(recipe), "--json", sync_at=directory)
    print(f"plan {plan.seconds:.1f} s, ", end="", file=sys.stderr, flush=True)
    merge = _streammerge(str(recipe), str(output), "--json", sync_at=directory)
    print(f"merge {merge.seconds:.1f} s", file=sys.stderr)
    if read_tensor_bytes(output) != spec.tensor_bytes:
        raise BenchError(f"{output} does not hold {spec.tensor_bytes} bytes of tensors.")
    shutil.rmtree(output)
    return Count(num_tensors, plan, merge)


def _spec_of_count(num_tensors: int) -> CheckpointSpec:
    names = [
        f"model.layers.{i // EXPERTS_PER_LAYER}.mlp.experts.{i % EXPERTS_PER_LAYER}.up_proj.weight"
        for i in range(num_tensors)
    ]
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 8, "intermediate_size": 8,
        "num_hidden_layers": -(-num_tensors // EXPERTS_PER_LAYER), "num_attention_heads": 1, "vocab_size": 1,
        "torch_dtype": "bfloat16",
    }  # fmt: skip
    return CheckpointSpec(models=("a", "b"), tensors=dict.fromkeys(sorted(names), (8, ELEMENTS // 8)), config=config)


def _streammerge(*arguments: str, sync_at: Path) -> Measurement:
    command = [*streammerge_command(), *arguments]
    measurement = measure(command, cwd=ROOT, environment=child_environment(), sync_at=sync_at)
    if measurement.exit_code != 0:
        raise BenchError(
            f"streammerge {arguments[0]} ended with exit code {measurement.exit_code}: {measurement.stderr_tail}"
        )
    return measurement


def _print_counts(measured: Sequence[Count]) -> None:
    headers = [
        "tensors", "plan s", "plan s per 1,000", "merge s", "merge s per 1,000", "anon + shmem MiB, plan", "merge",
    ]  # fmt: skip
    rows = [
        [
            f"{count.num_tensors:,}",
            f"{count.plan.seconds:.2f}",
            f"{count.plan.seconds / count.num_tensors * 1000:.3f}",
            f"{count.merge.seconds:.2f}",
            f"{count.merge.seconds / count.num_tensors * 1000:.3f}",
            format_mib(count.plan.peak_anonymous_bytes),
            format_mib(count.merge.peak_anonymous_bytes),
        ]
        for count in measured
    ]
    print(f"\n{markdown_table(headers, rows)}")
    if len(measured) > 1:
        first, last = measured[0], measured[-1]
        more = last.num_tensors - first.num_tensors
        for name, early, late in (("plan", first.plan, last.plan), ("merge", first.merge, last.merge)):
            slope = (late.seconds - early.seconds) / more * 1000
            print(f"\n{name}: {slope:.3f} s per further 1,000 tensors, from the first count to the last")
