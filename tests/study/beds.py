"""Test beds of Hi-Merging: specialists with their questions, conflicts planted in them, and analyses to run on them.

Three kinds: the demo's models, which are trained and clash a little by nature; tiny twins that learn tasks of disjoint
words, and hardly clash at all; and made-up models, whose scores are a formula.
"""

from __future__ import annotations

import copy
import json
import random
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor

from streammerge.demo import FOLDER as DEMO
from streammerge.demo import Demo, unpack
from streammerge.study.analysis import ProxyFindings, analyze_recipe
from streammerge.study.findings import Findings, Row
from streammerge.study.judge import Judge, Part
from streammerge.study.mixture import KEEP, Group, Mixture
from streammerge.study.scoring import Estimate, Outcome
from streammerge.study.tasks import Example
from streammerge.study.workbench import StudyOptions
from tests.study.tiny import TOKENS, WORDS, make_tokenizer, read_weights, write_lines, write_weights

WHOLE = {"density": 1.0, "scale": 1.0}
NUM_QUESTIONS = 40


class Interrupt(Exception):
    """Raised by an observer that has seen enough."""


@dataclass
class Witness:
    """An observer that remembers what it was told, and may interrupt: at so much progress of the given stage."""

    interrupt_in: str | None = None
    notes: list[str] = field(default_factory=list)
    stages: list[str] = field(default_factory=list)

    def note(self, text: str) -> None:
        self.notes.append(text)

    def stage(self, text: str) -> None:
        self.stages.append(text)

    def progress(self, done: float, total: float) -> None:
        if self.interrupt_in is not None and self.interrupt_in in self.stages[-1] and done > total / 2:
            raise Interrupt


@dataclass(frozen=True)
class Analysed:
    """A finished analysis: what it found, the recipe it wrote, and what the observer was told."""

    findings: Findings
    recipe: Path
    witness: Witness

    @property
    def text(self) -> str:
        return self.recipe.read_text()

    def row(self, name: str, split: str = "dev") -> Row:
        """One row of the final table; models by the last part of their path."""
        found = [row for row in self.findings.table if Path(row.name).name == name and row.split == split]
        assert len(found) == 1, f"{name}, {split}: {[(row.name, row.split) for row in self.findings.table]}"
        return found[0]

    @property
    def first_merge(self) -> Row:
        """The dev row of the stage-1 merge, which has no row of its own where it is plain task arithmetic."""
        names = [row.name for row in self.findings.table]
        return self.row("stage 1" if "stage 1" in names else "task arithmetic")

    def shares(self, row: Row) -> list[float]:
        """Of each task's own gain, what a row of the table keeps."""
        units = self.findings.units
        base = self.row("base", row.split)
        return [(p.value - low.value) / unit for p, low, unit in zip(row.p, base.p, units, strict=True)]


class Bed:
    """A folder with `models/`, the base among them, questions of their tasks, and recipes over them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def model(self, name: str) -> Path:
        return self.folder / "models" / name

    def weights(self, name: str) -> dict[str, Tensor]:
        return read_weights(self.model(name))

    def delta(self, name: str) -> dict[str, Tensor]:
        """A model's distance from the base, in float32."""
        base = self.weights("base")
        return {tensor: values.float() - base[tensor].float() for tensor, values in self.weights(name).items()}

    def add(self, name: str, delta: Mapping[str, Tensor]) -> str:
        """A model so far from the base; returns its name."""
        base = self.weights("base")
        shutil.copytree(self.model("base"), self.model(name), dirs_exist_ok=True)
        made = {tensor: (values.float() + delta[tensor]).to(values.dtype) for tensor, values in base.items()}
        write_weights(self.model(name), made)
        return name

    def copy(self, name: str, model: str) -> str:
        """The same model under another name."""
        shutil.copytree(self.model(model), self.model(name))
        return name

    def questions(self, task: str, split: str = "dev", first: int = 0, last: int | None = None) -> list[Any]:
        lines = (self.folder / f"{task}.{split}.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines[first:last]]

    def recipe(self, name: str, models: Mapping[str, Sequence[Any] | tuple[Sequence[Any], Sequence[Any]]], *,
               parameters: Mapping[str, Any] | None = None, each: Sequence[Mapping[str, Any]] | None = None,
               entry: Mapping[str, Any] | None = None, **top: Any) -> Path:  # fmt: skip
        """Write `name`.yaml. `models` gives each specialist's questions: those of dev, or a pair of dev and test.

        `parameters` hold for all models, `each` for one after the other; `entry` are further keys of every task.
        """
        tasks = []
        for model, questions in models.items():
            splits = questions if isinstance(questions, tuple) else (questions,)
            files = {split: f"{name}.{model}.{split}.jsonl" for split, _ in zip(("dev", "test"), splits, strict=False)}
            for file, lines in zip(files.values(), splits, strict=True):
                write_lines(self.folder / file, *lines)
            tasks.append({"name": model, "model": str(self.model(model)), **files, **(entry or {})})
        listed = [{"model": str(self.model(model))} for model in models]
        for one, own in zip(listed, each or [], strict=False):
            one["parameters"] = dict(own)  # type: ignore[assignment]
        content = {"merge_method": "hi_merging", "base_model": str(self.model("base")), "models": listed}
        if parameters is not None:
            content["parameters"] = dict(parameters)
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump({**content, "tasks": tasks, **top}, sort_keys=False))
        return path

    def analyze(self, name: str, models: Mapping[str, Any], *, witness: Witness | None = None, work: str = "work",
                threads: int = 2, **recipe: Any) -> Analysed:  # fmt: skip
        """Analyse a recipe as `recipe` writes it. Scores are kept in the folder `work`, for the next analysis."""
        return self.run(self.recipe(name, models, **recipe), witness=witness, work=work, threads=threads)

    def run(self, recipe: Path, *, witness: Witness | None = None, work: str = "work", threads: int = 2) -> Analysed:
        witness, out = witness or Witness(), recipe.with_suffix(".decided.yaml")
        options = StudyOptions(device="cpu", threads=threads, compile="off")
        findings = analyze_recipe(recipe, out, self.folder / work, options, witness)
        return Analysed(findings, out, witness)  # type: ignore[arg-type]

    def weigh(self, recipe: Path) -> tuple[ProxyFindings, Path]:
        """The analysis of a recipe that asks for a proxy."""
        out = recipe.with_suffix(".decided.yaml")
        options = StudyOptions(device="cpu", threads=1, compile="off")
        findings = analyze_recipe(recipe, out, self.folder / "work", options, Witness())
        assert isinstance(findings, ProxyFindings)
        return findings, out


