"""streammerge.manifest.json: what a result is made of, so that it can be checked, traced and made again."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import xxhash

from streammerge import __version__
from streammerge.base.errors import InputError
from streammerge.plan.plan import FORMAT, Plan
from streammerge.run.journal import Done
from streammerge.run.output import MANIFEST_NAME


def manifest(plan: Plan, done: Mapping[str, Done], side_files: Mapping[str, bytes]) -> bytes:
    """The manifest of a complete output. It ends with a checksum of its own."""
    content = {
        "format": FORMAT,
        "digest": plan.digest,
        "method": plan.method.name,
        "seed": plan.seed,
        "rng": "mergekit" if plan.draws_in_turn else "position",
        "versions": {"streammerge": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "recipe": plan.recipe.text,
        "inputs": plan.facts["inputs"],
        "files": {name: xxhash.xxh3_128_hexdigest(content) for name, content in sorted(side_files.items())},
        "shards": {shard.name: {"header": xxhash.xxh3_128_hexdigest(shard.header), "bytes": shard.nbytes}
                   for shard in plan.shards},
        "tensors": {name: done[name].xxh3_128 for tensor in plan.tensors for name in tensor.names},
        "nonfinite": {
            tensor.name: {"inputs": done[tensor.name].nonfinite_inputs, "output": done[tensor.name].nonfinite_output}
            for tensor in plan.tensors
            if done[tensor.name].nonfinite_output or any(done[tensor.name].nonfinite_inputs)
        },
    }  # fmt: skip
    return _dump(content | {"checksum": xxhash.xxh3_128_hexdigest(_dump(content))})


def read_manifest(out: Path) -> dict[str, Any]:
    """The manifest of a finished output. Raises InputError when there is none or it is damaged."""
    path = out / MANIFEST_NAME
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read: {error.strerror}. Is this the finished output of a merge?"
        ) from error
    except (ValueError, RecursionError):
        raise InputError(f"{path}: is not JSON; it is damaged.") from None
    parts = ("files", "shards", "tensors")
    if not isinstance(content, dict) or not all(isinstance(content.get(part), dict) for part in parts):
        raise InputError(f"{path}: is no manifest of ours, or damaged.")
    checksum = content.pop("checksum", None)
    try:
        found = xxhash.xxh3_128_hexdigest(_dump(content))
    except UnicodeEncodeError:
        # Half a character: we never write one.
        found = None
    if found is None or checksum != found:
        raise InputError(f"{path}: is not what was written: its own checksum differs.")
    for name in (*content["files"], *content["shards"]):
        if not name or Path(name).name != name or "\0" in name:
            raise InputError(f"{path}: names the file {name!r}, outside its own directory. Refused.")
    if not all(isinstance(shard, dict) for shard in content["shards"].values()):
        raise InputError(f"{path}: is no manifest of ours.")
    return content


def _dump(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode()
