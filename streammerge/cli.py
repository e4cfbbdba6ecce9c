"""The command line: verbs, flags, exit codes. What a verb needs is imported when the verb runs."""

from __future__ import annotations

import gc
import os
import sys
import threading
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from streammerge import __version__, cluster_verbs
from streammerge.base.errors import Stopped, UserError, VerificationFailed
from streammerge.base.processor import choose_numpy_code
from streammerge.base.units import parse_size
from streammerge.command import (
    Compile,
    Device,
    Json,
    MaxGpuMemory,
    MaxMemory,
    OutPath,
    Quiet,
    Random,
    RecipePath,
    Restart,
    Seed,
    ShardSize,
    Strict,
    Threads,
    VerifyOutput,
    Watcher,
    make_options,
    open_terminal,
)
from streammerge.extract_verb import extract_lora
from streammerge.moe_verb import moe
from streammerge.ui import Steps, Terminal

if TYPE_CHECKING:
    from streammerge.plan.plan import Plan
    from streammerge.run.health import Health
    from streammerge.run.inspection import Inspection
    from streammerge.run.merge import Options, Report
    from streammerge.study.analysis import ProxyFindings
    from streammerge.study.findings import Findings
    from streammerge.study.workbench import StudyOptions

_BEGAN = time.perf_counter()

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    help="Merge model checkpoints of any size inside the memory you allow.\n\n"
    "`streammerge RECIPE OUT` is short for `streammerge merge RECIPE OUT`.",
)


TasksFile = Annotated[
    Path | None, typer.Option("--tasks", metavar="FILE", help="Tasks, a YAML list of {name, model, dev, test}.")
]
Spill = Annotated[
    Path | None, typer.Option("--spill", metavar="DIR", help="Keep hidden states in files there, not in memory.")
]


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        typer.echo(f"streammerge {__version__}")
        raise typer.Exit


@app.command()
def merge(
    recipe: RecipePath,
    out: OutPath,
    max_memory: MaxMemory = None,
    max_gpu_memory: MaxGpuMemory = None,
    device: Device = "auto",
    cuda: Annotated[bool, typer.Option("--cuda", help="mergekit's way to say --device cuda.", hidden=True)] = False,
    out_shard_size: ShardSize = "5GB",
    threads: Threads = None,
    compile_: Compile = "auto",
    seed: Seed = 0,
    rng: Random = "position",
    restart: Restart = False,
    verify_inputs: Annotated[
        bool,
        typer.Option("--verify-inputs", help="First compare inputs with the checksums of their manifest or download."),
    ] = False,
    verify_output: VerifyOutput = False,
    spill: Spill = None,
    dask: Annotated[
        str | None,
        typer.Option(metavar="local|slurm|ADDRESS", help="Merge with Dask's workers; the flags are for each of them."),
    ] = None,
    workers: Annotated[int, typer.Option(min=1, metavar="N", help="How many of --dask local, or slurm at most.")] = 2,
    strict: Strict = False,
    profile: Annotated[bool, typer.Option("--profile", help="Say at the end where the time went.")] = False,
    quiet: Quiet = False,
    as_json: Json = False,
    log: Annotated[Path | None, typer.Option(metavar="FILE", help="Append what happens to this file.")] = None,
) -> None:
    """Merge RECIPE into the directory OUT. Run again after a stop or a crash, it goes on where it was.

    A hi_merging recipe with tasks is analysed first: decisions and report are left in OUT.analysis beside OUT.
    """
    with open_terminal(quiet=quiet, as_json=as_json, log=log) as terminal:
        device = "cuda" if cuda else device
        options = make_options(
            max_memory, max_gpu_memory, device, out_shard_size, threads, compile_, seed, restart, strict
        )
        options = replace(options, rng=rng, verify_inputs=verify_inputs, verify_output=verify_output)
        from streammerge import report
        from streammerge.run.merge import merge as run_merge

        terminal.log(f"streammerge {__version__}: merge {recipe} into {out}")
        decided = _analysed(terminal, recipe, out, options, spill)
        if decided != recipe:
            # The analysis has begun with that.
            options = replace(options, verify_inputs=False)
        done = (
            run_merge(decided, out, options, Watcher(terminal))
            if dask is None
            else _merge_over_dask(terminal, decided, out, options, dask, workers)
        )
        seconds = time.perf_counter() - _BEGAN
        terminal.rows("done", report.report_rows(done, seconds))
        if profile:
            terminal.table("profile", report.profile_table(done.profile, seconds))
        terminal.event("done", report.report_json(done, seconds))


