"""Adapters in analyses: folded in they score, and are decided about, as the models they are when written in float32."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

import streammerge
from streammerge.study.analysis import ProxyFindings
from streammerge.study.findings import Findings, Row
from tests.models import write_recipe
from tests.run.test_adapters import write_adapter
from tests.study.tiny import make_examples, make_model, read_weights, write_lines

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own


@dataclass(frozen=True)
class Bed:
    """A base, two adapters as references and as written models, and a file of tasks for each."""

    base: Path
    references: list[str]
    written: list[str]
    tasks: list[dict[str, str]]


@pytest.fixture(scope="module")
def bed(tmp_path_factory: pytest.TempPathFactory) -> Bed:
    folder = tmp_path_factory.mktemp("adapted")
    base = make_model(folder / "base")
    shapes = {
        name: (tensor.shape[0], tensor.shape[1])
        for name, tensor in read_weights(base).items()
        if "proj" in name or "embed" in name
    }
    references, written, tasks = [], [], []
    for seed in (1, 2):
        adapter = write_adapter(folder / f"adapter{seed}", shapes, seed=seed, lora_alpha=40, norms=seed == 2)
        references.append(f"{base}+{adapter}")
        recipe = write_recipe(folder / "w.yaml", "passthrough", references[-1:], dtype="float32")
        streammerge.merge(recipe, folder / f"written{seed}", compile="off")
        written.append(str(folder / f"written{seed}"))
        examples = make_examples(24, seed=seed)
        lines = [{"prompt": e.prompt, "choices": list(e.choices), "answer": e.answer} for e in examples]
        write_lines(folder / f"{seed}.jsonl", *lines)
        tasks.append({"name": f"task{seed}", "dev": str(folder / f"{seed}.jsonl")})
    return Bed(base, references, written, tasks)


def numbers(rows: Sequence[Row]) -> list[Any]:
    """Every score, and every resampled one."""
    return [[(p.value, p.draws.tolist()) for p in row.p] for row in rows]


def test_recipes_of_adapters_score_as_the_written_models(bed: Bed, tmp_path: Path) -> None:
    (tmp_path / "tasks.yaml").write_text(yaml.safe_dump(bed.tasks))
    found = []
    for number, models in enumerate((bed.references, bed.written)):
        folder = tmp_path / str(number)
        folder.mkdir()
        recipes = [write_recipe(folder / "one.yaml", "passthrough", models[:1], dtype="float32")]
        for method in ("ties", "della", "arcee_fusion"):
            chosen = models[:1] if method == "arcee_fusion" else models
            each = {} if method == "arcee_fusion" else {"weight": 0.7, "density": 0.4}
            recipes.append(write_recipe(folder / f"{method}.yaml", method, chosen, base=bed.base, dtype="float32",
                                        per_model=each))  # fmt: skip
        found.append(streammerge.evaluate(recipes, tmp_path / "tasks.yaml", compile="off", threads=1).rows)
    assert numbers(found[0]) == numbers(found[1])


def recipe_of(path: Path, bed: Bed, models: list[str], *, proxy: bool) -> Path:
    tasks = [{**task, "model": model} for task, model in zip(bed.tasks, models, strict=True)]
    about = {"proxy": "weights"} if proxy else {"tasks": tasks, "analysis": {"densities": [0.6, 1.0], "scales": [1.0]}}
    return write_recipe(path, "hi_merging", models, base=bed.base, dtype="float32", **about)


def test_an_analysis_decides_about_adapters_as_about_the_written_models(bed: Bed, tmp_path: Path) -> None:
    found: list[Findings] = []
    for name, models in (("folded", bed.references), ("written", bed.written)):
        recipe = recipe_of(tmp_path / f"{name}.yaml", bed, models, proxy=False)
        findings = streammerge.analyze(recipe, tmp_path / f"{name}.better.yaml", compile="off", threads=1)
        assert isinstance(findings, Findings)
        found.append(findings)
        streammerge.merge(tmp_path / f"{name}.better.yaml", tmp_path / name, compile="off")
    assert found[0].verdict == found[1].verdict
    assert numbers(found[0].table) == numbers(found[1].table)
    assert found[0].result == found[1].result
    outs = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("folded", "written")]
    assert outs[0] == outs[1]


def test_the_proxy_weighs_adapters_as_the_written_models(bed: Bed, tmp_path: Path) -> None:
    clashes = []
    for name, models in (("folded", bed.references), ("written", bed.written)):
        recipe = recipe_of(tmp_path / f"{name}.yaml", bed, models, proxy=True)
        findings = streammerge.analyze(recipe, tmp_path / f"{name}.better.yaml", compile="off", threads=1)
        assert isinstance(findings, ProxyFindings)
        clashes.append(findings.clashes)
    assert clashes[0] == clashes[1]
    assert any(clash.share > 0 for clash in clashes[0])
