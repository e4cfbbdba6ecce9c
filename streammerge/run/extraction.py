"""`streammerge extract-lora`: the difference of two models as a LoRA adapter, inside a budget.

open both → plan → schedule → for every matrix: sketch, factor, spill → look at the rest → lay out → OUT in one step
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TypeVar

import torch
import yaml

from streammerge.base.errors import DoesNotFit, Stopped, UserError
from streammerge.base.units import format_size
from streammerge.plan.adapter import CONFIG_NAME as ADAPTER_CONFIG_NAME
from streammerge.plan.extraction import Extraction, Wanted, plan_extraction
from streammerge.plan.names import embedding_of, listing, order_of
from streammerge.plan.peft import alike, configuration, taken_for_experts, usual_rank
from streammerge.plan.recipe import parse_recipe
from streammerge.plan.reference import find_local
from streammerge.plan.sketch import SketchSchedule, make_sketch_schedule
from streammerge.plan.view import Model
from streammerge.run.adapter_card import CARD_NAME, FACTS_NAME, adapter_card, facts_of
from streammerge.run.collecting import Collector, Observer, Progress
from streammerge.run.configuration import CONFIG_NAME, architecture
from streammerge.run.extracted import Extracted, Factored, LeftOut
from streammerge.run.memory import Meter, memory_limit, processors, refusals, usage
from streammerge.run.merge import stop_signals
from streammerge.run.models import open_models
from streammerge.run.output import check_apart
from streammerge.run.panels import Panels
from streammerge.run.spill import Spill
from streammerge.run.whole_folder import check_new, whole_folder
from streammerge.storage.checkpoint import Checkpoint
from streammerge.storage.jsonfile import dump_map, read_map
from streammerge.storage.sink import free_bytes, write_file
from streammerge.storage.source import Source

WEIGHTS_NAME = "adapter_model.safetensors"


@refusals()
def extract(model: str, base: str, out: Path, wanted: Wanted, *, max_memory: int | None = None,
            threads: int | None = None, observer: Observer) -> Extracted:  # fmt: skip
    """Write the difference between two models, named as in a recipe, into the directory `out` as a PEFT adapter.

    Raises InputError; UserError when they do not hold the same tensors, or do not differ; OutputError when OUT is not
    new; DoesNotFit; Stopped. Whatever happens, `out` is a complete adapter or nothing.
    """
    wanted.check()
    check_new(out)
    opened, checkpoints = _open(model, base, observer)
    model_type = read_map(checkpoints[opened[1].checkpoint].directory / CONFIG_NAME).get("model_type")
    extraction = plan_extraction(*opened, checkpoints, wanted, model_type if isinstance(model_type, str) else None)
    check_apart(out, checkpoints)
    schedule = _schedule(extraction, wanted, max_memory, threads)
    _check_disk(extraction, wanted, out)
    with ExitStack() as stack:
        stopping = stack.enter_context(_stopping())
        folder = stack.enter_context(whole_folder(out))
        meter = stack.enter_context(Meter())
        sources = [stack.enter_context(_open_source(checkpoint)) for checkpoint in checkpoints]
        done = Progress(extraction, observer)
        panels = Panels(sources, schedule, stopping, done.advance)
        stack.callback(panels.close)
        spill = Spill(folder / "factors.partial")
        with _closing(spill):
            collector = Collector(panels, spill, wanted, done)
            observer.stage(f"extracting the difference between {model} and {base}")
            observer.progress(0, done.total)
            factored = [found for target in extraction.targets if (found := collector.factor(target)) is not None]
            ranks = collector.ranks(extraction.targets, factored)
            left = [seen for each in extraction.left if (seen := collector.look(each)) is not None]
            if not factored:
                raise UserError(_nothing(model, base, left))
            left = collector.with_whole(extraction, left, {each.name for each in factored})
            for source in sources:
                source.check_unchanged()
            observer.stage("writing the adapter")
            size = spill.lay_out(folder / WEIGHTS_NAME, collector.filled(extraction.targets, ranks))
        notes = tuple(_notes(extraction, ranks))
        for note in notes:
            observer.note(note)
        extracted = Extracted(
            out, model, base, wanted, _in_order(factored), _in_order(left),
            len(extraction.targets) + len(extraction.left) - len(factored) - len(left), extraction.unseen, notes, size,
            panels.read_bytes, usage().peak_resident, meter.peak_own, schedule.limit_bytes,
        )  # fmt: skip
        config = configuration(
            base=base,
            ranks=ranks,
            usual=usual_rank(ranks, alike(list(ranks), set(ranks))),
            modules=extraction.modules,
            whole=[each.name for each in left if each.whole],
            transposes=extraction.transposes,
            task=_task(checkpoints[opened[1].checkpoint]),
        )
        facts = facts_of(extracted)
        write_file(folder / FACTS_NAME, (json.dumps(facts, indent=1, ensure_ascii=True) + "\n").encode())
        write_file(folder / CARD_NAME, adapter_card(extracted).encode("utf-8", "surrogatepass"))
        write_file(folder / ADAPTER_CONFIG_NAME, dump_map(config))
    return extracted


_Named = TypeVar("_Named", Factored, LeftOut)


def _in_order(found: Sequence[_Named]) -> tuple[_Named, ...]:
    """As they stand in a model, and not in its shards."""
    return tuple(sorted(found, key=lambda each: order_of(each.name)))


def _open(model: str, base: str, observer: Observer) -> tuple[tuple[Model, Model], list[Checkpoint]]:
    """The two models, and their checkpoints. Raises InputError, UserError."""
    place = Path("extract-lora")
    paths = [found.resolve() if (found := find_local(name, place)) is not None else name for name in (model, base)]
    if paths[0] == paths[1]:
        raise UserError(f"{model} and {base} are the same model: there is no difference to extract.")
    text = yaml.safe_dump({"merge_method": "linear", "models": [{"model": model}, {"model": base}],
                           "parameters": {"weight": 1}})  # fmt: skip
    models, checkpoints = open_models(parse_recipe(text, place), observer.note)
    return (models[0], models[1]), checkpoints


def _schedule(extraction: Extraction, wanted: Wanted, max_memory: int | None, threads: int | None) -> SketchSchedule:
    limit, limited_by = memory_limit(max_memory)
    # LAPACK and BLAS load code and make buffers when they are first used: that is of the baseline.
    torch.set_num_threads(1)
    some = torch.eye(64, dtype=torch.float64)
    torch.linalg.svd(torch.linalg.qr(some @ some)[0])
    torch.linalg.eigh(some)
    return make_sketch_schedule(
        extraction,
        wanted,
        limit_bytes=limit,
        limited_by=limited_by,
        allowed=max_memory is not None,
        baseline_bytes=usage().resident,
        threads=threads or processors(),
    )


def _check_disk(extraction: Extraction, wanted: Wanted, out: Path) -> None:
    """Raise DoesNotFit when factors of the asked rank would not fit on the disk of `out`, twice: they are laid out when
    all of them are known."""
    if wanted.energy is not None:
        return
    need = 2 * sum(
        min(wanted.most, target.pair.rows, target.pair.columns) * (target.pair.rows + target.pair.columns)
        for target in extraction.targets
    ) * (4 if wanted.dtype == "F32" else 2)  # fmt: skip
    folder = out.absolute()
    while not folder.exists():
        folder = folder.parent
    free = free_bytes(folder)
    if need > free:
        raise DoesNotFit(
            f"{out}: needs {format_size(need)} of disk while it is made, {format_size(free)} are free. Free some, "
            "choose another directory, or a smaller --rank."
        )


def _nothing(model: str, base: str, left: Sequence[LeftOut]) -> str:
    if not left:
        return f"{model} and {base} do not differ: every tensor that was compared is the same. Nothing was written."
    names = ", ".join(each.name for each in left[:3])
    return (
        f"{model} and {base} differ in no matrix, only in what a LoRA cannot hold ({len(left)} tensors, {names}). "
        "Nothing was written."
    )


def _notes(extraction: Extraction, ranks: Mapping[str, int]) -> Iterator[str]:
    """What those should know who load the adapter with PEFT (0.21)."""
    embedding = embedding_of(target.pair.name for target in extraction.targets if target.module in ranks)
    if extraction.tied and embedding is not None:
        yield (
            "the embedding is the head, too: a recipe's BASE+OUT and PEFT's merge_and_unload() change both, PEFT "
            "without merging changes the embedding alone"
        )
    if confused := taken_for_experts(list(ranks)):
        yield (
            f"PEFT takes {len(confused)} matrices for experts that are none ({listing(confused)}), and leaves them as "
            f"they are; a recipe's BASE+OUT changes them"
        )


def _task(base: Checkpoint) -> str | None:
    """What PEFT calls the use of such a model."""
    return "CAUSAL_LM" if (architecture(base) or "").endswith("ForCausalLM") else None


@contextmanager
def _stopping() -> Iterator[Callable[[], bool]]:
    """Whether a signal asked to stop. What was begun is thrown away."""
    try:
        with stop_signals() as stopping:
            yield stopping
    except Stopped:
        raise Stopped("Stopped. Nothing was written: run the same command again to begin anew.") from None


@contextmanager
def _open_source(checkpoint: Checkpoint) -> Iterator[Source]:
    source = Source(checkpoint)
    try:
        yield source
    finally:
        source.close()


@contextmanager
def _closing(spill: Spill) -> Iterator[None]:
    try:
        yield
    finally:
        spill.close()