@app.command()
def plan(
    recipe: RecipePath,
    max_memory: MaxMemory = None,
    out_shard_size: ShardSize = "5GB",
    threads: Threads = None,
    seed: Seed = 0,
    strict: Strict = False,
    as_json: Json = False,
) -> None:
    """Show what merging RECIPE would do: tensors, passes, bytes, peak memory, disk. Writes nothing."""
    with open_terminal(as_json=as_json) as terminal:
        options = make_options(max_memory, None, "auto", out_shard_size, threads, "auto", seed, False, strict)
        from streammerge import report
        from streammerge.run.compiling import consider
        from streammerge.run.estimate import estimate_seconds
        from streammerge.run.merge import make_plan, schedule_for
        from streammerge.run.sidefiles import side_files

        made, notes = _plan_before_analysis(recipe, options) or (make_plan(recipe, options, terminal.note), [])
        schedule = schedule_for(made, options)
        computing = consider(made.tensors, schedule, "auto", on_gpu=False).seconds
        seconds = estimate_seconds(made, made.tensors, schedule, computing)
        beside = list(side_files(made))
        if as_json:
            terminal.document(report.plan_json(made, schedule, seconds, beside))
        else:
            for warning in made.warnings:
                terminal.note(f"{recipe}: {warning}")
            for text in notes:
                terminal.note(text)
            terminal.rows("plan", report.plan_rows(made, schedule, seconds, beside))


@app.command()
def analyze(
    recipe: RecipePath,
    out: Annotated[Path, typer.Option("--output", "-o", metavar="NEW", help="The recipe to write.")],
    tasks: TasksFile = None,
    max_memory: MaxMemory = None,
    device: Device = "auto",
    threads: Threads = None,
    compile_: Compile = "auto",
    spill: Spill = None,
    team: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Score with other processes that run this same command, some N in all."),
    ] = None,
    seed: Seed = 0,
    strict: Strict = False,
    quiet: Quiet = False,
    as_json: Json = False,
    log: Annotated[Path | None, typer.Option(metavar="FILE", help="Append what happens to this file.")] = None,
) -> None:
    """Find where merging RECIPE hurts, and write a recipe that avoids it. No checkpoint is written.

    NEW is an ordinary recipe that runs without data. Beside it, NEW.analysis holds the report (HTML, JSON, pictures)
    and every score: run again after a stop, it goes on.
    """
    with open_terminal(quiet=quiet, as_json=as_json, log=log) as terminal:
        options = _study_options(max_memory, device, threads, compile_, spill, seed, strict)
        from streammerge.cluster.rank import find_rank
        from streammerge.study.analysis import analysis_folder, analyze_recipe
        from streammerge.study.team import open_team

        work = analysis_folder(out)
        terminal.log(f"streammerge {__version__}: analyze {recipe} into {out}")
        with ExitStack() as stack:
            if team is not None:
                own = stack.enter_context(open_team(work / "team", find_rank(None, None).name, team))
                options = replace(options, team=own)
            with terminal.steps() as steps:
                findings = analyze_recipe(recipe, out, work, options, _Student(terminal, steps), tasks_file=tasks)
            if options.team is not None:
                stack.enter_context(options.team.alone("report"))
            _show_findings(terminal, findings, work)
        terminal.rows("analyze", [("recipe", str(out)), ("time", f"{time.perf_counter() - _BEGAN:.0f} s")])


