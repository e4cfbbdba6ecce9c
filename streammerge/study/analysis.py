"""One analysis from recipe to recipe: what `analyze` and a merge with tasks do.

    recipe, tasks, headers → workbench → stages 1 to 3 (himerge.py) → test table → decided recipe

Everything that was scored is in the scorebook of the work folder: run again, it goes on where it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from streammerge.base.errors import RecipeError
from streammerge.base.units import format_size
from streammerge.plan.plan import Plan
from streammerge.plan.recipe import Module, Recipe, load_recipe
from streammerge.plan.setting import Setting, parse_setting
from streammerge.run.check import verify_inputs
from streammerge.run.memory import refusals
from streammerge.run.merge import Options, check_disk, plan_recipe, stop_signals
from streammerge.run.output import check_apart, check_usable
from streammerge.storage.sink import write_file
from streammerge.study.decided import decided_recipe
from streammerge.study.findings import Findings, Given, Row
from streammerge.study.himerge import analyze, contribution_questions
from streammerge.study.judge import Judge, one_of
from streammerge.study.mixture import HALF, KEEP, Family, Mixture
from streammerge.study.proxy import Clash, weigh_conflicts
from streammerge.study.tasks import Task, load_tasks, read_tasks_file, shared_rows
from streammerge.study.workbench import StudyOptions, Workbench, open_workbench

_SCORES = "scores.jsonl"
# About so many models are made of the inputs: decides whether compiling pays.
_MODELS_PER_LAYER = 8


class StudyObserver(Protocol):
    """Who is told what happens."""

    def note(self, text: str) -> None:
        """Something the user should know."""

    def stage(self, text: str) -> None:
        """A new part of the analysis begins."""

    def progress(self, done: float, total: float) -> None:
        """How far the sweep is, in tokens times layers."""


@dataclass(frozen=True)
class ProxyFindings:
    """What the proxy found: every layer's clash, and the layers that were halved."""

    models: list[str]
    clashes: list[Clash]
    treated: list[int]
    verdict: str


@refusals()
def analyze_recipe(recipe_path: Path, out: Path, work: Path, options: StudyOptions, observer: StudyObserver, *,
                   tasks_file: Path | None = None) -> Findings | ProxyFindings:  # fmt: skip
    """Analyse a recipe and write the decided one to `out`; what is needed to go on is kept in the folder `work`.

    Raises the errors of base/errors.py; those about recipe and tasks before anything runs for long.
    """
    recipe = load_recipe(recipe_path, strict=options.strict)
    if recipe.method.name != "hi_merging":
        raise RecipeError(str(recipe_path), [f"only hi_merging is analysed, and this is {recipe.method.name}"])
    for warning in recipe.warnings:
        observer.note(f"{recipe_path}: {warning}")
    given = _given(recipe)
    template = _template(recipe)
    plan = plan_recipe(template, Options(seed=options.seed, strict=options.strict), observer.note)
    with ExitStack() as stack:
        stopping = stack.enter_context(stop_signals())
        if recipe.proxy is not None and tasks_file is None:
            bench = stack.enter_context(
                open_workbench(plan.checkpoints[0].directory, options, book=None, stopping=stopping,
                               progress=observer.progress, note=observer.note, plans=(), versions=0)
            )  # fmt: skip
            text, proxied = _by_proxy(recipe, plan, bench, given, out, observer)
            _write(out, text, options)
            return proxied
        tasks = _tasks(recipe, tasks_file)
        for sentence in (sentence for task in tasks for sentence in shared_rows(task)):
            observer.note(f"WARNING: {sentence}")
        bench = stack.enter_context(
            open_workbench(plan.checkpoints[0].directory, options, book=work / _SCORES, stopping=stopping,
                           progress=observer.progress, note=observer.note, plans=(plan,),
                           versions=_MODELS_PER_LAYER if given.density is not None else 100)
        )  # fmt: skip
        findings = _by_data(recipe, plan, tasks, bench, given, observer)
        text = decided_recipe(
            recipe, [_parameters(findings, m) for m in range(len(findings.models))], _comments(findings),
            _heading(recipe, findings), out,
        )  # fmt: skip
        _write(out, text, options)
        return findings


