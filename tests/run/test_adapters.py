"""LoRA adapters are folded in while reading: as PEFT does it, to one rounding, whatever tiles, threads and budget."""

from __future__ import annotations

import json
import math
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import streammerge
from streammerge.base.errors import InputError, StreamMergeError, UserError
from streammerge.run.merge import Options, make_plan
from tests.methods.cases import FORMS, model_count, usual
from tests.models import make_tensors, save_model, write_recipe
from tests.study.tiny import make_model

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' and PEFT's own


@dataclass(frozen=True)
class Adapted:
    """A base, an adapter for it, and what PEFT makes of the two: its tensors in float64, from float64 arithmetic."""

    base: Path
    adapter: Path
    merged: dict[str, Tensor]


def adapt(folder: Path, base: Path, model: nn.Module, config: LoraConfig, *, seed: int = 1) -> Adapted:
    """Give a model a random adapter, save that, and let PEFT merge it."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        adapted = get_peft_model(model, config)
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "lora_magnitude" in name:
                    parameter.mul_(1 + 0.1 * torch.rand_like(parameter))
                elif parameter.requires_grad:
                    parameter.copy_(torch.randn_like(parameter) * 0.05)
    adapted.save_pretrained(folder)
    wide = adapted.to(torch.float64).merge_and_unload()
    return Adapted(base, folder, {name: tensor.clone() for name, tensor in wide.state_dict().items()})


def causal(folder: Path, architecture: str, dtype: torch.dtype = torch.bfloat16, **options: Any) -> Adapted:
    base = make_model(folder / "base", architecture, dtype=dtype)
    # PEFT keeps the adapter in float32 whatever the base is.
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = LoraConfig(r=4, lora_alpha=6, task_type="CAUSAL_LM", **options)
    return adapt(folder / "adapter", base, model, config)


class Convolutions(nn.Module):
    """Of every kind that PEFT has layers for."""

    def __init__(self) -> None:
        super().__init__()
        self.line, self.plane = nn.Conv1d(6, 10, 3), nn.Conv2d(10, 7, (3, 5))
        self.point, self.space = nn.Conv2d(7, 12, 1), nn.Conv3d(4, 5, 2)


def convolutions(folder: Path, **options: Any) -> Adapted:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Convolutions()
    (folder / "base").mkdir(parents=True)
    save_file(model.state_dict(), folder / "base" / "model.safetensors", metadata={"format": "pt"})
    targets = ["line", "plane", "point", "space"]
    return adapt(folder / "adapter", folder / "base", model, LoraConfig(r=3, target_modules=targets, **options))


LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CASES: dict[str, Callable[[Path], Adapted]] = {
    "plain": lambda folder: causal(folder, "llama", target_modules=LINEAR),
    "float32": lambda folder: causal(folder, "llama", torch.float32, target_modules=LINEAR),
    "float64": lambda folder: causal(folder, "llama", torch.float64, target_modules=LINEAR),
    "rsLoRA": lambda folder: causal(folder, "llama", target_modules=LINEAR, use_rslora=True),
    "patterns": lambda folder: causal(
        folder, "llama", target_modules=LINEAR,
        rank_pattern={"q_proj": 2, r"model.layers.1.mlp.up_proj": 7, r"layers\.(0|2)\.self_attn\.v_proj": 3},
        alpha_pattern={"q_proj": 11, "down_proj": 1},
    ),
    "DoRA": lambda folder: causal(folder, "llama", target_modules=LINEAR, use_dora=True),
    "modules_to_save": lambda folder: causal(
        folder, "llama", target_modules=["q_proj"], modules_to_save=["lm_head", "norm"]
    ),
    "embeddings": lambda folder: causal(folder, "llama", target_modules=["embed_tokens", "q_proj", "lm_head"]),
    "embeddings, DoRA": lambda folder: causal(
        folder, "llama", target_modules=["embed_tokens", "q_proj"], use_dora=True
    ),
    "bias": lambda folder: causal(folder, "gpt2", target_modules=["c_attn"], bias="all"),
    "fan_in_fan_out": lambda folder: causal(
        folder, "gpt2", target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True
    ),
    "fan_in_fan_out, DoRA": lambda folder: causal(
        folder, "gpt2", target_modules=["c_attn", "c_fc"], fan_in_fan_out=True, use_dora=True
    ),
    "some layers": lambda folder: causal(folder, "llama", target_modules=LINEAR, layers_to_transform=[1]),
    "convolutions": convolutions,
    "convolutions, DoRA": lambda folder: convolutions(folder, use_dora=True),
}  # fmt: skip


def fold(folder: Path, adapted: Adapted, **top: Any) -> dict[str, Tensor]:
    """base+adapter as one model, written."""
    recipe = write_recipe(folder / "fold.yaml", "passthrough", [f"{adapted.base}+{adapted.adapter}"], **top)
    streammerge.merge(recipe, folder / "out", compile="off", threads=1)
    return load_file(folder / "out" / "model.safetensors")


@pytest.mark.parametrize("case", CASES)
def test_a_folded_model_is_what_peft_makes_of_it_to_one_rounding(tmp_path: Path, case: str) -> None:
    adapted = CASES[case](tmp_path)
    before = load_file(adapted.base / "model.safetensors")
    after = fold(tmp_path, adapted)
    assert set(after) == set(before)
    changed = 0
    for name, ours in after.items():
        theirs = adapted.merged[name] if name in adapted.merged else adapted.merged[f"transformer.{name}"]
        assert ours.dtype == before[name].dtype
        # PEFT folds in float64 here, so what is left is our one rounding, and its own to float64.
        step = torch.finfo(ours.dtype).eps / 2
        assert ((ours.double() - theirs).abs() <= theirs.abs() * step * 1.0001 + 1e-15).all(), name
        changed += not torch.equal(ours, before[name])
    assert changed


def test_an_adapter_may_be_pickled(tmp_path: Path) -> None:
    adapted = CASES["plain"](tmp_path)
    expected = fold(tmp_path, adapted)
    weights = adapted.adapter / "adapter_model.safetensors"
    torch.save(load_file(weights), adapted.adapter / "adapter_model.bin")
    weights.unlink()
    shutil.rmtree(tmp_path / "out")
    found = fold(tmp_path, adapted)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_directory_may_hold_a_model_and_an_adapter(tmp_path: Path) -> None:
    adapted = CASES["plain"](tmp_path)
    expected = fold(tmp_path, adapted)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(adapted.adapter / file, adapted.base / file)
    shutil.rmtree(tmp_path / "out")
    found = fold(tmp_path, Adapted(adapted.base, adapted.base, {}))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_an_adapter_that_resizes_the_vocabulary_is_true_to_config(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base")
    rows, width = load_file(base / "model.safetensors")["lm_head.weight"].shape
    lora = write_adapter(tmp_path / "lora", {"model.layers.0.self_attn.q_proj.weight": (32, 32)})
    weights = load_file(lora / "adapter_model.safetensors")
    for name in ("model.embed_tokens", "lm_head"):
        weights[f"base_model.model.{name}.weight"] = torch.randn(rows + 2, width)
    save_file(weights, lora / "adapter_model.safetensors")
    fold(tmp_path, Adapted(base, lora, {}))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert torch.equal(model.lm_head.weight, weights["base_model.model.lm_head.weight"])


# --- in merges -------------------------------------------------------------------------------------------------------

# Around the edges of blocks: rows that divide them, rows that do not, rows wider than one, a column.
SHAPES: dict[str, tuple[int, ...]] = {
    "even.weight": (640, 256),
    "odd.weight": (333, 517),
    "wide.weight": (3, 70_001),
    "column.weight": (70_000, 1),
    "small.weight": (3, 5),
    "untouched.weight": (100, 7),
    "saved.weight": (50, 11),
}


def write_adapter(path: Path, shapes: dict[str, tuple[int, ...]], *, seed: int = 0, rank: int = 3, saved: str = "",
                  norms: bool = False, across: bool = False, **config: Any) -> Path:  # fmt: skip
    """An adapter made by hand, for modules named like the tensors of `shapes`."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, (rows, columns) in shapes.items():
        module = f"base_model.model.{name.removesuffix('.weight')}"
        if name == saved:
            tensors[f"{module}.weight"] = torch.randn(rows, columns, generator=generator) * 0.02
            continue
        outputs, inputs = (columns, rows) if across else (rows, columns)
        tensors[f"{module}.lora_A.weight"] = torch.randn(rank, inputs, generator=generator) * 0.03
        tensors[f"{module}.lora_B.weight"] = torch.randn(outputs, rank, generator=generator) * 0.03
        if norms:
            tensors[f"{module}.lora_magnitude_vector"] = torch.rand(outputs, generator=generator) + 0.5
    path.mkdir(parents=True)
    save_file(tensors, path / "adapter_model.safetensors")
    content = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "use_dora": norms, "fan_in_fan_out": across}
    (path / "adapter_config.json").write_text(json.dumps({**content, **config}))
    return path


