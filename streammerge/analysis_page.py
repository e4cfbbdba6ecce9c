"""An analysis as one HTML page that needs no other file, and as pictures. Facts in, words and shapes out.

The facts are the documents of analysis_report.py, as they are after a trip through JSON. Nothing is worked out here but
where things lie and what a row's accuracies are in the mean; every word of a document is escaped.

    analysis_page    header, then one function per section, in the order of SECTIONS; a section with nothing to say
                     is left out
    write_pngs       the heat maps with matplotlib, if it is installed
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from html import escape
from importlib.util import find_spec
from pathlib import Path, PurePath
from typing import Any, TypeVar

from streammerge import svg
from streammerge.base.units import format_seconds, format_size
from streammerge.storage.sink import write_file

Facts = Mapping[str, Any]
_T = TypeVar("_T")

# What fits side by side on 900 pixels, and on paper.
_TASKS_PER_TABLE = 3
_MODELS_PER_TABLE = 3
# Steps that are shown before the rest is folded away.
_STEPS_SHOWN = 24
# From here on an overview comes before the table of layers.
_MANY_LAYERS, _MANY_MODELS = 32, 3
_ANNOTATED_LAYERS = 64

_MODES = {
    "guarded": "single changes were tried on the dev data; what leaves any task worse off there was not kept",
    "paper": "the rules of the paper were followed without looking back at the data",
    "searched": "a grid of changes was searched, layer after layer, as long as the dev data said that it helps",
}
_CASES = {"severe": "every γ beyond τ", "partial": "some γ beyond τ", "mutual gain": "no γ beyond τ"}
_LEGEND = {
    "α": "What a layer is worth in company: how far P falls when the changes that fine-tuning made in the layer are "
    "deleted from the model.",
    "β": "What it is worth alone: how far P rises above the base when only this layer's changes are added to it.",
    "before → after": "The same in the specialist and in the merge, each for the task of that model. In the drawing a "
    "hollow and a full dot, on a square-root scale; the thin line is zero.",
    "γ": "What merging took from the layer: α + β before, less α + β after, as a share of what the specialist gains "
    "over the base.{units} Orange: the layer serves the task less well in the merge. Blue: better. In brackets the "
    "95 % interval; under it, if anything was changed, γ in the result.",
    "τ": 'How large γ must be to count: {tau}. <span class="mark">▲</span> and a frame mark what is beyond.',
    "Γ": "The sum of γ over the models. Under a layer's name its case; {cases}.",
}
_PROXY = (
    "This is a proxy. It looks at the weights alone: how much of the layers' deltas has opposite signs in different "
    "models. No data confirmed that these layers conflict, nor that treating them helps."
)


def analysis_page(facts: Facts) -> str:
    """The whole page, for a document of kind `analysis` or `proxy`."""
    if facts.get("kind") == "proxy":
        sections = [("layers", "Layers", _proxy_layers(facts))]
        title, header = "Layers by their weights alone", _proxy_header(facts)
    else:
        made = [(anchor, heading, make(facts)) for anchor, heading, make in SECTIONS]
        sections = [section for section in made if section[2]]
        names = ", ".join(task["name"] for task in facts.get("tasks", []))
        title, header = f"Hi-Merging: {names}" if names else "Hi-Merging", _header(facts)
    links = "".join(f'<a href="#{anchor}">{heading}</a>' for anchor, heading, _ in sections)
    body = "".join(
        f'<section id="{anchor}"><h2>{heading}</h2>{content}</section>' for anchor, heading, content in sections
    )
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_style()}</style>\n</head>\n<body>\n"
        f"<header><h1>{escape(title)}</h1>{header}<nav>{links}</nav></header>\n<main>{body}</main>\n"
        f"<footer>StreamMerge {_text(facts.get('streammerge', ''))}</footer>\n</body>\n</html>\n"
    )


def _style() -> str:
    return Path(__file__).with_suffix(".css").read_text(encoding="utf-8")


# --- header ----------------------------------------------------------------------------------------------------------


def _header(facts: Facts) -> str:
    mode = facts.get("decisions_mode", "")
    about = f": {_MODES[mode]}" if mode in _MODES else ""
    models = facts.get("models", [])
    equal = [
        f"The files of {_listed(group)} are equal: they count as one model." for group in facts.get("equal_models", [])
    ]
    notes = "".join(f'<p class="warning">{one}</p>' for one in [*map(_text, facts.get("warnings", [])), *equal])
    return (
        f'<p class="verdict">{_text(facts.get("verdict", ""))}</p>'
        f"<p>Mode <b>{_text(mode)}</b>{about}.</p>{notes}{_models_table(facts) if models else ''}"
    )


def _models_table(facts: Facts) -> str:
    """Who is merged, what each is there for, and what stage 1 makes of it."""
    tasks = {task["model"]: task for task in facts.get("tasks", [])}
    start = facts.get("stage1") or {}
    rows = []
    for m, model in enumerate(facts["models"]):
        task = tasks.get(model)
        about = [_text(task["name"]), _breakable(task["metric"]), f"{task['dev_examples']:,}"] if task else ["–"] * 3
        gain = f"{_number(task['gain']['value'])} {_interval(task['gain'])}" if task else "–"
        raw = " <small>raw units</small>" if task and task.get("unit") == 1.0 else ""
        chosen = [_plain(start[key][m]) if key in start else "–" for key in ("density", "scale", "weight")]
        cells = "".join(f"<td>{cell}</td>" for cell in about[:2])
        numbers = "".join(f'<td class="n">{cell}</td>' for cell in (about[2], gain + raw, *chosen))
        rows.append(f"<tr>{_name_cell(model, model)}{cells}{numbers}</tr>")
    head = (
        '<tr><th rowspan="2">model</th><th rowspan="2">task</th><th rowspan="2">metric P</th>'
        '<th rowspan="2" class="n">dev<br>examples</th><th rowspan="2" class="n">gain in P<br>over the base</th>'
        '<th colspan="3" class="group">stage 1</th></tr>'
        '<tr><th class="n">density&nbsp;p</th><th class="n">scale&nbsp;s</th><th class="n">weight</th></tr>'
    )
    return _table(head, rows, "models")


def _proxy_header(facts: Facts) -> str:
    return (
        f'<p class="verdict">{_text(facts.get("verdict", ""))}</p><p class="warning">{_PROXY}</p>'
        f"<p>Models: {_listed(facts.get('models', []))}.</p>"
    )


def _proxy_layers(facts: Facts) -> str:
    layers = facts.get("layers", [])
    most = max((layer["conflict_mass"] for layer in layers), default=0.0)
    rows = []
    for layer in layers:
        share = layer["conflict_mass"]
        bar = f'<span class="bar" style="width:{100 * share / most if most > 0 else 0:.1f}%"></span>'
        decision = '<b class="done">half</b>' if layer["treated"] else '<span class="quiet">keep</span>'
        rows.append(
            f'<tr>{_name_cell(layer["name"], layer["name"])}<td class="n">{_number(share, 4)}</td>'
            f'<td class="bars">{bar}</td><td>{decision}</td></tr>'
        )
    head = '<tr><th>layer</th><th class="n">conflict mass</th><th></th><th>decision</th></tr>'
    return (
        "<p>Conflict mass: the share of the deltas of a layer that cancels between models of opposite sign. "
        f"A proxy, without data.</p>{_table(head, rows)}"
    )


# --- scores ----------------------------------------------------------------------------------------------------------


def _scores(facts: Facts) -> str:
    """The test split first, and apart from it the dev data."""
    rows = facts.get("table", [])
    if not rows:
        return ""
    by_split = {split: [row for row in rows if row["split"] == split] for split in ("test", "dev")}
    test = (
        "<p>No decision has seen this split.</p>" + _score_tables(by_split["test"], facts)
        if by_split["test"]
        else "<p>No test split was given: how good the result is on data that no decision saw is not known.</p>"
    )
    dev = "<p>Every decision was made on these examples, so that they flatter what was chosen.</p>"
    return (
        "<p>P is the metric of a task, larger is better. Beside each value its 95 % interval, and both as a line.</p>"
        f'<div class="split test"><h3>Test split</h3>{test}</div>'
        f'<div class="split dev"><h3>Dev data</h3>{dev}{_score_tables(by_split["dev"], facts)}</div>'
    )


def _score_tables(rows: Sequence[Facts], facts: Facts) -> str:
    tasks = [name for row in rows[:1] for name in row["tasks"]]
    with_accuracy = [task for task in tasks if any(row["tasks"][task]["accuracy"] for row in rows)]
    short = _short_names(facts.get("models", []))
    tables = []
    for part in _parts(tasks, _TASKS_PER_TABLE):
        mean = len(with_accuracy) > 1 and part[0] == tasks[0]
        top = "".join(f'<th class="group" colspan="{1 + (task in with_accuracy)}">{_text(task)}</th>' for task in part)
        below = "".join(f"<th>P</th>{'<th>accuracy</th>' if task in with_accuracy else ''}" for task in part)
        last = '<th rowspan="2" class="n">mean<br>accuracy</th>' if mean else ""
        head = f'<tr><th rowspan="2">model</th>{top}{last}</tr><tr>{below}</tr>'
        lines = []
        for row in rows:
            cells = []
            for task in part:
                found = row["tasks"][task]
                cells.append(_score_cell(found["p"], _reach([one["tasks"][task]["p"] for one in rows]), "P"))
                if task in with_accuracy:
                    cells.append(_score_cell(found["accuracy"], (0.0, 1.0), "accuracy"))
            if mean:
                cells.append(f'<td class="n">{_number(_mean_accuracy(row))}</td>')
            kind = ' class="result"' if row["name"] == "Hi-Merging" else ""
            whole: str = row["name"]
            name = _name_cell(short.get(whole, whole), whole)
            lines.append(f"<tr{kind}>{name}{''.join(cells)}</tr>")
        tables.append(_table(head, lines, "scores" if len(tasks) > 2 else "wide scores"))
    return "".join(tables)


def _score_cell(estimate: Facts | None, span: svg.Range, what: str) -> str:
    if estimate is None:
        return '<td class="quiet">–</td>'
    value, low, high = estimate["value"], estimate["low"], estimate["high"]
    label = f"{what} {_number(value)}, 95 % interval {_interval(estimate)}"
    return (
        f'<td class="score"><b>{_number(value)}</b> <small>{_interval(estimate)}</small>'
        f"{svg.whisker(value, low, high, span, label)}</td>"
    )


def _mean_accuracy(row: Facts) -> float | None:
    found = [one["accuracy"]["value"] for one in row["tasks"].values() if one["accuracy"] is not None]
    return sum(found) / len(found) if found else None


# --- layers ----------------------------------------------------------------------------------------------------------


def _layers(facts: Facts) -> str:
    """γ as a heat map, with α and β beside it."""
    layers = facts.get("layers", [])
    if not layers:
        return ""
    models = facts["models"]
    limit = _gamma_limit(layers)
    key = svg.colour_key(limit, "Colours of γ", ("merging helped", "merging hurt"), _signed)
    overview = _overview(layers, models, limit) if len(layers) > _MANY_LAYERS or len(models) > _MANY_MODELS else ""
    spans = [_contribution_span(layers, m) for m in range(len(models))]
    tables = []
    for part in _parts(range(len(models)), _MODELS_PER_TABLE):
        of = f" of {len(models)}" if len(models) > len(part) else ""
        heading = f"<h3>Models {part[0] + 1} to {part[-1] + 1}{of}</h3>" if of else ""
        tables.append(heading + _layer_table(layers, models, part, spans, limit))
    return (
        f'<div class="{"beside" if len(tables) == 1 else "below"}"><div>{key}{overview}{"".join(tables)}</div>'
        f"<aside><h3>How to read this</h3>{_legend(facts)}</aside></div>"
    )


def _layer_table(layers: Sequence[Facts], models: Sequence[str], part: Sequence[int],
                 spans: Sequence[svg.Range], limit: float) -> str:  # fmt: skip
    short = _short_names(models)
    top = "".join(
        f'<th class="group" colspan="2" title="{_text(models[m])}">{_text(short[models[m]])}</th>' for m in part
    )
    later = any(one.get("in_result") for layer in layers for one in layer["models"])
    gamma = f"<th>γ{'<small>→ in the result</small>' if later else ''}</th>"
    below = f"{gamma}<th>α, β: before → after</th>" * len(part)
    head = f'<tr><th rowspan="2">layer</th>{top}<th rowspan="2" class="n">Γ</th></tr><tr>{below}</tr>'
    rows = []
    for layer in layers:
        cells = "".join(_gamma_cell(layer["models"][m], limit) + _contribution_cell(layer["models"][m], spans[m])
                        for m in part)  # fmt: skip
        name = _name_cell(layer["name"], layer["name"], f"<small>{_text(layer['case'])}</small>")
        rows.append(f'<tr>{name}{cells}<td class="n">{_signed(layer["conflict"])}</td></tr>')
    return _table(head, rows, "heat")


def _gamma_cell(one: Facts, limit: float) -> str:
    gamma = one["gamma"]
    mark = ' <span class="mark" title="beyond τ">▲</span>' if one["beyond"] else ""
    later = ""
    if one.get("in_result"):
        after = one["in_result"]["gamma"]
        hint = f"γ in the result {_signed(after['value'])} {_interval(after)}"
        colour = svg.diverging(after["value"], limit)
        later = f'<span class="later" style="background:{colour}" title="{hint}">→ {_signed(after["value"])}</span>'
    return (
        f'<td class="gamma{" beyond" if one["beyond"] else ""}" style="background:'
        f'{svg.diverging(gamma["value"], limit)}" title="τ {_number(one["tau"])}">'
        f"<b>{_signed(gamma['value'])}</b>{mark}<small>{_interval(gamma)}</small>{later}</td>"
    )


def _contribution_cell(one: Facts, span: svg.Range) -> str:
    lines, pairs = [], []
    for sign, key in (("α", "alpha"), ("β", "beta")):
        before, after = one[f"{key}_before"]["value"], one[f"{key}_after"]["value"]
        pairs.append((before, after))
        lines.append(f"{sign} {_number(before)} → {_number(after)}")
    label = "; ".join(lines)
    if one.get("in_result"):
        result = one["in_result"]
        label += f"; in the result α {_number(result['alpha_after']['value'])}"
        label += f", β {_number(result['beta_after']['value'])}"
    return f'<td class="ab"><span>{"<br>".join(lines)}</span>{svg.dumbbell(pairs, span, label)}</td>'


def _overview(layers: Sequence[Facts], models: Sequence[str], limit: float) -> str:
    """γ of all models at one glance: a strip for each, a cell for each layer."""
    rows = []
    short = _short_names(models)
    for m, model in enumerate(models):
        cells = [layer["models"][m] for layer in layers]
        titles = [
            f"{layer['name']}: γ {_signed(one['gamma']['value'])}{', beyond τ' if one['beyond'] else ''}"
            for layer, one in zip(layers, cells, strict=True)
        ]
        colours = [svg.diverging(one["gamma"]["value"], limit) for one in cells]
        drawn = svg.strip(colours, [one["beyond"] for one in cells], titles, f"γ of {model} by layer")
        rows.append(f"<tr>{_name_cell(short[model], model)}<td>{drawn}</td></tr>")
    ends = f"From {_text(layers[0]['name'])} on the left to {_text(layers[-1]['name'])} on the right"
    return f"<h3>All layers at a glance</h3><p>{ends}; a dark foot marks γ beyond τ.</p>{_table('', rows, 'overview')}"


def _legend(facts: Facts) -> str:
    threshold = facts.get("threshold") or {}
    fixed = threshold.get("fixed")
    tau = (
        f"{_plain(fixed)}, fixed" if fixed is not None
        else f"{_plain(threshold.get('errors', 3.0))} standard errors of that γ"
    )  # fmt: skip
    raw = [task["name"] for task in facts.get("tasks", []) if task.get("unit") == 1.0]
    units = f" Raw, not a share, for {_listed(raw)}." if raw else ""
    cases = "; ".join(f"<b>{name}</b>: {what}" for name, what in _CASES.items())
    entries = [(sign, words.format(tau=tau, units=units, cases=cases)) for sign, words in _LEGEND.items()]
    return f"<dl>{''.join(f'<div><dt>{sign}</dt><dd>{words}</dd></div>' for sign, words in entries)}</dl>"


def _gamma_limit(layers: Sequence[Facts]) -> float:
    gammas = [one["gamma"]["value"] for layer in layers for one in layer["models"]]
    gammas += [
        one["in_result"]["gamma"]["value"] for layer in layers for one in layer["models"] if one.get("in_result")
    ]
    return max((abs(value) for value in gammas if math.isfinite(value)), default=0.0)


def _contribution_span(layers: Sequence[Facts], model: int) -> svg.Range:
    keys = ("alpha_before", "alpha_after", "beta_before", "beta_after")
    values = [layer["models"][model][key]["value"] for layer in layers for key in keys]
    found = [0.0, *(value for value in values if math.isfinite(value))]
    return min(found), max(found)


# --- decisions -------------------------------------------------------------------------------------------------------


def _decisions(facts: Facts) -> str:
    """What becomes of every layer of every model."""
    layers = facts.get("layers", [])
    if not layers:
        return ""
    models = facts["models"]
    short = _short_names(models)
    names = "".join(f'<th title="{_text(model)}">{_text(short[model])}</th>' for model in models)
    rows = []
    for layer in layers:
        cells = []
        for one in layer["models"]:
            numbers = f"<small>p {_plain(one['density'])}, s {_plain(one['scale'])}</small>"
            kind = "quiet" if one["decision"] == "keep" else "done"
            cells.append(f'<td class="{kind}"><b>{_text(one["decision"])}</b>{numbers}</td>')
        case = layer["case"]
        small = f'<small title="{_CASES.get(case, "")}">{_text(case)}</small>'
        rows.append(f"<tr>{_name_cell(layer['name'], layer['name'], small)}{''.join(cells)}</tr>")
    changed = facts.get("changed")
    counted = f"{changed:,} of {len(layers):,} layers changed. " if changed is not None else ""
    about = "Under each layer its case, under each decision the density p and the scale s that are used there."
    return f"<p>{counted}{about}</p>" + _table(f"<tr><th>layer</th>{names}</tr>", rows, "decisions")


# --- what was tried --------------------------------------------------------------------------------------------------


def _tried(facts: Facts) -> str:
    """Nested steps, single changes and rounds, whichever the mode has."""
    parts = []
    if facts.get("prefixes"):
        chosen = _chosen_step(facts)
        marked = " The marked line is the result." if chosen is not None else ""
        table = _step_table(facts["prefixes"], facts, chosen=chosen)
        parts.append(
            f"<h3>Nested steps</h3><p>Each line has the changes of all lines above it, too.{marked}</p>{table}"
        )
    if facts.get("candidates"):
        ordered = sorted(facts["candidates"], key=lambda step: -step["gain"])
        parts.append(
            "<h3>Single changes</h3><p>Each tried alone, the most useful first. A change that is out alone may be part "
            f"of a step in which another one makes up for it.</p>{_folded(ordered, facts)}"
        )
    if facts.get("rounds"):
        parts.append(f"<h3>Rounds</h3><p>The search saw one part of the dev data only.</p>{_rounds(facts)}")
    about = (
        "<p>On the dev data. Gain: what the mean share of the tasks' gains rises by, ± one standard error. Under each "
        "task P, and below it the accuracy if there is one.</p>"
    )
    return f'{about}<div class="charts">{"".join(f"<div>{part}</div>" for part in parts)}</div>' if parts else ""


def _folded(steps: Sequence[Facts], facts: Facts) -> str:
    """The first steps, and the rest behind a line to click on."""
    scale = _gain_span(steps)
    shown = _step_table(steps[:_STEPS_SHOWN], facts, scale=scale)
    rest = steps[_STEPS_SHOWN:]
    if not rest:
        return shown
    return f"{shown}<details><summary>{len(rest):,} more</summary>{_step_table(rest, facts, scale=scale)}</details>"


def _rounds(facts: Facts) -> str:
    """The part searched over and the part held back, side by side."""
    parts: dict[str, list[Facts]] = {}
    for step in facts["rounds"]:
        name, _, part = step["label"].rpartition(", ")
        parts.setdefault(part, []).append({**step, "label": name or step["label"]})
    scale = _gain_span(facts["rounds"])
    tables = [
        f"<div><h4>{_text(part)}</h4>{_step_table(steps, facts, scale=scale)}</div>" for part, steps in parts.items()
    ]
    return f'<div class="pair">{"".join(tables)}</div>'


def _step_table(steps: Sequence[Facts], facts: Facts, *, scale: svg.Range | None = None,
                chosen: int | None = None) -> str:  # fmt: skip
    scale = scale or _gain_span(steps)
    short = _short_names(facts.get("models", []))
    tasks = [task["name"] for task in facts.get("tasks", [])]
    head = "".join(f'<th class="n" title="{_text(name)}">{_text(name)}</th>' for name in tasks)
    rows = []
    for i, step in enumerate(steps):
        gain, error = step["gain"], step["gain_error"]
        label = f"gain {_signed(gain, 4)} ± {_number(error, 4)}"
        line = svg.whisker(gain, gain - error, gain + error, scale, label, zero=True)
        cells = ""
        for p, accuracy in zip(step["p"], step["accuracy"], strict=True):
            small = "" if accuracy is None else f"<small>{_number(accuracy)}</small>"
            cells += f'<td class="n">{_number(p)}{small}</td>'
        why = f"<small>out: {_text(step['out'])}</small>" if step.get("out") else ""
        kind = ' class="result"' if i == chosen else ' class="out"' if step.get("out") else ""
        number = f"{_signed(gain, 4)} <small>± {_number(error, 4)}</small>"
        name = _name_cell(_shortened(step["label"], short), step["label"], why)
        rows.append(
            f'<tr{kind}>{name}<td class="gain">{number}{line}</td>'
            f'<td class="n">{_number(step["score"])}</td>{cells}</tr>'
        )
    heading = f'<tr><th>what</th><th>gain</th><th class="n">mean<br>share</th>{head}</tr>'
    return _table(heading, rows, "steps")


def _chosen_step(facts: Facts) -> int | None:
    """The nested step that is the result: the one with its very scores on the dev data."""
    for row in facts.get("table", []):
        if row["name"] == "Hi-Merging" and row["split"] == "dev":
            result = [one["p"]["value"] for one in row["tasks"].values()]
            return next((i for i, step in enumerate(facts["prefixes"]) if list(step["p"]) == result), None)
    return None


def _gain_span(steps: Sequence[Facts]) -> svg.Range:
    """As far to the left as to the right: what helps is to be seen, and what hurts more than that runs off the edge."""
    ends = [step["gain"] + step["gain_error"] for step in steps if step["gain"] > 0]
    ends = ends or [abs(step["gain"]) + step["gain_error"] for step in steps]
    most = max((end for end in ends if math.isfinite(end)), default=0.0)
    return -most, most


# --- stage 1 ---------------------------------------------------------------------------------------------------------


def _stage_one(facts: Facts) -> str:
    """How density, scale and weight were found."""
    factors, surfaces = facts.get("factors", []), facts.get("surfaces", [])
    parts = []
    if len(factors) > 1:
        chosen = _common_weight(facts)
        marked = f" {_plain(chosen)} was taken (orange)." if chosen is not None else ""
        score = [(one["factor"], one["score"]) for one in factors]
        charts = [svg.line_chart(score, chosen, "All tasks", ("common weight", "mean share of the gains"))]
        for i, task in enumerate(facts.get("tasks", [])):
            curve = [(one["factor"], one["p"][i]) for one in factors]
            charts.append(svg.line_chart(curve, chosen, task["name"], ("common weight", "P")))
        parts.append(
            "<h3>Common weight</h3><p>What a merge keeps of the specialists' gains, by the weight that all models "
            f"have in it; 1 is as good as the specialists. Dev data.{marked}</p>"
            f'<div class="charts">{"".join(charts)}</div>'
        )
    elif factors:
        parts.append(
            "<p>The weights were not searched. The first merge keeps a mean share of "
            f"{_number(factors[0]['score'])} of the specialists' gains on the dev data.</p>"
        )
    if surfaces:
        charts = [_surface(surface, facts) for surface in surfaces]
        parts.append(
            "<h3>Density and scale</h3><p>P of each specialist on its own task, on the dev data, when only the "
            "share p of its delta's entries is kept and the delta is scaled by s. The frame is what was taken.</p>"
            f'<div class="charts">{"".join(charts)}</div>'
        )
    return "".join(parts)


def _surface(surface: Facts, facts: Facts) -> str:
    model: str = surface["model"]
    densities, scales = surface["densities"], surface["scales"]
    return svg.heat_map(
        surface["p"], [_plain(p) for p in densities], [_plain(s) for s in scales], _taken(surface, facts),
        _short_names(facts["models"]).get(model, model), ("scale s", "density p"), _cell_number,
    )  # fmt: skip


def _taken(surface: Facts, facts: Facts) -> tuple[int, int] | None:
    """Where in a surface the density and scale are that stage 1 took."""
    start = facts.get("stage1") or {}
    try:
        m = facts["models"].index(surface["model"])
        return surface["densities"].index(start["density"][m]), surface["scales"].index(start["scale"][m])
    except (KeyError, ValueError):
        return None


def _common_weight(facts: Facts) -> float | None:
    weights: list[float] = (facts.get("stage1") or {}).get("weight", [])
    return weights[0] if len(set(weights)) == 1 else None


# --- cost ------------------------------------------------------------------------------------------------------------


def _cost(facts: Facts) -> str:
    cost = facts.get("cost")
    if not cost:
        return ""
    if not cost["jobs"]:
        return "<p>Nothing: every score was known from an earlier run.</p>"
    waves = f"{cost['waves']:,} pass{'' if cost['waves'] == 1 else 'es'}"
    rows = [
        ("loads of a block", f"{cost['unit_loads']:,}", f"{cost['plain_loads']:,}"),
        ("forwards of a block", f"{cost['block_forwards']:,}", f"{cost['plain_forwards']:,}"),
    ]
    lines = [
        f'<tr><th>{what}</th><td class="n">{here}</td><td class="n">{plain}</td></tr>' for what, here, plain in rows
    ]
    head = '<tr><th></th><th class="n">here</th><th class="n">model by model</th></tr>'
    return (
        f"<p>{cost['jobs']:,} scores of models that were never written, in {waves} over the weights: "
        f"{format_size(cost['bytes_read'])} read, {format_seconds(cost['seconds'])}.</p>{_table(head, lines)}"
    )


SECTIONS: tuple[tuple[str, str, Callable[[Facts], str]], ...] = (
    ("scores", "Scores", _scores),
    ("layers", "Where merging hurts, layer by layer", _layers),
    ("decisions", "Decisions", _decisions),
    ("tried", "What was tried", _tried),
    ("stage1", "Stage 1: density, scale, weight", _stage_one),
    ("cost", "Cost of this run", _cost),
)


# --- words and numbers -----------------------------------------------------------------------------------------------


def _text(words: object) -> str:
    return escape(str(words))


def _breakable(name: str) -> str:
    """A name that may go on in the next line where a person would break it."""
    return re.sub(r"(?<!\d)([./_-])(?!\d)", r"\1<wbr>", _text(name))


def _name_cell(shown: str, whole: str, below: str = "") -> str:
    """The head of a row, with the whole name under the pointer."""
    return f'<th title="{_text(whole)}">{_breakable(shown)}{below}</th>'


def _listed(names: Sequence[object]) -> str:
    return ", ".join(f"<b>{_text(name)}</b>" for name in names)


def _short_names(models: Sequence[str]) -> dict[str, str]:
    """The last part of each path, or all of it where that would not tell the models apart."""
    short = {model: PurePath(model).name or model for model in models}
    return short if len(set(short.values())) == len(short) else {model: model for model in models}


def _shortened(label: str, short: Mapping[str, str]) -> str:
    """A label in which models have their short names."""
    longest_first = sorted(short, key=len, reverse=True)
    pattern = "|".join(map(re.escape, longest_first))
    return re.sub(pattern, lambda match: short[match.group()], label) if pattern else label


def _number(value: float | None, decimals: int = 3) -> str:
    """Three decimals, fewer for large numbers, and a true minus."""
    if value is None:
        return "–"
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else "∞" if value > 0 else "−∞"
    size = abs(value)
    decimals -= (size >= 10) + (size >= 100) + (size >= 1000)
    return f"{value:z,.{decimals}f}".replace("-", "−")


def _signed(value: float, decimals: int = 3) -> str:
    return f"+{_number(value, decimals)}" if value >= 0.5 * 10.0**-decimals else _number(value, decimals)


def _plain(value: float) -> str:
    """A number that someone chose: as short as it can be."""
    return f"{value:g}".replace("-", "−")


def _cell_number(value: float) -> str:
    return _number(value, 2)


def _interval(estimate: Facts) -> str:
    return f"[{_number(estimate['low'])}, {_number(estimate['high'])}]"


def _reach(estimates: Sequence[Facts]) -> svg.Range:
    lows = [one["low"] for one in estimates if math.isfinite(one["low"])]
    highs = [one["high"] for one in estimates if math.isfinite(one["high"])]
    return min(lows, default=0.0), max(highs, default=0.0)


def _parts(items: Sequence[_T], size: int) -> Iterator[Sequence[_T]]:
    """Cut into pieces of at most `size`, as even as can be."""
    count = math.ceil(len(items) / size)
    for i in range(count):
        yield items[len(items) * i // count : len(items) * (i + 1) // count]


def _table(head: str, rows: Sequence[str], kind: str = "") -> str:
    top = f"<thead>{head}</thead>" if head else ""
    return f'<div class="scroll"><table class="{kind}">{top}<tbody>{"".join(rows)}</tbody></table></div>'


# --- pictures --------------------------------------------------------------------------------------------------------


def write_pngs(facts: Facts, folder: Path) -> list[Path]:
    """γ by layer and model as gamma.png, and each model's (p, s) surface; nothing if matplotlib is not installed."""
    if find_spec("matplotlib") is None:
        return []
    import matplotlib as mpl

    folder.mkdir(parents=True, exist_ok=True)
    pictures: list[Path] = []
    # Names are no formulas, and a letter that the font lacks is no reason to warn.
    with mpl.rc_context({"text.parse_math": False, "font.size": 9}), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if facts.get("kind") == "analysis" and facts.get("layers"):
            pictures.append(_draw_gamma(facts, folder / "gamma.png"))
        for i, surface in enumerate(facts.get("surfaces", [])):
            name = re.sub(r"[^A-Za-z0-9_.-]+", "-", PurePath(surface["model"]).name)
            pictures.append(_draw_surface(surface, facts, folder / f"surface-{i + 1}-{name}.png"))
    return pictures


