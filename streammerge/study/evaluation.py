"""Scoring any recipes, and checkpoints as they are, in one read of the weights. Nothing is written but scores."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from streammerge.base.errors import InputError, RecipeError, UserError
from streammerge.plan.pickled import open_model
from streammerge.plan.plan import Plan
from streammerge.plan.recipe import load_recipe, parse_recipe
from streammerge.run.memory import refusals
from streammerge.run.merge import Options, plan_recipe, stop_signals
from streammerge.study.analysis import StudyObserver
from streammerge.study.findings import Row
from streammerge.study.scoring import default_metric
from streammerge.study.sweep import Job, SweepFacts
from streammerge.study.tasks import load_tasks, read_tasks_file
from streammerge.study.variants import Variant, variant_of
from streammerge.study.workbench import StudyOptions, open_workbench

Which = Literal["dev", "test"]


@dataclass(frozen=True)
class Evaluation:
    """Scores of every recipe on every task of one split. `tasks` are (name, metric)."""

    split: Which
    tasks: list[tuple[str, str]]
    rows: list[Row]
    facts: SweepFacts


@refusals()
def evaluate(recipes: Sequence[Path], tasks_file: Path, which: Which, options: StudyOptions, observer: StudyObserver, *,
             work: Path | None = None) -> Evaluation:  # fmt: skip
    """Score `recipes` (files, or directories of checkpoints) on the tasks of a file, in one sweep.

    With a folder `work`, scores are kept there, and a stopped evaluation goes on. All must be of one architecture and
    vocabulary. Raises the errors of base/errors.py.
    """
    plans = {_name(path, recipes): _plan(path, options, observer) for path in recipes}
    tasks = load_tasks(read_tasks_file(tasks_file), tasks_file, None)
    for task in tasks:
        split = task.dev if which == "dev" or task.test is None else task.test
        if (task.metric or default_metric(split)) == "kl":
            raise UserError(f"{tasks_file}: task {task.name}: kl compares with the specialist of an analysis; "
                            f"eval has none. Use another metric.")  # fmt: skip
    directory = next(iter(plans.values())).checkpoints[0].directory
    with ExitStack() as stack:
        stopping = stack.enter_context(stop_signals())
        bench = stack.enter_context(
            open_workbench(directory, options, book=None if work is None else work / "scores.jsonl", stopping=stopping,
                           progress=observer.progress, note=observer.note, plans=list(plans.values()), versions=1)
        )  # fmt: skip
        data = [bench.prepare(task, which) for task in tasks]
        variants: dict[str, Variant] = {}
        for name, plan in plans.items():
            bench.network.check_shapes({tensor.name: tensor.shape for tensor in plan.tensors})
            units = bench.network.units_of(tensor.name for tensor in plan.tensors)
            variants[name] = variant_of(bench.surveyed(plan), bench.shelf, units, bench.network.num_units)
        observer.stage(f"scoring {len(variants)} models on {len(data)} tasks")
        jobs = {
            (name, i): Job(variant, one.batches) for name, variant in variants.items() for i, one in enumerate(data)
        }
        bench.sweeper.score(list(jobs.values()))
        rows = []
        for name in variants:
            scores = [bench.book[jobs[name, i].key] for i in range(len(data))]
            p = tuple(one.scoring.p(score) for one, score in zip(data, scores, strict=True))
            accuracy = tuple(one.scoring.accuracy(score) for one, score in zip(data, scores, strict=True))
            rows.append(Row(name, which, p, accuracy))
        return Evaluation(which, [(one.task.name, one.scoring.metric) for one in data], rows, bench.sweeper.facts)


def _plan(path: Path, options: StudyOptions, observer: StudyObserver) -> Plan:
    """The plan of a recipe, or of a checkpoint as it is."""
    merging = Options(seed=options.seed, strict=options.strict)
    if path.is_dir() or path.suffix == ".safetensors":
        open_model(path)
        text = f"merge_method: passthrough\nmodels:\n  - model: {json.dumps(str(path.resolve()))}\n"
        return plan_recipe(parse_recipe(text, path / "recipe"), merging)
    if not path.exists():
        raise InputError(f"{path}: is neither a recipe nor a checkpoint directory.")
    recipe = load_recipe(path, strict=options.strict)
    if recipe.is_analysed:
        advice = "its parameters are still to be found: run `streammerge analyze` on it, and give the recipe it writes"
        raise RecipeError(str(path), [advice])
    if recipe.moe is not None:
        advice = "a model with experts that is made of dense ones can be written, and then scored; not before"
        raise RecipeError(str(path), [advice])
    for warning in recipe.warnings:
        observer.note(f"{path}: {warning}")
    return plan_recipe(recipe, merging, observer.note)


def _name(path: Path, others: Sequence[Path]) -> str:
    """The shortest name that no other recipe has."""
    short = path.stem if path.is_file() else path.name
    alike = [other for other in others if (other.stem if other.is_file() else other.name) == short]
    return short if short and len(alike) == 1 else str(path)
