"""RAM+: RAM that strengthens a model's own changes by how much of its work it shares with others.

Model i changed an entry when |x_i − b| > epsilon. Over the whole tensor, ρ_i is the number of its changes that others
share by the number that are its own:

    y = b + λ_i (x_i − b)   where model i alone changed the entry, λ_i = 1 + r · ρ_i, ρ_i within [0, alpha]
    y = b + the mean of the changes   where several did

Yuan et al., "Behavior Knowledge Merge in Reinforced Agentic Models" (arXiv 2601.13572), tensor by tensor. As in
mergekit the number of own changes is counted as epsilon at least, which matters only for an epsilon above 1.
"""

from __future__ import annotations

from streammerge.kernels.blocksum import total
from streammerge.kernels.contract import Look, Measuring, Method, Param, Problem, Settings
from streammerge.kernels.overlap import COUNT, MERGE_SCALED


def _measure(problem: Problem) -> Measuring:
    settings, models = problem.settings, problem.models
    epsilon, alpha = settings.number("epsilon"), settings.number("alpha")
    arguments = {"epsilon": problem.tensor([epsilon])}
    answer = yield Look(COUNT, arguments)
    counts = total(answer.double())
    factors = []
    for shared, own in zip(counts[:models], counts[models:], strict=True):
        # Without changes of its own there is nothing to strengthen.
        ratio = shared / max(own, epsilon) if own else 0.0
        factors.append(1 + settings.number("r") * min(ratio, alpha))
    return arguments | {"factor": problem.tensor(factors)}


def _check(settings: Settings) -> list[str]:
    negative = [(name, settings.number(name)) for name in ("epsilon", "alpha") if settings.number(name) < 0]
    return [f"{name} {value:g} is below 0" for name, value in negative]


RAMPLUS_TL = Method(
    name="ramplus_tl",
    doc=__doc__,
    params=(
        Param("r", "how much sharing strengthens a model's own changes", 0.1),
        Param("alpha", "the most that the ratio of shared to own changes counts", 0.2),
        Param("epsilon", "a delta's entry up to this size counts as unchanged", 1e-5),
    ),
    base="required",
    min_models=1,
    max_models=None,
    program=lambda settings: MERGE_SCALED,
    measure=_measure,
    passes=lambda settings, narrow, elements: 2,
    looks=lambda settings, narrow, elements: (COUNT,),
    check=_check,
)
