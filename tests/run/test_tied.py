"""Models whose head is their embedding, through transformers: what is written is what the config says of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import streammerge
from streammerge.base.errors import UserError
from tests.models import write_recipe
from tests.run.test_adapters import write_adapter
from tests.study.tiny import (
    make_examples,
    make_model,
    make_specialist,
    plain_model,
    read_weights,
    write_lines,
    write_weights,
)

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own


def config_of(path: Path) -> Any:
    return json.loads((path / "config.json").read_text())


def merge(folder: Path, *models: Path) -> Path:
    recipe = write_recipe(folder / "r.yaml", "linear", models, per_model={"weight": 0.5})
    streammerge.merge(recipe, folder / "out", compile="off", threads=1)
    return folder / "out"


@pytest.fixture
def tied(tmp_path: Path) -> Path:
    return make_model(tmp_path / "tied", "llama", tie_word_embeddings=True)


@pytest.fixture
def untied(tmp_path: Path, tied: Path) -> Path:
    """The same model with a head of its own."""
    path = make_specialist(tmp_path / "untied", tied, seed=1)
    weights = read_weights(path)
    write_weights(path, {**weights, "lm_head.weight": torch.randn_like(weights["model.embed_tokens.weight"])})
    (path / "config.json").write_text(json.dumps({**config_of(path), "tie_word_embeddings": False}))
    return path


def test_a_tied_and_an_untied_model_make_an_untied_one_that_loads_as_it_is(
    tmp_path: Path, tied: Path, untied: Path
) -> None:
    out = merge(tmp_path, tied, untied)
    assert config_of(tied)["tie_word_embeddings"] is True
    assert config_of(out)["tie_word_embeddings"] is False
    head = (read_weights(tied)["model.embed_tokens.weight"] + read_weights(untied)["lm_head.weight"]) / 2
    model = plain_model(out)
    assert torch.allclose(model.lm_head.weight, head, atol=1e-7)
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)


def test_without_the_flag_a_donor_that_is_tied_by_its_kind_gets_it(tmp_path: Path, tied: Path, untied: Path) -> None:
    config = config_of(tied)
    del config["tie_word_embeddings"]
    (tied / "config.json").write_text(json.dumps(config))
    assert config_of(merge(tmp_path, tied, untied))["tie_word_embeddings"] is False


def test_tied_models_stay_tied_and_a_head_that_one_of_them_stores_is_the_embedding(tmp_path: Path, tied: Path) -> None:
    other = make_specialist(tmp_path / "other", tied, seed=2)
    weights = read_weights(other)
    write_weights(other, {**weights, "lm_head.weight": torch.zeros_like(weights["model.embed_tokens.weight"])})
    out = merge(tmp_path, tied, other)
    assert config_of(out)["tie_word_embeddings"] is True
    merged = load_file(out / "model.safetensors")
    assert torch.equal(merged["lm_head.weight"], merged["model.embed_tokens.weight"])
    model = plain_model(out)
    assert torch.equal(model.lm_head.weight, merged["model.embed_tokens.weight"])


def test_tied_models_without_a_head_make_one_without(tmp_path: Path, tied: Path) -> None:
    out = merge(tmp_path, tied, make_specialist(tmp_path / "other", tied, seed=2))
    assert "lm_head.weight" not in load_file(out / "model.safetensors")
    assert config_of(out) == config_of(tied)


def test_a_merge_of_tied_and_untied_is_not_scored_as_something_else(tmp_path: Path, tied: Path, untied: Path) -> None:
    lines = [{"prompt": e.prompt, "choices": list(e.choices), "answer": e.answer} for e in make_examples(3)]
    write_lines(tmp_path / "dev.jsonl", *lines)
    (tmp_path / "tasks.yaml").write_text("- {name: t, dev: dev.jsonl}\n")
    recipe = write_recipe(tmp_path / "r.yaml", "linear", [tied, untied], per_model={"weight": 0.5})
    with pytest.raises(UserError, match="can be written, but not scored yet"):
        streammerge.evaluate([recipe], tmp_path / "tasks.yaml", compile="off", threads=1)
    turned = write_recipe(tmp_path / "t.yaml", "linear", [untied, tied], per_model={"weight": 0.5})
    (row,) = streammerge.evaluate([turned], tmp_path / "tasks.yaml", compile="off", threads=1).rows
    streammerge.merge(turned, tmp_path / "written", compile="off")
    (written,) = streammerge.evaluate([tmp_path / "written"], tmp_path / "tasks.yaml", compile="off", threads=1).rows
    assert row.p[0].value == written.p[0].value


def test_an_analysis_needs_every_tensor_in_every_model(tmp_path: Path, untied: Path) -> None:
    one, two = (make_specialist(tmp_path / name, untied, seed=i) for i, name in enumerate("ab"))
    weights = read_weights(two)
    write_weights(two, {name: tensor for name, tensor in weights.items() if name != "model.norm.weight"})
    recipe = write_recipe(tmp_path / "r.yaml", "hi_merging", [one, two], base=untied, proxy="weights")
    with pytest.raises(UserError, match=r"tensor 'model\.norm\.weight' is not in .*/b\."):
        streammerge.analyze(recipe, tmp_path / "better.yaml", compile="off", threads=1)


@pytest.mark.parametrize("whole", [False, True])
def test_a_head_that_an_adapter_changes_is_not_thrown_away(tmp_path: Path, tied: Path, whole: bool) -> None:
    weights = read_weights(tied)
    embedding = weights["model.embed_tokens.weight"]
    write_weights(tied, {**weights, "lm_head.weight": embedding.clone()})
    shape = (embedding.shape[0], embedding.shape[1])
    lora = write_adapter(tmp_path / "lora", {"lm_head.weight": shape}, saved="lm_head.weight" if whole else "")
    recipe = write_recipe(tmp_path / "r.yaml", "passthrough", [f"{tied}+{lora}"])
    streammerge.merge(recipe, tmp_path / "out", compile="off")
    model = plain_model(tmp_path / "out")
    assert not torch.equal(model.lm_head.weight, embedding)
    assert torch.equal(model.model.embed_tokens.weight, embedding)
    assert config_of(tmp_path / "out")["tie_word_embeddings"] is False
