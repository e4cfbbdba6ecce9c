"""Weights in 8 bits with scales: merged as the numbers they stand for, and stored so again."""

from __future__ import annotations

import json
import random
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from operator import ne
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import streammerge
from streammerge.base.errors import RecipeError, UserError, VerificationFailed
from streammerge.kernels.scaling import Grid
from streammerge.plan.scaled import Scaled, Scaling
from streammerge.run.arena import Arena
from streammerge.run.difference import compare
from streammerge.run.health import check_health
from streammerge.run.scaling import Scaler, read_scaled
from streammerge.storage.source import Source
from tests.models import make_models, make_tensors, read_tensors, save_model, write_recipe
from tests.run.test_adapters import write_adapter
from tests.run.unfinished import before_the_side_files
from tests.scales import FORMS, Form, numbers, quantise, save_scaled, spread

# Blocks that are whole and that are not, several blocks of 65,536 elements, and a row of one block.
WEIGHTS = {
    "model.layers.0.mlp.up_proj.weight": (300, 520),
    "model.layers.0.self_attn.q_proj.weight": (128, 256),
    "model.layers.1.mlp.up_proj.weight": (1100, 300),
    "model.layers.1.self_attn.q_proj.weight": (1, 130),
}
REST = {"model.embed_tokens.weight": (60, 520), "model.layers.0.input_layernorm.weight": (520,)}
UP = "model.layers.0.mlp.up_proj.weight"


def make_family(folder: Path, form: Form, shapes: dict[str, tuple[int, ...]] = WEIGHTS,
                **options: Any) -> tuple[list[Path], list[dict[str, Tensor]]]:  # fmt: skip
    """A base and two models in 8 bits: their directories, and what is stored."""
    paths, stored = [], []
    for seed in range(3):
        weights = make_tensors(seed, shapes=shapes, dtype=torch.float32)
        paths.append(folder / f"m{seed}")
        stored.append(save_scaled(paths[-1], weights, form, more=make_tensors(seed, shapes=REST), **options))
    return paths, stored


def task_arithmetic(folder: Path, models: list[Path], **top: Any) -> Path:
    base, *others = models
    return write_recipe(folder / "recipe.yaml", "task_arithmetic", others, base=base, per_model={"weight": 0.4}, **top)


def merged_in_float64(stored: list[dict[str, Tensor]], name: str, form: Form) -> Tensor:
    base, a, b = (numbers(each[name], each[name + form.suffix], form) for each in stored)
    return base + 0.4 * (a - base) + 0.4 * (b - base)


def merge(recipe: Path, out: Path, **options: Any) -> dict[str, Tensor]:
    streammerge.merge(recipe, out, **{"compile": "off", "threads": 1, **options})
    return {name: tensor for file in sorted(out.glob("*.safetensors")) for name, tensor in load_file(file).items()}


# Numbers.


@pytest.mark.parametrize("kind", FORMS)
def test_a_merge_of_codes_is_the_merge_of_what_they_stand_for(tmp_path: Path, kind: str) -> None:
    form = FORMS[kind]
    models, stored = make_family(tmp_path, form)
    merged = merge(task_arithmetic(tmp_path, models), tmp_path / "out")
    assert set(merged) == {*WEIGHTS, *REST}
    for name in WEIGHTS:
        expected = merged_in_float64(stored, name, form)
        assert merged[name].dtype == torch.bfloat16
        # One rounding to bfloat16, and float32's before it.
        assert ((merged[name].double() - expected).abs() <= expected.abs() * 2**-8 * 1.001 + 1e-8).all()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize("kind", FORMS)
def test_a_result_in_eight_bits_is_one_rounding_with_fresh_scales(tmp_path: Path, kind: str) -> None:
    form = FORMS[kind]
    models, stored = make_family(tmp_path, form)
    dtype = str(form.codes).removeprefix("torch.")
    merged = merge(task_arithmetic(tmp_path, models, out_dtype=dtype), tmp_path / "out")
    assert set(merged) == set(stored[0])
    for name, shape in WEIGHTS.items():
        codes, scales = merged[name], merged[name + form.suffix]
        assert (codes.dtype, scales.dtype) == (form.codes, form.dtype)
        assert scales.shape == stored[0][name + form.suffix].shape
        expected = merged_in_float64(stored, name, form)
        wanted = quantise(expected, form)[1].reshape(scales.shape).double()
        # What is largest in a block differs by float32's rounding, and then the scale's.
        assert ((scales.double() - wanted).abs() <= wanted * (2**-8 if form.dtype == torch.bfloat16 else 2**-22)).all()
        quotients = expected / spread(scales, shape, form)
        mantissa = 3 if form.codes == torch.float8_e4m3fn else 2
        least = torch.finfo(form.codes).tiny * 2**-mantissa
        half = torch.maximum(torch.exp2(torch.floor(torch.log2(quotients.abs())) - mantissa - 1),
                             torch.tensor(least / 2, dtype=torch.float64))  # fmt: skip
        # And what float32 loses before it, of numbers as large as the largest.
        before = 2**-22 * expected.abs().max() / spread(scales, shape, form)
        assert ((codes.double() - quotients).abs() <= half + before).all()
    assert merged["model.embed_tokens.weight"].dtype == torch.bfloat16
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "fp8"
    assert config["torch_dtype"] == "bfloat16"


