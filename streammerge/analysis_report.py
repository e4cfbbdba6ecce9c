"""An analysis as JSON and as text: facts in, nothing computed but shares and intervals of what was found."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from streammerge import __version__
from streammerge.storage.sink import write_file
from streammerge.study.analysis import ProxyFindings
from streammerge.study.contribution import Contribution
from streammerge.study.evaluation import Evaluation
from streammerge.study.findings import Findings, Row
from streammerge.study.scoring import Estimate
from streammerge.study.sweep import SweepFacts

Table = list[list[str]]


def analysis_json(findings: Findings) -> dict[str, Any]:
    """Everything that was found. γ, c and τ are in units of each task's gain (or raw, where `unit` is 1)."""
    start = findings.start
    return {
        "streammerge": __version__,
        "kind": "analysis",
        "verdict": findings.verdict,
        "decisions_mode": findings.decisions,
        "warnings": findings.warnings,
        "models": findings.models,
        "equal_models": [[findings.models[m] for m in group] for group in findings.equal if len(group) > 1],
        "tasks": [
            {
                "name": data.task.name,
                "model": data.task.model,
                "metric": data.scoring.metric,
                "dev_examples": len(data.split.examples),
                "gain": _estimate(gain),
                "unit": unit,
            }
            for data, gain, unit in zip(findings.tasks, findings.gains, findings.units, strict=True)
        ],
        "threshold": {"errors": findings.threshold.errors, "fixed": findings.threshold.fixed},
        "stage1": {"density": start.density, "scale": start.scale, "weight": start.weight},
        "surfaces": [
            {"model": findings.models[one.model], "densities": one.densities, "scales": one.scales, "p": one.scores}
            for one in findings.surfaces
        ],
        "factors": [asdict(factor) for factor in findings.factors],
        "layers": [_layer_json(findings, layer) for layer in findings.layers],
        "candidates": [asdict(step) for step in findings.candidates],
        "prefixes": [asdict(step) for step in findings.prefixes],
        "rounds": [asdict(step) for step in findings.rounds],
        "changed": findings.changed,
        "table": [_row_json(row, findings) for row in findings.table],
        "cost": asdict(findings.facts),
    }


def analysis_tables(findings: Findings) -> dict[str, Table]:
    """The conflict table and the scores, each a list of rows with a heading."""
    return {"conflicts": _conflict_table(findings), "scores": score_table(findings.table, _task_names(findings))}


def cost_text(facts: SweepFacts) -> str:
    """What the sweeps of this run cost, and what scoring every model for itself would have cost."""
    if facts.jobs == 0:
        return "nothing: every score was known from an earlier run"
    passes = f"{facts.waves} pass{'es'[: 2 * (facts.waves > 1)]} over the weights"
    return (
        f"{facts.jobs:,} scores of unwritten models in {passes}, {facts.seconds:.0f} s; "
        f"{facts.unit_loads:,} block loads ({facts.plain_loads:,} one by one), "
        f"{facts.block_forwards:,} block forwards ({facts.plain_forwards:,} one by one)"
    )


def write_report(facts: dict[str, Any], folder: Path) -> list[Path]:
    """Write analysis.json, report.html and, with matplotlib, pictures to `folder`; returns the files for people."""
    from streammerge.analysis_page import analysis_page, write_pngs

    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / "analysis.json", (json.dumps(facts, indent=1) + "\n").encode())
    page = folder / "report.html"
    write_file(page, analysis_page(facts).encode())
    return [page, folder / "analysis.json", *write_pngs(facts, folder)]


def proxy_json(findings: ProxyFindings) -> dict[str, Any]:
    """What the proxy found."""
    return {
        "streammerge": __version__,
        "kind": "proxy",
        "verdict": findings.verdict,
        "models": findings.models,
        "layers": [
            {"name": clash.label, "conflict_mass": clash.share, "treated": clash.layer in findings.treated}
            for clash in findings.clashes
        ],
    }


def proxy_table(findings: ProxyFindings) -> Table:
    """Layers and their sign-conflict mass."""
    rows = [["layer", "sign-conflict mass (proxy)", "decision"]]
    for clash in findings.clashes:
        rows.append([clash.label, f"{clash.share:.4f}", "half" if clash.layer in findings.treated else "keep"])
    return rows


def evaluation_json(evaluation: Evaluation) -> dict[str, Any]:
    """Scores of recipes."""
    return {
        "streammerge": __version__,
        "kind": "evaluation",
        "split": evaluation.split,
        "tasks": [{"name": name, "metric": metric} for name, metric in evaluation.tasks],
        "table": [_scores_json(row, [name for name, _ in evaluation.tasks]) for row in evaluation.rows],
        "cost": asdict(evaluation.facts),
    }


