"""A mixture of thousands of small experts: what is done for each tensor does not grow with their number."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import streammerge
from streammerge.storage import checkpoint
from streammerge.storage.header import Header
from tests.models import save_model

SHARDS = 4
# Calls per tensor, of functions in Python and in C, to plan a merge of three models with filters. It was 480.
MOST_CALLS = 900


def deepseek(count: int, experts: int = 256) -> list[str]:
    """The first `count` tensors of a model of DeepSeek-V3's names, but for most of its attention."""
    names = ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
    layer = 0
    while len(names) < count:
        block = f"model.layers.{layer}.mlp"
        names += [f"model.layers.{layer}.self_attn.kv_b_proj.weight", f"{block}.gate.weight",
                  f"{block}.gate.e_score_correction_bias"]  # fmt: skip
        names += [f"{block}.shared_experts.{w}_proj.weight" for w in ("gate", "up", "down")]
        names += [f"{block}.experts.{i}.{w}_proj.weight" for i in range(experts) for w in ("gate", "up", "down")]
        layer += 1
    return names[:count]


def write(folder: Path, count: int, models: int = 3) -> Path:
    """A recipe over models of `count` tensors, with a filter for an expert, for what is shared, and for routers."""
    tensors = {name: torch.zeros(2, 2) for name in deepseek(count)}
    base, *others = (str(save_model(folder / f"m{i}", tensors, shards=SHARDS)) for i in range(models))
    weight = [{"filter": "experts.3.", "value": 0.5}, {"filter": "shared_experts", "value": 0.25},
              {"filter": "mlp.gate.", "value": 0.0}, {"value": [0.5, 1.0]}]  # fmt: skip
    path = folder / "r.yaml"
    path.write_text(yaml.safe_dump({"merge_method": "task_arithmetic", "base_model": base, "dtype": "float32",
                                    "models": [{"model": other} for other in others],
                                    "parameters": {"weight": weight}}))  # fmt: skip
    return path


def count_calls(work: Callable[[], Any]) -> int:
    """The calls that `work` makes, of functions in Python and in C."""
    calls = 0

    def count(frame: object, event: str, argument: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        work()
    finally:
        sys.setprofile(None)
    return calls


def test_planning_makes_as_many_calls_for_the_last_tensor_as_for_the_first(tmp_path: Path) -> None:
    few, many = (write(tmp_path / str(count), count) for count in (1000, 5000))
    streammerge.make_plan(few)  # what is imported, or worked out once
    first, second = (count_calls(lambda recipe=recipe: streammerge.make_plan(recipe)) for recipe in (few, many))
    assert second - first < 4000 * MOST_CALLS
    # No more for each of the 4000 others than for each of the first thousand, and a little.
    assert (second - first) / 4000 < 1.1 * first / 1000


def test_every_header_is_read_once_whatever_it_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    real = checkpoint.read_header

    def read_header(raw: bytes, file_bytes: int, path: str) -> Header:
        read.append(path)
        return real(raw, file_bytes, path)

    monkeypatch.setattr(checkpoint, "read_header", read_header)
    for count in (100, 3000):
        plan = streammerge.make_plan(write(tmp_path / str(count), count))
        assert len(plan.tensors) == count
        assert len(read) == len(set(read)) == 3 * SHARDS
        read.clear()


def test_many_tensors_share_a_sync_of_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    for name in ("fsync", "fdatasync"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda file, real=real: synced.append(file) or real(file))
    recipe = write(tmp_path, 1500, models=2)
    report = streammerge.merge(recipe, tmp_path / "out", compile="off", out_shard_size="10KB")
    assert report.tensors == 1500
    assert len(synced) < 150
