"""Rewards that read the answer's words: right answers, numbers, patterns, forms, lengths, tool calls."""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections.abc import Callable, Sequence
from typing import Any, Literal

from tunesmith.core.errors import SpecError
from tunesmith.rollout.rewarding import Scoring, reward
from tunesmith.rollout.sample import Sample

_NUMBER = re.compile(r"(?:(?<![\w.)])[-+])?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+|(?=\.\d))(?:\.\d+)?(?:[eE][-+]?\d+)?(?:\s*/\s*\d+(?:\.\d+)?)?")
_MARKED = (
    re.compile(r"(?s)<answer>(?P<said>.*?)</answer>"),
    re.compile(r"(?s)\\boxed\{(?P<said>[^{}]*)\}"),
    re.compile(r"####(?P<said>[^\n]*)"),
)
"""Where answers say which part of them counts, the last one first."""


@reward("exact")
def exact(*, field: str = "", case: bool = False, marked: bool = True) -> Scoring:
    """1 where the answer's words are those of the row's answer, else 0.

    Spaces are folded and Unicode is normalised (NFKC). field: a column that holds the right answer, else the row's own; one that holds
    a list has any of them right. case: capitals count. marked: an answer that marks its result (<answer>..</answer>, \\boxed{..},
    #### ..) is read there. Says nothing of a row without an answer.
    """

    def fold(text: str) -> str:
        folded = " ".join(unicodedata.normalize("NFKC", text).split())
        return folded if case else folded.casefold()

    def one(sample: Sample) -> float | None:
        right = _right(sample, field)
        if right is None:
            return None
        said = fold(said_in(sample.completion) if marked else sample.completion)
        return float(any(said == fold(each) for each in right))

    return _each(one)


@reward("numeric")
def numeric(*, tolerance: float = 1e-6, relative: bool = False, field: str = "", last: bool = True) -> Scoring:
    """1 where the number that the answer says is the row's, else 0.

    Read is the marked result (as in exact), else the last number, or the first with last=false: 1,234.5, -3/4, 2e3; units and the
    sign % are passed over. tolerance: largest distance; relative: as a share of the right number. Says nothing of a row whose
    answer holds no number.
    """
    if not tolerance >= 0:
        raise SpecError(f"numeric's tolerance is {tolerance}, and a distance is at least 0.")

    def one(sample: Sample) -> float | None:
        right = [number for each in _right(sample, field) or () if (number := number_in(each)) is not None]
        if not right:
            return None
        said = number_in(sample.completion, last=last)
        if said is None:
            return 0.0
        return float(any(abs(said - each) <= tolerance * (abs(each) if relative else 1.0) for each in right))

    return _each(one)


@reward("regex")
def regex(*, pattern: str, whole: bool = False, case: bool = True) -> Scoring:
    """1 where the pattern is found in the answer (whole: is all of it), else 0. case: capitals count."""
    found = _compiled(pattern, 0 if case else re.IGNORECASE)
    return _each(lambda sample: float(bool((found.fullmatch if whole else found.search)(sample.completion))))


_THINK = r"\s*<think>(?P<thought>(?:(?!</?think>|</?answer>).)*)</think>\s*<answer>(?P<said>(?:(?!</?think>|</?answer>).)*)</answer>\s*"


@reward("format")
def form(*, pattern: str = "", partial: bool = False) -> Scoring:
    """1 where the whole answer has the form <think>..</think><answer>..</answer>, both filled, else 0. pattern: another form.

    partial: without the whole form, 0.125 for each of the four marks that stands there exactly once.
    """
    if pattern and partial:
        raise SpecError("format's partial counts the marks of its own form, and pattern names another one.", hints=["Leave one out."])
    wanted = _compiled(pattern or _THINK, re.DOTALL)

    def one(sample: Sample) -> float:
        match = wanted.fullmatch(sample.completion)
        if match and (pattern or (match["thought"].strip() and match["said"].strip())):
            return 1.0
        marks = ("<think>", "</think>", "<answer>", "</answer>")
        return 0.125 * sum(sample.completion.count(mark) == 1 for mark in marks) if partial else 0.0

    return _each(one)


@reward("length")
def length(*, target: int, tolerance: int = 0, unit: Literal["tokens", "words", "characters"] = "tokens") -> Scoring:
    """1 within `tolerance` of the target length, falling evenly to 0 at one target's distance beyond it."""
    measures: dict[str, Callable[[Sample], int]] = {
        "tokens": lambda sample: len(sample.ids),
        "words": lambda sample: len(sample.completion.split()),
        "characters": lambda sample: len(sample.completion),
    }
    if unit not in measures:
        raise SpecError(f"length has no unit '{unit}'.", hints=[f"Known: {', '.join(measures)}"])
    if target < 1 or tolerance < 0:
        raise SpecError(f"length's target is at least 1 and its tolerance at least 0 (given: {target}, {tolerance}).")
    measure = measures[unit]
    return _each(lambda sample: 1.0 - min(1.0, max(0, abs(measure(sample) - target) - tolerance) / target))


@reward("tool_use")
def tool_use(*, need: bool = True) -> Scoring:
    """Share of the answer's tool calls that are well formed (a name, and a JSON object of arguments) and succeeded.

    need: an answer without calls has 0; else nothing is said of it.
    """

    def one(sample: Sample) -> float | None:
        if not sample.calls:
            return 0.0 if need else None
        good = [call for call in sample.calls if call.name and not call.failed and _is_object(call.arguments)]
        return len(good) / len(sample.calls)

    return _each(one)


def said_in(text: str) -> str:
    """The part of an answer that is marked as its result, the last one; all of it where nothing is."""
    for mark in _MARKED:
        if found := list(mark.finditer(text)):
            return found[-1]["said"]
    return text


def number_in(text: str, *, last: bool = True) -> float | None:
    """The number that a text says: in its marked result, else the last (or first) one; None where there is none."""
    found = _NUMBER.findall(said_in(text).replace("−", "-"))
    return _value(found[-1 if last else 0]) if found else None


def _value(text: str) -> float | None:
    top, _, below = text.replace(",", "").partition("/")
    try:
        value = float(top) / float(below) if below else float(top)
    except ZeroDivisionError:
        return None
    return value if math.isfinite(value) else None


def _right(sample: Sample, field: str) -> list[str] | None:
    """Right answers of a row, None where it has none. Raises SpecError for a column that no row has."""
    if not field:
        return None if sample.answer is None else [sample.answer]
    if field not in sample.fields:
        raise SpecError(f"the row has no column '{field}'.", where=sample.where, hints=[f"Its columns: {', '.join(sample.fields)}"])
    value = sample.fields[field]
    if value is None:
        return None
    return [str(each) for each in value] if isinstance(value, list | tuple) else [str(value)]


def _is_object(text: Any) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (TypeError, ValueError):
        return False


def _compiled(pattern: str, flags: int) -> re.Pattern[str]:
    try:
        return re.compile(pattern, flags)
    except re.error as cause:
        raise SpecError(f"the pattern '{pattern}' cannot be read: {cause}.") from None


def _each(one: Callable[[Sample], float | None]) -> Scoring:
    def score(samples: Sequence[Sample]) -> list[float | None]:
        return [one(sample) for sample in samples]

    return score
