"""The board: which cell comes next, which learning rate a method got, and what is left."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from methods.cells import Cell, Result, Store, Want
from methods.table import Grid, Table


@dataclass(frozen=True, slots=True)
class Chosen:
    """A method's learning rate on a task. scores: dev quality by rate, None where training diverged. edge: the best rate tried is
    the first or the last of them, so a better one may lie beyond."""

    rate: float
    scores: dict[float, float | None]
    edge: bool


def further_rate(rates: Sequence[float], scores: dict[float, float | None], extend: int) -> float | None:
    """The rate to try beyond the grid: one step on where the best is at an end of what was tried, at most `extend` times."""
    tried = sorted(scores)
    if len(tried) < 2 or len(tried) - len(rates) >= extend or best_rate(scores) is None:
        return None
    best = best_rate(scores)
    if best == tried[-1]:
        return _round(tried[-1] ** 2 / tried[-2])
    return _round(tried[0] ** 2 / tried[1]) if best == tried[0] else None


def best_rate(scores: dict[float, float | None]) -> float | None:
    """The rate of the highest score; of equal ones the middle one. None where all diverged."""
    found = [score for score in scores.values() if score is not None]
    if not found:
        return None
    best = sorted(rate for rate, score in scores.items() if score == max(found))
    return best[(len(best) - 1) // 2]


def _round(rate: float) -> float:
    return float(f"{rate:.3g}")


class Board:
    """What is done of a table's cells, and what comes next."""

    def __init__(self, table: Table, store: Store, wants: Sequence[Want]) -> None:
        self.table, self.store, self.wants = table, store, list(wants)
        self.closed: dict[tuple[str, str], str] = {}

    def next(self, running: Iterable[Cell] = ()) -> Cell | None:
        """The first cell that can be run now and is not running; None where all that is left waits for one that is."""
        busy = set(running)
        for want in self.wants:
            for cell in self._open(want):
                if cell not in busy:
                    return cell
        return None

    def left(self) -> list[Cell]:
        """Cells that are still to be run, as far as it is known: where the rate is not yet chosen, the final one with the grid's
        middle rate stands for itself."""
        return list(dict.fromkeys(cell for want in self.wants for cell in self._left(want)))

    def refusal(self, task: str, method: str) -> str:
        """Why a task's base cannot carry a method, or the task cannot be run at all; empty where it can, or was not tried yet."""
        if closed := self.closed.get((task, method)):
            return closed
        rates = self.table.methods[method].rates
        tried = [self._rate_cell(task, method, rate) for rate in rates]
        if len(rates) == 1:
            tried = [Cell(want, "final", rates[0]) for want in self.wants if (want.task, want.method) == (task, method)]
        results = [result for cell in tried if (result := self.store.get(cell)) is not None]
        return next((str(result["refused"]) for result in results if "refused" in result), "")

    def close(self, task: str, method: str, reason: str) -> None:
        """Note that a method cannot be run on a task now; another run tries again."""
        self.closed[task, method] = reason

    def tried(self, task: str, method: str) -> list[Cell]:
        """The cells that the method's rate is chosen from, as far as they are done, rates rising."""
        if len(self.table.methods[method].rates) == 1:
            return []
        given, extend = self.table.methods[method].rates, self._grid(task).extend
        rates = list(given)
        while all(self.store.get(self._rate_cell(task, method, rate)) for rate in rates):
            more = further_rate(given, self._scores(task, method, rates), extend)
            if more is None:
                break
            rates.append(more)
        cells = [self._rate_cell(task, method, rate) for rate in sorted(rates)]
        return [cell for cell in cells if self.store.get(cell) is not None]

    def chosen(self, task: str, method: str) -> Chosen | None:
        """The method's rate on the task, None while rates are being tried, or where none works."""
        rates = self.table.methods[method].rates
        if self.refusal(task, method) or self._rates_left(task, method):
            return None
        if len(rates) == 1:
            return Chosen(rates[0], {}, False)
        scores = self._scores(task, method, [cell.rate for cell in self.tried(task, method)])
        rate = best_rate(scores)
        return None if rate is None else Chosen(rate, scores, rate in (min(scores), max(scores)))

    def final(self, want: Want) -> Cell | None:
        """The cell of a want with its rate, None while that is not known."""
        chosen = self.chosen(want.task, want.method)
        return None if chosen is None else Cell(want, "final", chosen.rate)

    def result(self, want: Want) -> Result | None:
        """The result of a want, None where it has none."""
        cell = self.final(want)
        return None if cell is None else self.store.get(cell)

    def _open(self, want: Want) -> list[Cell]:
        """Cells of a want that can be run now."""
        if self.refusal(want.task, want.method):
            return []
        trying = self._rates_left(want.task, want.method)
        if trying:
            return trying
        cell = self.final(want)
        return [cell] if cell is not None and self.store.get(cell) is None else []

    def _left(self, want: Want) -> list[Cell]:
        if self.refusal(want.task, want.method):
            return []
        trying = self._rates_left(want.task, want.method)
        if not trying:
            return self._open(want)
        rates = self.table.methods[want.method].rates
        return [*trying, Cell(want, "final", rates[len(rates) // 2])]

    def _rates_left(self, task: str, method: str) -> list[Cell]:
        """Cells that must be run before the method's rate on the task is known."""
        rates = self.table.methods[method].rates
        if len(rates) == 1:
            return []
        open_ones = [cell for rate in rates if self.store.get(cell := self._rate_cell(task, method, rate)) is None]
        if open_ones:
            return open_ones
        scores = self._scores(task, method, [cell.rate for cell in self.tried(task, method)])
        more = further_rate(rates, scores, self._grid(task).extend)
        return [] if more is None or more in scores else [self._rate_cell(task, method, more)]

    def _scores(self, task: str, method: str, rates: Iterable[float]) -> dict[float, float | None]:
        """Dev quality by rate; None where training went wrong."""
        return {rate: (self.store.get(self._rate_cell(task, method, rate)) or {}).get("quality") for rate in rates}

    def _rate_cell(self, task: str, method: str, rate: float) -> Cell:
        grid = self._grid(task)
        return Cell(Want(task, grid.size, method, grid.seed), "rate", rate)

    def _grid(self, task: str) -> Grid:
        return self.table.tasks[task].grid


class Estimate:
    """Seconds that cells take, learnt from those that are done."""

    def __init__(self, table: Table) -> None:
        self.table = table
        self._seen: dict[tuple[str, ...], list[float]] = {}

    def learn(self, cell: Cell, seconds: float) -> None:
        """Note how long a cell took."""
        for group in self._groups(cell):
            self._seen.setdefault(group, []).append(seconds / self._rows(cell))

    def seconds(self, cell: Cell) -> float | None:
        """What a cell will take, from the most similar ones; None before any is done."""
        for group in self._groups(cell):
            if group in self._seen:
                return statistics.fmean(self._seen[group]) * self._rows(cell)
        return None

    def all(self, cells: Iterable[Cell], at_once: int) -> float | None:
        """What cells will take together; None before any is done."""
        each = [self.seconds(cell) for cell in cells]
        return None if None in each else sum(second for second in each if second is not None) / at_once

    def _groups(self, cell: Cell) -> list[tuple[str, ...]]:
        want = cell.want
        alike = [(want.task, cell.kind, want.size, want.method), (want.task, cell.kind, want.size)]
        return [*alike, (want.task, cell.kind), (want.task,), ()]

    def _rows(self, cell: Cell) -> int:
        budget = cell.budget(self.table)
        return budget.steps * budget.batch
