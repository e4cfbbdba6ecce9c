"""Contribution analysis: what each layer gives to each task, before merging and after (section numbers: the paper's).

    α = P(M) − P(M without layer l)          what deleting the layer's deltas takes
    β = P(base + layer l alone) − P(base)    what adding them alone gives
    c = α + β,   γ = c before − c after      positive: merging made the layer serve the task less well

`before` is the specialist, `after` the merge. With units of gain, c and γ are shares of what the specialist gains over
the base: tasks of different metrics then add up.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from streammerge.study.scoring import Estimate

Case = Literal["severe", "partial", "mutual gain"]


@dataclass(frozen=True)
class Contribution:
    """One layer for one model's task. α and β are in the metric's units; `unit` makes c and γ of them."""

    layer: int
    model: int
    alpha_before: Estimate
    alpha_after: Estimate
    beta_before: Estimate
    beta_after: Estimate
    unit: float

    @property
    def before(self) -> Estimate:
        return (self.alpha_before + self.beta_before) / self.unit

    @property
    def after(self) -> Estimate:
        return (self.alpha_after + self.beta_after) / self.unit

    @property
    def gamma(self) -> Estimate:
        return self.before - self.after


@dataclass(frozen=True)
class Threshold:
    """When γ counts: beyond so many of its own standard errors, or beyond a fixed number."""

    errors: float
    fixed: float | None

    def of(self, contribution: Contribution) -> float:
        """τ for one γ."""
        return self.errors * contribution.gamma.error if self.fixed is None else self.fixed

    def exceeded(self, contribution: Contribution) -> bool:
        return contribution.gamma.value > self.of(contribution)


def case_of(contributions: list[Contribution], threshold: Threshold) -> Case:
    """The case of one layer, from the contributions of all models that are in it."""
    count = sum(threshold.exceeded(contribution) for contribution in contributions)
    return "mutual gain" if count == 0 else "severe" if count == len(contributions) else "partial"
