"""How much memory this process has, may have, and takes. Linux: /proc and cgroups (v1 and v2); elsewhere psutil."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import psutil

from streammerge.base.errors import DoesNotFit
from streammerge.base.units import format_size

_CGROUPS = Path("/sys/fs/cgroup")
# A limit above this means none (v1 writes about 2^63).
_NO_LIMIT = 1 << 60


@dataclass(frozen=True)
class Usage:
    """Memory of this process in bytes. `own` is anonymous and shared memory, `resident` also mapped file pages."""

    own: int
    resident: int
    peak_resident: int


def usage() -> Usage:
    """What the process takes now, and the most it ever took."""
    status = Path("/proc/self/status")
    if not status.exists():
        resident = psutil.Process().memory_info().rss
        return Usage(resident, resident, resident)
    fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
    size = {name: int(fields[name].split()[0]) * 1024 for name in ("RssAnon", "RssShmem", "VmRSS", "VmHWM")}
    return Usage(size["RssAnon"] + size["RssShmem"], size["VmRSS"], size["VmHWM"])


def memory_limit(asked: int | None) -> tuple[int, str]:
    """The bytes this process may take, and what says so: the flag, a cgroup, or the memory that is free.

    Free counts what the process holds already.
    """
    limits = [(psutil.virtual_memory().available + usage().resident, "the memory that is free")]
    limits += [(limit, f"the cgroup limit of {format_size(limit)}") for limit in _cgroup_limits()]
    if asked is not None:
        limits.append((asked, "--max-memory"))
    return min(limits)


def _cgroup_limits() -> list[int]:
    """The limits of every cgroup this process is in, enclosing ones included."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    limits = []
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if controllers == "":
            root, file = _CGROUPS, "memory.max"
        elif "memory" in controllers.split(","):
            root, file = _CGROUPS / "memory", "memory.limit_in_bytes"
        else:
            continue
        folder = root / group.lstrip("/")
        # Inside a container the path may be the host's; what is mounted at the root then is our own group.
        for place in [folder, *folder.parents]:
            if place != root and root not in place.parents:
                break
            limits += _read_limit(place / file)
    return [limit for limit in limits if limit < _NO_LIMIT]


def _read_limit(file: Path) -> list[int]:
    try:
        text = file.read_text().strip()
    except OSError:
        return []
    return [int(text)] if text.isdigit() else []


# What torch and Python say, in RuntimeErrors, when the system gives no memory or no stack for a thread.
_REFUSALS = ("can't allocate memory", "out of memory", "can't start new thread")


@contextmanager
def refusals() -> Iterator[None]:
    """Raise DoesNotFit where the system refuses memory that the budget allows: `ulimit -d` or `-v`, no overcommit."""
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as error:
        refused = isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM
        if not refused and not any(text in str(error) for text in _REFUSALS):
            raise
        raise DoesNotFit(
            f"The system refused memory ({str(error).splitlines()[0] if str(error) else type(error).__name__}) "
            f"after {format_size(usage().own)} of its own. Raise its limit (ulimit -d, ulimit -v) or give a smaller "
            "--max-memory; a merge goes on where it was when the same command is run again."
        ) from error


class Meter:
    """Watches the memory of this process from a thread of its own, ten times a second."""

    def __init__(self) -> None:
        self.peak_own = 0
        self.now_own = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="meter", daemon=True)

    def __enter__(self) -> Meter:
        self._sample()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        self._sample()

    def _watch(self) -> None:
        while not self._stop.wait(0.1):
            self._sample()

    def _sample(self) -> None:
        self.now_own = usage().own
        self.peak_own = max(self.peak_own, self.now_own)


def processors() -> int:
    """The processors this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
