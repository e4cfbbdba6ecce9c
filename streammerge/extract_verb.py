"""The verb `extract-lora`: what one model changed in another, as a low-rank adapter."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Literal

import typer

from streammerge import __version__
from streammerge.base.units import parse_size
from streammerge.command import Json, MaxMemory, OutPath, Quiet, Threads, open_terminal
from streammerge.ui import Steps, Terminal

_BEGAN = time.perf_counter()


def extract_lora(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="The model that was made from BASE, as in a recipe.")],
    out: OutPath,
    base: Annotated[str, typer.Option("--base", metavar="BASE", help="What MODEL was made from.")],
    rank: Annotated[int | None, typer.Option(metavar="R", help="The rank of every matrix; 16.")] = None,
    energy: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE", help="Instead: the smallest ranks that hold this share of each squared difference."
        ),
    ] = None,
    max_rank: Annotated[int | None, typer.Option(metavar="R", help="The most that --energy may choose; 128.")] = None,
    include: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="Only tensors whose names hold TEXT; may be repeated.")
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="No tensors whose names hold TEXT; may be repeated.")
    ] = None,
    keep_whole: Annotated[
        bool, typer.Option("--keep-whole", help="Put norms and biases that differ into the adapter as they are.")
    ] = False,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"], typer.Option(help="What the factors are stored in.")
    ] = "float32",
    seed: Annotated[int, typer.Option("--seed", help="Seed of the random sketch.")] = 0,
    max_memory: MaxMemory = None,
    threads: Threads = None,
    tensors: Annotated[bool, typer.Option("--tensors", help="Show each tensor, not kinds of them.")] = False,
    quiet: Quiet = False,
    as_json: Json = False,
    log: Annotated[Path | None, typer.Option(metavar="FILE", help="Append what happens to this file.")] = None,
) -> None:
    """Write what MODEL changed in BASE into the directory OUT, as a LoRA adapter that PEFT loads.

    By randomised SVD, panel by panel: neither model, and no tensor of them, is ever in memory whole. A recipe takes the
    result as BASE+OUT. OUT appears when it is complete; after a stop, run it again: it begins anew.
    """
    with open_terminal(quiet=quiet, as_json=as_json, log=log) as terminal:
        memory = None if max_memory is None else parse_size(max_memory, flag="--max-memory")
        from streammerge import extract_report
        from streammerge.plan.extraction import DTYPE_NAMES, Wanted
        from streammerge.run.extraction import extract

        wanted = Wanted(
            rank, energy, max_rank, tuple(include or ()), tuple(exclude or ()), keep_whole, DTYPE_NAMES[dtype], seed
        )
        terminal.log(f"streammerge {__version__}: extract-lora {model} less {base} into {out}")
        with terminal.steps() as steps:
            done = extract(
                model, base, out, wanted, max_memory=memory, threads=threads, observer=_Watcher(terminal, steps)
            )
        seconds = time.perf_counter() - _BEGAN
        table = extract_report.tensor_table(done) if tensors else extract_report.kind_table(done)
        terminal.table("tensors", table)
        terminal.rows("done", extract_report.extracted_rows(done, seconds))
        terminal.event("done", extract_report.extracted_json(done, seconds))


class _Watcher:
    """Tells a terminal how an extraction goes."""

    def __init__(self, terminal: Terminal, steps: Steps) -> None:
        self.note = terminal.note
        self.stage = steps.stage
        self.progress = steps.progress
