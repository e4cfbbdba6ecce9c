"""An output folder that appears whole: filled beside its place, and put there in one step.

    OUT.partial/lock     held by the process that works
    OUT.partial/whole/   what is being made; renamed to OUT at the end

What a kill leaves is removed by the next run, which begins anew.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from streammerge.base.errors import DoesNotFit, OutputError
from streammerge.run.output import check_empty, make_folders
from streammerge.storage.local import sync_directory, try_lock
from streammerge.storage.sink import partial_path, translate

_LOCK, _WHOLE = "lock", "whole"


def check_new(out: Path) -> None:
    """Raise OutputError unless OUT is nothing yet, or an empty directory."""
    if out.exists() and not out.is_dir():
        raise OutputError(f"{out}: is a file. Choose a directory for the result.")
    if out.is_dir():
        check_empty(out)


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """A folder to fill, which becomes OUT when the body ends, and nothing if the body fails. Raises OutputError."""
    check_new(out)
    target = out.resolve()
    work = partial_path(target)
    whole = work / _WHOLE
    try:
        make_folders(work)
        strangers = sorted(path.name for path in work.iterdir() if path.name not in (_LOCK, _WHOLE))
        if strangers:
            raise OutputError(f"{work}: is where {out} would be made, and holds {strangers[0]}. Choose another OUT.")
        lock = os.open(work / _LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise translate(work, error) from error
    try:
        if not try_lock(lock):
            raise OutputError(f"{out}: another process is making it. Wait for it, or choose another OUT.")
        try:
            shutil.rmtree(whole, ignore_errors=True)
            try:
                whole.mkdir()
            except OSError as error:
                raise translate(whole, error) from error
            try:
                yield whole
            except DoesNotFit as error:
                if isinstance(error.__cause__, OSError):
                    raise DoesNotFit(
                        f"{out}: {error.__cause__.strerror}. Nothing was written: free some space and run it again."
                    ) from error
                raise
            try:
                # Over an empty directory, too, but never over one that was filled meanwhile.
                whole.rename(target)
                sync_directory(target.parent)
            except OSError as error:
                raise translate(out, error) from error
        finally:
            shutil.rmtree(work, ignore_errors=True)
    finally:
        os.close(lock)
