"""Whole merges, process start to synced output, beside mergekit and beside reading and writing the same bytes.

Three bf16 checkpoints of TinyLlama's shape (2.2 GB each; --quick: 270 MB) are made once and kept. Every tool runs once
per round, in turn, on the same recipe. Inputs are in the page cache (--cold: nothing is). Outputs go to an ext4 file
system in an image that was written in full before (see image.py); it is emptied and synced before each run, untimed.
The clock runs from process start to the end of a sync of that file system, for every tool.

    streammerge       the command line, as a user calls it
    mergekit          mergekit-yaml, the same recipe, default flags but for --no-copy-tokenizer
    cat + cp          cat of the inputs to /dev/null, cp of one input to the output, sync
    loop              preadv of every input into one 8 MiB buffer, pwritev of the output's size
    loop, fdatasync   the same with an fdatasync every 256 MiB
    loop, N passes    the same with every input read N times, for methods that must see their inputs N times
"""

import argparse
import os
import shutil
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchlib.checkpoints import QUICK, TINYLLAMA, CheckpointSpec, prepare_checkpoints, read_tensor_bytes, weights_of
from benchlib.errors import BenchError
from benchlib.image import mounted_image
from benchlib.machine import describe_machine, describe_versions
from benchlib.measure import Measurement, measure, sync_filesystem
from benchlib.project import ROOT, child_environment, helper_environment, streammerge_command
from benchlib.recipes import METHODS, OURS_ALONE, Method, write_recipe
from benchlib.tables import format_mib, markdown_facts, markdown_table, save_json

SUMMARY = "seconds and peak memory of whole merges, beside mergekit and plain copying"
IMAGE_BYTES = 8 << 30
QUICK_IMAGE_BYTES = 3 << 29  # 1.5 GiB
OURS = "streammerge"
WARMING_BUFFER = bytearray(1 << 20)


@dataclass(frozen=True)
class Tool:
    """Something that reads the inputs of a recipe and writes as many bytes as its output has."""

    name: str
    command: tuple[str, ...]
    environment: Mapping[str, str]
    merges: bool  # the output directory must hold a whole checkpoint afterwards


@dataclass(frozen=True)
class Run:
    method: str
    tool: str
    round: int
    measurement: Measurement
    error: str  # empty when all is well


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="a 270 MB model instead of a 2.2 GB one")
    parser.add_argument(
        "--methods", default=",".join(METHODS), metavar="M,…", help="which recipes (default: %(default)s)"
    )
    parser.add_argument("--runs", type=int, default=3, metavar="N", help="rounds (default: %(default)s)")
    parser.add_argument("--cold", action="store_true", help="drop every page cache before each run (needs root)")
    parser.add_argument("--no-image", action="store_true", help="write to a plain directory, without a loop device")
    parser.add_argument("--merges-only", action="store_true", help="leave cat, cp and the loops out")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--mergekit", type=Path, metavar="ENV", help="the environment that mergekit is installed in")
    which.add_argument("--no-mergekit", action="store_true", help="leave mergekit out")


def run(options: argparse.Namespace) -> int:
    methods = _choose_methods(options.methods)
    mergekit = None if options.no_mergekit else _find_mergekit(options.mergekit)
    suffix = "-quick" if options.quick else ""
    shape = QUICK if options.quick else TINYLLAMA
    spec = CheckpointSpec(models=("base", "a", "b"), tensors=shape.tensors, config=shape.config)
    checkpoints = prepare_checkpoints(options.work / f"inputs{suffix}", spec)
    facts = _describe_setting(options, mergekit, spec)
    runs: list[Run] = []
    with _output_filesystem(options, suffix) as filesystem:
        for method in methods:
            recipe = write_recipe(options.work / f"recipes{suffix}" / f"{method.name}.yml", method, checkpoints)
            inputs = weights_of([checkpoints[name] for name in method.inputs])
            tools = _list_tools(
                method, recipe, inputs, filesystem=filesystem, output_bytes=spec.tensor_bytes, mergekit=mergekit
            )
            if options.merges_only:
                tools = [tool for tool in tools if tool.merges]
            for round_number in range(1, options.runs + 1):
                for tool in tools:
                    _prepare_caches(filesystem, inputs, cold=options.cold)
                    label = f"{method.name}, round {round_number} of {options.runs}, {tool.name}"
                    print(f"{label}: ", end="", file=sys.stderr, flush=True)
                    runs.append(_run_once(tool, method, round_number, filesystem, spec.tensor_bytes))
                    print(f"{runs[-1].measurement.seconds:.2f} s {runs[-1].error}".rstrip(), file=sys.stderr)
                    save_json(options.json, {"facts": facts, "runs": [asdict(entry) for entry in runs]})
            _empty(filesystem)
    print(markdown_facts(facts))
    for method in methods:
        _print_method(method, [entry for entry in runs if entry.method == method.name])
    if len(methods) > 1:
        _print_all(methods, runs, spec.tensor_bytes)
    return 1 if any(entry.error for entry in runs) else 0


