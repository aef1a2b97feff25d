"""The geometry of the pictures: figures of the report as positions in percent, which the template draws as SVG.

Everything is placed in percent of the drawing area, so that one file is crisp at any width, on paper as on a telephone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tunesmith.report import numbers, verdict
from tunesmith.report.schema import CurvePoint, Report, Rung, Versus

LINE_POINTS = 240
HOVER_POINTS = 60
SMOOTH_FROM = 40


@dataclass(frozen=True, slots=True)
class Tick:
    at: float
    text: str


@dataclass(frozen=True, slots=True)
class Axis:
    """A number line from low to high; `at` gives a value's place in percent."""

    low: float
    high: float
    ticks: tuple[Tick, ...]

    def at(self, value: float) -> float:
        return round(min(max((value - self.low) / (self.high - self.low), 0.0), 1.0) * 100, 2)


@dataclass(frozen=True, slots=True)
class Dot:
    """One rung on the accuracy figure: the estimate, its interval, and how it compares with the best rung before it."""

    rung: Rung
    at: float
    low: float
    high: float
    recommended: bool
    versus: Versus | None
    against: str


@dataclass(frozen=True, slots=True)
class Forest:
    """Estimates with intervals, one a row. floor: what always answering the largest class would score, if known."""

    axis: Axis
    dots: tuple[Dot, ...]
    floor: float | None
    floor_at: float
    zoomed: bool


@dataclass(frozen=True, slots=True)
class Bar:
    rung: Rung
    width: float
    split: float
    text: str
    detail: str
    recommended: bool


@dataclass(frozen=True, slots=True)
class Bars:
    """One cost, a bar a rung on a common scale from zero. width: whole bar; split: its first part (prompt tokens)."""

    title: str
    parts: tuple[str, ...]
    bars: tuple[Bar, ...]


@dataclass(frozen=True, slots=True)
class Mark:
    """A point with its place and what to say about it."""

    x: float
    y: float
    text: str
    best: bool = False


@dataclass(frozen=True, slots=True)
class Curve:
    """One quantity over steps. line, smooth: SVG polyline points in a 100 x 100 box; summary: the curve in words."""

    title: str
    x: Axis
    y: Axis
    line: str
    smooth: str
    marks: tuple[Mark, ...]
    dots: bool
    summary: str


def axis(low: float, high: float, *, scale: numbers.Scale | None = None, target: int = 4) -> Axis:
    """A number line that holds low to high and begins and ends on a round number."""
    span = high - low
    if span <= 0:
        low, high, span = low - 0.5, high + 0.5, 1.0
    step = numbers.nice_step(span, target)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    values = [round(index * step, 10) for index in range(first, last + 1)]
    ends = values[0], values[-1]
    write = scale.tick if scale else (lambda value: f"{value:,.10g}")
    ticks = tuple(Tick(round((value - ends[0]) / (ends[1] - ends[0]) * 100, 2), write(value)) for value in values)
    return Axis(ends[0], ends[1], ticks)


def accuracy(report: Report) -> Forest:
    """The accuracy of every rung with its interval. From zero, unless all intervals lie within a fifth of the scale."""
    scale = numbers.scale_of(report)
    floor = largest_class(report)
    lows = [rung.ci_low for rung in report.rungs] + ([floor] if floor is not None else [])
    highs = [rung.ci_high for rung in report.rungs] + ([floor] if floor is not None else [])
    low, high = min(lows), max(highs)
    zoomed = len(report.rungs) > 1 and high - low < 0.2 and low > 0.1
    line = axis(low, high, scale=scale) if zoomed else axis(0.0, max(1.0, high), scale=scale)
    chosen = verdict.recommended(report)
    titles = {rung.name: rung.title for rung in report.rungs}
    compared = [(rung, rung.versus_best_before or rung.versus_previous) for rung in report.rungs]
    dots = tuple(
        Dot(
            rung=rung,
            at=line.at(rung.accuracy),
            low=line.at(rung.ci_low),
            high=line.at(rung.ci_high),
            recommended=rung is chosen,
            versus=versus,
            against=titles.get(versus.rung, versus.rung) if versus else "",
        )
        for rung, versus in compared
    )
    return Forest(line, dots, floor, line.at(floor) if floor is not None else 0.0, zoomed)


def largest_class(report: Report) -> float | None:
    """The share of the most frequent gold label: what always answering it would score."""
    for rung in report.rungs:
        if rung.confusion and numbers.scale_of(report).percent:
            sizes = [sum(row) for row in rung.confusion.counts]
            return max(sizes) / sum(sizes) if sum(sizes) else None
    return None


