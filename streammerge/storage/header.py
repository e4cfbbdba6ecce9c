"""The header of a safetensors file: parsed strictly, and made.

A file is eight bytes of length (little endian), that many bytes of JSON, then the data. The parser accepts nothing
that the safetensors library refuses, and refuses three things the library lets pass: a tensor named twice, spaces
before the brace, and fields it does not know. It reads the header only, and never more than the file holds.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import xxhash

from streammerge.base.dtypes import DTYPES
from streammerge.base.errors import InputError

LENGTH_BYTES = 8
# The library's limit for reading.
MAX_HEADER_BYTES = 100_000_000
# The Hub's client reads no more than this; so we write no more.
MAX_WRITTEN_HEADER_BYTES = 25_000_000
# No reader opens a file that claims a header of 2^64 - 1 bytes: a shard carries this until it is complete.
UNFINISHED = b"\xff" * LENGTH_BYTES


@dataclass(frozen=True)
class Entry:
    """One tensor in one file. `start` and `stop` are byte offsets in the file (not in its data part)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Header:
    """A parsed header: the tensors in the order of their data, the metadata, and a fingerprint of the raw bytes."""

    entries: tuple[Entry, ...]
    metadata: dict[str, str]
    data_start: int
    digest: str


class _Refused(Exception):
    """Why a header is refused; becomes an InputError that names the file."""


def read_header(raw: bytes, file_bytes: int, path: str) -> Header:
    """The header of a file of `file_bytes` bytes that begins with `raw` (at least the whole header).

    Raises InputError, naming `path` and what is wrong.
    """
    try:
        length = header_length(raw[:LENGTH_BYTES], file_bytes)
        return _parse(raw[: LENGTH_BYTES + length], file_bytes)
    except _Refused as refused:
        raise InputError(f"{path}: not a usable safetensors file: {refused}") from None


def check_length(raw: bytes, file_bytes: int, path: str) -> int:
    """The length of the JSON that the first eight bytes announce. Raises InputError when it cannot be true."""
    try:
        return header_length(raw, file_bytes)
    except _Refused as refused:
        raise InputError(f"{path}: not a usable safetensors file: {refused}") from None


def header_length(raw: bytes, file_bytes: int) -> int:
    if len(raw) < LENGTH_BYTES:
        raise _Refused(f"it is {file_bytes} bytes long, too short to hold a header length")
    if raw == UNFINISHED:
        raise _Refused("it is an unfinished shard; run the merge that began it again")
    length = int.from_bytes(raw, "little")
    if length > MAX_HEADER_BYTES:
        raise _Refused(f"its header claims {length} bytes, the format allows {MAX_HEADER_BYTES}")
    if LENGTH_BYTES + length > file_bytes:
        raise _Refused(f"its header claims {length} bytes, the file has {file_bytes}: truncated, or not safetensors")
    return length


def _parse(raw: bytes, file_bytes: int) -> Header:
    text = raw[LENGTH_BYTES:]
    if not text.startswith(b"{"):
        raise _Refused("its header does not begin with '{'")
    try:
        fields = json.loads(
            text.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant, parse_int=_integer
        )
    except UnicodeDecodeError as error:
        raise _Refused(f"its header is not UTF-8 ({error.reason} at byte {error.start})") from None
    except RecursionError:
        raise _Refused("its header is nested too deeply") from None
    except ValueError as error:  # json.JSONDecodeError, and int() refusing thousands of digits
        raise _Refused(f"its header is not JSON ({error})") from None

    metadata = _metadata(fields.pop("__metadata__", {}))
    data_bytes = file_bytes - len(raw)
    entries = sorted(
        (_entry(name, field, len(raw), data_bytes) for name, field in fields.items()),
        key=lambda entry: (entry.start, entry.stop),
    )
    _check_contiguous(entries, len(raw), file_bytes)
    return Header(tuple(entries), metadata, len(raw), xxhash.xxh3_128_hexdigest(raw))


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise _Refused(f"its header names {name!r} twice")
            seen.add(name)
    return fields


def _integer(text: str) -> int:
    # To Python that is 0; the library refuses every sign.
    if text == "-0":
        raise _Refused("its header holds -0")
    return int(text)


