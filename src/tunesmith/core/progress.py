"""Telling the user what happens: lines with a topic, and one moving line for long work.

The engine and the ladder speak to a Reporter; what it does with the words is the caller's choice.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID


class Task(Protocol):
    """A piece of long work whose progress is shown."""

    def advance(self, steps: int = 1, note: str | None = None) -> None: ...


class Reporter(Protocol):
    """Where progress goes."""

    def line(self, topic: str, text: str) -> None: ...

    @contextmanager
    def work(self, topic: str, total: int, done: int = 0) -> Iterator[Task]: ...


class _Silent:
    def advance(self, steps: int = 1, note: str | None = None) -> None:
        """Nothing to show."""


class Quiet:
    """Says nothing."""

    def line(self, topic: str, text: str) -> None:
        """Nothing to say."""

    @contextmanager
    def work(self, topic: str, total: int, done: int = 0) -> Iterator[Task]:
        yield _Silent()


class Terminal:
    """Lines and a progress bar on stderr, so that stdout stays free for results; plain lines where it is no terminal."""

    def __init__(self, console: Console | None = None) -> None:
        from rich.console import Console

        self.console = console or Console(stderr=True, highlight=False)
        self._bars: Progress | None = None

    def line(self, topic: str, text: str) -> None:
        from rich.markup import escape

        self.console.print(f"[bold cyan]{escape(f'{topic:<9}')}[/] {escape(text)}", soft_wrap=True)

    @contextmanager
    def work(self, topic: str, total: int, done: int = 0) -> Iterator[Task]:
        if not self.console.is_terminal:
            yield _Lines(self, topic, total, done)
            return
        if self._bars is not None:  # work within work gets a line of its own below
            yield from self._bar(self._bars, topic, total, done)
            return
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn("[bold cyan]{task.description:<9}"),
            BarColumn(24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(compact=True),
            TextColumn("left"),
        )
        with Progress(*columns, console=self.console, transient=True) as self._bars:
            try:
                yield from self._bar(self._bars, topic, total, done)
            finally:
                self._bars = None

    def _bar(self, bars: Progress, topic: str, total: int, done: int) -> Iterator[Task]:
        from rich.markup import escape

        identity = bars.add_task(escape(topic), total=total, completed=done, note="")
        try:
            yield _Bar(bars, identity)
        finally:
            bars.remove_task(identity)


class _Bar:
    def __init__(self, bars: Progress, task: TaskID) -> None:
        self.bars, self.task = bars, task

    def advance(self, steps: int = 1, note: str | None = None) -> None:
        from rich.markup import escape

        fields: dict[str, Any] = {} if note is None else {"note": escape(note)}
        self.bars.update(self.task, advance=steps, **fields)


class _Lines:
    """For logs: a line every 15 seconds at most, and at the end."""

    def __init__(self, terminal: Terminal, topic: str, total: int, done: int) -> None:
        self.terminal, self.topic, self.total, self.done = terminal, topic, total, done
        self.said = time.monotonic()
        self.note = ""

    def advance(self, steps: int = 1, note: str | None = None) -> None:
        self.done += steps
        self.note = self.note if note is None else note
        if self.done >= self.total or time.monotonic() - self.said > 15:
            self.said = time.monotonic()
            self.terminal.line(self.topic, f"{self.done}/{self.total} {self.note}".rstrip())
            sys.stderr.flush()
