"""Reading ahead and writing behind, so that disk and arithmetic work at the same time.

    ReadAhead     takes tiles in order; its threads wait for a free slot each and fill it
    WriteBehind   one thread hashes a tensor's bytes in order and writes them, another syncs and keeps the journal

Slots go to tiles strictly in the order they were asked for, so the tile that is needed next always has one.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import xxhash

from streammerge.kernels.contract import BLOCK
from streammerge.plan.gather import Gathered
from streammerge.plan.given import Drawn, Given
from streammerge.plan.scaled import Scaled
from streammerge.plan.tensor import TensorPlan
from streammerge.run.arena import Area, Arena
from streammerge.run.given import fill_given
from streammerge.run.journal import Done, Record
from streammerge.run.profile import Spent
from streammerge.run.rows import read_rows
from streammerge.run.scaling import read_scaled
from streammerge.storage.sink import Shard
from streammerge.storage.source import Source

READ_THREADS = 2
_SYNC_SECONDS = 2.0


@dataclass(eq=False)
class Tile:
    """A range of one tensor, in memory once `wait` has returned.

    `areas` has one for everything that is read, filled up with zeros, and one for the result of every step.
    `made` is the number of steps whose results are there.
    """

    tensor: TensorPlan
    start: int
    elements: int
    keep_cached: bool
    slot: int = -1
    areas: list[Area] = field(default_factory=list)
    made: int = 0
    _ready: threading.Event = field(default_factory=threading.Event)
    _error: BaseException | None = None

    @property
    def blocks(self) -> int:
        return -(-self.elements // BLOCK)

    def wait(self) -> None:
        """Return when the tile is in memory; raise what reading it raised."""
        self._ready.wait()
        if self._error is not None:
            raise self._error

    def finish(self, error: BaseException | None = None) -> None:
        self._error = error
        self._ready.set()


def read_elements(sources: Sequence[Source], tensor: TensorPlan, into: Sequence[Area], start: int, elements: int,
                  at: int = 0, *, keep_cached: bool = False) -> int:  # fmt: skip
    """Read elements [start, start + elements) of all that a tensor reads into `into` from element `at` on.

    Returns the bytes read.
    """
    count = 0
    for area, read in zip(into, tensor.reads, strict=False):
        if isinstance(read, Gathered):
            count += read_rows(sources, read, area, start, elements, at, keep_cached=keep_cached)
            continue
        if isinstance(read, Scaled):
            count += read_scaled(sources, read, area, start, elements, at, keep_cached=keep_cached)
            continue
        if isinstance(read, Given | Drawn):
            fill_given(read, area, start, elements, at)
            continue
        spec = read.spec
        view = area.bytes[at * area.itemsize : (at + elements) * area.itemsize]
        offset = spec.offset + start * area.itemsize
        sources[read.checkpoint].read_into(view, spec.file, offset, keep_cached=keep_cached)
        count += len(view)
    return count


class ReadAhead:
    """Threads that read tiles into slots. Owns the free slots."""

    def __init__(self, sources: Sequence[Source], arena: Arena, threads: int) -> None:
        self._sources, self._arena = sources, arena
        self._queue: deque[Tile] = deque()
        self._free = list(range(arena.slots))
        self._change = threading.Condition()
        self._closed = False
        self.bytes_read = 0
        self.spent = Spent()
        self._threads = [threading.Thread(target=self._work, name=f"read-{i}", daemon=True) for i in range(threads)]
        for thread in self._threads:
            thread.start()

    def request(self, tiles: Sequence[Tile]) -> None:
        with self._change:
            self._queue.extend(tiles)
            self._change.notify_all()

    def wait_for(self, tile: Tile) -> Tile:
        """`tile`, in memory."""
        began = time.perf_counter()
        tile.wait()
        self.spent.add("waiting", began)
        return tile

    def release(self, tile: Tile) -> None:
        """Give the tile's slot back."""
        with self._change:
            self._free.append(tile.slot)
            self._change.notify_all()

    def close(self) -> None:
        """Stop the threads; tiles still waiting are forgotten."""
        with self._change:
            self._closed = True
            self._queue.clear()
            self._change.notify_all()
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        while (tile := self._next()) is not None:
            began = time.perf_counter()
            try:
                self._fill(tile)
                self.spent.add("reading", began)
            except BaseException as error:  # noqa: BLE001 - handed over to whoever waits for the tile
                tile.finish(error)
            else:
                tile.finish()

    def _next(self) -> Tile | None:
        with self._change:
            while not self._closed and not (self._queue and self._free):
                self._change.wait()
            if self._closed:
                return None
            tile = self._queue.popleft()
            tile.slot = self._free.pop()
            return tile

    def _fill(self, tile: Tile) -> None:
        tensor = tile.tensor
        tile.areas = self._arena.areas(tile.slot, tensor.dtypes, tile.blocks)
        count = read_elements(
            self._sources, tensor, tile.areas, tile.start, tile.elements, keep_cached=tile.keep_cached
        )
        for area in tile.areas[: len(tensor.reads)]:
            area.zero_from(tile.elements)
        with self._change:
            self.bytes_read += count


@dataclass
class Finished:
    """A tensor whose last tile is written: what the journal will say."""

    shard: int
    done: Done


@dataclass(eq=False)
class _Write:
    """Bytes for one place in one shard; `ready` returns when they are there to be read."""

    tensor: TensorPlan
    data: memoryview
    offset: int
    ready: Callable[[], None]
    release: Callable[[], None]
    # Set on a tensor's last piece: makes the journal's line from its checksum.
    finish: Callable[[str], Done] | None


