"""Ways to break a run from inside: its calls to the system are counted, killed at, made to fail, or cut short.

Each is a function that a forked child calls before it runs the command (tests/run/zygote.py). Calls are those of `os`
through which a merge reads and writes, and fallocate; what Python's own files do is not among them.
"""

from __future__ import annotations

import errno
import json
import os
import pathlib
import pickle
import random
import signal
import stat
import time
from collections import Counter
from collections.abc import Callable
from threading import Lock, RLock, Thread
from typing import Any

from streammerge.storage import local

WRITES = ("pwritev", "pwrite", "write")
READS = ("preadv",)
SYNCS = ("fdatasync", "fsync")
OTHERS = ("ftruncate", "fallocate", "rename", "replace", "link", "unlink", "mkdir", "open")
CALLS = (*WRITES, *READS, *SYNCS, *OTHERS)
CHANGES = tuple(call for call in CALLS if call not in READS)
PAGE = 4096

Before = Callable[[str, Callable[..., Any], tuple[Any, ...]], Any]
_GO_ON = object()


def count(file: str) -> None:
    """Write how often each call was made to `file`, as JSON, when the run ends."""
    counts: Counter[str] = Counter()

    def before(name: str, _call: Callable[..., Any], _arguments: tuple[Any, ...]) -> Any:
        counts[name] += 1
        return _GO_ON

    _wrap(CALLS, before)
    leave = os._exit

    def leaving(code: int) -> None:
        pathlib.Path(file).write_text(json.dumps(counts))
        leave(code)

    os._exit = leaving  # type: ignore[assignment]


def kill_at(number: int) -> None:
    """Kill the process before its call `number` of `CHANGES`."""

    def before(_name: str, _call: Callable[..., Any], _arguments: tuple[Any, ...]) -> Any:
        _die()

    _wrap(CHANGES, _at(number, before))


