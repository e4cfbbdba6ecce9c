"""The budget holds: a process in a memory cgroup of exactly the budget finishes, and a careless one does not.

Every method and every kind of input is squeezed into the smallest budget that a refusal names. Checkpoints are four
fifths of that or more, of which torch and the interpreter take half.
"""

from __future__ import annotations

import json
import os
import random
import re
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

import streammerge
from tests.command import COMMAND
from tests.command import streammerge as run
from tests.methods.cases import FORMS, make, make_case, usual
from tests.models import make_models, make_tensors, save_model, write_recipe
from tests.run.test_adapters import write_adapter
from tests.run.vocabularies import EMBED, write_tokenizer
from tests.scales import FORMS as SCALES
from tests.scales import save_scaled
from tests.study.tiny import make_model, make_specialist, sentence, write_lines

BUDGET = 500_000_000
# 112 MB per model.
SHAPES = {"model.layers.0.mlp.up_proj.weight": (7000, 8000)}
# The same, in two layers.
LAYERS = {f"model.layers.{i}.mlp.up_proj.weight": (7000, 4000) for i in range(2)}

Groups = Callable[[int], Path]


@pytest.fixture
def groups() -> Iterator[Groups]:
    """Makes memory cgroups of a limit in bytes (v2 where it is delegated, else v1)."""
    made: list[Path] = []

    def group(limit_bytes: int) -> Path:
        v2, v1 = Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/memory")
        name = f"streammerge-test-{os.getpid()}-{len(made)}"
        for root, limit in ((v2, "memory.max"), (v1, "memory.limit_in_bytes")):
            folder = root / name
            try:
                folder.mkdir()
            except OSError:
                continue
            made.append(folder)
            if (folder / limit).exists():
                (folder / limit).write_text(str(limit_bytes))
                return folder
            # No cgroup file system, or the memory controller is not here.
        pytest.skip("NO MEMORY CGROUP CAN BE MADE HERE: the budget is not proven on this machine (run as root)")

    yield group
    for folder in made:
        folder.rmdir()


def joining(group: Path) -> Callable[[], None]:
    def join() -> None:
        (group / "cgroup.procs").write_text(str(os.getpid()))

    return join


# --- kinds of input --------------------------------------------------------------------------------------------------


def _ties(folder: Path, **top: Any) -> Path:
    base, *models = make_models(folder, shapes=SHAPES)
    per_model = {"weight": 0.5, "density": 0.3}
    return write_recipe(folder / "recipe.yaml", "ties", models, base=base, per_model=per_model, **top)


def _many(folder: Path, **top: Any) -> Path:
    """Sixteen models."""
    base, *models = make_models(folder, count=16, shapes=SHAPES)
    return write_recipe(folder / "recipe.yaml", "ties", models, base=base, per_model={"weight": 0.5, "density": 0.3},
                        **top)  # fmt: skip


def _mixed(folder: Path) -> Path:
    """A base of float32, a model of float16 and one of bfloat16."""
    base = make_tensors(0, dtype=torch.float32, shapes=SHAPES)
    one = make_tensors(1, around=base, dtype=torch.float16, shapes=SHAPES)
    two = make_tensors(2, around=base, shapes=SHAPES)
    saved = [save_model(folder / name, each) for name, each in (("base", base), ("one", one), ("two", two))]
    return write_recipe(folder / "recipe.yaml", "task_arithmetic", saved[1:], base=saved[0], per_model={"weight": 1})


def _double(folder: Path) -> Path:
    """Everything in float64, which is also what is computed in."""
    _, *models = make_models(folder, dtype=torch.float64, shapes={"w": (3500, 4000)})
    return write_recipe(folder / "recipe.yaml", "slerp", models, base=models[0], parameters={"t": 0.3})


def _shards(folder: Path) -> Path:
    tensors = [make_tensors(seed, shapes=LAYERS) for seed in range(3)]
    models = [save_model(folder / f"m{i}", each, shards=2) for i, each in enumerate(tensors)]
    return write_recipe(folder / "recipe.yaml", "linear", models, per_model={"weight": 0.4})


def _slices(folder: Path) -> Path:
    """A layer of one model, a layer merged of two, and a layer again."""
    one, two = (save_model(folder / f"m{i}", make_tensors(i, shapes=LAYERS)) for i in range(2))
    for model in (one, two):
        config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": 2}
        (model / "config.json").write_text(json.dumps(config))
    weighted = [
        {"model": str(one), "layer_range": [1, 2], "parameters": {"weight": 0.3}},
        {"model": str(two), "layer_range": [0, 1], "parameters": {"weight": 0.7}},
    ]
    slices = [{"sources": [{"model": str(one), "layer_range": [0, 2]}]}, {"sources": weighted}]
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({"merge_method": "linear", "parameters": {"weight": 1}, "slices": slices}))
    return path


