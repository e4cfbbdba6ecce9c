"""A comparison of models as tables, JSON, and a page with a heat map of layers by kinds of tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import Any

from streammerge import svg
from streammerge.plan.names import layer_of
from streammerge.run.difference import Difference, Distance

Table = list[list[str]]
_STYLE = """
body { font: 14px system-ui, sans-serif; color: #1d2129; margin: 2em; }
table { border-collapse: collapse; font-size: 11px; margin: 1em 0; }
td { min-width: 3.4em; height: 1.9em; text-align: center; border: 1px solid #fff; }
th { font-weight: 400; text-align: right; padding: 0 .6em; white-space: nowrap; }
thead th { writing-mode: vertical-rl; transform: rotate(180deg); text-align: left; padding: .6em 0; }
"""


def difference_table(found: Difference, *, tensors: bool) -> Table:
    """By layers, or by tensors; the last row is of everything. `deltas` is the cosine of the two deltas."""
    head = ["tensor" if tensors else "layer", "|b-a|/|a|", "cosine", "changed"]
    head += [] if found.base is None else ["deltas", "opposed"]
    rows = [*(found.in_order() if tensors else found.by_layer()).items(), ("all", found.whole)]
    return [head, *([name, *_cells(distance, found.base is not None)] for name, distance in rows)]


def _cells(distance: Distance, based: bool) -> list[str]:
    cells = [_number(distance.relative), _cosine(distance.cosine), _share(distance.changed)]
    return cells + ([_number(distance.delta_cosine), _share(distance.conflict)] if based else [])


def difference_rows(found: Difference) -> list[tuple[str, str]]:
    """What the table does not say."""
    sums = found.whole.sums
    rows = []
    if sums.nonfinite_a or sums.nonfinite_b:
        rows.append(("not finite", f"{sums.nonfinite_a:,.0f} numbers of a, {sums.nonfinite_b:,.0f} of b; counted as 0"))
    if found.integers:
        differ = [name for name, differs in found.integers.items() if differs]
        rows.append(("integers", f"{len(found.integers)} tensors, {len(differ)} differ{_some(differ)}"))
    if found.alone:
        rows.append(("not in all", f"{len(found.alone)} tensors, not compared{_some(found.alone)}"))
    return rows


def difference_json(found: Difference) -> dict[str, Any]:
    """All of it."""
    return {
        "a": found.models[0],
        "b": found.models[1],
        "base": found.base,
        "all": _facts(found.whole, found),
        "layers": {name: _facts(distance, found) for name, distance in found.by_layer().items()},
        "tensors": {name: _facts(distance, found) for name, distance in found.tensors.items()},
        "integers": {name: {"differs": differs} for name, differs in found.integers.items()},
        "not_in_all": list(found.alone),
    }


def _facts(distance: Distance, found: Difference) -> dict[str, Any]:
    facts = {
        "elements": distance.elements,
        "delta_norm": _finite(distance.size),
        "relative": _finite(distance.relative),
        "cosine": _finite(distance.cosine),
        "changed": distance.changed,
        "nonfinite": [int(distance.sums.nonfinite_a), int(distance.sums.nonfinite_b)],
    }
    if found.base is not None:
        facts |= {"delta_cosine": _finite(distance.delta_cosine), "opposite_signs": distance.conflict}
    return facts


def difference_page(found: Difference) -> str:
    """A page that needs no other file: the size of the difference, and with a base the conflicts, by layer and kind."""
    title = f"{found.models[0]} and {found.models[1]}"
    parts = [f"<h1>{escape(title)}</h1>"]
    if found.base is not None:
        parts.append(f"<p>From the base {escape(found.base)}.</p>")
    parts.append(_map(found, "Size of the difference, |b - a| / |a|", "relative"))
    if found.base is not None:
        parts.append(_map(found, "Share of elements that both changed, in opposite directions", "conflict"))
    size = sum(distance.elements for distance in found.tensors.values())
    parts.append(f"<p>{len(found.tensors):,} tensors, {size:,} elements. Point at a cell for all its numbers.</p>")
    return (
        f'<!DOCTYPE html>\n<html lang="en"><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{_STYLE}</style>\n" + "\n".join(parts) + "\n</html>\n"
    )


def _map(found: Difference, heading: str, what: str) -> str:
    cells: dict[str, dict[str, Distance]] = {}
    for name, distance in found.in_order().items():
        layer = layer_of(name)
        prefix = "" if layer is None else f"{layer[0]}.{layer[1]}.".lstrip(".")
        row = prefix.rstrip(".") or "outside the layers"
        cells.setdefault(row, {})[name.removeprefix(prefix).removesuffix(".weight")] = distance
    values = [getattr(distance, what) for row in cells.values() for distance in row.values()]
    known = [value for value in values if value is not None and math.isfinite(value)]
    span = (0.0, max(known, default=0.0))
    tables = []
    inside = {row: own for row, own in cells.items() if row != "outside the layers"}
    for rows in (inside, {row: own for row, own in cells.items() if row not in inside}):
        columns = list(dict.fromkeys(column for own in rows.values() for column in own))
        if not columns:
            continue
        head = "".join(f"<th>{escape(column)}</th>" for column in columns)
        body = "".join(
            f"<tr><th>{escape(row)}</th>{''.join(_cell(own.get(column), what, span, found) for column in columns)}</tr>"
            for row, own in rows.items()
        )
        tables.append(f"<table><thead><tr><td></td>{head}</tr></thead><tbody>{body}</tbody></table>")
    return f"<h2>{escape(heading)}</h2>\n" + "\n".join(tables)


def _cell(distance: Distance | None, what: str, span: svg.Range, found: Difference) -> str:
    if distance is None:
        return "<td></td>"
    value = getattr(distance, what)
    fill, ink = svg.sequential(math.nan if value is None else value, span)
    words = ", ".join(f"{key} {value}" for key, value in _facts(distance, found).items())
    shown = _share(value) if what == "conflict" else _number(value)
    return f'<td style="background:{fill};color:{ink}" title="{escape(words)}">{shown}</td>'


def _some(names: Sequence[str]) -> str:
    return f" ({', '.join(names[:5])}{', …' if len(names) > 5 else ''})" if names else ""


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _cosine(value: float | None) -> str:
    return "" if value is None else f"{value:.6f}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.3g} %"
