"""The command line itself: what is wrong with it is one line and exit code 2, never a traceback."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.command import streammerge


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("recipe.yaml", "out", "--nope"), "No such option"),
        (("merge",), "Missing argument"),
        (("plan", "a", "b", "c"), "unexpected extra argument"),
        (("recipe.yaml", "out", "--threads", "none"), "valid integer"),
        (("recipe.yaml", "out", "--rng", "dice"), "is not one of"),
        (("recipe.yaml", "out", "--max-memory", "24Gb"), "--max-memory"),
        (("methods", "tise"), "Did you mean ties?"),
    ],
)
def test_a_wrong_command_line_is_said_in_a_line_with_exit_code_2(arguments: tuple[str, ...], message: str) -> None:
    done = streammerge(*arguments)
    assert done.code == 2
    assert message in done.err
    assert "Traceback" not in done.err


def test_help_and_version_are_no_errors(tmp_path: Path) -> None:
    for arguments in (("--help",), ("--version",), ("merge", "-h")):
        assert streammerge(*arguments, cwd=tmp_path).code == 0
