"""What people see: tables, progress in bytes, errors. The only place that prints.

On a terminal there is a progress bar; otherwise a line now and then; with --json one JSON object per line on stdout
and nothing else there. Notes, errors and progress go to stderr.
"""

from __future__ import annotations

import json
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, TextIO

from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table
from rich.text import Text

from streammerge.base.units import format_seconds, format_size

# Names come from files of strangers: nothing in them may move the cursor or change colours.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
_LINE_SECONDS = 10.0


def printable(text: str) -> str:
    """`text` with control characters spelt out; line breaks and tabs stay."""
    return _CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}", text)


class Terminal:
    """Where a command's words go. Owns the log file, if there is one."""

    def __init__(self, *, quiet: bool = False, as_json: bool = False, log: Path | None = None) -> None:
        self._quiet, self._json = quiet, as_json
        self._out = Console(highlight=False, soft_wrap=True)
        self._err = Console(stderr=True, highlight=False, soft_wrap=True)
        self._log: TextIO | None = log.open("a", encoding="utf-8") if log is not None else None

    def close(self) -> None:
        if self._log is not None:
            self._log.close()

    def log(self, text: str) -> None:
        """A line for the log file only."""
        self._write_log(text)

    def note(self, text: str) -> None:
        """Something worth knowing; shown even with --quiet, as it may need action."""
        self._write_log(f"note: {text}")
        if self._json:
            self.event("note", {"text": text})
        else:
            self._err.print(Text("note: ", style="yellow").append(printable(text), style="default"))

    def error(self, text: str) -> None:
        self._write_log(f"error: {text}")
        if self._json:
            self.event("error", {"text": text})
        else:
            self._err.print(Text("error: ", style="bold red").append(printable(text), style="default"))

    def event(self, name: str, facts: Mapping[str, Any]) -> None:
        """One line of JSON on stdout, with --json only."""
        if self._json:
            sys.stdout.write(json.dumps({"event": name, **facts}, ensure_ascii=True) + "\n")
            sys.stdout.flush()

    def rows(self, title: str, rows: Sequence[tuple[str, str]]) -> None:
        """A small table of label and text."""
        for label, text in rows:
            self._write_log(f"{title}: {label}: {text}")
        if self._quiet or self._json:
            return
        self._out.print(_grid(rows), soft_wrap=False)

    def lines(self, lines: Sequence[str]) -> None:
        """Plain lines on stdout: what the user asked to see."""
        for line in lines:
            self._out.print(Text(printable(line)))

    def document(self, facts: Mapping[str, Any]) -> None:
        """One JSON document on stdout."""
        sys.stdout.write(json.dumps(facts, indent=1, ensure_ascii=True) + "\n")

    @contextmanager
    def progress(self, total: int, status: Callable[[], tuple[int, int, int]], allowed: int) -> Iterator[None]:
        """Show progress while the body runs. `status` gives bytes read, written and held; `total` is read + written."""
        show = self._show_json if self._json else self._show_bar if self._err.is_terminal else self._show_lines
        if self._quiet and not self._json:
            yield
            return
        stop = threading.Event()
        thread = threading.Thread(target=show, args=(stop, total, status, allowed), name="progress", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()

    @contextmanager
    def steps(self) -> Iterator[Steps]:
        """Show the progress of work in several stages while the body runs; the body tells how far it is."""
        steps = Steps(self, self._err, bar=self._err.is_terminal and not self._quiet and not self._json)
        try:
            yield steps
        finally:
            steps.close()

    @contextmanager
    def live(self) -> Iterator[Callable[[Sequence[tuple[str, str]], Sequence[Sequence[str]]], None]]:
        """A function that shows rows and a table in the place of those before; one below the other if no terminal."""
        if self._json:
            yield lambda rows, table: None
        elif not self._out.is_terminal:
            yield lambda rows, table: self._out.print(_grid(rows), *([_table(table)] if table else []))
        else:
            with Live(console=self._out, auto_refresh=False) as live:
                yield lambda rows, table: live.update(
                    Group(_grid(rows), *([_table(table)] if table else [])), refresh=True
                )

    def step_line(self, text: str) -> None:
        """One line about a stage that begins or goes on, on stderr."""
        self._write_log(text)
        if not self._quiet and not self._json:
            self._err.print(Text(printable(text)))

    def table(self, title: str, rows: Sequence[Sequence[str]], *, numbers: bool = True) -> None:
        """A table; the first row is its heading. Columns of `numbers` are set to the right."""
        for row in rows:
            self._write_log(f"{title}: {' | '.join(row)}")
        if self._quiet or self._json:
            return
        self._out.print(_table(rows, numbers=numbers), soft_wrap=False)

    def _show_bar(
        self, stop: threading.Event, total: int, status: Callable[[], tuple[int, int, int]], allowed: int
    ) -> None:
        columns = (
            TextColumn("merging"),
            BarColumn(bar_width=None),
            DownloadColumn(binary_units=True),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[memory]}"),
        )
        with Progress(*columns, console=self._err, transient=True) as bar:
            task = bar.add_task("merging", total=total, memory="")
            while True:
                read, written, held = status()
                done = read + written
                # A method may look more often than the plan thought.
                bar.update(task, completed=done, total=max(total, done),
                           memory=f"{format_size(held)} of {format_size(allowed)}")  # fmt: skip
                if stop.wait(0.1):
                    return

    def _show_lines(
        self, stop: threading.Event, total: int, status: Callable[[], tuple[int, int, int]], allowed: int
    ) -> None:
        began = time.monotonic()
        while not stop.wait(_LINE_SECONDS):
            read, written, held = status()
            done, seconds = read + written, time.monotonic() - began
            total = max(total, done)
            left = (total - done) * seconds / done if done else 0.0
            self._err.print(
                f"{100 * done / max(total, 1):.0f} %  {format_size(done)} of {format_size(total)}  "
                f"{format_size(done / seconds)}/s  {format_seconds(left)} left  "
                f"memory {format_size(held)} of {format_size(allowed)}"
            )

    def _show_json(
        self, stop: threading.Event, total: int, status: Callable[[], tuple[int, int, int]], allowed: int
    ) -> None:
        began = time.monotonic()
        while not stop.wait(1.0):
            read, written, held = status()
            total = max(total, read + written)
            self.event(
                "progress",
                {"bytes_read": read, "bytes_written": written, "bytes_total": total, "memory_bytes": held,
                 "limit_bytes": allowed, "seconds": round(time.monotonic() - began, 1)},
            )  # fmt: skip

    def _write_log(self, text: str) -> None:
        if self._log is not None:
            stamp = datetime.now(UTC).isoformat(timespec="seconds")
            self._log.write("".join(f"{stamp} {line}\n" for line in printable(text).splitlines()))
            self._log.flush()


