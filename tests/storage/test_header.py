"""Headers: every refusal, hostile ones by the hundred, and bytes like the library's own."""

from __future__ import annotations

import copy
import json
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from streammerge.base.dtypes import DTYPES
from streammerge.base.errors import InputError
from streammerge.storage.checkpoint import open_file
from streammerge.storage.header import MAX_HEADER_BYTES, UNFINISHED, Header, check_length, make_header, read_header

QUIET = settings(derandomize=True, database=None, deadline=None)


def as_file(header: object, data: bytes = b"", *, length: int | None = None) -> bytes:
    """A file with this header, JSON or bytes; `length` lies about how long it is."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def tensor(dtype: object = "F32", shape: object = (1,), offsets: object = (0, 4), **more: object) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}


def parse(content: bytes) -> Header:
    return read_header(content, len(content), "x.safetensors")


def library_accepts(path: Path) -> bool:
    try:
        with safe_open(path, framework="pt"):
            return True
    except SafetensorError:
        return False


# What is wrong, the file, and what the refusal says.
REFUSED: dict[str, tuple[bytes, str]] = {
    "empty file": (b"", "too short to hold a header length"),
    "seven bytes": (b"\x08\0\0\0\0\0\0", "7 bytes long, too short"),
    "unfinished shard": (UNFINISHED + b"{}", "unfinished shard; run the merge that began it again"),
    "length over the limit": (as_file({}, length=MAX_HEADER_BYTES + 1), "the format allows 100000000"),
    "length of 10^18": (as_file({}, length=10**18), "claims 1000000000000000000 bytes"),
    "length beyond the file": (as_file({}, length=3), "the file has 10: truncated, or not safetensors"),
    "no header": (as_file(b""), "does not begin with '{'"),
    "space before the brace": (as_file(b" {}"), "does not begin with '{'"),
    "byte order mark": (as_file(b"\xef\xbb\xbf{}"), "does not begin with '{'"),
    "a list": (as_file([]), "does not begin with '{'"),
    "not UTF-8": (as_file(b'{"\xff":1}'), "not UTF-8 (invalid start byte at byte 2)"),
    "surrogates in UTF-8": (as_file(b'{"\xed\xa0\x80":1}'), "not UTF-8"),
    "not JSON": (as_file(b"{'a':1}"), "not JSON"),
    "trailing characters": (as_file(b"{}{}"), "not JSON (Extra data"),
    "trailing zeros": (as_file(b"{}\0\0\0\0\0\0"), "not JSON"),
    "a raw line break in a name": (as_file(b'{"a\nb":1}'), "not JSON"),
    "NaN": (as_file(b'{"a":NaN}'), "holds NaN, which is not JSON"),
    "Infinity": (as_file(b'{"a":-Infinity}'), "holds -Infinity, which is not JSON"),
    "nested too deeply": (as_file(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"), "nested too deeply"),
    "a number of 5,000 digits": (as_file(b'{"a":' + b"9" * 5000 + b"}"), "not JSON"),
    "a tensor twice": (as_file(b'{"a":{},"a":{}}'), "names 'a' twice"),
    "a tensor twice, escaped": (as_file(b'{"a":{},"\\u0061":{}}'), "names 'a' twice"),
    "a field twice": (as_file(b'{"a":{"dtype":"F32","dtype":"F32"}}'), "names 'dtype' twice"),
    "metadata of numbers": (as_file({"__metadata__": {"a": 1}}), "__metadata__ is not a map from text to text"),
    "metadata of null": (as_file({"__metadata__": None}), "__metadata__ is not a map"),
    "metadata nested": (as_file({"__metadata__": {"a": {}}}), "__metadata__ is not a map"),
    "entry of a number": (as_file({"a": 1}), "does not have exactly dtype, shape and data_offsets"),
    "entry without shape": (as_file({"a": {"dtype": "F32", "data_offsets": [0, 0]}}), "does not have exactly"),
    "entry with a field more": (as_file({"a": tensor(more=1)}, bytes(4)), "does not have exactly"),
    "unknown dtype": (as_file({"a": tensor("F33")}, bytes(4)), "unknown dtype 'F33'"),
    "dtype in lower case": (as_file({"a": tensor("f32")}, bytes(4)), "unknown dtype 'f32'"),
    "dtype of a list": (as_file({"a": tensor(["F32"])}, bytes(4)), "unknown dtype ['F32']"),
    "shape of a float": (as_file({"a": tensor(shape=[1.0])}, bytes(4)), "shape that is not a list of sizes"),
    "shape of a bool": (as_file({"a": tensor(shape=[True])}, bytes(4)), "shape that is not a list of sizes"),
    "shape of text": (as_file({"a": tensor(shape="1")}, bytes(4)), "shape that is not a list of sizes"),
    "negative shape": (as_file({"a": tensor(shape=[-1])}, bytes(4)), "shape that is not a list of sizes"),
    "size over 2^63": (as_file({"a": tensor(shape=[2**63])}, bytes(4)), "shape that is not a list of sizes"),
    "product over 2^63": (as_file({"a": tensor(shape=[2**32, 2**32])}, bytes(4)), "more than 2^63 elements"),
    "one offset": (as_file({"a": tensor(offsets=[0])}, bytes(4)), "has 1 data_offsets, not 2"),
    "three offsets": (as_file({"a": tensor(offsets=[0, 4, 4])}, bytes(4)), "has 3 data_offsets, not 2"),
    "negative offset": (as_file({"a": tensor(offsets=[-4, 0])}, bytes(4)), "data_offsets that is not a list of sizes"),
    "offsets the wrong way": (as_file({"a": tensor(offsets=[4, 0])}, bytes(4)), "lies at [4, 0)"),
    "offsets beyond the file": (as_file({"a": tensor(offsets=[0, 4])}, bytes(3)), "the data has 3 bytes: truncated?"),
    "too few bytes for the shape": (as_file({"a": tensor(shape=[2])}, bytes(4)), "needs 8 bytes, its offsets give 4"),
    "half a byte": (as_file({"a": tensor("F4", [1], [0, 1])}, bytes(1)), "needs 0.5 bytes"),
    "a hole in front": (as_file({"a": tensor(offsets=[4, 8])}, bytes(8)), "'a' leaves a hole before it"),
    "a hole": (as_file({"a": tensor(), "b": tensor(offsets=[8, 12])}, bytes(12)), "'b' leaves a hole before it"),
    "an overlap": (as_file({"a": tensor(), "b": tensor(offsets=[2, 6])}, bytes(6)), "'b' overlaps what lies before it"),
    "the same bytes twice": (as_file({"a": tensor(), "b": tensor()}, bytes(4)), "'b' overlaps"),
    "an empty tensor inside another": (
        as_file({"a": tensor(), "b": tensor(shape=[0], offsets=[2, 2])}, bytes(4)),
        "'b' overlaps",
    ),
    "bytes nobody claims": (as_file({"a": tensor()}, bytes(5)), "or bytes nobody claims"),
    "data without tensors": (as_file({}, bytes(1)), "or bytes nobody claims"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_bad_header_is_refused_with_its_reason(case: str) -> None:
    content, reason = REFUSED[case]
    with pytest.raises(InputError) as caught:
        parse(content)
    assert str(caught.value).startswith("x.safetensors: not a usable safetensors file: ")
    assert reason in str(caught.value)


def refused_by_both(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    assert not library_accepts(path)
    with pytest.raises(InputError):
        open_file(path)


def test_half_a_character_is_refused_as_the_library_does(tmp_path: Path) -> None:
    # Such a name cannot be written as UTF-8 again: the merge would end with a UnicodeEncodeError.
    entry = json.dumps(tensor())
    for escape in ("\\ud800", "\\udc00", "\\udc00\\ud800", "a\\udfff"):
        refused_by_both(tmp_path / "x.safetensors", as_file(f'{{"{escape}":{entry}}}'.encode(), bytes(4)))
        metadata = f'{{"__metadata__":{{"a":"{escape}"}},"a":{entry}}}'
        refused_by_both(tmp_path / "x.safetensors", as_file(metadata.encode(), bytes(4)))


def test_minus_zero_is_refused_as_the_library_does(tmp_path: Path) -> None:
    for shape, offsets, size in (("[1]", "[-0,4]", 4), ("[-0]", "[0,0]", 0)):
        header = f'{{"a":{{"dtype":"F32","shape":{shape},"data_offsets":{offsets}}}}}'
        refused_by_both(tmp_path / "x.safetensors", as_file(header.encode(), bytes(size)))


@pytest.mark.parametrize(
    ("header", "data"),
    [
        ({}, b""),
        ({"__metadata__": {}}, b""),
        ({"a": tensor()}, bytes(4)),
        ({"a": tensor(shape=[], offsets=[0, 4])}, bytes(4)),
        ({"a": tensor(shape=[0, 7], offsets=[0, 0])}, b""),
        ({"b": tensor(), "a": tensor(shape=[0], offsets=[4, 4])}, bytes(4)),
        ({"b": tensor(), "a": tensor(shape=[0], offsets=[0, 0])}, bytes(4)),
        ({"z": tensor("U8", [3], [0, 3]), "a": tensor(shape=[2], offsets=[3, 11])}, bytes(11)),
        ({"a": tensor("F4", [4], [0, 2]), "b": tensor("F6_E2M3", [4], [2, 5])}, bytes(5)),
        ({"": tensor(), 'ä\u2028\U0001f600"\\\0': tensor(offsets=[4, 8])}, bytes(8)),
    ],
    ids=str,
)
def test_an_unusual_header_that_the_library_accepts_is_accepted(tmp_path: Path, header: Any, data: bytes) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(as_file(header, data))
    assert library_accepts(path)
    found, _ = open_file(path)
    assert {entry.name for entry in found.entries} == set(header) - {"__metadata__"}
    for entry in found.entries:
        start, stop = header[entry.name]["data_offsets"]
        assert (entry.start, entry.stop) == (found.data_start + start, found.data_start + stop)
        assert list(entry.shape) == list(header[entry.name]["shape"])


def test_padding_with_any_number_of_spaces_is_accepted(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    for spaces in (0, 1, 7, 4096):
        path.write_bytes(as_file(json.dumps({"a": tensor()}).encode() + b" " * spaces, bytes(4)))
        assert library_accepts(path)
        assert open_file(path)[0].entries[0].name == "a"


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_of_the_table_is_known_to_the_library(tmp_path: Path, dtype: str) -> None:
    path = tmp_path / "x.safetensors"
    nbytes = 8 * DTYPES[dtype].bits // 8
    path.write_bytes(as_file({"a": tensor(dtype, [8], [0, nbytes])}, bytes(nbytes)))
    assert library_accepts(path)
    assert open_file(path)[0].entries[0].nbytes == nbytes


@pytest.mark.parametrize(
    "shape",
    [[10**18], [10**9, 10**9], [10**18, 0], [0, 10**18], [10**18] * 100_000, [0] + [10**18] * 100_000],
    ids=["1d", "2d", "zero last", "zero first", "many", "many with zero"],
)
def test_claims_of_a_billion_billion_elements_cost_no_memory_or_time(shape: list[int]) -> None:
    content = as_file({"a": tensor(shape=shape)}, bytes(4))
    tracemalloc.start()
    began = time.perf_counter()
    try:
        with pytest.raises(InputError):
            parse(content)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000 + 10 * len(content)
    finally:
        tracemalloc.stop()
    assert time.perf_counter() - began < 5


def test_a_file_that_claims_a_long_header_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    tracemalloc.start()
    try:
        for claim in (99_999_999, 10**18, 2**64 - 2):
            path.write_bytes(claim.to_bytes(8, "little") + b"{}")
            with pytest.raises(InputError, match="claims"):
                open_file(path)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


def test_the_length_alone_is_checked_before_anything_is_read() -> None:
    assert check_length((16).to_bytes(8, "little"), 24, "x") == 16
    with pytest.raises(InputError, match="x: not a usable safetensors file: its header claims 16 bytes"):
        check_length((16).to_bytes(8, "little"), 23, "x")


# A valid file to be damaged: several dtypes, an empty tensor, a 0-d one, metadata, an odd name.
VALID: dict[str, Any] = {
    "__metadata__": {"format": "pt"},
    "w.0": tensor("F32", [2, 3], [0, 24]),
    "s": tensor("I64", [], [24, 32]),
    "e": tensor("F16", [0, 3], [32, 32]),
    'ä"\\': tensor("U8", [5], [32, 37]),
    "b": tensor("BF16", [1, 1, 3], [37, 43]),
}
SIZES = [0, 1, 2, 3, 4, 8, 24, 32, 37, 43, 44, 2**31, 2**32, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**18, 10**40, -1]
ODD: list[Any] = [None, True, False, 1.0, 1.5, "", "1", [], [0], {}, {"a": "b"}, "F32", "F4", "BOOL", "\0", "\x7f"]


def check_against_library(path: Path, content: bytes) -> None:
    """Ours accepts only what the library does, and raises nothing but InputError."""
    path.write_bytes(content)
    try:
        open_file(path)
    except InputError:
        return
    assert library_accepts(path), content


@settings(QUIET, max_examples=400)
@given(data=st.data())
def test_damaged_bytes_never_pass_when_the_library_refuses_them(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    content = bytearray(as_file(VALID, bytes(43)))
    for _ in range(data.draw(st.integers(1, 3))):
        if not content:
            break
        place = data.draw(st.integers(0, len(content) - 1))
        match data.draw(st.sampled_from(["set", "flip", "insert", "delete", "cut", "copy"])):
            case "set":
                content[place] = data.draw(st.sampled_from(b'\0 {}[]:,"\\0123456789-+.eEnaf\xff\xed'))
            case "flip":
                content[place] ^= 1 << data.draw(st.integers(0, 7))
            case "insert":
                content[place:place] = data.draw(
                    st.sampled_from([b"0", b"-", b'"', b",", b"\\u0061", b" ", b"\t", b"{"])
                )
            case "delete":
                del content[place]
            case "cut":
                del content[max(place, 1) :]
            case "copy":
                content[place:place] = content[8 : 8 + data.draw(st.integers(1, 40))]
        if data.draw(st.booleans()) and len(content) >= 8:
            # The length that now makes the data end where it did.
            content[:8] = max(0, len(content) - 43 - 8).to_bytes(8, "little")
    check_against_library(tmp_path_factory.getbasetemp() / "damaged.safetensors", bytes(content))


@settings(QUIET, max_examples=400)
@given(data=st.data())
def test_lying_headers_never_pass_when_the_library_refuses_them(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    header = copy.deepcopy(VALID)
    size = 43
    for _ in range(data.draw(st.integers(1, 3))):
        name = data.draw(st.sampled_from(sorted(header)))
        field = header[name]
        odd = copy.deepcopy(data.draw(st.sampled_from(ODD)))
        match data.draw(st.sampled_from(["field", "size", "entry", "drop", "extra", "swap", "rename", "data"])):
            case "field" if isinstance(field, dict):
                field[data.draw(st.sampled_from(["dtype", "shape", "data_offsets"]))] = odd
            case "size" if isinstance(field, dict):
                sizes = field.get(data.draw(st.sampled_from(["shape", "data_offsets"])))
                if isinstance(sizes, (list, tuple)):
                    key = "shape" if sizes is field.get("shape") else "data_offsets"
                    at = data.draw(st.integers(0, len(sizes)))
                    field[key] = [*sizes[:at], data.draw(st.sampled_from(SIZES)), *sizes[at + 1 :]]
            case "entry":
                header[name] = odd
            case "drop" if isinstance(field, dict) and field:
                del field[data.draw(st.sampled_from(sorted(field)))]
            case "extra" if isinstance(field, dict):
                field[data.draw(st.sampled_from(["x", "", "Dtype"]))] = odd
            case "swap":
                other = data.draw(st.sampled_from(sorted(header)))
                header[name], header[other] = header[other], header[name]
            case "rename":
                header[data.draw(st.text(max_size=5))] = header.pop(name)
            case "data":
                size = data.draw(st.sampled_from([0, 1, 36, 42, 43, 44, 50]))
    check_against_library(tmp_path_factory.getbasetemp() / "lying.safetensors", as_file(header, bytes(size)))


# Names that safetensors can write: any text but its own key for metadata.
NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=12).filter(lambda name: name != "__metadata__")
TORCH_DTYPES = {name: dtype.torch_name for name, dtype in DTYPES.items() if dtype.torch_name is not None}
SPECS = st.dictionaries(
    NAMES,
    st.tuples(st.sampled_from(sorted(TORCH_DTYPES)), st.lists(st.integers(0, 3), max_size=3).map(tuple)),
    max_size=8,
)


def library_file(path: Path, specs: dict[str, tuple[str, tuple[int, ...]]]) -> bytes:
    tensors = {name: torch.zeros(shape, dtype=torch.uint8).to(getattr(torch, TORCH_DTYPES[dtype] or ""))
               for name, (dtype, shape) in specs.items()}  # fmt: skip
    save_file(tensors, path, metadata={"format": "pt"})
    return path.read_bytes()


@settings(QUIET, max_examples=150)
@given(specs=SPECS)
def test_a_made_header_has_the_bytes_of_save_file(
    tmp_path_factory: pytest.TempPathFactory, specs: dict[str, tuple[str, tuple[int, ...]]]
) -> None:
    expected = library_file(tmp_path_factory.getbasetemp() / "library.safetensors", specs)
    raw, entries = make_header((name, dtype, shape) for name, (dtype, shape) in specs.items())
    assert expected[: len(raw)] == raw
    assert len(expected) == (entries[-1].stop if entries else len(raw))
    header = read_header(raw, len(expected), "x")
    assert header.entries == entries
    assert header.metadata == {"format": "pt"}


def test_odd_names_mixed_dtypes_and_empty_tensors_have_the_bytes_of_save_file(tmp_path: Path) -> None:
    names = ["", " ", "a", "A", "ä", "é", "\U0001f600", "\uffff", 'quote"', "back\\slash", "line\nbreak", "tab\t", "\0",
             "\x1f\x7f\x80", "\u2028", "z" * 300, "model.layers.10.w", "model.layers.9.w"]  # fmt: skip
    shapes: list[tuple[int, ...]] = [(), (0,), (3,), (2, 0, 5), (7, 1), (1, 1, 1)]
    dtypes = sorted(TORCH_DTYPES)
    specs = {name: (dtypes[i % len(dtypes)], shapes[i % len(shapes)]) for i, name in enumerate(names)}
    expected = library_file(tmp_path / "library.safetensors", specs)
    raw, entries = make_header((name, dtype, shape) for name, (dtype, shape) in specs.items())
    assert expected[: len(raw)] == raw
    assert len(expected) == entries[-1].stop
    with safe_open(tmp_path / "library.safetensors", framework="pt") as file:
        assert sorted(file.keys()) == sorted(entry.name for entry in entries)