def _draw_gamma(facts: Facts, path: Path) -> Path:
    import numpy as np
    from matplotlib.colors import FuncNorm
    from matplotlib.figure import Figure

    layers, models = facts["layers"], facts["models"]
    cells = [layer["models"] for layer in layers]
    limit = _gamma_limit(layers) or 1.0
    few = len(layers) <= _ANNOTATED_LAYERS
    figure = Figure((3.2 + 1.1 * len(models), 1.6 + (0.3 if few else 0.14) * len(layers)), layout="constrained")
    axes = figure.add_subplot()
    # The square root shows small values, too, as on the page.
    norm = FuncNorm((lambda x: np.sign(x) * np.sqrt(np.abs(x)), lambda x: np.sign(x) * x**2), -limit, limit)
    values = [[one["gamma"]["value"] for one in row] for row in cells]
    image = axes.imshow(values, cmap=_colour_map(), norm=norm, aspect="auto")
    axes.set_xticks(range(len(models)), list(_short_names(models).values()), rotation=20, ha="right")
    axes.set_yticks(range(len(layers)), [layer["name"] for layer in layers], fontsize=9 if few else 5)
    for r, row in enumerate(cells):
        for c, one in enumerate(row):
            mark = "▲" if one["beyond"] else ""
            words = f"{_signed(one['gamma']['value'])} {mark}" if few else mark
            axes.text(c, r, words, ha="center", va="center", fontsize=8 if few else 4)
    axes.set_title("γ: what merging took (▲ beyond τ)")
    bar = figure.colorbar(image, ax=axes, aspect=25, ticks=[-limit, -limit / 4, 0, limit / 4, limit])
    bar.ax.set_yticklabels([_signed(value) for value in (-limit, -limit / 4, 0.0, limit / 4, limit)])
    return _save(figure, path)


def _draw_surface(surface: Facts, facts: Facts, path: Path) -> Path:
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    densities, scales = surface["densities"], surface["scales"]
    figure = Figure((2.2 + 0.5 * len(scales), 1.4 + 0.4 * len(densities)), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(surface["p"], cmap="Blues", origin="lower", aspect="auto")
    axes.set_xticks(range(len(scales)), [_plain(scale) for scale in scales])
    axes.set_yticks(range(len(densities)), [_plain(density) for density in densities])
    axes.set(xlabel="scale s", ylabel="density p", title=PurePath(surface["model"]).name)
    taken = _taken(surface, facts)
    if taken is not None:
        corner = (taken[1] - 0.5, taken[0] - 0.5)
        axes.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor=svg.ORANGE, linewidth=2.5))
    figure.colorbar(image, ax=axes, label="P on the dev data")
    return _save(figure, path)


def _colour_map() -> Any:
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("gamma", [svg.diverging(value, 1.0) for value in (-1.0, 0.0, 1.0)])


def _save(figure: Any, path: Path) -> Path:
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=150)
    write_file(path, content.getvalue())
    return path
