"""Claims: who of many processes on many machines does what, in small files on a file system that they share.

A claim is a file that was made exclusively and is touched while its owner lives. It saves work and decides nothing: an
owner that is thought dead may not be, so that what is done under a claim must be right when it is done twice. Ages are
measured by the clock of the file system; those of machines differ.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from streammerge.storage.sink import translate

# An owner that is not heard of for so long counts as dead; the heart beats twelve times in it.
STALE_SECONDS = 180.0
BEATS = 12


@dataclass(frozen=True)
class Claimed:
    """What is claimed, by whom, and how many seconds ago something was heard of them."""

    name: str
    worker: str
    age: float


class Claim:
    """A claim of ours. Owns its descriptor: touched through it, so that nobody else's is once it is stolen."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self._path, self._descriptor = path, descriptor

    def touch(self) -> None:
        os.utime(self._descriptor)

    def release(self) -> None:
        """Give it back, unless it was taken from us."""
        try:
            if self._path.stat().st_ino == os.fstat(self._descriptor).st_ino:
                self._path.unlink()
        except OSError:
            # Stolen, which network file systems call stale; or everything is over and its folder gone.
            pass
        finally:
            os.close(self._descriptor)


class Claims:
    """All claims in one folder, which is there. Raises OutputError and DoesNotFit."""

    def __init__(self, folder: Path, stale_seconds: float = STALE_SECONDS) -> None:
        self.folder, self.stale_seconds = folder, stale_seconds

    def take(self, name: str, worker: str, *, steal: bool = False) -> Claim | None:
        """Take the claim of that name, or one that is stale or its worker's own from before; None if others have it.

        With `steal` it is taken whoever has it. Raises FileNotFoundError when the folder is gone.
        """
        path = self.folder / name
        try:
            if (claim := _make(path, worker)) is not None:
                return claim
            found = self._read(path)
            if found is None:
                return _make(path, worker)
            if not steal and found.worker != worker and found.age < self.stale_seconds:
                return None
            # Of several thieves one has the file to rename.
            stolen = path.with_name(f".{name}.{worker}.{os.getpid()}.{threading.get_ident()}")
            path.rename(stolen)
            stolen.unlink()
            return _make(path, worker)
        except FileNotFoundError:
            if not self.folder.is_dir():
                raise
            return None
        except OSError as error:
            raise translate(path, error) from error

    def all(self) -> list[Claimed]:
        """All claims there are."""
        found = [self._read(path) for path in sorted(self.folder.glob("[!.]*"))]
        return [each for each in found if each is not None]

    def now(self) -> float:
        """What time it is for the file system; by our own clock where we cannot write, 0 when the folder is gone."""
        path = self.folder / f".clock.{socket.gethostname()}.{os.getpid()}.{threading.get_ident()}"
        try:
            path.touch()
            now = path.stat().st_mtime
            path.unlink()
        except FileNotFoundError:
            return 0.0
        except OSError:
            # Who may only look decides nothing by it.
            return time.time()
        return now

    def _read(self, path: Path) -> Claimed | None:
        try:
            worker, touched = path.read_text(), path.stat().st_mtime
        except (FileNotFoundError, UnicodeDecodeError):
            return None
        return Claimed(path.name, worker, self.now() - touched)


class Heart:
    """Touches claims while they are held, and calls `beat`, in a thread."""

    def __init__(self, seconds: float, beat: Callable[[], None] = lambda: None) -> None:
        self._seconds, self._beat = seconds, beat
        self._claims: list[Claim] = []
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._work, name="heart", daemon=True)

    def __enter__(self) -> Heart:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()

    @contextmanager
    def holding(self, claim: Claim) -> Iterator[None]:
        """Keep a claim alive while the body runs, and give it back."""
        with self._lock:
            self._claims.append(claim)
        try:
            yield
        finally:
            with self._lock:
                self._claims.remove(claim)
            claim.release()

    def _work(self) -> None:
        while not self._over.wait(self._seconds):
            with self._lock:
                for claim in self._claims:
                    # One that was stolen is stale on network file systems; the others must live on.
                    with suppress(OSError):
                        claim.touch()
            self._beat()


def _make(path: Path, worker: str) -> Claim | None:
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
    except FileExistsError:
        return None
    os.write(descriptor, worker.encode())
    return Claim(path, descriptor)
