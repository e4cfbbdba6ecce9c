"""An extraction as rows and tables for people, and as JSON."""

from __future__ import annotations

from typing import Any

from streammerge.base.units import format_seconds, format_size
from streammerge.run.adapter_card import facts_of
from streammerge.run.extracted import Extracted

_SHOWN = 3
_MANY = 40


def extracted_rows(done: Extracted, seconds: float) -> list[tuple[str, str]]:
    """What was done, and what is not in the adapter."""
    ranks = sorted({each.rank for each in done.factored})
    shown = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
    left = [each for each in done.left if not each.whole]
    whole = [each for each in done.left if each.whole]
    rows = [
        ("adapter", f"{done.out}: {format_size(done.adapter_bytes)}, {len(done.factored)} matrices, rank {shown}"),
        ("in it", f"{_share(done.kept)} of the squared difference"),
    ]
    if whole:
        rows.append(("whole", f"{len(whole)} tensors: {_names([each.name for each in whole])}"))
    if left:
        squares = sum(each.squares or 0.0 for each in left)
        reasons = ", ".join(dict.fromkeys(each.why for each in left))
        text = f"{len(left)} tensors that differ, {_share(squares / done.squares)} of the squared difference: "
        rows.append(("left out", f"{text}{_names([each.name for each in left])}; {reasons}"))
    if done.wanted.share is not None:
        short = [each.name for each in done.factored if each.kept < done.wanted.share]
        if short:
            most = f"{done.wanted.energy:g} at rank {done.wanted.most}, the most allowed (--max-rank)"
            rows.append(("short", f"{len(short)} matrices hold less than {most}: {_names(short)}"))
    if done.equal:
        rows.append(("equal", f"{done.equal} tensors"))
    if done.unseen:
        rows.append(("not looked at", f"{len(done.unseen)} tensors, as asked"))
    rows += [
        ("read", format_size(done.read_bytes)),
        ("peak memory", f"{format_size(done.peak_own_bytes)} of {format_size(done.limit_bytes)} allowed"),
        ("time", format_seconds(seconds)),
    ]
    return rows


def tensor_table(done: Extracted, *, every: bool) -> list[list[str]]:
    """Ranks and errors by tensor; of many only those with the largest errors, unless `every` one is asked for."""
    shown = list(done.factored)
    if len(shown) > _MANY and not every:
        worst = sorted(shown, key=lambda each: -each.error)[:_MANY]
        shown = [each for each in shown if each in worst]
    rows = [
        [each.name, str(each.rank), _share(each.kept), f"{each.error:.3g}"] for each in shown
    ]  # fmt: skip
    return [["tensor", "rank", "energy kept", "|D-BA|/|D|"], *rows]


def extracted_json(done: Extracted, seconds: float) -> dict[str, Any]:
    """All of it."""
    return {
        "out": str(done.out),
        **facts_of(done),
        "adapter_bytes": done.adapter_bytes,
        "read_bytes": done.read_bytes,
        "peak_bytes": done.peak_bytes,
        "peak_own_bytes": done.peak_own_bytes,
        "limit_bytes": done.limit_bytes,
        "seconds": round(seconds, 3),
    }


def _names(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def _share(share: float) -> str:
    return f"{100 * share:.4g} %"
