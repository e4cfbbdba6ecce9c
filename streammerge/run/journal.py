"""The journal: which tensors are safely on disk, one line each, so that a merge can go on after anything.

    OUT/.streammerge/plan.json   the facts and digest of the plan, written before anything else
    OUT/.streammerge/journal     checksum, then JSON, per line: a tensor whose bytes were synced before the line was
    OUT/.streammerge/lock        held while a merge runs

A line that is torn or damaged ends the journal: what follows it is not trusted and is cut off.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from streammerge.storage.lines import checked_line, read_lines
from streammerge.storage.local import sync_directory
from streammerge.storage.sink import translate

WORK_FOLDER = ".streammerge"


@dataclass(frozen=True)
class Done:
    """One finished tensor: its checksum, and how many elements of each input and of the result are not finite."""

    tensor: str
    xxh3_128: str
    nonfinite_inputs: tuple[int, ...] = ()
    nonfinite_output: int = 0


class Record(Protocol):
    """Where finished tensors are written down."""

    def append(self, tensors: Sequence[Done]) -> None:
        """Record tensors whose bytes are on disk."""


class Journal:
    """The journal file of one output directory, open for appending. Owns its descriptor."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.done: dict[str, Done] = {}
        try:
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            content = path.read_bytes()
            sound = self._read(content)
            os.ftruncate(self._descriptor, sound)
            os.lseek(self._descriptor, sound, os.SEEK_SET)
            sync_directory(path.parent)
        except OSError as error:
            raise translate(path, error) from error

    def append(self, tensors: Sequence[Done]) -> None:
        """Record tensors whose bytes are on disk. Returns when the lines are, too."""
        text = b"".join(checked_line(asdict(done)) for done in tensors)
        try:
            written = 0
            while written < len(text):
                written += os.write(self._descriptor, text[written:])
            os.fdatasync(self._descriptor)
        except OSError as error:
            raise translate(self._path, error) from error
        self.done |= {done.tensor: done for done in tensors}

    def keep(self, tensors: Sequence[Done]) -> None:
        """Forget every tensor but these. A crash on the way forgets more, never less."""
        try:
            os.ftruncate(self._descriptor, 0)
            os.fdatasync(self._descriptor)
            os.lseek(self._descriptor, 0, os.SEEK_SET)
        except OSError as error:
            raise translate(self._path, error) from error
        self.done = {}
        self.append(tensors)

    def close(self) -> None:
        os.close(self._descriptor)

    def _read(self, content: bytes) -> int:
        """Take in the sound lines; returns the bytes they take, 0 where one of them is not of a journal."""
        lines, sound = read_lines(content)
        found: dict[str, Done] = {}
        for fields in lines:
            done = read_done(fields)
            if done is None:
                return 0
            found[done.tensor] = done
        self.done = found
        return sound


def read_done(fields: dict[str, Any]) -> Done | None:
    """What a line says, or None if it is no journal's."""
    try:
        done = Done(**fields | {"nonfinite_inputs": tuple(fields["nonfinite_inputs"])})
    except (KeyError, TypeError):
        # Sound, and of something else.
        return None
    counts = (*done.nonfinite_inputs, done.nonfinite_output)
    texts = isinstance(done.tensor, str) and isinstance(done.xxh3_128, str)
    return done if texts and all(type(count) is int for count in counts) else None
