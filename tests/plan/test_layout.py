"""Shards: names, split, bytes and index like huggingface_hub's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import save_torch_state_dict, split_torch_state_dict_into_shards
from hypothesis import given, settings
from hypothesis import strategies as st

from streammerge.base.dtypes import DTYPES
from streammerge.base.errors import UserError
from streammerge.base.units import parse_shard_size
from streammerge.plan.layout import DEFAULT_SHARD_BYTES, index_file, lay_out
from streammerge.storage.header import read_header

PATTERN = "model{suffix}.safetensors"
Specs = dict[str, tuple[str, tuple[int, ...]]]


def tensors_of(specs: Specs) -> dict[str, torch.Tensor]:
    """Tensors without memory, for the library to split."""
    return {name: torch.empty(shape, dtype=getattr(torch, DTYPES[dtype].torch_name or ""), device="meta")
            for name, (dtype, shape) in specs.items()}  # fmt: skip


@settings(derandomize=True, database=None, deadline=None, max_examples=100)
@given(
    sizes=st.lists(
        st.tuples(st.sampled_from(["F32", "BF16", "U8", "I64"]), st.integers(0, 60)), min_size=1, max_size=12
    ),
    limit=st.integers(1, 400),
)
def test_any_split_is_that_of_the_hub(sizes: list[tuple[str, int]], limit: int) -> None:
    specs: Specs = {f"model.layers.{i}.w": (dtype, (size,)) for i, (dtype, size) in enumerate(sizes)}
    stored = {name: tensor.to("cpu") if not tensor.is_meta else torch.zeros(tensor.shape, dtype=tensor.dtype)
              for name, tensor in tensors_of(specs).items()}  # fmt: skip
    split = split_torch_state_dict_into_shards(stored, filename_pattern=PATTERN, max_shard_size=limit)
    shards = lay_out(specs, limit)
    assert {shard.name: {entry.name for entry in shard.entries} for shard in shards} == {
        file: set(names) for file, names in split.filename_to_tensors.items()
    }
    assert [shard.name for shard in shards] == sorted(split.filename_to_tensors)
    index = index_file(shards)
    assert (index is not None) == split.is_sharded
    if index is not None:
        content = json.loads(index[1])
        assert content["weight_map"] == split.tensor_to_filename
        assert content["metadata"]["total_size"] == split.metadata["total_size"]


@pytest.mark.parametrize("limit", [50, 100, 1000])
def test_shards_and_index_have_the_bytes_that_the_hub_library_writes(tmp_path: Path, limit: int) -> None:
    tensors = {f"model.layers.{i}.w": torch.zeros(5 + i, dtype=torch.bfloat16) for i in range(9)}
    save_torch_state_dict(tensors, tmp_path, filename_pattern=PATTERN, max_shard_size=limit)
    shards = lay_out({name: ("BF16", tuple(tensor.shape)) for name, tensor in tensors.items()}, limit)
    expected = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    made = {shard.name: shard.header + bytes(shard.nbytes - len(shard.header)) for shard in shards}
    if (index := index_file(shards)) is not None:
        assert index[0] == "model.safetensors.index.json"
        assert json.loads(index[1]) == json.loads(expected.pop(index[0]))
    assert made == expected


def test_mergekits_5b_splits_at_five_billion_bytes() -> None:
    assert parse_shard_size("5B") == parse_shard_size("5GB") == DEFAULT_SHARD_BYTES == 5_000_000_000
    third = 5_000_000_000 // 2 // 3
    specs: Specs = {f"t{i}": ("BF16", (third,)) for i in range(4)}
    assert [len(shard.entries) for shard in lay_out(specs, parse_shard_size("5B"))] == [3, 1]
    names = [shard.name for shard in lay_out(specs, parse_shard_size("5B"))]
    assert names == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


def test_one_shard_has_the_plain_name_and_no_index() -> None:
    (shard,) = lay_out({"a": ("F32", (3,))}, 5_000_000_000)
    assert shard.name == "model.safetensors"
    assert index_file((shard,)) is None


def test_a_tensor_larger_than_a_shard_gets_one_of_its_own() -> None:
    shards = lay_out({"a": ("F32", (1,)), "b": ("F32", (100,)), "c": ("F32", (1,))}, 8)
    assert sorted(tuple(entry.name for entry in shard.entries) for shard in shards) == [("a", "c"), ("b",)]


def test_offsets_are_those_that_the_header_states() -> None:
    specs: Specs = {"a": ("U8", (5,)), "b": ("F64", (2, 2)), "c": ("BF16", ()), "d": ("F32", (0, 3))}
    (shard,) = lay_out(specs, 10**9)
    header = read_header(shard.header, shard.nbytes, "x")
    assert header.entries == shard.entries
    assert {entry.name: (entry.dtype, entry.shape) for entry in shard.entries} == specs


def test_a_header_that_the_hub_would_not_read_is_refused() -> None:
    specs: Specs = {f"{i:05}" + "x" * 1000: ("U8", (1,)) for i in range(24_800)}
    with pytest.raises(UserError, match=r"the header of 24800 tensors takes \d+ bytes, .*smaller --out-shard-size"):
        lay_out(specs, 10**9)
    assert len(lay_out(specs, 12_400)) == 2
