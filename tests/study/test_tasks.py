"""Tasks and their data: what is read, and that everything wrong is said at once, with its line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from streammerge.base.errors import RecipeError, TaskError
from streammerge.study.tasks import Example, Task, load_tasks, read_tasks_file, shared_rows
from tests.study.tiny import write_lines

CHOICE = {"prompt": "a b", "choices": [" c", " d"], "answer": 1}
COMPLETION = {"prompt": "a b", "completion": " c"}
BARE = {"prompt": "a b"}


def read(path: Path, *lines: Any) -> tuple[Example, ...]:
    """The examples of a file of these lines."""
    write_lines(path / "dev.jsonl", *lines)
    return load(path).dev.examples


def load(path: Path, **entry: Any) -> Task:
    (task,) = load_tasks([{"name": "t", "dev": "dev.jsonl", **entry}], path / "tasks.yaml", None)
    return task


def problems_of(path: Path, *lines: Any) -> list[str]:
    """What is wrong with a file of these lines, without the file's name before it."""
    with pytest.raises(TaskError) as caught:
        read(path, *lines)
    prefix = f"{path / 'dev.jsonl'}"
    assert all(problem.startswith(prefix) for problem in caught.value.problems), caught.value.problems
    return [problem.removeprefix(prefix).lstrip(",: ") for problem in caught.value.problems]


# --- what is read ----------------------------------------------------------------------------------------------------


def test_choices_are_read_with_the_number_of_the_right_one(tmp_path: Path) -> None:
    assert read(tmp_path, CHOICE) == (Example("a b", (" c", " d"), 1, 1),)


def test_choices_without_an_answer_are_read(tmp_path: Path) -> None:
    (found,) = read(tmp_path, {"prompt": "a", "choices": [" c", " d"]})
    assert found == Example("a", (" c", " d"), None, 1)


def test_a_completion_is_a_single_choice(tmp_path: Path) -> None:
    assert read(tmp_path, COMPLETION) == (Example("a b", (" c",), 0, 1),)


def test_a_prompt_alone_has_no_choices(tmp_path: Path) -> None:
    assert read(tmp_path, BARE) == (Example("a b", (), None, 1),)


def test_a_final_assistant_message_is_the_completion(tmp_path: Path) -> None:
    messages = [{"role": "system", "content": "be"}, {"role": "user", "content": "a"}]
    answer = {"role": "assistant", "content": "c"}
    prompt = (("system", "be"), ("user", "a"))
    assert read(tmp_path, {"messages": [*messages, answer]}) == (Example(prompt, ("c",), 0, 1),)


def test_messages_that_end_with_the_user_are_a_prompt(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "a"}]
    found = read(tmp_path, {"messages": messages, "completion": "c"})
    assert found == (Example((("user", "a"),), ("c",), 0, 1),)
    found = read(tmp_path, {"messages": messages, "choices": ["c", "d"], "answer": 0})
    assert found == (Example((("user", "a"),), ("c", "d"), 0, 1),)
    assert read(tmp_path, {"messages": messages}) == (Example((("user", "a"),), (), None, 1),)


def test_with_choices_a_final_assistant_message_stays_in_the_prompt(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "I say"}]
    (found,) = read(tmp_path, {"messages": messages, "choices": [" c", " d"], "answer": 0})
    assert found.prompt == (("user", "a"), ("assistant", "I say"))


def test_empty_lines_and_windows_line_ends_are_no_matter(tmp_path: Path) -> None:
    (tmp_path / "dev.jsonl").write_bytes(b"\n" + json.dumps(BARE).encode() + b"\r\n\n  \n" + json.dumps(BARE).encode())
    assert [found.line for found in load(tmp_path).dev.examples] == [2, 5]


def test_spaces_and_letters_of_any_script_stay_as_they_are(tmp_path: Path) -> None:
    (found,) = read(tmp_path, {"prompt": " 猫\u2028 ", "completion": "\n chat  "})
    assert (found.prompt, found.choices) == (" 猫\u2028 ", ("\n chat  ",))


