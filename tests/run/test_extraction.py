"""What one model changed in another becomes an adapter: near the best there is, small, whole, and PEFT's to load."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import streammerge
from streammerge.base.errors import DoesNotFit, InputError, OutputError, ShapeMismatch, StreamMergeError, UserError
from streammerge.plan.extraction import Wanted
from streammerge.run.extracted import Extracted
from streammerge.run.extraction import extract
from tests.command import COMMAND
from tests.command import streammerge as run
from tests.models import make_tensors, save_model, write_recipe
from tests.run.test_adapters import CASES as ADAPTED
from tests.run.test_adapters import fold, write_adapter
from tests.run.test_budget_holds import Groups, groups, joining  # noqa: F401
from tests.scales import FORMS, quantise
from tests.study.tiny import make_model

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' and PEFT's own

# Rows and columns around strips and panels: several of both, one, fewer than a sketch is wide.
SHAPES: dict[str, tuple[int, ...]] = {
    "model.embed_tokens.weight": (1500, 128),
    "model.layers.0.self_attn.q_proj.weight": (256, 256),
    "model.layers.0.mlp.up_proj.weight": (1037, 1100),
    "model.layers.0.mlp.down_proj.weight": (7, 2500),
    "model.layers.1.self_attn.q_proj.weight": (256, 256),
    "model.layers.1.input_layernorm.weight": (256,),
    "model.norm.weight": (256,),
    "lm_head.weight": (1500, 128),
}


class Unseen:
    """Hears notes."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def stage(self, text: str) -> None:
        pass

    def progress(self, done: float, total: float) -> None:
        assert 0 <= done <= total


def lora(model: Path, base: Path, out: Path, wanted: Wanted | None = None, **how: Any) -> Extracted:
    return extract(str(model), str(base), out, wanted or Wanted(), observer=how.pop("observer", Unseen()), **how)


