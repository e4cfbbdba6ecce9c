"""Looking at tensors: answers what methods ask, from tiles in memory or from the files, and runs single steps.

A tensor that stays has its tiles in their slots from the first look to the last; any other is read for every look.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from streammerge.base.errors import InputError, Stopped
from streammerge.kernels.chance import block_keys, stream_key
from streammerge.kernels.contract import BLOCK, KEPT, Arguments, Grain, Look, Problem, Program, round_once
from streammerge.kernels.dtypes import torch_dtype
from streammerge.kernels.fold import Factors, factors, fold_span
from streammerge.plan.adapter import Change
from streammerge.plan.budget import SCRATCH_BLOCKS, Schedule, keeps, stays, tile_elements
from streammerge.plan.tensor import TensorPlan
from streammerge.run.arena import Area, Arena
from streammerge.run.compiling import signature_of
from streammerge.run.draws import Draws
from streammerge.run.lane import Lane, Merged, Stretch
from streammerge.run.pipeline import ReadAhead, Tile, read_elements
from streammerge.storage.source import Source

# One tile is computed, the next one waits its turn.
_LOOKS_AT_ONCE = 2

Q = TypeVar("Q")
T = TypeVar("T")


class Work:
    """A tensor in work: what every step is run with, and the arguments of those that are measured."""

    def __init__(self, tensor: TensorPlan, seed: int, draws: Draws | None = None) -> None:
        self.tensor, self._draws = tensor, draws
        self.signatures = [signature_of(tensor, step) for step in tensor.steps]
        self.grains = [step.grain(tensor.shape) for step in tensor.steps]
        self.arguments: list[Arguments] = []
        # What methods kept of their looks, step by step.
        self.kept: list[Tensor | None] = []
        self._keys = [
            [stream_key(seed, step.stream, i) for i in range(signature.models)]
            for step, signature in zip(tensor.steps, self.signatures, strict=True)
        ]

    def program(self, number: int) -> Program:
        """The program that a measured step is run with."""
        step = self.tensor.steps[number]
        if self.kept[number] is None:
            return step.method.program(step.settings)
        assert step.method.kept_programs is not None
        return step.method.kept_programs(step.settings)[0]

    def problem(self, number: int) -> Problem:
        """What the method of a step is asked to measure."""
        step, signature = self.tensor.steps[number], self.signatures[number]
        return Problem(
            self.tensor.elements, signature.models, step.settings, signature.work, self.grains[number], step.has_base,
            step.found,
        )  # fmt: skip

    def stretch(self, number: int, program: Program, areas: Sequence[Area], start: int, elements: int,
                starts: Tensor | None = None, *, needs_starts: bool) -> Stretch:  # fmt: skip
        """The operands of a step in `areas`: whole units from element `start` on, or that begin at `starts`."""
        step, grain = self.tensor.steps[number], self.grains[number]
        keys = None
        if program.needs_keys and step.settings.sequential is not None:
            assert self._draws is not None
            keys = self._draws.tile(self.tensor.name, self.signatures[number].models, start, elements)
        elif program.kept:
            kept, first = self.kept[number], start // grain.unit
            assert kept is not None
            units = slice(first, first + grain.units(elements)) if starts is None else starts[:, 0] // grain.unit
            keys = kept[units]
        elif program.needs_keys and starts is None:
            keys = block_keys(self._keys[number], start // grain.unit, grain.units(elements))
        elif program.needs_keys:
            assert starts is not None
            firsts = (starts[:, 0] // grain.unit).tolist()
            keys = torch.cat([block_keys(self._keys[number], first, 1) for first in firsts])
        if needs_starts and starts is None:
            starts = (torch.arange(grain.units(elements)) * grain.unit + start)[:, None]
        return Stretch([areas[i] for i in step.operands], elements, grain, starts if needs_starts else None, keys)


class Looker:
    """Runs looks and steps. Owns nothing; everything it works with is given to it."""

    def __init__(self, schedule: Schedule, *, sources: Sequence[Source], arena: Arena, reader: ReadAhead, lane: Lane,
                 stopping: Callable[[], bool]) -> None:  # fmt: skip
        self._schedule, self._sources, self._arena = schedule, sources, arena
        self._reader, self._lane, self._stopping = reader, lane, stopping
        # The factors of the adapters of one tensor, the one in work.
        self._factors: dict[Change, Factors] = {}
        self._factors_of: TensorPlan | None = None

    def reads_again(self, tensor: TensorPlan) -> bool:
        """Whether the tiles of a tensor are asked for more than once."""
        return tensor.passes > 1 and not self.stays_in_memory(tensor)

    def stays_in_memory(self, tensor: TensorPlan) -> bool:
        """Whether its tiles stay in their slots through all looks."""
        return stays(tensor, self._schedule)

    def tiles(self, tensor: TensorPlan) -> list[Tile]:
        """The tiles of a tensor, not yet asked for."""
        size = tile_elements(tensor, self._schedule.tile_blocks)
        # A later pass finds in the page cache what this one leaves there, if that is not taken from anyone.
        keep = self.reads_again(tensor) and tensor.read_bytes <= self._schedule.cache_bytes
        return [
            Tile(tensor, start, min(size, tensor.elements - start), keep_cached=keep)
            for start in range(0, tensor.elements, size)
        ]

    def get(self, tile: Tile) -> Tile:
        """A tile that was asked for, in memory. Raises Stopped once stopping is asked."""
        if self._stopping():
            raise Stopped("stopped")
        try:
            return self._reader.wait_for(tile)
        except InputError as error:
            raise InputError(f"{error} (tensor {tile.tensor.name})") from error

    def measure(self, work: Work, tiles: list[Tile], *, resident: bool, steps: int | None = None) -> list[Tile]:
        """Find the arguments of all steps, or the first `steps`. Returns the tiles to go on with, asked for."""
        for number in range(len(work.arguments), len(work.tensor.steps) if steps is None else steps):
            step = work.tensor.steps[number]
            problem = work.problem(number)
            if step.change is not None:
                problem = replace(problem, found=self._loaded(work.tensor, step.change))

            def answer(look: Look, number: int = number) -> Any:
                nonlocal tiles
                if look.spans is not None:
                    return self.look_at_spans(work, number, look, tiles if resident else None)
                found = self.look_at_all(work, number, look, tiles, keep=resident)
                if not resident:
                    tiles = self.tiles(work.tensor)
                    self._reader.request(tiles)
                return found

            problem = replace(
                problem,
                keeps=keeps(work.tensor, self._schedule) and step.kept_bytes(work.tensor.shape) > 0,
                sifts=self._schedule.sifts,
            )
            arguments = solve(step.method.measure(problem), answer)
            work.kept.append(arguments.pop(KEPT, None))
            if step.change is not None:
                # The factors of many tensors at once would be too much.
                arguments = {name: value for name, value in arguments.items() if name == "share"}
            work.arguments.append(arguments)
        return tiles

    def make(self, work: Work, tile: Tile, steps: int) -> None:
        """Fill the areas of a tile's first `steps` steps."""
        reads = len(work.tensor.reads)
        for number in range(tile.made, steps):
            self.run_step(work, number, tile.areas, tile.areas[reads + number], tile.start, tile.elements).ready()
            tile.made = number + 1

    def run_step(self, work: Work, number: int, areas: Sequence[Area], out: Area, start: int, elements: int,
                  starts: Tensor | None = None) -> Merged:  # fmt: skip
        """Start one step on some whole units from element `start` on; or on units that begin at `starts`."""
        step = work.tensor.steps[number]
        program = work.program(number)
        stretch = work.stretch(number, program, areas, start, elements, starts, needs_starts=program.needs_starts)
        signature = work.signatures[number]._replace(out=torch_dtype(step.dtype))
        return self._lane.merge(program, signature, stretch, out, self._arguments(work, number))

    def _arguments(self, work: Work, number: int) -> Arguments:
        """Those that were measured, and the factors of an adapter: these are not kept for every tensor."""
        change = work.tensor.steps[number].change
        measured = work.arguments[number]
        return measured if change is None else {**self._loaded(work.tensor, change).arguments, **measured}

    def _loaded(self, tensor: TensorPlan, change: Change) -> Factors:
        """The factors of one change of a tensor; those of other tensors are forgotten."""
        if self._factors_of is not tensor:
            self._factors.clear()
            self._factors_of = tensor
        if change not in self._factors:
            source = self._sources[change.checkpoint]
            stored = []
            for spec in change.specs:
                values = torch.empty(spec.shape, dtype=torch_dtype(spec.dtype))
                # Through bytes: numpy knows no bfloat16.
                source.read_into(memoryview(values.view(-1).view(torch.uint8).numpy().data), spec.file, spec.offset)
                self._reader.bytes_read += spec.nbytes
                stored.append(values)
            left, right, *norms = stored
            self._factors[change] = factors(
                left, right, norms[0] if norms else None, rank=change.rank, scale=change.scale,
                transposed=change.transposed,
            )  # fmt: skip
        return self._factors[change]

    def look_at_all(self, work: Work, number: int, look: Look, tiles: list[Tile], *, keep: bool) -> Any:
        """Answer a step's look from all tiles, which were asked for; they are given back unless they are to be kept."""
        parts: list[Any] = []
        looking: deque[tuple[Tile, Callable[[], list[Any]]]] = deque()

        def take() -> None:
            tile, result = looking.popleft()
            for part in result():
                if look.fold is not None:
                    look.fold(part)
                else:
                    parts.append(part)
            if not keep:
                self._reader.release(tile)

        needed = look.program.needs_starts or look.digest is not None
        for tile in tiles:
            self.make(work, self.get(tile), number)
            stretch = work.stretch(number, look.program, tile.areas, tile.start, tile.elements, needs_starts=needed)
            looking.append((tile, self._lane.look(look, work.signatures[number], stretch)))
            if len(looking) == _LOOKS_AT_ONCE:
                take()
        while looking:
            take()
        return look.answer(parts)

    def look_at_spans(self, work: Work, number: int, look: Look, tiles: list[Tile] | None) -> Any:
        """Pack the spans into the scratch area, a few blocks at a time, from tiles in memory or from the files."""
        tensor, grain = work.tensor, work.grains[number]
        parts: list[Any] = []
        for pack in _packs(look.spans or (), grain):
            at = 0
            elements = sum(count for _, count in pack)
            blocks = -(-elements // BLOCK)
            areas = self._arena.areas(self._arena.slots, tensor.dtypes, blocks)
            reads = areas[: len(tensor.reads)]
            starts = torch.zeros(grain.units(elements), 1, dtype=torch.int64)
            for start, count in pack:
                if at % grain.unit == 0:
                    starts[at // grain.unit] = start
                if tiles is None:
                    self._reader.bytes_read += read_elements(self._sources, tensor, areas, start, count, at)
                else:
                    self._gather(reads, tiles, start, count, at)
                at += count
            for area in reads:
                area.zero_from(at)
            for earlier in range(number):
                out = areas[len(reads) + earlier]
                if tensor.steps[earlier].change is not None:
                    self._fold_pack(work, earlier, areas, out, pack)
                else:
                    self.run_step(work, earlier, areas, out, 0, elements, starts).ready()
            stretch = work.stretch(number, look.program, areas, 0, elements, starts, needs_starts=True)
            for part in self._lane.look(look, work.signatures[number], stretch)():
                if look.fold is not None:
                    look.fold(part)
                else:
                    parts.append(part)
        return look.answer(parts)

    def _fold_pack(self, work: Work, number: int, areas: Sequence[Area], out: Area,
                   pack: Sequence[tuple[int, int]]) -> None:  # fmt: skip
        """Fold a change into packed spans: what is added to an element goes by its place in the tensor."""
        step, arguments, at = work.tensor.steps[number], self._arguments(work, number), 0
        values, folded = areas[step.operands[0]].tensor.view(-1), out.tensor.view(-1)
        for start, count in pack:
            span = fold_span(values[at : at + count], start, arguments, step.settings)
            folded[at : at + count] = round_once(span, folded.dtype)
            at += count
        out.zero_from(at)

    def _gather(self, into: Sequence[Area], tiles: list[Tile], start: int, elements: int, at: int) -> None:
        """Copy elements [start, start + elements) out of tiles in memory, to element `at` on."""
        size_of_tile = tile_elements(tiles[0].tensor, self._schedule.tile_blocks)
        while elements:
            tile = self.get(tiles[start // size_of_tile])
            first = start - tile.start
            count = min(elements, tile.elements - first)
            for area, source in zip(into, tile.areas, strict=False):
                size = area.itemsize
                area.bytes[at * size : (at + count) * size] = source.bytes[first * size : (first + count) * size]
            start, at, elements = start + count, at + count, elements - count


def solve(asking: Generator[Q, Any, T], answer: Callable[[Q], Any]) -> T:
    """What `asking` returns once its questions are answered."""
    sent: Any = None
    while True:
        try:
            question = asking.send(sent)
        except StopIteration as stop:
            result: T = stop.value
            return result
        sent = answer(question)


def _packs(spans: Sequence[tuple[int, int]], grain: Grain) -> Iterator[list[tuple[int, int]]]:
    """Groups of spans that fill at most the scratch area; by rows one by one."""
    pack: list[tuple[int, int]] = []
    size = 0
    for start, elements in spans:
        if pack and (grain.width is not None or size + elements > SCRATCH_BLOCKS * BLOCK):
            yield pack
            pack, size = [], 0
        pack.append((start, elements))
        size += elements
    if pack:
        yield pack
