"""Hi-Merging: from specialists and dev data to a recipe, without training.

    stage 1   per model a density p and a scale s, given or searched; a common weight, given or searched
    stage 2   contribution analysis of every layer, before and after the first merge (contribution.py)
    stage 3   conflicts resolved layer by layer: drop, prune and scale again, or keep (decisions.py)

Every question "how good would this merge be?" goes to the sweep (sweep.py); no merge is written on the way.
Fu et al., "Training-free LLM Merging for Multi-task Learning" (ACL 2025). Where the paper is silent, docs/hi-merging.md
says which reading this is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from streammerge.plan.analysis import AnalysisOptions, Decisions
from streammerge.study.contribution import Contribution, Threshold
from streammerge.study.decisions import decide
from streammerge.study.findings import Factor, Findings, Given, Surface
from streammerge.study.judge import Judge, one_of
from streammerge.study.mixture import Mixture


def analyze(judge: Judge, given: Given, options: AnalysisOptions, decisions: Decisions,
            tell: Callable[[str], None]) -> Findings:  # fmt: skip
    """Stages 1 to 3 on the dev data of the judge; `tell` is told which stage begins."""
    models = len(judge.tasks)
    equal = judge.family.equal_models()
    density, scale, surfaces = _stage_one(judge, given, options, tell)
    tell("scoring base, specialists and first merges")
    one = judge.family.mixture(density, scale, [1.0] * models)
    specialists = [one.with_weight(one_of(models, m)) for m in range(models)]
    factors = _factors_to_try(given, options, decisions, models)
    first = [one.with_weight(weight) for weight in factors]
    judge.ask_all([judge.base, *specialists, *first])
    findings = _open_findings(judge, options, decisions, one, specialists, equal)
    findings.surfaces = surfaces
    start = _choose_factor(judge, findings, first)
    findings.start = findings.result = start
    before = [_before(judge, options, decisions, start, specialists, group_of, m)
              for m, group_of in enumerate(_group_of_each(equal, models))]  # fmt: skip
    tell(f"contribution analysis of {len(findings.layers)} layers")
    findings.contributions = contributions(judge, findings.layers, start, before, findings.units)
    decide(judge, findings, options, tell)
    if findings.result != findings.start:
        tell("contribution analysis of the result")
        findings.after = contributions(judge, findings.layers, findings.result, before, findings.units)
    return findings


def contributions(judge: Judge, layers: Sequence[int], after: Mixture, before: Sequence[Mixture],
                  units: Sequence[float]) -> dict[tuple[int, int], Contribution]:  # fmt: skip
    """α and β of every layer for every model's task, in one sweep."""
    tasks = range(len(judge.tasks))
    judge.ask(contribution_questions(judge, layers, after, before))
    found = {}
    for layer in layers:
        for task in tasks:
            base, mine = judge.p(judge.base, task), before[task]
            found[layer, task] = Contribution(
                layer,
                task,
                judge.p(mine, task) - judge.p(mine.without(layer), task),
                judge.p(after, task) - judge.p(after.without(layer), task),
                judge.p(mine.only(layer), task) - base,
                judge.p(after.only(layer), task) - base,
                units[task],
            )
    return found


def contribution_questions(
    judge: Judge, layers: Sequence[int], after: Mixture, before: Sequence[Mixture]
) -> list[tuple[Mixture, int]]:
    """The mixtures and tasks that an analysis of `layers` has to score: 3 + 4 · layers for each task."""
    questions: list[tuple[Mixture, int]] = []
    for task, mine in enumerate(before):
        questions += [(judge.base, task), (mine, task), (after, task)]
        for layer in layers:
            questions += [(made, task) for one in (mine, after) for made in (one.without(layer), one.only(layer))]
    return questions


