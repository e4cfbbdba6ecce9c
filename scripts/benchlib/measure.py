"""Run one command and measure it from outside: seconds, CPU seconds, peak memory.

    start the command in a session of its own
    20 times a second: add up RssAnon + RssShmem, and VmRSS, over its process tree
    wait4, then sync the output's file system: the clock stops here, for every tool alike

Two traps:
- ru_maxrss of a child begins at the peak of the process that started it (the kernel carries the peak over exec), so the
  process that measures must never import torch. Its own 25 MiB or so are the least that can be seen.
- A sum of VmRSS counts pages that two processes share twice; the sum is an upper bound.
"""

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Self

from benchlib.errors import BenchError
from benchlib.machine import read_busy_seconds

SAMPLES_PER_SECOND = 20
TAIL_BYTES = 64 * 1024


@dataclass(frozen=True)
class Measurement:
    seconds: float  # process start to the end of the sync
    sync_seconds: float  # the part of it after the process had ended
    user_seconds: float
    system_seconds: float
    other_cpu_seconds: float  # used meanwhile by everything else, kernel threads included: is the machine quiet?
    largest_process_bytes: int  # ru_maxrss
    peak_anonymous_bytes: int  # RssAnon + RssShmem over the process tree, sampled
    peak_resident_bytes: int  # VmRSS over the process tree, sampled
    exit_code: int
    report: dict[str, Any]  # the last line of standard output that is a JSON object, or {}
    stderr_tail: str


def measure(
    command: Sequence[str], *, cwd: Path, environment: Mapping[str, str], sync_at: Path | None = None
) -> Measurement:
    """Run `command` to its end. `sync_at` is any path on the file system to sync within the timed interval."""
    with tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
        busy_before = read_busy_seconds()
        start = time.perf_counter()
        try:
            process = subprocess.Popen(
                command, cwd=cwd, env=environment, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr,
                start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            raise BenchError(f"cannot start {command[0]}: {error}") from error
        try:
            with _MemorySampler(process.pid) as sampler:
                _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)  # reaped behind Popen's back: tell it
        except BaseException:
            _stop_session(process)
            raise
        ended = time.perf_counter()
        if sync_at is not None:
            sync_filesystem(sync_at)
        synced = time.perf_counter()
        busy = read_busy_seconds() - busy_before
        return Measurement(
            seconds=synced - start,
            sync_seconds=synced - ended,
            user_seconds=usage.ru_utime,
            system_seconds=usage.ru_stime,
            other_cpu_seconds=max(0.0, busy - usage.ru_utime - usage.ru_stime),
            largest_process_bytes=usage.ru_maxrss * 1024,
            peak_anonymous_bytes=sampler.peak_anonymous_bytes,
            peak_resident_bytes=sampler.peak_resident_bytes,
            exit_code=process.returncode,
            report=_last_json_object(_read_tail(stdout)),
            stderr_tail=_read_tail(stderr)[-2000:],
        )


def sync_filesystem(path: Path) -> None:
    """syncfs(2), which Python lacks; sync(2) where the C library has none."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "syncfs"):
        os.sync()
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        if libc.syncfs(descriptor) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), str(path))
    finally:
        os.close(descriptor)


class _MemorySampler:
    """Owns the thread that watches a process tree."""

    def __init__(self, pid: int) -> None:
        self.peak_anonymous_bytes = 0
        self.peak_resident_bytes = 0
        self._pid = pid
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(1 / SAMPLES_PER_SECOND):
            anonymous = resident = 0
            for pid in _process_tree(self._pid):
                fields = _memory_fields(pid)
                anonymous += fields.get("RssAnon", 0) + fields.get("RssShmem", 0)
                resident += fields.get("VmRSS", 0)
            self.peak_anonymous_bytes = max(self.peak_anonymous_bytes, anonymous)
            self.peak_resident_bytes = max(self.peak_resident_bytes, resident)


def _process_tree(root: int) -> list[int]:
    tree = [root]
    for pid in tree:  # grows while it is walked
        # A process may end between two reads; it then simply counts no more.
        with contextlib.suppress(OSError):
            for task in Path(f"/proc/{pid}/task").iterdir():
                with contextlib.suppress(OSError):
                    tree.extend(map(int, (task / "children").read_text().split()))
    return tree


def _memory_fields(pid: int) -> dict[str, int]:
    fields: dict[str, int] = {}
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            key, _, value = line.partition(":")
            if key in {"RssAnon", "RssShmem", "VmRSS"}:
                fields[key] = int(value.split()[0]) * 1024
    return fields


def _stop_session(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(ChildProcessError):
        process.wait()


def _read_tail(file: IO[bytes]) -> str:
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - TAIL_BYTES))
    return file.read().decode(errors="replace")


def _last_json_object(text: str) -> dict[str, Any]:
    for line in reversed(text.splitlines()):
        with contextlib.suppress(ValueError):
            value = json.loads(line)
            if isinstance(value, dict):
                return value
    return {}
