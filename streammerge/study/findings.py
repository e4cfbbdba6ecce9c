"""What an analysis found: facts for reports, recipes and people. Computes next to nothing."""

from __future__ import annotations

from dataclasses import dataclass, field

from streammerge.plan.analysis import Decisions
from streammerge.study.contribution import Case, Contribution, Threshold, case_of
from streammerge.study.mixture import Family, Mixture
from streammerge.study.scoring import Estimate
from streammerge.study.sweep import SweepFacts
from streammerge.study.workbench import TaskData


@dataclass(frozen=True)
class Given:
    """What the recipe fixes of stage 1; None is searched. One value per model."""

    density: tuple[float, ...] | None
    scale: tuple[float, ...] | None
    weight: tuple[float, ...] | None


@dataclass(frozen=True)
class Surface:
    """The search of one model's density and scale: P on its task, (densities, scales)."""

    model: int
    densities: tuple[float, ...]
    scales: tuple[float, ...]
    scores: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Factor:
    """One common weight that was tried: the mean share of the gains, and P by task."""

    factor: float
    score: float
    p: tuple[float, ...]


@dataclass(frozen=True)
class Step:
    """A merge that was tried on the way: what it is, its mean share of the gains with error, P and accuracy by task.

    `out` says why it is out of the question, if it is.
    """

    label: str
    score: float
    gain: float
    gain_error: float
    p: tuple[float, ...]
    accuracy: tuple[float | None, ...]
    out: str | None = None


@dataclass(frozen=True)
class Row:
    """One model of the final table, on one split: per task P with its interval, and accuracy."""

    name: str
    split: str
    p: tuple[Estimate, ...]
    accuracy: tuple[Estimate | None, ...]


@dataclass
class Findings:
    """Everything an analysis found. Layers are numbers of `groups`."""

    decisions: Decisions
    models: list[str]
    tasks: list[TaskData]
    groups: list[str]
    layers: list[int]
    threshold: Threshold
    start: Mixture
    result: Mixture
    units: list[float]
    gains: list[Estimate]
    equal: list[list[int]]
    surfaces: list[Surface] = field(default_factory=list)
    factors: list[Factor] = field(default_factory=list)
    contributions: dict[tuple[int, int], Contribution] = field(default_factory=dict)
    after: dict[tuple[int, int], Contribution] = field(default_factory=dict)
    candidates: list[Step] = field(default_factory=list)
    prefixes: list[Step] = field(default_factory=list)
    rounds: list[Step] = field(default_factory=list)
    table: list[Row] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    verdict: str = ""
    facts: SweepFacts = field(default_factory=SweepFacts)
    family: Family | None = None

    @property
    def changed(self) -> int:
        """How many layers are treated otherwise than in the first merge."""
        return sum(mine != first for mine, first in zip(self.result.parts, self.start.parts, strict=True))

    def case(self, layer: int) -> Case:
        return case_of([self.contributions[layer, m] for m in range(len(self.models))], self.threshold)

    def conflict(self, layer: int) -> float:
        """Γ of a layer: the sum of its γ over the models."""
        return sum(self.contributions[layer, m].gamma.value for m in range(len(self.models)))

    @property
    def order(self) -> list[int]:
        """Layers by descending Γ."""
        return sorted(self.layers, key=lambda layer: (-self.conflict(layer), layer))

    @property
    def conflicts(self) -> list[int]:
        """Layers with a γ beyond its threshold, by descending Γ."""
        return [layer for layer in self.order if self.case(layer) != "mutual gain"]
