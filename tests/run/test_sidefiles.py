"""What lies beside the weights: copied files, config.json's dtype, the recipe as given, and the model card."""

from __future__ import annotations

import json
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import streammerge
from streammerge.api import make_plan as plan
from streammerge.base.errors import InputError, StreamMergeError
from streammerge.run.sidefiles import model_card, side_files
from tests.models import make_models, make_tensors, save_model, write_recipe

SHAPES = {"embed": (70, 8), "layers.0.w": (16, 8), "norm": (8,)}


def merge(recipe: Path, out: Path) -> Path:
    streammerge.merge(recipe, out, compile="off", threads=1)
    return out


@pytest.fixture
def models(tmp_path: Path) -> list[Path]:
    return make_models(tmp_path / "models", shapes=SHAPES)


@pytest.fixture
def recipe(tmp_path: Path, models: list[Path]) -> Path:
    return write_recipe(tmp_path / "r.yaml", "task_arithmetic", models[1:], base=models[0], per_model={"weight": 0.5})


def front_matter(card: str) -> dict[str, Any]:
    match = re.match(r"---\n(.*?\n)---\n", card, re.DOTALL)
    assert match is not None
    content = yaml.safe_load(match[1])
    assert isinstance(content, dict)
    return content


def card_of(recipe: Path) -> dict[str, Any]:
    return front_matter(model_card(plan(recipe)).decode())


def write_card(model: Path, front: str, *, newline: str = "\n") -> None:
    (model / "README.md").write_bytes(f"---\n{front}\n---\n# Model\n".replace("\n", newline).encode())


# Copied files.


def test_the_files_of_the_base_go_along_and_weights_do_not(recipe: Path, models: list[Path], tmp_path: Path) -> None:
    copied = {"tokenizer.json": b"{}", "tokenizer.model": b"\0\1", "chat_template.jinja": b"{{ x }}", "LICENSE": b"MIT",
              "generation_config.json": b"{}", "modeling_x.py": b"x = 1", "vocab.txt": b"a\r\nb"}  # fmt: skip
    left = {"pytorch_model.bin", "model.gguf", "x.pt", "model.onnx", ".gitattributes", "tf_model.h5", "old.partial",
            "x.bin.index.json", "streammerge.manifest.json", "mergekit_config.yml", "README.md"}  # fmt: skip
    for name, content in copied.items():
        (models[0] / name).write_bytes(content)
    for name in left:
        (models[0] / name).write_bytes(b"of the base")
    (models[0] / "folder").mkdir()
    (models[1] / "only_in_another.json").write_bytes(b"{}")
    out = merge(recipe, tmp_path / "out")
    assert {name: (out / name).read_bytes() for name in copied} == copied
    ours = {"config.json", "model.safetensors", "README.md", "mergekit_config.yml", "streammerge.manifest.json"}
    assert {path.name for path in out.iterdir()} == set(copied) | ours
    assert b"of the base" not in (out / "README.md").read_bytes()