@app.command(name="eval")
def evaluate(
    recipes: Annotated[
        list[Path], typer.Argument(metavar="RECIPE…", help="Recipes, or directories of checkpoints as they are.")
    ],
    tasks: Annotated[Path, typer.Option("--tasks", metavar="FILE", help="Tasks, a YAML list of {name, dev, test}.")],
    split: Annotated[Literal["dev", "test"], typer.Option("--split", help="The files to score on.")] = "dev",
    scores: Annotated[
        Path | None, typer.Option("--scores", metavar="DIR", help="Keep scores there, to go on after a stop.")
    ] = None,
    max_memory: MaxMemory = None,
    device: Device = "auto",
    threads: Threads = None,
    compile_: Compile = "auto",
    spill: Spill = None,
    seed: Seed = 0,
    strict: Strict = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Score any number of recipes on tasks, in one read of the weights. Writes no checkpoint."""
    with open_terminal(quiet=quiet, as_json=as_json) as terminal:
        options = _study_options(max_memory, device, threads, compile_, spill, seed, strict)
        from streammerge import analysis_report
        from streammerge.study.evaluation import evaluate as run_evaluate

        with terminal.steps() as steps:
            found = run_evaluate(recipes, tasks, split, options, _Student(terminal, steps), work=scores)
        terminal.table("scores", analysis_report.score_table(found.rows, [name for name, _ in found.tasks]))
        terminal.event("scores", analysis_report.evaluation_json(found))


@app.command()
def verify(out: OutPath, as_json: Json = False) -> None:
    """Read a finished OUT again and compare every byte with its checksums; name what is wrong."""
    with open_terminal(as_json=as_json) as terminal:
        from streammerge import report
        from streammerge.run.check import verify as run_verify

        with terminal.steps() as steps:
            steps.stage("reading what was written")
            verdict = run_verify(out, steps.progress)
        terminal.rows("verify", report.verdict_rows(verdict))
        terminal.event("verified", {"tensors": verdict.tensors, "bytes": verdict.nbytes, "problems": verdict.problems})
        if verdict.problems:
            raise VerificationFailed("\n".join(verdict.problems))


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="A checkpoint directory, or one safetensors file.")],
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor.")] = False,
    health: Annotated[bool, typer.Option("--health", help="Read it all: NaN, zeros, duplicates.")] = False,
    max_memory: MaxMemory = None,
    as_json: Json = False,
) -> None:
    """Show what the checkpoint at PATH holds: files, tensors, dtypes, shapes, sizes, layers, vocabulary.

    Reads headers only, unless --health is asked for.
    """
    with open_terminal(as_json=as_json) as terminal:
        memory = None if max_memory is None else parse_size(max_memory, flag="--max-memory")
        from streammerge import report
        from streammerge.run.inspection import inspect as run_inspect

        found = run_inspect(path.expanduser())
        checked = _health(terminal, found, memory, silent=as_json) if health else None
        if as_json:
            more = {} if checked is None else {"health": report.health_json(checked)}
            terminal.document(report.inspection_json(found) | more)
            return
        terminal.rows("inspect", report.inspection_rows(found))
        if tensors:
            width = max(len(spec.name) for spec in found.tensors)
            terminal.lines([f"{spec.name:<{width}}  {spec.dtype:<5} {list(spec.shape)}" for spec in found.tensors])
        if checked is not None:
            terminal.rows("health", report.health_rows(checked))


def _health(terminal: Terminal, found: Inspection, memory: int | None, *, silent: bool) -> Health:
    from streammerge.run.health import check_health
    from streammerge.run.merge import stop_signals

    def unheard(done: float, total: float) -> None:
        pass

    with terminal.steps() as steps, stop_signals() as stopping:
        if not silent:
            steps.stage("reading all weights")
        progress = unheard if silent else steps.progress
        return check_health(found.checkpoint, max_memory=memory, stopping=stopping, progress=progress)


@app.command()
def diff(
    first: Annotated[str, typer.Argument(metavar="A", help="A model, named as in a recipe.")],
    second: Annotated[str, typer.Argument(metavar="B", help="Another of the same shapes.")],
    base: Annotated[
        str | None, typer.Option("--base", metavar="C", help="Compare their deltas from this, too.")
    ] = None,
    tensors: Annotated[
        bool, typer.Option("--tensors", help="A row for every tensor, not only for every layer.")
    ] = False,
    heatmap: Annotated[
        Path | None, typer.Option("--heatmap", metavar="FILE.html", help="Draw layers by kinds of tensors as a page.")
    ] = None,
    max_memory: MaxMemory = None,
    threads: Threads = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Compare models A and B layer by layer: size of the difference, cosine, share of changed elements.

    With a base C also how their deltas lie to each other, and the share of elements they move in opposite directions.
    """
    with open_terminal(quiet=quiet, as_json=as_json) as terminal:
        memory = None if max_memory is None else parse_size(max_memory, flag="--max-memory")
        from streammerge import difference_report
        from streammerge.run.difference import compare
        from streammerge.storage.sink import write_file

        with terminal.steps() as steps:
            steps.stage(f"comparing {first} and {second}")
            found = compare(
                first, second, base, max_memory=memory, threads=threads, note=terminal.note, progress=steps.progress
            )
        for warning in found.warnings:
            terminal.note(warning)
        if heatmap is not None:
            write_file(heatmap, difference_report.difference_page(found).encode())
        if as_json:
            terminal.event("diff", difference_report.difference_json(found))
            return
        terminal.table("diff", difference_report.difference_table(found, tensors=tensors))
        terminal.rows("diff", difference_report.difference_rows(found))


@app.command()
def methods(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="One method, to be shown whole.")] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="All of them as a page.")] = False,
    as_json: Json = False,
) -> None:
    """List the merge methods, or show what NAME does: formula, parameters, passes, source."""
    with open_terminal(as_json=as_json) as terminal:
        from streammerge import methods_report
        from streammerge.methods import METHODS
        from streammerge.plan.document import nearest

        if name is not None and name not in METHODS:
            advice = nearest(name, list(METHODS)) or f" There are {', '.join(METHODS)}."
            raise UserError(f"{name!r} is no method here.{advice}")
        chosen = list(METHODS.values()) if name is None else [METHODS[name]]
        if as_json:
            terminal.document({method.name: methods_report.method_json(method) for method in chosen})
        elif markdown:
            typer.echo(methods_report.methods_page(), nl=False)
        elif name is None:
            terminal.rows("methods", methods_report.method_list())
            terminal.lines(["", "One of them whole: streammerge methods NAME"])
        else:
            terminal.lines([name, "", *methods_report.method_text(chosen[0]).splitlines(), ""])
            terminal.rows(name, methods_report.method_rows(chosen[0]))
            terminal.table("parameters", methods_report.parameter_table(chosen[0]), numbers=False)


