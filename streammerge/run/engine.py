"""The engine: walks the plan tensor by tensor, tile by tile. Has no decisions of its own.

    for each tensor of the plan that the journal does not have:
        merge    for each step: arguments = its method's measure, the looks answered from the tiles
                 each tile: program(tile, arguments) of every step; the last one's area -> WriteBehind
        copy     each tile -> WriteBehind

A tensor of few tiles keeps them in their slots through all looks; a longer one is read again for each. Reading runs
ahead: as soon as all tiles that the tensor in work will need are asked for, those of the next ones are.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from streammerge.base.errors import InputError, Stopped, UserError
from streammerge.kernels.chance import block_keys, stream_key
from streammerge.kernels.contract import BLOCK, Arguments, Grain, Look, Problem, Program
from streammerge.kernels.dtypes import torch_dtype
from streammerge.plan.budget import SCRATCH_BLOCKS, Schedule, stays, tile_elements
from streammerge.plan.plan import Plan, TensorPlan
from streammerge.run.arena import Area, Arena
from streammerge.run.compiling import signature_of
from streammerge.run.journal import Done
from streammerge.run.lane import Lane, Merged, Stretch, scan
from streammerge.run.pipeline import ReadAhead, Tile, WriteBehind, read_elements
from streammerge.storage.source import Source

# One tile is computed, the next one waits its turn.
_LOOKS_AT_ONCE = 2


class Engine:
    """One walk over a plan. Owns nothing; everything it works with is given to it."""

    def __init__(self, plan: Plan, schedule: Schedule, *, sources: Sequence[Source], arena: Arena, reader: ReadAhead,
                 writer: WriteBehind, lane: Lane, stopping: Callable[[], bool]) -> None:  # fmt: skip
        self._plan, self._schedule = plan, schedule
        self._sources, self._arena, self._reader, self._writer = sources, arena, reader, writer
        self._lane, self._stopping = lane, stopping
        # Tensors whose first tiles are asked for and not yet in work, with those tiles.
        self._ahead: deque[tuple[TensorPlan, list[Tile]]] = deque()
        self._waiting: Iterator[TensorPlan] = iter(())

    def run(self, tensors: Sequence[TensorPlan]) -> None:
        """Merge `tensors`. Raises Stopped at the next tile once `stopping()` is true."""
        self._waiting = iter(tensors)
        self._read_ahead()
        while self._ahead:
            tensor, tiles = self._ahead.popleft()
            if tensor.elements == 0:
                self._write_nothing(tensor)
            elif tensor.action == "merge":
                self._merge(tensor, tiles)
            else:
                self._copy(tensor, tiles)
            self._read_ahead()

    def _write_nothing(self, tensor: TensorPlan) -> None:
        """A tensor without elements has no tiles, but its line in the journal."""

        def finish(checksum: str) -> Done:
            return Done(tensor.name, checksum)

        self._writer.put(
            tensor, memoryview(b""), tensor.offset, ready=_nothing, release=_nothing, finish=finish
        )  # fmt: skip

    def _copy(self, tensor: TensorPlan, tiles: list[Tile]) -> None:
        self._read_ahead()
        seen: list[Merged] = []
        for tile in tiles:
            self._get(tile)
            for other in tile.areas[1:]:
                size = tile.elements * other.itemsize
                if tile.areas[0].bytes[:size] != other.bytes[:size]:
                    raise UserError(
                        f"{tensor.name}: its integers ({tensor.dtype}) differ between inputs, and integers are only "
                        f"copied. Give the models the same ones, or leave one of them out."
                    )
            seen.append(scan(tile.areas[0], tensor.dtype, tile.elements))
            self._put(tile, tile.areas[0], seen)

    def _merge(self, tensor: TensorPlan, tiles: list[Tile]) -> None:
        resident = self._stays(tensor)
        if resident:
            self._read_ahead()
        work = _Work(tensor, self._plan.seed)
        for number, step in enumerate(tensor.steps):
            measuring = step.method.measure(work.problem(number))
            answer: Any = None
            while True:
                try:
                    look = measuring.send(answer)
                except StopIteration as stop:
                    work.arguments.append(stop.value)
                    break
                if look.spans is not None:
                    answer = self._look_at_spans(work, number, look, tiles if resident else None)
                else:
                    answer = self._look_at_all(work, number, look, tiles, keep=resident)
                    if not resident:
                        tiles = self._tiles(tensor)
                        self._reader.request(tiles)

        self._read_ahead()
        last = len(tensor.steps) - 1
        seen: list[Merged] = []
        for tile in tiles:
            self._make(work, self._get(tile), last)
            out = tile.areas[-1]
            seen.append(self._run_step(work, last, tile.areas, out, tile.start, tile.elements))
            self._put(tile, out, seen)

    def _make(self, work: _Work, tile: Tile, steps: int) -> None:
        """Fill the areas of a tile's first `steps` steps."""
        reads = len(work.tensor.reads)
        for number in range(tile.made, steps):
            self._run_step(work, number, tile.areas, tile.areas[reads + number], tile.start, tile.elements).ready()
            tile.made = number + 1

    def _run_step(self, work: _Work, number: int, areas: Sequence[Area], out: Area, start: int, elements: int,
                  starts: Tensor | None = None) -> Merged:  # fmt: skip
        """Start one step on some whole units from element `start` on; or on units that begin at `starts`."""
        step = work.tensor.steps[number]
        program = step.method.program(step.settings)
        stretch = work.stretch(number, program, areas, start, elements, starts, needs_starts=program.needs_starts)
        signature = work.signatures[number]._replace(out=torch_dtype(step.dtype))
        return self._lane.merge(program, signature, stretch, out, work.arguments[number])

    def _look_at_all(self, work: _Work, number: int, look: Look, tiles: list[Tile], *, keep: bool) -> Any:
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
            self._make(work, self._get(tile), number)
            stretch = work.stretch(number, look.program, tile.areas, tile.start, tile.elements, needs_starts=needed)
            looking.append((tile, self._lane.look(look, work.signatures[number], stretch)))
            if len(looking) == _LOOKS_AT_ONCE:
                take()
        while looking:
            take()
        return look.answer(parts)

    def _look_at_spans(self, work: _Work, number: int, look: Look, tiles: list[Tile] | None) -> Any:
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
                self._run_step(work, earlier, areas, out, 0, elements, starts).ready()
            stretch = work.stretch(number, look.program, areas, 0, elements, starts, needs_starts=True)
            for part in self._lane.look(look, work.signatures[number], stretch)():
                if look.fold is not None:
                    look.fold(part)
                else:
                    parts.append(part)
        return look.answer(parts)

    def _gather(self, into: Sequence[Area], tiles: list[Tile], start: int, elements: int, at: int) -> None:
        """Copy elements [start, start + elements) out of tiles in memory, to element `at` on."""
        size_of_tile = tile_elements(tiles[0].tensor, self._schedule.tile_blocks)
        while elements:
            tile = self._get(tiles[start // size_of_tile])
            first = start - tile.start
            count = min(elements, tile.elements - first)
            for area, source in zip(into, tile.areas, strict=False):
                size = area.itemsize
                area.bytes[at * size : (at + count) * size] = source.bytes[first * size : (first + count) * size]
            start, at, elements = start + count, at + count, elements - count

    def _get(self, tile: Tile) -> Tile:
        if self._stopping():
            raise Stopped("stopped")
        try:
            return self._reader.wait_for(tile)
        except InputError as error:
            raise InputError(f"{error} (tensor {tile.tensor.name})") from error

    def _put(self, tile: Tile, area: Area, merged: list[Merged]) -> None:
        """Hand a tile's bytes to the writer; with the last tile, what the journal will say."""
        tensor = tile.tensor
        last = tile.start + tile.elements == tensor.elements

        def finish(checksum: str) -> Done:
            inputs, output = _add_counts(merged)
            return Done(tensor.name, checksum, inputs, output)

        self._writer.put(
            tensor,
            area.bytes[: tile.elements * area.itemsize],
            tensor.offset + tile.start * area.itemsize,
            ready=merged[-1].ready,
            release=lambda: self._reader.release(tile),
            finish=finish if last else None,
        )

    def _read_ahead(self) -> None:
        """Ask for the first tiles of the tensors to come, as far as that cannot starve the one in work.

        A tensor that is read several times, and does not stay in memory, must find its slots free when it asks for
        its tiles again: nothing is read past it before it is in work and has asked for its last pass.
        """
        while sum(len(tiles) for _, tiles in self._ahead) < 2 * self._schedule.slots:
            if self._ahead and self._reads_again(self._ahead[-1][0]):
                return
            tensor = next(self._waiting, None)
            if tensor is None:
                return
            tiles = self._tiles(tensor)
            self._reader.request(tiles)
            self._ahead.append((tensor, tiles))

    def _reads_again(self, tensor: TensorPlan) -> bool:
        return tensor.passes > 1 and not self._stays(tensor)

    def _stays(self, tensor: TensorPlan) -> bool:
        return stays(tensor, self._schedule)

    def _tiles(self, tensor: TensorPlan) -> list[Tile]:
        size = tile_elements(tensor, self._schedule.tile_blocks)
        # A later pass finds in the page cache what this one leaves there, if that is not taken from anyone.
        keep = self._reads_again(tensor) and tensor.read_bytes <= self._schedule.cache_bytes
        return [
            Tile(tensor, start, min(size, tensor.elements - start), keep_cached=keep)
            for start in range(0, tensor.elements, size)
        ]


class _Work:
    """A tensor in work: what every step is run with, and the arguments of those that are measured."""

    def __init__(self, tensor: TensorPlan, seed: int) -> None:
        self.tensor = tensor
        self.signatures = [signature_of(tensor, step) for step in tensor.steps]
        self.grains = [step.grain(tensor.shape) for step in tensor.steps]
        self.arguments: list[Arguments] = []
        self._keys = [
            [stream_key(seed, step.stream, i) for i in range(signature.models)]
            for step, signature in zip(tensor.steps, self.signatures, strict=True)
        ]

    def problem(self, number: int) -> Problem:
        """What the method of a step is asked to measure."""
        step, signature = self.tensor.steps[number], self.signatures[number]
        return Problem(
            self.tensor.elements, signature.models, step.settings, signature.work, self.grains[number], step.has_base
        )

    def stretch(self, number: int, program: Program, areas: Sequence[Area], start: int, elements: int,
                starts: Tensor | None = None, *, needs_starts: bool) -> Stretch:  # fmt: skip
        """The operands of a step in `areas`: whole units from element `start` on, or that begin at `starts`."""
        step, grain = self.tensor.steps[number], self.grains[number]
        keys = None
        if program.needs_keys and starts is None:
            keys = block_keys(self._keys[number], start // grain.unit, grain.units(elements))
        elif program.needs_keys:
            assert starts is not None
            firsts = (starts[:, 0] // grain.unit).tolist()
            keys = torch.cat([block_keys(self._keys[number], first, 1) for first in firsts])
        if needs_starts and starts is None:
            starts = (torch.arange(grain.units(elements)) * grain.unit + start)[:, None]
        return Stretch([areas[i] for i in step.operands], elements, grain, starts if needs_starts else None, keys)


def _nothing() -> None:
    pass


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


def _add_counts(merged: Sequence[Merged]) -> tuple[tuple[int, ...], int]:
    counts = [each.nonfinite() for each in merged]
    found = [inputs for inputs, _ in counts if inputs]
    return tuple(sum(column) for column in zip(*found, strict=True)), sum(output for _, output in counts)
