"""Cells: one training each, its content hash, and the folder of results that makes a run resumable."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from methods.table import Size, Table
from tunesmith.engine.checkpoint import write_whole

Kind = Literal["rate", "final"]
Result = dict[str, Any]

FORM = 1
"""Of a cell's file; raised when what is measured changes, so that old files are not taken for new ones."""


@dataclass(frozen=True, slots=True)
class Want:
    """A cell of the comparison before its learning rate is known."""

    task: str
    size: str
    method: str
    seed: int

    @property
    def name(self) -> str:
        """For people, and for `--only`."""
        return f"{self.task}/{self.size}/{self.method}/{self.seed}"


@dataclass(frozen=True, slots=True)
class Cell:
    """One training. kind "rate": a short one, judged on dev, that helps to choose the learning rate; "final": judged on test."""

    want: Want
    kind: Kind
    rate: float

    @property
    def name(self) -> str:
        """Name of its file, without the key."""
        tail = f"rate-{self.rate:g}" if self.kind == "rate" else f"seed-{self.want.seed}"
        return f"{self.want.task}-{self.want.size}-{self.want.method}-{tail}"

    def budget(self, table: Table) -> Size:
        """Samples, steps and batch that it trains with."""
        task = table.tasks[self.want.task]
        size = task.sizes[self.want.size]
        if self.kind == "final":
            return size
        return size.model_copy(update={"steps": max(1, round(size.steps * task.grid.share))})

    def content(self, table: Table) -> dict[str, Any]:
        """Everything that its result depends on, but for the code."""
        method = table.methods[self.want.method]
        task = table.tasks[self.want.task].model_dump(include={"base", "keep_layers", "dtype", "objective", "data", "task", "train"})
        return {
            "form": FORM,
            "kind": self.kind,
            "task": task,
            "general": table.general.model_dump() if self.kind == "final" else None,
            "method": {"adapter": method.adapter, "spec": method.spec},
            "rate": self.rate,
            "seed": self.want.seed,
            "budget": self.budget(table).model_dump(),
        }

    def key(self, table: Table) -> str:
        """Content hash of the cell and of the versions that compute it."""
        text = json.dumps([self.content(table), versions()], sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@cache
def versions() -> dict[str, str]:
    """Of what computes a cell; asked for with every cell's key, and read once."""
    return {name: _version(name) for name in ("tunesmith", "torch", "transformers", "numpy")}


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "unknown"


class Store:
    """The results of a table's cells, one file each. A file is written whole or not at all, and is never changed."""

    def __init__(self, folder: Path, table: Table) -> None:
        self.folder, self.table = folder, table
        self._read: dict[Path, Result] = {}
        self._paths: dict[Cell, Path] = {}

    def path(self, cell: Cell) -> Path:
        if cell not in self._paths:
            self._paths[cell] = self.folder / f"{cell.name}.{cell.key(self.table)}.json"
        return self._paths[cell]

    def get(self, cell: Cell) -> Result | None:
        """The result of a cell, None where it has none yet."""
        path = self.path(cell)
        if path not in self._read:
            if not path.exists():
                return None
            self._read[path] = json.loads(path.read_text(encoding="utf-8"))
        return self._read[path]

    def put(self, cell: Cell, result: Mapping[str, Any]) -> None:
        """Keep the result of a cell."""
        self.folder.mkdir(parents=True, exist_ok=True)
        named = {"name": cell.name, "want": cell.want.name, "kind": cell.kind, "rate": cell.rate, "content": cell.content(self.table)}
        write_whole(self.path(cell), json.dumps({**named, "versions": versions(), **result}, indent=1) + "\n")

    def forget(self, cell: Cell) -> None:
        """Remove the result of a cell, so that it is run again."""
        self._read.pop(self.path(cell), None)
        self.path(cell).unlink(missing_ok=True)


def wants_of(table: Table, chosen_tasks: frozenset[str] = frozenset()) -> list[Want]:
    """All cells of a table in the order in which they are worth running; each once. chosen_tasks: of the opt-in ones."""
    return list(dict.fromkeys(_ordered(table, chosen_tasks)))


def _ordered(table: Table, chosen_tasks: frozenset[str]) -> Iterator[Want]:
    for wave in table.waves:
        for seed in wave.seeds:
            for task in wave.tasks:
                if table.tasks[task].opt_in and task not in chosen_tasks:
                    continue
                for size in wave.sizes:
                    for method in table.methods_of(task, wave.methods):
                        yield Want(task, size, method, seed)