@app.command()
def schema() -> None:
    """Print the recipe language as JSON Schema, for editors to check and complete recipes with."""
    import json

    from streammerge.plan.schema import recipe_schema

    typer.echo(json.dumps(recipe_schema(), indent=2, ensure_ascii=False))


@app.command()
def clean(
    out: OutPath,
    remove: Annotated[bool, typer.Option("--remove", help="Remove them; without it they are only listed.")] = False,
) -> None:
    """List what an abandoned merge left in OUT, or remove it."""
    with open_terminal() as terminal:
        from streammerge.run.output import clean as run_clean

        files = run_clean(out, remove=remove)
        terminal.lines([f"{'removed' if remove else 'left over'}  {file}" for file in files] or ["nothing left over"])


for verb in cluster_verbs.VERBS:
    app.command()(verb)
app.command()(moe)
app.command("extract-lora")(extract_lora)


@app.command()
def demo(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Where to write it.")] = Path("streammerge-demo"),
) -> None:
    """Merge the tiny trained models that ship with the package by several methods, and let them speak."""
    with open_terminal() as terminal:
        options = make_options(None, None, "cpu", "5GB", None, "off", 0, False, False)
        from streammerge import report
        from streammerge.demo import PROMPTS, unpack
        from streammerge.run.check import verify as run_verify
        from streammerge.run.merge import merge as run_merge
        from streammerge.study.completion import can_run_models, complete

        made = unpack(directory)
        terminal.lines([f"Three tiny models and four recipes are in {directory}. One of them, ties.yaml:", ""])
        terminal.lines([f"    {line}" for line in made.recipes["ties"].read_text().splitlines()])
        merged = {}
        for method, recipe in made.recipes.items():
            merged[method] = directory / f"merged-{method}"
            terminal.lines(["", f"$ streammerge {recipe} {merged[method]}"])
            began = time.perf_counter()
            done = run_merge(recipe, merged[method], options, Watcher(terminal))
            terminal.rows("done", report.report_rows(done, time.perf_counter() - began))
        terminal.lines(["", f"$ streammerge verify {merged['ties']}"])
        terminal.rows("verify", report.verdict_rows(run_verify(merged["ties"])))
        if not can_run_models():
            terminal.lines(["", "To analyse the models and hear them speak: pip install 'streammerge[eval]'"])
            return
        from streammerge.study.evaluation import evaluate as run_evaluate
        from streammerge.study.workbench import StudyOptions

        merged["hi_merging"] = directory / "merged-hi_merging"
        terminal.lines(["", "Hi-Merging finds its parameters on dev questions first. Its recipe, hi_merging.yaml:", ""])
        terminal.lines([f"    {line}" for line in made.hi_merging.read_text().splitlines()])
        terminal.lines(["", f"$ streammerge {made.hi_merging} {merged['hi_merging']}"])
        began = time.perf_counter()
        decided = _analysed(terminal, made.hi_merging, merged["hi_merging"], options, None)
        done = run_merge(decided, merged["hi_merging"], options, Watcher(terminal))
        terminal.rows("done", report.report_rows(done, time.perf_counter() - began))
        scored = [*made.models.values(), *made.recipes.values(), merged["hi_merging"]]
        terminal.lines(["", f"$ streammerge eval {' '.join(map(str, scored))} --tasks {made.tasks} --split test"])
        with terminal.steps() as steps:
            found = run_evaluate(scored, made.tasks, "test", StudyOptions(), _Student(terminal, steps))
        from streammerge.analysis_report import score_table

        terminal.table("scores", score_table(found.rows, [name for name, _ in found.tasks]))
        prompts = list(PROMPTS.values())
        for name, path in {**made.models, **merged}.items():
            answers = complete(path, prompts)
            terminal.lines(["", name])
            terminal.lines([f"    {prompt}{answer}" for prompt, answer in zip(prompts, answers, strict=True)])