def changed(tensors: Mapping[str, Tensor], *, rank: int = 4, size: float = 1e-3, noise: float = 0.0, seed: int = 5,
            only: str = "") -> dict[str, Tensor]:  # fmt: skip
    """The tensors with a random change of a low rank, and noise, in the matrices whose names hold `only`."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name, tensor in tensors.items():
        delta = torch.zeros(tensor.shape, dtype=torch.float64)
        if tensor.dim() == 2 and only in name:
            rows, columns = tensor.shape
            left, right = (torch.randn(size, generator=generator).double() for size in ((rows, rank), (rank, columns)))
            delta = size * left @ right / math.sqrt(rank) + noise * torch.randn(tensor.shape, generator=generator)
        made[name] = (tensor.double() + delta).to(tensor.dtype)
    return made


def pair(folder: Path, dtype: torch.dtype = torch.bfloat16, shapes: Mapping[str, tuple[int, ...]] = SHAPES,
         **change: Any) -> tuple[Path, Path]:  # fmt: skip
    """A model and its base."""
    base = make_tensors(0, dtype=dtype, shapes=shapes)
    model = save_model(folder / "model", changed(base, **change))
    return model, save_model(folder / "base", base)


def folded(folder: Path, base: Path, adapter: Path, **top: Any) -> dict[str, Tensor]:
    """base+adapter, written by a recipe."""
    recipe = write_recipe(folder / "again.yaml", "passthrough", [f"{base}+{adapter}"], **top)
    out = folder / f"again-{adapter.name}"
    streammerge.merge(recipe, out, compile="off", threads=1)
    return load_file(out / "model.safetensors")


def roundings(again: Tensor, model: Tensor, base: Tensor) -> float:
    """The largest error of any element, in steps of the dtype at the size of what it was made of.

    That is the largest of itself, of the base's and of what was added to that, which may cancel each other; where all
    of them happen to be small, of a usual element: the roundings of others are in the singular vectors.
    """
    wide, before = model.double(), base.double()
    size = torch.stack([wide.abs(), before.abs(), (wide - before).abs()]).amax(0)
    step = torch.finfo(model.dtype).eps * size.clamp(min=float(wide.square().mean().sqrt()))
    return float(((again.double() - wide).abs() / step).max())


# --- a model that was made from a LoRA -------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [16, 1], ids=["large", "small"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_model_made_from_a_lora_is_given_back_within_one_rounding(
    tmp_path: Path, dtype: torch.dtype, alpha: float
) -> None:
    """A change of a quarter of the weights, or of a sixtieth: in bfloat16 that is some three roundings."""
    base = save_model(tmp_path / "base", make_tensors(0, dtype=dtype, shapes=SHAPES))
    matrices = {name: shape for name, shape in SHAPES.items() if len(shape) == 2 and "embed" not in name}
    adapter = write_adapter(tmp_path / "lora", matrices, rank=8, seed=3, lora_alpha=alpha)
    recipe = write_recipe(tmp_path / "r.yaml", "passthrough", [f"{base}+{adapter}"])
    streammerge.merge(recipe, tmp_path / "model", compile="off")

    done = lora(tmp_path / "model", base, tmp_path / "out", Wanted(rank=8))
    assert {each.name for each in done.factored} == set(matrices)
    before, model = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "model"))
    again = folded(tmp_path, base, tmp_path / "out")
    for name, tensor in model.items():
        if name not in matrices:
            assert torch.equal(again[name], tensor), name
            continue
        assert roundings(again[name], tensor, before[name]) < 1.01, name
        assert float((again[name] == tensor).float().mean()) > 0.7, name
    errors = {torch.float32: 3e-6, torch.float16: 3e-2, torch.bfloat16: 0.2}
    assert all(each.error < errors[dtype] for each in done.factored)


@pytest.mark.parametrize("case", ["plain", "float32", "patterns", "embeddings", "fan_in_fan_out", "some layers"])
def test_what_peft_trained_and_we_folded_is_extracted_again(tmp_path: Path, case: str) -> None:
    adapted = ADAPTED[case](tmp_path)
    model, base = fold(tmp_path, adapted), load_file(adapted.base / "model.safetensors")
    lora(tmp_path / "out", adapted.base, tmp_path / "lora", Wanted(rank=7))
    again = folded(tmp_path, adapted.base, tmp_path / "lora")
    for name, tensor in model.items():
        assert roundings(again[name], tensor, base[name]) < 2, name


# --- PEFT ------------------------------------------------------------------------------------------------------------


def _fine_tune(base: Path, folder: Path, *, noise: float = 0.0) -> Path:
    """Everything in the model is changed: matrices by changes of rank 1 to 3, vectors at random."""
    generator = torch.Generator().manual_seed(1)
    tensors = load_file(base / "model.safetensors")
    for i, (name, tensor) in enumerate(sorted(tensors.items())):
        if tensor.dim() == 2:
            rank = 1 + i % 3
            left, right = (torch.randn(s, generator=generator) for s in ((len(tensor), rank), (rank, tensor.shape[1])))
            tensors[name] = tensor + 0.05 * left @ right + noise * torch.randn(tensor.shape, generator=generator)
        else:
            tensors[name] = tensor + 0.01 * torch.randn(tensor.shape, generator=generator)
    shutil.copytree(base, folder)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


TOKENS = torch.arange(1, 20)[None]


def _logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


def _load(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


@pytest.mark.parametrize("how", [Wanted(energy=0.9999999, keep_whole=True), Wanted(rank=3, keep_whole=True)], ids=repr)
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt2", "gemma2", "phi3", "bloom", "mixtral", "qwen3_moe"])
def test_peft_makes_the_model_of_it(tmp_path: Path, architecture: str, how: Wanted) -> None:
    base = make_model(tmp_path / "base", architecture, dtype=torch.float32)
    model = _fine_tune(base, tmp_path / "model")
    done = lora(model, base, tmp_path / "lora", how)
    assert done.kept > 1 - 1e-6
    wanted = _logits(_load(model))
    assert float((_logits(_load(base)) - wanted).abs().max()) > 0.1
    adapted = PeftModel.from_pretrained(_load(base), tmp_path / "lora")
    tied = "lm_head.weight" not in load_file(base / "model.safetensors")
    if not tied:
        assert torch.allclose(_logits(adapted), wanted, atol=1e-4)
    assert torch.allclose(_logits(adapted.merge_and_unload()), wanted, atol=1e-4)
    ours = folded(tmp_path, base, tmp_path / "lora")
    for name, tensor in load_file(model / "model.safetensors").items():
        assert torch.allclose(ours[name], tensor, atol=1e-6), name


@pytest.mark.parametrize("architecture", ["mixtral", "qwen3_moe"])
def test_experts_that_did_not_change_have_factors_of_zeros(tmp_path: Path, architecture: str) -> None:
    """PEFT takes the experts of a model together, and our own reader each for itself."""
    base = make_model(tmp_path / "base", architecture, dtype=torch.float32)
    tensors = load_file(base / "model.safetensors")
    name = next(name for name in tensors if ".experts.1." in name)
    generator = torch.Generator().manual_seed(0)
    tensors[name] += 0.1 * torch.randn(len(tensors[name]), 1, generator=generator)
    shutil.copytree(base, tmp_path / "model")
    save_file(tensors, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    done = lora(tmp_path / "model", base, tmp_path / "lora", Wanted(energy=0.99))
    assert [(each.name, each.rank) for each in done.factored] == [(name, 1)]
    assert torch.allclose(folded(tmp_path, base, tmp_path / "lora")[name], tensors[name], atol=1e-6)
    adapted = PeftModel.from_pretrained(_load(base), tmp_path / "lora")
    assert torch.allclose(_logits(adapted), _logits(_load(tmp_path / "model")), atol=1e-4)


def test_a_tied_embedding_is_told_of(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base", "qwen2", dtype=torch.float32)
    observer = Unseen()
    done = lora(_fine_tune(base, tmp_path / "model"), base, tmp_path / "lora", observer=observer)
    assert done.notes == tuple(observer.notes)
    assert "the embedding is the head, too" in done.notes[0]
    assert done.notes[0] in (tmp_path / "lora" / "README.md").read_text()
    lora(tmp_path / "model", base, tmp_path / "without", Wanted(exclude=("embed",)), observer=(quiet := Unseen()))
    assert quiet.notes == []


def test_matrices_that_peft_takes_for_experts_are_told_of(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base", "deepseek_v3", dtype=torch.float32)
    done = lora(_fine_tune(base, tmp_path / "model"), base, tmp_path / "lora", Wanted(exclude=("embed", "lm_head")))
    (note,) = done.notes
    assert "model.layers.0.mlp.down_proj" in note
    ours = folded(tmp_path, base, tmp_path / "lora")["model.layers.0.mlp.down_proj.weight"]
    theirs = load_file(tmp_path / "model" / "model.safetensors")["model.layers.0.mlp.down_proj.weight"]
    assert torch.allclose(ours, theirs, atol=1e-6)


def test_a_head_of_its_own_where_the_base_has_none_is_left_out(tmp_path: Path) -> None:
    tensors = make_tensors(0, shapes=SHAPES)
    del tensors["lm_head.weight"]
    base = save_model(tmp_path / "base", tensors)
    model = changed(tensors)
    # Tied as well, but stored.
    stored = save_model(tmp_path / "stored", {**model, "lm_head.weight": model["model.embed_tokens.weight"].clone()})
    config = json.loads((stored / "config.json").read_text())
    (stored / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    assert not lora(stored, base, tmp_path / "a").left
    own = save_model(tmp_path / "own", {**model, "lm_head.weight": model["model.embed_tokens.weight"] * 2})
    (left,) = lora(own, base, tmp_path / "b").left
    assert (left.name, left.why) == ("lm_head.weight", "the base has no head of its own, but uses its embedding")


# --- how good it is --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
def test_ranks_energies_and_errors_are_those_of_a_whole_decomposition(tmp_path: Path, dtype: str) -> None:
    model, base = pair(tmp_path, torch.float32, rank=40, noise=3e-4)
    done = lora(model, base, tmp_path / "out", Wanted(rank=24, dtype=dtype))
    ours, theirs, factors = (load_file(file) for file in (base / "model.safetensors", model / "model.safetensors",
                                                         tmp_path / "out" / "adapter_model.safetensors"))  # fmt: skip
    assert len(done.factored) == 6
    for each in done.factored:
        delta = (theirs[each.name] - ours[each.name]).double()
        squares = torch.linalg.svdvals(delta).square()
        assert each.squares == pytest.approx(float(squares.sum()), rel=1e-10)
        best = float(squares[: each.rank].sum() / squares.sum())
        assert 0.99 * best <= each.kept <= best * (1 + 1e-9)
        module = f"base_model.model.{each.name.removesuffix('.weight')}"
        embedding = "embed" in module
        first, second = (
            factors[f"{module}.lora_embedding_{part}" if embedding else f"{module}.lora_{part}.weight"].double()
            for part in "AB"
        )
        left = delta - ((second @ first).t() if embedding else second @ first)
        assert each.error == pytest.approx(float(left.norm() / delta.norm()), rel=1e-6)
        # Both factors have half of it.
        assert float(first.norm()) == pytest.approx(float(second.norm()), rel=0.01)


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.999])
def test_by_energy_the_rank_is_nearly_the_fewest(tmp_path: Path, energy: float) -> None:
    model, base = pair(tmp_path, torch.float32, rank=60, noise=1e-5)
    done = lora(model, base, tmp_path / "out", Wanted(energy=energy))
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (base, model))
    for each in done.factored:
        squares = torch.linalg.svdvals((theirs[each.name] - ours[each.name]).double()).square()
        fewest = 1 + int((squares.cumsum(0) < energy * squares.sum()).sum())
        assert fewest <= each.rank <= fewest + 1 + fewest // 20
        assert each.kept >= energy


def test_the_most_that_energy_may_choose_is_kept_to_and_said(tmp_path: Path) -> None:
    model, base = pair(tmp_path, torch.float32, rank=60)
    result = run("extract-lora", model, tmp_path / "out", "--base", base, "--energy", "0.99", "--max-rank", "5")
    assert result.code == 0, result.err
    facts = json.loads((tmp_path / "out" / "streammerge.extraction.json").read_text())
    assert {each["rank"] for each in facts["tensors"].values()} == {5}
    assert re.search(r"short\s+\d matrices hold less than 0.99", result.out)


# --- the same bytes --------------------------------------------------------------------------------------------------


def _contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


@pytest.mark.parametrize("wanted", [Wanted(rank=5), Wanted(energy=0.9)], ids=repr)
def test_threads_and_budgets_leave_the_bytes_as_they_are(tmp_path: Path, wanted: Wanted) -> None:
    model, base = pair(tmp_path, rank=40, noise=1e-4)
    expected, reads = None, set()
    for number, (threads, memory) in enumerate(((1, None), (2, None), (5, None), (1, "small"), (3, "small"))):
        out = tmp_path / f"out{number}"
        with pytest.MonkeyPatch.context() as patch:
            if memory == "small":
                patch.setattr("streammerge.plan.sketch._DEFAULT_HELD", 0)
            reads.add(lora(model, base, out, wanted, threads=threads).read_bytes)
        found = _contents(out)
        assert expected in (None, found)
        expected = found
    # Held differences are read once.
    assert len(reads) == 2


def test_another_seed_is_another_sketch(tmp_path: Path) -> None:
    model, base = pair(tmp_path, rank=40, noise=1e-3)
    for seed in (0, 1):
        lora(model, base, tmp_path / f"{seed}", Wanted(rank=4, seed=seed))
    one, other = (_contents(tmp_path / f"{seed}")["adapter_model.safetensors"] for seed in (0, 1))
    assert one != other


def test_the_file_is_the_librarys(tmp_path: Path) -> None:
    model, base = pair(tmp_path)
    lora(model, base, tmp_path / "out", Wanted(rank=3, keep_whole=True, dtype="BF16"))
    file = tmp_path / "out" / "adapter_model.safetensors"
    save_file(load_file(file), tmp_path / "theirs", metadata={"format": "pt"})
    assert file.read_bytes() == (tmp_path / "theirs").read_bytes()


# --- what is in it, and what is not ----------------------------------------------------------------------------------


def test_what_did_not_change_is_no_target(tmp_path: Path) -> None:
    model, base = pair(tmp_path, only="q_proj")
    done = lora(model, base, tmp_path / "out")
    assert [each.name for each in done.factored] == [name for name in SHAPES if "q_proj" in name]
    assert (done.equal, done.left, done.kept) == (6, (), pytest.approx(1, abs=0.2))
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["target_modules"] == ["q_proj"]


def _with_vectors(folder: Path) -> tuple[Path, Path]:
    """A pair whose norms, a bias, a stack of matrices and a counter differ, too."""
    more = {"model.layers.0.self_attn.q_proj.bias": (256,), "model.layers.0.mlp.experts.up_proj": (4, 30, 20)}
    base = make_tensors(0, shapes=SHAPES | more) | {"model.steps": torch.arange(5)}
    model = changed(base, only="q_proj")
    for name, tensor in model.items():
        if tensor.dim() != 2:
            model[name] = tensor + torch.ones_like(tensor) * (1 if tensor.dtype == torch.int64 else 0.5)
    return save_model(folder / "model", model), save_model(folder / "base", base)


def test_what_is_left_out_is_said_with_its_share(tmp_path: Path) -> None:
    model, base = _with_vectors(tmp_path)
    done = lora(model, base, tmp_path / "out")
    why = {each.name: each.why for each in done.left}
    assert why == {
        "model.layers.0.self_attn.q_proj.bias": "a bias",
        "model.layers.0.mlp.experts.up_proj": "of 3 dimensions",
        "model.layers.1.input_layernorm.weight": "a vector, no matrix",
        "model.norm.weight": "a vector, no matrix",
        "model.steps": "not of floats",
    }
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (base, model))
    squares = {name: float((theirs[name].double() - ours[name].double()).square().sum()) for name in ours}
    for each in done.left:
        if each.name != "model.steps":
            assert each.squares == pytest.approx(squares[each.name], rel=1e-5)
    facts = json.loads((tmp_path / "out" / "streammerge.extraction.json").read_text())
    assert list(facts["left_out"]) == list(why)
    assert facts["share_in_adapter"] == done.kept < 0.5
    assert "## Not in the adapter, though they differ" in (tmp_path / "out" / "README.md").read_text()


def test_norms_and_biases_go_along_whole_if_asked(tmp_path: Path) -> None:
    model, base = _with_vectors(tmp_path)
    done = lora(model, base, tmp_path / "out", Wanted(keep_whole=True))
    whole = {each.name for each in done.left if each.whole}
    assert whole == {"model.layers.0.self_attn.q_proj.bias", "model.layers.1.input_layernorm.weight",
                     "model.norm.weight"}  # fmt: skip
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["model.layers.1.input_layernorm", "model.norm"]
    assert config["bias"] == "all"
    theirs, again = load_file(model / "model.safetensors"), folded(tmp_path, base, tmp_path / "out")
    assert all(torch.equal(again[name], theirs[name]) for name in whole)


def test_a_norm_whose_name_ends_others_is_not_kept_whole(tmp_path: Path) -> None:
    """PEFT would take them for it, and find no weights for them."""
    base = make_tensors(0, shapes={"q.weight": (40, 40), "norm.weight": (40,), "layers.0.input_norm.weight": (40,)})
    model = changed(base) | {"norm.weight": base["norm.weight"] + 1}
    paths = [save_model(tmp_path / name, each) for name, each in (("model", model), ("base", base))]
    (left,) = lora(*paths, tmp_path / "out", Wanted(keep_whole=True)).left
    assert (left.name, left.whole) == ("norm.weight", False)


def test_only_what_is_asked_for_is_looked_at(tmp_path: Path) -> None:
    model, base = pair(tmp_path)
    done = lora(model, base, tmp_path / "a", Wanted(include=("q_proj", "mlp"), exclude=("layers.1",)))
    assert {each.name for each in done.factored} == {name for name in SHAPES if "layers.0" in name}
    assert len(done.unseen) == len(SHAPES) - 3
    with pytest.raises(UserError, match=r"--include q_prj: is part of no tensor's name. Did you mean q_proj"):
        lora(model, base, tmp_path / "b", Wanted(include=("q_prj",)))


def test_weights_in_8_bits_are_the_numbers_they_stand_for(tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors = make_tensors(0, dtype=torch.float32, shapes={name: (300, 260), "model.norm.weight": (260,)})
    base = save_model(tmp_path / "base", tensors)
    wide = changed(tensors, size=1e-2)
    codes, scales = quantise(wide[name].double(), FORMS["blocks"])
    model = save_model(tmp_path / "model", {**wide, name: codes, f"{name}_scale_inv": scales})
    recipe = write_recipe(tmp_path / "r.yaml", "passthrough", [model], dtype="float32")
    streammerge.merge(recipe, tmp_path / "plain", compile="off")
    for source, out in ((model, "scaled"), (tmp_path / "plain", "same")):
        lora(source, base, tmp_path / out, Wanted(rank=4))
    one, other = (_contents(tmp_path / out)["adapter_model.safetensors"] for out in ("scaled", "same"))
    assert one == other


@pytest.mark.parametrize("dtypes", [(torch.float64, torch.float64), (torch.float32, torch.float64),
                                    (torch.bfloat16, torch.float32)], ids=repr)  # fmt: skip
def test_models_of_different_dtypes_are_compared_as_numbers(tmp_path: Path, dtypes: tuple[Any, Any]) -> None:
    base = make_tensors(0, dtype=torch.float64, shapes={"a.weight": (200, 300)})
    model = changed(base)
    paths = [save_model(tmp_path / str(i), {"a.weight": each["a.weight"].to(dtype)})
             for i, (each, dtype) in enumerate(zip((model, base), dtypes, strict=True))]  # fmt: skip
    (found,) = lora(*paths, tmp_path / "out", Wanted(rank=4)).factored
    delta = model["a.weight"].to(dtypes[0]).double() - base["a.weight"].to(dtypes[1]).double()
    assert found.squares == pytest.approx(float(delta.square().sum()), rel=1e-6)


# --- what does not fit -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        (Wanted(rank=0), "--rank 0: must be 1 or more"),
        (Wanted(energy=0.0), "--energy 0: must be above 0 and at most 1"),
        (Wanted(energy=1.01), "--energy 1.01: must be"),
        (Wanted(energy=math.nan), "--energy nan: must be"),
        (Wanted(rank=4, energy=0.5), "give one of them"),
        (Wanted(energy=0.5, max_rank=0), "--max-rank 0: must be"),
        (Wanted(rank=4, max_rank=5), "without --energy give --rank alone"),
    ],
)
def test_numbers_that_mean_nothing_are_errors(tmp_path: Path, wanted: Wanted, expected: str) -> None:
    model, base = pair(tmp_path)
    with pytest.raises(UserError, match=re.escape(expected)):
        lora(model, base, tmp_path / "out", wanted)
    assert not (tmp_path / "out").exists()


def test_a_rank_larger_than_a_matrix_is_all_of_it(tmp_path: Path) -> None:
    shapes = {"a.weight": (30, 50), "b.weight": (50, 30)}
    model, base = pair(tmp_path, torch.float32, shapes, rank=30, noise=1e-3)
    done = lora(model, base, tmp_path / "out", Wanted(rank=64))
    assert [(each.rank, each.error < 1e-6) for each in done.factored] == [(30, True), (30, True)]
    assert lora(model, base, tmp_path / "all", Wanted(energy=1.0)).kept == pytest.approx(1)


def _refused(tmp_path: Path, change: Callable[[dict[str, Tensor]], None], kind: type[StreamMergeError]) -> str:
    tensors = make_tensors(0, shapes=SHAPES)
    base, model = save_model(tmp_path / "base", tensors), dict(tensors)
    change(model)
    save_model(tmp_path / "model", model)
    with pytest.raises(kind) as caught:
        lora(tmp_path / "model", base, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "model"]
    return str(caught.value)


def test_models_that_do_not_differ_are_an_error(tmp_path: Path) -> None:
    assert "do not differ" in _refused(tmp_path, lambda model: None, UserError)


def test_models_that_differ_in_vectors_only_are_an_error(tmp_path: Path) -> None:
    def change(model: dict[str, Tensor]) -> None:
        model["model.norm.weight"] = model["model.norm.weight"] + 1

    assert "differ in no matrix, only in what a LoRA cannot hold" in _refused(tmp_path, change, UserError)


def test_the_same_model_twice_is_an_error(tmp_path: Path) -> None:
    model, _ = pair(tmp_path)
    with pytest.raises(UserError, match="are the same model"):
        lora(model, tmp_path / "base" / ".." / "model", tmp_path / "out")


def test_tensors_that_only_one_has_are_an_error_and_all_are_named(tmp_path: Path) -> None:
    def change(model: dict[str, Tensor]) -> None:
        del model["model.layers.0.mlp.up_proj.weight"]
        model["model.extra.weight"] = torch.zeros(3, 3)

    text = _refused(tmp_path, change, UserError)
    assert "lacks 1 that" in text
    assert "model.layers.0.mlp.up_proj.weight" in text
    assert "model.extra.weight" in text
    assert "--exclude" in text


def test_a_vocabulary_that_grew_is_an_error_with_a_way_out(tmp_path: Path) -> None:
    tensors = make_tensors(0, shapes=SHAPES)
    base, model = save_model(tmp_path / "base", tensors), changed(tensors)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        model[name] = torch.cat([model[name], model[name][:4]])
    save_model(tmp_path / "model", model)
    with pytest.raises(ShapeMismatch) as caught:
        lora(tmp_path / "model", base, tmp_path / "out")
    assert "[1504, 128], the base's is [1500, 128]" in str(caught.value)
    flags = re.search(r"To leave them out: (.*)\.$", str(caught.value))
    assert flags is not None
    done = lora(tmp_path / "model", base, tmp_path / "out", Wanted(exclude=tuple(flags[1].split()[1::2])))
    assert len(done.factored) == 4


def test_another_width_is_an_error(tmp_path: Path) -> None:
    def change(model: dict[str, Tensor]) -> None:
        model["model.layers.0.mlp.up_proj.weight"] = torch.zeros(1037, 1099)

    assert "[1037, 1099], the base's is [1037, 1100]" in _refused(tmp_path, change, ShapeMismatch)


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_numbers_that_are_none_are_an_error_that_names_the_tensor(tmp_path: Path, number: float) -> None:
    def change(model: dict[str, Tensor]) -> None:
        name = "model.layers.0.mlp.up_proj.weight"
        model[name] = model[name].clone()
        model[name][700, 7] = number

    text = _refused(tmp_path, change, InputError)
    assert text.startswith("model.layers.0.mlp.up_proj.weight: the difference")


def test_weights_in_4_bits_are_an_error(tmp_path: Path) -> None:
    def change(model: dict[str, Tensor]) -> None:
        model["model.layers.0.mlp.up_proj.qweight"] = torch.zeros(3, 3, dtype=torch.int32)

    assert "is quantised by AWQ or GPTQ" in _refused(tmp_path, change, UserError)


def test_a_base_with_an_adapter_is_written_first(tmp_path: Path) -> None:
    model, base = pair(tmp_path)
    lora(model, base, tmp_path / "out")
    with pytest.raises(UserError, match="Write that model first"):
        extract(f"{base}+{tmp_path / 'out'}", str(base), tmp_path / "b", Wanted(), observer=Unseen())


def test_a_model_that_is_not_there_is_an_input_error(tmp_path: Path) -> None:
    _, base = pair(tmp_path)
    with pytest.raises(InputError, match="is not there"):
        lora(tmp_path / "nowhere", base, tmp_path / "out")


# --- OUT -------------------------------------------------------------------------------------------------------------


def test_an_out_that_holds_something_is_left_alone(tmp_path: Path) -> None:
    model, base = pair(tmp_path)
    (tmp_path / "out").mkdir()
    lora(model, base, tmp_path / "out")
    before = _contents(tmp_path / "out")
    result = run("extract-lora", model, tmp_path / "out", "--base", base)
    assert result.code == 2
    assert "is not empty" in result.err
    assert _contents(tmp_path / "out") == before
    for out, expected in ((base / "config.json", "is a file"), (model / "lora", "lies inside the input")):
        with pytest.raises(OutputError, match=expected):
            lora(model, base, out)
    assert sorted(path.name for path in model.iterdir()) == ["config.json", "model.safetensors"]


def test_what_would_be_made_beside_somebody_elses_files_is_not(tmp_path: Path) -> None:
    model, base = pair(tmp_path)
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "notes").write_text("mine")
    with pytest.raises(OutputError, match="holds notes"):
        lora(model, base, tmp_path / "out")
    assert (tmp_path / "out.partial" / "notes").read_text() == "mine"


def test_a_kill_leaves_nothing_or_all_and_the_next_run_begins_anew(tmp_path: Path) -> None:
    shapes = {f"model.layers.{i}.mlp.up_proj.weight": (400, 900) for i in range(30)}
    model, base = pair(tmp_path, shapes=shapes, noise=1e-4)
    lora(model, base, tmp_path / "expected")
    expected, out = _contents(tmp_path / "expected"), tmp_path / "out"
    command = [*COMMAND, "extract-lora", str(model), str(out), "--base", str(base), "--threads", "1"]
    killed = 0
    for number in range(6):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and not (tmp_path / "out.partial" / "whole").exists():
            time.sleep(0.005)
        time.sleep(0.06 * number)
        process.kill()
        killed += process.wait() == -9
        if out.exists():
            assert _contents(out) == expected
            shutil.rmtree(out)
    assert killed >= 3
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0
    assert _contents(out) == expected
    assert not (tmp_path / "out.partial").exists()


def test_a_stop_leaves_nothing_and_says_so(tmp_path: Path) -> None:
    shapes = {f"model.layers.{i}.mlp.up_proj.weight": (400, 900) for i in range(60)}
    model, base = pair(tmp_path, shapes=shapes, noise=1e-4)
    command = [*COMMAND, "extract-lora", str(model), str(tmp_path / "out"), "--base", str(base), "--threads", "1"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not (tmp_path / "out.partial" / "whole" / "factors.partial").exists():
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 75, said
    assert "Nothing was written" in said
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


def test_a_full_disk_is_told_of_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, base = pair(tmp_path)

    def full(*arguments: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr("streammerge.run.spill.os.pwrite", full)
        with pytest.raises(DoesNotFit, match="Nothing was written: free some space"):
            lora(model, base, tmp_path / "out")
    monkeypatch.setattr("streammerge.run.extraction.free_bytes", lambda folder: 1000)
    with pytest.raises(DoesNotFit, match=r"needs .* of disk while it is made"):
        lora(model, base, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "model"]


def test_it_is_there_from_python(tmp_path: Path) -> None:
    model, base = pair(tmp_path)
    done = streammerge.extract_lora(str(model), tmp_path / "out", base=str(base), rank=3, max_memory="2GB")
    assert {each.rank for each in done.factored} == {3}
    with pytest.raises(UserError, match="--rank 0"):
        streammerge.extract_lora(str(model), tmp_path / "b", base=str(base), rank=0)


def test_two_at_a_time_do_not_meddle(tmp_path: Path) -> None:
    import fcntl

    model, base = pair(tmp_path)
    (tmp_path / "out.partial").mkdir()
    with (tmp_path / "out.partial" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(OutputError, match="another process is making it"):
            lora(model, base, tmp_path / "out")
    lora(model, base, tmp_path / "out")


# --- memory ----------------------------------------------------------------------------------------------------------

LARGE = {
    "model.layers.0.mlp.up_proj.weight": (5000, 8000),
    "model.layers.0.mlp.down_proj.weight": (1000, 30_001),
    "model.norm.weight": (8000,),
}


@pytest.mark.parametrize("threads", ["2", pytest.param("1", marks=pytest.mark.nightly)])
def test_it_works_in_a_cgroup_of_the_smallest_budget_that_a_refusal_names(
    groups: Groups,  # noqa: F811
    tmp_path: Path,
    threads: str,
) -> None:
    model, base = pair(tmp_path, shapes=LARGE, noise=1e-3)
    arguments = ("extract-lora", model, tmp_path / "small", "--base", base, "--threads", threads)
    refused = run(*arguments, "--max-memory", "150MB")
    assert refused.code == 3
    named = re.search(r"smallest budget that works is (\d+)MB", refused.err)
    assert named is not None, refused.err
    assert not (tmp_path / "small").exists()
    budget = int(named[1]) * 1_000_000
    # The two models are 280 MB, and their differences in float32 as much.
    assert budget < 450_000_000
    squeezed = run(*arguments, "--max-memory", str(budget), "--json", before=joining(groups(budget)))
    assert squeezed.done["peak_own_bytes"] <= budget
    assert squeezed.done["read_bytes"] == 4 * 2 * 2 * 70_001_000 + 2 * 2 * 8000
    lora(model, base, tmp_path / "large")
    assert _contents(tmp_path / "small") == _contents(tmp_path / "large")


def test_a_rank_that_does_not_fit_is_refused_before_any_file(tmp_path: Path) -> None:
    model, base = pair(tmp_path, shapes={"a.weight": (1000, 9000)})
    with pytest.raises(DoesNotFit, match="too little for rank 900"):
        lora(model, base, tmp_path / "out", Wanted(rank=900), max_memory=600_000_000)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "model"]


# --- the command -----------------------------------------------------------------------------------------------------


def test_the_command_says_what_it_made(tmp_path: Path) -> None:
    model, base = _with_vectors(tmp_path)
    result = run("extract-lora", model, tmp_path / "a", "--base", base, "--rank", "4")
    assert result.code == 0, result.err
    assert "2 matrices, rank 4" in " ".join(result.out.split())
    assert "5 tensors that differ" in " ".join(result.out.split())
    events = run("extract-lora", model, tmp_path / "b", "--base", base, "--rank", "4", "--json").done
    assert events["tensors"]["model.layers.0.self_attn.q_proj.weight"]["rank"] == 4
    assert _contents(tmp_path / "a") == _contents(tmp_path / "b")
    assert (tmp_path / "a" / "adapter_model.safetensors").stat().st_mode & 0o777 == 0o644 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
