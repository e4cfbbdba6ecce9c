"""From log-probabilities to P, the metric of a task (larger is better), and how sure it is.

    choice_log_likelihood   log-likelihood of the right choice, normalised over the choices (the default for choices)
    choice_accuracy         whether the right choice is the likeliest
    answer_log_likelihood   mean log-likelihood per token of the answer (the default for free answers)
    perplexity              log-likelihood per token over all examples together: minus the log of the perplexity
    kl                      minus the mean divergence from the specialist's predictions: needs no answers
    module:function         a function of yours: (example, outcome) -> number

P is a ratio of sums over examples, so every metric is two numbers per example. Intervals come from a paired bootstrap:
the same resampled examples for every model, so that what models have in common cancels.
"""

from __future__ import annotations

import importlib
import sys
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streammerge.base.errors import TaskError
from streammerge.study.batches import TaskBatches
from streammerge.study.scorebook import Score
from streammerge.study.tasks import Example, Split, Task

Array = NDArray[np.float64]

METRICS = ("choice_log_likelihood", "choice_accuracy", "answer_log_likelihood", "perplexity", "kl")
_DRAWS = 2000


@dataclass(frozen=True)
class Estimate:
    """A number and the same number over resampled examples (draws,). Sums and differences keep the pairing."""

    value: float
    draws: Array

    def __add__(self, other: Estimate) -> Estimate:
        return Estimate(self.value + other.value, self.draws + other.draws)

    def __sub__(self, other: Estimate) -> Estimate:
        return Estimate(self.value - other.value, self.draws - other.draws)

    def __truediv__(self, number: float) -> Estimate:
        return Estimate(self.value / number, self.draws / number)

    @property
    def error(self) -> float:
        """The standard error."""
        return float(self.draws.std())

    @property
    def interval(self) -> tuple[float, float]:
        """95 % of the resampled values lie within."""
        low, high = np.quantile(self.draws, [0.025, 0.975])
        return float(low), float(high)


@dataclass(frozen=True)
class Outcome:
    """What a model said to one example, as a metric of yours gets it: the summed log-probability of each choice, their
    numbers of tokens, and the mean divergence from the specialist (with `kl` only, else None)."""

    log_probs: tuple[float, ...]
    num_tokens: tuple[int, ...]
    distance: float | None


