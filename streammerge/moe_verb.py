"""The verb `moe`: a model with experts of dense ones. It is a merge like any other; only its recipe is another."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from streammerge import __version__
from streammerge.base.errors import UserError
from streammerge.command import (
    Compile,
    Device,
    Json,
    MaxGpuMemory,
    MaxMemory,
    OutPath,
    Quiet,
    Restart,
    Seed,
    ShardSize,
    Strict,
    Threads,
    VerifyOutput,
    Watcher,
    make_options,
    open_terminal,
)

_BEGAN = time.perf_counter()


def moe(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="The recipe, mergekit-moe's YAML.")],
    out: OutPath,
    max_memory: MaxMemory = None,
    max_gpu_memory: MaxGpuMemory = None,
    device: Device = "auto",
    out_shard_size: ShardSize = "5GB",
    threads: Threads = None,
    compile_: Compile = "auto",
    seed: Seed = 0,
    restart: Restart = False,
    verify_output: VerifyOutput = False,
    strict: Strict = False,
    quiet: Quiet = False,
    as_json: Json = False,
    log: Annotated[Path | None, typer.Option(metavar="FILE", help="Append what happens to this file.")] = None,
) -> None:
    """Make a mixture of experts in OUT: the base of RECIPE, with MLPs of other dense models as its experts.

    Mixtral of llama and mistral models, Qwen3-MoE of qwen3, Qwen2-MoE of qwen2. Run again after a stop or a crash, it
    goes on where it was. `streammerge RECIPE OUT` does the same, and `streammerge plan RECIPE` shows it beforehand.
    """
    with open_terminal(quiet=quiet, as_json=as_json, log=log) as terminal:
        options = make_options(
            max_memory, max_gpu_memory, device, out_shard_size, threads, compile_, seed, restart, strict
        )
        from streammerge import report
        from streammerge.plan.recipe import load_recipe
        from streammerge.run.merge import merge as run_merge

        if load_recipe(recipe, strict=strict).moe is None:
            raise UserError(f"{recipe}: has no `experts:`. To merge it: streammerge {recipe} {out}")
        terminal.log(f"streammerge {__version__}: moe {recipe} into {out}")
        done = run_merge(recipe, out, replace(options, verify_output=verify_output), Watcher(terminal))
        seconds = time.perf_counter() - _BEGAN
        terminal.rows("done", report.report_rows(done, seconds))
        terminal.event("done", report.report_json(done, seconds))
