"""Running the command as a user does: a process of its own, its output and its exit code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

COMMAND = (sys.executable, "-m", "streammerge")


@dataclass(frozen=True)
class Result:
    """What a finished command left."""

    code: int
    out: str
    err: str

    @property
    def events(self) -> list[dict[str, Any]]:
        """The JSON lines of --json."""
        return [json.loads(line) for line in self.out.splitlines()]

    @property
    def done(self) -> dict[str, Any]:
        """The last event, which must be `done`."""
        assert self.code == 0, self.err + self.out
        assert self.events[-1]["event"] == "done"
        return self.events[-1]


def streammerge(*arguments: str | Path, cwd: Path | None = None, env: Mapping[str, str] | None = None,
                before: Callable[[], None] | None = None, timeout: float = 120) -> Result:  # fmt: skip
    """Run `streammerge ARGUMENTS`; `before` runs in the child before it begins."""
    done = subprocess.run(
        [*COMMAND, *map(str, arguments)], cwd=cwd, env=os.environ | (env or {}), preexec_fn=before,
        capture_output=True, text=True, timeout=timeout, check=False,
    )  # fmt: skip
    return Result(done.returncode, done.stdout, done.stderr)
