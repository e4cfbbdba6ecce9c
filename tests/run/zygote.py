"""Runs of the command that take a third of a second: a process that has imported everything is forked for each.

Beside it is the way to break them (breaking.py). Only the child is broken; it has no threads yet when it is made.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.command import Result

_SECONDS = 60


class Zygote:
    """The process, and a folder for what its children print. Owns both."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.run.zygote"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            cwd=Path(__file__).resolve().parents[2],
        )  # fmt: skip

    def __enter__(self) -> Zygote:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.communicate()
        self._folder.cleanup()

    def run(self, arguments: Sequence[str | Path], way: str | None = None, **options: Any) -> Result:
        """Run `streammerge ARGUMENTS`, broken in one of the ways of breaking.py. A hang is an error."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        out, err = (Path(self._folder.name) / name for name in ("out", "err"))
        request = {
            "arguments": [str(a) for a in arguments],
            "way": way,
            "options": options,
            "out": str(out),
            "err": str(err),
        }
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        code = int(self._process.stdout.readline())
        result = Result(code, out.read_text(), err.read_text())
        assert code != -signal.SIGALRM, f"it hangs: {request}\n{result.err}"
        return result


def _serve() -> None:
    from streammerge.cli import main
    from tests.run import breaking

    # What the command imports when it needs it is there before the fork.
    for module in (
        "streammerge.report", "streammerge.run.merge", "streammerge.study.analysis", "streammerge.cluster.worker",
    ):  # fmt: skip
        import_module(module)
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            for number, name in ((1, "out"), (2, "err")):
                os.dup2(os.open(request[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), number)
            signal.alarm(_SECONDS)
            sys.argv = ["streammerge", *request["arguments"]]
            if request["way"] is not None:
                getattr(breaking, request["way"])(**request["options"])
            main()
            os._exit(70)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    _serve()
