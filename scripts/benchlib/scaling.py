"""How a cluster run scales: measured here for 1 and 2 workers, and simulated for up to 64 with a 70B model.

Measured: TIES of two checkpoints of TinyLlama's shape and their base, in shards of 250 MB, by workers of one thread
each that start together, from the page cache, in turn; from the first start to the end of the last and of finalize.

Simulated: three inputs and an output of Llama-70B's shape. Every worker begins after the start-up that was measured,
takes units in the order that the real workers take (`streammerge.cluster.units`), and moves bytes at the rate that was
measured for one worker here, unless all together would exceed the file system's rate: then they share it evenly.
"""

import argparse
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchlib.checkpoints import QUICK, TINYLLAMA, CheckpointSpec, prepare_checkpoints, weights_of
from benchlib.errors import BenchError
from benchlib.machine import describe_machine, describe_versions
from benchlib.project import ROOT, child_environment, streammerge_command
from benchlib.recipes import METHODS, write_recipe
from benchlib.tables import markdown_facts, markdown_table, save_json

SUMMARY = "a cluster run: 1 and 2 workers measured, 1 to 64 simulated"
MODEL_BYTES = 141_107_412_992  # bf16, Llama-3.1-70B: 70,553,706,496 parameters
INPUTS = 3
WORKERS = (1, 2, 4, 8, 16, 32, 64)
FILE_SYSTEMS = (2e9, 10e9, 50e9)
SHARDS = (5_000_000_000, 1_000_000_000)
WARMING_BUFFER = bytearray(1 << 20)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="a 270 MB model instead of a 2.2 GB one")
    parser.add_argument("--runs", type=int, default=3, metavar="N", help="rounds (default: %(default)s)")


def run(options: argparse.Namespace) -> int:
    shape = QUICK if options.quick else TINYLLAMA
    spec = CheckpointSpec(models=("base", "a", "b"), tensors=shape.tensors, config=shape.config)
    checkpoints = prepare_checkpoints(options.work / ("inputs-quick" if options.quick else "inputs"), spec)
    recipe = write_recipe(options.work / "recipes-scaling" / "ties.yml", METHODS["ties"], checkpoints)
    inputs = weights_of(list(checkpoints.values()))
    out = options.work / "scaling"
    seconds: dict[int, list[float]] = {1: [], 2: []}
    for round_number in range(options.runs + 1):
        for count, taken in seconds.items():
            elapsed = _measure(recipe, out, inputs, count)
            print(f"round {round_number}, {count} workers: {elapsed:.2f} s", file=sys.stderr)
            # The first round may compile.
            if round_number > 0:
                taken.append(elapsed)
    shutil.rmtree(out)
    nothing = _measure_start(options.work)
    moved = (INPUTS + 1) * spec.tensor_bytes
    medians = {count: statistics.median(taken) for count, taken in seconds.items()}
    rate = moved / (medians[1] - nothing)
    facts = describe_machine() | {"this environment": describe_versions(), "rounds": str(options.runs)}
    print(markdown_facts(facts))
    rows = [
        [str(count), f"{taken:.2f}", f"{moved / taken / 1e9:.2f}", f"{medians[1] / taken:.2f}"]
        for count, taken in medians.items()
    ]
    print(f"\n{markdown_table(['workers, measured', 's', 'GB/s', 'times one'], rows)}")
    print(f"\nstart-up {nothing:.2f} s; one worker moves {rate / 1e9:.2f} GB/s\n")
    places = [(size, system) for size in SHARDS for system in FILE_SYSTEMS]
    simulated = [
        [str(count), *(f"{simulate(count, size, rate, system, nothing):,.0f}" for size, system in places)]
        for count in WORKERS
    ]
    headings = [f"{system / 1e9:.0f} GB/s, {size / 1e9:.0f} GB shards" for size, system in places]
    print(markdown_table(["workers, simulated: seconds", *headings], simulated))
    save_json(options.json, {"facts": facts, "seconds": seconds, "start": nothing, "rate": rate})
    return 0


def _measure(recipe: Path, out: Path, inputs: Sequence[Path], count: int) -> float:
    shutil.rmtree(out, ignore_errors=True)
    command, environment = streammerge_command(), child_environment()
    _run([*command, "submit", str(recipe), str(out), "--plan-only", "--out-shard-size", "250MB"])
    for path in inputs:
        with path.open("rb", buffering=0) as file:
            while file.readinto(WARMING_BUFFER):
                pass
    began = time.perf_counter()
    workers = [
        subprocess.Popen([*command, "work", str(out), "--threads", "1", "--index", str(index), "--count", str(count)],
                         cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
        for index in range(count)
    ]  # fmt: skip
    codes = [worker.wait() for worker in workers]
    if any(codes):
        raise BenchError(f"workers ended with {codes}")
    _run([*command, "finalize", str(out)])
    return time.perf_counter() - began


def _measure_start(work: Path) -> float:
    """What a worker takes that finds nothing to do."""
    began = time.perf_counter()
    subprocess.run([*streammerge_command(), "work", str(work / "nothing")], cwd=ROOT, env=child_environment(),
                   capture_output=True, check=False)  # fmt: skip
    return time.perf_counter() - began


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, cwd=ROOT, env=child_environment(), capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise BenchError(f"{' '.join(command)}: {done.stderr.strip()}")


def simulate(count: int, shard_bytes: int, rate: float, system: float, start: float) -> float:
    """Seconds until the last unit is done."""
    # Only now: the process that measures stays small.
    sys.path.insert(0, str(ROOT))
    from streammerge.cluster.units import Unit, order_for

    sizes = [shard_bytes] * (MODEL_BYTES // shard_bytes) + [MODEL_BYTES % shard_bytes]
    units = [Unit(number, "", (), INPUTS * size, size) for number, size in enumerate(sizes)]
    orders = [order_for(units, index, count) for index in range(count)]
    taken: set[int] = set()
    now = start
    left: dict[int, float] = {}

    def take(worker: int) -> None:
        unit = next((unit for unit in orders[worker] if unit.number not in taken), None)
        if unit is not None:
            taken.add(unit.number)
            left[worker] = float(unit.moved_bytes)

    for worker in range(count):
        take(worker)
    while left:
        speed = min(rate, system / len(left))
        step = min(left.values()) / speed
        now += step
        left = {worker: nbytes - step * speed for worker, nbytes in left.items()}
        ended = [worker for worker, nbytes in left.items() if nbytes <= 1]
        for worker in ended:
            del left[worker]
        for worker in ended:
            take(worker)
    return now