@dataclass(frozen=True)
class Pair:
    """A base, two adapters, and what the two models are when they are written in float32."""

    base: Path
    references: tuple[str, str]
    written: tuple[Path, Path]


@pytest.fixture(scope="module", params=["LoRA", "DoRA", "DoRA, transposed"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tmp_path_factory.mktemp("pair")
    base = save_model(folder / "base", make_tensors(0, shapes=SHAPES))
    changed = {name: shape for name, shape in SHAPES.items() if name != "untouched.weight"}
    kinds = {"norms": request.param != "LoRA", "across": "transposed" in request.param, "saved": "saved.weight"}
    references, written = [], []
    for seed in (1, 2):
        adapter = write_adapter(folder / f"adapter{seed}", changed, seed=seed, **kinds)
        references.append(f"{base}+{adapter}")
        recipe = write_recipe(folder / "w.yaml", "passthrough", references[-1:], dtype="float32")
        streammerge.merge(recipe, folder / f"written{seed}", compile="off")
        written.append(folder / f"written{seed}")
    return Pair(base, (references[0], references[1]), (written[0], written[1]))


@pytest.mark.parametrize("label", FORMS)
def test_every_method_merges_folded_models_as_if_they_were_written_in_float32(
    pair: Pair, tmp_path: Path, label: str
) -> None:
    method = FORMS[label]
    parameters = {name: value for name, value in usual(method).items() if not isinstance(value, tuple)}
    each = {name: value[0] for name, value in usual(method).items() if isinstance(value, tuple)}
    count = model_count(method)
    outs = []
    for number, models in enumerate((pair.references, pair.written)):
        recipe = write_recipe(
            tmp_path / f"{number}.yaml", method.name, list(map(str, models[:count])), per_model=each,
            base=str(pair.base) if method.base == "required" else None, dtype="bfloat16", parameters=parameters,
        )  # fmt: skip
        streammerge.merge(recipe, tmp_path / f"out{number}", compile="off", threads=2)
        outs.append((tmp_path / f"out{number}" / "model.safetensors").read_bytes())
    assert outs[0] == outs[1]


def test_tiles_threads_and_budgets_leave_the_bytes_as_they_are(pair: Pair, tmp_path: Path,
                                                               monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    recipe = write_recipe(tmp_path / "r.yaml", "ties", pair.references, base=pair.base, dtype="bfloat16",
                          per_model={"density": 0.4, "weight": 0.7})  # fmt: skip
    found = set()
    for tile_blocks, threads, compiled in ((1, 1, "off"), (2, 2, "off"), (64, 1, "off"), (3, 2, "on")):
        monkeypatch.setattr("streammerge.plan.budget._TILE_BLOCKS", tile_blocks)
        out = tmp_path / f"{tile_blocks}-{threads}-{compiled}"
        streammerge.merge(recipe, out, compile=compiled, threads=threads)
        found.add((out / "model.safetensors").read_bytes())
    assert len(found) == 1


def test_the_base_of_several_adapters_is_read_once(pair: Pair, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "r.yaml", "task_arithmetic", pair.references, base=pair.base,
                          per_model={"weight": 0.5})  # fmt: skip
    plan = streammerge.make_plan(recipe)
    assert len(plan.checkpoints) == 3
    reads = {tensor.name: [read.checkpoint for read in tensor.reads] for tensor in plan.tensors}
    assert reads.pop("saved.weight") == [0, 1, 2]
    assert set(map(tuple, reads.values())) == {(0,)}
    report = streammerge.merge(recipe, tmp_path / "out", compile="off")
    files = [checkpoint.file_path(0).stat().st_size for checkpoint in plan.checkpoints]
    assert report.read_bytes <= 2 * sum(files)


def test_a_stage_is_rounded_as_if_it_were_written(pair: Pair, tmp_path: Path) -> None:
    first = write_recipe(tmp_path / "1.yaml", "passthrough", [pair.references[0]], dtype="bfloat16")
    streammerge.merge(first, tmp_path / "first", compile="off")
    second = write_recipe(tmp_path / "2.yaml", "linear", [tmp_path / "first", pair.base], per_model={"weight": 0.3})
    streammerge.merge(second, tmp_path / "apart", compile="off")
    named = {**yaml.safe_load(first.read_text()), "name": "first"}
    content = yaml.safe_load(second.read_text())
    content["models"][0]["model"] = "first"
    together = tmp_path / "t.yaml"
    together.write_text(yaml.safe_dump_all([named, content]))
    streammerge.merge(together, tmp_path / "together", compile="off")
    assert (
        load_file(tmp_path / "apart" / "model.safetensors").keys()
        == load_file(tmp_path / "together" / "model.safetensors").keys()
    )
    for name, tensor in load_file(tmp_path / "apart" / "model.safetensors").items():
        assert torch.equal(tensor, load_file(tmp_path / "together" / "model.safetensors")[name]), name


def test_the_mapping_form_and_paths_with_plus_and_at(pair: Pair, tmp_path: Path) -> None:
    base, adapter = pair.references[0].split("+")
    odd = tmp_path / "a+b@c"
    shutil.copytree(base, odd / "base")
    shutil.copytree(adapter, odd / "lora")
    expected = None
    for model in (f"{odd}/base+{odd}/lora", {"model": {"path": f"{odd}/base"}, "lora": {"path": f"{odd}/lora"}},
                  {"model": f"{odd}/base", "lora": f"{odd}/lora"}):  # fmt: skip
        recipe = tmp_path / "r.yaml"
        recipe.write_text(json.dumps({"merge_method": "passthrough", "models": [{"model": model}]}))
        streammerge.merge(recipe, tmp_path / "out", compile="off", restart=True)
        content = (tmp_path / "out" / "model.safetensors").read_bytes()
        assert expected in (None, content)
        expected = content
        shutil.rmtree(tmp_path / "out")


def test_the_manifest_names_adapters_and_a_change_of_one_is_another_plan(pair: Pair, tmp_path: Path) -> None:
    base, adapter = pair.references[0].split("+")
    shutil.copytree(adapter, tmp_path / "lora")
    recipe = write_recipe(tmp_path / "r.yaml", "passthrough", [f"{base}+{tmp_path / 'lora'}"])
    before = streammerge.make_plan(recipe)
    streammerge.merge(recipe, tmp_path / "out", compile="off")
    (facts,) = json.loads((tmp_path / "out" / "streammerge.manifest.json").read_text())["inputs"]
    assert list(facts["adapter"]) == ["adapter_model.safetensors"]
    config = tmp_path / "lora" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "lora_alpha": 7}))
    assert streammerge.make_plan(recipe).digest != before.digest