def _stage_one(
    judge: Judge, given: Given, options: AnalysisOptions, tell: Callable[[str], None]
) -> tuple[list[float], list[float], list[Surface]]:
    """Density and scale of every model: what is given, or the best on the dev data of its task."""
    models = range(len(judge.tasks))
    densities = [options.densities if given.density is None else (given.density[m],) for m in models]
    scales = [options.scales if given.scale is None else (given.scale[m],) for m in models]
    if all(len(densities[m]) * len(scales[m]) == 1 for m in models):
        return [row[0] for row in densities], [row[0] for row in scales], []
    tell(f"searching density and scale: {sum(len(densities[m]) * len(scales[m]) for m in models)} models")
    grid = {}
    for m in models:
        for p in densities[m]:
            for s in scales[m]:
                others = [(p, s) if k == m else (1.0, 1.0) for k in models]
                mixture = judge.family.mixture([a for a, _ in others], [b for _, b in others], one_of(len(models), m))
                grid[m, p, s] = mixture
    judge.ask([(mixture, m) for (m, _, _), mixture in grid.items()])
    chosen, surfaces = [], []
    for m in models:
        scores = {(p, s): judge.p(grid[m, p, s], m).value for p in densities[m] for s in scales[m]}
        # Of equal ones the denser and stronger: it changes the specialist least.
        chosen.append(max(scores, key=lambda pair: (scores[pair], pair)))
        rows = tuple(tuple(scores[p, s] for s in scales[m]) for p in densities[m])
        surfaces.append(Surface(m, tuple(densities[m]), tuple(scales[m]), rows))
    return [p for p, _ in chosen], [s for _, s in chosen], surfaces


def _factors_to_try(
    given: Given, options: AnalysisOptions, decisions: Decisions, models: int
) -> list[tuple[float, ...]]:
    if given.weight is not None:
        return [given.weight]
    how = options.weights or ("paper" if decisions == "paper" else "searched")
    if how == "searched":
        return [(factor,) * models for factor in options.factors]
    return [(1.0 if how == "sum" else 1 / models,) * models]


def _open_findings(judge: Judge, options: AnalysisOptions, decisions: Decisions, one: Mixture,
                   specialists: Sequence[Mixture], equal: list[list[int]]) -> Findings:  # fmt: skip
    """The gains of the tasks, which are the units of everything that follows."""
    warnings, units, gains = [], [], []
    for task, data in enumerate(judge.tasks):
        gain = judge.p(specialists[task], task) - judge.p(judge.base, task)
        gains.append(gain)
        if options.units == "raw":
            units.append(1.0)
        elif gain.value <= gain.error:
            units.append(1.0)
            warnings.append(
                f"task {data.task.name}: its specialist gains {gain.value:+.4f} over the base, which is within the "
                f"standard error of {gain.error:.4f}: raw values of {data.scoring.metric} are used for it"
            )
        else:
            units.append(gain.value)
    judge.units = units
    fixed = options.threshold
    if fixed is None and options.errors is None and decisions == "paper":
        fixed = 0.0
    threshold = Threshold(3.0 if options.errors is None else options.errors, fixed)
    groups = [group.label for group in judge.family.groups]
    return Findings(
        decisions, judge.family.models, list(judge.tasks), groups, judge.family.layers, threshold, one, one, units,
        gains, equal, warnings=warnings,
    )  # fmt: skip


def _choose_factor(judge: Judge, findings: Findings, first: Sequence[Mixture]) -> Mixture:
    """The first merge that keeps most of the gains."""
    scores = [judge.score(mixture).value for mixture in first]
    if len(first) > 1:
        tasks = range(len(judge.tasks))
        findings.factors = [
            Factor(mixture.weight[0], score, tuple(judge.p(mixture, task).value for task in tasks))
            for mixture, score in zip(first, scores, strict=True)
        ]
    return first[scores.index(max(scores))]


def _before(judge: Judge, options: AnalysisOptions, decisions: Decisions, start: Mixture,
            specialists: Sequence[Mixture], equal: Sequence[int], model: int) -> Mixture:  # fmt: skip
    """The specialist that contributions are compared with. Equal models count as one."""
    how = options.before or ("full" if decisions == "paper" else "weighted")
    if how == "weighted":
        return start.with_weight([weight if k in equal else 0.0 for k, weight in enumerate(start.weight)])
    if how == "full":
        return specialists[model]
    models = len(start.weight)
    return replace(judge.base, weight=one_of(models, model))


def _group_of_each(equal: list[list[int]], models: int) -> list[list[int]]:
    return [next(group for group in equal if m in group) for m in range(models)]
