"""RAM: entries that one model changed are taken in full, entries that several changed are averaged.

Model i changed an entry when |x_i − b| > epsilon. With the c models that changed it:

    y = b + Σ (x_i − b) / max(c, 1)

Yuan et al., "Behavior Knowledge Merge in Reinforced Agentic Models" (arXiv 2601.13572).
"""

from __future__ import annotations

from streammerge.kernels.contract import Measuring, Method, Param, Problem, Settings
from streammerge.kernels.overlap import MERGE


def _measure(problem: Problem) -> Measuring:
    return {"epsilon": problem.tensor([problem.settings.number("epsilon")])}
    yield  # a generator that asks nothing


def _check(settings: Settings) -> list[str]:
    epsilon = settings.number("epsilon")
    return [f"epsilon {epsilon:g} is below 0; it is a magnitude"] if epsilon < 0 else []


RAM = Method(
    name="ram",
    doc=__doc__,
    params=(Param("epsilon", "a delta's entry up to this size counts as unchanged", 1e-5),),
    base="required",
    min_models=1,
    max_models=None,
    program=lambda settings: MERGE,
    measure=_measure,
    passes=lambda settings, narrow, elements: 1,
    check=_check,
)