def test_experts_in_one_tensor_have_scales_of_their_own(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.experts.down_proj"
    for form in (Form((128, 128)), Form((0, 0)), Form((64, 32))):
        folder = tmp_path / f"{form.block}"
        told = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [64, 32]}}
        models, stored = make_family(folder, form, {name: (3, 200, 160)}, config=told if form.block == (64, 32) else {})
        if form.block == (0, 0):
            # One for each expert.
            assert stored[0][name + "_scale_inv"].shape == (3,)
        for dtype in ("bfloat16", "float8_e4m3fn"):
            merged = merge(task_arithmetic(folder, models, out_dtype=dtype), folder / dtype)
            expected = merged_in_float64(stored, name, form)
            values = merged[name].double() if dtype == "bfloat16" else numbers(
                merged[name], merged[name + "_scale_inv"], form
            )  # fmt: skip
            assert ((values - expected).abs() <= expected.abs() * 2**-4 + 0.1 * 2**-9).all()


def test_models_in_eight_bits_and_in_more_are_merged_with_each_other(tmp_path: Path) -> None:
    form = FORMS["blocks"]
    models, stored = make_family(tmp_path, form)
    base = save_model(tmp_path / "base", make_tensors(7, shapes={**WEIGHTS, **REST}))
    recipe = task_arithmetic(tmp_path, [base, *models[1:]])
    own = load_file(base / "model.safetensors")[UP].double()
    a, b = (numbers(each[UP], each[UP + "_scale_inv"], form) for each in stored[1:])
    expected = own + 0.4 * (a - own) + 0.4 * (b - own)
    assert ((merge(recipe, tmp_path / "out")[UP].double() - expected).abs() <= expected.abs() * 2**-8 + 1e-8).all()
    # In 8 bits are then those that are so in an input, and config.json says how.
    recipe = task_arithmetic(tmp_path, [base, *models[1:]], out_dtype="float8_e4m3fn")
    merged = merge(recipe, tmp_path / "small")
    assert set(merged) == set(stored[0])
    config = json.loads((tmp_path / "small" / "config.json").read_text())
    assert config["quantization_config"]["weight_block_size"] == [128, 128]
    # What was measured of activations is not known of this model.
    assert config["quantization_config"]["activation_scheme"] == "dynamic"


def test_what_is_not_finite_is_so_in_eight_bits_and_counted(tmp_path: Path) -> None:
    values = make_tensors(0, shapes={UP: (128, 256)}, dtype=torch.float32)[UP]
    values[3, 5], values[100, 200] = torch.inf, torch.nan
    path = save_model(tmp_path / "m", {UP: values})
    recipe = write_recipe(tmp_path / "r.yaml", "passthrough", [path], out_dtype="float8_e4m3fn")
    report = streammerge.merge(recipe, tmp_path / "out", compile="off")
    assert report.nonfinite == {UP: (2, 2)}
    merged = load_file(tmp_path / "out" / "model.safetensors")
    codes = merged[UP].float()
    assert codes.isnan().nonzero().tolist() == [[3, 5], [100, 200]]
    # They do not spoil the others of their block.
    values[3, 5] = values[100, 200] = 0
    assert torch.equal(merged[UP + "_scale_inv"], quantise(values, FORMS["blocks"])[1])


