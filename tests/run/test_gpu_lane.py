"""The GPU's lane without a GPU: streams and events that do nothing, buffers on the processor.

This shows that tiles go where they should and that the results are those of the other lane. It cannot show that the
order the events keep is right: that takes a GPU.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import streammerge
from streammerge.base.errors import DoesNotFit, UserError
from streammerge.run.arena import Arena
from streammerge.run.gpu import CudaLane, choose_device
from streammerge.run.walk import Equipment
from tests.models import make_models, write_recipe

SHAPES = {"model.layers.0.up.weight": (700, 1000), "model.layers.1.up.weight": (65_537,), "norm": (63,)}


class FakeStream:
    def __init__(self, *_: object) -> None:
        pass

    def wait_event(self, event: FakeEvent) -> None:
        pass


class FakeEvent:
    def record(self, stream: FakeStream) -> None:
        pass

    def synchronize(self) -> None:
        pass


@pytest.fixture
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.cuda's calls, doing nothing."""
    cudart = SimpleNamespace(cudaHostRegister=lambda *_: 0, cudaHostUnregister=lambda *_: 0)
    fakes = {
        "Stream": FakeStream, "Event": FakeEvent, "stream": lambda _: nullcontext(), "set_device": lambda _: None,
        "mem_get_info": lambda _: (10**9, 2 * 10**9), "set_per_process_memory_fraction": lambda *_: None,
        "cudart": lambda: cudart, "synchronize": lambda _: None,
    }  # fmt: skip
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)


@pytest.mark.usefixtures("fake_gpu")
@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "dare_ties", "slerp"])
def test_the_lane_of_a_gpu_gives_the_bytes_of_the_processor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    base, *models = make_models(tmp_path, 1 if method == "slerp" else 2, shapes=SHAPES)
    per_model = None if method == "slerp" else {"weight": 0.5} | ({} if "task" in method else {"density": 0.4})
    top = {"parameters": {"t": 0.3}} if method == "slerp" else {}
    recipe = write_recipe(tmp_path / "r.yaml", method, models, base=base, per_model=per_model, **top)
    streammerge.merge(recipe, tmp_path / "cpu", compile="off", device="cpu")
    monkeypatch.setattr(Equipment, "lane", lambda _, arena: CudaLane(torch.device("cpu"), arena, None))
    # One block per tile, so that the ring goes round.
    monkeypatch.setattr("streammerge.plan.budget._TILE_BLOCKS", 1)
    streammerge.merge(recipe, tmp_path / "gpu", compile="off", device="cpu")
    names = ("model.safetensors", "streammerge.manifest.json")
    assert [(tmp_path / "gpu" / name).read_bytes() for name in names] == [
        (tmp_path / "cpu" / name).read_bytes() for name in names
    ]


@pytest.mark.usefixtures("fake_gpu")
def test_too_little_gpu_memory_is_refused() -> None:
    with pytest.raises(DoesNotFit, match="--max-gpu-memory"):
        CudaLane(torch.device("cpu"), Arena(3, 1 << 20, 1 << 20, touch=False), 1000)


def test_a_device_that_is_not_there_is_refused() -> None:
    assert choose_device("cpu").type == "cpu"
    for name in ("tpu", "meta", "cuda:99"):
        with pytest.raises(UserError, match="--device"):
            choose_device(name)