class WriteBehind:
    """Threads that hash, write, sync and keep the journal. Owns the open shards."""

    def __init__(self, record: Record, open_shard: Callable[[int], Shard], dirty_bytes: int,
                 remaining: dict[int, int], check_inputs: Callable[[], None]) -> None:  # fmt: skip
        """`open_shard` opens output shard number n; `remaining` counts the tensors each shard still waits for.

        `check_inputs` raises when an input has changed since the plan: then no shard is published any more.
        """
        self._record, self._open_shard = record, open_shard
        self._dirty_limit, self._remaining, self._check_inputs = dirty_bytes, remaining, check_inputs
        self._queue: deque[_Write] = deque()
        self._finished: list[Finished] = []
        self._shards: dict[int, Shard] = {}
        self._dirty = 0
        self._change = threading.Condition()
        self._closing = self._written_all = False
        self._error: BaseException | None = None
        self.bytes_written = 0
        self.spent = Spent()
        self._writer = threading.Thread(target=self._write_all, name="write", daemon=True)
        self._syncer = threading.Thread(target=self._sync_all, name="sync", daemon=True)
        self._writer.start()
        self._syncer.start()

    def put(self, tensor: TensorPlan, data: memoryview, offset: int, *, ready: Callable[[], None],
            release: Callable[[], None], finish: Callable[[str], Done] | None) -> None:  # fmt: skip
        """Queue `data` for byte `offset` of the tensor's shard. Pieces of a tensor come in order.

        Raises what an earlier write raised.
        """
        with self._change:
            self._raise_error()
            self._queue.append(_Write(tensor, data, offset, ready, release, finish))
            self._change.notify_all()

    def close(self) -> None:
        """Write, sync and journal everything queued, publish complete shards, and stop. Raises the first error."""
        with self._change:
            self._closing = True
            self._change.notify_all()
        self._writer.join()
        self._syncer.join()
        for shard in self._shards.values():
            shard.close()
        self._raise_error()

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    def _fail(self, error: BaseException) -> None:
        with self._change:
            self._error = self._error or error
            self._change.notify_all()

    def _write_all(self) -> None:
        hashing: xxhash.xxh3_128 | None = None
        try:
            while (piece := self._next_piece()) is not None:
                try:
                    hashing = self._write_piece(piece, hashing or xxhash.xxh3_128())
                finally:
                    piece.release()
        except BaseException as error:  # noqa: BLE001 - raised in the main thread by put and close
            self._fail(error)
        with self._change:
            self._written_all = True
            left, self._queue = list(self._queue), deque()
            self._change.notify_all()
        # After an error nothing is written any more. Whoever waits for a slot gets it, goes on, and meets the error
        # at the next put.
        for piece in left:
            piece.release()

    def _write_piece(self, piece: _Write, hashing: xxhash.xxh3_128) -> xxhash.xxh3_128 | None:
        """Write one piece; returns the hash to go on with, None after a tensor's last piece."""
        began = time.perf_counter()
        piece.ready()
        self.spent.add("unready", began)
        began = time.perf_counter()
        hashing.update(piece.data)
        self.spent.add("hashing", began)
        began = time.perf_counter()
        self._shard(piece.tensor.shard).write(piece.offset, piece.data)
        self.spent.add("writing", began)
        with self._change:
            self._dirty += len(piece.data)
            self.bytes_written += len(piece.data)
            if piece.finish is not None:
                self._finished.append(Finished(piece.tensor.shard, piece.finish(hashing.hexdigest())))
            self._change.notify_all()
        return None if piece.finish is not None else hashing

    def _next_piece(self) -> _Write | None:
        with self._change:
            while self._error is None:
                if self._queue and self._dirty < self._dirty_limit:
                    return self._queue.popleft()
                if self._closing and not self._queue:
                    return None
                self._change.wait()
            return None

    def _shard(self, number: int) -> Shard:
        with self._change:
            shard = self._shards.get(number)
        if shard is None:
            shard = self._open_shard(number)
            with self._change:
                self._shards[number] = shard
        return shard

    def _sync_all(self) -> None:
        last = False
        try:
            while not last:
                with self._change:
                    self._change.wait_for(self._should_sync, timeout=_SYNC_SECONDS)
                    # After a failed write, too: what was finished before it goes into the journal.
                    last = self._written_all or self._error is not None
                    finished, self._finished = self._finished, []
                    shards, dirty = list(self._shards.items()), self._dirty
                if dirty or finished:
                    self._sync(finished, shards, dirty)
        except BaseException as error:  # noqa: BLE001 - raised in the main thread by put and close
            self._fail(error)

    def _should_sync(self) -> bool:
        return self._dirty >= self._dirty_limit // 2 or self._written_all or self._error is not None

    def _sync(self, finished: list[Finished], shards: list[tuple[int, Shard]], dirty: int) -> None:
        began = time.perf_counter()
        for _, shard in shards:
            shard.sync()
        # Only now are the bytes safe; a line in the journal says that they are.
        if finished:
            self._record.append([item.done for item in finished])
        for item in finished:
            self._remaining[item.shard] -= 1
            if self._remaining[item.shard] == 0:
                with self._change:
                    shard = self._shards.pop(item.shard)
                self._check_inputs()
                shard.publish()
        with self._change:
            self._dirty -= dirty
            self._change.notify_all()
        self.spent.add("syncing", began)