def test_a_code_is_rounded_once(tmp_path: Path) -> None:
    """Numbers so near the middle between two codes that a quotient in float32 lies on it."""
    generator = torch.Generator().manual_seed(0)
    scale = 3.0000002
    middles = torch.arange(8, 16, dtype=torch.float64) * 2 + 1
    values = (middles[torch.randint(0, 8, (128, 256), generator=generator)] * scale).to(torch.float32)
    # As far from it as a float32 can be and still be divided onto it.
    values = (
        values.view(torch.int32) + torch.randint(-1, 2, values.shape, generator=generator, dtype=torch.int32)
    ).view(torch.float32)
    values[0, 0] = values[0, 128] = 448 * scale
    path = save_model(tmp_path / "m", {UP: values})
    recipe = write_recipe(tmp_path / "r.yaml", "passthrough", [path], out_dtype="float8_e4m3fn")
    merged = merge(recipe, tmp_path / "out")
    quotients = values.double() / spread(merged[UP + "_scale_inv"], (128, 256), FORMS["blocks"])
    codes = merged[UP].double()
    for neighbour in (merged[UP].view(torch.uint8) + 1, merged[UP].view(torch.uint8) - 1):
        other = neighbour.view(torch.float8_e4m3fn).double()
        assert ((codes - quotients).abs() <= (other - quotients).abs().nan_to_num(torch.inf)).all()
    assert (quotients.float() != quotients).any()


# The same bytes.


