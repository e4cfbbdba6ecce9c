"""Every method inside a control group of exactly the smallest budget it names, against the same run outside.

    refusal   --max-memory 150MB is refused, and the refusal names the smallest budget that works
    inside    a memory control group of that size, page cache cold
    outside   --max-memory of that size and no group, page cache cold

Outside, free memory would serve as a page cache for second passes; so that both read the same bytes from the disk, the
run outside is told that there is no other memory. Medians of the rounds; inside and outside in turn.
"""

import argparse
import os
import re
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from benchlib.cgroup import CgroupFacts, memory_cgroup
from benchlib.checkpoints import TINYLLAMA, CheckpointSpec, prepare_checkpoints, weights_of
from benchlib.errors import BenchError
from benchlib.machine import describe_machine, describe_versions
from benchlib.measure import Measurement, measure
from benchlib.project import ROOT, child_environment, streammerge_command
from benchlib.recipes import METHODS, write_recipe
from benchlib.tables import format_mib, markdown_facts, markdown_table, save_json

SUMMARY = "every method in a control group of its smallest budget, against the same run outside"
# Without a cgroup, and with no other memory than --max-memory.
NO_OTHER_MEMORY = """
import streammerge.run.merge as merge
from streammerge.cli import main
limit_of = merge.memory_limit
merge.memory_limit = lambda asked: limit_of(asked or {budget})
main()
"""


@dataclass(frozen=True)
class Squeeze:
    method: str
    budget: int
    inside: list[Measurement]
    groups: list[CgroupFacts]
    outside: list[Measurement]

    @property
    def ratio(self) -> float:
        return _seconds(self.inside) / _seconds(self.outside)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="default: %(default)s")
    parser.add_argument("--layers", type=int, default=8, metavar="N", help="of 88 MB each, besides 262 MB (default: 8)")
    parser.add_argument("--only", metavar="METHOD,…", help="these methods")


def run(options: argparse.Namespace) -> int:
    if "STREAMMERGE_COMMAND" in os.environ:
        raise BenchError("STREAMMERGE_COMMAND: the run outside is one of this checkout; unset it.")
    chosen = options.only.split(",") if options.only else list(METHODS)
    shape = replace(TINYLLAMA, layers=options.layers)
    spec = CheckpointSpec(models=("base", "a", "b"), tensors=shape.tensors, config=shape.config)
    facts = {**describe_machine(), "environment": describe_versions(), "model": f"{spec.tensor_bytes / 1e9:.2f} GB"}
    directory: Path = options.work / "budget"
    shutil.rmtree(directory, ignore_errors=True)  # what an interrupted bench left
    squeezes: list[Squeeze] = []
    try:
        checkpoints = prepare_checkpoints(directory / "inputs", spec)
        weights = weights_of(list(checkpoints.values()))
        for name in chosen:
            recipe = write_recipe(directory / f"{name}.yml", METHODS[name], checkpoints)
            squeezes.append(_squeeze(name, recipe, directory / "merged", weights, options.rounds))
            save_json(options.json, {"facts": facts, "runs": [asdict(squeeze) for squeeze in squeezes]})
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    print(markdown_facts(facts))
    _print_squeezes(squeezes)
    return 0 if all(squeeze.ratio <= 1.15 for squeeze in squeezes) else 1


def _squeeze(name: str, recipe: Path, output: Path, weights: Sequence[Path], rounds: int) -> Squeeze:
    budget = _smallest_budget(recipe, output)
    arguments = [str(recipe), str(output), "--max-memory", str(budget), "--json"]
    found = Squeeze(name, budget, [], [], [])
    print(f"{name} in {budget / 1e6:.0f} MB: ", end="", file=sys.stderr, flush=True)
    for _ in range(rounds):
        with memory_cgroup(budget) as group:
            found.inside.append(_merge(group.wrap([*streammerge_command(), *arguments]), output, weights))
            found.groups.append(group.read_facts())
        alone = [sys.executable, "-c", NO_OTHER_MEMORY.format(budget=budget), *arguments]
        found.outside.append(_merge(alone, output, weights))
    print(f"{_seconds(found.inside):.2f} s inside, {_seconds(found.outside):.2f} outside", file=sys.stderr)
    return found


def _smallest_budget(recipe: Path, output: Path) -> int:
    command = [*streammerge_command(), str(recipe), str(output), "--max-memory", "150MB"]
    refused = subprocess.run(command, cwd=ROOT, env=child_environment(), capture_output=True, text=True, check=False)
    named = re.search(r"smallest budget that works is (\d+)MB", refused.stderr)
    if named is None:
        raise BenchError(f"150 MB were not refused: exit code {refused.returncode}, {refused.stderr}")
    return int(named[1]) * 1_000_000


def _merge(command: Sequence[str], output: Path, weights: Sequence[Path]) -> Measurement:
    for path in weights:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    measurement = measure(command, cwd=ROOT, environment=child_environment(), sync_at=output.parent)
    if measurement.exit_code != 0:
        raise BenchError(f"streammerge ended with exit code {measurement.exit_code}: {measurement.stderr_tail}")
    shutil.rmtree(output)
    return measurement


def _seconds(measured: Sequence[Measurement]) -> float:
    return statistics.median(measurement.seconds for measurement in measured)


def _print_squeezes(squeezes: Sequence[Squeeze]) -> None:
    headers = [
        "method", "budget MB", "s inside", "s outside", "ratio", "anon + shmem MiB", "group's peak MiB", "limit hits",
        "OOM kills",
    ]  # fmt: skip
    rows = [
        [
            squeeze.method,
            f"{squeeze.budget / 1e6:.0f}",
            f"{_seconds(squeeze.inside):.2f}",
            f"{_seconds(squeeze.outside):.2f}",
            f"{squeeze.ratio:.2f}",
            format_mib(max(each.peak_anonymous_bytes for each in squeeze.inside)),
            format_mib(max(group.peak_bytes for group in squeeze.groups)),
            str(max(group.limit_hits for group in squeeze.groups)),
            str(sum(group.oom_kills for group in squeeze.groups)),
        ]
        for squeeze in squeezes
    ]
    print(f"\n{markdown_table(headers, rows)}")