def kill_in_write(number: int) -> None:
    """Kill the process when half of its write `number` is done."""

    def before(name: str, call: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        call(*_shortened(name, arguments, 0.5))
        _die()

    _wrap(WRITES, _at(number, before))


def kill_after(seconds: float) -> None:
    """Kill the process some time from now, wherever it is then."""

    def wait() -> None:
        time.sleep(seconds)
        _die()

    Thread(target=wait, daemon=True).start()


def fail(call: str, code: str, number: int, lasting: bool, told: str) -> None:
    """Call `number` of a kind fails, and with `lasting` all that follow. The file `told` says if it came to that."""
    teller, tell = os.open(told, os.O_WRONLY | os.O_CREAT, 0o600), os.write

    def before(_name: str, _call: Callable[..., Any], _arguments: tuple[Any, ...]) -> Any:
        tell(teller, b"failed\n")
        raise OSError(getattr(errno, code), os.strerror(getattr(errno, code)))

    _wrap((call,), _at(number, before, lasting=lasting))


def shorten(seed: int) -> None:
    """Every read and write moves a random part of what was asked, and at least a byte."""
    chance = random.Random(seed)

    def before(name: str, call: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        return call(*_shortened(name, arguments, chance.random()))

    # write is left out: Python's own files are written through it only where it is asked for all.
    _wrap(("pwritev", "pwrite", "preadv"), before)


def power_cut(number: int, survives: str, seed: int, out: str) -> None:
    """The machine loses power at change `number`: what was not synced is lost, and the folder `out` says so afterwards.

    `survives` is what is on disk of the rest: "nothing", the "names" of files, or some "pages" of their contents, too.
    """
    disk = _Disk(pathlib.Path(out))

    def before(name: str, call: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        if name in SYNCS:
            result = call(*arguments)
            disk.synced(arguments[0])
            return result
        if name == "unlink":
            disk.removed(pathlib.Path(arguments[0]))
        return _GO_ON

    def cut(_name: str, _call: Callable[..., Any], _arguments: tuple[Any, ...]) -> Any:
        pathlib.Path(f"{out}.disk").write_bytes(pickle.dumps(disk.after(survives, random.Random(seed))))
        _die()

    at = _at(number, cut)
    # One change at a time, so that nothing moves while the power goes.
    lock = RLock()

    def both(name: str, call: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        with lock:
            at(name, call, arguments)
            found = before(name, call, arguments)
            return call(*arguments) if found is _GO_ON else found

    _wrap(CHANGES, both)


class _Content:
    """What a sync has made sure of in one file."""

    def __init__(self) -> None:
        self.data = b""


class _Disk:
    """What is safe of a folder and the folders in it: names when their folder was synced, bytes when their file was."""

    def __init__(self, out: pathlib.Path) -> None:
        self._out = out
        self._contents: dict[int, _Content] = {}
        self._names: dict[pathlib.Path, dict[str, _Content]] = {}

    def synced(self, descriptor: int) -> None:
        status = os.fstat(descriptor)
        path = pathlib.Path(f"/proc/self/fd/{descriptor}")
        if stat.S_ISDIR(status.st_mode):
            self._names[path.resolve()] = self._listing(path.resolve())
        else:
            self._content(status.st_ino).data = path.read_bytes()

    def removed(self, path: pathlib.Path) -> None:
        # The number of its inode may be another file's soon.
        if path.exists():
            self._contents.pop(path.stat().st_ino, None)

    def after(self, survives: str, chance: random.Random) -> dict[str, bytes]:
        """The files there are when the power is back, by their paths in the folder."""
        folders = [path for path in (self._out, *self._out.rglob("*")) if path.is_dir()]
        files: dict[str, bytes] = {}
        for folder in folders:
            names = self._names.get(folder.resolve(), {}) if survives == "nothing" else self._listing(folder)
            for name, content in names.items():
                data = content.data
                if survives != "nothing":
                    data = self._mixed(data, (folder / name).read_bytes(), chance if survives == "pages" else None)
                files[str((folder / name).relative_to(self._out))] = data
        return files

    def _mixed(self, safe: bytes, now: bytes, chance: random.Random | None) -> bytes:
        old = safe[: len(now)].ljust(len(now), b"\0")
        if chance is None:
            return old
        pages = range(0, len(now), PAGE)
        return b"".join((now if chance.random() < 0.5 else old)[page : page + PAGE] for page in pages)

    def _listing(self, folder: pathlib.Path) -> dict[str, _Content]:
        return {path.name: self._content(path.stat().st_ino) for path in folder.iterdir() if path.is_file()}

    def _content(self, inode: int) -> _Content:
        return self._contents.setdefault(inode, _Content())


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def _at(number: int, then: Before, *, lasting: bool = False) -> Before:
    """`then` at the call of that number, counted over all kinds that are wrapped and from 1."""
    made = 0
    lock = Lock()

    def before(name: str, call: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        nonlocal made
        with lock:
            made += 1
            here = made == number or (lasting and made > number)
        return then(name, call, arguments) if here else _GO_ON

    return before


def _shortened(name: str, arguments: tuple[Any, ...], share: float) -> tuple[Any, ...]:
    """The arguments of a read or write of a part of the bytes."""
    descriptor, data, *rest = arguments
    view = memoryview(data[0] if name in ("preadv", "pwritev") else data)
    part = view[: max(1, int(len(view) * share))] if view else view
    return (descriptor, [part] if name in ("preadv", "pwritev") else part, *rest)


def _wrap(calls: tuple[str, ...], before: Before) -> None:
    """Put `before` in the way of calls: it goes on, or gives the result itself, or raises."""

    def wrapped(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def instead(*arguments: Any, **named: Any) -> Any:
            found = before(name, lambda *given: call(*given, **named), arguments)
            return call(*arguments, **named) if found is _GO_ON else found

        return instead

    for name in calls:
        # pathlib and shutil come here, too.
        where = local if name == "fallocate" else os
        setattr(where, name, wrapped(name, getattr(where, name)))