def _check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise _Refused(f"its header holds half a character in {text!r}") from None


def _no_constant(text: str) -> None:
    raise _Refused(f"its header holds {text}, which is not JSON")


def _metadata(field: Any) -> dict[str, str]:
    if not isinstance(field, dict) or not all(isinstance(value, str) for value in field.values()):
        raise _Refused("its __metadata__ is not a map from text to text")
    for key, value in field.items():
        _check_text(key)
        _check_text(value)
    return field


def _entry(name: str, field: Any, data_start: int, data_bytes: int) -> Entry:
    _check_text(name)
    if not isinstance(field, dict) or set(field) != {"dtype", "shape", "data_offsets"}:
        raise _Refused(f"its entry {name!r} does not have exactly dtype, shape and data_offsets")
    dtype = DTYPES.get(field["dtype"]) if isinstance(field["dtype"], str) else None
    if dtype is None:
        raise _Refused(f"its entry {name!r} has the unknown dtype {field['dtype']!r}")
    shape, offsets = _sizes(name, field["shape"], "shape"), _sizes(name, field["data_offsets"], "data_offsets")
    if len(offsets) != 2:
        raise _Refused(f"its entry {name!r} has {len(offsets)} data_offsets, not 2")
    start, stop = offsets
    if not start <= stop <= data_bytes:
        raise _Refused(f"its entry {name!r} lies at [{start}, {stop}), the data has {data_bytes} bytes: truncated?")
    elements = 1
    for size in shape:
        elements *= size
        if elements >= 2**63:
            raise _Refused(f"its entry {name!r} claims a shape of more than 2^63 elements")
    bits = elements * dtype.bits
    if bits % 8 or bits // 8 != stop - start:
        raise _Refused(f"its entry {name!r}: shape {list(shape)} of {dtype.name} needs {bits / 8:.10g} bytes, "
                       f"its offsets give {stop - start}")  # fmt: skip
    return Entry(name, dtype.name, shape, data_start + start, data_start + stop)


def _sizes(name: str, field: Any, what: str) -> tuple[int, ...]:
    # bool is an int to Python, not to JSON.
    if not isinstance(field, list) or not all(type(size) is int and 0 <= size < 2**63 for size in field):
        raise _Refused(f"its entry {name!r} has a {what} that is not a list of sizes")
    return tuple(field)


def _check_contiguous(entries: list[Entry], data_start: int, file_bytes: int) -> None:
    end = data_start
    for entry in entries:
        if entry.start != end:
            trouble = "overlaps what lies before it" if entry.start < end else "leaves a hole before it"
            raise _Refused(f"its entry {entry.name!r} {trouble} (begins at {entry.start}, expected {end})")
        end = entry.stop
    if end != file_bytes:
        raise _Refused(f"its tensors end at byte {end}, the file at {file_bytes}: truncated, or bytes nobody claims")


def make_header(tensors: Iterable[tuple[str, str, tuple[int, ...]]]) -> tuple[bytes, tuple[Entry, ...]]:
    """The bytes that begin a file of these (name, dtype, shape), and where each tensor's bytes go.

    The order and the bytes are those of the library's `save_file(..., metadata={"format": "pt"})`: dtype rank
    descending, then name; compact JSON; spaces up to a multiple of eight.
    """
    ordered = sorted(tensors, key=lambda tensor: (-DTYPES[tensor[1]].rank, tensor[0]))
    fields: dict[str, Mapping[str, object]] = {"__metadata__": {"format": "pt"}}
    spans: list[tuple[int, int]] = []
    end = 0
    for name, dtype, shape in ordered:
        elements = 1
        for size in shape:
            elements *= size
        start, end = end, end + elements * DTYPES[dtype].bits // 8
        spans.append((start, end))
        fields[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % LENGTH_BYTES)
    raw = len(text).to_bytes(LENGTH_BYTES, "little") + text
    entries = tuple(
        Entry(name, dtype, shape, len(raw) + start, len(raw) + stop)
        for (name, dtype, shape), (start, stop) in zip(ordered, spans, strict=True)
    )
    assert all(before.stop == after.start for before, after in pairwise(entries))
    return raw, entries
