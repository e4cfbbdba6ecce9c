"""Reading at offsets: the same bytes in every mode, and what happens when a disk does not play along."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from streammerge.base.errors import InputError
from streammerge.storage.checkpoint import Checkpoint, open_checkpoint
from streammerge.storage.local import RWF_DONTCACHE, Mode, reading_mode
from streammerge.storage.source import Source, hash_range
from tests.models import save_model

MODES: tuple[Mode, ...] = ("dontcache", "direct", "buffered")
# Larger than the bounce buffer of direct reads, and no multiple of a page.
SIZE = (9 << 20) + 1234


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    generator = torch.Generator().manual_seed(0)
    big = torch.randint(0, 256, (SIZE,), dtype=torch.uint8, generator=generator)
    small = torch.randint(0, 256, (777,), dtype=torch.uint8, generator=generator)
    return open_checkpoint(save_model(tmp_path_factory.mktemp("model"), {"big": big, "small": small}, shards=2))


@pytest.fixture(scope="module")
def content(checkpoint: Checkpoint) -> list[bytes]:
    return [checkpoint.file_path(i).read_bytes() for i in range(2)]


def small_checkpoint(path: Path) -> Checkpoint:
    return open_checkpoint(save_model(path, {"w": torch.arange(50_000, dtype=torch.int32)}))


@contextmanager
def opened(checkpoint: Checkpoint, mode: Mode | None = None) -> Iterator[Source]:
    """A source that is closed afterwards; skips where the file system of the tests does not have `mode`."""
    try:
        source = Source(checkpoint, mode)
        source.read_into(memoryview(bytearray(1)), 0, 0)
    except InputError as error:
        if isinstance(error.__cause__, OSError) and error.__cause__.errno in (errno.EINVAL, errno.EOPNOTSUPP):
            pytest.skip(f"{mode} does not work on the file system of the tests")
        raise
    try:
        yield source
    finally:
        source.close()


def read(source: Source, file: int, offset: int, length: int, *, keep_cached: bool = False) -> bytes:
    buffer = bytearray(b"\xaa" * length)
    source.read_into(memoryview(buffer), file, offset, keep_cached=keep_cached)
    return bytes(buffer)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("keep_cached", [False, True])
def test_every_mode_reads_the_same_bytes_at_odd_places(
    checkpoint: Checkpoint, content: list[bytes], mode: Mode, keep_cached: bool
) -> None:
    with opened(checkpoint, mode) as source:
        for file, whole in enumerate(content):
            end = len(whole)
            places = [(0, 1), (0, end), (1, end - 1), (end - 1, 1), (4095, 2), (4096, 4096), (4097, 1), (511, 513),
                      (end - 1234, 1234), (0, 0), (end, 0), (8 << 20, 4096), ((8 << 20) - 1, 4098)]  # fmt: skip
            for offset, length in places:
                if offset >= 0 and offset + length <= end:
                    assert (
                        read(source, file, offset, length, keep_cached=keep_cached) == whole[offset : offset + length]
                    )


@settings(derandomize=True, database=None, deadline=None, max_examples=60)
@given(data=st.data())
def test_any_place_and_length_reads_the_same_in_every_mode(
    checkpoint: Checkpoint, content: list[bytes], data: st.DataObject
) -> None:
    offset = data.draw(st.integers(0, SIZE))
    length = data.draw(st.integers(0, min(20_000, len(content[0]) - offset)))
    for mode in MODES:
        with opened(checkpoint, mode) as source:
            assert read(source, 0, offset, length) == content[0][offset : offset + length]


def test_only_the_buffer_is_written(checkpoint: Checkpoint, content: list[bytes]) -> None:
    for mode in MODES:
        buffer = bytearray(b"\xaa" * 300)
        with opened(checkpoint, mode) as source:
            source.read_into(memoryview(buffer)[100:200], 0, 4000)
        assert buffer == b"\xaa" * 100 + content[0][4000:4100] + b"\xaa" * 100


def test_several_threads_read_through_one_source(checkpoint: Checkpoint, content: list[bytes]) -> None:
    for mode in MODES:
        with opened(checkpoint, mode) as source:
            wrong: list[int] = []

            def check(seed: int, source: Source = source, wrong: list[int] = wrong) -> None:
                for i in range(20):
                    offset = (seed * 7919 + i * 104_729) % (SIZE - 70_000)
                    if read(source, 0, offset, 65_537) != content[0][offset : offset + 65_537]:
                        wrong.append(offset)

            threads = [threading.Thread(target=check, args=(seed,)) for seed in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert not wrong


def test_the_mode_is_found_by_trying(checkpoint: Checkpoint) -> None:
    mode = reading_mode(checkpoint.file_path(0))
    assert mode in MODES
    with opened(checkpoint) as source:
        assert source.modes[0] == mode


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.EINVAL])
def test_a_file_system_without_dontcache_gets_another_mode(
    checkpoint: Checkpoint, content: list[bytes], monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    real = os.preadv

    def preadv(descriptor: int, buffers: list[memoryview], offset: int, flags: int = 0) -> int:
        if flags & RWF_DONTCACHE:
            raise OSError(code, os.strerror(code))
        return real(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    with opened(checkpoint) as source:
        assert source.modes[0] in ("direct", "buffered")
        assert read(source, 0, 17, 5000) == content[0][17:5017]


def test_files_of_one_model_on_different_file_systems_are_read(
    checkpoint: Checkpoint, content: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    # A shard may be a link to another disk, one without dontcache: tmpfs, say.
    real = os.preadv

    def preadv(descriptor: int, buffers: list[memoryview], offset: int, flags: int = 0) -> int:
        if flags & RWF_DONTCACHE and os.fstat(descriptor).st_size == len(content[1]):
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        return real(descriptor, buffers, offset, flags)

    monkeypatch.setattr(os, "preadv", preadv)
    with opened(checkpoint) as source:
        assert read(source, 0, 17, 5000) == content[0][17:5017]
        assert read(source, 1, 17, 500) == content[1][17:517]


# Faults, by patching the system call.

Preadv = Callable[..., int]


def patch_reads(monkeypatch: pytest.MonkeyPatch, wrap: Callable[[Preadv], Preadv]) -> None:
    monkeypatch.setattr(os, "preadv", wrap(os.preadv))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("most", [1, 7, 4096, 5000])
def test_short_reads_are_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: Mode, most: int
) -> None:  # fmt: skip
    checkpoint = small_checkpoint(tmp_path)
    whole = checkpoint.file_path(0).read_bytes()
    if mode == "direct":
        # The kernel gives whole sectors there.
        most = max(4096, most - most % 4096)

    def short(real: Preadv) -> Preadv:
        return lambda descriptor, buffers, *rest: real(descriptor, [buffers[0][:most]], *rest)

    with opened(checkpoint, mode) as source:
        patch_reads(monkeypatch, short)
        length = 3000 if most < 4096 else 100_000
        assert read(source, 0, 333, length) == whole[333 : 333 + length]


class Faults:
    """Makes the calls numbered in `failing` fail with `code`."""

    def __init__(self, failing: range, code: int) -> None:
        self.failing, self.code, self.calls = failing, code, 0

    def wrap(self, real: Preadv) -> Preadv:
        def call(*arguments: object) -> int:
            self.calls += 1
            if self.calls - 1 in self.failing:
                raise OSError(self.code, os.strerror(self.code))
            return real(*arguments)

        return call


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE])
def test_a_passing_fault_is_retried_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: Mode, code: int
) -> None:  # fmt: skip
    checkpoint = small_checkpoint(tmp_path)
    whole = checkpoint.file_path(0).read_bytes()
    with opened(checkpoint, mode) as source:
        faults = Faults(range(1), code)
        patch_reads(monkeypatch, faults.wrap)
        assert read(source, 0, 100, 1000) == whole[100:1100]
        assert faults.calls == 2


@pytest.mark.parametrize("mode", MODES)
def test_a_lasting_fault_is_an_input_error_with_file_and_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: Mode
) -> None:
    checkpoint = small_checkpoint(tmp_path)
    with opened(checkpoint, mode) as source:
        faults = Faults(range(1000), errno.EIO)
        patch_reads(monkeypatch, faults.wrap)
        with pytest.raises(
            InputError, match=r"model\.safetensors: reading at byte 100 failed: Input/output error"
        ) as caught:
            read(source, 0, 100, 1000)
        assert caught.value.exit_code == 4
        assert faults.calls == 2


def test_other_faults_are_not_retried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = small_checkpoint(tmp_path)
    with opened(checkpoint, "buffered") as source:
        faults = Faults(range(1), errno.EBADF)
        patch_reads(monkeypatch, faults.wrap)
        with pytest.raises(InputError, match="reading at byte 0 failed"):
            read(source, 0, 0, 10)
        assert faults.calls == 1


@pytest.mark.parametrize("mode", MODES)
def test_a_file_that_ends_early_is_called_truncated(tmp_path: Path, mode: Mode) -> None:
    checkpoint = small_checkpoint(tmp_path)
    size = checkpoint.files[0].size
    with opened(checkpoint, mode) as source:
        os.truncate(checkpoint.file_path(0), 5000)
        pattern = rf"ends at byte 5000, {size - 5000} bytes before the tensor does\. It was truncated"
        with pytest.raises(InputError, match=pattern):
            read(source, 0, 100, size - 100)


def test_a_file_replaced_during_a_fault_is_noticed_by_its_header(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = small_checkpoint(tmp_path)
    path = checkpoint.file_path(0)
    with opened(checkpoint, "buffered") as source:
        # Same size, same time, another header: only its fingerprint tells.
        path.write_bytes(path.read_bytes().replace(b'"w"', b'"v"'))
        os.utime(path, ns=(0, checkpoint.files[0].mtime_ns))
        patch_reads(monkeypatch, Faults(range(1), errno.EIO).wrap)
        with pytest.raises(InputError, match="its header changed while it was read"):
            read(source, 0, 100, 1000)


def test_a_file_of_another_size_is_refused_when_opened(tmp_path: Path) -> None:
    checkpoint = small_checkpoint(tmp_path)
    with checkpoint.file_path(0).open("ab") as file:
        file.write(b"x")
    with pytest.raises(InputError, match=r"changed since its header was read \(size \d+ then, \d+ now\)"):
        Source(checkpoint)


def test_a_file_of_another_time_is_refused_when_opened(tmp_path: Path) -> None:
    checkpoint = small_checkpoint(tmp_path)
    os.utime(checkpoint.file_path(0), ns=(0, checkpoint.files[0].mtime_ns + 1))
    with pytest.raises(InputError, match="changed since its header was read"):
        Source(checkpoint)


def test_a_file_that_is_gone_is_an_input_error_when_opened(tmp_path: Path) -> None:
    checkpoint = small_checkpoint(tmp_path)
    checkpoint.file_path(0).unlink()
    for mode in (*MODES, None):
        with pytest.raises(InputError, match=r"model\.safetensors: cannot be read: No such file"):
            Source(checkpoint, mode)


@pytest.mark.parametrize("change", ["grow", "shrink", "touch"])
def test_a_file_changed_while_open_is_noticed(tmp_path: Path, change: str) -> None:
    checkpoint = small_checkpoint(tmp_path)
    path = checkpoint.file_path(0)
    with opened(checkpoint) as source:
        source.check_unchanged()
        match change:
            case "grow":
                with path.open("ab") as file:
                    file.write(b"x")
            case "shrink":
                os.truncate(path, 100)
            case "touch":
                os.utime(path, ns=(0, checkpoint.files[0].mtime_ns + 1))
        with pytest.raises(InputError, match=r"model\.safetensors: changed since its header was read"):
            source.check_unchanged()


def test_nothing_stays_open_after_a_failed_opening_or_closing(tmp_path: Path) -> None:
    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))

    checkpoint = open_checkpoint(save_model(tmp_path, {"a": torch.zeros(3), "b": torch.zeros(3)}, shards=2))
    before = descriptors()
    with opened(checkpoint, "buffered"):
        assert descriptors() == before + 2
    assert descriptors() == before
    os.utime(checkpoint.file_path(1), ns=(0, 0))
    with pytest.raises(InputError):
        Source(checkpoint)
    assert descriptors() == before


def test_a_range_is_hashed_through_a_buffer_of_any_size(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(bytes(range(256)) * 100)
    for size in (1, 7, 4096, 100_000):
        hashing = xxhash.xxh3_128()
        hash_range(path, 13, 10_001, hashing.update, bytearray(size))
        assert hashing.hexdigest() == xxhash.xxh3_128_hexdigest(path.read_bytes()[13:10_014])


def test_a_range_beyond_the_file_or_of_no_file_is_an_input_error(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(bytes(100))
    with pytest.raises(InputError, match="ends at byte 100, 50 bytes too early"):
        hash_range(path, 50, 100, lambda _: None, bytearray(64))
    with pytest.raises(InputError, match="cannot be read: No such file"):
        hash_range(tmp_path / "y", 0, 1, lambda _: None, bytearray(64))
