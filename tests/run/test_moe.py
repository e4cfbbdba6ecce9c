"""A model with experts of dense ones: what transformers makes of it, its bytes, its gates, and what is refused."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

import streammerge
from streammerge.base.errors import InputError, RecipeError, StreamMergeError, UserError
from streammerge.kernels.contract import BLOCK
from streammerge.plan.given import Drawn, Given, drawn
from streammerge.plan.recipe import load_recipe
from streammerge.run.arena import Arena
from streammerge.run.given import fill_given
from streammerge.run.journal import WORK_FOLDER
from streammerge.run.merge import Options, make_plan
from tests.command import streammerge as run
from tests.run.test_adapters import adapt
from tests.run.test_resume import KILLER
from tests.run.unfinished import before_the_side_files
from tests.study.tiny import (
    TOKENS,
    make_model,
    make_specialist,
    make_tokenizer,
    plain_model,
    read_weights,
    write_weights,
)

# What is made of which models.
KINDS = {"llama": "mixtral", "mistral": "mixtral", "qwen3": "qwen3_moe", "qwen2": "qwen2_moe"}
PROMPTS = [["a b c", "d e"], ["f g", "h"], ["x y z", "a"], ["aa bb"]]
BLOCKS = {"mixtral": "block_sparse_moe", "qwen3_moe": "mlp", "qwen2_moe": "mlp"}


def write(path: Path, base: Path, experts: list[Any], *, gates: str | None = "cheap_embed", **top: Any) -> Path:
    """A recipe; an expert is a model, which gets prompts of its own, or a map."""
    listed = [
        expert if isinstance(expert, dict)
        else {"source_model": str(expert), **({"positive_prompts": PROMPTS[i % 4]} if gates == "cheap_embed" else {})}
        for i, expert in enumerate(experts)
    ]  # fmt: skip
    content = {"base_model": str(base), "gate_mode": gates, "experts": listed, **top}
    kept = {key: value for key, value in content.items() if value is not None}
    path.write_text(yaml.safe_dump(kept, sort_keys=False))
    return path


def make(recipe: Path, out: Path, **how: Any) -> dict[str, Tensor]:
    """The tensors of what a recipe makes."""
    streammerge.merge(recipe, out, **{"compile": "off", "threads": 1, **how})
    return tensors_of(out)


def tensors_of(out: Path) -> dict[str, Tensor]:
    return {name: tensor for file in sorted(out.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def logits(model: Path, *, seed: int = 0) -> Tensor:
    tokens = torch.randint(0, 250, (2, 17), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        found = plain_model(model)(tokens).logits
    assert isinstance(found, Tensor)
    return found


@pytest.fixture(scope="module")
def trio(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A tiny llama and two of its specialists, in bfloat16."""
    folder = tmp_path_factory.mktemp("trio")
    base = make_model(folder / "base", dtype=torch.bfloat16)
    return [base, *(make_specialist(folder / f"m{i}", base, seed=i) for i in (1, 2))]


# What transformers makes of it.