# --- what does not fit -----------------------------------------------------------------------------------------------


@dataclass
class Broken:
    """An adapter that is taken apart: change `config` and `tensors`, then `refusal`."""

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]

    def refusal(self, kind: type[StreamMergeError] = UserError) -> str:
        shutil.rmtree(self.folder / "lora", ignore_errors=True)
        (self.folder / "lora").mkdir()
        (self.folder / "lora" / "adapter_config.json").write_text(json.dumps(self.config))
        if self.tensors:
            save_file(self.tensors, self.folder / "lora" / "adapter_model.safetensors")
        recipe = write_recipe(self.folder / "r.yaml", "passthrough", [f"{self.folder / 'base'}+{self.folder / 'lora'}"])
        with pytest.raises(kind) as caught:
            streammerge.merge(recipe, self.folder / "out")
        assert not (self.folder / "out").exists()
        return str(caught.value)


@pytest.fixture
def broken(tmp_path: Path) -> Broken:
    shapes = {name: SHAPES[name] for name in ("even.weight", "odd.weight")}
    save_model(tmp_path / "base", make_tensors(0, shapes=shapes))
    made = write_adapter(tmp_path / "made", shapes)
    config = json.loads((made / "adapter_config.json").read_text())
    return Broken(tmp_path, config, load_file(made / "adapter_model.safetensors"))


