"""Answers a method's looks from tensors in memory, as the engine does from files: no tiles, no threads."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from streammerge.kernels.chance import block_keys
from streammerge.kernels.compiled import Run, Signature, eager
from streammerge.kernels.contract import BLOCK, Look, Program

T = TypeVar("T")


def in_blocks(values: Tensor) -> Tensor:
    """A tensor as (blocks, BLOCK), filled up with zeros."""
    flat = values.reshape(-1)
    padded = torch.zeros(-(-len(flat) // BLOCK) * BLOCK, dtype=values.dtype)
    padded[: len(flat)] = flat
    return padded.view(-1, BLOCK)


def block_starts(first: int, blocks: int) -> Tensor:
    """Where blocks begin: (blocks, 1)."""
    return ((torch.arange(blocks) + first) * BLOCK)[:, None]


@dataclass
class Memory:
    """The inputs of one tensor, base first; counts how often all of it is looked at, and how much in pieces."""

    inputs: Sequence[Tensor]
    has_base: bool = True
    work: torch.dtype = torch.float32
    stream_keys: Sequence[int] = ()
    # How a look's program is run.
    runner: Callable[[Program, Signature], Run] = eager
    full_looks: int = 0
    elements_in_spans: int = 0
    answers: list[Any] = field(default_factory=list)

    @property
    def signature(self) -> Signature:
        return Signature(self.work, tuple(x.dtype for x in self.inputs), self.has_base, None)

    def solve(self, looking: Generator[Look, Any, T]) -> T:
        """What `looking` returns once its looks are answered."""
        answer: Any = None
        while True:
            try:
                look = looking.send(answer)
            except StopIteration as stop:
                found: T = stop.value
                return found
            answer = self._answer(look)
            self.answers.append(answer)

    def _answer(self, look: Look) -> Any:
        if look.spans is None:
            self.full_looks += 1
            tiles = [in_blocks(x) for x in self.inputs]
            starts = block_starts(0, len(tiles[0]))
        else:
            self.elements_in_spans += sum(count for _, count in look.spans)
            flat = [x.reshape(-1) for x in self.inputs]
            tiles = [in_blocks(torch.cat([x[a : a + n] for a, n in look.spans])) for x in flat]
            # Only spans of whole blocks have starts that mean anything.
            starts = torch.zeros(len(tiles[0]), 1, dtype=torch.int64)
            at = 0
            for start, count in look.spans:
                if at % BLOCK == 0:
                    starts[at // BLOCK] = start
                at += count
        keys = None
        if look.program.needs_keys:
            keys = torch.cat([block_keys(self.stream_keys, int(start) // BLOCK, 1) for start in starts])
        run = self.runner(look.program, self.signature)
        parts = []
        for i in range(len(starts)):
            piece = slice(i, i + 1)
            result = run([x[piece] for x in tiles], None, starts[piece], None if keys is None else keys[piece],
                         look.arguments)  # fmt: skip
            parts.append(result if look.digest is None else look.digest(result, starts[piece]))
        return parts if look.digest is not None else torch.cat(parts)
