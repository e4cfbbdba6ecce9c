"""Workers that come, go, die and meet: the run always ends with the bytes of one machine, and no stray file."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from streammerge.cluster.job import folder_of, ledger_of, open_job, read_job
from streammerge.run.journal import WORK_FOLDER
from tests.command import COMMAND, Result
from tests.models import make_models, make_tensors, save_model, write_recipe
from tests.run.breaking import CHANGES
from tests.run.test_crash import files, numbers, strides
from tests.run.zygote import Zygote

SHAPES = {f"model.layers.{i}.mlp.up_proj.weight": (300, 1024) for i in range(8)}
SHARDS = 8
FLAGS = ("--compile", "off", "--threads", "1", "--json")


@dataclass(frozen=True)
class Site:
    """A merge to be made by many, and what one machine makes of it."""

    zygote: Zygote
    recipe: Path
    whole: dict[str, bytes]

    def plan(self, out: Path, *flags: str) -> Path:
        """Write the job into OUT."""
        done = self.run("submit", self.recipe, out, "--plan-only", "--out-shard-size", "700KB", *flags)
        assert done.code == 0, done.err
        return out

    def work(self, out: Path, *flags: str | Path) -> dict[str, Any]:
        done = self.run("work", out, *FLAGS, *flags)
        assert done.code == 0, done.err + done.out
        return done.events[-1]

    def run(self, *arguments: str | Path, way: str | None = None, **options: Any) -> Result:
        return self.zygote.run(arguments, way, **options)

    def assert_completes(self, out: Path) -> Result:
        done = self.run("finalize", out, "--json")
        assert done.code == 0, done.err + done.out
        assert files(out) == self.whole
        assert not list(out.glob(f"{WORK_FOLDER}*"))
        return done


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("cluster")
    base, *models = make_models(folder, shapes=SHAPES)
    recipe = write_recipe(folder / "recipe.yaml", "ties", models, base=base, per_model={"weight": 0.5, "density": 0.4})
    with Zygote() as zygote:
        one = folder / "one"
        assert zygote.run([recipe, one, "--out-shard-size", "700KB", *FLAGS]).code == 0
        yield Site(zygote, recipe, files(one))


def start(out: Path, *flags: str, environment: dict[str, str] | None = None) -> subprocess.Popen[str]:
    """A worker of its own process."""
    return subprocess.Popen(
        [*COMMAND, "work", str(out), *FLAGS, *flags], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | (environment or {}),
    )  # fmt: skip


def ledger_folder(out: Path, name: str) -> Path:
    return ledger_of(out, read_job(folder_of(out) / "job.json")).folder / name


def ledger_names(out: Path, folder: str) -> list[str]:
    return sorted(path.name for path in ledger_folder(out, folder).iterdir() if not path.name.startswith("."))


def worker_pids(out: Path) -> dict[str, int]:
    """The processes of workers that are making a shard, by the worker's name."""
    pids = {}
    for path in ledger_folder(out, "workers").glob("*.json"):
        facts: dict[str, Any] = json.loads(path.read_text())
        if facts["state"] == "merging" and facts["unit"] and Path(f"/proc/{facts['pid']}").exists():
            pids[facts["worker"]] = facts["pid"]
    return pids


def test_one_worker(site: Site, tmp_path: Path) -> None:
    out = site.plan(tmp_path / "out")
    done = site.work(out)
    assert done["units"] == SHARDS
    assert ledger_names(out, "claims") == ledger_names(out, "attempts") == []
    facts = site.assert_completes(out).events[-1]
    assert [worker["units"] for worker in facts["workers"]] == [SHARDS]
    assert site.run("verify", out).code == 0


def test_several_at_once(site: Site, tmp_path: Path) -> None:
    out = site.plan(tmp_path / "out")
    workers = [start(out, "--index", str(i), "--count", "3") for i in range(3)]
    made = []
    for worker in workers:
        text, errors = worker.communicate(timeout=120)
        assert worker.returncode == 0, errors
        made.append(json.loads(text.splitlines()[-1]))
    assert sum(each["units"] for each in made) == SHARDS
    site.assert_completes(out)


