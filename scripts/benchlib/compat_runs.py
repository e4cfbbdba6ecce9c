"""Recipes merged by both tools, and what to compare: `Kitchen` has them merged, a `Run` reads one's results."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from benchlib.compat_recipes import placed
from streammerge.api import make_plan, merge
from streammerge.base.errors import StreamMergeError
from streammerge.plan.draft import Draft, draft_stages
from streammerge.plan.gather import Read
from streammerge.plan.plan import Plan
from streammerge.plan.view import Operand
from tests.methods.oracles import Array, Expected, Given, oracle, rounded

SEED = 1

# mergekit's own command, called for one recipe after the other: importing it takes longer than merging.
MERGEKIT = """
import json, sys, warnings
warnings.simplefilter("ignore")
from mergekit.scripts import multimerge, run_yaml
failed = {}
for recipe, out, staged in json.load(open(sys.argv[1])):
    command, where = (multimerge, ["--out-path", out, "-I", out + ".stages"]) if staged else (run_yaml, [out])
    try:
        command.main([recipe, *where, "--no-copy-tokenizer", "--no-write-model-card", "--random-seed", sys.argv[3],
                      "--quiet"],
                     standalone_mode=False)
    except Exception as error:
        failed[recipe] = f"{type(error).__name__}: {error}"
json.dump(failed, open(sys.argv[2], "w"))
"""

# They write float32 whatever the recipe's dtype; rounded here before they are judged.
FLOAT32_OUTPUTS = ("arcee_fusion", "ramplus_tl")


@cache
def load_model(folder: Path) -> dict[str, Tensor]:
    return load(folder)


def load(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint or an output."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


class Unexplained(Exception):
    """What makes a comparison impossible, in words."""


@dataclass(frozen=True)
class Run:
    """One recipe through both tools. `kind` says how it is judged."""

    label: str
    kind: str
    recipe: Path
    staged: bool = False

    @property
    def ours(self) -> Path:
        return self.recipe.with_name("ours")

    @property
    def theirs(self) -> Path:
        return self.recipe.with_name("theirs")

    @cached_property
    def plan(self) -> Plan:
        return make_plan(self.recipe)

    @property
    def method(self) -> str:
        return self.plan.method.name

    def tensors(self) -> Iterator[tuple[Given, Expected, Array, Array]]:
        """Every output tensor: what it was made of, what it should be, as we wrote it, and as mergekit did."""
        ours, theirs = load(self.ours), load(self.theirs)
        if set(ours) != set(theirs):
            raise Unexplained(f"other tensors: {sorted(set(ours) ^ set(theirs))[:5]}")
        results, *_ = draft_stages(self.plan.recipe, self.plan.models, self.plan.checkpoints)
        drafts = results[-1].tensors
        for name, mine in ours.items():
            other = theirs[name]
            if mine.dtype != other.dtype == torch.float32 and self.method in FLOAT32_OUTPUTS:
                other = other.to(mine.dtype)
            if (mine.dtype, mine.shape) != (other.dtype, other.shape):
                raise Unexplained(f"{name} is {mine.dtype} {mine.shape} and {other.dtype} {other.shape}")
            draft = drafts[name]
            assert isinstance(draft, Draft), name
            given, expected = self._expect(draft)
            yield given, expected, flat(mine), flat(other)

    def _expect(self, draft: Draft) -> tuple[Given, Expected]:
        given = self._given(draft)
        return given, oracle(draft.method.name, given)

    def _values(self, operand: Operand) -> Array:
        if isinstance(operand, Draft):
            return rounded(self._expect(operand)[1].values, operand.dtype)
        assert isinstance(operand, Read)
        return flat(load_model(Path(self.plan.recipe.inputs[operand.checkpoint]))[operand.spec.name])

    def _given(self, draft: Draft) -> Given:
        values = [self._values(operand) for operand in draft.operands]
        base = values.pop(0) if draft.has_base else None
        settings = draft.settings
        return Given(draft.stream, base, values, settings.shared, settings.models, seed=SEED,
                     shape=draft.shape, depth=settings.depth)  # fmt: skip


def flat(tensor: Tensor) -> Array:
    return tensor.double().reshape(-1).numpy()


class Kitchen:
    """Writes recipes, those whose label contains `only`, and has both tools merge them."""

    def __init__(self, folder: Path, only: str = "") -> None:
        self._folder, self._only = folder, only
        folder.mkdir(parents=True)
        self.runs: list[Run] = []
        self.failures: dict[Path, str] = {}  # of mergekit, by recipe
        self.refusals: dict[Path, str] = {}  # ours

    def add(self, kind: str, label: str, recipe: Mapping[str, Any], models: Path, **top: str) -> None:
        self.add_staged(kind, label, [recipe], models, **top)

    def add_staged(self, kind: str, label: str, stages: Sequence[Mapping[str, Any]], models: Path, **top: str) -> None:
        if self._only not in label:
            return
        home = self._folder / f"{len(self.runs):04d}"
        home.mkdir(parents=True)
        names = [stage["name"] for stage in stages if "name" in stage]
        documents = [placed(dict(stage), str(models), names, **top) for stage in stages]
        (home / "recipe.yaml").write_text(yaml.safe_dump_all(documents, sort_keys=False))
        self.runs.append(Run(label, kind, home / "recipe.yaml", len(stages) > 1))

    def cook(self, environment: Path) -> None:
        """mergekit in two processes; ours meanwhile."""
        variables = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        variables.pop("PYTHONPATH", None)
        started = []
        for half in range(2):
            jobs, failed = self._folder / f"jobs{half}.json", self._folder / f"failed{half}.json"
            jobs.write_text(json.dumps([(str(run.recipe), str(run.theirs), run.staged) for run in self.runs[half::2]]))
            command = [str(environment / "bin" / "python"), "-c", MERGEKIT, str(jobs), str(failed), str(SEED)]
            log = (self._folder / f"log{half}.txt").open("w")
            started.append((subprocess.Popen(command, env=variables, stdout=log, stderr=log), failed, log))
        for run in self.runs:
            try:
                rng: Literal["position", "mergekit"] = "mergekit" if run.kind == "drawn" else "position"
                merge(run.recipe, run.ours, threads=1, compile="off", seed=SEED, rng=rng)
            except StreamMergeError as error:
                self.refusals[run.recipe] = str(error)
        for process, failed, log in started:
            if process.wait() != 0:
                log.close()
                sys.exit(f"mergekit failed:\n{Path(log.name).read_text()[-3000:]}")
            self.failures |= {Path(recipe): error for recipe, error in json.loads(failed.read_text()).items()}
