"""Small drawings as inline SVG, for a page that needs no other file. Takes numbers and words, escapes every word.

Knows nothing of merging, and works nothing out but where things lie. A number that is not finite is not drawn.

    whisker      a value with its interval, one line high
    dumbbell     pairs of before and after, a line each
    line_chart   one curve with axes
    heat_map     a grid of values with axes
    strip        a row of coloured cells, as wide as there is room
    colour_key   what the colours of `diverging` mean
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape
from itertools import pairwise

Range = tuple[float, float]
Colour = tuple[int, int, int]

INK, MUTED, RULE = "#1d2129", "#5c6470", "#c9ced6"
BLUE, ORANGE = "#1f6aa5", "#c25e00"
_WHITE: Colour = (255, 255, 255)
# Blue and orange stay apart for every kind of colour-blindness, and dark text is readable on all of them.
_BELOW: Colour = (96, 174, 232)
_ABOVE: Colour = (243, 154, 45)
_LOW: Colour = (242, 246, 250)
_HIGH: Colour = (12, 78, 140)
_DARK = 0.7


# --- colours ---------------------------------------------------------------------------------------------------------


def diverging(value: float, limit: float) -> str:
    """Blue below zero, white at zero, orange above. Grows with the square root, so that small values are seen, too."""
    if not math.isfinite(value) or limit <= 0:
        return _hex(_WHITE)
    share = _root(max(-1.0, min(1.0, value / limit)))
    return _hex(_between(_WHITE, _ABOVE if share > 0 else _BELOW, abs(share)))


def sequential(value: float, span: Range) -> tuple[str, str]:
    """From pale to dark blue, and the colour of text upon it."""
    low, high = span
    if not math.isfinite(value):
        return _hex(_WHITE), INK
    share = (value - low) / (high - low) if high > low else 1.0
    return _hex(_between(_LOW, _HIGH, share)), "#ffffff" if share > _DARK else INK


def colour_key(limit: float, label: str, ends: tuple[str, str], number: Callable[[float], str]) -> str:
    """The colours of `diverging` from -limit to limit, with numbers under them and a word at each end."""
    width, steps, left = 300, 60, 20
    cells = []
    for i in range(steps):
        root = 2 * (i + 0.5) / steps - 1
        colour = diverging(root * abs(root) * limit, limit)
        cells.append(_box(left + i * width / steps, 16, width / steps + 0.5, 12, colour))
    ticks = []
    for place, value in ((0.0, -limit), (0.25, -limit / 4), (0.5, 0.0), (0.75, limit / 4), (1.0, limit)):
        x = left + place * width
        ticks += [_line(x, 28, x, 32, MUTED), _text(x, 43, number(value), "middle")]
    words = [_text(left, 11, ends[0], "start"), _text(left + width, 11, ends[1], "end")]
    frame = _box(left, 16, width, 12, "none", RULE)
    return _picture(width + 2 * left, 48, label, [*cells, frame, *ticks, *words])


# --- small ones, for cells of tables ---------------------------------------------------------------------------------


def whisker(value: float, low: float, high: float, span: Range, label: str, zero: bool = False) -> str:
    """A dot at `value` on a line from `low` to `high`. What lies outside `span` ends in an arrow at the edge."""
    width, height, edge = 88, 10, 5
    if not all(map(math.isfinite, (value, low, high, *span))):
        return ""
    place = _axis(span, edge, width - edge)
    middle = height / 2
    shapes = [_line(0, middle, width, middle, "#e6e9ed")]
    if zero and span[0] <= 0 <= span[1]:
        shapes.append(_line(place(0), 0, place(0), height, MUTED))
    start, end = place(max(low, span[0])), place(min(high, span[1]))
    if value < span[0] or value > span[1]:
        x, back = (edge, 4) if value < span[0] else (width - edge, -4)
        tip = x - back
        shapes.append(f'<path d="M{_n(tip)} {_n(middle)}l{back} -3.5v7z" fill="{BLUE}"/>')
        inner = end if value < span[0] else start
        if edge <= inner <= width - edge:
            shapes.append(_line(x, middle, inner, middle, BLUE, 2))
    else:
        shapes += [_line(start, middle, end, middle, BLUE, 2), _dot(place(value), middle, 3, BLUE)]
    return _picture(width, height, label, shapes, fixed=True)


def dumbbell(pairs: Sequence[tuple[float, float]], span: Range, label: str) -> str:
    """Each pair a line from a hollow dot (before) to a full one (after), and zero a thin line through all of them.

    Distances from zero grow with the square root, so that small values are seen beside large ones.
    """
    width, row, edge = 64, 14, 4
    height = row * len(pairs)
    straight = _axis((_root(span[0]), _root(span[1])), edge, width - edge)

    def place(value: float) -> float:
        return straight(_root(value))

    shapes = [_line(place(0), 0, place(0), height, RULE)] if span[0] <= 0 <= span[1] else []
    for i, (before, after) in enumerate(pairs):
        if math.isfinite(before) and math.isfinite(after):
            y = row * (i + 0.5)
            shapes.append(_line(place(before), y, place(after), y, BLUE, 1.5))
            shapes.append(_dot(place(before), y, 2.8, "#ffffff", BLUE))
            shapes.append(_dot(place(after), y, 2.8, BLUE, BLUE))
    return _picture(width, height, label, shapes, fixed=True)


def strip(colours: Sequence[str], marked: Sequence[bool], titles: Sequence[str], label: str) -> str:
    """Cells side by side, each with a text that appears under the pointer; marked ones have a dark foot."""
    shapes = []
    for i, (colour, mark, title) in enumerate(zip(colours, marked, titles, strict=True)):
        foot = _box(i + 0.1, 15, 0.8, 5, INK) if mark else ""
        shapes.append(f"<g><title>{escape(title)}</title>{_box(i, 0, 1.02, 20, colour)}{foot}</g>")
    return (
        f'<svg class="strip" role="img" aria-label="{escape(label)}" viewBox="0 0 {max(1, len(colours))} 20" '
        f'preserveAspectRatio="none">{"".join(shapes)}</svg>'
    )


# --- charts ----------------------------------------------------------------------------------------------------------


def line_chart(points: Sequence[tuple[float, float]], chosen: float | None, title: str, axes: tuple[str, str]) -> str:
    """A curve through `points`, (x, y) by rising x, between two axes; the point at x = `chosen` stands out."""
    points = [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]
    if not points:
        return ""
    width, height, left, right, top, bottom = 400, 250, 58, 14, 30, 44
    x_ticks, y_ticks = ticks(*_span([x for x, _ in points])), ticks(*_span([y for _, y in points]))
    across = _axis(_span([*x_ticks, *(x for x, _ in points)]), left + 8, width - right - 8)
    up = _axis(_span([*y_ticks, *(y for _, y in points)]), height - bottom - 6, top + 6)
    shapes = [_text(left, 14, title, "start", weight=600)]
    for y in y_ticks:
        shapes.append(_line(left, up(y), width - right, up(y), "#e6e9ed"))
        shapes.append(_text(left - 7, up(y) + 3.5, _tick(y, y_ticks), "end"))
    for x in x_ticks:
        shapes.append(_line(across(x), height - bottom, across(x), height - bottom + 4, MUTED))
        shapes.append(_text(across(x), height - bottom + 16, _tick(x, x_ticks), "middle"))
    shapes.append(_line(left, height - bottom, width - right, height - bottom, MUTED))
    shapes.append(_text((left + width - right) / 2, height - 8, axes[0], "middle", fill=MUTED))
    shapes.append(_text(13, (top + height - bottom) / 2, axes[1], "middle", fill=MUTED, turned=True))
    corners = " ".join(f"{_n(across(x))},{_n(up(y))}" for x, y in points)
    shapes.append(f'<polyline points="{corners}" fill="none" stroke="{BLUE}" stroke-width="1.8"/>')
    for x, y in points:
        if x == chosen:
            shapes.append(_line(across(x), up(y), across(x), height - bottom, ORANGE, 1, dashed=True))
        shapes.append(_dot(across(x), up(y), *((4.6, ORANGE) if x == chosen else (2.8, BLUE))))
    return _picture(width, height, f"{title}: {axes[1]} by {axes[0]}", shapes)


def heat_map(values: Sequence[Sequence[float]], rows: Sequence[str], columns: Sequence[str],
             chosen: tuple[int, int] | None, title: str, axes: tuple[str, str],
             number: Callable[[float], str]) -> str:  # fmt: skip
    """Values as a grid of colours, the first row at the bottom. Numbers stand in the cells; `chosen` has a frame."""
    if not values or not rows or not columns:
        return ""
    cell_width, cell_height = max(34.0, min(46.0, 340 / len(columns))), 22.0
    left, top, bottom = 58.0, 30.0, 44.0
    width, height = left + cell_width * len(columns) + 6, top + cell_height * len(rows) + bottom
    width = max(width, 240)
    span = _span([value for row in values for value in row if math.isfinite(value)])
    floor = top + cell_height * len(rows)
    shapes = [_text(left, 14, title, "start", weight=600)]
    for r, row in enumerate(values):
        y = floor - (r + 1) * cell_height
        shapes.append(_text(left - 7, y + 15, rows[r], "end"))
        for c, value in enumerate(row):
            fill, ink = sequential(value, span)
            x = left + c * cell_width
            shapes.append(_box(x, y, cell_width - 1, cell_height - 1, fill))
            shapes.append(_text(x + (cell_width - 1) / 2, y + 14.5, number(value), "middle", fill=ink, size=9.5))
    for c, name in enumerate(columns):
        shapes.append(_text(left + (c + 0.5) * cell_width, floor + 15, name, "middle"))
    middle = left + cell_width * len(columns) / 2
    shapes.append(_text(max(middle, width / 2 if len(columns) < 4 else 0), height - 8, axes[0], "middle", fill=MUTED))
    shapes.append(_text(13, (top + floor) / 2, axes[1], "middle", fill=MUTED, turned=True))
    if chosen is not None:
        x, y = left + chosen[1] * cell_width, floor - (chosen[0] + 1) * cell_height
        shapes.append(_box(x - 0.5, y - 0.5, cell_width, cell_height, "none", ORANGE, 2.5))
    return _picture(width, height, f"{title}: {axes[1]} against {axes[0]}", shapes)


def ticks(low: float, high: float, about: int = 6) -> list[float]:
    """Round numbers between `low` and `high`, steps of 1, 2 or 5 times a power of ten."""
    if high <= low:
        return [low]
    power: float = 10.0 ** math.floor(math.log10((high - low) / about))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power * about >= (high - low) * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


# --- shapes ----------------------------------------------------------------------------------------------------------


def _picture(width: float, height: float, label: str, shapes: Sequence[str], *, fixed: bool = False) -> str:
    kind = "mark" if fixed else "chart"
    return (
        f'<svg class="{kind}" role="img" aria-label="{escape(label)}" width="{_n(width)}" height="{_n(height)}" '
        f'viewBox="0 0 {_n(width)} {_n(height)}"><title>{escape(label)}</title>{"".join(shapes)}</svg>'
    )


def _line(x1: float, y1: float, x2: float, y2: float, stroke: str, width: float = 1, *, dashed: bool = False) -> str:
    dash = ' stroke-dasharray="3 3"' if dashed else ""
    ends = f'x1="{_n(x1)}" y1="{_n(y1)}" x2="{_n(x2)}" y2="{_n(y2)}"'
    return f'<line {ends} stroke="{stroke}" stroke-width="{_n(width)}"{dash}/>'


def _box(x: float, y: float, width: float, height: float, fill: str, stroke: str = "none", line: float = 1) -> str:
    edge = "" if stroke == "none" else f' stroke="{stroke}" stroke-width="{_n(line)}"'
    return f'<rect x="{_n(x)}" y="{_n(y)}" width="{_n(width)}" height="{_n(height)}" fill="{fill}"{edge}/>'


def _dot(x: float, y: float, radius: float, fill: str, stroke: str = "none") -> str:
    return f'<circle cx="{_n(x)}" cy="{_n(y)}" r="{_n(radius)}" fill="{fill}" stroke="{stroke}" stroke-width="1.4"/>'


def _text(x: float, y: float, words: str, anchor: str, *, fill: str = INK, size: float = 11, weight: int = 400,
          turned: bool = False) -> str:  # fmt: skip
    turn = f' transform="rotate(-90 {_n(x)} {_n(y)})"' if turned else ""
    style = f'text-anchor="{anchor}" font-size="{_n(size)}" font-weight="{weight}" fill="{fill}"'
    return f'<text x="{_n(x)}" y="{_n(y)}" {style}{turn}>{escape(words)}</text>'


def _axis(span: Range, start: float, end: float) -> Callable[[float], float]:
    """From values to places: span[0] lies at `start`, span[1] at `end`."""
    low, high = span
    if high <= low:
        return lambda _: (start + end) / 2
    return lambda value: start + (value - low) / (high - low) * (end - start)


def _root(value: float) -> float:
    """The square root of the size, with the sign kept."""
    return math.copysign(math.sqrt(abs(value)), value)


def _span(values: Sequence[float]) -> Range:
    return (min(values), max(values)) if values else (0.0, 0.0)


def _tick(value: float, others: Sequence[float]) -> str:
    """A number on an axis, with as many decimals as its neighbours need."""
    step = min((abs(b - a) for a, b in pairwise(others)), default=0.0)
    decimals = max(0, -math.floor(math.log10(step) + 1e-9)) if step else 2
    return f"{value:.{decimals}f}".replace("-", "−")


def _between(one: Colour, other: Colour, share: float) -> Colour:
    red, green, blue = (round(a + (b - a) * share) for a, b in zip(one, other, strict=True))
    return red, green, blue


def _hex(colour: Colour) -> str:
    return "#{:02x}{:02x}{:02x}".format(*colour)


def _n(number: float) -> str:
    """A coordinate, short."""
    return f"{number:.1f}".removesuffix(".0") if abs(number) < 1e6 else "0"