def _merge_over_dask(terminal: Terminal, recipe: Path, out: Path, options: Options, where: str,
                     workers: int) -> Report:  # fmt: skip
    from streammerge import cluster_report
    from streammerge.cluster.dask import dask_executor
    from streammerge.cluster.executor import merge_over

    with dask_executor(where, workers) as executor, terminal.steps() as steps:
        steps.stage(f"merging over Dask, {where}")
        done = merge_over(executor, recipe, out, options, terminal.note, steps.progress)
    if done.workers:
        terminal.table("workers", cluster_report.workers_table(done.workers))
    return done.report


class _Student:
    """Tells a terminal how a study goes."""

    def __init__(self, terminal: Terminal, steps: Steps) -> None:
        self.note = terminal.note
        self.stage = steps.stage
        self.progress = steps.progress


def _analysed(terminal: Terminal, recipe: Path, out: Path, options: Options, spill: Path | None) -> Path:
    """The recipe to merge: as given, or if its parameters are to be found first, the one an analysis decides on."""
    from streammerge.plan.recipe import load_recipe

    if not load_recipe(recipe, strict=options.strict).is_analysed:
        return recipe
    _needs_transformers()
    from streammerge.study.analysis import analysis_folder, decided_for_merge, decided_path
    from streammerge.study.workbench import StudyOptions

    work = analysis_folder(out)
    how = StudyOptions(options.max_memory, options.device, options.threads, options.compile, spill, options.seed,
                       options.strict)  # fmt: skip
    with terminal.steps() as steps:
        findings = decided_for_merge(recipe, out, work, how, _Student(terminal, steps), options.shard_bytes,
                                     verified=options.verify_inputs)  # fmt: skip
    _show_findings(terminal, findings, work)
    return decided_path(work)