class Steps:
    """Stages of work that say how far they are: a bar with the time left, lines now and then, or JSON events."""

    def __init__(self, terminal: Terminal, console: Console, *, bar: bool) -> None:
        self._terminal = terminal
        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(),
                   TextColumn("left"), TimeRemainingColumn())  # fmt: skip
        self._bar = Progress(*columns, console=console, transient=True) if bar else None
        self._task: TaskID | None = None
        self._title, self._began, self._said = "", time.monotonic(), time.monotonic()
        if self._bar is not None:
            self._bar.start()

    def stage(self, text: str) -> None:
        """A new stage begins."""
        self._title = text
        self._terminal.step_line(text)
        self._terminal.event("stage", {"text": text})

    def progress(self, done: float, total: float) -> None:
        """So much of the stage is done; called with 0 when the total is known."""
        if done == 0:
            self._began = self._said = time.monotonic()
        if self._bar is not None:
            if self._task is not None and done == 0:
                self._bar.remove_task(self._task)
                self._task = None
            if self._task is None:
                self._task = self._bar.add_task(printable(self._title)[:40], total=total)
            self._bar.update(self._task, completed=done)
            return
        now = time.monotonic()
        if done == 0 or now - self._said < _LINE_SECONDS:
            return
        self._said = now
        left = (total - done) * (now - self._began) / done
        self._terminal.step_line(f"  {100 * done / total:.0f} %, {format_seconds(left)} left")
        self._terminal.event("progress", {"share": round(done / total, 4), "seconds_left": round(left, 1)})

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()


def _grid(rows: Sequence[tuple[str, str]]) -> Table:
    """Labels and texts."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for label, text in rows:
        table.add_row(label, Text(printable(text)))
    return table


def _table(rows: Sequence[Sequence[str]], *, numbers: bool = True) -> Table:
    """A table; the first row is its heading."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for i, heading in enumerate(rows[0]):
        justify: Literal["left", "right"] = "left" if i == 0 or not numbers else "right"
        table.add_column(Text(printable(heading)), justify=justify, overflow="fold", no_wrap=i == 0)
    for row in rows[1:]:
        table.add_row(*(Text(printable(cell)) for cell in row))
    return table