# --- what is wrong with a line ---------------------------------------------------------------------------------------

_MESSAGES = [{"role": "user", "content": "a"}]
BAD_LINES: dict[str, tuple[Any, str]] = {
    "no JSON": ('{"prompt": "a"', "not JSON"),
    "no JSON at all": ("hello", "not JSON"),
    "a list": ([1, 2], "expected a map"),
    "a number": (3, "expected a map"),
    "null": ("null", "expected a map"),
    "an unknown key": ({**CHOICE, "label": 1}, "unknown keys label; known are answer"),
    "no prompt": ({"completion": "c"}, "needs either prompt or messages"),
    "both prompt and messages": ({**BARE, "messages": _MESSAGES}, "needs either prompt or messages"),
    "a prompt that is no text": ({"prompt": 5}, "prompt must be text, found 5"),
    "a prompt that is null": ({"prompt": None}, "prompt must be text"),
    "an empty completion": ({**BARE, "completion": ""}, "completion must be text that is not empty"),
    "a completion that is no text": ({**BARE, "completion": ["c"]}, "completion must be text"),
    "completion and choices": ({**CHOICE, "completion": "c"}, "one of them is meant"),
    "completion and answer": ({**COMPLETION, "answer": 0}, "one of them is meant"),
    "an answer without choices": ({**BARE, "answer": 0}, "has an answer and no choices"),
    "one choice": ({**CHOICE, "choices": ["c"], "answer": 0}, "a list of at least two"),
    "choices that are text": ({**CHOICE, "choices": "cd"}, "a list of at least two"),
    "choices that are null": ({**CHOICE, "choices": None}, "a list of at least two"),
    "an empty choice": ({**CHOICE, "choices": ["c", ""]}, "every choice must be text that is not empty"),
    "a choice that is a number": ({**CHOICE, "choices": ["c", 4]}, "every choice must be text"),
    "equal choices": ({**CHOICE, "choices": ["c", "d", "c"]}, "two choices are equal"),
    "an answer beyond the choices": ({**CHOICE, "answer": 2}, "0 to 1, found 2"),
    "a negative answer": ({**CHOICE, "answer": -1}, "0 to 1, found -1"),
    "an answer that is a boolean": ({**CHOICE, "answer": True}, "0 to 1, found True"),
    "an answer that is text": ({**CHOICE, "answer": "1"}, "0 to 1, found '1'"),
    "an answer that is a fraction": ({**CHOICE, "answer": 1.0}, "0 to 1, found 1.0"),
    "no messages": ({"messages": []}, "messages must be a list"),
    "messages that are text": ({"messages": "a"}, "messages must be a list"),
    "a message without a role": ({"messages": [{"content": "a"}]}, "every message must be {role, content}"),
    "a message with a name": (
        {"messages": [{"role": "user", "content": "a", "name": "b"}]},
        "every message must be {role, content}",
    ),
    "a message without text": ({"messages": [{"role": "user", "content": None}]}, "must be text"),
    "an answer that says nothing": (
        {"messages": [*_MESSAGES, {"role": "assistant", "content": ""}]},
        "completion must be text that is not empty",
    ),
    "nested beyond reason": ("[" * 100_000, "nested too deeply"),
    "a number beyond reason": ('{"prompt": ' + "9" * 5000 + "}", "integer string"),
}


@pytest.mark.parametrize("label", BAD_LINES)
def test_a_bad_line_is_told_with_its_number(tmp_path: Path, label: str) -> None:
    line, expected = BAD_LINES[label]
    (problem,) = problems_of(tmp_path, "", line)
    assert problem.startswith("line 2: ")
    assert expected in problem


