"""Merges of every kind of architecture that transformers has: found by names, compared by numbers, loaded and run."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

import streammerge
from streammerge.plan.names import embedding_of, head_of, stacks, vocabulary_of
from tests.models import write_recipe
from tests.run.architectures import ARCHITECTURES, IMAGE, VOCABULARY, Architecture, page

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "architectures.md"
WEIGHT = 0.6
DENSITY = 0.5
OF_EVERY_KIND = {each.kind: each for each in reversed(ARCHITECTURES)}.values()


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    """Arithmetic in one order, and no threads that wait for each other over tiny matrices."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_base(folder: Path, architecture: Architecture) -> Path:
    """A model in float32 all of whose numbers are random, those of norms and biases too."""
    config = transformers.AutoConfig.for_model(architecture.name, **json.loads(json.dumps(architecture.config)))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, architecture.model).from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.02)
    model.save_pretrained(folder / "base")
    return folder / "base"


def make_models(folder: Path, architecture: Architecture) -> list[Path]:
    """A base and two fine-tunes of it."""
    base = make_base(folder, architecture)
    generator = torch.Generator().manual_seed(1)
    for name in ("a", "b"):
        shutil.copytree(base, folder / name)
        tuned = {
            each: tensor + 0.01 * torch.randn(tensor.shape, generator=generator)
            for each, tensor in tensors_of(base).items()
        }
        save_file(tuned, folder / name / "model.safetensors", metadata={"format": "pt"})
    return [base, folder / "a", folder / "b"]


def architecture_of(name: str) -> Architecture:
    return next(each for each in ARCHITECTURES if each.name == name)


def tensors_of(path: Path) -> dict[str, Tensor]:
    return load_file(path / "model.safetensors")


def load(path: Path, architecture: Architecture) -> tuple[Any, Mapping[str, Any]]:
    model, found = getattr(transformers, architecture.model).from_pretrained(
        path, output_loading_info=True, dtype=torch.float32
    )
    return model.eval(), found


def run(model: Any, architecture: Architecture) -> Tensor:
    """The numbers that a model makes of some tokens, and of an image or a sound where it takes them."""
    generator = torch.Generator().manual_seed(2)
    given: dict[str, Tensor] = {
        name: torch.randint(1, IMAGE, shape, generator=generator) if name.endswith("_ids")
        else torch.randn(shape, generator=generator)
        for name, shape in architecture.inputs.items()
    }  # fmt: skip
    if architecture.embedding is not None and "input_features" not in given:
        given["input_ids"] = torch.randint(1, IMAGE, (1, 8), generator=generator)
        given["input_ids"][0, 1 : 1 + architecture.image_tokens] = IMAGE
    if architecture.name == "qwen2_vl":
        given["image_grid_thw"] = torch.tensor([[1, 4, 4]])
        given["mm_token_type_ids"] = (given["input_ids"] == IMAGE).int()
    with torch.no_grad():
        made = model(**given)
    result: Tensor = made.logits if "logits" in made else made.logits_per_image
    return result


