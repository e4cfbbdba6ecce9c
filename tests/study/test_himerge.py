"""Hi-Merging, proved: its algebra, conflicts that were planted, specialists that hardly clash, and every option.

The beds are in beds.py. Scores are those of real models, but for the made-up ones, on which rules are checked exactly.
"""

from __future__ import annotations

import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

import streammerge
from streammerge.base.errors import RecipeError, Stopped, TaskError
from streammerge.plan.analysis import AnalysisOptions
from streammerge.plan.group import Group
from streammerge.plan.recipe import load_recipe
from streammerge.run.merge import Options, make_plan, schedule_for
from streammerge.run.survey import ask_together
from streammerge.study.findings import Findings, Given
from streammerge.study.himerge import analyze
from streammerge.study.mixture import DROP, HALF, KEEP, Family, Mixture
from streammerge.study.network import Network
from streammerge.study.variants import Shelf
from tests.command import COMMAND
from tests.command import streammerge as run_command
from tests.study.beds import (
    WHOLE,
    Analysed,
    Bed,
    Interrupt,
    MadeUpJudge,
    Witness,
    crossing,
    demo_bed,
    layer_of,
    plant_conflict,
    twin_bed,
)

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own, of which none is about scores


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Bed:
    return demo_bed(tmp_path_factory.mktemp("demo") / "bed")


def asked(bed: Bed, last: int, *, first: int = 0, test: int = 0) -> dict[str, Any]:
    """The demo's two specialists with some of their questions."""
    return {
        name: (bed.questions(name, "dev", first, last), bed.questions(name, "test", 0, test))
        if test
        else bed.questions(name, "dev", first, last)
        for name in ("translate", "sort")
    }


# --- algebra ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("weight", "expected"), [(1.0, "sort"), (0.0, "base")])
def test_one_whole_model_at_weight_one_is_that_model_and_at_zero_the_base(
    demo: Bed, tmp_path: Path, weight: float, expected: str
) -> None:
    recipe = tmp_path / "recipe.yaml"
    parameters = {**WHOLE, "weight": weight}
    content = {
        "merge_method": "hi_merging", "base_model": str(demo.model("base")), "dtype": "bfloat16",
        "models": [{"model": str(demo.model("sort")), "parameters": parameters}],
    }  # fmt: skip
    recipe.write_text(yaml.safe_dump(content))
    assert {tensor.action for tensor in make_plan(recipe, Options()).tensors} == {"copy"}
    streammerge.merge(recipe, tmp_path / "out", compile="off")
    _assert_equal(_read(tmp_path / "out"), demo.weights(expected))


@pytest.mark.parametrize(
    ("name", "densities", "top"),
    [
        ("blocks", (0.7, 0.45), {}),
        ("parts", (1.0, 1.0), {"analysis": {"layer": "parts", "outside": "analysed"}}),
        ("elected", (1.0, 1.0), {"parameters": {"sign_consensus": True, "lambda": 0.9}}),
        ("of the model", (0.7, 0.45), {"parameters": {"density_scope": "model"}}),
        ("of the layer", (1.0, 0.45), {"parameters": {"density_scope": "layer"}}),
    ],
)
def test_the_decided_recipe_writes_the_model_that_was_decided_on(
    demo: Bed, tmp_path: Path, name: str, densities: tuple[float, float], top: dict[str, Any]
) -> None:
    given = zip(densities, (0.9, 1.0), (0.9, 0.7), strict=True)
    each = [{"density": density, "scale": scale, "weight": weight} for density, scale, weight in given]
    analysed = demo.analyze(
        f"written-{name}", asked(demo, 16), each=each, decisions="paper", dtype="bfloat16", work="written", **top
    )
    findings = analysed.findings
    assert findings.result != findings.start, "nothing was decided: the test is void"
    written = load_recipe(analysed.recipe, strict=True)
    assert not written.is_analysed
    assert "tasks" not in yaml.safe_load(analysed.text)
    streammerge.merge(analysed.recipe, tmp_path / "out", compile="off")
    _assert_equal(_read(tmp_path / "out"), _made(findings, analysed.recipe, demo.model("base"), **top))


def test_a_half_is_of_what_the_model_had_at_first_and_a_drop_leaves_the_base(demo: Bed, tmp_path: Path) -> None:
    p, s, w = 0.6, 0.9, 0.8
    parameters = {"density": p, "scale": s, "weight": w}
    analysed = demo.analyze("halves", asked(demo, 24), parameters=parameters, decisions="paper", dtype="float32")
    result, models = analysed.findings.result, ["translate", "sort"]
    treated = [(layer, m) for layer, row in enumerate(result.parts) for m, part in enumerate(row) if part != KEEP]
    assert {result.parts[layer][m] for layer, m in treated} == {DROP, HALF}, "drops and halves are what is tested"
    base = {name: values.float() for name, values in demo.weights("base").items()}
    for m, model in enumerate(models):
        # The decided recipe for this model alone: the other one at weight 0.
        alone = yaml.safe_load(analysed.text)
        alone["models"][1 - m]["parameters"]["weight"] = 0.0
        recipe, out = tmp_path / f"{model}.yaml", tmp_path / model
        recipe.write_text(yaml.safe_dump(alone))
        streammerge.merge(recipe, out, compile="off")
        merged, delta = _read(out), demo.delta(model)
        for layer, group in enumerate(_groups(analysed.findings)):
            part = result.parts[layer][m]
            for name in group:
                if part == DROP:
                    assert torch.equal(merged[name], base[name]), f"{model} is not dropped from {name}"
                    continue
                halves = 2 if part == HALF else 1
                vector = base[name].ndim < 2
                kept = base[name].numel() if vector else max(1, int(p / halves * base[name].numel()))
                assert int((merged[name] != base[name]).sum()) <= kept, f"{model} keeps too much of {name}"
                expected = base[name] + _top(delta[name], kept) * torch.tensor(w * s / halves)
                assert torch.equal(merged[name], expected), f"{name} of {model} is not what the rule says"