def test_all_bad_lines_are_one_error(tmp_path: Path) -> None:
    lines = [line for line, _ in BAD_LINES.values()]
    found = problems_of(tmp_path, *lines)
    assert [problem.split(":")[0] for problem in found] == [f"line {i + 1}" for i in range(len(lines))]
    assert all(expected in problem for (_, expected), problem in zip(BAD_LINES.values(), found, strict=True))


def test_good_lines_between_bad_ones_hide_nothing(tmp_path: Path) -> None:
    found = problems_of(tmp_path, CHOICE, {**CHOICE, "answer": 9}, CHOICE, "x", CHOICE)
    assert [problem.split(":")[0] for problem in found] == ["line 2", "line 4"]


def test_bytes_that_are_no_text_are_told(tmp_path: Path) -> None:
    (tmp_path / "dev.jsonl").write_bytes(json.dumps(BARE).encode() + b'\n{"prompt": "\xff"}\n')
    with pytest.raises(TaskError, match="line 2: not UTF-8 text"):
        load(tmp_path)


@pytest.mark.parametrize("others", [[CHOICE, COMPLETION], [BARE, COMPLETION], [CHOICE, {**CHOICE, "answer": None}]])
def test_one_file_holds_one_kind_of_question(tmp_path: Path, others: list[Any]) -> None:
    assert problems_of(tmp_path, *others) == [
        "mixes multiple choice, free answers or bare prompts; give each a task of its own"
    ]


@pytest.mark.parametrize("content", ["", "\n\n  \n"])
def test_a_file_without_examples_is_told(tmp_path: Path, content: str) -> None:
    (tmp_path / "dev.jsonl").write_text(content)
    with pytest.raises(TaskError, match=r"dev\.jsonl: holds no examples"):
        load(tmp_path)


def test_a_missing_file_and_a_folder_are_told(tmp_path: Path) -> None:
    write_lines(tmp_path / "dev.jsonl", BARE)
    with pytest.raises(TaskError, match=r"gone\.jsonl: the examples cannot be read: No such file"):
        load(tmp_path, test="gone.jsonl")
    with pytest.raises(TaskError, match="the examples cannot be read: Is a directory"):
        load(tmp_path, test=str(tmp_path))


@pytest.mark.parametrize("name", ["a\0b", "~nobody-of-that-name/dev.jsonl", "x" * 5000])
def test_a_name_that_no_file_can_have_is_told(tmp_path: Path, name: str) -> None:
    with pytest.raises(TaskError, match="the examples cannot be read"):
        load(tmp_path, dev=name)


# Any JSON, and maps that have the right keys with any JSON in them.
_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
_message = st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]) | _json, "content": st.text() | _json})
_line = _json | st.fixed_dictionaries(
    {},
    optional={
        "prompt": st.text() | _json,
        "messages": st.lists(_message, max_size=3) | _json,
        "choices": st.lists(st.text(max_size=2), max_size=3) | _json,
        "answer": st.integers(-1, 3) | _json,
        "completion": st.text() | _json,
    },
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300, deadline=None)
@given(lines=st.lists(_line, max_size=3))
@example(lines=[{"prompt": "\ud800", "completion": "\udfff"}])
@example(lines=[{"prompt": "a", "choices": [" b", " c"], "answer": 10**400}])
def test_any_json_is_an_example_or_a_task_error(tmp_path: Path, lines: list[Any]) -> None:
    try:
        found = read(tmp_path, *map(json.dumps, lines))
    except TaskError:
        return
    assert len(found) == len(lines) > 0
    for one in found:
        assert all(one.choices)
        assert one.answer is None or 0 <= one.answer < len(one.choices)
        assert isinstance(one.identity, str)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=100, deadline=None)
@given(content=st.binary(max_size=60))
def test_any_bytes_are_examples_or_a_task_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "dev.jsonl").write_bytes(content)
    with pytest.raises(TaskError):
        # No sixty bytes at random are a question; what they are is told.
        load(tmp_path)


