"""Examples as token batches. What a batch holds depends on the data alone, never on memory: scores repeat bit by bit.

The choices of an example share its prompt, which is computed once: one row holds the prompt and then every choice, a
mask keeps the choices from seeing each other, and each goes on from the prompt's last position.

    row         p p p p a a b b b c
    positions   0 1 2 3 4 5 4 5 6 4
    c sees      p p p p . . . . . c

Where a model cannot be told positions and masks (see network.py), every choice has a row of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import xxhash
from torch import Tensor

from streammerge.base.errors import TaskError
from streammerge.study.tasks import Example, Split, Task

# Padded tokens of a batch: enough for a product of matrices, and few enough to go round the threads.
_BATCH_TOKENS = 512


@dataclass(frozen=True)
class Scored:
    """One choice (or completion, or bare prompt) of one example: which logits say how likely its tokens are.

    `rows` number positions in the batch, row · width + column; the logits there predict `targets`.
    """

    example: int
    choice: int
    rows: tuple[int, ...]
    targets: tuple[int, ...]


@dataclass(frozen=True)
class Batch:
    """Rows of tokens: `ids` and `positions` (rows, width) int64, the lengths of the rows, and what is scored.

    `branches` (rows, width) int32 says which branch of its row a token is in: 0 the shared prompt, -1 padding. None
    for plain rows.
    """

    ids: Tensor
    positions: Tensor
    branches: Tensor | None
    lengths: tuple[int, ...]
    scored: tuple[Scored, ...]

    @cached_property
    def wanted(self) -> tuple[int, ...]:
        """The positions whose logits are needed, ascending."""
        return tuple(sorted({row for scored in self.scored for row in scored.rows}))

    def attention_mask(self) -> Tensor:
        """What a model's forward takes: (rows, width) int64 of ones and zeros, or for branches an additive mask
        (rows, 1, width, width) in float32."""
        width = self.ids.shape[1]
        if self.branches is None:
            return (torch.arange(width)[None, :] < torch.tensor(self.lengths)[:, None]).to(torch.int64)
        earlier = torch.ones(width, width, dtype=torch.bool).tril()
        query, key = self.branches[:, :, None], self.branches[:, None, :]
        # Padding sees itself: a row of a softmax must not be empty.
        sees = earlier & ((key == 0) | (key == query))
        lowest = torch.finfo(torch.float32).min
        return torch.where(sees, 0.0, lowest)[:, None]


@dataclass(frozen=True)
class TaskBatches:
    """One split of a task, ready to be run. `num_tokens` counts padding."""

    name: str
    batches: tuple[Batch, ...]
    examples: tuple[Example, ...]

    @cached_property
    def num_tokens(self) -> int:
        return sum(batch.ids.numel() for batch in self.batches)

    @cached_property
    def digest(self) -> str:
        """Names the tokens and what is scored of them."""
        hashing = xxhash.xxh3_128()
        for batch in self.batches:
            hashing.update(batch.ids.numpy().tobytes())
            hashing.update(batch.positions.numpy().tobytes())
            hashing.update(repr((batch.lengths, batch.scored)).encode())
        return hashing.hexdigest()


def make_batches(task: Task, split: Split, tokenizer: Any, *, shares_prompts: bool, longest: int | None) -> TaskBatches:
    """Tokenise a split. `longest` is the model's context. Raises TaskError with every line that cannot be scored."""
    problems: list[str] = []
    sequences = []
    for number, example in enumerate(split.examples):
        try:
            sequences.append(_sequence(example, number, tokenizer, shares_prompts))
        except ValueError as error:
            problems.append(f"line {example.line}: {error}")
            continue
        longest_here = max(len(sequence.positions) and max(sequence.positions) + 1 for sequence in sequences[-1])
        if longest is not None and longest_here > longest:
            problems.append(f"line {example.line}: {longest_here} tokens, the model's context is {longest}")
    if problems:
        raise TaskError(f"{split.path} (task {task.name})", problems)
    rows = [row for rows in sequences for row in rows]
    # Rows of like length together, the longest first: little padding.
    order = sorted(range(len(rows)), key=lambda i: (-len(rows[i].ids), i))
    batches, taken = [], 0
    while taken < len(order):
        width = len(rows[order[taken]].ids)
        count = max(1, _BATCH_TOKENS // width)
        batches.append(_batch([rows[i] for i in order[taken : taken + count]], width, shares_prompts))
        taken += count
    return TaskBatches(task.name, tuple(batches), split.examples)


@dataclass(frozen=True)
class _Row:
    """One row of a batch before padding. In `scored`, rows are columns of this row."""

    ids: list[int]
    positions: list[int]
    branches: list[int]
    scored: list[Scored]


def _sequence(example: Example, number: int, tokenizer: Any, shares_prompts: bool) -> list[_Row]:
    """The rows of one example. Raises ValueError when something cannot be scored."""
    text, special = _prompt_text(example, tokenizer)
    prompt = _encode(tokenizer, text, special)
    if not example.choices:
        if len(prompt) < 2:
            raise ValueError("the prompt has fewer than two tokens: there is nothing to score")
        scored = Scored(number, 0, tuple(range(len(prompt) - 1)), tuple(prompt[1:]))
        return [_Row(prompt, list(range(len(prompt))), [0] * len(prompt), [scored])]
    whole = [_encode(tokenizer, text + choice, special) for choice in example.choices]
    starts = []
    for choice, ids in zip(example.choices, whole, strict=True):
        start = _common(ids, prompt)
        if start == len(ids):
            raise ValueError(f"the choice {choice!r:.60} adds no token to the prompt")
        if start == 0:
            raise ValueError("the prompt is empty and the tokenizer puts nothing before a text: "
                             "the first token of a choice has nothing to be judged by")  # fmt: skip
        starts.append(start)
    if not shares_prompts:
        rows = []
        for i, (ids, start) in enumerate(zip(whole, starts, strict=True)):
            scored = Scored(number, i, tuple(range(start - 1, len(ids) - 1)), tuple(ids[start:]))
            rows.append(_Row(ids, list(range(len(ids))), [0] * len(ids), [scored]))
        return rows
    shared = min(_common(whole[0], ids) for ids in whole)
    row = _Row(whole[0][:shared], list(range(shared)), [0] * shared, [])
    for i, (ids, start) in enumerate(zip(whole, starts, strict=True)):
        offset = len(row.ids)
        columns = list(range(shared)) + list(range(offset, offset + len(ids) - shared))
        row.ids.extend(ids[shared:])
        row.positions.extend(range(shared, len(ids)))
        row.branches.extend([i + 1] * (len(ids) - shared))
        row.scored.append(Scored(number, i, tuple(columns[start - 1 : len(ids) - 1]), tuple(ids[start:])))
    return [row]


def _prompt_text(example: Example, tokenizer: Any) -> tuple[str, bool]:
    """The prompt, and whether the tokenizer is to add its special tokens."""
    if isinstance(example.prompt, str):
        return example.prompt, True
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError("has messages, and the model has no chat template; give a prompt")
    # Imported here: it is there where models are run.
    from jinja2 import TemplateError

    messages = [{"role": role, "content": content} for role, content in example.prompt]
    try:
        text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except TemplateError as error:
        raise ValueError(f"the model's chat template refuses the messages: {error}") from None
    return text, False


def _encode(tokenizer: Any, text: str, special: bool) -> list[int]:
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError("holds half a surrogate pair (\\ud800 to \\udfff), which is no text")
    ids: list[int] = tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
    return ids


def _common(left: Sequence[int], right: Sequence[int]) -> int:
    """How many leading tokens agree."""
    count = 0
    for a, b in zip(left, right, strict=False):
        if a != b:
            break
        count += 1
    return count


def _batch(rows: list[_Row], width: int, shares_prompts: bool) -> Batch:
    def padded(values: list[list[int]], fill: int, dtype: torch.dtype) -> Tensor:
        return torch.tensor([row + [fill] * (width - len(row)) for row in values], dtype=dtype)

    scored = [
        Scored(one.example, one.choice, tuple(i * width + column for column in one.rows), one.targets)
        for i, row in enumerate(rows)
        for one in row.scored
    ]
    return Batch(
        padded([row.ids for row in rows], 0, torch.int64),
        padded([row.positions for row in rows], 0, torch.int64),
        padded([row.branches for row in rows], -1, torch.int32) if shares_prompts else None,
        tuple(len(row.ids) for row in rows),
        tuple(scored),
    )