def _choose_methods(names: str) -> list[Method]:
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    unknown = [name for name in wanted if name not in METHODS]
    if unknown:
        raise BenchError(f"no recipe for {', '.join(unknown)}; there are {', '.join(METHODS)}.")
    return [METHODS[name] for name in wanted]


def _find_mergekit(environment: Path | None) -> Path | None:
    """The bin directory that holds mergekit-yaml and its python."""
    if environment is not None:
        found = environment.absolute() / "bin" / "mergekit-yaml"
        if not found.exists():
            raise BenchError(f"{found} does not exist: --mergekit takes the directory of a virtual environment.")
        return found.parent
    on_path = shutil.which("mergekit-yaml")
    if on_path is None:
        raise BenchError("mergekit-yaml is not on PATH. Say --mergekit ENV, or --no-mergekit to go without.")
    return Path(on_path).parent


def _describe_setting(options: argparse.Namespace, mergekit: Path | None, spec: CheckpointSpec) -> dict[str, str]:
    facts = describe_machine()
    facts["this environment"] = describe_versions()
    if mergekit is not None:
        facts["mergekit's environment"] = describe_versions(mergekit / "python")
    facts["model"] = f"bf16, {len(spec.tensors)} tensors, {spec.tensor_bytes / 1e9:.2f} GB each"
    facts["inputs"] = "cold: page cache dropped before each run" if options.cold else "in the page cache"
    facts["outputs"] = "a plain directory" if options.no_image else "ext4 in an image written in full beforehand"
    facts["rounds"] = str(options.runs)
    return facts


@contextmanager
def _output_filesystem(options: argparse.Namespace, suffix: str) -> Iterator[Path]:
    directory: Path = options.work / f"output{suffix}"
    if options.no_image:
        directory.mkdir(parents=True, exist_ok=True)
        yield directory
        return
    size = QUICK_IMAGE_BYTES if options.quick else IMAGE_BYTES
    with mounted_image(options.work / f"output{suffix}.img", size, directory) as filesystem:
        yield filesystem


def _list_tools(
    method: Method, recipe: Path, inputs: Sequence[Path], *, filesystem: Path, output_bytes: int, mergekit: Path | None
) -> list[Tool]:
    merged = str(filesystem / "merged")
    copied = str(filesystem / "copied.safetensors")
    tools = [Tool(OURS, (*streammerge_command(), str(recipe), merged, "--json"), child_environment(), merges=True)]
    if mergekit is not None and method not in OURS_ALONE:
        command = (str(mergekit / "mergekit-yaml"), str(recipe), merged, "--no-copy-tokenizer")
        tools.append(Tool("mergekit", command, child_environment(), merges=True))
    shell = 'out=$1; shift; cat "$@" > /dev/null && cp "$1" "$out" && sync -f "$out"'
    cat_and_cp = ("sh", "-c", shell, "sh", copied, *map(str, inputs))
    tools.append(Tool("cat + cp", cat_and_cp, child_environment(), merges=False))
    loop = (sys.executable, "-m", "benchlib.tile_loop", *map(str, inputs), "--output", copied,
            "--output-bytes", str(output_bytes))  # fmt: skip
    variants = {"loop": (), "loop, fdatasync": ("--fdatasync",)}
    if method.num_passes > 1:
        variants[f"loop, {method.num_passes} passes"] = ("--passes", str(method.num_passes))
    tools += [Tool(name, (*loop, *flags), helper_environment(), merges=False) for name, flags in variants.items()]
    return tools


def _prepare_caches(filesystem: Path, inputs: Sequence[Path], *, cold: bool) -> None:
    _empty(filesystem)
    if cold:
        os.sync()
        try:
            Path("/proc/sys/vm/drop_caches").write_text("3")
        except OSError as error:
            raise BenchError(f"--cold cannot drop the page cache: {error.strerror}; it needs root.") from error
    else:
        for path in inputs:
            with path.open("rb", buffering=0) as file:
                while file.readinto(WARMING_BUFFER):
                    pass