def _stages(folder: Path) -> Path:
    """A merge of a merge that is never written."""
    base, one, two = map(str, make_models(folder, shapes=SHAPES))
    first = {"name": "mean", "merge_method": "linear", "parameters": {"weight": 0.5},
             "models": [{"model": one}, {"model": two}]}  # fmt: skip
    second = {"merge_method": "ties", "base_model": base, "parameters": {"weight": 0.5, "density": 0.4},
              "models": [{"model": "mean"}, {"model": one}]}  # fmt: skip
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump_all([first, second]))
    return path


def _files(folder: Path) -> Path:
    """Plain files, no models: two of them, and one tensor that is whole numbers."""
    paths = []
    for seed in range(3):
        path = folder / f"{seed}.safetensors"
        counts = {"counts": torch.arange(1000)}
        save_file(make_tensors(seed, shapes=SHAPES) | counts, path)
        paths.append(path)
    return write_recipe(folder / "recipe.yaml", "linear", paths, per_model={"weight": 0.4})


def _adapter(folder: Path, *, norms: bool) -> Path:
    """TIES of a base with two adapters of rank 64 folded in."""
    base, _ = make_models(folder, count=1, shapes=SHAPES)
    models = [
        f"{base}+{write_adapter(folder / f'lora{seed}', SHAPES, seed=seed, rank=64, norms=norms)}" for seed in range(2)
    ]
    per_model = {"weight": 0.5, "density": 0.3}
    return write_recipe(folder / "recipe.yaml", "ties", models, base=base, per_model=per_model)


def _vocabularies(folder: Path) -> Path:
    """Models whose tokens have other ids, some of them only in one: the table is read as float32, row by row."""
    words = [f"word{i}" for i in range(7000)]
    models = []
    for seed, own in enumerate((words, words[::-1][:6900], ["more", *words[100:]])):
        path = folder / f"m{seed}"
        write_tokenizer(path, ["<unk>", *own])
        models.append(save_model(path, make_tensors(seed, shapes={EMBED: (len(own) + 1, 8000)})))
    return write_recipe(folder / "recipe.yaml", "linear", models, per_model={"weight": 0.4}, tokenizer_source="union")


def _scaled(folder: Path) -> Path:
    """Weights in 8 bits with scales of blocks, merged as float32 and written so again."""
    models = [folder / f"m{seed}" for seed in range(3)]
    for seed, path in enumerate(models):
        save_scaled(path, make_tensors(seed, shapes=SHAPES, dtype=torch.float32), SCALES["blocks"])
    per_model = {"weight": 0.5, "density": 0.3}
    return write_recipe(folder / "recipe.yaml", "ties", models[1:], base=models[0], per_model=per_model,
                        out_dtype="float8_e4m3fn")  # fmt: skip


KINDS: dict[str, Callable[[Path], Path]] = {
    "vocabularies": _vocabularies,
    "mixed dtypes": _mixed,
    "float64": _double,
    "shards": _shards,
    "slices": _slices,
    "stages": _stages,
    "files": _files,
    "cut over the whole model": lambda folder: _ties(folder, parameters={"density_scope": "model"}),
    "many models": _many,
    "many models, cut over the whole": lambda folder: _many(folder, parameters={"density_scope": "model"}),
    "adapters": lambda folder: _adapter(folder, norms=False),
    "adapters, DoRA": lambda folder: _adapter(folder, norms=True),
    "float8 with scales": _scaled,
    "to float8": lambda folder: _ties(folder, out_dtype="float8_e4m3fn"),
}


def _method(label: str) -> Callable[[Path], Path]:
    def recipe(folder: Path) -> Path:
        method = FORMS[label]
        cases = [
            make_case(method, "large", (7000, 8000), seed=1, **usual(method)),
            make_case(method, "vector", (8000,), seed=2),
        ]
        return make(folder, method, cases).recipe

    return recipe


SQUEEZED = {**KINDS, **{label: _method(label) for label in FORMS}}
# The nightly run tries all.
_IN_SUITE = {"adapters", "vocabularies", "stages", "cut over the whole model", "ties"}


def _some(kinds: Iterable[str]) -> list[Any]:
    return [pytest.param(kind, marks=() if kind in _IN_SUITE else pytest.mark.nightly) for kind in kinds]


# --- in a cgroup of exactly the budget -------------------------------------------------------------------------------


