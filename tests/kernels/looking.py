"""Answers a method's looks from tensors in memory, as the engine does from files: no tiles, no threads."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from streammerge.kernels.chance import block_keys
from streammerge.kernels.compiled import Run, Signature, eager
from streammerge.kernels.contract import BLOCK, FLAT, Grain, Look, Program

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
    grain: Grain = FLAT

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
            answer = self.answer(look)
            self.answers.append(answer)

    def answer(self, look: Look) -> Any:
        """The answer to one look."""
        run = self.runner(look.program, self.signature)
        parts: list[Any] = []
        for tiles, start in self._units(look.spans):
            starts = torch.tensor([[start]])
            keys = block_keys(self.stream_keys, start // self.grain.unit, 1) if look.program.needs_keys else None
            part = run(tiles, None, starts, keys, look.arguments)
            if look.digest is not None:
                part = look.digest(part, starts)
            if look.fold is not None:
                look.fold(part)
            else:
                parts.append(part)
        return look.answer(parts)

    def _units(self, spans: Sequence[tuple[int, int]] | None) -> Iterator[tuple[list[Tensor], int]]:
        """Every unit, with its start; spans packed into blocks, or by rows one by one."""
        flat = [x.reshape(-1) for x in self.inputs]
        if spans is None:
            self.full_looks += 1
        else:
            self.elements_in_spans += sum(count for _, count in spans)
        if self.grain.width is not None:
            unit = self.grain.unit
            every = [(a, min(unit, len(flat[0]) - a)) for a in range(0, len(flat[0]), unit)]
            for start, count in every if spans is None else spans:
                yield [x[start : start + count].view(-1, self.grain.width) for x in flat], start
            return
        tiles = [in_blocks(x if spans is None else torch.cat([x[a : a + n] for a, n in spans])) for x in flat]
        # Only spans of whole blocks have starts that mean anything.
        starts = [i * BLOCK for i in range(len(tiles[0]))] if spans is None else [0] * len(tiles[0])
        at = 0
        for start, count in spans or ():
            if at % BLOCK == 0:
                starts[at // BLOCK] = start
            at += count
        for i, start in enumerate(starts):
            yield [x[i : i + 1] for x in tiles], start
