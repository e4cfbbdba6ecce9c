"""Tensors that are made one after the other, in a file of their own, until all are known."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from streammerge.base.dtypes import DTYPES
from streammerge.base.errors import InputError
from streammerge.storage.header import make_header
from streammerge.storage.local import drop_cached
from streammerge.storage.sink import Shard, translate

_PIECE = 4 << 20
# Bytes that may wait to be on disk.
_UNSYNCED = 16 << 20


@dataclass(frozen=True)
class _Place:
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class Spill:
    """Tensors on disk in the order they came. Owns its file; close it, which removes it."""

    def __init__(self, path: Path) -> None:
        self._path, self._places, self._end, self._unsynced = path, dict[str, _Place](), 0, 0
        try:
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        except OSError as error:
            raise translate(path, error) from error

    def add(self, name: str, dtype: str, shape: tuple[int, ...], pieces: Iterable[memoryview]) -> None:
        """Keep a tensor, whose bytes come in pieces. Raises DoesNotFit, OutputError."""
        assert name not in self._places
        begin = self._end
        try:
            for piece in pieces:
                self._append(piece)
        except OSError as error:
            raise translate(self._path, error) from error
        self._places[name] = _Place(dtype, shape, begin, self._end - begin)

    def lay_out(self, path: Path, filled: Mapping[str, tuple[int, int]]) -> int:
        """Write a safetensors file of all tensors, as the library would; returns its size. Raises as `add` does.

        `filled` has the shapes of matrices that are filled up with zeros, at the end of rows and columns.
        """
        header, entries = make_header(
            (name, place.dtype, filled.get(name, place.shape)) for name, place in self._places.items()
        )
        shard = Shard(path, header, entries[-1].stop)
        buffer = memoryview(bytearray(_PIECE))
        unsynced = 0
        for entry in entries:
            place, start = self._places[entry.name], entry.start
            for piece in self._pieces(place, filled.get(entry.name, place.shape), buffer):
                shard.write(start, piece)
                start += len(piece)
                unsynced += len(piece)
                if unsynced >= _UNSYNCED:
                    shard.sync()
                    unsynced = 0
        shard.sync()
        shard.publish()
        return entries[-1].stop

    def close(self) -> None:
        os.close(self._descriptor)
        self._path.unlink(missing_ok=True)

    def _pieces(self, place: _Place, shape: tuple[int, ...], buffer: memoryview) -> Iterator[memoryview]:
        """The bytes of a tensor, filled up to `shape`. Each piece is there until the next is asked for."""
        if shape == place.shape:
            for start in range(0, place.nbytes, _PIECE):
                piece = buffer[: min(_PIECE, place.nbytes - start)]
                self._read(piece, place.offset + start)
                yield piece
            return
        size = DTYPES[place.dtype].itemsize
        (rows, columns), wide = place.shape, shape[1] * size
        row = memoryview(bytearray(wide))
        for number in range(shape[0]):
            row[:] = bytes(wide)
            if number < rows:
                self._read(row[: columns * size], place.offset + number * columns * size)
            yield row

    def _append(self, piece: memoryview) -> None:
        done = 0
        while done < len(piece):
            count = os.pwrite(self._descriptor, piece[done : done + _PIECE], self._end + done)
            done += count
            self._unsynced += count
            if self._unsynced >= _UNSYNCED:
                os.fdatasync(self._descriptor)
                drop_cached(self._descriptor, 0, 0)
                self._unsynced = 0
        self._end += len(piece)

    def _read(self, into: memoryview, offset: int) -> None:
        done = 0
        while done < len(into):
            count = os.preadv(self._descriptor, [into[done:]], offset + done)
            if count == 0:
                raise InputError(f"{self._path}: ends too early; something else has changed it.")
            done += count