def layer_of(findings: Findings, block: int) -> int:
    """The number of the group that is a block."""
    return next(layer for layer in findings.layers if findings.groups[layer].endswith(f".{block}"))


# --- the demo's models -----------------------------------------------------------------------------------------------


def small_demo(folder: Path) -> Demo:
    """The demo with fewer questions and a small grid, so that an analysis takes seconds."""
    made = unpack(folder)
    for file in sorted((made.directory / "tasks").glob("*.jsonl")):
        file.write_text("".join(file.read_text().splitlines(keepends=True)[:NUM_QUESTIONS]))
    content = yaml.safe_load(made.hi_merging.read_text())
    content["analysis"] = {"densities": [0.7, 1.0], "scales": [1.0], "factors": [0.7, 0.9]}
    made.hi_merging.write_text(yaml.safe_dump(content, sort_keys=False))
    return made


def demo_bed(folder: Path) -> Bed:
    """Base, `translate` and `sort`, with the questions of both tasks."""
    bed = Bed(folder)
    shutil.copytree(DEMO / "models", folder / "models")
    for file in sorted((DEMO / "tasks").iterdir()):
        shutil.copy(file, folder / file.name)
    return bed


def plant_conflict(bed: Bed, name: str, *, offender: str, victim: str, block: int, strength: float) -> str:
    """The offender, damaged in one block: so many times the victim's delta is taken away from its own there."""
    mine, other = bed.delta(offender), bed.delta(victim)
    inside = f"layers.{block}."
    return bed.add(
        name, {tensor: delta - strength * (inside in tensor) * other[tensor] for tensor, delta in mine.items()}
    )


def sure_of_right(example: Example, outcome: Outcome) -> float:
    """A metric of one's own: the probability of the right choice among all, or of a completion's average token."""
    assert example.answer is not None
    if len(outcome.log_probs) == 1:
        return float(np.exp(outcome.log_probs[0] / outcome.num_tokens[0]))
    return float(np.exp(outcome.log_probs[example.answer] - np.logaddexp.reduce(outcome.log_probs)))


# --- tiny twins ------------------------------------------------------------------------------------------------------

_PROMPTS, _ANSWERS, _CHOICES = 40, 8, 4
_WIDTH, _STEPS, _RATE = 64, 12, 1e-3