def test_finalize_waits_for_all(site: Site, tmp_path: Path) -> None:
    out = site.plan(tmp_path / "out")
    done = site.run("finalize", out)
    assert done.code == 75
    assert "8 of 8 shards are still to be made" in done.err
    site.work(out)
    site.assert_completes(out)
    again = site.run("finalize", out, "--json")
    assert again.code == 0
    assert again.events[-1]["already_finished"]
    # Late workers find nothing to do.
    assert site.work(out)["units"] == 0


@strides
def test_killed_at_any_call(site: Site, tmp_path: Path, stride: int) -> None:
    """The worker of the same name goes on at once; another one would wait until the claim is stale."""
    counts = tmp_path / "counts"
    unbroken = site.plan(tmp_path / "unbroken")
    assert site.run("work", unbroken, *FLAGS, way="count", file=str(counts)).code == 0
    calls = sum(count for name, count in json.loads(counts.read_text()).items() if name in CHANGES)
    killed = 0
    for number in numbers(calls, stride):
        out = site.plan(tmp_path / str(number), "--stale-after", "1")
        code = site.run("work", out, *FLAGS, way="kill_at", number=number).code
        assert code in (0, -signal.SIGKILL)
        killed += code != 0
        for name, content in files(out).items():
            assert content == site.whole[name], name
        site.work(out, "--wait")
        site.assert_completes(out)
        shutil.rmtree(out)
    assert killed > 0


