"""Reading again what was written, or what will be merged, and comparing every byte with the checksums there are."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from streammerge.base.errors import InputError, VerificationFailed
from streammerge.base.units import format_size
from streammerge.run.manifest import read_manifest
from streammerge.run.output import MANIFEST_NAME
from streammerge.storage.checkpoint import INDEX_NAME, Checkpoint, open_file
from streammerge.storage.local import is_file
from streammerge.storage.source import hash_range

_BUFFER = 8 << 20
_SHA256 = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class Verdict:
    """What verifying found: `problems` is empty when every byte is as it was written."""

    tensors: int
    files: int
    nbytes: int
    problems: tuple[str, ...]


def verify(out: Path, progress: Callable[[float, float], None] | None = None) -> Verdict:
    """Check the output in `out`, reading from the disk. Raises InputError when it has no usable manifest.

    `progress` is told the bytes of shards that were read, and all there are.
    """
    content = read_manifest(out)
    tensors, nbytes, problems = _check_shards(out, content, list(content["shards"]), progress)
    for name, checksum in content["files"].items():
        path = out / name
        if not is_file(path):
            problems.append(f"{path}: is missing.")
            continue
        size = path.stat().st_size
        nbytes += size
        try:
            if _hexdigest(xxhash.xxh3_128(), path, 0, size) != checksum:
                problems.append(f"{path}: differs from what was written.")
        except InputError as error:
            problems.append(str(error))
    if len(content["shards"]) > 1 and INDEX_NAME not in content["files"]:
        problems.append(f"{out}: the manifest does not know {INDEX_NAME}; it is not complete.")
    return Verdict(tensors, len(content["shards"]) + len(content["files"]), nbytes, tuple(problems))


def verify_inputs(checkpoints: Sequence[Checkpoint], note: Callable[[str], None]) -> None:
    """Compare the weights of inputs with the checksums there are: our own manifest, or the Hub's in its download cache.

    Raises VerificationFailed with all that differs; tells which inputs have no checksums.
    """
    problems: list[str] = []
    for checkpoint in checkpoints:
        sizes = {file.name: file.size for file in checkpoint.files}
        written = (checkpoint.directory / MANIFEST_NAME).is_file()
        content = read_manifest(checkpoint.directory) if written else {"shards": {}}
        downloaded = {} if written else _blob_checksums(checkpoint)
        known = [name for name in sizes if name in content["shards"] or name in downloaded]
        unknown = [name for name in sizes if name not in known]
        if known:
            size = format_size(sum(sizes[name] for name in known))
            note(f"{checkpoint.path}: comparing {size} of weights with the checksums there are")
        if unknown:
            listed = f": {', '.join(unknown[:5])}" if known else ""
            note(f"{checkpoint.path}: has no checksums to verify it by{listed}")
        if written:
            problems += _check_shards(checkpoint.directory, content, known)[2]
        for name, checksum in downloaded.items():
            path = checkpoint.directory / name
            if _hexdigest(hashlib.sha256(), path, 0, sizes[name]) != checksum:
                problems.append(f"{path}: is not what was downloaded: its SHA-256 differs. Download it again.")
    if problems:
        raise VerificationFailed("\n".join(problems))


def _check_shards(
    out: Path,
    content: Mapping[str, Any],
    names: Sequence[str],
    progress: Callable[[float, float], None] | None = None,
) -> tuple[int, int, list[str]]:
    """Compare these shards of an output with its manifest: tensors, bytes, and what is wrong."""
    problems: list[str] = []
    every = len(names) == len(content["shards"])
    expected = dict(content["tensors"])
    tensors = nbytes = read = 0
    total = sum((out / name).stat().st_size for name in names if is_file(out / name))
    if progress is not None:
        progress(0, total)
    for name in names:
        path = out / name
        try:
            header, status = open_file(path)
        except InputError as error:
            problems.append(str(error))
            continue
        if header.digest != content["shards"][name].get("header"):
            problems.append(f"{path}: its header is not the one that was written.")
        nbytes += status.st_size
        for entry in header.entries:
            tensors += 1
            checksum = expected.pop(entry.name, None)
            try:
                if _hexdigest(xxhash.xxh3_128(), path, entry.start, entry.nbytes) != checksum:
                    problems.append(f"{path}: tensor {entry.name} differs from what was written.")
            except InputError as error:
                problems.append(f"{error} (tensor {entry.name})")
            read += entry.nbytes
            if progress is not None:
                progress(read, total)
    if every:
        problems += [f"{out}: tensor {name} is missing." for name in expected]
    return tensors, nbytes, problems


def _blob_checksums(checkpoint: Checkpoint) -> dict[str, str]:
    """The SHA-256 of the files that lie in the Hub's download cache: the names of their blobs there."""
    paths = {file.name: checkpoint.directory / file.name for file in checkpoint.files}
    blobs = {name: path.resolve().name for name, path in paths.items() if path.is_symlink()}
    return {name: blob for name, blob in blobs.items() if _SHA256.fullmatch(blob)}


def _hexdigest(hashing: Any, path: Path, offset: int, length: int) -> str:
    """The hash of a part of a file, as hexadecimal digits. Raises InputError."""
    hash_range(path, offset, length, hashing.update, bytearray(min(_BUFFER, max(1, length))))
    digits: str = hashing.hexdigest()
    return digits