def _write(out: Path, text: str, options: StudyOptions) -> None:
    """Write the decided recipe; in a team all write the same, one after the other."""
    with nullcontext() if options.team is None else options.team.alone("recipe"):
        write_file(out, text.encode())


def decided_for_merge(recipe_path: Path, out: Path, work: Path, options: StudyOptions, observer: StudyObserver,
                      shard_bytes: int, *, verified: bool) -> Findings | ProxyFindings:  # fmt: skip
    """The analysis before a merge into `out`: leaves the decided recipe in `work`, where `decided_path` finds it.

    What is wrong with `out` or its disk, and if they are to be `verified` with the inputs, is said before the analysis.
    """
    recipe = load_recipe(recipe_path, strict=options.strict)
    merging = Options(seed=options.seed, strict=options.strict, shard_bytes=shard_bytes)
    plan = plan_recipe(_template(recipe), merging, observer.note)
    check_apart(out, plan.checkpoints)
    check_apart(work, plan.checkpoints)
    check_usable(out)
    check_disk(plan, out)
    if verified:
        verify_inputs(plan.checkpoints, observer.note)
    return analyze_recipe(recipe_path, decided_path(work), work, options, observer)


def foresee(recipe_path: Path, options: StudyOptions, shard_bytes: int) -> tuple[Plan, list[str]]:
    """What merging a recipe with tasks will do: the plan but for the parameters, and sentences about the analysis.

    Reads headers and tasks, no weights. Raises DoesNotFit when the analysis cannot work in the memory there is.
    """
    recipe = load_recipe(recipe_path, strict=options.strict)
    given = _given(recipe)
    plan = plan_recipe(_template(recipe), Options(seed=options.seed, strict=options.strict, shard_bytes=shard_bytes))
    if recipe.proxy is not None:
        return plan, ["the parameters are found first, by one pass over the weights; no data is asked (a proxy)"]
    tasks = _tasks(recipe, None)
    sentences = [sentence for task in tasks for sentence in shared_rows(task)]
    with open_workbench(plan.checkpoints[0].directory, options, book=None, stopping=lambda: False, plans=(),
                        progress=lambda done, total: None, note=sentences.append, versions=0) as bench:  # fmt: skip
        family = _family(recipe, plan, bench)
        judge = Judge(family, [bench.prepare(task, "dev") for task in tasks], bench.sweeper)
        models = len(tasks)
        half = family.mixture([0.5] * models, [1.0] * models, [1.0] * models)
        before = [half.with_weight(one_of(models, m)) for m in range(models)]
        jobs = judge.jobs(contribution_questions(judge, family.layers, half, before))
        waves = bench.sweeper.waves(jobs)
        hidden = sum(job.task.num_tokens * bench.network.width * 4 for job in jobs)
        searched = "" if given.density is not None and given.scale is not None else (
            f"a search of density and scale over {len(recipe.analysis.densities) * len(recipe.analysis.scales)} models "
            f"per specialist, "
        )  # fmt: skip
        passes = f"{len(waves)} pass{'es'[: 2 * (len(waves) > 1)]}"
        sentences.append(
            f"the parameters are found first, on {sum(len(one.split.examples) for one in judge.tasks)} dev examples: "
            f"{searched}the contributions of {len(family.layers)} layers ({len(jobs)} scores of unwritten models, "
            f"{sum(wave.block_forwards for wave in waves):,} block forwards, {passes} over the weights, hidden states "
            f"of {format_size(hidden)}{' on disk' if options.spill else ''}), and single actions and nested steps "
            f"of about the same cost"
        )
    return plan, sentences


def analysis_folder(out: Path) -> Path:
    """Where the analysis before a merge into `out`, or the one that writes the recipe `out`, keeps what it found."""
    return out.with_name(f"{out.name}.analysis")


