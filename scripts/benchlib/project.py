"""How to start the program under test, and with what environment."""

import os
import shlex
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def streammerge_command() -> list[str]:
    """`python -m streammerge`, to be run in ROOT, or what STREAMMERGE_COMMAND says."""
    replacement = os.environ.get("STREAMMERGE_COMMAND")
    return shlex.split(replacement) if replacement else [sys.executable, "-m", "streammerge"]


def child_environment() -> dict[str, str]:
    """The caller's environment without what would leak this interpreter into another one; the Hub is switched off."""
    dropped = {"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"}
    kept = {name: value for name, value in os.environ.items() if name not in dropped}
    return {**kept, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}


def helper_environment() -> dict[str, str]:
    """The environment in which `python -m benchlib.…` works."""
    return {**child_environment(), "PYTHONPATH": str(ROOT / "scripts")}