@pytest.mark.parametrize("kind", ["blocks", "one", "rows"])
def test_tiles_and_threads_do_not_change_a_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    models, _ = make_family(tmp_path, FORMS[kind])
    recipe = write_recipe(tmp_path / "r.yaml", "ties", models[1:], base=models[0], out_dtype="float8_e4m3fn",
                          per_model={"weight": 0.5, "density": 0.3})  # fmt: skip
    found = []
    for tile_blocks, threads, memory in ((1, 1, "4GB"), (2, 2, None), (64, 2, None)):
        monkeypatch.setattr("streammerge.plan.budget._TILE_BLOCKS", tile_blocks)
        out = tmp_path / str(tile_blocks)
        merge(recipe, out, threads=threads, max_memory=memory)
        found.append(read_tensors(out))
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("block", [(128, 128), (96, 128), (1, 700), (500, 700)])
def test_any_cut_gives_the_codes_of_the_whole(block: tuple[int, int]) -> None:
    grid = Grid(500, 700, block)
    blocks = (-(-500 // block[0]), -(-700 // block[1]))
    scaling = Scaling("F8_E4M3", grid, "s", "F32", (2, *blocks))
    arena = Arena(1, 5 * 11 * 65536, 0, touch=False)
    area, codes = arena.areas(0, ("F32", "F8_E4M3"), 11)
    elements = 2 * 500 * 700
    values = torch.randn(elements, generator=torch.Generator().manual_seed(0))
    area.tensor.view(-1)[:elements] = values
    pool = ThreadPoolExecutor(2)
    scaler = Scaler(scaling, elements, pool)
    # Looking may be done in any pieces.
    for start in range(0, elements, 77_777):
        part = arena.areas(0, ("F32", "F8_E4M3"), 11)[0]
        piece = values[start : start + 77_777].clone()
        part.tensor.view(-1)[: len(piece)] = piece
        scaler.look(part, start, len(piece))
    area.tensor.view(-1)[:elements] = values
    scaler.store(area, codes, 0, elements)
    pool.shutdown()
    form = Form(block)
    expected, scales = quantise(values.view(2, 500, 700), form)
    assert torch.equal(codes.tensor.view(-1)[:elements].view(torch.uint8), expected.reshape(-1).view(torch.uint8))
    assert torch.equal(torch.frombuffer(bytearray(scaler.stored()), dtype=torch.float32), scales.reshape(-1))


@pytest.mark.parametrize("kind", FORMS)
def test_any_range_is_read_as_of_the_whole(tmp_path: Path, kind: str) -> None:
    form = FORMS[kind]
    stored = save_scaled(tmp_path / "m", make_tensors(0, shapes={UP: (300, 520)}, dtype=torch.float32), form)
    plan = streammerge.make_plan(write_recipe(tmp_path / "r.yaml", "passthrough", [tmp_path / "m"]))
    (tensor,) = plan.tensors
    (read,) = tensor.reads
    assert isinstance(read, Scaled)
    codes, scales = stored[UP], spread(stored[UP + form.suffix], (300, 520), form)
    expected = (codes.float() * scales.float()).view(-1)
    source = Source(plan.checkpoints[0])
    area = Arena(1, 4 * 3 * 65536, 0, touch=False).areas(0, ("F32",), 3)[0]
    chance = random.Random(0)
    for _ in range(200):
        start = chance.randrange(300 * 520)
        count, at = (
            chance.randrange(1, min(300 * 520 - start, 1 << chance.randrange(1, 18)) + 1),
            chance.randrange(9999),
        )
        read_scaled([source], read, area, start, count, at, keep_cached=True)
        assert torch.equal(area.tensor.view(-1)[at : at + count], expected[start : start + count])
    source.close()


@pytest.mark.parametrize("method", ["linear", "ties", "della"])
def test_long_rows_and_many_tiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    """Tiles that begin within a row, looks at spans, and ranks in rows."""
    monkeypatch.setattr("streammerge.plan.budget._TILE_BLOCKS", 1)
    shapes = {UP: (700, 1300)}
    models, stored = make_family(tmp_path, FORMS["blocks"], shapes)
    wide = []
    for seed, own in enumerate(stored):
        scales = spread(own[UP + "_scale_inv"], shapes[UP], FORMS["blocks"]).float()
        wide.append(
            save_model(tmp_path / f"w{seed}", {UP: own[UP].float() * scales, **make_tensors(seed, shapes=REST)})
        )
    found = []
    for number, (base, *others) in enumerate((models, wide)):
        recipe = write_recipe(
            tmp_path / f"{number}.yaml", method, others, **({} if method == "linear" else {"base": base}),
            per_model={"weight": 0.5, **({} if method == "linear" else {"density": 0.4})}, dtype="float32",
        )  # fmt: skip
        merge(recipe, tmp_path / f"out{number}")
        found.append(read_tensors(tmp_path / f"out{number}"))
    # What codes stand for, written down as float32, is merged to the same bits.
    assert found[0] == found[1]


def test_a_merge_that_lost_the_scales_makes_them_again(tmp_path: Path) -> None:
    models, stored = make_family(tmp_path, FORMS["blocks"])
    recipe = task_arithmetic(tmp_path, models, out_dtype="float8_e4m3fn")
    merge(recipe, tmp_path / "out")
    whole = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    for lost in (UP, UP + "_scale_inv"):
        before_the_side_files(tmp_path / "out", streammerge.make_plan(recipe), keeps=partial(ne, lost))
        report = streammerge.merge(recipe, tmp_path / "out", compile="off")
        assert report.resumed == report.tensors - 1
        assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == whole
    assert len(stored[0]) == len(json.loads(whole["streammerge.manifest.json"])["tensors"])


def test_scales_lie_in_the_shard_of_their_weight_and_workers_make_the_same_bytes(tmp_path: Path) -> None:
    models, _ = make_family(tmp_path, FORMS["blocks"])
    recipe = task_arithmetic(tmp_path, models, out_dtype="float8_e4m3fn")
    merge(recipe, tmp_path / "one", out_shard_size=50_000)
    shards = sorted((tmp_path / "one").glob("*.safetensors"))
    assert len(shards) >= 3
    for shard in shards:
        with safe_open(shard, "pt") as file:
            names = set(file.keys())
        assert {name + "_scale_inv" for name in names & set(WEIGHTS)} <= names
    with ThreadPoolExecutor(2) as executor:
        streammerge.merge(recipe, tmp_path / "many", compile="off", threads=1, out_shard_size=50_000, executor=executor)
    for path in (tmp_path / "one").iterdir():
        assert (tmp_path / "many" / path.name).read_bytes() == path.read_bytes()
    assert not streammerge.verify(tmp_path / "many").problems


def test_a_flipped_bit_in_a_scale_is_found(tmp_path: Path) -> None:
    models, _ = make_family(tmp_path, FORMS["blocks"])
    merge(task_arithmetic(tmp_path, models, out_dtype="float8_e4m3fn"), tmp_path / "out")
    path = tmp_path / "out" / "model.safetensors"
    content = bytearray(path.read_bytes())
    # Scales, being wider, come first.
    content[8 + int.from_bytes(content[:8], "little")] ^= 1
    path.write_bytes(content)
    (problem,) = streammerge.verify(tmp_path / "out").problems
    assert "_scale_inv" in problem
    assert VerificationFailed.exit_code == 5


# As they stand.


def test_what_is_copied_keeps_its_codes_and_scales(tmp_path: Path) -> None:
    models, stored = make_family(tmp_path, FORMS["blocks"])
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"merge_method: passthrough\nout_dtype: float8_e4m3fn\nslices:\n"
        f"- sources: [{{model: {models[0]}, layer_range: [0, 1]}}]\n"
        f"- sources: [{{model: {models[1]}, layer_range: [0, 1]}}]\n"
    )
    merged = merge(recipe, tmp_path / "out")
    for layer, own in ((0, stored[0]), (1, stored[1])):
        for name in (UP, UP + "_scale_inv"):
            mine = merged[name.replace("layers.0", f"layers.{layer}")]
            assert torch.equal(mine.view(torch.uint8), own[name].view(torch.uint8))


def test_an_adapter_is_folded_into_weights_in_eight_bits(tmp_path: Path) -> None:
    models, stored = make_family(tmp_path, FORMS["blocks"])
    adapter = write_adapter(tmp_path / "lora", {UP: WEIGHTS[UP]})
    recipe = write_recipe(tmp_path / "r.yaml", "passthrough", [f"{models[0]}+{adapter}"])
    merged = merge(recipe, tmp_path / "out")
    factors = load_file(adapter / "adapter_model.safetensors")
    left, right = (factors[f"base_model.model.{UP.removesuffix('weight')}{part}.weight"].double()
                   for part in ("lora_B", "lora_A"))  # fmt: skip
    expected = numbers(stored[0][UP], stored[0][UP + "_scale_inv"], FORMS["blocks"]) + 2 * left @ right
    assert ((merged[UP].double() - expected).abs() <= expected.abs() * 2**-8 * 1.001 + 1e-8).all()


def test_comparing_sees_what_codes_stand_for(tmp_path: Path) -> None:
    models, stored = make_family(tmp_path, FORMS["blocks"])
    wide = {name: numbers(stored[0][name], stored[0][name + "_scale_inv"], FORMS["blocks"]).float() for name in WEIGHTS}
    same = save_model(tmp_path / "wide", wide | make_tensors(0, shapes=REST))
    found = compare(str(models[0]), str(same), None, note=print, progress=lambda done, total: None)
    assert set(found.tensors) == {*WEIGHTS, *REST}
    assert all(distance.relative is not None and distance.relative < 1e-7 for distance in found.tensors.values())


# A model that has no scales.


def test_matrices_in_layers_get_scales_and_transformers_reads_them(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(
        hidden_size=256, intermediate_size=384, num_hidden_layers=2, num_attention_heads=4, vocab_size=200
    )
    models = []
    for seed in range(2):
        torch.manual_seed(seed)
        models.append(tmp_path / f"m{seed}")
        transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(models[-1])
    small = write_recipe(tmp_path / "r.yaml", "linear", models, per_model={"weight": 1}, out_dtype="float8_e4m3fn")
    merged = merge(small, tmp_path / "small")
    coded = {name for name, tensor in merged.items() if tensor.dtype == torch.float8_e4m3fn}
    assert coded == {name for name in merged if "_proj.weight" in name and not name.endswith("_scale_inv")}
    wide = write_recipe(tmp_path / "w.yaml", "passthrough", [tmp_path / "small"])
    merge(wide, tmp_path / "wide")
    tokens = torch.arange(20)[None]
    logits = []
    for path in (tmp_path / "small", tmp_path / "wide"):
        loaded, info = transformers.AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
        assert not any(info.values())
        with torch.no_grad():
            logits.append(loaded.to(torch.float32)(tokens).logits)
    assert torch.equal(*logits)


# One form in an output, and a configuration that is true.

LAYERS = {f"model.layers.{i}.mlp.{part}_proj.weight": (256, 128) for i in range(2) for part in ("up", "gate")}
TOLD = {
    "blocks": {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]},
    "rows": {"quant_method": "compressed-tensors", "ignore": ["lm_head"]},
}


def save_form(path: Path, seed: int, kind: str | None) -> Path:
    """A model of two layers and a head: the layers' matrices in 8 bits, or all of it in bfloat16."""
    layers = make_tensors(seed, shapes=LAYERS, dtype=torch.float32)
    rest = make_tensors(seed, shapes={"lm_head.weight": (256, 128), "model.norm.weight": (128,)})
    config = {"num_hidden_layers": 2}
    if kind is None:
        save_model(path, {name: weight.bfloat16() for name, weight in layers.items()} | rest)
        (path / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], **config}))
    else:
        save_scaled(path, layers, FORMS[kind], config={**config, "quantization_config": TOLD[kind]}, more=rest)
    return path


