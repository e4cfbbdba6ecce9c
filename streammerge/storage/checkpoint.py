"""A checkpoint as it lies on disk: one file, an index with shards, or a directory of safetensors files.

Opening one reads headers only. What comes out is an ordered map from tensor name to where its bytes are, and a
fingerprint of every file, by which a later run knows that nothing changed.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from streammerge.base.dtypes import DTYPES
from streammerge.base.errors import InputError
from streammerge.storage.header import LENGTH_BYTES, Header, check_length, read_header

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
_MAX_INDEX_BYTES = 256_000_000


@dataclass(frozen=True)
class TensorSpec:
    """Where one tensor's bytes are: file number in its checkpoint, byte offset in that file, dtype and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: int
    offset: int
    nbytes: int

    @property
    def elements(self) -> int:
        return self.nbytes * 8 // DTYPES[self.dtype].bits


@dataclass(frozen=True)
class FileFingerprint:
    """What a file was when its header was read. `name` is relative to the checkpoint."""

    name: str
    size: int
    mtime_ns: int
    header: str


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of one model in file order, and its files."""

    path: Path
    files: tuple[FileFingerprint, ...]
    tensors: dict[str, TensorSpec]

    @property
    def directory(self) -> Path:
        """Where config and tokenizer lie: the checkpoint itself, or the directory of its single file."""
        return self.path if self.path.is_dir() else self.path.parent

    def file_path(self, number: int) -> Path:
        return self.directory / self.files[number].name

    @cached_property
    def nbytes(self) -> int:
        return sum(spec.nbytes for spec in self.tensors.values())


Opener = Callable[[Path], tuple[Header, os.stat_result]]


@dataclass(frozen=True)
class Layout:
    """How a kind of weights lies in a directory: names of the index and of a single file, all files, how one opens."""

    index: str
    single: str
    every: str
    open: Opener


def open_checkpoint(path: Path) -> Checkpoint:
    """Read the headers of the checkpoint at `path` (a directory, or one safetensors file).

    Raises InputError when it is missing, damaged, or when index and files disagree.
    """
    if _is(path, stat.S_ISREG):
        return open_single(path, open_file)
    if not _is(path, stat.S_ISDIR):
        raise InputError(f"{path}: no such model. Give a directory with safetensors files, or one such file.")
    checkpoint = open_directory(path, Layout(INDEX_NAME, SINGLE_NAME, "*.safetensors", open_file))
    if checkpoint is None:
        raise InputError(f"{path}: holds no safetensors file.")
    return checkpoint


def open_single(path: Path, opener: Opener) -> Checkpoint:
    """A checkpoint that is one file. Raises InputError."""
    return _gather(path, [(path.name, *opener(path))])


def open_directory(path: Path, layout: Layout) -> Checkpoint | None:
    """The checkpoint in a directory, or None when it holds no files of this layout. Raises InputError."""
    index, single = path / layout.index, path / layout.single
    if index.exists():
        weight_map = read_index(index)
        names = sorted(set(weight_map.values()))
        if single.exists() and layout.single not in names:
            raise InputError(
                f"{path}: holds both {layout.single} and an index of other shards; one of them is left over from an "
                f"earlier save. Remove the wrong one, or name the file itself as the model."
            )
        missing = [name for name in names if not _is(path / name, stat.S_ISREG)]
        if missing:
            raise InputError(f"{index}: names {_listing(missing)}, which {_are(missing)} not there. Download again.")
        checkpoint = _gather(path, [(name, *_open_own(path, name, layout.open)) for name in names])
        _check_index(index, weight_map, checkpoint)
        return checkpoint
    names = [layout.single] if single.exists() else sorted(file.name for file in path.glob(layout.every))
    return _gather(path, [(name, *_open_own(path, name, layout.open)) for name in names]) if names else None


def leads_outside(directory: Path, name: str) -> Path | None:
    """Where a file of a checkpoint lies, if links lead out of its directory; None for those into a Hub download cache.

    A repository from a stranger may hold links to any file of this machine.
    """
    target, home = (directory / name).resolve(), directory.resolve()
    is_blob = target.parent.name == "blobs" and target.parent.parent.name.startswith("models--")
    return None if target.is_relative_to(home) or is_blob else target


def _open_own(directory: Path, name: str, opener: Opener) -> tuple[Header, os.stat_result]:
    if (target := leads_outside(directory, name)) is not None:
        raise InputError(
            f"{directory / name}: is a link to {target}, outside {directory}. Refused: a checkpoint may not name "
            f"files elsewhere. If the link is your own, put the file itself there, or a hard link (ln without -s)."
        )
    return opener(directory / name)


def open_file(path: Path) -> tuple[Header, os.stat_result]:
    """Header and status of one safetensors file. Raises InputError, naming the file."""
    if _is(path, stat.S_ISFIFO):
        raise InputError(f"{path}: cannot be read: it is a pipe.")
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            raw = file.read(LENGTH_BYTES)
            raw += file.read(check_length(raw, status.st_size, str(path)))
            return read_header(raw, status.st_size, str(path)), status
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}.") from error


def read_index(path: Path) -> dict[str, str]:
    """The weight map of an index: tensor name to file name. Raises InputError; refuses names outside the directory."""
    try:
        if path.stat().st_size > _MAX_INDEX_BYTES:
            raise InputError(f"{path}: larger than {_MAX_INDEX_BYTES} bytes; this is no index.")
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: is not JSON ({error}).") from None
    weight_map: Any = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise InputError(f"{path}: has no weight_map from tensor names to file names.")
    for name in sorted(set(weight_map.values())):
        if not name or name.startswith("/") or ".." in Path(name).parts or "\0" in name:
            raise InputError(f"{path}: names the file {name!r}, outside its own directory. Refused.")
    return weight_map


def _gather(path: Path, parts: Iterable[tuple[str, Header, os.stat_result]]) -> Checkpoint:
    tensors: dict[str, TensorSpec] = {}
    files: list[FileFingerprint] = []
    for name, header, status in parts:
        for entry in header.entries:
            if entry.name in tensors:
                other = files[tensors[entry.name].file].name
                raise InputError(f"{path}: tensor {entry.name!r} is in both {other} and {name}. Remove the wrong file.")
            tensors[entry.name] = TensorSpec(
                entry.name, entry.dtype, entry.shape, len(files), entry.start, entry.nbytes
            )
        files.append(FileFingerprint(name, status.st_size, status.st_mtime_ns, header.digest))
    if not tensors:
        raise InputError(f"{path}: holds no tensors.")
    return Checkpoint(path, tuple(files), tensors)


def _check_index(index: Path, weight_map: dict[str, str], checkpoint: Checkpoint) -> None:
    problems: list[str] = []
    for name, file in weight_map.items():
        spec = checkpoint.tensors.get(name)
        if spec is None:
            problems.append(f"tensor {name!r} should be in {file} and is not")
        elif checkpoint.files[spec.file].name != file:
            problems.append(f"tensor {name!r} should be in {file} and is in {checkpoint.files[spec.file].name}")
    problems += [
        f"tensor {name!r} is in {checkpoint.files[spec.file].name} and not in the index"
        for name, spec in checkpoint.tensors.items()
        if name not in weight_map
    ]
    if problems:
        shown = "\n".join(f"  - {problem}" for problem in problems[:10])
        more = f"\n  - and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise InputError(f"{index}: does not fit its files:\n{shown}{more}\nDownload the model again.")


def _is(path: Path, kind: Callable[[int], bool]) -> bool:
    try:
        return kind(path.stat().st_mode)
    except (OSError, ValueError):
        # Not there, or a name that no file can have.
        return False


def _listing(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _are(names: list[str]) -> str:
    return "are" if len(names) > 1 else "is"