def score_table(rows: Sequence[Row], tasks: Sequence[str]) -> Table:
    """A row per model and split: per task P and accuracy ± half their 95 % intervals, and the mean accuracy."""
    with_accuracy = [i for i in range(len(tasks)) if any(row.accuracy[i] is not None for row in rows)]
    heading = ["model", "split"]
    for i, task in enumerate(tasks):
        heading += [f"{task} P", *([f"{task} accuracy"] if i in with_accuracy else [])]
    table = [[*heading, *(["mean accuracy"] if len(with_accuracy) > 1 else [])]]
    for row in rows:
        cells = [Path(row.name).name or row.name, row.split]
        for i in range(len(tasks)):
            cells.append(_with_interval(row.p[i]))
            accuracy = row.accuracy[i]
            if i in with_accuracy:
                cells.append("" if accuracy is None else _with_interval(accuracy))
        if len(with_accuracy) > 1:
            found = [one.value for one in row.accuracy if one is not None]
            cells.append(f"{sum(found) / len(found):.3f}" if found else "")
        table.append(cells)
    return table


def _conflict_table(findings: Findings) -> Table:
    """Layers by descending Γ: case, γ of every model with its threshold, and what is done."""
    table = [["layer", "Γ", "case", *(f"γ {Path(model).name} ± τ" for model in findings.models), "decision"]]
    for layer in findings.order:
        gammas = []
        for m in range(len(findings.models)):
            contribution = findings.contributions[layer, m]
            tau = findings.threshold.of(contribution)
            mark = " *" if findings.threshold.exceeded(contribution) else ""
            gammas.append(f"{contribution.gamma.value:+.3f} ± {tau:.3f}{mark}")
        table.append([findings.groups[layer], f"{findings.conflict(layer):+.3f}", findings.case(layer), *gammas,
                      _decision(findings, layer)])  # fmt: skip
    return table


def _decision(findings: Findings, layer: int) -> str:
    row = findings.result.parts[layer]
    changed = [
        f"{treatment.label} {Path(model).name}"
        for model, treatment in zip(findings.models, row, strict=True)
        if treatment.label != "keep"
    ]
    return ", ".join(changed) or "keep"


def _layer_json(findings: Findings, layer: int) -> dict[str, Any]:
    return {
        "name": findings.groups[layer],
        "case": findings.case(layer),
        "conflict": findings.conflict(layer),
        "models": [
            {
                "model": model,
                **_contribution_json(findings.contributions[layer, m]),
                "tau": findings.threshold.of(findings.contributions[layer, m]),
                "beyond": findings.threshold.exceeded(findings.contributions[layer, m]),
                "decision": treatment.label,
                "density": findings.result.density[m] * treatment.density,
                "scale": findings.result.scale[m] * treatment.scale,
                "in_result": _contribution_json(findings.after[layer, m]) if findings.after else None,
            }
            for m, (model, treatment) in enumerate(zip(findings.models, findings.result.parts[layer], strict=True))
        ],
    }


def _contribution_json(one: Contribution) -> dict[str, Any]:
    return {
        "alpha_before": _estimate(one.alpha_before),
        "alpha_after": _estimate(one.alpha_after),
        "beta_before": _estimate(one.beta_before),
        "beta_after": _estimate(one.beta_after),
        "c_before": _estimate(one.before),
        "c_after": _estimate(one.after),
        "gamma": _estimate(one.gamma),
    }


def _row_json(row: Row, findings: Findings) -> dict[str, Any]:
    return _scores_json(row, _task_names(findings))


def _scores_json(row: Row, tasks: Sequence[str]) -> dict[str, Any]:
    return {
        "name": row.name,
        "split": row.split,
        "tasks": {
            task: {"p": _estimate(p), "accuracy": None if accuracy is None else _estimate(accuracy)}
            for task, p, accuracy in zip(tasks, row.p, row.accuracy, strict=True)
        },
    }


def _task_names(findings: Findings) -> list[str]:
    return [data.task.name for data in findings.tasks]


def _estimate(estimate: Estimate) -> dict[str, float]:
    low, high = estimate.interval
    return {"value": estimate.value, "error": estimate.error, "low": low, "high": high}


def _with_interval(estimate: Estimate) -> str:
    low, high = estimate.interval
    return f"{estimate.value:.3f} ± {(high - low) / 2:.3f}"
