"""A file system of our own for the outputs: ext4 in a file, through a loop device.

The first write to a block of a virtual disk can be several times slower than the next, so the image is written in full
once, with bytes that are not zero, and nothing ever hands its blocks back: no discard, no holes.
"""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchlib.errors import BenchError

CHUNK_BYTES = 8 << 20
# Zeroing inode tables or the journal would go through the loop device as "zero this range", which makes the image's
# blocks unwritten again; lazy_* leaves them alone, and noinit_itable keeps the kernel from doing it later.
MKFS_OPTIONS = "nodiscard,lazy_itable_init=1,lazy_journal_init=1"
MOUNT_OPTIONS = "noatime,nodiscard,noinit_itable"


@contextmanager
def mounted_image(image: Path, size_bytes: int, mount_point: Path) -> Iterator[Path]:
    """Mount `image` (made first where it is missing or of another size) for as long as the block runs."""
    if os.geteuid() != 0:
        raise BenchError("mounting the output image needs root; --no-image writes to a plain directory instead.")
    is_new = not image.exists() or image.stat().st_size != size_bytes
    if is_new:
        _write_in_full(image, size_bytes)
    mount_point.mkdir(parents=True, exist_ok=True)
    # direct-io: else every written page would be cached twice, and the inner sync would end in the outer page cache.
    device = _run("losetup", "--find", "--show", "--direct-io=on", str(image)).strip()
    try:
        if is_new:
            _run("mkfs.ext4", "-q", "-F", "-m", "0", "-E", MKFS_OPTIONS, device)
        _run("mount", "-t", "ext4", "-o", MOUNT_OPTIONS, device, str(mount_point))
        try:
            yield mount_point
        finally:
            _run("umount", str(mount_point))
    finally:
        _run("losetup", "--detach", device)


def _write_in_full(image: Path, size_bytes: int) -> None:
    unfinished = image.with_suffix(".partial")
    image.parent.mkdir(parents=True, exist_ok=True)
    chunk = os.urandom(CHUNK_BYTES)
    with unfinished.open("wb", buffering=0) as file:
        file.writelines(memoryview(chunk)[: size_bytes - offset] for offset in range(0, size_bytes, CHUNK_BYTES))
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    unfinished.rename(image)


def _run(*command: str) -> str:
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise BenchError(f"{command[0]} is not installed; --no-image does without it.") from error
    if answer.returncode != 0:
        raise BenchError(f"{' '.join(command)} failed: {answer.stderr.strip()}; --no-image does without it.")
    return answer.stdout
