"""A Slurm of two nodes on this machine: its own munge, controller and node daemons, all of them on loopback.

Needs the packages slurmctld, slurmd, slurm-client and munge, and root. Nothing of the system's own Slurm is touched.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scontrol", "scancel")
NODES = ("n1", "n2")
_START_SECONDS = 20

_CONFIGURATION = """
ClusterName=streammerge
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={controller}
SlurmUser=root
SlurmdUser=root
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SlurmdParameters=config_overrides
SlurmctldParameters=preempt_send_user_signal
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
PropagateResourceLimits=NONE
ReturnToService=2
KillWait=25
SlurmdTimeout=10
MinJobAge=3600
MaxArraySize=20
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,sched_min_interval=0
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{nodes}
PartitionName=low Nodes=n1,n2 Default=YES MaxTime=INFINITE PriorityTier=1 State=UP OverSubscribe=NO
PartitionName=graceful Nodes=n1,n2 MaxTime=INFINITE PriorityTier=1 GraceTime=30 State=UP OverSubscribe=NO
PartitionName=high Nodes=n1,n2 MaxTime=INFINITE PriorityTier=10 State=UP OverSubscribe=NO PreemptMode=OFF
"""


class Slurm:
    """The daemons in one folder, from entering to leaving. Owns their processes, and ends no others."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Slurm:
        for name in ("state", *(f"spool-{node}" for node in NODES)):
            (self.folder / name).mkdir(parents=True)
        self.folder.chmod(0o755)
        key = self.folder / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o600)
        controller, *ports = _free_ports(1 + len(NODES))
        nodes = "\n".join(
            f"NodeName={name} NodeHostname=localhost NodeAddr=127.0.0.1 Port={port} CPUs=2 RealMemory=2000"
            for name, port in zip(NODES, ports, strict=True)
        )
        text = _CONFIGURATION.format(folder=self.folder, controller=controller, nodes=nodes)
        (self.folder / "slurm.conf").write_text(text)
        folder = self.folder
        self._start("munged", "--foreground", "--force", f"--key-file={key}", f"--socket={folder}/munge.socket",
                    f"--pid-file={folder}/munge.pid", f"--log-file={folder}/munge.log",
                    f"--seed-file={folder}/munge.seed", "--num-threads=2")  # fmt: skip
        wait_for((folder / "munge.socket").exists)
        self._start("slurmctld", "-D", "-f", f"{folder}/slurm.conf")
        for node in NODES:
            self.start_node(node)
        wait_for(lambda: self.ask("sinfo", "-h", "-o", "%T", "-p", "low").split() == ["idle"], _START_SECONDS)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.ask("scancel", "-u", "root")
        for daemon in reversed(self._daemons.values()):
            daemon.send_signal(signal.SIGTERM)
            try:
                daemon.wait(timeout=10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()

    def ask(self, *command: str) -> str:
        """What a command of Slurm prints; also when it fails."""
        done = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, check=False, timeout=60
        )  # fmt: skip
        return done.stdout + done.stderr

    def states(self, job: str) -> list[str]:
        """The states of a job's tasks, as long as Slurm remembers them."""
        return self.ask("squeue", "-h", "-r", "-t", "all", "-j", job, "-o", "%T").split()

    def start_node(self, node: str) -> None:
        self._start(node, "-D", "-N", node, "-f", f"{self.folder}/slurm.conf", program="slurmd")

    def kill_node(self, node: str) -> None:
        """The daemon of a node dies; what runs there lives on."""
        self._daemons[node].kill()
        self._daemons[node].wait()

    def _start(self, name: str, *flags: str, program: str | None = None) -> None:
        log = (self.folder / f"{name}.out").open("ab")
        path = shutil.which(program or name) or f"/usr/sbin/{program or name}"
        # A session of its own: slurmd ends its process group.
        self._daemons[name] = subprocess.Popen(
            [path, *flags], env=self.environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip
        log.close()


def is_there() -> bool:
    """Whether Slurm's programs are installed and may be started."""
    path = f"{os.environ.get('PATH', '')}:/usr/sbin"
    return os.geteuid() == 0 and all(shutil.which(program, path=path) for program in PROGRAMS)


def wait_for(condition: Callable[[], object], seconds: float = 30) -> None:
    """Return when `condition()` holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came to that"
        time.sleep(0.05)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports
