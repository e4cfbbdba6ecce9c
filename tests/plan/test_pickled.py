"""Pickled weights: found without running or reading anything, and merged as the same tensors in safetensors are."""

from __future__ import annotations

import json
import pickle
import random
import shutil
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import streammerge
from streammerge.base.errors import InputError
from streammerge.plan.pickled import open_model, open_pickled
from tests.models import make_models, make_tensors, read_tensors, save_model, write_recipe

TENSORS = {
    "a": torch.randn(5, 3).to(torch.bfloat16), "b": torch.arange(7), "c": torch.tensor(2.5), "d": torch.empty(0, 4),
    "e": torch.randn(2, 2, 2).to(torch.float16), "f": torch.tensor([True, False]), "g": torch.randn(3).double(),
}  # fmt: skip


def save(path: Path, content: Any, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path, **options)
    return path


def check(path: Path, tensors: dict[str, Tensor]) -> None:
    """Every tensor is where it is said to be."""
    content = path.read_bytes()
    header, _ = open_pickled(path)
    assert {entry.name for entry in header.entries} == set(tensors)
    for entry in header.entries:
        tensor = tensors[entry.name]
        assert entry.shape == tuple(tensor.shape)
        stored = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        assert content[entry.start : entry.stop] == stored, entry.name


def test_every_tensor_is_where_it_is_said_to_be(tmp_path: Path) -> None:
    check(save(tmp_path / "x.bin", TENSORS), TENSORS)
    check(save(tmp_path / "y.pt", OrderedDict(TENSORS)), TENSORS)
    check(save(tmp_path / "z.ckpt", {"state_dict": TENSORS, "epoch": 3}), TENSORS)
    check(save(tmp_path / "p.bin", {"w": torch.nn.Parameter(torch.randn(4))}), torch.load(tmp_path / "p.bin"))


def test_views_of_one_storage_are_found_each_in_its_place(tmp_path: Path) -> None:
    whole = torch.randn(100)
    tensors = {"whole": whole, "part": whole[10:30].view(4, 5), "tied": whole}
    check(save(tmp_path / "x.bin", tensors), tensors)


@pytest.mark.parametrize("shards", [1, 3])
def test_a_merge_of_pickled_models_is_that_of_the_same_in_safetensors(tmp_path: Path, shards: int) -> None:
    base, *models = make_models(tmp_path)
    pickled = []
    for model in (base, *models):
        other = tmp_path / "pickled" / model.name
        tensors = load_file(model / "model.safetensors")
        names = list(tensors)
        if shards == 1:
            save(other / "pytorch_model.bin", tensors)
        else:
            files = [f"pytorch_model-{i + 1:05d}-of-{shards:05d}.bin" for i in range(shards)]
            for i, file in enumerate(files):
                save(other / file, {name: tensors[name] for name in names[i::shards]})
            weight_map = {name: files[i % shards] for i, name in enumerate(names)}
            (other / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
        shutil.copy(model / "config.json", other / "config.json")
        pickled.append(other)
    outs = []
    for number, (first, *others) in enumerate(((base, *models), pickled)):
        recipe = write_recipe(tmp_path / f"{number}.yaml", "ties", others, base=first,
                              per_model={"weight": 0.6, "density": 0.4})  # fmt: skip
        streammerge.merge(recipe, tmp_path / f"out{number}", compile="off", threads=2)
        outs.append(tmp_path / f"out{number}")
    assert read_tensors(outs[0]) == read_tensors(outs[1])
    assert not list(outs[1].glob("*.bin"))
    assert not list(outs[1].glob("*.index.json"))
    assert streammerge.inspect(pickled[0]).layers == {"model.layers": 2}


def test_safetensors_are_preferred_where_both_are(tmp_path: Path) -> None:
    path = save_model(tmp_path, make_tensors(0, shapes={"w": (3, 3)}))
    save(path / "pytorch_model.bin", {"other": torch.zeros(3)})
    assert set(open_model(path).tensors) == {"w"}


def refusal(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        open_pickled(path)
    assert str(caught.value).startswith(f"{path}: ")
    return str(caught.value)


class _Runs:
    def __init__(self, marker: Path) -> None:
        self._marker = marker

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self._marker,)


def test_a_pickle_that_would_run_something_is_refused_and_runs_nothing(tmp_path: Path) -> None:
    path = save(tmp_path / "x.bin", {"w": torch.zeros(3), "evil": _Runs(tmp_path / "it-ran")})
    assert "its pickle asks for more than tensors" in refusal(path)
    assert not (tmp_path / "it-ran").exists()
    torch.load(path, weights_only=False)
    assert (tmp_path / "it-ran").exists(), "the bomb is no bomb"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"w": torch.zeros(3), "step": 7}, "its entry 'step' is a int, not a tensor"),
        ({3: torch.zeros(3)}, "its entry '3' is a FakeTensor, not a tensor with a name"),
        ([torch.zeros(3)], "it holds a list, not a map"),
        ({"w": torch.zeros(4, 3).t()}, "has the strides (1, 3); save a contiguous copy"),
        ({"w": torch.zeros(1).expand(5)}, "has the strides (0,)"),
        ({"w": torch.zeros(3, 3).to_sparse()}, "sparse"),
        ({"w": torch._neg_view(torch.arange(3.0))}, "cannot be merged"),
        ({"w": torch.zeros(3, dtype=torch.complex128)}, "torch.complex128"),
    ],
)
def test_what_is_no_map_of_plain_tensors_is_refused(tmp_path: Path, content: Any, expected: str) -> None:
    assert expected in refusal(save(tmp_path / "x.bin", content))


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    save(path, TENSORS, _use_new_zipfile_serialization=False)
    assert "it is no archive of torch.save since 1.6" in refusal(path)
    for content in (b"", b"PK", b"nothing", pickle.dumps({"w": 1}), save(path, TENSORS).read_bytes()[:-50]):
        path.write_bytes(content)
        refusal(path)


