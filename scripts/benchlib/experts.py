"""Seconds against the number of tensors: planning and merging should take linear time.

A base and two bf16 models of N tensors with 64 elements each, named like DeepSeek-V3's (256 experts in a layer, and one
that all share; 45,000 tensors are 58 layers), in 8 shards, merged by task_arithmetic with filters for an expert, for
what is shared and for routers. Tensors so small cost their overhead alone.
"""

import argparse
import json
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
from benchlib.tables import format_mib, markdown_facts, markdown_table, save_json

SUMMARY = "seconds against the number of tensors"
SHAPE = (8, 8)
EXPERTS_PER_LAYER = 256
SHARDS = 8
RECIPE = """
merge_method: task_arithmetic
base_model: {base}
models: [{{model: {a}}}, {{model: {b}}}]
parameters:
  weight:
    - {{filter: experts.3., value: 0.2}}
    - {{filter: shared_experts, value: 0.9}}
    - {{filter: mlp.gate., value: 0}}
    - {{value: [0.3, 0.6]}}
dtype: bfloat16
"""


@dataclass(frozen=True)
class Count:
    num_tensors: int
    plan: Measurement
    merge: Measurement


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--counts", default="5000,15000,45000", metavar="N,…", help="numbers of tensors (default: %(default)s)"
    )


def run(options: argparse.Namespace) -> int:
    try:
        counts = [int(count) for count in options.counts.split(",")]
    except ValueError:
        raise BenchError(f"--counts {options.counts}: expected whole numbers, such as 5000,15000.") from None
    facts = {**describe_machine(), "environment": describe_versions()}
    measured: list[Count] = []
    directory: Path = options.work / "experts"
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
    recipe = directory / "recipe.yml"
    recipe.write_text(RECIPE.format(**{name: json.dumps(str(path)) for name, path in checkpoints.items()}))
    output = directory / "merged"
    print(f"{num_tensors:,} tensors: ", end="", file=sys.stderr, flush=True)
    plan = _streammerge("plan", str(recipe), sync_at=directory)
    print(f"plan {plan.seconds:.1f} s, ", end="", file=sys.stderr, flush=True)
    merge = _streammerge(str(recipe), str(output), "--json", sync_at=directory)
    print(f"merge {merge.seconds:.1f} s", file=sys.stderr)
    if read_tensor_bytes(output) != spec.tensor_bytes:
        raise BenchError(f"{output} does not hold {spec.tensor_bytes} bytes of tensors.")
    shutil.rmtree(output)
    return Count(num_tensors, plan, merge)


def _spec_of_count(num_tensors: int) -> CheckpointSpec:
    names = ["model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"]
    layers = 0
    while len(names) < num_tensors:
        block = f"model.layers.{layers}.mlp"
        parts = ["shared_experts", *(f"experts.{i}" for i in range(EXPERTS_PER_LAYER))]
        names += [f"model.layers.{layers}.self_attn.kv_b_proj.weight", f"{block}.gate.weight"]
        names += [f"{block}.{part}.{w}_proj.weight" for part in parts for w in ("gate", "up", "down")]
        layers += 1
    config = {
        "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "hidden_size": 8,
        "intermediate_size": 8, "moe_intermediate_size": 8, "n_routed_experts": EXPERTS_PER_LAYER,
        "num_hidden_layers": layers, "num_attention_heads": 1, "vocab_size": 8, "torch_dtype": "bfloat16",
    }  # fmt: skip
    return CheckpointSpec(("base", "a", "b"), dict.fromkeys(names[:num_tensors], SHAPE), config, shards=SHARDS)


def _streammerge(*arguments: str, sync_at: Path) -> Measurement:
    command = [*streammerge_command(), *arguments]
    measurement = measure(command, cwd=ROOT, environment=child_environment(), sync_at=sync_at)
    if measurement.exit_code != 0:
        raise BenchError(
            f"streammerge {arguments[0]} ended with exit code {measurement.exit_code}: {measurement.stderr_tail}"
        )
    return measurement


def _print_counts(measured: Sequence[Count]) -> None:
    headers = ["tensors"]
    for name in ("plan", "merge"):
        headers += [f"{name} s", "CPU s", "per 1,000", "CPU s", "anon + shmem MiB"]
    rows = [
        [f"{count.num_tensors:,}", *_cells(count.plan, count.num_tensors), *_cells(count.merge, count.num_tensors)]
        for count in measured
    ]
    print(f"\n{markdown_table(headers, rows)}")
    others = sum(run.other_cpu_seconds for count in measured for run in (count.plan, count.merge))
    seconds = sum(run.seconds for count in measured for run in (count.plan, count.merge))
    print(f"\nMeanwhile other programs kept {others / seconds:.1f} processors busy.")
    if len(measured) > 1:
        first, last = measured[0], measured[-1]
        more = last.num_tensors - first.num_tensors
        for name, early, late in (("plan", first.plan, last.plan), ("merge", first.merge, last.merge)):
            slope = (late.seconds - early.seconds) / more * 1000
            print(f"\n{name}: {slope:.3f} s per further 1,000 tensors, from the first count to the last")


def _cells(run: Measurement, tensors: int) -> list[str]:
    cpu = run.user_seconds + run.system_seconds
    thousands = tensors / 1000
    return [
        f"{run.seconds:.2f}", f"{cpu:.2f}", f"{run.seconds / thousands:.3f}", f"{cpu / thousands:.3f}",
        format_mib(run.peak_anonymous_bytes),
    ]  # fmt: skip
