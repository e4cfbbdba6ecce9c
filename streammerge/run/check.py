"""`streammerge verify`: reads a finished output again and compares every byte with the manifest's checksums."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import xxhash

from streammerge.base.errors import InputError
from streammerge.run.manifest import read_manifest
from streammerge.storage.checkpoint import INDEX_NAME, open_file
from streammerge.storage.source import hash_range

_BUFFER = 8 << 20


@dataclass(frozen=True)
class Verdict:
    """What verifying found: `problems` is empty when every byte is as it was written."""

    tensors: int
    files: int
    nbytes: int
    problems: tuple[str, ...]


def verify(out: Path) -> Verdict:
    """Check the output in `out`. Raises InputError when it has no usable manifest."""
    content = read_manifest(out)
    problems: list[str] = []
    buffer = bytearray(_BUFFER)
    expected = dict(content["tensors"])
    tensors = nbytes = 0
    for name, shard in content["shards"].items():
        path = out / name
        try:
            header, status = open_file(path)
        except InputError as error:
            problems.append(str(error))
            continue
        if header.digest != shard.get("header"):
            problems.append(f"{path}: its header is not the one that was written.")
        nbytes += status.st_size
        for entry in header.entries:
            hashing = xxhash.xxh3_128()
            try:
                hash_range(path, entry.start, entry.nbytes, hashing.update, buffer)
            except InputError as error:
                problems.append(f"{error} (tensor {entry.name})")
            tensors += 1
            checksum = expected.pop(entry.name, None)
            if checksum != hashing.hexdigest():
                problems.append(f"{path}: tensor {entry.name} differs from what was written.")
    problems += [f"{out}: tensor {name} is missing." for name in expected]
    for name, checksum in content["files"].items():
        path = out / name
        if not path.is_file():
            problems.append(f"{path}: is missing.")
            continue
        whole = path.read_bytes()
        nbytes += len(whole)
        if xxhash.xxh3_128_hexdigest(whole) != checksum:
            problems.append(f"{path}: differs from what was written.")
    if len(content["shards"]) > 1 and INDEX_NAME not in content["files"]:
        problems.append(f"{out}: the manifest does not know {INDEX_NAME}; it is not complete.")
    return Verdict(tensors, len(content["shards"]) + len(content["files"]), nbytes, tuple(problems))