def test_a_key_that_matches_no_tensor_is_an_error_and_all_are_named(broken: Broken) -> None:
    broken.config["base_model_name_or_path"] = "meta/other"
    for name in ("q_proj", "k_proj"):
        broken.tensors[f"base_model.model.layers.0.{name}.lora_A.weight"] = torch.zeros(3, 4)
        broken.tensors[f"base_model.model.layers.0.{name}.lora_B.weight"] = torch.zeros(4, 3)
    text = broken.refusal()
    assert "layers.0.q_proj: the base has no such module" in text
    assert "layers.0.k_proj: the base has no such module" in text
    assert "It says that it was trained on 'meta/other'" in text


def test_an_adapter_for_another_width_is_an_error(broken: Broken) -> None:
    broken.tensors["base_model.model.even.lora_A.weight"] = torch.zeros(3, 255)
    assert "even: its change is [640, 255], the base's tensor is [640, 256]" in broken.refusal()


def test_a_rank_that_does_not_fit_is_an_error(broken: Broken) -> None:
    broken.config["r"] = 8
    assert "even: has rank 3, its configuration says 8" in broken.refusal()
    broken.config["r"] = 3
    broken.tensors["base_model.model.even.lora_B.weight"] = torch.zeros(640, 4)
    assert "A is [3, 256] and B is [640, 4], which do not multiply" in broken.refusal()