def put_together(folder: Path, one: Path, two: Path, out_dtype: str = "float8_e4m3fn") -> Path:
    """The first model's two layers, then the first layer of the other."""
    slices = [{"sources": [{"model": str(one), "layer_range": [0, 2]}]},
              {"sources": [{"model": str(two), "layer_range": [0, 1]}]}]  # fmt: skip
    recipe = {"merge_method": "passthrough", "slices": slices, "out_dtype": out_dtype}
    path = folder / "together.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


@pytest.mark.parametrize("form", ["blocks", "rows"])
@pytest.mark.parametrize("other", [None, "blocks", "rows"])
def test_layers_that_are_put_together_are_stored_in_one_way(tmp_path: Path, form: str, other: str | None) -> None:
    one, two = save_form(tmp_path / "one", 1, form), save_form(tmp_path / "two", 2, other)
    first = {name: tensor.float() for name, tensor in merge(put_together(tmp_path, one, two, "float32"),
                                                            tmp_path / "wide").items()}  # fmt: skip
    found = merge(put_together(tmp_path, one, two), tmp_path / "out")
    for layer in range(3):
        for part in ("up", "gate"):
            name = f"model.layers.{layer}.mlp.{part}_proj.weight"
            scales = found[name + FORMS[form].suffix]
            assert found[name].dtype == torch.float8_e4m3fn
            # Half a step of the largest code, 448, is 16.
            error = (numbers(found[name], scales, FORMS[form]) - first[name].double()).abs().max()
            assert error <= 16.01 * scales.max()
    suffixes = {name.rpartition(".weight")[2] for name in found if "_scale" in name}
    assert suffixes == {FORMS[form].suffix}
    told = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert told == TOLD[form]


