"""Processes that make one analysis together: each scores a part, all decide alike, and the dead are made up for."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path

import pytest

from streammerge.demo import Demo
from streammerge.run.claims import Heart
from streammerge.study.scorebook import Score
from streammerge.study.team import SharedBook, Team, _cut, open_team
from tests.command import COMMAND, streammerge
from tests.study.beds import small_demo


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    """The small demo, and what one process decides, in alone.yaml."""
    made = small_demo(tmp_path_factory.mktemp("demo"))
    done = streammerge("analyze", made.hi_merging, "-o", made.directory / "alone.yaml", "--threads", "1")
    assert done.code == 0, done.err
    return made


def start(demo: Demo, out: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*COMMAND, "analyze", str(demo.hi_merging), "-o", str(out), "--threads", "1", "--team", "2"], text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def scored(out: Path) -> dict[str, int]:
    """How many scores each process has written."""
    files = (out.with_name(f"{out.name}.analysis") / "team" / "scores").glob("*.jsonl")
    return {file.name: len(file.read_text().splitlines()) for file in files}


def test_two_decide_what_one_decides_and_score_nothing_twice(demo: Demo) -> None:
    out = demo.directory / "two.yaml"
    processes = [start(demo, out) for _ in range(2)]
    for process in processes:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    assert out.read_bytes() == (demo.directory / "alone.yaml").read_bytes()
    alone = demo.directory / "alone.yaml.analysis" / "scores.jsonl"
    found = scored(out)
    assert len(found) == 2
    assert all(found.values())
    assert sum(found.values()) == len(alone.read_text().splitlines())
    facts = [
        json.loads((demo.directory / f"{name}.yaml.analysis" / "analysis.json").read_text())
        for name in ("alone", "two")
    ]
    assert facts[0]["layers"] == facts[1]["layers"]
    assert facts[0]["table"] == facts[1]["table"]


def test_one_goes_on_where_a_killed_team_was(demo: Demo) -> None:
    out = demo.directory / "killed.yaml"
    processes = [start(demo, out) for _ in range(2)]
    while sum(scored(out).values()) < 4:
        time.sleep(0.05)
    for process in processes:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    before = sum(scored(out).values())
    # Their claims would be stale after three minutes.
    for claim in (demo.directory / "killed.yaml.analysis" / "team" / "claims").iterdir():
        claim.unlink()
    last = start(demo, out)
    _, errors = last.communicate(timeout=300)
    assert last.returncode == 0, errors
    assert out.read_bytes() == (demo.directory / "alone.yaml").read_bytes()
    assert sum(scored(out).values()) >= before


def test_a_book_is_read_while_others_write_it(tmp_path: Path) -> None:
    one, two = SharedBook(tmp_path, "one", "c "), SharedBook(tmp_path, "two", "c ")
    one.add("key", Score(((0.5, 1.5),)))
    assert "key" not in two
    two.refresh()
    assert two["key"] == one["key"]
    # A line that is being written is read when it is whole.
    path = tmp_path / "one.jsonl"
    whole = path.read_bytes()
    one.add("next", Score(((2.5,),)))
    line = path.read_bytes()[len(whole) :]
    path.write_bytes(whole + line[:10])
    two.refresh()
    assert "next" not in two
    path.write_bytes(whole + line)
    two.refresh()
    assert two["next"] == Score(((2.5,),))
    one.close()
    two.close()


def test_files_that_all_write_are_written_in_turn(tmp_path: Path) -> None:
    with open_team(tmp_path, "one", 2) as team, Heart(1.0) as heart:
        other = Team(tmp_path, "two", 2, heart, 60.0)
        with team.alone("report"):
            assert other._claims.take("report", "two") is None
        with other.alone("report"):
            pass
    assert list((tmp_path / "claims").iterdir()) == []


@pytest.mark.parametrize("count", [1, 2, 3, 10])
def test_parts_hold_every_job_once(count: int) -> None:
    class Task:
        def __init__(self, name: str, num_tokens: int) -> None:
            self.name, self.num_tokens = name, num_tokens

    class Job:
        def __init__(self, task: Task) -> None:
            self.task = task

    first, second = Task("a", 100), Task("b", 300)
    jobs = [Job(second), Job(first), Job(second), Job(first)]
    parts = _cut(jobs, count)  # type: ignore[arg-type]
    assert sorted(id(job) for part in parts for job in part) == sorted(map(id, jobs))
    assert len(parts) <= count
    if count == 2:
        assert [[job.task.name for job in part] for part in parts] == [["a", "a", "b"], ["b"]]
