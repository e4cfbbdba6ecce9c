"""Looking at many tensors before any of them is merged: for methods whose parameters are of a layer or a model.

    for each group of tensors, and as often as the method's survey asks:
        one look at each of them, read tile by tile, or at some
    what was found goes into a file, so that a merge that goes on does not look again

What is found depends on nothing but the inputs and the recipe, as everything else does.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from streammerge.plan.names import layer_of
from streammerge.plan.plan import Plan, Step, TensorPlan
from streammerge.run.looking import Looker, Work
from streammerge.run.pipeline import ReadAhead
from streammerge.storage.sink import write_file

# What surveys found: by tensor, by the number of the step.
Found = Mapping[str, Mapping[int, Any]]


@dataclass(frozen=True)
class Group:
    """Tensors that are looked at together for one of their steps, in the order of the stage's names."""

    key: str
    members: tuple[tuple[TensorPlan, int], ...]

    @property
    def step(self) -> Step:
        tensor, number = self.members[0]
        return tensor.steps[number]


def groups_of(tensors: Sequence[TensorPlan]) -> list[Group]:
    """The groups that must be surveyed, earlier steps first. A tensor that stands twice in the output counts once."""
    found: dict[tuple[int, str, str, str], dict[str, tuple[TensorPlan, int]]] = {}
    for tensor in tensors:
        for number, step in enumerate(tensor.steps):
            scope = step.method.scope(step.settings)
            if scope != "tensor" and tensor.elements > 0:
                layer = layer_of(step.stream)
                place = "" if scope == "model" or layer is None else f"{layer[0]}.{layer[1]}"
                members = found.setdefault((number, step.stage, scope, place), {})
                members.setdefault(step.stream, (tensor, number))
    return [
        Group(" ".join(map(str, key)), tuple(members[name] for name in sorted(members)))
        for key, members in sorted(found.items())
    ]


class SurveyBook:
    """What was found, a small file per group in a folder, which only a plan of the same digest reads; or not kept."""

    def __init__(self, folder: Path | None, digest: str) -> None:
        self._folder, self._digest = folder, digest

    def get(self, key: str) -> Any:
        """What was found in a group, or None."""
        path = self._path(key)
        return json.loads(path.read_bytes()) if path is not None and path.exists() else None

    def put(self, key: str, found: list[Any]) -> None:
        """Keep what was found in a group. Returns when it is on disk."""
        path = self._path(key)
        if path is not None:
            write_file(path, json.dumps(found).encode())

    def _path(self, key: str) -> Path | None:
        name = xxhash.xxh3_128_hexdigest(f"{self._digest} {key}".encode("utf-8", "surrogatepass"))
        return None if self._folder is None else self._folder / f"survey-{name}.json"


def survey(plan: Plan, pending: Sequence[TensorPlan], looker: Looker, reader: ReadAhead, book: SurveyBook) -> Found:
    """What surveys find for the `pending` tensors of a plan."""
    waiting = {tensor.name for tensor in pending}
    found: dict[str, dict[int, Any]] = {}
    users_of: dict[str, list[tuple[TensorPlan, int]]] = {}
    for tensor in plan.tensors:
        for number, step in enumerate(tensor.steps):
            users_of.setdefault(step.stream, []).append((tensor, number))
    for group in groups_of(plan.tensors):
        users = [user for tensor, number in group.members for user in users_of[tensor.steps[number].stream]]
        if not any(tensor.name in waiting for tensor, _ in users):
            continue
        results = book.get(group.key)
        if results is None:
            results = _survey_group(plan, group, looker, reader, found)
            book.put(group.key, results)
        by_stream = {t.steps[n].stream: result for (t, n), result in zip(group.members, results, strict=True)}
        for tensor, number in users:
            found.setdefault(tensor.name, {})[number] = by_stream[tensor.steps[number].stream]
    return found


def _survey_group(plan: Plan, group: Group, looker: Looker, reader: ReadAhead, found: Found) -> list[Any]:
    works = [Work(tensor, plan.seed, found.get(tensor.name, {})) for tensor, _ in group.members]
    numbers = [number for _, number in group.members]
    method = group.step.method
    assert method.survey is not None
    surveying = method.survey([work.problem(number) for work, number in zip(works, numbers, strict=True)])
    answers: list[Any] = []
    while True:
        try:
            looks = surveying.send(answers) if answers else next(surveying)
        except StopIteration as stop:
            results: list[Any] = stop.value
            return results
        answers = list(_answers(works, numbers, looks, looker, reader))


def _answers(works: Sequence[Work], numbers: Sequence[int], looks: Sequence[Any], looker: Looker,
             reader: ReadAhead) -> Iterator[Any]:  # fmt: skip
    for work, number, look in zip(works, numbers, looks, strict=True):
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
