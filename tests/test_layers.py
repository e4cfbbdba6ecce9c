"""Imports go one way (design.md, section 2), and what is light stays light.

cli, ui, report, api → anything
cluster → study → run → plan → methods, kernels, storage → base;  methods → kernels → base
storage and kernels never meet
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "streammerge"
FILES = sorted(path for path in PACKAGE.rglob("*.py") if "__pycache__" not in path.parts)

# Every room of the house, with the rooms it may import from besides itself.
MAY_IMPORT: dict[str, set[str]] = {
    "base": set(),
    "demo": set(),
    "storage": {"base"},
    "kernels": {"base"},
    "methods": {"kernels", "base"},
    "plan": {"methods", "kernels", "storage", "base"},
    "run": {"plan", "methods", "kernels", "storage", "base"},
    "study": {"run", "plan", "methods", "kernels", "storage", "base"},
    "cluster": {"study", "run", "plan", "methods", "kernels", "storage", "base"},
}
# Modules of the front, which may import anything.
FRONT = {
    "__init__",
    "__main__",
    "analysis_page",
    "analysis_report",
    "api",
    "cli",
    "cluster_report",
    "cluster_verbs",
    "command",
    "difference_report",
    "extract_report",
    "extract_verb",
    "methods_report",
    "moe_verb",
    "report",
    "svg",
    "ui",
}

# Libraries that belong to certain rooms or files.
HOMES: dict[str, tuple[str, ...]] = {
    "rich": ("ui.py",),
    "typer": ("cli.py", "cluster_verbs.py", "command.py", "extract_verb.py", "moe_verb.py"),
    "click": ("cli.py",),
    "distributed": ("cluster/dask.py",),
    "dask_jobqueue": ("cluster/dask.py",),
    "transformers": ("study/", "plan/vocab.py"),
    "matplotlib": ("analysis_page.py",),
    "accelerate": ("study/", "run/team.py"),
}


def imported_modules(path: Path) -> Iterator[str]:
    """Dotted names of every module a file imports, wherever in it; `from a import b` gives `a` and `a.b`."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = list(path.relative_to(ROOT).with_suffix("").parts[: -node.level]) if node.level else []
            module = ".".join(package + ([node.module] if node.module else []))
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def name_of(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def rooms_imported(path: Path) -> set[str]:
    """The rooms of ours, or modules of the front, that a file imports from. The package's own version is no room."""
    parts = [module.split(".") for module in imported_modules(path)]
    ours = {part[1] for part in parts if part[0] == "streammerge" and len(part) > 1}
    return {name for name in ours if (PACKAGE / name).is_dir() or (PACKAGE / f"{name}.py").is_file()}


def test_every_file_is_in_a_room_of_the_house() -> None:
    strangers = [name_of(path) for path in FILES if room_of(path) not in MAY_IMPORT | dict.fromkeys(FRONT)]
    assert not strangers, f"no import rule for {strangers}: name the room in design.md and here"


@pytest.mark.parametrize("path", [path for path in FILES if room_of(path) in MAY_IMPORT], ids=name_of)
def test_a_room_imports_only_the_rooms_below_it(path: Path) -> None:
    room = room_of(path)
    assert rooms_imported(path) <= MAY_IMPORT[room] | {room}


def test_storage_and_kernels_never_meet() -> None:
    meeting = {"storage": {"kernels", "methods"}, "kernels": {"storage", "plan"}, "methods": {"storage", "plan"}}
    for path in FILES:
        assert not rooms_imported(path) & meeting.get(room_of(path), set()), name_of(path)


def test_base_imports_nothing_of_ours() -> None:
    for path in FILES:
        if room_of(path) == "base":
            assert rooms_imported(path) <= {"base"}, name_of(path)


@pytest.mark.parametrize("library", HOMES)
def test_a_library_stays_in_its_home(library: str) -> None:
    users = [name_of(path) for path in FILES if any(name.split(".")[0] == library for name in imported_modules(path))]
    assert [user for user in users if not user.startswith(HOMES[library])] == []


@pytest.mark.parametrize("room", ["storage", "base"])
def test_bytes_know_no_torch(room: str) -> None:
    for path in FILES:
        if room_of(path) == room:
            libraries = {name.split(".")[0] for name in imported_modules(path)}
            assert not libraries & {"torch", "numpy", "safetensors"}, name_of(path)


def test_the_import_reader_sees_every_kind_of_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    (tmp_path / "streammerge" / "run").mkdir(parents=True)
    file = tmp_path / "streammerge" / "run" / "x.py"
    file.write_text(
        "import rich.table as t\ndef f():\n    from torch import nn\nfrom . import y\nfrom ..plan.names import z\n"
    )
    assert set(imported_modules(file)) == {
        "rich.table", "torch", "torch.nn", "streammerge.run", "streammerge.run.y", "streammerge.plan.names",
        "streammerge.plan.names.z",
    }  # fmt: skip


def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    )


def test_importing_the_package_imports_nothing_heavy() -> None:
    heavy = "{'torch', 'numpy', 'yaml', 'pydantic', 'rich', 'typer', 'huggingface_hub', 'safetensors'}"
    done = run_python("-c", f"import sys, streammerge; print(sorted({heavy} & set(sys.modules)))")
    assert done.stdout.strip() == "[]"


def test_storage_works_without_torch() -> None:
    modules = [f"streammerge.storage.{path.stem}" for path in FILES if room_of(path) == "storage"]
    modules += [f"streammerge.base.{path.stem}" for path in FILES if room_of(path) == "base"]
    names = ", ".join(module.removesuffix(".__init__") for module in modules)
    done = run_python("-c", f"import sys, {names}; print('torch' in sys.modules, 'numpy' in sys.modules)")
    assert done.stdout.strip() == "False False"


@pytest.mark.parametrize("arguments", [["--help"], ["merge", "--help"], ["--version"]], ids=" ".join)
def test_help_never_imports_torch(arguments: list[str]) -> None:
    done = run_python("-X", "importtime", "-m", "streammerge", *arguments)
    imported = {line.rsplit("|", 1)[-1].strip().split(".")[0] for line in done.stderr.splitlines()}
    assert "streammerge" in imported
    assert not imported & {"torch", "numpy", "safetensors", "transformers", "huggingface_hub"}
    assert done.stdout
