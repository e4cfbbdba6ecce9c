"""An extraction as rows and tables for people, and as JSON."""

from __future__ import annotations

import re
from typing import Any

from streammerge.base.units import format_seconds, format_size
from streammerge.plan.extraction import BIAS, VECTOR
from streammerge.run.adapter_card import facts_of
from streammerge.run.extracted import Extracted, Factored

_SHOWN = 3
_NUMBER = re.compile(r"\.\d+\.")


def extracted_rows(done: Extracted, seconds: float) -> list[tuple[str, str]]:
    """What was done, and what is not in the adapter."""
    shown = _span([str(rank) for rank in sorted({each.rank for each in done.factored})])
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
        if not done.wanted.keep_whole and any(each.why in (BIAS, VECTOR) for each in left):
            rows.append(("", "--keep-whole would put norms and biases into the adapter as they are"))
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


def tensor_table(done: Extracted) -> list[list[str]]:
    """Rank, energy and error of every matrix."""
    rows = [[each.name, str(each.rank), _share(each.kept), f"{each.error:.3g}"] for each in done.factored]
    return [["tensor", "rank", "energy kept", "error"], *rows]


def kind_table(done: Extracted) -> list[list[str]]:
    """The same by kinds of layers: how many there are, their ranks, and the least that is kept of any."""
    kinds: dict[str, list[Factored]] = {}
    for each in done.factored:
        kinds.setdefault(_NUMBER.sub(".*.", each.name), []).append(each)
    rows = [
        [
            kind,
            str(len(own)),
            _span([str(rank) for rank in sorted({each.rank for each in own})]),
            _share(min(each.kept for each in own)),
            f"{max(each.error for each in own):.3g}",
        ]
        for kind, own in kinds.items()
    ]
    return [["kind", "", "rank", "least kept", "worst error"], *rows]


def _span(ordered: list[str]) -> str:
    return ordered[0] if ordered[0] == ordered[-1] else f"{ordered[0]}-{ordered[-1]}"


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
