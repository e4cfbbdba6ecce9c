"""Whole merges, process start to synced output, beside mergekit and beside reading and writing the same bytes.

Three bf16 checkpoints of TinyLlama's shape (2.2 GB each; --quick: 270 MB) are made once and kept. In every round each
tool runs once, in turn: mergekit on the same recipe in the first --mergekit-runs rounds, what only reads and writes
once for each set of inputs. Inputs are in the page cache, in the cold rounds nothing is. Outputs go to an ext4 file
system in an image that was written in full before (see image.py); it is emptied and synced before each run, untimed.
The clock runs from process start to the end of a sync of that file system, for every tool. Before the first round each
method runs once with --compile on, so that its programs are there; what that took is in a column of its own.

    streammerge       the command line, as a user calls it
    mergekit          mergekit-yaml, the same recipe, default flags but for --no-copy-tokenizer
    cat + cp          cat of the inputs to /dev/null, cp of one input to the output, sync
    loop, N passes    the import of torch; preadv of every input into one 8 MiB buffer, N times; in the last, pwritev
                      of the output's size, hashed, with an fdatasync and a line in a journal every 256 MiB
    disk              cold rounds only: the inputs read past the page cache by four threads

The table has minima of the rounds, as disks and other programs only ever add to them. GB/s counts every input once, and
the output, over the whole process; the share of the disk is that rate, cold, over the rate of `disk`. "Merging" is the
part of streammerge's seconds after start, planning and compiling; `engine` compares it with mergekit's seconds without
the import of mergekit.
"""

import argparse
import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from benchlib.chart import draw_speed
from benchlib.checkpoints import QUICK, TINYLLAMA, CheckpointSpec, prepare_checkpoints, read_tensor_bytes, weights_of
from benchlib.errors import BenchError
from benchlib.image import mounted_image
from benchlib.machine import describe_machine, describe_versions
from benchlib.measure import Measurement, measure, sync_filesystem
from benchlib.project import ROOT, child_environment, helper_environment, streammerge_command
from benchlib.recipes import METHODS, OURS_ALONE, Method, write_recipe
from benchlib.tables import format_mib, markdown_facts, markdown_table, save_json

SUMMARY = "every method in one table: seconds, rates and peak memory, beside mergekit, copying and a bare loop"
IMAGE_BYTES = 8 << 30
QUICK_IMAGE_BYTES = 3 << 29  # 1.5 GiB
OURS, MERGEKIT, IMPORT, COPY, DISK = "streammerge", "mergekit", "import mergekit", "cat + cp", "disk"
WARMING_BUFFER = bytearray(1 << 20)


@dataclass(frozen=True)
class Tool:
    """One command. `of` is what it is measured for: a method, or the set of inputs that it reads."""

    name: str
    of: str
    inputs: tuple[Path, ...]
    command: tuple[str, ...]
    environment: Mapping[str, str]
    merges: bool = False  # the output directory must hold a whole checkpoint afterwards


@dataclass(frozen=True)
class Run:
    tool: str
    of: str
    round: int  # 0: with --compile on, before the others
    cold: bool
    measurement: Measurement
    error: str  # empty when all is well


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="a 270 MB model instead of a 2.2 GB one")
    parser.add_argument("--methods", default=",".join(METHODS), metavar="M,…", help="which recipes (default: all)")
    parser.add_argument("--runs", type=int, default=3, metavar="N", help="rounds from the page cache (default: 3)")
    parser.add_argument("--cold-runs", type=int, default=0, metavar="N", help="rounds from the disk (default: 0)")
    parser.add_argument("--mergekit-runs", type=int, metavar="N", help="rounds with mergekit in them (default: all)")
    parser.add_argument("--no-image", action="store_true", help="write to a plain directory, without a loop device")
    parser.add_argument("--merges-only", action="store_true", help="leave out what only reads and writes")
    parser.add_argument("--chart", type=Path, metavar="FILE", help="draw the table: .svg or .png")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--mergekit", type=Path, metavar="ENV", help="the environment that mergekit is installed in")
    which.add_argument("--no-mergekit", action="store_true", help="leave mergekit out")


