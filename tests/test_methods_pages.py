"""What is written from the methods: `streammerge methods`, docs/methods.md, and the schema for editors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from streammerge.methods import METHODS
from streammerge.methods_report import methods_page
from streammerge.plan.schema import recipe_schema
from tests.command import streammerge

DOCS = Path(__file__).resolve().parents[1] / "docs"
RECIPE = """
merge_method: ties
base_model: a
models:
  - model: a
  - model: {model: {path: b}}
    parameters: {weight: [0.1, 1e-5], density: [{filter: mlp, value: [0.1, 0.9]}, {value: 0.5}]}
parameters: {normalize: true, lambda: 1.5}
dtype: bfloat16
chat_template: chatml
tokenizer:
  pad_to_multiple_of: 8
  tokens:
    <|x|>: {source: {kind: model_token, model: a, token_id: 3}}
    <|y|>: {source: {kind: zero}, force: true}
    <|z|>: {source: {model: {path: a}}}
    <|w|>: {source: a}
"""
EXPERTS = """\
base_model: c
gate_mode: random
experts_per_token: 1
experts:
  - {source_model: a, noise_scale: 0.01}
  - {source_model: {model: b}, positive_prompts: [x], residual_scale: 0.5}
"""


def test_the_page_of_the_methods_is_current() -> None:
    assert (DOCS / "methods.md").read_text() == methods_page(), "run: streammerge methods --markdown > docs/methods.md"


def test_the_schema_in_the_docs_is_current() -> None:
    written = json.loads((DOCS / "recipe.schema.json").read_text())
    assert written == recipe_schema(), "run: streammerge schema > docs/recipe.schema.json"


def test_every_method_says_what_it_is_with_its_source_and_its_parameters() -> None:
    for name, method in METHODS.items():
        assert len(method.doc.split()) >= 15, name
        assert all(param.meaning for param in method.params), name


def problems(recipe: str) -> list[str]:
    schema = recipe_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    found = jsonschema.Draft202012Validator(schema).iter_errors(yaml.safe_load(recipe))
    return [error.json_path for error in found]


def test_the_schema_takes_a_sound_recipe() -> None:
    assert problems(RECIPE) == []
    assert problems("merge_method: passthrough\nslices:\n- sources: [{model: a, layer_range: [0, 8]}]\n") == []
    assert problems(EXPERTS) == []


@pytest.mark.parametrize(
    ("old", "new", "place"),
    [
        ("ties", "tise", "$.merge_method"),
        ("bfloat16", "bf16", "$.dtype"),
        ("lambda: 1.5", "lambda: much", "$.parameters.lambda"),
        ("normalize: true", "normalize: 7", "$.parameters.normalize"),
        ("value: 0.5", "vale: 0.5", "$.models[1].parameters.density"),
        ("model: a\n  -", "modle: a\n  -", "$.models[0]"),
        ("token_id: 3", "token_id: -3", "$.tokenizer.tokens"),
        ("token_id: 3", "token_id: 3, token: x", "$.tokenizer.tokens"),
        (", token_id: 3", "", "$.tokenizer.tokens"),
        ("multiple_of: 8", "multiple_of: 0", "$.tokenizer.pad_to_multiple_of"),
    ],
)
def test_the_schema_finds_mistakes(old: str, new: str, place: str) -> None:
    assert any(found.startswith(place) for found in problems(RECIPE.replace(old, new)))


@pytest.mark.parametrize(
    ("old", "new", "place"),
    [
        ("random", "hidden", "$.gate_mode"),
        ("per_token: 1", "per_token: 0", "$.experts_per_token"),
        ("source_model: a", "model: a", "$.experts[0]"),
        ("base_model: c", "merge_method: linear", "$"),
    ],
)
def test_the_schema_finds_mistakes_in_recipes_of_experts(old: str, new: str, place: str) -> None:
    assert place in problems(EXPERTS.replace(old, new))


def test_the_command_lists_methods_and_shows_one() -> None:
    listed = streammerge("methods").out
    assert all(name in listed for name in METHODS)
    shown = streammerge("methods", "ties").out
    assert "elect a sign" in shown
    assert "density" in shown
    document: dict[str, Any] = json.loads(streammerge("methods", "slerp", "--json").out)
    assert document["slerp"]["parameters"][0]["name"] == "t"
    done = streammerge("methods", "tise")
    assert done.code == 2
    assert "Did you mean ties?" in done.err