def _empty(filesystem: Path) -> None:
    for entry in filesystem.iterdir():
        if entry.name == "lost+found":
            continue
        if entry.is_dir():
            shutil.rmtree(entry)
        else:
            entry.unlink()
    sync_filesystem(filesystem)


def _run_once(tool: Tool, method: Method, round_number: int, filesystem: Path, output_bytes: int) -> Run:
    measurement = measure(tool.command, cwd=ROOT, environment=tool.environment, sync_at=filesystem)
    error = ""
    if measurement.exit_code != 0:
        last_words = measurement.stderr_tail.strip().splitlines()[-1:] or ["nothing on standard error"]
        error = f"exit code {measurement.exit_code}: {last_words[0]}"
    elif tool.merges:
        written = read_tensor_bytes(filesystem / "merged")
        if written != output_bytes:
            error = f"wrote {written} bytes of tensors, expected {output_bytes}"
    return Run(method.name, tool.name, round_number, measurement, error)


def _print_method(method: Method, runs: Sequence[Run]) -> None:
    by_tool: dict[str, list[Run]] = {}
    for entry in runs:
        by_tool.setdefault(entry.tool, []).append(entry)
    good = {tool: [e.measurement for e in entries if not e.error] for tool, entries in by_tool.items()}
    minima = {tool: min(m.seconds for m in measurements) for tool, measurements in good.items() if measurements}
    rows = [_row(tool, good[tool], minima.get(OURS)) if good[tool] else [tool, "failed", *[""] * 8] for tool in by_tool]
    headers = [
        method.name, "min s", "median s", "max s", f"÷ {OURS}", "CPU s", "largest process MiB", "anon + shmem MiB",
        "RSS MiB", "others' CPU s",
    ]  # fmt: skip
    print(f"\n{markdown_table(headers, rows)}")
    for entry in runs:
        if entry.error:
            print(f"\n{entry.tool}, round {entry.round}: {entry.error}")
    fastest = min(good.get(OURS) or [], key=lambda m: m.seconds, default=None)
    if fastest is not None and fastest.report:
        print(f"\n{OURS} reports of its fastest run: {_format_report(fastest.report)}")


def _print_all(methods: Sequence[Method], runs: Sequence[Run], model_bytes: int) -> None:
    """One row per method. GB/s counts every input once, and the output, over the whole process."""
    rows = []
    for method in methods:
        found: dict[str, list[Measurement]] = {}
        for entry in runs:
            if entry.method == method.name and not entry.error:
                found.setdefault(entry.tool, []).append(entry.measurement)
        if OURS not in found:
            rows.append([method.name, "failed", *[""] * 5])
            continue
        seconds = min(m.seconds for m in found[OURS])
        peak = max(m.largest_process_bytes for m in found[OURS])
        theirs = min((m.seconds for m in found.get("mergekit", [])), default=None)
        rate = (len(method.inputs) + 1) * model_bytes / seconds / 1e9
        rows.append([
            method.name, f"{seconds:.2f}", f"{rate:.2f}", format_mib(peak), "" if theirs is None else f"{theirs:.1f}",
            "" if theirs is None else f"{theirs / seconds:.1f}",
            "" if theirs is None else format_mib(max(m.largest_process_bytes for m in found["mergekit"])),
        ])  # fmt: skip
    headers = ["all methods", "min s", "GB/s", "peak MiB", "mergekit, min s", "times as fast", "mergekit's peak MiB"]
    print(f"\n{markdown_table(headers, rows)}")


def _row(tool: str, measurements: Sequence[Measurement], ours: float | None) -> list[str]:
    seconds = [m.seconds for m in measurements]
    fastest = min(measurements, key=lambda m: m.seconds)
    return [
        tool,
        f"{min(seconds):.2f}",
        f"{statistics.median(seconds):.2f}",
        f"{max(seconds):.2f}",
        f"{min(seconds) / ours:.2f}" if ours else "?",
        f"{fastest.user_seconds + fastest.system_seconds:.1f}",
        format_mib(max(m.largest_process_bytes for m in measurements)),
        format_mib(max(m.peak_anonymous_bytes for m in measurements)),
        format_mib(max(m.peak_resident_bytes for m in measurements)),
        f"{max(m.other_cpu_seconds for m in measurements):.1f}",
    ]


def _format_report(report: Mapping[str, Any]) -> str:
    """The numbers of the final report object, whichever it has."""
    parts = []
    for key, value in report.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        parts.append(f"{key} {format_mib(value)} MiB" if "bytes" in key else f"{key} {value:.6g}")
    return ", ".join(parts)
