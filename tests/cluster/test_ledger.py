"""Claims save work, commits decide: whatever happens between any two steps, one attempt counts, and all of it."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from streammerge.base.errors import OutputError
from streammerge.cluster.ledger import FOLDERS, Committed, Failed, Ledger
from streammerge.run.journal import Done

STALE = 100.0
TENSORS = (Done("a", "00", (1, 2), 3), Done("b", "11"))


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    folder = tmp_path / "cluster"
    for name in FOLDERS:
        (folder / name).mkdir(parents=True)
    return Ledger(folder, stale_seconds=STALE)


def attempt(ledger: Ledger, name: str, content: bytes = b"shard") -> Committed:
    ledger.attempt_path(name).write_bytes(content)
    return Committed(3, name, "me", 1.5, 10, 20, TENSORS)


def make_old(ledger: Ledger, name: str, seconds: float = 2 * STALE) -> None:
    path = ledger.folder / "claims" / name
    then = path.stat().st_mtime - seconds
    os.utime(path, (then, then))


def test_a_claim_is_one_workers(ledger: Ledger) -> None:
    claim = ledger.claims.take("00003", "me")
    assert claim is not None
    assert ledger.claims.take("00003", "you") is None
    assert [(each.name, each.worker) for each in ledger.claims.all()] == [("00003", "me")]
    claim.release()
    assert ledger.claims.take("00003", "you") is not None


def test_a_worker_started_again_takes_its_own_claim(ledger: Ledger) -> None:
    before = ledger.claims.take("00003", "slurm-7-5")
    again = ledger.claims.take("00003", "slurm-7-5")
    assert before is not None
    assert again is not None
    # The one before may still be alive, and gives back nothing but its own.
    before.release()
    assert [each.worker for each in ledger.claims.all()] == ["slurm-7-5"]
    again.release()
    assert ledger.claims.all() == []


def test_a_stale_claim_is_taken_and_a_touched_one_is_not(ledger: Ledger) -> None:
    claim = ledger.claims.take("00003", "dead")
    assert claim is not None
    make_old(ledger, "00003")
    claim.touch()
    assert ledger.claims.take("00003", "me") is None
    make_old(ledger, "00003")
    assert ledger.claims.take("00003", "me") is not None
    # The dead one wakes up: its heart beats for nobody.
    make_old(ledger, "00003")
    claim.touch()
    claim.release()
    assert [each.worker for each in ledger.claims.all()] == ["me"]
    assert ledger.claims.all()[0].age > STALE


def test_of_many_thieves_one_has_the_claim(ledger: Ledger) -> None:
    for round_number in range(20):
        name = f"{round_number:05d}"
        dead = ledger.claims.take(name, "dead")
        assert dead is not None
        make_old(ledger, name)
        start = threading.Barrier(4)
        won = []

        def steal(worker: str, name: str = name, start: threading.Barrier = start, won: list[str] = won) -> None:
            start.wait()
            if ledger.claims.take(name, worker) is not None:
                won.append(worker)

        threads = [threading.Thread(target=steal, args=(f"w{i}",)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(won) >= 1
        assert {each.worker for each in ledger.claims.all() if each.name == name} <= set(won)


def test_of_two_attempts_the_first_counts(ledger: Ledger, tmp_path: Path) -> None:
    first, second = attempt(ledger, "first", b"same"), attempt(ledger, "second", b"same")
    shard = tmp_path / "model.safetensors"
    assert ledger.commit(first, shard)
    assert not ledger.commit(second, shard)
    assert shard.read_bytes() == b"same"
    assert list((ledger.folder / "attempts").iterdir()) == []
    assert Ledger(ledger.folder, stale_seconds=STALE).done() == {3: first}


def test_whoever_finds_it_finishes_the_renaming(
    ledger: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = tmp_path / "model.safetensors"
    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "settle", lambda *_: None)
        assert ledger.commit(attempt(ledger, "killed"), shard)
    assert not shard.exists()
    other = Ledger(ledger.folder, stale_seconds=STALE)
    found = other.done()[3]
    other.settle(found, shard)
    other.settle(found, shard)
    assert shard.read_bytes() == b"shard"


def test_a_shard_that_is_gone_is_told_of(ledger: Ledger, tmp_path: Path) -> None:
    shard = tmp_path / "model.safetensors"
    ledger.commit(attempt(ledger, "one"), shard)
    shard.unlink()
    with pytest.raises(OutputError, match="is gone"):
        ledger.settle(ledger.done()[3], shard)
    ledger.take(4, TENSORS)
    with pytest.raises(OutputError, match="is gone"):
        ledger.settle(ledger.done()[4], shard)
    assert (ledger.folder / "attempts").is_dir()


@pytest.mark.parametrize("damage", ["torn", "flipped", "empty", "of another unit"])
def test_a_damaged_record_is_told_of(ledger: Ledger, tmp_path: Path, damage: str) -> None:
    ledger.commit(attempt(ledger, "one"), tmp_path / "model.safetensors")
    path = ledger.folder / "done" / "00003"
    content = path.read_bytes()
    if damage == "of another unit":
        path.rename(path.with_name("00004"))
    else:
        path.write_bytes({"torn": content[:-9], "flipped": content.replace(b"11", b"12"), "empty": b""}[damage])
    with pytest.raises(OutputError, match=r"0000[34]: is damaged"):
        Ledger(ledger.folder, stale_seconds=STALE).done()


def test_failures_are_written_once_and_forgiven(ledger: Ledger) -> None:
    ledger.fail(Failed(3, "it is so", 4, "me"))
    ledger.fail(Failed(3, "it is otherwise", 2, "you"))
    assert ledger.failed() == {3: Failed(3, "it is so", 4, "me")}
    ledger.forgive()
    assert ledger.failed() == {}
    ledger.fail(Failed(3, "again", 4, "me"))
    (ledger.folder / "failed" / "00003").write_bytes(b"rubbish\n")
    assert ledger.failed() == {}


def test_ages_are_the_file_systems(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that is hours off makes nobody dead."""
    ledger.claims.take("00003", "me")
    monkeypatch.setattr("time.time", lambda: 10.0**10)
    assert ledger.claims.all()[0].age < STALE
    ledger.note_worker("me", {"worker": "me"})
    ((facts, age),) = ledger.workers()
    assert facts == {"worker": "me"}
    assert age < STALE


def test_a_run_that_is_over(ledger: Ledger) -> None:
    assert not ledger.is_gone()
    for name in FOLDERS:
        (ledger.folder / name).rmdir()
    ledger.folder.rmdir()
    assert ledger.is_gone()
    with pytest.raises(FileNotFoundError):
        ledger.claims.take("00003", "me")
    assert ledger.claims.all() == []
    assert ledger.failed() == {}