def decided_path(work: Path) -> Path:
    """The recipe that the analysis before a merge decided on."""
    return work / "recipe.yaml"


def _by_data(recipe: Recipe, plan: Plan, tasks: Sequence[Task], bench: Workbench, given: Given,
             observer: StudyObserver) -> Findings:  # fmt: skip
    options = recipe.analysis
    family = _family(recipe, plan, bench)
    dev = [bench.prepare(task, "dev") for task in tasks]
    test = [bench.prepare(task, "test") for task in tasks if task.test is not None]
    observer.stage(f"analysing {len(family.layers)} layers of {len(family.models)} models")
    judge = Judge(family, dev, bench.sweeper)
    findings = analyze(judge, given, options, recipe.decisions, observer.stage)
    findings.family = family
    findings.table = _table(judge, findings, "dev")
    if len(test) == len(tasks):
        observer.stage("scoring on the test data")
        findings.table += _table(Judge(family, test, bench.sweeper), findings, "test")
    elif test:
        observer.note("some tasks have no test file: the test table is left out")
    findings.facts = bench.sweeper.facts
    for warning in findings.warnings:
        observer.note(f"WARNING: {warning}")
    return findings


def _family(recipe: Recipe, plan: Plan, bench: Workbench) -> Family:
    options = recipe.analysis
    return Family(
        plan, bench.network, bench.shelf, split_blocks=options.layer == "parts", outside=options.outside == "analysed",
        ask=lambda group, question: bench.ask(plan, group, question),
    )  # fmt: skip


def _table(judge: Judge, findings: Findings, split: str) -> list[Row]:
    """Base, specialists, the plain sum of their deltas at the same weights, stage 1, and the result."""
    models = len(findings.models)
    plain = judge.family.mixture([1.0] * models, [1.0] * models, findings.start.weight)
    rows: dict[str, Mixture] = {"base": judge.base}
    for m, model in enumerate(findings.models):
        rows[model] = plain.with_weight(one_of(models, m))
    rows["task arithmetic"] = plain
    rows["stage 1"] = findings.start
    rows["Hi-Merging"] = findings.result
    judge.ask_all(list(rows.values()))
    tasks = range(len(judge.tasks))
    return [
        Row(name, split, tuple(judge.p(mixture, task) for task in tasks),
            tuple(judge.accuracy(mixture, task) for task in tasks))
        for name, mixture in rows.items()
    ]  # fmt: skip


def _by_proxy(recipe: Recipe, plan: Plan, bench: Workbench, given: Given, out: Path,
              observer: StudyObserver) -> tuple[str, ProxyFindings]:  # fmt: skip
    """The decided recipe, and what was found."""
    options = recipe.analysis
    family = _family(recipe, plan, bench)
    models = len(family.models)
    if models < 2:
        raise RecipeError(str(recipe.path), ["proxy: weights compares models; it needs two or more"])
    observer.stage("weighing sign conflicts: a proxy, no data is asked")
    clashes = weigh_conflicts(family)
    worst = sorted(clashes, key=lambda clash: (-clash.share, clash.layer))
    treated = [clash.layer for clash in worst[: max(1, round(options.share * len(worst)))] if clash.share > 0]
    ones = (1.0,) * models
    mixture = family.mixture(given.density or ones, given.scale or ones, given.weight or (1 / models,) * models)
    for layer in treated:
        for m in range(models):
            mixture = mixture.with_part(layer, m, HALF)
    verdict = (
        f"{len(treated)} of {len(clashes)} layers halved, by a proxy: the sign-conflict mass of the weights, "
        f"which no data confirmed"
    )
    comments = {
        text: f"half; sign-conflict mass {clash.share:.3f} (proxy)"
        for clash in clashes
        if clash.layer in treated
        for text in family.groups[clash.layer].filters
    }
    heading = [f"Decided by streammerge analyze from {recipe.path.name}: {verdict}."]
    parameters = [family.parameters(mixture, m) for m in range(models)]
    text = decided_recipe(recipe, parameters, comments, heading, out)
    return text, ProxyFindings(family.models, clashes, treated, verdict)