def _smallest(*arguments: str | Path) -> int:
    """The smallest budget, in bytes, that the refusal of a smaller one names."""
    refused = run(*arguments, "--max-memory", "150MB")
    assert refused.code == 3, refused.err + refused.out
    named = re.search(r"(?:smallest budget that works is|Allow) (\d+)MB", refused.err + refused.out)
    assert named is not None, refused.err + refused.out
    return int(named[1]) * 1_000_000


@pytest.mark.parametrize("kind", _some(SQUEEZED))
def test_everything_works_in_a_cgroup_of_the_smallest_budget_that_a_refusal_names(
    groups: Groups, tmp_path: Path, kind: str
) -> None:
    recipe = SQUEEZED[kind](tmp_path)
    budget = _smallest(recipe, tmp_path / "small")
    assert not (tmp_path / "small").exists()
    squeezed = run(recipe, tmp_path / "small", "--max-memory", str(budget), "--json", "--compile", "off",
                   before=joining(groups(budget)))  # fmt: skip
    assert squeezed.done["peak_own_bytes"] <= budget
    streammerge.merge(recipe, tmp_path / "large", compile="off")
    for file in (tmp_path / "large").glob("*.safetensors"):
        assert (tmp_path / "small" / file.name).read_bytes() == file.read_bytes()


@pytest.mark.nightly
def test_a_sweep_works_in_a_cgroup_of_the_smallest_budget_that_a_refusal_names(groups: Groups, tmp_path: Path) -> None:
    base, models, tasks = _large_family(tmp_path)
    recipe = write_recipe(tmp_path / "ties.yaml", "ties", models, base=base, per_model={"weight": 0.5, "density": 0.5})
    arguments = ("eval", base, recipe, "--tasks", tasks, "--json", "--compile", "off", "--threads", "1")
    budget = _smallest(*arguments)
    squeezed = run(*arguments, "--max-memory", str(budget), before=joining(groups(budget)))
    assert squeezed.code == 0, squeezed.err
    free = run(*arguments)
    assert squeezed.events[-1]["table"] == free.events[-1]["table"]


@pytest.mark.nightly
def test_comparing_and_looking_work_in_a_cgroup_of_the_smallest_budget_that_a_refusal_names(
    groups: Groups, tmp_path: Path
) -> None:
    base, *models = make_models(tmp_path, shapes=SHAPES)
    arguments = ("diff", *models, "--base", base, "--json")
    budget = _smallest(*arguments)
    squeezed = run(*arguments, "--max-memory", str(budget), before=joining(groups(budget)))
    assert squeezed.code == 0, squeezed.err
    assert squeezed.events[-1] == run(*arguments).events[-1]
    healthy = run("inspect", base, "--health", "--max-memory", str(budget), before=joining(groups(budget)))
    assert "every number is finite" in healthy.out


def _large_family(folder: Path) -> tuple[Path, list[Path], Path]:
    """A base and two models of 150 MB, and tasks for them."""
    base = make_model(folder / "base", dtype=torch.bfloat16, hidden_size=1024, intermediate_size=4096,
                      num_hidden_layers=4)  # fmt: skip
    models = [make_specialist(folder / name, base, seed=seed) for seed, name in ((1, "a"), (2, "b"))]
    generator = random.Random(0)
    lines = [
        {"prompt": sentence(generator, 5), "choices": [f" {sentence(generator, 2)}" for _ in range(3)], "answer": 0}
        for _ in range(4)
    ]
    write_lines(folder / "dev.jsonl", *lines)
    (folder / "tasks.yaml").write_text("- {name: choose, dev: dev.jsonl}\n")
    return base, models, folder / "tasks.yaml"


def test_a_merge_in_mapped_memory_is_killed_in_such_a_cgroup(groups: Groups, tmp_path: Path) -> None:
    """The control: what torch offers for files larger than memory, in the budget that ties works in above."""
    paths = make_models(tmp_path, count=3, shapes=SHAPES)
    careless = (
        "import sys, torch\n"
        "storages = [torch.UntypedStorage.from_file(f, False, 112_000_000) for f in sys.argv[1:]]\n"
        "base, *models = [torch.empty(0, dtype=torch.bfloat16).set_(storage) for storage in storages]\n"
        "for model in models: base += 0.3 * model.sub_(base)\n"
    )
    files = [path / "model.safetensors" for path in paths]
    command = [sys.executable, "-c", careless, *files]
    assert subprocess.run(command, check=False, timeout=60).returncode == 0
    budget = _smallest(_ties(tmp_path), tmp_path / "out")
    killed = subprocess.run(command, preexec_fn=joining(groups(budget)), check=False, timeout=60)
    assert killed.returncode == -9


