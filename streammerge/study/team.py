"""Several processes that make one analysis together, on one machine or many, over a folder that they share.

All run the same command and come to the same questions in the same order: what they ask next depends on scores alone.
The scores that a question needs are cut into parts; who claims a part sweeps it, and everybody reads what all have
found. The part of one that dies is taken by another once its claim is stale. Scores have the same bits whoever makes
them, and so have the decisions.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import xxhash

from streammerge.base.errors import Stopped
from streammerge.run.claims import BEATS, STALE_SECONDS, Claims, Heart
from streammerge.storage.sink import translate
from streammerge.study.scorebook import Scorebook

if TYPE_CHECKING:
    from streammerge.study.sweep import Job

_POLL_SECONDS = 0.5


class Team:
    """One of the processes. `parts` is into how many parts they cut what is to be scored: about their number."""

    def __init__(self, folder: Path, worker: str, parts: int, heart: Heart, stale_seconds: float) -> None:
        self.folder, self.parts = folder, parts
        self._worker, self._heart = f"{worker}.{os.getpid()}", heart
        self._claims = Claims(folder / "claims", stale_seconds)

    def open_book(self, context: str) -> SharedBook:
        """The scores of all. Its owner closes it."""
        return SharedBook(self.folder / "scores", self._worker, context)

    def turns(self, jobs: Sequence[Job], book: Scorebook, stopping: Callable[[], bool]) -> Iterator[list[Job]]:
        """Parts of `jobs` that are ours to score, one after the other; at the end all of them are in the book.

        What is yielded must be in the book when the next is asked for. Raises Stopped once `stopping()` is true.
        """
        parts = _cut(jobs, self.parts)
        while True:
            book.refresh()
            left = [part for part in parts if any(job.key not in book for job in part)]
            if not left:
                return
            if stopping():
                raise Stopped("Stopped. Finished scores are saved: run the same command again to go on.")
            for part in left:
                name = xxhash.xxh3_128_hexdigest("\n".join(job.key for job in part).encode())
                if (claim := self._claims.take(name, self._worker)) is not None:
                    with self._heart.holding(claim):
                        # Between our look and our claim another may have scored it.
                        book.refresh()
                        yield [job for job in part if job.key not in book]
                    break
            else:
                time.sleep(_POLL_SECONDS)

    @contextmanager
    def alone(self, what: str) -> Iterator[None]:
        """Run the body while none of the others does: for files that all of them write."""
        while (claim := self._claims.take(what, self._worker)) is None:
            time.sleep(_POLL_SECONDS / 5)
        with self._heart.holding(claim):
            yield


@contextmanager
def open_team(folder: Path, worker: str, parts: int, stale_seconds: float = STALE_SECONDS) -> Iterator[Team]:
    """Join the team of an analysis that keeps what it found in `folder`."""
    try:
        for name in ("claims", "scores"):
            (folder / name).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise translate(folder, error) from error
    with Heart(stale_seconds / BEATS) as heart:
        yield Team(folder, worker, parts, heart, stale_seconds)


class SharedBook(Scorebook):
    """A scorebook of which every process writes a file of its own and reads those of all."""

    def __init__(self, folder: Path, worker: str, context: str) -> None:
        super().__init__(folder / f"{worker}.jsonl", context)
        self._folder = folder
        self._own = folder / f"{worker}.jsonl"
        self._read_to: dict[Path, int] = {}
        self.refresh()

    def refresh(self) -> None:
        """Take in what others have written since. A line that is not complete yet is left for the next time."""
        for path in sorted(self._folder.glob("*.jsonl")):
            if path == self._own:
                continue
            before = self._read_to.get(path, 0)
            with path.open("rb") as file:
                file.seek(before)
                self._read_to[path] = before + self._read(file.read())


def _cut(jobs: Sequence[Job], count: int) -> list[list[Job]]:
    """Parts of about the same cost. Those of one task stay together as far as may be: they share streams."""
    ordered = sorted(jobs, key=lambda job: job.task.name)
    total = sum(job.task.num_tokens for job in ordered)
    parts: list[list[Job]] = [[] for _ in range(count)]
    done = 0
    for job in ordered:
        parts[min(count - 1, done * count // max(1, total))].append(job)
        done += job.task.num_tokens
    return [part for part in parts if part]
