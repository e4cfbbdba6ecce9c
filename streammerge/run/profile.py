"""Where the time of a merge goes: seconds by kind of work, added up over threads."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Profile:
    """Seconds of one merge.

    The first four follow each other; the rest happen at the same time, within `merging`: `reading` is the sum over the
    threads that read, `programs` over those that compute, by program, with how many pieces each had. `waiting` is what
    the walk waits for reads, `unready` what writing waits for results.
    """

    planning: float
    compiling: float
    merging: float
    finishing: float
    reading: float
    readers: int
    waiting: float
    programs: dict[str, tuple[int, float]]
    threads: int
    unready: float
    hashing: float
    writing: float
    syncing: float

    @property
    def computing(self) -> float:
        """Seconds of arithmetic, of all threads together."""
        return sum(seconds for _, seconds in self.programs.values())


NOTHING_DONE = Profile(0, 0, 0, 0, 0, 0, 0, {}, 0, 0, 0, 0, 0)


@dataclass
class Spent:
    """Seconds by name, added up from any thread."""

    _seconds: dict[str, tuple[int, float]] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, name: str, began: float) -> None:
        """Count what began then and ends now (`time.perf_counter`)."""
        seconds = time.perf_counter() - began
        with self._lock:
            count, before = self._seconds.get(name, (0, 0.0))
            self._seconds[name] = (count + 1, before + seconds)

    def of(self, name: str) -> float:
        return self._seconds.get(name, (0, 0.0))[1]

    @property
    def all(self) -> dict[str, tuple[int, float]]:
        """How often, and how long."""
        return dict(self._seconds)