# --- the list of tasks -----------------------------------------------------------------------------------------------


def list_problems(path: Path, entries: list[Any], models: list[str] | None = None) -> list[str]:
    write_lines(path / "dev.jsonl", BARE)
    with pytest.raises(TaskError) as caught:
        load_tasks(entries, path / "tasks.yaml", models)
    assert caught.value.exit_code == 2
    assert str(caught.value).startswith(str(path / "tasks.yaml"))
    return caught.value.problems


def entry(name: str, model: str | None = None) -> dict[str, Any]:
    return {"name": name, "dev": "dev.jsonl"} | ({} if model is None else {"model": model})


def test_a_task_has_everything_its_entry_says(tmp_path: Path) -> None:
    write_lines(tmp_path / "dev.jsonl", BARE)
    (tmp_path / "data").mkdir()
    write_lines(tmp_path / "data" / "test.jsonl", COMPLETION, COMPLETION)
    task = load(tmp_path, model="m", test="data/test.jsonl", metric="perplexity", length_normalised=True)
    assert (task.name, task.model, task.metric, task.length_normalised) == ("t", "m", "perplexity", True)
    assert task.dev.path == tmp_path / "dev.jsonl"
    assert task.test is not None
    assert len(task.test.examples) == 2


def test_what_an_entry_leaves_out_has_its_default(tmp_path: Path) -> None:
    write_lines(tmp_path / "dev.jsonl", BARE)
    task = load(tmp_path)
    assert (task.model, task.test, task.metric, task.length_normalised) == (None, None, None, False)


def test_files_may_be_named_by_their_full_path(tmp_path: Path) -> None:
    data = write_lines(tmp_path / "dev.jsonl", BARE)
    (task,) = load_tasks([{"name": "t", "dev": str(data)}], Path("/elsewhere/tasks.yaml"), None)
    assert task.dev.path == data


def test_with_models_every_task_belongs_to_one(tmp_path: Path) -> None:
    write_lines(tmp_path / "dev.jsonl", BARE)
    tasks = load_tasks([entry("t", "m"), entry("u", "n")], tmp_path / "tasks.yaml", ["n", "m"])
    assert [(task.name, task.model) for task in tasks] == [("t", "m"), ("u", "n")]


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        ([entry("t"), entry("u", "m"), entry("v", "n")], ["task t: names no model; it needs one of m, n"]),
        (
            [entry("t", "x"), entry("u", "m"), entry("v", "n")],
            ["task t: 'x' is no model of the recipe; those are m, n"],
        ),
        ([entry("t", "m"), entry("u", "m"), entry("v", "n")], ["model m has two tasks; give it one"]),
        ([entry("t", "m")], ["model n has no task: every model needs a dev file"]),
        ([entry("t", "m"), entry("t", "n")], ["the task name 't' is given twice"]),
    ],
    ids=["without a model", "unknown model", "two tasks for one model", "model without a task", "name given twice"],
)
def test_tasks_and_models_must_fit(tmp_path: Path, entries: list[Any], expected: list[str]) -> None:
    assert list_problems(tmp_path, entries, ["m", "n"]) == expected


def test_every_wrong_key_of_every_entry_is_told(tmp_path: Path) -> None:
    entries = ["text", {"name": "t"}, {**entry("u"), "metrics": "x"}, {**entry("v"), "length_normalised": "perhaps"}]
    found = list_problems(tmp_path, entries)
    assert [problem.split(":")[0] for problem in found] == [
        "tasks[0]", "tasks[1].dev", "tasks[2].metrics", "tasks[3].length_normalised",
    ]  # fmt: skip


