"""The layer-major sweep: any number of unwritten models scored in one pass over the weights.

    for each wave of (variant, task) pairs whose hidden states fit in memory, or all of them if these may spill:
        for each unit, front to back:
            read what its versions need, once
            for each version: make its tensors, put them into the network
                for each batch, for each stream that goes on with this version: run the unit

Variants whose versions agree up to a unit share one stream up to there. So a variant that differs from another in
layer l alone costs nothing before l.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from streammerge.base.errors import DoesNotFit, Stopped
from streammerge.base.units import format_size
from streammerge.study.batches import Batch, TaskBatches
from streammerge.study.network import Network
from streammerge.study.reading import LOGITS_AT_ONCE, Reading, as_score, read_batch
from streammerge.study.scorebook import Score, Scorebook
from streammerge.study.streams import Streams
from streammerge.study.team import Team
from streammerge.study.variants import Shelf, Variant, Version, version_bytes

MIB = 1 << 20
# An allowance for the temporaries of making a version eagerly, as kernels/whole.py does: so many of a piece of at most
# 4 blocks, in float32.
_MAKING_TEMPORARIES, _MAKING_ELEMENTS = 64, 4 * 65536


@dataclass(frozen=True)
class Job:
    """One variant to be scored on one task; with a `reference`, also how far its predictions are from that one's."""

    variant: Variant
    task: TaskBatches
    reference: Variant | None = None

    @property
    def key(self) -> str:
        """Names the score in the book."""
        reference = "" if self.reference is None else f" {self.reference.digest}"
        return f"{self.variant.digest} {self.task.digest}{reference}"


@dataclass
class SweepFacts:
    """What sweeping cost: seconds, passes over the weights, reads of a unit of one model, and forwards of one unit over
    one task's data. `plain_loads` and `plain_forwards` are what scoring every variant for itself would have cost."""

    jobs: int = 0
    waves: int = 0
    unit_loads: int = 0
    block_forwards: int = 0
    bytes_read: int = 0
    seconds: float = 0.0
    plain_loads: int = 0
    plain_forwards: int = 0


@dataclass(frozen=True)
class _Step:
    """A stream that goes through a unit: from where, with which version, and what it becomes."""

    task: int
    parent: str
    version: Version
    stream: str


@dataclass(frozen=True)
class Wave:
    """Jobs that are swept together, and the steps of every unit. `ends` gives, per job, the stream before the back."""

    jobs: tuple[Job, ...]
    tasks: tuple[TaskBatches, ...]
    steps: tuple[tuple[_Step, ...], ...]
    ends: tuple[str, ...]
    references: tuple[str, ...]

    @property
    def identity(self) -> str:
        return xxhash.xxh3_128_hexdigest("\n".join(job.key for job in self.jobs).encode())

    @property
    def block_forwards(self) -> int:
        """Forwards of one block over one task's data."""
        return sum(len(steps) for steps in self.steps[1:-1])

    @property
    def cost(self) -> float:
        """Tokens times units, in all."""
        return float(sum(self.tasks[step.task].num_tokens for steps in self.steps for step in steps))


