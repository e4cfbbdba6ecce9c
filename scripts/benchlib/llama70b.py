"""Layers of Llama-70B's real shapes within a small budget, and what that comes to for all 80 of them.

Embedding and head of 128,256 × 8,192, and as many layers as are asked for, each with three matrices of 28,672 × 8,192;
bf16, one file. linear of two models, and ties of two models and a base. Only two models are on disk: the base of ties
is `a`, its models are `b` and a hard link to `b`. The page cache is dropped before each run, and cannot hold a model.

The time for 80 layers is worked out, not measured: the part of merging that a layer takes is the same for each.
"""

import argparse
import shutil
import sys
from dataclasses import asdict, replace
from pathlib import Path

from benchlib.checkpoints import CheckpointSpec, LlamaShape, prepare_checkpoints
from benchlib.errors import BenchError
from benchlib.machine import describe_machine, describe_versions
from benchlib.memory import RECIPES, Peak, link_again, merge_within
from benchlib.recipes import write_recipe
from benchlib.tables import format_mib, markdown_facts, markdown_table, save_json

SUMMARY = "layers of Llama-70B's shapes in 2 GB, and the time for all 80 worked out"
LLAMA_70B = LlamaShape(layers=80, hidden=8192, intermediate=28672, heads=64, kv_heads=8, vocab=128256)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--layers", type=int, default=8, metavar="N", help="of 1.7 GB in each of three copies")
    parser.add_argument("--max-memory", default="2GB", metavar="SIZE", help="the budget (default: %(default)s)")


def run(options: argparse.Namespace) -> int:
    facts = {**describe_machine(), "environment": describe_versions(), "budget": options.max_memory}
    directory: Path = options.work / "llama70b"
    shutil.rmtree(directory, ignore_errors=True)
    peaks: list[Peak] = []
    shape = replace(LLAMA_70B, layers=options.layers)
    whole = CheckpointSpec((), LLAMA_70B.tensors, {}).tensor_bytes
    try:
        spec = CheckpointSpec(models=("a", "b"), tensors=shape.tensors, config=shape.config, repeat_noise=True)
        checkpoints = prepare_checkpoints(directory / "inputs", spec)
        checkpoints["b-again"] = link_again(checkpoints["b"])
        for method in RECIPES:
            recipe = write_recipe(directory / f"{method.name}.yml", method, checkpoints)
            _drop_caches()
            measurement = merge_within(recipe, directory / "merged", options.max_memory, spec.tensor_bytes)
            peaks.append(Peak(method.name, spec.tensor_bytes, measurement))
            save_json(options.json, {"facts": facts, "runs": [asdict(peak) for peak in peaks]})
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    headers = [
        "method",
        "layers",
        "model GB",
        "seconds",
        "GB/s",
        "VmHWM MiB",
        "anon + shmem MiB",
        "80 layers, worked out",
    ]
    rows = []
    for peak in peaks:
        report = peak.measurement.report
        seconds = peak.measurement.seconds
        rate = (report["bytes_read"] + report["bytes_written"]) / seconds / 1e9
        minutes = report["engine_seconds"] * whole / peak.model_bytes / 60
        rows.append([
            peak.method, str(options.layers), f"{peak.model_bytes / 1e9:.1f}", f"{seconds:.1f}", f"{rate:.2f}",
            format_mib(peak.measurement.largest_process_bytes), format_mib(peak.measurement.peak_anonymous_bytes),
            f"{minutes:.1f} min",
        ])  # fmt: skip
    print(markdown_facts(facts))
    print(f"\n{markdown_table(headers, rows)}")
    return 0


def _drop_caches() -> None:
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3")
    except OSError as error:
        raise BenchError(f"the page cache cannot be dropped: {error.strerror}; that needs root.") from error
    print("page cache dropped", file=sys.stderr)
