"""The engine: walks the plan tensor by tensor, tile by tile. Has no decisions of its own.

    for each tensor of the plan that the journal does not have:
        merge    for each step: arguments = its method's measure, the looks answered from the tiles
                 each tile: program(tile, arguments) of every step; the last one's area -> WriteBehind
                 in 8 bits: its codes -> WriteBehind, and after the last tile their scales
        copy     each tile -> WriteBehind

A tensor of few tiles keeps them in their slots through all looks; a longer one is read again for each. Reading runs
ahead: as soon as all tiles that the tensor in work will need are asked for, those of the next ones are.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch

from streammerge.base.errors import UserError
from streammerge.plan.budget import Schedule
from streammerge.plan.plan import Plan
from streammerge.plan.tensor import TensorPlan
from streammerge.run.arena import Area
from streammerge.run.draws import Draws
from streammerge.run.journal import Done
from streammerge.run.lane import Merged, scan
from streammerge.run.looking import Looker, Work
from streammerge.run.pipeline import ReadAhead, Tile, WriteBehind
from streammerge.run.scaling import Scaler


class Engine:
    """One walk over a plan. Owns nothing; everything it works with is given to it."""

    def __init__(
        self, plan: Plan, schedule: Schedule, *, looker: Looker, reader: ReadAhead, writer: WriteBehind
    ) -> None:
        self._seed, self._schedule = plan.seed, schedule
        self._draws = Draws(plan) if plan.draws_in_turn else None
        self._looker, self._reader, self._writer = looker, reader, writer
        # Tensors whose first tiles are asked for and not yet in work, with those tiles.
        self._ahead: deque[tuple[TensorPlan, list[Tile]]] = deque()
        self._waiting: Iterator[TensorPlan] = iter(())
        # Threads that make codes; they begin with the first one to be made.
        self._coders = ThreadPoolExecutor(schedule.threads, "code", torch.set_num_threads, (1,))

    def run(self, tensors: Sequence[TensorPlan]) -> None:
        """Merge `tensors`. Raises Stopped at the next tile once `stopping()` is true."""
        self._waiting = iter(tensors)
        self._read_ahead()
        with self._coders:
            self._run()

    def _run(self) -> None:
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

        for name in tensor.names:
            self._writer.put(
                tensor, memoryview(b""), tensor.offset, ready=_nothing, release=_nothing, finish=partial(Done, name)
            )

    def _copy(self, tensor: TensorPlan, tiles: list[Tile]) -> None:
        self._read_ahead()
        seen: list[Merged] = []
        for tile in tiles:
            self._looker.get(tile)
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
        looker = self._looker
        resident = looker.stays_in_memory(tensor)
        if resident:
            self._read_ahead()
        work = Work(tensor, self._seed, self._draws)
        tiles = looker.measure(work, tiles, resident=resident)
        scaler = None if tensor.scaling is None else Scaler(tensor.scaling, tensor.elements, self._coders)
        if scaler is not None and not scaler.is_quick:
            tiles = self._look_at_results(work, tiles, scaler, resident=resident)
        self._read_ahead()
        last = len(tensor.steps) - 1
        seen: list[Merged] = []
        for tile in tiles:
            looker.make(work, looker.get(tile), last)
            out = tile.areas[len(tensor.reads) + last]
            seen.append(looker.run_step(work, last, tile.areas, out, tile.start, tile.elements))
            if scaler is not None:
                seen[-1].ready()
                scaler.store(out, tile.areas[-1], tile.start, tile.elements)
            self._put(tile, tile.areas[-1], seen)
        if scaler is not None:
            self._put_scales(tensor, scaler)

    def _look_at_results(self, work: Work, tiles: list[Tile], scaler: Scaler, *, resident: bool) -> list[Tile]:
        """Make the whole result to find its scales. Returns the tiles to go on with, asked for."""
        looker, tensor = self._looker, work.tensor
        for tile in tiles:
            looker.make(work, looker.get(tile), len(tensor.steps))
            scaler.look(tile.areas[-2], tile.start, tile.elements)
            if not resident:
                self._reader.release(tile)
        if not resident:
            tiles = looker.tiles(tensor)
            self._reader.request(tiles)
        return tiles

    def _put_scales(self, tensor: TensorPlan, scaler: Scaler) -> None:
        scaling = tensor.scaling
        assert scaling is not None
        self._writer.put(
            tensor, scaler.stored(), tensor.scale_offset, ready=_nothing, release=_nothing,
            finish=partial(Done, scaling.scale_name),
        )  # fmt: skip

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
            if self._ahead and self._looker.reads_again(self._ahead[-1][0]):
                return
            tensor = next(self._waiting, None)
            if tensor is None:
                return
            tiles = self._looker.tiles(tensor)
            self._reader.request(tiles)
            self._ahead.append((tensor, tiles))


def _nothing() -> None:
    pass


def _add_counts(merged: Sequence[Merged]) -> tuple[tuple[int, ...], int]:
    counts = [each.nonfinite() for each in merged]
    found = [inputs for inputs, _ in counts if inputs]
    return tuple(sum(column) for column in zip(*found, strict=True)), sum(output for _, output in counts)
