"""From log-probabilities to numbers: every metric against numbers by hand, and how sure they are."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from streammerge.base.errors import TaskError
from streammerge.study.batches import make_batches
from streammerge.study.scorebook import Score
from streammerge.study.scoring import METRICS, Outcome, Scoring, default_metric, half_of
from streammerge.study.tasks import Example, Split
from tests.study.tiny import make_task, make_tokenizer

# Choices of one, two and three tokens; the right ones are the first, the third and the second.
QUESTIONS = tuple(Example("x y", (" a", " b c", " d e f"), answer, 1) for answer in (0, 2, 1))
LOG_PROBS = ((-1.0, -2.0, -6.0), (-3.0, -5.0, -6.0), (-2.0, -4.0, -3.0))
COMPLETIONS = (Example("x", (" a b",), 0, 1), Example("x", (" a b c d",), 0, 2))
BARE = (Example("x y z", (), None, 1), Example("x y", (), None, 2))
UNDECIDED = (Example("x", (" a", " b"), None, 1),)


def scoring_of(examples: Sequence[Example], metric: str | None = None, *, name: str = "t", model: str | None = "m",
               length_normalised: bool = False) -> Scoring:  # fmt: skip
    task = make_task(name, examples, model=model, metric=metric, length_normalised=length_normalised)
    batches = make_batches(task, task.dev, make_tokenizer(), shares_prompts=True, longest=None)
    return Scoring(task, task.dev, batches)


def problem_with(examples: Sequence[Example], metric: str | None, *, model: str | None = "m") -> str:
    with pytest.raises(TaskError) as caught:
        scoring_of(examples, metric, model=model)
    (problem,) = caught.value.problems
    assert "t.dev.jsonl" in str(caught.value)
    return problem


def log_share(values: Sequence[float], right: int) -> float:
    """The log of the share that the right one has of the probability of all."""
    return math.log(math.exp(values[right]) / sum(math.exp(value) for value in values))


# --- metrics ---------------------------------------------------------------------------------------------------------


def test_choice_log_likelihood_is_normalised_over_the_choices() -> None:
    expected = sum(log_share(values, right) for values, right in zip(LOG_PROBS, (0, 2, 1), strict=True)) / 3
    assert scoring_of(QUESTIONS, "choice_log_likelihood").p(Score(LOG_PROBS)).value == pytest.approx(
        expected, abs=1e-12
    )


def test_probabilities_too_small_for_a_float_are_no_trouble() -> None:
    far = tuple(tuple(value - 5000 for value in values) for values in LOG_PROBS)
    scoring = scoring_of(QUESTIONS)
    assert scoring.p(Score(far)).value == pytest.approx(scoring.p(Score(LOG_PROBS)).value, abs=1e-9)


def test_length_normalised_divides_by_the_tokens_of_each_choice() -> None:
    each = [(-1.0, -1.0, -2.0), (-3.0, -2.5, -2.0), (-2.0, -2.0, -1.0)]
    expected = sum(log_share(values, right) for values, right in zip(each, (0, 2, 1), strict=True)) / 3
    scoring = scoring_of(QUESTIONS, length_normalised=True)
    assert scoring.p(Score(LOG_PROBS)).value == pytest.approx(expected, abs=1e-12)
    # Of equals the first is chosen.
    accuracy = scoring.accuracy(Score(LOG_PROBS))
    assert accuracy is not None
    assert accuracy.value == pytest.approx(2 / 3)


def test_choice_accuracy_is_the_share_of_right_choices_that_are_the_likeliest() -> None:
    scoring = scoring_of(QUESTIONS, "choice_accuracy")
    assert scoring.p(Score(LOG_PROBS)).value == pytest.approx(1 / 3)
    accuracy = scoring.accuracy(Score(LOG_PROBS))
    assert accuracy is not None
    assert accuracy.value == scoring.p(Score(LOG_PROBS)).value


def test_answer_log_likelihood_is_per_token_of_each_answer() -> None:
    scoring = scoring_of(COMPLETIONS, "answer_log_likelihood")
    assert scoring.p(Score(((-3.0,), (-2.0,)))).value == pytest.approx((-3.0 / 2 + -2.0 / 4) / 2)
    scoring = scoring_of(QUESTIONS, "answer_log_likelihood")
    assert scoring.p(Score(LOG_PROBS)).value == pytest.approx((-1.0 / 1 + -6.0 / 3 + -4.0 / 2) / 3)


def test_perplexity_is_per_token_of_all_answers_together() -> None:
    assert scoring_of(COMPLETIONS, "perplexity").p(Score(((-3.0,), (-2.0,)))).value == pytest.approx(-5.0 / 6)
    assert scoring_of(QUESTIONS, "perplexity").p(Score(LOG_PROBS)).value == pytest.approx((-1.0 - 6.0 - 4.0) / 6)


def test_perplexity_of_a_bare_prompt_is_of_all_its_tokens() -> None:
    assert scoring_of(BARE, "perplexity").p(Score(((-3.0,), (-2.0,)))).value == pytest.approx(-5.0 / 5)


@pytest.mark.parametrize("examples", [QUESTIONS, COMPLETIONS, BARE, UNDECIDED])
def test_kl_is_minus_the_mean_distance(examples: Sequence[Example]) -> None:
    scoring = scoring_of(examples, "kl")
    distances = tuple(0.25 * (i + 1) for i in range(len(examples)))
    log_probs = tuple((-1.0,) * max(1, len(example.choices)) for example in examples)
    assert scoring.needs_reference
    assert scoring.p(Score(log_probs, distances)).value == pytest.approx(-sum(distances) / len(distances))


def test_the_default_metric_is_the_one_that_fits_the_data() -> None:
    expected = ["choice_log_likelihood", "answer_log_likelihood", "kl", "kl"]
    kinds = [QUESTIONS, COMPLETIONS, BARE, UNDECIDED]
    assert [default_metric(Split(Path("x"), tuple(kind))) for kind in kinds] == expected
    assert [scoring_of(kind).metric for kind in kinds] == expected
    assert [scoring_of(kind).needs_reference for kind in kinds] == [False, False, True, True]


def test_there_is_an_accuracy_where_there_are_right_choices() -> None:
    for examples in (COMPLETIONS, BARE, UNDECIDED):
        scoring = scoring_of(examples, "kl")
        assert not scoring.has_accuracy
        assert scoring.accuracy(Score(tuple((-1.0, -2.0) for _ in examples), (0.0,) * len(examples))) is None
    for metric in METRICS:
        assert scoring_of(QUESTIONS, metric).has_accuracy


# --- a metric of one's own -------------------------------------------------------------------------------------------

_OWN = """
def worth(example, outcome):
    assert type(outcome).__name__ == "Outcome"
    return outcome.log_probs[example.answer] * 10 + outcome.num_tokens[example.answer]

