"""Runs under a real Slurm: whatever it does to the workers, the output is that of one machine, and no stray file."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from streammerge.run.claims import Claimed, Claims
from streammerge.run.journal import WORK_FOLDER
from tests.cluster.real_slurm import Slurm, is_there, wait_for
from tests.cluster.test_workers import ledger_folder, ledger_names, worker_pids
from tests.command import COMMAND, Result
from tests.models import make_models, write_recipe
from tests.run.test_crash import files

pytestmark = [pytest.mark.cluster, pytest.mark.skipif(not is_there(), reason="Slurm is not installed here")]

ROOT = Path(__file__).resolve().parents[2]
SHARDS = 24
FLAGS = ("--out-shard-size", "700KB", "--threads", "1", "--compile", "off", "--json")
SECONDS = 60.0


@dataclass(frozen=True)
class Site:
    """A merge whose every shard takes a worker about a quarter of a second, and what one machine makes of it."""

    slurm: Slurm
    recipe: Path
    whole: dict[str, bytes]

    def run(self, *arguments: str | Path) -> Result:
        done = subprocess.run([*COMMAND, *map(str, arguments)], env=self.slurm.environment, cwd=ROOT,
                              capture_output=True, text=True, check=False, timeout=SECONDS)  # fmt: skip
        return Result(done.returncode, done.stdout, done.stderr)

    def submit(self, out: Path, workers: int, *flags: str) -> tuple[str, str]:
        """Send a run; returns the ids of its array and finaliser."""
        done = self.run("submit", self.recipe, out, "--workers", str(workers), *FLAGS, *flags)
        assert done.code == 0, done.err + done.out
        return done.events[-1]["array"], done.events[-1]["finaliser"]

    def assert_completes(self, out: Path, seconds: float = SECONDS) -> None:
        try:
            wait_for(lambda: is_complete(out), seconds)
        except AssertionError:
            logs = "\n".join(f"{log.name}: {log.read_text()}" for log in sorted(logs_of(out).iterdir()))
            raise AssertionError(f"{self.slurm.ask('squeue', '-t', 'all', '-r')}\n{logs}") from None
        assert files(out) == self.whole
        verdict = self.run("verify", out)
        assert verdict.code == 0, verdict.err


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("slurm")
    shapes = {f"model.layers.{i}.mlp.up_proj.weight": (150, 10240) for i in range(SHARDS)}
    base, *models = make_models(folder, shapes=shapes)
    recipe = write_recipe(folder / "recipe.yaml", "arcee_fusion", models[:1], base=base)
    with Slurm(folder / "daemons") as slurm:
        site = Site(slurm, recipe, {})
        done = site.run(recipe, folder / "one", *FLAGS)
        assert done.code == 0, done.err + done.out
        yield Site(slurm, recipe, files(folder / "one"))


def is_complete(out: Path) -> bool:
    return (out / "streammerge.manifest.json").exists() and not (out / WORK_FOLDER).exists()


def logs_of(out: Path) -> Path:
    return out.with_name(f"{out.name}.logs")


def done_units(out: Path) -> int:
    return SHARDS if is_complete(out) else len(ledger_names(out, "done"))


@contextmanager
def held(out: Path, count: int) -> Iterator[dict[str, int]]:
    """So many workers, each stopped (SIGSTOP) while it makes a shard; afterwards they go on, if they still live."""
    workers: dict[str, int] = {}

    def hold() -> bool:
        for name, pid in worker_pids(out).items():
            if name not in workers:
                os.kill(pid, signal.SIGSTOP)
                workers[name] = pid
        return len(workers) == count and all(map(is_stopped, workers.values()))

    try:
        wait_for(hold)
        yield workers
    finally:
        for pid in workers.values():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


def is_signalled(pid: int) -> bool:
    """Whether a stopped process goes on, is gone, or has a signal waiting for it."""
    try:
        status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    except (FileNotFoundError, ProcessLookupError):
        return True
    return not status["State"].strip().startswith("T") or int(status["ShdPnd"], 16) != 0


def is_stopped(pid: int) -> bool:
    """Whether a process is there, held still."""
    return "\nState:\tT" in Path(f"/proc/{pid}/status").read_text()


def node_of(pid: int) -> str:
    """The node that a worker was started on."""
    variables = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
    return dict(variable.split("=", 1) for variable in variables if "=" in variable)["SLURMD_NODENAME"]


def ledger_claims(out: Path) -> list[Claimed]:
    """Who works on which shard."""
    claims = Claims(ledger_folder(out, "claims")).all()
    return [claim for claim in claims if claim.name.isdigit()]


def test_four_workers_on_two_nodes(site: Site, tmp_path: Path) -> None:
    out = tmp_path / 'an "output" of 50% #1'
    array, finaliser = site.submit(out, 4, "--sbatch=--comment='of the test'")
    site.assert_completes(out)
    wait_for(lambda: site.slurm.states(finaliser) == ["COMPLETED"])
    assert site.slurm.states(array) == ["COMPLETED"] * 4
    report = (logs_of(out) / f"finish_{finaliser}.log").read_text()
    assert report.count("slurm-") == 4
    assert len(list(logs_of(out).glob(f"{array}_*.log"))) == 4


def test_two_go_on_with_what_four_began_and_cancelled_stays_cancelled(site: Site, tmp_path: Path) -> None:
    out = tmp_path / "out"
    array, finaliser = site.submit(out, 4)
    wait_for(lambda: 1 <= done_units(out) < SHARDS - 2)
    site.slurm.ask("scancel", finaliser, array)
    wait_for(lambda: set(site.slurm.states(array) + site.slurm.states(finaliser)) <= {"CANCELLED", "COMPLETED"})
    begun = done_units(out)
    assert begun < SHARDS
    assert not is_complete(out)
    # Nothing is queued, and nothing is claimed: the workers gave it back.
    assert site.slurm.ask("squeue", "-h") == ""
    assert ledger_names(out, "claims") == []
    site.submit(out, 2)
    assert done_units(out) >= begun
    site.assert_completes(out)


def test_a_second_array_joins(site: Site, tmp_path: Path) -> None:
    out = tmp_path / "out"
    site.submit(out, 1)
    wait_for(lambda: done_units(out) >= 1)
    script = f"#!/bin/bash\nexec {' '.join(COMMAND)} work {out} --threads=1 --compile=off\n"
    joined = subprocess.run(
        ["sbatch", "--parsable", "--array=0-1", f"--chdir={ROOT}", f"--output={tmp_path}/joined_%a.log"], input=script,
        env=site.slurm.environment, capture_output=True, text=True, check=True,
    ).stdout.strip()  # fmt: skip
    site.assert_completes(out)
    wait_for(lambda: site.slurm.states(joined) == ["COMPLETED"] * 2)
    assert "shards" in (tmp_path / "joined_0.log").read_text()


@pytest.mark.parametrize("partition", ["low", "graceful"])
def test_preemption(site: Site, tmp_path: Path, partition: str) -> None:
    """Workers must go for a job of a higher partition: at once, or after a signal that they hear."""
    out = tmp_path / "out"
    array, _ = site.submit(out, 2, "--partition", partition, "--sbatch=--exclusive")
    with held(out, 2) as workers:
        high = subprocess.run(["sbatch", "--parsable", "-p", "high", "--exclusive", "-N2", "--wrap", "sleep 2",
                               f"--output={tmp_path}/high.log"], env=site.slurm.environment, capture_output=True,
                              text=True, check=True).stdout.strip()  # fmt: skip
        wait_for(lambda: all(map(is_signalled, workers.values())))
    wait_for(lambda: site.slurm.states(high) == ["COMPLETED"])
    site.assert_completes(out)
    logs = "".join(log.read_text() for log in logs_of(out).glob(f"{array}_*.log"))
    if partition == "graceful":
        # Both hear of it in time. Who is still RUNNING then puts itself back into the queue; the other is made up for.
        assert logs.count("Stopped by SIGUSR1") == 2
        assert "Slurm is asked to start this worker again" in logs
    else:
        # SIGTERM comes together with the signal that the script asks for; Slurm has put them back itself.
        assert logs.count("Stopped by SIG") == logs.count("DUE TO PREEMPTION") == 2


def test_a_node_goes_down(site: Site, tmp_path: Path) -> None:
    out = tmp_path / "out"
    site.submit(out, 4)
    with held(out, 4):
        site.slurm.ask("scontrol", "update", "NodeName=n2", "State=DOWN", "Reason=test")
    try:
        site.assert_completes(out)
    finally:
        site.slurm.ask("scontrol", "update", "NodeName=n2", "State=RESUME")
        wait_for(lambda: site.slurm.ask("sinfo", "-h", "-o", "%T", "-p", "low").split() == ["idle"])


def test_a_worker_is_killed(site: Site, tmp_path: Path) -> None:
    """Its shard is taken again at once where Slurm starts it again, or by the finaliser's next round."""
    out = tmp_path / "out"
    site.submit(out, 2, "--stale-after", "2")
    with held(out, 2) as workers:
        os.kill(next(iter(workers.values())), signal.SIGKILL)
    site.assert_completes(out)


