"""Local files: which way of reading and writing a mount does best, and a few calls Python does not have.

Three ways, tried in this order for each file system:

    dontcache   preadv and pwritev with RWF_DONTCACHE (Linux 6.14): no alignment rules, the page cache does not grow
    direct      O_DIRECT through an aligned bounce buffer, for reading on local block devices of older kernels
    buffered    plain calls; what was read is dropped from the cache behind the reader with posix_fadvise
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import sys
from pathlib import Path
from typing import Literal

Mode = Literal["dontcache", "direct", "buffered"]

RWF_DONTCACHE = 0x80
DIRECT_ALIGNMENT = 4096
# File systems on a local block device, where O_DIRECT is known to behave (numbers of statfs(2)).
_DIRECT_MAGIC = {0xEF53: "ext4", 0x58465342: "xfs", 0x9123683E: "btrfs"}
_LINUX = sys.platform == "linux"
_libc = ctypes.CDLL(None, use_errno=True) if _LINUX else None


def reading_mode(path: Path) -> Mode:
    """The best way to read files beside `path`, found by trying it on `path` itself."""
    if not _LINUX:
        return "buffered"
    descriptor = os.open(path, os.O_RDONLY)
    try:
        page = mmap.mmap(-1, DIRECT_ALIGNMENT)
        try:
            os.preadv(descriptor, [page], 0, RWF_DONTCACHE)
            return "dontcache"
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                raise
        return "direct" if _file_system(descriptor) in _DIRECT_MAGIC and _opens_direct(path) else "buffered"
    finally:
        os.close(descriptor)


def writing_mode(descriptor: int) -> Mode:
    """The best way to write to this open file: dontcache where the file system has it, else buffered."""
    if not _LINUX:
        return "buffered"
    try:
        os.pwritev(descriptor, [b""], 0, RWF_DONTCACHE)
        return "dontcache"
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise
        return "buffered"


def allocate(descriptor: int, size: int) -> None:
    """Reserve `size` bytes of disk for an empty file, without writing them where the file system can.

    Raises OSError (ENOSPC, EDQUOT) when there is no room.
    """
    if _libc is not None:
        try:
            fallocate(descriptor, size)
            return
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS):
                raise
    os.ftruncate(descriptor, size)


def fallocate(descriptor: int, size: int) -> None:
    """fallocate(2), which os.posix_fallocate is not: that writes zeros where it is missing, minutes for a shard."""
    assert _libc is not None
    while _libc.fallocate(descriptor, 0, ctypes.c_int64(0), ctypes.c_int64(size)) != 0:
        code = ctypes.get_errno()
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code))


def drop_cached(descriptor: int, offset: int, length: int) -> None:
    """Tell the kernel that these bytes will not be read again soon."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, offset, length, os.POSIX_FADV_DONTNEED)


def is_file(path: Path) -> bool:
    """Whether there is a regular file at `path`, also where no file can have such a name."""
    try:
        return path.is_file()
    except OSError:
        # A name that is too long.
        return False


def try_lock(descriptor: int) -> bool:
    """Lock an open file for this process, until it is closed; False if another process holds it.

    Some network file systems have no locks: then nobody is kept out, and nobody can be.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
    return True


def sync_directory(path: Path) -> None:
    """Make renames and new names in `path` durable."""
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0))
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _opens_direct(path: Path) -> bool:
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_DIRECT))
        return True
    except OSError:
        return False


def _file_system(descriptor: int) -> int:
    assert _libc is not None
    buffer = (ctypes.c_long * 32)()
    return int(buffer[0]) & 0xFFFFFFFF if _libc.fstatfs(descriptor, buffer) == 0 else 0
