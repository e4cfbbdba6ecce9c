"""Outputs in the states that a stop or a crash leaves them in, made from finished ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from streammerge.plan.plan import Plan
from streammerge.run.journal import WORK_FOLDER, Done, Journal
from streammerge.run.manifest import read_manifest
from streammerge.run.merge import file_names
from streammerge.run.output import MANIFEST_NAME, claim
from streammerge.run.sidefiles import side_files


def before_the_end(out: Path, plan: Plan, *, keeps: Callable[[str], bool] = lambda _: True) -> None:
    """Give a finished `out` its work folder back, as if the last step, removing it, had not happened.

    The journal holds the tensors whose name `keeps` accepts.
    """
    checksums = read_manifest(out)["tensors"]
    (out / WORK_FOLDER).mkdir()
    with claim(out, plan, file_names(plan, side_files(plan)), restart=False) as work:
        journal = Journal(work / "journal")
        journal.append([Done(name, checksum) for name, checksum in checksums.items() if keeps(name)])
        journal.close()


def before_the_side_files(out: Path, plan: Plan, *, keeps: Callable[[str], bool] = lambda _: True) -> None:
    """As `before_the_end`, with shards only: side files, manifest and index are still to come."""
    before_the_end(out, plan, keeps=keeps)
    shards = {shard.name for shard in plan.shards}
    for path in out.iterdir():
        if path.is_file() and path.name not in shards:
            path.unlink()
    assert not (out / MANIFEST_NAME).exists()
