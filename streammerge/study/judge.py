"""Answers how good a merge would be. What it does not know it finds out in one sweep for all questions together."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from streammerge.study.mixture import Family, Mixture
from streammerge.study.scoring import Estimate
from streammerge.study.sweep import Job, Sweeper
from streammerge.study.workbench import TaskData

# Which examples count, per task; None for all.
Part = Sequence[NDArray[np.bool_]] | None


class Judge:
    """Answers how good mixtures are, by sweeping when it does not know. Task i belongs to model i."""

    def __init__(self, family: Family, tasks: Sequence[TaskData], sweeper: Sweeper) -> None:
        self.family, self.tasks = family, tasks
        self._sweeper = sweeper
        models = len(tasks)
        whole = family.mixture([1.0] * models, [1.0] * models, [0.0] * models)
        self.base = whole
        self._specialists = [whole.with_weight(one_of(models, m)) for m in range(models)]
        self.units = [1.0] * models
        # Estimates over all examples: asked for again and again, and a bootstrap each.
        self._known: dict[tuple[Mixture, int], tuple[Estimate, Estimate | None]] = {}

    def ask(self, questions: Sequence[tuple[Mixture, int]]) -> None:
        """Make sure that the scores of these (mixture, task) pairs are known: one sweep for all of them."""
        self._sweeper.score(self.jobs(questions))

    def jobs(self, questions: Sequence[tuple[Mixture, int]]) -> list[Job]:
        """What the sweep has to do for these questions."""
        return [self._job(mixture, task) for mixture, task in questions]

    def ask_all(self, mixtures: Sequence[Mixture]) -> None:
        """The same, of every task."""
        self.ask([(mixture, task) for task in range(len(self.tasks)) for mixture in mixtures])

    def p(self, mixture: Mixture, task: int, part: Part = None) -> Estimate:
        """P of a mixture on a task, which must have been asked."""
        return self._estimates(mixture, task, part)[0]

    def accuracy(self, mixture: Mixture, task: int, part: Part = None) -> Estimate | None:
        """Its accuracy, where the task has choices."""
        return self._estimates(mixture, task, part)[1]

    def _estimates(self, mixture: Mixture, task: int, part: Part) -> tuple[Estimate, Estimate | None]:
        if part is None and (mixture, task) in self._known:
            return self._known[mixture, task]
        score = self._sweeper.book[self._job(mixture, task).key]
        scoring, chosen = self.tasks[task].scoring, None if part is None else part[task]
        estimates = scoring.p(score, chosen), scoring.accuracy(score, chosen)
        if part is None:
            self._known[mixture, task] = estimates
        return estimates

    def score(self, mixture: Mixture, part: Part = None) -> Estimate:
        """The mean over tasks of (P − P(base)) in units of the tasks' gains."""
        shares = [
            (self.p(mixture, task, part) - self.p(self.base, task, part)) / self.units[task]
            for task in range(len(self.tasks))
        ]
        total = shares[0]
        for share in shares[1:]:
            # Examples of different tasks have nothing in common: their draws pair up at random, as they should.
            total = total + share
        return total / len(shares)

    def _job(self, mixture: Mixture, task: int) -> Job:
        data = self.tasks[task]
        reference = self.family.variant(self._specialists[task]) if data.scoring.needs_reference else None
        return Job(self.family.variant(mixture), data.batches, reference)


def one_of(models: int, model: int) -> tuple[float, ...]:
    """The weights of one model alone."""
    return tuple(1.0 if k == model else 0.0 for k in range(models))
