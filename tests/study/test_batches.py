"""Examples as tokens: what is in a batch, what of it is scored, and what cannot be scored.

The tests count tokens by hand: a word is a token, and `<s>` comes first (tests/study/tiny.py).
"""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from streammerge.base.errors import TaskError
from streammerge.study.batches import Batch, TaskBatches, make_batches
from streammerge.study.tasks import Example
from tests.study.tiny import TOKENS, encode, make_examples, make_task, make_tokenizer, sentence

Prompt = str | tuple[tuple[str, str], ...]

both_forms = pytest.mark.parametrize("shares", [True, False], ids=["shared prompts", "plain rows"])


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer()


def question(prompt: Prompt, *choices: str, answer: int | None = 0, line: int = 1) -> Example:
    return Example(prompt, choices, answer if choices else None, line)


def batches_of(tokenizer: Any, *examples: Example, shares: bool = True, longest: int | None = None) -> TaskBatches:
    task = make_task("t", examples)
    return make_batches(task, task.dev, tokenizer, shares_prompts=shares, longest=longest)


def problems_of(tokenizer: Any, *examples: Example, shares: bool = True, longest: int | None = None) -> list[str]:
    with pytest.raises(TaskError) as caught:
        batches_of(tokenizer, *examples, shares=shares, longest=longest)
    assert str(caught.value).startswith("t.dev.jsonl (task t): ")
    return caught.value.problems


def seen_from(batch: Batch, position: int) -> list[int]:
    """The tokens that a position may look at, its own last, in the order of their positions in the text."""
    width = batch.ids.shape[1]
    row, column = divmod(position, width)
    if batch.branches is None:
        assert batch.attention_mask()[row, column] == 1
        return batch.ids[row, : column + 1].tolist()
    seen = torch.nonzero(batch.attention_mask()[row, 0, column] == 0).flatten().tolist()
    positions = batch.positions[row, seen].tolist()
    assert sorted(positions) == list(range(len(positions)))
    return [batch.ids[row, i].item() for _, i in sorted(zip(positions, seen, strict=True))]


def assert_scores(batches: TaskBatches, texts: dict[tuple[int, int], tuple[list[int], int]]) -> None:
    """Of every choice (example, choice) the tokens of its whole text from a number on are scored, and no others.

    A token is scored where everything before it, and nothing else, is seen.
    """
    found = {}
    for batch in batches.batches:
        for one in batch.scored:
            assert (one.example, one.choice) not in found
            found[one.example, one.choice] = [
                (seen_from(batch, row), target) for row, target in zip(one.rows, one.targets, strict=True)
            ]
    assert found == {
        key: [(ids[:i], ids[i]) for i in range(start, len(ids))] for key, (ids, start) in texts.items()
    }  # fmt: skip


# --- rows ------------------------------------------------------------------------------------------------------------


def test_choices_go_on_from_a_prompt_they_share(tokenizer: Any) -> None:
    batches = batches_of(tokenizer, question("x y z", " a aa", " b ba bb", " c"))
    (batch,) = batches.batches
    assert batch.ids.tolist() == [[*encode("x y z"), *(TOKENS[word] for word in ("a", "aa", "b", "ba", "bb", "c"))]]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 4, 5, 4, 5, 6, 4]]
    assert batch.branches is not None
    assert batch.branches.tolist() == [[0, 0, 0, 0, 1, 1, 2, 2, 2, 3]]
    assert batch.lengths == (10,)
    assert [one.rows for one in batch.scored] == [(3, 4), (3, 6, 7), (3,)]
    assert batch.wanted == (3, 4, 6, 7)
    assert batches.num_tokens == 10
    # Of the third choice: the prompt, and itself.
    sees = batch.attention_mask()[0, 0, 9] == 0
    assert sees.tolist() == [True] * 4 + [False] * 5 + [True]


def test_plain_rows_hold_one_choice_each(tokenizer: Any) -> None:
    batches = batches_of(tokenizer, question("x y z", " a aa", " b ba bb", " c"), shares=False)
    (batch,) = batches.batches
    # The longest first.
    assert batch.ids.tolist() == [encode("x y z b ba bb"), [*encode("x y z a aa"), 0], [*encode("x y z c"), 0, 0]]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 3, 4, 5, 0], [0, 1, 2, 3, 4, 0, 0]]
    assert batch.branches is None
    assert batch.attention_mask().tolist() == [[1] * 7, [1] * 6 + [0], [1] * 5 + [0] * 2]
    assert [(one.choice, one.rows) for one in batch.scored] == [(1, (3, 4, 5)), (0, (10, 11)), (2, (17,))]


