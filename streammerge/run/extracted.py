"""What an extraction found and did: facts, of each tensor and of all."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from streammerge.plan.extraction import Wanted


@dataclass(frozen=True)
class Factored:
    """One matrix in the adapter. `kept` is the share of its difference's squares that the singular vectors hold;
    `error` is what the stored factors miss: ‖D - B·A‖ / ‖D‖, measured. `squares` is ‖D‖²."""

    name: str
    shape: tuple[int, ...]
    rank: int
    kept: float
    error: float
    squares: float


@dataclass(frozen=True)
class LeftOut:
    """A tensor that differs and has no factors, and why; `squares` is ‖D‖², None for what is no floats. `whole` says
    that it went along as it is."""

    name: str
    shape: tuple[int, ...]
    why: str
    squares: float | None
    whole: bool


@dataclass(frozen=True)
class Extracted:
    """What an extraction did; `notes` are what those should know who load the adapter.

    Bytes were measured; `peak_bytes` is the most the process held, file pages included, `peak_own_bytes` without them.
    """

    out: Path
    model: str
    base: str
    wanted: Wanted
    factored: tuple[Factored, ...]
    left: tuple[LeftOut, ...]
    equal: int
    unseen: tuple[str, ...]
    notes: tuple[str, ...]
    adapter_bytes: int
    read_bytes: int
    peak_bytes: int
    peak_own_bytes: int
    limit_bytes: int

    @property
    def squares(self) -> float:
        """‖D‖² of all that was looked at."""
        return sum(each.squares for each in self.factored) + sum(each.squares or 0.0 for each in self.left)

    @property
    def kept(self) -> float:
        """The share of that which is in the adapter, low-rank or whole."""
        held = sum((1 - each.error**2) * each.squares for each in self.factored)
        held += sum(each.squares or 0.0 for each in self.left if each.whole)
        return held / self.squares if self.squares else 1.0
