"""Looking at many tensors before any of them is merged: for methods whose parameters are of a layer or a model.

    for each group of tensors, and as often as the method's survey asks:
        one look at each of them, read tile by tile, or at some
    what was found goes into a file, so that a merge that goes on does not look again

What is found depends on nothing but the inputs and the recipe, as everything else does.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import xxhash

from streammerge.kernels.contract import Look, Problem
from streammerge.plan.budget import Schedule
from streammerge.plan.group import Group, groups_of
from streammerge.plan.plan import Plan
from streammerge.plan.tensor import UNWRITTEN, TensorPlan
from streammerge.run.arena import Arena
from streammerge.run.lane import CpuLane, Finder
from streammerge.run.looking import Looker, Work, solve
from streammerge.run.pipeline import READ_THREADS, ReadAhead, Tile
from streammerge.storage.lines import checked_line, read_lines
from streammerge.storage.sink import write_file
from streammerge.storage.source import Source

T = TypeVar("T")


class SurveyBook:
    """What was found, a small file per group in a folder, which only a plan of the same digest reads; or not kept."""

    def __init__(self, folder: Path | None, digest: str) -> None:
        self._folder, self._digest = folder, digest

    def get(self, key: str) -> Any:
        """What was found in a group, or None, also where the file is damaged."""
        path = self.path(key)
        lines, _ = read_lines(path.read_bytes()) if path is not None and path.exists() else ([], 0)
        return lines[0].get("found") if lines else None

    def put(self, key: str, found: list[Any]) -> None:
        """Keep what was found in a group. Returns when it is on disk."""
        path = self.path(key)
        if path is not None:
            self.keep(path, checked_line({"found": found}))

    def keep(self, path: Path, content: bytes) -> None:
        """Write the file of a group."""
        write_file(path, content)

    def path(self, key: str) -> Path | None:
        """The file of a group."""
        name = xxhash.xxh3_128_hexdigest(f"{self._digest} {key}".encode("utf-8", "surrogatepass"))
        return None if self._folder is None else self._folder / f"survey-{name}.json"


def survey(plan: Plan, pending: Sequence[TensorPlan], looker: Looker, reader: ReadAhead,
           book: SurveyBook) -> list[TensorPlan]:  # fmt: skip
    """The `pending` tensors of a plan with what surveys found for their steps."""
    everything = (*plan.tensors, *plan.asked)
    # By place in the output, or in the stage: a stage's name and a slash come before the latter.
    tensors = {_key(tensor): tensor for tensor in everything}
    waiting = {_key(tensor) for tensor in pending}
    users_of: dict[str, list[tuple[Key, int]]] = {}
    for tensor in everything:
        for number, step in enumerate(tensor.steps):
            users_of.setdefault(step.stream, []).append((_key(tensor), number))
    for group in groups_of(everything):
        streams = [tensor.steps[number].stream for tensor, number in group.members]
        if waiting.isdisjoint(name for stream in streams for name, _ in users_of[stream]):
            continue
        results = book.get(group.key)
        if results is None:
            members = [(tensors[_key(tensor)], number) for tensor, number in group.members]
            results = _survey_group(plan.seed, members, looker, reader)
            book.put(group.key, results)
        for stream, result in zip(streams, results, strict=True):
            for name, number in users_of[stream]:
                tensors[name] = _with_found(tensors[name], number, result)
    return [tensors[_key(tensor)] for tensor in pending]


Key = tuple[bool, str]


def _key(tensor: TensorPlan) -> Key:
    """Tells output tensors from those that are only looked at."""
    return tensor.shard == UNWRITTEN, tensor.name


def survey_alone(plan: Plan, schedule: Schedule, compiled: Finder, stopping: Callable[[], bool]) -> Plan:
    """The plan with what surveys find, looked for without a merge."""
    with _opened(plan, schedule, compiled, stopping) as (looker, reader):
        tensors = survey(plan, plan.tensors, looker, reader, SurveyBook(None, ""))
        return replace(plan, tensors=tuple(tensors))


def ask_together(plan: Plan, group: Group, ask: Callable[[Sequence[Problem]], Generator[list[Look | None], Any, T]],
                 schedule: Schedule, compiled: Finder, stopping: Callable[[], bool]) -> T:  # fmt: skip
    """What `ask` finds out about a group, without a merge."""
    with _opened(plan, schedule, compiled, stopping) as (looker, reader):
        return _ask(plan.seed, group.members, ask, looker, reader)


@contextmanager
def _opened(
    plan: Plan, schedule: Schedule, compiled: Finder, stopping: Callable[[], bool]
) -> Iterator[tuple[Looker, ReadAhead]]:
    with ExitStack() as stack:
        arena = Arena(schedule.slots, schedule.slot_bytes, schedule.scratch_bytes, touch=False)
        sources = [Source(checkpoint) for checkpoint in plan.checkpoints]
        for source in sources:
            stack.callback(source.close)
        lane = CpuLane(schedule.threads, compiled)
        stack.callback(lane.close)
        reader = ReadAhead(sources, arena, READ_THREADS)
        stack.callback(reader.close)
        yield Looker(schedule, sources=sources, arena=arena, reader=reader, lane=lane, stopping=stopping), reader


def _with_found(tensor: TensorPlan, number: int, found: Any) -> TensorPlan:
    steps = [replace(step, found=found) if i == number else step for i, step in enumerate(tensor.steps)]
    return replace(tensor, steps=tuple(steps))


def _survey_group(seed: int, members: Sequence[tuple[TensorPlan, int]], looker: Looker,
                  reader: ReadAhead) -> list[Any]:  # fmt: skip
    tensor, number = members[0]
    survey = tensor.steps[number].method.survey
    assert survey is not None
    return _ask(seed, members, survey, looker, reader)


def _ask(seed: int, members: Sequence[tuple[TensorPlan, int]],
         ask: Callable[[Sequence[Problem]], Generator[list[Look | None], Any, T]], looker: Looker,
         reader: ReadAhead) -> T:  # fmt: skip
    works = [Work(tensor, seed) for tensor, _ in members]
    numbers = [number for _, number in members]
    asking = ask([work.problem(number) for work, number in zip(works, numbers, strict=True)])
    return solve(asking, lambda looks: list(_answers(works, numbers, looks, looker, reader)))


def _answers(works: Sequence[Work], numbers: Sequence[int], looks: Sequence[Any], looker: Looker,
             reader: ReadAhead) -> Iterator[Any]:  # fmt: skip
    """The answers of all tensors, one after the other; while one is looked at, the next is read."""
    ahead: deque[tuple[Work, int, Any, list[Tile]]] = deque()

    def take() -> Any:
        work, number, look, tiles = ahead.popleft()
        return looker.look_at_all(work, number, look, tiles, keep=False)

    for work, number, look in zip(works, numbers, looks, strict=True):
        if look is not None and len(work.arguments) >= number and look.spans is None:
            tiles = looker.tiles(work.tensor)
            reader.request(tiles)
            ahead.append((work, number, look, tiles))
            if len(ahead) > 1:
                yield take()
            continue
        while ahead:
            yield take()
        if look is None:
            yield None
            continue
        if len(work.arguments) < number:
            tiles = looker.tiles(work.tensor)
            reader.request(tiles)
            for tile in looker.measure(work, tiles, resident=False, steps=number):
                reader.release(looker.get(tile))
        if look.spans is not None:
            yield looker.look_at_spans(work, number, look, None)
            continue
        tiles = looker.tiles(work.tensor)
        reader.request(tiles)
        yield looker.look_at_all(work, number, look, tiles, keep=False)
    while ahead:
        yield take()