@both_forms
def test_every_token_of_a_choice_is_scored_where_all_before_it_is_seen(tokenizer: Any, shares: bool) -> None:
    examples = make_examples(40, seed=3)
    batches = batches_of(tokenizer, *examples, shares=shares)
    assert len(batches.batches) > 1
    texts = {
        (number, i): (encode(f"{one.prompt}{choice}"), len(encode(str(one.prompt))))
        for number, one in enumerate(examples)
        for i, choice in enumerate(one.choices)
    }
    assert_scores(batches, texts)


@both_forms
def test_a_completion_is_scored_like_a_choice(tokenizer: Any, shares: bool) -> None:
    assert_scores(batches_of(tokenizer, question("x y", " a b"), shares=shares), {(0, 0): (encode("x y a b"), 3)})


@both_forms
def test_of_a_bare_prompt_everything_after_the_first_token_is_scored(tokenizer: Any, shares: bool) -> None:
    assert_scores(batches_of(tokenizer, question("x y z"), shares=shares), {(0, 0): (encode("x y z"), 1)})


@both_forms
def test_leading_tokens_that_choices_have_in_common_are_scored_for_each(tokenizer: Any, shares: bool) -> None:
    batches = batches_of(tokenizer, question("x y", " a b c", " a b d", " a b e f"), shares=shares)
    assert_scores(batches, {
        (0, 0): (encode("x y a b c"), 3), (0, 1): (encode("x y a b d"), 3), (0, 2): (encode("x y a b e f"), 3),
    })  # fmt: skip
    if shares:
        # They are computed once.
        assert batches.batches[0].ids.tolist() == [encode("x y a b c d e f")]


@both_forms
@pytest.mark.parametrize("choices", [(" a", " a b"), (" a b", " a"), (" a", " a b", " c"), (" c a", " a b c", " a b")])
def test_a_choice_may_be_the_beginning_of_another(tokenizer: Any, shares: bool, choices: tuple[str, ...]) -> None:
    batches = batches_of(tokenizer, question("x", *choices), shares=shares)
    assert_scores(batches, {(0, i): (encode(f"x{choice}"), 2) for i, choice in enumerate(choices)})


@both_forms
def test_a_choice_may_change_the_last_token_of_the_prompt(tokenizer: Any, shares: bool) -> None:
    # "x a" and "b" are "x ab": what is new begins in the prompt.
    batches = batches_of(tokenizer, question("x a", "b", " c", "c d"), shares=shares)
    assert_scores(batches, {(0, 0): (encode("x ab"), 2), (0, 1): (encode("x a c"), 3), (0, 2): (encode("x ac d"), 2)})


@both_forms
def test_an_empty_prompt_will_do_where_texts_begin_with_a_token(tokenizer: Any, shares: bool) -> None:
    batches = batches_of(tokenizer, question("", "a b", "c"), shares=shares)
    assert_scores(batches, {(0, 0): (encode("a b"), 1), (0, 1): (encode("c"), 1)})


def test_prompt_and_choice_are_joined_as_they_stand(tokenizer: Any) -> None:
    (batch,) = batches_of(tokenizer, question("x", "y")).batches
    # One word that the tokenizer does not know: no space was added.
    assert batch.scored[0].targets == (TOKENS["<unk>"],)


# --- batches ---------------------------------------------------------------------------------------------------------


@both_forms
def test_rows_of_like_length_are_together_and_batches_are_of_a_size(tokenizer: Any, shares: bool) -> None:
    generator = random.Random(5)
    examples = [question(sentence(generator, generator.randint(1, 90)), " a", " b") for _ in range(60)]
    batches = batches_of(tokenizer, *examples, shares=shares)
    lengths = [length for batch in batches.batches for length in batch.lengths]
    assert lengths == sorted(lengths, reverse=True)
    assert len(lengths) == (60 if shares else 120)
    assert all(batch.ids.numel() <= 1024 for batch in batches.batches)
    assert len(batches.batches) < len(lengths) / 5
    for batch in batches.batches:
        for row, length in enumerate(batch.lengths):
            assert not batch.ids[row, length:].any()
            if batch.branches is not None:
                assert (batch.branches[row, length:] == -1).all()


def test_a_row_longer_than_a_batch_has_one_of_its_own(tokenizer: Any) -> None:
    batches = batches_of(tokenizer, question("x " * 1500, " a"), question("x", " a"))
    assert [batch.ids.shape for batch in batches.batches] == [(1, 1502), (1, 3)]


@both_forms
def test_padding_sees_something_and_is_seen_by_nothing(tokenizer: Any, shares: bool) -> None:
    (batch,) = batches_of(tokenizer, question("x y z", " a b", " c"), question("x", " a", " c"), shares=shares).batches
    mask = batch.attention_mask()
    if not shares:
        assert all(sum(row) == length for row, length in zip(mask.tolist(), batch.lengths, strict=True))
        return
    sees = mask[:, 0] == 0
    for row, length in enumerate(batch.lengths):
        assert sees[row, :, :].any(1).all()
        assert not sees[row, :length, length:].any()


