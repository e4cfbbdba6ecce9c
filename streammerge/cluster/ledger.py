"""The ledger: who works on which unit and what is done, in small files that every worker sees.

    claims/N     somebody works on unit N (run/claims.py). Saves work, decides nothing
    attempts/…   a shard while one worker makes it, under a name no other attempt has
    done/N       unit N is done, and by which attempt. Made complete and exclusively, by link(2): the first one counts
    failed/N     unit N failed with an error of the input or the recipe, which would come again
    workers/…    what each worker does and has done

Committing: the attempt is complete and synced; done/N is linked; the attempt is renamed to the shard. Whoever finds
done/N without its shard finishes the renaming. Two attempts at one unit do happen and harm nothing: they have the same
bytes, one counts, the other is deleted.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from streammerge.base.errors import OutputError
from streammerge.base.fields import made_of
from streammerge.run.claims import Claims
from streammerge.run.journal import Done, read_done
from streammerge.storage.lines import checked_line, read_lines
from streammerge.storage.local import sync_directory
from streammerge.storage.sink import translate

FOLDERS = ("claims", "attempts", "done", "failed", "workers")


@dataclass(frozen=True)
class Committed:
    """A unit that is done: by which attempt ("" where the shard had its name before), by whom, and its tensors."""

    unit: int
    attempt: str
    worker: str
    seconds: float
    read_bytes: int
    written_bytes: int
    tensors: tuple[Done, ...]


@dataclass(frozen=True)
class Failed:
    """A unit that failed: the error, its exit code, and whose it was."""

    unit: int
    error: str
    exit_code: int
    worker: str


class Ledger:
    """The ledger in one folder. Knows nothing of plans. Raises OutputError and DoesNotFit."""

    def __init__(self, folder: Path, *, stale_seconds: float) -> None:
        self.folder = folder
        self.claims = Claims(folder / "claims", stale_seconds)
        self._known: dict[int, Committed] = {}

    def is_done(self, unit: int) -> bool:
        return unit in self._known or self._path("done", unit).exists()

    def done(self) -> dict[int, Committed]:
        """All units that are done. Raises OutputError when what is written of one is damaged."""
        for unit, path in self._numbered("done"):
            if unit not in self._known:
                self._known[unit] = _read_committed(path, unit)
        return dict(self._known)

    def attempt_path(self, attempt: str) -> Path:
        return self.folder / "attempts" / attempt

    def commit(self, committed: Committed, shard: Path) -> bool:
        """Make a complete and synced attempt count and give it the name `shard`; False, and deleted, if another did."""
        attempt = self.attempt_path(committed.attempt)
        won = self._write_commit(committed)
        if won:
            self.settle(committed, shard)
        else:
            attempt.unlink(missing_ok=True)
        return won

    def take(self, unit: int, tensors: Sequence[Done]) -> None:
        """Count a unit whose shard has its name already."""
        self._write_commit(Committed(unit, "", "", 0.0, 0, 0, tuple(tensors)))

    def settle(self, committed: Committed, shard: Path) -> None:
        """Give the attempt that counts the name of its shard, unless it has it. Returns when that is durable."""
        try:
            if not committed.attempt:
                raise FileNotFoundError
            self.attempt_path(committed.attempt).rename(shard)
            sync_directory(shard.parent)
        except FileNotFoundError:
            # It has its name already; or it is gone, and then so is the unit's being done.
            if not shard.exists():
                raise OutputError(
                    f"{shard}: is gone, and so is the attempt that made it. Remove {self._path('done', committed.unit)}"
                    " and submit the merge again: this shard is then made again."
                ) from None
        except OSError as error:
            raise translate(shard, error) from error

    def fail(self, failed: Failed) -> None:
        """Write down that a unit failed."""
        self._create(self._path("failed", failed.unit), checked_line(asdict(failed)), failed.worker)

    def failed(self) -> dict[int, Failed]:
        """All units that failed. What is damaged does not count."""
        found = {}
        for unit, path in self._numbered("failed"):
            lines, _ = read_lines(path.read_bytes())
            failed = made_of(Failed, lines[0]) if lines else None
            if failed is not None and failed.unit == unit:
                found[unit] = failed
        return found

    def forgive(self) -> None:
        """Forget all failures: the user has asked again."""
        for _, path in self._numbered("failed"):
            path.unlink(missing_ok=True)

    def note_worker(self, name: str, facts: dict[str, Any]) -> None:
        """Write down what a worker does. Replaces what it said before."""
        path = self.folder / "workers" / f"{name}.json"
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(facts))
        partial.replace(path)

    def workers(self) -> list[tuple[Any, float]]:
        """What every worker said last, as it stands there, and how many seconds ago."""
        now = self.claims.now()
        found = []
        for path in sorted((self.folder / "workers").glob("*.json")):
            with contextlib.suppress(OSError, ValueError, RecursionError):
                found.append((json.loads(path.read_text()), now - path.stat().st_mtime))
        return found

    def is_gone(self) -> bool:
        """Whether the run is over and its folder removed."""
        return not self.claims.folder.is_dir()

    def replace(self, path: Path, content: bytes, worker: str) -> None:
        """Write a small file that several workers may write, each with the same content."""
        partial = path.with_name(f"{path.name}.{worker}.{os.getpid()}")
        try:
            _write_synced(partial, content)
            partial.replace(path)
            sync_directory(path.parent)
        except OSError as error:
            raise translate(path, error) from error

    def _create(self, path: Path, content: bytes, worker: str) -> bool:
        """Make a file that appears complete, on the disk, and only once. False if it was there."""
        partial = self.folder / "attempts" / f"{path.parent.name}-{path.name}.{worker}.{os.getpid()}.{time.time_ns()}"
        try:
            _write_synced(partial, content)
            try:
                os.link(partial, path)
            except FileExistsError:
                # NFS may say so of a link that it has made itself, a moment before: every attempt has its own content.
                return path.read_bytes() == content
            finally:
                partial.unlink(missing_ok=True)
            sync_directory(path.parent)
        except OSError as error:
            raise translate(path, error) from error
        return True

    def _write_commit(self, committed: Committed) -> bool:
        """Write down that a unit is done. False if it was already, by another attempt."""
        lines = [asdict(committed) | {"tensors": len(committed.tensors)}, *map(asdict, committed.tensors)]
        return self._create(self._path("done", committed.unit), b"".join(map(checked_line, lines)), committed.worker)

    def _path(self, folder: str, unit: int) -> Path:
        return self.folder / folder / f"{unit:05d}"

    def _numbered(self, folder: str) -> list[tuple[int, Path]]:
        """The files of units in a folder."""
        return [(int(path.name), path) for path in sorted((self.folder / folder).glob("[0-9]" * 5))]


def _write_synced(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _read_committed(path: Path, unit: int) -> Committed:
    try:
        lines, _ = read_lines(path.read_bytes())
    except OSError as error:
        raise OutputError(f"{path}: cannot be read: {error.strerror}.") from error
    tensors = [done for line in lines[1:] if (done := read_done(line)) is not None]
    if lines and lines[0].get("tensors") == len(tensors) == len(lines) - 1:
        committed = made_of(Committed, lines[0] | {"tensors": tuple(tensors)})
        if committed is not None and committed.unit == unit and Path(committed.attempt).name == committed.attempt:
            return committed
    raise OutputError(f"{path}: is damaged. Remove it and submit the merge again: this shard is then made again.")