def _plan_before_analysis(recipe: Path, options: Options) -> tuple[Plan, list[str]] | None:
    """The plan of a recipe whose parameters are still to be found, and what finding them takes; else None."""
    from streammerge.plan.recipe import load_recipe

    if not load_recipe(recipe, strict=options.strict).is_analysed:
        return None
    _needs_transformers()
    from streammerge.study.analysis import foresee
    from streammerge.study.workbench import StudyOptions

    how = StudyOptions(options.max_memory, "cpu", options.threads, "off", None, options.seed, options.strict)
    return foresee(recipe, how, options.shard_bytes)


def _show_findings(terminal: Terminal, findings: Findings | ProxyFindings, work: Path) -> None:
    """Tables on the terminal, report files in `work`."""
    from streammerge import analysis_report
    from streammerge.study.analysis import ProxyFindings

    if isinstance(findings, ProxyFindings):
        facts = analysis_report.proxy_json(findings)
        terminal.table("conflicts", analysis_report.proxy_table(findings))
    else:
        facts = analysis_report.analysis_json(findings)
        for title, table in analysis_report.analysis_tables(findings).items():
            terminal.table(title, table)
    files = analysis_report.write_report(facts, work)
    rows = [("verdict", findings.verdict), ("report", ", ".join(map(str, files)))]
    if not isinstance(findings, ProxyFindings):
        rows.append(("cost", analysis_report.cost_text(findings.facts)))
    terminal.rows("analysis", rows)
    terminal.event("analysis", facts)


def _needs_transformers() -> None:
    from streammerge.study.completion import can_run_models

    if not can_run_models():
        raise UserError("Running models needs transformers: pip install 'streammerge[eval]'")


def _study_options(max_memory: str | None, device: str, threads: int | None,
                   compile_: Literal["auto", "on", "off"], spill: Path | None, seed: int,
                   strict: bool) -> StudyOptions:  # fmt: skip
    size = None if max_memory is None else parse_size(max_memory, flag="--max-memory")
    _needs_transformers()
    from streammerge.study.workbench import StudyOptions

    return StudyOptions(size, device, threads, compile_, spill, seed, strict)


def main() -> None:
    """The command `streammerge`. Ends the process with an exit code of base/errors.py."""
    # Importing torch makes half a million objects that stay: looking through them as they come took 0.12 s. A plan of
    # 45,000 tensors makes more, which stay as well: a third of its time.
    gc.set_threshold(50_000, 20, 50)
    # Threads need a fraction of the usual 8 MB, all of which count where `ulimit -d` is set.
    threading.stack_size(2 << 20)
    choose_numpy_code()
    arguments = sys.argv[1:]
    verbs = {command.name or command.callback.__name__ for command in app.registered_commands if command.callback}
    # `streammerge RECIPE OUT`: the verb is left out. Flags may come first.
    words = [argument for argument in arguments if not argument.startswith("-")]
    if words and not verbs & set(arguments) and not {"--version"} & set(arguments):
        arguments = ["merge", *arguments]
    _leave(_run(arguments))


# What is wrong with a command line. typer brings a click of its own, or uses the one that is installed.
_COMMAND_LINE_ERROR: Any = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")


def _run(arguments: list[str]) -> int:
    try:
        code = typer.main.get_command(app).main(arguments, prog_name="streammerge", standalone_mode=False)
    except typer.Abort:
        return Stopped.exit_code
    except _COMMAND_LINE_ERROR as error:
        error.show()
        return UserError.exit_code
    return code if isinstance(code, int) else 0


def _leave(code: int) -> None:
    """End the process without taking torch apart piece by piece: that takes 0.2 s and frees nothing of worth."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
