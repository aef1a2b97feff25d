"""Running cells: a process each, so many at once, in the board's order, until all is done or the time is up."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path

from methods.board import Board, Estimate
from methods.cells import Cell, Result, Store, Want
from methods.ground import ground
from methods.measuring import measure, one_thread
from methods.table import Table
from tunesmith.core.errors import TunesmithError
from tunesmith.report.numbers import duration

POLL = 0.02
"""Seconds between looks at what is running."""

Say = Callable[[str], None]


@dataclass(slots=True)
class Running:
    """A cell in its process."""

    cell: Cell
    process: BaseProcess
    began: float = field(default_factory=time.monotonic)


class Runner:
    """folder: of the comparison. at_once: processes. hours: after which no cell is begun that would not end in time."""

    def __init__(self, board: Board, folder: Path, *, at_once: int = 2, hours: float | None = None, say: Say | None = None) -> None:
        self.board, self.folder, self.at_once = board, folder, at_once
        self.table: Table = board.table
        self.store: Store = board.store
        self.began = time.monotonic()
        self.end = None if hours is None else self.began + 3600 * hours
        self.estimate = Estimate(self.table)
        self.say = say or (lambda line: print(line, file=sys.stderr, flush=True))
        self.running: list[Running] = []
        self.late = False
        # Forked processes have libraries and base already. Elsewhere each loads them for itself.
        self.way = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
        self._learn_from_before()

    def run(self) -> bool:
        """Run what is left. Whether all is done; False where the time was up."""
        one_thread()
        shutil.rmtree(self.folder / "work", ignore_errors=True)  # what a killed run left there
        try:
            while True:
                self._collect()
                while len(self.running) < self.at_once and (cell := self._next()) is not None:
                    self._start(cell)
                if not self.running:
                    return not self.late
                time.sleep(POLL)
        finally:
            for one in self.running:
                one.process.terminate()

    def _next(self) -> Cell | None:
        """The cell to begin now; None where all that is left waits for one that is running, or the time is up."""
        cell = None if self.late else self.board.next(one.cell for one in self.running)
        if cell is not None and not self._in_time(cell):
            self.late, cell = True, None
        return cell

    @property
    def elapsed(self) -> float:
        """Seconds since it was made."""
        return time.monotonic() - self.began

    def _in_time(self, cell: Cell) -> bool:
        seconds = self.estimate.seconds(cell) or 0.0
        return self.end is None or time.monotonic() + seconds < self.end

    def _start(self, cell: Cell) -> None:
        method = self.table.methods[cell.want.method]
        if self.way.get_start_method() == "fork":
            try:
                ground(self.table.tasks[cell.want.task], self.table.general, method.spec)
            except TunesmithError as cause:
                self.board.close(cell.want.task, cell.want.method, cause.what)
                self.say(f"{cell.name} cannot be run: {cause.what}")
                return
        count = cell.want.seed == _first_seed(self.board.wants, cell.want)
        process = self.way.Process(target=_in_process, args=(cell, self.table, self.folder, count, os.getpid()), daemon=True)
        process.start()
        self.running.append(Running(cell, process))

    def _collect(self) -> None:
        for one in list(self.running):
            if one.process.is_alive():
                continue
            self.running.remove(one)
            if self.store.get(one.cell) is None:
                self.store.put(one.cell, {"failed": f"its process ended with code {one.process.exitcode}", "seconds": 0.0})
            self._said(one.cell, one.began)

    def _said(self, cell: Cell, began: float) -> None:
        result = self.store.get(cell) or {}
        if "quality" in result:
            self.estimate.learn(cell, float(result["seconds"]))
        now, left = time.monotonic(), self.board.left()
        rest = self.estimate.all(left, self.at_once)
        line = f"{duration(now - self.began):>12}  {cell.name}: {outcome(result)} ({duration(now - began)})"
        if left:
            line += f" · {len(left)} cells left" + ("" if rest is None else f", about {duration(rest)}")
        self.say(line)

    def _learn_from_before(self) -> None:
        for want in self.board.wants:
            for cell in [*self.board.tried(want.task, want.method), *filter(None, [self.board.final(want)])]:
                result = self.store.get(cell)
                if result is not None and "quality" in result:
                    self.estimate.learn(cell, float(result["seconds"]))


def outcome(result: Result) -> str:
    """A result in a few words."""
    if "quality" in result:
        return f"{result['quality']:.3f}"
    return next((f"{word}: {result[word]}" for word in ("refused", "failed") if word in result), "nothing")


def _first_seed(wants: list[Want], one: Want) -> int:
    """The seed of a method's first cell, which is the one that is counted."""
    return next((want.seed for want in wants if (want.task, want.size, want.method) == (one.task, one.size, one.method)), one.seed)


def _in_process(cell: Cell, table: Table, folder: Path, count: bool, parent: int) -> None:
    """What a cell's process does. It ends when its parent does."""
    one_thread()
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    try:
        result = measure(cell, table, folder / "work", count=count)
    except Exception as cause:  # the comparison goes on without it, and its page says why
        traceback.print_exc()
        result = {"failed": f"{type(cause).__name__}: {cause}", "seconds": 0.0}
    Store(folder / "cells", table).put(cell, result)


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)
