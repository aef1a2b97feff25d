"""The comparison as one HTML page that opens offline: pictures of quality against each cost, and the tables."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from methods.board import Board
from methods.summary import Absent, Line
from tunesmith.report.figures import Axis, Tick, axis
from tunesmith.report.numbers import Scale, duration, memory, parameters, signed

WIDTH, HEIGHT = 440, 300
"""Of a picture's drawing area, in its own units; words are 11 high."""

LETTER, TALL = 5.9, 11.0
PERCENT = Scale("quality", True)


@dataclass(frozen=True, slots=True)
class Label:
    """Where a point's name stands. anchor: start, middle or end, as in SVG."""

    x: float
    y: float
    anchor: str


@dataclass(frozen=True, slots=True)
class Point:
    """A method. low, high: its interval. label: none where there is no room. best: no cheaper method is as good."""

    name: str
    words: str
    x: float
    y: float
    low: float
    high: float
    label: Label | None
    best: bool


@dataclass(frozen=True, slots=True)
class Picture:
    """Quality against one cost. front: the best methods joined, from cheap to dear, as SVG points."""

    title: str
    x: Axis
    y: Axis
    points: tuple[Point, ...]
    front: str


@dataclass(frozen=True, slots=True)
class CostAxis:
    """A cost that is drawn. log: on a scale of powers of ten; what costs nothing then stands at the left end."""

    title: str
    of: Callable[[Line], float]
    words: Callable[[float], str]
    log: bool


def size(count: float) -> str:
    """Bytes for people."""
    return f"{count / 2**10:.0f} kB" if count < 2**20 else memory(count / 2**20)


AXES = (
    CostAxis("Trained values", lambda line: line.cost.trainable, lambda value: parameters(round(value)), True),
    CostAxis("Stored, bytes", lambda line: line.cost.stored, size, True),
    CostAxis("Training, processor seconds", lambda line: line.cost.train_seconds, duration, False),
    CostAxis("Highest memory while training, MB", lambda line: line.cost.peak_mb, memory, False),
    CostAxis("Forgetting: rise of the base's own loss, nats", lambda line: line.forgetting, lambda value: signed(value, 3), False),
    CostAxis("FLOP a token more, where not merged", lambda line: line.cost.flops, lambda value: parameters(round(value)), True),
)


def picture(lines: Sequence[Line], cost: CostAxis) -> Picture:
    """All methods of a task and size against one cost."""
    values = [cost.of(line) for line in lines]
    x = log_axis(values) if cost.log else _along(values)
    y = axis(min(line.low for line in lines), max(line.high for line in lines), scale=PERCENT)
    place = [_place(value, x, cost.log) for value in values]
    best = frontier([(value, line.quality) for value, line in zip(values, lines, strict=True)])
    raw = [(place[index], _up(y, line.quality)) for index, line in enumerate(lines)]
    labels = placed([line.method for line in lines], raw, first=best)
    points = tuple(
        Point(
            name=line.method,
            words=f"{line.method}: {100 * line.quality:.1f} % ({100 * line.low:.1f} to {100 * line.high:.1f}), {cost.words(value)}",
            x=raw[index][0],
            y=raw[index][1],
            low=_up(y, line.low),
            high=_up(y, line.high),
            label=labels[index],
            best=index in best,
        )
        for index, (line, value) in enumerate(zip(lines, values, strict=True))
    )
    return Picture(cost.title, x, y, points, " ".join(f"{raw[index][0]:g},{raw[index][1]:g}" for index in best))


def frontier(points: Sequence[tuple[float, float]]) -> list[int]:
    """Points that no other beats in quality at the same cost or less, from cheap to dear. points: (cost, quality)."""
    order = sorted(range(len(points)), key=lambda index: (points[index][0], -points[index][1]))
    found: list[int] = []
    for index in order:
        if not found or points[index][1] > points[found[-1]][1]:
            found.append(index)
    return found


def log_axis(values: Sequence[float]) -> Axis:
    """Powers of ten that hold all values above zero; low and high are exponents."""
    positive = [math.log10(value) for value in values if value > 0] or [0.0]
    low, high = math.floor(min(positive) + 1e-9), math.ceil(max(positive) - 1e-9)
    high = max(high, low + 1)
    every = max(1, math.ceil((high - low) / 6))
    ticks = tuple(Tick(round(100 * (n - low) / (high - low), 2), _power(n)) for n in range(low, high + 1, every))
    return Axis(float(low), float(high), ticks)