@both_forms
def test_the_same_data_makes_the_same_batches(shares: bool) -> None:
    examples = make_examples(30, seed=1)
    first = batches_of(make_tokenizer(), *examples, shares=shares)
    again = batches_of(make_tokenizer(), *examples, shares=shares)
    assert first.digest == again.digest
    for one, other in zip(first.batches, again.batches, strict=True):
        assert torch.equal(one.ids, other.ids)
        assert torch.equal(one.positions, other.positions)
        assert one.scored == other.scored


def test_the_digest_names_tokens_and_what_is_scored(tokenizer: Any) -> None:
    questions = [
        question("x y", " a", " b"), question("x y", " b", " a"), question("x y", " a", " c"), question("x", " y a"),
        question("x y", " a"), question("x y a"), question("x z", " a"),
    ]  # fmt: skip
    digests = [batches_of(tokenizer, one).digest for one in questions]
    assert len(set(digests)) == len(questions)
    # Which choice is right is no matter of the network.
    assert batches_of(tokenizer, question("x y", " a", " b", answer=1)).digest == digests[0]


# --- what cannot be scored -------------------------------------------------------------------------------------------


@both_forms
def test_a_choice_that_adds_no_token_is_told_with_its_line(tokenizer: Any, shares: bool) -> None:
    (problem,) = problems_of(tokenizer, question("x", " a", "  ", line=7), shares=shares)
    assert problem == "line 7: the choice '  ' adds no token to the prompt"


@both_forms
def test_a_prompt_longer_than_the_context_is_told_with_its_line(tokenizer: Any, shares: bool) -> None:
    examples = [question("x y", " a b"), question("x y z", " a b", line=3), question("x " * 9, line=5)]
    assert problems_of(tokenizer, *examples, shares=shares, longest=5) == [
        "line 3: 6 tokens, the model's context is 5", "line 5: 10 tokens, the model's context is 5",
    ]  # fmt: skip


def test_many_choices_of_one_prompt_may_be_longer_than_the_context_together(tokenizer: Any) -> None:
    batches = batches_of(tokenizer, question("x y", " a b", " c d", " e f"), longest=5)
    assert batches.batches[0].ids.shape == (1, 9)


def test_a_prompt_of_one_token_has_nothing_to_score(tokenizer: Any) -> None:
    (problem,) = problems_of(tokenizer, question("", line=2))
    assert problem == "line 2: the prompt has fewer than two tokens: there is nothing to score"


@both_forms
def test_a_first_token_with_nothing_before_it_cannot_be_scored(shares: bool) -> None:
    tokenizer = make_tokenizer(begins=False)
    (problem,) = problems_of(tokenizer, question("", "a", "b", line=4), shares=shares)
    assert problem.startswith("line 4: the prompt is empty and the tokenizer puts nothing before a text")


def test_text_that_is_no_unicode_is_told_with_its_line(tokenizer: Any) -> None:
    problems = problems_of(tokenizer, question("x \ud800", " a", line=6), question("x", " a\udfff", line=7))
    assert problems == [
        f"line {line}: holds half a surrogate pair (\\ud800 to \\udfff), which is no text" for line in (6, 7)
    ]


def test_everything_that_cannot_be_scored_is_one_error() -> None:
    examples = [question("x " * 9, " a", line=1), question("x", " a", line=2), question("x", " ", line=3),
                question((("user", "x"),), "a", line=4)]  # fmt: skip
    found = problems_of(make_tokenizer(chats=False), *examples, longest=5)
    assert sorted(problem.split(":")[0] for problem in found) == ["line 1", "line 3", "line 4"]


# --- messages --------------------------------------------------------------------------------------------------------

_TALK = (("system", "be"), ("user", "x y"))


@both_forms
def test_messages_go_through_the_chat_template(tokenizer: Any, shares: bool) -> None:
    batches = batches_of(tokenizer, question(_TALK, "a b", "c"), shares=shares)
    # The template says itself what a text begins with: no <s> is added.
    prompt = encode("<system> be <user> x y <assistant>")[1:]
    assert_scores(batches, {
        (0, 0): ([*prompt, *encode("a b")[1:]], len(prompt)), (0, 1): ([*prompt, TOKENS["c"]], len(prompt)),
    })  # fmt: skip


def test_messages_without_a_template_are_told_with_their_line() -> None:
    (problem,) = problems_of(make_tokenizer(chats=False), question(_TALK, "a", line=8))
    assert problem == "line 8: has messages, and the model has no chat template; give a prompt"


def test_messages_that_the_template_refuses_are_told_with_their_line() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('System role not supported') }}"
    (problem,) = problems_of(tokenizer, question(_TALK, "a", line=9))
    assert problem == "line 9: the model's chat template refuses the messages: System role not supported"