def test_what_stays_in_more_bits_beside_a_model_in_eight_is_named(tmp_path: Path) -> None:
    """A layer that a model in 8 bits itself leaves in more."""
    one = save_form(tmp_path / "one", 1, "blocks")
    partly = {}
    for layer in range(2):
        coded = {name: shape for name, shape in LAYERS.items() if f".{layer}." in name}
        more = {name: shape for name, shape in LAYERS.items() if name not in coded}
        told = TOLD["blocks"] | {"modules_to_not_convert": [f"model.layers.{1 - layer}.mlp"]}
        partly[layer] = tmp_path / f"partly{layer}"
        save_scaled(partly[layer], make_tensors(3, shapes=coded, dtype=torch.float32), FORMS["blocks"],
                    config={"num_hidden_layers": 2, "quantization_config": told},
                    more=make_tensors(3, shapes=more | {"lm_head.weight": (256, 128), "model.norm.weight": (128,)}),
                    )  # fmt: skip

    def named(recipe: Path, out: str) -> list[str] | None:
        merge(recipe, tmp_path / out)
        told = json.loads((tmp_path / out / "config.json").read_text())["quantization_config"]
        names: list[str] | None = told.pop("modules_to_not_convert", None)
        assert told == TOLD["blocks"]
        return names

    assert named(put_together(tmp_path, partly[0], one), "first") == ["model.layers.1.mlp"]
    assert named(put_together(tmp_path, one, partly[0]), "none") is None
    assert named(put_together(tmp_path, one, partly[1]), "last") == [
        "model.layers.2.mlp.gate_proj", "model.layers.2.mlp.up_proj"
    ]  # fmt: skip
    # What a name said that is true of some no more is said of each.
    assert named(put_together(tmp_path, partly[1], one), "each") == ["model.layers.0.mlp"]
    mean = write_recipe(
        tmp_path / "r.yaml", "linear", [partly[1], one], per_model={"weight": 1}, out_dtype="float8_e4m3fn"
    )
    assert named(mean, "mean") == ["lm_head"]


def test_a_matrix_of_one_block_says_nothing_of_others(tmp_path: Path) -> None:
    """Its scale looks like one for a whole tensor. What only the other model has is stored in blocks all the same."""
    shapes = {"model.layers.0.a_proj.weight": (128, 128), "model.layers.0.b_proj.weight": (256, 128)}
    models = []
    for seed, more in enumerate(({}, {"extra.weight": (256, 256)})):
        models.append(tmp_path / f"m{seed}")
        weights = make_tensors(seed, shapes=shapes | more, dtype=torch.float32)
        save_scaled(models[-1], weights, FORMS["blocks"], config={"quantization_config": TOLD["blocks"]})
    recipe = write_recipe(tmp_path / "r.yaml", "linear", models, per_model={"weight": 1}, out_dtype="float8_e4m3fn")
    found = merge(recipe, tmp_path / "out")
    assert found["extra.weight_scale_inv"].shape == (2, 2)
    stored = load_file(models[1] / "model.safetensors")["extra.weight"]
    assert torch.equal(found["extra.weight"].view(torch.uint8), stored.view(torch.uint8))


def test_eight_bits_of_another_kind_are_told_of(tmp_path: Path) -> None:
    one = save_form(tmp_path / "one", 1, "blocks")
    recipe = write_recipe(tmp_path / "r.yaml", "passthrough", [one], out_dtype="float8_e5m2")
    notes: list[str] = []
    merge(recipe, tmp_path / "out", note=notes.append)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["fmt"] == "e5m2"
    assert any("unless it is told to dequantize" in note for note in notes)
    rows = save_form(tmp_path / "rows", 1, "rows")
    refused = write_recipe(tmp_path / "x.yaml", "passthrough", [rows], out_dtype="float8_e5m2")
    with pytest.raises(RecipeError, match="float8_e5m2 is none of compressed-tensors"):
        streammerge.merge(refused, tmp_path / "x")