def by_hand(base: Mapping[str, Tensor], *others: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """base + Σ weight · (model − base), of whole tensors in float64."""
    return {
        name: sum((WEIGHT * (other[name].double() - tensor.double()) for other in others), tensor.double())
        if tensor.is_floating_point() else tensor
        for name, tensor in base.items()
    }  # fmt: skip


def ties_by_hand(base: Mapping[str, Tensor], *others: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each delta's largest entries; of those that agree with the sign of their sum, the mean."""
    merged = {}
    for name, tensor in base.items():
        kept = []
        for other in others:
            delta = (other[name].double() - tensor.double()).view(-1)
            keep = delta.abs().argsort(descending=True, stable=True)[: max(1, int(DENSITY * delta.numel()))]
            kept.append(torch.zeros_like(delta).index_copy(0, keep, delta[keep]) * WEIGHT)
        stacked = torch.stack(kept)
        agree = stacked.sign() == stacked.sum(0).sign()
        weights = (agree & (stacked != 0)).double().sum(0) * WEIGHT
        change = (stacked * agree).sum(0) / weights.clamp(min=WEIGHT)
        merged[name] = tensor.double() + change.view(tensor.shape)
    return merged


def check(merged: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    assert list(merged) == list(wanted)
    for name, tensor in wanted.items():
        assert merged[name].dtype == torch.float32
        error = (merged[name].double() - tensor).abs().max()
        assert error <= 1e-6 * max(1.0, float(tensor.abs().max())), name


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda each: each.name)
def test_a_merge_is_that_by_hand_and_loads_and_runs(tmp_path: Path, architecture: Architecture) -> None:
    models = make_models(tmp_path, architecture)
    own = [tensors_of(path) for path in models]
    recipe = write_recipe(tmp_path / "r.yaml", "task_arithmetic", models[1:], base=models[0],
                          per_model={"weight": WEIGHT})  # fmt: skip
    notes: list[str] = []
    streammerge.merge(recipe, tmp_path / "out", compile="off", threads=1, note=notes.append)
    assert notes == []
    check(tensors_of(tmp_path / "out"), by_hand(*own))
    loaded, found = load(tmp_path / "out", architecture)
    assert not any(found[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), found
    # The same merge of what transformers has in memory, where names and layouts may be others.
    hand, *others = (load(path, architecture)[0] for path in models)
    hand.load_state_dict(by_hand(hand.state_dict(), *(other.state_dict() for other in others)))
    result = run(loaded, architecture)
    assert result.isfinite().all()
    assert result.any()
    assert torch.allclose(result, run(hand, architecture), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(result, run(others[0], architecture), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda each: each.name)
def test_layers_embedding_and_head_are_found(tmp_path: Path, architecture: Architecture) -> None:
    base = make_base(tmp_path, architecture)
    own = tensors_of(base)
    assert stacks(own) == architecture.stacks
    assert (embedding_of(own), head_of(own)) == (architecture.embedding, architecture.head)
    tables = vocabulary_of({name: tuple(tensor.shape) for name, tensor in own.items()}) or {None: 0}
    assert next(iter(tables)) == architecture.embedding
    assert architecture.head is None or architecture.head in tables
    # And what transformers says of it.
    model, _ = load(base, architecture)
    if architecture.name in ("clip", "vit"):
        return  # it does not say
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert embedding is not None
    assert embedding.weight.shape[0] >= VOCABULARY
    assert architecture.embedding is not None
    assert torch.equal(embedding.weight, own[architecture.embedding])
    assert torch.equal(head.weight, own[architecture.head or architecture.embedding])
    plan = streammerge.make_plan(write_recipe(tmp_path / "r.yaml", "linear", [base], per_model={"weight": 1}))
    assert plan.tied == (head.weight is embedding.weight)


@pytest.mark.parametrize("architecture", OF_EVERY_KIND, ids=lambda each: each.name)
def test_ties_is_that_by_hand_for_every_kind(tmp_path: Path, architecture: Architecture) -> None:
    models = make_models(tmp_path, architecture)
    recipe = write_recipe(tmp_path / "r.yaml", "ties", models[1:], base=models[0],
                          per_model={"weight": WEIGHT, "density": DENSITY})  # fmt: skip
    streammerge.merge(recipe, tmp_path / "out", compile="off", threads=1)
    check(tensors_of(tmp_path / "out"), ties_by_hand(*(tensors_of(path) for path in models)))


def test_there_is_one_of_every_kind_and_the_page_lists_them() -> None:
    """`python -m tests.run.test_architectures` writes the page."""
    assert len(ARCHITECTURES) >= 40
    assert len(OF_EVERY_KIND) == 6
    pinned = re.search(r"^transformers==(.+)$", (ROOT / "scripts" / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned is not None
    assert PAGE.read_text() == page(pinned[1])


if __name__ == "__main__":
    PAGE.write_text(page(transformers.__version__))