def test_tasks_cancelled_one_by_one_are_made_up_for(site: Site, tmp_path: Path) -> None:
    out = tmp_path / "out"
    array, finaliser = site.submit(out, 3)
    with held(out, 3):
        for task in range(3):
            site.slurm.ask("scancel", f"{array}_{task}")
    site.assert_completes(out)
    assert site.slurm.states(finaliser) == ["COMPLETED"]
    assert set(site.slurm.states(array)) <= {"CANCELLED", "COMPLETED"}


def test_the_time_limit(site: Site, tmp_path: Path) -> None:
    """A minute is Slurm's shortest, and it warns a minute before: the worker stops, and puts itself into the queue."""
    out = tmp_path / "out"
    array, _ = site.submit(out, 1, "--time", "1")
    with held(out, 1) as workers:
        wait_for(lambda: all(map(is_signalled, workers.values())), 90)
    site.assert_completes(out)
    log = (logs_of(out) / f"{array}_0.log").read_text()
    assert "Stopped by SIGUSR1" in log
    assert "Slurm is asked to start this worker again" in log
    # It is the same task, and not a later round's.
    assert len(list(logs_of(out).glob("*_0.log"))) == 1


def test_two_live_attempts_at_one_shard(site: Site, tmp_path: Path) -> None:
    """The daemon of a node is killed, its worker lives on, and Slurm starts the task again elsewhere."""
    out = tmp_path / "out"
    site.submit(out, 2, "--sbatch=--exclusive")
    with held(out, 2) as workers:
        nodes = {node_of(pid): (name, pid) for name, pid in workers.items()}
        name, pid = nodes["n2"]
        (unit,) = (claim.name for claim in ledger_claims(out) if claim.worker == name)
        site.slurm.kill_node("n2")
        site.slurm.ask("scontrol", "update", "NodeName=n2", "State=DOWN", "Reason=test")
        try:
            # The other one makes room on its node, where the first is started again and makes what it held.
            os.kill(nodes["n1"][1], signal.SIGCONT)
            wait_for(lambda: is_complete(out) or unit in ledger_names(out, "done"))
            assert is_stopped(pid)
        finally:
            site.slurm.start_node("n2")
            site.slurm.ask("scontrol", "update", "NodeName=n2", "State=RESUME")
    wait_for(lambda: not Path(f"/proc/{pid}").exists())
    site.assert_completes(out)
    wait_for(lambda: site.slurm.ask("sinfo", "-h", "-o", "%T", "-p", "low").split() == ["idle"])