def _top(delta: Tensor, kept: int) -> Tensor:
    """The largest entries of a tensor; of equal ones the first."""
    order = delta.abs().flatten().sort(descending=True, stable=True).indices[:kept]
    out = torch.zeros(delta.numel())
    out[order] = delta.flatten()[order]
    return out.view(delta.shape)


def _groups(findings: Findings) -> list[tuple[str, ...]]:
    assert findings.family is not None
    return [group.names for group in findings.family.groups]


def _read(model: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for file in sorted(model.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def _made(findings: Findings, recipe: Path, base: Path, analysis: Mapping[str, Any] | None = None,
          **others: Any) -> dict[str, Tensor]:  # fmt: skip
    """The tensors of the result as sweeps see it: made by a family, never written."""
    shelf = Shelf(lambda program, signature: None)
    options = AnalysisOptions(**(analysis or {}))
    plan = make_plan(recipe, Options())

    def ask(group: Group, question: Any) -> Any:
        return ask_together(plan, group, question, schedule_for(plan, Options()), shelf.find, lambda: False)

    family = Family(
        plan, Network(base, torch.device("cpu")), shelf, split_blocks=options.layer == "parts",
        outside=options.outside == "analysed", ask=ask,
    )  # fmt: skip
    made: dict[str, Tensor] = {}
    with ThreadPoolExecutor(1) as pool:
        for version in family.variant(findings.result).versions:
            shelf.load([version])
            made |= shelf.make(version, pool)
            shelf.forget()
    shelf.close()
    return made


def _assert_equal(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> None:
    assert set(left) == set(right)
    for name, values in left.items():
        assert values.dtype == right[name].dtype
        assert torch.equal(values.view(torch.uint8), right[name].view(torch.uint8)), name


# --- planted conflicts -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Planted:
    """`sort` is damaged in one block by taking `strength` times the delta of `translate` away from it there."""

    bed: Bed
    block: int
    offender: str
    weight: float

    def analyze(self, name: str, first: int, last: int, test: int = 0, **top: Any) -> Analysed:
        own = asked(self.bed, last, first=first, test=test)
        models = {"translate": own["translate"], self.offender: own["sort"]}
        parameters = {**WHOLE, "weight": self.weight}
        return self.bed.analyze(f"{self.offender}-{name}", models, parameters=parameters, dtype="bfloat16", **top)


@pytest.fixture(scope="session", params=[(5, 3.0, 0.7), (2, 5.0, 0.7)], ids=["block 5", "block 2"])
def planted(demo: Bed, request: pytest.FixtureRequest) -> Planted:
    block, strength, weight = request.param
    offender = plant_conflict(
        demo, f"damaged-{block}", offender="sort", victim="translate", block=block, strength=strength
    )
    return Planted(demo, block, offender, weight)


@pytest.fixture(scope="session")
def found(planted: Planted) -> Analysed:
    """The planted conflict, analysed on the first 60 dev questions with the defaults."""
    return planted.analyze("guarded", 0, 60, test=150, work=planted.offender)


def test_a_damaged_block_ranks_first_and_serves_its_victim_less_well(planted: Planted, found: Analysed) -> None:
    findings = found.findings
    layer = layer_of(findings, planted.block)
    assert findings.order[0] == layer
    assert findings.threshold.exceeded(findings.contributions[layer, 0]), "the victim's γ is within the noise"
    assert findings.case(layer) != "mutual gain"


def test_guarded_treats_the_offender_in_the_damaged_block(planted: Planted, found: Analysed) -> None:
    treatment = found.findings.result.parts[layer_of(found.findings, planted.block)][1]
    assert treatment.density * treatment.scale < 1, f"the offender is left as it is: {treatment.label}"


def test_guarded_beats_task_arithmetic_at_the_same_weights(found: Analysed) -> None:
    plain, best = found.row("task arithmetic"), found.row("Hi-Merging")
    assert sum(found.shares(best)) > sum(found.shares(plain))
    # On questions that no decision saw: mean accuracy.
    assert _accuracy(found.row("Hi-Merging", "test")) > _accuracy(found.row("task arithmetic", "test"))


def test_the_recipe_of_what_was_decided_writes_the_model_that_was_scored(found: Analysed, tmp_path: Path) -> None:
    streammerge.merge(found.recipe, tmp_path / "out", compile="off")
    _assert_equal(_read(tmp_path / "out"), _made(found.findings, found.recipe, found.recipe.parent / "models" / "base"))


def test_both_halves_of_the_dev_data_find_the_damaged_block(planted: Planted, found: Analysed) -> None:
    other = planted.analyze("other half", 60, 120, analysis={"errors": 1000.0}, work="other half").findings
    assert other.order[0] == found.findings.order[0] == layer_of(other, planted.block)


def test_paper_goes_through_a_planted_conflict(planted: Planted) -> None:
    """It is not judged: taken literally, its rules hurt these models (test below)."""
    analysed = planted.analyze("paper", 0, 60, decisions="paper", work=planted.offender)
    assert "without looking back" in analysed.findings.verdict
    assert analysed.findings.after


def _accuracy(row: Any) -> float:
    return float(np.mean([accuracy.value for accuracy in row.accuracy]))


# --- the guard -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("first", "last"), [(0, 30), (40, 70), (130, 160)])
def test_guarded_makes_nothing_worse_on_the_dev_data_where_paper_does(demo: Bed, first: int, last: int) -> None:
    rows = {}
    for mode in ("guarded", "paper"):
        # A low threshold: the guard must hold whatever the analysis takes for a conflict.
        analysed = demo.analyze(
            f"{mode}-{first}", asked(demo, last, first=first), parameters={**WHOLE, "weight": 0.8}, dtype="bfloat16",
            decisions=mode, analysis={"errors": 0.5}, work=f"guard-{first}",
        )  # fmt: skip
        assert analysed.findings.conflicts
        rows[mode] = (analysed.first_merge, analysed.row("Hi-Merging"), analysed)
    start, end, analysed = rows["guarded"]
    assert sum(analysed.shares(end)) >= sum(analysed.shares(start))
    for task in range(2):
        assert end.p[task].value >= start.p[task].value
        assert end.accuracy[task].value >= start.accuracy[task].value  # type: ignore[union-attr]
    start, end, analysed = rows["paper"]
    assert sum(analysed.shares(end)) < sum(analysed.shares(start)), "the literal rules do not hurt: the test is weaker"


def test_without_a_conflict_stage_one_is_kept_and_the_verdict_says_so(demo: Bed) -> None:
    for mode in ("guarded", "paper"):
        analysed = demo.analyze(
            f"quiet-{mode}", asked(demo, 24), parameters={**WHOLE, "weight": 0.8}, dtype="bfloat16", decisions=mode,
            analysis={"errors": 1000.0}, work="quiet",
        )  # fmt: skip
        findings = analysed.findings
        assert findings.result == findings.start
        assert "no conflict found" in findings.verdict
        assert "no conflict found" in analysed.text
        assert [entry["parameters"] for entry in yaml.safe_load(analysed.text)["models"]] == [
            {"weight": 0.8, "density": 1.0, "scale": 1.0}
        ] * 2


# --- no conflict at all ----------------------------------------------------------------------------------------------

_SEEDS = 20


@pytest.fixture(scope="session")
def twins(tmp_path_factory: pytest.TempPathFactory) -> list[Bed]:
    folder = tmp_path_factory.mktemp("twins")
    return [twin_bed(folder / str(seed), seed) for seed in range(_SEEDS)]


def twin_analysis(bed: Bed, name: str, right: str = "right", weight: float = 0.8, **analysis: Any) -> Analysed:
    models = {"left": bed.questions("left"), right: bed.questions("right")}
    return bed.analyze(name, models, parameters={**WHOLE, "weight": weight}, threads=1, analysis=analysis)


def test_specialists_of_disjoint_tasks_show_no_conflict_in_nineteen_of_twenty_seeds(twins: list[Bed]) -> None:
    alarms, standardised = [], []
    for seed, bed in enumerate(twins):
        analysed = twin_analysis(bed, "null")
        findings = analysed.findings
        for m, specialist in enumerate(("left", "right")):
            # The deltas are no zeros: each specialist knows its task, of which the base knows nothing.
            assert analysed.row(specialist).accuracy[m].value >= 0.9  # type: ignore[union-attr]
            assert analysed.row("base").accuracy[m].value <= 0.5  # type: ignore[union-attr]
        left, right = (torch.cat([values.flatten() for values in bed.delta(m).values()]) for m in ("left", "right"))
        assert abs(torch.nn.functional.cosine_similarity(left, right, dim=0).item()) < 0.1
        gammas = [contribution.gamma for contribution in findings.contributions.values()]
        standardised += [gamma.value / gamma.error for gamma in gammas]
        if findings.conflicts:
            alarms.append(seed)
        else:
            assert "no conflict found" in findings.verdict
    assert len(alarms) <= 1, f"false alarms in seeds {alarms}"
    # And not because the errors are too wide: they are as large as γ spreads.
    assert 0.7 < np.std(standardised) < 1.5


def test_the_full_specialist_as_before_takes_dilution_for_conflict(twins: list[Bed]) -> None:
    """Why the specialist at the strength it has in the merge is the default: nothing clashes here."""
    for bed in twins[:3]:
        assert not twin_analysis(bed, "half", weight=0.5).findings.conflicts
        diluted = twin_analysis(bed, "diluted", weight=0.5, before="full").findings
        assert all(diluted.case(layer) == "severe" for layer in diluted.layers)


@pytest.mark.parametrize("block", [0, 1])
def test_a_conflict_planted_between_such_specialists_is_found_where_it_is(twins: list[Bed], block: int) -> None:
    for bed in twins[:3]:
        damaged = plant_conflict(bed, f"damaged-{block}", offender="right", victim="left", block=block, strength=0.5)
        findings = twin_analysis(bed, f"planted-{block}", right=damaged).findings
        beyond = {key for key, one in findings.contributions.items() if findings.threshold.exceeded(one)}
        assert beyond == {(layer_of(findings, block), 0)}


def test_equal_specialists_change_nothing(demo: Bed) -> None:
    demo.copy("twin", "translate")
    questions = demo.questions("translate", "dev", 0, 24)
    analysed = demo.analyze(
        "equal", {"translate": questions, "twin": questions}, parameters={**WHOLE, "weight": 0.6}, dtype="bfloat16",
        analysis={"errors": 0.0}, work="equal",
    )  # fmt: skip
    findings = analysed.findings
    assert findings.equal == [[0, 1]]
    assert all(contribution.gamma.value == 0.0 for contribution in findings.contributions.values())
    assert findings.result == findings.start
    assert "equal" in findings.verdict
    assert "equal" in analysed.text


def test_one_model_alone_cannot_conflict(demo: Bed) -> None:
    questions = demo.questions("sort", "dev", 0, 24)
    analysed = demo.analyze(
        "alone", {"sort": questions}, parameters={**WHOLE, "weight": 0.7}, dtype="bfloat16", analysis={"errors": 0.0}
    )
    findings = analysed.findings
    assert all(contribution.gamma.value == 0.0 for contribution in findings.contributions.values())
    assert findings.result == findings.start
    assert "no conflict found" in findings.verdict


# --- the rules, on made-up models ------------------------------------------------------------------------------------


def made_up(effects: Sequence[Sequence[Sequence[float]]], mode: str = "paper", *, weight: float = 1.0,
            **options: Any) -> tuple[Findings, MadeUpJudge]:  # fmt: skip
    """An analysis of models whose score on a task is a sum over layers and models: effects[layer][model][task]."""
    models = len(effects[0])
    judge = MadeUpJudge(models, len(effects), crossing(effects))
    ones = (1.0,) * models
    given = Given(ones, ones, tuple(weight * one for one in ones))
    # Raw units, so that γ is what the formula says.
    chosen = AnalysisOptions(**({"units": "raw"} | options))
    return analyze(judge, given, chosen, mode, lambda text: None), judge  # type: ignore[arg-type]


# Layer by layer, for two models: what each does to both tasks.
_SEVERE = [[1.0, -0.4], [-0.3, 2.0]]
_PARTIAL = [[1.0, 0.2], [-0.3, 2.0]]
_MUTUAL = [[1.0, 0.2], [0.3, 2.0]]


def test_contributions_are_of_deletion_and_addition() -> None:
    findings, _ = made_up([_SEVERE, _MUTUAL], weight=0.5)
    one = findings.contributions[0, 1]
    assert (one.alpha_before.value, one.beta_before.value) == pytest.approx((2.0, 2.0))
    assert (one.alpha_after.value, one.beta_after.value) == pytest.approx((0.5 * 1.6, 0.5 * 1.6))


def test_gamma_is_what_the_others_take_when_the_specialist_stands_at_its_strength_in_the_merge() -> None:
    findings, _ = made_up([_SEVERE, _PARTIAL, _MUTUAL], "guarded", weight=0.5)
    gammas = [findings.contributions[layer, m].gamma.value for layer in range(3) for m in range(2)]
    assert gammas == pytest.approx([0.3, 0.4, 0.3, -0.2, -0.3, -0.2])
    assert [findings.case(layer) for layer in range(3)] == ["severe", "partial", "mutual gain"]
    assert findings.order == [0, 1, 2]
    assert findings.conflict(0) == pytest.approx(0.7)


def test_paper_keeps_the_larger_contribution_halves_the_conflicting_model_and_leaves_mutual_gain_alone() -> None:
    findings, _ = made_up([_SEVERE, _PARTIAL, _MUTUAL])
    assert findings.result.parts == ((DROP, KEEP), (HALF, KEEP), (KEEP, KEEP))


def test_treated_other_halves_the_model_without_the_conflict() -> None:
    findings, _ = made_up([_PARTIAL], treated="other")
    assert findings.result.parts == ((KEEP, HALF),)


def test_survivors_reweighted_stand_at_weight_one() -> None:
    findings, _ = made_up([_SEVERE], weight=0.8, before="weighted", survivors="reweighted")
    ((dropped, survivor),) = findings.result.parts
    assert dropped == DROP
    assert survivor.scale * 0.8 == pytest.approx(1.0)


def test_contributions_of_tasks_with_different_units_are_compared_as_shares_of_their_gains() -> None:
    # Model 1 has the larger numbers, and the smaller share of its gain in layer 0.
    effects = [[[1.0, -3.0], [-0.3, 20.0]], [[0.0, 0.0], [0.0, 180.0]]]
    assert made_up(effects, units="gain")[0].result.parts[0] == (KEEP, DROP)
    assert made_up(effects, units="raw")[0].result.parts[0] == (DROP, KEEP)


def test_three_models_that_all_conflict_lose_the_smallest_contribution_and_are_analysed_again() -> None:
    # Task by task, what model 0, 1 and 2 do. Model 2 contributes least and goes first everywhere.
    stays = [[3.0, 0.1, -1.0], [0.1, 2.0, -1.0], [-1.0, -1.0, 1.0]]
    one_left = [[3.0, -0.2, -1.0], [-0.2, 2.0, -1.0], [-1.0, -1.0, 1.0]]
    halved = [[3.0, 0.2, -1.0], [-0.2, 2.0, -1.0], [-1.0, -1.0, 1.0]]
    findings, judge = made_up([stays, one_left, halved])
    assert [findings.case(layer) for layer in range(3)] == ["severe"] * 3
    assert findings.result.parts == ((KEEP, KEEP, DROP), (KEEP, DROP, DROP), (HALF, KEEP, DROP))
    # Each layer was asked again for itself, the others as they were at first.
    for layer in range(3):
        assert (findings.start.with_part(layer, 2, DROP), 0) in judge.asked


def test_of_three_models_each_that_conflicts_is_halved() -> None:
    layer = [[3.0, 0.1, -0.5], [-0.5, 2.0, -0.5], [0.1, 0.1, 1.0]]
    findings, _ = made_up([layer])
    assert findings.result.parts == ((HALF, KEEP, HALF),)


def test_a_fixed_threshold_decides_what_counts() -> None:
    assert made_up([_SEVERE], threshold=0.7)[0].result.parts == ((KEEP, HALF),)
    assert "no conflict found" in made_up([_SEVERE], threshold=0.9)[0].verdict


def test_guarded_takes_no_step_that_costs_a_task_anything() -> None:
    # Without model 1 the mean would rise, and task 1 would fall; with less of it, too.
    effects = [[[1.0, 0.0], [-5.0, 1.0]]]
    findings, _ = made_up(effects, "guarded")
    assert findings.conflicts == [0]
    for task, score in enumerate(crossing(effects)(findings.result, task) for task in range(2)):
        assert score >= crossing(effects)(findings.start, task)
    assert findings.result.parts[0][1].scale >= 1


def test_guarded_drops_what_only_hurts() -> None:
    findings, _ = made_up([[[1.0, 0.0], [-0.5, 0.0]], [[1.0, 0.0], [0.0, 1.0]]], "guarded")
    assert findings.result.parts[0][1] == DROP


def test_guarded_may_be_told_to_try_layers_with_a_conflict_only() -> None:
    effects = [_MUTUAL, _SEVERE, _MUTUAL]
    tried = {
        candidates: {
            step.label.partition(":")[0] for step in made_up(effects, "guarded", candidates=candidates)[0].candidates
        }
        for candidates in ("all", "conflicts")
    }
    assert tried == {"all": {"layer 0", "layer 1", "layer 2"}, "conflicts": {"layer 1"}}


def test_searched_compounds_its_rounds_or_begins_from_stage_one_each_time() -> None:
    # More of either model is always better, and 1.3 is the most that a round may give.
    effects = [[[1.0, 0.0], [0.0, 1.0]]]
    original, _ = made_up(effects, "searched", rounds=3)
    compound, _ = made_up(effects, "searched", rounds=3, half="compound")
    assert {part.scale for part in original.result.parts[0]} == {1.3}
    # In a round one action for a layer: three rounds are shared by two models.
    assert sum(np.log([part.scale for part in compound.result.parts[0]])) == pytest.approx(3 * np.log(1.3))
    assert [step.label for step in original.rounds][:2] == ["stage 1, searched over", "stage 1, held back"]
    assert "held back" in original.verdict


def test_searched_lets_no_task_fall() -> None:
    effects = [[[1.0, 0.0], [-5.0, 1.0]]]
    findings, _ = made_up(effects, "searched")
    scores = [[crossing(effects)(mixture, task) for task in range(2)] for mixture in (findings.start, findings.result)]
    assert all(after >= before for before, after in zip(*scores, strict=True))


def test_searched_warns_where_the_held_back_quarter_disagrees() -> None:
    # Model 1 hurts, but for one example in four.
    def formula(mixture: Mixture, task: int) -> Any:
        strength = mixture.weight[1] * mixture.scale[1] * mixture.parts[0][1].scale
        return np.tile([-1.0, -1.0, -1.0, 1.0], 2) * strength

    findings = analyze(
        MadeUpJudge(2, 1, formula), Given((1.0, 1.0), (1.0, 1.0), (1.0, 1.0)), AnalysisOptions(units="raw"),
        "searched", lambda text: None,
    )  # fmt: skip
    assert findings.result.parts == ((KEEP, DROP),)
    seen, unseen = findings.rounds[-2:]
    assert (seen.gain, unseen.gain) == (1.0, -1.0)
    assert any("over-fits" in warning for warning in findings.warnings)


# --- every option, on three models -----------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def trio(demo: Bed) -> Bed:
    """The demo's specialists and a third: half of `translate`, and noise. It answers other questions of that task."""
    generator = torch.Generator().manual_seed(1)
    delta = {
        name: 0.6 * values + 0.3 * values.std(unbiased=False) * torch.randn(values.shape, generator=generator)
        for name, values in demo.delta("translate").items()
    }
    demo.add("third", delta)
    return demo


def three(bed: Bed, name: str, mode: str = "paper", *, weight: float | None = 0.7, scale: float = 1.0,
          top: Mapping[str, Any] | None = None, **analysis: Any) -> Analysed:  # fmt: skip
    models = asked(bed, 20) | {"third": bed.questions("translate", "dev", 100, 120)}
    parameters = {"density": 1.0, "scale": scale} | ({} if weight is None else {"weight": weight})
    given = dict(top or {})
    parameters |= given.pop("parameters", {})
    return bed.analyze(
        f"trio-{name}", models, parameters=parameters, decisions=mode, analysis=analysis, dtype="bfloat16",
        work="trio", **given,
    )  # fmt: skip


def test_weights_paper_is_one_over_the_models_and_sum_is_one(trio: Bed) -> None:
    assert three(trio, "paper weights", weight=None, weights="paper", errors=1e3).findings.start.weight == (1 / 3,) * 3
    assert three(trio, "sum", weight=None, weights="sum", errors=1e3).findings.start.weight == (1.0,) * 3


def test_before_full_and_raw_are_other_specialists_than_the_weighted_one(trio: Bed) -> None:
    found = {
        (before, weight): three(
            trio, f"{before}-{weight}", weight=weight, scale=0.8, before=before, errors=1e3
        ).findings
        for before, weight in [("weighted", 0.7), ("full", 0.7), ("raw", 0.7), ("weighted", 1.0), ("full", 1.0)]
    }
    gammas = {key: [one.gamma.value for one in findings.contributions.values()] for key, findings in found.items()}
    afters = {key: [one.after.value for one in findings.contributions.values()] for key, findings in found.items()}
    # At weight 1 the weighted specialist is the full one; below they differ, and so does the delta as it was.
    assert gammas["weighted", 1.0] == gammas["full", 1.0]
    assert len({tuple(gammas[before, 0.7]) for before in ("weighted", "full", "raw")}) == 3
    assert afters["weighted", 0.7] == afters["full", 0.7] == afters["raw", 0.7]


def test_units_raw_are_those_of_the_metric(trio: Bed) -> None:
    shares, raw = three(trio, "gain").findings, three(trio, "raw", units="raw").findings
    assert raw.units == [1.0] * 3
    assert shares.units == [gain.value for gain in shares.gains]
    for (layer, m), one in shares.contributions.items():
        assert raw.contributions[layer, m].gamma.value == pytest.approx(one.gamma.value * shares.units[m])


def test_treated_other_and_conflicting_treat_different_models_of_a_layer(trio: Bed) -> None:
    mine, others = (three(trio, treated, treated=treated).findings for treated in ("conflicting", "other"))
    partial = [layer for layer in mine.layers if mine.case(layer) == "partial"]
    assert partial
    for layer in partial:
        over = [mine.threshold.exceeded(mine.contributions[layer, m]) for m in range(3)]
        assert [part == HALF for part in mine.result.parts[layer]] == over
        assert [part == HALF for part in others.result.parts[layer]] == [not one for one in over]


def test_a_layer_that_everyone_suffers_in_keeps_one_model_and_reweighted_it_stands_alone(trio: Bed) -> None:
    # Below every γ: each layer is severe until one model is left.
    findings = three(trio, "severe", threshold=-1e6, survivors="reweighted").findings
    for layer in findings.layers:
        assert findings.case(layer) == "severe"
        row = findings.result.parts[layer]
        least = min(range(3), key=lambda m: findings.contributions[layer, m].before.value)
        assert row[least] == DROP
        assert sorted(part.scale for part in row) == pytest.approx([0.0, 0.0, 1 / 0.7])


def test_layers_may_be_the_attention_and_the_rest_of_a_block(trio: Bed) -> None:
    findings = three(trio, "parts", layer="parts").findings
    blocks = [f"model.layers.{block}" for block in range(6)]
    expected = [f"{block} {part}" for block in blocks for part in ("attention", "rest")]
    assert sorted(findings.groups[layer] for layer in findings.layers) == expected
    for group, names in zip(findings.groups, _groups(findings), strict=True):
        assert all(("self_attn" in name) == group.endswith("attention") for name in names)


def test_what_lies_outside_the_blocks_may_be_analysed_as_well(trio: Bed) -> None:
    findings = three(trio, "outside", outside="analysed").findings
    labels = {
        findings.groups[layer]: names for layer, names in enumerate(_groups(findings)) if layer in findings.layers
    }
    # The head is the embedding: it is counted once, in front.
    assert labels["front"] == ("model.embed_tokens.weight",)
    assert labels["back"] == ("model.norm.weight",)
    kept = three(trio, "kept").findings
    assert len(kept.layers) == len(findings.layers) - 2
    assert all(part == KEEP for part in kept.result.parts[-1])


def test_candidates_conflicts_tries_the_layers_with_a_conflict(trio: Bed) -> None:
    findings = three(trio, "candidates", "guarded", candidates="conflicts", errors=1.5).findings
    assert 0 < len(findings.conflicts) < len(findings.layers)
    tried = {step.label.partition(":")[0] for step in findings.candidates}
    assert tried == {findings.groups[layer] for layer in findings.conflicts}


def test_sign_consensus_counts_in_every_score_and_stays_in_the_recipe(trio: Bed) -> None:
    elected = three(trio, "elected", top={"parameters": {"sign_consensus": True}})
    summed = three(trio, "summed")
    assert yaml.safe_load(elected.text)["parameters"] == {"sign_consensus": True}
    assert "parameters" not in yaml.safe_load(summed.text)
    for row in ("translate", "base"):
        assert elected.row(row).p[0].value == pytest.approx(summed.row(row).p[0].value)
    assert elected.row("task arithmetic").p[0].value != summed.row("task arithmetic").p[0].value


def test_density_scale_and_weight_are_searched_where_the_recipe_gives_none(demo: Bed) -> None:
    grid: dict[str, Any] = {"densities": [0.2, 0.6, 1.0], "scales": [0.4, 1.0], "factors": [0.3, 0.6, 0.9, 1.2]}
    findings = demo.analyze("searched", asked(demo, 20), analysis={**grid, "errors": 1000.0}, dtype="bfloat16").findings
    for m, surface in enumerate(findings.surfaces):
        assert surface.model == m
        scores = {
            (p, s): surface.scores[i][j] for i, p in enumerate(grid["densities"]) for j, s in enumerate(grid["scales"])
        }
        assert len(set(scores.values())) > 1
        assert scores[findings.start.density[m], findings.start.scale[m]] == max(scores.values())
    assert [factor.factor for factor in findings.factors] == grid["factors"]
    best = max(findings.factors, key=lambda factor: factor.score)
    assert findings.start.weight == (best.factor,) * 2


def test_searched_goes_through_real_models_and_shows_what_was_held_back(demo: Bed) -> None:
    analysed = demo.analyze(
        "rounds", asked(demo, 16), parameters={**WHOLE, "weight": 0.8}, decisions="searched", dtype="bfloat16",
        analysis={"rounds": 1}, work="searched",
    )  # fmt: skip
    findings = analysed.findings
    assert [step.label for step in findings.rounds] == [
        "stage 1, searched over", "stage 1, held back", "round 1, searched over", "round 1, held back",
    ]  # fmt: skip
    assert findings.rounds[2].gain >= 0
    assert findings.rounds[2].out is None


# --- stopped and killed ----------------------------------------------------------------------------------------------


@dataclass
class Terminator(Witness):
    """Sends this process SIGTERM when a stage begins."""

    at: str = ""

    def stage(self, text: str) -> None:
        super().stage(text)
        if self.at in text:
            signal.raise_signal(signal.SIGTERM)


@pytest.fixture(scope="session")
def unbroken(demo: Bed) -> tuple[Path, str, int]:
    """A recipe, what an analysis of it that nobody disturbs decides on, and how many scores that takes."""
    recipe = demo.recipe(
        "resumed", asked(demo, 30), parameters={**WHOLE, "weight": 0.8}, decisions="paper", dtype="bfloat16"
    )
    analysed = demo.run(recipe, work="unbroken")
    return recipe, analysed.text, analysed.findings.facts.jobs


def test_an_analysis_that_an_error_ends_goes_on_where_it_was(demo: Bed, unbroken: tuple[Path, str, int]) -> None:
    recipe, text, jobs = unbroken
    with pytest.raises(Interrupt):
        demo.run(recipe, witness=Witness("contribution analysis"), work="broken")
    again = demo.run(recipe, work="broken")
    assert again.text == text
    assert 0 < again.findings.facts.jobs < jobs


def test_an_analysis_stopped_by_a_signal_says_so_and_goes_on(demo: Bed, unbroken: tuple[Path, str, int]) -> None:
    recipe, text, jobs = unbroken
    assert threading.current_thread() is threading.main_thread(), "signals go to the main thread"
    with pytest.raises(Stopped) as stopped:
        demo.run(recipe, witness=Terminator(at="contribution analysis of the result"), work="stopped")
    assert stopped.value.exit_code == 75
    again = demo.run(recipe, work="stopped")
    assert again.text == text
    assert 0 < again.findings.facts.jobs < jobs
    assert demo.run(recipe, work="stopped").findings.facts.jobs == 0


def test_a_killed_command_leaves_its_scores_to_the_next(demo: Bed, unbroken: tuple[Path, str, int]) -> None:
    recipe, text, jobs = unbroken
    out, work = demo.folder / "resumed.decided.yaml", demo.folder / "resumed.decided.yaml.analysis"
    out.unlink(missing_ok=True)
    arguments = ["analyze", str(recipe), "-o", str(out), "--device", "cpu", "--compile", "off", "--quiet"]
    with subprocess.Popen([*COMMAND, *arguments]) as process:
        scores = work / "scores.jsonl"
        deadline = time.monotonic() + 60
        while not (scores.exists() and scores.stat().st_size):
            assert process.poll() is None, "it ended before there was a score to see"
            assert time.monotonic() < deadline
            time.sleep(0.005)
        process.kill()
    assert not out.exists()
    again = demo.run(recipe, work=work.name)
    assert again.text == text
    assert 0 < again.findings.facts.jobs < jobs


# --- proxy -----------------------------------------------------------------------------------------------------------


def test_the_proxy_weighs_masses_of_opposite_sign(demo: Bed) -> None:
    recipe = demo.folder / "proxy.yaml"
    content = {
        "merge_method": "hi_merging", "base_model": str(demo.model("base")),
        "models": [{"model": str(demo.model(name))} for name in ("translate", "sort")],
        "proxy": "weights", "analysis": {"share": 0.34}, "dtype": "bfloat16",
    }  # fmt: skip
    recipe.write_text(yaml.safe_dump(content))
    findings, decided = demo.weigh(recipe)
    left, right = demo.delta("translate"), demo.delta("sort")
    expected = []
    for block in range(6):
        names = [name for name in left if f"layers.{block}." in name]
        a, b = (torch.cat([delta[name].flatten().double() for name in names]) for delta in (left, right))
        opposed = (torch.minimum(a.abs(), b.abs()) * (a * b < 0)).sum()
        expected.append(float(opposed / (a.abs().sum() + b.abs().sum())))
    assert [clash.share for clash in findings.clashes] == pytest.approx(expected, rel=1e-6)
    # A third of six layers: the two worst, halved for both models.
    worst = sorted(range(6), key=lambda block: -expected[block])[:2]
    assert {findings.clashes[layer].label for layer in findings.treated} == {f"model.layers.{block}" for block in worst}
    text = decided.read_text()
    assert "proxy" in text
    assert "proxy" in findings.verdict
    assert not load_recipe(decided, strict=True).is_analysed
    for entry in yaml.safe_load(text)["models"]:
        for setting in ("density", "scale"):
            values = entry["parameters"][setting]
            assert {value["filter"] for value in values[:-1]} == {f"model.layers.{block}." for block in worst}
            assert [value["value"] for value in values] == [0.5, 0.5, 1.0]


# --- mistakes --------------------------------------------------------------------------------------------------------


def _of_an_unknown_model(bed: Bed) -> dict[str, Any]:
    other = {"name": "other", "model": str(bed.model("nobody")), "dev": "mistaken.sort.dev.jsonl"}
    return {"tasks": [other]}


_MISTAKES: dict[str, tuple[Callable[[Bed], dict[str, Any]], str]] = {
    "a task of no model": (_of_an_unknown_model, "is no model of the recipe"),
    "a gradient": (lambda bed: {"parameters": {"density": [0.2, 0.8]}}, "no gradients or filters"),
    "a filter": (
        lambda bed: {"parameters": {"weight": [{"filter": "mlp", "value": 0.5}, {"value": 1.0}]}},
        "no gradients or filters",
    ),
    "another method": (lambda bed: {"merge_method": "task_arithmetic"}, "only hi_merging is analysed"),
    "no tasks": (lambda bed: {"tasks": None}, "an analysis needs tasks"),
    "a missing file": (
        lambda bed: {"tasks": [{"name": "sort", "model": str(bed.model("sort")), "dev": "nothing.jsonl"}]},
        "cannot be read",
    ),
}


@pytest.mark.parametrize("mistake", _MISTAKES)
def test_what_is_wrong_is_said_before_anything_runs(demo: Bed, mistake: str) -> None:
    change, sentence = _MISTAKES[mistake]
    recipe = demo.recipe("mistaken", {"sort": demo.questions("sort", "dev", 0, 4)}, parameters={"weight": 1.0})
    content = {**yaml.safe_load(recipe.read_text()), **change(demo)}
    recipe.write_text(yaml.safe_dump({key: value for key, value in content.items() if value is not None}))
    witness = Witness()
    with pytest.raises(RecipeError, match=sentence) as raised:
        demo.run(recipe, witness=witness, work="mistaken")
    assert raised.value.exit_code == 2
    assert not witness.stages
    assert not (demo.folder / "mistaken").exists()


def test_a_parameter_given_for_some_models_only_is_refused(demo: Bed) -> None:
    each = [{"weight": 0.5}]
    recipe = demo.recipe("partly", asked(demo, 4), each=each)
    with pytest.raises(RecipeError, match="weight is given for some models only"):
        demo.run(recipe, work="mistaken")


def test_the_command_ends_with_code_two(demo: Bed) -> None:
    recipe = demo.recipe("code", {"sort": demo.questions("sort", "dev", 0, 4)}, parameters={"density": [0.2, 0.8]})
    done = run_command("analyze", recipe, "-o", demo.folder / "code.decided.yaml")
    assert done.code == 2
    assert "no gradients or filters" in done.err
    assert not (demo.folder / "code.decided.yaml").exists()


def test_rows_that_dev_and_test_share_are_a_loud_note(demo: Bed) -> None:
    dev = demo.questions("sort", "dev", 0, 12)
    models = {"sort": (dev, [*demo.questions("sort", "test", 0, 4), *dev[:3]])}
    analysed = demo.analyze("shared", models, parameters={**WHOLE, "weight": 1.0}, dtype="bfloat16")
    (note,) = [note for note in analysed.witness.notes if "dev rows" in note]
    assert note.startswith("WARNING")
    assert "task sort: 3 of 7 test rows are dev rows as well" in note


def test_a_specialist_that_gains_nothing_is_measured_in_raw_units_with_a_warning(demo: Bed) -> None:
    # Each specialist is asked the other's questions.
    models = {"translate": demo.questions("sort", "dev", 0, 24), "sort": demo.questions("translate", "dev", 0, 24)}
    analysed = demo.analyze("swapped", models, parameters={**WHOLE, "weight": 0.8}, dtype="bfloat16")
    findings = analysed.findings
    nothing = [m for m, gain in enumerate(findings.gains) if gain.value <= gain.error]
    assert nothing
    for m, unit in enumerate(findings.units):
        assert unit == (1.0 if m in nothing else findings.gains[m].value)
    assert len(findings.warnings) == len(nothing)
    for m in nothing:
        name = ("translate", "sort")[m]
        assert any(
            f"task {name}: its specialist gains" in note and "WARNING" in note for note in analysed.witness.notes
        )


# --- metrics ---------------------------------------------------------------------------------------------------------


def answers(questions: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Free answers: the right choice as a completion."""
    return [{"prompt": one["prompt"], "completion": one["choices"][one["answer"]]} for one in questions]


def texts(questions: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Bare prompts: question and answer, with nothing that says which is which."""
    return [{"prompt": one["prompt"] + one["completion"]} for one in answers(questions)]


def measured(bed: Bed, name: str, make: Callable[[Any], Any], metric: str | None) -> Analysed:
    models = {model: make(questions) for model, questions in asked(bed, 12).items()}
    return bed.analyze(
        f"metric-{name}", models, parameters={**WHOLE, "weight": 0.8}, dtype="bfloat16", work="metrics",
        analysis={"candidates": "conflicts", "errors": 1.0}, entry={"metric": metric} if metric else None,
    )  # fmt: skip


_METRICS: list[tuple[str, Callable[[Any], Any], str | None]] = [
    ("answers", answers, None),
    ("perplexity", answers, "perplexity"),
    ("own, of answers", answers, "tests.study.beds:sure_of_right"),
    ("own, of choices", list, "tests.study.beds:sure_of_right"),
    ("accuracy", list, "choice_accuracy"),
    ("kl", texts, None),
]


@pytest.fixture(scope="session")
def by_metric(demo: Bed) -> dict[str, Analysed]:
    return {name: measured(demo, name, make, metric) for name, make, metric in _METRICS}


@pytest.mark.parametrize("name", [name for name, _, _ in _METRICS])
def test_an_analysis_runs_by_any_metric(by_metric: dict[str, Analysed], name: str) -> None:
    analysed = by_metric[name]
    findings = analysed.findings
    expected = {"answers": "answer_log_likelihood", "kl": "kl", "perplexity": "perplexity",
                "accuracy": "choice_accuracy"}.get(name, "tests.study.beds:sure_of_right")  # fmt: skip
    assert [task.scoring.metric for task in findings.tasks] == [expected] * 2
    for m, specialist in enumerate(("translate", "sort")):
        mine, base = analysed.row(specialist), analysed.row("base")
        assert mine.p[m].value > base.p[m].value
        assert (mine.accuracy[m] is None) == ("choices" not in name and name != "accuracy")
    assert all(np.isfinite(one.gamma.value) for one in findings.contributions.values())
    start, end = analysed.first_merge, analysed.row("Hi-Merging")
    assert all(after.value >= before.value for before, after in zip(start.p, end.p, strict=True))


def test_kl_is_from_the_specialist_and_needs_no_answers(by_metric: dict[str, Analysed]) -> None:
    for m, specialist in enumerate(("translate", "sort")):
        assert by_metric["kl"].row(specialist).p[m].value == 0.0
        assert by_metric["kl"].row("base").p[m].value < 0.0


def test_answers_of_equal_length_have_one_log_likelihood_per_token(by_metric: dict[str, Analysed]) -> None:
    # Every answer of `translate` has five words, each a token.
    mean, whole = (by_metric[name].row("base").p[0].value for name in ("answers", "perplexity"))
    assert mean == pytest.approx(whole)


def test_a_metric_of_ones_own_gets_log_probabilities_of_choices(by_metric: dict[str, Analysed]) -> None:
    own, accuracy = by_metric["own, of choices"], by_metric["accuracy"]
    for row in ("base", "translate", "sort", "Hi-Merging"):
        assert all(0 <= p.value <= 1 for p in own.row(row).p)
    # A choice that is right with more than half of the probability is the likeliest.
    for task in range(2):
        assert accuracy.row("sort").p[task].value == accuracy.row("sort").accuracy[task].value  # type: ignore[union-attr]


def test_a_metric_that_does_not_fit_is_refused(demo: Bed) -> None:
    with pytest.raises(TaskError, match="needs choices with an answer"):
        measured(demo, "wrong", answers, "choice_accuracy")
    with pytest.raises(TaskError, match="cannot be imported"):
        measured(demo, "missing", list, "tests.study.beds:nobody")