def _power(exponent: int) -> str:
    return f"{10**exponent:,}" if 0 <= exponent < 5 else "10" + "".join("⁰¹²³⁴⁵⁶⁷⁸⁹"[int(d)] if d != "-" else "⁻" for d in str(exponent))


def _along(values: Sequence[float]) -> Axis:
    low, high = min(values), max(values)
    return axis(min(0.0, low) if low < 0.6 * high or low < 0 else low, high, target=5)


def _place(value: float, x: Axis, log: bool) -> float:
    at = x.at(math.log10(value) if value > 0 else x.low) if log else x.at(value)
    return round(at * WIDTH / 100, 1)


def _up(y: Axis, value: float) -> float:
    return round((100 - y.at(value)) * HEIGHT / 100, 1)


def placed(names: Sequence[str], points: Sequence[tuple[float, float]], *, first: Sequence[int] = ()) -> list[Label | None]:
    """A place for each name beside its point where it covers no other name or point; none where there is no such place.

    first: points whose names are placed before the others'.
    """
    taken = [(x - 3.5, y - 3.5, x + 3.5, y + 3.5) for x, y in points]
    out: list[Label | None] = [None] * len(names)
    for index in [*first, *(index for index in range(len(names)) if index not in set(first))]:
        x, y = points[index]
        wide = LETTER * len(names[index])
        for label, box in _places(x, y, wide):
            inside = box[0] >= -4 and box[2] <= WIDTH + 60 and box[1] >= -12 and box[3] <= HEIGHT + 4
            others = [other for number, other in enumerate(taken) if number != index]
            if inside and not any(_overlap(box, other) for other in others):
                out[index] = label
                taken.append(box)
                break
    return out


def _places(x: float, y: float, wide: float) -> list[tuple[Label, tuple[float, float, float, float]]]:
    """Right of a point, left of it, above and below, and the corners: where the words begin, and the box they fill."""
    found = []
    for dx, dy, anchor in ((7, 4, "start"), (-7, 4, "end"), (0, -8, "middle"), (0, 17, "middle"), (6, -6, "start"), (6, 14, "start"),
                           (-6, -6, "end"), (-6, 14, "end")):  # fmt: skip
        left = x + dx - {"start": 0.0, "middle": wide / 2, "end": wide}[anchor]
        box = (left, y + dy - TALL + 2, left + wide, y + dy + 2)
        found.append((Label(round(x + dx, 1), round(y + dy, 1), anchor), box))
    return found


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


@dataclass(frozen=True, slots=True)
class Section:
    """A task at a size, on the page."""

    name: str
    title: str
    budget: str
    pictures: tuple[Picture, ...]
    blocks: tuple[tuple[str, str, tuple[Line, ...]], ...]


def sections(board: Board, lines: Sequence[Line]) -> list[Section]:
    """What the page shows, in the table's order."""
    found = []
    for task_name, task in board.table.tasks.items():
        for size, budget in task.sizes.items():
            own = [line for line in lines if (line.task, line.size) == (task_name, size)]
            if not own:
                continue
            shown = [line for line in own if line.block == next(iter(board.table.references))]
            blocks = tuple(
                (block, reference, tuple(sorted((line for line in own if line.block == block), key=lambda line: -line.quality)))
                for block, reference in board.table.references.items()
                if any(line.block == block for line in own)
            )
            rows = "all samples" if budget.rows is None else f"{budget.rows:,} samples"
            pictures = tuple(picture(shown, cost) for cost in AXES) if len(shown) > 1 else ()
            words = f"{budget.steps} steps of {budget.batch} rows for every method"
            found.append(Section(f"{task_name}-{size}", f"{task.title}, {rows}", words, pictures, blocks))
    return found


def to_html(board: Board, lines: Sequence[Line], absent: Sequence[Absent], facts: Mapping[str, Any]) -> str:
    """The page. All text is escaped; it holds no script and asks for nothing."""
    from jinja2 import ChoiceLoader, Environment, FileSystemLoader, PackageLoader, StrictUndefined

    from methods.pages import absent_lines, difference, method_notes

    loaders = [FileSystemLoader(Path(__file__).parent), PackageLoader("tunesmith.report", "templates")]
    environment = Environment(
        loader=ChoiceLoader(loaders), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(duration=duration, memory=memory, parameters=parameters, signed=signed, difference=difference, size=size)
    return environment.get_template("page.html.j2").render(
        title=board.table.title,
        notes=method_notes(board, facts),
        sections=sections(board, lines),
        absent=absent_lines(absent),
        width=WIDTH,
        height=HEIGHT,
    )
