"""The output directory: whose it is, what lies in it, and taking it over for one merge.

claim      refuse an OUT that is an input, or holds something else; lock it; find or write its plan
leftovers  what an abandoned merge left behind
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from streammerge.base.errors import OutputError
from streammerge.plan.plan import Plan
from streammerge.run.journal import WORK_FOLDER, Done, Journal
from streammerge.storage.checkpoint import Checkpoint
from streammerge.storage.local import is_file, sync_directory, try_lock
from streammerge.storage.sink import PARTIAL_SUFFIX, partial_path, translate, write_file

MANIFEST_NAME = "streammerge.manifest.json"
# In the work folder: what workers of a cluster run leave for each other.
CLUSTER_FOLDER = "cluster"
# The work folder of a merge that is complete, until it is removed.
_FINISHED_FOLDER = f"{WORK_FOLDER}.finished"
_REMOVALS = 5
_REMOVAL_SECONDS = 0.1
_SHARD = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")


def check_apart(out: Path, checkpoints: Sequence[Checkpoint]) -> None:
    """Refuse an OUT that is, contains, or lies in an input."""
    target = out.resolve()
    for checkpoint in checkpoints:
        source = checkpoint.path.resolve()
        if target == source:
            raise OutputError(f"{out}: is also an input. Choose another directory for the result.")
        if source in target.parents or target in source.parents:
            relation = "lies inside" if source in target.parents else "contains"
            raise OutputError(f"{out}: {relation} the input {checkpoint.path}. Choose a directory apart from it.")


def finished_digest(out: Path) -> str | None:
    """The digest of the plan that OUT is the finished result of, or None."""
    return None if (out / WORK_FOLDER).exists() else manifest_digest(out)


def manifest_digest(out: Path) -> str | None:
    """What the manifest says of its plan, None where there is no manifest. Raises OutputError when it is damaged."""
    manifest = out / MANIFEST_NAME
    if not manifest.exists():
        return None
    digest = _read_json(manifest, "Remove the directory, or choose another one.").get("digest")
    return digest if isinstance(digest, str) else None


def check_usable(out: Path) -> None:
    """Refuse an OUT that no merge could be written to: a file, or a directory with something else in it.

    For work that comes before a merge and would be in vain. Whose OUT it is, `claim` finds out.
    """
    if out.exists() and not out.is_dir():
        raise OutputError(f"{out}: is a file. Choose a directory for the result.")
    if out.is_dir() and not (out / WORK_FOLDER).is_dir() and finished_digest(out) is None:
        check_empty(out)


@contextmanager
def claim(out: Path, plan: Plan, files: Sequence[str], *, restart: bool, joins: bool = False) -> Iterator[Path]:
    """Take OUT over: yields its work folder, locked, with this plan and the names of all `files` to come written in it.

    A merge that is complete by then leaves nothing but its files there.

    Raises OutputError when OUT holds something else, is locked, belongs to another plan, or, unless `joins`, to a
    cluster run.
    """
    work = out / WORK_FOLDER
    _check_free(out, work, plan)
    try:
        make_folders(work)
    except OSError as error:
        raise translate(out, error) from error
    with _locked(out, work):
        if restart:
            # First, and with its folders: a worker that lives on finds nowhere to put what it has made.
            shutil.rmtree(work / CLUSTER_FOLDER, ignore_errors=True)
            delete(leftovers(out))
        elif not joins and (work / CLUSTER_FOLDER / "job.json").exists():
            raise OutputError(
                f"{out}: belongs to a cluster run. `streammerge work {out}` joins it, `streammerge finalize {out}` "
                "completes it once all is done, --restart throws its work away."
            )
        record = work / "plan.json"
        if record.exists():
            check_record(out, plan)
        else:
            content = {"digest": plan.digest, "facts": plan.facts, "files": files}
            write_file(record, json.dumps(content, indent=1).encode())
        yield work
    sweep(out)


def check_record(out: Path, plan: Plan) -> None:
    """Raise OutputError when the plan that was begun in OUT is not this one."""
    record = out / WORK_FOLDER / "plan.json"
    _compare(out, _read_json(record, "Give --restart to begin again, or choose another directory."), plan)


def make_folders(folder: Path) -> None:
    """Make a folder and those it is in, so that they are there after a power cut."""
    if folder.is_dir():
        return
    make_folders(folder.parent)
    folder.mkdir(exist_ok=True)
    sync_directory(folder.parent)


@contextmanager
def _locked(out: Path, work: Path) -> Iterator[None]:
    """Hold the lock of OUT. Raises OutputError when another process does."""
    try:
        lock = os.open(work / "lock", os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise translate(out, error) from error
    try:
        if not try_lock(lock):
            raise OutputError(f"{out}: another merge is running into it. Wait for it, or choose another OUT.")
        yield
    finally:
        os.close(lock)


def trust(out: Path, plan: Plan, journal: Journal) -> None:
    """Make the journal say only what the files in OUT bear out.

    A shard, or its partial file, that is gone or of the wrong size has lost its tensors. A finished shard whose tensors
    are not all in the journal becomes a partial file again.
    """
    kept: list[Done] = []
    for shard in plan.shards:
        known = [journal.done[entry.name] for entry in shard.entries if entry.name in journal.done]
        final, partial = out / shard.name, partial_path(out / shard.name)
        if begins_with(final, shard.header, shard.nbytes):
            kept += known
            if len(known) < len(shard.entries):
                try:
                    final.rename(partial)
                except OSError as error:
                    raise translate(final, error) from error
        elif begins_with(partial, b"", shard.nbytes):
            kept += known
    if len(kept) < len(journal.done):
        journal.keep(kept)


def is_complete(out: Path, plan: Plan, files: Sequence[str]) -> bool:
    """Whether every one of the files to come is in OUT, so that only the work folder is left to remove."""
    try:
        if manifest_digest(out) != plan.digest:
            return False
    except OutputError:
        # A damaged manifest is written again.
        return False
    return all((out / name).is_file() for name in files) and all(
        begins_with(out / shard.name, shard.header, shard.nbytes) for shard in plan.shards
    )


def begins_with(path: Path, header: bytes, size: int) -> bool:
    """Whether there is a file of this size that begins with these bytes."""
    if not path.is_file() or path.stat().st_size != size:
        return False
    with path.open("rb") as file:
        return file.read(len(header)) == header


def leftovers(out: Path) -> list[Path]:
    """What an unfinished merge has left in OUT: the files its plan names, whole or partial, and its work folder's.

    Where the plan is damaged: whatever has the name of a shard.
    """
    work = out / WORK_FOLDER
    if not work.is_dir():
        return []
    names = _planned_names(work / "plan.json")
    if names is None:
        # The manifest too: alone it would say that OUT is finished.
        found = [
            path
            for path in sorted(out.iterdir())
            if path.name == MANIFEST_NAME or _SHARD.fullmatch(path.name.removesuffix(PARTIAL_SUFFIX))
        ]
    else:
        found = [path for name in names for path in (out / name, partial_path(out / name)) if is_file(path)]
    return found + sorted(file for file in work.rglob("*") if file.is_file() and file != work / "lock")


def _planned_names(record: Path) -> list[str] | None:
    """The names of the files that the plan in OUT makes, or None where it does not say."""
    try:
        names = _read_json(record, "").get("files") if record.exists() else None
    except OutputError:
        return None
    if not isinstance(names, list):
        return None
    return [name for name in names if isinstance(name, str) and name and Path(name).name == name]


def clean(out: Path, *, remove: bool) -> list[Path]:
    """The leftovers in OUT, removed if asked. Raises OutputError when a merge is running there."""
    work = out / WORK_FOLDER
    if not work.is_dir():
        return []
    with _locked(out, work):
        files = leftovers(out)
        if remove:
            delete(files)
            finish(out)
    if remove:
        sweep(out)
    return files


def delete(files: Sequence[Path]) -> None:
    """Delete `leftovers`."""
    try:
        for file in files:
            file.unlink()
    except OSError as error:
        raise translate(file, error) from error


def finish(out: Path) -> None:
    """Say that the merge in OUT is complete: its work folder gives up its name, in one step, and can then be removed.

    A worker of a cluster run that comes too late finds no place any more to put something.
    """
    sweep(out)
    try:
        (out / WORK_FOLDER).rename(out / _FINISHED_FOLDER)
        sync_directory(out)
    except FileNotFoundError:
        # Where there are no locks another process may have completed it, too.
        pass
    except OSError as error:
        raise translate(out, error) from error


def sweep(out: Path) -> None:
    """Remove what a complete merge has left behind, once its lock and its journal are closed.

    Files that are open, here or on another machine, keep a name in their folder on network file systems: they are
    waited for a little, and if they stay the folder does, until somebody looks at OUT again.
    """
    folder = out / _FINISHED_FOLDER
    for _ in range(_REMOVALS):
        try:
            shutil.rmtree(folder)
        except FileNotFoundError:
            # Gone; or another process sweeps, too.
            if not folder.exists():
                return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EBUSY):
                raise translate(out, error) from error
            time.sleep(_REMOVAL_SECONDS)
        else:
            return


def _check_free(out: Path, work: Path, plan: Plan) -> None:
    if out.exists() and not out.is_dir():
        raise OutputError(f"{out}: is a file. Choose a directory for the result.")
    if work.is_dir() or not out.exists():
        return
    if (digest := finished_digest(out)) is not None:
        raise OutputError(
            f"{out}: holds the finished result of another merge (plan {digest[:12]}, this one is {plan.digest[:12]}). "
            f"Choose another directory, or remove it."
        )
    check_empty(out)


def check_empty(out: Path) -> None:
    """Raise OutputError when the directory OUT holds anything but what a complete merge has left to be removed."""
    content = sorted(path.name for path in out.iterdir() if path.name != _FINISHED_FOLDER)
    if content:
        shown = ", ".join(content[:3]) + (" and more" if len(content) > 3 else "")
        raise OutputError(f"{out}: is not empty (it holds {shown}). Nothing of yours is overwritten: choose another.")


def _compare(out: Path, record: dict[str, Any], plan: Plan) -> None:
    if record.get("digest") == plan.digest:
        return
    before = record.get("facts")
    changes = list(_differences("", before if isinstance(before, dict) else {}, plan.facts))
    shown = "\n".join(f"  {change}" for change in changes[:12])
    more = f"\n  and {len(changes) - 12} more" if len(changes) > 12 else ""
    raise OutputError(
        f"{out}: holds an unfinished merge of another plan; what differs:\n{shown}{more}\n"
        f"Restore it to go on, choose another directory, or give --restart to throw the unfinished work away."
    )


def _differences(place: str, before: Any, after: Any) -> Iterator[str]:
    if isinstance(before, dict) and isinstance(after, dict):
        for key in sorted({*before, *after}):
            yield from _differences(f"{place}.{key}".lstrip("."), before.get(key), after.get(key))
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for i, (old, new) in enumerate(zip(before, after, strict=True)):
            yield from _differences(f"{place}[{i}]", old, new)
    elif before != after:
        yield f"{place}: {_short(before)} then, {_short(after)} now"


def _short(value: Any) -> str:
    text = "nothing" if value is None else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "…"


def _read_json(path: Path, advice: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise OutputError(f"{path}: cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError):
        raise OutputError(f"{path}: is damaged. {advice}") from None
    return content if isinstance(content, dict) else {}