def test_the_limit_of_the_cgroup_counts_without_a_flag(groups: Groups, tmp_path: Path) -> None:
    _, *models = make_models(tmp_path, shapes={"w": (100, 100)})
    recipe = write_recipe(tmp_path / "r.yaml", "linear", models, per_model={"weight": 1})
    result = run("plan", recipe, "--json", before=joining(groups(BUDGET)))
    assert result.code == 0, result.err
    assert f'"limit_bytes": {BUDGET // 4096 * 4096}' in result.out


# --- other limits ----------------------------------------------------------------------------------------------------


def _data_limit(limit_bytes: int) -> Callable[[], None]:
    return lambda: resource.setrlimit(resource.RLIMIT_DATA, (limit_bytes, limit_bytes))


@pytest.mark.parametrize("kind", _some(FORMS))
def test_everything_works_within_a_limit_on_private_memory(tmp_path: Path, kind: str) -> None:
    recipe = SQUEEZED[kind](tmp_path)
    done = run(recipe, tmp_path / "out", "--max-memory", str(BUDGET), "--json", "--compile", "off",
               before=_data_limit(BUDGET)).done  # fmt: skip
    assert done["peak_own_bytes"] <= BUDGET


def test_memory_that_the_system_refuses_midway_is_an_error_of_its_own(tmp_path: Path) -> None:
    recipe = SQUEEZED["ties"](tmp_path)
    refused = run(recipe, tmp_path / "out", "--max-memory", "2GB", "--compile", "off", before=_data_limit(BUDGET))
    assert refused.code == 3, refused.err
    assert "ulimit -d" in refused.err or "Give a smaller --max-memory" in refused.err
    assert "Traceback" not in refused.err
    assert not list((tmp_path / "out").glob("*.safetensors"))
    assert run(recipe, tmp_path / "out", "--max-memory", str(BUDGET)).code == 0


def test_a_long_run_does_not_grow(tmp_path: Path) -> None:
    """2,000 tensors: what the last of them take is what the first took."""
    shapes = {f"model.layers.{i}.mlp.up_proj.weight": (128, 512) for i in range(2000)}
    base, *models = make_models(tmp_path, shapes=shapes)
    recipe = write_recipe(tmp_path / "r.yaml", "ties", models, base=base, per_model={"weight": 0.5, "density": 0.3})
    out = tmp_path / "out"
    command = [*COMMAND, str(recipe), str(out), "--max-memory", str(BUDGET), "--compile", "off", "--threads", "1"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    samples = []
    while process.poll() is None:
        if list(out.glob("*.partial")):
            samples.append(_own(process.pid))
        time.sleep(0.02)
    assert process.returncode == 0
    third = len(samples) // 3
    assert third >= 20
    first, last = max(samples[:third]), max(samples[-third:])
    # The journal's notes of 2,000 tensors are allowed a kilobyte each.
    assert last <= first + 2_000_000


def _own(pid: int) -> int:
    """Anonymous and shared memory of a process, in bytes, from outside; 0 once it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    sizes = re.findall(r"Rss(?:Anon|Shmem):\s+(\d+) kB", status)
    return sum(map(int, sizes)) * 1024


# --- refusals --------------------------------------------------------------------------------------------------------


def test_a_budget_that_cannot_work_is_refused_before_any_file(tmp_path: Path) -> None:
    _, *models = make_models(tmp_path, shapes={"w": (100, 100)})
    recipe = write_recipe(tmp_path / "r.yaml", "linear", models, per_model={"weight": 1})
    result = run(recipe, tmp_path / "out", "--max-memory", "100MB")
    assert result.code == 3
    assert "The smallest budget that works is" in result.err
    assert not (tmp_path / "out").exists()
    smallest = result.err.rsplit("is ", 1)[1].strip().rstrip(".")
    assert run(recipe, tmp_path / "out", "--max-memory", smallest).code == 0


def test_no_room_on_disk_is_refused_before_any_file(tmp_path: Path) -> None:
    _, *models = make_models(tmp_path, shapes={"w": (100, 100)})
    recipe = write_recipe(tmp_path / "r.yaml", "linear", models, per_model={"weight": 1})
    full = (
        "import streammerge.run.merge as m\nm.free_bytes = lambda folder: 1000\n"
        "from streammerge.cli import main\nmain()\n"
    )
    done = subprocess.run([sys.executable, "-c", full, recipe, tmp_path / "out"], capture_output=True, text=True,
                          check=False)  # fmt: skip
    assert done.returncode == 3
    assert "of disk" in done.stderr
    assert not (tmp_path / "out").exists()
