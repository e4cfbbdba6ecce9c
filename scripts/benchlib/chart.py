"""Seconds per method as a picture: one row each, on a logarithmic axis."""

from collections.abc import Mapping, Sequence
from pathlib import Path

# Distinct for the colour-blind too, and by their shapes.
_MARKS = (("o", "#0b6e4f"), ("s", "#b3541e"), ("|", "#555555"))


def draw_speed(path: Path, methods: Sequence[str], series: Mapping[str, Sequence[float | None]], caption: str) -> None:
    """Draw `series`, {tool: seconds per method, None where there are none}, into a file of matplotlib's formats."""
    # Only here: the process that measures stays small.
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams["svg.hashsalt"] = "streammerge"
    figure = Figure(figsize=(8, 0.8 + 0.26 * len(methods)), layout="constrained")
    axes = figure.add_subplot()
    rows = range(len(methods))
    for (tool, seconds), (mark, colour) in zip(series.items(), _MARKS, strict=True):
        points = [(value, row) for value, row in zip(seconds, rows, strict=True) if value is not None]
        if points:
            axes.plot(*zip(*points, strict=True), mark, color=colour, label=tool, markersize=7, linestyle="none")
    axes.set_xscale("log")
    axes.set_xticks([1, 2, 5, 10, 20, 50, 100, 200, 500], labels=["1", "2", "5", "10", "20", "50", "100", "200", "500"])
    axes.set_yticks(rows, labels=methods)
    axes.invert_yaxis()
    axes.grid(axis="both", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel(f"seconds, whole process, from the page cache ({caption})")
    axes.legend(loc="upper right", framealpha=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