class Scoring:
    """How one split of a task is scored."""

    def __init__(self, task: Task, split: Split, batches: TaskBatches) -> None:
        """Raises TaskError when the metric does not fit the data, or is not there."""
        self.name = task.name
        self.metric = task.metric or default_metric(split)
        self._examples = split.examples
        self._length_normalised = task.length_normalised
        self._num_tokens = _token_counts(batches)
        self._function = _own_metric(self.metric, split) if ":" in self.metric else None
        _check(self.metric, task, split)
        n = len(split.examples)
        # A stream for each task: examples of different tasks are resampled apart.
        generator = np.random.default_rng(zlib.crc32(task.name.encode()))
        self._counts: Array = generator.multinomial(n, np.full(n, 1 / n), size=_DRAWS).astype(np.float64)

    @property
    def needs_reference(self) -> bool:
        return self.metric == "kl"

    @property
    def has_accuracy(self) -> bool:
        """Whether there are right choices to find."""
        return all(len(example.choices) > 1 and example.answer is not None for example in self._examples)

    def p(self, score: Score, part: NDArray[np.bool_] | None = None) -> Estimate:
        """The metric, over all examples or over `part` of them."""
        rows = [self._value(i, example, score) for i, example in enumerate(self._examples)]
        return self._estimate(np.array(rows), part)

    def accuracy(self, score: Score, part: NDArray[np.bool_] | None = None) -> Estimate | None:
        """The share of examples whose right choice is the likeliest, where there are choices."""
        if not self.has_accuracy:
            return None
        right = [self._is_right(i, example, score) for i, example in enumerate(self._examples)]
        return self._estimate(np.stack([np.array(right, np.float64), np.ones(len(right))], 1), part)

    def _estimate(self, rows: Array, part: NDArray[np.bool_] | None) -> Estimate:
        """`rows` (examples, 2): what is summed above and below the line."""
        counts = self._counts
        if part is not None:
            rows, counts = rows[part], counts[:, part]
        above, below = rows[:, 0].sum(), rows[:, 1].sum()
        sums = counts @ rows
        # A draw without any example of the part says nothing: it counts as the value itself.
        safe = np.where(sums[:, 1] > 0, sums[:, 1], 1.0)
        draws = np.where(sums[:, 1] > 0, sums[:, 0] / safe, above / below)
        return Estimate(float(above / below), draws)

    def _value(self, i: int, example: Example, score: Score) -> tuple[float, float]:
        if self._function is not None:
            distance = score.distances[i] if score.distances else None
            outcome = Outcome(score.log_probs[i], self._num_tokens[i], distance)
            return float(self._function(example, outcome)), 1.0
        if self.metric == "kl":
            return -score.distances[i], 1.0
        if self.metric == "choice_accuracy":
            return self._is_right(i, example, score), 1.0
        answer = example.answer or 0
        if self.metric == "perplexity":
            return score.log_probs[i][answer], float(self._num_tokens[i][answer])
        if self.metric == "answer_log_likelihood":
            return score.log_probs[i][answer] / self._num_tokens[i][answer], 1.0
        scores = self._choice_scores(i, score)
        return float(scores[answer] - np.logaddexp.reduce(scores)), 1.0

    def _choice_scores(self, i: int, score: Score) -> Array:
        scores = np.array(score.log_probs[i])
        return scores / np.array(self._num_tokens[i]) if self._length_normalised else scores

    def _is_right(self, i: int, example: Example, score: Score) -> float:
        scores = self._choice_scores(i, score)
        return float(int(scores.argmax()) == example.answer)


def default_metric(split: Split) -> str:
    """The metric that fits the data."""
    first = split.examples[0]
    if len(first.choices) > 1 and first.answer is not None:
        return "choice_log_likelihood"
    return "answer_log_likelihood" if len(first.choices) == 1 else "kl"


def half_of(count: int, *, every: int) -> NDArray[np.bool_]:
    """Which examples are held back: one in `every`, spread evenly."""
    held_back: NDArray[np.bool_] = np.arange(count) % every == every - 1
    return held_back


def _check(metric: str, task: Task, split: Split) -> None:
    first = split.examples[0]
    choices = len(first.choices) > 1 and first.answer is not None
    problem = None
    if ":" not in metric and metric not in METRICS:
        problem = f"{metric!r} is no metric; there are {', '.join(METRICS)}, and module:function"
    elif metric.startswith("choice") and not choices:
        problem = f"{metric} needs choices with an answer"
    elif metric == "answer_log_likelihood" and first.answer is None:
        problem = "answer_log_likelihood needs completions, or choices with an answer"
    elif metric == "perplexity" and first.choices and first.answer is None:
        problem = "perplexity needs completions, choices with an answer, or bare prompts"
    elif metric == "kl" and task.model is None:
        problem = "kl compares with the task's specialist: name its model"
    if problem is not None:
        raise TaskError(f"{split.path} (task {task.name})", [problem])


def _own_metric(name: str, split: Split) -> Callable[[Example, Outcome], Any]:
    module_name, _, function_name = name.partition(":")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError, SyntaxError, TypeError, ValueError) as error:
        raise TaskError(str(split.path), [f"the metric {name} cannot be imported: {error}"]) from None
    if not callable(function):
        raise TaskError(str(split.path), [f"the metric {name} cannot be called: it is {function!r:.40}"])
    return function  # type: ignore[no-any-return]


def _token_counts(batches: TaskBatches) -> list[tuple[int, ...]]:
    counts: Sequence[dict[int, int]] = [{} for _ in batches.examples]
    for batch in batches.batches:
        for one in batch.scored:
            counts[one.example][one.choice] = len(one.targets)
    return [tuple(of[choice] for choice in sorted(of)) for of in counts]
