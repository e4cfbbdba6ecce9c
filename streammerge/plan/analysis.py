"""What a recipe says about the analysis that comes before a merge: the keys `decisions`, `proxy` and `analysis`.

Each option is one reading of what the Hi-Merging paper leaves open; docs/hi-merging.md explains them. The mode `paper`
changes the defaults of some to the paper's own readings.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

Decisions = Literal["guarded", "paper", "searched"]


class AnalysisOptions(BaseModel):
    """The map under `analysis:`. None stands for the default of the mode."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    # The weights of the first merge, where the recipe gives none: a common factor searched on the dev data, 1/models,
    # or 1.
    weights: Literal["searched", "paper", "sum"] | None = None
    # The specialist before merging: at the strength it has in the merge, in full, or with its delta as it was.
    before: Literal["weighted", "full", "raw"] | None = None
    # A conflict is beyond so many standard errors, or beyond a fixed threshold, in units of c.
    errors: float | None = Field(default=None, ge=0)
    threshold: float | None = None
    # Units of contributions: shares of the task's own gain, or of the metric.
    units: Literal["gain", "raw"] = "gain"
    # A half of the stage-1 density and scale, or in `searched` of what earlier rounds left.
    half: Literal["original", "compound"] = "original"
    # In a partial conflict: the model with the conflict is halved, or the others are.
    treated: Literal["conflicting", "other"] = "conflicting"
    # After a drop: the other models keep their weights, or take over the dropped one's.
    survivors: Literal["kept", "reweighted"] = "kept"
    # What a layer is: a block, or its attention and the rest of it apart.
    layer: Literal["block", "parts"] = "block"
    # What lies outside the blocks: kept as stage 1 has it, or analysed like layers.
    outside: Literal["kept", "analysed"] = "kept"
    # The layers whose actions are tried in `guarded`: all, or those with a conflict.
    candidates: Literal["all", "conflicts"] = "all"
    # The search grids.
    densities: tuple[float, ...] = tuple(i / 10 for i in range(1, 11))
    scales: tuple[float, ...] = tuple(i / 10 for i in range(1, 11))
    factors: tuple[float, ...] = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.3, 1.5)
    # Rounds of `searched`.
    rounds: int = Field(default=3, ge=1, le=20)
    # The share of the layers that `proxy: weights` halves.
    share: float = Field(default=0.25, gt=0, le=1)
