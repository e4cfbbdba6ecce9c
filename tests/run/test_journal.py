"""The journal: sound lines count, the first line that is not sound ends it."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streammerge.base.errors import DoesNotFit, OutputError
from streammerge.run.journal import Done, Journal

DONE = [
    Done("model.embed.weight", "0" * 32),
    Done('odd "name" ä\n\u2028\x85\r', "1" * 32, (1, 0, 3), 4),
    Done("", "2" * 32, (), 0),
    Done("last", "3" * 32, (0,), 7),
]


def read(path: Path) -> list[Done]:
    journal = Journal(path)
    journal.close()
    return list(journal.done.values())


def write(path: Path, done: list[Done] = DONE) -> bytes:
    path.unlink(missing_ok=True)
    journal = Journal(path)
    journal.append(done)
    journal.close()
    return path.read_bytes()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal"


def test_a_new_journal_is_empty(path: Path) -> None:
    assert read(path) == []
    assert path.read_bytes() == b""


def test_what_was_appended_is_read_again_in_order(path: Path) -> None:
    write(path, [])
    for done in DONE:
        journal = Journal(path)
        journal.append([done])
        assert journal.done[done.tensor] == done
        journal.close()
    assert read(path) == DONE
    assert len(path.read_bytes().splitlines()) == len(DONE)


def test_appending_all_at_once_gives_the_same_bytes(path: Path, tmp_path: Path) -> None:
    one_by_one = tmp_path / "other"
    journal = Journal(one_by_one)
    for done in DONE:
        journal.append([done])
    journal.close()
    assert write(path) == one_by_one.read_bytes()


def test_a_journal_cut_anywhere_keeps_its_whole_lines(path: Path) -> None:
    content = write(path)
    ends = [i + 1 for i, byte in enumerate(content) if byte == ord("\n")]
    for cut in range(len(content) + 1):
        path.write_bytes(content[:cut])
        whole = sum(end <= cut for end in ends)
        assert read(path) == DONE[:whole]
        assert path.read_bytes() == content[: ends[whole - 1] if whole else 0], "the torn line is cut off"


def test_a_flipped_bit_ends_the_journal_before_its_line(path: Path) -> None:
    content = write(path)
    starts = [0] + [i + 1 for i, byte in enumerate(content) if byte == ord("\n")]
    for place in range(len(content)):
        damaged = bytearray(content)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        line = sum(start <= place for start in starts) - 1
        assert read(path) == DONE[:line]


def test_a_sound_line_after_a_damaged_one_is_not_trusted(path: Path) -> None:
    lines = write(path).splitlines(keepends=True)
    path.write_bytes(lines[0] + lines[1].replace(b"1", b"9") + lines[2] + lines[3])
    assert read(path) == DONE[:1]
    assert path.read_bytes() == lines[0]


def test_appending_goes_on_after_a_torn_line(path: Path) -> None:
    content = write(path, DONE[:2])
    path.write_bytes(content[:-5])
    journal = Journal(path)
    journal.append(DONE[1:])
    journal.close()
    assert read(path) == DONE
    assert path.read_bytes() == write(path)


def test_zeros_that_a_crash_left_at_the_end_are_cut_off(path: Path) -> None:
    content = write(path)
    path.write_bytes(content + bytes(4096))
    assert read(path) == DONE
    assert path.read_bytes() == content


@settings(derandomize=True, database=None, deadline=None, max_examples=150)
@given(garbage=st.binary(max_size=60), lines=st.integers(0, 2))
def test_garbage_is_never_an_error_and_never_a_tensor(
    tmp_path_factory: pytest.TempPathFactory, garbage: bytes, lines: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "garbage"
    content = write(path, DONE[:lines]) if lines else b""
    path.write_bytes(content + garbage)
    assert read(path) == DONE[:lines]


def test_a_line_of_nothing_with_the_checksum_of_nothing_is_garbage_too(path: Path) -> None:
    content = write(path)
    path.write_bytes(content + b"00000000 \n")
    assert read(path) == DONE


def test_a_later_line_for_a_tensor_counts(path: Path) -> None:
    write(path, [Done("a", "0" * 32), Done("b", "1" * 32), Done("a", "2" * 32)])
    assert {done.tensor: done.xxh3_128 for done in read(path)} == {"a": "2" * 32, "b": "1" * 32}


def test_a_line_is_on_disk_before_append_returns(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[bytes] = []
    real = os.fdatasync

    def look(descriptor: int) -> None:
        synced.append(path.read_bytes())
        real(descriptor)

    monkeypatch.setattr(os, "fdatasync", look)
    content = write(path)
    assert synced == [content]


def test_short_writes_are_continued(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = write(tmp_path / "other")
    real = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: real(descriptor, data[:7]))
    assert write(path) == expected


@pytest.mark.parametrize("call", ["write", "fdatasync"])
def test_a_full_disk_does_not_fit_and_records_nothing(path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    journal = Journal(path)
    monkeypatch.setattr(os, call, fail)
    with pytest.raises(DoesNotFit, match=r"journal: No space left on device"):
        journal.append(DONE)
    monkeypatch.undo()
    assert journal.done == {}
    journal.close()


def test_a_journal_that_cannot_be_opened_is_an_output_error(tmp_path: Path) -> None:
    with pytest.raises(OutputError):
        Journal(tmp_path)
    with pytest.raises(OutputError):
        Journal(tmp_path / "gone" / "journal")
