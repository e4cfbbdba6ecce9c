"""Facts about the machine and the versions, for the head of a table."""

import datetime
import os
import platform
import subprocess
import sys
from pathlib import Path

from benchlib.project import child_environment

PACKAGES = ("streammerge", "mergekit", "torch", "transformers", "safetensors", "numpy")
ASK_VERSIONS = """
import importlib.metadata, platform, sys
print("python", platform.python_version())
for name in sys.argv[1:]:
    try:
        print(name, importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        pass
"""


def describe_machine() -> dict[str, str]:
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": f"{_cpu_model()}, {os.cpu_count()} logical CPUs",
        "memory": f"{_memory_bytes() / 2**30:.1f} GiB",
        "kernel": f"{platform.system()} {platform.release()}",
    }


def describe_versions(python: Path | str = sys.executable) -> str:
    """What the environment of `python` has installed, as one line."""
    answer = subprocess.run(
        [str(python), "-c", ASK_VERSIONS, *PACKAGES],
        capture_output=True, text=True, check=False, env=child_environment(), cwd="/",
    )  # fmt: skip
    return ", ".join(answer.stdout.splitlines()) or "unknown"


def read_busy_seconds() -> float:
    """CPU seconds that all processes and the kernel of this machine have used since it started."""
    first_line = Path("/proc/stat").read_text().partition("\n")[0]
    user, nice, system, _idle, _iowait, irq, softirq = first_line.split()[1:8]
    ticks = int(user) + int(nice) + int(system) + int(irq) + int(softirq)
    return ticks / os.sysconf("SC_CLK_TCK")


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return value.strip()
    return platform.machine()


def _memory_bytes() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
