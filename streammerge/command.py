"""What verbs share: their flags, the terminal they talk to, and the options that flags come to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from streammerge.base.errors import OutputError, Stopped, StreamMergeError, UserError
from streammerge.base.units import parse_shard_size, parse_size
from streammerge.ui import Terminal

if TYPE_CHECKING:
    from streammerge.plan.budget import Schedule
    from streammerge.plan.plan import Plan
    from streammerge.run.merge import Options
    from streammerge.run.walk import Status

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="The recipe, mergekit's YAML.")]
OutPath = Annotated[Path, typer.Argument(metavar="OUT", help="The output directory.")]
MaxMemory = Annotated[
    str | None, typer.Option(metavar="SIZE", help="Most memory of the whole process, like 24GB. Else a small default.")
]
MaxGpuMemory = Annotated[str | None, typer.Option(metavar="SIZE", help="Most memory to take on the GPU.")]
Device = Annotated[str, typer.Option(metavar="cpu|cuda|cuda:N|auto", help="Where to compute.")]
ShardSize = Annotated[str, typer.Option(metavar="SIZE", help="Largest output file, like 5GB.")]
Threads = Annotated[
    int | None,
    typer.Option("--threads", "--num-threads", "-j", min=1, help="Threads that compute. Else all processors."),
]
Compile = Annotated[
    Literal["auto", "on", "off"], typer.Option("--compile", help="Compile the arithmetic: same bits, faster.")
]
Seed = Annotated[int, typer.Option("--seed", "--random-seed", help="Seed of the methods that drop at random.")]
Strict = Annotated[bool, typer.Option("--strict", help="Take unknown keys in the recipe for errors.")]
Json = Annotated[bool, typer.Option("--json", help="JSON on stdout instead of text.")]

Random = Annotated[
    Literal["position", "mergekit"],
    typer.Option("--rng", help="What DARE draws: bits by position, or the numbers mergekit draws for that seed."),
]
Restart = Annotated[bool, typer.Option("--restart", help="Throw away unfinished work in OUT first.")]
VerifyOutput = Annotated[
    bool, typer.Option("--verify-output", help="At the end read OUT again, from the disk, as verify does.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print only notes and errors.")]


class Watcher:
    """Tells a terminal what a merge does."""

    def __init__(self, terminal: Terminal) -> None:
        self._terminal = terminal
        self._allowed = 0

    def note(self, text: str) -> None:
        self._terminal.note(text)

    def planned(self, plan: Plan, schedule: Schedule, resumed: int, seconds: float) -> None:
        from streammerge import report
        from streammerge.run.sidefiles import side_files

        self._allowed = schedule.limit_bytes
        rows = report.plan_rows(plan, schedule, seconds, list(side_files(plan)))
        shown = ("method", "models", "tensors", "names", "passes", "peak memory", "time")
        self._terminal.rows("plan", [row for row in rows if row[0] in shown])
        if resumed:
            self._terminal.rows(
                "plan", [("resuming", f"{resumed:,} of {len(plan.tensors):,} tensors are done already")]
            )
        self._terminal.event("plan", {"digest": plan.digest, "tensors": len(plan.tensors), "resumed": resumed,
                                      "bytes_to_write": plan.bytes_to_write,
                                      "peak_bytes": schedule.peak_bytes})  # fmt: skip

    def running(self, status: Callable[[], Status], read_bytes: int, write_bytes: int) -> AbstractContextManager[None]:
        def numbers() -> tuple[int, int, int]:
            now = status()
            return now.read_bytes, now.written_bytes, now.own_bytes

        return self._terminal.progress(read_bytes + write_bytes, numbers, self._allowed)


def make_options(max_memory: str | None, max_gpu_memory: str | None, device: str, out_shard_size: str,
                 threads: int | None, compile_: Literal["auto", "on", "off"], seed: int, restart: bool,
                 strict: bool) -> Options:  # fmt: skip
    """The options of a merge. Raises UserError."""
    memory = None if max_memory is None else parse_size(max_memory, flag="--max-memory")
    gpu_memory = None if max_gpu_memory is None else parse_size(max_gpu_memory, flag="--max-gpu-memory")
    shard_bytes = parse_shard_size(out_shard_size)
    from streammerge.run.merge import Options

    return Options(
        memory, gpu_memory, device, threads, shard_bytes, compile_, seed=seed, restart=restart, strict=strict
    )


@contextmanager
def open_terminal(*, quiet: bool = False, as_json: bool = False, log: Path | None = None) -> Iterator[Terminal]:
    """A terminal; errors of ours are printed on it and end the program with their exit code."""
    try:
        terminal = Terminal(quiet=quiet, as_json=as_json, log=log)
    except OSError as error:
        Terminal().error(f"--log: {log}: cannot be written: {error.strerror}.")
        raise typer.Exit(OutputError.exit_code) from None
    try:
        yield terminal
    except StreamMergeError as error:
        terminal.error(_named(error))
        raise typer.Exit(error.exit_code) from None
    finally:
        terminal.close()


def _named(error: StreamMergeError) -> str:
    """The message, after the error's name where that says more than `error`."""
    plain = type(error) in (StreamMergeError, UserError, Stopped)
    return str(error) if plain else f"{type(error).__name__}: {error}"
