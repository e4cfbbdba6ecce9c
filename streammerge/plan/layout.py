"""Where every output byte goes: shards, their names, headers, offsets, and the index."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

from streammerge.base.dtypes import DTYPES
from streammerge.base.errors import UserError
from streammerge.storage.checkpoint import INDEX_NAME
from streammerge.storage.header import MAX_WRITTEN_HEADER_BYTES, Entry, make_header

DEFAULT_SHARD_BYTES = 5_000_000_000

# A tensor's dtype and shape.
Stored = tuple[str, tuple[int, ...]]


@dataclass(frozen=True)
class ShardLayout:
    """One output file: its name, the bytes it begins with, its tensors with their offsets, and its size."""

    name: str
    header: bytes
    entries: tuple[Entry, ...]
    nbytes: int


def lay_out(
    tensors: Mapping[str, Stored], shard_bytes: int, beside: Mapping[str, tuple[str, Stored]] | None = None
) -> tuple[ShardLayout, ...]:
    """Split tensors in their order into shards of at most `shard_bytes` of data.

    Names and split are the Hub's; a tensor larger than that gets a shard of its own. `beside` has tensors that go
    into the shard of another, by that one's name.
    """
    beside = beside or {}
    # Imported here: the library takes a tenth of a second, which `--help` should not pay.
    from huggingface_hub import split_state_dict_into_shards_factory

    split = split_state_dict_into_shards_factory(
        {name: (stored, beside[name][1] if name in beside else None) for name, stored in tensors.items()},
        get_storage_size=lambda pair: _nbytes(pair[0]) + (0 if pair[1] is None else _nbytes(pair[1])),
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=shard_bytes,
    )
    shards = []
    for file, names in split.filename_to_tensors.items():
        own = [(name, *tensors[name]) for name in names]
        own += [(beside[name][0], *beside[name][1]) for name in names if name in beside]
        header, entries = make_header(own)
        if len(header) > MAX_WRITTEN_HEADER_BYTES:
            raise UserError(
                f"{file}: the header of {len(own)} tensors takes {len(header)} bytes, the Hub reads "
                f"{MAX_WRITTEN_HEADER_BYTES}. Give a smaller --out-shard-size."
            )
        shards.append(ShardLayout(file, header, entries, entries[-1].stop))
    return tuple(shards)


def index_file(shards: tuple[ShardLayout, ...]) -> tuple[str, bytes] | None:
    """Name and content of the index, or None for a single shard."""
    if len(shards) == 1:
        return None
    weight_map = {entry.name: shard.name for shard in shards for entry in shard.entries}
    total = sum(entry.nbytes for shard in shards for entry in shard.entries)
    content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    return INDEX_NAME, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def _nbytes(tensor: Stored) -> int:
    dtype, shape = tensor
    elements = 1
    for size in shape:
        elements *= size
    return elements * DTYPES[dtype].bits // 8
