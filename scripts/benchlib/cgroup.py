"""A memory control group of an exact size, version 2 or version 1, whichever this machine has."""

import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchlib.errors import BenchError

MOUNT = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class CgroupFacts:
    limit_bytes: int
    peak_bytes: int  # page cache included
    limit_hits: int  # how often the limit was reached and something had to be reclaimed; not an error by itself
    oom_kills: int


class MemoryCgroupError(BenchError):
    """This machine or this user cannot make a memory control group."""


@dataclass(frozen=True)
class MemoryCgroup:
    """One directory of the control group file system."""

    directory: Path
    version: int

    def wrap(self, command: Sequence[str]) -> list[str]:
        """The same command, entering this group before it begins."""
        # The shell joins and then becomes the command: every byte it allocates as that command is charged here.
        enter = 'echo $$ > "$0" && exec "$@"'
        return ["sh", "-c", enter, str(self.directory / "cgroup.procs"), *command]

    def read_facts(self) -> CgroupFacts:
        if self.version == 2:
            events = self._read_keys("memory.events")
            return CgroupFacts(
                limit_bytes=self._read_number("memory.max"),
                peak_bytes=self._read_number("memory.peak"),
                limit_hits=events.get("max", 0),
                oom_kills=events.get("oom_kill", 0),
            )
        return CgroupFacts(
            limit_bytes=self._read_number("memory.limit_in_bytes"),
            peak_bytes=self._read_number("memory.max_usage_in_bytes"),
            limit_hits=self._read_number("memory.failcnt"),
            oom_kills=self._read_keys("memory.oom_control").get("oom_kill", 0),
        )

    def _read_number(self, name: str) -> int:
        try:
            return int((self.directory / name).read_text())
        except OSError:
            return 0  # memory.peak came with Linux 5.19

    def _read_keys(self, name: str) -> dict[str, int]:
        pairs = (line.split() for line in (self.directory / name).read_text().splitlines())
        return {key: int(value) for key, value in pairs}


@contextmanager
def memory_cgroup(limit_bytes: int) -> Iterator[MemoryCgroup]:
    """A new group with this limit (the kernel rounds it down to whole pages) and no swap."""
    name = f"streammerge-bench-{os.getpid()}"
    if _has_memory_controller(MOUNT):
        group = MemoryCgroup(MOUNT / name, version=2)
        settings = {"memory.max": limit_bytes, "memory.swap.max": 0}
    elif (MOUNT / "memory" / "memory.limit_in_bytes").exists():
        group = MemoryCgroup(MOUNT / "memory" / name, version=1)
        # No memsw limit: at the same size it would be the one that is hit, and the kernel does not count its hits.
        settings = {"memory.limit_in_bytes": limit_bytes, "memory.swappiness": 0}
    else:
        raise MemoryCgroupError(f"no memory controller under {MOUNT}, neither of version 2 nor of version 1.")
    try:
        group.directory.mkdir()
    except OSError as error:
        problem = f"cannot make {group.directory} ({error.strerror}): run as root, outside a container."
        raise MemoryCgroupError(problem) from error
    try:
        for file, value in settings.items():
            path = group.directory / file
            if path.exists():
                path.write_text(str(value))
            elif "swap" not in file:  # swap accounting may be switched off; the limit itself must be there
                raise MemoryCgroupError(f"{path} is missing: the memory controller is not delegated here.")
        yield group
    finally:
        _remove(group.directory)


def _has_memory_controller(mount: Path) -> bool:
    controllers = mount / "cgroup.controllers"
    if not controllers.exists() or "memory" not in controllers.read_text().split():
        return False
    subtree = mount / "cgroup.subtree_control"
    if "memory" not in subtree.read_text().split():
        try:
            subtree.write_text("+memory")
        except OSError as error:
            raise MemoryCgroupError(f"cannot switch on the memory controller in {mount}: {error.strerror}.") from error
    return True


def _remove(directory: Path) -> None:
    for _ in range(50):  # the group stays busy for a moment after its last process has ended
        with contextlib.suppress(OSError):
            directory.rmdir()
            return
        time.sleep(0.1)