def test_what_is_wrong_with_list_and_files_is_one_error(tmp_path: Path) -> None:
    write_lines(tmp_path / "bad.jsonl", "x", {**CHOICE, "answer": 5})
    write_lines(tmp_path / "worse.jsonl", "y")
    entries = [{"name": "t", "dev": "bad.jsonl", "test": "worse.jsonl"}, {"name": "u", "model": "m"}, entry("v", "z")]
    found = list_problems(tmp_path, entries, ["m"])
    for text in (
        "tasks[1].dev", "names no model", "'z' is no model", "model m has no task", "bad.jsonl, line 1",
        "bad.jsonl, line 2", "worse.jsonl, line 1",
    ):  # fmt: skip
        assert any(text in problem for problem in found), (text, found)


# --- the file of tasks -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [
        "- {name: t, dev: dev.jsonl}\n",
        "tasks:\n  - name: t\n    dev: dev.jsonl\n",
        '[{"name": "t", "dev": "dev.jsonl"}]',
    ],
    ids=["a list", "a map", "JSON"],
)
def test_a_tasks_file_is_a_list_or_a_map_with_one(tmp_path: Path, content: str) -> None:
    (tmp_path / "tasks.yaml").write_text(content)
    assert read_tasks_file(tmp_path / "tasks.yaml") == [{"name": "t", "dev": "dev.jsonl"}]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "expected a list of tasks"),
        (b"[]", "expected a list of tasks"),
        (b"tasks: []", "expected a list of tasks"),
        (b"tasks: {name: t}", "expected a list of tasks"),
        (b"tasks: []\nmodels: []", "expected a list of tasks"),
        (b"name: t", "expected a list of tasks"),
        (b"- {name: t", "not YAML"),
        (b"- \xff", "not YAML"),
        (b"- {a: 2020-99-99}", "not YAML"),
    ],
)
def test_a_tasks_file_that_is_something_else_is_told(tmp_path: Path, content: bytes, expected: str) -> None:
    (tmp_path / "tasks.yaml").write_bytes(content)
    with pytest.raises(TaskError, match=expected):
        read_tasks_file(tmp_path / "tasks.yaml")


def test_a_tasks_file_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="the tasks cannot be read: No such file"):
        read_tasks_file(tmp_path / "tasks.yaml")


def test_a_task_error_is_the_users_to_change() -> None:
    error = TaskError("where", ["what"])
    assert isinstance(error, RecipeError)
    assert error.exit_code == 2


# --- dev and test ----------------------------------------------------------------------------------------------------


def test_rows_that_dev_and_test_share_are_told_in_a_sentence(tmp_path: Path) -> None:
    rows = [{**CHOICE, "prompt": f"a {i}"} for i in range(10)]
    write_lines(tmp_path / "dev.jsonl", *rows[:8])
    write_lines(tmp_path / "test.jsonl", rows[9], *rows[:7])
    (sentence,) = shared_rows(load(tmp_path, test="test.jsonl"))
    assert sentence.startswith("task t: 7 of 8 test rows are dev rows as well")
    assert f"{tmp_path / 'test.jsonl'}, line 2, 3, 4, 5, 6 …" in sentence


def test_rows_apart_need_no_sentence(tmp_path: Path) -> None:
    write_lines(tmp_path / "dev.jsonl", CHOICE)
    # The same question with other choices, or another answer, is another row.
    write_lines(tmp_path / "test.jsonl", {**CHOICE, "answer": 0}, {**CHOICE, "choices": [" c", " e"]})
    assert shared_rows(load(tmp_path, test="test.jsonl")) == []
    assert shared_rows(load(tmp_path)) == []


def test_equal_rows_are_found_whatever_their_order_of_keys(tmp_path: Path) -> None:
    write_lines(tmp_path / "dev.jsonl", '{"prompt": "a", "choices": ["b", "c"], "answer": 0}')
    write_lines(tmp_path / "test.jsonl", "", '{"answer":0,"choices":["b","\\u0063"],"prompt":"a"}')
    (sentence,) = shared_rows(load(tmp_path, test="test.jsonl"))
    assert "1 of 1 test rows" in sentence
    assert "line 2" in sentence