@pytest.mark.parametrize("times", [10, pytest.param(200, marks=pytest.mark.nightly)])
def test_two_workers_killed_at_any_moment(site: Site, tmp_path: Path, times: int) -> None:
    """Two at a time, killed and started until all is done."""
    chance = random.Random(times)
    for number in range(max(1, times // 5)):
        out = site.plan(tmp_path / str(number), "--stale-after", "1")
        for _ in range(5):
            workers = [start(out, "--index", str(i), "--count", "2") for i in range(2)]
            time.sleep(1.2 + chance.random())
            for worker in workers:
                worker.kill()
                worker.communicate()
            for name, content in files(out).items():
                assert content == site.whole[name], name
        site.work(out, "--wait")
        site.assert_completes(out)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_gives_the_work_back(slow: Site, tmp_path: Path, number: signal.Signals) -> None:
    out = slow.plan(tmp_path / "out")
    worker = start(out)
    wait_until(lambda: ledger_names(out, "claims") != [])
    worker.send_signal(number)
    text, errors = worker.communicate(timeout=60)
    assert worker.returncode == 75, errors
    assert "Any worker goes on with what is left" in text
    assert ledger_names(out, "claims") == ledger_names(out, "attempts") == []
    assert [json.loads(path.read_text())["state"] for path in ledger_folder(out, "workers").glob("*.json")] == [
        "stopped"
    ]
    slow.work(out)
    slow.assert_completes(out)


def test_the_living_take_over_from_the_dead(slow: Site, tmp_path: Path) -> None:
    out = slow.plan(tmp_path / "out", "--stale-after", "2")
    dead = start(out)
    wait_until(lambda: ledger_names(out, "claims") != [])
    dead.kill()
    dead.communicate()
    finished = len(ledger_names(out, "done"))
    # What the dead one held is left alone until it is stale.
    quick = slow.work(out)["units"]
    assert finished + quick in {SHARDS - 1, SHARDS}
    assert slow.work(out, "--wait")["units"] == SHARDS - finished - quick
    slow.assert_completes(out)


def test_two_live_attempts_at_one_shard(slow: Site, tmp_path: Path) -> None:
    """A worker that was thought dead, and is not: both make the shard, one counts."""
    out = slow.plan(tmp_path / "out", "--stale-after", "1")
    first = start(out)
    wait_until(lambda: ledger_names(out, "claims") != [])
    os.kill(first.pid, signal.SIGSTOP)
    try:
        others = slow.work(out, "--wait")
    finally:
        os.kill(first.pid, signal.SIGCONT)
    text, errors = first.communicate(timeout=60)
    assert first.returncode == 0, errors
    lost = json.loads(text.splitlines()[-1])
    assert others["units"] + lost["units"] == SHARDS
    assert lost["lost"] == 1
    slow.assert_completes(out)


def test_a_worker_that_comes_after_the_end(slow: Site, tmp_path: Path) -> None:
    """It is stopped in the middle of a shard until the whole run is complete and its folder gone."""
    out = slow.plan(tmp_path / "out", "--stale-after", "1")
    first = start(out)
    wait_until(lambda: ledger_names(out, "claims") != [])
    os.kill(first.pid, signal.SIGSTOP)
    try:
        slow.work(out, "--wait")
        slow.assert_completes(out)
    finally:
        os.kill(first.pid, signal.SIGCONT)
    _, errors = first.communicate(timeout=60)
    assert first.returncode == 0, errors
    assert files(out) == slow.whole
    assert not list(out.glob(f"{WORK_FOLDER}*"))


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A merge of which every shard takes a worker about a second."""
    folder = tmp_path_factory.mktemp("slow")
    shapes = {f"model.layers.{i}.mlp.up_proj.weight": (300, 10240) for i in range(SHARDS)}
    base, *models = make_models(folder, shapes=shapes)
    recipe = write_recipe(folder / "recipe.yaml", "arcee_fusion", models[:1], base=base)
    with Zygote() as zygote:
        one = folder / "one"
        assert zygote.run([recipe, one, "--out-shard-size", "700KB", *FLAGS]).code == 0
        yield Site(zygote, recipe, files(one))


def wait_until(condition: Any, seconds: float = 30) -> None:
    """Return when `condition()` holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came to that"
        time.sleep(0.01)


def test_what_a_single_run_has_finished_counts(slow: Site, tmp_path: Path) -> None:
    out = tmp_path / "out"
    single = subprocess.Popen([*COMMAND, str(slow.recipe), str(out), "--out-shard-size", "700KB", *FLAGS])
    wait_until(lambda: len(list(out.glob("*.safetensors"))) >= 2)
    single.send_signal(signal.SIGTERM)
    assert single.wait(timeout=60) == 75
    finished = len(list(out.glob("*.safetensors")))
    assert 2 <= finished < SHARDS
    slow.plan(out)
    assert list(out.glob("*.partial")) == []
    assert slow.work(out)["units"] == SHARDS - finished
    slow.assert_completes(out)


def test_a_single_run_does_not_meddle(site: Site, tmp_path: Path) -> None:
    out = site.plan(tmp_path / "out")
    arguments = [site.recipe, out, "--out-shard-size", "700KB", *FLAGS]
    done = site.run(*arguments)
    assert done.code == 2
    assert "belongs to a cluster run" in done.out
    assert site.run(*arguments, "--restart").code == 0
    assert files(out) == site.whole


def test_a_worker_that_slept_through_a_restart_puts_nothing_there(slow: Site, tmp_path: Path) -> None:
    """Another recipe of the same shapes has taken its place meanwhile: the bytes of the first must not get into it."""
    out = slow.plan(tmp_path / "out")
    first = start(out)
    wait_until(lambda: ledger_names(out, "claims") != [])
    os.kill(first.pid, signal.SIGSTOP)
    folder = slow.recipe.parent
    other = write_recipe(folder / "other.yaml", "linear", [folder / "base", folder / "m0"], per_model={"weight": 1})
    one = tmp_path / "one"
    assert slow.run(other, one, "--out-shard-size", "700KB", *FLAGS).code == 0
    assert slow.run("submit", other, out, "--plan-only", "--out-shard-size", "700KB", "--restart").code == 0
    os.kill(first.pid, signal.SIGCONT)
    first.communicate(timeout=60)
    assert first.returncode == 2
    slow.work(out)
    assert slow.run("finalize", out).code == 0
    assert files(out) == files(one)


def test_a_finished_output_is_left_alone(site: Site, tmp_path: Path) -> None:
    out = site.plan(tmp_path / "out")
    site.work(out)
    site.assert_completes(out)
    done = site.run("submit", site.recipe, out, "--plan-only", "--out-shard-size", "700KB")
    assert done.code == 0
    assert "already" in done.out
    assert files(out) == site.whole


def test_status(slow: Site, tmp_path: Path) -> None:
    out = slow.plan(tmp_path / "out")
    worker = start(out, "--index", "1", "--count", "2")
    wait_until(lambda: len(ledger_names(out, "done")) >= 2)
    facts = slow.run("status", out, "--json").events[-1]
    text = slow.run("status", out).out
    worker.send_signal(signal.SIGTERM)
    worker.communicate(timeout=60)
    assert facts["done"] >= 2
    assert facts["units"] == SHARDS
    assert 0 < facts["moved_bytes"] < facts["total_bytes"]
    assert facts["seconds_left"] > 0
    assert [each["worked"]["state"] for each in facts["workers"]] == ["merging"]
    assert "8 done, 1 in work" in text
    slow.work(out)
    slow.assert_completes(out)
    assert "is complete" in slow.run("status", out).out


def test_watching_ends_with_the_run(site: Site, tmp_path: Path) -> None:
    out = site.plan(tmp_path / "out")
    watching = subprocess.Popen([*COMMAND, "status", str(out), "--watch"], stdout=subprocess.PIPE, text=True)
    site.work(out)
    site.assert_completes(out)
    text, _ = watching.communicate(timeout=60)
    assert watching.returncode == 0
    assert "is complete" in text


def test_a_survey_is_made_once(tmp_path: Path) -> None:
    """A cut over the whole model is looked for by one worker; the others wait for it."""
    base, *models = make_models(tmp_path, shapes=SHAPES)
    recipe = write_recipe(tmp_path / "recipe.yaml", "ties", models, base=base,
                          per_model={"weight": 0.5, "density": 0.4}, parameters={"density_scope": "model"})  # fmt: skip
    with Zygote() as zygote:
        one = tmp_path / "one"
        done = zygote.run([recipe, one, "--out-shard-size", "700KB", *FLAGS])
        assert done.code == 0
        site = Site(zygote, recipe, files(one))
        out = site.plan(tmp_path / "out")
        workers = [start(out, "--index", str(i), "--count", "2") for i in range(2)]
        made = [json.loads(worker.communicate(timeout=120)[0].splitlines()[-1]) for worker in workers]
        assert sum(each["units"] for each in made) == SHARDS
        # What one process reads, and not twice what it looks at.
        assert sum(each["read_bytes"] for each in made) == done.done["bytes_read"]
        site.assert_completes(out)


def test_a_failing_shard_is_not_tried_again(site: Site, tmp_path: Path) -> None:
    """Integers that differ between inputs are an error that only reading finds, and that would come again."""
    models = []
    for number in range(2):
        tensors = make_tensors(number, shapes=SHAPES) | {"model.layers.3.ids": torch.tensor([number])}
        models.append(save_model(tmp_path / f"m{number}", tensors))
    recipe = write_recipe(tmp_path / "recipe.yaml", "linear", models, per_model={"weight": 1})
    out = tmp_path / "out"
    arguments = ["submit", recipe, out, "--plan-only", "--out-shard-size", "700KB"]
    assert site.run(*arguments).code == 0
    done = site.run("work", out, *FLAGS)
    assert done.code == 2
    assert "integers" in done.out
    # Everything else is done, and nobody tries that one again by itself.
    (failed,) = ledger_names(out, "failed")
    assert failed not in ledger_names(out, "done")
    units = len(ledger_names(out, "done")) + 1
    assert site.work(out, "--wait")["units"] == 0
    end = site.run("finalize", out)
    assert end.code == 2
    assert f"1 of {units} shards failed" in end.err
    assert "integers" in end.err
    # Asked for again it is tried again.
    assert site.run(*arguments).code == 0
    assert site.run("work", out, *FLAGS).code == 2


def test_a_directory_that_is_not_shared(site: Site, tmp_path: Path) -> None:
    for verb in ("work", "status", "finalize"):
        done = site.run(verb, tmp_path / "elsewhere")
        assert done.code == 2, verb
        assert "no cluster run is there" in done.err
    assert "file system they share" in site.run("work", tmp_path / "elsewhere").err


def test_another_recipe_or_version_in_out(site: Site, tmp_path: Path) -> None:
    out = site.plan(tmp_path / "out")
    other = write_recipe(tmp_path / "other.yaml", "linear", [site.recipe.parent / "m0", site.recipe.parent / "m1"],
                         per_model={"weight": 1})  # fmt: skip
    done = site.run("submit", other, out, "--plan-only", "--out-shard-size", "700KB")
    assert done.code == 2
    assert "another plan" in done.err
    assert "method" in done.err
    record = out / WORK_FOLDER / "plan.json"
    facts = json.loads(record.read_text())
    facts["facts"]["format"], facts["digest"] = 1, "of another version"
    record.write_text(json.dumps(facts))
    done = site.run("work", out)
    assert done.code == 2
    assert "format: 1 then" in done.err


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"recipe": 1}', "\0"])
def test_a_damaged_job(site: Site, tmp_path: Path, content: str) -> None:
    out = site.plan(tmp_path / "out")
    (folder_of(out) / "job.json").write_text(content)
    for verb in ("work", "status", "finalize"):
        done = site.run(verb, out)
        assert done.code == 2, verb
        assert "is damaged" in done.err
    site.plan(out)
    site.work(out)
    site.assert_completes(out)


def test_a_full_disk_gives_the_work_back(site: Site, tmp_path: Path) -> None:
    out = site.plan(tmp_path / "out")
    told = tmp_path / "told"
    done = site.run("work", out, *FLAGS, way="fail", call="fallocate", code="EDQUOT", number=3, lasting=True,
                    told=str(told))  # fmt: skip
    assert done.code == 3
    assert "quota" in done.out
    assert ledger_names(out, "claims") == ledger_names(out, "attempts") == ledger_names(out, "failed") == []
    site.work(out)
    site.assert_completes(out)


def test_what_one_machine_cannot_read_is_left_to_others(site: Site, tmp_path: Path) -> None:
    out = site.plan(tmp_path / "out")
    done = site.run("work", out, *FLAGS, way="fail", call="preadv", code="EIO", number=9, lasting=True,
                    told=str(tmp_path / "told"))  # fmt: skip
    assert done.code == 4
    assert ledger_names(out, "claims") == ledger_names(out, "attempts") == ledger_names(out, "failed") == []
    site.work(out)
    site.assert_completes(out)


def test_models_named_relative_to_where_it_was_submitted(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_models(tmp_path / "here", shapes=SHAPES)
    recipe = write_recipe(tmp_path / "recipe.yaml", "linear", ["here/m0", "here/m1"], per_model={"weight": 1})
    out = tmp_path / "out"
    done = subprocess.run([*COMMAND, "submit", recipe.name, "out", "--plan-only"], cwd=tmp_path, check=False,
                          env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])})  # fmt: skip
    assert done.returncode == 0
    recipe.unlink()
    assert site.work(out)["units"] == 1
    assert site.run("finalize", out).code == 0


def test_opening_goes_where_it_was_submitted(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    out = site.plan(tmp_path / "out")
    found = open_job(out, lambda _: None)
    assert found is not None
    assert len(found.units) == SHARDS
    assert all(unit.moved_bytes > 0 for unit in found.units)
