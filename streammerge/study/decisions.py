"""Stage 3: what is done about conflicts, in three modes.

    paper      layers with a conflict, by descending Γ: severe keeps the larger contribution alone, partial halves
    guarded    single actions are tried on dev data, the improving ones in nested steps; nothing that hurts a task stays
    searched   a grid of actions, layer after layer, as long as dev data say that it helps

The modes differ in how much they trust the analysis: the first does not look back, the last hardly needs it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from streammerge.plan.analysis import AnalysisOptions
from streammerge.study.contribution import Contribution
from streammerge.study.findings import Findings, Step
from streammerge.study.judge import Judge, Part
from streammerge.study.mixture import DROP, HALF, Mixture, Treatment
from streammerge.study.scoring import Estimate, half_of

# What guarded tries in each layer for each model: the paper's two, and a little less or more.
_GUARDED = (DROP, HALF, Treatment(1.0, 0.75), Treatment(1.0, 1.3))
_GRID = (DROP, Treatment(1.0, 0.5), Treatment(1.0, 0.75), Treatment(1.0, 1.3))
_HELD_BACK = 4
# A step that promises less, summed over the tasks in shares of their gains, is not worth a score.
_LEAST_GAIN = 0.001


def decide(judge: Judge, findings: Findings, options: AnalysisOptions, tell: Callable[[str], None]) -> None:
    """Set `findings.result` and `findings.verdict`."""
    if len(findings.equal) == 1 and len(findings.models) > 1:
        findings.verdict = "the models are equal: there is nothing to resolve, and the stage-1 merge is kept"
    elif not findings.conflicts and findings.decisions != "searched":
        findings.verdict = "no conflict found: no γ is beyond its threshold, and the stage-1 merge is kept"
    elif findings.decisions == "paper":
        _paper(judge, findings, options)
    elif findings.decisions == "guarded":
        _guarded(judge, findings, options, tell)
    else:
        _searched(judge, findings, options, tell)


# --- paper -----------------------------------------------------------------------------------------------------------


def _paper(judge: Judge, findings: Findings, options: AnalysisOptions) -> None:
    everyone = list(range(len(findings.models)))
    mixture = findings.start
    open_layers = {layer: {m: findings.contributions[layer, m] for m in everyone} for layer in findings.conflicts}
    while open_layers:
        again: dict[int, list[int]] = {}
        for layer, of in open_layers.items():
            over = [m for m, contribution in of.items() if findings.threshold.exceeded(contribution)]
            if len(over) == len(of) > 1:
                least = min(of, key=lambda m: (of[m].before.value, m))
                mixture = mixture.with_part(layer, least, DROP)
                left = [m for m in of if m != least]
                if len(left) > 1:
                    again[layer] = left
                elif options.survivors == "reweighted":
                    mixture = mixture.with_part(layer, left[0], _reweighted(findings, left))
            elif over:
                treated = over if options.treated == "conflicting" else [m for m in of if m not in over]
                for m in treated:
                    mixture = mixture.with_part(layer, m, HALF)
        open_layers = _analyse_again(judge, findings, mixture, again)
    findings.result = mixture
    findings.verdict = (
        f"{findings.changed} of {len(findings.layers)} layers changed by the paper's rules, without looking back"
    )


def _reweighted(findings: Findings, left: Sequence[int]) -> Treatment:
    total = sum(findings.start.weight[m] for m in left)
    return Treatment(1.0, 1 / total) if total else Treatment()


def _analyse_again(
    judge: Judge, findings: Findings, mixture: Mixture, layers: dict[int, list[int]]
) -> dict[int, dict[int, Contribution]]:
    """The contributions of layers from which a model was dropped, for the models that are left in them."""
    start = findings.start
    reduced = {layer: start.with_row(layer, mixture.parts[layer]) for layer in layers}
    judge.ask(
        [(made, m) for layer, models in layers.items() for m in models
         for made in (reduced[layer], reduced[layer].only(layer))]
    )  # fmt: skip
    found: dict[int, dict[int, Contribution]] = {}
    for layer, models in layers.items():
        for m in models:
            known = findings.contributions[layer, m]
            found.setdefault(layer, {})[m] = replace(
                known,
                alpha_after=judge.p(reduced[layer], m) - judge.p(start.without(layer), m),
                beta_after=judge.p(reduced[layer].only(layer), m) - judge.p(judge.base, m),
            )
    return found


# --- guarded ---------------------------------------------------------------------------------------------------------


def _guarded(judge: Judge, findings: Findings, options: AnalysisOptions, tell: Callable[[str], None]) -> None:
    start = findings.start
    layers = findings.order if options.candidates == "all" else findings.conflicts
    actions = [
        _Action(layer, m, treatment, start.with_part(layer, m, treatment))
        for layer in layers
        for m in range(len(findings.models))
        for treatment in _GUARDED
    ]
    tell(f"trying {len(actions)} single actions")
    judge.ask_all([start, *(action.mixture for action in actions)])
    findings.candidates = [_step(judge, _label(findings, action), action.mixture, start, None) for action in actions]
    moves = _chain(judge, findings, actions)
    prefixes = [start]
    for move in moves:
        mixture = prefixes[-1]
        for action in move:
            mixture = mixture.with_part(action.layer, action.model, action.treatment)
        prefixes.append(mixture)
    tell(f"scoring {len(prefixes)} nested steps")
    judge.ask_all(prefixes)
    labels = ["nothing", *("+ " + ", ".join(_label(findings, action) for action in move) for move in moves)]
    steps = [_step(judge, label, mixture, start, None) for label, mixture in zip(labels, prefixes, strict=True)]
    findings.prefixes = steps
    chosen = _shortest_best(judge, steps, prefixes)
    findings.result = prefixes[chosen]
    findings.verdict = (
        f"{_changed(findings)} changes, the first {chosen} of {len(moves)} steps that promised a gain on the dev data"
        if chosen
        else "no change holds on the dev data without hurting a task: the stage-1 merge is kept"
    )


def _changed(findings: Findings) -> int:
    """How many layers of how many models are treated otherwise than at the start."""
    rows = zip(findings.result.parts, findings.start.parts, strict=True)
    return sum(mine != first for row, old in rows for mine, first in zip(row, old, strict=True))


@dataclass(frozen=True)
class _Action:
    """One model treated otherwise in one layer, and nothing else."""

    layer: int
    model: int
    treatment: Treatment
    mixture: Mixture


def _label(findings: Findings, action: _Action) -> str:
    return f"{findings.groups[action.layer]}: {action.treatment.label} {findings.models[action.model]}"


def _chain(judge: Judge, findings: Findings, actions: Sequence[_Action]) -> list[list[_Action]]:
    """Moves to make one after the other, as far as single effects add up.

    Each is the one action, or the two, that gain most without leaving a task worse off than at the start, in P or in
    accuracy. Two, because what one action takes from a task another may give back. At most one for a layer and model.
    """
    effects = np.array([_effects(judge, findings.start, action.mixture) for action in actions])
    places = np.array([action.layer * len(findings.models) + action.model for action in actions])
    gains = effects[:, : len(judge.tasks)].sum(1)
    first, second = np.triu_indices(len(actions))
    # An action with itself is a move of one.
    apart = (first == second) | (places[first] != places[second])
    first, second = first[apart], second[apart]
    single = first == second
    move_effects = effects[first] + np.where(single, 0.0, 1.0)[:, None] * effects[second]
    move_gains = gains[first] + np.where(single, 0.0, gains[second])
    reached = np.zeros(effects.shape[1])
    free = np.ones(len(first), np.bool_)
    moves: list[list[_Action]] = []
    while True:
        possible = free & (move_gains > _LEAST_GAIN) & (reached + move_effects >= -1e-12).all(1)
        if not possible.any():
            return moves
        best = int(np.where(possible, move_gains, -np.inf).argmax())
        chosen = sorted({int(first[best]), int(second[best])})
        moves.append([actions[i] for i in chosen])
        reached = reached + move_effects[best]
        free &= ~np.isin(places[first], places[chosen]) & ~np.isin(places[second], places[chosen])


def _effects(judge: Judge, start: Mixture, mixture: Mixture) -> list[float]:
    """What a mixture changes: P of every task in units of its gain, then the accuracies."""
    tasks = range(len(judge.tasks))
    changes = [(judge.p(mixture, task) - judge.p(start, task)).value / judge.units[task] for task in tasks]
    for task in tasks:
        mine, first = judge.accuracy(mixture, task), judge.accuracy(start, task)
        changes.append(0.0 if mine is None or first is None else mine.value - first.value)
    return changes


def _shortest_best(judge: Judge, steps: Sequence[Step], mixtures: Sequence[Mixture]) -> int:
    """Of the steps that hurt no task the best, or the shortest one that is as good within its standard error."""
    allowed = [i for i, step in enumerate(steps) if step.out is None]
    best = max(allowed, key=lambda i: (steps[i].gain, -i))
    for i in allowed:
        behind = judge.score(mixtures[best]) - judge.score(mixtures[i])
        if i == best or behind.value <= behind.error:
            return i
    return best


def _step(judge: Judge, label: str, mixture: Mixture, start: Mixture, part: Part) -> Step:
    tasks = range(len(judge.tasks))
    gain = judge.score(mixture, part) - judge.score(start, part)
    accuracy = tuple(judge.accuracy(mixture, task, part) for task in tasks)
    return Step(
        label,
        judge.score(mixture, part).value,
        gain.value,
        gain.error,
        tuple(judge.p(mixture, task, part).value for task in tasks),
        tuple(None if one is None else one.value for one in accuracy),
        _fallen(judge, mixture, start, part),
    )


def _fallen(judge: Judge, mixture: Mixture, start: Mixture, part: Part) -> str | None:
    """Which task is worse off than at the start, in P or in accuracy, or None."""
    for task, data in enumerate(judge.tasks):
        name = data.task.name
        fall = judge.p(mixture, task, part) - judge.p(start, task, part)
        if fall.value < 0:
            return f"{name} falls by {-fall.value:.4f}"
        mine, first = judge.accuracy(mixture, task, part), judge.accuracy(start, task, part)
        if mine is not None and first is not None and mine.value < first.value:
            return f"the accuracy of {name} falls by {first.value - mine.value:.4f}"
    return None


# --- searched --------------------------------------------------------------------------------------------------------


def _searched(judge: Judge, findings: Findings, options: AnalysisOptions, tell: Callable[[str], None]) -> None:
    counts = [len(data.split.examples) for data in judge.tasks]
    held_back = [half_of(count, every=_HELD_BACK) for count in counts]
    search = [~part for part in held_back]
    current = findings.start
    judge.ask_all([current])
    _note_round(judge, findings, "stage 1", current, search, held_back)
    for number in range(options.rounds):
        started = current
        tell(f"round {number + 1}: a grid of actions, layer after layer")
        for layer in findings.order:
            current = _best_action(judge, findings, options, current, layer, search)
        _note_round(judge, findings, f"round {number + 1}", current, search, held_back)
        if current == started:
            break
    findings.result = current
    rounds = len(findings.rounds) // 2 - 1
    seen, unseen = (_gain(judge, current, findings.start, part) for part in (search, held_back))
    findings.verdict = (
        f"{findings.changed} layers changed in {rounds} round{'s'[: rounds != 1]}; mean gain {seen.value:+.3f} on the "
        f"dev data searched over, {unseen.value:+.3f} on the quarter held back"
    )
    if seen.value - unseen.value > 2 * unseen.error:
        findings.warnings.append(
            "the search over-fits: what it gains on its own data is not there on the quarter held back"
        )


def _best_action(judge: Judge, findings: Findings, options: AnalysisOptions, current: Mixture, layer: int,
                 part: Part) -> Mixture:  # fmt: skip
    tried: list[Mixture] = []
    for m in range(len(findings.models)):
        own = current.parts[layer][m]
        for action in (*_GRID, Treatment()):
            factor = own.scale if options.half == "compound" else 1.0
            made = current.with_part(layer, m, Treatment(action.density, action.scale * factor))
            if made != current:
                tried.append(made)
    judge.ask_all([current, *tried])
    best, most = current, 0.0
    for mixture in tried:
        gain = _gain(judge, mixture, current, part)
        if gain.value > max(most, gain.error) and _fallen(judge, mixture, findings.start, part) is None:
            best, most = mixture, gain.value
    return best


def _gain(judge: Judge, mixture: Mixture, start: Mixture, part: Part) -> Estimate:
    return judge.score(mixture, part) - judge.score(start, part)


def _note_round(judge: Judge, findings: Findings, label: str, mixture: Mixture, search: Part, held_back: Part) -> None:
    findings.rounds.append(_step(judge, f"{label}, searched over", mixture, findings.start, search))
    findings.rounds.append(_step(judge, f"{label}, held back", mixture, findings.start, held_back))
