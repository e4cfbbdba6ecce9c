"""A network run piece by piece says what plain transformers says, architecture by architecture, to the last bit."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from streammerge.base.errors import InputError, UserError
from streammerge.study.batches import Batch, TaskBatches, make_batches
from streammerge.study.network import Network
from tests.study.tiny import (
    ARCHITECTURES,
    LAYERS,
    PECULIAR,
    make_examples,
    make_model,
    make_task,
    make_tokenizer,
    plain_model,
    read_weights,
    write_weights,
)

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own

CPU = torch.device("cpu")
every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)
both_forms = pytest.mark.parametrize("shares", [True, False], ids=["shared prompts", "plain rows"])


@dataclass(frozen=True)
class Made:
    """A model on disk, the network of it, and what plain transformers makes of it."""

    path: Path
    network: Network
    plain: Any
    weights: dict[str, Tensor]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Made]:
    folder = tmp_path_factory.mktemp("models")
    return {name: made(make_model(folder / name, name)) for name in ARCHITECTURES}


def made(path: Path) -> Made:
    return Made(path, Network(path, CPU), plain_model(path), read_weights(path))


def batches_of(*, shares: bool) -> TaskBatches:
    task = make_task("t", make_examples(16, seed=2))
    return make_batches(task, task.dev, make_tokenizer(), shares_prompts=shares, longest=128)


def put_unit(one: Made, unit: int) -> None:
    """The weights of one unit, and no others."""
    one.network.take_out()
    units = one.network.units_of(one.weights)
    tensors = {name: tensor for name, tensor in one.weights.items() if unit in units[name]}
    one.network.put(one.network.parameters_of(tensors))


def run(one: Made, batches: TaskBatches) -> Iterator[tuple[Batch, Tensor]]:
    """Every batch, and its hidden states after the last block. The weights of the back are in."""
    network = one.network
    put_unit(one, 0)
    hidden = [network.call(batch, 0)[0] for batch in batches.batches]
    for block in range(LAYERS):
        put_unit(one, block + 1)
        for i, batch in enumerate(batches.batches):
            hidden[i] = network.run_block(block, hidden[i], network.call(batch, block)[1])
    put_unit(one, network.num_units - 1)
    yield from zip(batches.batches, hidden, strict=True)


def plain_logits(one: Made, batch: Batch) -> Tensor:
    """(positions, vocabulary) of the model as it is, given the same arguments."""
    logits: Tensor = one.plain(**one.network.arguments(batch), use_cache=False).logits
    return logits.flatten(0, 1)


def choice_scores(one: Made, batches: TaskBatches) -> dict[tuple[int, int], float]:
    """The log-probability of every choice of every example."""
    scores = {}
    with torch.inference_mode():
        for batch, hidden in run(one, batches):
            log_probs = one.network.logits(hidden.flatten(0, 1)).log_softmax(-1)
            for scored in batch.scored:
                value = log_probs[list(scored.rows), list(scored.targets)].sum().item()
                scores[scored.example, scored.choice] = value
    return scores


def assert_says_the_same(one: Made, *, shares: bool) -> None:
    with torch.inference_mode():
        for batch, hidden in run(one, batches_of(shares=shares)):
            expected, rows = plain_logits(one, batch), hidden.flatten(0, 1)
            assert torch.equal(one.network.logits(rows), expected)
            # The head at the wanted positions alone. A product of fewer rows may end with other last bits.
            wanted = torch.tensor(batch.wanted)
            torch.testing.assert_close(one.network.logits(rows[wanted]), expected[wanted], rtol=1e-5, atol=1e-5)


@every_architecture
@both_forms
def test_piece_by_piece_the_logits_are_those_of_plain_transformers(models: dict[str, Made], architecture: str,
                                                                   shares: bool) -> None:  # fmt: skip
    assert models[architecture].network.can_share_prompts
    assert_says_the_same(models[architecture], shares=shares)


@every_architecture
def test_choices_that_share_a_prompt_score_as_they_do_alone(models: dict[str, Made], architecture: str) -> None:
    shared, plain = (choice_scores(models[architecture], batches_of(shares=it)) for it in (True, False))
    assert shared.keys() == plain.keys()
    assert len(shared) == 16 * 3
    assert max(abs(shared[key] - plain[key]) for key in plain) < 1e-4
    # They are not all alike: a mask that hid everything would not be found out.
    assert max(shared.values()) - min(shared.values()) > 1


@every_architecture
def test_every_tensor_belongs_to_the_unit_that_needs_it(models: dict[str, Made], architecture: str) -> None:
    one = models[architecture]
    units = one.network.units_of(one.weights)
    assert one.network.num_units == LAYERS + 2
    assert set(units) == set(one.weights)
    for name, found in units.items():
        inside = [part for part in name.split(".") if part.isdigit()]
        if inside:
            assert found == (int(inside[0]) + 1,), name
        elif any(word in name for word in ("wpe", "embed_in")):
            assert found == (0,), name
        elif any(word in name for word in ("embed_tokens", "wte")):
            tied = one.plain.config.tie_word_embeddings
            assert found == ((0, LAYERS + 1) if tied else (0,)), name
        else:
            assert found == (LAYERS + 1,), name
    assert {unit for found in units.values() for unit in found} == set(range(LAYERS + 2))


@pytest.mark.parametrize("architecture", PECULIAR)
def test_networks_with_ways_of_their_own_say_what_they_say_in_plain_transformers(
    tmp_path: Path, architecture: str
) -> None:
    one = made(make_model(tmp_path / "model", architecture))
    assert_says_the_same(one, shares=False)
    # Where a model does not do as told by a mask, choices do not share a prompt.
    assert one.network.can_share_prompts == (architecture in ("falcon", "opt", "deepseek_v3"))
    if one.network.can_share_prompts:
        assert_says_the_same(one, shares=True)
        shared, plain = (choice_scores(one, batches_of(shares=it)) for it in (True, False))
        assert max(abs(shared[key] - plain[key]) for key in plain) < 1e-4


# Half of the prompts and choices are longer than this window, and rows of six choices longer than the other.
@pytest.mark.parametrize("architecture", ["mistral", "gemma2", "gemma3_text"])
def test_plain_rows_may_be_longer_than_the_window(tmp_path: Path, architecture: str) -> None:
    one = made(make_model(tmp_path / "model", architecture, sliding_window=6))
    assert_says_the_same(one, shares=False)


@pytest.mark.parametrize("architecture", ["mistral", "gemma2", "gemma3_text"])
def test_choices_share_a_prompt_in_a_row_longer_than_the_window(tmp_path: Path, architecture: str) -> None:
    one = made(make_model(tmp_path / "model", architecture, sliding_window=16))
    task = make_task("t", make_examples(8, seed=4, choices=6))
    forms = [make_batches(task, task.dev, make_tokenizer(), shares_prompts=it, longest=16) for it in (True, False)]
    assert forms[0].batches[0].ids.shape[1] > 24
    shared, plain = (choice_scores(one, batches) for batches in forms)
    assert max(abs(shared[key] - plain[key]) for key in plain) < 1e-4


def test_tied_embeddings_are_both_ends_of_the_network(tmp_path: Path) -> None:
    for tied in (True, False):
        one = made(make_model(tmp_path / f"{tied}", "llama", tie_word_embeddings=tied))
        assert ("lm_head.weight" in one.weights) != tied
        assert_says_the_same(one, shares=True)


def test_a_tied_head_that_is_stored_as_well_is_not_used(tmp_path: Path) -> None:
    path = make_model(tmp_path / "model", "llama", tie_word_embeddings=True)
    weights = read_weights(path)
    write_weights(path, {**weights, "lm_head.weight": weights["model.embed_tokens.weight"].clone()})
    one = made(path)
    assert one.network.units_of(one.weights)["lm_head.weight"] == ()
    assert_says_the_same(one, shares=True)


def test_names_without_the_prefix_of_the_base_model_will_do(tmp_path: Path) -> None:
    # As the first GPT-2 on the Hub is.
    path = make_model(tmp_path / "model", "gpt2")
    write_weights(path, {name.removeprefix("transformer."): tensor for name, tensor in read_weights(path).items()})
    one = made(path)
    assert "h.0.ln_1.weight" in one.weights
    assert one.network.units_of(one.weights)["h.1.ln_1.weight"] == (2,)
    assert_says_the_same(one, shares=True)


def test_experts_are_counted_and_not_spelled(tmp_path: Path) -> None:
    # Expert 10 comes after expert 9, not after expert 1.
    one = made(make_model(tmp_path / "model", "mixtral", num_local_experts=12))
    assert any("experts.11." in name for name in one.weights)
    assert_says_the_same(one, shares=True)


def test_weights_in_bfloat16_are_run_in_float32(tmp_path: Path) -> None:
    one = made(make_model(tmp_path / "model", "qwen3", dtype=torch.bfloat16))
    assert {tensor.dtype for tensor in one.weights.values()} == {torch.bfloat16}
    assert_says_the_same(one, shares=True)


def test_biases_and_buffers_of_a_checkpoint_are_no_trouble(tmp_path: Path) -> None:
    path = make_model(tmp_path / "model", "llama", attention_bias=True, mlp_bias=True)
    weights = read_weights(path)
    # Old checkpoints hold the rotary frequencies of every block, which the model computes itself.
    stale = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(LAYERS)}
    write_weights(path, weights | stale)
    one = made(path)
    assert all(one.network.units_of(one.weights)[name] == () for name in stale)
    assert_says_the_same(one, shares=True)


def test_a_twin_is_another_network_of_the_kind(models: dict[str, Made]) -> None:
    one = models["llama"]
    (batch, hidden), *_ = run(one, batches_of(shares=True))
    twin = one.network.twin()
    rows = hidden.flatten(0, 1)
    back = {name: tensor for name, tensor in one.weights.items() if one.network.units_of(one.weights)[name] == (4,)}
    with torch.inference_mode():
        twin.put(twin.parameters_of({name: tensor * 2 for name, tensor in back.items()}))
        assert torch.equal(one.network.logits(rows), plain_logits(one, batch))
        assert not torch.equal(twin.logits(rows), one.network.logits(rows))


def test_a_network_knows_its_context_and_its_window(models: dict[str, Made]) -> None:
    assert models["llama"].network.longest == models["gpt2"].network.longest == 128
    assert models["llama"].network.window is None
    assert models["mistral"].network.window == 64
    assert models["gpt2"].network.width == 32


# --- what cannot be run ----------------------------------------------------------------------------------------------


def test_an_encoder_is_refused(tmp_path: Path) -> None:
    from transformers import BertConfig, BertForMaskedLM

    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertForMaskedLM(BertConfig(vocab_size=50, **size)).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"BertForMaskedLM; models are run as causal language models only .*Encoders"):
        Network(tmp_path, CPU)


def test_a_model_that_is_no_causal_language_model_is_refused(tmp_path: Path) -> None:
    from transformers import T5Config

    T5Config(vocab_size=50, d_model=16, num_layers=1).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="cannot be run as a causal language model"):
        Network(tmp_path, CPU)


def test_another_head_of_a_causal_architecture_is_refused(tmp_path: Path) -> None:
    path = make_model(tmp_path / "model", "llama")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"architectures": ["LlamaForSequenceClassification"]}))
    with pytest.raises(UserError, match="is a LlamaForSequenceClassification"):
        Network(path, CPU)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "holds no config.json"),
        ("{", "holds no config.json that transformers reads"),
        ("[]", "Should have a `model_type` key in its config.json"),
        ("{}", "Should have a `model_type` key in its config.json"),
        ('{"model_type": "unheard-of"}', "cannot be run as a causal language model"),
        ('{"model_type": "llama", "hidden_size": "wide"}', "Validation error for field 'hidden_size'"),
    ],
    ids=["missing", "no JSON", "a list", "empty", "unknown", "a size that is text"],
)
def test_a_configuration_that_cannot_be_read_is_told(tmp_path: Path, content: str | None, expected: str) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises((UserError, InputError), match=expected) as caught:
        Network(tmp_path, CPU)
    assert str(tmp_path) in str(caught.value)


def test_blocks_that_are_not_found_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import LlamaModel

    path = make_model(tmp_path / "model", "llama")
    built = LlamaModel.__init__

    def with_another_depth(self: Any, config: Any) -> None:
        built(self, config)
        config.num_hidden_layers = LAYERS + 1

    monkeypatch.setattr(LlamaModel, "__init__", with_another_depth)
    with pytest.raises(UserError) as caught:
        Network(path, CPU)
    assert f"the blocks of LlamaForCausalLM are not found: expected one ModuleList of {LAYERS + 1}" in str(caught.value)
    assert f"found model.layers ({LAYERS})" in str(caught.value)


def refusal(path: Path, config: Any, architecture: str) -> str:
    """Why the network of a configuration is refused."""
    config.architectures = [architecture]
    config.save_pretrained(path)
    with pytest.raises(UserError) as caught:
        Network(path, CPU)
    return str(caught.value)


def test_blocks_that_need_more_than_hidden_states_are_told(tmp_path: Path) -> None:
    from transformers import RwkvConfig, Zamba2Config

    # The one hands a state from block to block, the other the embeddings to blocks further on.
    rwkv = RwkvConfig(vocab_size=50, hidden_size=16, num_hidden_layers=3, attention_hidden_size=16)
    zamba = Zamba2Config(
        vocab_size=50, hidden_size=32, num_hidden_layers=3, layer_types=["mamba", "hybrid", "mamba"],
        num_attention_heads=4, intermediate_size=32, n_mamba_heads=8, mamba_headdim=8, num_mem_blocks=1,
    )  # fmt: skip
    for name, config in (("RwkvForCausalLM", rwkv), ("Zamba2ForCausalLM", zamba)):
        text = refusal(tmp_path / name, config, name)
        assert f"the blocks of {name} hand each other more than hidden states" in text


def test_parameters_that_a_checkpoint_lacks_are_told(models: dict[str, Made]) -> None:
    one = models["llama"]
    names = [name for name in one.weights if "layers.1.mlp" not in name and "q_proj" not in name]
    with pytest.raises(UserError) as caught:
        one.network.units_of(names)
    assert str(caught.value) == (
        "LlamaForCausalLM needs model.layers.0.self_attn.q_proj.weight, model.layers.1.self_attn.q_proj.weight, "
        "model.layers.1.mlp.gate_proj.weight and 3 more, which the checkpoint does not hold."
    )


@pytest.mark.parametrize("lacking", ["experts.2.w1", "experts.2."], ids=["a matrix of an expert", "an expert"])
def test_a_parameter_that_is_made_of_several_tensors_needs_them_all(models: dict[str, Made], lacking: str) -> None:
    one = models["mixtral"]
    here = {name: tensor for name, tensor in one.weights.items() if "layers.1." in name and lacking not in name}
    with pytest.raises(UserError, match=r"MixtralForCausalLM needs model\.layers\.1\.mlp\.experts.* does it lack some"):
        one.network.parameters_of(here)


def test_no_file_is_read_but_the_configuration(tmp_path: Path) -> None:
    path = make_model(tmp_path / "model", "llama")
    os.remove(path / "model.safetensors")  # noqa: PTH107
    assert Network(path, CPU).num_units == LAYERS + 2
