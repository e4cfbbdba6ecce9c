"""The data a user gives: tasks, each a model and files of JSON lines.

    {"prompt": "…", "choices": ["…", "…"], "answer": 1}      multiple choice, each choice scored as a continuation
    {"prompt": "…", "completion": "…"}                       free answer
    {"messages": [{"role": "user", "content": "…"}, …], …}   either of them, its prompt through the chat template
    {"prompt": "…"}                                          no answer: for metrics that need none

Everything that is wrong with all files is one error, line by line.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash
import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from streammerge.base.errors import TaskError

_MAX_BYTES = 1 << 30
_KEYS = {"prompt", "messages", "choices", "answer", "completion"}


@dataclass(frozen=True)
class Example:
    """One line: a prompt (or messages), and its choices with the right one's number, a completion, or nothing.

    A `completion` is a single choice. `line` says where it was read.
    """

    prompt: str | tuple[tuple[str, str], ...]
    choices: tuple[str, ...]
    answer: int | None
    line: int

    @property
    def identity(self) -> str:
        """Equal for equal rows, wherever they stand."""
        content = json.dumps([self.prompt, self.choices, self.answer], ensure_ascii=False)
        return xxhash.xxh3_128_hexdigest(content.encode("utf-8", "surrogatepass"))


@dataclass(frozen=True)
class Split:
    """The examples of one file."""

    path: Path
    examples: tuple[Example, ...]


@dataclass(frozen=True)
class Task:
    """A task: the specialist it belongs to (by the name in the recipe, or None), its data, and how it is scored.

    `metric` is a name of scoring.py or `module:function`; None stands for the one that fits the data.
    """

    name: str
    model: str | None
    dev: Split
    test: Split | None
    metric: str | None
    length_normalised: bool


class _TaskEntry(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    name: str
    model: str | None = None
    dev: str
    test: str | None = None
    metric: str | None = None
    length_normalised: bool = False


def read_tasks_file(path: Path) -> list[Any]:
    """The list that a tasks file holds: YAML, a list of maps, or a map with the one key `tasks`."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise TaskError(str(path), [f"the tasks cannot be read: {error.strerror}"]) from None
    except RecursionError:
        raise TaskError(str(path), ["nested too deeply"]) from None
    except (yaml.YAMLError, ValueError, OverflowError, KeyError, AttributeError, TypeError) as error:
        # The last ones: PyYAML has no error of its own for a scalar that looks like a date or a number and is none.
        raise TaskError(str(path), [f"not YAML: {error}"]) from None
    if isinstance(content, dict) and set(content) == {"tasks"}:
        content = content["tasks"]
    if not isinstance(content, list) or not content:
        raise TaskError(str(path), ["expected a list of tasks, {name, dev, …} each"])
    return content


def load_tasks(entries: Sequence[Any], origin: Path, models: Sequence[str] | None) -> tuple[Task, ...]:
    """Read the tasks listed in `origin`. With `models`, every task must name one of them, and each be named once.

    Raises TaskError with every problem of list and files.
    """
    problems: list[str] = []
    parsed: list[_TaskEntry] = []
    for i, entry in enumerate(entries):
        try:
            parsed.append(_TaskEntry.model_validate(entry))
        except ValidationError as error:
            problems += [f"tasks[{i}]{_place(details['loc'])}: {details['msg'].lower()}" for details in error.errors()]
    problems += [f"the task name {name!r} is given twice" for name in _repeated([entry.name for entry in parsed])]
    if models is not None:
        problems += _model_problems(parsed, models)
    tasks = []
    for entry in parsed:
        dev = _read_split(_find(entry.dev, origin), problems)
        test = None if entry.test is None else _read_split(_find(entry.test, origin), problems)
        tasks.append(Task(entry.name, entry.model, dev, test, entry.metric, entry.length_normalised))
    if problems:
        raise TaskError(str(origin), problems)
    return tuple(tasks)


def shared_rows(task: Task) -> list[str]:
    """A sentence if dev and test of a task share rows: then the test says little."""
    if task.test is None:
        return []
    dev = {example.identity for example in task.dev.examples}
    shared = [example.line for example in task.test.examples if example.identity in dev]
    if not shared:
        return []
    lines = ", ".join(map(str, shared[:5])) + (" …" if len(shared) > 5 else "")
    sentence = (
        f"task {task.name}: {len(shared)} of {len(task.test.examples)} test rows are dev rows as well "
        f"({task.test.path}, line {lines}): decisions saw them, and the test scores mean little"
    )
    return [sentence]


