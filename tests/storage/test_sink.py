"""Writing shards in place: the library's bytes whatever the order, nothing half-written under a final name."""

from __future__ import annotations

import errno
import os
import random
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from streammerge.base.dtypes import DTYPES
from streammerge.base.errors import DoesNotFit, InputError, OutputError
from streammerge.storage.checkpoint import open_file
from streammerge.storage.header import Entry, make_header
from streammerge.storage.sink import Shard, free_bytes, partial_path, write_file

TENSORS = {
    "w": torch.randn(100, 7, generator=torch.Generator().manual_seed(0)),
    "b": torch.arange(33, dtype=torch.bfloat16),
    "n": torch.tensor(7),
    "e": torch.zeros(0, 3, dtype=torch.float16),
    "odd": torch.arange(5, dtype=torch.uint8),
}


def name_of(dtype: torch.dtype) -> str:
    return next(name for name, known in DTYPES.items() if known.torch_name == str(dtype).removeprefix("torch."))


def header_of(tensors: dict[str, torch.Tensor]) -> tuple[bytes, tuple[Entry, ...]]:
    return make_header((name, name_of(tensor.dtype), tuple(tensor.shape)) for name, tensor in tensors.items())


def raw(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())


def library_bytes(tensors: dict[str, torch.Tensor], path: Path) -> bytes:
    save_file(tensors, path, metadata={"format": "pt"})
    return path.read_bytes()


def make_shard(path: Path) -> tuple[Shard, tuple[Entry, ...]]:
    header, entries = header_of(TENSORS)
    return Shard(path, header, entries[-1].stop), entries


def fill(shard: Shard, entries: tuple[Entry, ...]) -> None:
    for entry in entries:
        shard.write(entry.start, raw(TENSORS[entry.name]))