def run(options: argparse.Namespace) -> int:
    methods = _choose_methods(options.methods)
    mergekit = None if options.no_mergekit else _find_mergekit(options.mergekit)
    mergekit_runs = options.runs if options.mergekit_runs is None else options.mergekit_runs
    suffix = "-quick" if options.quick else ""
    shape = QUICK if options.quick else TINYLLAMA
    spec = CheckpointSpec(models=("base", "a", "b"), tensors=shape.tensors, config=shape.config)
    checkpoints = prepare_checkpoints(options.work / f"inputs{suffix}", spec)
    recipes = {
        method.name: write_recipe(options.work / f"recipes{suffix}" / f"{method.name}.yml", method, checkpoints)
        for method in methods
    }
    facts = _describe_setting(options, mergekit, spec)
    runs: list[Run] = []
    with _output_filesystem(options, suffix) as filesystem:
        tools = _list_tools(methods, recipes, checkpoints, filesystem, spec.tensor_bytes, mergekit)
        plain = [tool for tool in tools if tool.merges or tool.name == IMPORT or not options.merges_only]

        def measure_all(tools: Sequence[Tool], number: int, *, cold: bool = False) -> None:
            for tool in tools:
                _prepare_caches(filesystem, tool.inputs, cold=cold)
                place = "cold round" if cold else "round" if number else "compiling, round"
                print(f"{place} {number}, {tool.of}, {tool.name}: ", end="", file=sys.stderr, flush=True)
                runs.append(_run_once(tool, number, cold, filesystem, spec.tensor_bytes))
                print(f"{runs[-1].measurement.seconds:.2f} s {runs[-1].error}".rstrip(), file=sys.stderr)
                save_json(options.json, {"facts": facts, "runs": [asdict(entry) for entry in runs]})
            _empty(filesystem)

        measure_all([_compiling(tool) for tool in plain if tool.name == OURS], 0)
        for number in range(1, options.runs + 1):
            measure_all(
                [t for t in plain if t.name != DISK and (number <= mergekit_runs or "mergekit" not in t.name)], number
            )
        for number in range(1, options.cold_runs + 1):
            measure_all([t for t in plain if "mergekit" not in t.name], number, cold=True)
    print(markdown_facts(facts))
    print(f"\n{_references_table(runs)}\n\n{_methods_table(methods, runs, spec.tensor_bytes)}")
    if options.chart is not None:
        draw_speed(options.chart, *_seconds_to_draw(methods, runs), f"{facts['cpu']}, {facts['date']}")
    failed = [entry for entry in runs if entry.error]
    for entry in failed:
        print(f"\n{entry.of}, {entry.tool}, round {entry.round}: {entry.error}")
    return 1 if failed else 0


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
    facts["outputs"] = "a plain directory" if options.no_image else "ext4 in an image written in full beforehand"
    facts["rounds"] = f"{options.runs} from the page cache, {options.cold_runs} cold"
    if mergekit is not None and options.mergekit_runs is not None:
        facts["rounds with mergekit"] = str(options.mergekit_runs)
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
    methods: Sequence[Method],
    recipes: Mapping[str, Path],
    checkpoints: Mapping[str, Path],
    filesystem: Path,
    output_bytes: int,
    mergekit: Path | None,
) -> list[Tool]:
    """What only reads and writes, once for each set of inputs and number of passes; then the merges."""
    merged = str(filesystem / "merged")
    copied = str(filesystem / "copied.safetensors")
    files = {
        _name_inputs(method): tuple(weights_of([checkpoints[name] for name in method.inputs])) for method in methods
    }
    tools: list[Tool] = []
    for name, inputs in files.items():
        shell = 'out=$1; shift; cat "$@" > /dev/null && cp "$1" "$out" && sync -f "$out"'
        tools.append(
            Tool(COPY, name, inputs, ("sh", "-c", shell, "sh", copied, *map(str, inputs)), child_environment())
        )
        loop = (sys.executable, "-m", "benchlib.tile_loop", *map(str, inputs), "--output", copied,
                "--output-bytes", str(output_bytes))  # fmt: skip
        passes = sorted({method.num_passes for method in methods if _name_inputs(method) == name})
        tools += [
            Tool(_loop_name(count), name, inputs, (*loop, "--passes", str(count)), helper_environment())
            for count in passes
        ]
        disk = (sys.executable, "-m", "benchlib.disk_rate", *map(str, inputs))
        tools.append(Tool(DISK, name, inputs, disk, helper_environment()))
    if mergekit is not None:
        command = (str(mergekit / "python"), "-c", "import mergekit.scripts.run_yaml")
        tools.append(Tool(IMPORT, "mergekit", (), command, child_environment()))
    for method in methods:
        inputs, recipe = files[_name_inputs(method)], str(recipes[method.name])
        ours = (*streammerge_command(), recipe, merged, "--json")
        tools.append(Tool(OURS, method.name, inputs, ours, child_environment(), merges=True))
        if mergekit is not None and method not in OURS_ALONE:
            theirs = (str(mergekit / "mergekit-yaml"), recipe, merged, "--no-copy-tokenizer")
            tools.append(Tool(MERGEKIT, method.name, inputs, theirs, child_environment(), merges=True))
    return tools


def _compiling(tool: Tool) -> Tool:
    return Tool(
        tool.name, tool.of, tool.inputs, (*tool.command, "--compile", "on"), tool.environment, merges=tool.merges
    )


def _name_inputs(method: Method) -> str:
    return " + ".join(sorted(method.inputs, key=("base", "a", "b").index))


def _loop_name(passes: int) -> str:
    return f"loop, {passes} pass{'es'[: 2 * (passes > 1)]}"


