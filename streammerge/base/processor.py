"""A processor whose widest vectors are not its quickest."""

from __future__ import annotations

import os
from pathlib import Path

_CPUINFO = Path("/proc/cpuinfo")
# By numpy 2.4's names and by earlier ones.
_AVX512 = "X86_V4 AVX512_SKX"


def choose_numpy_code() -> None:
    """Let numpy, if it is not imported yet, do without AVX-512 on Zen 4, unless it was told something already.

    There, storing the lanes that a mask selects is microcode, of which numpy's sort is made: 8.0 ns per float32 where
    AVX2 takes 2.9 (rows of 2,048, numpy 2.4.6, 2026-11-29).
    """
    try:
        text = _CPUINFO.read_text()
    except OSError:
        return
    if is_zen4(text):
        os.environ.setdefault("NPY_DISABLE_CPU_FEATURES", _AVX512)


def is_zen4(cpuinfo: str) -> bool:
    """Whether /proc/cpuinfo is that of AMD's Zen 4: of its family, 25, only that has AVX-512."""
    first = cpuinfo.split("\n\n", 1)[0]
    facts = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in first.splitlines())}
    family = facts.get("vendor_id"), facts.get("cpu family")
    return family == ("AuthenticAMD", "25") and "avx512f" in facts.get("flags", "").split()
