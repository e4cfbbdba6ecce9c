"""The sweep says of a merge that was never written what plain transformers says of it when it is, to the last bit.

And it says so whatever the memory, the threads, the waves and the crashes, for about half of the work.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import streammerge
from streammerge.base.errors import DoesNotFit, InputError, OutputError, Stopped, StreamMergeError, TaskError, UserError
from streammerge.study import reading
from streammerge.study.batches import Batch, TaskBatches
from streammerge.study.evaluation import evaluate
from streammerge.study.judge import Judge, one_of
from streammerge.study.mixture import Family
from streammerge.study.scorebook import Score, Scorebook
from streammerge.study.streams import Streams
from streammerge.study.sweep import Job, Sweeper
from streammerge.study.tasks import Task
from streammerge.study.variants import Variant
from streammerge.study.workbench import StudyOptions, Workbench, open_workbench
from tests.models import write_recipe
from tests.study.tiny import (
    LAYERS,
    Stops,
    make_examples,
    make_model,
    make_specialist,
    make_task,
    plain_model,
    plan_of,
    read_weights,
    variant_on,
    workbench,
    write_lines,
)

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own

UNITS = LAYERS + 2
TASKS = (make_task("choose", make_examples(12, seed=1)), make_task("go on", make_examples(9, seed=2, choices=1)))


@dataclass(frozen=True)
class Models:
    """A base, two specialists, and recipes of them (or the checkpoints themselves) by what they try."""

    base: Path
    specialists: tuple[Path, Path]
    recipes: dict[str, Path]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return make_family(tmp_path_factory.mktemp("models"), "llama")


def make_family(folder: Path, architecture: str, **changes: Any) -> Models:
    base = make_model(folder / "base", architecture, dtype=torch.bfloat16, **changes)
    a, b = (make_specialist(folder / name, base, seed=seed) for seed, name in ((1, "a"), (2, "b")))
    # What a block is called, whatever the architecture.
    second = next(name for name in read_weights(base) if ".1." in name).split(".1.")[0] + ".1."
    dropped = {"scale": [{"filter": second, "value": 0.0}, {"value": 0.9}], "density": 0.5, "weight": 0.7}

    def recipe(name: str, method: str, **top: Any) -> Path:
        return write_recipe(folder / f"{name}.yaml", method, (a, b), base=base, **top)

    halves = {"density": 0.5, "scale": 0.8, "weight": 0.7}
    recipes = {
        "the base": base,
        "a specialist": a,
        "a sum": recipe("sum", "task_arithmetic", per_model={"weight": 0.6}),
        "another sum": recipe("another", "task_arithmetic", per_model={"weight": 0.3}),
        "pruned": recipe("pruned", "hi_merging", per_model=halves),
        "pruned, in float32": recipe("pruned32", "hi_merging", per_model=halves, dtype="float32"),
        "a layer dropped": recipe("dropped", "hi_merging", per_model=dropped),
        "dropped at random": recipe("dare", "dare_ties", per_model={"density": 0.6, "weight": 0.5}),
    }
    return Models(base, (a, b), recipes)


def prepare(bench: Workbench, tasks: Sequence[Task] = TASKS) -> list[TaskBatches]:
    return [bench.prepare(task, "dev").batches for task in tasks]


def jobs_on(bench: Workbench, models: Models) -> dict[tuple[str, str], Job]:
    """Every recipe and every task."""
    tasks = prepare(bench)
    return {
        (name, task.name): Job(variant_on(bench, recipe), task)
        for name, recipe in models.recipes.items()
        for task in tasks
    }


def scores_on(bench: Workbench, models: Models) -> dict[tuple[str, str], Score]:
    jobs = jobs_on(bench, models)
    bench.sweeper.score(list(jobs.values()))
    return {key: bench.book[job.key] for key, job in jobs.items()}


@pytest.fixture(scope="module")
def scores(models: Models) -> dict[tuple[str, str], Score]:
    """Every score, in the plainest way: one wave, one thread, no files."""
    with workbench(models.base) as bench:
        found = scores_on(bench, models)
        assert bench.sweeper.facts.waves == 1
    return found


# --- brute force -----------------------------------------------------------------------------------------------------


def plain_log_probs(plain: Any, arguments: dict[str, Tensor], batch: Batch) -> Tensor:
    """(wanted positions, vocabulary) of a model as it is.

    The head runs at the wanted positions alone, as in the sweep: a product of matrices with other rows may end with
    other last bits. That the logits of the whole model are the same but for those is checked as well.
    """
    wanted = torch.tensor(batch.wanted)
    with torch.inference_mode():
        hidden = getattr(plain, plain.base_model_prefix)(**arguments, use_cache=False)[0]
        logits: Tensor = plain.get_output_embeddings()(hidden.flatten(0, 1)[wanted])
        whole = plain(**arguments, use_cache=False).logits.flatten(0, 1)[wanted]
    torch.testing.assert_close(logits, whole, rtol=1e-5, atol=1e-5)
    return logits.log_softmax(-1)


def plain_score(plain: Any, bench: Workbench, task: TaskBatches) -> Score:
    """What a model that was written says."""
    found = {}
    for batch in task.batches:
        log_probs = plain_log_probs(plain, bench.network.arguments(batch), batch)
        place = {position: i for i, position in enumerate(batch.wanted)}
        for one in batch.scored:
            values = [log_probs[place[row], target].item() for row, target in zip(one.rows, one.targets, strict=True)]
            found[one.example, one.choice] = sum(values)
    choices = [max(1, len(example.choices)) for example in task.examples]
    return Score(tuple(tuple(found[i, k] for k in range(count)) for i, count in enumerate(choices)))


def written(recipe: Path, out: Path) -> Path:
    """The checkpoint of a recipe: what was given, or what the merge writes."""
    if recipe.is_dir():
        return recipe
    streammerge.merge(recipe, out, compile="off", threads=1)
    return out


def test_every_score_is_that_of_the_merge_that_is_written(models: Models, scores: dict[tuple[str, str], Score],
                                                          tmp_path: Path) -> None:  # fmt: skip
    with workbench(models.base) as bench:
        tasks = prepare(bench)
        assert any(batch.branches is not None for task in tasks for batch in task.batches)
        for name, recipe in models.recipes.items():
            plain = plain_model(written(recipe, tmp_path / name))
            for task in tasks:
                assert scores[name, task.name] == plain_score(plain, bench, task), (name, task.name)
    assert len(set(scores.values())) == len(scores)


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("gpt2", {}),
        ("mixtral", {}),
        ("gemma3_text", {"sliding_window": 16}),
        ("llama", {"tie_word_embeddings": True}),
    ],
    ids=["gpt2", "experts", "windows", "tied"],
)
def test_so_it_is_for_other_architectures(tmp_path: Path, architecture: str, changes: dict[str, Any]) -> None:
    models = make_family(tmp_path, architecture, **changes)
    with workbench(models.base) as bench:
        (task,) = prepare(bench, TASKS[:1])
        for name in ("a specialist", "pruned", "a layer dropped"):
            job = Job(variant_on(bench, models.recipes[name]), task)
            bench.sweeper.score([job])
            plain = plain_model(written(models.recipes[name], tmp_path / name))
            assert bench.book[job.key] == plain_score(plain, bench, task), name


# --- the same scores -------------------------------------------------------------------------------------------------


def least_room(sweeper: Sweeper, jobs: Sequence[Job]) -> int:
    """The least room that the jobs fit in."""
    low, high = 0, 1 << 40
    while high - low > 1:
        sweeper.room_bytes = (low + high) // 2
        try:
            sweeper.waves(jobs)
            high = sweeper.room_bytes
        except DoesNotFit:
            low = sweeper.room_bytes
    return high


def test_many_waves_change_no_score(models: Models, scores: dict[tuple[str, str], Score]) -> None:
    with workbench(models.base) as bench:
        jobs = list(jobs_on(bench, models).values())
        bench.sweeper.room_bytes = least_room(bench.sweeper, jobs)
        waves = bench.sweeper.waves(jobs)
        assert len(waves) > len(jobs) / 2
        assert scores_on(bench, models) == scores
        assert bench.sweeper.facts.waves == len(waves)


def test_a_few_waves_are_about_equal_and_fit(models: Models, scores: dict[tuple[str, str], Score]) -> None:
    with workbench(models.base) as bench:
        jobs = list(jobs_on(bench, models).values())
        largest = max(hidden_bytes(bench, [job]) for job in jobs)
        bench.sweeper.room_bytes = least_room(bench.sweeper, jobs) + 4 * largest
        sizes = [hidden_bytes(bench, wave.jobs) for wave in bench.sweeper.waves(jobs)]
        assert len(sizes) == -(-hidden_bytes(bench, jobs) // (5 * largest))
        assert max(sizes) <= 5 * largest
        assert max(sizes) - min(sizes) <= 2 * largest
        assert scores_on(bench, models) == scores


def hidden_bytes(bench: Workbench, jobs: Sequence[Job]) -> int:
    """Hidden states of all these jobs in float32."""
    return sum(job.task.num_tokens * bench.network.width * 4 for job in jobs)


def test_threads_change_no_score(models: Models, scores: dict[tuple[str, str], Score]) -> None:
    for threads in (2, 5):
        with workbench(models.base, threads=threads) as bench:
            assert scores_on(bench, models) == scores


@pytest.mark.parametrize("threads", [1, 2])
def test_spilling_changes_no_score(models: Models, scores: dict[tuple[str, str], Score], tmp_path: Path,
                                   threads: int) -> None:  # fmt: skip
    with workbench(models.base, spill=tmp_path / "spill", threads=threads) as bench:
        assert scores_on(bench, models) == scores
        assert bench.sweeper.facts.waves == 1
    assert list((tmp_path / "spill").iterdir()) == []


def test_alone_or_beside_others_a_score_is_the_same(models: Models, scores: dict[tuple[str, str], Score]) -> None:
    with workbench(models.base) as bench:
        for key, job in jobs_on(bench, models).items():
            bench.sweeper.score([job])
            assert bench.book[job.key] == scores[key], key


def test_rows_that_go_through_the_head_in_parts_score_as_together(
    models: Models, monkeypatch: pytest.MonkeyPatch, scores: dict[tuple[str, str], Score]
) -> None:
    monkeypatch.setattr(reading, "LOGITS_AT_ONCE", 300 * 7)
    with workbench(models.base) as bench:
        found = scores_on(bench, models)
    for key, score in found.items():
        for values, expected in zip(score.log_probs, scores[key].log_probs, strict=True):
            assert values == pytest.approx(expected, abs=1e-4)


def test_what_was_scored_is_not_scored_again(models: Models, tmp_path: Path) -> None:
    with workbench(models.base, book=tmp_path / "scores.jsonl") as bench:
        found = scores_on(bench, models)
        loads = bench.sweeper.facts.unit_loads
        assert scores_on(bench, models) == found
        assert bench.sweeper.facts.unit_loads == loads
    with workbench(models.base, book=tmp_path / "scores.jsonl") as bench:
        assert scores_on(bench, models) == found
        assert bench.sweeper.facts.unit_loads == bench.sweeper.facts.jobs == 0


# --- stopped and killed ----------------------------------------------------------------------------------------------


def stopped(models: Models, after: int, *, book: Path, spill: Path | None = None, waves: bool = False,
            threads: int = 1) -> None:  # fmt: skip
    """A sweep that is stopped after so many batches."""
    stops = Stops()
    with workbench(models.base, book=book, spill=spill, stops=stops, threads=threads) as bench:
        jobs = list(jobs_on(bench, models).values())
        if waves:
            bench.sweeper.room_bytes = least_room(bench.sweeper, jobs)
        stops.after = after
        with pytest.raises(Stopped, match="run the same command again to go on"):
            bench.sweeper.score(jobs)


def batches_asked(models: Models, spill: Path | None = None) -> int:
    """How often an unbroken sweep asks whether to stop."""
    stops = Stops()
    with workbench(models.base, stops=stops, spill=spill) as bench:
        scores_on(bench, models)
    return stops.asked


def test_of_many_waves_those_that_were_finished_are_not_swept_again(
    models: Models, tmp_path: Path, scores: dict[tuple[str, str], Score]
) -> None:
    book = tmp_path / "scores.jsonl"
    stopped(models, batches_asked(models) // 2, book=book, waves=True)
    with workbench(models.base, book=book) as bench:
        before = len(bench.book)
        assert 0 < before < len(scores)
        assert scores_on(bench, models) == scores
        assert bench.sweeper.facts.jobs == len(scores) - before


def test_a_spilled_sweep_goes_on_at_the_unit_it_reached(models: Models, scores: dict[tuple[str, str], Score],
                                                        tmp_path: Path) -> None:  # fmt: skip
    asked = batches_asked(models, tmp_path / "spill")
    units = []
    for share in (0.0, 0.4, 0.6, 0.97):
        book, spill = tmp_path / f"{share}.jsonl", tmp_path / f"{share}"
        stopped(models, int(share * asked), book=book, spill=spill)
        with workbench(models.base, book=book, spill=spill) as bench:
            assert scores_on(bench, models) == scores
            units.append(bench.sweeper.facts.unit_loads / 3)
            assert bench.sweeper.facts.waves == 1
        assert list(spill.iterdir()) == []
    # From the beginning, from units in between, and with the back alone.
    assert units[0] == UNITS > units[1] > units[2] > units[3] == 1


def test_stopped_again_and_again_it_still_arrives(models: Models, scores: dict[tuple[str, str], Score],
                                                  tmp_path: Path) -> None:  # fmt: skip
    book, spill = tmp_path / "scores.jsonl", tmp_path / "spill"
    asked = batches_asked(models, tmp_path / "counted")
    for _ in range(5):
        stopped(models, asked // 3, book=book, spill=spill, threads=2)
        if any(json.loads(note.read_text())["unit"] >= 2 for note in spill.glob("*/unit-done.json")):
            break
    with workbench(models.base, book=book, spill=spill) as bench:
        assert scores_on(bench, models) == scores
        assert bench.sweeper.facts.unit_loads <= 2 * 3


@pytest.mark.parametrize("threads", [1, 2])
def test_spilled_states_of_other_questions_are_not_mistaken_for_these(
    models: Models, tmp_path: Path, threads: int, scores: dict[tuple[str, str], Score]
) -> None:
    spill = tmp_path / "spill"
    stops = Stops(after=20)
    with workbench(models.base, spill=spill, stops=stops, threads=threads) as bench:
        some = [job for (name, _), job in jobs_on(bench, models).items() if name in ("a sum", "pruned", "the base")]
        with pytest.raises(Stopped):
            bench.sweeper.score(some)
    assert list(spill.glob("*/*.hidden"))
    with workbench(models.base, spill=spill) as bench:
        assert scores_on(bench, models) == scores


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", "7", '{"wave": "another", "unit": 3}'])
def test_a_note_of_the_unit_reached_that_is_damaged_or_of_others_is_no_note(tmp_path: Path, content: str) -> None:
    streams = Streams(tmp_path)
    streams.unit_done("mine", 2, set())
    assert streams.resume_at("mine") == 3
    (note,) = tmp_path.iterdir()
    note.write_text(content)
    assert Streams(tmp_path).resume_at("mine") == 0


def test_a_spilled_file_that_is_too_short_is_told(models: Models, tmp_path: Path) -> None:
    book, spill = tmp_path / "scores.jsonl", tmp_path / "spill"
    stopped(models, batches_asked(models) // 2, book=book, spill=spill)
    for file in spill.glob("*/*.hidden"):
        os.truncate(file, 100)
    with (
        workbench(models.base, book=book, spill=spill) as bench,
        pytest.raises(
            StreamMergeError, match=r"is shorter than it was written; remove .*spill/[0-9a-f]{32} and run again"
        ),
    ):
        scores_on(bench, models)


# --- the scorebook ---------------------------------------------------------------------------------------------------

ODD_SCORES = {
    "plain": Score(((-1.5, -2.0), (-0.1,))),
    "exact": Score(((-0.1 - 0.2, 1 / 3, 5e-324, -1.7976931348623157e308),), (0.1,)),
    "endless": Score(((-math.inf, math.inf),), (math.inf,)),
    "empty": Score(()),
    "last": Score(((-7.0,),), (0.5,)),
}


def book_of(path: Path) -> dict[str, Score]:
    book = Scorebook(path)
    found = {key: book[key] for key in ODD_SCORES if key in book}
    assert len(book) == len(found)
    book.close()
    return found


@pytest.fixture
def book(tmp_path: Path) -> Path:
    made = Scorebook(tmp_path / "work" / "scores.jsonl")
    for key, score in ODD_SCORES.items():
        made.add(key, score)
    made.sync()
    made.close()
    return tmp_path / "work" / "scores.jsonl"


def test_a_scorebook_gives_back_every_bit(book: Path) -> None:
    assert book_of(book) == ODD_SCORES


def test_of_a_torn_last_line_only_that_is_lost(book: Path) -> None:
    whole = book.read_bytes()
    last = len(whole.splitlines(keepends=True)[-1])
    for cut in range(1, last + 1):
        book.write_bytes(whole[:-cut])
        assert list(book_of(book)) == list(ODD_SCORES)[:-1]


@pytest.mark.parametrize("number", range(5))
def test_what_follows_a_damaged_line_is_not_trusted(book: Path, number: int) -> None:
    lines = book.read_bytes().splitlines(keepends=True)
    for at in (0, 8, 15, len(lines[number]) // 2, len(lines[number]) - 1):
        damaged = bytearray(lines[number])
        damaged[at] ^= 1
        book.write_bytes(b"".join([*lines[:number], bytes(damaged), *lines[number + 1 :]]))
        assert list(book_of(book)) == list(ODD_SCORES)[:number]


def test_a_book_goes_on_after_what_is_sound(book: Path) -> None:
    whole = book.read_bytes()
    book.write_bytes(whole[:-3] + b"\0\0rubbish")
    again = Scorebook(book)
    again.add("last", ODD_SCORES["last"])
    again.close()
    assert book.read_bytes() == whole


@pytest.mark.parametrize("content", [b"\n", b"\xff\xfe", b"00000000 {}\n", b"hello\n" * 100])
def test_a_file_that_is_no_scorebook_is_an_empty_one(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "scores.jsonl").write_bytes(content)
    assert book_of(tmp_path / "scores.jsonl") == {}


def test_after_damage_only_what_was_lost_is_scored_again(models: Models, scores: dict[tuple[str, str], Score],
                                                         tmp_path: Path) -> None:  # fmt: skip
    path = tmp_path / "scores.jsonl"
    with workbench(models.base, book=path) as bench:
        scores_on(bench, models)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-3]) + lines[-3][:40])
    with workbench(models.base, book=path) as bench:
        assert scores_on(bench, models) == scores
        assert bench.sweeper.facts.jobs == 3


# --- cost ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spilled", [False, True])
def test_every_unit_of_every_checkpoint_is_read_once(models: Models, tmp_path: Path, spilled: bool) -> None:
    with workbench(models.base, spill=tmp_path if spilled else None) as bench:
        scores_on(bench, models)
        facts = bench.sweeper.facts
    assert facts.waves == 1
    assert facts.unit_loads == UNITS * 3
    bytes_of = [sum(tensor.nbytes for tensor in read_weights(path).values())
                for path in (models.base, *models.specialists)]  # fmt: skip
    assert facts.bytes_read == sum(bytes_of)
    assert facts.jobs == len(models.recipes) * len(TASKS)
    assert facts.plain_loads > 2 * facts.unit_loads
    assert facts.plain_forwards == facts.jobs * LAYERS


def test_every_wave_reads_the_weights_once(models: Models) -> None:
    with workbench(models.base) as bench:
        jobs = [job for (name, _), job in jobs_on(bench, models).items() if name.startswith("pruned")]
        bench.sweeper.room_bytes = least_room(bench.sweeper, jobs)
        bench.sweeper.score(jobs)
        assert bench.sweeper.facts.waves > 1
        assert bench.sweeper.facts.unit_loads == UNITS * 3 * bench.sweeper.facts.waves


def test_equal_merges_are_scored_once(models: Models, tmp_path: Path) -> None:
    same = write_recipe(
        tmp_path / "same.yaml", "hi_merging", models.specialists, base=models.base, seed=3,
        parameters={"weight": 0.7, "density": 0.5, "scale": 0.8},
    )  # fmt: skip
    with workbench(models.base) as bench:
        (task, _) = prepare(bench)
        first, second = (Job(variant_on(bench, recipe), task) for recipe in (models.recipes["pruned"], same))
        assert first.variant.digest == second.variant.digest
        bench.sweeper.score([first, second])
        assert bench.sweeper.facts.jobs == 1
        assert len(bench.book) == 1


def test_a_variant_is_another_with_another_number_model_seed_or_file(models: Models, tmp_path: Path) -> None:
    a, b = models.specialists
    digests = set()
    with workbench(models.base) as bench:
        recipes = [
            write_recipe(tmp_path / f"{i}.yaml", "dare_ties", chosen, base=models.base,
                         per_model={"weight": 0.5, "density": density})
            for i, (chosen, density) in enumerate([((a, b), 0.5), ((a, b), 0.7), ((b, a), 0.5), ((a,), 0.5)])
        ]  # fmt: skip
        digests = {variant_on(bench, recipe).digest for recipe in [*recipes, *models.recipes.values()]}
        assert len(digests) == 4 + len(models.recipes)
    mine = make_specialist(tmp_path / "mine", models.base, seed=5)
    recipe = write_recipe(tmp_path / "mine.yaml", "linear", (mine,), per_model={"weight": 0.5, "normalize": False})
    first = digest_of(recipe, models)
    assert digest_of(recipe, models) == first
    os.utime(mine / "model.safetensors", ns=(1, 1))
    assert digest_of(recipe, models) != first


def digest_of(recipe: Path, models: Models) -> str:
    with workbench(models.base) as bench:
        return variant_on(bench, recipe).digest


@dataclass(frozen=True)
class Studied:
    """A workbench with what an analysis asks: a judge of two tasks, one per specialist."""

    bench: Workbench
    judge: Judge
    jobs: list[Job]


_DEPTH = 8


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Studied]:
    """The contribution analysis of two specialists of eight layers."""
    models = make_family(
        tmp_path_factory.mktemp("deep"), "llama", num_hidden_layers=_DEPTH, hidden_size=16, intermediate_size=16
    )
    with workbench(models.base) as bench:
        plan = plan_of(models.recipes["pruned"])
        family = Family(plan, bench.network, bench.shelf, split_blocks=False, outside=False)
        tasks = [make_task(f"t{i}", make_examples(3, seed=i), model=str(models.specialists[i])) for i in range(2)]
        judge = Judge(family, [bench.prepare(task, "dev") for task in tasks], bench.sweeper)
        merged = family.mixture([0.5, 0.5], [0.9, 0.9], [0.7, 0.7])
        questions = []
        for task in range(2):
            mine = merged.with_weight([0.7 * share for share in one_of(2, task)])
            questions += [(judge.base, task), (mine, task), (merged, task)]
            for layer in family.layers:
                questions += [(part, task) for one in (mine, merged) for part in (one.without(layer), one.only(layer))]
        yield Studied(bench, judge, judge.jobs(questions))


def trie_size(jobs: Sequence[Job]) -> int:
    """How many different beginnings, block by block, the variants of each task have."""
    beginnings = set()
    for job in jobs:
        keys = [version.key for version in job.variant.versions[:-1]]
        beginnings |= {(job.task.digest, tuple(keys[: unit + 1])) for unit in range(1, len(keys))}
    return len(beginnings)


def test_an_analysis_computes_every_common_beginning_once_and_half_of_the_plain_way(deep: Studied) -> None:
    jobs, sweeper = deep.jobs, deep.bench.sweeper
    assert len({job.key for job in jobs}) == len(jobs) == 2 * (3 + 4 * _DEPTH)
    (wave,) = sweeper.waves(jobs)
    # Base, specialist and merge go through all blocks; what differs from one of them in a layer begins there.
    expected = 2 * (3 * _DEPTH + 4 * _DEPTH * (_DEPTH + 1) // 2)
    assert wave.block_forwards == trie_size(jobs) == expected
    sweeper.score(jobs)
    facts = sweeper.facts
    assert facts.block_forwards == expected
    assert facts.plain_forwards == len(jobs) * _DEPTH
    assert facts.block_forwards / facts.plain_forwards == pytest.approx(0.5, abs=0.11)
    assert facts.waves == 1
    assert facts.unit_loads == (_DEPTH + 2) * 3


def test_a_wave_says_beforehand_what_it_costs(deep: Studied) -> None:
    told: list[tuple[float, float]] = []
    with workbench(Path(deep.bench.tokenizer.name_or_path)) as bench:
        sweeper = Sweeper(
            deep.bench.network, deep.bench.shelf, Scorebook(None), 1 << 40, 1 << 40, None, lambda: False,
            lambda done, total: told.append((done, total)), bench.sweeper.pool, 1,
        )  # fmt: skip
        some = deep.jobs[:9]
        (wave,) = sweeper.waves(some)
        sweeper.score(some)
    assert told[0] == (0.0, wave.cost)
    assert told[-1] == (wave.cost, wave.cost)
    assert [done for done, _ in told] == sorted(done for done, _ in told)


# --- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spilled", [False, True])
def test_a_refusal_names_a_budget_that_then_works(models: Models, scores: dict[tuple[str, str], Score],
                                                  tmp_path: Path, spilled: bool) -> None:  # fmt: skip
    spill = tmp_path / "spill" if spilled else None

    def run(megabytes: int) -> dict[tuple[str, str], Score]:
        options = StudyOptions(megabytes * 1_000_000, device="cpu", threads=2, compile="off", spill=spill)
        with open_workbench(models.base, options, book=None, stopping=lambda: False, plans=(), versions=0,
                            progress=lambda done, total: None, note=lambda text: None) as bench:  # fmt: skip
            return scores_on(bench, models)

    with pytest.raises(DoesNotFit) as caught:
        run(100)
    text = str(caught.value)
    assert text.startswith("95.4 MiB of memory is too little to score these models: one block of every model and")
    assert ("--spill DIR" in text) != spilled
    allowed = re.search(r"Allow (\d+)MB", text)
    assert allowed is not None
    assert run(int(allowed[1])) == scores


def test_a_job_that_needs_a_reference_takes_room_for_two(models: Models) -> None:
    with workbench(models.base) as bench:
        (task, _) = prepare(bench)
        base, a = (variant_on(bench, models.recipes[name]) for name in ("the base", "a specialist"))
        alone = least_room(bench.sweeper, [Job(base, task)])
        assert least_room(bench.sweeper, [Job(base, task, a)]) - alone >= task.num_tokens * bench.network.width * 4


# --- distance from a reference ---------------------------------------------------------------------------------------


def plain_distances(plain: Any, other: Any, bench: Workbench, task: TaskBatches) -> list[float]:
    """The mean divergence of a model from another at the scored positions of each example."""
    found: dict[int, list[float]] = {}
    for batch in task.batches:
        arguments = bench.network.arguments(batch)
        mine, expected = (plain_log_probs(model, arguments, batch) for model in (plain, other))
        apart = torch.nn.functional.kl_div(mine, expected, reduction="none", log_target=True).sum(-1)
        place = {position: i for i, position in enumerate(batch.wanted)}
        for one in batch.scored:
            found.setdefault(one.example, []).extend(apart[place[row]].item() for row in one.rows)
    return [sum(found[i]) / len(found[i]) for i in range(len(task.examples))]


def reference_jobs(bench: Workbench, models: Models, tasks: Sequence[TaskBatches]) -> dict[tuple[str, str], Job]:
    reference = variant_on(bench, models.specialists[0])
    return {
        (name, task.name): Job(variant_on(bench, models.recipes[name]), task, reference)
        for name in ("the base", "a specialist", "pruned")
        for task in tasks
    }


def test_the_distance_of_a_reference_from_itself_is_zero(models: Models) -> None:
    with workbench(models.base) as bench:
        jobs = reference_jobs(bench, models, prepare(bench))
        bench.sweeper.score(list(jobs.values()))
        for (name, _), job in jobs.items():
            distances = bench.book[job.key].distances
            assert len(distances) == len(job.task.examples)
            if name == "a specialist":
                assert set(distances) == {0.0}
            else:
                assert min(distances) > 1e-4


def test_other_distances_are_those_of_a_plain_computation(models: Models, tmp_path: Path,
                                                          scores: dict[tuple[str, str], Score]) -> None:  # fmt: skip
    bare = make_task("bare", make_examples(6, seed=9, choices=0), model="a")
    other = plain_model(models.specialists[0])
    with workbench(models.base) as bench:
        jobs = reference_jobs(bench, models, prepare(bench, [*TASKS, bare]))
        bench.sweeper.score(list(jobs.values()))
        for name in ("the base", "pruned"):
            plain = plain_model(written(models.recipes[name], tmp_path / name))
            for (which, _), job in jobs.items():
                if which == name:
                    expected = plain_distances(plain, other, bench, job.task)
                    assert bench.book[job.key].distances == pytest.approx(expected, rel=1e-3, abs=1e-6)
        # The log-probabilities are the same as without a reference.
        for key, job in jobs.items():
            assert key[1] == "bare" or bench.book[job.key].log_probs == scores[key].log_probs


@pytest.mark.parametrize("name", ["the base", "pruned"])
def test_a_reference_that_is_not_scored_itself_is_read_all_the_same(models: Models, name: str) -> None:
    with workbench(models.base) as bench:
        jobs = reference_jobs(bench, models, prepare(bench))
        bench.sweeper.score(list(jobs.values()))
        for key, job in jobs.items():
            if key[0] == name:
                with workbench(models.base) as alone:
                    alone.sweeper.score([reference_jobs(alone, models, prepare(alone))[key]])
                    assert alone.book[job.key] == bench.book[job.key]


def test_references_of_several_kinds_do_not_get_mixed_up(models: Models, tmp_path: Path) -> None:
    with workbench(models.base, spill=tmp_path / "spill", threads=2) as bench:
        (task, _) = prepare(bench)
        variants = [variant_on(bench, path) for path in (models.base, *models.specialists)]
        jobs = [Job(one, task, other) for one in variants for other in variants]
        bench.sweeper.score(jobs)
        distances = [bench.book[job.key].distances for job in jobs]
    assert [set(values) == {0.0} for values in distances] == [i % 4 == 0 for i in range(9)]
    assert len(set(distances)) == 7


# --- inputs and tokens -----------------------------------------------------------------------------------------------


def test_an_input_that_changes_while_it_is_swept_is_told(models: Models, tmp_path: Path) -> None:
    mine = make_specialist(tmp_path / "mine", models.base, seed=6)
    with workbench(models.base) as bench:
        (task, _) = prepare(bench)
        job = Job(variant_on(bench, mine), task)
        os.utime(mine / "model.safetensors", ns=(1, 1))
        with pytest.raises(InputError):
            bench.sweeper.score([job])


def test_the_shelf_is_empty_after_a_sweep(models: Models) -> None:
    with workbench(models.base) as bench:
        (task, _) = prepare(bench)
        variant: Variant = variant_on(bench, models.recipes["pruned"])
        bench.sweeper.score([Job(variant, task)])
        with pytest.raises(KeyError):
            bench.shelf.make(variant.versions[-1], bench.sweeper.pool)


def test_a_window_shorter_than_a_row_means_plain_rows(tmp_path: Path) -> None:
    for window, shared in ((20, True), (8, False)):
        model = make_model(tmp_path / f"{window}", "mistral", sliding_window=window)
        with workbench(model) as bench:
            (task, _) = prepare(bench)
            assert {batch.branches is not None for batch in task.batches} == {shared}


def test_a_split_that_a_task_does_not_have_is_told(models: Models) -> None:
    with workbench(models.base) as bench, pytest.raises(TaskError, match="task choose has no test file"):
        bench.prepare(TASKS[0], "test")


@pytest.mark.parametrize("metric", [{}, {"metric": "kl"}])
def test_without_an_analysis_there_is_no_specialist_to_be_near_to(models: Models, tmp_path: Path,
                                                                  metric: dict[str, str]) -> None:  # fmt: skip
    write_lines(tmp_path / "dev.jsonl", {"prompt": "a b c"})
    write_lines(tmp_path / "tasks.yaml", [{"name": "bare", "model": "m", "dev": "dev.jsonl", **metric}])
    options = StudyOptions(device="cpu", threads=1, compile="off")
    with pytest.raises(UserError, match=r"task bare: kl compares with the specialist .* Use another metric"):
        evaluate([models.base], tmp_path / "tasks.yaml", "dev", options, Silent())


class Silent:
    """Is told, and says nothing."""

    def note(self, text: str) -> None: ...

    def stage(self, text: str) -> None: ...

    def progress(self, done: float, total: float) -> None: ...


def test_a_model_without_a_tokenizer_is_told(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", "llama")
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (model / file).unlink()
    with pytest.raises(InputError, match="holds no tokenizer that transformers reads"), workbench(model):
        pass


def test_a_second_run_does_not_write_to_the_scores_of_the_first(tmp_path: Path) -> None:
    first = Scorebook(tmp_path / "scores.jsonl")
    with pytest.raises(OutputError, match="another analysis"):
        Scorebook(tmp_path / "scores.jsonl")
    first.close()
    Scorebook(tmp_path / "scores.jsonl").close()
