"""The engine: walks the plan tensor by tensor, tile by tile. Has no decisions of its own.

    for each tensor of the plan that the journal does not have:
        merge    arguments = the method's measure, its looks answered from the tiles
                 each tile: program(tile, arguments) -> output area -> WriteBehind
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
from streammerge.kernels.compiled import Signature
from streammerge.kernels.contract import BLOCK, Look, Problem, Program
from streammerge.kernels.dtypes import torch_dtype
from streammerge.plan.budget import SCRATCH_BLOCKS, Schedule, stays
from streammerge.plan.plan import Plan, TensorPlan
from streammerge.run.arena import Area, Arena
from streammerge.run.journal import Done
from streammerge.run.lane import Lane, Merged, scan
from streammerge.run.pipeline import ReadAhead, Tile, WriteBehind, read_elements, tile_dtypes
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
            for other in tile.inputs[1:]:
                size = tile.elements * other.itemsize
                if tile.inputs[0].bytes[:size] != other.bytes[:size]:
                    raise UserError(
                        f"{tensor.name}: its integers ({tensor.dtype}) differ between inputs, and integers are only "
                        f"copied. Give the models the same ones, or leave one of them out."
                    )
            seen.append(scan(tile.inputs[0], tensor.dtype, tile.elements))
            self._put(tile, tile.inputs[0], seen)

    def _merge(self, tensor: TensorPlan, tiles: list[Tile]) -> None:
        plan = self._plan
        resident = self._stays(tensor)
        work = torch_dtype(tensor.work)
        types = tuple(torch_dtype(spec.dtype) for spec in tensor.inputs)
        signature = Signature(work, types, plan.has_base, None)
        keys = [stream_key(plan.seed, tensor.name, i) for i in range(signature.models)]
        measuring = plan.method.measure(Problem(tensor.elements, signature.models, tensor.settings, work))
        if resident:
            self._read_ahead()

        answer: Any = None
        while True:
            try:
                look = measuring.send(answer)
            except StopIteration as stop:
                arguments: dict[str, Tensor] = stop.value
                break
            if look.spans is not None:
                answer = self._look_at_spans(tensor, look, signature, keys, tiles if resident else None)
            else:
                answer = self._look_at_all(look, signature, keys, tiles, keep=resident)
                if not resident:
                    tiles = self._tiles(tensor)
                    self._reader.request(tiles)

        self._read_ahead()
        program = plan.method.program(tensor.settings)
        signature = signature._replace(out=torch_dtype(tensor.dtype))
        seen: list[Merged] = []
        for tile in tiles:
            self._get(tile)
            starts = _starts(tile.first_block, tile.blocks) if program.needs_starts else None
            assert tile.output is not None
            merged = self._lane.merge(
                program, signature, tile.inputs, tile.output, tile.elements, starts, _keys(program, keys, tile),
                arguments,
            )  # fmt: skip
            seen.append(merged)
            self._put(tile, tile.output, seen)

    def _look_at_all(self, look: Look, signature: Signature, keys: list[int], tiles: list[Tile], *, keep: bool) -> Any:
        parts: list[Any] = []
        looking: deque[tuple[Tile, Callable[[], list[Any]]]] = deque()

        def take() -> None:
            tile, result = looking.popleft()
            parts.extend(result())
            if not keep:
                self._reader.release(tile)

        for tile in tiles:
            self._get(tile)
            needed = look.program.needs_starts or look.digest is not None
            starts = _starts(tile.first_block, tile.blocks) if needed else None
            result = self._lane.look(look, signature, tile.inputs, starts, _keys(look.program, keys, tile))
            looking.append((tile, result))
            if len(looking) == _LOOKS_AT_ONCE:
                take()
        while looking:
            take()
        return parts if look.digest is not None else torch.cat(parts)

    def _look_at_spans(self, tensor: TensorPlan, look: Look, signature: Signature, keys: list[int],
                       tiles: list[Tile] | None) -> Any:  # fmt: skip
        """Pack the spans into the scratch area, a few blocks at a time, from tiles in memory or from the files."""
        dtypes = tile_dtypes(tensor)[: len(tensor.read_inputs)]
        parts: list[Any] = []
        for pack in _packs(look.spans or ()):
            at = 0
            blocks = -(-sum(elements for _, elements in pack) // BLOCK)
            inputs = self._arena.areas(self._arena.slots, dtypes, blocks)
            starts = torch.zeros(blocks, 1, dtype=torch.int64)
            for start, elements in pack:
                if at % BLOCK == 0:
                    starts[at // BLOCK] = start
                if tiles is None:
                    self._reader.bytes_read += read_elements(self._sources, tensor, inputs, start, elements, at)
                else:
                    self._gather(inputs, tiles, start, elements, at)
                at += elements
            for area in inputs:
                area.zero_from(at)
            tile_keys = None
            if look.program.needs_keys:
                tile_keys = torch.cat([block_keys(keys, start // BLOCK, 1) for start in starts[:, 0].tolist()])
            parts += self._lane.look(look, signature, inputs, starts, tile_keys)()
        return parts if look.digest is not None else torch.cat(parts)

    def _gather(self, into: Sequence[Area], tiles: list[Tile], start: int, elements: int, at: int) -> None:
        """Copy elements [start, start + elements) out of tiles in memory, to element `at` on."""
        while elements:
            tile = self._get(tiles[start // (self._schedule.tile_blocks * BLOCK)])
            first = start - tile.start
            count = min(elements, tile.elements - first)
            for area, source in zip(into, tile.inputs, strict=True):
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
        return self._plan.passes(tensor) > 1 and not self._stays(tensor)

    def _stays(self, tensor: TensorPlan) -> bool:
        return stays(tensor, self._schedule)

    def _tiles(self, tensor: TensorPlan) -> list[Tile]:
        size = self._schedule.tile_blocks * BLOCK
        # A later pass finds in the page cache what this one leaves there, if that is not taken from anyone.
        fits = sum(tensor.inputs[i].nbytes for i in tensor.read_inputs) <= self._schedule.cache_bytes
        keep = self._reads_again(tensor) and fits
        tiles = []
        for start in range(0, tensor.elements, size):
            elements = min(size, tensor.elements - start)
            tiles.append(Tile(tensor, start // BLOCK, -(-elements // BLOCK), elements, keep_cached=keep))
        return tiles


def _nothing() -> None:
    pass


def _starts(first_block: int, blocks: int) -> Tensor:
    return ((torch.arange(blocks) + first_block) * BLOCK)[:, None]


def _keys(program: Program, keys: list[int], tile: Tile) -> Tensor | None:
    return block_keys(keys, tile.first_block, tile.blocks) if program.needs_keys else None


def _packs(spans: Sequence[tuple[int, int]]) -> Iterator[list[tuple[int, int]]]:
    """Groups of spans that fill at most the scratch area."""
    pack: list[tuple[int, int]] = []
    size = 0
    for start, elements in spans:
        if size + elements > SCRATCH_BLOCKS * BLOCK:
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
