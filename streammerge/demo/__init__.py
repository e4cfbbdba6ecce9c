"""The demo: tiny trained models that ship with the package, merged by several methods (README.md beside this file)."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parent
PROMPTS = {
    "language": "the otter lives in the",
    "translate": "in vel: the old mouse sees the young otter =",
    "sort": "from small to large: mouse lynx hare frog =",
}
_SPECIALISTS = ("translate", "sort")


@dataclass(frozen=True)
class Demo:
    """A directory with the demo's models and the recipes over them, by method; `hi_merging` is still to be analysed.

    `tasks` is the file that lists the questions: dev for the analysis, test for the scores.
    """

    directory: Path
    models: dict[str, Path]
    recipes: dict[str, Path]
    hi_merging: Path
    tasks: Path


def unpack(directory: Path) -> Demo:
    """Copy the models to `directory` and write the recipes beside them. Files of an earlier demo are replaced."""
    names = ("base", *_SPECIALISTS)
    for name in names:
        shutil.copytree(FOLDER / "models" / name, directory / "models" / name, dirs_exist_ok=True)
    recipes = {
        "linear": _recipe("linear", None, "weight: 0.5"),
        "task_arithmetic": _recipe("task_arithmetic", "base", "weight: 1.0"),
        "ties": _recipe("ties", "base", "weight: 1.0, density: 0.5"),
        "dare_ties": _recipe("dare_ties", "base", "weight: 1.0, density: 0.7"),
    }
    shutil.copytree(FOLDER / "tasks", directory / "tasks", dirs_exist_ok=True)
    tasks, hi_merging = directory / "tasks.yaml", directory / "hi_merging.yaml"
    tasks.write_text("".join(f"- {_task(name)}\n" for name in _SPECIALISTS))
    entries = "".join(f"  - {_task(name)}\n" for name in _SPECIALISTS)
    # A coarser grid than the default, to be quick.
    grid = "analysis: {densities: [0.2, 0.4, 0.6, 0.8, 1.0], scales: [0.2, 0.4, 0.6, 0.8, 1.0]}\n"
    hi_merging.write_text(_recipe("hi_merging", "base", None) + f"tasks:\n{entries}{grid}")
    paths = {}
    for method, text in recipes.items():
        paths[method] = directory / f"{method}.yaml"
        paths[method].write_text(text)
    return Demo(directory, {name: directory / "models" / name for name in names}, paths, hi_merging, tasks)


def _task(name: str) -> str:
    files = f"dev: tasks/{name}.dev.jsonl, test: tasks/{name}.test.jsonl"
    return f"{{name: {name}, model: models/{name}, {files}}}"


def _recipe(method: str, base: str | None, parameters: str | None) -> str:
    lines = [f"merge_method: {method}"]
    if base is not None:
        lines.append(f"base_model: models/{base}")
    lines.append("models:")
    for name in _SPECIALISTS:
        lines.append(f"  - model: models/{name}")
        if parameters is not None:
            lines.append(f"    parameters: {{{parameters}}}")
    return "\n".join([*lines, "dtype: bfloat16", ""])