def test_half_an_adapter_is_an_error(broken: Broken) -> None:
    del broken.tensors["base_model.model.odd.lora_B.weight"]
    assert "odd: has lora_A only, where A and B belong together" in broken.refusal()


def test_a_saved_tensor_that_the_base_does_not_have_is_an_error(broken: Broken) -> None:
    broken.tensors["base_model.model.score.modules_to_save.weight"] = torch.zeros(3)
    assert "score.modules_to_save.weight is of no tensor of the base" in broken.refusal()


def test_a_saved_tensor_of_another_shape_is_an_error(broken: Broken) -> None:
    # Only tables of tokens may be longer.
    broken.tensors["base_model.model.even.modules_to_save.weight"] = torch.zeros(641, 256)
    assert "is [641, 256], the base's tensor is [640, 256]" in broken.refusal()


def test_an_adapter_named_as_a_model_is_told_of(tmp_path: Path) -> None:
    adapters = [write_adapter(tmp_path / f"lora{seed}", {"a.weight": (8, 8)}, seed=seed) for seed in range(2)]
    recipe = write_recipe(tmp_path / "r.yaml", "linear", adapters, parameters={"weight": 1})
    first, _ = make_plan(recipe, Options()).warnings
    assert "is an adapter, and its matrices are merged as they are" in first