def _model_problems(entries: Sequence[_TaskEntry], models: Sequence[str]) -> list[str]:
    problems = []
    for entry in entries:
        if entry.model is None:
            problems.append(f"task {entry.name}: names no model; it needs one of {', '.join(models)}")
        elif entry.model not in models:
            problems.append(f"task {entry.name}: {entry.model!r} is no model of the recipe; those are "
                            f"{', '.join(models)}")  # fmt: skip
    named = [entry.model for entry in entries if entry.model is not None]
    problems += [f"model {model} has two tasks; give it one" for model in _repeated(named)]
    problems += [f"model {model} has no task: every model needs a dev file" for model in models if model not in named]
    return problems


def _read_split(path: Path, problems: list[str]) -> Split:
    try:
        if path.stat().st_size > _MAX_BYTES:
            problems.append(f"{path}: larger than {_MAX_BYTES} bytes; some hundred lines are enough")
            return Split(path, ())
        lines = path.read_bytes().split(b"\n")
    except (OSError, ValueError) as error:
        # A ValueError: no file can have such a name.
        problems.append(f"{path}: the examples cannot be read: {getattr(error, 'strerror', error)}")
        return Split(path, ())
    known = len(problems)
    examples = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            examples.append(_example(json.loads(line.decode("utf-8")), number))
        except UnicodeDecodeError:
            problems.append(f"{path}, line {number}: not UTF-8 text")
        except json.JSONDecodeError as error:
            problems.append(f"{path}, line {number}: not JSON: {error.msg} at column {error.colno}")
        except RecursionError:
            problems.append(f"{path}, line {number}: nested too deeply")
        except ValueError as error:
            problems.append(f"{path}, line {number}: {error}")
    if not examples and len(problems) == known:
        problems.append(f"{path}: holds no examples")
    kinds = {(len(example.choices) > 1, example.answer is None) for example in examples}
    if len(kinds) > 1:
        problems.append(f"{path}: mixes multiple choice, free answers or bare prompts; give each a task of its own")
    return Split(path, tuple(examples))


def _example(content: Any, line: int) -> Example:
    if not isinstance(content, dict):
        raise ValueError('expected a map like {"prompt": …, "choices": […], "answer": 0}')
    if unknown := [str(key) for key in content if key not in _KEYS]:
        raise ValueError(f"unknown keys {', '.join(unknown)}; known are {', '.join(sorted(_KEYS))}")
    if ("prompt" in content) == ("messages" in content):
        raise ValueError("needs either prompt or messages")
    prompt: str | tuple[tuple[str, str], ...]
    completion = content.get("completion")
    if "messages" in content:
        prompt = _messages(content["messages"])
        if "choices" not in content and completion is None and len(prompt) > 1 and prompt[-1][0] == "assistant":
            completion, prompt = prompt[-1][1], prompt[:-1]
    else:
        prompt = content["prompt"]
        if not isinstance(prompt, str):
            raise ValueError(f"prompt must be text, found {prompt!r:.40}")
    if completion is not None:
        if "choices" in content or "answer" in content:
            raise ValueError("has a completion and choices or an answer; one of them is meant")
        if not isinstance(completion, str) or not completion:
            raise ValueError("completion must be text that is not empty")
        return Example(prompt, (completion,), 0, line)
    if "choices" not in content:
        if "answer" in content:
            raise ValueError("has an answer and no choices")
        return Example(prompt, (), None, line)
    return Example(prompt, *_choices(content), line)


def _choices(content: dict[str, Any]) -> tuple[tuple[str, ...], int | None]:
    choices, answer = content["choices"], content.get("answer")
    if not isinstance(choices, list) or len(choices) < 2:
        raise ValueError("choices must be a list of at least two")
    if not all(isinstance(choice, str) and choice for choice in choices):
        raise ValueError("every choice must be text that is not empty")
    if len(set(choices)) < len(choices):
        raise ValueError("two choices are equal")
    if answer is None:
        return tuple(choices), None
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(choices):
        raise ValueError(f"answer must be the number of a choice, 0 to {len(choices) - 1}, found {answer!r:.40}")
    return tuple(choices), answer


def _messages(content: Any) -> tuple[tuple[str, str], ...]:
    if not isinstance(content, list) or not content:
        raise ValueError("messages must be a list of {role, content}")
    messages = []
    for message in content:
        if not isinstance(message, dict) or set(message) != {"role", "content"}:
            raise ValueError("every message must be {role, content}")
        role, text = message["role"], message["content"]
        if not isinstance(role, str) or not isinstance(text, str):
            raise ValueError("role and content of a message must be text")
        messages.append((role, text))
    return tuple(messages)


def _find(name: str, origin: Path) -> Path:
    """Relative to the file that names it."""
    # Not Path.expanduser, which raises where there is no such user.
    path = Path(os.path.expanduser(name))  # noqa: PTH111
    return path if path.is_absolute() else origin.parent / path


def _repeated(names: Sequence[str]) -> list[str]:
    return [name for name in dict.fromkeys(names) if names.count(name) > 1]


def _place(location: tuple[int | str, ...]) -> str:
    return "".join(f".{part}" for part in location)
