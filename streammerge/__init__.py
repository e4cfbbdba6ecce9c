"""StreamMerge merges model checkpoints of any size inside the memory you allow.

    import streammerge
    report = streammerge.merge("recipe.yaml", "out", max_memory="24GB")

Names are resolved when they are first used: importing this imports nothing heavy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from streammerge.api import analyze, evaluate, extract_lora, inspect, make_plan, merge, verify

__version__ = "0.1.0"
__all__ = ["__version__", "analyze", "evaluate", "extract_lora", "inspect", "make_plan", "merge", "verify"]


def __getattr__(name: str) -> Any:
    if name in {"analyze", "evaluate", "extract_lora", "inspect", "make_plan", "merge", "verify"}:
        from streammerge import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
