"""The table of a comparison, read from YAML and checked: what is compared, on what, and in which order."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from tunesmith.core.errors import SpecError, unknown


class Part(BaseModel):
    """A part of the table; keys that it does not know are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Method(Part):
    """adapter: an expression. rates: the learning rates to choose from, rising. block: which table it stands in. spec: keys of
    a spec that this method needs otherwise, such as {base: {...}}."""

    adapter: str
    rates: tuple[float, ...] = Field(min_length=1)
    block: str = "methods"
    spec: dict[str, Any] = Field(default_factory=dict)

    @field_validator("rates")
    @classmethod
    def _rising(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if list(value) != sorted(set(value)) or value[0] <= 0:
            raise ValueError("learning rates are positive and rise")
        return value


class Size(Part):
    """rows: training samples, None for all there are. steps, batch: the budget that every method gets."""

    rows: int | None = None
    steps: int
    batch: int


class Grid(Part):
    """How a learning rate is chosen: trained at `size` for `share` of its steps with seed `seed`, judged on dev. extend: how many
    further rates may be tried where the best one is the first or the last."""

    size: str
    share: float = Field(default=0.3, gt=0, le=1)
    seed: int = 0
    extend: int = Field(default=1, ge=0)


class General(Part):
    """The fixed text that forgetting is measured on. text, description: columns; texts with a description of 25 characters or less
    are left out. count: of texts. tokens: what a text is cut to."""

    source: str
    text: str
    description: str
    count: int = 50
    tokens: int = 128


class Task(Part):
    """base, data, task, objective, train: as in a spec. keep_layers: a base of so many of its layers. sizes: by name. methods:
    names, or patterns of names ("!" takes out). opt_in: only when it is asked for."""

    title: str
    base: str
    keep_layers: int | None = None
    dtype: str = "fp32"
    objective: str
    data: dict[str, Any]
    task: dict[str, Any] = Field(default_factory=dict)
    train: dict[str, Any] = Field(default_factory=dict)
    sizes: dict[str, Size]
    grid: Grid
    methods: tuple[str, ...] = ("*",)
    opt_in: bool = False

    @field_validator("sizes", mode="before")
    @classmethod
    def _names(cls, value: Any) -> Any:
        return {str(name): size for name, size in value.items()} if isinstance(value, dict) else value

    @field_validator("grid", mode="before")
    @classmethod
    def _name(cls, value: Any) -> Any:
        return {**value, "size": str(value.get("size"))} if isinstance(value, dict) else value


class Wave(Part):
    """Cells that are run before those of the next wave: seed by seed, then task by task, size by size, method by method."""

    tasks: tuple[str, ...]
    sizes: tuple[str, ...]
    seeds: tuple[int, ...]
    methods: tuple[str, ...] = ("*",)

    @field_validator("sizes", mode="before")
    @classmethod
    def _names(cls, value: Any) -> Any:
        return [str(name) for name in value] if isinstance(value, list) else value


class Table(Part):
    """All of a comparison. margin: differences of quality within it count as none. references: of each block, the method that
    the others are compared with."""

    title: str
    general: General
    methods: dict[str, Method]
    tasks: dict[str, Task]
    waves: tuple[Wave, ...]
    margin: float = 0.02
    references: dict[str, str] = Field(default_factory=lambda: {"methods": "full"})

    @model_validator(mode="after")
    def _names_are_known(self) -> Table:
        for name, task in self.tasks.items():
            _known("size", [task.grid.size], task.sizes, f"tasks.{name}.grid")
            _known("method", [each for each in task.methods if not set(each) & set("*?[!")], self.methods, f"tasks.{name}.methods")
        _known("method", self.references.values(), self.methods, "references")
        _known("block", [method.block for method in self.methods.values()], self.references, "references")
        for wave in self.waves:
            _known("task", wave.tasks, self.tasks, "waves")
            for chosen in wave.tasks:
                _known("size", wave.sizes, self.tasks[chosen].sizes, f"waves, {chosen}")
        return self

    def methods_of(self, task: str, patterns: tuple[str, ...] = ("*",)) -> list[str]:
        """The methods of a task that match, in the order of the table."""
        own = self.tasks[task].methods
        return [name for name in self.methods if _matches(name, own) and _matches(name, patterns)]


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    """Whether any pattern names it; one that begins with "!" takes out what those before it let in."""
    chosen = False
    for pattern in patterns:
        if fnmatchcase(name, pattern.removeprefix("!")):
            chosen = not pattern.startswith("!")
    return chosen


def _known(kind: str, names: Any, known: Any, where: str) -> None:
    for name in names:
        if name not in known:
            raise ValueError(f"{where}: {unknown(kind, name, known, error=SpecError)}")


def read_table(path: Path) -> Table:
    """Read a table. Raises SpecError that names the file and the key."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as cause:
        raise SpecError(f"the table cannot be read: {cause}.", where=str(path)) from None
    if values is None:
        raise SpecError("the table is empty.", where=str(path))
    try:
        return Table.model_validate(values)
    except ValidationError as cause:
        said = [f"{'.'.join(map(str, each['loc'])) or 'table'}: {each['msg'].removeprefix('Value error, ')}" for each in cause.errors()]
        more = f" (and {len(said) - 2} like faults)" if len(said) > 2 else ""
        raise SpecError("; ".join(said[:2]) + more, where=str(path)) from None