@pytest.mark.parametrize("pattern", ["(a+)+b", ".*.*.*.*x", "(", "(a|aa)*b", "a?" * 30])
def test_a_pattern_that_could_take_for_ever_is_an_error(broken: Broken, pattern: str) -> None:
    broken.config["rank_pattern"] = {pattern: 4}
    assert "the pattern" in broken.refusal()


def test_a_pattern_that_python_wonders_about_is_no_warning(tmp_path: Path) -> None:
    shapes = {"w.weight": (6, 4)}
    base = save_model(tmp_path / "base", make_tensors(0, shapes=shapes))
    lora = write_adapter(tmp_path / "lora", shapes, alpha_pattern={"[[q]": 8.5})
    recipe = write_recipe(tmp_path / "r.yaml", "passthrough", [f"{base}+{lora}"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        streammerge.make_plan(recipe)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"peft_type": "IA3"}, "is a IA3 adapter"),
        ({"peft_type": None}, "is a None adapter"),
        ({"target_parameters": ["experts"]}, "sets target_parameters, which cannot be folded in"),
        ({"trainable_token_indices": [1]}, "sets trainable_token_indices"),
        ({"init_lora_weights": "pissa_niter_4"}, "was trained from a base that pissa_niter_4 had changed"),
        ({"use_dora": True}, "lacks its magnitude"),
        ({"lora_alpha": "many"}, "lora_alpha is 'many', not a number that can be used"),
        ({"lora_alpha": 10**400}, "lora_alpha is a very large integer"),
        ({"lora_alpha": math.nan}, "lora_alpha is nan"),
        ({"r": None}, "r is None, not a number that can be used"),
        ({"rank_pattern": [4]}, "rank_pattern is not a map"),
    ],
)
def test_a_configuration_that_cannot_be_followed_is_an_error(
    broken: Broken, change: dict[str, Any], expected: str
) -> None:
    broken.config |= change
    assert expected in broken.refusal()


def test_what_is_no_adapter_is_an_input_error(broken: Broken, tmp_path: Path) -> None:
    broken.tensors = {}
    assert "holds none of adapter_model.safetensors and adapter_model.bin" in broken.refusal(InputError)
    for content in ("[]", "{", "[" * 5000):
        (tmp_path / "lora" / "adapter_config.json").write_text(content)
        recipe = tmp_path / "r.yaml"
        with pytest.raises(InputError, match="adapter_config"):
            streammerge.merge(recipe, tmp_path / "out")
    (tmp_path / "lora" / "adapter_config.json").unlink()
    with pytest.raises(InputError, match=r"Is .* a PEFT adapter"):
        streammerge.merge(recipe, tmp_path / "out")


@pytest.mark.parametrize(
    ("model", "expected"),
    [("+x", "nothing before"), ("x+", "nothing after"), ("a+b+c", "several adapters"), ("a@b@c", "a single `@`")],
)
def test_a_reference_that_names_nothing_is_an_error_of_the_recipe(tmp_path: Path, model: str, expected: str) -> None:
    recipe = write_recipe(tmp_path / "r.yaml", "passthrough", [model])
    with pytest.raises(UserError, match=expected):
        streammerge.make_plan(recipe)


def test_all_missing_models_and_adapters_are_named(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "r.yaml", "linear", ["nowhere+noadapter", "neither"], per_model={"weight": 1})
    with pytest.raises(InputError) as caught:
        streammerge.make_plan(recipe)
    assert "'noadapter'" in str(caught.value)
    assert "'neither'" in str(caught.value)
