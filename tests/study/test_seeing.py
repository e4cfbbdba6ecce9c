"""Models that see, asked about texts: run piece by piece, scored, analysed, also with a text model in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

import streammerge
from streammerge.plan.recipe import load_recipe
from streammerge.study.network import Network
from tests.run.seeing import KINDS, LAYERS, loaded, make_seeing, make_text, put, weights
from tests.study.test_network import CPU, Made, assert_says_the_same, batches_of, choice_scores
from tests.study.tiny import VOCABULARY, make_examples, make_tokenizer, write_lines

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own
NAMES = KINDS["llava"].names


def with_tokenizer(path: Path) -> Path:
    make_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llava")
    return with_tokenizer(make_seeing(folder / "vlm", "llava", vocab_size=VOCABULARY))


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("llama")
    made = [make_text(folder / f"text{seed}", "llava", seed=seed, vocab_size=VOCABULARY) for seed in (1, 2)]
    return [with_tokenizer(path) for path in made]


def write_tasks(folder: Path) -> Path:
    lines = [{"prompt": e.prompt, "choices": list(e.choices), "answer": e.answer} for e in make_examples(6)]
    write_lines(folder / "dev.jsonl", *lines)
    (folder / "tasks.yaml").write_text("- {name: t, dev: dev.jsonl}\n")
    return folder / "tasks.yaml"


def write(path: Path, recipe: Any) -> Path:
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path


def scores(folder: Path, *recipes: Path) -> list[float]:
    rows = streammerge.evaluate(recipes, write_tasks(folder), compile="off", threads=1).rows
    return [row.p[0].value for row in rows]


@pytest.mark.parametrize("kind", KINDS)
def test_piece_by_piece_the_logits_are_those_of_plain_transformers(tmp_path: Path, kind: str) -> None:
    path = make_seeing(tmp_path / "vlm", kind, vocab_size=VOCABULARY)
    one = Made(path, Network(path, CPU), loaded(path), weights(path))
    for shares in (True, False):
        assert_says_the_same(one, shares=shares)
    shared, plain = (choice_scores(one, batches_of(shares=it)) for it in (True, False))
    assert max(abs(shared[key] - plain[key]) for key in plain) < 1e-4
    assert max(shared.values()) - min(shared.values()) > 1
    units = one.network.units_of(one.weights)
    for name, found in units.items():
        sees = name.startswith((KINDS[kind].begins, "multi_modal_projector."))
        assert (found == ()) == sees, name


def test_a_text_model_in_its_language_part_is_scored_as_what_is_written(
    tmp_path: Path, llava: Path, texts: list[Path]
) -> None:
    models = [{"model": str(llava)}, {"model": str(texts[0]), "names": NAMES}]
    recipe = write(tmp_path / "r.yaml", {"merge_method": "linear", "models": models, "parameters": {"weight": 0.5}})
    streammerge.merge(recipe, tmp_path / "out", compile="off")
    # Of the picture nothing is asked: the language part alone says the same.
    alone = with_tokenizer(make_text(tmp_path / "alone", "llava", vocab_size=VOCABULARY))
    begin = "language_model."
    part = {name: tensor for name, tensor in weights(tmp_path / "out").items() if name.startswith(begin)}
    put(alone, {name.removeprefix(begin): tensor for name, tensor in part.items()})
    unwritten, written = scores(tmp_path, recipe, tmp_path / "out")
    (text,) = scores(tmp_path, alone)
    assert unwritten == written
    assert text == pytest.approx(written, abs=1e-6)
    assert scores(tmp_path, llava) != [written]


@pytest.mark.parametrize("base_sees", [True, False])
def test_an_analysis_takes_the_layers_of_the_language_part_and_writes_the_names(
    tmp_path: Path, llava: Path, texts: list[Path], base_sees: bool
) -> None:
    named = [{"model": str(path), "names": NAMES} for path in texts]
    base, models = (llava, named) if base_sees else (texts[0], [named[0], {"model": str(llava)}, named[1]])
    write_tasks(tmp_path)
    asked = [model["model"] for model in models if model["model"] != str(base)]
    recipe = {
        "merge_method": "hi_merging", "base_model": str(base), "models": models,
        "tasks": [{"name": f"t{i}", "model": model, "dev": "dev.jsonl"} for i, model in enumerate(asked)],
        "parameters": {"density": 0.5, "scale": 0.5},
    }  # fmt: skip
    findings = streammerge.analyze(write(tmp_path / "r.yaml", recipe), tmp_path / "new.yaml", compile="off", threads=1)
    stack = "language_model.model.layers"
    assert [findings.groups[layer] for layer in findings.layers] == [f"{stack}.{i}" for i in range(LAYERS)]
    decided = load_recipe(tmp_path / "new.yaml", strict=True)
    assert decided.last.names == load_recipe(tmp_path / "r.yaml").last.names
    assert decided.last.donor == str(llava)
    streammerge.merge(tmp_path / "new.yaml", tmp_path / "out", compile="off", strict=True)
    assert loaded(tmp_path / "out").config.architectures == ["LlavaForConditionalGeneration"]
    result = next(row.p[0].value for row in findings.table if row.name == "Hi-Merging")
    assert scores(tmp_path, tmp_path / "out") == [pytest.approx(result, abs=1e-5)]
    (score,) = scores(tmp_path, llava if base_sees else texts[0])
    assert next(row.p[0].value for row in findings.table if row.name == "base") == pytest.approx(score, abs=1e-5)


def test_without_data_too(tmp_path: Path, llava: Path, texts: list[Path]) -> None:
    models = [{"model": str(path), "names": NAMES} for path in texts]
    recipe = {"merge_method": "hi_merging", "base_model": str(llava), "models": models, "proxy": "weights"}
    found = streammerge.analyze(write(tmp_path / "r.yaml", recipe), tmp_path / "new.yaml", compile="off", threads=1)
    assert len(found.clashes) == LAYERS
    streammerge.merge(tmp_path / "new.yaml", tmp_path / "out", compile="off", strict=True)
    before, merged = weights(llava), weights(tmp_path / "out")
    assert all((merged[name] == before[name]).all() for name in before if not name.startswith("language_model."))
