"""What every variant said to every task, kept in a file as it comes, so that a killed analysis goes on.

A line is a checksum and JSON, as in the journal of a merge; what follows a damaged line is not trusted.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from streammerge.base.errors import OutputError
from streammerge.storage.lines import checked_line, read_lines
from streammerge.storage.local import try_lock
from streammerge.storage.sink import translate


@dataclass(frozen=True)
class Score:
    """Per example: the log-probability of each choice, and the mean distance (KL) from a reference, where asked for."""

    log_probs: tuple[tuple[float, ...], ...]
    distances: tuple[float, ...] = ()


class Scorebook:
    """Scores by key, in memory and in a file. Owns its descriptor.

    `context` names what else decides a score, besides what its key names: scores of another context are not seen.
    """

    def __init__(self, path: Path | None, context: str = "") -> None:
        self._context = context
        self._scores: dict[str, Score] = {}
        self._descriptor: int | None = None
        self._path = path
        if path is None:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            self._lock(path)
            sound = self._read(path.read_bytes())
            os.ftruncate(self._descriptor, sound)
            os.lseek(self._descriptor, sound, os.SEEK_SET)
        except OSError as error:
            raise translate(path, error) from error

    def __contains__(self, key: str) -> bool:
        return self._context + key in self._scores

    def __getitem__(self, key: str) -> Score:
        return self._scores[self._context + key]

    def __len__(self) -> int:
        return len(self._scores)

    def add(self, key: str, score: Score) -> None:
        """Remember a score; it is safe on disk after the next `sync`."""
        self._scores[self._context + key] = score
        if self._descriptor is None:
            return
        fields = {"key": self._context + key, "log_probs": score.log_probs, "distances": score.distances}
        line = checked_line(fields)
        try:
            while line:
                line = line[os.write(self._descriptor, line) :]
        except OSError as error:
            assert self._path is not None
            raise translate(self._path, error) from error

    def refresh(self) -> None:
        """Take in what other processes have written: nobody else writes to this one."""

    def sync(self) -> None:
        if self._descriptor is not None:
            os.fdatasync(self._descriptor)

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _lock(self, path: Path) -> None:
        """Hold the file for this process alone: two that write to it would tear each other's lines."""
        assert self._descriptor is not None
        if not try_lock(self._descriptor):
            self.close()
            raise OutputError(f"{path}: another analysis is writing to it. Wait for it, or choose another place.")

    def _read(self, content: bytes) -> int:
        lines, sound = read_lines(content)
        try:
            for fields in lines:
                log_probs = tuple(tuple(map(float, values)) for values in fields["log_probs"])
                self._scores[str(fields["key"])] = Score(log_probs, tuple(map(float, fields["distances"])))
        except (KeyError, TypeError, ValueError):
            self.close()
            raise OutputError(f"{self._path}: holds a line that is no score. Remove it, or choose another.") from None
        return sound
