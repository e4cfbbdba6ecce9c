"""Hidden states between two units: in memory, or in files when they are told to spill.

A stream is what one version of the units so far made of a task's batches. Its tensors are put and taken batch by batch;
where a stream has one successor, that takes its place as it goes.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from torch import Tensor

from streammerge.base.errors import StreamMergeError
from streammerge.storage.sink import translate

_DONE = "unit-done.json"


class Streams:
    """Hidden states of one wave, by stream and batch, in memory or in one file per stream under `folder`."""

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._tensors: dict[tuple[str, int], Tensor] = {}
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    def put(self, stream: str, batch: int, hidden: Tensor) -> None:
        if self._folder is None:
            self._tensors[stream, batch] = hidden.to("cpu")
            return
        path = self._path(stream, batch)
        try:
            path.write_bytes(hidden.to("cpu").contiguous().view(torch.uint8).numpy().tobytes())
        except OSError as error:
            raise translate(path, error) from error

    def get(self, stream: str, batch: int, shape: tuple[int, ...]) -> Tensor:
        """The hidden states, float32, of a shape the caller knows."""
        if self._folder is None:
            return self._tensors[stream, batch]
        path = self._path(stream, batch)
        hidden = torch.empty(shape, dtype=torch.float32)
        view = hidden.view(-1).view(torch.uint8).numpy().data
        with path.open("rb", buffering=0) as file:
            if file.readinto(view) != len(view):
                raise StreamMergeError(f"{path}: is shorter than it was written; remove {self._folder} and run again.")
        return hidden

    def drop(self, stream: str, batch: int) -> None:
        """The stream's batch is not needed any more. In files it stays until its unit is done."""
        if self._folder is None:
            self._tensors.pop((stream, batch), None)

    def unit_done(self, identity: str, unit: int, kept: set[str]) -> None:
        """Remember that everything up to `unit` is computed, and forget all streams but `kept`."""
        if self._folder is None:
            return
        temporary = self._folder / f"{_DONE}.new"
        temporary.write_text(json.dumps({"wave": identity, "unit": unit}))
        temporary.replace(self._folder / _DONE)
        for path in self._folder.glob("*.hidden"):
            if path.name.rsplit(".", 2)[0] not in kept:
                path.unlink()

    def resume_at(self, identity: str) -> int:
        """The first unit that is still to be computed of the wave `identity`: 0 unless files of it are there."""
        if self._folder is None or not (self._folder / _DONE).exists():
            return 0
        try:
            content = json.loads((self._folder / _DONE).read_text())
        except ValueError:
            return 0
        known = isinstance(content, dict) and content.get("wave") == identity
        return int(content["unit"]) + 1 if known else 0

    def close(self) -> None:
        """Remove everything."""
        self._tensors.clear()
        if self._folder is not None:
            for path in [*self._folder.glob("*.hidden"), self._folder / _DONE]:
                path.unlink(missing_ok=True)
            self._folder.rmdir()

    def _path(self, stream: str, batch: int) -> Path:
        assert self._folder is not None
        return Path(os.path.join(self._folder, f"{stream}.{batch}.hidden"))  # noqa: PTH118 - called millions of times