def _prepare_caches(filesystem: Path, inputs: Sequence[Path], *, cold: bool) -> None:
    _empty(filesystem)
    if cold:
        os.sync()
        try:
            Path("/proc/sys/vm/drop_caches").write_text("3")
        except OSError as error:
            raise BenchError(f"--cold-runs: the page cache cannot be dropped: {error.strerror}; needs root.") from error
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


def _run_once(tool: Tool, number: int, cold: bool, filesystem: Path, output_bytes: int) -> Run:
    measurement = measure(tool.command, cwd=ROOT, environment=tool.environment, sync_at=filesystem)
    error = ""
    if measurement.exit_code != 0:
        last_words = measurement.stderr_tail.strip().splitlines()[-1:] or ["nothing on standard error"]
        error = f"exit code {measurement.exit_code}: {last_words[0]}"
    elif tool.merges:
        written = read_tensor_bytes(filesystem / "merged")
        # mergekit writes the float32 of some methods whatever was asked for.
        if written != output_bytes and tool.name == OURS:
            error = f"wrote {written} bytes of tensors, expected {output_bytes}"
    return Run(tool.name, tool.of, number, cold, measurement, error)


def _good(runs: Sequence[Run], tool: str, of: str, *, cold: bool = False) -> list[Measurement]:
    return [
        e.measurement for e in runs
        if (e.tool, e.of, e.cold) == (tool, of, cold) and e.round > 0 and not e.error
    ]  # fmt: skip


def _least(measurements: Sequence[Measurement]) -> float | None:
    return min((m.seconds for m in measurements), default=None)


def _references_table(runs: Sequence[Run]) -> str:
    """What only reads and writes, and the import of mergekit."""
    rows = []
    for tool, of in dict.fromkeys((e.tool, e.of) for e in runs if e.tool not in {OURS, MERGEKIT}):
        warm, cold = _least(_good(runs, tool, of)), _least(_good(runs, tool, of, cold=True))
        rate = _disk_rate(runs, of) if tool == DISK else None
        rows.append([f"{tool}: {of}" if tool != IMPORT else tool, _number(warm), _number(cold), _number(rate, 1e9)])
    return markdown_table(["reading and writing alone", "warm s", "cold s", "GB/s of the disk"], rows)


def _methods_table(methods: Sequence[Method], runs: Sequence[Run], model_bytes: int) -> str:
    """One row per method."""
    rows = []
    for method in methods:
        of = _name_inputs(method)
        ours, cold = _good(runs, OURS, method.name), _least(_good(runs, OURS, method.name, cold=True))
        seconds = _least(ours)
        if seconds is None:
            rows.append([method.name, "failed", *[""] * 13])
            continue
        moved = (len(method.inputs) + 1) * model_bytes
        engine = min(m.report["engine_seconds"] for m in ours)
        theirs = _good(runs, MERGEKIT, method.name)
        whole, importing = _least(theirs), _least(_good(runs, IMPORT, "mergekit"))
        disk = _disk_rate(runs, of)
        rows.append([
            method.name, _number(seconds), _number(engine), _number(moved / seconds, 1e9),
            str(method.num_passes),
            _ratio(seconds, _least(_good(runs, _loop_name(method.num_passes), of))),
            _ratio(seconds, _least(_good(runs, COPY, of))),
            format_mib(max(m.largest_process_bytes for m in ours)),
            _number(next((e.measurement.report["compile_seconds"] for e in runs
                          if e.round == 0 and e.of == method.name and not e.error), None)),
            _number(cold),
            "" if cold is None or disk is None else f"{moved / cold / disk:.0%}",
            _number(whole), _ratio(whole, seconds),
            "" if whole is None or importing is None else _ratio(whole - importing, engine),
            format_mib(max(m.largest_process_bytes for m in theirs)) if theirs else "",
        ])  # fmt: skip
    headers = [
        "method", "s", "merging s", "GB/s", "passes", "÷ loop of its passes", "÷ cat + cp",
        "peak MiB", "compiled once in s", "cold s", "share of disk", "mergekit s", "times as fast", "engine",
        "mergekit MiB",
    ]  # fmt: skip
    return markdown_table(headers, rows)


def _disk_rate(runs: Sequence[Run], of: str) -> float | None:
    """Bytes per second, the most of the cold rounds."""
    return max((m.report["bytes_per_second"] for m in _good(runs, DISK, of, cold=True)), default=None)


def _seconds_to_draw(methods: Sequence[Method], runs: Sequence[Run]) -> tuple[list[str], dict[str, list[float | None]]]:
    names = [method.name for method in methods]
    series = {tool: [_least(_good(runs, tool, name)) for name in names] for tool in (OURS, MERGEKIT)}
    return names, series | {COPY: [_least(_good(runs, COPY, _name_inputs(method))) for method in methods]}


def _number(value: float | None, unit: float = 1.0) -> str:
    return "" if value is None else f"{value / unit:.2f}"


def _ratio(value: float | None, other: float | None) -> str:
    return (
        ""
        if value is None or other is None
        else f"{value / other:.2f}"
        if value < 9.95 * other
        else (f"{value / other:.1f}")
    )