def tokens(report: Report) -> Bars:
    """Prompt and completion tokens of each rung on one scale."""
    most = max((r.prompt_tokens_per_answer + r.completion_tokens_per_answer for r in report.rungs), default=0.0) or 1.0
    chosen = verdict.recommended(report)
    bars = tuple(
        Bar(
            rung=rung,
            width=round((rung.prompt_tokens_per_answer + rung.completion_tokens_per_answer) / most * 100, 2),
            split=round(rung.prompt_tokens_per_answer / most * 100, 2),
            text=numbers.count(rung.prompt_tokens_per_answer + rung.completion_tokens_per_answer),
            detail=f"{numbers.count(rung.prompt_tokens_per_answer)} read + {numbers.count(rung.completion_tokens_per_answer)} written",
            recommended=rung is chosen,
        )
        for rung in report.rungs
    )
    return Bars("Tokens an answer", ("read (prompt)", "written (completion)"), bars)


def seconds(report: Report) -> Bars:
    """Seconds an answer of each rung on one scale."""
    most = max((rung.seconds_per_answer for rung in report.rungs), default=0.0) or 1.0
    chosen = verdict.recommended(report)
    bars = tuple(
        Bar(
            rung=rung,
            width=round(rung.seconds_per_answer / most * 100, 2),
            split=round(rung.seconds_per_answer / most * 100, 2),
            text=numbers.duration(rung.seconds_per_answer),
            detail="",
            recommended=rung is chosen,
        )
        for rung in report.rungs
    )
    return Bars("Time an answer", (), bars)


def curves(report: Report, rung: Rung) -> list[Curve]:
    """The training curves of a rung: the loss and the dev metric, each where it was recorded."""
    scale = numbers.scale_of(report)
    drawn = []
    losses = [(point.step, point.loss) for point in rung.curve if point.loss is not None and math.isfinite(point.loss)]
    if len(losses) > 1:
        drawn.append(_loss(losses, _steps(rung.curve)))
    devs = [(point.step, point.dev_metric) for point in rung.curve if point.dev_metric is not None and math.isfinite(point.dev_metric)]
    if devs:
        drawn.append(_dev(devs, _steps(rung.curve), scale))
    return drawn


def _steps(points: Sequence[CurvePoint]) -> Axis:
    return axis(0.0, float(max(max(point.step for point in points), 1)))


def _loss(values: list[tuple[int, float]], x: Axis) -> Curve:
    thinned = _thin(values)
    y = axis(0.0 if min(value for _, value in thinned) >= 0 else min(value for _, value in thinned), max(value for _, value in thinned))
    smooth = _smooth(thinned) if len(thinned) >= SMOOTH_FROM else []
    shown = smooth or thinned
    every = max(1, math.ceil(len(shown) / HOVER_POINTS))
    marks = tuple(Mark(x.at(step), 100 - y.at(value), f"step {step:,}: {value:.3f}") for step, value in shown[::every])
    (first_step, first), (last_step, last) = shown[0], shown[-1]
    summary = f"Training loss goes from {first:.3f} at step {first_step:,} to {last:.3f} at step {last_step:,}."
    return Curve("Training loss", x, y, _points(thinned, x, y), _points(smooth, x, y), marks, False, summary)


def _dev(values: list[tuple[int, float]], x: Axis, scale: numbers.Scale) -> Curve:
    y = axis(min(value for _, value in values), max(value for _, value in values), scale=scale)
    top = max(values, key=lambda item: item[1])
    marks = tuple(
        Mark(
            x.at(step),
            100 - y.at(value),
            f"step {step:,}: {scale.score(value)}{', best' if (step, value) == top else ''}",
            (step, value) == top,
        )
        for step, value in values
    )
    summary = f"Dev {scale.name} is best at step {top[0]:,} with {scale.score(top[1])}."
    return Curve(f"Dev {scale.name}", x, y, _points(values, x, y), "", marks, len(values) <= HOVER_POINTS, summary)


def _thin(values: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """At most LINE_POINTS points: means over equal stretches of steps, each at its last step."""
    stretch = math.ceil(len(values) / LINE_POINTS)
    parts = [values[start : start + stretch] for start in range(0, len(values), stretch)]
    return [(part[-1][0], sum(value for _, value in part) / len(part)) for part in parts]


def _smooth(values: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """A centred moving mean over a tenth of the run: follows the trend without lagging behind it."""
    reach = max(1, len(values) // 20)
    smoothed = []
    for index, (step, _) in enumerate(values):
        near = min(reach, index, len(values) - 1 - index)
        window = values[index - near : index + near + 1]
        smoothed.append((step, sum(value for _, value in window) / len(window)))
    return smoothed


def _points(values: Sequence[tuple[int, float]], x: Axis, y: Axis) -> str:
    return " ".join(f"{x.at(step):g},{100 - y.at(value):.2f}" for step, value in values)