@dataclass
class Sweeper:
    """Runs sweeps: owns nothing, adds to `facts` what they cost.

    `room_bytes` is what the process may still take; with a `spill` folder, hidden states go there. With a `team` other
    processes sweep a part of it.
    """

    network: Network
    shelf: Shelf
    book: Scorebook
    room_bytes: int
    limit_bytes: int
    spill: Path | None
    stopping: Callable[[], bool]
    progress: Callable[[float, float], None]
    # The threads that compute; each runs torch on itself alone, so that sums do not depend on their number.
    pool: ThreadPoolExecutor
    threads: int
    team: Team | None = None
    facts: SweepFacts = field(default_factory=SweepFacts)
    # A second shell for the backs of references; made when one is needed.
    _twin: Network | None = None

    def score(self, jobs: Sequence[Job]) -> None:
        """Score every job that the book does not have yet, and write it there.

        Raises DoesNotFit when not even one job fits, Stopped when told to stop; finished waves are in the book.
        """
        unique = list({job.key: job for job in jobs}.values())
        if self.team is None:
            self._sweep([job for job in unique if job.key not in self.book])
            return
        for part in self.team.turns(unique, self.book, self.stopping):
            self._sweep(part)

    def _sweep(self, missing: Sequence[Job]) -> None:
        if not missing:
            return
        began = time.perf_counter()
        waves = self.waves(missing)
        total, done = sum(wave.cost for wave in waves), 0.0
        self.progress(0.0, total)
        for wave in waves:
            for part in self._run(wave):
                done += part
                self.progress(done, total)
        self.shelf.check_unchanged()
        self.facts.jobs += len(missing)
        self.facts.waves += len(waves)
        self.facts.seconds += time.perf_counter() - began
        for job in missing:
            models = {number for version in job.variant.versions for number, _ in version.reads()}
            self.facts.plain_loads += self.network.num_units * len(models)
            self.facts.plain_forwards += self.network.num_units - 2

    def waves(self, jobs: Sequence[Job]) -> list[Wave]:
        """Jobs cut into waves that fit. A wave keeps at most one stream per job."""
        fixed = self._fixed_bytes(jobs)
        room = self.room_bytes - fixed
        sizes = [self._stream_bytes(job.task) * (1 if job.reference is None else 2) for job in jobs]
        if self.spill is not None:
            sizes = [0] * len(jobs)
        if room < max(sizes, default=0) or room < 0:
            need = self.limit_bytes - self.room_bytes + fixed + max(sizes)
            need = max(need + 64 * MIB, -(-need * 20 // 19))
            spilling = "" if self.spill is not None else ", or let hidden states spill to disk (--spill DIR)"
            raise DoesNotFit(
                f"{format_size(self.limit_bytes)} of memory is too little to score these models: one block of every "
                f"model and its working space take {format_size(fixed)}, the hidden states of one model on one task "
                f"{format_size(max(sizes))}. Allow {-(-need // 1_000_000)}MB{spilling}."
            )
        # Jobs of one task side by side: they share streams.
        order = sorted(range(len(jobs)), key=lambda i: (jobs[i].task.name, i))
        count = max(1, -(-sum(sizes) // max(room, 1)))
        while True:
            groups = _split([(jobs[i], sizes[i]) for i in order], count)
            if all(sum(size for _, size in group) <= room for group in groups):
                return [_wave([job for job, _ in group], self.network.num_units) for group in groups]
            count += 1

    def _stream_bytes(self, task: TaskBatches) -> int:
        return task.num_tokens * self.network.width * 4

    def _fixed_bytes(self, jobs: Sequence[Job]) -> int:
        """Weights and temporaries, whatever the number of streams."""
        weights = piece = 0
        for unit in range(self.network.num_units):
            variants = [variant for job in jobs for variant in (job.variant, job.reference) if variant is not None]
            versions = {variant.versions[unit].key: variant.versions[unit] for variant in variants}
            inputs, made = version_bytes(versions.values())
            twice = 2 if any(job.reference for job in jobs) and unit == self.network.num_units - 1 else 1
            weights = max(weights, inputs + made * twice)
            elements = [tensor.elements for version in versions.values() for tensor in version.tensors]
            piece = max(piece, min(_MAKING_ELEMENTS, max(elements, default=0)))
        batches = [batch for job in jobs for batch in job.task.batches]
        tokens = max(batch.ids.numel() for batch in batches)
        config, width = self.network.config, self.network.width
        inner = max(
            4 * width,
            *(int(getattr(config, name, None) or 0) for name in ("intermediate_size", "n_inner", "ffn_dim")),
        )
        scores = 2 * int(getattr(config, "num_attention_heads", 1)) * max(batch.ids.shape[1] for batch in batches)
        forward = 4 * tokens * (4 * inner + 8 * width + scores)
        logits = 16 * min(LOGITS_AT_ONCE, int(config.vocab_size) * max(len(batch.wanted) for batch in batches))
        return weights + self.threads * (max(forward, logits) + 4 * _MAKING_TEMPORARIES * piece)

    def _run(self, wave: Wave) -> Iterator[float]:
        """Sweep one wave; yields the cost of what was just done."""
        # A folder for each wave: another run may spill to the same place.
        streams = Streams(None if self.spill is None else self.spill / wave.identity)
        start = streams.resume_at(wave.identity)
        last = self.network.num_units - 1
        with torch.inference_mode():
            for unit in range(self.network.num_units):
                if unit < start:
                    yield float(sum(wave.tasks[step.task].num_tokens for step in wave.steps[unit]))
                    continue
                self.network.take_out()
                versions = {step.version.key: step.version for step in wave.steps[unit]}
                before = self.shelf.bytes_read
                read = [*versions.values()]
                if unit == last:
                    read += [job.reference.versions[last] for job in wave.jobs if job.reference is not None]
                self.shelf.load(read)
                self.facts.bytes_read += self.shelf.bytes_read - before
                self.facts.unit_loads += len({number for version in read for number, _ in version.reads()})
                if unit == last:
                    yield from self._run_back(wave, streams, versions)
                else:
                    yield from self._run_unit(wave, unit, streams, versions)
                    streams.unit_done(wave.identity, unit, {step.stream for step in wave.steps[unit]})
                self.shelf.forget()
        streams.close()

    def _run_unit(self, wave: Wave, unit: int, streams: Streams, versions: dict[str, Version]) -> Iterator[float]:
        steps = wave.steps[unit]
        left: dict[str, int] = {}
        for step in steps:
            left[step.parent] = left.get(step.parent, 0) + 1
        for key, version in versions.items():
            self.network.put(self.network.parameters_of(self.shelf.make(version, self.pool)))
            going = [step for step in steps if step.version.key == key]
            for step in going:
                left[step.parent] -= 1
            running: deque[tuple[float, Future[None]]] = deque()
            for number, task in enumerate(wave.tasks):
                here = [step for step in going if step.task == number]
                for i, batch in enumerate(task.batches if here else ()):
                    self._check_stop()
                    hidden, rest = self.network.call(batch, max(0, unit - 1))
                    for step in here:
                        done = left[step.parent] == 0
                        future = self.pool.submit(self._advance, streams, unit, step, i, batch, hidden, rest, done)
                        running.append((float(batch.ids.numel()), future))
                    while len(running) > 2 * self.threads:
                        tokens, future = running.popleft()
                        future.result()
                        yield tokens
                self.facts.block_forwards += len(here) if unit > 0 else 0
            # The next version takes the place of this one's weights.
            for tokens, future in running:
                future.result()
                yield tokens

    def _advance(self, streams: Streams, unit: int, step: _Step, number: int, batch: Batch, hidden: Tensor,
                 rest: dict[str, Any], done: bool) -> None:  # fmt: skip
        """One batch of one stream through a unit; `done` says that its parent is not needed any more."""
        with torch.inference_mode():
            if unit > 0:
                parent = streams.get(step.parent, number, (*batch.ids.shape, self.network.width))
                hidden = self.network.run_block(unit - 1, parent.to(self.network.device), rest)
            streams.put(step.stream, number, hidden)
            if unit > 0 and done:
                streams.drop(step.parent, number)

    def _run_back(self, wave: Wave, streams: Streams, versions: dict[str, Version]) -> Iterator[float]:
        # What spilled belongs to all jobs of the wave: were some of them in the book, the rest would begin anew.
        held: list[tuple[str, Score]] = []
        for key, version in versions.items():
            self.network.put(self.network.parameters_of(self.shelf.make(version, self.pool)))
            for i, job in enumerate(wave.jobs):
                if wave.steps[-1][i].version.key != key:
                    continue
                other = None
                if job.reference is not None:
                    other = self._twin = self._twin or self.network.twin()
                    other.put(other.parameters_of(self.shelf.make(job.reference.versions[-1], self.pool)))

                def read(number: int, batch: Batch, i: int = i, other: Network | None = other) -> Reading:
                    self._check_stop()
                    shape = (*batch.ids.shape, self.network.width)
                    with torch.inference_mode():
                        hidden = streams.get(wave.ends[i], number, shape)
                        reference = None if other is None else streams.get(wave.references[i], number, shape)
                        return read_batch(self.network, batch, hidden, other, reference)

                readings = list(self.pool.map(read, *zip(*enumerate(job.task.batches), strict=True)))
                if self.spill is None:
                    self.book.add(job.key, as_score(job.task, readings))
                else:
                    held.append((job.key, as_score(job.task, readings)))
                yield float(job.task.num_tokens)
        for name, score in held:
            self.book.add(name, score)
        self.book.sync()

    def _check_stop(self) -> None:
        if self.stopping():
            raise Stopped("Stopped. Finished scores are saved: run the same command again to go on.")


def _wave(jobs: Sequence[Job], num_units: int) -> Wave:
    """The steps of every unit: one for each stream that no other shares."""
    tasks = list({job.task.digest: job.task for job in jobs}.values())
    numbers = {task.digest: i for i, task in enumerate(tasks)}
    steps: list[list[_Step]] = [[] for _ in range(num_units)]
    known: dict[tuple[int, str, str], str] = {}

    def follow(variant: Variant, task: int) -> str:
        stream = f"start-{task}"
        for unit, version in enumerate(variant.versions[:-1]):
            key = (task, stream, version.key)
            if key not in known:
                known[key] = f"{unit}-{len(steps[unit])}"
                steps[unit].append(_Step(task, stream, version, known[key]))
            stream = known[key]
        return stream

    ends, references = [], []
    for job in jobs:
        task = numbers[job.task.digest]
        ends.append(follow(job.variant, task))
        references.append("" if job.reference is None else follow(job.reference, task))
        steps[-1].append(_Step(task, ends[-1], job.variant.versions[-1], ""))
    return Wave(tuple(jobs), tuple(tasks), tuple(map(tuple, steps)), tuple(ends), tuple(references))


def _split(items: Sequence[tuple[Job, int]], count: int) -> list[list[tuple[Job, int]]]:
    """Cut into `count` runs of about equal size."""
    total = sum(size for _, size in items)
    groups: list[list[tuple[Job, int]]] = [[]]
    taken = 0
    for item in items:
        if groups[-1] and len(groups) < count and taken >= total * len(groups) / count:
            groups.append([])
        groups[-1].append(item)
        taken += item[1]
    return groups