def rewritten(path: Path, change: Any, compression: int = zipfile.ZIP_STORED) -> Path:
    """The archive with its members changed by `change(name, content)`."""
    with zipfile.ZipFile(path) as old:
        members = [(name, old.read(name)) for name in old.namelist()]
    with zipfile.ZipFile(path, "w", compression) as new:
        for name, content in members:
            changed = change(name, content)
            if changed is not None:
                new.writestr(name, changed)
    return path


def test_an_archive_that_does_not_hold_what_its_pickle_says_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    short = rewritten(save(path, TENSORS), lambda name, content: content[:-1] if name.endswith("data/0") else content)
    assert "does not lie within what the archive holds of it" in refusal(short)
    gone = rewritten(save(path, TENSORS), lambda name, content: None if name.endswith("data/0") else content)
    refusal(gone)
    packed = rewritten(save(path, TENSORS), lambda name, content: content, zipfile.ZIP_DEFLATED)
    assert "compressed" in refusal(packed)
    big = rewritten(save(path, TENSORS), lambda name, content: b"big" if name.endswith("byteorder") else content)
    assert "big-endian" in refusal(big)
    empty = rewritten(save(path, TENSORS), lambda name, content: None if name.endswith("data.pkl") else content)
    assert "holds no data.pkl" in refusal(empty)


def test_a_claim_of_endless_elements_costs_nothing(tmp_path: Path) -> None:
    path = save(tmp_path / "x.bin", {"w": torch.zeros(3)})
    fake = rewritten(path, lambda name, content: _endless() if name.endswith("data.pkl") else content)
    assert "does not lie within what the archive holds of it" in refusal(fake)


def _endless() -> bytes:
    """The pickle of {"w": 10^18 numbers}."""

    class Pickler(pickle.Pickler):
        def persistent_id(self, value: Any) -> Any:
            return ("storage", torch.FloatStorage, "0", "cpu", 10**18) if isinstance(value, _Storage) else None

    class _Storage:
        pass

    class _Tensor:
        def __reduce__(self) -> Any:
            from torch._utils import _rebuild_tensor_v2

            return _rebuild_tensor_v2, (_Storage(), 0, (10**18,), (1,), False, OrderedDict())

    import io

    buffer = io.BytesIO()
    Pickler(buffer, protocol=2).dump({"w": _Tensor()})
    return buffer.getvalue()


@pytest.mark.parametrize("times", [150, pytest.param(5000, marks=pytest.mark.nightly)])
def test_damaged_archives_are_errors_of_ours_or_hold_what_they_say(tmp_path: Path, times: int) -> None:
    path = save(tmp_path / "x.bin", TENSORS)
    sound = path.read_bytes()
    chance = random.Random(times)
    refused = 0
    for _ in range(times):
        changed = bytearray(sound)
        for _ in range(chance.randint(1, 3)):
            place = chance.randrange(len(changed))
            if chance.random() < 0.3:
                del changed[place : place + chance.randint(1, 30)]
            else:
                changed[place] = chance.randrange(256)
        path.write_bytes(changed)
        try:
            header, status = open_pickled(path)
        except InputError:
            refused += 1
        else:
            assert all(0 <= entry.start <= entry.stop <= status.st_size for entry in header.entries)
    assert refused > times // 20