def test_a_link_out_of_the_donors_directory_is_not_copied(recipe: Path, models: list[Path], tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("of this machine")
    (models[0] / "LICENSE").symlink_to(tmp_path / "secret")
    (models[0] / "tokenizer.json").write_text("{}")
    (models[0] / "NOTICE").symlink_to("tokenizer.json")
    notes: list[str] = []
    streammerge.merge(recipe, tmp_path / "out", compile="off", threads=1, note=notes.append)
    assert [note for note in notes if "LICENSE: is a link to" in note and "not copied" in note]
    assert not (tmp_path / "out" / "LICENSE").exists()
    assert (tmp_path / "out" / "NOTICE").read_text() == "{}"
    assert streammerge.verify(tmp_path / "out").problems == ()


def test_without_a_base_the_first_model_is_the_donor(models: list[Path], tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "l.yaml", "linear", models[1:], per_model={"weight": 0.5})
    (models[1] / "tokenizer.json").write_text("first")
    (models[2] / "tokenizer.json").write_text("second")
    assert (merge(recipe, tmp_path / "out") / "tokenizer.json").read_text() == "first"


def test_a_file_as_donor_brings_what_lies_beside_it_when_there_is_a_config(models: list[Path], tmp_path: Path) -> None:
    file = models[0] / "model.safetensors"
    recipe = write_recipe(tmp_path / "l.yaml", "linear", [file], per_model={"weight": 1})
    assert list(side_files(plan(recipe))) == ["config.json", "mergekit_config.yml", "README.md"]
    (models[0] / "config.json").unlink()
    assert list(side_files(plan(recipe))) == ["mergekit_config.yml", "README.md"]


def test_the_recipe_is_kept_as_given(recipe: Path, tmp_path: Path) -> None:
    text = "# my recipe — ünïcode\n\n" + recipe.read_text() + "\n\n"
    recipe.write_text(text)
    assert (merge(recipe, tmp_path / "out") / "mergekit_config.yml").read_text() == text


# config.json.


def config(plan_recipe: Path, content: Any) -> Any:
    made = plan(plan_recipe)
    path = made.checkpoints[0].directory / "config.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return json.loads(side_files(made)[path.name])


@pytest.mark.parametrize(
    ("top", "expected"),
    [({}, "bfloat16"), ({"dtype": "float32"}, "float32"), ({"dtype": "float32", "out_dtype": "float16"}, "float16")],
    ids=["as the inputs", "dtype", "out_dtype"],
)
@pytest.mark.parametrize("key", ["torch_dtype", "dtype"])
def test_config_names_the_dtype_of_the_output(
    models: list[Path], tmp_path: Path, top: dict[str, str], expected: str, key: str
) -> None:
    recipe = write_recipe(tmp_path / "c.yaml", "linear", models[1:], per_model={"weight": 0.5}, **top)
    content = {"architectures": ["X"], key: "float64", "rope_theta": 1e6, "ä": "ö"}
    assert config(recipe, content) == content | {key: expected}


def test_a_config_without_a_dtype_gets_one(recipe: Path) -> None:
    assert config(recipe, {"a": 1}) == {"a": 1, "dtype": "bfloat16"}


def test_a_config_that_is_right_is_copied_byte_for_byte(recipe: Path, models: list[Path]) -> None:
    content = b'{ "torch_dtype" :"bfloat16",\n\n"x": 1.0e5 }'
    (models[0] / "config.json").write_bytes(content)
    assert side_files(plan(recipe))["config.json"] == content


def test_a_config_that_begins_with_a_byte_order_mark_is_read(recipe: Path, models: list[Path]) -> None:
    content = b'\xef\xbb\xbf{"torch_dtype": "bfloat16"}'
    (models[0] / "config.json").write_bytes(content)
    assert side_files(plan(recipe))["config.json"] == content
    (models[0] / "config.json").write_bytes(content.replace(b"bfloat16", b"float32"))
    assert json.loads(side_files(plan(recipe))["config.json"]) == {"torch_dtype": "bfloat16"}


def test_mixed_inputs_give_the_dtype_that_most_bytes_have(tmp_path: Path) -> None:
    a = save_model(tmp_path / "a", make_tensors(0, shapes=SHAPES))
    b = save_model(tmp_path / "b", make_tensors(1, shapes=SHAPES, dtype=torch.float16))
    recipe = write_recipe(tmp_path / "r.yaml", "linear", [a, b], per_model={"weight": 0.5})
    assert config(recipe, {"torch_dtype": "bfloat16"}) == {"torch_dtype": "float32"}


def test_integers_do_not_decide_the_dtype(tmp_path: Path) -> None:
    tensors = {"ids": torch.zeros(1000, dtype=torch.int64), "w": torch.zeros(3, dtype=torch.float16)}
    model = save_model(tmp_path / "a", tensors)
    recipe = write_recipe(tmp_path / "r.yaml", "passthrough", [model])
    assert config(recipe, {}) == {"dtype": "float16"}
    model = save_model(tmp_path / "b", {"ids": torch.zeros(10, dtype=torch.int64)})
    recipe = write_recipe(tmp_path / "r.yaml", "passthrough", [model])
    assert config(recipe, {"torch_dtype": "kept"}) == {"torch_dtype": "kept"}


@pytest.mark.parametrize("content", ["{", "[]", "null", '"x"', "\0"])
def test_a_config_that_is_no_json_object_is_refused_by_name(recipe: Path, content: str) -> None:
    with pytest.raises(InputError, match=r"base/config\.json: is not (a )?JSON"):
        config(recipe, content)


def test_a_config_that_cannot_be_used_is_refused_before_the_merge(
    recipe: Path, models: list[Path], tmp_path: Path
) -> None:
    # Principle 1: what cannot be planned fails at plan time, not after hours of merging.
    (models[0] / "config.json").write_text("{")
    with pytest.raises(InputError, match="is not JSON"):
        merge(recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_config_of_hostile_text_is_no_crash(recipe: Path, models: list[Path]) -> None:
    for content in ('{"a": "\\ud800", "dtype": "x"}', '{"a": ' + "[" * 100_000 + "]" * 100_000 + "}"):
        (models[0] / "config.json").write_text(content)
        with suppress(StreamMergeError):
            side_files(plan(recipe))


# The model card.


def test_the_card_has_front_matter_the_hub_reads(recipe: Path, models: list[Path], tmp_path: Path) -> None:
    card = (merge(recipe, tmp_path / "out") / "README.md").read_text()
    front = front_matter(card)
    assert front["library_name"] == "transformers"
    assert {"merge", "mergekit"} <= set(front["tags"])
    assert "license" not in front
    for role, model in zip(("base", "model", "model"), models, strict=True):
        assert f"| {role} | {model} | not stated |" in card
    assert recipe.read_text().rstrip() in card


def test_the_card_names_the_licence_that_all_inputs_share(recipe: Path, models: list[Path]) -> None:
    for model in models:
        write_card(model, "license: apache-2.0")
    assert card_of(recipe)["license"] == "apache-2.0"


def test_the_card_names_every_licence_when_they_differ(recipe: Path, models: list[Path]) -> None:
    for model, licence in zip(models, ["llama3", "mit", "apache-2.0"], strict=True):
        write_card(model, f"license: {licence}")
    card = model_card(plan(recipe)).decode()
    assert front_matter(card)["license"] == "other"
    for model, licence in zip(models, ["llama3", "mit", "apache-2.0"], strict=True):
        assert re.search(rf"\| {re.escape(str(model))} \| {licence} \|", card)
    assert "The licences of all inputs apply." in card


def test_a_licence_that_one_input_does_not_state_is_not_claimed(recipe: Path, models: list[Path]) -> None:
    write_card(models[0], "license: mit")
    write_card(models[1], "license: mit")
    card = model_card(plan(recipe)).decode()
    assert front_matter(card)["license"] == "other"
    assert card.count("not stated") == 1


def test_a_card_with_line_ends_of_windows_is_read(recipe: Path, models: list[Path]) -> None:
    for model in models:
        write_card(model, "license: mit", newline="\r\n")
    assert card_of(recipe)["license"] == "mit"


@pytest.mark.parametrize(
    "front",
    ["", "license: [", "license: [mit, gpl]", "- a", "license: 5", "x: !!python/object:os.system y", "[" * 1100],
)
def test_a_card_that_states_no_licence_is_no_trouble(recipe: Path, models: list[Path], front: str) -> None:
    for model in models:
        write_card(model, front)
    assert "license" not in card_of(recipe)


def test_a_card_with_a_date_that_does_not_exist_is_no_trouble(recipe: Path, models: list[Path], tmp_path: Path) -> None:
    # PyYAML raises a plain ValueError for it, and the card is made when all the work is done.
    write_card(models[1], "license: mit\ndate: 2024-02-30")
    merge(recipe, tmp_path / "out")


def test_names_of_any_kind_keep_the_front_matter_and_the_table_whole(tmp_path: Path) -> None:
    names = ["a: b", "- c", "pipe|in name", "ünï", "it's", '"quoted"', "#x", "{y}", "%z", "*star", "!tag"]
    paths = [save_model(tmp_path / name, make_tensors(i, shapes=SHAPES)) for i, name in enumerate(names)]
    recipe = write_recipe(tmp_path / "r.yaml", "linear", paths, per_model={"weight": 1.0})
    card = model_card(plan(recipe)).decode()
    assert front_matter(card)["library_name"] == "transformers"
    rows = [line for line in card.splitlines() if line.startswith("| model")]
    assert len(rows) == len(names)
    assert all(len(re.findall(r"(?<!\\)\|", row)) == 4 for row in rows)
