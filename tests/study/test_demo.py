"""The demo's merges are models that plain transformers loads and that still speak their toy language."""

from __future__ import annotations

from pathlib import Path

import pytest

import streammerge
from streammerge.demo import PROMPTS, unpack
from streammerge.study.completion import complete


@pytest.mark.filterwarnings("ignore")  # transformers' own, of which none is about the merge
@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "ties", "dare_ties"])
def test_a_merge_of_the_demo_models_still_speaks(tmp_path: Path, method: str) -> None:
    demo = unpack(tmp_path / "demo")
    streammerge.merge(demo.recipes[method], tmp_path / "out", compile="off")
    assert complete(tmp_path / "out", [PROMPTS["language"]]) == [" river and eats fish."]


def test_the_specialists_know_their_tasks(tmp_path: Path) -> None:
    demo = unpack(tmp_path)
    assert complete(demo.models["translate"], [PROMPTS["translate"]]) == [" nimo olu sulati yeni vesi"]
    assert complete(demo.models["sort"], [PROMPTS["sort"]]) == [" mouse frog hare lynx"]
