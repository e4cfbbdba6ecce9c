"""Writing output shards in place: made at full size, filled at planned offsets, shown under their names when complete.

open       NAME.partial: disk reserved, header written, its length replaced by a sentinel no reader accepts
write      pwrite at the offsets the header gave, in any order
sync       fdatasync: what was written before is on disk
publish    the true length, fsync, rename, fsync of the directory
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

from streammerge.base.errors import DoesNotFit, OutputError
from streammerge.storage.header import LENGTH_BYTES, UNFINISHED
from streammerge.storage.local import RWF_DONTCACHE, allocate, drop_cached, sync_directory, writing_mode

PARTIAL_SUFFIX = ".partial"


def partial_path(path: Path) -> Path:
    """The name a shard has until it is complete."""
    return path.with_name(path.name + PARTIAL_SUFFIX)


class Shard:
    """One output file while it is being filled. Owns its descriptor."""

    def __init__(self, path: Path, header: bytes, size: int) -> None:
        """Open `path`'s partial file, or make it. `header` begins the file, `size` is its final length in bytes.

        Raises DoesNotFit when the disk is full, OutputError for anything else.
        """
        self.path = path
        self._partial = partial_path(path)
        self._header = header
        try:
            self._descriptor = self._reopen(size) if self._partial.exists() else self._create(size)
            self._flags = RWF_DONTCACHE if writing_mode(self._descriptor) == "dontcache" else 0
        except OSError as error:
            raise translate(self._partial, error) from error

    def write(self, offset: int, data: memoryview) -> None:
        """Put `data` at byte `offset` of the file. Raises DoesNotFit or OutputError."""
        done = 0
        try:
            while done < len(data):
                done += os.pwritev(self._descriptor, [data[done:]], offset + done, self._flags)
        except OSError as error:
            raise translate(self._partial, error) from error

    def sync(self) -> None:
        """Return when everything written before is on disk. A failure is final: the dirty pages are gone."""
        try:
            os.fdatasync(self._descriptor)
            if not self._flags:
                drop_cached(self._descriptor, 0, 0)
        except OSError as error:
            raise translate(self._partial, error) from error

    def publish(self) -> None:
        """Turn the complete partial file into the shard. It is closed afterwards."""
        try:
            _write_at(self._descriptor, self._header[:LENGTH_BYTES], 0)
            os.fsync(self._descriptor)
            self.close()
            self._partial.rename(self.path)
            sync_directory(self.path.parent)
        except OSError as error:
            raise translate(self._partial, error) from error

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _create(self, size: int) -> int:
        # 0o666 and the umask, like any file a program makes: not the 0600 of a temporary one.
        descriptor = os.open(self._partial, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            allocate(descriptor, size)
            _write_at(descriptor, UNFINISHED + self._header[LENGTH_BYTES:], 0)
            # What the journal will say of this file counts only where its name is.
            sync_directory(self._partial.parent)
        except OSError:
            os.close(descriptor)
            self._partial.unlink()
            raise
        return descriptor

    def _reopen(self, size: int) -> int:
        descriptor = os.open(self._partial, os.O_RDWR)
        # A crash between create and the first sync can leave a short file or none of the header: write it again.
        if os.fstat(descriptor).st_size != size:
            os.ftruncate(descriptor, 0)
            allocate(descriptor, size)
        _write_at(descriptor, UNFINISHED + self._header[LENGTH_BYTES:], 0)
        return descriptor


def _write_at(descriptor: int, data: bytes, offset: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(descriptor, data[done:], offset + done)


def write_file(path: Path, content: bytes) -> None:
    """Make a small file durable under its final name in one step. Raises DoesNotFit or OutputError."""
    partial = partial_path(path)
    try:
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(descriptor)
        partial.rename(path)
        sync_directory(path.parent)
    except OSError as error:
        raise translate(path, error) from error


def free_bytes(directory: Path) -> int:
    """Bytes that a user without privileges may still write on the file system of `directory`."""
    status = os.statvfs(directory)
    return status.f_bavail * status.f_frsize


def translate(path: Path, error: OSError) -> DoesNotFit | OutputError:
    """What a failed write means for the user: a full disk (exit code 3), or a directory that cannot be written."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DoesNotFit(
            f"{path}: {error.strerror}. Finished tensors are kept: free some space and run the same command again."
        )
    return OutputError(f"{path}: cannot be written: {error.strerror}.")
