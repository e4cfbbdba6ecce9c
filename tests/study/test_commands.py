"""The commands analyze, eval, plan and merge over recipes with tasks, as a user types them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from streammerge.demo import Demo
from streammerge.plan.recipe import load_recipe
from tests.command import streammerge
from tests.models import read_tensors
from tests.study.beds import small_demo


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    return small_demo(tmp_path_factory.mktemp("demo"))


@pytest.fixture(scope="module")
def better(demo: Demo) -> Path:
    """The recipe that `analyze` writes."""
    out = demo.directory / "better.yaml"
    done = streammerge("analyze", demo.hi_merging, "-o", out, "--threads", "2")
    assert done.code == 0, done.err
    assert "verdict" in done.out
    assert "γ" in done.out
    return out


def test_analyze_writes_a_recipe_without_tasks_and_a_report(better: Path) -> None:
    recipe = load_recipe(better)
    assert recipe.method.name == "hi_merging"
    assert not recipe.is_analysed
    work = better.with_name("better.yaml.analysis")
    assert {"report.html", "analysis.json", "scores.jsonl"} <= {path.name for path in work.iterdir()}
    facts = json.loads((work / "analysis.json").read_text())
    assert [layer["name"] for layer in facts["layers"]] == [f"model.layers.{i}" for i in range(6)]
    assert {row["split"] for row in facts["table"]} == {"dev", "test"}


def test_the_decided_recipe_merges_without_data(better: Path, tmp_path: Path) -> None:
    done = streammerge(better, tmp_path / "out", "--compile", "off", cwd=better.parent)
    assert done.code == 0, done.err


def test_a_merge_with_tasks_analyses_first_and_writes_the_same_tensors(
    demo: Demo, better: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    done = streammerge(demo.hi_merging, out, "--compile", "off")
    assert done.code == 0, done.err
    assert (tmp_path / "out.analysis" / "report.html").exists()
    streammerge(better, tmp_path / "again", "--compile", "off", cwd=better.parent)
    assert read_tensors(out) == read_tensors(tmp_path / "again")
    # Everything is known by now: neither analysed nor merged again.
    again = streammerge(demo.hi_merging, out, "--compile", "off")
    assert again.code == 0, again.err
    assert "nothing was done" in again.out


def test_an_occupied_out_is_refused_before_the_analysis(demo: Demo, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    done = streammerge(demo.hi_merging, tmp_path / "out")
    assert done.code == 2
    assert "thesis.txt" in done.err
    assert not (tmp_path / "out.analysis").exists()


def test_eval_scores_recipes_and_checkpoints_alike(demo: Demo, better: Path) -> None:
    done = streammerge("eval", demo.models["base"], demo.recipes["ties"], better, "--tasks", demo.tasks, "--json",
                       cwd=demo.directory)  # fmt: skip
    assert done.code == 0, done.err
    facts = done.events[-1]
    assert [row["name"] for row in facts["table"]] == ["base", "ties", "better"]
    assert all(0 <= row["tasks"]["sort"]["accuracy"]["value"] <= 1 for row in facts["table"])
    # Front, six blocks and back, of the base and two specialists, each read once.
    assert facts["cost"]["unit_loads"] == 8 * 3
    assert facts["cost"]["waves"] == 1


def test_plan_says_what_the_analysis_takes(demo: Demo) -> None:
    done = streammerge("plan", demo.hi_merging)
    assert done.code == 0, done.err
    assert "54 scores of unwritten models" in done.err
    assert "digest" in done.out


def test_too_little_memory_is_refused_with_a_budget_that_would_do(demo: Demo) -> None:
    done = streammerge("eval", demo.models["base"], "--tasks", demo.tasks, "--max-memory", "300MB")
    assert done.code == 3
    assert "Allow" in done.err


def test_eval_refuses_a_recipe_that_is_not_analysed_yet(demo: Demo) -> None:
    done = streammerge("eval", demo.hi_merging, "--tasks", demo.tasks)
    assert done.code == 2
    assert "streammerge analyze" in done.err


def test_every_bad_line_is_named_before_anything_runs(demo: Demo, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a", "choices": [" b"], "answer": 0}\nno json\n{"prompt": 3}\n')
    (tmp_path / "tasks.yaml").write_text("- {name: t, dev: bad.jsonl}\n")
    done = streammerge("eval", demo.models["base"], "--tasks", tmp_path / "tasks.yaml")
    assert done.code == 2
    for number in (1, 2, 3):
        assert f"line {number}:" in done.err


def test_the_proxy_says_that_it_is_one(demo: Demo, tmp_path: Path) -> None:
    content = yaml.safe_load(demo.hi_merging.read_text())
    del content["tasks"]
    recipe = demo.directory / "proxy.yaml"
    recipe.write_text(yaml.safe_dump({**content, "proxy": "weights"}))
    done = streammerge("analyze", recipe, "-o", tmp_path / "new.yaml")
    assert done.code == 0, done.err
    assert "proxy" in done.out
    assert "proxy" in (tmp_path / "new.yaml").read_text()
    assert "no data confirmed" in (tmp_path / "new.yaml.analysis" / "report.html").read_text()


def test_a_recipe_of_more_layers_is_not_scored_as_if_it_had_fewer(demo: Demo, tmp_path: Path) -> None:
    base = str(demo.models["base"])
    recipe = tmp_path / "tall.yaml"
    slices = [{"sources": [{"model": base, "layer_range": layers}]} for layers in ([0, 4], [2, 6])]
    recipe.write_text(yaml.safe_dump({"merge_method": "passthrough", "slices": slices}))
    done = streammerge("eval", recipe, "--tasks", demo.tasks)
    assert done.code == 2
    assert "model.layers.6." in done.err
    assert "is of a layer beyond the 6 of" in done.err
    assert streammerge(recipe, tmp_path / "tall").code == 0
    assert streammerge("eval", tmp_path / "tall", "--tasks", demo.tasks).code == 0
