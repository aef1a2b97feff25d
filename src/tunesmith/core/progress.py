"""Telling the user what happens: lines with a topic, and one moving line for long work.

The engine and the ladder speak to a Reporter; what it does with the words is the caller's choice.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol


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

    def __init__(self) -> None:
        from rich.console import Console

        self.console = Console(stderr=True, highlight=False)

    def line(self, topic: str, text: str) -> None:
        from rich.markup import escape

        self.console.print(f"[bold cyan]{topic:<9}[/] {escape(text)}", soft_wrap=True)

    @contextmanager
    def work(self, topic: str, total: int, done: int = 0) -> Iterator[Task]:
        if not self.console.is_terminal:
            yield _Lines(self, topic, total, done)
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
        with Progress(*columns, console=self.console, transient=True) as progress:
            yield _Bar(progress, progress.add_task(topic, total=total, completed=done, note=""))


class _Bar:
    def __init__(self, progress: Any, task: Any) -> None:
        self.progress, self.task = progress, task

    def advance(self, steps: int = 1, note: str | None = None) -> None:
        fields = {} if note is None else {"note": note}
        self.progress.update(self.task, advance=steps, **fields)


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
