"""The same verbs from Python, without a terminal."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from streammerge.base.units import parse_shard_size, parse_size
from streammerge.plan.extraction import DTYPE_NAMES, Wanted
from streammerge.plan.layout import DEFAULT_SHARD_BYTES
from streammerge.plan.plan import Plan
from streammerge.plan.recipe import load_recipe
from streammerge.run.check import Verdict
from streammerge.run.check import verify as _verify
from streammerge.run.compiling import Compile
from streammerge.run.inspection import Inspection
from streammerge.run.inspection import inspect as _inspect
from streammerge.run.merge import Options, Report, Unwatched
from streammerge.run.merge import make_plan as _make_plan
from streammerge.run.merge import merge as _merge

if TYPE_CHECKING:
    from streammerge.run.extracted import Extracted
    from streammerge.study.analysis import ProxyFindings
    from streammerge.study.evaluation import Evaluation
    from streammerge.study.findings import Findings
    from streammerge.study.workbench import StudyOptions

PathLike = str | os.PathLike[str]


class _Silent(Unwatched):
    """An observer that hears only notes."""

    def __init__(self, note: Callable[[str], None] | None) -> None:
        self._note = note

    def note(self, text: str) -> None:
        if self._note is not None:
            self._note(text)

    def stage(self, text: str) -> None:
        pass

    def progress(self, done: float, total: float) -> None:
        pass


def merge(
    recipe: PathLike,
    out: PathLike,
    *,
    max_memory: str | int | None = None,
    max_gpu_memory: str | int | None = None,
    device: str = "auto",
    threads: int | None = None,
    out_shard_size: str | int = DEFAULT_SHARD_BYTES,
    compile: Compile = "auto",
    seed: int = 0,
    restart: bool = False,
    strict: bool = False,
    rng: Literal["position", "mergekit"] = "position",
    verify_inputs: bool = False,
    verify_output: bool = False,
    executor: Executor | None = None,
    note: Callable[[str], None] | None = None,
) -> Report:
    """Merge `recipe` into the directory `out`, going on where an earlier run stopped.

    Sizes are bytes or text like "24GB". With an `executor` its workers make the shards, one at a time each: they must
    see `out` and the inputs under the same paths, and memory and threads are those of every worker. `note` is called
    with what the user should know. Raises StreamMergeError, and what the executor raises.
    """
    options = Options(_size(max_memory), _size(max_gpu_memory), device, threads, _shard_size(out_shard_size), compile,
                      seed, restart, strict, rng, verify_inputs, verify_output)  # fmt: skip
    path = Path(recipe)
    if load_recipe(path, strict=strict).is_analysed:
        from streammerge.study.analysis import analysis_folder, decided_for_merge, decided_path

        work = analysis_folder(Path(out))
        study = _study_options(max_memory, device, threads, compile, None, seed, strict)
        decided_for_merge(
            path, Path(out), work, study, _Silent(note), options.shard_bytes, verified=options.verify_inputs
        )
        path, options = decided_path(work), replace(options, verify_inputs=False)
    if executor is not None:
        from streammerge.cluster.executor import merge_over

        observer = _Silent(note)
        return merge_over(executor, path, Path(out), options, observer.note, observer.progress).report
    return _merge(path, Path(out), options, _Silent(note))


def analyze(
    recipe: PathLike,
    out: PathLike,
    *,
    tasks: PathLike | None = None,
    max_memory: str | int | None = None,
    device: str = "auto",
    threads: int | None = None,
    compile: Compile = "auto",
    spill: PathLike | None = None,
    seed: int = 0,
    strict: bool = False,
    note: Callable[[str], None] | None = None,
) -> Findings | ProxyFindings:
    """Analyse a hi_merging recipe and write the decided recipe to `out`; scores are kept in `out`.analysis.

    Returns everything that was found. Raises StreamMergeError.
    """
    from streammerge.study.analysis import analysis_folder, analyze_recipe

    options = _study_options(max_memory, device, threads, compile, spill, seed, strict)
    tasks_file = None if tasks is None else Path(tasks)
    return analyze_recipe(
        Path(recipe), Path(out), analysis_folder(Path(out)), options, _Silent(note), tasks_file=tasks_file
    )


def evaluate(
    recipes: Sequence[PathLike],
    tasks: PathLike,
    *,
    split: Literal["dev", "test"] = "dev",
    scores: PathLike | None = None,
    max_memory: str | int | None = None,
    device: str = "auto",
    threads: int | None = None,
    compile: Compile = "auto",
    spill: PathLike | None = None,
    seed: int = 0,
    strict: bool = False,
    note: Callable[[str], None] | None = None,
) -> Evaluation:
    """Score recipes (or directories of checkpoints) on the tasks of a file, writing no checkpoint.

    With `scores`, a directory, a stopped evaluation goes on. Raises StreamMergeError.
    """
    from streammerge.study.evaluation import evaluate as run_evaluate

    options = _study_options(max_memory, device, threads, compile, spill, seed, strict)
    work = None if scores is None else Path(scores)
    return run_evaluate([Path(recipe) for recipe in recipes], Path(tasks), split, options, _Silent(note), work=work)


def extract_lora(
    model: str,
    out: PathLike,
    *,
    base: str,
    rank: int | None = None,
    energy: float | None = None,
    max_rank: int | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    keep_whole: bool = False,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    seed: int = 0,
    max_memory: str | int | None = None,
    threads: int | None = None,
    note: Callable[[str], None] | None = None,
) -> Extracted:
    """Write what `model` changed in `base` into the directory `out`, as a LoRA adapter that PEFT loads.

    Models are named as in a recipe. The rank is 16 unless given, or else the fewest that hold the share `energy` of
    each tensor's squared difference, `max_rank` (128) at most. Raises StreamMergeError.
    """
    from streammerge.run.extraction import extract

    wanted = Wanted(
        rank, energy, max_rank, tuple(include), tuple(exclude), keep_whole, DTYPE_NAMES[dtype], seed
    )  # fmt: skip
    return extract(
        model, base, Path(out), wanted, max_memory=_size(max_memory), threads=threads, observer=_Silent(note)
    )


def make_plan(
    recipe: PathLike, *, out_shard_size: str | int = DEFAULT_SHARD_BYTES, seed: int = 0, strict: bool = False
) -> Plan:
    """The plan of `recipe`, from headers alone. Raises StreamMergeError."""
    return _make_plan(Path(recipe), Options(shard_bytes=_shard_size(out_shard_size), seed=seed, strict=strict))


def verify(out: PathLike) -> Verdict:
    """Compare a finished output with its checksums. Raises InputError when there are none."""
    return _verify(Path(out))


def inspect(path: PathLike) -> Inspection:
    """What the checkpoint at `path` holds. Raises InputError."""
    return _inspect(Path(path).expanduser())


def _study_options(max_memory: str | int | None, device: str, threads: int | None, compile: Compile,
                   spill: PathLike | None, seed: int, strict: bool) -> StudyOptions:  # fmt: skip
    from streammerge.study.workbench import StudyOptions

    folder = None if spill is None else Path(spill)
    return StudyOptions(_size(max_memory), device, threads, compile, folder, seed, strict)


def _shard_size(size: str | int) -> int:
    return parse_shard_size(size) if isinstance(size, str) else size


def _size(size: str | int | None) -> int | None:
    return parse_size(size) if isinstance(size, str) else size