def whole(example, outcome):
    return 7

seven = 7
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module in the working directory."""
    (tmp_path / "metrics_of_mine.py").write_text(_OWN)
    (tmp_path / "metrics_that_break.py").write_text("def worth(:\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "metrics_of_mine", raising=False)


@pytest.mark.usefixtures("own")
def test_a_function_of_ones_own_is_called_with_example_and_outcome() -> None:
    scoring = scoring_of(QUESTIONS, "metrics_of_mine:worth")
    assert scoring.metric == "metrics_of_mine:worth"
    assert scoring.p(Score(LOG_PROBS)).value == pytest.approx((-10 + 1 - 60 + 3 - 40 + 2) / 3)
    assert scoring_of(BARE, "metrics_of_mine:whole").p(Score(((-1.0,), (-1.0,)))).value == 7.0


def test_an_outcome_has_what_a_model_said(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Example, Outcome]] = []

    def note(example: Example, outcome: Outcome) -> float:
        seen.append((example, outcome))
        return 0.0

    monkeypatch.setattr(sys.modules[__name__], "note", note, raising=False)
    scoring_of(QUESTIONS, f"{__name__}:note").p(Score(LOG_PROBS))
    expected = [Outcome(values, (1, 2, 3), None) for values in LOG_PROBS]
    assert seen == list(zip(QUESTIONS, expected, strict=True))


@pytest.mark.usefixtures("own")
@pytest.mark.parametrize(
    "name",
    ["no_such_module:worth", "metrics_of_mine:no_such", "metrics_of_mine:", ":worth", ".:worth", ".a:worth",
     "metrics_of_mine:seven", "metrics_that_break:worth"],
)  # fmt: skip
def test_a_function_that_is_not_there_is_told(name: str) -> None:
    assert problem_with(QUESTIONS, name).startswith(f"the metric {name} cannot be ")


# --- metrics and data that do not fit --------------------------------------------------------------------------------


def test_a_metric_that_there_is_not_is_told() -> None:
    problem = problem_with(QUESTIONS, "accuracy")
    assert problem == f"'accuracy' is no metric; there are {', '.join(METRICS)}, and module:function"


@pytest.mark.parametrize("metric", ["choice_log_likelihood", "choice_accuracy"])
@pytest.mark.parametrize("examples", [COMPLETIONS, BARE, UNDECIDED])
def test_metrics_of_choices_need_choices_and_an_answer(metric: str, examples: Sequence[Example]) -> None:
    assert problem_with(examples, metric) == f"{metric} needs choices with an answer"


@pytest.mark.parametrize("examples", [BARE, UNDECIDED])
def test_the_likelihood_of_an_answer_needs_one(examples: Sequence[Example]) -> None:
    problem = problem_with(examples, "answer_log_likelihood")
    assert problem == "answer_log_likelihood needs completions, or choices with an answer"


def test_perplexity_needs_to_know_which_choice_is_meant() -> None:
    assert problem_with(UNDECIDED, "perplexity").startswith("perplexity needs ")


@pytest.mark.parametrize("metric", ["kl", None])
def test_kl_needs_a_specialist(metric: str | None) -> None:
    problem = problem_with(BARE, metric, model=None)
    assert problem == "kl compares with the task's specialist: name its model"


# --- how sure --------------------------------------------------------------------------------------------------------


def many(count: int, seed: int) -> tuple[tuple[Example, ...], Score]:
    """Completions of one to four tokens with random log-probabilities."""
    generator = np.random.default_rng(seed)
    examples = tuple(Example("x", (" a" * int(generator.integers(1, 5)),), 0, i + 1) for i in range(count))
    return examples, Score(tuple((float(value),) for value in -generator.gamma(2.0, 3.0, count)))


def test_the_bootstrap_error_is_about_the_standard_error_of_the_mean() -> None:
    examples, score = many(200, seed=1)
    estimate = scoring_of(examples, "answer_log_likelihood").p(score)
    each = np.array([values[0] / len(example.choices[0].split())
                     for values, example in zip(score.log_probs, examples, strict=True)])  # fmt: skip
    assert estimate.value == pytest.approx(each.mean())
    assert estimate.error == pytest.approx(each.std() / math.sqrt(len(each)), rel=0.08)
    low, high = estimate.interval
    assert low < estimate.value < high
    assert high - low == pytest.approx(2 * 1.96 * estimate.error, rel=0.1)
    assert estimate.draws.mean() == pytest.approx(estimate.value, abs=estimate.error / 10)


def test_the_error_of_a_ratio_counts_what_is_below_the_line() -> None:
    examples, score = many(200, seed=2)
    above = np.array([values[0] for values in score.log_probs])
    below = np.array([len(example.choices[0].split()) for example in examples])
    estimate = scoring_of(examples, "perplexity").p(score)
    ratio = above.sum() / below.sum()
    assert estimate.value == pytest.approx(ratio)
    expected = np.std(above - ratio * below) / below.mean() / math.sqrt(len(above))
    assert estimate.error == pytest.approx(expected, rel=0.08)


def test_differences_of_identical_models_are_exactly_zero() -> None:
    examples, score = many(50, seed=3)
    for metric in ("answer_log_likelihood", "perplexity"):
        scoring = scoring_of(examples, metric)
        difference = scoring.p(score) - scoring.p(score)
        assert difference.value == 0.0
        assert difference.error == 0.0
        assert difference.interval == (0.0, 0.0)


def test_what_models_have_in_common_cancels() -> None:
    examples, score = many(80, seed=4)
    generator = np.random.default_rng(5)
    better = Score(tuple((values[0] + 0.1 + 0.01 * float(generator.normal()),) for values in score.log_probs))
    scoring = scoring_of(examples, "answer_log_likelihood")
    difference = scoring.p(better) - scoring.p(score)
    assert difference.value == pytest.approx(scoring.p(better).value - scoring.p(score).value)
    assert difference.error < scoring.p(score).error / 20
    assert difference.interval[0] > 0


def test_a_task_is_resampled_the_same_way_every_time_and_apart_from_others() -> None:
    examples, score = many(60, seed=6)
    first = scoring_of(examples, name="one").p(score)
    again = scoring_of(examples, name="one").p(score)
    other = scoring_of(examples, name="two").p(score)
    assert np.array_equal(first.draws, again.draws)
    assert first.value == other.value
    assert abs(np.corrcoef(first.draws, other.draws)[0, 1]) < 0.1


def test_estimates_add_and_divide_with_their_draws() -> None:
    examples, score = many(30, seed=7)
    one = scoring_of(examples).p(score)
    assert (one + one).value == 2 * one.value
    assert np.array_equal(((one + one) / 2).draws, one.draws)
    assert ((one + one) / 2).error == one.error


def test_a_part_is_scored_as_if_it_were_all() -> None:
    scoring = scoring_of(QUESTIONS, "choice_accuracy")
    score = Score(LOG_PROBS)
    first = np.array([True, False, False])
    assert scoring.p(score, first).value == 1.0
    assert scoring.p(score, ~first).value == 0.0
    part = scoring.accuracy(score, np.array([True, True, False]))
    assert part is not None
    assert part.value == 0.5
    # A draw without any example of the part says nothing.
    assert scoring.p(score, first).error == 0.0
    assert np.isfinite(part.draws).all()


def test_a_part_has_the_error_of_its_size() -> None:
    examples, score = many(200, seed=8)
    scoring = scoring_of(examples, "answer_log_likelihood")
    part = half_of(200, every=2)
    each = np.array([values[0] / len(example.choices[0].split())
                     for values, example in zip(score.log_probs, examples, strict=True)])[part]  # fmt: skip
    assert scoring.p(score, part).value == pytest.approx(each.mean())
    assert scoring.p(score, part).error == pytest.approx(each.std() / math.sqrt(100), rel=0.1)


def test_what_is_held_back_is_spread_evenly() -> None:
    assert half_of(9, every=4).tolist() == [False, False, False, True] * 2 + [False]
    assert half_of(100, every=4).sum() == 25
    assert not half_of(3, every=4).any()


def test_one_example_has_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    estimate: Any = scoring_of(COMPLETIONS[:1]).p(Score(((-3.0,),)))
    assert (estimate.value, estimate.error) == (-1.5, 0.0)