def test_matrices_of_broken_blocks_stay_in_more_bits_and_that_is_said(tmp_path: Path) -> None:
    shapes = {"model.layers.0.a.weight": (256, 128), "model.layers.0.b.weight": (192, 128)}
    notes: list[str] = []
    model = save_model(tmp_path / "m", make_tensors(1, shapes=shapes))
    recipe = write_recipe(tmp_path / "r.yaml", "passthrough", [model], out_dtype="float8_e4m3fn")
    found = merge(recipe, tmp_path / "out", note=notes.append)
    assert found["model.layers.0.a.weight"].dtype == torch.float8_e4m3fn
    assert found["model.layers.0.b.weight"].dtype == torch.bfloat16
    assert any("1 matrices in layers are not stored in 8 bits" in note and "0.b.weight" in note for note in notes)


def test_the_block_that_scales_are_for_is_told_of(tmp_path: Path) -> None:
    one = save_form(tmp_path / "one", 1, "blocks")
    config = json.loads((one / "config.json").read_text())
    config["quantization_config"]["weight_block_size"] = [64, 64]
    (one / "config.json").write_text(json.dumps(config))
    merge(write_recipe(tmp_path / "r.yaml", "passthrough", [one], out_dtype="float8_e4m3fn"), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"] == TOLD["blocks"]


def test_health_sees_codes_that_are_no_numbers(tmp_path: Path) -> None:
    one = save_form(tmp_path / "one", 1, "blocks")
    stored = load_file(one / "model.safetensors")
    stored["model.layers.0.mlp.up_proj.weight"].view(torch.uint8)[0, 0] = 0x7F
    save_file(stored, one / "model.safetensors", metadata={"format": "pt"})
    checkpoint = streammerge.inspect(one).checkpoint
    found = check_health(checkpoint, max_memory=None, stopping=lambda: False, progress=lambda done, total: None)
    assert found.nonfinite == {"model.layers.0.mlp.up_proj.weight": 1}


# What is wrong.


def one(folder: Path, tensors: dict[str, Tensor]) -> Path:
    return write_recipe(folder / "r.yaml", "passthrough", [save_model(folder / "m", tensors)])


CODES = torch.zeros(128, 128).to(torch.float8_e4m3fn)


@pytest.mark.parametrize(
    ("tensors", "sentence"),
    [
        ({"w": CODES}, "w is stored as F8_E4M3 without scales (w_scale_inv or w_scale)"),
        ({"w_scale_inv": torch.ones(1, 1)}, "w_scale_inv has scales for a weight that is not stored in 8 bits"),
        ({"a.weight": torch.ones(4, 4), "a.weight_scale": torch.ones(1)}, "a.weight_scale has scales for a weight"),
        ({"w": CODES, "w_scale": torch.ones(2, 3)}, "w_scale is F32 of shape [2, 3]: no scales for w, [128, 128]"),
        ({"w": CODES, "w_scale": torch.ones(1, 1, dtype=torch.int32)}, "w_scale is I32 of shape [1, 1]: no scales"),
        ({"w": torch.ones(4).to(torch.float8_e8m0fnu)}, "w is stored as F8_E8M0, which is for scales"),
    ],
)
def test_codes_and_scales_that_do_not_belong_together(
    tmp_path: Path, tensors: dict[str, Tensor], sentence: str
) -> None:
    with pytest.raises(UserError) as caught:
        merge(one(tmp_path, tensors), tmp_path / "out")
    assert sentence in str(caught.value)
    assert str(tmp_path / "m") in str(caught.value)
    assert not (tmp_path / "out").exists()


BYTES = torch.zeros(4, 4, dtype=torch.uint8)
P = "model.layers.0.mlp.up_proj"
E = "model.layers.0.mlp.experts"
CODED = BYTES.clone()


@pytest.mark.parametrize(
    ("tensors", "form", "advice"),
    [
        ({f"{P}.weight": BYTES, f"{P}.weight.quant_state.bitsandbytes__nf4": CODED},
         "bitsandbytes (4 bits)", "model.dequantize()"),
        ({f"{P}.weight": BYTES.to(torch.int8), f"{P}.SCB": torch.ones(4)}, "bitsandbytes (8 bits)", "dequantize()"),
        ({f"{P}.qweight": BYTES.int(), f"{P}.qzeros": BYTES.int(), f"{P}.g_idx": BYTES[0].int()}, "GPTQ",
         "Merge the models it was made from"),
        ({f"{P}.qweight": BYTES.int(), f"{P}.qzeros": BYTES.int(), f"{P}.scales": torch.ones(4)}, "AWQ",
         "Merge the models it was made from"),
        ({f"{E}.gate_up_proj_blocks": BYTES, f"{E}.gate_up_proj_scales": CODED},
         "MXFP4", "Mxfp4Config(dequantize=True)"),
        ({f"{P}.weight_packed": BYTES.int(), f"{P}.weight_scale": torch.ones(4)}, "compressed-tensors (packed)", "M"),
        ({f"{P}.weight": BYTES, f"{P}.weight_scale": CODES, f"{P}.weight_scale_2": torch.ones(())}, "NVFP4", "Merge"),
        ({f"{P}.weight": BYTES.to(torch.int8), f"{P}.weight_scale": torch.ones(4, 1)},
         f"a way that is not known here: {P}.weight is stored as I8", "Merge the models it was made from"),
    ],
)  # fmt: skip
def test_other_quantised_weights_are_refused_with_what_to_do(
    tmp_path: Path, tensors: dict[str, Tensor], form: str, advice: str
) -> None:
    with pytest.raises(UserError) as caught:
        merge(one(tmp_path, tensors), tmp_path / "out")
    text = str(caught.value)
    assert f"{tmp_path / 'm'}: its weights are quantised by {form}" in text
    assert advice in text
    assert caught.value.exit_code == 2


def test_all_quantised_models_are_named_at_once(tmp_path: Path) -> None:
    good, *_ = make_models(tmp_path, shapes={f"{P}.weight": (4, 4)})
    bad = [save_model(tmp_path / name, {f"{P}.qweight": BYTES.int()}) for name in "xy"]
    recipe = write_recipe(tmp_path / "r.yaml", "linear", [good, *bad], per_model={"weight": 1})
    with pytest.raises(UserError, match=r"(?s)x: its weights.*y: its weights"):
        merge(recipe, tmp_path / "out")


def test_scales_of_activations_are_left_out_and_that_is_said(tmp_path: Path) -> None:
    more = {f"{UP.removesuffix('weight')}input_scale": torch.ones(1), "model.layers.0.self_attn.k_scale": torch.ones(1)}
    path = tmp_path / "m"
    weights = make_tensors(0, shapes=WEIGHTS, dtype=torch.float32)
    save_scaled(path, weights, FORMS["one"], more=more)
    notes: list[str] = []
    merged = merge(write_recipe(tmp_path / "r.yaml", "passthrough", [path]), tmp_path / "out", note=notes.append)
    assert set(merged) == set(WEIGHTS)
    assert any("input_scale, model.layers.0.self_attn.k_scale are of activations" in note for note in notes)


def test_eight_bits_are_for_the_last_document(tmp_path: Path) -> None:
    models, _ = make_family(tmp_path, FORMS["blocks"])
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"name: first\nmerge_method: linear\nmodels: [{{model: {models[0]}}}]\nparameters: {{weight: 1}}\n"
        f"out_dtype: float8_e4m3fn\n---\nmerge_method: linear\nmodels: [{{model: first}}, {{model: {models[1]}}}]\n"
        f"parameters: {{weight: 1}}\n"
    )
    with pytest.raises(RecipeError, match="document first: 8 bits are for what is written"):
        merge(recipe, tmp_path / "out")
    text = recipe.read_text().replace("out_dtype: float8_e4m3fn\n", "") + "out_dtype: float8_e4m3fn\n"
    recipe.write_text(text)
    assert merge(recipe, tmp_path / "out")[UP].dtype == torch.float8_e4m3fn


def test_a_name_that_an_input_has_already_is_not_taken_for_scales(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    models, _ = make_family(tmp_path, Form((128, 128), "_scale"))
    more = {**make_tensors(1, shapes={**WEIGHTS, **REST}), f"{name}_scale": torch.ones(3)}
    with pytest.raises(UserError, match="has scales for a weight that is not stored in 8 bits"):
        merge(task_arithmetic(tmp_path, [models[0], models[1], save_model(tmp_path / "x", more)]), tmp_path / "out")


def test_scoring_says_that_it_cannot_yet(tmp_path: Path) -> None:
    models, _ = make_family(tmp_path, FORMS["blocks"])
    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    recipe = task_arithmetic(tmp_path, models)
    from streammerge.study.variants import check_network

    with pytest.raises(UserError, match=r"in 8 bits with scales.*not scored yet"):
        check_network(streammerge.make_plan(recipe))
