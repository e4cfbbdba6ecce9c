"""Reading tensor bytes at offsets into buffers that somebody else owns. Never a map of the file.

A `Source` holds the open files of one checkpoint. It is safe to use from several threads: every read names its offset.
"""

from __future__ import annotations

import errno
import mmap
import os
import threading
from collections.abc import Callable
from pathlib import Path

from streammerge.base.errors import InputError
from streammerge.storage.checkpoint import Checkpoint, open_file
from streammerge.storage.local import DIRECT_ALIGNMENT, RWF_DONTCACHE, Mode, drop_cached, reading_mode

_BOUNCE_BYTES = 8 << 20

# Pages that lie only partly in a range are not dropped with it.
_PAGE = 4096


class Source:
    """The files of one checkpoint, open for reading. Owns its descriptors; close it."""

    def __init__(self, checkpoint: Checkpoint, mode: Mode | None = None) -> None:
        """Open every file and check that it is still the one whose header was read. Raises InputError."""
        self.checkpoint = checkpoint
        self._mode = mode
        # The way each file is read: its own, as a shard may be a link to another file system.
        self.modes: list[Mode] = []
        self._bounce = threading.local()
        self._descriptors: list[int] = []
        try:
            for number in range(len(checkpoint.files)):
                self._descriptors.append(self._open(number))
        except BaseException:
            self.close()
            raise

    def read_into(self, buffer: memoryview, file: int, offset: int, *, keep_cached: bool = False) -> None:
        """Fill `buffer` with the bytes of `file` from `offset` on.

        `keep_cached` leaves them in the page cache for a later pass. Raises InputError when the file ends early or
        cannot be read.
        """
        read = self._read_direct if self.modes[file] == "direct" else self._read_plain
        done = 0
        while done < len(buffer):
            try:
                count = read(file, buffer[done:], offset + done, keep_cached)
            except OSError as error:
                if error.errno not in (errno.EIO, errno.ESTALE):
                    raise self._failed(file, offset + done, error) from error
                # A stale handle or a passing fault: once more through a fresh descriptor, then it is an error.
                self._reopen(file)
                try:
                    count = read(file, buffer[done:], offset + done, keep_cached)
                except OSError as again:
                    raise self._failed(file, offset + done, again) from again
            if count == 0:
                raise InputError(
                    f"{self.checkpoint.file_path(file)}: ends at byte {offset + done}, {len(buffer) - done} bytes "
                    f"before the tensor does. It was truncated; download it again."
                )
            done += count

    def check_unchanged(self) -> None:
        """Raise InputError if any file is not the one that was opened."""
        for number, descriptor in enumerate(self._descriptors):
            self._compare(number, os.fstat(descriptor))

    def close(self) -> None:
        for descriptor in self._descriptors:
            os.close(descriptor)
        self._descriptors = []

    def _read_plain(self, file: int, buffer: memoryview, offset: int, keep_cached: bool) -> int:
        descriptor = self._descriptors[file]
        if self.modes[file] == "dontcache" and not keep_cached:
            return os.preadv(descriptor, [buffer], offset, RWF_DONTCACHE)
        count = os.preadv(descriptor, [buffer], offset)
        if not keep_cached:
            drop_cached(descriptor, offset, count)
        return count

    def _read_direct(self, file: int, buffer: memoryview, offset: int, keep_cached: bool) -> int:
        bounce: mmap.mmap | None = getattr(self._bounce, "buffer", None)
        if bounce is None:
            bounce = self._bounce.buffer = mmap.mmap(-1, _BOUNCE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        lead = offset % DIRECT_ALIGNMENT
        want = min(len(buffer) + lead, _BOUNCE_BYTES)
        want += -want % DIRECT_ALIGNMENT
        with memoryview(bounce) as view:
            count = os.preadv(self._descriptors[file], [view[:want]], offset - lead)
            count = max(0, min(count - lead, len(buffer)))
            buffer[:count] = view[lead : lead + count]
        return count

    def _open(self, number: int) -> int:
        path = self.checkpoint.file_path(number)
        try:
            if number == len(self.modes):
                self.modes.append(self._mode or reading_mode(path))
            flags = os.O_RDONLY | (os.O_DIRECT if self.modes[number] == "direct" else 0)
            descriptor = os.open(path, flags)
        except OSError as error:
            raise InputError(f"{path}: cannot be read: {error.strerror}.") from error
        try:
            self._compare(number, os.fstat(descriptor))
        except InputError:
            os.close(descriptor)
            raise
        return descriptor

    def _reopen(self, number: int) -> None:
        header, _ = open_file(self.checkpoint.file_path(number))
        if header.digest != self.checkpoint.files[number].header:
            raise InputError(f"{self.checkpoint.file_path(number)}: its header changed while it was read.")
        fresh = self._open(number)
        # dup2 swaps the file under the same number: other threads may be reading through it.
        os.dup2(fresh, self._descriptors[number])
        os.close(fresh)

    def _compare(self, number: int, status: os.stat_result) -> None:
        known = self.checkpoint.files[number]
        if (status.st_size, status.st_mtime_ns) != (known.size, known.mtime_ns):
            raise InputError(
                f"{self.checkpoint.file_path(number)}: changed since its header was read (size {known.size} then, "
                f"{status.st_size} now). Leave the inputs alone while a merge runs, then run it again."
            )

    def _failed(self, file: int, offset: int, error: OSError) -> InputError:
        return InputError(f"{self.checkpoint.file_path(file)}: reading at byte {offset} failed: {error.strerror}.")


def hash_range(path: Path, offset: int, length: int, update: Callable[[memoryview], object], buffer: bytearray) -> None:
    """Feed `length` bytes of `path` from `offset` on to `update`, through `buffer`. Raises InputError.

    They are read from the disk, not from the page cache, unless another program has the file mapped.
    """
    try:
        with path.open("rb", buffering=0) as file:
            drop_cached(file.fileno(), max(0, offset - _PAGE), length + 2 * _PAGE)
            view = memoryview(buffer)
            done = 0
            while done < length:
                count = os.preadv(file.fileno(), [view[: min(len(view), length - done)]], offset + done)
                if count == 0:
                    raise InputError(f"{path}: ends at byte {offset + done}, {length - done} bytes too early.")
                update(view[:count])
                done += count
            drop_cached(file.fileno(), offset, length)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}.") from error
