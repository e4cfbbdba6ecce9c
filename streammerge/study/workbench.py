"""What scoring unwritten models needs: network, tokenizer, shelf of checkpoints, scorebook, and memory to work in."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from streammerge.base.errors import InputError, TaskError
from streammerge.kernels.compiled import Run, Signature
from streammerge.kernels.contract import Problem, Program
from streammerge.kernels.whole import Finder
from streammerge.plan.budget import Schedule
from streammerge.plan.group import Group, groups_of
from streammerge.plan.plan import Plan
from streammerge.run.compiling import Compile, programs_of, weigh
from streammerge.run.gpu import choose_device
from streammerge.run.memory import memory_limit, processors, usage
from streammerge.run.merge import Options, schedule_for
from streammerge.run.survey import ask_together, survey_alone
from streammerge.study.batches import TaskBatches, make_batches
from streammerge.study.network import Network
from streammerge.study.scorebook import Scorebook
from streammerge.study.scoring import Scoring
from streammerge.study.sweep import Sweeper
from streammerge.study.tasks import Split, Task
from streammerge.study.team import Team
from streammerge.study.variants import Shelf

MIB = 1 << 20


@dataclass(frozen=True)
class StudyOptions:
    """Where and how models are run, and with whom: none of it changes a score, but for the device."""

    max_memory: int | None = None
    device: str = "auto"
    threads: int | None = None
    compile: Compile = "auto"
    spill: Path | None = None
    seed: int = 0
    strict: bool = False
    team: Team | None = None


@dataclass(frozen=True)
class TaskData:
    """A split of a task, tokenised, and how it is scored."""

    task: Task
    split: Split
    batches: TaskBatches
    scoring: Scoring


@dataclass(frozen=True)
class Workbench:
    """Everything a sweep works with."""

    network: Network
    tokenizer: Any
    shelf: Shelf
    book: Scorebook
    sweeper: Sweeper

    def prepare(self, task: Task, which: Literal["dev", "test"]) -> TaskData:
        """Tokenise a split. Raises TaskError."""
        split = task.dev if which == "dev" else task.test
        if split is None:
            raise TaskError(str(task.dev.path), [f"task {task.name} has no {which} file"])
        longest = self.network.longest
        batches = make_batches(
            task, split, self.tokenizer, shares_prompts=self.network.can_share_prompts, longest=longest
        )
        window = self.network.window
        if window is not None and self.network.can_share_prompts and _longest(batches) > window:
            # A mask of our own would let a sliding layer see beyond its window.
            batches = make_batches(task, split, self.tokenizer, shares_prompts=False, longest=longest)
        return TaskData(task, split, batches, Scoring(task, split, batches))

    def surveyed(self, plan: Plan) -> Plan:
        """The plan with what must be known of many tensors together before one can be made."""
        if not groups_of((*plan.tensors, *plan.asked)):
            return plan
        return survey_alone(plan, self.schedule(plan), self.shelf.find, self.sweeper.stopping)

    def ask(self, plan: Plan, group: Group, question: Callable[[Sequence[Problem]], Any]) -> Any:
        """Ask the tensors of a group together."""
        return ask_together(plan, group, question, self.schedule(plan), self.shelf.find, self.sweeper.stopping)

    def schedule(self, plan: Plan) -> Schedule:
        """How a survey of a plan runs in the memory that is left."""
        return schedule_for(plan, Options(max_memory=self.sweeper.limit_bytes, threads=self.sweeper.threads))


@contextmanager
def open_workbench(directory: Path, options: StudyOptions, *, book: Path | None, stopping: Callable[[], bool],
                   progress: Callable[[float, float], None], note: Callable[[str], None],
                   plans: Sequence[Plan], versions: int) -> Iterator[Workbench]:  # fmt: skip
    """A workbench for models of the architecture and vocabulary of `directory`.

    `versions` is about how many models will be made of each of the `plans`: it decides whether compiling pays.
    Raises InputError, UserError.
    """
    device = choose_device(options.device)
    threads = options.threads or processors()
    # The pool is the parallelism: torch's own threads spin, and their number would decide the last bits of sums.
    torch.set_num_threads(1)
    limit, _ = memory_limit(options.max_memory)
    find = _finder(plans, versions, options, limit, note)
    with ExitStack() as stack:
        tokenizer = _tokenizer(directory)
        network = Network(directory, device)
        shelf = Shelf(find)
        stack.callback(shelf.close)
        context = f"{network.identity} "
        scores = Scorebook(book, context) if options.team is None or book is None else options.team.open_book(context)
        stack.callback(scores.close)
        pool = stack.enter_context(ThreadPoolExecutor(threads, "study", torch.set_num_threads, (1,)))
        reserve = max(limit // 20, 64 * MIB)
        sweeper = Sweeper(
            network, shelf, scores, limit - reserve - usage().resident, limit, options.spill, stopping, progress,
            pool, threads, None if book is None else options.team,
        )  # fmt: skip
        yield Workbench(network, tokenizer, shelf, scores, sweeper)


def _tokenizer(directory: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise InputError(f"{directory}: holds no tokenizer that transformers reads: {error}") from None


def _finder(plans: Sequence[Plan], versions: int, options: StudyOptions, limit: int,
            note: Callable[[str], None]) -> Finder:  # fmt: skip
    """Compiled programs, where they are or are worth making."""
    wanted: dict[tuple[Program, Signature | None], int] = {}
    for plan in plans:
        for pair, count in programs_of(plan.tensors).items():
            wanted[pair] = wanted.get(pair, 0) + count * versions
    threads = options.threads or processors()
    compiling = weigh(wanted, threads, limit, options.compile)
    compiling.build(note)
    cache = compiling.cache
    if cache is None:
        return lambda program, signature: None
    loaded: dict[tuple[Program, Signature], Run | None] = {}

    def find(program: Program, signature: Signature) -> Run | None:
        if (program, signature) not in loaded:
            loaded[program, signature] = cache.load(program, signature, threads)
        return loaded[program, signature]

    return find


def _longest(batches: TaskBatches) -> int:
    return max(int(batch.positions.max()) + 1 for batch in batches.batches)
