"""`streammerge diff` against numpy in float64, for every dtype, with adapters, in any tiles; and what it shows."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from streammerge.base.errors import DoesNotFit, UserError
from streammerge.run.difference import Difference, Distance, compare
from tests.command import streammerge as run
from tests.models import make_models, make_tensors, save_model
from tests.run.test_adapters import write_adapter

SHAPES = {"model.embed.weight": (300, 64), "model.layers.0.mlp.weight": (1100, 70), "model.layers.0.norm.weight": (64,),
          "model.layers.1.mlp.weight": (1100, 70), "lm_head.weight": (3, 5)}  # fmt: skip


def diff(first: Path | str, second: Path | str, base: Path | str | None = None, **options: int) -> Difference:
    return compare(str(first), str(second), None if base is None else str(base), note=lambda text: None,
                   progress=lambda done, total: None, **options)  # fmt: skip


def arrays(path: Path) -> dict[str, np.ndarray]:
    return {name: tensor.double().numpy().ravel() for name, tensor in load_file(path / "model.safetensors").items()}


def check(distance: Distance, a: np.ndarray, b: np.ndarray, c: np.ndarray | None = None) -> None:
    assert distance.elements == a.size
    assert distance.relative == pytest.approx(np.linalg.norm(b - a) / np.linalg.norm(a), rel=1e-12)
    assert distance.cosine == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b), rel=1e-12)
    assert distance.changed == (a != b).mean()
    if c is not None:
        u, v = a - c, b - c
        both = (u != 0) & (v != 0)
        assert distance.delta_cosine == pytest.approx(u @ v / np.linalg.norm(u) / np.linalg.norm(v), rel=1e-9)
        assert distance.conflict == pytest.approx((u * v < 0).sum() / both.sum(), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_every_number_is_numpys(tmp_path: Path, dtype: torch.dtype) -> None:
    base, one, two = make_models(tmp_path, dtype=dtype, shapes=SHAPES)
    found, based = diff(one, two), diff(one, two, base)
    a, b, c = arrays(one), arrays(two), arrays(base)
    for name in SHAPES:
        check(found.tensors[name], a[name], b[name])
        check(based.tensors[name], a[name], b[name], c[name])
    assert list(found.by_layer()) == ["model.embed.weight", "model.layers.0", "model.layers.1", "lm_head.weight"]
    layer = [name for name in SHAPES if "layers.0" in name]
    check(based.by_layer()["model.layers.0"], *(np.concatenate([each[n] for n in layer]) for each in (a, b, c)))
    check(based.whole, *(np.concatenate([each[n] for n in SHAPES]) for each in (a, b, c)))


def test_tiles_and_threads_leave_the_numbers_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, one, two = make_models(tmp_path, shapes={"w": (700, 1000), "v": (13, 65537)})
    whole = diff(one, two, base, threads=2)
    monkeypatch.setattr("streammerge.plan.budget._TILE_BLOCKS", 1)
    assert diff(one, two, base, threads=1).tensors == whole.tensors


def test_mixed_dtypes_and_a_model_with_an_adapter(tmp_path: Path) -> None:
    tensors = make_tensors(0, dtype=torch.float32, shapes=SHAPES)
    one = save_model(tmp_path / "one", tensors)
    two = save_model(tmp_path / "two", {name: tensor.bfloat16() for name, tensor in tensors.items()})
    lora = write_adapter(tmp_path / "lora", {"lm_head.weight": (3, 5)})
    found = diff(one, f"{two}+{lora}")
    weights = load_file(lora / "adapter_model.safetensors")
    b = arrays(two)
    a, _ = (weights[f"base_model.model.lm_head.lora_{part}.weight"].double() for part in "AB")
    change = 2 * weights["base_model.model.lm_head.lora_B.weight"].double() @ a
    b["lm_head.weight"] = (torch.tensor(b["lm_head.weight"]).view(3, 5) + change).float().double().numpy().ravel()
    for name in SHAPES:
        check(found.tensors[name], arrays(one)[name], b[name])


def changed(path: Path, source: Path, **tensors: Tensor) -> Path:
    return save_model(path, {**load_file(source / "model.safetensors"), **tensors})


def test_integers_are_compared_by_their_bytes_and_what_is_not_in_all_is_named(tmp_path: Path) -> None:
    base, _ = make_models(tmp_path, 1, shapes=SHAPES)
    one = changed(tmp_path / "one", base, count=torch.arange(9), same=torch.arange(3), extra=torch.zeros(4))
    two = changed(tmp_path / "two", base, count=torch.arange(9).flip(0), same=torch.arange(3))
    found = diff(one, two)
    assert found.integers == {"count": True, "same": False}
    assert found.alone == ("extra",)
    assert "extra" not in found.tensors


def test_integers_of_models_that_share_their_base_are_compared(tmp_path: Path) -> None:
    base, other = make_models(tmp_path, 1, shapes={"w.weight": (6, 4)})
    one = changed(tmp_path / "one", base, count=torch.arange(9))
    loras = [write_adapter(tmp_path / f"lora{i}", {"w.weight": (6, 4)}, seed=i) for i in range(2)]
    found = diff(f"{one}+{loras[0]}", f"{one}+{loras[1]}")
    assert (found.integers, found.alone) == ({"count": False}, ())
    two = changed(tmp_path / "two", other, count=torch.arange(9).flip(0))
    assert diff(one, two, f"{one}+{loras[0]}").integers == {"count": True}


def test_equal_models_and_zeros_and_numbers_that_are_not_finite(tmp_path: Path) -> None:
    base, _ = make_models(tmp_path, 1, shapes={"w": (4, 4)})
    same = changed(tmp_path / "same", base)
    whole = diff(base, same).whole
    assert (whole.relative, whole.changed, whole.cosine) == (0.0, 0.0, pytest.approx(1.0))
    zeros = changed(tmp_path / "zeros", base, w=torch.zeros(4, 4))
    assert (diff(zeros, base).whole.relative, diff(zeros, base).whole.cosine) == (None, None)
    bad = changed(tmp_path / "bad", base, w=torch.full((4, 4), math.nan))
    assert diff(base, bad).whole.sums.nonfinite_b == 16
    assert diff(base, bad).whole.changed == 1.0


def test_models_of_nothing_to_compare_and_numbers_whose_squares_are_too_large(tmp_path: Path) -> None:
    one, two = (save_model(tmp_path / name, {"i": torch.arange(n)}) for name, n in (("one", 3), ("two", 3)))
    assert diff(one, two).whole.elements == 0
    assert run("diff", one, two).code == 0
    assert run("diff", one, two, "--json").code == 0
    large, small = torch.tensor([1e200, 1.0], dtype=torch.float64), torch.tensor([-1e200, 3.0], dtype=torch.float64)
    a = save_model(tmp_path / "a", {"w": large, "v": large.clone(), "e": torch.empty(0, 3)})
    b = save_model(tmp_path / "b", {"w": small, "v": large.clone(), "e": torch.empty(0, 3)})
    assert run("diff", a, b).code == 0
    facts = run("diff", a, b, "--json").events[-1]
    assert facts["all"]["relative"] is None
    assert facts["tensors"]["w"]["changed"] == 1.0


def test_what_cannot_be_compared_is_one_error(tmp_path: Path) -> None:
    base, _ = make_models(tmp_path, 1, shapes=SHAPES)
    other = save_model(tmp_path / "other", make_tensors(0, shapes={**SHAPES, "lm_head.weight": (4, 5)}))
    with pytest.raises(UserError, match="lm_head"):
        diff(base, other)
    with pytest.raises(UserError, match="listed more than once"):
        diff(base, base)
    with pytest.raises(DoesNotFit, match="smallest budget that works"):
        diff(base, save_model(tmp_path / "two", make_tensors(1, shapes=SHAPES)), max_memory=100_000_000)


def test_the_command_prints_a_table_json_and_a_page(tmp_path: Path) -> None:
    base, one, two = make_models(tmp_path, shapes={**SHAPES, "model.layers.1.<b>x": (8,)})
    done = run("diff", one, two, "--base", base, "--heatmap", tmp_path / "map.html")
    assert done.code == 0, done.err
    assert "model.layers.1" in done.out
    assert "opposed" in done.out
    page = (tmp_path / "map.html").read_text()
    assert "<b>x" not in page
    assert "&lt;b&gt;x" in page
    assert page.count("<td style") == 2 * 6
    facts = run("diff", one, two, "--base", base, "--json").events[-1]
    assert facts["event"] == "diff"
    assert set(facts["layers"]) == {"model.layers.0", "model.layers.1", "model.embed.weight", "lm_head.weight"}
    assert 0 < facts["all"]["opposite_signs"] < 1
    assert json.dumps(facts)
    by_tensor = run("diff", one, two, "--tensors")
    assert "model.layers.0.mlp.weight" in by_tensor.out
    assert run("diff", one, tmp_path / "nowhere").code == 4