@settings(derandomize=True, database=None, deadline=None, max_examples=40)
@given(seed=st.integers(0, 2**32), most=st.sampled_from([1 << 20, 1000, 64, 13]), syncs=st.booleans())
def test_a_shard_filled_in_any_order_has_the_bytes_of_save_file(
    tmp_path_factory: pytest.TempPathFactory, seed: int, most: int, syncs: bool
) -> None:
    folder = tmp_path_factory.mktemp("shard")
    chance = random.Random(seed)
    shard, entries = make_shard(folder / "x.safetensors")
    pieces: list[tuple[int, memoryview]] = []
    for entry in entries:
        content = raw(TENSORS[entry.name])
        size = chance.randint(1, most)
        pieces += [(entry.start + at, content[at : at + size]) for at in range(0, len(content), size)]
    chance.shuffle(pieces)
    for i, (offset, piece) in enumerate(pieces):
        shard.write(offset, piece)
        if syncs and i % 50 == 0:
            shard.sync()
    shard.sync()
    shard.publish()
    assert (folder / "x.safetensors").read_bytes() == library_bytes(TENSORS, folder / "library.safetensors")
    assert sorted(path.name for path in folder.iterdir()) == ["library.safetensors", "x.safetensors"]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_files_have_the_mode_that_the_umask_gives(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        shard, entries = make_shard(tmp_path / "x.safetensors")
        fill(shard, entries)
        shard.publish()
        write_file(tmp_path / "config.json", b"{}")
    finally:
        os.umask(before)
    for name in ("x.safetensors", "config.json"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == mode


def test_an_unfinished_shard_is_opened_by_nobody_and_called_unfinished_by_us(tmp_path: Path) -> None:
    shard, entries = make_shard(tmp_path / "x.safetensors")
    partial = partial_path(tmp_path / "x.safetensors")

    def check() -> None:
        assert not (tmp_path / "x.safetensors").exists()
        assert partial.stat().st_size == entries[-1].stop
        with pytest.raises(SafetensorError, match=r"[Hh]eader.*[Ll]arge"), safe_open(partial, framework="pt"):
            pass
        with pytest.raises(InputError, match=r"\.partial: .*unfinished shard; run the merge that began it again"):
            open_file(partial)

    check()
    fill(shard, entries)
    shard.sync()
    check()
    shard.publish()
    with safe_open(tmp_path / "x.safetensors", framework="pt") as file:
        assert all(file.get_tensor(name).equal(tensor) for name, tensor in TENSORS.items())


def test_disk_is_reserved_before_anything_is_written(tmp_path: Path) -> None:
    header, entries = make_header([("w", "F32", (1 << 20,))])
    shard = Shard(tmp_path / "x.safetensors", header, entries[-1].stop)
    shard.close()
    status = partial_path(tmp_path / "x.safetensors").stat()
    assert status.st_size == entries[-1].stop
    assert status.st_blocks * 512 >= status.st_size


def test_a_partial_file_is_taken_up_with_what_it_holds(tmp_path: Path) -> None:
    shard, entries = make_shard(tmp_path / "x.safetensors")
    fill(shard, entries[:2])
    shard.sync()
    shard.close()
    shard, entries = make_shard(tmp_path / "x.safetensors")
    fill(shard, entries[2:])
    shard.publish()
    assert (tmp_path / "x.safetensors").read_bytes() == library_bytes(TENSORS, tmp_path / "y.safetensors")


def test_a_partial_file_of_a_crash_while_it_was_made_is_made_again(tmp_path: Path) -> None:
    header, _ = header_of(TENSORS)
    for left in (b"", b"\xff" * 3, bytes(100_000), b"\xff" * 8 + header[8:20]):
        partial_path(tmp_path / "x.safetensors").write_bytes(left)
        shard, entries = make_shard(tmp_path / "x.safetensors")
        fill(shard, entries)
        shard.publish()
        assert (tmp_path / "x.safetensors").read_bytes() == library_bytes(TENSORS, tmp_path / "y.safetensors")


def test_closing_twice_is_fine(tmp_path: Path) -> None:
    shard, _ = make_shard(tmp_path / "x.safetensors")
    shard.close()
    shard.close()


# Faults, by patching system calls.


def failing(code: int, after: int = 0) -> Callable[..., int]:
    """A stand-in for os.pwritev: probes of nothing succeed, then `after` writes, then `code`."""
    real, left = os.pwritev, [after]

    def call(descriptor: int, buffers: list[memoryview], offset: int, flags: int = 0) -> int:
        if sum(map(len, buffers)):
            if not left[0]:
                raise OSError(code, os.strerror(code))
            left[0] -= 1
        return real(descriptor, buffers, offset, flags)

    return call


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_while_writing_does_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    shard, entries = make_shard(tmp_path / "x.safetensors")
    monkeypatch.setattr(os, "pwritev", failing(code, after=1))
    with pytest.raises(DoesNotFit, match=r"x\.safetensors\.partial: .*free some space and run the same") as caught:
        fill(shard, entries)
    shard.close()
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("code", [errno.EIO, errno.EROFS, errno.EFBIG])
def test_any_other_fault_while_writing_is_an_output_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    shard, entries = make_shard(tmp_path / "x.safetensors")
    monkeypatch.setattr(os, "pwritev", failing(code))
    with pytest.raises(OutputError, match=r"x\.safetensors\.partial: cannot be written") as caught:
        fill(shard, entries)
    shard.close()
    assert caught.value.exit_code == 2


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte."""
    path = tmp_path / "tiny"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(path)]
    try:
        mounted = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("no permission to mount a small file system")
    try:
        yield path
    finally:
        subprocess.run(["umount", str(path)], check=True)


def test_a_shard_larger_than_the_disk_does_not_fit_and_leaves_nothing(tiny_disk: Path) -> None:
    header, entries = make_header([("w", "F32", (1 << 20,))])
    with pytest.raises(DoesNotFit, match="No space left on device"):
        Shard(tiny_disk / "x.safetensors", header, entries[-1].stop)
    assert list(tiny_disk.iterdir()) == []


def test_a_small_file_on_a_full_disk_does_not_fit_and_leaves_the_old_one(tiny_disk: Path) -> None:
    write_file(tiny_disk / "config.json", b"old")
    (tiny_disk / "filler").write_bytes(bytes(free_bytes(tiny_disk)))
    with pytest.raises(DoesNotFit):
        write_file(tiny_disk / "config.json", bytes(100_000))
    assert (tiny_disk / "config.json").read_bytes() == b"old"


def test_a_disk_full_at_the_reservation_does_not_fit_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def allocate(descriptor: int, size: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("streammerge.storage.sink.allocate", allocate)
    with pytest.raises(DoesNotFit):
        make_shard(tmp_path / "x.safetensors")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("call", ["fdatasync", "fsync"])
@pytest.mark.parametrize(("code", "kind"), [(errno.EIO, OutputError), (errno.ENOSPC, DoesNotFit)])
def test_a_fault_of_syncing_is_never_silent_and_never_shows_the_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, code: int, kind: type[Exception]
) -> None:
    shard, entries = make_shard(tmp_path / "x.safetensors")
    fill(shard, entries)

    def fail(descriptor: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(kind):
        shard.sync() if call == "fdatasync" else shard.publish()
    monkeypatch.undo()
    shard.close()
    assert not (tmp_path / "x.safetensors").exists()


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwritev
    shard, entries = make_shard(tmp_path / "x.safetensors")
    monkeypatch.setattr(
        os, "pwritev", lambda descriptor, buffers, *rest: real(descriptor, [buffers[0][:11]], *rest)
    )  # fmt: skip
    fill(shard, entries)
    shard.publish()
    assert (tmp_path / "x.safetensors").read_bytes() == library_bytes(TENSORS, tmp_path / "y.safetensors")


def test_a_short_write_of_the_header_is_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Where fallocate is missing, a disk that fills up cuts the write of a header of megabytes short.
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda descriptor, data, offset: real(descriptor, data[:50], offset))
    shard, entries = make_shard(tmp_path / "x.safetensors")
    fill(shard, entries)
    shard.publish()
    assert (tmp_path / "x.safetensors").read_bytes() == library_bytes(TENSORS, tmp_path / "y.safetensors")


def test_a_shard_in_a_directory_that_is_gone_is_an_output_error(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot be written: No such file or directory"):
        make_shard(tmp_path / "gone" / "x.safetensors")
    with pytest.raises(OutputError, match="cannot be written: No such file or directory"):
        write_file(tmp_path / "gone" / "config.json", b"{}")


def test_a_small_file_is_replaced_in_one_step_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "config.json"
    write_file(path, b"old")
    seen: list[bytes] = []
    real = os.fsync

    def look(descriptor: int) -> None:
        # By now the new content is on its way to the disk, and the name still means the old file.
        seen.append(path.read_bytes())
        real(descriptor)

    monkeypatch.setattr(os, "fsync", look)
    write_file(path, b"new")
    assert b"old" in seen
    assert path.read_bytes() == b"new"

    def fail(descriptor: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OutputError):
        write_file(path, b"newer")
    assert path.read_bytes() == b"new"
    monkeypatch.undo()
    write_file(path, b"newest")
    assert path.read_bytes() == b"newest"
    assert [file.name for file in tmp_path.iterdir()] == ["config.json"]


def test_free_bytes_is_what_the_file_system_says(tmp_path: Path) -> None:
    assert 0 < free_bytes(tmp_path) <= os.statvfs(tmp_path).f_blocks * os.statvfs(tmp_path).f_frsize