def twin_bed(folder: Path, seed: int) -> Bed:
    """A random base, and two specialists, `left` and `right`, of tasks that have no word in common.

    A task gives each of its prompts, a word of its own, one of its answers; so examples know nothing of each other. The
    base has two blocks of width 64 and knows nothing. A specialist learns all of its task by heart in a dozen
    steps of Adam; embeddings stay as they are.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    bed, generator = Bed(folder), random.Random(seed)
    tokenizer = make_tokenizer(begins=False)
    config = LlamaConfig(
        vocab_size=len(TOKENS), hidden_size=_WIDTH, intermediate_size=2 * _WIDTH, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=16, tie_word_embeddings=True,
        bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    # The seed of this bed alone: other tests may draw from torch's generator, too.
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        base = LlamaForCausalLM(config)
        torch.nn.init.normal_(base.model.embed_tokens.weight, std=0.3)
    _save(base, tokenizer, bed.model("base"))
    words = generator.sample(WORDS, 2 * (_PROMPTS + _ANSWERS))
    for side, name in enumerate(("left", "right")):
        own = words[side * (_PROMPTS + _ANSWERS) :][: _PROMPTS + _ANSWERS]
        prompts, answers = own[:_PROMPTS], own[_PROMPTS:]
        questions = []
        for prompt in prompts:
            choices = generator.sample(answers, _CHOICES)
            right = generator.randrange(_CHOICES)
            questions.append({"prompt": prompt, "choices": [f" {word}" for word in choices], "answer": right})
        write_lines(folder / f"{name}.dev.jsonl", *questions)
        specialist = copy.deepcopy(base)
        _learn(specialist, questions, answers)
        _save(specialist, tokenizer, bed.model(name))
    return bed


def _learn(model: Any, questions: Sequence[Mapping[str, Any]], answers: Sequence[str]) -> None:
    """Full batches of the answer after its prompt, normalised over the task's answers."""
    prompts = torch.tensor([[TOKENS[question["prompt"]]] for question in questions])
    right = torch.tensor([answers.index(question["choices"][question["answer"]].strip()) for question in questions])
    rows = torch.tensor([TOKENS[answer] for answer in answers])
    model.model.embed_tokens.weight.requires_grad_(False)
    optimizer = torch.optim.Adam([one for one in model.parameters() if one.requires_grad], lr=_RATE)
    for _ in range(_STEPS):
        loss = torch.nn.functional.cross_entropy(model(prompts).logits[:, -1][:, rows], right)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def _save(model: Any, tokenizer: Any, path: Path) -> None:
    path.mkdir(parents=True)
    model.config.architectures = ["LlamaForCausalLM"]
    model.config.save_pretrained(path)
    tokenizer.save_pretrained(path)
    write_weights(path, {name: values.detach() for name, values in model.named_parameters()})


# --- made-up models --------------------------------------------------------------------------------------------------

_EXAMPLES = 8
# P of a mixture on a task, for all examples or for each.
Formula = Callable[[Mixture, int], Any]


class MadeUpFamily:
    """Stands in for a Family: layers without tensors."""

    def __init__(self, models: int, layers: int) -> None:
        self.models = [f"m{m}" for m in range(models)]
        self.groups = [Group(f"layer {layer}", (), (), is_layer=True) for layer in range(layers)]
        self.layers = list(range(layers))

    def mixture(self, density: Sequence[float], scale: Sequence[float], weight: Sequence[float]) -> Mixture:
        parts = ((KEEP,) * len(self.models),) * len(self.layers)
        return Mixture(tuple(density), tuple(scale), tuple(weight), parts)

    def equal_models(self) -> list[list[int]]:
        return [[m] for m in range(len(self.models))]


class MadeUpJudge(Judge):
    """A judge whose scores are a formula, known without error. Remembers what it was asked."""

    def __init__(self, models: int, layers: int, formula: Formula) -> None:
        self.family = MadeUpFamily(models, layers)  # type: ignore[assignment]
        self.tasks = [_made_up_task(m) for m in range(models)]
        self.base = self.family.mixture([1.0] * models, [1.0] * models, [0.0] * models)
        self.units = [1.0] * models
        self.asked: dict[tuple[Mixture, int], None] = {}
        self._formula = formula

    def ask(self, questions: Sequence[tuple[Mixture, int]]) -> None:
        self.asked |= dict.fromkeys(questions)

    def p(self, mixture: Mixture, task: int, part: Part = None) -> Estimate:
        assert (mixture, task) in self.asked, "a score was used that nobody asked for"
        values = np.broadcast_to(np.asarray(self._formula(mixture, task), np.float64), _EXAMPLES)
        value = float(values.mean() if part is None else values[part[task]].mean())
        return Estimate(value, np.full(4, value))

    def accuracy(self, mixture: Mixture, task: int, part: Part = None) -> Estimate | None:
        return None


def crossing(effects: Sequence[Sequence[Sequence[float]]]) -> Formula:
    """P as a sum over layers and models of strength · effects[layer][model][task], with strength = weight · scale.

    Then a layer contributes 2 · w · effects[layer][m][m] to task m before merging, and γ is -2 times what the other
    models do to the task there.
    """

    def formula(mixture: Mixture, task: int) -> float:
        return sum(
            mixture.weight[m] * mixture.scale[m] * part.scale * effects[layer][m][task]
            for layer, row in enumerate(mixture.parts)
            for m, part in enumerate(row)
        )

    return formula


def _made_up_task(number: int) -> Any:
    return SimpleNamespace(
        task=SimpleNamespace(name=f"task {number}"),
        split=SimpleNamespace(examples=range(_EXAMPLES)),
        scoring=SimpleNamespace(metric="made up"),
    )
