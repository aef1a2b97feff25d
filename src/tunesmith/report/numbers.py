"""Numbers as a reader meets them: one way of writing each kind, shared by the page, the Markdown and the terminal."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from datetime import datetime, timedelta

from tunesmith.report.schema import Report

NAMES = {
    "rouge-l": "ROUGE-L",
    "rouge_l": "ROUGE-L",
    "chrf": "chrF",
    "bleu": "BLEU",
    "f1": "F1",
    "token_f1": "token F1",
    "macro_f1": "macro F1",
    "span_f1": "span F1",
}
PROPORTIONS = frozenset({"accuracy", "exact match", "exact_match"})
ABSENT = "–"
MONTHS = ["January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November", "December"]


@dataclass(frozen=True, slots=True)
class Scale:
    """How the report's metric is written: a share of questions in percent, anything else with three decimals."""

    name: str
    percent: bool

    def score(self, value: float, digits: int = 1) -> str:
        return f"{value * 100:.{digits}f} %" if self.percent else f"{value:.3f}"

    def told(self, value: float) -> str:
        """A score with what it is: "94.0 % right", "judge rating 0.612"."""
        return f"{self.score(value)} right" if self.percent else f"{self.name} {self.score(value)}"

    def bounds(self, low: float, high: float) -> str:
        """An interval without its unit: it stands beside a score that has one."""
        return f"{low * 100:.1f} to {high * 100:.1f}" if self.percent else f"{low:.3f} to {high:.3f}"

    def short_bounds(self, low: float, high: float) -> str:
        """An interval where there is little room."""
        return f"{low * 100:.0f}–{high * 100:.0f}" if self.percent else f"{low:.3f}–{high:.3f}"

    def gain(self, value: float) -> str:
        return f"{self.short_gain(value)} points" if self.percent else self.short_gain(value)

    def short_gain(self, value: float) -> str:
        """A difference beside scores of the same unit, where there is little room."""
        return signed(value * 100, 1) if self.percent else signed(value, 3)

    def gain_bounds(self, low: float, high: float) -> str:
        factor, digits = (100, 1) if self.percent else (1, 3)
        return f"{signed(low * factor, digits)} to {signed(high * factor, digits)}"

    def tick(self, value: float) -> str:
        return f"{value * 100:.10g} %" if self.percent else f"{value:.10g}"


def scale_of(report: Report) -> Scale:
    return scale_for(report.metric)


def scale_for(metric: str) -> Scale:
    """How a metric is written, by its name."""
    return Scale(NAMES.get(metric.lower(), metric.replace("_", " ")), metric.lower() in PROPORTIONS)


def signed(value: float, digits: int) -> str:
    """With a sign, and a true minus; what rounds to zero has none."""
    text = f"{abs(value):.{digits}f}"
    if float(text) == 0:
        return text
    return f"{'+' if value > 0 else '−'}{text}"


def duration(seconds: float) -> str:
    """Seconds in the unit a person would say: 42 ms, 3.2 s, 4 min 12 s, 1 h 30 min."""
    if seconds <= 0:
        return ABSENT
    if seconds < 0.9995:
        return f"{seconds * 1000:.3g} ms"
    if seconds < 59.5:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if minutes else f"{hours} h"


def count(value: float) -> str:
    """A count or a mean of counts: 1,240 · 94 · 3.4."""
    return f"{value:.1f}" if 0 < value < 10 and value != round(value) else f"{value:,.0f}"


def parameters(value: int) -> str:
    if value <= 0:
        return ABSENT
    for unit, size in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return str(value)


def memory(megabytes: float) -> str:
    if megabytes <= 0:
        return ABSENT
    return f"{megabytes / 1024:.1f} GB" if megabytes >= 1024 else f"{megabytes:.0f} MB"


def p_value(value: float) -> str:
    """`p < 0.001`, else three decimals."""
    return "p < 0.001" if value < 0.001 else f"p = {value:.3f}"


def moment(iso: str) -> str:
    """`2 March 2026, 14:05 UTC` from ISO 8601; what is no date stays as it is."""
    try:
        when = datetime.fromisoformat(iso)
    except ValueError:
        return iso
    zone = " UTC" if when.utcoffset() == timedelta(0) else ""
    return f"{when.day} {MONTHS[when.month - 1]} {when.year}, {when:%H:%M}{zone}"


def ratio(value: float, other: float, less: str, more: str) -> str:
    """How `value` stands to `other`: `85 % fewer`, `2.3 times more`, `about the same`; empty where it cannot be said.

    less, more: the words ("fewer"/"more", "faster"/"slower"). A factor is used from two upwards when it grew or is a speed.
    """
    if value <= 0 or other <= 0:
        return ""
    factor = max(value, other) / min(value, other)
    if factor < 1.05:
        return "about the same"
    word = less if value < other else more
    if less == "fewer" and value < other:
        return f"{(1 - value / other) * 100:.0f} % fewer"
    return f"{factor:.1f} times {word}" if factor < 9.95 else f"{factor:.0f} times {word}"


def bound(text: str) -> str:
    """The text with numbers tied to their units, so that no line breaks between them."""
    return re.sub(r"(?<=\d) (?=(?:%|points|GB|MB|min|ms|s|h)(?!\w))", "\u00a0", text)


def nice_step(span: float, target: int) -> float:
    """A step of 1, 2, 2.5 or 5 times a power of ten that cuts `span` into about `target` parts."""
    raw = span / target
    power = float(10 ** math.floor(math.log10(raw)))
    return next(step * power for step in (1, 2, 2.5, 5, 10) if raw <= step * power * 1.0001)