def test_an_unknown_partition(site: Site, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = site.run("submit", site.recipe, out, "--workers", "2", "--partition", "nowhere", *FLAGS)
    assert done.code == 2
    assert "nvalid partition" in done.events[-1]["text"]
    assert site.slurm.ask("squeue", "-h") == ""
    # What was planned is there, and can be sent again.
    site.submit(out, 2)
    site.assert_completes(out)


def test_an_array_larger_than_the_site_allows(site: Site, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = site.run("submit", site.recipe, out, "--workers", str(SHARDS), *FLAGS)
    assert done.code == 2
    assert "Slurm did not take the job" in done.events[-1]["text"]
    assert site.slurm.ask("squeue", "-h") == ""


@pytest.mark.parametrize("option", ["--array=0-3", "-a 0-3", "--dependency=after:1", "--signal=USR2"])
def test_options_of_sbatch_that_are_ours(site: Site, tmp_path: Path, option: str) -> None:
    done = site.run("submit", site.recipe, tmp_path / "out", "--workers", "2", f"--sbatch={option}", *FLAGS)
    assert done.code == 2
    assert "set by submit" in done.events[-1]["text"]
    assert site.slurm.ask("squeue", "-h") == ""


def test_dry_run_sends_nothing(site: Site, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = site.run("submit", site.recipe, out, "--workers", "50", "--dry-run", "--time", "1:00:00", *FLAGS)
    assert done.code == 0
    assert f"#SBATCH --array=0-{SHARDS - 1}" in done.out
    assert "#SBATCH --time=1:00:00" in done.out
    assert not out.exists()
    assert site.slurm.ask("squeue", "-h") == ""