@pytest.mark.parametrize("gates", ["cheap_embed", "random"])
@pytest.mark.parametrize("kind", KINDS)
def test_experts_that_are_all_the_same_model_give_its_logits(kind: str, gates: str, tmp_path: Path) -> None:
    base = make_model(tmp_path / "base", kind)
    # The shared expert of Qwen2-MoE comes on top of the others.
    shared = {"shared_experts": [{"source_model": str(base), "residual_scale": 0}]} if kind == "qwen2" else {}
    recipe = write(tmp_path / "r.yaml", base, [base] * 4, gates=gates, **shared)
    make(recipe, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == KINDS[kind]
    expected = logits(base)
    assert expected.std() > 0.1
    torch.testing.assert_close(logits(tmp_path / "out"), expected, atol=2e-5, rtol=2e-5)


class Mixed(torch.nn.Module):
    """The MLPs of dense models, weighed by a router: the definition, written out."""

    def __init__(self, router: Tensor, experts: list[Any], per_token: int, shared: tuple[Tensor, Any] | None) -> None:
        super().__init__()
        self.router, self.experts, self.per_token, self.shared = router, experts, per_token, shared

    def forward(self, x: Tensor) -> Tensor:
        chances = torch.softmax(x @ self.router.T, -1)
        best = chances.topk(self.per_token, -1)
        weights = torch.zeros_like(chances).scatter(-1, best.indices, best.values)
        weights = weights / weights.sum(-1, keepdim=True)
        total = torch.stack([weights[..., i : i + 1] * expert(x) for i, expert in enumerate(self.experts)]).sum(0)
        return total if self.shared is None else total + torch.sigmoid(x @ self.shared[0].T) * self.shared[1](x)


@pytest.mark.parametrize("kind", KINDS)
def test_experts_that_differ_are_mixed_as_the_router_says(kind: str, tmp_path: Path) -> None:
    base = make_model(tmp_path / "base", kind)
    models = [make_specialist(tmp_path / f"m{i}", base, seed=i, noise=0.2) for i in range(4)]
    more: dict[str, Any] = {}
    if kind == "qwen2":
        more = {"shared_experts": [{"source_model": str(models[3]), "positive_prompts": ["c d"]}]}
    recipe = write(tmp_path / "r.yaml", base, list(models[:3]), experts_per_token=2, **more)
    made = make(recipe, tmp_path / "out")
    plain = plain_model(base)
    others = [plain_model(model) for model in models]
    for number, layer in enumerate(plain.model.layers):
        mlps = [other.model.layers[number].mlp for other in others]
        place = f"model.layers.{number}.{BLOCKS[KINDS[kind]]}"
        shared = (made[f"{place}.shared_expert_gate.weight"], mlps[3]) if more else None
        layer.mlp = Mixed(made[f"{place}.gate.weight"], mlps[:3], 2, shared)
    tokens = torch.randint(0, 250, (2, 17), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = plain(tokens).logits
    assert (expected - logits(base)).abs().max() > 0.05
    torch.testing.assert_close(logits(tmp_path / "out"), expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("old", [False, True])
def test_angles_and_norms_are_those_of_the_dense_model(old: bool, tmp_path: Path) -> None:
    angles = {"rope_type": "linear", "factor": 3.0, "rope_theta": 500.0}
    base = make_model(tmp_path / "base", rms_norm_eps=1e-2, head_dim=16, rope_parameters=angles)
    if old:
        # As transformers 4 wrote it.
        config = json.loads((base / "config.json").read_text())
        del config["rope_parameters"]
        config |= {"rope_theta": 500.0, "rope_scaling": {"type": "linear", "factor": 3.0}}
        (base / "config.json").write_text(json.dumps(config))
    make(write(tmp_path / "r.yaml", base, [base] * 2), tmp_path / "out")
    torch.testing.assert_close(logits(tmp_path / "out"), logits(base), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_dense_config_leaves_unsaid_means_the_same_afterwards(kind: str, tmp_path: Path) -> None:
    from transformers import AutoConfig

    base = make_model(tmp_path / "base", kind)
    (base / "config.json").write_text(json.dumps({"model_type": kind}))
    shared = {"shared_experts": [{"source_model": str(base)}]} if kind == "qwen2" else {}
    make(write(tmp_path / "r.yaml", base, [base] * 2, **shared), tmp_path / "out")
    dense, made = AutoConfig.from_pretrained(base), AutoConfig.from_pretrained(tmp_path / "out")
    same = [
        *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_act"),
        *("max_position_embeddings", "initializer_range", "rms_norm_eps", "tie_word_embeddings", "rope_parameters"),
        *("attention_dropout", "bos_token_id", "eos_token_id", "intermediate_size"),
    ]
    assert {key: getattr(made, key) for key in same} == {key: getattr(dense, key) for key in same}
    assert (getattr(made, "sliding_window", None) or None) == getattr(dense, "sliding_window", None)
    width = getattr(dense, "head_dim", None) or dense.hidden_size // dense.num_attention_heads
    assert (getattr(made, "head_dim", None) or made.hidden_size // made.num_attention_heads) == width
    assert made.num_experts_per_tok == 2
    assert (made.num_local_experts if kind in ("llama", "mistral") else made.num_experts) == 2


# What is written.


def test_weights_are_those_of_the_models_bit_for_bit(trio: list[Path], tmp_path: Path) -> None:
    made = make(write(tmp_path / "r.yaml", trio[0], trio[1:]), tmp_path / "out")
    base, *experts = [read_weights(model) for model in trio]
    expected = {name: tensor for name, tensor in base.items() if ".mlp." not in name}
    words = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
    for layer in range(3):
        for number, expert in enumerate(experts):
            for word, projection in words.items():
                name = f"model.layers.{layer}.block_sparse_moe.experts.{number}.{word}.weight"
                expected[name] = expert[f"model.layers.{layer}.mlp.{projection}.weight"]
    routers = {f"model.layers.{layer}.block_sparse_moe.gate.weight" for layer in range(3)}
    assert set(made) == set(expected) | routers
    for name, tensor in expected.items():
        assert made[name].dtype == tensor.dtype
        assert torch.equal(made[name], tensor), name
    assert {name: made[name].dtype for name in routers} == dict.fromkeys(routers, torch.bfloat16)
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (trio[0] / "tokenizer.json").read_bytes()


def unit(vector: Any) -> Any:
    return vector / np.linalg.norm(vector)


def summed(table: Tensor, prompts: list[str]) -> Any:
    counts = Counter(TOKENS[word] for prompt in prompts for word in prompt.split())
    return sum(table[token].double().numpy() * count for token, count in counts.items())


def test_routers_of_prompts_are_their_rows_of_the_embedding(trio: list[Path], tmp_path: Path) -> None:
    prompts = [
        {"positive_prompts": ["a b a", "c"], "negative_prompts": ["d", "e e"]},
        {"positive_prompts": ["f g h"]},
    ]
    experts = [{"source_model": str(model), **own} for model, own in zip(trio[1:], prompts, strict=True)]
    made = make(write(tmp_path / "r.yaml", trio[0], experts, dtype="float32"), tmp_path / "out")
    table = read_weights(trio[0])["model.embed_tokens.weight"]
    expected = np.stack([
        unit(unit(summed(table, ["a b a", "c"])) - unit(summed(table, ["d", "e e"]))), unit(summed(table, ["f g h"])),
    ])  # fmt: skip
    for layer in range(3):
        found = made[f"model.layers.{layer}.block_sparse_moe.gate.weight"]
        assert found.dtype == torch.float32
        np.testing.assert_allclose(found.numpy(), expected, atol=1e-7)


def test_random_routers_are_small_differ_by_layer_and_go_by_the_seed(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base", hidden_size=256, intermediate_size=16)
    recipe = write(tmp_path / "r.yaml", base, [base] * 8, gates="random")
    routers = [f"model.layers.{layer}.block_sparse_moe.gate.weight" for layer in range(3)]
    first, again, other = (make(recipe, tmp_path / f"out{i}", seed=seed) for i, seed in enumerate((1, 1, 2)))
    for name in routers:
        assert torch.equal(first[name], again[name])
        assert not torch.equal(first[name], other[name])
        assert 0.018 < float(first[name].std()) < 0.022
        assert abs(float(first[name].mean())) < 0.002
    assert not torch.equal(first[routers[0]], first[routers[1]])


def test_a_scale_is_of_the_last_matrix_alone(trio: list[Path], tmp_path: Path) -> None:
    scaled = {"source_model": str(trio[1]), "residual_scale": 0.3}
    made = make(write(tmp_path / "r.yaml", trio[0], [scaled, trio[2]], gates="random"), tmp_path / "out")
    one = read_weights(trio[1])
    place = "model.layers.1.block_sparse_moe.experts.0"
    expected = (one["model.layers.1.mlp.down_proj.weight"].float() * np.float32(0.3)).bfloat16()
    assert torch.equal(made[f"{place}.w2.weight"], expected)
    assert torch.equal(made[f"{place}.w1.weight"], one["model.layers.1.mlp.gate_proj.weight"])


def test_noise_is_in_all_three_matrices_and_scaled_with_the_last(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base", intermediate_size=1000)
    noisy = {"source_model": str(base), "noise_scale": 0.01, "residual_scale": 0.5}
    made = make(write(tmp_path / "r.yaml", base, [noisy, dict(noisy)], gates="random"), tmp_path / "out")
    weights = read_weights(base)
    for word, projection, scale in (("w1", "gate_proj", 1.0), ("w2", "down_proj", 0.5), ("w3", "up_proj", 1.0)):
        own = weights[f"model.layers.0.mlp.{projection}.weight"].double() * scale
        first, second = (made[f"model.layers.0.block_sparse_moe.experts.{i}.{word}.weight"].double() for i in (0, 1))
        noise = (first - own) / scale
        assert abs(float(noise.std()) / 0.01 - 1) < 0.02
        assert abs(float(noise.mean())) < 3e-4
        # Two experts of one model become different.
        assert (
            abs(float(torch.corrcoef(torch.stack([noise.flatten(), ((second - own) / scale).flatten()]))[0, 1])) < 0.03
        )


def test_experts_of_a_layer_are_stored_in_one_dtype(trio: list[Path], tmp_path: Path) -> None:
    half = shutil.copytree(trio[1], tmp_path / "half")
    write_weights(half, {name: tensor.half() for name, tensor in read_weights(trio[1]).items()})
    made = make(write(tmp_path / "r.yaml", trio[0], [half, trio[2]], gates="random"), tmp_path / "out")
    dtypes = {tensor.dtype for name, tensor in made.items() if ".experts." in name}
    assert dtypes == {torch.float32}
    assert made["model.embed_tokens.weight"].dtype == torch.bfloat16


@pytest.mark.filterwarnings("ignore")  # PEFT's own
def test_an_expert_may_be_a_model_with_an_adapter(trio: list[Path], tmp_path: Path) -> None:
    from peft import LoraConfig

    config = LoraConfig(r=2, target_modules=["up_proj"], task_type="CAUSAL_LM")
    adapted = adapt(tmp_path / "lora", trio[1], plain_model(trio[1]), config)
    recipe = write(tmp_path / "r.yaml", trio[0], [f"{trio[1]}+{tmp_path / 'lora'}", trio[2]], dtype="float32")
    made = make(recipe, tmp_path / "out")
    name = "model.layers.2.mlp.up_proj.weight"
    found = made["model.layers.2.block_sparse_moe.experts.0.w3.weight"]
    torch.testing.assert_close(found.double(), adapted.merged[name], atol=1e-7, rtol=1e-6)
    assert (found - read_weights(trio[1])[name].float()).abs().max() > 1e-3


# Random numbers.


def plain_numbers(read: Drawn, start: int, count: int) -> Any:
    """The same by numpy: murmur3's finaliser over a block's keys, sixteen bits at a time."""
    mask = np.uint64(0xFFFFFFFFFFFFFFFF)

    def block_key(key: int, block: int) -> int:
        number = np.uint64((key + (block + 1) * 0x9E3779B97F4A7C15) & int(mask))
        number = np.uint64((int(number ^ (number >> np.uint64(30))) * 0xBF58476D1CE4E5B9) & int(mask))
        number = np.uint64((int(number ^ (number >> np.uint64(27))) * 0x94D049BB133111EB) & int(mask))
        return int(number ^ (number >> np.uint64(31)))

    def mix(bits: int) -> int:
        bits = ((bits ^ (bits >> 16)) * 0x85EBCA6B) & 0xFFFFFFFF
        bits = ((bits ^ (bits >> 13)) * 0xC2B2AE35) & 0xFFFFFFFF
        return bits ^ (bits >> 16)

    found = []
    for element in range(start, start + count):
        block, index = divmod(element, BLOCK)
        total = 0
        for key in read.keys:
            both = block_key(key, block)
            bits = mix(mix(index ^ (both & 0xFFFFFFFF)) ^ (both >> 32))
            total += (bits & 0xFFFF) + (bits >> 16)
        found.append(total / 65536 - 6 + 12 / 131072)
    return np.array(found)


def filled(read: Drawn | Given, dtype: str, start: int, count: int, at: int = 0) -> Any:
    arena = Arena(1, 8 * 8 * BLOCK, 0, touch=False)
    (area,) = arena.areas(0, (dtype,), 8)
    fill_given(read, area, start, count, at)
    return area.tensor.view(-1)[at : at + count].clone().numpy()


def test_drawn_numbers_are_a_function_of_their_place() -> None:
    read = drawn(3, "x", (3, BLOCK))
    whole = filled(read, "F32", 0, 3 * BLOCK)
    np.testing.assert_array_equal(filled(read, "F32", BLOCK - 7, BLOCK + 20, 5), whole[BLOCK - 7 : 2 * BLOCK + 13])
    np.testing.assert_array_equal(whole[BLOCK - 3 : BLOCK + 4], plain_numbers(read, BLOCK - 3, 7).astype(np.float32))
    assert abs(whole.mean()) < 0.01
    assert abs(whole.std() - 1) < 0.01
    assert 4 < abs(whole).max() < 6
    # As many within one, two and three deviations as of normal numbers, to a hundredth.
    for limit, share in ((1, 0.6827), (2, 0.9545), (3, 0.9973)):
        assert abs((abs(whole) < limit).mean() - share) < 0.01


def test_given_numbers_are_read_from_any_place_on() -> None:
    values = np.random.default_rng(0).normal(size=(5, 7))
    np.testing.assert_array_equal(filled(Given(values), "F64", 4, 20, 3), values.reshape(-1)[4:24])


# The same bytes.


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A recipe whose matrices have several blocks, noise, scales and another dtype, and its result."""
    folder = tmp_path_factory.mktemp("wide")
    base = make_model(folder / "base", hidden_size=64, intermediate_size=4000, dtype=torch.bfloat16)
    other = make_specialist(folder / "m", base, seed=1)
    experts = [
        {"source_model": str(base), "positive_prompts": ["a b"], "noise_scale": 0.01},
        {"source_model": str(other), "positive_prompts": ["c d"], "residual_scale": 0.7},
        {"source_model": str(other), "positive_prompts": ["e"], "negative_prompts": ["a"]},
    ]
    recipe = write(folder / "r.yaml", base, experts, dtype="float16")
    make(recipe, folder / "whole", out_shard_size="3MB")
    return recipe, folder / "whole"


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("blocks", [1, 3])
def test_tiles_and_threads_do_not_change_a_byte(wide: tuple[Path, Path], tmp_path: Path, threads: int, blocks: int,
                                                monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    from streammerge.plan import budget

    recipe, whole = wide
    monkeypatch.setattr(budget, "_TILE_BLOCKS", blocks)
    make(recipe, tmp_path / "out", out_shard_size="3MB", threads=threads)
    assert files(tmp_path / "out") == files(whole)
    assert len(list(whole.glob("model-*.safetensors"))) > 3


def test_what_was_finished_before_a_stop_stays(wide: tuple[Path, Path], tmp_path: Path) -> None:
    recipe, whole = wide
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    plan = make_plan(recipe, Options(shard_bytes=3_000_000))
    before_the_side_files(out, plan, keeps=lambda name: ".experts.1" not in name)
    report = streammerge.merge(recipe, out, compile="off", threads=1, out_shard_size="3MB")
    assert report.tensors - report.resumed == 9
    assert files(out) == files(whole)


def test_a_run_that_is_killed_goes_on_and_gives_the_same_bytes(wide: tuple[Path, Path], tmp_path: Path) -> None:
    recipe, whole = wide
    out = tmp_path / "out"
    how = ["moe", str(recipe), str(out), "--out-shard-size", "3MB", "--compile", "off", "--json"]
    command = [sys.executable, "-c", KILLER, "30", *how]
    assert subprocess.run(command, capture_output=True, check=False, timeout=60).returncode == -signal.SIGKILL
    assert (out / WORK_FOLDER).exists()
    assert run(*how).done["tensors"] == 51
    assert files(out) == files(whole)


def test_workers_of_a_cluster_run_make_the_same_bytes(wide: tuple[Path, Path], tmp_path: Path) -> None:
    recipe, whole = wide
    out = tmp_path / "out"
    assert run("submit", recipe, out, "--plan-only", "--out-shard-size", "3MB").code == 0
    assert run("work", out, "--compile", "off").code == 0
    assert run("finalize", out).code == 0
    assert files(out) == files(whole)


def test_the_digest_knows_what_only_the_config_says(trio: list[Path], tmp_path: Path) -> None:
    one, two = (write(tmp_path / f"{n}.yaml", trio[0], [trio[1], trio[2]], experts_per_token=n) for n in (1, 2))
    assert streammerge.make_plan(one).digest != streammerge.make_plan(two).digest
    prompts = [{"source_model": str(model), "positive_prompts": ["q"]} for model in trio[1:]]
    assert (
        streammerge.make_plan(write(tmp_path / "3.yaml", trio[0], prompts)).digest != streammerge.make_plan(two).digest
    )


# The command.


def test_the_command_makes_checks_and_shows_it(trio: list[Path], tmp_path: Path) -> None:
    recipe, out = write(tmp_path / "r.yaml", trio[0], trio[1:]), tmp_path / "out"
    shown = json.loads(run("plan", recipe, "--json").out)
    assert (shown["method"], shown["bases"]) == ("moe", [str(trio[0])])
    done = run("moe", recipe, out, "--threads", "1", "--compile", "off", "--verify-output", "--json").done
    assert done["digest"] == shown["digest"]
    assert run("verify", out).code == 0
    assert "Mixtral" in (out / "README.md").read_text()
    # A second time nothing is left to do; and the plain command is the same.
    assert run(recipe, out, "--json").done["already_finished"]
    assert json.loads((out / "config.json").read_text())["architectures"] == ["MixtralForCausalLM"]


def test_the_verb_is_for_recipes_with_experts(trio: list[Path], tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(
        f"merge_method: linear\nmodels: [{{model: {trio[0]}, parameters: {{weight: 1}}}}]\n"
    )
    done = run("moe", tmp_path / "r.yaml", tmp_path / "out")
    assert done.code == 2
    assert "has no `experts:`" in done.err


def test_it_is_scored_when_it_is_written_and_not_before(trio: list[Path], tmp_path: Path) -> None:
    recipe = write(tmp_path / "r.yaml", trio[0], trio[1:])
    (tmp_path / "dev.jsonl").write_text('{"prompt": "a b", "choices": [" c", " d"], "answer": 1}\n' * 4)
    (tmp_path / "tasks.yaml").write_text("- {name: t, dev: dev.jsonl}\n")
    done = run("eval", recipe, "--tasks", tmp_path / "tasks.yaml")
    assert done.code == 2
    assert "can be written, and then scored" in done.err
    make(recipe, tmp_path / "out")
    assert run("eval", tmp_path / "out", "--tasks", tmp_path / "tasks.yaml", "--device", "cpu").code == 0


# What is refused.

GOOD = {"source_model": "M", "positive_prompts": ["a"]}


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("base_model: B\nexperts: []\n",
         ["line 1: gate_mode: is missing", "write cheap_embed", "line 2: experts: a router chooses among two"]),
        ("base_model: B\ngate_mode: hidden\nexperts:\n- {source_model: M}\n- {source_model: M}\n",
         ["line 2: gate_mode: hidden needs the base model to run", "write cheap_embed"]),
        ("base_model: B\ngate_mode: cheap\nexperts: [{source_model: M}, {source_model: M}]\n",
         ["'cheap' is none of cheap_embed, random", "Did you mean cheap_embed?"]),
        (("base_model: B\ngate_mode: cheap_embed\nexperts:\n"
          "- source_model: M\n- {source_model: M, positive_prompts: ['']}\n"),
         ["line 4: experts[0]: positive_prompts is missing", "line 5: experts[1].positive_prompts[0]: is empty"]),
        ("base_model: B\ngate_mode: random\nexperts_per_token: 3\nexperts: [{source_model: M}, {source_model: M}]\n",
         ["line 3: experts_per_token: is 3, and there are 2 experts"]),
        ("base_model: B\ngate_mode: random\nexperts_per_token: 0\nexperts: [{source_model: M}, {source_model: M}]\n",
         ["line 3: experts_per_token", "greater than or equal to 1"]),
        ("base_model: B\ngate_mode: random\narchitecture: deepseek\nexperts: [{source_model: M}, {source_model: M}]\n",
         ["line 3: architecture: 'deepseek' is none that is made here; there are mixtral, qwen3_moe, qwen2_moe"]),
        ("gate_mode: random\ndtype: bf16\nexperts:\n- {source_model: M, residual_scale: .inf}\n- {noise_scale: -1}\n",
         ["base_model: is missing", "line 2: dtype: 'bf16' is none of", "line 4: experts[0].residual_scale",
          "line 5: experts[1].source_model: is missing", "line 5: experts[1].noise_scale"]),
        ("base_model: B\ngate_mode: random\nmerge_method: ties\nexperts: [{source_model: M}, {source_model: M}]\n",
         ["line 3: merge_method: a recipe with `experts:` has no merge_method"]),
        ("base_model: B\ngate_mode: random\nexperts: [{source_model: M}]\n---\nmerge_method: linear\nmodels: []\n",
         ["a document with `experts:` stands alone"]),
        ("base_model: B\ngate_mode: random\ndtype: float8_e4m3fn\nexperts: [{source_model: M}, {source_model: N}]\n",
         ["line 3: dtype: experts are made in no 8 bits; write bfloat16"]),
        ("base_model: B\ngate_mode: random\nexperts: 3\n", ["line 3: experts: expected a list, found 3"]),
    ],
)  # fmt: skip
def test_mistakes_are_told_together_with_their_lines(text: str, sentences: list[str], tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    for sentence in sentences:
        assert sentence in str(caught.value)


def test_unknown_keys_and_idle_prompts_are_warnings_or_errors_if_strict(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("base_model: B\ngate_mod: x\ngate_mode: random\nexperts:\n- {source_model: M, positive_prompt: a}\n"
                    "- {source_model: M, positive_prompts: [a]}\n")  # fmt: skip
    expected = [
        "line 2: gate_mod: unknown key, ignored. Did you mean gate_mode?",
        "line 5: experts[0].positive_prompt: unknown key, ignored. Did you mean positive_prompts?",
        "line 3: gate_mode: with random gates the prompts have no effect",
    ]
    assert list(load_recipe(path).warnings) == expected
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, strict=True)
    assert caught.value.problems == expected


def reshaped(model: Path) -> None:
    weights = read_weights(model)
    write_weights(model, weights | {"model.layers.1.mlp.up_proj.weight": torch.zeros(65, 32)})


def without(*names: str) -> Callable[[Path], None]:
    def change(model: Path) -> None:
        write_weights(model, {name: own for name, own in read_weights(model).items() if name not in names})

    return change


def having(name: str, shape: tuple[int, ...]) -> Callable[[Path], None]:
    def change(model: Path) -> None:
        write_weights(model, read_weights(model) | {name: torch.zeros(shape)})

    return change


def configured(**keys: Any) -> Callable[[Path], None]:
    def change(model: Path) -> None:
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps(config | keys))

    return change


def one_layer_less(model: Path) -> None:
    write_weights(model, {name: own for name, own in read_weights(model).items() if ".layers.2." not in name})


def float8(model: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    write_weights(model, read_weights(model) | {name: read_weights(model)[name].to(torch.float8_e4m3fn)})


@pytest.mark.parametrize(
    ("who", "change", "sentence"),
    [
        ("expert", reshaped, "model.layers.1.mlp.up_proj.weight is [65, 32] in"),
        ("expert", having("model.layers.99999999.mlp.up_proj.weight", (1,)), "has 0 layers, and the base"),
        ("base", having("model.layers.99999999.mlp.up_proj.weight", (1,)), "has no layers named model.layers.0"),
        ("expert", one_layer_less, "has 2 layers, and the base"),
        ("expert", without("model.layers.0.mlp.down_proj.weight"), "has no model.layers.0.mlp.down_proj.weight"),
        ("expert", having("model.layers.0.mlp.up_proj.bias", (64,)), "for which an expert of Mixtral has no place"),
        ("expert", float8, "is stored as F8_E4M3 without scales"),
        ("expert", configured(hidden_act="gelu"), "go through gelu, and those of the base"),
        ("base", float8, "is stored as F8_E4M3 without scales"),
        ("base", without("model.norm.weight"), "has no model.norm.weight: Mixtral is made of llama and mistral models"),
        ("base", having("model.layers.0.self_attn.q_proj.bias", (32,)), "for which Mixtral has no place"),
        ("base", configured(model_type="gemma"), "is a gemma model; what can be made is Mixtral of llama and mistral"),
        ("base", configured(model_type=None), "has no config.json that says its model_type"),
        ("base", configured(layer_types=["full_attention", "sliding_attention"]), "see a window only"),
        ("base", lambda model: (model / "tokenizer.json").unlink(), "has no tokenizer, which gate_mode: cheap_embed"),
        ("base", without("model.embed_tokens.weight"), "whose rows can be read"),
    ],
)  # fmt: skip
def test_models_that_do_not_fit_are_refused(who: str, change: Callable[[Path], None], sentence: str,
                                            trio: list[Path], tmp_path: Path) -> None:  # fmt: skip
    for name, model in zip(("base", "expert"), trio, strict=False):
        shutil.copytree(model, tmp_path / name)
    change(tmp_path / who)
    recipe = write(tmp_path / "r.yaml", tmp_path / "base", [tmp_path / "expert", trio[2]])
    with pytest.raises(UserError) as caught:
        streammerge.merge(recipe, tmp_path / "out")
    assert sentence in str(caught.value)
    assert caught.value.exit_code == 2
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ({"architecture": "qwen3"}, "is a llama model; what can be made is"),
        ({"architecture": "Mixtral", "shared_experts": [{"source_model": "."}]}, "Mixtral has no shared experts"),
    ],
)
def test_an_architecture_needs_its_own_kind_of_models(more: dict[str, Any], sentence: str, trio: list[Path],
                                                      tmp_path: Path) -> None:  # fmt: skip
    if "shared_experts" in more:
        more = {**more, "shared_experts": [{"source_model": str(trio[1])}]}
    with pytest.raises(RecipeError, match=sentence):
        streammerge.make_plan(write(tmp_path / "r.yaml", trio[0], trio[1:], **more))


def test_qwen2_needs_a_shared_expert(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base", "qwen2")
    with pytest.raises(
        RecipeError, match="Qwen2-MoE has one shared expert, found 0: name a model under shared_experts"
    ):
        streammerge.make_plan(write(tmp_path / "r.yaml", base, [base, base]))


def with_prompts(tmp_path: Path, base: Path, *prompts: dict[str, list[str]]) -> Path:
    return write(tmp_path / "r.yaml", base, [{"source_model": str(base), **own} for own in prompts])


def test_a_prompt_without_tokens_is_refused_with_its_place(trio: list[Path], tmp_path: Path) -> None:
    from tokenizers import normalizers

    base = shutil.copytree(trio[0], tmp_path / "base")
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("zz", " ")
    tokenizer.save_pretrained(base)
    recipe = with_prompts(tmp_path, base, {"positive_prompts": ["a"]}, {"positive_prompts": ["b", "zz"]})
    with pytest.raises(RecipeError, match=r"line 7: experts\[1\]: positive_prompts\[1\]: 'zz' has no tokens"):
        streammerge.make_plan(recipe)


def test_a_token_beyond_the_table_is_refused(trio: list[Path], tmp_path: Path) -> None:
    base = shutil.copytree(trio[0], tmp_path / "base")
    weights = read_weights(base)
    short = {name: weights[name][:10].clone() for name in ("model.embed_tokens.weight", "lm_head.weight")}
    write_weights(base, weights | short)
    recipe = with_prompts(tmp_path, base, {"positive_prompts": ["a"]}, {"positive_prompts": ["z"]})
    with pytest.raises(RecipeError, match=f"'z' has the token {TOKENS['z']}, and the embedding of .* has 10 rows"):
        streammerge.make_plan(recipe)


def test_prompts_that_cancel_each_other_are_refused(trio: list[Path], tmp_path: Path) -> None:
    same = {"positive_prompts": ["a b"], "negative_prompts": ["b", "a"]}
    with pytest.raises(RecipeError, match=r"line \d+: experts\[1\]: its prompts make no gate: .* cancel each other"):
        streammerge.make_plan(with_prompts(tmp_path, trio[0], {"positive_prompts": ["a"]}, same))


def test_a_tokenizer_that_cannot_cut_a_prompt_up_is_an_input_error(trio: list[Path], tmp_path: Path) -> None:
    base = shutil.copytree(trio[0], tmp_path / "base")
    content = json.loads((base / "tokenizer.json").read_text())
    del content["model"]["vocab"]["<unk>"]
    content["added_tokens"] = []
    (base / "tokenizer.json").write_text(json.dumps(content))
    recipe = with_prompts(tmp_path, base, {"positive_prompts": ["a"]}, {"positive_prompts": ["?"]})
    with pytest.raises(InputError, match="cannot cut up a text"):
        streammerge.make_plan(recipe)


def test_equal_gates_and_other_vocabularies_are_warnings(trio: list[Path], tmp_path: Path) -> None:
    longer = shutil.copytree(trio[1], tmp_path / "longer")
    weights = read_weights(longer)
    longer_table = torch.cat([weights["model.embed_tokens.weight"], torch.zeros(2, 32, dtype=torch.bfloat16)])
    write_weights(longer, weights | {"model.embed_tokens.weight": longer_table})
    experts = [{"source_model": str(model), "positive_prompts": ["a b"]} for model in (longer, trio[2])]
    recipe = write(tmp_path / "r.yaml", trio[0], experts)
    warnings = streammerge.make_plan(recipe).warnings
    assert any("experts[1]: has the same gate as experts[0]" in warning for warning in warnings)
    assert any("has 302 rows in its embedding, and the base 300" in warning for warning in warnings)
    with pytest.raises(StreamMergeError, match="the same gate"):
        streammerge.make_plan(recipe, strict=True)
