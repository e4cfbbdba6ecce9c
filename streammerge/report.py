"""Facts in, text and JSON out. Computes nothing and prints nothing."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from streammerge.base.units import format_seconds, format_size
from streammerge.kernels.contract import Settings
from streammerge.plan.budget import Schedule, bytes_to_read
from streammerge.plan.plan import Plan
from streammerge.plan.renamed import Reach
from streammerge.run.check import Verdict
from streammerge.run.health import Health
from streammerge.run.inspection import Inspection
from streammerge.run.merge import Report
from streammerge.run.profile import Profile

Rows = list[tuple[str, str]]
_SHOWN = 5
_WORTH_SAYING = 0.1
# Findings of one kind that are shown on a terminal.
_MOST = 10


def plan_rows(plan: Plan, schedule: Schedule, seconds: float, side_files: list[str]) -> Rows:
    """The plan as label and text."""
    actions = {action: [t for t in plan.tensors if t.action == action] for action in ("merge", "copy", "equal")}
    copied = len(actions["copy"]) + len(actions["equal"])
    passes = [tensor.passes for tensor in actions["merge"]]
    recipe = plan.recipe
    base = f", base {', '.join(sorted(recipe.bases))}" if recipe.bases else ""
    stages = [f"{stage.method.name} as {stage.name}" for stage in recipe.stages[:-1]]
    elements = sum(tensor.elements for tensor in plan.tensors)
    read_twice = sum(1 for t in plan.tensors if t.passes > 1)
    parts = f"baseline {format_size(schedule.baseline_bytes)}, buffers {format_size(schedule.arena_bytes)}"
    return [
        ("method", f"{', then '.join([*stages, plan.method.name])}{base}"),
        ("models", ", ".join(model for model in recipe.inputs if model not in recipe.bases) or "none"),
        ("tensors", f"{len(plan.tensors):,} ({elements:,} elements){_of_them(copied, 'copied')}"),
        *(("names", _reach(reach)) for reach in plan.reaches),
        ("passes", _passes(passes, read_twice)),
        ("read", format_size(bytes_to_read((*plan.tensors, *plan.asked), schedule))),
        ("write", f"{format_size(plan.bytes_to_write)} in {_count(len(plan.shards), 'file')}"),
        ("with", ", ".join(side_files) or "no side files"),
        ("peak memory", f"{format_size(schedule.peak_bytes)} of {format_size(schedule.limit_bytes)} allowed ({parts})"),
        ("tiles", f"{schedule.tile_blocks * 65536:,} elements, {schedule.slots} in memory, {schedule.threads} threads"),
        ("disk", f"{format_size(plan.bytes_to_write)} needed"),
        ("time", f"about {format_seconds(seconds)} (a guess)"),
        ("digest", plan.digest),
    ]  # fmt: skip


def plan_json(plan: Plan, schedule: Schedule, seconds: float, side_files: list[str]) -> dict[str, Any]:
    """All of the plan."""
    return {
        "digest": plan.digest,
        "method": plan.method.name,
        "stages": [{"name": stage.name, "method": stage.method.name} for stage in plan.recipe.stages],
        "bases": sorted(plan.recipe.bases),
        "models": [model for model in plan.recipe.inputs if model not in plan.recipe.bases],
        "seed": plan.seed,
        "names": [asdict(reach) for reach in plan.reaches],
        "warnings": list(plan.warnings),
        "side_files": side_files,
        "schedule": {
            **asdict(schedule),
            "arena_bytes": schedule.arena_bytes,
            "peak_bytes": schedule.peak_bytes,
            "bytes_to_read": bytes_to_read((*plan.tensors, *plan.asked), schedule),
            "bytes_to_write": plan.bytes_to_write,
            "disk_bytes": plan.bytes_to_write,
            "estimated_seconds": round(seconds, 1),
        },
        "shards": [{"name": shard.name, "bytes": shard.nbytes, "tensors": len(shard.entries)} for shard in plan.shards],
        "tensors": [
            {
                "name": tensor.name,
                "dtype": tensor.dtype,
                "shape": list(tensor.shape),
                "action": tensor.action,
                "passes": tensor.passes,
                "shard": plan.shards[tensor.shard].name,
                "offset": tensor.offset,
                "bytes": tensor.nbytes,
                "inputs": [read.dtype for read in tensor.reads],
                "parameters": _parameters(plan.settings.get(tensor.name)),
            }
            for tensor in plan.tensors
        ],
    }


def _reach(reach: Reach) -> str:
    """What a model with a map of names takes part in."""
    renamed = ", ".join(f"{mine or 'all'} → {theirs}" for mine, theirs in reach.names.items())
    return (
        f"{reach.model} is in {reach.tensors:,} of {_count(reach.of, 'tensor')} ({renamed}), "
        f"and has no part in the other {reach.of - reach.tensors:,}"
    )


def _parameters(settings: Settings | None) -> dict[str, Any]:
    return {} if settings is None else {**settings.shared, **settings.models}


def report_rows(report: Report, seconds: float) -> Rows:
    """A finished merge as label and text."""
    if report.already_finished:
        return [
            ("finished", f"{report.out} holds this very merge already; nothing was done"),
            ("digest", report.digest),
        ]
    profile = report.profile
    compiled = profile.compiling > _WORTH_SAYING
    compiling = f", {format_seconds(profile.compiling)} compiling" if compiled else ""
    engine = profile.merging + profile.finishing
    moved = report.read_bytes + report.written_bytes
    rows = [
        ("output", str(report.out)),
        ("tensors", f"{report.tensors:,}{_of_them(report.resumed, 'from an earlier run')}"),
        ("read", format_size(report.read_bytes)),
        ("written", format_size(report.written_bytes)),
        ("peak memory", f"{format_size(report.peak_bytes)} ({format_size(report.peak_own_bytes)} without file pages)"),
        ("time", f"{format_seconds(seconds)}, {format_seconds(engine)} of it merging{compiling}"),
        ("rate", f"{moved / max(engine, 1e-9) / 1e9:.2f} GB/s read and written"),
    ]  # fmt: skip
    if report.nonfinite:
        shown = [
            f"{name}: {inputs:,} in the inputs, {output:,} in the result"
            for name, (inputs, output) in list(report.nonfinite.items())[:_SHOWN]
        ]
        more = [f"and {len(report.nonfinite) - _SHOWN} more tensors"] if len(report.nonfinite) > _SHOWN else []
        rows.append(("not finite", "; ".join(shown + more)))
    return rows


def report_json(report: Report, seconds: float) -> dict[str, Any]:
    """A finished merge, all of it."""
    return {
        "out": str(report.out),
        "digest": report.digest,
        "already_finished": report.already_finished,
        "tensors": report.tensors,
        "resumed": report.resumed,
        "bytes_read": report.read_bytes,
        "bytes_written": report.written_bytes,
        "peak_bytes": report.peak_bytes,
        "peak_own_bytes": report.peak_own_bytes,
        "seconds": round(seconds, 3),
        "engine_seconds": round(report.profile.merging + report.profile.finishing, 3),
        "compile_seconds": round(report.profile.compiling, 3),
        "sync_seconds": round(report.profile.syncing, 3),
        "profile": profile_json(report.profile),
        "nonfinite": {name: list(counts) for name, counts in report.nonfinite.items()},
    }


def profile_table(profile: Profile, seconds: float) -> list[list[str]]:
    """Where the time went: one thing after the other, and within merging what goes on at the same time."""
    begun = seconds - profile.planning - profile.compiling - profile.merging - profile.finishing
    phases = [("starting Python", begun), ("planning", profile.planning), ("compiling", profile.compiling),
              ("merging", profile.merging), ("finishing", profile.finishing)]  # fmt: skip
    rows = [["where the time went", "threads", "seconds", ""]]
    rows += [[name, "", f"{taken:.2f}", f"{taken / seconds:.0%} of all"] for name, taken in phases]
    whole = max(profile.merging, 1e-9)

    def at_once(name: str, threads: int, taken: float) -> None:
        share = f"{taken / whole / max(1, threads):.0%} of merging" if taken else ""
        rows.append([f"  {name}", f"{threads}", f"{taken:.2f}", share])

    at_once("reading", profile.readers, profile.reading)
    at_once("waiting for it", 1, profile.waiting)
    programs: dict[str, float] = {}
    for label, (_, taken) in profile.programs.items():
        # Without its options: those are in the JSON.
        short = label.partition("(")[0].removeprefix("streammerge.")
        programs[short] = programs.get(short, 0.0) + taken
    for name, taken in sorted(programs.items(), key=lambda item: -item[1]):
        at_once(name, profile.threads, taken)
    at_once("waiting for results", 1, profile.unready)
    at_once("hashing", 1, profile.hashing)
    at_once("writing", 1, profile.writing)
    at_once("syncing", 1, profile.syncing)
    return rows


def profile_json(profile: Profile) -> dict[str, Any]:
    """All of it."""
    found = {key: round(value, 4) if isinstance(value, float) else value for key, value in asdict(profile).items()}
    programs = {
        label: {"pieces": pieces, "seconds": round(taken, 4)} for label, (pieces, taken) in profile.programs.items()
    }
    return found | {"programs": programs}


def inspection_rows(inspection: Inspection) -> Rows:
    """What a checkpoint holds, in short."""
    checkpoint = inspection.checkpoint
    rows = [
        ("path", str(checkpoint.path)),
        ("files", f"{len(checkpoint.files)}, {format_size(sum(file.size for file in checkpoint.files))}"),
        ("tensors", f"{len(checkpoint.tensors):,}, {inspection.elements:,} elements"),
    ]
    rows += [(dtype, f"{_count(count, 'tensor')}, {format_size(nbytes)}")
             for dtype, (count, nbytes) in sorted(inspection.dtypes.items())]  # fmt: skip
    rows += [("layers", f"{count} under {stack or 'the top'}") for stack, count in inspection.layers.items()]
    if inspection.vocabulary is not None:
        rows.append(("vocabulary", f"{inspection.vocabulary:,} rows"))
    if inspection.quantised is not None:
        rows.append(("quantised", f"{inspection.quantised}, says config.json"))
    return rows


def health_rows(health: Health) -> Rows:
    """What is odd in the weights."""
    rows = [
        ("not finite", f"{_count(count, 'number')} of {name}") for name, count in list(health.nonfinite.items())[:_MOST]
    ]
    rows += [("all zero", name) for name in health.zeros[:_MOST]]
    rows += [("the same", ", ".join(names[:_MOST])) for names in health.duplicates[:_MOST]]
    hidden = sum(max(0, len(each) - _MOST) for each in (health.nonfinite, health.zeros, health.duplicates))
    if hidden:
        rows.append(("and", f"{hidden} more; --json lists all"))
    return rows or [("health", "every number is finite, no tensor is all zero, no two matrices are the same")]


def health_json(health: Health) -> dict[str, Any]:
    """All of it."""
    return {
        "nonfinite": health.nonfinite,
        "zeros": list(health.zeros),
        "duplicates": [list(names) for names in health.duplicates],
    }


def inspection_json(inspection: Inspection) -> dict[str, Any]:
    """What a checkpoint holds, all of it."""
    checkpoint = inspection.checkpoint
    return {
        "path": str(checkpoint.path),
        "files": [asdict(file) for file in checkpoint.files],
        "elements": inspection.elements,
        "bytes": checkpoint.nbytes,
        "dtypes": {name: {"tensors": count, "bytes": nbytes} for name, (count, nbytes) in inspection.dtypes.items()},
        "layers": inspection.layers,
        "vocabulary": inspection.vocabulary,
        "quantised": inspection.quantised,
        "tensors": [
            {**asdict(spec), "shape": list(spec.shape), "file": checkpoint.files[spec.file].name}
            for spec in inspection.tensors
        ],
    }


def verdict_rows(verdict: Verdict) -> Rows:
    """What verifying found."""
    state = "every byte is as it was written" if not verdict.problems else f"{_count(len(verdict.problems), 'problem')}"
    return [
        ("verified", f"{verdict.tensors:,} tensors in {_count(verdict.files, 'file')}, {format_size(verdict.nbytes)}"),
        ("result", state),
    ]


def _passes(passes: list[int], read_twice: int) -> str:
    if not passes:
        return "1 (copying only)"
    low, high = min(passes), max(passes)
    span = str(low) if low == high else f"{low} to {high}"
    return span + (f"; {read_twice:,} tensors are looked at before they are merged" if read_twice else "")


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def _of_them(number: int, what: str) -> str:
    return f", {number:,} of them {what}" if number else ""