def _tasks(recipe: Recipe, tasks_file: Path | None) -> list[Task]:
    """The tasks, in the order of the models they belong to."""
    models = [source.model for source in recipe.only.models]
    entries: Sequence[Any]
    entries, origin = (recipe.tasks or (), recipe.path)
    if tasks_file is not None:
        entries, origin = read_tasks_file(tasks_file), tasks_file
    if not entries:
        raise RecipeError(
            str(recipe.path),
            ["an analysis needs tasks: a list {name, model, dev} under `tasks:`, or --tasks FILE, or `proxy: weights`"],
        )
    tasks = {task.model: task for task in load_tasks(entries, origin, models)}
    return [tasks[model] for model in models]


def _given(recipe: Recipe) -> Given:
    """What the recipe fixes. Raises RecipeError for anything but one number per model."""
    problems: list[str] = []
    values: dict[str, tuple[float, ...] | None] = {}
    for name in ("density", "scale", "weight"):
        settings = [source.parameters.get(name, recipe.last.parameters.get(name)) for source in recipe.only.models]
        numbers = [_number(setting) for setting in settings if setting]
        if any(number is None for number in numbers):
            problems.append(f"{name}: an analysis takes one number per model, no gradients or filters")
        elif numbers and len(numbers) < len(settings):
            problems.append(f"{name} is given for some models only; give it for all, or for none to have it searched")
        values[name] = tuple(number for number in numbers if number is not None) if numbers else None
    if not recipe.only.models:
        problems.append("list at least one model besides the base")
    if problems:
        raise RecipeError(str(recipe.path), problems)
    return Given(values["density"], values["scale"], values["weight"])


def _number(setting: Setting) -> float | None:
    if len(setting) != 1 or setting[0].filter not in (None, "*") or len(setting[0].values) != 1:
        return None
    value = setting[0].values[0]
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _template(recipe: Recipe) -> Recipe:
    """The recipe with parameters that the analysis will replace."""
    own = ("weight", "density", "scale")
    fixed = {"weight": parse_setting(1.0), "density": parse_setting(0.5), "scale": parse_setting(1.0)}
    part = recipe.only
    models = tuple(
        replace(source, parameters={k: v for k, v in source.parameters.items() if k not in own} | fixed)
        for source in part.models
    )
    shared = {name: setting for name, setting in recipe.last.parameters.items() if name not in own}
    stage = replace(recipe.last, modules=(Module(None, (replace(part, models=models),)),), parameters=shared)
    return replace(recipe, stages=(stage,))


def _parameters(findings: Findings, model: int) -> dict[str, Any]:
    assert findings.family is not None
    return findings.family.parameters(findings.result, model)


def _comments(findings: Findings) -> dict[str, str]:
    """For each filter of a layer that changed: the case and every γ with its interval."""
    assert findings.family is not None
    comments = {}
    for layer in findings.layers:
        row = findings.result.parts[layer]
        if all(treatment == KEEP for treatment in row):
            continue
        parts = [f"{findings.case(layer)}"]
        for m, (model, treatment) in enumerate(zip(findings.models, row, strict=True)):
            gamma = findings.contributions[layer, m].gamma
            low, high = gamma.interval
            parts.append(f"{Path(model).name} {treatment.label}, γ {gamma.value:+.3f} [{low:+.3f}, {high:+.3f}]")
        for text in findings.family.groups[layer].filters:
            comments[text] = "; ".join(parts)
    return comments


def _heading(recipe: Recipe, findings: Findings) -> list[str]:
    return [
        f"Decided by streammerge analyze from {recipe.path.name}, mode {findings.decisions}: {findings.verdict}.",
        "An ordinary recipe: read it, change it, run it without data. A positive γ says that merging made the layer",
        "serve the task less well, in units of the task's own gain; its 95 % interval stands beside it.",
    ]
