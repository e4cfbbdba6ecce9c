"""One merge from recipe to finished directory: the order of things, and what must be given back.

plan → schedule → claim OUT → compile → arena, sources, lane → engine → side files, manifest, index
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Literal, Protocol

from streammerge.base.errors import DoesNotFit, RecipeError, Stopped, UserError, VerificationFailed
from streammerge.base.units import format_size
from streammerge.plan.adapter import CONFIG_NAME as ADAPTER_CONFIG_NAME
from streammerge.plan.budget import Schedule, make_schedule
from streammerge.plan.layout import DEFAULT_SHARD_BYTES, index_file
from streammerge.plan.plan import Plan, build_plan
from streammerge.plan.recipe import Recipe, load_recipe
from streammerge.plan.tensor import TensorPlan
from streammerge.run.check import verify, verify_inputs
from streammerge.run.compiling import Compile, consider
from streammerge.run.configuration import CONFIG_NAME, architecture, language_type, lost_tokens
from streammerge.run.estimate import estimate_seconds
from streammerge.run.gates import ground_of
from streammerge.run.gpu import choose_device
from streammerge.run.journal import Done, Journal
from streammerge.run.manifest import manifest
from streammerge.run.memory import Meter, memory_limit, processors, refusals, usage
from streammerge.run.models import open_models
from streammerge.run.output import MANIFEST_NAME, check_apart, claim, finish, finished_digest, is_complete, sweep, trust
from streammerge.run.pipeline import READ_THREADS
from streammerge.run.profile import NOTHING_DONE, Profile
from streammerge.run.sidefiles import left_files, side_files
from streammerge.run.survey import SurveyBook
from streammerge.run.walk import Equipment, Status, Walked, walk
from streammerge.storage.sink import Shard, free_bytes, partial_path, write_file


@dataclass(frozen=True)
class Options:
    """Where and how a merge runs: none of it changes the result, but for `seed`, `rng` and `shard_bytes`."""

    max_memory: int | None = None
    max_gpu_memory: int | None = None
    device: str = "auto"
    threads: int | None = None
    shard_bytes: int = DEFAULT_SHARD_BYTES
    compile: Compile = "auto"
    seed: int = 0
    restart: bool = False
    strict: bool = False
    rng: Literal["position", "mergekit"] = "position"
    verify_inputs: bool = False
    verify_output: bool = False


@dataclass(frozen=True)
class Report:
    """What a merge did. Seconds are wall time; `peak_bytes` is the most the process ever held, file pages included.

    `nonfinite` gives, per tensor with NaN or infinities, their number in the inputs and in the result.
    """

    out: Path
    digest: str
    already_finished: bool
    tensors: int
    resumed: int
    read_bytes: int
    written_bytes: int
    peak_bytes: int
    peak_own_bytes: int
    profile: Profile
    nonfinite: dict[str, tuple[int, int]]


class Observer(Protocol):
    """Who is told what happens: a terminal, a log, a program."""

    def note(self, text: str) -> None:
        """Something the user should know."""

    def planned(self, plan: Plan, schedule: Schedule, resumed: int, seconds: float) -> None:
        """The merge is about to begin; `resumed` tensors are done already, it may take `seconds`."""

    def running(self, status: Callable[[], Status], read_bytes: int, write_bytes: int) -> AbstractContextManager[None]:
        """Entered while the engine works; `status` may be asked from any thread. The totals are still to do."""


class Unwatched:
    """An observer who does not look: for merges that nobody sees."""

    def note(self, text: str) -> None:
        pass

    def planned(self, plan: Plan, schedule: Schedule, resumed: int, seconds: float) -> None:
        pass

    def running(self, status: Callable[[], Status], read_bytes: int, write_bytes: int) -> AbstractContextManager[None]:
        return nullcontext()


def _unheard(text: str) -> None:
    pass


def make_plan(recipe_path: Path, options: Options, note: Callable[[str], None] = _unheard) -> Plan:
    """Read recipe and headers, and plan."""
    return plan_recipe(load_recipe(recipe_path, strict=options.strict), options, note)


def plan_recipe(recipe: Recipe, options: Options, note: Callable[[str], None] = _unheard) -> Plan:
    """Find and open the models of a recipe, and plan. `note` hears of downloads."""
    if options.rng == "mergekit" and not 0 <= options.seed < 2**32:
        raise UserError(f"--seed {options.seed}: mergekit's are from 0 to {2**32 - 1}.")
    models, checkpoints = open_models(recipe, note)
    made = build_plan(
        recipe, models, checkpoints, seed=options.seed, shard_bytes=options.shard_bytes, strict=options.strict,
        sequential=options.rng == "mergekit", ground=ground_of(recipe, models, checkpoints),
    )  # fmt: skip
    told = [
        f"{model.reference} is an adapter, and its matrices are merged as they are; to merge the model that it makes, "
        f"write base+adapter"
        for model in models
        if (checkpoints[model.checkpoint].path / ADAPTER_CONFIG_NAME).exists()
        and not (checkpoints[model.checkpoint].path / CONFIG_NAME).exists()
    ]
    told += lost_tokens(made)
    kinds = {model.reference: architecture(checkpoints[model.checkpoint]) for model in models}
    types = {model.reference: language_type(checkpoints[model.checkpoint]) for model in models}
    for stage in recipe.stages:
        # A model under other names is meant to be of another architecture.
        found = {name: kind for name in stage.inputs if name not in stage.names and (kind := kinds[name]) is not None}
        if len(set(found.values())) > 1:
            listed = ", ".join(f"{model} is {kind}" for model, kind in found.items())
            told.append(f"{listed}: merged because names and shapes agree")
        for name in stage.names:
            mine, theirs = types[name] or "", types[stage.donor] or ""
            # qwen2 is the language part of qwen2_vl.
            if not mine.startswith(theirs) and not theirs.startswith(mine):
                told.append(f"{name} is of the type {mine}, and the language part of {stage.donor} of {theirs}: merged "
                            f"because names and shapes agree")  # fmt: skip
        if stage.name is not None:
            kinds[stage.name], types[stage.name] = kinds[stage.donor], types[stage.donor]
    if options.strict and told:
        raise RecipeError(str(recipe.path), told)
    return replace(made, warnings=(*made.warnings, *told))


def schedule_for(plan: Plan, options: Options) -> Schedule:
    """The schedule of a plan in this process, now that everything it imports is in memory. Raises DoesNotFit."""
    limit, limited_by = memory_limit(options.max_memory)
    available, _ = memory_limit(None)
    return make_schedule(
        plan,
        limit_bytes=limit,
        limited_by=limited_by,
        allowed=options.max_memory is not None,
        available_bytes=available,
        baseline_bytes=usage().resident,
        threads=options.threads or processors(),
    )


@refusals()
def merge(recipe_path: Path, out: Path, options: Options, observer: Observer) -> Report:
    """Merge `recipe_path` into the directory `out`, going on where an earlier run stopped.

    Raises the errors of base/errors.py; whatever happens, `out` holds complete shards under their names or none.
    """
    started = time.perf_counter()
    plan = make_plan(recipe_path, options, observer.note)
    for warning in plan.warnings:
        observer.note(f"{recipe_path}: {warning}")
    for sentence in left_files(plan):
        observer.note(sentence)
    check_apart(out, plan.checkpoints)
    if finished_digest(out) == plan.digest:
        sweep(out)
        return finished_before(plan, out, options)
    device = choose_device(options.device)
    if plan.draws_in_turn and device.type != "cpu":
        raise UserError("--rng mergekit: numbers are drawn in mergekit's order on the CPU only; add --device cpu.")
    schedule = schedule_for(plan, options)
    check_disk(plan, out)
    # Written last, read now too: what is wrong with them is said before the work.
    files = file_names(plan, side_files(plan))
    if options.verify_inputs:
        verify_inputs(plan.checkpoints, observer.note)
    with ExitStack() as stack:
        stopping = stack.enter_context(stop_signals())
        work = stack.enter_context(claim(out, plan, files, restart=options.restart))
        if is_complete(out, plan, files):
            # The run before was stopped while it removed its work folder.
            finish(out)
            return finished_before(plan, out, options)
        journal = Journal(work / "journal")
        stack.callback(journal.close)
        trust(out, plan, journal)
        pending = [tensor for tensor in plan.tensors if any(name not in journal.done for name in tensor.names)]
        compiling = consider(pending, schedule, options.compile, on_gpu=device.type == "cuda")
        seconds = estimate_seconds(plan, pending, schedule, compiling.seconds)
        observer.planned(plan, schedule, len(plan.tensors) - len(pending), seconds)
        began = time.perf_counter()
        compiling.build(observer.note)
        compiled = time.perf_counter()
        meter = stack.enter_context(Meter())
        equipment = Equipment(schedule, device, compiling.cache, options.max_gpu_memory, options.max_memory is not None)
        walked = _merge_rest(plan, pending, out, work, journal, equipment, observer, meter, stopping)
        merged = time.perf_counter()
        publish_rest(plan, out, journal.done)
        finished = time.perf_counter()
    if options.verify_output:
        verify_output(out)
    return Report(
        out=out,
        digest=plan.digest,
        already_finished=False,
        tensors=len(plan.tensors),
        resumed=len(plan.tensors) - len(pending),
        read_bytes=walked.read_bytes,
        written_bytes=walked.written_bytes,
        peak_bytes=usage().peak_resident,
        peak_own_bytes=meter.peak_own,
        profile=Profile(
            planning=began - started,
            compiling=compiled - began,
            merging=merged - compiled,
            finishing=finished - merged,
            readers=READ_THREADS,
            threads=schedule.threads,
            **walked.spent,
        ),
        nonfinite=count_nonfinite(journal.done),
    )


def count_nonfinite(done: Mapping[str, Done]) -> dict[str, tuple[int, int]]:
    """Per tensor with NaN or infinities, their number in the inputs and in the result."""
    return {
        name: (sum(each.nonfinite_inputs), each.nonfinite_output)
        for name, each in done.items()
        if each.nonfinite_output or any(each.nonfinite_inputs)
    }


def _merge_rest(plan: Plan, pending: list[TensorPlan], out: Path, work: Path, journal: Journal, equipment: Equipment,
                observer: Observer, meter: Meter, stopping: Callable[[], bool]) -> Walked:  # fmt: skip
    """Merge the pending tensors into the shards of OUT."""

    def open_shard(number: int) -> Shard:
        shard = plan.shards[number]
        return Shard(out / shard.name, shard.header, shard.nbytes)

    waiting = {tensor.shard for tensor in pending}
    for number, shard in enumerate(plan.shards):
        # Every tensor is on disk, but the run ended before the shard got its name.
        if number not in waiting and partial_path(out / shard.name).exists():
            open_shard(number).publish()
    book = SurveyBook(work, plan.digest)
    return walk(plan, pending, equipment, journal, open_shard, book, meter, stopping, observer.running)


def publish_rest(plan: Plan, out: Path, done: Mapping[str, Done]) -> None:
    """Side files, manifest, and last of all the index: then the output is complete."""
    files = side_files(plan)
    index = index_file(plan.shards)
    for name, content in files.items():
        write_file(out / name, content)
    write_file(out / MANIFEST_NAME, manifest(plan, done, files | dict([index] if index else [])))
    if index is not None:
        write_file(out / index[0], index[1])
    finish(out)


def verify_output(out: Path) -> None:
    """Read OUT again from the disk. Raises VerificationFailed."""
    if problems := verify(out).problems:
        advice = f"The disk, or what lies before it, changed what was written. Remove {out} and merge to another one."
        raise VerificationFailed("\n".join((*problems, advice)))


def file_names(plan: Plan, beside: Iterable[str]) -> list[str]:
    """Every file that OUT will hold, with those beside the weights."""
    index = index_file(plan.shards)
    return [*(shard.name for shard in plan.shards), *beside, MANIFEST_NAME, *([index[0]] if index else [])]


def check_disk(plan: Plan, out: Path) -> None:
    """Raise DoesNotFit when the shards would not fit on the disk of `out`."""
    folder = out
    while not folder.exists():
        folder = folder.parent
    # Partial files have their space already.
    have = sum(
        path.stat().st_blocks * 512
        for shard in plan.shards
        for path in (out / shard.name, partial_path(out / shard.name))
        if path.exists()
    )
    need = max(0, plan.bytes_to_write - have)
    need += need // 100
    free = free_bytes(folder)
    if need > free:
        raise DoesNotFit(
            f"{out}: needs {format_size(need)} of disk, {format_size(free)} are free. "
            f"Free at least {format_size(need - free)} more, or choose another directory."
        )


def finished_before(plan: Plan, out: Path, options: Options) -> Report:
    """The report of a merge that was complete before. Raises VerificationFailed if asked to look and it is not."""
    if options.verify_output:
        verify_output(out)
    return Report(out, plan.digest, True, len(plan.tensors), len(plan.tensors), 0, 0, usage().peak_resident,
                  usage().own, NOTHING_DONE, {})  # fmt: skip


@contextmanager
def stop_signals(*others: signal.Signals) -> Iterator[Callable[[], bool]]:
    """SIGINT, SIGTERM, SIGHUP, and `others`, ask to stop; a second SIGINT stops at once, as a crash would.

    After either what was begun can be resumed.
    """
    asked: list[int] = []

    def ask(number: int, frame: FrameType | None) -> None:
        if asked and number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            signal.raise_signal(signal.SIGINT)
        asked.append(number)

    if threading.current_thread() is not threading.main_thread():
        # Only the main thread may set handlers; elsewhere whoever owns the process stops it.
        yield lambda: False
        return
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, *others)
    before = {number: signal.signal(number, ask) for number in numbers}
    try:
        yield lambda: bool(asked)
    except Stopped:
        if not asked:
            raise
        names = ", ".join(signal.Signals(number).name for number in asked[:1])
        raise Stopped(f"Stopped by {names}. What is finished is saved: run the same command again to go on.") from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
