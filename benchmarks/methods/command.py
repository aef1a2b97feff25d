"""The command line of the comparison."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from methods.board import Board
from methods.cells import Store, Want, wants_of
from methods.measuring import one_thread
from methods.pages import publish, write_all
from methods.running import Runner
from methods.smoke import smoke_table
from methods.table import Table, read_table
from tunesmith.bases.hardware import hardware
from tunesmith.core.errors import SpecError, TunesmithError, unknown
from tunesmith.report.numbers import duration

HERE = Path(__file__).parent


def arguments(words: Sequence[str] | None) -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(prog="make bench-methods", description="Parameter-efficient methods, compared.")
    parser.add_argument("table", nargs="?", type=Path, default=HERE / "comparison.yaml", help="another table")
    parser.add_argument("--folder", type=Path, default=Path("runs/bench-methods"), help="where results are kept")
    parser.add_argument(
        "--only", action="append", default=[], metavar="PATTERN", help="cells TASK/SIZE/METHOD/SEED that match, as minilm/*/lora*/0"
    )
    parser.add_argument("--task", action="append", default=[], help="an opt-in task to run as well")
    parser.add_argument("--budget-hours", type=float, metavar="N", help="begin no cell that would not end within N hours")
    parser.add_argument("--at-once", type=int, default=2, help="processes, one thread each")
    parser.add_argument("--again", action="store_true", help="run cells again that failed or were refused")
    parser.add_argument("--list", action="store_true", help="only say which cells are left")
    parser.add_argument("--publish", action="store_true", help="write docs/comparison.md and benchmarks/results/methods.csv too")
    parser.add_argument("--smoke", action="store_true", help="the whole way in seconds, on tiny random models")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> int:
    """Run what is left of a table, and write its pages. 0 when all is done, 3 where the time was up."""
    given = arguments(words)
    one_thread()  # before anything is computed: a process that has worked with several threads cannot be forked
    try:
        return _run(given)
    except TunesmithError as cause:
        print(cause, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; what is done is kept, and the same command goes on.", file=sys.stderr)
        return 130


def _run(given: argparse.Namespace) -> int:
    table = smoke_table(given.folder / "smoke") if given.smoke else read_table(given.table)
    store = Store(given.folder / "cells", table)
    board = Board(table, store, chosen(table, given.only, given.task))
    if given.again:
        again(board)
    if given.list:
        print("\n".join(cell.name for cell in board.left()))
        return 0
    runner = Runner(board, given.folder, at_once=given.at_once, hours=given.budget_hours)
    done = False
    try:
        done = runner.run()
    finally:
        written = write_all(board, given.folder, {"at_once": given.at_once, "machine": machine()})
        if given.publish:
            publish(written, HERE.parent.parent)
    word = "all is done" if done else "the time is up; the same command goes on"
    print(f"{word} · {duration(runner.elapsed)} · {written['comparison.md']} · {written['comparison.html']}", file=sys.stderr)
    return 0 if done else 3


def chosen(table: Table, only: Sequence[str], tasks: Sequence[str]) -> list[Want]:
    """The cells that are asked for. Raises SpecError for a task that is not there, or where nothing matches."""
    for name in tasks:
        if name not in table.tasks:
            raise unknown("task", name, table.tasks, error=SpecError)
    wants = wants_of(table, frozenset(tasks))
    matching = [want for want in wants if not only or any(fnmatchcase(want.name, pattern) for pattern in only)]
    if not matching:
        hints = [f"Cells are named  TASK/SIZE/METHOD/SEED, for example  {wants[0].name}" if wants else "The table has no waves."]
        raise SpecError("no cell of the table is asked for.", where="--only", hints=hints)
    return matching


def again(board: Board) -> None:
    """Forget the cells that have no quality, so that they are run again."""
    for want in board.wants:
        tried = board.tried(want.task, want.method)
        final = board.final(want)
        for cell in [*tried, *([final] if final is not None else [])]:
            if "quality" not in (board.store.get(cell) or {"quality": None}):
                board.store.forget(cell)


def machine() -> str:
    """In a few words."""
    found = hardware()
    return ", ".join(str(found[key]) for key in ("cpu", "cores", "memory_total_mb") if key in found)
